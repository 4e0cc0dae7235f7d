"""Labelled pictures from disk to tensors: COCO and Pascal VOC layouts, told apart by looking, in one form.

A `Split` holds plain records; `DetectionDataset` turns one into what a detector trains on. A target has `boxes` (T, 4),
`labels` (T,) in 0..K-1 in the order of `classes`, `area`, `iscrowd`, `image_id`, `orig_size` and `size` (height, width).
Category ids of any kind stay in `category_ids`, for results files.
"""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from errors import UserError
from transforms import mix_up, mosaic

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


@dataclass
class Record:
    """One labelled picture. boxes (T, 4) xyxy pixels of the upright picture; labels (T,) in 0..K-1; ignored (T,) marks
    crowds and `difficult` objects, which train nothing and are neither hits nor misses in evaluation."""

    image_id: int | str
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    upright: bool = True  # False: the boxes were drawn on the stored pixels, before any EXIF rotation


@dataclass
class Split:
    """One part of a data set: its records, and what had to be mended or left out on the way in."""

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]
    remarks: list[str] = field(default_factory=list)

    @property
    def most_objects(self):
        return max((int((~r.ignored).sum()) for r in self.records), default=0)


def read_image(path, upright=True):
    """Any picture file -> RGB PIL image: turned as its EXIF says, transparency over white, 16 bits scaled to 8."""
    with Image.open(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, dtype=np.float32)
            top = 65535 if image.mode.startswith("I") and values.max() > 255 else max(values.max(), 1) if image.mode == "F" else 255
            image = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class DetectionDataset(torch.utils.data.Dataset):
    """Records as (image, target) after `transforms`; decoded pictures are kept in memory up to `cache_bytes`.

    Indexed by (index, seed, draw, mixed) as well as by index: the augmentation depends on nothing but these, see EndlessBatches,
    whichever process draws it and whenever; so a resumed run sees the same pictures. Where `mixed`, half of the pictures are
    mosaics, and in half of the batches pictures are mixed up.
    """

    def __init__(self, split, transforms, cache_bytes=0):
        self.split, self.transforms = split, transforms
        pixels = sum(r.width * r.height * 3 for r in split.records)
        self.cache = {} if pixels <= cache_bytes else None

    def __len__(self):
        return len(self.split.records)

    def __getitem__(self, index):
        index, seed, draw, mixed = index if isinstance(index, tuple) else (index, index, None, False)
        sample = self.load(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            is_mosaic = mixed and float(torch.rand(())) < 0.5
            if is_mosaic:
                sample = mosaic([sample, *(self.load(i) for i in torch.randint(len(self), (3,)).tolist())])
            return self.transforms(*sample, draw, is_mosaic)

    def __getitems__(self, indices):
        """A batch at once, as DataLoader asks for it."""
        samples = [self[index] for index in indices]
        first = indices[0]
        if isinstance(first, tuple) and first[3]:
            chance, share = torch.rand(2, generator=torch.Generator().manual_seed(first[1])).tolist()
            if chance < 0.5:
                samples = mix_up(samples, 0.45 + 0.1 * share)
        return samples

    def load(self, index):
        """-> the whole picture as uint8 tv_tensors.Image (3, H, W) and its target, boxes xyxy in pixels."""
        record = self.split.records[index]
        image = None if self.cache is None else self.cache.get(index)
        if image is None:
            image = TF.pil_to_tensor(read_image(record.path, record.upright))
            if self.cache is not None:
                self.cache[index] = image
        keep = ~record.ignored
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(record.boxes[keep]).float(), format="XYXY", canvas_size=(record.height, record.width)
        )
        target = {
            "boxes": boxes,
            "labels": torch.from_numpy(record.labels[keep]),
            "area": torch.from_numpy(record.areas[keep]).float(),
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.long),
            "image_id": index,
            "orig_size": torch.tensor([record.height, record.width]),
        }
        return tv_tensors.Image(image), target


class EndlessBatches:
    """Batches of (index, seed, draw, mixed) without end, for DataLoader's batch_sampler: permutation after permutation of the
    data set, each picture once in each, cut into full batches. `first` batches are left out, to go on where a run was stopped.

    phase: (pictures shown so far) -> "plain", "varied" or "mixed", see transforms. `draw` is a number in [0, 1) that a whole
    batch shares, None where it is plain.
    """

    def __init__(self, length, batch_size, seed, phase, first=0):
        self.length, self.batch_size, self.seed, self.phase, self.first = length, batch_size, seed, phase, first

    def __iter__(self):
        start = self.first * self.batch_size
        batch = []
        for position in itertools.count(start):
            round_, place = divmod(position, self.length)
            if place == 0 or position == start:
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + round_)).tolist()
            seed = (self.seed * 1_000_003 + position) % 2**31
            if not batch:
                phase = self.phase(position)
                draw = None if phase == "plain" else float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
            batch.append((order[place], seed, draw, phase == "mixed"))
            if len(batch) == self.batch_size:
                yield batch
                batch = []


def collate(batch, divisor=32):
    """[(image, target)] -> images (B, 3, H, W) padded at the right and bottom to multiples of divisor, mask (B, H, W) True on padding, targets."""
    images, targets = zip(*batch)
    h, w = (-(-max(i.shape[d] for i in images) // divisor) * divisor for d in (1, 2))
    padded = images[0].new_zeros(len(images), 3, h, w)
    mask = torch.ones(len(images), h, w, dtype=torch.bool)
    for image, row, row_mask in zip(images, padded, mask):
        row[:, : image.shape[1], : image.shape[2]] = image
        row_mask[: image.shape[1], : image.shape[2]] = False
    return padded, mask, list(targets)


# Layouts


def load_splits(root, train=None, val=None, skip_bad_images=False):
    """A data set's folder -> (training Split, validation Split), read and checked whole.

    `train` and `val` name the parts where the folder has several: a file of ImageSets/Main for Pascal VOC, a word in the
    JSON's or the folder's name for COCO. Raises UserError.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data takes the folder of a COCO or a Pascal VOC data set")
    read = read_voc if (root / "ImageSets" / "Main").is_dir() else read_coco
    splits = read(root, train, val)
    for split in splits:
        check(split, skip_bad_images)
    if not any(len(r.boxes) for r in splits[0].records):
        raise UserError(f"{root}: the training part '{splits[0].name}' has {len(splits[0].records)} pictures and no box")
    return splits


def read_coco(root, train=None, val=None):
    """Annotations in annotations/*.json, or one folder a part with its JSON inside -> [Split, Split]."""
    jsons = sorted((root / "annotations").glob("*.json")) if (root / "annotations").is_dir() else []
    jsons = jsons or sorted(path for folder in root.iterdir() if folder.is_dir() for path in folder.glob("*.json"))
    other_tasks = ("captions", "person_keypoints", "image_info", "stuff", "panoptic")
    jsons = [path for path in jsons if not path.name.startswith(other_tasks)]
    splits = []
    for words in ([train or "train"], [val] if val else ["val", "test"]):
        matches = next(filter(None, ([p for p in jsons if w in f"{p.parent.name}/{p.stem}".lower()] for w in words)), [])
        if len(matches) > 1:
            names = ", ".join(str(p.relative_to(root)) for p in matches)
            raise UserError(f"{root}: {names} could all be '{words[0]}'; say which with --train-split and --val-split")
        if not matches:
            here = ", ".join(sorted(p.name for p in root.iterdir())[:12]) or "nothing"
            raise UserError(
                f"{root}: no annotations for '{words[0]}'. Looked for COCO (annotations/*{words[0]}*.json, or a folder "
                f"{words[0]}*/ with a JSON inside) and for Pascal VOC (ImageSets/Main). Found: {here}"
            )
        splits.append(read_coco_file(matches[0], root))
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


def read_coco_file(path, root):
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        categories = sorted((c["id"], c["name"]) for c in data["categories"])
        images = {image["id"]: image for image in data["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a COCO annotation file ({type(error).__name__}: {error})") from None
    labels = {category_id: i for i, (category_id, _) in enumerate(categories)}
    if not categories or len(labels) < len(categories) or len(images) < len(data["images"]):
        raise UserError(f"{path}: {'no categories' if not categories else 'an id is used twice in categories or images'}")
    rows = {image_id: [] for image_id in images}
    for number, annotation in enumerate(data.get("annotations", [])):
        try:
            x, y, w, h = (float(n) for n in annotation["bbox"])
            label = labels[annotation["category_id"]]
            area = float(annotation.get("area") or w * h)
            rows[annotation["image_id"]].append((x, y, x + w, y + h, label, area, bool(annotation.get("iscrowd"))))
        except (ValueError, KeyError, TypeError) as error:
            what = f"annotation {annotation.get('id', number)}" if isinstance(annotation, dict) else f"annotation number {number}"
            raise UserError(f"{path}: {what}: {type(error).__name__} {error}; bbox, category_id or image_id is wrong") from None
    folders = [path.parent / "images", path.parent, root / path.stem.removeprefix("instances_"), root / "images", root]
    split = path.parent.name if path.parent.name != "annotations" else path.stem.removeprefix("instances_")
    folders.insert(0, root / split)
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    records = []
    for image_id, image in images.items():
        if "file_name" not in image:
            raise UserError(f"{path}: image {image_id} has no file_name")
        candidates = [folder / image["file_name"] for folder in folders]
        file = next((c for c in candidates if c.exists()), candidates[0])
        size = (int(image.get("width") or 0), int(image.get("height") or 0))
        records.append(make_record(image_id, file, size, rows[image_id]))
    return Split(split, [name for _, name in categories], [category_id for category_id, _ in categories], records)


def make_record(image_id, path, size, rows):
    """rows: (x1, y1, x2, y2, label, area, ignored)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    labels, ignored = table[:, 4].astype(np.int64), table[:, 6].astype(bool)
    return Record(image_id, path, *size, table[:, :4], labels, table[:, 5], ignored)


def read_voc(root, train=None, val=None):
    """Pascal VOC -> [Split, Split]: trainval and test where both are there, else train and val."""
    lists = {p.stem for p in (root / "ImageSets" / "Main").glob("*.txt")}
    if train is None:
        train = "trainval" if {"trainval", "test"} <= lists else "train"
    if val is None:
        val = "test" if train == "trainval" else "val"
    files = {path.stem: path for path in (root / "JPEGImages").iterdir()} if (root / "JPEGImages").is_dir() else {}
    names, parts = set(), []
    for part in (train, val):
        if part not in lists:
            raise UserError(f"{root}/ImageSets/Main/{part}.txt is missing; there are: {', '.join(sorted(lists)) or 'no lists'}")
        stems = [line.split()[0] for line in (root / "ImageSets" / "Main" / f"{part}.txt").read_text().splitlines() if line.strip()]
        objects = {stem: read_voc_file(root / "Annotations" / f"{stem}.xml") for stem in stems}
        names |= {row[4] for _, rows in objects.values() for row in rows}
        parts.append((part, objects))
    classes = sorted(names)
    labels = {name: i for i, name in enumerate(classes)}
    splits = []
    for part, objects in parts:
        records = [
            make_record(stem, files.get(stem, root / "JPEGImages" / f"{stem}.jpg"), size,
                        [(*row[:4], labels[row[4]], *row[5:]) for row in rows])
            for stem, (size, rows) in objects.items()
        ]  # fmt: skip
        splits.append(Split(part, classes, list(range(1, len(classes) + 1)), records))
    return splits


def read_voc_file(path):
    """-> (width, height), rows of (x1, y1, x2, y2, name, area, difficult); VOC counts pixels from 1, both ends included."""
    try:
        tree = ElementTree.parse(path).getroot()
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
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a Pascal VOC annotation ({error})") from None


def probe(record):
    """Decodes a picture (small, where JPEG allows) -> its stored and its upright (width, height), or what is wrong."""
    try:
        with Image.open(record.path) as image:
            stored = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            image.draft("RGB", (stored[0] // 8, stored[1] // 8))
            image.load()
        return stored, stored[::-1] if turned else stored
    except FileNotFoundError:
        return f"{record.path}: missing"
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
        mend_boxes(record, found)
    split.records = [r for r, p in zip(split.records, probes) if not isinstance(p, str)]
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
