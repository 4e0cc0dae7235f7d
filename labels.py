"""Detections written as a dataset that train.py opens again: COCO's JSON, Pascal VOC's XML or YOLO's text."""

import json
import re
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import yaml

from errors import UserError, writing

NOT_IN_XML = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\ufffe\\uffff]")


class DatasetWriter:
    """A folder with copies of images and what was detected in them, in the layout coco, voc or yolo.

    Used as a context manager, which writes the rest at its end, also after Ctrl-C. Raises UserError if the folder
    exists and is not empty.
    """

    def __init__(self, folder, layout, classes, category_ids):
        self.folder, self.layout = Path(folder), layout
        self.classes, self.category_ids = classes, category_ids
        self.images, self.annotations = [], []  # COCO's

    def __enter__(self):
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder}: already exists; delete it, or choose another --out")
        self.labels = self.folder / {"coco": ".", "voc": "annotations", "yolo": "labels"}[self.layout]
        with writing(self.folder, "; choose another --out"):
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            self.labels.mkdir(exist_ok=True)
        return self

    def add(self, path, name, size, found):
        """An image's file, a name for its copy without suffix, its (width, height) and its detections."""
        copy = self.folder / "images" / f"{name}{path.suffix}"
        with writing(copy):
            shutil.copy(path, copy)
        rows = list(zip(found["labels"].tolist(), found["boxes"].tolist()))
        if self.layout == "coco":
            self.add_coco(copy.name, size, rows)
            return
        if self.layout == "yolo":
            target, text = self.labels / f"{name}.txt", yolo_text(size, rows)
        else:
            target, text = self.labels / f"{name}.xml", voc_text(copy.name, size, rows, self.classes)
        try:
            with writing(target):
                target.write_bytes(text.encode("utf-8", "replace"))  # file names may hold what is no character
        except UserError:  # a full disk: an image without its labels would be background, half an XML stops training
            target.unlink(missing_ok=True)
            copy.unlink(missing_ok=True)
            raise

    def add_coco(self, file_name, size, rows):
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
        for label, (x1, y1, x2, y2) in rows:
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": self.category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )

    def __exit__(self, *_):
        with writing(self.folder):
            if self.layout == "coco":
                categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes)]
                content = {"images": self.images, "annotations": self.annotations, "categories": categories}
                (self.folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
            if self.layout == "yolo":
                content = {"train": "images", "names": dict(enumerate(self.classes))}
                text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
                (self.folder / "data.yaml").write_text(text, encoding="utf-8")


def yolo_text(size, rows):
    """(width, height) and [(label, (x1, y1, x2, y2))] in pixels -> the content of a label file."""
    width, height = size
    lines = []
    for label, (x1, y1, x2, y2) in rows:
        box = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        lines.append(f"{label} " + " ".join(f"{value:.7f}" for value in box) + "\n")
    return "".join(lines)


def voc_text(file_name, size, rows, classes):
    """The same -> the content of an XML file; VOC counts pixels from 1."""
    names = [escape(NOT_IN_XML.sub("?", name)) for name in classes]
    objects = "".join(
        f"  <object>\n    <name>{names[label]}</name>\n    <difficult>0</difficult>\n    <bndbox>"
        f"<xmin>{x1 + 1:.3f}</xmin><ymin>{y1 + 1:.3f}</ymin><xmax>{x2:.3f}</xmax><ymax>{y2:.3f}</ymax></bndbox>\n"
        "  </object>\n"
        for label, (x1, y1, x2, y2) in rows
    )
    sides = f"<width>{size[0]}</width><height>{size[1]}</height><depth>3</depth>"
    return f"<annotation>\n  <filename>{escape(file_name)}</filename>\n  <size>{sides}</size>\n{objects}</annotation>\n"
