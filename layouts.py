"""Reads datasets of any common layout into one form, a `Split` of `Record`s, checked by checks.py.

Layouts: COCO, Pascal VOC and YOLO, as their authors, the tools that export them, and hands leave them; see LAYOUTS. A
`Folder` lists all files once. The annotations are found in it, read by annotations.py, and matched with their images.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from annotations import (
    MALFORMED,
    MOST_CLASSES,
    read_coco_json,
    read_darknet_data,
    read_lines,
    read_text,
    read_voc_file,
    read_yolo_labels,
    read_yolo_yaml,
    require_inside,
    require_string,
)
from checks import check
from errors import UserError
from folder import MOST_LOOKED_INTO, Folder, count_paths, depth, in_masks, listing, normal, parts_of
from transforms import CLOSED_SUFFIXES, IMAGE_SUFFIXES

VAL_FRACTION = 0.2  # of a dataset that has one part only
BACKGROUND = "images have no annotation file and are taken as background"
NO_IMAGE = "annotation files have no image and are left out"


class NoSuchSplit(UserError):
    """The dataset has no split of a name that was asked for."""


@dataclass
class Record:
    """One labelled image with T objects.

    boxes (T, 4) are xyxy in pixels of the upright image, labels (T,) in 0..K-1, areas (T,) in square pixels.
    ignored (T,) marks crowds and `difficult` objects: background in training, as in DETR; neither hits nor misses in
    evaluation.
    """

    image_id: int | str
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    upright: bool = True  # False: the boxes refer to the stored pixels, before any EXIF rotation
    relative: bool = False  # True: boxes and areas are fractions of the image's, whose size is not known yet
    tile: tuple | None = None  # (left, top, right, bottom) in the image, if this is a part of it, see cut_into_tiles
    whole: int = -1  # the index, in its split, of the record that it is a part of


@dataclass
class Split:
    """The training or the validation split of a dataset; `remarks` say what was repaired or left out."""

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]
    remarks: list[str] = field(default_factory=list)
    umbrella: int | None = None  # the label of a class that may stand for all others, see leave_out_umbrella
    is_fraction: bool = False  # the dataset has one part only, and this is a fraction of it, see divide
    value_range: tuple | None = None  # of images with more than 8 bits, see transforms.common_range
    whole: "Split | None" = None  # what this Split holds the tiles of, see datasets.cut_into_tiles
    side: int | None = None  # of these tiles
    fingerprint: str | None = None  # of a training split, see fingerprint
    repairs: dict = field(default_factory=dict)  # {what checks.py repaired or left out: how often}

    def describe(self):
        """-> lines: what it holds, and its remarks."""
        boxes = sum(int((~record.ignored).sum()) for record in self.records)
        counts = f"{len(self.records):,} images, {boxes:,} boxes, {len(self.classes)} classes"
        return [f"{self.name}: {counts}", *(f"  {self.name}: {remark}" for remark in self.remarks)]

    @property
    def most_objects(self):
        """The largest number of objects in an image, ignored ones not counted."""
        return max((int((~r.ignored).sum()) for r in self.records), default=0)


def make_record(image_id, path, size, rows):
    """size (width, height), rows [(x1, y1, x2, y2, label, area, ignored)] -> Record."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    labels, ignored = table[:, 4].astype(np.int64), table[:, 6].astype(bool)
    return Record(image_id, path, *size, table[:, :4], labels, table[:, 5], ignored)


def load_splits(
    root,
    train_split=None,
    val_split=None,
    skip_bad_images=False,
    layout=None,
    val_fraction=None,
    allow_outside=False,
    only_val=False,
    classes=None,
    single_class=False,
    trained_on=None,
):
    """Reads and checks the dataset in a folder -> [training Split, validation Split]. Raises UserError.

    train_split, val_split: choose among several splits: the name of a file in ImageSets/Main for Pascal VOC, a key of
        data.yaml for YOLO, part of the name of the JSON or of its folder otherwise.
    skip_bad_images: leave out images that can't be read.
    layout: a key of LAYOUTS; None detects it.
    val_fraction: of the images of a dataset with one part only, chosen with a fixed seed; None is VAL_FRACTION.
    allow_outside: files may lie outside of the folder, through links, `..` or absolute paths.
    only_val: no training image is opened; the training annotations only give the classes.
    classes: "a,b", those to keep; single_class: all of them become one, "object".
    trained_on: the fingerprint of the images that a detector was trained on: other images that have one part only are
        not divided, all of them are the validation split.

    Prints the layout and what belongs to no split.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data takes the folder of a dataset")
    folder = Folder(root, None if allow_outside else root)
    is_detected = layout is None
    layout = FORMER_NAMES.get(layout, layout) or detect_layout(folder)
    splits = LAYOUTS[layout](folder, train_split, val_split)
    if len(splits) == 1 and val_split:
        raise NoSuchSplit(f"{root}: one part has all images; leave out --val-split {val_split}, or use --val-fraction")
    if len(splits) == 1:
        splits = divide(splits[0], VAL_FRACTION if val_fraction is None else val_fraction, root, trained_on)
    splits[0].fingerprint = fingerprint(splits[0].records)
    leftover = leftovers(folder, splits)
    for split in splits:
        choose_classes(split, classes, single_class, root)
    for split in splits[1:] if only_val else splits:
        if not split.records:
            raise UserError(f"{root}: the split '{split.name}' has no images")
        require_inside(folder.home, [record.path for record in split.records])
        check(split, skip_bad_images)
    train, val = splits
    if train.value_range:
        low, high = val.value_range = train.value_range
        train.remarks.append(f"values of images with more than 8 bits: {low:g} becomes black, {high:g} white")
    boxes = sum(len(r.boxes) for r in train.records)
    if not only_val and not train.most_objects:
        what = f"and {boxes} boxes, all of them crowds or difficult: nothing to learn" if boxes else "but no box"
        reasons = f" ({'; '.join(train.remarks)})" if train.remarks else ""
        raise UserError(f"{root}: the training split '{train.name}' has {len(train.records)} images {what}{reasons}")
    if not val.most_objects:
        raise UserError(f"{root}: the split '{val.name}' has {len(val.records)} images but no box to evaluate on")
    print(f"{root}: {layout} layout{' (detected; --layout overrides it)' if is_detected else ''}")
    for line in leftover:
        print(f"{root}: {line}")
    return splits


def choose_classes(split, classes, single_class, root):
    """Leaves out all objects of other classes than "a,b", and makes one class of those that stay, in place.

    Raises UserError for a class that is not there.
    """
    names = [name.strip() for name in classes.split(",")] if classes else split.classes
    for name in names:
        if name not in split.classes:
            there = ", ".join(split.classes[:20])
            raise UserError(f"{root}: --classes {classes}: there is no class '{name}'; there are: {there}")
    kept = [label for label, name in enumerate(split.classes) if name in names]
    new_labels = np.full(len(split.classes), -1)
    new_labels[kept] = 0 if single_class else np.arange(len(kept))
    left_out = 0
    for record in split.records:
        labels = new_labels[record.labels]
        keep = labels >= 0
        left_out += int((~keep).sum())
        record.boxes, record.labels, record.areas, record.ignored = (
            values[keep] for values in (record.boxes, labels, record.areas, record.ignored)
        )
    split.classes = ["object"] if single_class else [split.classes[label] for label in kept]
    split.category_ids = [1] if single_class else [split.category_ids[label] for label in kept]
    if left_out:
        split.remarks.append(f"{left_out} boxes of other classes are left out (--classes)")


def divide(whole, val_fraction, root, trained_on=None):
    """The one Split of a dataset -> [Split, Split], val_fraction of its images in the second. Raises UserError.

    trained_on: see load_splits.
    """
    total = len(whole.records)
    val_count = round(val_fraction * total)
    order = np.random.default_rng(0).permutation(total)  # a fixed seed: every run gets the same split
    remark = (
        f"{whole.name} is split with a fixed seed: {total - val_count} images to train on, {val_count} to evaluate on "
        "(--val-fraction)"
    )
    train = subset(whole, "train", order[val_count:], [*whole.remarks, remark])
    if trained_on is not None and fingerprint(train.records) != trained_on:
        return [subset(whole, "train", [], []), whole]
    if not 0 < val_count < total:
        raise UserError(f"{root}: --val-fraction {val_fraction} of {total} images leaves a split without any")
    return [train, subset(whole, "val", order[:val_count], [])]


def fingerprint(records):
    """-> a short text that tells the images of some Records from others, by the names of their files."""
    names = sorted({record.path.name for record in records})
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]


def subset(split, name, indices, remarks):
    """The records of a Split at some indices, in their order in it -> Split."""
    records = [split.records[i] for i in sorted(indices)]
    return Split(name, split.classes, split.category_ids, records, remarks, is_fraction=True)


def leftovers(folder, splits):
    """Lines about images that no Split has or both have, and files found elsewhere than the annotations say."""
    in_train, in_val = ({str(record.path) for record in split.records} for split in splits)
    used = in_train | in_val
    unused = [place.file for place in folder.places(IMAGE_SUFFIXES) if str(Path(place.file)) not in used]
    unused = [os.path.relpath(file, folder.root) for file in unused]
    moved = [f"{text[:100]!r} is {os.path.relpath(file, folder.root)}" for file, text in folder.moved.items()]
    closed = [os.path.relpath(place.file, folder.root) for place in folder.places(CLOSED_SUFFIXES)]
    is_heif = any(path.lower().endswith((".heic", ".heif")) for path in closed)
    return [
        *count_paths(unused, "images belong to neither split"),
        *count_paths(sorted(in_train & in_val), "images are in both splits, so that AP will be too high"),
        *count_paths(closed, "images have a format that isn't opened" + is_heif * " (pip install pillow-heif)"),
        *count_paths(folder.closed, "folders can't be read, or lead out of the dataset (--allow-outside)"),
        *count_paths(moved, "files found by the end of their paths"),
    ]


# Splits


def split_names(train, val, val_names=("val", "test")):
    """-> the possible names of the training and of the validation split, in order of preference."""
    return [train or "train"], [val] if val else list(val_names)


def images_of_splits(folder, annotations, train, val):
    """{image Place: Place of its annotation} -> [(split name, [image path])], or one with all images. Raises UserError.

    Lists such as train.txt tell the split of an image, or the innermost of its folders, or its annotation's, that
    begins with the name of a split. An image without an annotation counts if another one in its folder has one.
    """
    used = {image.folders for image in annotations}
    images = [image for image in folder.places(IMAGE_SUFFIXES) if image.folders in used]
    if not images:
        raise UserError(
            f"{folder.root}: no image has the name of an annotation file; if they lie outside, behind links, "
            f"add --allow-outside. Found: {listing(folder.root)}"
        )
    words = [train or "train", *([val] if val else ("val", "test"))]
    listed, groups = split_lists(folder, words), defaultdict(list)
    if listed:
        told = [next(((word, word) for word in words if image in listed.get(word, ())), None) for image in images]
    else:
        told = told_by_folders([(image, annotations.get(image)) for image in images], words, (train, val))
    for image, found in zip(images, told):
        word, name = found or (None, None)
        groups[word].append((name, Path(image.file)))
    if groups.keys() == {None} and not train and not val:
        return [(folder.root.name, [path for _, path in groups[None]])]
    chosen = [words[0], next((word for word in words[1:] if groups[word]), None)]
    for word in (words[0], val):
        if word and not groups[word]:
            raise NoSuchSplit(f"{folder.root}: no folder for '{word}'; found: {listing(folder.root)}")
    return [(groups[word][0][0], [path for _, path in groups[word]]) for word in chosen if word]


def told_by_folders(pairs, words, given):
    """[(image Place, annotation Place or None)] -> for each (split word, name of the folder that tells it), or None.

    Of an image's folders, or else its annotation's, the one that tells it most clearly counts. Of several, the
    outermost, if these differ between the images (val/train/a.jpg may be a class called train), or else the innermost.
    given: the words that the user chose.
    """
    clear = []
    for places in pairs:
        told = []
        for place in places:
            told = told or [clarity(name, words, given) for name in (place.folders if place else ())]
            told = [entry for entry in told if entry[0]]
        best = max((entry[0] for entry in told), default=0)
        clear.append([entry for entry in told if entry[0] == best])
    if len({word for told in clear for _, word, _ in told}) < 2:  # a single name such as bullet_train says nothing
        clear = [[entry for entry in told if entry[0] > 1] for told in clear]
    outermost = {told[0][1] for told in clear if told}
    return [(told[0] if len(outermost) > 1 else told[-1])[1:] if told else None for told in clear]


def clarity(name, words, given):
    """How clearly the name of a folder says which split it holds -> 3 train2017, 2 train_images, 1 my_train or 0, the
    split's word, the name.

    One that the user gave has to begin the name.
    """
    lower, kinds, found = name.lower(), parts_of([name]), (0, None, name)
    for word in words:
        if word in given:
            grade = 3 if lower == word.lower() else 2 * lower.startswith(word.lower())
        else:
            grade = (3 if re.fullmatch(r"[a-z]+\d*", lower) else 2 if lower.startswith(word) else 1) * (word in kinds)
        found = max(found, (grade, word, name), key=itemgetter(0))  # the first of those that are as clear
    return found


def split_lists(folder, words):
    """Text files such as train.txt that list images -> {word: the Places of these images}; empty unless two do."""
    listed = {}
    for place in folder.places({".txt"}):
        if place.stem.lower() in words and not looks_like_labels(place, folder.home):
            images = {image for line in read_lines(Path(place.file)) for image in listed_images(folder, line)}
            if images:
                listed[place.stem.lower()] = images
    return listed if len(listed) > 1 else {}


def listed_images(folder, line):
    """The images that a line of a list means: those of its name that share most folders with it."""
    places = []
    for text in dict.fromkeys((VOC_LINE.fullmatch(line)[2], line.split()[0])):
        places = places or folder.images(text)
    folders = tuple(re.split(r"[/\\]+", VOC_LINE.fullmatch(line)[1] or "")[-2::-1])
    shared = [len(os.path.commonprefix([place.folders[::-1], folders])) for place in places]
    return [place for place, count in zip(places, shared) if count == max(shared)]


def build_splits(folder, sources, read, classes_of, is_relative=False):
    """[(split name, [(image path, annotation path or None)])] -> [Split]. Raises UserError.

    read: annotation path -> (width, height), rows as for make_record, with anything for a label. classes_of: the set of
    these -> the labels of the classes, in order. is_relative: boxes are fractions of their image's sides.
    """
    require_inside(folder.home, [path for _, pairs in sources for pair in pairs for path in pair if path])
    files = [[read(path) if path else ((0, 0), []) for _, path in pairs] for _, pairs in sources]
    classes = classes_of({row[4] for split in files for _, rows in split for row in rows})
    labels = {name: label for label, name in enumerate(classes)}
    splits = []
    for (name, pairs), split_files in zip(sources, files):
        records = []
        for (image, _), (size, rows) in zip(pairs, split_files):
            rows = [(*box, labels[row_class], area, ignored) for *box, row_class, area, ignored in rows]
            records.append(make_record(image.stem, image, size, rows))
            records[-1].relative = is_relative
        remarks = count_paths([image for image, path in pairs if path is None], BACKGROUND)
        splits.append(Split(name, [str(c) for c in classes], list(range(len(classes))), records, remarks))
    return splits


# COCO

ROBOFLOW_FILE = "_annotations.coco.json"
OTHER_TASKS = ("captions", "person_keypoints", "image_info", "stuff", "panoptic")  # COCO's files without boxes
COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')


def coco_files(folder):
    """The COCO files for detection, anywhere; one that is broken counts if its name or place tells what it is."""
    places = folder.places({".json"})
    places = [place for place in places if not place.stem.startswith(OTHER_TASKS)] or places
    places = sorted(places, key=depth)[:MOST_LOOKED_INTO]
    sound = [place for place in places if folder.mentions(place, COCO_KEYS)]
    named = [place for place in places if parts_of([*place.folders[-1:], place.stem])]
    if sound:
        return [place for place in places if place in sound or place in named]
    return [place for place in named if place.folders[-1:] == ("annotations",) or place.stem + ".json" == ROBOFLOW_FILE]


def is_unlabelled(place, folder):
    """Whether a JSON file, which is not broken, has no annotations: a test set, or detections."""
    if folder.mentions(place, (b'"annotations"', b'"bbox"')):
        return False
    try:
        content = json.loads(read_text(Path(place.file)))
    except (UserError, ValueError, RecursionError):
        return False
    return not isinstance(content, dict) or not content.get("annotations")


def coco_words(place):
    """The part of a COCO file's path that tells its split: its folder and name, or else a folder further out."""
    words = [*place.folders[-1:], place.stem]
    if not parts_of(words):
        words += [name for name in place.folders[::-1] if parts_of([name])][:1]
    return "/".join(words).lower()


def read_coco(folder, train=None, val=None):
    """A COCO file for each split -> [Split, Split], or one for all images -> [Split]. Raises UserError."""
    files, (train_words, val_words) = coco_files(folder), split_names(train, val)
    unlabelled = [] if val or len(files) == 1 else [place for place in files if is_unlabelled(place, folder)]
    files = [place for place in files if place not in unlabelled] or files
    if len(files) == 1 and not train:
        splits = [read_coco_file(files[0], folder)]
        splits[0].remarks += count_paths([place.file for place in unlabelled], "JSON files have no annotations")
        leave_out_umbrella(splits)
        return splits
    first = choose_coco_file(folder, files, train_words)
    second = choose_coco_file(folder, files if val else [place for place in files if place != first], val_words)
    word = next(word for word in val_words if word.lower() in coco_words(second))
    splits = [read_coco_file(first, folder, train_words[0]), read_coco_file(second, folder, word)]
    leave_out_umbrella(splits)
    share_categories(folder.root, *splits)
    return splits


def choose_coco_file(folder, files, words):
    """The file with one of the words in its name or in its folder's; earlier words win, then those nearest to the
    top. Raises UserError."""
    matches = []
    for word in words:
        matches = matches or [place for place in files if word.lower() in coco_words(place)]
    if not matches:
        raise NoSuchSplit(
            f"{folder.root}: no annotations for '{words[0]}'. Looked for a COCO *.json with {words[0]} in its name or "
            f"in its folder's; --train-split and --val-split take other words. Found: {listing(folder.root)}"
        )
    if len(matches) > 1:
        matches = [place for place in matches if folder.mentions(place, COCO_KEYS)] or matches
        exact = [place for place in matches if place.stem.lower().removeprefix("instances_") in words]
        matches = exact or matches
        matches = [place for place in matches if depth(place) == depth(matches[0])]  # sorted by that
    if len(matches) > 1:
        names = ", ".join(os.path.relpath(place.file, folder.root) for place in matches)
        raise UserError(f"{folder.root}: {names} could all be '{words[0]}'; choose with --train-split and --val-split")
    return matches[0]


def share_categories(root, train, val):
    """Gives val the classes and labels of train, in place. Raises UserError if train lacks a category of val."""
    train_names = dict(zip(train.category_ids, train.classes))
    for category_id, name in zip(val.category_ids, val.classes):
        if train_names.get(category_id) != name:
            raise UserError(
                f"{root}: category {category_id} is '{name}' in {val.name} but "
                f"'{train_names.get(category_id, 'missing')}' in {train.name}; give both files the same categories"
            )
    labels = {category_id: label for label, category_id in enumerate(train.category_ids)}
    new_labels = np.array([labels[category_id] for category_id in val.category_ids], dtype=np.int64)
    for record in val.records:
        if len(record.labels):
            record.labels = new_labels[record.labels]
    val.category_ids, val.classes = train.category_ids, train.classes


def leave_out_umbrella(splits):
    """Removes the class that Roboflow's exports begin with, which stands for the whole project, unless a box has it."""
    for split in splits:
        if split.umbrella is None or any(split.umbrella in record.labels for record in split.records):
            return
    for split in splits:
        name = split.classes.pop(split.umbrella)
        split.category_ids.pop(split.umbrella)
        for record in split.records:
            record.labels = record.labels - (record.labels > split.umbrella)
        split.remarks.append(f"class '{name}' stands for all the others and is left out")


def find_umbrella(path, data, categories):
    """The label of Roboflow's class for the whole project, the supercategory of all others, or None."""
    if path.name != ROBOFLOW_FILE or len(categories) < 2:
        return None
    first_id, first_name = categories[0]
    supercategories = {str(c.get("supercategory")) for c in data["categories"] if c["id"] != first_id}
    return 0 if supercategories == {first_name} else None


def read_coco_file(place, folder, word=""):
    """A COCO annotation file, chosen by a word -> Split. Raises UserError."""
    path = Path(place.file)
    require_inside(folder.home, [path])
    data, images, categories, rows = read_coco_json(path)
    stem = place.stem.removeprefix("instances_")
    has_own_folder = place.folders[-1:] not in ((), ("annotations",))
    is_named_by_folder = has_own_folder and (parts_of(place.folders[-1:]) or not parts_of([stem]))
    name = place.folders[-1] if is_named_by_folder else stem
    folders = [folder.root / name, path.parent / "images", path.parent, folder.root / stem]
    entries = {}  # {file: (image id, size, rows)}: some tools list an image once for each of its objects
    for image_id, image in images.items():
        try:
            text = require_string(image["file_name"])
            size = (int(image.get("width") or 0), int(image.get("height") or 0))
        except MALFORMED as error:
            raise UserError(
                f"{path}: image {image_id}: {type(error).__name__} {error}; "
                "file_name, width or height is missing or wrong"
            ) from None
        file = folder.locate(text, folders, near=place.folders, parts=parts_of([word]), split=name)
        entry = entries.setdefault(file, (image_id, size, []))
        entry[2].extend(rows[str(image_id)])
    records = [make_record(image_id, file, size, own) for file, (image_id, size, own) in entries.items()]
    category_ids, names = (list(column) for column in zip(*categories))
    unlisted = len(rows.get(None, ()))
    remarks = [f"{unlisted} annotations are of images that are not listed, and left out"] if unlisted else []
    if len(records) < len(images):
        remarks.append(f"{len(images)} entries are of {len(records)} images, whose objects are put together")
    return Split(name, names, category_ids, records, remarks, find_umbrella(path, data, categories))


# Pascal VOC

# A line of a list may hold folders and a suffix; ImageSets of a class say whether it is there
VOC_LINE = re.compile(
    rf"(.*[/\\])?(.*?)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})?(?:\s{{1,8}}(?:-1|0|1))?", re.IGNORECASE
)


def has_xml(folder):
    return any(folder.images(place.stem) for place in folder.places({".xml"}))


def voc_devkits(folder):
    """The folders with ImageSets/Main that are nearest to the top, such as VOC2007 and VOC2012."""
    devkits = [place.folders[:-1] for place in folder.by_stem.get("Main/", ()) if place.folders[-1:] == ("ImageSets",)]
    top = min(map(len, devkits), default=0)
    return [folder.root.joinpath(*folders) for folders in sorted(devkits) if len(folders) == top]


def read_voc(folder, train=None, val=None):
    """Lists of images in one devkit or several, or only images and an XML for each that has objects, in folders that
    tell their split -> [Split, Split], or [Split] if there is one part only. Raises UserError."""
    sources, unmatched = voc_lists(folder, train, val), []
    if not sources:
        annotations, unmatched = folder.match(".xml")
        files = {Path(image.file): Path(xml.file) for image, xml in annotations.items()}
        sources = images_of_splits(folder, annotations, train, val)
        sources = [(name, [(image, files.get(image)) for image in images]) for name, images in sources]
        refuse_mixed(folder, [image for _, pairs in sources for image, xml in pairs if xml is None])
    splits = build_splits(folder, sources, read_voc_file, sorted)
    for split in splits:
        split.category_ids = list(range(1, len(split.classes) + 1))
    splits[0].remarks += count_paths(unmatched, NO_IMAGE)
    return splits


def refuse_mixed(folder, images):
    """Raises UserError if one of some images without XML has YOLO's labels."""
    for image in images:
        for place in folder.named(normal(image.stem), {".txt"}):
            if looks_like_labels(place, folder.home):
                raise UserError(
                    f"{image}: has no XML as others do, but {place.file}; use one format for all images "
                    "(--layout yolo or voc takes one of them)"
                )


def voc_lists(folder, train, val):
    """The lists of ImageSets/Main -> [(split name, [(image path, XML path or None)])], empty if there are none.

    trainval and test are chosen if both are there, otherwise train and val, or the only list. Raises UserError.
    """
    devkits = voc_devkits(folder)
    names = {path.stem for devkit in devkits for path in (devkit / "ImageSets" / "Main").glob("[!.]*.txt")}
    if not names and not train and not val:
        return []
    if train is None:
        train = "trainval" if {"trainval", "test"} <= names else "train"
        if len(names) == 1 and parts_of(names)[:1] in ([], ["train"]):
            train = min(names)
    if val is None and names != {train}:
        val = "test" if train == "trainval" or "val" not in names and "test" in names else "val"
    sources = []
    for name in (train, val) if val else (train,):
        if name not in names and devkits:
            there = ", ".join(sorted(names)) or "no lists"
            raise NoSuchSplit(f"{folder.root}/ImageSets/Main/{name}.txt is missing; there are: {there}")
        if name in names:
            sources.append((name, [pair for devkit in devkits for pair in voc_pairs(devkit, name, folder)]))
    return sources


def voc_pairs(devkit, split, folder):
    """The images of a split in one devkit -> [(image path, XML path or None)], empty without a list of that name.

    They lie in its JPEGImages and Annotations. Where one of these has none of them, the nearest file of a name counts.
    """
    path = devkit / "ImageSets" / "Main" / f"{split}.txt"
    require_inside(folder.home, [path])
    photos, annotations = devkit / "JPEGImages", devkit / "Annotations"
    images, xmls = files_by_name(photos, IMAGE_SUFFIXES), files_by_name(annotations, {".xml"})
    stems, pairs = [], []
    for line in read_lines(path) if path.exists() else []:
        folders, stem, suffix = (part or "" for part in VOC_LINE.fullmatch(line).groups())
        names = [line, (folders + stem).replace("\\", "/"), stem]
        name = next((name for name in names if name in images), next((n for n in names if n in xmls), stem))
        found = [p for p in images.get(name, ()) if p.suffix.lower() == suffix.lower()] or images.get(name, [])
        if len(found) > 1:
            raise UserError(f"{path}: {line} could be {found[0]} or {found[1]}; name its ending, or leave one of them")
        if name in images or name in xmls:
            image, xml = found[0] if found else None, next(iter(xmls.get(name, ())), None)
        else:  # neither is there, or both outside
            image, xml = None, annotations / f"{line}.xml"
            xml = xml if os.path.lexists(xml) else None
        stems.append((stem, photos / f"{line if '..' in line else name}.jpg"))
        pairs.append((image, xml))
    images, xmls = (list(column) for column in zip(*pairs)) if pairs else ([], [])
    if not any(images):
        images = [voc_elsewhere(folder, photos, stem, IMAGE_SUFFIXES, split) for stem, _ in stems]
    if not any(xmls):
        xmls = [voc_elsewhere(folder, annotations, stem, {".xml"}, split) for stem, _ in stems]
    return [(image or missing, xml) for image, xml, (_, missing) in zip(images, xmls, stems)]


def voc_elsewhere(folder, usual, stem, suffixes, split):
    """The file of a name, with one of some suffixes, that is nearest to the folder where it should be -> path or None.

    Raises UserError if several are as near.
    """
    near = (*usual.parent.relative_to(folder.root).parts, usual.name)
    places = folder.named(normal(stem), suffixes, near=near)
    places = [p for p in places if p.folders[: len(near) - 1] == near[:-1] and not in_masks(p) or p.suffix == ".xml"]
    place = folder.nearest(places, (), stem, near=near, parts=parts_of([split]))
    return Path(place.file) if place else None


def files_by_name(folder, suffixes):
    """{path below a folder, without suffix: [path]} of the files with some suffixes, in whatever case."""
    files = defaultdict(list)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            files[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    return files


# YOLO

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")


def yolo_file(folder):
    """The path of data.yaml, under any name, or else of obj.data; None if there is neither. Raises UserError."""
    places = folder.places({".yaml", ".yml", ".data"})
    named = [place for name in YAML_NAMES for place in places if place.stem + place.suffix == name]
    others = [place for place in places if not place.folders and folder.mentions(place, (b"names:", b"train:"))]
    found = sorted([*named, *(place for place in others if place not in named)], key=depth)
    same = [place for place in found if depth(place) == depth(found[0])]
    if len(same) > 1 and (same[0].folders != same[1].folders or same[0] not in named):
        raise UserError(f"{folder.root}: {same[0].file} or {same[1].file}? --data takes the folder of one dataset")
    return Path(found[0].file) if found else None


def has_yolo_file_at_top(folder):
    """Whether data.yaml or its like lies in the dataset's folder itself."""
    return any(not place.folders for place in folder.places({".yaml", ".yml", ".data"})) and (
        (path := yolo_file(folder)) is not None and path.parent == folder.root
    )


def class_file(folder):
    """The path of the list of classes that is nearest to the top, or None. Raises UserError if two differ."""
    places = sorted(folder.places({".txt", ".names", ".labels"}), key=depth)
    paths = [Path(place.file) for place in places if place.suffix != ".txt" or place.stem == "classes"]
    require_inside(folder.home, paths)
    for other in paths[1:]:
        if read_lines(other) != read_lines(paths[0]):
            raise UserError(f"{folder.root}: {paths[0]} and {other} differ; --data takes the folder of one dataset")
    return paths[0] if paths else None


def has_labels(folder):
    """Whether a folder has a list of classes, or text files with the names of images that look like labels."""
    places = [place for place in folder.places({".txt"}) if folder.images(place.stem)][:MOST_LOOKED_INTO]
    return class_file(folder) is not None or any(looks_like_labels(place, folder.home) for place in places)


def looks_like_labels(place, home):
    """Whether a text file holds nothing but lines of five numbers and more."""
    try:
        require_inside(home, [Path(place.file)])
        rows = [[float(text) for text in line.split()] for line in read_lines(Path(place.file))]
        return bool(rows) and all(len(row) >= 5 for row in rows)
    except (UserError, ValueError):
        return False


def read_yolo(folder, train=None, val=None):
    """data.yaml has the classes and the folders of the images; the boxes of a/images/b.jpg are in a/labels/b.txt
    -> [Split, Split], or [Split] if there is one part only. Raises UserError.

    Instead there may be obj.data, or train.txt and val.txt, or only folders that tell the split; and a list of classes.
    """
    path = yolo_file(folder)
    require_inside(folder.home, [path] if path else [])
    if path is None:
        keys = ("train", "val", "valid", "test")
        lists = {place.stem: place for place in folder.places({".txt"}) if not place.folders and place.stem in keys}
        data = {key: f"{key}.txt" for key in keys if key in lists and not looks_like_labels(lists[key], folder.home)}
    else:
        data = read_darknet_data(path) if path.suffix == ".data" else read_yolo_yaml(path)
    names = data.get("names") if isinstance(data.get("names"), list) else None
    if names is None and class_file(folder):
        names = read_lines(class_file(folder))
    if path or data:
        sources = yolo_sources(folder, data, path or folder.root / "data.yaml", train, val)
    else:
        sources = images_of_splits(folder, folder.match(".txt")[0], train, val)
    labels = [yolo_labels(folder, images) for _, images in sources]
    sources = [(name, [*zip(images, paths)]) for (name, images), paths in zip(sources, labels)]
    limit = MOST_CLASSES if names is None else len(names)

    def read(path):
        return (0, 0), read_yolo_labels(path, limit, data.get("points"))

    def numbers(used):
        return range(1 + max(used, default=0) if names is None else len(names))

    splits = build_splits(folder, sources, read, numbers, is_relative=True)
    for split in splits:
        split.classes = names or split.classes
    if names is None:
        splits[0].remarks.append(
            "the classes are called by their numbers: there is no data.yaml, classes.txt or obj.names"
        )
    splits[0].remarks += count_paths(unused_labels(folder, labels), NO_IMAGE)
    return splits


def yolo_sources(folder, data, path, train, val):
    """-> [(key of data.yaml, [image path])] for both splits, or for the only one. Raises UserError."""
    sources = []
    for keys in split_names(train, val, ("val", "valid", "test")):
        key = next((key for key in keys if data.get(key)), None)
        if key is None and sources and not val:
            break
        if key is None:
            raise NoSuchSplit(f"{path}: no {' or '.join(keys)}; it has {', '.join(map(str, data))}")
        entries = data[key] if isinstance(data[key], list) else [data[key]]
        if not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: {key} is neither a folder nor a list of folders")
        others = [data[k] for k in ("train", "val", "valid", "test") if k != key and isinstance(data.get(k), str)]
        images = [i for entry in entries for i in yolo_images(folder, entry, path, data.get("path"), key, others)]
        if key == "test" and sources and not val and not any(yolo_labels(folder, images)):
            break  # a challenge keeps its labels
        sources.append((key, images))
    return sources


def yolo_images(folder, entry, path, base, key, others=()):
    """The images of an entry of data.yaml, which is a folder or a text file with a list -> [path]. Raises UserError.

    The entry is relative to `base`, to data.yaml's folder, or, in exports, to a folder next to that. others: the
    entries of other keys; of a folder within the entry's, the images are theirs.
    """
    parent, parts = path.parent, parts_of([key])
    bases = [parent / base if base else parent, parent, parent / "images"]
    candidates = [b / entry for b in bases] + [parent / entry.removeprefix("../"), parent / entry / "images"]
    place = next((c for c in candidates if os.path.exists(c)), None)
    place = place or folder.find(entry, parts=parts) or folder.find(entry + "/", parts=parts)
    if place is None:
        raise UserError(f"{path}: {entry} does not exist; looked for {', '.join(map(str, dict.fromkeys(candidates)))}")
    require_inside(folder.home, [place])
    place = folder.own(Path(os.path.normpath(place)))
    if place.is_file():
        return [folder.locate(line, [place.parent], parts=parts) for line in read_lines(place)]
    inner = [os.path.relpath(other, entry) + os.sep for other in others if os.path.isabs(other) == os.path.isabs(entry)]
    inner = tuple(other for other in inner if not other.startswith("."))
    images = []
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        is_hidden = any(part.startswith(".") for part in name.split(os.sep))
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden and not name.startswith(inner):
            images.append(path)
    return images


def yolo_labels(folder, images):
    """The label file of each image -> [path or None].

    a/images/b.jpg has a/labels/b.txt, by the last `images` in the path, or a/images/b.txt; where no image of a folder
    has such a one, the nearest file of its name.
    """
    texts = {name_of(place.file): Path(place.file) for place in folder.places({".txt"})}
    labels = {}
    for image in images:
        parts = list(image.parts[::-1])
        if "images" in parts[1:]:
            parts[parts.index("images", 1)] = "labels"
        paths = Path(*parts[::-1]).with_suffix(".txt"), image.with_suffix(".txt")
        known = (texts.get(name_of(path)) for path in paths)
        outside = (path for path in paths if os.path.lexists(path))
        labels[image] = next((path for path in (*known, *outside) if path), None)
    labelled = {image.parent for image in images if labels[image]}
    if any(image.parent not in labelled for image in images):
        nearest = {name_of(image.file): Path(label.file) for image, label in folder.match(".txt")[0].items()}
        labels |= {image: nearest.get(name_of(image)) for image in images if image.parent not in labelled}
    return [labels[image] for image in images]


def unused_labels(folder, labels):
    """The label files that have no image, in the folders of those that have."""
    parents = {path.parent for paths in labels for path in paths if path}
    places = [p for p in folder.places({".txt"}) if Path(p.file).parent in parents and not folder.images(p.stem)]
    return [place.file for place in places if looks_like_labels(place, folder.home)]


def name_of(path):
    """A path without suffix, to compare it with others."""
    return normal(os.path.splitext(path)[0])


# The table of layouts

LAYOUTS = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}
FORMER_NAMES = {"json": "coco", "roboflow": "coco", "voc-folders": "voc"}  # in the settings of earlier runs

# (layout, its signs for messages, test), in the order in which they are tried: the first that matches counts.
SIGNS = (
    ("voc", "ImageSets/Main/*.txt", voc_devkits),
    ("yolo", "data.yaml or obj.data", has_yolo_file_at_top),
    ("coco", "a COCO *.json", coco_files),
    ("yolo", "data.yaml or obj.data in a folder below", yolo_file),
    ("voc", "*.xml with the names of images", has_xml),
    ("yolo", "classes.txt, or *.txt with the names of images", has_labels),
)


def detect_layout(folder):
    """The first layout whose signs a Folder has. Raises UserError with the signs and the folder's content."""
    for name, _, matches in SIGNS:
        if matches(folder):
            return name
    signs = "; ".join(f"{name}: {signs}" for name, signs, _ in SIGNS)
    raise UserError(f"{folder.root}: unknown layout. Looked for {signs}. Found: {listing(folder.root)}")
