"""COCO: a JSON file for each split, or one for all images, wherever it and the images lie."""

import json
import math
import os
from pathlib import Path

import numpy as np

from errors import UserError
from files import MALFORMED, read_text, require_inside, require_string
from folder import MOST_LOOKED_INTO, count_paths, depth, listing, parts_of
from splits import NoSuchSplit, Split, make_record, split_names

ROBOFLOW_FILE = "_annotations.coco.json"
OTHER_TASKS = ("captions", "person_keypoints", "image_info", "stuff", "panoptic")  # COCO's files without boxes
COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')
NO_BOX = [math.nan] * 4  # dropped and counted with the boxes that are empty, see clean_boxes


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


def set_missing(split, folder, of_other):
    """An image that was only found in the other Split's folder, and is the other's, is missing: sets its path so."""
    strayed = folder.strayed & of_other
    for record in split.records if strayed else ():
        if str(record.path) in strayed:
            kinds = parts_of(record.path.relative_to(folder.root).parts)
            if not {*kinds} & {*parts_of([split.name])}:
                record.path = folder.root / split.name / record.path.name


def is_unlabelled(place, folder):
    """Whether a JSON file, which is not broken, has no annotations: a test set, or detections."""
    if folder.mentions(place, (b'"annotations"', b'"bbox"')):
        return False
    try:
        require_inside(folder.home, [Path(place.file)])
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
    candidates = [] if val or len(files) == 1 else [p for p in files if train_words[0].lower() not in coco_words(p)]
    unlabelled = [place for place in candidates if is_unlabelled(place, folder)]
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
    for split, other in (splits, splits[::-1]):
        set_missing(split, folder, {str(record.path) for record in other.records})
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


# The file


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


def is_true(value):
    """A flag, which some tools write as a word."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")
    return bool(value)
