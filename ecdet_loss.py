"""ECDet's boxes as distributions of their edges (D-FINE, arXiv 2410.13842), and its losses.

All outputs share one set of (query, object) pairs for their boxes and edges: the union of the pairs that each output
matches on its own. L outputs, B images, Q queries, K classes, M matches, U pairs of the union.
"""

import torch
import torch.nn.functional as F
from torch import nn

from detr_loss import number_in_batch, pairwise_giou, quality_loss, repeat_matches, stack_layers, to_xyxy
from distributed import average_count
from layers import to_device

REG_MAX, REG_SCALE, UP = 32, 4.0, 0.5  # an edge's distribution: the number of its last bin, its scale, its reach
TEMPERATURE = 5.0  # softens the distributions that the last layer distills into earlier ones


def bin_distances(device=None):
    """W(n) (33,), the edge distance of each bin: dense around 0, from -2 * UP * REG_SCALE to 2 * UP * REG_SCALE."""
    step = (UP * REG_SCALE + 1) ** (2 / (REG_MAX - 2))
    n = torch.arange(-REG_MAX // 2, REG_MAX // 2 + 1, device=device)
    distance = (step ** n.abs() - 1).masked_fill(n.abs() == REG_MAX // 2, 2 * UP * REG_SCALE)
    return n.sign() * distance


def corners_to_boxes(initial, corners):
    """initial (..., 4) cxcywh, corners (..., 4 * 33) logits of left, top, right, bottom -> refined (..., 4) cxcywh."""
    distances = corners.unflatten(-1, (4, REG_MAX + 1)).softmax(-1) @ bin_distances(corners.device)
    x, y, w, h = initial.unbind(-1)
    left, top, right, bottom = ((0.5 * REG_SCALE + distances) / REG_SCALE).unbind(-1)
    x1, y1, x2, y2 = x - left * w, y - top * h, x + right * w, y + bottom * h
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def edge_distances(initial, target_boxes):
    """initial, target_boxes (M, 4) cxcywh -> (M, 4): how far the target's edges are outside of initial, as W(n)."""
    x1, y1, x2, y2 = to_xyxy(target_boxes).unbind(-1)
    x, y, w, h = initial.unbind(-1)
    w, h = w / REG_SCALE + 1e-16, h / REG_SCALE + 1e-16
    return torch.stack([(x - x1) / w, (y - y1) / h, (x2 - x) / w, (y2 - y) / h], dim=-1) - 0.5 * REG_SCALE


class RefinementCriterion(nn.Module):
    """The loss of ECDet's outputs. matcher: HungarianMatcher.

    Weights: classes (MAL) 1, boxes (L1) 5, GIoU 2, edges (FGL) 0.15, distillation (DDF) 1.5.
    """

    def __init__(self, matcher):
        super().__init__()
        self.matcher = matcher
        self.weights = {"class": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}

    def forward(self, outputs, targets, objects=None):
        """outputs: ECDet's in training; targets: B dicts with `labels` (T,) and `boxes` (T, 4)
        -> {name: weighted scalar}, whose sum is the loss.

        objects: see SetCriterion; it applies to the class terms, while boxes are averaged over their own pairs. Names
        end in _aux_0, _aux_1, ... for earlier layers, _pre for the first boxes, _enc for the encoder's selection; those
        of the noisy copies also in _dn.
        """
        labels, target_boxes = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes"))
        ground_truth, device = (labels, target_boxes.float()), labels.device
        stacked = stack_layers(outputs)
        _, logits, boxes = stacked
        matches = number_in_batch([len(t["labels"]) for t in targets], *self.matcher(logits, boxes, targets))
        union = union_of_matches(*matches[1:], logits.shape[2])
        matches, union = to_device(matches, device), to_device(union, device)
        total = average_count(len(labels), device) if objects is None else objects
        losses = self.losses(outputs, stacked, matches, union, ground_truth, total)
        if "denoising" in outputs:
            losses |= self.denoising_losses(outputs["denoising"], ground_truth)
        else:
            # Without an object there are no copies. Other processes may have some: all take part in their all-reduces.
            average_count(0, device)
            average_count(0, device)
        return losses

    def denoising_losses(self, outputs, ground_truth):
        """The terms of the noisy copies, whose objects are known: nothing is matched. Names end in _dn."""
        stacked, union = stack_layers(outputs), outputs["matches"]
        matches = repeat_matches(union, len(stacked[0]))
        total = average_count(len(union[0]), ground_truth[0].device)
        losses = self.losses(outputs, stacked, matches, union, ground_truth, total)
        return {f"{name}_dn": value for name, value in losses.items()}

    def losses(self, outputs, stacked, matches, union, ground_truth, total):
        """The terms of all layers -> {name: weighted scalar}.

        stacked: the outputs' suffixes, logits (L, B, Q, K) and boxes (L, B, Q, 4), see stack_layers. matches: layer,
        image, query, object (M,), for the classes; union: image, query, object (U,), for boxes and edges. ground_truth:
        labels and boxes of the batch's objects. total: their number, by which class terms are divided.
        """
        suffixes, logits, boxes = stacked
        terms = {"class": loss_labels(logits, boxes, matches, ground_truth) / total}

        image, query, target = union
        total = average_count(len(image), logits.device)
        matched_boxes, target_boxes = boxes[:, image, query], ground_truth[1][target]
        iou, giou = pairwise_giou(to_xyxy(matched_boxes), to_xyxy(target_boxes))
        terms["bbox"] = (matched_boxes - target_boxes).abs().sum((1, 2)) / total
        terms["giou"] = (1 - giou).sum(1) / total
        if "pred_corners" in outputs:
            terms |= edge_terms(outputs, logits, (image, query), target_boxes, iou.detach(), total)
        return {
            f"loss_{name}{suffix}": self.weights[name] * value
            for name, values in terms.items()
            for suffix, value in zip(suffixes, values)
        }


def loss_labels(logits, boxes, matches, ground_truth):
    """The quality loss of the classes, summed -> (L,); the other arguments: see RefinementCriterion.losses."""
    labels, target_boxes = ground_truth
    layer, image, query, target = matches
    iou, _ = pairwise_giou(to_xyxy(boxes[layer, image, query].detach()), to_xyxy(target_boxes[target]))
    quality = torch.zeros_like(logits)
    quality[layer, image, query, labels[target]] = iou.clamp(min=1e-4) ** 1.5
    return quality_loss(logits, quality).sum((1, 2))


def edge_terms(outputs, logits, matched, target_boxes, iou, total):
    """The fine-grained localization loss of the R refined layers, "fgl" (R,), and their distillation, "ddf" (R - 1,).

    outputs: the last layer's and `aux_outputs`, with `pred_corners`; logits (L, B, Q, K), the refined layers first;
    matched: image, query (U,); target_boxes (U, 4); iou (L, U) of the boxes.
    """
    image, query = matched
    layers = [*outputs["aux_outputs"], outputs]
    corners = torch.stack([layer["pred_corners"] for layer in layers]).unflatten(-1, (4, REG_MAX + 1))
    iou = iou[: len(layers)]
    distances = edge_distances(outputs["initial_boxes"][image, query], target_boxes)
    fgl = (fine_grained_loss(corners[:, image, query], distances) * iou[..., None]).sum((1, 2)) / total

    weight = logits[len(layers) - 1].detach().sigmoid().amax(-1).repeat(len(layers) - 1, 1, 1)
    weight[:, image, query] = iou[:-1]
    is_matched = torch.zeros(logits.shape[1:3], dtype=torch.bool, device=logits.device)
    is_matched[image, query] = True
    return {"fgl": fgl, "ddf": distillation_loss(corners[:-1], corners[-1].detach(), weight, is_matched)}


def union_of_matches(image, query, target, num_queries):
    """Matches (M,) of several outputs -> image, query, object, (U,) each.

    Each (image, query) comes once, with the object that it was matched to most often.
    """
    if len(image) == 0:
        return image, query, target
    pairs, count = torch.stack([image * num_queries + query, target], dim=1).unique(dim=0, return_counts=True)
    pairs = pairs[count.argsort(descending=True, stable=True)]
    pairs = pairs[pairs[:, 0].argsort(stable=True)]  # by query; within one, the most frequent first
    first = torch.cat([pairs.new_ones(1, dtype=torch.bool), pairs[1:, 0] != pairs[:-1, 0]])
    place, target = pairs[first].T
    return place // num_queries, place % num_queries, target


def fine_grained_loss(corners, distances):
    """corners (L, M, 4, 33) logits, distances (M, 4) -> (L, M, 4).

    The cross-entropy against the two bins next to the distance, each weighted by its closeness.
    """
    bins = bin_distances(corners.device)
    distances = distances.clamp(bins[0], bins[-1])
    left = (torch.searchsorted(bins, distances.contiguous(), right=True) - 1).clamp(0, REG_MAX - 1)
    right_weight = (distances - bins[left]) / (bins[left + 1] - bins[left])
    log_p = corners.log_softmax(-1)
    return cross_entropy(log_p, left) * (1 - right_weight) + cross_entropy(log_p, left + 1) * right_weight


def cross_entropy(log_p, bins):
    """log_p (L, M, 4, 33), bins (M, 4) indices -> (L, M, 4), minus the log-probability of each bin."""
    return -log_p.gather(-1, bins.expand(len(log_p), -1, -1)[..., None])[..., 0]


def distillation_loss(corners, teacher, weight, matched):
    """The KL divergence of the students `corners` (L, B, Q, 4, 33) from teacher (B, Q, 4, 33) -> (L,).

    weight (L, B, Q), matched (B, Q). The means over matched and over unmatched queries are averaged, weighted by the
    square roots of their numbers.
    """
    student = (corners / TEMPERATURE).log_softmax(-1)
    divergence = F.kl_div(student, (teacher / TEMPERATURE).softmax(-1).expand_as(student), reduction="none").sum(-1)
    loss = divergence.mean(-1) * weight * TEMPERATURE**2
    means, weights = [], []
    for mask in (matched, ~matched):
        means.append((loss * mask).sum((1, 2)) / mask.sum().clamp(min=1))
        weights.append(mask.sum().float().sqrt())
    return (means[0] * weights[0] + means[1] * weights[1]) / (weights[0] + weights[1])
