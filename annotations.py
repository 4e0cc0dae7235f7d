"""Annotation files: COCO's JSON, Pascal VOC's XML, YOLO's text and its lists of classes; read and, at the end, written.

The files are not trusted: a broken or hostile one costs a message, and nothing else. layouts.py finds the files.
"""

import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from xml.sax.saxutils import escape

import yaml

from errors import UserError, writing

# What parsing raises where the content has an unexpected form
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
NO_BOX = [math.nan] * 4  # dropped and counted with the boxes that are empty, see clean_boxes
MOST_CLASSES = 10_000  # a number of a class beyond is a mistake


# Opening files without trust


def read_bytes(path):
    """The content of a regular file; pipes and devices could block for ever. Raises UserError."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path):
    """A text file in UTF-8, or in UTF-16 with its byte order mark -> str, lines ended by \\n. Raises UserError."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it in that encoding") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path):
    """The lines of a text file that are not blank, stripped. Raises UserError."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def require_inside(home, paths):
    """Raises UserError if a path, links followed, lies outside of the folder home; with home None all may."""
    if home is None:
        return
    home = os.path.realpath(home)
    real_parents = {}  # each folder is resolved once, as a large dataset has many files in few folders
    for path in paths:
        try:
            if path.parent not in real_parents:
                real_parents[path.parent] = os.path.realpath(path.parent)
            if path.name == ".." or path.is_symlink():
                real = os.path.realpath(path)
            else:
                real = os.path.join(real_parents[path.parent], path.name)
            is_outside = os.path.commonpath([home, real]) != home
        except (OSError, ValueError) as error:
            raise UserError(f"{home}: {str(path)[:200]!r} is not a valid path ({error})") from None
        if is_outside:
            raise UserError(
                f"{path}: lies outside of {home}, in {os.path.dirname(real)}; if that is intended, add --allow-outside"
            )


# COCO


def read_coco_json(path):
    """A COCO annotation file -> its content, {image id: image}, [(category id, name)] in order, {image id: rows}.

    Ids of images are strings in the latter, None for all images that are not listed; rows are as for make_record.
    Raises UserError.
    """
    try:
        data = json.loads(read_text(path))
        categories = [(require_id(c["id"]), require_string(c["name"])) for c in data["categories"]]
        categories.sort(key=id_order)
        images = {require_id(image["id"]): image for image in data["images"]}
        annotations = list(data.get("annotations") or [])
    except MALFORMED as error:
        raise UserError(f"{path}: not a COCO annotation file ({type(error).__name__}: {error})") from None
    if not categories:
        raise UserError(f"{path}: no categories")
    labels = {str(category_id): label for label, (category_id, _) in enumerate(categories)}
    rows = {str(image_id): [] for image_id in images}
    if len(labels) < len(categories) or len(rows) < len(data["images"]):
        raise UserError(f"{path}: an id is used twice in categories or images")
    for number, annotation in enumerate(annotations):
        try:
            row, image_id = coco_row(annotation, labels), str(require_id(annotation["image_id"]))
            rows.setdefault(image_id if image_id in rows else None, []).append(row)
        except MALFORMED as error:
            which = annotation.get("id", number) if isinstance(annotation, dict) else f"number {number}"
            raise UserError(
                f"{path}: annotation {which}: {type(error).__name__} {error}; bbox, category_id or image_id is wrong"
            ) from None
    return data, images, categories, rows


def coco_row(annotation, labels):
    """An annotation -> (x1, y1, x2, y2, label, area, is crowd); labels: {str of a category id: label}.

    Raises one of MALFORMED.
    """
    bbox = annotation.get("bbox")
    if bbox:
        x, y, w, h = (float(n) for n in bbox)
    elif annotation.get("segmentation"):
        x, y, w, h = segmentation_box(annotation["segmentation"])
    else:
        annotation["bbox"]  # KeyError: it has neither
        x, y, w, h = NO_BOX
    label = look_up(labels, annotation["category_id"])
    area = float(annotation.get("area") or w * h)
    return x, y, x + w, y + h, label, area, is_true(annotation.get("iscrowd"))


def segmentation_box(segmentation):
    """Polygons [[x, y, x, y, ...]] or a run-length code {size, counts} -> its box x, y, w, h.

    Raises one of MALFORMED.
    """
    if isinstance(segmentation, dict):
        return run_length_box(segmentation)
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    xs = [float(x) for polygon in polygons for x in polygon[::2]]
    ys = [float(y) for polygon in polygons for y in polygon[1::2]]
    if not xs:
        return NO_BOX
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def run_length_box(code):
    """A run-length code, compressed or not -> its box x, y, w, h. Raises one of MALFORMED."""
    from pycocotools import mask  # few datasets need it

    height, width = (int(n) for n in code["size"])
    if not (0 < height < 2**16 and 0 < width < 2**16):
        raise ValueError(f"{height} x {width} is no size of a mask")
    counts = code["counts"]
    if isinstance(counts, str):
        # pycocotools is C that trusts the text: it must end where a number ends, or it is read beyond its end
        values = [ord(character) - 48 for character in counts]
        if not all(0 <= value < 64 for value in values) or values[-1:] and values[-1] & 32:
            raise ValueError("counts is no run-length code")
        return mask.toBbox({"size": [height, width], "counts": counts.encode()}).tolist()
    counts = [int(n) for n in counts]
    if min(counts, default=0) < 0 or sum(counts) > height * width:
        raise ValueError("counts is no run-length code")
    return mask.toBbox(mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)).tolist()


def require_id(value):
    """An id of a COCO file: an integer or a string; a whole float stands for its integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{str(value)[:40]!r} is not an id")
    return value


def id_order(category):
    """Sorts (id, name) by id, numbers before words."""
    return isinstance(category[0], str), category


def look_up(table, value):
    """The entry of {str of an id: entry} for an id, be it written as a number or as a word. Raises KeyError."""
    try:
        return table[str(require_id(value))]
    except KeyError:
        raise KeyError(value) from None


def require_string(value):
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not a string")
    return value


def is_true(value):
    """A flag, which some tools write as a word."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")
    return bool(value)


# Pascal VOC


def read_voc_file(path):
    """-> (width, height), rows of (x1, y1, x2, y2, class name, area, difficult). Raises UserError."""
    content = read_bytes(path)
    try:
        if b"<!ENTITY" in content:
            raise ValueError("it defines entities, which no annotation needs")
        tree = ElementTree.fromstring(content)
        size = tuple(int(float(tree.findtext(f"size/{side}", "").strip() or 0)) for side in ("width", "height"))
        return size, [voc_row(item) for item in tree.iter("object")]
    except (ElementTree.ParseError, LookupError, *MALFORMED) as error:
        raise UserError(f"{path}: not a Pascal VOC annotation ({error})") from None


def voc_row(item):
    """An <object> element -> (x1, y1, x2, y2, class name, area, difficult). Raises one of MALFORMED."""
    x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    # VOC counts pixels from 1, both ends included; but a box whose ends coincide is a stray click, not one pixel wide.
    if x2 > x1:
        x1 -= 1
    if y2 > y1:
        y1 -= 1
    name = item.findtext("name").strip()
    difficult = item.findtext("difficult", "0").strip() == "1"
    return x1, y1, x2, y2, name, (x2 - x1) * (y2 - y1), difficult


# YOLO


def read_yolo_yaml(path):
    """data.yaml -> its content with `names` a list and `points` the numbers of a line's key points. Raises UserError.

    `points` is None unless `kpt_shape` says that the labels have any.
    """
    try:
        text = read_text(path)
        data = yaml.safe_load(text)
        written = yaml.load(text, yaml.BaseLoader)["names"]  # no, 01, which are a boolean and a number otherwise
        if isinstance(written, dict) and len(written) < len(data["names"]):
            raise ValueError("the keys of names have to be numbers, each once")
        names = class_names(written)
        if data.get("path"):
            require_string(data["path"])
        shape = data.get("kpt_shape")
        points = math.prod(int(n) for n in shape) if shape else None
        classes = data.get("nc")
        classes = classes if classes is None else int(classes)
    except (yaml.YAMLError, *MALFORMED) as error:
        raise UserError(
            f"{path}: not a YOLO data.yaml, which has names, train and val ({type(error).__name__}: {error})"
        ) from None
    if classes not in (None, len(names)):
        raise UserError(
            f"{path}: nc is {classes}, but names makes {len(names)} classes from number 0 on "
            f"({', '.join(names[:8])}); correct one"
        )
    return data | {"names": names, "points": points}


def class_names(names):
    """`names` of a data.yaml, a list, {number: name}, {name: number}, or a word -> [name]. Raises one of MALFORMED.

    Numbers keep their meaning: one that is skipped becomes a class that is called by its number.
    """
    if isinstance(names, str):
        names = [names]
    if isinstance(names, dict):
        numbers = [value for value in names.values() if isinstance(value, str) and value.isdecimal()]
        if not all(key.isdecimal() for key in names) and len(numbers) == len(names):
            names = dict(zip(names.values(), names)) if len(set(numbers)) == len(names) else {}
        numbers = {class_number(key): name for key, name in names.items()}
        if not numbers or len(numbers) < len(names):
            raise ValueError("the keys of names have to be numbers, each once")
        names = [numbers.get(number, str(number)) for number in range(max(numbers) + 1)]
    names = list(names)
    if any(isinstance(name, (dict, list)) for name in names):
        raise TypeError("a class name is a list or a mapping")
    return [str(name) for name in names]


def class_number(key):
    """A key of `names`, a number or the word for one -> int. Raises ValueError."""
    number = int(key) if key.isdecimal() else -1
    if not 0 <= number < MOST_CLASSES:
        raise ValueError(f"{str(key)[:40]!r} in names is not the number of a class")
    return number


def read_darknet_data(path):
    """obj.data, lines of `key = value` -> {key: value}. Raises UserError."""
    pairs = (line.partition("=") for line in read_lines(path))
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def read_yolo_labels(path, num_classes, points=None):
    """A label file -> rows as yolo_row gives them. Raises UserError."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(yolo_row(line, num_classes, points))
        except (ValueError, OverflowError) as error:
            form = "or a polygon" if points is None else f"and {points} numbers of key points"
            raise UserError(
                f"{path}, line {number}: {error}; expected a class from 0 to {num_classes - 1} and cx cy w h, {form}"
            ) from None
    return rows


def yolo_row(line, num_classes, points=None):
    """A line of a label file -> (x1, y1, x2, y2, label, area, False), in fractions of the image.

    It is `class cx cy w h`, optionally with a score or with so many numbers of key points, or `class x y x y x y ...`,
    a polygon or the corners of an oriented box. Raises ValueError or OverflowError.
    """
    label, *values = (float(text) for text in line.split())
    is_class = label == int(label) and 0 <= label < num_classes
    is_box = len(values) in ((4, 5) if points is None else (4, 4 + points))
    is_polygon = points is None and len(values) >= 6 and len(values) % 2 == 0
    if not is_class or not (is_box or is_polygon):
        raise ValueError(f"'{line.strip()[:60]}'")
    if is_box:
        cx, cy, w, h = values[:4]
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        if max(values) >= 2:
            raise ValueError(f"'{line.strip()[:60]}' leaves the image (key points need kpt_shape in data.yaml)")
        x1, y1, x2, y2 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    return x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), False


# Writing

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
