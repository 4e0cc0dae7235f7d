"""Public datasets as they are downloaded, and what else lies beside images: each part has its own images and labels."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_coco
from PIL import Image
from test_cases import BOX, boxes, draw, paths, refused, said, write, write_json, write_xml, yolo_line, yolo_parts
from test_commands import called
from test_export import write_checkpoint

import datasets
import evaluate
import export
from checkpoint import read_checkpoint
from detector import to_image
from folder import Folder
from layouts import load_splits
from splits import fingerprint
from transforms import read_image


def draw_mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ones((72, 96), dtype=np.uint8)).save(path)


# Masks beside the images


@pytest.mark.parametrize(
    "image, annotation, mask",
    [
        ("images/{}.jpg", "annotations/xmls/{}.xml", "annotations/trimaps/{}.png"),  # Oxford-IIIT Pet
        ("images/{}.png", "annotations/xmls/{}.xml", "annotations/masks/{}.png"),
        ("photos/{}.jpg", "annotations/{}.xml", "annotations/{}.png"),
        ("images/{}.jpg", "labels/{}.txt", "labels/{}.png"),
        ("data/photos/{}.jpg", "data/labels/{}.txt", "data/seg_masks/{}.png"),
        ("JPEGImages/{}.jpg", "Annotations/{}.xml", "SegmentationClass/{}.png"),
        ("images/train/{}.jpg", "annotations/train/{}.xml", "annotations/train/{}.png"),
        ("images/train/{}.jpg", "labels/train/{}.txt", "labels/train/{}.png"),
        ("images/{}.jpg", "gt/{}.xml", "gt/{}.png"),
    ],
)
def test_masks_are_not_taken_for_images(image, annotation, mask, tmp_path):
    for i in range(5):
        draw(tmp_path / image.format(i))
        draw_mask(tmp_path / mask.format(i))
        if annotation.endswith(".xml"):
            write_xml(tmp_path / annotation.format(i))
        else:
            write(tmp_path / annotation.format(i), yolo_line())
    splits = load_splits(tmp_path)
    found = [path for split in splits for path in paths(split, tmp_path)]
    assert sorted(found) == [image.format(i) for i in range(5)] and boxes(splits) == {BOX}


def test_images_in_a_folder_of_masked_faces_are_images(tmp_path):
    for kind in ("with_mask", "without_mask"):
        for i in range(3):
            draw(tmp_path / kind / f"{i}.png")
            write_xml(tmp_path / kind / f"{i}.xml")
    splits = load_splits(tmp_path)
    assert sum(len(split.records) for split in splits) == 6 and boxes(splits) == {BOX}


def test_an_image_that_is_missing_is_not_replaced_by_its_mask(tmp_path):
    for name, count in (("train", 3), ("val", 2)):
        for i in range(count):
            draw(tmp_path / f"JPEGImages/{name}{i}.png")
            write_xml(tmp_path / f"Annotations/{name}{i}.xml")
        write(tmp_path / f"ImageSets/Main/{name}.txt", "".join(f"{name}{i}\n" for i in range(count)))
    for i in range(2):
        (tmp_path / f"JPEGImages/val{i}.png").unlink()
        draw_mask(tmp_path / f"SegmentationClass/val{i}.png")
    refused(tmp_path, "2 of 2 images can't be read .*JPEGImages/val0.jpg: missing")


# What tells the split


def test_a_class_that_is_called_like_a_split_is_no_split(tmp_path):
    """Open Images has a class Train: its folder is in each part."""
    for part, count in (("train", 3), ("validation", 2)):
        for kind in ("Train", "test_tube"):
            for i in range(count):
                draw(tmp_path / part / kind / f"{part}-{i}.png")
                write_xml(tmp_path / part / kind / f"{part}-{i}.xml")
    splits = load_splits(tmp_path)
    assert [split.name for split in splits] == ["train", "validation"]
    assert [len(split.records) for split in splits] == [6, 4]
    assert all(path.startswith("validation/") for path in paths(splits[1], tmp_path))


@pytest.mark.parametrize(
    "train, val", [("my_train", "my_test"), ("img_train", "img_val"), ("test_set/train", "test_set/val")]
)
def test_names_that_hold_a_split_tell_it(train, val, tmp_path):
    for part, count in ((train, 3), (val, 2)):
        for i in range(count):
            draw(tmp_path / part / f"{i}.png")
            write_xml(tmp_path / part / f"{i}.xml")
    splits = load_splits(tmp_path)
    assert [[path.rsplit("/", 1)[0] for path in paths(split, tmp_path)] for split in splits] == [[train] * 3, [val] * 2]


def test_one_folder_whose_name_holds_a_split_is_one_part_of_all(tmp_path):
    for kind in ("bullet_train", "bus"):
        for i in range(5):
            draw(tmp_path / kind / f"{kind}{i}.png")
            write_xml(tmp_path / kind / f"{kind}{i}.xml")
    assert sum(len(split.records) for split in load_splits(tmp_path)) == 10


def test_lists_name_images_with_their_folders(tmp_path):
    """Frames have the same names in every sequence."""
    for sequence, count in (("seq1", 3), ("seq2", 2)):
        for i in range(count):
            draw(tmp_path / f"images/{sequence}/{i:06d}.png")
            write_xml(tmp_path / f"annotations/{sequence}/{i:06d}.xml")
    write(tmp_path / "train.txt", "".join(f"./images/seq1/{i:06d}.png\n" for i in range(3)))
    write(tmp_path / "val.txt", "".join(f"seq2/{i:06d}.png\n" for i in range(2)))
    train, val = load_splits(tmp_path)
    assert paths(train, tmp_path) == [f"images/seq1/{i:06d}.png" for i in range(3)]
    assert paths(val, tmp_path) == [f"images/seq2/{i:06d}.png" for i in range(2)]


@pytest.mark.parametrize("folder", ["trainval", "JPEGImages-trainval", "train_val_images", "train"])
def test_both_parts_may_lie_in_one_folder(folder, tmp_path):
    for part, numbers in (("train", range(3)), ("val", range(3, 5))):
        for i in numbers:
            draw(tmp_path / folder / f"{i}.png")
        write_json(tmp_path / f"annotations/{part}.json", [f"{i}.png" for i in numbers])
    splits = load_splits(tmp_path)
    assert [paths(split, tmp_path) for split in splits] == [
        [f"{folder}/{i}.png" for i in range(3)],
        [f"{folder}/{i}.png" for i in range(3, 5)],
    ]


@pytest.mark.parametrize("content", ["no annotations", "annotations: []", "detections"])
def test_a_coco_file_without_annotations_is_left_out(content, tmp_path):
    for i in range(5):
        draw(tmp_path / "train" / f"{i}.png")
        draw(tmp_path / "test" / f"{i + 5}.png")
    write_json(tmp_path / "train.json", [f"{i}.png" for i in range(5)])
    write_json(tmp_path / "test.json", [f"{i + 5}.png" for i in range(5)])
    data = json.loads((tmp_path / "test.json").read_text())
    if content == "annotations: []":
        data["annotations"] = []
    else:
        data = data["annotations"] if content == "detections" else {k: v for k, v in data.items() if k != "annotations"}
    write(tmp_path / "test.json", json.dumps(data))
    splits = load_splits(tmp_path)
    assert [len(split.records) for split in splits] == [4, 1] and "1 JSON files have no annotations" in said(splits)
    write(tmp_path / "test.json", (tmp_path / "train.json").read_text()[:-9])  # cut short: not left out
    refused(tmp_path, "test.json: ")


def test_the_test_images_of_a_challenge_have_no_labels(tmp_path):
    for i in range(5):
        draw(tmp_path / "images/train" / f"{i}.png")
        write(tmp_path / "labels/train" / f"{i}.txt", yolo_line())
        draw(tmp_path / "images/test" / f"{i + 5}.png")
    write(tmp_path / "data.yaml", "train: images/train\ntest: images/test\nnames: [cat]\n")
    assert [len(split.records) for split in load_splits(tmp_path)] == [4, 1]


# Pascal VOC's lists, other folders


@pytest.mark.parametrize(
    "image, annotation",
    [
        ("images/{}.png", "Annotations/{}.xml"),
        ("JPEGImages-{part}/{}.png", "Annotations/Horizontal Bounding Boxes/{}.xml"),  # DIOR
        ("JPEGImages/{}.png", "labels/{}.xml"),
    ],
)
def test_lists_find_their_files_in_other_folders(image, annotation, tmp_path):
    for part, numbers in (("trainval", range(3)), ("test", range(3, 5))):
        for i in numbers:
            draw(tmp_path / image.format(i, part=part))
            write_xml(tmp_path / annotation.format(i))
        write(tmp_path / f"ImageSets/Main/{part}.txt", "".join(f"{i}\n" for i in numbers))
    splits = load_splits(tmp_path)
    assert [split.name for split in splits] == ["trainval", "test"] and boxes(splits) == {BOX}
    assert paths(splits[1], tmp_path) == [image.format(i, part="test") for i in (3, 4)]


def test_a_list_of_test_images_is_validated_on_where_there_is_no_other(tmp_path):
    for part, numbers in (("train", range(3)), ("test", range(3, 5))):
        for i in numbers:
            draw(tmp_path / f"JPEGImages/{i}.png")
            write_xml(tmp_path / f"Annotations/{i}.xml")
        write(tmp_path / f"ImageSets/Main/{part}.txt", "".join(f"{i}\n" for i in numbers))
    assert [(split.name, len(split.records)) for split in load_splits(tmp_path)] == [("train", 3), ("test", 2)]


def test_labels_of_two_kinds_are_refused(tmp_path):
    for i in range(4):
        draw(tmp_path / f"images/{i}.png")
        write(tmp_path / f"labels/{i}.txt", yolo_line())
    write_xml(tmp_path / "xml/0.xml")
    refused(tmp_path, "images/1.png: has no XML as others do, but .*labels/1.txt.*--layout yolo takes")
    assert sum(len(split.records) for split in load_splits(tmp_path, layout="yolo")) == 4


# YOLO


@pytest.mark.parametrize(
    "names, classes",
    [
        ("names: [no, yes]", ["no", "yes"]),
        ("names: {0: on, 1: off}", ["on", "off"]),
        ("names: [01, 0x2]", ["01", "0x2"]),
        ("names:\n  0: 1\n  1: 2.50", ["1", "2.50"]),
    ],
)
def test_class_names_are_as_they_are_written(names, classes, tmp_path):
    yolo_parts(tmp_path, names)
    assert load_splits(tmp_path)[0].classes == classes


def test_images_in_folders_below_belong_to_their_entry(tmp_path):
    yolo_parts(tmp_path, "names: [cat]", train="images/train", val="images/train/val")
    for folder in ("images/train/site 2", "images/train/.thumbnails"):
        draw(tmp_path / folder / "b.png")
        write(tmp_path / folder.replace("images", "labels") / "b.txt", yolo_line())
    train, val = load_splits(tmp_path)
    assert [len(split.records) for split in (train, val)] == [4, 2]
    assert "images/train/site 2/b.png" in paths(train, tmp_path)


def test_letters_of_images_and_labels_are_composed_alike(tmp_path):
    yolo_parts(tmp_path, "names: [cat]")
    draw(tmp_path / "images/train/Gro\u0308\u00dfe.png")
    write(tmp_path / "labels/train/Gr\u00f6\u00dfe.txt", yolo_line())
    train, _ = load_splits(tmp_path)
    assert [len(record.boxes) for record in train.records] == [1] * 4


@pytest.mark.parametrize("labels", ["labels", "ann"])
def test_a_path_of_data_yaml_may_be_absolute(labels, tmp_path, monkeypatch, capsys):
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            draw(tmp_path / f"mine/images/{part}/{i}.png")
            write(tmp_path / f"mine/{labels}/{part}/{i}.TXT", yolo_line())
    write(
        tmp_path / "mine/data.yaml",
        f"path: {tmp_path / 'mine'}\ntrain: images/train\nval: images/val\nnames: [cat]\n",
    )
    monkeypatch.chdir(tmp_path)
    splits = load_splits("mine")
    assert boxes(splits) == {BOX} and "no annotation file" not in said(splits)
    assert "belong to neither split" not in capsys.readouterr().out


# What must not be taken for something else


def test_a_missing_split_does_not_take_the_images_of_the_other(tmp_path):
    """Both parts have 0.png; those of val are not there."""
    for i in range(3):
        draw(tmp_path / f"images/train/{i}.png")
    for part, count in (("train", 3), ("val", 2)):
        write_json(tmp_path / f"annotations/{part}.json", [f"{i}.png" for i in range(count)])
    refused(tmp_path, "val: 2 of 2 images can't be read .*val/0.png: missing")


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_labels_of_a_missing_split_stay_without_images(form, tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            if part == "train":
                draw(tmp_path / f"images/train/{i}.png")
            if form == "yolo":
                write(tmp_path / f"labels/{part}/{i}.txt", yolo_line())
            else:
                write_xml(tmp_path / f"Annotations/{part}/{i}.xml")
    splits = load_splits(tmp_path, val_fraction=0.4)
    assert [len(split.records) for split in splits] == [2, 1] and boxes(splits) == {BOX}


def test_labelled_images_in_a_folder_called_masked_are_images(tmp_path):
    for kind in ("masked", "bare"):
        for part, count in (("train", 3), ("val", 2)):
            for i in range(count):
                draw(tmp_path / f"images/{part}/{kind}/{i}.png")
                write(tmp_path / f"labels/{part}/{kind}/{i}.txt", yolo_line())
    write(tmp_path / "data.yaml", "path: ''\ndownload: ''\ntrain: images/train\nval: images/val\nnames: [cat]\n")
    assert [len(split.records) for split in load_splits(tmp_path)] == [6, 4]


def test_a_single_devkit_takes_annotations_beside_it(tmp_path):
    for i in range(4):
        draw(tmp_path / f"VOC/JPEGImages/{i}.png")
        write_xml(tmp_path / f"Annotations/{i}.xml")
    write(tmp_path / "VOC/ImageSets/Main/train.txt", "0\n1\n2\n")
    write(tmp_path / "VOC/ImageSets/Main/val.txt", "3\n")
    splits = load_splits(tmp_path)
    assert boxes(splits) == {BOX} and sum(len(r.boxes) for split in splits for r in split.records) == 4


def test_a_devkit_does_not_take_the_boxes_of_another(tmp_path):
    for devkit in ("VOC_a", "VOC_b"):
        for i in range(4):
            draw(tmp_path / devkit / f"JPEGImages/{i}.png")
            if devkit == "VOC_a":
                write_xml(tmp_path / devkit / f"Annotations/{i}.xml")
        write(tmp_path / devkit / "ImageSets/Main/train.txt", "0\n1\n2\n")
        write(tmp_path / devkit / "ImageSets/Main/val.txt", "3\n")
    train, _ = load_splits(tmp_path)
    assert sorted(len(record.boxes) for record in train.records) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("val", ["[images/val]", "images/val", "images/val/"])
def test_the_images_of_another_entry_are_not_this_ones(val, tmp_path):
    for i in range(3):
        draw(tmp_path / f"images/{i}.png")
        draw(tmp_path / f"images/masks/{i}.png")
        write(tmp_path / f"labels/{i}.txt", yolo_line())
    for i in range(2):
        draw(tmp_path / f"images/val/{i}.png")
        write(tmp_path / f"labels/val/{i}.txt", yolo_line())
    write(tmp_path / "data.yaml", f"train: [images, images]\nval: {val}\nnames: [cat]\n")
    assert [len(split.records) for split in load_splits(tmp_path)] == [3, 2]


@pytest.mark.parametrize("outer", ["trainval", "train"])
def test_splits_within_a_split_are_the_innermost(outer, tmp_path):
    for folder, count in ((f"{outer}/train", 4), (f"{outer}/val", 3), ("test", 2)):
        for i in range(count):
            draw(tmp_path / folder / f"{i}.png")
            write_xml(tmp_path / folder / f"{i}.xml")
    assert [len(split.records) for split in load_splits(tmp_path)] == [4, 3]


def test_an_image_beside_its_annotation_is_its_image(tmp_path):
    for i in range(4):
        draw(tmp_path / f"with_mask/{i}.png")
        draw(tmp_path / f"plain/{i}.jpg")
        write_xml(tmp_path / f"with_mask/{i}.xml")
    found = [path for split in load_splits(tmp_path) for path in paths(split, tmp_path)]
    assert sorted(found) == [f"with_mask/{i}.png" for i in range(4)]


def test_texts_elsewhere_are_no_labels(tmp_path):
    for i in range(5):
        draw(tmp_path / f"images/{i}.png")
        if i:
            write_xml(tmp_path / f"annotations/{i}.xml")
    write(tmp_path / "results/0.txt", "0 0.5 0.5 0.2 0.3")
    assert sum(len(split.records) for split in load_splits(tmp_path)) == 5


def test_a_training_file_without_annotations_is_not_left_out(tmp_path):
    for part in ("train", "val"):
        for i in range(3):
            draw(tmp_path / part / f"{i}.png")
        write_json(tmp_path / f"{part}.json", [f"{i}.png" for i in range(3)])
    data = json.loads((tmp_path / "train.json").read_text()) | {"annotations": []}
    write(tmp_path / "train.json", json.dumps(data))
    refused(tmp_path, "the training split 'train' has 3 images but no box")


@pytest.mark.parametrize("names", ["", "~", "null", "3"])
def test_names_that_are_none_are_refused(names, tmp_path):
    yolo_parts(tmp_path, f"names: {names}")
    refused(tmp_path, "not a YOLO data.yaml")


# Sequences with the same names


@pytest.mark.parametrize("annotation", ["annotations/{}/{}.xml", "frames/{}/xml/{}.xml"])
def test_frames_of_many_sequences_are_found_in_time(annotation, tmp_path, monkeypatch):
    """300 sequences of 10 frames: each annotation is compared with a few images, not with all 300 of its name."""
    count = 300
    image = "frames/{}/{}.png" if annotation.startswith("annotations") else "frames/{}/img/{}.png"
    for s in range(count):
        for i in range(10):
            for name in (image, annotation):
                path = tmp_path / name.format(f"s{s}", f"{i:06d}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    compared, nearest = [], Folder.nearest
    monkeypatch.setattr(
        Folder,
        "nearest",
        lambda self, places, *args, **more: compared.append(len(places)) or nearest(self, places, *args, **more),
    )
    matched, unmatched = Folder(tmp_path, tmp_path).match(".xml")
    assert len(matched) == 10 * count and not unmatched and max(compared) <= 2
    assert all(image.folders[1] == xml.folders[1] for image, xml in matched.items())


# Other data than that of the run


def evaluated(options, monkeypatch, capsys):
    status, out, error = called(evaluate.main, options, monkeypatch, capsys)
    return status, out + error


def holdout(root, count=4, names=("kind 2", "kind 1")):
    """A COCO dataset with one part, whose classes have another order and other ids than those of a run."""
    write_coco(root, {"images": count}, category_ids=(8, 9))
    file = root / "annotations" / "instances_images.json"
    data = json.loads(file.read_text())
    data["categories"] = [{"id": c, "name": name} for c, name in zip((8, 9), names)]
    file.write_text(json.dumps(data))
    return root


def checkpoint(path, **config):
    return write_checkpoint(path, "detr", ("kind 1", "kind 2"), num_classes=2, category_ids=[1, 2], **config)


def test_all_images_of_other_data_are_evaluated(tmp_path, monkeypatch, capsys):
    file = checkpoint(tmp_path / "best.pth", trained_on="of others", val_fraction=0.5)
    for count in (1, 4):
        root = holdout(tmp_path / f"holdout{count}", count)
        status, said = evaluated([file, "--data", root], monkeypatch, capsys)
        assert status == 0 and f"images: {count} images, {2 * count} boxes, 2 classes" in said, said


@pytest.mark.parametrize("of_run", [True, False])
def test_of_the_runs_own_data_only_validation_images_are(of_run, tmp_path, monkeypatch, capsys):
    """Wherever they lie now. Checkpoints of earlier versions do not say what they were trained on."""
    root = holdout(tmp_path / "data", names=("kind 1", "kind 2"))
    train, _ = load_splits(root, val_fraction=0.5)
    assert train.fingerprint == fingerprint(train.records)
    file = checkpoint(tmp_path / "best.pth", trained_on=train.fingerprint if of_run else None, val_fraction=0.5)
    shutil.move(root, tmp_path / "moved")
    status, said = evaluated([file, "--data", tmp_path / "moved"], monkeypatch, capsys)
    assert status == 0 and "val: 2 images, 4 boxes" in said, said


def test_of_the_runs_own_folder_too_though_it_has_changed(tmp_path, monkeypatch, capsys):
    root = holdout(tmp_path / "data", names=("kind 1", "kind 2"))
    file = checkpoint(tmp_path / "best.pth", trained_on="fewer images", val_fraction=0.5, data=str(root))
    for options in ([], ["--data", root]):
        status, said = evaluated([file, *options], monkeypatch, capsys)
        assert status == 0 and "val: 2 images" in said and "are no longer those of" in said, said


def test_an_exported_file_is_evaluated_on_classes_in_another_order(tmp_path, monkeypatch, capsys):
    file = checkpoint(tmp_path / "best.pth", trained_on="of others")
    status, _, error = called(export.main, [file, "--format", "torch"], monkeypatch, capsys)
    assert status == 0, error
    status, said = evaluated([tmp_path / "best.pt2", "--data", holdout(tmp_path / "data")], monkeypatch, capsys)
    assert status == 0 and "images: 4 images, 8 boxes" in said, said


def test_the_names_of_the_runs_splits_are_not_asked_of_other_data(tmp_path, monkeypatch, capsys):
    file = checkpoint(tmp_path / "best.pth", train_split="mine", val_split="yours", trained_on="of others")
    status, said = evaluated([file, "--data", holdout(tmp_path / "one")], monkeypatch, capsys)
    assert status == 0 and "images: 4 images" in said, said
    write_coco(tmp_path / "two", {"train": 3, "val": 2})
    status, said = evaluated([file, "--data", tmp_path / "two"], monkeypatch, capsys)
    assert status == 0 and "val: 2 images" in said, said
    status, said = evaluated([file, "--data", tmp_path / "two", "--val-split", "ours"], monkeypatch, capsys)
    assert status == 2 and "no annotations for" in said


def test_classes_are_matched_by_their_names(tmp_path, monkeypatch, capsys):
    root = holdout(tmp_path / "data")
    file = checkpoint(tmp_path / "best.pth", trained_on="of others")
    content = read_checkpoint(file)
    _, val = evaluate.load_run_splits(file, content, root)
    assert val.classes == ["kind 1", "kind 2"] and val.category_ids == [1, 2]
    assert val.records[0].labels.tolist() == [1, 0]  # kind 2 comes first in the file
    few = holdout(tmp_path / "few", names=("kind 2", "unused"))  # a test set may lack a class, and name others
    data = json.loads((few / "annotations" / "instances_images.json").read_text())
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 8]
    write(few / "annotations" / "instances_images.json", json.dumps(data))
    assert {int(label) for r in evaluate.load_run_splits(file, content, few)[1].records for label in r.labels} == {1}
    cows = holdout(tmp_path / "cows", names=("kind 1", "cow"))
    status, said = evaluated([file, "--data", cows], monkeypatch, capsys)
    assert status == 2 and "it has cow, the checkpoint kind 1, kind 2" in said


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-size", -1], "--batch-size -1: has to be at least 1"),
        (["--batch-size", 0], "--batch-size 0: has to be at least 1"),
        (["--image-size", -640], "--image-size -640: has to be in 1"),
        (["--image-size", 0], "--image-size 0: has to be in 1"),
    ],
)
def test_impossible_numbers_are_refused(options, message, tmp_path, monkeypatch, capsys):
    status, said = evaluated([tmp_path / "best.pth", *options], monkeypatch, capsys)
    assert status == 2 and message in said and said.count("\n") == 1


# What datasets.py says of annotations that do not belong to their images


def test_annotations_of_larger_images_are_suspicious(tmp_path, monkeypatch, capsys):
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            draw(tmp_path / part / f"{i}.png")
            with Image.open(tmp_path / part / f"{i}.png") as image:
                image.resize((32, 24)).save(tmp_path / part / f"{i}.png")
        write_json(tmp_path / f"{part}.json", [f"{i}.png" for i in range(count)])
    arguments = [tmp_path, "--strict", "--out", tmp_path / "s.png"]
    status, out, error = called(datasets.main, arguments, monkeypatch, capsys)
    assert status == 1 and "train: 3 images differ in size from their annotations" in out, error
    assert out.count("do the annotations belong to these images?") >= 2


# Images


def test_broken_exif_is_passed_over(tmp_path):
    """Viewers show such an image; PIL raises SyntaxError if the file tells its density too."""
    draw(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x01\x00\x48\x00\x48\x00\x00"
    exif = b"\xff\xe1\x00\x10Exif\x00\x00notTIFF!"
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8" + jfif + exif + content[content.index(b"\xff\xdb") :])
    a, b = (np.asarray(read_image(tmp_path / name)) for name in ("a.jpg", "b.jpg"))
    assert np.array_equal(a, b)


def test_stored_pixels_stay_as_they_are_stored(tmp_path):
    """An image that is annotated as it is stored is detected in as it is stored, by an exported detector too."""
    draw(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "b.jpg", exif=exif)
    stored = read_image(tmp_path / "b.jpg", upright=False)
    assert stored.size == to_image(stored).size == (96, 72) and read_image(tmp_path / "b.jpg").size == (72, 96)
