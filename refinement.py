"""How decoders refine boxes: shifts in a box's own size, or distributions over how far each edge lies from an initial box's
(D-FINE, arXiv 2410.13842)."""

import torch

from detr_loss import to_xyxy
from layers import small_tensor

REG_MAX, REG_SCALE, UP = 32, 4.0, 0.5  # bins of an edge's distribution, its scale, its widest reach


def shift_boxes(boxes, deltas):
    """boxes, deltas (..., 4) cxcywh -> boxes moved by deltas measured in their own size (as in R-CNN, arXiv 1311.2524).

    The same deltas mean the same pixels' pattern wherever the object is and however large the picture; a shift of
    logits, as in Deformable DETR, does not. Clamped to [0, 1], sizes to 1e-4 at least.
    """
    centres = boxes[..., :2] + deltas[..., :2] * boxes[..., 2:]
    sizes = boxes[..., 2:] * deltas[..., 2:].clamp(-4, 4).exp()
    return torch.cat([centres.clamp(0.0, 1.0), sizes.clamp(1e-4, 1.0)], dim=-1)


def bin_distances(device=None):
    """W(n) (33,): the edge distances that a distribution's bins stand for, dense around 0, reaching UP * REG_SCALE twice over."""
    step = (UP * REG_SCALE + 1) ** (2 / (REG_MAX - 2))
    inner = [step**k - 1 for k in range(1, REG_MAX // 2)]
    positive = inner + [2 * UP * REG_SCALE]
    return small_tensor([-v for v in reversed(positive)] + [0.0] + positive, device)


def corners_to_boxes(initial, corners):
    """initial (..., 4) cxcywh, corners (..., 4 * 33) logits of left, top, right, bottom -> refined boxes (..., 4) cxcywh."""
    distances = corners.unflatten(-1, (4, REG_MAX + 1)).softmax(-1) @ bin_distances(corners.device)
    x, y, w, h = initial.unbind(-1)
    left, top, right, bottom = ((0.5 * REG_SCALE + distances) / REG_SCALE).unbind(-1)
    x1, y1, x2, y2 = x - left * w, y - top * h, x + right * w, y + bottom * h
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def edge_distances(initial, wanted):
    """How far the edges of wanted (M, 4) lie outside those of initial (M, 4), both cxcywh, in units of W(n) -> (M, 4): l, t, r, b."""
    x1, y1, x2, y2 = to_xyxy(wanted).unbind(-1)
    x, y, w, h = initial.unbind(-1)
    w, h = w / REG_SCALE + 1e-16, h / REG_SCALE + 1e-16
    return torch.stack([(x - x1) / w, (y - y1) / h, (x2 - x) / w, (y2 - y) / h], dim=-1) - 0.5 * REG_SCALE
