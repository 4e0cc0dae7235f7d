"""Draws the demo data set: shapes on textured noise, as COCO files, the same ones for the same seed."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "triangle", "star", "cross")
SIDE = 128
SCALE = 4  # shapes are drawn this much larger, then shrunk, for smooth edges


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


def draw_picture(rng, side=SIDE):
    """-> uint8 (side, side, 3), boxes [(x, y, w, h)], labels: 1 to 8 shapes, a fifth of the smaller of any two hidden at most."""
    picture = textured_noise(rng, side)
    boxes, labels = [], []
    for _ in range(rng.integers(1, 9)):
        for _ in range(20):
            label = int(rng.integers(len(CLASSES)))
            points = np.array(outline(CLASSES[label], rng.uniform(0, 2 * math.pi)))
            points -= points.min(0)
            points *= rng.uniform(0.08, 0.4) * side / points.max()
            points += rng.uniform(0, side - points.max(0))
            x0, y0 = np.floor(points.min(0)).astype(int)
            w, h = np.ceil(points.max(0)).astype(int) - (x0, y0)
            canvas = Image.new("L", (w * SCALE, h * SCALE))
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in (points - (x0, y0)) * SCALE], fill=255)
            mask = np.asarray(canvas.resize((w, h), Image.Resampling.BOX), dtype=float)[..., None] / 255
            ys, xs = np.nonzero(mask[..., 0] > 0.5)
            box = (int(x0 + xs.min()), int(y0 + ys.min()), int(np.ptp(xs) + 1), int(np.ptp(ys) + 1))
            if any(overlap(box, other) > 0.2 for other in boxes):
                continue
            colour = rng.uniform(0, 255, 3)
            window = picture[y0 : y0 + h, x0 : x0 + w]
            if np.quantile(np.linalg.norm(window[ys, xs] - colour, axis=1), 0.1) > 70:  # visibly apart
                window += (colour - window) * mask
                boxes.append(box)
                labels.append(label)
                break
    return picture.astype(np.uint8), boxes, labels


def overlap(a, b):
    """Intersection of two xywh boxes over the smaller one's area."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def make_demo(root, train=2000, val=200, seed=0):
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
            picture, boxes, labels = draw_picture(np.random.default_rng([seed, part, i]))
            file_name = f"{i:05d}.jpg"
            Image.fromarray(picture).save(folder / file_name, quality=95)
            images.append({"id": i + 1, "file_name": file_name, "width": SIDE, "height": SIDE})
            annotations += [
                {"id": len(annotations) + j + 1, "image_id": i + 1, "category_id": label + 1, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
                for j, (box, label) in enumerate(zip(boxes, labels))
            ]  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        (partial / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    partial.rename(root)
