"""A dataset in memory, whatever its layout: `Split`s of `Record`s, and which images belong to which."""

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from errors import UserError
from files import read_lines, require_inside
from folder import count_paths, listing, parts_of
from transforms import IMAGE_SUFFIXES

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
    tile: tuple | None = None  # (left, top, right, bottom) in the image, if this is a part of it, see tiles.py
    whole: int = -1  # the index, in its split, of the record that it is a part of


@dataclass
class Split:
    """The training or the validation split of a dataset; `remarks` say what was repaired or left out."""

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]
    remarks: list[str] = field(default_factory=list)
    umbrella: int | None = None  # the label of a class that may stand for all others, see layout_coco.py
    is_fraction: bool = False  # the dataset has one part only, and this is a fraction of it, see divide
    value_range: tuple | None = None  # of images with more than 8 bits, see transforms.common_range
    whole: "Split | None" = None  # what this Split holds the tiles of, see tiles.cut_into_tiles
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


# A line of a list may hold folders and a suffix; ImageSets of a class say whether it is there
VOC_LINE = re.compile(
    rf"(.*[/\\])?(.*?)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})?(?:\s{{1,8}}(?:-1|0|1))?", re.IGNORECASE
)


def choose_classes(split, classes, single_class, root):
    """Leaves out all objects of other classes than "a,b", and makes one class of those that stay, in place.

    Raises UserError for a class that is not there.
    """
    if not classes and not single_class:
        return
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

    trained_on: see layouts.load_splits.
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
    """-> a short text that tells the images of some Records from others, by the names and sizes of their files."""
    files = sorted({f"{record.path.name} {file_size(record.path)}" for record in records})
    return hashlib.sha256(os.fsencode("\n".join(files))).hexdigest()[:16]


def file_size(path):
    try:
        return os.path.getsize(path)
    except OSError:  # check says that it is missing
        return None


def subset(split, name, indices, remarks):
    """The records of a Split at some indices, in their order in it -> Split."""
    records = [split.records[i] for i in sorted(indices)]
    return Split(name, split.classes, split.category_ids, records, remarks, is_fraction=True)


# Which images belong to which split


def split_names(train, val, val_names=("val", "test")):
    """-> the possible names of the training and of the validation split, in order of preference."""
    return [train or "train"], [val] if val else list(val_names)


def images_of_splits(folder, annotations, train, val):
    """{image Place: Place of its annotation} -> [(split name, [image path])], or one with all images. Raises UserError.

    Lists such as train.txt tell the split of an image, or else folders, see told_by_folders. An image without an
    annotation counts if another one in its folder has one.
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

    Of an image's folders, or else its annotation's, the one that tells it most clearly counts. Of several it is the
    innermost, as in trainval/val, unless that is a class called Train in folders of several splits. given: the words
    that the user chose.
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
    outer = {told[0][1] for told in clear if told}
    below, above = defaultdict(set), defaultdict(set)  # {outermost word: innermost ones}, the other way round
    for told in clear:
        if len(told) > 1:
            below[told[0][1]].add(told[-1][1])
            above[told[-1][1]].add(told[0][1])
    are_classes = any(len(words) > 1 for words in above.values()) or all(len(words) < 2 for words in below.values())
    place = 0 if are_classes and len(outer) > 1 else -1
    return [told[place][1:] if told else None for told in clear]


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


def looks_like_labels(place, home):
    """Whether a text file holds nothing but lines of five numbers and more."""
    try:
        require_inside(home, [Path(place.file)])
        rows = [[float(text) for text in line.split()] for line in read_lines(Path(place.file))]
        return bool(rows) and all(len(row) >= 5 for row in rows)
    except (UserError, ValueError):
        return False
