"""ECDet's losses: scores by quality, boxes by L1 and GIoU, edges by their distributions (D-FINE, arXiv 2410.13842).

All outputs share one set of (query, object) pairs for their boxes and edges, the union of what each would match on its own.
"""

import torch
import torch.nn.functional as F
from torch import nn

from detr_loss import number_in_batch, pairwise_giou, quality_loss, repeat_matches, stack_layers, to_device, to_xyxy
from distributed import mean_of, share_of
from refinement import REG_MAX, bin_distances, edge_distances

TEMPERATURE = 5.0  # of the distributions that earlier layers learn from the last


class RefinementCriterion(nn.Module):
    """matcher: HungarianMatcher. Weights: MAL 1, L1 5, GIoU 2, FGL 0.15, DDF 1.5."""

    def __init__(self, matcher):
        super().__init__()
        self.matcher = matcher
        self.weights = {"class": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}

    def forward(self, outputs, targets, objects=None):
        """outputs: ECDet's in training; targets: B dicts with `labels` (T,) and `boxes` (T, 4) -> {name: weighted scalar}.

        The sum is the loss. objects: see SetCriterion, here for the scores; boxes are averaged over their own pairs. Terms of earlier layers end in _aux_0, _aux_1, ..., of the first boxes in _pre, of the encoder's
        selection in _enc, of the noisy copies in _dn besides.
        """
        labels, wanted = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes"))
        truth = labels, wanted.float()
        layers, logits, boxes = stack_layers(outputs)
        matches = number_in_batch([len(t["labels"]) for t in targets], *self.matcher(logits, boxes, targets))
        matches, union = (to_device(indices, labels.device) for indices in (matches, union_of_matches(*matches[1:], logits.shape[2])))
        total = share_of(len(labels), labels.device) if objects is None else mean_of(objects, labels.device)
        losses = self.losses(outputs, layers, logits, boxes, matches, union, truth, total)
        if "denoising" in outputs:
            outputs = outputs["denoising"]
            layers, logits, boxes = stack_layers(outputs)
            matches = outputs["matches"]
            copies = self.losses(outputs, layers, logits, boxes, repeat_matches(matches, len(layers)), matches, truth, share_of(len(matches[0]), labels.device))
            losses |= {f"{name}_dn": value for name, value in copies.items()}
        else:  # no copies, as there is no object here; other processes may have some, and all have to meet twice
            share_of(0, labels.device), share_of(0, labels.device)
        return losses

    def losses(self, outputs, layers, logits, boxes, matches, union, truth, total):
        """logits (L, B, Q, K) and boxes (L, B, Q, 4) of `layers` (their names' endings), the refined ones first. matches: layer,
        image, query, object (M,), for the classes; union: image, query, object (U,), for boxes and edges; total: of objects."""
        labels, wanted = truth
        refined = len(outputs["aux_outputs"]) + 1
        layer, image, query, target = matches
        quality = torch.zeros_like(logits)
        iou = pairwise_giou(to_xyxy(boxes[layer, image, query].detach()), to_xyxy(wanted[target]))[0]
        quality[layer, image, query, labels[target]] = iou.clamp(min=1e-4) ** 1.5
        terms = {"class": quality_loss(logits, quality).sum((1, 2)) / total}

        image, query, target = union
        total = share_of(len(image), logits.device)
        predicted, wanted = boxes[:, image, query], wanted[target]
        iou, giou = pairwise_giou(to_xyxy(predicted), to_xyxy(wanted))
        terms["bbox"] = (predicted - wanted).abs().sum((1, 2)) / total
        terms["giou"] = (1 - giou).sum(1) / total

        if "pred_corners" in outputs:
            corners = torch.stack([output["pred_corners"] for output in (*outputs["aux_outputs"], outputs)]).unflatten(-1, (4, REG_MAX + 1))
            iou = iou[:refined].detach()
            distances = edge_distances(outputs["initial_boxes"][image, query], wanted)
            terms["fgl"] = (fine_grained_loss(corners[:, image, query], distances) * iou[..., None]).sum((1, 2)) / total
            weight = logits[refined - 1].detach().sigmoid().amax(-1).repeat(refined - 1, 1, 1)
            weight[:, image, query] = iou[:-1]
            matched = torch.zeros(logits.shape[1:3], dtype=torch.bool, device=logits.device)
            matched[image, query] = True
            terms["ddf"] = distillation_loss(corners[:-1], corners[-1].detach(), weight, matched)
        return {f"loss_{name}{ending}": self.weights[name] * value for name, values in terms.items() for ending, value in zip(layers, values)}


def union_of_matches(image, query, target, num_queries):
    """Matches (M,) of several outputs -> each (image, query) once, with the target that it was matched to most often, (U,) each."""
    if len(image) == 0:
        return image, query, target
    pairs, count = torch.stack([image * num_queries + query, target], dim=1).unique(dim=0, return_counts=True)
    pairs = pairs[count.argsort(descending=True, stable=True)]
    pairs = pairs[pairs[:, 0].argsort(stable=True)]  # by query; within one, the most frequent first
    first = torch.cat([pairs.new_ones(1, dtype=torch.bool), pairs[1:, 0] != pairs[:-1, 0]])
    place, target = pairs[first].T
    return place // num_queries, place % num_queries, target


def fine_grained_loss(corners, distances):
    """corners (L, M, 4, 33) logits, distances (M, 4) -> (L, M, 4): cross-entropy against the two bins next to the distance,
    each weighed by how near it is."""
    bins = bin_distances(corners.device)
    distances = distances.clamp(bins[0], bins[-1])
    left = (torch.searchsorted(bins, distances.contiguous(), right=True) - 1).clamp(0, REG_MAX - 1)
    right_share = (distances - bins[left]) / (bins[left + 1] - bins[left])
    log_p = corners.log_softmax(-1)
    at = lambda index: -log_p.gather(-1, index.expand(len(corners), -1, -1)[..., None])[..., 0]
    return at(left) * (1 - right_share) + at(left + 1) * right_share


def distillation_loss(corners, teacher, weight, matched):
    """corners (L, B, Q, 4, 33) learn teacher (B, Q, 4, 33) by KL divergence; weight (L, B, Q); matched (B, Q) -> (L,).

    The means over matched and over unmatched queries are averaged by the square roots of their numbers.
    """
    student = (corners / TEMPERATURE).log_softmax(-1)
    divergence = F.kl_div(student, (teacher / TEMPERATURE).softmax(-1).expand_as(student), reduction="none").sum(-1)
    loss = divergence.mean(-1) * weight * TEMPERATURE**2
    parts, shares = [], []
    for mask in (matched, ~matched):
        parts.append((loss * mask).sum((1, 2)) / mask.sum().clamp(min=1))
        shares.append(mask.sum().float().sqrt())
    return (parts[0] * shares[0] + parts[1] * shares[1]) / (shares[0] + shares[1])
