"""Draws data sets, shapes on textured noise, as COCO files, the same ones for the same seed. `train.py` draws the demo by itself.

    python demo_data.py tiny             data/tiny: up to 25 shapes of 6 to 14 pixels in an image
    python demo_data.py crowds           data/crowds: heaps of shapes whose boxes overlap by an IoU of up to 0.8
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from errors import UserError, run

CLASSES = ("disc", "square", "triangle", "star", "cross")
SCALE = 4  # shapes are drawn this much larger, then shrunk, for smooth edges


@dataclass
class Kind:
    """What is drawn: images of side x side pixels, `most` shapes in one, whose longer sides are these shares of the image's."""

    side: int = 128
    fewest: int = 1
    most: int = 8
    smallest: float = 0.08
    largest: float = 0.4
    hidden: float = 0.2  # share of the smaller of any two boxes that the other one covers, at most
    heaped: float = 0.0  # share of shapes that are laid on another
    iou: float = 1.0  # of any two boxes, at most
    visible: float = 0.0  # share of a shape that later ones leave, at least


DEMO = Kind()
KINDS = {
    "demo": DEMO,
    "tiny": Kind(side=224, fewest=5, most=25, smallest=6 / 224, largest=14 / 224),
    "crowds": Kind(side=224, fewest=8, most=30, smallest=0.16, largest=0.25, hidden=1.0, heaped=0.7, iou=0.8, visible=0.3),
}  # fmt: skip


def outline(kind, angle):
    """Corners (x, y) of a shape around (0, 0), turned by angle."""
    if kind == "disc":
        points = [(1, 2 * math.pi * i / 48) for i in range(48)]
    elif kind in ("square", "triangle"):
        corners = 4 if kind == "square" else 3
        points = [(1, 2 * math.pi * i / corners) for i in range(corners)]
    elif kind == "star":
        points = [(1 if i % 2 == 0 else 0.45, math.pi * i / 5) for i in range(10)]
    else:
        arm = 0.3
        quarter = [(1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm), (-1, arm)]
        points = [(math.hypot(x, y), math.atan2(y, x)) for x, y in quarter + [(-x, -y) for x, y in quarter]]
    return [(r * math.cos(a + angle), r * math.sin(a + angle)) for r, a in points]


def textured_noise(rng, side):
    """Sum of noise at several scales, each colour apart: (side, side, 3) float in 0..255."""
    total = np.zeros((side, side, 3))
    for cells in (2, 4, 8, 16, 32, side):
        grain = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        total += (np.asarray(grain, dtype=float) - 127.5) * rng.uniform(0.1, 0.5)
    return (total + rng.uniform(60, 195, 3)).clip(0, 255)


def draw_picture(rng, kind=DEMO):
    """-> uint8 (side, side, 3), boxes [(x, y, w, h)], labels."""
    side = kind.side
    picture, owner = textured_noise(rng, side), np.full((side, side), -1)
    boxes, labels, areas = [], [], []
    for _ in range(rng.integers(kind.fewest, kind.most + 1)):
        for _ in range(20):
            label = int(rng.integers(len(CLASSES)))
            points = np.array(outline(CLASSES[label], rng.uniform(0, 2 * math.pi)))
            points -= points.min(0)
            points *= rng.uniform(kind.smallest, kind.largest) * side / points.max()
            free = side - points.max(0)
            corner = rng.uniform(0, free)
            if kind.heaped and boxes and rng.random() < kind.heaped:
                x, y, w, h = boxes[rng.integers(len(boxes))]
                corner = (np.array([x, y]) + rng.normal(0, 0.15, 2) * (w, h)).clip(0, free)
            points += corner
            x0, y0 = np.floor(points.min(0)).astype(int)
            w, h = np.ceil(points.max(0)).astype(int) - (x0, y0)
            canvas = Image.new("L", (w * SCALE, h * SCALE))
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in (points - (x0, y0)) * SCALE], fill=255)
            mask = np.asarray(canvas.resize((w, h), Image.Resampling.BOX), dtype=float)[..., None] / 255
            ys, xs = np.nonzero(mask[..., 0] > 0.5)
            box = (int(x0 + xs.min()), int(y0 + ys.min()), int(np.ptp(xs) + 1), int(np.ptp(ys) + 1))
            if any(overlap(box, other) > kind.hidden or iou(box, other) > kind.iou for other in boxes):
                continue
            after = owner.copy()
            after[y0 + ys, x0 + xs] = len(boxes)
            left = np.bincount(after[after >= 0], minlength=len(boxes))
            if any(left[i] < kind.visible * area for i, area in enumerate(areas)):
                continue
            colour = rng.uniform(0, 255, 3)
            window = picture[y0 : y0 + h, x0 : x0 + w]
            if np.quantile(np.linalg.norm(window[ys, xs] - colour, axis=1), 0.1) > 70:  # visibly apart
                window += (colour - window) * mask
                owner = after
                boxes.append(box)
                labels.append(label)
                areas.append(len(ys))
                break
    return picture.astype(np.uint8), boxes, labels


def shared(a, b):
    """Intersection of two xywh boxes."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def overlap(a, b):
    """Intersection of two xywh boxes over the smaller one's area."""
    return shared(a, b) / min(a[2] * a[3], b[2] * b[3])


def iou(a, b):
    return shared(a, b) / (a[2] * a[3] + b[2] * b[3] - shared(a, b))


def make_demo(root, train=2000, val=200, seed=0, kind=DEMO):
    """Draws the data set into `root` unless it is there; it appears whole or not at all."""
    root = Path(root)
    if root.exists():
        return
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "annotations").mkdir(parents=True)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    for part, (name, count) in enumerate((("train", train), ("val", val))):
        folder = partial / name
        folder.mkdir()
        images, annotations = [], []
        for i in range(count):
            picture, boxes, labels = draw_picture(np.random.default_rng([seed, part, i]), kind)
            file_name = f"{i:05d}.jpg"
            Image.fromarray(picture).save(folder / file_name, quality=95)
            images.append({"id": i + 1, "file_name": file_name, "width": kind.side, "height": kind.side})
            annotations += [
                {"id": len(annotations) + j + 1, "image_id": i + 1, "category_id": label + 1, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
                for j, (box, label) in enumerate(zip(boxes, labels))
            ]  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        (partial / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    partial.rename(root)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", metavar="DIR", help="default: data/KIND")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training images (default 400)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="images to evaluate on (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = Path(arguments.out or Path("data") / arguments.kind)
    if out.exists():
        raise UserError(f"{out}: is there already; delete it, or choose another --out")
    make_demo(out, arguments.train, arguments.val, arguments.seed, KINDS[arguments.kind])
    print(f"{out}: {arguments.train} + {arguments.val} images; python train.py --data {out}")


if __name__ == "__main__":
    run(main)
