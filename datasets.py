"""Labelled pictures from disk to tensors: `DetectionDataset` turns a `Split` of layouts.py into what a detector trains on.

    python datasets.py DIR          what a data set holds, what is suspicious about it, and a picture of samples

A target has `boxes` (T, 4), `labels` (T,) in 0..K-1 in the order of `classes`, `area`, `iscrowd`, `image_id`, `orig_size` and `size` (height, width).
Category ids of any kind stay in `category_ids`, for results files.
"""

import argparse
import ctypes
import hashlib
import itertools
import math
import random
import signal
import sys
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import plots
from errors import UserError, run
from files import open_image
from layouts import LAYOUTS, load_splits
from transforms import longest_side, mix_up, mosaic, resized_sides


def read_image(path, upright=True, detail=None):
    """Any picture file -> RGB PIL image: turned as its EXIF says, transparency over white, 16 bits scaled to 8.

    detail: a JPEG is decoded at a half, a quarter or an eighth if its shortest side keeps so many pixels.
    """
    with open_image(path) as image:
        n = reduction(*image.size, detail)
        image.draft(None, (image.width // n, image.height // n))
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, dtype=np.float32)
            top = 65535 if image.mode.startswith("I") and values.max() > 255 else max(values.max(), 1) if image.mode == "F" else 255
            image = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def reduction(width, height, detail):
    """1, 2, 4 or 8: how many pixels, along each side, may become one. None is ever cut, so that boxes stay exact."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or detail and min(width, height) // n >= detail and width % n == height % n == 0)


class Draw(NamedTuple):
    """Which image, and how it is augmented; the augmentation depends on nothing else, whichever process does it and whenever."""

    index: int
    seed: int = 0
    side: float | None = None  # in [0, 1), picks the transform, see transforms.PickOne; None: the whole image
    is_mosaic: bool = False
    mix: float | None = None  # what the image keeps of itself where its batch is mixed up


class DetectionDataset(torch.utils.data.Dataset):
    """Records as (image, target) after `transforms`, indexed by a Draw (or a tuple of its parts, or an index alone). Decoded
    pictures are kept in memory if `cache_bytes` hold them all. detail: see read_image."""

    def __init__(self, split, transforms, cache_bytes=0, detail=None):
        self.split, self.transforms, self.detail = split, transforms, detail
        needed = sum(decoded_bytes(record, detail) for record in split.records)
        self.cache, self.room = {}, cache_bytes if needed <= cache_bytes else 0

    def __len__(self):
        return len(self.split.records)

    def __getitem__(self, index):
        draw = Draw(*index) if isinstance(index, tuple) else Draw(index, index)
        sample = self.load(draw.index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)  # torch.manual_seed keeps a note for every device that is not in use yet
            if draw.is_mosaic:
                others = (self.load(i) for i in torch.randint(len(self), (3,)).tolist())
                sample = mosaic([sample, *others], self.transforms.tile)
            return self.transforms(*sample, draw.side, draw.is_mosaic)

    def __getitems__(self, indices):
        """A batch at once, as DataLoader asks for it."""
        samples = [self[index] for index in indices]
        mix = Draw(*indices[0]).mix if isinstance(indices[0], tuple) else None
        return samples if mix is None else mix_up(samples, mix)

    def load(self, index):
        """-> the whole picture as uint8 tv_tensors.Image (3, H, W) and its target, boxes xyxy in pixels."""
        record = self.split.records[index]
        image = self.cache.get(index)
        if image is None:
            try:
                image = TF.pil_to_tensor(read_image(record.path, record.upright, self.detail))
            except Exception as error:  # it could be read when the run began
                raise UserError(f"{record.path}: can't be read any more ({error})") from None
            if image.nbytes <= self.room:
                self.room -= image.nbytes
                self.cache[index] = image
        keep = ~record.ignored
        h, w = image.shape[-2:]
        smaller = w / record.width
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes[keep] * smaller).float(), format="XYXY", canvas_size=(h, w)),
            "labels": torch.from_numpy(record.labels[keep]),
            "area": torch.from_numpy(record.areas[keep] * smaller**2).float(),
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.long),
            "image_id": index,
            "orig_size": torch.tensor([record.height, record.width]),
        }
        return tv_tensors.Image(image), target


def start_worker(_=None):
    """For processes that work for this one, such as DataLoader's. Ctrl-C reaches them too; the main process alone decides what it means.
    They end when it is killed. What a picture took in memory is kept for the next: glibc would give it back, and getting it again, zeroed
    page by page, took a quarter of the time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc:
        set_parent_death_signal = 1
        libc.prctl(set_parent_death_signal, signal.SIGKILL)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def decoded_bytes(record, detail):
    """What a picture takes in memory, if its file is what its name says."""
    n = reduction(record.width, record.height, detail) if record.path.suffix.lower() in (".jpg", ".jpeg") else 1
    return 3 * record.width * record.height // n**2


class EndlessBatches:
    """Batches of Draws without end, for DataLoader's batch_sampler: the data set is shuffled anew in every round, each image
    comes once in each, and batches go across rounds, so that all are full. `first` batches are left out, to resume a run.

    proportions: each image's width / height, by which images are put together, see by_proportions; None leaves it to chance.
    phase: (images shown so far) -> "plain", "varied" or "mixed", see transforms; a batch shares its `side`. mixing: how
    likely an image is a mosaic and a batch is mixed up where it is "mixed". share: (rank, number of processes), each of which
    takes its part of every batch; pieces: in how many batches it gets that part, for accumulation.

    All that is drawn for a batch comes from one generator in turn: draws that share a seed would be the same number.
    """

    def __init__(self, length, batch_size, seed, phase, first=0, share=(0, 1), proportions=None, mixing=0.5, pieces=1):
        self.length, self.batch_size, self.seed, self.phase, self.first, self.share = length, batch_size, seed, phase, first, share
        self.proportions = torch.ones(length) if proportions is None else proportions
        self.mixing, self.pieces, self.last_order = mixing, pieces, (None, [])

    def __iter__(self):
        rank, world = self.share
        for number in itertools.count(self.first):
            mine = self.batch(number)[rank::world]
            size = len(mine) // self.pieces
            yield from (mine[i : i + size] for i in range(0, len(mine), size))

    def batch(self, number):
        """-> the Draws of all processes."""
        start = number * self.batch_size
        places = (divmod(position, self.length) for position in range(start, start + self.batch_size))
        indices = [self.order(round_)[place] for round_, place in places]
        draws, phase = random.Random(f"{self.seed} batch {number}"), self.phase(start)
        side, mixes, mix = draws.random(), draws.random() < self.mixing, 0.45 + 0.1 * draws.random()
        side, mix = None if phase == "plain" else side, mix if phase == "mixed" and mixes else None
        is_mosaic = [draws.random() < self.mixing and phase == "mixed" for _ in indices]
        return [Draw(index, draws.getrandbits(31), side, *more, mix) for index, *more in zip(indices, is_mosaic)]

    def order(self, round_):
        """The images' indices in the order of a round."""
        if self.last_order[0] != round_:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed} round {round_}").getrandbits(63))
            order = torch.randperm(self.length, generator=generator)
            begun = -round_ * self.length % self.batch_size  # so many belong to a batch of the last round
            order = torch.cat([order[:begun], by_proportions(order[begun:], self.proportions, self.batch_size)])
            self.last_order = round_, order.tolist()
        return self.last_order[1]


def proportions_of(split):
    """Width / height of each picture (N,)."""
    return torch.tensor([record.width / record.height for record in split.records])


def equal_batches(sizes, batch_size, divisor):
    """sizes [(height, width)] of images as the network gets them -> batches of their indices, [[index]], in each of which all
    are padded to the same multiples of divisor: so what an image gives doesn't depend on the others."""
    groups = defaultdict(list)
    for index, (height, width) in enumerate(sizes):
        groups[math.ceil(height / divisor), math.ceil(width / divisor)].append(index)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def evaluation_batches(split, batch_size, divisor, size, square=False, exact=True):
    """equal_batches of a Split for eval_transforms(size, square, exact)."""
    sizes = [
        (size, size) if square else resized_sides(r.height, r.width, size, longest_side(size), exact) for r in split.records
    ]
    return equal_batches(sizes, batch_size, divisor)


def by_proportions(order, proportions, batch_size, batches=16):
    """Puts pictures of like proportions into the same batch, so that little of it is padding. Of each `batches` full batches the pictures
    are shared out anew, narrow ones first; then those batches come in the order of their first pictures in `order`, as random as that is.
    What is left at the end stays as it is."""
    places, full = torch.arange(len(order)), len(order) // batch_size * batch_size
    found = []
    for chunk in places[:full].split(batches * batch_size):
        grouped = chunk[proportions[order[chunk]].argsort(stable=True)].view(-1, batch_size)
        found.append(grouped[grouped.amin(1).argsort()].flatten())
    return order[torch.cat([*found, places[full:]])]


def collate(batch, divisor=32):
    """[(image, target)] -> images (B, 3, H, W) padded at the right and bottom to multiples of divisor, mask (B, H, W) True on padding, targets."""
    images, targets = zip(*batch)
    h, w = (-(-max(i.shape[d] for i in images) // divisor) * divisor for d in (1, 2))
    padded = images[0].new_zeros(len(images), h, w, 3).permute(0, 3, 1, 2)  # channels last
    mask = torch.ones(len(images), h, w, dtype=torch.bool)
    for image, row, row_mask in zip(images, padded, mask):
        row[:, : image.shape[1], : image.shape[2]] = image
        row_mask[: image.shape[1], : image.shape[2]] = False
    return padded, mask, list(targets)


def describe(split):
    """Lines that tell what a Split holds."""
    records = split.records
    boxes = np.concatenate([r.boxes for r in records])
    labels = np.concatenate([r.labels for r in records])
    areas, sides = np.concatenate([r.areas for r in records]), np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    spread = lambda values, form="{:.0f}": " / ".join(form.format(v) for v in np.quantile(values, [0, 0.5, 1])) if len(values) else "-"
    sizes = Counter((r.width, r.height) for r in records)
    lines = [f"{split.name}: {len(records):,} pictures, {len(boxes):,} boxes, {len(split.classes)} classes"]
    lines += [f"  {remark}" for remark in split.remarks]
    lines.append("  sizes: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(4)) + (f", {len(sizes) - 4} others" if len(sizes) > 4 else ""))
    lines.append(f"  boxes in a picture, least / median / most: {spread([len(r.boxes) for r in records])}")
    share = lambda low, high: f"{((areas >= low) & (areas < high)).mean() if len(areas) else 0:.0%}"
    lines.append(f"  small, medium, large (under 32, under 96, from 96 pixels squared): {share(0, 32**2)}, {share(32**2, 96**2)}, {share(96**2, np.inf)}")
    lines.append(f"  {'class':24s} {'boxes':>8s} {'pictures':>8s}  side in pixels, least / median / most")
    for label, name in enumerate(split.classes):
        mine = labels == label
        lines.append(f"  {name[:24]:24s} {mine.sum():8,d} {sum(label in r.labels for r in records):8,d}  {spread(sides[mine])}")
    return lines


def suspicions(train, val):
    """What may be wrong with a data set, a line each."""
    lines, homes = [], defaultdict(list)
    for split in (train, val):
        for record in split.records:
            homes[hashlib.sha256(record.path.read_bytes()).digest()].append((split.name, record.path))
    named = lambda paths: ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    twice = [places for places in homes.values() if len(places) > 1]
    leaked = [next(path for name, path in places if name == val.name) for places in twice if len({name for name, _ in places}) == 2]
    if leaked:
        lines.append(f"{len(leaked)} pictures of {val.name} are in {train.name} too, byte by byte: the figures will be too good ({named(leaked)})")
    again = [path for places in twice for split in (train, val) for name, path in [p for p in places if p[0] == split.name][1:]]
    if again:
        lines.append(f"{len(again)} pictures are there more than once in their part ({named(again)})")
    counts = [Counter(int(label) for r in split.records for label in r.labels) for split in (train, val)]
    unseen = [name for label, name in enumerate(train.classes) if counts[1][label] and not counts[0][label]]
    if unseen:
        lines.append(f"classes of {val.name} that {train.name} has no box of: {', '.join(unseen)}")
    rare = [f"{name} ({counts[0][label]})" for label, name in enumerate(train.classes) if 0 < counts[0][label] < 10]
    if rare:
        lines.append(f"classes with fewer than ten boxes in {train.name}: {', '.join(rare)}")
    unused = [name for label, name in enumerate(train.classes) if not counts[0][label] and not counts[1][label]]
    if unused:
        lines.append(f"classes without any box: {', '.join(unused)}")
    thin, doubled, whole = [], [], []
    for record in (*train.records, *val.records):
        sides = record.boxes[:, 2:] - record.boxes[:, :2]
        thin += [record.path] * int((sides.min(1) <= 1).sum()) if len(sides) else []
        doubled += [record.path] * (len(sides) - len({(*box, label) for box, label in zip(record.boxes.tolist(), record.labels.tolist())}))
        whole += [record.path] * int((sides.prod(1) >= 0.98 * record.width * record.height).sum())
    for paths, what in ((thin, "boxes are one pixel wide or high, or less"), (doubled, "boxes are there twice, with the same class"), (whole, "boxes are as large as their picture")):
        if paths:
            lines.append(f"{len(paths)} {what} ({named(list(dict.fromkeys(paths)))})")
    return lines


def draw_sheet(split, count=12):
    """Pictures from all over a split with their boxes -> PIL image."""
    chosen = [split.records[i] for i in np.linspace(0, len(split.records) - 1, min(count, len(split.records))).astype(int)]
    return plots.tile([plots.draw_boxes(read_image(r.path, r.upright), r.boxes, r.labels, split.classes) for r in chosen], 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: by looking")
    parser.add_argument("--train-split", metavar="NAME")
    parser.add_argument("--val-split", metavar="NAME")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out pictures that can't be read")
    parser.add_argument("--allow-outside", action="store_true", help="files may lie outside of DIR, through links or absolute paths")
    parser.add_argument("--out", default="samples.png", metavar="FILE", help="default: samples.png")
    arguments = parser.parse_args()
    train, val = load_splits(arguments.data, arguments.train_split, arguments.val_split, arguments.skip_bad_images, arguments.layout, allow_outside=arguments.allow_outside)
    if train.layout == "json" and (arguments.train_split or arguments.val_split):
        raise UserError(f"{arguments.data} is a single COCO file, which has no parts to choose; leave out --train-split and --val-split")
    for line in [*describe(train), *describe(val)]:
        print(line)
    found = suspicions(train, val)
    print("suspicious: " + ("nothing" if not found else ""))
    for line in found:
        print(f"  {line}")
    try:
        draw_sheet(train).save(arguments.out)
    except (OSError, ValueError) as error:
        raise UserError(f"{arguments.out}: can't be written ({error})") from None
    print(f"samples of {train.name} are in {arguments.out}")


if __name__ == "__main__":
    run(main)
