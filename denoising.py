"""Contrastive denoising (DINO, arXiv 2203.03605): noisy copies of the objects as extra queries, which need no matching.

A positive copy has to find its object again, a negative one, moved further, has to learn that it is none.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from detr_loss import to_device

LABEL_NOISE = 0.25  # share of the copies whose label is drawn anew


@dataclass
class Denoising:
    """D queries a picture: labels (B, D) in 0..K, K for none; boxes (B, D, 4) cxcywh; blocked (D, D + Q), True where a
    copy (row) must not see a query; matches: image, query, object (M,), objects counted over the batch, of the positive copies."""

    labels: torch.Tensor
    boxes: torch.Tensor
    blocked: torch.Tensor
    matches: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_denoising(targets, num_classes, num_queries, copies=100):
    """targets: B dicts with `labels` (T,) and `boxes` (T, 4) cxcywh -> Denoising, or None where no picture has an object.

    As many groups of a positive and a negative copy of every object as fit `copies`, at least one. Groups see neither
    each other nor are seen by the num_queries matching queries, which come after them.
    """
    sizes = [len(t["labels"]) for t in targets]
    most = max(sizes)
    if most == 0:
        return None
    groups = max(1, copies // most)
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True, padding_value=num_classes)
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).float()
    place = torch.arange(2 * groups * most)
    negative = place // most % 2 == 1

    real = torch.arange(most) < torch.tensor(sizes)[:, None]  # known on the host, which so need not wait for the device
    numbers = real.flatten().cumsum(0).view_as(real) - 1
    image, query = (real.repeat(1, 2 * groups) & ~negative).nonzero(as_tuple=True)
    matches = to_device((image, query, numbers[image, query % most]), labels.device)
    place, negative = (x.to(labels.device, non_blocking=True) for x in (place, negative))

    labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)
    flipped = (torch.rand(labels.shape, device=labels.device) < LABEL_NOISE) & (labels < num_classes)
    labels = torch.where(flipped, torch.randint_like(labels, num_classes), labels)
    sign = torch.randint_like(boxes, 2) * 2 - 1
    shift = sign * (torch.rand_like(boxes) + negative[:, None]) * boxes[..., [2, 3, 2, 3]] / 2
    moved = (box_convert(boxes, "cxcywh", "xyxy") + shift).clamp(0, 1)
    x1, y1, x2, y2 = moved.unbind(-1)  # edges may have crossed
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1).abs(), (y2 - y1).abs()], dim=-1)

    group = torch.cat([place // (2 * most), place.new_full((num_queries,), -1)])
    blocked = (group[None] != -1) & (group[: len(place), None] != group[None])
    return Denoising(labels, boxes, blocked, matches)


def join(noisy, embedding, queries, boxes):
    """Denoising or None, an embedding of K + 1 labels, queries (B, Q, C) and boxes (B, Q, 4) -> the same with the copies before them, and
    what to add to the scores of attention among all of them, (D + Q, D + Q) or None."""
    if noisy is None:
        return queries, boxes, None
    copies, everything = noisy.blocked.shape
    blocked = torch.cat([noisy.blocked, noisy.blocked.new_zeros(everything - copies, everything)])
    blocked[copies:, :copies] = True
    bias = torch.zeros(blocked.shape, device=queries.device).masked_fill(blocked, -torch.inf)
    return torch.cat([embedding(noisy.labels).to(queries.dtype), queries], dim=1), torch.cat([noisy.boxes, boxes], dim=1), bias


def split_queries(layers, count):
    """layers: [{name: (B, Q, ...)}] -> the same of the first `count` queries, and of the others."""
    parts = [{key: value.split([count, value.shape[1] - count], dim=1) for key, value in layer.items()} for layer in layers]
    return tuple([{key: value[i] for key, value in layer.items()} for layer in parts] for i in (0, 1))
