"""Labelled images from disk to batches of tensors: `DetectionDataset` loads and augments the records of a `Split`.

    python datasets.py DIR      prints statistics and suspicious findings of a dataset, and draws samples of it

A target has `boxes` (T, 4), `labels` (T,) in 0..K-1 in the order of the split's `classes`, `area` (T,), `iscrowd` (T,),
`image_id`, the index of the record, and `orig_size` and `size`, both (height, width).
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import random
import sys
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import plots
from errors import UserError, run_script, writing
from folder import first_paths
from layouts import LAYOUTS, load_splits
from transforms import allow_large_images, longest_side, mix_up, mosaic, read_image, reduction, resized_sides


class Draw(NamedTuple):
    """An image and its augmentation, which depends on nothing else, in whatever process and order it is computed."""

    index: int
    seed: int = 0
    side: float | None = None  # in [0, 1), picks the transform, see transforms.PickOne; None: the whole image
    is_mosaic: bool = False
    mix: float | None = None  # the image's own weight where its batch is mixed up; None: no mix-up


class DetectionDataset(torch.utils.data.Dataset):
    """The records of a Split as (image, target) after `transforms`; indices are Draws, tuples like them, or ints.

    Decoded images are kept in memory if all of them fit into cache_bytes. detail: see read_image.
    """

    def __init__(self, split, transforms, cache_bytes=0, detail=None):
        self.split, self.transforms, self.detail = split, transforms, detail
        needed = sum(decoded_bytes(record, detail) for record in split.records)
        self.cache, self.room = {}, cache_bytes if needed <= cache_bytes else 0
        self.latest = None, None  # path and image of the latest tile: the next one is often of the same image

    def __len__(self):
        return len(self.split.records)

    def __getitem__(self, index):
        draw = Draw(*index) if isinstance(index, tuple) else Draw(index, index)
        sample = self.load(draw.index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also queue a call for every device that is not in use yet
            torch.default_generator.manual_seed(draw.seed)
            if draw.is_mosaic:
                others = [self.load(i) for i in torch.randint(len(self), (3,)).tolist()]
                sample = mosaic([sample, *others], self.transforms.tile)
            return self.transforms(*sample, draw.side, draw.is_mosaic)

    def __getitems__(self, indices):
        """A batch at once, as DataLoader asks for it: only here can its images be mixed up."""
        samples = [self[index] for index in indices]
        mix = Draw(*indices[0]).mix if isinstance(indices[0], tuple) else None
        return samples if mix is None else mix_up(samples, mix)

    def load(self, index):
        """-> the whole image, a uint8 tv_tensors.Image (3, H, W), and its target, boxes xyxy in pixels."""
        record = self.split.records[index]
        image = self.pixels(index)
        keep = ~record.ignored
        height, width = image.shape[-2:]
        scale = width / record.width  # below 1 if the image was decoded smaller, see reduction
        boxes = torch.from_numpy(record.boxes[keep] * scale).float()
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(record.labels[keep]),
            "area": torch.from_numpy(record.areas[keep] * scale**2).float(),
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.long),
            "image_id": index,
            "orig_size": torch.tensor([record.height, record.width]),
        }
        return tv_tensors.Image(image), target

    def pixels(self, index):
        """-> uint8 (3, H, W) of an image, from the cache or from its file. Raises UserError."""
        if index in self.cache:
            return self.cache[index]
        record = self.split.records[index]
        try:
            if record.tile and self.latest[0] == record.path:
                image = self.latest[1]
            else:
                detail = None if record.tile else self.detail
                image = read_image(record.path, record.upright, detail, self.split.value_range)
            if record.tile:
                self.latest = record.path, image
                image = image.crop(record.tile)
            image = TF.pil_to_tensor(image)
        except Exception as error:  # it could be read when the run began
            raise UserError(f"{record.path}: can't be read any more ({error})") from None
        if image.nbytes <= self.room:
            self.room -= image.nbytes
            self.cache[index] = image
        return image


def decoded_bytes(record, detail):
    """The memory that a decoded image takes, if its file has the format that its suffix says."""
    is_jpeg = record.path.suffix.lower() in (".jpg", ".jpeg")
    n = reduction(record.width, record.height, detail) if is_jpeg and not record.tile else 1
    return 3 * record.width * record.height // n**2


# Batches


class EndlessBatches:
    """Infinite batch sampler: reshuffles every epoch and crosses epoch boundaries, so that every batch is full.

    Yields lists of Draws, for DataLoader's batch_sampler.

    length: number of images; each comes once an epoch.
    phase: (images shown so far) -> "plain": whole images; "varied": one transform for a batch, picked by its `side`; or
        "mixed": as "varied", with mosaics and mix-up.
    first: number of the batch to begin with, to resume a run.
    process: (rank, number of processes); each process gets its slice of every batch.
    aspect_ratios: (length,) width / height of the images; similar ones share a batch, see group_by_aspect_ratio. None
        leaves that to chance.
    mixing: in the "mixed" phase, the probability of an image to be a mosaic, and of a batch to be mixed up.
    pieces: a process gets its slice of a batch in this many batches, for gradient accumulation.
    """

    def __init__(
        self, length, batch_size, seed, phase, first=0, process=(0, 1), aspect_ratios=None, mixing=0.5, pieces=1
    ):
        self.length, self.batch_size, self.seed, self.phase = length, batch_size, seed, phase
        self.first, self.process, self.mixing, self.pieces = first, process, mixing, pieces
        self.aspect_ratios = torch.ones(length) if aspect_ratios is None else aspect_ratios
        self.last_order = (None, [])  # the latest epoch and its order

    def __iter__(self):
        rank, world = self.process
        for number in itertools.count(self.first):
            draws = self.batch(number)[rank::world]
            size = len(draws) // self.pieces
            for i in range(0, len(draws), size):
                yield draws[i : i + size]

    def batch(self, number):
        """-> the Draws of all processes for a batch.

        One generator gives all its random numbers in turn: generators with the same seed would give the same numbers.
        """
        start = number * self.batch_size
        rng, phase = random.Random(f"{self.seed} batch {number}"), self.phase(start)
        side, is_mixed, mix = rng.random(), rng.random() < self.mixing, 0.45 + 0.1 * rng.random()  # drawn in any phase
        if phase == "plain":
            side = None
        if phase != "mixed" or not is_mixed:
            mix = None
        indices = [self.index_at(position) for position in range(start, start + self.batch_size)]
        mosaics = [rng.random() < self.mixing and phase == "mixed" for _ in indices]
        return [Draw(index, rng.getrandbits(31), side, is_mosaic, mix) for index, is_mosaic in zip(indices, mosaics)]

    def index_at(self, position):
        """The image at a position of the endless sequence."""
        epoch, place = divmod(position, self.length)
        return self.order(epoch)[place]

    def order(self, epoch):
        """The images' indices in the order of an epoch."""
        if self.last_order[0] != epoch:
            seed = random.Random(f"{self.seed} round {epoch}").getrandbits(63)
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed))
            begun = -epoch * self.length % self.batch_size  # so many complete the last batch of the epoch before
            grouped = group_by_aspect_ratio(order[begun:], self.aspect_ratios, self.batch_size)
            self.last_order = epoch, torch.cat([order[:begun], grouped]).tolist()
        return self.last_order[1]


def aspect_ratios_of(split):
    """Width / height of each image (N,)."""
    return torch.tensor([record.width / record.height for record in split.records])


def group_by_aspect_ratio(order, aspect_ratios, batch_size, batches=16):
    """Puts images of similar aspect ratios into the same batch, so that little of it is padding: order (N,) -> (N,).

    Within each `batches` full batches of `order` the images are redistributed by aspect ratio. The new batches come in
    the order of their earliest images, which is as random as `order`. An incomplete batch at the end stays as it is.
    """
    positions, full = torch.arange(len(order)), len(order) // batch_size * batch_size
    groups = []
    for chunk in positions[:full].split(batches * batch_size):
        by_ratio = chunk[aspect_ratios[order[chunk]].argsort(stable=True)].view(-1, batch_size)
        groups.append(by_ratio[by_ratio.amin(1).argsort()].flatten())
    return order[torch.cat([*groups, positions[full:]])]


def equal_batches(sizes, batch_size, divisor):
    """sizes [(height, width)] of images as the network gets them -> batches of indices [[index]].

    The images of a batch are padded to the same multiples of divisor, so that no result depends on the other images.
    """
    groups = defaultdict(list)
    for index, (height, width) in enumerate(sizes):
        groups[math.ceil(height / divisor), math.ceil(width / divisor)].append(index)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def evaluation_batches(split, batch_size, divisor, size, square=False, exact=True):
    """equal_batches of a Split for eval_transforms(size, square, exact)."""
    if square:
        sizes = [(size, size)] * len(split.records)
    else:
        longest = longest_side(size)
        sizes = [resized_sides(r.height, r.width, size, longest, exact) for r in split.records]
    return equal_batches(sizes, batch_size, divisor)


def collate(batch, divisor=32):
    """[(image, target)] -> images (B, 3, H, W), mask (B, H, W) True on padding, targets.

    Images are padded at the right and at the bottom to multiples of divisor.
    """
    images, targets = zip(*batch)
    height = round_up(max(image.shape[1] for image in images), divisor)
    width = round_up(max(image.shape[2] for image in images), divisor)
    padded = images[0].new_zeros(len(images), height, width, 3).permute(0, 3, 1, 2)  # channels last
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, row, row_mask in zip(images, padded, mask):
        row[:, : image.shape[1], : image.shape[2]] = image
        row_mask[: image.shape[1], : image.shape[2]] = False
    return padded, mask, list(targets)


def round_up(n, divisor):
    return -(-n // divisor) * divisor


# Statistics and suspicious findings


def describe(split):
    """A Split -> lines of statistics: sizes of images and boxes, and a table of the classes."""
    records = split.records
    boxes = np.concatenate([r.boxes for r in records])
    areas = np.concatenate([r.areas for r in records])
    small = fraction_within(areas, 0, 32**2)
    medium = fraction_within(areas, 32**2, 96**2)
    large = fraction_within(areas, 96**2, np.inf)
    return [
        f"{split.name}: {len(records):,} images, {len(boxes):,} boxes, {len(split.classes)} classes",
        *(f"  {remark}" for remark in split.remarks),
        f"  sizes: {common_sizes(records)}",
        f"  boxes per image, min / median / max: {min_median_max([len(r.boxes) for r in records])}",
        f"  small, medium, large (area under 32x32, under 96x96, from 96x96 pixels): {small}, {medium}, {large}",
        *class_table(split, boxes),
    ]


def common_sizes(records):
    """The four most frequent sizes of images, for describe."""
    sizes = Counter((r.width, r.height) for r in records)
    listed = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(4))
    return listed + (f", {len(sizes) - 4} others" if len(sizes) > 4 else "")


def min_median_max(values):
    if not len(values):
        return "-"
    return " / ".join(f"{value:.0f}" for value in np.quantile(values, [0, 0.5, 1]))


def fraction_within(values, low, high):
    """The percentage of values in [low, high)."""
    fraction = ((values >= low) & (values < high)).mean() if len(values) else 0
    return f"{fraction:.0%}"


def class_table(split, boxes):
    """A row for each class: its boxes, the images that have any, the side of a square of their area."""
    labels = np.concatenate([r.labels for r in split.records])
    images = Counter(label for record in split.records for label in np.unique(record.labels).tolist())
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    lines = [f"  {'class':24s} {'boxes':>8s} {'images':>8s}  side in pixels, min / median / max"]
    for label, name in enumerate(split.classes):
        of_class = labels == label
        lines.append(f"  {name[:24]:24s} {of_class.sum():8,d} {images[label]:8,d}  {min_median_max(sides[of_class])}")
    return lines


ALIKE = 2  # bits of 64 in which the hashes of similar images differ at most
SMALL = 16  # pixels of an object's side, the root of its area, with which it is hard to tell what it is
MANY_REPAIRS = 0.03


def find_problems(train, val):
    """The suspicious findings in a dataset's two Splits, a line for each kind."""
    kinds = repair_problems, image_problems, class_problems, box_problems
    return [line for problems in kinds for line in problems(train, val)]


def repair_problems(train, val):
    """What had to be repaired or left out in more than a few images or boxes: annotations of other images, perhaps."""
    lines = []
    for split in (train, val):
        boxes = sum(len(record.boxes) for record in split.records)
        for what, count in split.repairs.items():
            total = len(split.records) if what.startswith("images differ") else boxes
            is_theirs = what.startswith(("images differ", "boxes", "empty"))
            if is_theirs and count > MANY_REPAIRS * total:
                lines.append(f"{split.name}: {count} {what}: do the annotations belong to these images?")
    return lines


def image_problems(train, val):
    """Identical files in both splits, or several times in one."""
    copies = defaultdict(list)  # digest of the content: [(split name, path)]
    for split in (train, val):
        for record in split.records:
            digest = hashlib.sha256(record.path.read_bytes()).digest()
            copies[digest].append((split.name, record.path))
    leaked, repeated = [], []
    for files in copies.values():
        if len({name for name, _ in files}) == 2:
            leaked.append(next(path for name, path in files if name == val.name))
        for split in (train, val):
            repeated += [path for name, path in files if name == split.name][1:]
    lines = []
    alike = [] if not train.records or not val.records else near_duplicates(train, val, set(leaked))
    if alike:
        lines.append(f"{len(alike)} images of {val.name} look like one of {train.name} ({first_paths(alike)})")
    if leaked:
        lines.append(
            f"{len(leaked)} images of {val.name} are in {train.name} too, byte by byte: "
            f"the measured AP will be too high ({first_paths(leaked)})"
        )
    if repeated:
        lines.append(f"{len(repeated)} images are duplicates within their split ({first_paths(repeated)})")
    return lines


def near_duplicates(train, val, known):
    """The paths of validation images that look like a training image; `known` are left out."""
    ours, theirs = (torch.stack([difference_hash(r, split) for r in split.records]) for split in (val, train))
    alike = []
    for record, row in zip(val.records, ours):
        agreeing = theirs @ row  # 64 less twice the number of bits that differ
        if row.any() and record.path not in known and float(agreeing.max()) >= 64 - 2 * ALIKE:
            alike.append(record.path)
    return alike


def difference_hash(record, split):
    """(64,) of 1 and -1: whether each of 8 x 8 places in an image is brighter than the one to its left; 0: flat."""
    image = read_image(record.path, record.upright, detail=72, value_range=split.value_range).convert("L")
    grey = torch.from_numpy(np.asarray(image.resize((9, 8)), dtype=np.float32))
    if float(grey.std()) < 2:
        return torch.zeros(64)
    return torch.where(grey[:, 1:] > grey[:, :-1], 1.0, -1.0).flatten()


def class_problems(train, val):
    """Classes that are never trained, hardly trained, or never used."""
    train_counts, val_counts = (count_labels(split) for split in (train, val))
    unseen, rare, unused = [], [], []
    for label, name in enumerate(train.classes):
        count = train_counts[label]
        if 0 < count < 10:
            rare.append(f"{name} ({count})")
        elif count == 0 and val_counts[label]:
            unseen.append(name)
        elif count == 0:
            unused.append(name)
    lines = []
    if unseen:
        lines.append(f"classes of {val.name} without any box in {train.name}: {', '.join(unseen)}")
    if rare:
        lines.append(f"classes with fewer than ten boxes in {train.name}: {', '.join(rare)}")
    if unused:
        lines.append(f"classes without any box: {', '.join(unused)}")
    return lines


def choose_image_size(split, smallest):
    """The shortest side at which a small object (20th percentile) is still 20 pixels wide, within reason."""
    side = np.median([min(r.width, r.height) for r in split.records])
    relative = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) / min(r.width, r.height) for r in split.records for b in r.boxes]
    needed = 20 / max(float(np.quantile(relative, 0.2)), 1e-3)
    return int(min(max(needed, smallest), max(2 * smallest, 640), max(side, smallest)) // 32 * 32)


def advise_tiles(split, size):
    """A line for the user if half of the objects are under SMALL pixels in images resized to `size`, and larger in the
    files; else None."""
    sides, shown = [], []
    for record in split.records:
        factor = resized_sides(record.height, record.width, size, longest_side(size))[0] / record.height
        own = np.sqrt((record.boxes[:, 2:] - record.boxes[:, :2]).prod(1))
        sides += own.tolist()
        shown += (own * factor).tolist()
    if not sides or np.median(shown) >= SMALL or np.median(sides) < 1.5 * np.median(shown):
        return None
    shortest, longest = (int(np.median([f(r.width, r.height) for r in split.records])) for f in (min, max))
    whole = round_up(shortest, 32)
    instead = f"--image-size {whole}" if shortest <= 640 and longest <= longest_side(whole) else "--tile 640"
    return (
        f"half of the objects are under {np.median(shown):.0f} pixels at --image-size {size}, but "
        f"{np.median(sides):.0f} in the files: train.py {instead} shows them at their own resolution"
    )


def count_labels(split):
    return Counter(int(label) for record in split.records for label in record.labels)


def box_problems(train, val):
    """Boxes that are hardly boxes, duplicated, or as large as their image."""
    thin, duplicated, full = [], [], []  # the path of the image, once for each box
    for record in (*train.records, *val.records):
        sides = record.boxes[:, 2:] - record.boxes[:, :2]
        distinct = {(*box, label) for box, label in zip(record.boxes.tolist(), record.labels.tolist())}
        thin += [record.path] * int((sides.min(1) <= 1).sum())
        duplicated += [record.path] * (len(sides) - len(distinct))
        full += [record.path] * int((sides.prod(1) >= 0.98 * record.width * record.height).sum())
    findings = {
        "boxes are at most one pixel wide or high": thin,
        "boxes are duplicates with the same class": duplicated,
        "boxes are as large as their image": full,
    }
    return [f"{len(paths)} {what} ({first_paths(dict.fromkeys(paths))})" for what, paths in findings.items() if paths]


def draw_sheet(split, count=12):
    """Images from all over a Split with their boxes -> PIL image."""
    places = np.linspace(0, len(split.records) - 1, min(count, len(split.records))).astype(int)
    samples = []
    for record in (split.records[i] for i in places):
        image = read_image(record.path, record.upright, value_range=split.value_range)
        samples.append(plots.draw_boxes(image, record.boxes, record.labels, split.classes))
    return plots.tile(samples, 4)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR", help="folder of the dataset")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: detected, and printed")
    parser.add_argument("--train-split", metavar="NAME", help="the split to train on, e.g. trainval")
    parser.add_argument("--val-split", metavar="NAME", help="the split to evaluate on, e.g. test")
    parser.add_argument(
        "--val-fraction", type=float, metavar="X", help="fraction to evaluate on, if there is one part only (0.2)"
    )
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out images that can't be read")
    parser.add_argument(
        "--allow-outside", action="store_true", help="files may lie outside of DIR, through links or absolute paths"
    )
    parser.add_argument("--large-images", action="store_true", help="open images that look like decompression bombs")
    parser.add_argument("--json", action="store_true", help="print it as JSON: for each split its lines, and problems")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything is suspicious")
    parser.add_argument(
        "--out", default="samples.png", metavar="FILE", help="image of samples to write (default: samples.png)"
    )
    return parser


def main():
    arguments = build_parser().parse_args()
    allow_large_images(arguments.large_images)
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        train, val = load_splits(
            arguments.data,
            arguments.train_split,
            arguments.val_split,
            arguments.skip_bad_images,
            arguments.layout,
            arguments.val_fraction,
            allow_outside=arguments.allow_outside,
        )
    advice = advise_tiles(train, choose_image_size(train, 640))
    if arguments.val_fraction is not None and not train.is_fraction:
        raise UserError(f"--val-fraction {arguments.val_fraction}: is for a dataset with one part only; leave it out")
    problems = find_problems(train, val) + ([advice] if advice else [])
    if arguments.json:
        print(json.dumps({split.name: describe(split) for split in (train, val)} | {"problems": problems}))
    else:
        print("\n".join([*describe(train), *describe(val)]))
        print("\n  ".join(["suspicious:", *problems] if problems else ["suspicious: nothing"]))
    with writing(arguments.out, "; choose another --out", also=[ValueError]):
        draw_sheet(train).save(arguments.out)
    print(f"samples of {train.name} are in {arguments.out}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.strict and problems:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
