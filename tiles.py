"""Tiles: windows of large images at their own resolution, for objects of a few pixels; cut for training, and what was
detected in them joined.
"""

import math
import random
from dataclasses import replace

import numpy as np
import torch
from torchvision.ops import box_iou

from errors import UserError

OVERLAP = 0.25  # of neighbouring tiles, as a fraction of their side
VISIBLE = 0.4  # of an object's area: with less of it in a tile, it is none of the tile's objects


def tiles_of(width, height, side):
    """The tiles of an image, evenly spaced -> [(left, top, right, bottom)]."""
    corners = [(x, y) for y in tile_starts(height, side) for x in tile_starts(width, side)]
    return [(x, y, min(x + side, width), min(y + side, height)) for x, y in corners]


def tile_starts(length, side):
    """Where tiles of `side` pixels start along `length` pixels: evenly spaced, sharing at least OVERLAP of a side."""
    if length <= side:
        return [0]
    count = 1 + math.ceil((length - side) / (side * (1 - OVERLAP)))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def cut_into_tiles(split, side, for_training):
    """A Split -> one of tiles of `side` pixels. An object that a tile cuts is clipped, or left out, see VISIBLE.

    Images larger than a tile come in whole too, for their large objects. for_training: of the tiles without objects, at
    most as many stay as there are with some. Raises UserError if no tile has any.
    """
    records, empty = [], []
    for index, record in enumerate(split.records):
        tiles = tiles_of(record.width, record.height, side)
        if len(tiles) > 1:
            records.append(replace(record, whole=index))
        for tile in tiles:
            part = cut(record, tile, index)
            is_empty = for_training and part.ignored.all()
            (empty if is_empty else records).append(part)
    remarks = list(split.remarks)
    if for_training and not any(record.tile and (~record.ignored).any() for record in records):
        raise UserError(f"{split.name}: no object fits into a tile of {side} pixels; choose a larger --tile")
    if for_training:
        kept = sorted(random.Random(0).sample(range(len(empty)), min(len(empty), len(records))))
        remarks.append(
            f"{len(split.records)} images become {len(records)}, tiles of {side} pixels with objects and whole images; "
            f"of {len(empty)} tiles without objects, {len(kept)} are used"
        )
        records += [empty[i] for i in kept]
    return replace(split, records=records, remarks=remarks, whole=split, side=side)


def cut(record, tile, index):
    """The part of a Record in a tile; index: the record's."""
    left, top, right, bottom = tile
    corner, size = np.array([left, top] * 2), np.array([right - left, bottom - top] * 2)
    boxes = (record.boxes - corner).clip(0, size)
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1), (record.boxes[:, 2:] - record.boxes[:, :2]).prod(1)
    fractions = sides[0] / sides[1].clip(1e-9)
    keep = fractions >= VISIBLE
    return replace(
        record,
        image_id=f"{record.image_id}/{left},{top}",
        width=right - left,
        height=bottom - top,
        boxes=boxes[keep],
        labels=record.labels[keep],
        areas=(record.areas * fractions)[keep],
        ignored=record.ignored[keep],
        tile=tile,
        whole=index,
    )


def detect_in_tiles(detect, image, side, sure=None):
    """detect: [PIL images] -> [{"scores", "labels", "boxes"}]; image: PIL -> the same for the whole of it, best first.

    side: of a tile, in pixels of the image; sure: see merge.
    """
    tiles = tiles_of(image.width, image.height, side)
    parts = [(None, detect([image])[0])] if len(tiles) > 1 else []
    parts += [(tile, detect([image.crop(tile)])[0]) for tile in tiles]
    return join_tiles(parts, image.width, image.height, side, sure)


def join_tiles(parts, width, height, side, sure=None):
    """[(tile, detections in it)] of an image -> the detections in all of it, best first.

    An object that is no larger than the overlap of tiles is whole in at least one of them. Larger ones are also taken
    from what was detected in the whole image, whose tile is None.
    """
    found, cut, home = [], [], []
    for number, (tile, detections) in enumerate(parts):
        boxes = detections["boxes"]
        if tile is None:
            large = (boxes[:, 2:] - boxes[:, :2]).amax(1) > OVERLAP * side
            detections = {key: value[large] for key, value in detections.items()}
            cut.append(torch.zeros(int(large.sum()), dtype=torch.bool))
        else:
            boxes = boxes + torch.tensor([*tile[:2], *tile[:2]])
            detections = {**detections, "boxes": boxes}
            cut.append(((boxes - inner_borders(tile, width, height)).abs() < 0.01 * side).any(1))
        found.append(detections)
        home.append(torch.full((len(detections["scores"]),), number))
    merged = {key: torch.cat([detections[key] for detections in found]) for key in found[0]}
    keep = merge(merged, torch.cat(cut), torch.cat(home), sure)
    keep = keep[merged["scores"][keep].argsort(descending=True, stable=True)]
    return {key: value[keep] for key, value in merged.items()}


def inner_borders(tile, width, height):
    """A tile (left, top, right, bottom) of an image -> its borders (4,), infinite where they are the image's own."""
    left, top, right, bottom = tile
    return torch.tensor(
        [
            left if left > 0 else -math.inf,
            top if top > 0 else -math.inf,
            right if right < width else math.inf,
            bottom if bottom < height else math.inf,
        ]
    )


def merge(detections, cut, home, sure=None, iou=0.5):
    """Class-wise non-maximum suppression between tiles, never within one -> indices of the detections that stay.

    cut (D,): whether the border of its tile cuts a box; home (D,): the number of its tile. Whole boxes come before cut
    ones, whatever their scores; but those that reach the `sure` score of their class (K,) come before all others, so
    that these change nothing in them.
    """
    boxes, labels, scores = detections["boxes"], detections["labels"], detections["scores"]
    unsure = torch.zeros_like(cut) if sure is None else scores < sure[labels]
    order = torch.argsort(scores - 2.0 * cut - 4.0 * unsure, descending=True, stable=True)
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    for i in order.tolist():
        rivals = kept & (labels == labels[i]) & (home != home[i])
        kept[i] = not is_duplicate(boxes[i], boxes[rivals], cut[i], iou)
    return order[kept[order]]


def is_duplicate(box, rivals, cut, iou):
    """Whether box (4,) is one of rivals (R, 4) again.

    Its IoU with that one is above `iou`; or it is cut, and more than that fraction of it lies inside.
    """
    if (box_iou(box[None], rivals)[0] > iou).any():
        return True
    area = (box[2:] - box[:2]).prod().clamp(min=1e-6)
    sides = torch.minimum(rivals[:, 2:], box[2:]) - torch.maximum(rivals[:, :2], box[:2])
    return bool(cut and (sides.clamp(min=0).prod(1) / area > iou).any())
