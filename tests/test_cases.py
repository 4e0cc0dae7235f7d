"""What people bring: folders as tools and hands leave them, read right, or refused in one line."""

import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask
from test_commands import SMALL, called

import datasets
import evaluate
import infer
import train
import transforms
from datasets import DetectionDataset
from detector import load
from errors import UserError
from layouts import load_splits

SIZE = (96, 72)
BOX = (20, 10, 50, 40)  # xyxy of every object


def draw(path, seed=None):
    """An image that no other is like."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(str(path))) if seed is None else seed)
    form = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(path, form)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_json(path, names, change=None, **annotation):
    """A COCO file of one object in each image. annotation: replaces entries of every object; None removes them."""
    x1, y1, x2, y2 = BOX
    rows = []
    for i in range(len(names)):
        row = {"id": i, "image_id": i, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0} | annotation
        rows.append({key: value for key, value in row.items() if value is not None})
    data = {
        "images": [{"id": i, "file_name": name, "width": 96, "height": 72} for i, name in enumerate(names)],
        "annotations": rows,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    if change:
        change(data)
    write(path, json.dumps(data))


def write_xml(path, size="<size><width>96</width><height>72</height><depth>3</depth></size>"):
    x1, y1, x2, y2 = BOX
    write(
        path,
        f"<annotation><filename>{path.stem}.jpg</filename>{size}<object><name>cat</name><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object></annotation>",
    )


def yolo_line(label=0):
    x1, y1, x2, y2 = BOX
    return f"{label} {(x1 + x2) / 192} {(y1 + y2) / 144} {(x2 - x1) / 96} {(y2 - y1) / 72}"


def yolo_parts(root, names, lines=None, train="images/train", val="images/val"):
    """Images and labels in two folders each, three and two of them, and data.yaml with `names`."""
    for folder, count in ((train, 3), (val, 2)):
        for i in range(count):
            draw(root / folder / f"{i}.png")
            write(root / folder.replace("images", "labels") / f"{i}.txt", lines or yolo_line())
    write(root / "data.yaml", f"train: {train}\nval: {val}\n{names}\n")


def paths(split, root):
    return [str(record.path.relative_to(root)) for record in split.records]


def boxes(splits):
    return {tuple(box) for split in splits for record in split.records for box in record.boxes.round(6).tolist()}


def refused(root, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        load_splits(root, **options)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def said(splits):
    return " | ".join(remark for split in splits for remark in split.remarks)


# COCO


@pytest.mark.parametrize(
    "file, image, written",
    [
        ("annotations/instances_{}.json", "images/{}/{}.PNG", "{}.PNG"),  # CVAT, Datumaro, Ultralytics
        ("annotations/instances_{}.json", "images/{}/{}.PNG", "{}.png"),
        ("annotations/custom_{}.json", "{}2017/{}.png", "{}.png"),
        ("annotations/instances_{}2017.json", "{}2017/{}.png", "{}.png"),
        ("{}.json", "{}/{}.png", "{}.png"),
        ("{}.json", "images/{}/{}.png", "{}.png"),
        ("labels/{}.json", "images/{}/deep/{}.png", "deep/{}.png"),
        ("{}/labels.json", "{}/images/{}.png", "{}.png"),
        ("sub/{}/_annotations.coco.json", "sub/{}/{}.png", "{}.png"),
        ("annotations/instances_{}.json", "images/{}/a b/{}.png", "a%20b/{}.png"),
        ("annotations/instances_{}.json", "images/{}/a/{}.png", "a\\{}.png"),
        ("annotations/instances_{}.json", "images/{}/{}.png", "C:\\Users\\me\\images\\{}.png"),
        ("annotations/instances_{}.json", "images/{}/{}.png", "/home/me/set/{}.png"),
        ("annotations/instances_{}.json", "images/{}/{}.png", "https://a.org/media/{}.png"),
    ],
)
def test_coco_images_are_found_wherever_they_are(file, image, written, tmp_path, capsys):
    """Every name is in both parts: each has its own images."""
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            draw(tmp_path / image.format(part, i))
        write_json(tmp_path / file.format(part), [written.format(i) for i in range(count)])
    splits = load_splits(tmp_path)
    for split, part, count in zip(splits, ("train", "val"), (3, 2)):
        assert paths(split, tmp_path) == [image.format(part, i) for i in range(count)]
    assert boxes(splits) == {BOX} and splits[0].classes == ["cat", "dog"]
    assert ("found by the end of their paths" in capsys.readouterr().out) == written.startswith(("C:", "/", "https"))


def test_an_archive_from_windows_has_backslashes_in_its_names(tmp_path):
    for part in ("train", "val"):
        draw(tmp_path / f"images\\{part}\\0.png")
        write_json(tmp_path / f"{part}.json", ["0.png"])
    assert [paths(split, tmp_path) for split in load_splits(tmp_path)] == [
        ["images\\train\\0.png"],
        ["images\\val\\0.png"],
    ]


def test_a_name_that_fits_two_files_is_refused_with_both(tmp_path):
    for folder in ("a", "b"):
        draw(tmp_path / folder / "0.png")
    write_json(tmp_path / "train.json", ["0.png"])
    refused(tmp_path, "'0.png' could be .*[ab]/0.png or .*[ab]/0.png", val_fraction=0.5)
    for i in range(1, 5):
        draw(tmp_path / "b" / f"{i}.png")
    write_json(tmp_path / "train.json", [f"b/{i}.png" for i in range(5)])
    assert sum(len(s.records) for s in load_splits(tmp_path)) == 5


def test_an_image_that_is_missing_is_not_taken_from_the_other_part(tmp_path):
    for part in ("train", "val"):
        for i in range(2):
            draw(tmp_path / "images" / part / f"{i}.png")
        write_json(tmp_path / "annotations" / f"{part}.json", ["0.png", "1.png"])
    (tmp_path / "images" / "train" / "1.png").unlink()
    refused(tmp_path, "train: 1 of 2 images can't be read .*1.png: missing")
    train, val = load_splits(tmp_path, skip_bad_images=True)
    assert paths(train, tmp_path) == ["images/train/0.png"] and len(val.records) == 2


@pytest.mark.parametrize("file", ["annotations/instances_default.json", "train.json", "a/b/whole.json"])
def test_a_coco_file_alone_is_split(file, tmp_path):
    for i in range(10):
        draw(tmp_path / "images" / "default" / f"{i}.png")
    write_json(tmp_path / file, [f"{i}.png" for i in range(10)])
    splits = load_splits(tmp_path)
    order = np.random.default_rng(0).permutation(10)
    assert [paths(s, tmp_path) for s in splits] == [
        [f"images/default/{i}.png" for i in sorted(part)] for part in (order[2:], order[:2])
    ]
    assert "8 images to train on, 2 to evaluate on" in said(splits)
    assert len(load_splits(tmp_path, val_fraction=0.5)[1].records) == 5
    refused(tmp_path, "one part has all images; leave out --val-split test", layout="coco", val_split="test")


@pytest.mark.parametrize("name", ["trains", "values", "latest"])
def test_folders_of_other_words_are_no_splits(name, tmp_path):
    for i in range(5):
        draw(tmp_path / "images" / name / f"{i}.png")
        draw(tmp_path / "images" / "buses" / f"b{i}.png")
        write_xml(tmp_path / "annotations" / f"{i}.xml")
        write_xml(tmp_path / "annotations" / f"b{i}.xml")
    assert [len(s.records) for s in load_splits(tmp_path)] == [8, 2]
    for part in ("train", "val"):
        write_json(tmp_path / f"{part}.json", [f"{i}.png" for i in range(5)])
    assert [len(s.records) for s in load_splits(tmp_path)] == [5, 5]


def test_a_test_folder_without_annotations_is_left_out(tmp_path, capsys):
    for i in range(10):
        draw(tmp_path / "train" / f"{i}.png")
        write_xml(tmp_path / "train" / f"{i}.xml")
        draw(tmp_path / "test" / f"t{i}.png")
    assert [len(s.records) for s in load_splits(tmp_path)] == [8, 2]
    assert "10 images belong to neither split" in capsys.readouterr().out


def test_a_stray_yaml_is_no_yolo(tmp_path):
    coco_parts(tmp_path)
    write(tmp_path / "docker-compose.yml", "services: {}")
    assert len(load_splits(tmp_path)[0].records) == 3


def test_any_split_of_several_can_be_chosen(tmp_path):
    for part in ("train", "dev"):
        draw(tmp_path / part / "0.png")
        write_json(tmp_path / part / "labels.json", ["0.png"])
    assert [s.name for s in load_splits(tmp_path, val_split="dev")] == ["train", "dev"]


def test_the_annotations_nearest_to_the_top_count(tmp_path):
    coco_parts(tmp_path)
    shutil.copytree(tmp_path / "annotations", tmp_path / "backup" / "of yesterday" / "annotations")
    assert [len(s.records) for s in load_splits(tmp_path)] == [3, 3]
    shutil.copytree(tmp_path / "annotations", tmp_path / "again")
    refused(tmp_path, "annotations/train.json.* could all be 'train'")


def test_json_of_other_kinds_is_passed_over(tmp_path):
    for part in ("train", "val"):
        draw(tmp_path / part / "0.png")
        write_json(tmp_path / f"{part}.json", ["0.png"])
        write(tmp_path / f"{part}_log.json", "{}")
    write(tmp_path / "package.json", "{}")
    assert [len(s.records) for s in load_splits(tmp_path)] == [1, 1]


POLYGONS = [[20, 10, 50, 10, 50, 25], [20, 40, 30, 20, 25, 25]]
MASK = np.zeros((72, 96), dtype=np.uint8, order="F")
MASK[10:40, 20:50] = 1
CODE = mask.encode(MASK)
RUNS = {"size": [72, 96], "counts": [20 * 72 + 10, *[30, 42] * 29, 30, 46 * 72 + 32]}


def coco_parts(root, change=None, **annotation):
    for part in ("train", "val"):
        names = [f"{i}.png" for i in range(3)]
        for name in names:
            draw(root / part / name)
        write_json(root / "annotations" / f"{part}.json", names, change, **annotation)
    return root


@pytest.mark.parametrize(
    "segmentation",
    [POLYGONS, POLYGONS[0] + [20, 40], {"size": [72, 96], "counts": CODE["counts"].decode()}, RUNS],
)
def test_a_segmentation_without_bbox_becomes_its_box(segmentation, tmp_path):
    assert boxes(load_splits(coco_parts(tmp_path, bbox=None, segmentation=segmentation))) == {BOX}


@pytest.mark.parametrize(
    "code",
    [
        {"size": [0, 96], "counts": [1, 2]},
        {"size": [72, 96], "counts": "P"},  # a number that goes on behind the end of the text
        {"size": [72, 96], "counts": "\0"},
        {"size": [72, 96], "counts": [5, -1]},
        {"size": [72, 96], "counts": [10**10]},
        {"size": [72, 96]},
        [["x", 1]],
        "word",
    ],
)
def test_a_segmentation_that_is_none_is_refused(code, tmp_path):
    refused(coco_parts(tmp_path, bbox=None, segmentation=code), "train.json: annotation 0: ")


def test_an_empty_bbox_is_dropped_and_counted(tmp_path):
    coco_parts(tmp_path, change=lambda data: data["annotations"][0].update(bbox=[]))
    splits = load_splits(tmp_path)
    assert "1 empty, inverted, outside or non-finite boxes dropped" in said(splits)
    assert [len(r.boxes) for r in splits[0].records] == [0, 1, 1]


@pytest.mark.parametrize("word, crowd", [("0", False), ("false", False), ("1", True), ("true", True), (True, True)])
def test_iscrowd_may_be_a_word(word, crowd, tmp_path):
    coco_parts(tmp_path, change=lambda data: data["annotations"][0].update(iscrowd=word))
    assert [bool(r.ignored[0]) for r in load_splits(tmp_path)[0].records] == [crowd, False, False]


def test_only_crowds_are_refused(tmp_path):
    refused(coco_parts(tmp_path, iscrowd=1), "3 images and 3 boxes, all of them crowds or difficult: nothing to learn")


def test_annotations_of_images_that_are_not_listed_are_counted(tmp_path):
    coco_parts(tmp_path, change=lambda data: data["annotations"][1].update(image_id=99))
    splits = load_splits(tmp_path)
    assert [len(r.boxes) for r in splits[0].records] == [1, 0, 1]
    assert said(splits).count("1 annotations are of images that are not listed, and left out") == 2


def test_ids_may_be_words_or_whole_floats(tmp_path):
    def change(data):
        for image in data["images"]:
            image["id"] = str(image["id"])
        for annotation in data["annotations"]:
            annotation["category_id"] = "2"
            annotation["image_id"] = float(annotation["image_id"])
        data["categories"][0]["id"] = 1.0

    splits = load_splits(coco_parts(tmp_path, change))
    assert boxes(splits) == {BOX} and splits[0].category_ids == [1, 2]
    assert {int(label) for r in splits[0].records for label in r.labels} == {1}


# Pascal VOC


@pytest.mark.parametrize("images, annotations", [("images", "annotations"), ("JPEGImages", "Annotations"), ("", "")])
def test_voc_without_lists_is_split(images, annotations, tmp_path, capsys):
    """LabelImg's folders, with an image that has no object, an annotation without an image, and an empty size."""
    for i in range(10):
        draw(tmp_path / images / f"r-{i}.jpg")
        if i:
            write_xml(tmp_path / annotations / f"r-{i}.xml")
    write_xml(tmp_path / annotations / "r-3.xml", "<size><width/><height></height></size>")
    write_xml(tmp_path / annotations / "gone.xml")
    draw(tmp_path / "elsewhere" / "x.jpg")
    splits = load_splits(tmp_path)
    assert "voc layout" in (out := capsys.readouterr().out)
    assert "1 images belong to neither split: " in out and "x.jpg" in out
    assert [len(s.records) for s in splits] == [8, 2] and boxes(splits) == {BOX}
    assert {(r.width, r.height) for s in splits for r in s.records} == {SIZE}
    assert "8 images to train on, 2 to evaluate on" in said(splits)
    assert "1 images have no annotation file" in said(splits)
    assert "1 annotation files have no image" in said(splits) and "gone.xml" in said(splits)


def devkit(root, lists, names):
    for name in names:
        draw(root / "JPEGImages" / f"{name}.jpg")
        write_xml(root / "Annotations" / f"{name}.xml")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, lines in lists.items():
        write(root / "ImageSets" / "Main" / f"{name}.txt", "\n".join(lines) + "\n")
    return root


def test_voc_names_have_spaces_flags_and_suffixes(tmp_path):
    names = ["IMG (0)", "IMG 1", "two", "three", "four", "five"]
    devkit(
        tmp_path,
        {"train": ["IMG (0)", "IMG 1", "two -1", "three  1"], "val": ["four.jpg", "JPEGImages/five.jpg"]},
        names,
    )
    train, val = load_splits(tmp_path)
    assert [r.path.stem for r in train.records] == names[:4] and [r.path.stem for r in val.records] == names[4:]
    assert boxes([train, val]) == {BOX}


@pytest.mark.parametrize("lists", [{}, {"default": list("abcdefghij")}, {"train": list("abcdefghij")}])
def test_voc_with_one_list_or_none_is_split(lists, tmp_path):
    splits = load_splits(devkit(tmp_path, lists, "abcdefghij"))
    assert [len(s.records) for s in splits] == [8, 2] and "2 to evaluate on" in said(splits)


def test_voc_lists_with_images_without_xml(tmp_path):
    devkit(tmp_path, {"train": list("abcd"), "val": list("ef")}, "abcdef")
    (tmp_path / "Annotations" / "b.xml").unlink()
    train, _ = load_splits(tmp_path)
    assert [len(r.boxes) for r in train.records] == [1, 0, 1, 1] and "1 images have no annotation file" in said([train])
    for name in "acd":
        (tmp_path / "Annotations" / f"{name}.xml").unlink()
    refused(tmp_path, "'train' has 4 images but no box .4 images have no annotation file")


@pytest.mark.parametrize(
    "image, xml",
    [
        ("{}/{}.jpg", "{}/{}.xml"),
        ("{}/images/{}.jpg", "{}/labels/{}.xml"),
        ("images/{}/{}.jpg", "annotations/{}/{}.xml"),
        ("{}/JPEGImages/deep/{}.jpg", "{}/Annotations/deep/{}.xml"),
    ],
)
def test_voc_negatives_without_xml_in_folders(image, xml, tmp_path):
    """Every name is in both parts."""
    for part, count in (("train", 4), ("valid", 2)):
        for i in range(count):
            draw(tmp_path / image.format(part, i))
            if i:
                write_xml(tmp_path / xml.format(part, i))
    splits = load_splits(tmp_path)
    assert [[len(r.boxes) for r in s.records] for s in splits] == [[0, 1, 1, 1], [0, 1]]
    assert [s.name for s in splits] == ["train", "valid"]
    assert said(splits).count("1 images have no annotation file") == 2


# YOLO


@pytest.mark.parametrize(
    "names, classes",
    [
        ("names: {'0': a, '1': b, '2': c, '10': k, '9': j}", "a b c 3 4 5 6 7 8 j k"),
        ("names: {0: a, 2: c}", "a 1 c"),
        ("names: {1: a, 2: c}", "0 a c"),
        ("names: {ant: 0, cat: 2, bee: 1}", "ant bee cat"),
        ("names: [a, b, c]\nnc: 3", "a b c"),
    ],
)
def test_yolo_class_names_keep_their_numbers(names, classes, tmp_path):
    yolo_parts(tmp_path, names, yolo_line(2))
    train, _ = load_splits(tmp_path)
    assert train.classes == classes.split() and {int(l) for r in train.records for l in r.labels} == {2}


def test_yolo_names_may_be_one_word(tmp_path):
    yolo_parts(tmp_path, "nc: 1\nnames: helmet")
    assert load_splits(tmp_path)[0].classes == ["helmet"]


@pytest.mark.parametrize(
    "names, match",
    [
        ("names: {a: x, b: y}", "'a' in names is not the number of a class"),
        ("names: {0: a, '0': b}", "the keys of names have to be numbers, each once"),
        ("names: {99999999: a}", "is not the number of a class"),
        ("names: {-1: a}", "is not the number of a class"),
        ("names: {a: 0, b: 0}", "have to be numbers"),
        ("names: {}", "have to be numbers"),
        ("nc: 3\nnames: [a, b]", "nc is 3, but names makes 2"),
        ("nc: 2\nnames: {1: a, 2: b}", "nc is 2, but names makes 3 classes from number 0 on .0, a, b."),
        ("nc: 2\nnames: helmet", "nc is 2, but names makes 1"),
    ],
)
def test_yolo_class_names_that_are_unclear_are_refused(names, match, tmp_path):
    yolo_parts(tmp_path, names)
    refused(tmp_path, match)


POSE = yolo_line() + " 0.6 0.4 2 0.6 0.4 2 0.6 0.6 2 0.4 0.6 2"
CORNERS = [(20, 10), (50, 10), (50, 40), (20, 40)]
POLYGON = "0 " + " ".join(f"{x / 96} {y / 72}" for x, y in CORNERS)


@pytest.mark.parametrize(
    "names, line",
    [
        ("kpt_shape: [4, 3]\nnames: [device]", POSE),
        ("kpt_shape: [4, 3]\nnames: [device]", yolo_line()),
        ("kpt_shape: [3, 2]\nnames: [device]", yolo_line() + " 0.6" * 6),
        ("names: [device]", yolo_line() + " 0.9"),  # a score
        ("names: [device]", POLYGON),  # the corners of an oriented box
        ("names: [device]", POLYGON + f" {30 / 96} {20 / 72}"),
    ],
)
def test_yolo_labels_of_other_tasks_become_their_boxes(names, line, tmp_path):
    yolo_parts(tmp_path, names, line)
    splits = load_splits(tmp_path)
    assert boxes(splits) == {BOX} and "clipped" not in said(splits)


@pytest.mark.parametrize(
    "names, line",
    [("names: [device]", POSE), ("kpt_shape: [4, 3]\nnames: [a]", POLYGON), ("kpt_shape: word\nnames: [a]", POSE)],
)
def test_yolo_key_points_without_their_shape_are_refused(names, line, tmp_path):
    yolo_parts(tmp_path, names, line)
    refused(tmp_path, "line 1: .*key points|not a YOLO data.yaml")


def flat_yolo(root, count=10, folder=""):
    for i in range(count):
        draw(root / folder / f"{i}.jpg")
        write(root / folder / f"{i}.txt", yolo_line(1))


def test_labelimgs_yolo_folder(tmp_path):
    flat_yolo(tmp_path)
    (tmp_path / "3.txt").unlink()
    write(tmp_path / "99.txt", yolo_line())
    write(tmp_path / "README.txt", "made by hand")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    splits = load_splits(tmp_path)
    assert splits[0].classes == ["cat", "dog"] and [len(s.records) for s in splits] == [8, 2]
    assert boxes(splits) == {BOX} and "1 images have no annotation file" in said(splits)
    assert "1 annotation files have no image" in said(splits) and "99.txt" in said(splits)


@pytest.mark.parametrize("parts", [["train"], ["train", "valid"]])
def test_cvats_yolo_1_1(parts, tmp_path):
    data = ["classes = 2", "names = data/obj.names", "backup = backup/"]
    for part in parts:
        folder = f"obj_{part}_data"
        flat_yolo(tmp_path, 10, folder)
        write(tmp_path / f"{part}.txt", "".join(f"data/{folder}/{i}.jpg\n" for i in range(10)))
        data.append(f"{part} = data/{part}.txt")
    write(tmp_path / "obj.names", "cat\ndog\n")
    write(tmp_path / "obj.data", "\n".join(data))
    splits = load_splits(tmp_path)
    assert splits[0].classes == ["cat", "dog"] and boxes(splits) == {BOX}
    assert [len(s.records) for s in splits] == ([8, 2] if len(parts) == 1 else [10, 10])
    assert ("2 to evaluate on" in said(splits)) == (len(parts) == 1)


@pytest.mark.parametrize(
    "image, label",
    [
        ("{}/images/{}.jpg", "{}/labels/{}.txt"),
        ("images/{}/{}.jpg", "labels/{}/{}.txt"),
        ("{}/img/{}.jpg", "{}/ann/{}.txt"),
    ],
)
def test_yolo_without_any_list_of_classes(image, label, tmp_path):
    """Every name is in both parts."""
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            draw(tmp_path / image.format(part, i))
            write(tmp_path / label.format(part, i), yolo_line(2 if part == "train" else 1))
    splits = load_splits(tmp_path)
    assert splits[0].classes == ["0", "1", "2"] and [len(s.records) for s in splits] == [3, 2]
    assert [{int(l) for r in s.records for l in r.labels} for s in splits] == [{2}, {1}]
    assert "the classes are called by their numbers" in said(splits) and boxes(splits) == {BOX}


def test_yolo_with_one_part_is_split(tmp_path):
    yolo_parts(tmp_path, "names: [a]")
    write(tmp_path / "data.yaml", "train: images/train\nval:\nnames: [a]")
    splits = load_splits(tmp_path, val_fraction=0.34)
    assert [len(s.records) for s in splits] == [2, 1] and "1 to evaluate on" in said(splits)
    refused(tmp_path, "no test; it has", val_split="test")


@pytest.mark.parametrize("prefix", ["/home/somebody/datasets/mine/", "C:\\data\\mine\\", "./", "mine/"])
def test_yolo_lists_with_paths_of_another_machine(prefix, tmp_path, capsys):
    yolo_parts(tmp_path, "names: [a]")
    for part, count in (("train", 3), ("val", 2)):
        write(tmp_path / f"{part}.txt", "".join(f"{prefix}images/{part}/{i}.png\n" for i in range(count)))
    write(tmp_path / "data.yaml", "path: /home/somebody/datasets/mine\ntrain: train.txt\nval: val.txt\nnames: [a]")
    splits = load_splits(tmp_path)
    assert [paths(s, tmp_path) for s in splits] == [
        [f"images/{p}/{i}.png" for i in range(n)] for p, n in (("train", 3), ("val", 2))
    ]
    assert ("found by the end of their paths" in capsys.readouterr().out) == (prefix != "./")
    assert boxes(splits) == {BOX}
    write(tmp_path / "val.txt", f"{prefix}images/val/7.png\n{prefix}images/val/0.png\n")
    refused(tmp_path, "val: 1 of 2 images can't be read .*images.val.7.png: missing")


def test_yolo_folders_of_another_machine(tmp_path):
    yolo_parts(tmp_path, "", train="train/images", val="val/images")
    write(tmp_path / "data.yaml", "train: /kaggle/working/train/images\nval: /kaggle/working/val/images\nnames: [a]")
    assert [len(s.records) for s in load_splits(tmp_path)] == [3, 2]
    shutil.move(tmp_path / "val", tmp_path.with_name("away"))
    refused(tmp_path, "val/images does not exist")


def test_yolo_labels_beside_images_in_a_folder_called_images(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        flat_yolo(tmp_path, count, f"{part}/camera1")
        flat_yolo(tmp_path, count, f"{part}/camera2/images")
    write(tmp_path / "data.yaml", "train: train\nval: val\nnames: [a, b]")
    splits = load_splits(tmp_path)
    assert [sum(len(r.boxes) for r in s.records) for s in splits] == [8, 4] and "no annotation file" not in said(splits)
    (tmp_path / "train/camera2/images/0.txt").unlink()
    assert "1 images have no annotation file" in said(load_splits(tmp_path))


def test_a_data_yaml_in_the_only_folder_is_found(tmp_path):
    yolo_parts(tmp_path / "as-unzipped", "names: [cat]")
    write(tmp_path / "as-unzipped" / "runs" / "args.yaml", "names: x\ntrain: y")
    assert load_splits(tmp_path)[0].classes == ["cat"]
    yolo_parts(tmp_path / "another", "names: [dog]")
    refused(tmp_path, "another/data.yaml or .*as-unzipped/data.yaml. --data takes the folder of one dataset")


def test_a_yaml_of_another_name_is_taken_if_it_is_the_only_one(tmp_path):
    yolo_parts(tmp_path, "names: [cat]")
    (tmp_path / "data.yaml").rename(tmp_path / "coco8.yaml")
    assert load_splits(tmp_path)[0].classes == ["cat"]
    shutil.copy(tmp_path / "coco8.yaml", tmp_path / "b.yaml")
    refused(tmp_path, "b.yaml or .*coco8.yaml")


# All layouts


def test_images_in_both_splits_are_said(tmp_path, capsys):
    yolo_parts(tmp_path, "names: [a]", val="images/train")
    load_splits(tmp_path)
    assert "3 images are in both splits, so that AP will be too high" in capsys.readouterr().out


def test_a_validation_split_without_boxes_is_refused(tmp_path):
    yolo_parts(tmp_path, "names: [a]")
    for path in (tmp_path / "labels" / "val").iterdir():
        path.write_text("")
    refused(tmp_path, "the split 'val' has 2 images but no box to evaluate on")


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    yolo_parts(tmp_path / "yolo", "names: [a]")
    coco_parts(tmp_path / "coco")
    devkit(tmp_path / "voc", {}, "abcdefghij")
    clean = {name: [len(s.records) for s in load_splits(tmp_path / name)] for name in ("yolo", "coco", "voc")}
    for root in list(tmp_path.rglob("*")):
        if root.is_dir():
            for name in ("._0.png", "._0.jpg", "._a.xml", "._train.json", ".DS_Store", "Thumbs.db", "desktop.ini"):
                (root / name).write_bytes(b"\0\5\x16\7Mac OS X")
            write_xml(root / "__MACOSX" / "Annotations" / "a.xml")
            draw(root / ".cache" / "x.png")
    assert clean == {name: [len(s.records) for s in load_splits(tmp_path / name)] for name in clean}


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_links_that_lead_out_are_not_followed(kind, tmp_path):
    root, secret = tmp_path / "data", tmp_path / "secret"
    for i in range(5):
        draw(secret / "images" / f"{i}.png")
    root.mkdir()
    (root / "images").symlink_to(secret / "images")
    (root / "loop").symlink_to(root)
    for i in range(5):
        if kind == "voc":
            write_xml(root / "annotations" / f"{i}.xml")
        elif kind == "yolo":
            write(root / "labels" / f"{i}.txt", yolo_line())
    if kind == "coco":
        write_json(root / "train.json", [f"{i}.png" for i in range(5)])
    refused(root, "lies outside of|behind links, add --allow-outside|unknown layout")
    assert sum(len(s.records) for s in load_splits(root, allow_outside=True)) == 5


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("folder.MOST_FILES", 5)
    refused(coco_parts(tmp_path), "more than 5 files")


def test_a_fraction_belongs_to_one_part_only(tmp_path):
    coco_parts(tmp_path)
    assert not any(split.is_fraction for split in load_splits(tmp_path))
    (tmp_path / "annotations" / "val.json").unlink()
    assert all(split.is_fraction for split in load_splits(tmp_path))
    assert Path(load_splits(tmp_path)[0].records[0].path).exists()


# Images


def grey_images(root, values):
    """A VOC folder of grey images with these pixel values, one array (T, 72, 96), as TIFFs: ten of them."""
    for i, image in enumerate(values):
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"{i}.tif")
        write_xml(root / "annotations" / f"{i}.xml")
    return root


def ramps(top, dtype, count=10):
    """Images from 0 to `top`, each brighter than the one before."""
    ramp = np.linspace(0, 1, SIZE[0]) * np.ones((SIZE[1], 1))
    return np.array([ramp * top * (i + 1) / count for i in range(count)]).astype(dtype)


@pytest.mark.parametrize(
    "values, low, high",
    [
        (ramps(200, np.uint16), 0, 255),
        (ramps(1000, np.uint16), 0, 1023),
        (ramps(4000, np.uint16), 0, 4095),
        (ramps(16000, np.uint16), 0, 16383),
        (ramps(60000, np.uint16), 0, 65535),
        (ramps(100_000, np.int32), 0, 100_000),
        (ramps(3000, np.int32) - 1000, -1000, 2000),
        (ramps(1, np.float32), 0, 1),
        (ramps(300, np.float32), 0, 300),
    ],
)
def test_deep_images_are_scaled_by_one_rule(values, low, high, tmp_path):
    train, val = load_splits(grey_images(tmp_path, values))
    assert train.value_range == val.value_range == pytest.approx((low, high), abs=(high - low) / 50)
    assert "images with more than 8 bits" in said([train])
    for split in (train, val):
        for index, record in enumerate(split.records):
            pixels = DetectionDataset(split, None).load(index)[0][0].numpy()
            expected = (values[int(record.path.stem)].astype(float) - low) * 255 / (high - low)
            assert np.abs(pixels - expected).max() <= (6 if values.dtype == np.float32 else 1)


def test_a_hot_pixel_does_not_set_the_range_of_floats(tmp_path):
    values = ramps(1, np.float32)
    values[:, 3, 3], values[:, 5, 5], values[:, 7, 7] = 1e6, np.nan, -np.inf
    train, _ = load_splits(grey_images(tmp_path, values))
    assert train.value_range == pytest.approx((0, 1), abs=0.02)
    pixels = DetectionDataset(train, None).load(0)[0]
    assert pixels[0, 3, 3] == 255 and pixels[0, 5, 5] == pixels[0, 7, 7] == 0


def test_colours_of_16_bits_are_said(tmp_path):
    header, pixels = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">6H", *[40000] * 6)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)  # two pixels of 16 bits a channel, which PIL does not write
    write_json(tmp_path / "all.json", [f"{i}.png" for i in range(5)], bbox=[0, 0, 1, 1])
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png)
    assert "4 images have colours of 16 bits, of which the upper 8 count" in said(load_splits(tmp_path))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_the_range_is_kept_for_detecting_and_resuming(tmp_path, monkeypatch, capsys):
    data, run = grey_images(tmp_path / "data", ramps(4000, np.uint16)), tmp_path / "run"
    options = [*SMALL, "--steps", "2", "--out", run]
    status, output, error = called(train.main, ["--data", data, *options], monkeypatch, capsys)
    assert status == 0, error
    detector = load(run / "best.pth", device="cpu")
    assert list(detector.value_range) == [0, 4095]
    dark = data / "images" / "0.tif"  # alone it would be taken for ten bits
    for way in (str(dark), Image.open(dark), np.asarray(Image.open(dark))):
        assert np.asarray(detector.open(way)).max() == round(400 * 255 / 4095)
    seen = []
    monkeypatch.setattr(infer, "draw_boxes", lambda image, *rest: seen.append(np.asarray(image).max()) or image)
    called(infer.main, [dark, "--checkpoint", run / "best.pth", "--out", tmp_path / "out"], monkeypatch, capsys)
    assert seen == [round(400 * 255 / 4095)]
    for i, image in enumerate(ramps(60000, np.uint16)):  # other exposures now
        Image.fromarray(image).save(data / "images" / f"{i}.tif")
    config = torch.load(run / "last.pth", weights_only=True)["config"]
    train_split, val_split, *_ = train.prepare({}, run, torch.device("cpu"))
    assert list(train_split.value_range) == list(val_split.value_range) == list(config["value_range"]) == [0, 4095]


FORMS = {
    ".avif": "AVIF",
    ".jfif": "JPEG",
    ".jp2": "JPEG2000",
    ".ppm": "PPM",
    ".PGM": "PPM",
    ".jpe": "JPEG",
    ".dib": "BMP",
}


@pytest.mark.parametrize("suffix", [s for s, form in FORMS.items() if form in transforms.FORMATS])
@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_every_format_that_is_opened_is_found(layout, suffix, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("RGB", SIZE, (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}{suffix}", FORMS[suffix])
        if layout == "voc":
            write_xml(tmp_path / "annotations" / f"{i}.xml")
        elif layout == "yolo":
            write(tmp_path / "labels" / f"{i}.txt", yolo_line())
    if layout == "coco":
        write_json(tmp_path / "labels.json", [f"{i}{suffix}" for i in range(5)])
    (tmp_path / "images" / "x.HEIC").write_bytes(b"closed")
    assert sum(len(s.records) for s in load_splits(tmp_path)) == 5
    assert (
        "1 images have a format that isn't opened (pip install pillow-heif): images/x.HEIC" in capsys.readouterr().out
    )
    assert len(infer.find_files([str(tmp_path / "images")])) == 5
    assert "1 of 6 files are neither images nor videos" in capsys.readouterr().out


# Near misses: what must not be taken for something else


def test_a_missing_image_is_not_replaced_by_one_of_the_same_name(tmp_path):
    for folder in ("cam1", "cam2"):
        for i in range(3):
            draw(tmp_path / "all" / folder / f"{i}.png")
    names = [f"{folder}/{i}.png" for folder in ("cam1", "cam2") for i in range(3)]
    (tmp_path / "all" / "cam1" / "0.png").unlink()
    write_json(tmp_path / "data.json", names)
    refused(tmp_path, "1 of . images can't be read .*cam1/0.png: missing", val_fraction=0.5)
    for i in range(3):
        (tmp_path / "all" / "cam2" / f"{i}.png").rename(tmp_path / f"{i}.png")
    shutil.rmtree(tmp_path / "all")  # an archive that was flattened
    refused(tmp_path, "would both be .*0.png; images seem to be missing")


def test_an_annotation_beside_images_has_no_image_elsewhere(tmp_path):
    for folder in ("cats", "dogs"):
        for i in range(5):
            draw(tmp_path / folder / f"{i}.jpg")
            write_xml(tmp_path / folder / f"{i}.xml")
    (tmp_path / "cats" / "0.jpg").unlink()
    (tmp_path / "dogs" / "0.xml").unlink()
    splits = load_splits(tmp_path)
    objects = {p: len(r.boxes) for s in splits for r, p in zip(s.records, paths(s, tmp_path))}
    assert objects["dogs/0.jpg"] == 0 and sum(objects.values()) == 8
    assert "1 annotation files have no image" in said(splits)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_turned_tiffs_are_what_turned_pngs_are(mode, orientation, tmp_path):
    values = np.arange(30 * 20).reshape(20, 30) * 90
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values.astype(np.uint8))
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.tif", "a.png"):
        image.save(tmp_path / name, exif=exif)
    ours, theirs = (transforms.read_image(tmp_path / name) for name in ("a.tif", "a.png"))
    assert ours.size == theirs.size and np.array_equal(np.asarray(ours), np.asarray(theirs))
    with transforms.open_image(tmp_path / "a.tif") as opened:
        assert transforms.upright_size(opened) == ours.size


def test_an_image_that_is_listed_several_times_is_one(tmp_path):
    for i in range(5):
        draw(tmp_path / "images" / f"{i}.png")
    write_json(tmp_path / "data.json", ["0.png", "0.png", "1.png", "2.png", "3.png", "4.png"])
    splits = load_splits(tmp_path)
    assert sorted(len(r.boxes) for s in splits for r in s.records) == [1, 1, 1, 1, 2]
    assert "6 entries are of 5 images, whose objects are put together" in said(splits)


@pytest.mark.parametrize("val", ["val_images", "images/val"])
def test_the_own_folder_of_a_split_comes_first(val, tmp_path):
    for folder, part, count in (("images", "train", 4), (val, "val", 2)):
        for i in range(count):
            draw(tmp_path / folder / f"{i}.png")
        write_json(tmp_path / f"{part}.json", [f"{i}.png" for i in range(count)])
    assert paths(load_splits(tmp_path)[1], tmp_path) == [f"{val}/{i}.png" for i in range(2)]


@pytest.mark.parametrize("top", ["train_val_split", "test_set", "my_valid_data"])
def test_the_innermost_folder_tells_the_split(top, tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for i in range(count):
            draw(tmp_path / top / part / f"{part}{i}.png")
            write_xml(tmp_path / top / part / f"{part}{i}.xml")
    assert [len(s.records) for s in load_splits(tmp_path)] == [4, 2]


def test_images_with_labels_of_another_format_are_no_background(tmp_path):
    for i in range(5):
        draw(tmp_path / f"{i}.png")
        write_xml(tmp_path / f"{i}.xml") if i else write(tmp_path / "0.txt", yolo_line())
    refused(tmp_path, "0.png: has no XML as others do, but .*0.txt; use one format")


def test_labels_are_found_folder_by_folder_and_in_any_case(tmp_path):
    yolo_parts(tmp_path, "names: [a]")
    for i in range(3):
        draw(tmp_path / "more" / "img" / f"m{i}.png")
        write(tmp_path / "more" / "ann" / f"m{i}.txt", yolo_line())
    (tmp_path / "labels" / "train" / "0.txt").rename(tmp_path / "labels" / "train" / "0.TXT")
    write(tmp_path / "data.yaml", "train: [images/train, more/img]\nval: images/val\nnames: [a]")
    assert [[len(r.boxes) for r in s.records] for s in load_splits(tmp_path)] == [[1] * 6, [1, 1]]


def test_voc_lists_may_name_folders_and_endings(tmp_path):
    devkit(tmp_path, {"train": ["a/0", "b/0", "x.jpg"], "val": ["a/1"]}, ["a/0", "a/1", "b/0", "0", "x"])
    draw(tmp_path / "JPEGImages" / "x.png")
    (tmp_path / "Annotations" / "b" / "0.xml").unlink()
    train_split, val_split = load_splits(tmp_path)
    found = [path.removeprefix("JPEGImages/") for path in paths(train_split, tmp_path)]
    assert found == ["a/0.jpg", "b/0.jpg", "x.jpg"] and [len(r.boxes) for r in train_split.records] == [1, 0, 1]
    write(tmp_path / "ImageSets" / "Main" / "val.txt", "x\n")
    refused(tmp_path, "x could be .*x.jpg or .*x.png")


def test_a_data_yaml_below_does_not_beat_what_is_at_the_top(tmp_path):
    coco_parts(tmp_path)
    yolo_parts(tmp_path / "backup", "names: [old]")
    assert load_splits(tmp_path)[0].classes == ["cat", "dog"]


@pytest.mark.parametrize("where", ["", "ImageSets/", "splits/"])
def test_lists_of_the_splits_count_wherever_they_are(where, tmp_path):
    for i in range(10):
        draw(tmp_path / "images" / f"{i}.jpg")
        write_xml(tmp_path / "annotations" / f"{i}.xml")
    write(tmp_path / f"{where}train.txt", "".join(f"{i} 1 1\n" for i in range(6)))
    write(tmp_path / f"{where}val.txt", "".join(f"images/{i}.jpg\n" for i in range(6, 10)))
    assert [len(s.records) for s in load_splits(tmp_path)] == [6, 4]


def test_composed_and_decomposed_letters_are_the_same(tmp_path):
    for i in range(5):
        draw(tmp_path / "images" / f"Größe{i}.jpg")
        write_xml(tmp_path / "annotations" / f"Gro\u0308ße{i}.xml")
    assert [len(s.records) for s in load_splits(tmp_path)] == [4, 1]


def test_folders_that_are_not_read_are_said(tmp_path, capsys):
    for i in range(5):
        draw(tmp_path / "data" / f"{i}.jpg")
        write_xml(tmp_path / "data" / f"{i}.xml")
        draw(tmp_path / "elsewhere" / f"e{i}.jpg")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    load_splits(tmp_path / "data")
    assert "1 folders can't be read, or lead out of the dataset (--allow-outside): " in capsys.readouterr().out


def test_an_image_called_test_is_no_list(tmp_path):
    flat_yolo(tmp_path, 5)
    draw(tmp_path / "test.jpg")
    write(tmp_path / "test.txt", yolo_line(1))
    assert [len(s.records) for s in load_splits(tmp_path)] == [5, 1]


def test_the_exact_name_of_annotations_goes_before_longer_ones(tmp_path):
    coco_parts(tmp_path)
    shutil.copy(tmp_path / "annotations" / "val.json", tmp_path / "annotations" / "train_mini.json")
    assert load_splits(tmp_path)[0].name == "train"


# Chosen classes


def test_classes_can_be_chosen(tmp_path):
    root = coco_parts(tmp_path, change=lambda data: data["annotations"][0].update(category_id=2))
    train_split, val_split = load_splits(root, classes="dog")
    assert train_split.classes == ["dog"] and train_split.category_ids == [2]
    assert [len(r.boxes) for r in train_split.records] == [1, 0, 0] and boxes([train_split, val_split]) == {BOX}
    assert "2 boxes of other classes are left out" in said([train_split])
    both, _ = load_splits(root, classes="dog, cat")
    assert both.classes == ["cat", "dog"] and [r.labels.tolist() for r in both.records] == [[1], [0], [0]]
    one, _ = load_splits(root, single_class=True)
    assert one.classes == ["object"] and [r.labels.tolist() for r in one.records] == [[0], [0], [0]]
    refused(root, "--classes cow: there is no class 'cow'; there are: cat, dog", classes="cow")


def test_a_run_with_chosen_classes_is_evaluated_and_resumed_with_them(tmp_path, monkeypatch, capsys):
    root, run = (
        coco_parts(tmp_path / "data", change=lambda d: d["annotations"][0].update(category_id=2)),
        tmp_path / "run",
    )
    arguments = ["--data", root, "--classes", "cat", *SMALL, "--steps", 2, "--out", run]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0 and load(run / "best.pth", device="cpu").classes == ["cat"], error
    status, out, error = called(evaluate.main, [run / "best.pth"], monkeypatch, capsys)
    assert status == 0 and "class/cat" in out and "class/dog" not in out, error
    status, out, error = called(train.main, ["--resume", run], monkeypatch, capsys)
    assert status == 0 and "nothing is left" in out, error


# What datasets.py finds


def test_similar_images_in_both_parts_are_said(tmp_path, monkeypatch, capsys):
    coco_parts(tmp_path)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "train" / "1.png")
    photo.resize((90, 68)).point(lambda v: min(255, v + 12)).save(tmp_path / "val" / "2.png")
    arguments = [tmp_path, "--json", "--strict", "--out", tmp_path / "s.png"]
    status, out, error = called(datasets.main, arguments, monkeypatch, capsys)
    content = json.loads(out)
    alike = [line for line in content["problems"] if "look like" in line]
    assert status == 1 and len(alike) == 1 and alike[0].startswith("1 images of val") and "val/2.png" in alike[0], error
    assert "coco layout" in error and any("3 images" in line for line in content["train"])


def test_output_that_nobody_reads_is_no_error(tmp_path):
    coco_parts(tmp_path)
    command = f"{sys.executable} {ROOT / 'datasets.py'} {tmp_path} --out {tmp_path / 's.png'} | true"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in process.stderr and "BrokenPipe" not in process.stderr, process.stderr
