"""Draws synthetic datasets, shapes on textured noise, as COCO files; the same seed gives the same dataset.

    python demo_data.py tiny      data/tiny: up to 25 shapes of 6 to 14 pixels in an image
    python demo_data.py crowds    data/crowds: piles of shapes whose boxes overlap by an IoU of up to 0.8

`train.py` draws its demo by itself.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from errors import UserError, run_script, writing

CLASSES = ("disc", "square", "triangle", "star", "cross")
ATTEMPTS = 20  # to place a shape, before the image does without it
SCALE = 4  # shapes are drawn this much larger, then shrunk, for smooth edges


@dataclass
class Kind:
    """What the images of a dataset are like, with a random number of shapes."""

    width: int = 128
    height: int = 128
    fewest: int = 1  # shapes
    most: int = 8
    smallest: float = 0.08  # longer side of a shape, as a fraction of the image's shorter one
    largest: float = 0.4
    max_overlap: float = 0.2  # of two boxes: intersection over the smaller one's area
    max_iou: float = 1.0  # of two boxes
    stacked: float = 0.0  # fraction of shapes that are placed on another one
    min_visible: float = 0.0  # fraction of a shape that later ones leave uncovered

    @property
    def side(self):
        return min(self.width, self.height)


DEMO = Kind()
KINDS = {
    "demo": DEMO,
    "tiny": Kind(224, 224, fewest=5, most=25, smallest=6 / 224, largest=14 / 224),
    "crowds": Kind(
        224,
        224,
        fewest=8,
        most=30,
        smallest=0.16,
        largest=0.25,
        max_overlap=1.0,
        max_iou=0.8,
        stacked=0.7,
        min_visible=0.3,
    ),
    "large": Kind(3000, 2000, fewest=20, most=80, smallest=12 / 2000, largest=40 / 2000),
}


def outline(shape, angle):
    """The corners [(x, y)] of one of CLASSES around (0, 0), rotated by angle."""
    if shape == "disc":
        points = [(1, 2 * math.pi * i / 48) for i in range(48)]
    elif shape in ("square", "triangle"):
        corners = 4 if shape == "square" else 3
        points = [(1, 2 * math.pi * i / corners) for i in range(corners)]
    elif shape == "star":
        points = [(1 if i % 2 == 0 else 0.45, math.pi * i / 5) for i in range(10)]
    else:
        arm = 0.3
        quarter = [(1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm), (-1, arm)]
        points = [(math.hypot(x, y), math.atan2(y, x)) for x, y in quarter + [(-x, -y) for x, y in quarter]]
    return [(r * math.cos(a + angle), r * math.sin(a + angle)) for r, a in points]


def textured_noise(rng, width, height):
    """The sum of noise at several scales, each colour by itself: (height, width, 3) float in 0..255."""
    total = np.zeros((height, width, 3))
    for cells in (2, 4, 8, 16, 32, None):
        rows, columns = (cells, cells) if cells else (height, width)
        grain = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        grain = grain.resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(grain, dtype=float) - 127.5) * rng.uniform(0.1, 0.5)
    return (total + rng.uniform(60, 195, 3)).clip(0, 255)


def rasterize(points):
    """Corners (P, 2) in pixels -> the mask (h, w, 1) in [0, 1] of their polygon, and its left and top pixel."""
    left, top = np.floor(points.min(0)).astype(int)
    w, h = np.ceil(points.max(0)).astype(int) - (left, top)
    canvas = Image.new("L", (w * SCALE, h * SCALE))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in (points - (left, top)) * SCALE], fill=255)
    mask = np.asarray(canvas.resize((w, h), Image.Resampling.BOX), dtype=float)[..., None] / 255
    return mask, left, top


class Scene:
    """An image that is drawn shape by shape."""

    def __init__(self, rng, kind):
        self.rng, self.kind = rng, kind
        self.pixels = textured_noise(rng, kind.width, kind.height)  # (height, width, 3) float
        self.owner = np.full((kind.height, kind.width), -1)  # the number of the shape on top, -1: none
        self.boxes, self.labels = [], []  # boxes are xywh in pixels
        self.areas = []  # pixels of each shape, covered ones included

    def try_shape(self):
        """Draws one random shape, unless it would break a rule of the kind -> whether it was drawn."""
        label, points = self.random_shape()
        mask, left, top = rasterize(points)
        ys, xs = np.nonzero(mask[..., 0] > 0.5)
        box = (int(left + xs.min()), int(top + ys.min()), int(np.ptp(xs) + 1), int(np.ptp(ys) + 1))
        if any(overlap(box, o) > self.kind.max_overlap or iou(box, o) > self.kind.max_iou for o in self.boxes):
            return False
        owner = self.owner
        if self.kind.min_visible:
            owner = owner.copy()
            owner[top + ys, left + xs] = len(self.boxes)
            visible = np.bincount(owner[owner >= 0], minlength=len(self.boxes))
            if any(visible[i] < self.kind.min_visible * area for i, area in enumerate(self.areas)):
                return False
        colour = self.rng.uniform(0, 255, 3)
        window = self.pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
        contrast = np.quantile(np.linalg.norm(window[ys, xs] - colour, axis=1), 0.1)
        if contrast <= 70:
            return False
        window += (colour - window) * mask
        self.owner = owner
        self.boxes.append(box)
        self.labels.append(label)
        self.areas.append(len(ys))
        return True

    def random_shape(self):
        """-> a label, and the corners (P, 2) in pixels of a shape of random angle, size and place."""
        rng, kind = self.rng, self.kind
        label = int(rng.integers(len(CLASSES)))
        points = np.array(outline(CLASSES[label], rng.uniform(0, 2 * math.pi)))
        points -= points.min(0)
        points *= rng.uniform(kind.smallest, kind.largest) * kind.side / points.max()
        free = np.array([kind.width, kind.height]) - points.max(0)
        corner = rng.uniform(0, free)
        if kind.stacked and self.boxes and rng.random() < kind.stacked:
            x, y, w, h = self.boxes[rng.integers(len(self.boxes))]
            corner = (np.array([x, y]) + rng.normal(0, 0.15, 2) * (w, h)).clip(0, free)
        return label, points + corner


def draw_picture(rng, kind=DEMO):
    """Draws an image -> uint8 (height, width, 3), boxes [(x, y, w, h)], labels."""
    scene = Scene(rng, kind)
    for _ in range(rng.integers(kind.fewest, kind.most + 1)):
        for _ in range(ATTEMPTS):
            if scene.try_shape():
                break
    return scene.pixels.astype(np.uint8), scene.boxes, scene.labels


def intersection(a, b):
    """The area that two xywh boxes share."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def overlap(a, b):
    """Intersection of two xywh boxes over the smaller one's area."""
    return intersection(a, b) / min(a[2] * a[3], b[2] * b[3])


def iou(a, b):
    """Intersection over union of two xywh boxes."""
    return intersection(a, b) / (a[2] * a[3] + b[2] * b[3] - intersection(a, b))


def make_demo(root, train=2000, val=200, seed=0, kind=DEMO):
    """Draws a dataset of train + val images into `root`, unless that exists; it appears whole or not at all."""
    root = Path(root)
    if root.exists():
        return
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "annotations").mkdir(parents=True)
    for number, (name, count) in enumerate((("train", train), ("val", val))):
        content = draw_split(partial / name, count, (seed, number), kind)
        (partial / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    partial.rename(root)


def draw_split(folder, count, seed, kind):
    """Draws images into a new folder, each from a generator of its own -> the content of their COCO file."""
    folder.mkdir()
    images, annotations = [], []
    for i in range(count):
        pixels, boxes, labels = draw_picture(np.random.default_rng([*seed, i]), kind)
        file_name = f"{i:05d}.jpg"
        Image.fromarray(pixels).save(folder / file_name, quality=95)
        images.append({"id": i + 1, "file_name": file_name, "width": kind.width, "height": kind.height})
        for box, label in zip(boxes, labels):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": i + 1,
                "category_id": label + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            annotations.append(annotation)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", metavar="DIR", help="default: data/KIND")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training images (default 400)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation images (default 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random numbers (default 0)")
    return parser


def main():
    arguments = build_parser().parse_args()
    out = Path(arguments.out or Path("data") / arguments.kind)
    if out.exists():
        raise UserError(f"{out}: already exists; delete it, or choose another --out")
    if min(arguments.train, arguments.val) < 1:
        raise UserError("--train and --val have to be at least 1")
    with writing(out, "; choose another --out"):
        make_demo(out, arguments.train, arguments.val, arguments.seed, KINDS[arguments.kind])
    print(f"{out}: {arguments.train} + {arguments.val} images; python train.py --data {out}")


if __name__ == "__main__":
    run_script(main)
