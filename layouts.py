"""Reads datasets of any common layout into one form, a `Split` of `Record`s, and checks every image and box.

Layouts: COCO, Roboflow's COCO, Pascal VOC (a devkit, several years of it, or folders of images and XML), YOLO, and a
single COCO file that is split here. They are detected, see LAYOUTS. The files are not trusted.
"""

import json
import math
import os
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from errors import UserError
from transforms import open_image, upright_size

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
VAL_FRACTION = 0.2  # of a single COCO file's images
# What parsing raises where the content has an unexpected form
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


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


@dataclass
class Split:
    """The training or the validation split of a dataset; `remarks` say what was repaired or left out."""

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]
    remarks: list[str] = field(default_factory=list)
    layout: str = ""  # see LAYOUTS
    umbrella: int | None = None  # the label of a class that may stand for all others, see leave_out_umbrella

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
):
    """Reads and checks the dataset in a folder -> [training Split, validation Split]. Raises UserError.

    train_split, val_split: choose among several splits: the name of a file in ImageSets/Main for Pascal VOC, a key of
        data.yaml for YOLO, part of the name of the JSON or of its folder otherwise.
    skip_bad_images: leave out images that can't be read.
    layout: a key of LAYOUTS; None detects it.
    val_fraction: of a single COCO file's images, chosen with a fixed seed; None is VAL_FRACTION.
    allow_outside: files may lie outside of the folder, through links, `..` or absolute paths.
    only_val: no training image is opened; the training annotations only give the classes.

    Prints the layout.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data takes the folder of a dataset")
    home = None if allow_outside else root
    is_detected = layout is None
    layout = layout or detect_layout(root)
    if layout == "json":
        splits = read_single(root, home, VAL_FRACTION if val_fraction is None else val_fraction)
    else:
        splits = LAYOUTS[layout].read(root, home, train_split, val_split)
    for split in splits:
        split.layout = layout
    for split in splits[1:] if only_val else splits:
        if not split.records:
            raise UserError(f"{root}: the split '{split.name}' has no images")
        require_inside(home, [record.path for record in split.records])
        check(split, skip_bad_images)
    train = splits[0]
    if not only_val and not any(len(r.boxes) for r in train.records):
        raise UserError(f"{root}: the training split '{train.name}' has {len(train.records)} images but no box")
    print(f"{root}: {layout} layout{' (detected; --layout overrides it)' if is_detected else ''}")
    return splits


def detect_layout(root):
    """The first key of LAYOUTS whose signs a folder has. Raises UserError with the signs and the folder's content."""
    for name, layout in LAYOUTS.items():
        if layout.matches(root):
            return name
    signs = "; ".join(f"{name}: {layout.signs}" for name, layout in LAYOUTS.items())
    raise UserError(f"{root}: unknown layout. Looked for {signs}. Found: {listing(root)}")


# Finding the files of a split


def listing(folder):
    """The first names in a folder, for messages."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "nothing"


def split_names(train, val, val_names=("val", "test")):
    """-> the possible names of the training and of the validation split, in order of preference."""
    return [train or "train"], [val] if val else list(val_names)


def split_folders(root, train=None, val=None):
    """-> the folders of the training and of the validation split, None for one that is missing."""
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    return tuple(find_by_prefix(folders, words) for words in split_names(train, val))


def find_by_prefix(folders, prefixes):
    """The first folder whose name begins with one of the prefixes; earlier prefixes win. None if there is none."""
    for prefix in prefixes:
        for folder in folders:
            if folder.name.lower().startswith(prefix):
                return folder
    return None


def find_images(folder):
    """{stem: path} of the images in a folder, empty if there is no such folder."""
    if not folder.is_dir():
        return {}
    return {p.stem: p for p in sorted(folder.iterdir()) if is_image(p)}


def is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES


# Opening files without trust: a broken or hostile one costs a message and nothing else


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

ROBOFLOW_FILE = "_annotations.coco.json"
OTHER_TASKS = ("captions", "person_keypoints", "image_info", "stuff", "panoptic")  # COCO's files without boxes


def coco_files(root):
    """The JSON files for detection in annotations/, or else those in the folders of the splits."""
    annotations = root / "annotations"
    files = sorted(annotations.glob("*.json")) if annotations.is_dir() else []
    if not files:
        files = sorted(path for folder in root.iterdir() if folder.is_dir() for path in folder.glob("*.json"))
    return [path for path in files if not path.name.startswith(OTHER_TASKS)]


def coco_words(path):
    """The part of a COCO file's path that tells its split."""
    return f"{path.parent.name}/{path.stem}".lower()


def has_coco_files(root):
    return any("train" in coco_words(path) for path in coco_files(root))


def has_roboflow_files(root):
    return any(root.glob(f"*/{ROBOFLOW_FILE}"))


def read_coco(root, home, train=None, val=None):
    """annotations/*.json, or a folder for each split with its JSON inside -> [Split, Split]. Raises UserError."""
    files = coco_files(root)
    splits = [read_coco_file(choose_coco_file(root, files, words), root, home) for words in split_names(train, val)]
    leave_out_umbrella(splits)
    share_categories(root, *splits)
    return splits


def choose_coco_file(root, files, words):
    """The file with one of the words in its name or in its folder's; earlier words win. Raises UserError."""
    matches = []
    for word in words:
        matches = matches or [path for path in files if word in coco_words(path)]
    if not matches:
        raise UserError(
            f"{root}: no annotations for '{words[0]}'. Looked for annotations/*{words[0]}*.json, or a folder "
            f"{words[0]}*/ with a JSON inside. Found: {listing(root)}"
        )
    if len(matches) > 1:
        names = ", ".join(str(path.relative_to(root)) for path in matches)
        raise UserError(f"{root}: {names} could all be '{words[0]}'; choose with --train-split and --val-split")
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


def require_id(value):
    """An id of a COCO file: an integer or a string."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{str(value)[:40]!r} is not an id")
    return value


def require_string(value):
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not a string")
    return value


def read_coco_file(path, root, home):
    """A COCO annotation file -> Split; its images are looked for near the file and in root. Raises UserError."""
    require_inside(home, [path])
    try:
        data = json.loads(read_text(path))
        categories = sorted((require_id(c["id"]), require_string(c["name"])) for c in data["categories"])
        images = {require_id(image["id"]): image for image in data["images"]}
        annotations = list(data.get("annotations") or [])
    except MALFORMED as error:
        raise UserError(f"{path}: not a COCO annotation file ({type(error).__name__}: {error})") from None
    if not categories:
        raise UserError(f"{path}: no categories")
    labels = {category_id: label for label, (category_id, _) in enumerate(categories)}
    if len(labels) < len(categories) or len(images) < len(data["images"]):
        raise UserError(f"{path}: an id is used twice in categories or images")
    rows = coco_rows(path, annotations, images, labels)
    name, folders = coco_folders(path, root)
    records = [coco_record(path, image_id, image, folders, rows[image_id]) for image_id, image in images.items()]
    category_ids, names = (list(column) for column in zip(*categories))
    return Split(name, names, category_ids, records, umbrella=find_umbrella(path, data, categories))


def coco_rows(path, annotations, images, labels):
    """-> {image id: rows as for make_record}; labels: {category id: label}. Raises UserError."""
    rows = {image_id: [] for image_id in images}
    for number, annotation in enumerate(annotations):
        try:
            x, y, w, h = (float(n) for n in annotation["bbox"])
            label = labels[annotation["category_id"]]
            area = float(annotation.get("area") or w * h)
            is_crowd = bool(annotation.get("iscrowd"))
            rows[annotation["image_id"]].append((x, y, x + w, y + h, label, area, is_crowd))
        except MALFORMED as error:
            which = annotation.get("id", number) if isinstance(annotation, dict) else f"number {number}"
            raise UserError(
                f"{path}: annotation {which}: {type(error).__name__} {error}; bbox, category_id or image_id is wrong"
            ) from None
    return rows


def coco_folders(path, root):
    """-> the name of a COCO file's split, and the folders in which its images may be."""
    stem = path.stem.removeprefix("instances_")
    name = stem if path.parent.name == "annotations" else path.parent.name
    candidates = [root / name, path.parent / "images", path.parent, root / stem, root / "images", root]
    return name, [folder for folder in dict.fromkeys(candidates) if folder.is_dir()]


def coco_record(path, image_id, image, folders, rows):
    """An entry of a COCO file's images -> Record. Raises UserError."""
    try:
        candidates = [folder / require_string(image["file_name"]) for folder in folders]
        size = (int(image.get("width") or 0), int(image.get("height") or 0))
    except MALFORMED as error:
        raise UserError(
            f"{path}: image {image_id}: {type(error).__name__} {error}; file_name, width or height is missing or wrong"
        ) from None
    file = next((c for c in candidates if os.path.exists(c)), candidates[0])
    return make_record(image_id, file, size, rows)


def single_files(root):
    return sorted([*root.glob("*.json"), *(root / "annotations").glob("*.json")])


def has_single_file(root):
    return len(single_files(root)) == 1


def read_single(root, home, val_fraction):
    """One COCO file for all images -> [Split, Split], val_fraction of them in the second. Raises UserError."""
    files = single_files(root)
    if len(files) != 1:
        raise UserError(f"{root}: {len(files)} JSON files; the layout json has exactly one. Found: {listing(root)}")
    whole = read_coco_file(files[0], root, home)
    leave_out_umbrella([whole])
    total = len(whole.records)
    val_count = round(val_fraction * total)
    if not 0 < val_count < total:
        raise UserError(f"{files[0]}: --val-fraction {val_fraction} of {total} images leaves a split without any")
    order = np.random.default_rng(0).permutation(total)  # a fixed seed: every run gets the same split
    remark = (
        f"{files[0].name} is split with a fixed seed: "
        f"{total - val_count} images to train on, {val_count} to evaluate on"
    )
    train = subset(whole, "train", order[val_count:], [*whole.remarks, remark])
    return [train, subset(whole, "val", order[:val_count], [])]


def subset(split, name, indices, remarks):
    """The records of a Split at some indices, in their order in it -> Split."""
    return Split(name, split.classes, split.category_ids, [split.records[i] for i in sorted(indices)], remarks)


# Pascal VOC


def voc_devkits(root):
    """The folders with ImageSets/Main: root itself, or those of years as VOC2007, in root or in its VOCdevkit/."""
    if (root / "ImageSets" / "Main").is_dir():
        return [root]
    devkits = []
    for folder in (root, root / "VOCdevkit"):
        if folder.is_dir():
            devkits += [p for p in sorted(folder.iterdir()) if (p / "ImageSets" / "Main").is_dir()]
    return devkits


def read_voc(root, home, train=None, val=None):
    """One devkit or several years -> [Split, Split]: trainval and test if both are there, else train and val."""
    devkits = voc_devkits(root)
    names = {p.stem for devkit in devkits for p in (devkit / "ImageSets" / "Main").glob("*.txt")}
    if train is None:
        train = "trainval" if {"trainval", "test"} <= names else "train"
    if val is None:
        val = "test" if train == "trainval" else "val"
    sources = []
    for name in (train, val):
        if name not in names:
            raise UserError(
                f"{root}/ImageSets/Main/{name}.txt is missing; there are: {', '.join(sorted(names)) or 'no lists'}"
            )
        sources.append((name, [entry for devkit in devkits for entry in voc_entries(devkit, name, home)]))
    return read_xml_splits(sources, home)


def voc_entries(devkit, name, home):
    """The images of a split in one devkit -> [(image id, image path, XML path)], empty without a list of that name."""
    path = devkit / "ImageSets" / "Main" / f"{name}.txt"
    require_inside(home, [path])
    lines = read_text(path).splitlines() if path.exists() else []
    stems = [line.split()[0] for line in lines if line.strip()]
    folder = devkit / "JPEGImages"
    images = find_images(folder)
    return [(s, images.get(s, folder / f"{s}.jpg"), devkit / "Annotations" / f"{s}.xml") for s in stems]


def xml_folder(folder):
    """Where the XML files of a split's folder are: next to its images or in a folder next to theirs; None: nowhere."""
    for candidate in (folder / "labels", folder / "annotations", folder / "Annotations", folder):
        if any(candidate.glob("*.xml")):
            return candidate
    return None


def has_xml_folders(root):
    train, _ = split_folders(root)
    return train is not None and xml_folder(train) is not None


def read_voc_folders(root, home, train=None, val=None):
    """train/images and train/labels, or both in train/, with an XML for each image; val and test likewise
    -> [Split, Split]. Raises UserError."""
    sources = []
    for folder, name in zip(split_folders(root, train, val), (train or "train", val or "val")):
        if folder is None:
            raise UserError(f"{root}: no folder for '{name}'; found: {listing(root)}")
        labels = xml_folder(folder) or folder
        images = find_images(folder / "images") or find_images(folder)
        sources.append((folder.name, [(stem, path, labels / f"{stem}.xml") for stem, path in images.items()]))
    return read_xml_splits(sources, home)


def read_xml_splits(sources, home):
    """[(split name, [(image id, image path, XML path)])] -> [Split] with the classes of all, in alphabetical order."""
    require_inside(home, [xml for _, entries in sources for _, _, xml in entries])
    annotations = [[read_voc_file(xml) for _, _, xml in entries] for _, entries in sources]
    classes = sorted({row[4] for split in annotations for _, rows in split for row in rows})
    labels = {name: label for label, name in enumerate(classes)}
    splits = []
    for (split_name, entries), files in zip(sources, annotations):
        records = []
        for (image_id, path, _), (size, rows) in zip(entries, files):
            rows = [(*box, labels[name], area, difficult) for *box, name, area, difficult in rows]
            records.append(make_record(image_id, path, size, rows))
        splits.append(Split(split_name, classes, list(range(1, len(classes) + 1)), records))
    return splits


def read_voc_file(path):
    """-> (width, height), rows of (x1, y1, x2, y2, class name, area, difficult). Raises UserError."""
    content = read_bytes(path)
    try:
        if b"<!ENTITY" in content:
            raise ValueError("it defines entities, which no annotation needs")
        tree = ElementTree.fromstring(content)
        size = tuple(int(float(tree.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
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


def yolo_file(root):
    """The path of data.yaml, under any of its names, or None."""
    return next((p for p in (root / "data.yaml", root / "data.yml", root / "dataset.yaml") if p.is_file()), None)


def read_yolo(root, home, train=None, val=None):
    """data.yaml has the classes and the folders of the images; the boxes of a/images/b.jpg are in a/labels/b.txt
    -> [Split, Split]. Raises UserError."""
    path = yolo_file(root)
    require_inside(home, [path])
    data, names, base = read_yolo_config(path)
    splits = []
    for keys in split_names(train, val, ("val", "valid", "test")):
        key = next((key for key in keys if data.get(key)), None)
        if key is None:
            raise UserError(f"{path}: no {' or '.join(keys)}; it has {', '.join(map(str, data))}")
        entries = data[key] if isinstance(data[key], list) else [data[key]]
        if not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: {key} is neither a folder nor a list of folders")
        images = [image for entry in entries for image in yolo_images(entry, path, base, home)]
        require_inside(home, images)
        records = [yolo_record(image, len(names)) for image in images]
        splits.append(Split(key, names, list(range(len(names))), records))
    return splits


def read_yolo_config(path):
    """data.yaml -> its content, the names of the classes, and its `path` if it has one. Raises UserError."""
    try:
        data = yaml.safe_load(read_text(path))
        names = data["names"]
        names = [names[i] for i in sorted(names)] if isinstance(names, dict) else list(names)
        if any(isinstance(name, (dict, list)) for name in names):
            raise TypeError("a class name is a list or a mapping")
        return data, [str(name) for name in names], data.get("path") and require_string(data["path"])
    except (yaml.YAMLError, *MALFORMED) as error:
        raise UserError(
            f"{path}: not a YOLO data.yaml, which has names, train and val ({type(error).__name__}: {error})"
        ) from None


def yolo_images(entry, path, base, home):
    """The images of an entry of data.yaml, which is a folder or a text file with a list -> [path]. Raises UserError.

    The entry is relative to `base`, to data.yaml's folder, or, in exports, to a folder next to that.
    """
    folder = path.parent
    bases = [folder / base if base else folder, folder, folder / "images"]
    candidates = [b / entry for b in bases] + [folder / entry.removeprefix("../"), folder / entry / "images"]
    place = next((c for c in candidates if os.path.exists(c)), None)
    if place is None:
        raise UserError(f"{path}: {entry} does not exist; looked for {', '.join(map(str, dict.fromkeys(candidates)))}")
    require_inside(home, [place])
    if place.is_file():
        return [place.parent / line.strip() for line in read_text(place).splitlines() if line.strip()]
    images = find_images(place)
    if not images and (place / "images").is_dir():
        place = place / "images"
        images = find_images(place)
    return list(images.values()) or sorted(p for p in place.rglob("*") if is_image(p))


def yolo_record(image, num_classes):
    """An image's path -> Record with boxes and areas as fractions of the image's. Raises UserError."""
    path = yolo_label_file(image)
    lines = read_text(path).split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(yolo_row(line, num_classes))
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{path}, line {number}: {error}; "
                f"expected a class from 0 to {num_classes - 1} and cx cy w h, or a polygon"
            ) from None
    record = make_record(image.stem, image, (0, 0), rows)
    record.relative = True
    return record


def yolo_label_file(image):
    """a/images/b.jpg -> a/labels/b.txt, by the last `images` in the path."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def yolo_row(line, num_classes):
    """A line of a label file -> (x1, y1, x2, y2, label, area, False), in fractions of the image.

    It is `class cx cy w h`, optionally with a score, or `class x y x y x y ...`, a polygon.
    Raises ValueError or OverflowError.
    """
    label, *values = (float(text) for text in line.split())
    is_class = label == int(label) and 0 <= label < num_classes
    is_box = len(values) in (4, 5)
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    if not is_class or not (is_box or is_polygon):
        raise ValueError(f"'{line.strip()[:60]}'")
    if is_box:
        cx, cy, w, h = values[:4]
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        x1, y1, x2, y2 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    return x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), False


# The table of layouts


class Layout(NamedTuple):
    signs: str  # what a folder of this layout has, for messages
    matches: Callable  # folder -> true if it has that
    read: Callable  # (root, home, train split, val split) -> [Split, Split]; read_single takes a fraction instead


# In the order in which they are tried: the first that matches counts.
LAYOUTS = {
    "voc": Layout("ImageSets/Main/*.txt, here or in VOC2007/ ... or VOCdevkit/VOC2007/ ...", voc_devkits, read_voc),
    "yolo": Layout("data.yaml", yolo_file, read_yolo),
    "roboflow": Layout(f"train/{ROBOFLOW_FILE}", has_roboflow_files, read_coco),
    "coco": Layout("annotations/*train*.json, or train*/ with a JSON inside", has_coco_files, read_coco),
    "voc-folders": Layout(
        "train/ with an XML for each image, in it or in its labels/", has_xml_folders, read_voc_folders
    ),
    "json": Layout("a single COCO *.json, here or in annotations/", has_single_file, read_single),
}


# Checking images and boxes

LARGE_IMAGE = 2**24  # pixels; only one image of more is in memory at a time
LARGE_IMAGE_LOCK = threading.Lock()


def check(split, skip_bad_images=False):
    """Decodes every image and repairs every box of a Split, in place; counts what was found in `split.remarks`.

    Raises UserError if images can't be read, unless skip_bad_images leaves them out.
    """
    sizes = leave_out_unreadable(split, skip_bad_images)
    counts = Counter()
    for record, (stored, upright) in zip(split.records, sizes):
        set_size(record, stored, upright, counts)
        clean_boxes(record, counts)
    repeats = Counter(record.image_id for record in split.records)
    for record in split.records:
        if repeats[record.image_id] > 1:  # the same name in several folders
            record.image_id = str(record.path)
    empty = sum(not len(r.boxes) for r in split.records)
    if empty:
        counts["images have no box (kept as background)"] = empty
    split.remarks += [f"{count} {what}" for what, count in counts.items() if count]


def leave_out_unreadable(split, skip_bad_images):
    """Decodes every image -> the sizes of those that can be read, as probe gives them; the others leave the Split."""
    with ThreadPoolExecutor() as pool:
        progress = tqdm(
            pool.map(probe, split.records),
            f"checking {split.name}",
            len(split.records),
            leave=False,
            disable=None if len(split.records) > 2000 else True,
        )
        probes = list(progress)
    bad = [p for p in probes if isinstance(p, str)]
    if bad:
        listed = "; ".join(bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
        if not skip_bad_images or len(bad) == len(probes):
            raise UserError(
                f"{split.name}: {len(bad)} of {len(probes)} images can't be read ({listed}). "
                "Repair them, or leave them out with --skip-bad-images"
            )
        split.remarks.append(f"{len(bad)} images left out: {listed}")
    split.records = [r for r, p in zip(split.records, probes) if not isinstance(p, str)]
    return [p for p in probes if not isinstance(p, str)]


def probe(record):
    """Decodes an image -> its stored and its upright (width, height), or a str that says why it can't be read."""
    try:
        with open_image(record.path) as image:
            stored, upright = image.size, upright_size(image)
            is_large = stored[0] * stored[1] > LARGE_IMAGE
            with LARGE_IMAGE_LOCK if is_large else nullcontext():
                image.draft("RGB", (max(1, stored[0] // 8), max(1, stored[1] // 8)))  # JPEGs: at an eighth of the size
                image.load()
        return stored, upright
    except Exception as error:  # PIL raises many kinds on broken files; each is the file's fault
        return f"{record.path}: {error}"


def set_size(record, stored, upright, counts):
    """Gives a Record the size of its file, and boxes in pixels where they were fractions."""
    declared = (record.width, record.height)
    if declared == stored != upright:  # annotated on the stored pixels: the image is not rotated
        record.upright, upright = False, stored
    elif declared not in (upright, (0, 0)):
        counts["images differ in size from their annotations (the file's size is used)"] += 1
    record.width, record.height = upright
    if record.relative:
        record.boxes = record.boxes * (upright * 2)
        record.areas = record.areas * math.prod(upright)
        record.relative = False


def clean_boxes(record, counts):
    """Clips a Record's boxes to its image and drops the empty ones."""
    if not len(record.boxes):
        return
    limit = np.array([record.width, record.height] * 2)
    finite = np.isfinite(record.boxes).all(1)
    boxes = np.where(finite[:, None], record.boxes, 0)
    clipped = boxes.clip(0, limit)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = finite & (sides > 0).all(1)
    outside = keep & (np.abs(clipped - boxes).max(1) > 1)  # less is rounding
    counts["boxes clipped to their image"] += int(outside.sum())
    counts["empty, inverted, outside or non-finite boxes dropped"] += int((~keep).sum())
    record.boxes, record.labels, record.ignored = clipped[keep], record.labels[keep], record.ignored[keep]
    areas = record.areas[keep]
    record.areas = np.where(np.isfinite(areas) & (areas > 0), areas, sides[keep].prod(1))
