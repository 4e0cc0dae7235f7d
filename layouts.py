"""The layouts that labelled pictures come in, told apart by looking, read and checked whole into one form.

COCO, Roboflow's COCO, Pascal VOC (a devkit, several years of it, or folders of pictures and XML), YOLO, and a single COCO
file that is split here. A `Split` holds plain records, whichever door they came through.
"""

import json
import math
import os
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from errors import UserError
from files import open_image, read_text, require_inside

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # what reading something of another form raises
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


@dataclass
class Record:
    """One labelled picture. boxes (T, 4) xyxy pixels of the upright picture; labels (T,) in 0..K-1; ignored (T,) marks
    crowds and `difficult` objects: in training they are background like all that has no box, as in DETR; in evaluation they
    are neither hits nor misses."""

    image_id: int | str
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    upright: bool = True  # False: the boxes were drawn on the stored pixels, before any EXIF rotation
    relative: bool = False  # boxes and areas are still shares of the picture's, which has not been opened yet


@dataclass
class Split:
    """One part of a data set: its records, and what had to be mended or left out on the way in."""

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]
    remarks: list[str] = field(default_factory=list)
    layout: str = ""  # see LAYOUTS
    umbrella: int | None = None  # a class that may stand for all the others, see leave_out_umbrella

    @property
    def most_objects(self):
        return max((int((~r.ignored).sum()) for r in self.records), default=0)


def load_splits(
    root, train=None, val=None, skip_bad_images=False, layout=None, val_fraction=None, allow_outside=False, only_val=False
):
    """A data set's folder -> (training Split, validation Split), read and checked whole.

    `train` and `val` name the parts where the folder has several: a file of ImageSets/Main for Pascal VOC, a word in the
    JSON's or the folder's name otherwise. layout: see LAYOUTS, None to look. val_fraction: of a single file's pictures, drawn with
    a fixed seed (default 0.2). allow_outside: files may lie outside of the folder, through links, `..` or absolute paths.
    only_val: no picture of the training part is opened, only its classes are known. Prints the layout. Raises UserError.
    """
    root = Path(root)
    home = None if allow_outside else root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data takes the folder of a data set")
    guessed = layout is None
    layout = layout or recognise(root)
    if layout == "json":
        splits = read_single(root, home, 0.2 if val_fraction is None else val_fraction)
    else:
        splits = LAYOUTS[layout][2](root, home, train, val)
    for split in splits:
        split.layout = layout
    for split in splits[1:] if only_val else splits:
        if not split.records:
            raise UserError(f"{root}: the part '{split.name}' has no pictures")
        require_inside(home, [record.path for record in split.records])
        check(split, skip_bad_images)
    if not only_val and not any(len(r.boxes) for r in splits[0].records):
        raise UserError(f"{root}: the training part '{splits[0].name}' has {len(splits[0].records)} pictures and no box")
    print(f"{root}: {layout} layout{' (--layout overrules)' if guessed else ''}")
    return splits


def recognise(root):
    """The name of the first of LAYOUTS that a folder looks like. UserError with what was looked for and what was found."""
    for name, (_, fits, _) in LAYOUTS.items():
        if fits(root):
            return name
    looked_for = "; ".join(f"{name}: {signs}" for name, (signs, _, _) in LAYOUTS.items())
    raise UserError(f"{root}: no layout that is known. Looked for {looked_for}. Found: {listing(root)}")


def listing(folder):
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def parts(root, train=None, val=None):
    """-> the folders of the training and the validation part, None where there is none: train*, and val* before test*."""
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    named = lambda words: next((p for word in words for p in folders if p.name.lower().startswith(word)), None)
    return named([train or "train"]), named([val] if val else ["val", "test"])


def pictures(folder):
    """{stem: path} of the pictures in a folder."""
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES} if folder.is_dir() else {}


def coco_files(root):
    """The JSON files of detection in annotations/, otherwise those in the folders of the parts."""
    jsons = sorted((root / "annotations").glob("*.json")) if (root / "annotations").is_dir() else []
    jsons = jsons or sorted(path for folder in root.iterdir() if folder.is_dir() for path in folder.glob("*.json"))
    other_tasks = ("captions", "person_keypoints", "image_info", "stuff", "panoptic")
    return [path for path in jsons if not path.name.startswith(other_tasks)]


def read_coco(root, home, train=None, val=None):
    """Annotations in annotations/*.json, or one folder a part with its JSON inside -> [Split, Split]."""
    jsons = coco_files(root)
    splits = []
    for words in ([train or "train"], [val] if val else ["val", "test"]):
        matches = next(filter(None, ([p for p in jsons if w in f"{p.parent.name}/{p.stem}".lower()] for w in words)), [])
        if len(matches) > 1:
            names = ", ".join(str(p.relative_to(root)) for p in matches)
            raise UserError(f"{root}: {names} could all be '{words[0]}'; say which with --train-split and --val-split")
        if not matches:
            raise UserError(
                f"{root}: no annotations for '{words[0]}'. Looked for annotations/*{words[0]}*.json, or a folder {words[0]}*/ with a JSON "
                f"inside. Found: {listing(root)}"
            )
        splits.append(read_coco_file(matches[0], root, home))
    leave_out_umbrella(splits)
    first, second = (dict(zip(s.category_ids, s.classes)) for s in splits)
    for category_id, name in second.items():
        if first.get(category_id) != name:
            raise UserError(
                f"{root}: category {category_id} is '{name}' in {splits[1].name} but '{first.get(category_id, 'missing')}' "
                f"in {splits[0].name}; give both files the same categories"
            )
    labels = {category_id: i for i, category_id in enumerate(splits[0].category_ids)}
    renumber = np.array([labels[c] for c in splits[1].category_ids], dtype=np.int64)
    for record in splits[1].records:
        record.labels = renumber[record.labels] if len(record.labels) else record.labels
    splits[1].category_ids, splits[1].classes = splits[0].category_ids, splits[0].classes
    return splits


def leave_out_umbrella(splits):
    """Roboflow's exports begin with a class that stands for the whole project: nothing is labelled with it, all others are under it."""
    if any(split.umbrella is None or any(split.umbrella in record.labels for record in split.records) for split in splits):
        return
    for split in splits:
        name = split.classes.pop(split.umbrella)
        split.category_ids.pop(split.umbrella)
        for record in split.records:
            record.labels = record.labels - (record.labels > split.umbrella)
        split.remarks.append(f"class '{name}' stands for all the others and is left out")


def identifier(value):
    """An id of a COCO file: a whole number or a word."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"an id is {str(value)[:40]!r}")
    return value


def word(value):
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no word")
    return value


def read_coco_file(path, root, home):
    require_inside(home, [path])
    try:
        data = json.loads(read_text(path))
        categories = sorted((identifier(c["id"]), word(c["name"])) for c in data["categories"])
        images = {identifier(image["id"]): image for image in data["images"]}
        annotations = list(data.get("annotations") or [])
    except MALFORMED as error:
        raise UserError(f"{path}: not a COCO annotation file ({type(error).__name__}: {error})") from None
    labels = {category_id: i for i, (category_id, _) in enumerate(categories)}
    if not categories or len(labels) < len(categories) or len(images) < len(data["images"]):
        raise UserError(f"{path}: {'no categories' if not categories else 'an id is used twice in categories or images'}")
    rows = {image_id: [] for image_id in images}
    for number, annotation in enumerate(annotations):
        try:
            x, y, w, h = (float(n) for n in annotation["bbox"])
            label = labels[annotation["category_id"]]
            area = float(annotation.get("area") or w * h)
            rows[annotation["image_id"]].append((x, y, x + w, y + h, label, area, bool(annotation.get("iscrowd"))))
        except MALFORMED as error:
            what = f"annotation {annotation.get('id', number)}" if isinstance(annotation, dict) else f"annotation number {number}"
            raise UserError(f"{path}: {what}: {type(error).__name__} {error}; bbox, category_id or image_id is wrong") from None
    folders = [path.parent / "images", path.parent, root / path.stem.removeprefix("instances_"), root / "images", root]
    split = path.parent.name if path.parent.name != "annotations" else path.stem.removeprefix("instances_")
    folders.insert(0, root / split)
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    records = []
    for image_id, image in images.items():
        try:
            candidates = [folder / word(image["file_name"]) for folder in folders]
            size = (int(image.get("width") or 0), int(image.get("height") or 0))
        except MALFORMED as error:
            raise UserError(f"{path}: image {image_id}: {type(error).__name__} {error}; file_name, width or height is missing or wrong") from None
        file = next((c for c in candidates if os.path.exists(c)), candidates[0])
        records.append(make_record(image_id, file, size, rows[image_id]))
    names = [name for _, name in categories]
    above = {str(c.get("supercategory")) for c in data["categories"] if c["id"] != categories[0][0]}
    umbrella = 0 if path.name == "_annotations.coco.json" and len(names) > 1 and above == {names[0]} else None
    return Split(split, names, [category_id for category_id, _ in categories], records, umbrella=umbrella)


def read_single(root, home, val_fraction):
    """One COCO file for all pictures -> [Split, Split], the second of val_fraction of them, drawn with a fixed seed."""
    files = sorted([*root.glob("*.json"), *(root / "annotations").glob("*.json")])
    if len(files) != 1:
        raise UserError(f"{root}: {len(files)} JSON files; the layout json wants one. Found: {listing(root)}")
    whole = read_coco_file(files[0], root, home)
    leave_out_umbrella([whole])
    count = round(val_fraction * len(whole.records))
    if not 0 < count < len(whole.records):
        raise UserError(f"{files[0]}: --val-fraction {val_fraction} of {len(whole.records)} pictures leaves a part without any")
    order = np.random.default_rng(0).permutation(len(whole.records))
    remark = f"{files[0].name} is split with a fixed seed: {len(order) - count} pictures to train on, {count} to evaluate on"
    make = lambda name, chosen, remarks: Split(name, whole.classes, whole.category_ids, [whole.records[i] for i in sorted(chosen)], remarks)
    return [make("train", order[count:], [*whole.remarks, remark]), make("val", order[:count], [])]


def make_record(image_id, path, size, rows):
    """rows: (x1, y1, x2, y2, label, area, ignored)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    labels, ignored = table[:, 4].astype(np.int64), table[:, 6].astype(bool)
    return Record(image_id, path, *size, table[:, :4], labels, table[:, 5], ignored)


def voc_devkits(root):
    """The folders that have ImageSets/Main: root itself, or its years, as VOC2007 and VOC2012, or those in its VOCdevkit."""
    if (root / "ImageSets" / "Main").is_dir():
        return [root]
    return [p for folder in (root, root / "VOCdevkit") if folder.is_dir() for p in sorted(folder.iterdir()) if (p / "ImageSets" / "Main").is_dir()]


def read_voc(root, home, train=None, val=None):
    """Pascal VOC, one devkit or several years -> [Split, Split]: trainval and test where both are there, else train and val."""
    devkits = voc_devkits(root)
    lists = {p.stem for devkit in devkits for p in (devkit / "ImageSets" / "Main").glob("*.txt")}
    if train is None:
        train = "trainval" if {"trainval", "test"} <= lists else "train"
    if val is None:
        val = "test" if train == "trainval" else "val"
    found = []
    for part in (train, val):
        if part not in lists:
            raise UserError(f"{root}/ImageSets/Main/{part}.txt is missing; there are: {', '.join(sorted(lists)) or 'no lists'}")
        entries = []
        for devkit in devkits:
            path = devkit / "ImageSets" / "Main" / f"{part}.txt"
            require_inside(home, [path])
            stems = [line.split()[0] for line in read_text(path).splitlines() if line.strip()] if path.exists() else []
            files = pictures(devkit / "JPEGImages")
            entries += [(stem, files.get(stem, devkit / "JPEGImages" / f"{stem}.jpg"), devkit / "Annotations" / f"{stem}.xml") for stem in stems]
        found.append((part, entries))
    return splits_of_xml(found, home)


def xml_folder(part):
    """Where the XML files of a part's folder lie, or None: beside its pictures or in a folder beside theirs."""
    return next((f for f in (part / "labels", part / "annotations", part / "Annotations", part) if part and next(f.glob("*.xml"), None)), None)


def read_voc_folders(root, home, train=None, val=None):
    """train/images and train/labels with an XML for each picture, or all in train/; val and test likewise -> [Split, Split]."""
    found = []
    for part, name in zip(parts(root, train, val), (train or "train", val or "val")):
        if part is None:
            raise UserError(f"{root}: no folder for '{name}'; found: {listing(root)}")
        labels = xml_folder(part) or part
        files = pictures(part / "images") or pictures(part)
        found.append((part.name, [(stem, path, labels / f"{stem}.xml") for stem, path in files.items()]))
    return splits_of_xml(found, home)


def splits_of_xml(found, home):
    """[(part, [(image id, picture, XML)])] -> [Split, Split] with the classes of both, in alphabetical order."""
    require_inside(home, [xml for _, entries in found for _, _, xml in entries])
    objects = [[(image_id, path, *read_voc_file(xml)) for image_id, path, xml in entries] for _, entries in found]
    classes = sorted({row[4] for part in objects for *_, rows in part for row in rows})
    labels = {name: i for i, name in enumerate(classes)}
    return [
        Split(name, classes, list(range(1, len(classes) + 1)), [
            make_record(image_id, path, size, [(*row[:4], labels[row[4]], *row[5:]) for row in rows]) for image_id, path, size, rows in part
        ])
        for (name, _), part in zip(found, objects)
    ]  # fmt: skip


def read_voc_file(path):
    """-> (width, height), rows of (x1, y1, x2, y2, name, area, difficult); VOC counts pixels from 1, both ends included."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file")
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise ValueError("it defines entities, which no annotation needs")
        tree = ElementTree.fromstring(content)
        size = tuple(int(float(tree.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
        rows = []
        for item in tree.iter("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            # A box whose ends coincide is a slip of the mouse, not an object one pixel wide.
            x1, y1 = (x1 - 1 if x2 > x1 else x1), (y1 - 1 if y2 > y1 else y1)
            rows.append((x1, y1, x2, y2, item.findtext("name").strip(), (x2 - x1) * (y2 - y1), item.findtext("difficult", "0").strip() == "1"))
        return size, rows
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ElementTree.ParseError, LookupError, *MALFORMED) as error:
        raise UserError(f"{path}: not a Pascal VOC annotation ({error})") from None


def read_yolo(root, home, train=None, val=None):
    """YOLO: data.yaml names the classes and where the pictures are; for a/images/b.jpg the boxes are in a/labels/b.txt, a line each: class,
    then cx cy w h as shares of the picture, or the corners of a polygon -> [Split, Split]."""
    path = yolo_file(root)
    require_inside(home, [path])
    try:
        data = yaml.safe_load(read_text(path))
        names = data["names"]
        names = [names[i] for i in sorted(names)] if isinstance(names, dict) else list(names)
        if any(isinstance(name, (dict, list)) for name in names):
            raise TypeError("names are words")
        names, base = [str(name) for name in names], data.get("path") and word(data["path"])
    except (yaml.YAMLError, *MALFORMED) as error:
        raise UserError(f"{path}: not YOLO's data.yaml, which has names, train and val ({type(error).__name__}: {error})") from None
    splits = []
    for keys in ([train or "train"], [val] if val else ["val", "valid", "test"]):
        key = next((key for key in keys if data.get(key)), None)
        if key is None:
            raise UserError(f"{path}: no {' or '.join(keys)}; it has {', '.join(map(str, data))}")
        entries = data[key] if isinstance(data[key], list) else [data[key]]
        if not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: {key} is neither a folder nor a list of folders")
        files = [file for entry in entries for file in yolo_pictures(entry, path, base, home)]
        require_inside(home, files)
        records = [yolo_record(file, len(names), path) for file in files]
        splits.append(Split(key, names, list(range(len(names))), records))
    return splits


def yolo_file(root):
    return next((p for p in (root / "data.yaml", root / "data.yml", root / "dataset.yaml") if p.is_file()), None)


def yolo_pictures(entry, path, base, home):
    """The pictures of an entry of data.yaml, a folder or a list of files, taken from the data set's root, from the file, or, as exports
    write it, from a folder beside the file's."""
    bases = [path.parent / base if base else path.parent, path.parent, path.parent / "images"]
    candidates = [b / entry for b in bases] + [path.parent / entry.removeprefix("../"), path.parent / entry / "images"]
    place = next((c for c in candidates if os.path.exists(c)), None)
    if place is None:
        raise UserError(f"{path}: {entry} is not there; looked for {', '.join(str(c) for c in dict.fromkeys(candidates))}")
    require_inside(home, [place])
    if place.is_file():
        return [place.parent / line.strip() for line in read_text(place).splitlines() if line.strip()]
    if not pictures(place) and (place / "images").is_dir():
        place = place / "images"
    return list(pictures(place).values()) or sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def yolo_record(file, classes, path):
    parents = list(file.parts)
    for i in reversed(range(len(parents) - 1)):
        if parents[i] == "images":
            parents[i] = "labels"
            break
    labels = Path(*parents).with_suffix(".txt")
    rows = []
    for number, line in enumerate(read_text(labels).split("\n") if labels.exists() else [], 1):
        if not line.strip():
            continue
        try:
            label, *values = (float(word) for word in line.split())
            if label != int(label) or not 0 <= label < classes or len(values) < 4 or (len(values) > 5 and len(values) % 2):
                raise ValueError(f"'{line.strip()[:60]}'")
        except (ValueError, OverflowError) as error:
            raise UserError(f"{labels}, line {number}: {error}; wanted a class from 0 to {classes - 1} and cx cy w h, or a polygon") from None
        if len(values) in (4, 5):  # the fifth would be a score
            cx, cy, w, h = values[:4]
            box = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        else:
            box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        x1, y1, x2, y2 = box
        rows.append((x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), False))
    record = make_record(file.stem, file, (0, 0), rows)
    record.relative = True
    return record


def upright_size(image):
    """(width, height) of a PIL image once it is turned as its EXIF says."""
    return image.size[::-1] if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else image.size


LARGE, ONE_LARGE = 2**24, threading.Lock()  # pixels of a picture; one such at a time is in memory


def probe(record):
    """Decodes a picture (small, where JPEG allows) -> its stored and its upright (width, height), or what is wrong."""
    try:
        with open_image(record.path) as image:
            stored, upright = image.size, upright_size(image)
            with ONE_LARGE if stored[0] * stored[1] > LARGE else nullcontext():
                image.draft("RGB", (max(1, stored[0] // 8), max(1, stored[1] // 8)))
                image.load()
        return stored, upright
    except Exception as error:  # PIL raises many kinds on broken files; each is the file's fault
        return f"{record.path}: {error}"


def check(split, skip_bad_images=False):
    """Opens every picture and mends every box, in place; `split.remarks` tells what was found. Raises UserError."""
    with ThreadPoolExecutor() as pool:
        probes = list(tqdm(pool.map(probe, split.records), f"checking {split.name}", len(split.records), leave=False, disable=None if len(split.records) > 2000 else True))
    bad = [p for p in probes if isinstance(p, str)]
    if bad:
        listed = "; ".join(bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
        if not skip_bad_images or len(bad) == len(probes):
            raise UserError(f"{split.name}: {len(bad)} of {len(probes)} pictures can't be read ({listed}). Mend them, or leave them out with --skip-bad-images")
        split.remarks.append(f"{len(bad)} pictures left out: {listed}")
    found = Counter()
    for record, sizes in zip(split.records, probes):
        if isinstance(sizes, str):
            continue
        stored, upright = sizes
        declared = (record.width, record.height)
        if declared == stored != upright:  # annotated on the pixels as stored: leave them so
            record.upright, upright = False, stored
        elif declared not in (upright, (0, 0)):
            found["pictures are not of the size that their annotation says; the file's size counts"] += 1
        record.width, record.height = upright
        if record.relative:
            record.boxes, record.areas = record.boxes * (upright * 2), record.areas * math.prod(upright)
            record.relative = False
        mend_boxes(record, found)
    split.records = [r for r, p in zip(split.records, probes) if not isinstance(p, str)]
    times = Counter(record.image_id for record in split.records)
    for record in split.records:  # of several folders
        if times[record.image_id] > 1:
            record.image_id = str(record.path)
    empty = sum(not len(r.boxes) for r in split.records)
    if empty:
        found["pictures have no box (kept: they teach what is background)"] = empty
    split.remarks += [f"{count} {what}" for what, count in found.items() if count]


def mend_boxes(record, found):
    """Clips a record's boxes to the picture and drops the empty ones, counting into `found`."""
    if not len(record.boxes):
        return
    limit = np.array([record.width, record.height] * 2)
    finite = np.isfinite(record.boxes).all(1)
    boxes = np.where(finite[:, None], record.boxes, 0)
    clipped = boxes.clip(0, limit)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = finite & (sides > 0).all(1)
    outside = keep & (np.abs(clipped - boxes).max(1) > 1)
    found["boxes clipped to their picture"] += int(outside.sum())
    found["empty, inverted, outside or non-finite boxes dropped"] += int((~keep).sum())
    record.boxes, record.labels, record.ignored = clipped[keep], record.labels[keep], record.ignored[keep]
    record.areas = np.where(np.isfinite(record.areas[keep]) & (record.areas[keep] > 0), record.areas[keep], sides[keep].prod(1))


# name: what shows it, whether a folder shows it, what reads it; the first that fits counts
LAYOUTS = {
    "voc": ("ImageSets/Main/*.txt, here or in VOC2007/ ... or VOCdevkit/VOC2007/ ...", voc_devkits, read_voc),
    "yolo": ("data.yaml", yolo_file, read_yolo),
    "roboflow": ("train/_annotations.coco.json", lambda root: next(root.glob("*/_annotations.coco.json"), None), read_coco),
    "coco": ("annotations/*train*.json, or train*/ with a JSON inside", lambda root: any("train" in f"{p.parent.name}/{p.stem}".lower() for p in coco_files(root)), read_coco),
    "voc-folders": ("train/ with an XML for each picture, in it or in its labels/", lambda root: parts(root)[0] and xml_folder(parts(root)[0]), read_voc_folders),
    "json": ("a single COCO *.json, here or in annotations/", lambda root: len([*root.glob("*.json"), *(root / "annotations").glob("*.json")]) == 1, read_single),
}  # fmt: skip
