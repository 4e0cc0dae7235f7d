"""Pascal VOC: lists of images in one devkit or several, or only images and an XML for each that has objects."""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from errors import UserError
from files import MALFORMED, read_bytes, read_lines, require_inside
from folder import count_paths, in_masks, normal, parts_of
from splits import NO_IMAGE, VOC_LINE, NoSuchSplit, build_splits, images_of_splits, looks_like_labels
from transforms import IMAGE_SUFFIXES


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
    """Raises UserError if one of some images without XML has YOLO's labels, beside it or in labels/."""
    for image in images:
        for place in folder.named(normal(image.stem), {".txt"}):
            is_near = Path(place.file).parent == image.parent or "labels" in place.folders
            if is_near and looks_like_labels(place, folder.home):
                raise UserError(
                    f"{image}: has no XML as others do, but {place.file}; use one format for all images "
                    "(--layout yolo takes the text files)"
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
        inner = [part for part in re.split(r"[/\\]+", folders) if part]
        stems.append((inner, stem, photos / f"{line if '..' in line else name}.jpg"))
        pairs.append((image, xml))
    images, xmls = (list(column) for column in zip(*pairs)) if pairs else ([], [])
    if not any(images):
        images = [voc_elsewhere(folder, photos, *names, IMAGE_SUFFIXES, split) for *names, _ in stems]
    if not any(xmls):
        xmls = [voc_elsewhere(folder, annotations, *names, {".xml"}, split) for *names, _ in stems]
    return [(image or missing, xml) for image, xml, (*_, missing) in zip(images, xmls, stems)]


def voc_elsewhere(folder, usual, folders, stem, suffixes, split):
    """The file of a name, with one of some suffixes, that is nearest to the folder where it should be -> path or None.

    folders: those in the list. Raises UserError if several are as near.
    """
    near = (*usual.parent.relative_to(folder.root).parts, usual.name)
    places = folder.named(normal(stem), suffixes, near=near)
    if len(voc_devkits(folder)) > 1:
        places = [place for place in places if place.folders[: len(near) - 1] == near[:-1]]
    places = [place for place in places if place.suffix == ".xml" or not in_masks(place)]
    place = folder.nearest(places, folders, stem, near=near, parts=parts_of([split]))
    return Path(place.file) if place else None


def files_by_name(folder, suffixes):
    """{path below a folder, without suffix: [path]} of the files with some suffixes, in whatever case."""
    files = defaultdict(list)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            files[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    return files


# The file of an image


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
