"""Large pictures in overlapping tiles: small objects keep their size, and what two tiles both found is merged."""

import math

import torch
from torchvision.ops import box_iou


def tile_starts(length, side, overlap):
    """Where tiles of `side` pixels begin along `length` pixels, evenly, neighbours sharing `overlap` of a side at least."""
    if length <= side:
        return [0]
    count = 1 + math.ceil((length - side) / (side * (1 - overlap)))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def detect_in_tiles(detect, image, side, overlap=0.25):
    """detect: [PIL images] -> [{"scores", "labels", "boxes"}]; image: PIL -> the same for the whole of it, best first.

    side: of a tile, in pixels of the picture. An object that is no larger than the overlap is whole in one tile at least.
    """
    corners = [(x, y) for y in tile_starts(image.height, side, overlap) for x in tile_starts(image.width, side, overlap)]
    found, cut, home = [], [], []
    for number, (x, y) in enumerate(corners):
        right, bottom = min(x + side, image.width), min(y + side, image.height)
        detections = detect([image.crop((x, y, right, bottom))])[0]
        boxes = detections["boxes"] + torch.tensor([x, y, x, y])
        borders = torch.tensor([x or -math.inf, y or -math.inf, right if right < image.width else math.inf, bottom if bottom < image.height else math.inf])
        cut.append(((boxes - borders).abs() < 0.01 * side).any(1))  # at a border that is not the picture's
        home.append(torch.full((len(boxes),), number))
        found.append({**detections, "boxes": boxes})
    merged = {key: torch.cat([detections[key] for detections in found]) for key in found[0]}
    keep = merge(merged, torch.cat(cut), torch.cat(home))
    keep = keep[merged["scores"][keep].argsort(descending=True, stable=True)]
    return {key: value[keep] for key, value in merged.items()}


def merge(detections, cut, home, iou=0.5):
    """Class-wise non-maximum suppression between tiles only -> indices of what stays. cut (D,): boxes that a tile's border cuts; home (D,):
    their tiles. Whole boxes come before cut ones; a cut one also goes where most of it lies in one of another tile."""
    scores, labels, boxes = (detections[key] for key in ("scores", "labels", "boxes"))
    order = torch.argsort(scores - 2.0 * cut, descending=True, stable=True)
    kept = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)
    for i in order.tolist():
        rivals = torch.tensor([k for k in kept if labels[k] == labels[i] and home[k] != home[i]], dtype=torch.long)
        if len(rivals):
            overlap = (torch.minimum(boxes[rivals, 2:], boxes[i, 2:]) - torch.maximum(boxes[rivals, :2], boxes[i, :2])).clamp(min=0).prod(1)
            if (box_iou(boxes[i : i + 1], boxes[rivals])[0] > iou).any() or (cut[i] and (overlap / areas[i] > iou).any()):
                continue
        kept.append(i)
    return torch.tensor(kept, dtype=torch.long)
