"""Hungarian matching, the losses of a set of predictions, and detections from the outputs. Boxes are cxcywh in [0, 1]."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

from distributed import mean_of, share_of


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
    (arXiv 2010.04159), alpha 0.25, gamma 2.
    """

    def __init__(self, class_cost=1.0, bbox_cost=5.0, giou_cost=2.0, class_loss="quality"):
        super().__init__()
        self.class_cost, self.bbox_cost, self.giou_cost, self.class_loss = class_cost, bbox_cost, giou_cost, class_loss

    @torch.no_grad()
    def cost(self, logits, boxes, targets):
        """logits (L, B, Q, K), boxes (L, B, Q, 4), targets: B dicts -> costs (L, B, Q, most objects in a picture)."""
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True).float()
        logits, boxes = logits.float(), boxes.float()
        index = labels[None, :, None].expand(*logits.shape[:3], -1)
        if self.class_loss == "softmax":
            class_cost = -logits.softmax(-1).gather(3, index)
        else:
            x = logits.gather(3, index)
            p = x.sigmoid()
            class_cost = 0.25 * (1 - p) ** 2 * -F.logsigmoid(x) - 0.75 * p**2 * -F.logsigmoid(-x)
        bbox_cost = (boxes[:, :, :, None] - wanted[None, :, None]).abs().sum(-1)
        giou_cost = -pairwise_giou(to_xyxy(boxes)[:, :, :, None], to_xyxy(wanted)[None, :, None])[1]
        return self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost

    @torch.no_grad()
    def forward(self, logits, boxes, targets):
        """-> layer, image, query, object: index tensors (M,) on the host; `object` counts within its picture.

        The costs go to the host, once. Where a picture has more objects than there are queries the dearest stay
        unmatched; a cost that is not finite (a diverged network) counts as very high, and the loss will tell.
        """
        sizes = [len(t["labels"]) for t in targets]
        if max(sizes, default=0) == 0:
            return tuple(torch.zeros(4, 0, dtype=torch.long))
        cost = self.cost(logits, boxes, targets).nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
        rows = []
        for layer in range(len(cost)):
            for image, size in enumerate(sizes):
                queries, objects = linear_sum_assignment(cost[layer, image, :, :size])
                rows += [(layer, image, q, o) for q, o in zip(queries, objects)]
        return tuple(torch.tensor(rows, dtype=torch.long).T)


@torch.no_grad()
def assign_dense(cost, sizes, k):
    """The k cheapest pixels of every object: costs (B, N, T), sizes: objects of each picture -> image, pixel, object, (M,) each, on the host.

    A pixel that several objects claim goes to the cheapest. This is how the dense outputs are taught: one pixel an object
    would be too few examples to learn from a small data set.
    """
    if cost.shape[2] == 0:
        return tuple(torch.zeros(3, 0, dtype=torch.long))
    pixels = cost.shape[1]
    cost, pixel = cost.nan_to_num(1e6, 1e6, -1e6).topk(min(k, pixels), dim=1, largest=False)
    cost, pixel = torch.stack([cost, pixel.to(cost)]).cpu()  # (B, k, T) each, in one copy
    exists = torch.arange(cost.shape[2]) < torch.tensor(sizes)[:, None, None]
    image, rank, target = exists.expand_as(cost).nonzero(as_tuple=True)
    cost, pixel = cost[image, rank, target], pixel[image, rank, target].long()
    place = image * pixels + pixel
    order = cost.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]  # by place; within one, the cheapest first
    first = order[place[order].diff(prepend=place.new_full((1,), -1)) > 0]
    return image[first], pixel[first], target[first]


class SetCriterion(nn.Module):
    """The loss of a detector's outputs: every decoder layer is matched on its own, all are computed together.

    class_loss "softmax": cross-entropy over K classes and "no object", which weighs `no_object_weight` (DETR). "focal": K
    binary scores (arXiv 1708.02002). "quality": the same, but they learn the IoU of their box, see `quality_loss`. Where the
    outputs have "dense" predictions, each object teaches `dense_k` of their pixels; where they have "enc", the predictions
    that queries were selected by, these are one more layer; "denoising" has outputs of noisy copies and their `matches`.
    """

    def __init__(self, matcher, class_loss="quality", class_weight=1.0, bbox_weight=5.0, giou_weight=2.0,
                 no_object_weight=0.1, dense_k=4):  # fmt: skip
        super().__init__()
        self.matcher, self.class_loss, self.no_object_weight, self.dense_k = matcher, class_loss, no_object_weight, dense_k
        self.weights = {"class": class_weight, "bbox": bbox_weight, "giou": giou_weight}

    def forward(self, outputs, targets, objects=None):
        """outputs: a detector's; targets: B dicts with `labels` (T,) and `boxes` (T, 4) -> {name: weighted scalar}.

        The sum is the loss. Boxes are averaged over the batch's objects, or divided by `objects`: where a batch comes in pieces, the
        mean of a piece, so that the mean of their losses is the batch's. Earlier layers' terms end in _aux_0, _aux_1, ...
        """
        suffixes, logits, boxes = stack_layers(outputs)
        sizes, device = [len(t["labels"]) for t in targets], logits.device
        total = share_of(sum(sizes), device) if objects is None else mean_of(objects, device)
        indices = to_device(number_in_batch(sizes, *self.matcher(logits, boxes, targets)), device)
        losses = self.losses(logits, boxes, indices, targets, suffixes, total)
        if outputs.get("denoising"):
            suffixes, logits, boxes = stack_layers(outputs["denoising"])
            matches = repeat_matches(outputs["denoising"]["matches"], len(suffixes))
            losses |= self.losses(logits, boxes, matches, targets, [f"{suffix}_dn" for suffix in suffixes], share_of(len(matches[0]) // len(suffixes), device))
        elif "enc" in outputs or "denoising" in outputs:  # no copies, as there is no object here; other processes may have some, and all have to meet
            share_of(0, device)
        if "dense" in outputs:
            logits, boxes = (outputs["dense"][key][None].float() for key in ("pred_logits", "pred_boxes"))
            image, pixel, target = assign_dense(self.matcher.cost(logits, boxes, targets)[0], sizes, self.dense_k)
            indices = to_device(number_in_batch(sizes, torch.zeros_like(image), image, pixel, target), device)
            losses |= self.losses(logits, boxes, indices, targets, ["_dense"], self.dense_k * total)
        return losses

    def losses(self, logits, boxes, indices, targets, suffixes, total):
        """logits (L, B, Q, K or K+1), boxes (L, B, Q, 4), indices: layer, image, query, object of the batch (M,) -> the terms of every
        layer, divided by `total`."""
        layer, image, query, target = indices
        labels = torch.cat([t["labels"] for t in targets])[target]
        wanted = torch.cat([t["boxes"] for t in targets])[target].float()
        predicted = boxes[layer, image, query]
        iou, giou = pairwise_giou(to_xyxy(predicted), to_xyxy(wanted))
        per_layer = lambda values: logits.new_zeros(len(suffixes)).index_add(0, layer, values)
        if self.class_loss == "softmax":
            classes = torch.full(logits.shape[:3], logits.shape[-1] - 1, device=logits.device)
            classes[layer, image, query] = labels
            class_term = softmax_loss(logits, classes, self.no_object_weight)
        elif self.class_loss == "focal":
            wanted_class = torch.zeros_like(logits)
            wanted_class[layer, image, query, labels] = 1
            class_term = sigmoid_focal_loss(logits, wanted_class, alpha=0.25, gamma=2).sum((1, 2, 3)) / total
        else:
            quality = torch.zeros_like(logits)
            quality[layer, image, query, labels] = iou.detach().clamp(min=1e-3) ** 1.5
            class_term = quality_loss(logits, quality).sum((1, 2)) / total
        terms = {
            "class": class_term,
            "bbox": per_layer((predicted - wanted).abs().sum(-1)) / total,
            "giou": per_layer(1 - giou) / total,
        }
        return {f"loss_{name}{suffix}": self.weights[name] * term[i] for name, term in terms.items() for i, suffix in enumerate(suffixes)}


def stack_layers(outputs):
    """-> endings of the layers' names, logits (L, B, Q, K), boxes (L, B, Q, 4): the refined layers', then those of `pre` and `enc`."""
    more = [key for key in ("pre", "enc") if key in outputs]
    layers = [*outputs["aux_outputs"], outputs, *(outputs[key] for key in more)]
    logits, boxes = (torch.stack([layer[key] for layer in layers]).float() for key in ("pred_logits", "pred_boxes"))
    return [f"_aux_{i}" for i in range(len(outputs["aux_outputs"]))] + [""] + [f"_{key}" for key in more], logits, boxes


def number_in_batch(sizes, layer, image, query, number):
    """sizes: objects of each picture; layer, image, query, object (M,) on the host -> the same, objects counted over the batch."""
    sizes = torch.tensor(sizes)
    return layer, image, query, (sizes.cumsum(0) - sizes)[image] + number


def to_device(indices, device):
    """Index tensors (M,) of the host -> of the device, in one copy."""
    return torch.stack(indices).to(device, non_blocking=True).unbind()


def repeat_matches(matches, layers):
    """image, query, object (M,) -> layer, image, query, object (L * M,): the same matches for each of so many layers."""
    layer = torch.arange(layers, device=matches[0].device).repeat_interleave(len(matches[0]))
    return layer, *(part.repeat(layers) for part in matches)


def quality_loss(logits, targets, gamma=1.5):
    """Matchability-aware loss (DEIM, arXiv 2412.04234). logits, targets (..., K): the target is IoU ** gamma for the class
    of the matched object and 0 elsewhere, where easy negatives count little -> (...,), summed over K."""
    weight = torch.where(targets > 0, 1.0, logits.detach().sigmoid() ** gamma)
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight).sum(-1)


def softmax_loss(logits, classes, no_object_weight):
    """logits (L, B, Q, K+1), classes (L, B, Q) with K for "no object" -> (L,), the weighted mean of each layer."""
    weight = torch.where(classes == logits.shape[-1] - 1, no_object_weight, 1.0)
    loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(weight)
    return (loss * weight).sum((1, 2)) / mean_of(weight.sum((1, 2)), weight.device)


class PostProcess(nn.Module):
    """Outputs -> detections. class_loss "softmax": each query's best class; otherwise the `limit` best
    (query, class) pairs, by default as many as there are queries and 300 at least."""

    def __init__(self, class_loss="quality", limit=None):
        super().__init__()
        self.class_loss, self.limit = class_loss, limit

    @torch.no_grad()
    def forward(self, outputs, sizes):
        """sizes (B, 2) height, width of the pictures -> B dicts: scores and labels (D,), boxes (D, 4) xyxy pixels, best first."""
        return [{"scores": s, "labels": l, "boxes": b} for s, l, b in zip(*self.best(outputs, sizes))]

    def best(self, outputs, sizes):
        """The same for the whole batch: scores and labels (B, D), boxes (B, D, 4)."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if self.class_loss == "softmax":
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, query = scores.sort(dim=1, descending=True)
            labels = labels.gather(1, query)
        else:
            classes = logits.shape[-1]
            limit = self.limit or max(300, logits.shape[1])
            scores, pair = logits.sigmoid().flatten(1).topk(min(limit, logits.shape[1] * classes), dim=1)
            query, labels = pair // classes, pair % classes
        sizes = sizes.to(boxes)[:, None, [1, 0, 1, 0]]
        boxes = to_xyxy(boxes.gather(1, query[..., None].expand(-1, -1, 4))) * sizes
        return scores, labels, boxes.clamp(min=0).minimum(sizes)
