"""Hungarian matching, the losses of a set of predictions, and detections from the outputs. Boxes are cxcywh in [0, 1]."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert


def pairwise_giou(a, b):
    """a (..., 4), b (..., 4) xyxy, broadcast against each other -> IoU and generalised IoU (arXiv 1902.09630), (...)."""
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = area_a + area_b - overlap
    iou = overlap / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def to_xyxy(boxes):
    return box_convert(boxes, "cxcywh", "xyxy")


class HungarianMatcher(nn.Module):
    """The cheapest one-to-one assignment of predictions to objects, for several layers' outputs at once.

    class_loss "softmax": the class cost is minus the probability (DETR); otherwise the focal cost of Deformable DETR
    (arXiv 2010.04159) with alpha 0.25 and gamma 2.
    """

    def __init__(self, class_cost=1.0, bbox_cost=5.0, giou_cost=2.0, class_loss="focal"):
        super().__init__()
        self.class_cost, self.bbox_cost, self.giou_cost, self.class_loss = class_cost, bbox_cost, giou_cost, class_loss

    @torch.no_grad()
    def cost(self, logits, boxes, targets):
        """logits (L, B, Q, K), boxes (L, B, Q, 4), targets: B dicts -> costs (L, B, Q, most objects in a picture)."""
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True).float()
        logits, boxes = logits.float(), boxes.float()
        if self.class_loss == "softmax":
            class_cost = -logits.softmax(-1)
        else:
            p = logits.sigmoid()
            positive = 0.25 * (1 - p) ** 2 * -F.logsigmoid(logits)
            negative = 0.75 * p**2 * -F.logsigmoid(-logits)
            class_cost = positive - negative
        index = labels[None, :, None].expand(*logits.shape[:3], -1)
        class_cost = class_cost.gather(3, index)
        bbox_cost = (boxes[:, :, :, None] - wanted[None, :, None]).abs().sum(-1)
        giou_cost = -pairwise_giou(to_xyxy(boxes)[:, :, :, None], to_xyxy(wanted)[None, :, None])[1]
        return self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost

    @torch.no_grad()
    def forward(self, logits, boxes, targets):
        """-> layer, image, query, object: index tensors (M,); `object` counts within its picture.

        The costs go to the host once. Where a picture has more objects than there are queries the dearest stay
        unmatched; a cost that is not finite (a diverged network) counts as very high, and the loss will tell.
        """
        sizes = [len(t["labels"]) for t in targets]
        device = logits.device
        if max(sizes, default=0) == 0:
            return tuple(torch.zeros(4, 0, dtype=torch.long, device=device))
        cost = self.cost(logits, boxes, targets).nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
        rows = []
        for layer in range(len(cost)):
            for image, size in enumerate(sizes):
                queries, objects = linear_sum_assignment(cost[layer, image, :, :size])
                rows += [(layer, image, q, o) for q, o in zip(queries, objects)]
        return tuple(torch.tensor(rows, dtype=torch.long).T.to(device))


def quality_focal_loss(logits, targets, gamma=1.5):
    """Matchability-aware loss (DEIM, arXiv 2412.04234): logits, targets (..., K), the target of the object's class being
    IoU ** gamma and 0 elsewhere; easy negatives count little -> (...,) summed over K."""
    weight = torch.where(targets > 0, 1.0, logits.detach().sigmoid() ** gamma)
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight).sum(-1)


class SetCriterion(nn.Module):
    """The loss of a detector's outputs: every decoder layer matched on its own, all of them computed together.

    Returns {name: weighted scalar}; their sum is the loss. Divided by the number of objects in the batch.
    """

    def __init__(self, matcher, class_loss, weights, no_object_weight=0.1, dense=None):
        super().__init__()
        self.matcher, self.class_loss, self.weights, self.no_object_weight = matcher, class_loss, weights, no_object_weight
        self.dense = dense

    def forward(self, outputs, targets):
        layers = [*outputs["aux_outputs"], outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers])
        boxes = torch.stack([layer["pred_boxes"] for layer in layers])
        layer, image, query, target = self.matcher(logits, boxes, targets)
        names = [f"_aux_{i}" for i in range(len(layers) - 1)] + [""]
        losses = self.losses(logits, boxes, (layer, image, query, target), targets, names)
        if self.dense is not None:
            logits, boxes = outputs["dense"]["pred_logits"][None], outputs["dense"]["pred_boxes"][None]
            indices = self.dense(self.matcher.cost(logits, boxes, targets)[0], targets)
            indices = (torch.zeros_like(indices[0]), *indices)
            losses |= self.losses(logits, boxes, indices, targets, ["_dense"], per=self.dense.k)
        return losses

    def losses(self, logits, boxes, indices, targets, names, per=1):
        layer, image, query, target = indices
        count = max(1, per * sum(len(t["labels"]) for t in targets))
        first = torch.tensor([0, *(len(t["labels"]) for t in targets)]).cumsum(0)[:-1].to(image.device)
        target = first[image] + target
        labels = torch.cat([t["labels"] for t in targets])[target]
        wanted = torch.cat([t["boxes"] for t in targets])[target]
        predicted = boxes[layer, image, query]
        iou, giou = pairwise_giou(to_xyxy(predicted), to_xyxy(wanted))
        quality = torch.zeros_like(logits)
        quality[layer, image, query, labels] = iou.detach().clamp(min=1e-3) ** 1.5
        per_layer = quality_focal_loss(logits, quality).sum((1, 2))
        zero = torch.zeros(len(names), device=logits.device)
        terms = {
            "class": self.weights["cls"] * per_layer / count,
            "bbox": self.weights["bbox"] * zero.index_add(0, layer, F.l1_loss(predicted, wanted, reduction="none").sum(-1)) / count,
            "giou": self.weights["giou"] * zero.index_add(0, layer, 1 - giou) / count,
        }
        return {f"loss_{term}{name}": values[i] for term, values in terms.items() for i, name in enumerate(names)}


class DenseCriterion(nn.Module):
    def __init__(self, k=4):
        super().__init__()
        self.k = k

    @torch.no_grad()
    def forward(self, cost, targets):
        """cost (B, N, T) -> image, pixel, object"""
        sizes = torch.tensor([len(t["labels"]) for t in targets], device=cost.device)
        b, n, t = cost.shape
        if t == 0: return tuple(torch.zeros(3, 0, dtype=torch.long, device=cost.device))
        cost = cost.nan_to_num(1e6, 1e6, -1e6).masked_fill(torch.arange(t, device=cost.device) >= sizes[:, None, None], 1e9)
        near = cost.topk(min(self.k, n), dim=1, largest=False).indices
        chosen = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, near, True) & (cost < 1e8)
        best = cost.masked_fill(~chosen, 1e9).argmin(-1)
        image, pixel = chosen.any(-1).nonzero(as_tuple=True)
        return image, pixel, best[image, pixel]


class PostProcess(nn.Module):
    def __init__(self, kind="sigmoid", limit=300):
        super().__init__()
        self.kind, self.limit = kind, limit

    @torch.no_grad()
    def forward(self, outputs, sizes):
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        p = logits.sigmoid().flatten(1)
        scores, index = p.topk(min(self.limit, p.shape[1]), dim=1)
        k = logits.shape[-1]
        boxes = to_xyxy(boxes.gather(1, (index // k)[..., None].expand(-1, -1, 4)))
        sizes = sizes.to(boxes)
        boxes = (boxes * sizes[:, None, [1, 0, 1, 0]]).clamp(min=0).minimum(sizes[:, None, [1, 0, 1, 0]])
        return [{"scores": s, "labels": l, "boxes": b} for s, l, b in zip(scores, index % k, boxes)]
