"""Reads datasets of any common layout into one form, a `Split` of `Record`s, checked by checks.py.

Layouts: COCO, Pascal VOC and YOLO, as their authors, the tools that export them, and hands leave them, each in a file
of its own; see LAYOUTS. A `Folder` lists all files once. The annotations are found in it and matched with their images.
"""

import os
from pathlib import Path

from checks import check
from errors import UserError
from files import garbage_collection_paused, require_inside
from folder import Folder, count_paths, listing
from layout_coco import coco_files, read_coco
from layout_voc import has_xml, read_voc, voc_devkits
from layout_yolo import has_labels, has_yolo_file_at_top, read_yolo, yolo_file
from splits import NoSuchSplit, choose_classes, divide, fingerprint
from transforms import CLOSED_SUFFIXES, IMAGE_SUFFIXES

VAL_FRACTION = 0.2  # of a dataset that has one part only


@garbage_collection_paused()
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
