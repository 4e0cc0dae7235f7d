"""Whichever door a data set comes through, its targets are the same."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from conftest import write_coco
from PIL import Image

import datasets
from datasets import DetectionDataset, find_problems
from errors import UserError
from layouts import load_splits


def write_xml(path, record, classes):
    objects = "".join(
        f"<object><name>{classes[label]}</name><difficult>{int(ignored)}</difficult><bndbox><xmin>{x1 + 1!r}</xmin>"
        f"<ymin>{y1 + 1!r}</ymin><xmax>{x2!r}</xmax><ymax>{y2!r}</ymax></bndbox></object>"
        for (x1, y1, x2, y2), label, ignored in zip(record.boxes.tolist(), record.labels, record.ignored)
    )
    path.write_text(
        f"<annotation><size><width>{record.width}</width><height>{record.height}</height><depth>3</depth></size>{objects}</annotation>"
    )


def write_labels(path, record):
    lines = []
    for (x1, y1, x2, y2), label in zip(record.boxes.tolist(), record.labels):
        values = (
            (x1 + x2) / 2 / record.width,
            (y1 + y2) / 2 / record.height,
            (x2 - x1) / record.width,
            (y2 - y1) / record.height,
        )
        lines.append(" ".join([str(label), *map(repr, values)]))
    path.write_text("\n".join(lines))


def as_coco(records, classes, first_id=1, umbrella=False, prefix=""):
    categories = [{"id": 0, "name": "things", "supercategory": "none"}] * umbrella
    categories += [
        {"id": i + first_id, "name": name, "supercategory": "things" if umbrella else ""}
        for i, name in enumerate(classes)
    ]
    images = [
        {"id": i, "file_name": prefix + r.path.name, "width": r.width, "height": r.height}
        for i, r in enumerate(records)
    ]
    annotations = []
    for i, record in enumerate(records):
        for (x1, y1, x2, y2), label in zip(record.boxes.tolist(), record.labels.tolist()):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": label + first_id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return json.dumps({"categories": categories, "images": images, "annotations": annotations})


def copy_pictures(records, folder):
    folder.mkdir(parents=True)
    for record in records:
        shutil.copy(record.path, folder)


def to_coco(root, train, val):
    (root / "annotations").mkdir(parents=True)
    for name, split in (("train2017", train), ("val2017", val)):
        copy_pictures(split.records, root / name)
        (root / "annotations" / f"instances_{name}.json").write_text(as_coco(split.records, split.classes))


def to_roboflow(root, train, val):
    for name, split in (("train", train), ("valid", val)):
        copy_pictures(split.records, root / name)
        (root / name / "_annotations.coco.json").write_text(as_coco(split.records, split.classes, umbrella=True))
    (root / "README.dataset.txt").write_text("made by an export")


def to_voc(root, train, val):
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    for name, split in (("train", train), ("val", val)):
        for record in split.records:
            shutil.copy(record.path, root / "JPEGImages")
            write_xml(root / "Annotations" / f"{record.path.stem}.xml", record, split.classes)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(r.path.stem for r in split.records))


def to_voc_years(root, train, val):
    half = len(train.records) // 2
    halves = [
        type(train)(train.name, train.classes, train.category_ids, part)
        for part in (train.records[:half], train.records[half:])
    ]
    nothing = type(val)(val.name, val.classes, val.category_ids, [])
    to_voc(root / "VOCdevkit" / "VOC2007", halves[0], val)
    to_voc(root / "VOCdevkit" / "VOC2012", halves[1], nothing)


def to_voc_folders(root, train, val):
    for name, split in (("train", train), ("test", val)):
        copy_pictures(split.records, root / name / "images")
        (root / name / "labels").mkdir()
        for record in split.records:
            write_xml(root / name / "labels" / f"{record.path.stem}.xml", record, split.classes)


def to_voc_beside(root, train, val):
    for name, split in (("train", train), ("valid", val)):
        copy_pictures(split.records, root / name)
        for record in split.records:
            write_xml(root / name / f"{record.path.stem}.xml", record, split.classes)


def to_yolo(root, train, val):
    """As Ultralytics documents it: images/train beside labels/train, classes by number."""
    for name, split in (("train", train), ("val", val)):
        copy_pictures(split.records, root / "images" / name)
        (root / "labels" / name).mkdir(parents=True)
        for record in split.records:
            write_labels(root / "labels" / name / f"{record.path.stem}.txt", record)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(train.classes))
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")


def to_yolo_export(root, train, val):
    """As Roboflow writes it: a folder a part, paths from a folder that isn't there, a list of names."""
    for name, split in (("train", train), ("valid", val)):
        copy_pictures(split.records, root / name / "images")
        (root / name / "labels").mkdir()
        for record in split.records:
            write_labels(root / name / "labels" / f"{record.path.stem}.txt", record)
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\n\n"
        f"nc: {len(train.classes)}\nnames: {json.dumps(train.classes)}\n"
    )


DOORS = {
    "coco": to_coco,
    "roboflow": to_roboflow,
    "voc": to_voc,
    "voc-years": to_voc_years,
    "voc-folders": to_voc_folders,
    "voc-beside": to_voc_beside,
    "yolo": to_yolo,
    "yolo-export": to_yolo_export,
}


def targets_of(split):
    """{the picture's content: (size, boxes, class names)}, whatever its name or number."""
    return {
        hashlib.sha256(r.path.read_bytes()).hexdigest(): (
            (r.width, r.height),
            r.boxes.round(6).tolist(),
            [split.classes[label] for label in r.labels],
            r.ignored.tolist(),
        )
        for r in split.records
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = write_coco(tmp_path_factory.mktemp("made"), {"train": 7, "val": 3}, category_ids=(1, 2))
    file = root / "annotations" / "instances_val.json"
    for picture in (root / "val").iterdir():  # each its own name
        picture.rename(picture.with_name("v" + picture.name))
    file.write_text(file.read_text().replace('"file_name": "', '"file_name": "v'))
    return load_splits(root)


@pytest.mark.parametrize("door", DOORS)
def test_targets_are_the_same_through_every_door(door, made, tmp_path, capsys):
    DOORS[door](tmp_path / "data", *made)
    found = load_splits(tmp_path / "data")
    assert f"{'coco' if door == 'roboflow' else door.split('-')[0]} layout" in capsys.readouterr().out
    for ours, theirs in zip(found, made):
        assert ours.classes == theirs.classes
        assert targets_of(ours) == targets_of(theirs)
        image, target = DetectionDataset(ours, None).load(0)
        assert image.shape[1:] == (target["orig_size"][0], target["orig_size"][1]) and len(target["boxes"]) == 2


def test_a_single_file_is_split_the_same_way_every_time(made, tmp_path, capsys):
    records = made[0].records + [r for r in made[1].records]
    for i, record in enumerate(records):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.open(record.path).save(tmp_path / "images" / f"{i}.png")
    renamed = [
        type(r)(i, tmp_path / "images" / f"{i}.png", r.width, r.height, r.boxes, r.labels, r.areas, r.ignored)
        for i, r in enumerate(records)
    ]
    (tmp_path / "labels.json").write_text(as_coco(renamed, made[0].classes))
    first, again, half = load_splits(tmp_path), load_splits(tmp_path), load_splits(tmp_path, val_fraction=0.5)
    assert "coco layout" in capsys.readouterr().out
    assert [len(s.records) for s in first] == [8, 2] and [len(s.records) for s in half] == [5, 5]
    assert [targets_of(s) for s in first] == [targets_of(s) for s in again]
    everything = type(made[0])("all", made[0].classes, [], renamed)
    assert targets_of(first[0]) | targets_of(first[1]) == targets_of(everything)
    assert not targets_of(first[0]).keys() & targets_of(first[1]).keys()
    assert any("8 images to train on, 2 to evaluate on" in remark for remark in first[0].remarks)
    with pytest.raises(UserError, match="leaves a split without any"):
        load_splits(tmp_path, val_fraction=0.01)


def test_roboflows_class_for_everything_stays_where_it_is_used(made, tmp_path):
    to_roboflow(tmp_path, *made)
    assert load_splits(tmp_path)[0].classes == ["kind 1", "kind 2"]
    path = tmp_path / "valid" / "_annotations.coco.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(data))
    train, val = load_splits(tmp_path)
    assert train.classes == val.classes == ["things", "kind 1", "kind 2"]
    assert set(np.concatenate([r.labels for r in train.records])) == {1, 2}


def test_yolos_polygons_become_their_boxes_and_mistakes_are_named(made, tmp_path):
    to_yolo(tmp_path, *made)
    labels = tmp_path / "labels" / "train" / "000.txt"
    labels.write_text("1 0.25 0.5 0.75 0.25 0.5 1.0\n")
    record = next(r for r in load_splits(tmp_path)[0].records if r.path.stem == "000")
    assert record.boxes.tolist() == [[0.25 * 64, 0.25 * 48, 0.75 * 64, 48]] and record.labels.tolist() == [1]
    for line, message in (
        ("2 0.5 0.5 0.1 0.1", "000.txt, line 1: .*expected a class from 0 to 1"),
        ("0 0.5 0.5 x 0.1", "line 1"),
        ("0 0.5 0.5", "line 1"),
    ):
        labels.write_text(line)
        with pytest.raises(UserError, match=message):
            load_splits(tmp_path)
    labels.unlink()
    assert len(next(r for r in load_splits(tmp_path)[0].records if r.path.stem == "000").boxes) == 0
    yaml_file = tmp_path / "data.yaml"
    for text, message in (
        ("names: [a, b]\nval: images/val\n", "no train; it has names, val"),
        ("names: [a, b]\ntrain: nowhere\nval: images/val", "nowhere does not exist; looked for"),
        ("train: images/train", "not a YOLO data.yaml"),
        ("names: [a", "not a YOLO data.yaml"),
    ):
        yaml_file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_splits(tmp_path)


def test_a_layout_can_be_overruled(made, tmp_path):
    to_voc(tmp_path, *made)
    to_coco(tmp_path, *made)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(made[0].records[0].path.stem)
    assert len(load_splits(tmp_path)[0].records) == 1
    assert len(load_splits(tmp_path, layout="coco")[0].records) == 7
    with pytest.raises(UserError, match="no image has the name of an annotation file"):
        load_splits(tmp_path, layout="yolo")


def test_pictures_of_the_same_name_keep_apart(made, tmp_path):
    to_voc_years(tmp_path, *made)
    for year in ("VOC2007", "VOC2012"):
        kit = tmp_path / "VOCdevkit" / year
        stem = (kit / "ImageSets" / "Main" / "train.txt").read_text().split()[0]
        for folder, suffix in (("JPEGImages", ".png"), ("Annotations", ".xml")):
            (kit / folder / f"{stem}{suffix}").rename(kit / folder / f"same{suffix}")
        text = (kit / "ImageSets" / "Main" / "train.txt").read_text().replace(stem, "same")
        (kit / "ImageSets" / "Main" / "train.txt").write_text(text)
    records = load_splits(tmp_path)[0].records
    assert len({r.image_id for r in records}) == len(records) == 7


def test_what_is_suspicious_is_said(made, tmp_path, monkeypatch, capsys):
    """Leaks, doubles, unseen and rare classes, thin, doubled and whole-image boxes: each is found, and nothing else."""
    to_coco(tmp_path, *made)
    clean = find_problems(*load_splits(tmp_path))
    assert [line.split(":")[0] for line in clean] == ["classes with fewer than ten boxes in train2017"]
    shutil.copy(tmp_path / "train2017" / "001.png", tmp_path / "val2017" / "v001.png")
    shutil.copy(tmp_path / "train2017" / "002.png", tmp_path / "train2017" / "003.png")
    for name in ("train2017", "val2017"):
        path = tmp_path / "annotations" / f"instances_{name}.json"
        data = json.loads(path.read_text())
        data["categories"] += [{"id": 8, "name": "new"}, {"id": 9, "name": "never"}]
        if name == "val2017":
            data["annotations"][0]["category_id"] = 8
        else:
            boxes = data["annotations"]
            boxes[0]["bbox"] = [5, 5, 1, 20]
            boxes[2]["bbox"], boxes[2]["category_id"] = boxes[3]["bbox"], boxes[3]["category_id"]
            boxes[4]["bbox"] = [0, 0, 64, 48]
        path.write_text(json.dumps(data))
    found = find_problems(*load_splits(tmp_path))
    wanted = [
        "1 images of val2017 are in train2017 too",
        "1 images are duplicates within their split",
        "classes of val2017 without any box in train2017: new",
        "classes with fewer than ten boxes",
        "classes without any box: never",
        "1 boxes are at most one pixel wide",
        "1 boxes are duplicates with the same class",
        "1 boxes are as large",
    ]
    assert len(found) == len(wanted) and all(line.startswith(start) for line, start in zip(found, wanted)), found
    assert "v001.png" in found[0] and "000.png" in found[5]
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["datasets.py", str(tmp_path), "--out", str(tmp_path / "samples.png")])
    datasets.main()
    said = capsys.readouterr().out
    assert "train2017: 7 images, 14 boxes, 4 classes" in said and "sizes: 64x48 (7)" in said and found[0] in said
    assert Image.open(tmp_path / "samples.png").width > 4 * 480
