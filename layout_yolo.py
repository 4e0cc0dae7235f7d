"""YOLO: data.yaml has the classes and the folders of the images, the boxes of a/images/b.jpg are in a/labels/b.txt."""

import math
import os
from pathlib import Path

import yaml

from errors import UserError
from files import MALFORMED, read_lines, read_text, require_inside, require_string
from folder import MOST_LOOKED_INTO, count_paths, depth, is_of_masks, normal, parts_of
from splits import NO_IMAGE, NoSuchSplit, build_splits, images_of_splits, looks_like_labels, split_names
from transforms import IMAGE_SUFFIXES

MOST_CLASSES = 10_000  # a number of a class beyond is a mistake
NO_ENTRIES = "path", "names", "download"  # keys of data.yaml that name no images
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
        others = [
            value if isinstance(value, list) else [value] for k, value in data.items() if k not in (key, *NO_ENTRIES)
        ]
        others = [entry for values in (*others, entries) for entry in values if isinstance(entry, str) and entry]
        images = [i for entry in entries for i in yolo_images(folder, entry, path, data.get("path"), key, others)]
        images = list(dict.fromkeys(images))
        if key == "test" and sources and not val and not any(yolo_labels(folder, images)):
            break  # a challenge keeps its labels
        sources.append((key, images))
    return sources


def yolo_images(folder, entry, path, base, key, others=()):
    """The images of an entry of data.yaml, which is a folder or a text file with a list -> [path]. Raises UserError.

    The entry is relative to `base`, to data.yaml's folder, or, in exports, to a folder next to that. others: all other
    entries; of a folder within the entry's, the images are theirs. So are masks, below images, no images.
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
    images, deeper = [], []
    for path in sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        name = str(path.relative_to(place))
        *folders, _ = parts = name.split(os.sep)
        if not any(part.startswith(".") for part in parts) and not name.startswith(inner):
            (deeper if any(map(is_of_masks, folders)) else images).append(path)
    if images:
        deeper = [image for image, label in zip(deeper, yolo_labels(folder, deeper)) if label]
    return sorted(images + deeper)


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


# The files


def read_yolo_yaml(path):
    """data.yaml -> its content with `names` a list and `points` the numbers of a line's key points. Raises UserError.

    `points` is None unless `kpt_shape` says that the labels have any.
    """
    try:
        text = read_text(path)
        data = yaml.safe_load(text)
        written = yaml.load(text, yaml.BaseLoader)["names"]  # no, 01, which are a boolean and a number otherwise
        if not isinstance(data["names"], (str, list, dict)):
            raise TypeError("names are neither a list nor a mapping")
        if isinstance(written, dict) and len(written) < len(data["names"]):
            raise ValueError("the keys of names have to be numbers, each once")
        names = class_names(written)
        if data.get("path"):
            require_string(data["path"])
        shape = data.get("kpt_shape")
        points = math.prod(int(n) for n in shape) if shape else None
        classes = data.get("nc")
        classes = classes if classes is None else int(classes)
    except (yaml.YAMLError, *MALFORMED) as error:
        raise UserError(
            f"{path}: not a YOLO data.yaml, which has names, train and val ({type(error).__name__}: {error})"
        ) from None
    if classes not in (None, len(names)):
        raise UserError(
            f"{path}: nc is {classes}, but names makes {len(names)} classes from number 0 on "
            f"({', '.join(names[:8])}); correct one"
        )
    return data | {"names": names, "points": points}


def class_names(names):
    """`names` of a data.yaml, a list, {number: name}, {name: number}, or a word -> [name]. Raises one of MALFORMED.

    Numbers keep their meaning: one that is skipped becomes a class that is called by its number.
    """
    if isinstance(names, str):
        names = [names]
    if isinstance(names, dict):
        numbers = [value for value in names.values() if isinstance(value, str) and value.isdecimal()]
        if not all(key.isdecimal() for key in names) and len(numbers) == len(names):
            names = dict(zip(names.values(), names)) if len(set(numbers)) == len(names) else {}
        numbers = {class_number(key): name for key, name in names.items()}
        if not numbers or len(numbers) < len(names):
            raise ValueError("the keys of names have to be numbers, each once")
        names = [numbers.get(number, str(number)) for number in range(max(numbers) + 1)]
    names = list(names)
    if any(isinstance(name, (dict, list)) for name in names):
        raise TypeError("a class name is a list or a mapping")
    return [str(name) for name in names]


def class_number(key):
    """A key of `names`, a number or the word for one -> int. Raises ValueError."""
    number = int(key) if key.isdecimal() else -1
    if not 0 <= number < MOST_CLASSES:
        raise ValueError(f"{str(key)[:40]!r} in names is not the number of a class")
    return number


def read_darknet_data(path):
    """obj.data, lines of `key = value` -> {key: value}. Raises UserError."""
    pairs = (line.partition("=") for line in read_lines(path))
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def read_yolo_labels(path, num_classes, points=None):
    """A label file -> rows as yolo_row gives them. Raises UserError."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(yolo_row(line, num_classes, points))
        except (ValueError, OverflowError) as error:
            form = "or a polygon" if points is None else f"and {points} numbers of key points"
            raise UserError(
                f"{path}, line {number}: {error}; expected a class from 0 to {num_classes - 1} and cx cy w h, {form}"
            ) from None
    return rows


def yolo_row(line, num_classes, points=None):
    """A line of a label file -> (x1, y1, x2, y2, label, area, False), in fractions of the image.

    It is `class cx cy w h`, optionally with a score or with so many numbers of key points, or `class x y x y x y ...`,
    a polygon or the corners of an oriented box. Raises ValueError or OverflowError.
    """
    label, *values = (float(text) for text in line.split())
    is_class = label == int(label) and 0 <= label < num_classes
    is_box = len(values) in ((4, 5) if points is None else (4, 4 + points))
    is_polygon = points is None and len(values) >= 6 and len(values) % 2 == 0
    if not is_class or not (is_box or is_polygon):
        raise ValueError(f"'{line.strip()[:60]}'")
    if is_box:
        cx, cy, w, h = values[:4]
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        if max(values) >= 2:
            raise ValueError(f"'{line.strip()[:60]}' leaves the image (key points need kpt_shape in data.yaml)")
        x1, y1, x2, y2 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    return x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), False
