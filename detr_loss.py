"""Hungarian matching, the losses of a set of predictions, and detections from the outputs.

B images, Q queries, K classes, L layers, T objects of an image, M matches. Boxes are cxcywh in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

from distributed import all_reduce_mean, average_count
from layers import to_device

COSTS_AT_ONCE = 2**22  # of cells and objects: images beyond wait for the next round, which takes less memory


def pairwise_giou(a, b):
    """a, b (..., 4) xyxy, broadcast against each other -> IoU and generalised IoU (arXiv 1902.09630), each (...)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    overlap = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap = overlap * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    iou = overlap / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def area(sides):
    """sides (..., 2) -> (...). The backward pass of prod waits for a GPU, as it looks for zeros."""
    return sides[..., 0] * sides[..., 1]


def to_xyxy(boxes):
    """boxes (..., 4) cxcywh -> (..., 4) xyxy."""
    return box_convert(boxes, "cxcywh", "xyxy")


def focal_cost(x):
    """Logits -> the focal cost of taking each for its class: that of a hit less that of a false alarm."""
    p = x.sigmoid()
    return 0.25 * (1 - p) ** 2 * -F.logsigmoid(x) - 0.75 * p**2 * -F.logsigmoid(-x)


class HungarianMatcher(nn.Module):
    """The cheapest one-to-one assignment of predictions to objects, for the outputs of several layers at once.

    class_loss "softmax": the class cost is minus the probability (DETR). Otherwise it is the focal cost of Deformable
    DETR (arXiv 2010.04159), alpha 0.25, gamma 2.
    """

    def __init__(self, class_cost=1.0, bbox_cost=5.0, giou_cost=2.0, class_loss="quality"):
        super().__init__()
        self.class_cost, self.bbox_cost, self.giou_cost, self.class_loss = class_cost, bbox_cost, giou_cost, class_loss

    @torch.no_grad()
    def cost(self, logits, boxes, targets):
        """logits (L, B, Q, K), boxes (L, B, Q, 4), targets: B dicts -> costs (L, B, Q, T), T the most of an image."""
        target_labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        target_boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).float()
        logits, boxes = logits.float(), boxes.float()
        index = target_labels[None, :, None].expand(*logits.shape[:3], -1)
        if self.class_loss == "softmax":
            class_cost = -logits.softmax(-1).gather(3, index)
        elif logits.shape[3] > index.shape[3]:
            class_cost = focal_cost(logits.gather(3, index))
        else:  # with more objects than classes, this is less work
            class_cost = focal_cost(logits).gather(3, index)
        bbox_cost = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1, -1), p=1)
        giou_cost = -pairwise_giou(to_xyxy(boxes)[:, :, :, None], to_xyxy(target_boxes)[None, :, None])[1]
        return self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost

    @torch.no_grad()
    def forward(self, logits, boxes, targets):
        """-> layer, image, query, object: index tensors (M,) on the host; objects are counted within their image.

        The costs go to the host in one copy. Where an image has more objects than queries, the most expensive ones stay
        unmatched. A cost that is not finite (a diverged network) counts as very high; the loss will not be finite.
        """
        sizes = [len(t["labels"]) for t in targets]
        if max(sizes, default=0) == 0:
            return tuple(torch.zeros(4, 0, dtype=torch.long))
        from scipy.optimize import linear_sum_assignment  # 400 modules, which detection does without

        cost = self.cost(logits, boxes, targets).nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
        rows = []
        for layer in range(len(cost)):
            for image, size in enumerate(sizes):
                queries, objects = linear_sum_assignment(cost[layer, image, :, :size])
                rows += [(layer, image, q, o) for q, o in zip(queries, objects)]
        return tuple(torch.tensor(rows, dtype=torch.long).T)


@torch.no_grad()
def assign_dense(cost, sizes, k):
    """The k cheapest cells of every object, which supervise the dense outputs.

    cost (B, N, T) of N cells, sizes: the number of objects in each image -> image, cell, object, (M,) each, on the
    host. A cell claimed by several objects goes to the cheapest. One cell per object would be too few examples to learn
    from a small dataset.
    """
    if cost.shape[2] == 0:
        return tuple(torch.zeros(3, 0, dtype=torch.long))
    cells = cost.shape[1]
    cost, cell = cost.nan_to_num(1e6, 1e6, -1e6).topk(min(k, cells), dim=1, largest=False)
    cost, cell = torch.stack([cost, cell.to(cost)]).cpu()  # (B, k, T) each, in one copy
    exists = torch.arange(cost.shape[2]) < torch.tensor(sizes)[:, None, None]
    image, rank, target = exists.expand_as(cost).nonzero(as_tuple=True)
    cost, cell = cost[image, rank, target], cell[image, rank, target].long()
    place = image * cells + cell
    order = cost.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]  # by place; within one, the cheapest first
    first = order[place[order].diff(prepend=place.new_full((1,), -1)) > 0]
    return image[first], cell[first], target[first]


class SetCriterion(nn.Module):
    """The loss of a detector's outputs. Every decoder layer is matched on its own; all are computed together.

    class_loss "softmax": cross-entropy over K classes and "no object", which is weighted by `no_object_weight` (DETR).
    "focal": the focal loss of K binary scores (arXiv 1708.02002). "quality": K binary scores that learn the IoU of
    their box, see `quality_loss`.

    Some outputs have more than the layers. "enc": the predictions that queries were selected by, one more layer.
    "denoising": the outputs of the noisy copies and their `matches`, or None. "dense": predictions of every cell, of
    which each object supervises `dense_k`.
    """

    def __init__(
        self,
        matcher,
        class_loss="quality",
        class_weight=1.0,
        bbox_weight=5.0,
        giou_weight=2.0,
        no_object_weight=0.1,
        dense_k=4,
    ):
        super().__init__()
        self.matcher, self.class_loss = matcher, class_loss
        self.no_object_weight, self.dense_k = no_object_weight, dense_k
        self.weights = {"class": class_weight, "bbox": bbox_weight, "giou": giou_weight}

    def forward(self, outputs, targets, objects=None):
        """outputs: a detector's; targets: B dicts with `labels` (T,) and `boxes` (T, 4) -> {name: weighted scalar}.

        The sum is the loss. Terms are divided by the number of objects in the batch, or by `objects`: where a batch
        comes in pieces, the mean number in a piece of all processes, so that the mean of their losses is the batch's.
        Names of earlier layers' terms end in _aux_0, _aux_1, ...
        """
        suffixes, logits, boxes = stack_layers(outputs)
        sizes, device = [len(t["labels"]) for t in targets], logits.device
        total = average_count(sum(sizes), device) if objects is None else objects
        indices = to_device(number_in_batch(sizes, *self.matcher(logits, boxes, targets)), device)
        losses = self.losses(logits, boxes, indices, targets, suffixes, total)
        if outputs.get("denoising"):
            losses |= self.denoising_losses(outputs["denoising"], targets)
        elif "enc" in outputs or "denoising" in outputs:
            # Without an object there are no copies. Other processes may have some: all take part in this all-reduce.
            average_count(0, device)
        if "dense" in outputs:
            losses |= self.dense_losses(outputs["dense"], targets, total)
        return losses

    def denoising_losses(self, outputs, targets):
        """The terms of the noisy copies, whose objects are known: nothing is matched. Names end in _dn."""
        suffixes, logits, boxes = stack_layers(outputs)
        matches = repeat_matches(outputs["matches"], len(suffixes))
        suffixes = [f"{suffix}_dn" for suffix in suffixes]
        total = average_count(len(outputs["matches"][0]), logits.device)
        return self.losses(logits, boxes, matches, targets, suffixes, total)

    def dense_losses(self, outputs, targets, total):
        """The terms of the dense predictions, logits (B, N, K) and boxes (B, N, 4). Names end in _dense."""
        logits, boxes = (outputs[key][None].float() for key in ("pred_logits", "pred_boxes"))
        sizes = [len(t["labels"]) for t in targets]
        group, found = max(1, COSTS_AT_ONCE // (logits.shape[2] * max([1, *sizes]))), []
        for first in range(0, len(sizes), group):
            part = slice(first, first + group)
            cost = self.matcher.cost(logits[:, part], boxes[:, part], targets[part])[0]
            image, cell, target = assign_dense(cost, sizes[part], self.dense_k)
            found.append((first + image, cell, target))
        image, cell, target = (torch.cat(parts) for parts in zip(*found))
        indices = to_device(number_in_batch(sizes, torch.zeros_like(image), image, cell, target), logits.device)
        return self.losses(logits, boxes, indices, targets, ["_dense"], self.dense_k * total)

    def losses(self, logits, boxes, indices, targets, suffixes, total):
        """The terms of every layer, divided by `total` -> {name: weighted scalar}.

        logits (L, B, Q, K or K+1), boxes (L, B, Q, 4), indices: layer, image, query, object of the batch, (M,) each.
        """
        layer, image, query, target = indices
        target_labels = torch.cat([t["labels"] for t in targets])[target]
        target_boxes = torch.cat([t["boxes"] for t in targets])[target].float()
        matched_boxes = boxes[layer, image, query]
        iou, giou = pairwise_giou(to_xyxy(matched_boxes), to_xyxy(target_boxes))
        terms = {
            "class": self.loss_labels(logits, (layer, image, query), target_labels, iou.detach(), total),
            "bbox": sum_by_layer((matched_boxes - target_boxes).abs().sum(-1), layer, len(logits)) / total,
            "giou": sum_by_layer(1 - giou, layer, len(logits)) / total,
        }
        return {
            f"loss_{name}{suffix}": self.weights[name] * term[i]
            for name, term in terms.items()
            for i, suffix in enumerate(suffixes)
        }

    def loss_labels(self, logits, matched, labels, iou, total):
        """The class term of every layer, (L,).

        logits (L, B, Q, K or K+1), matched: layer, image, query, (M,) each; labels and iou (M,) of their objects.
        """
        if self.class_loss == "softmax":
            no_object = logits.shape[-1] - 1
            target_classes = torch.full(logits.shape[:3], no_object, device=logits.device)
            target_classes[matched] = labels
            return softmax_loss(logits, target_classes, self.no_object_weight)
        target_scores = torch.zeros_like(logits)
        if self.class_loss == "focal":
            target_scores[*matched, labels] = target_scores.new_ones(())  # a number would be copied to the GPU
            return sigmoid_focal_loss(logits, target_scores, alpha=0.25, gamma=2).sum((1, 2, 3)) / total
        target_scores[*matched, labels] = iou.clamp(min=1e-3) ** 1.5
        return quality_loss(logits, target_scores).sum((1, 2)) / total


def sum_by_layer(values, layer, count):
    """values (M,), layer (M,) in 0..count-1 -> (count,), the sum of each layer's values."""
    return values.new_zeros(count).index_add(0, layer, values)


def stack_layers(outputs):
    """-> suffixes of the layers' names, logits (L, B, Q, K), boxes (L, B, Q, 4).

    The decoder layers' outputs come first, then "pre" and "enc", where there are any.
    """
    extra = [key for key in ("pre", "enc") if key in outputs]
    layers = [*outputs["aux_outputs"], outputs, *(outputs[key] for key in extra)]
    logits, boxes = (torch.stack([layer[key] for layer in layers]).float() for key in ("pred_logits", "pred_boxes"))
    suffixes = [f"_aux_{i}" for i in range(len(outputs["aux_outputs"]))] + [""] + [f"_{key}" for key in extra]
    return suffixes, logits, boxes


def number_in_batch(sizes, layer, image, query, number):
    """Object numbers within their images -> the same indices with objects counted over the batch.

    sizes: the number of objects in each image; layer, image, query, object (M,) on the host.
    """
    sizes = torch.tensor(sizes)
    return layer, image, query, (sizes.cumsum(0) - sizes)[image] + number


def repeat_matches(matches, layers):
    """image, query, object (M,) -> layer, image, query, object (L * M,): the same matches for each of L layers."""
    layer = torch.arange(layers, device=matches[0].device).repeat_interleave(len(matches[0]))
    return layer, *(part.repeat(layers) for part in matches)


def quality_loss(logits, targets, gamma=1.5):
    """Matchability-aware loss (DEIM, arXiv 2412.04234). logits, targets (..., K) -> (...,), summed over K.

    The target is IoU ** gamma for the class of the matched object and 0 elsewhere, where easy negatives count little.
    """
    weight = torch.where(targets > 0, 1.0, logits.detach().sigmoid() ** gamma)
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight).sum(-1)


def softmax_loss(logits, classes, no_object_weight):
    """logits (L, B, Q, K+1), classes (L, B, Q) with K for "no object" -> (L,), the weighted mean of each layer."""
    weight = torch.where(classes == logits.shape[-1] - 1, no_object_weight, 1.0)
    loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(weight)
    return (loss * weight).sum((1, 2)) / all_reduce_mean(weight.sum((1, 2)), weight.device)


class PostProcess(nn.Module):
    """Outputs -> detections.

    class_loss "softmax": the best class of each query; otherwise the `limit` best (query, class) pairs, by default as
    many as there are queries, but at least 300.
    """

    def __init__(self, class_loss="quality", limit=None):
        super().__init__()
        self.class_loss, self.limit = class_loss, limit

    @torch.no_grad()
    def forward(self, outputs, sizes):
        """sizes (B, 2), height and width of the images -> B dicts of D detections, best first: `scores` and `labels`
        (D,), `boxes` (D, 4) xyxy in pixels."""
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
        image_sizes = sizes.to(boxes)[:, None, [1, 0, 1, 0]]  # width, height, width, height
        boxes = to_xyxy(boxes.gather(1, query[..., None].expand(-1, -1, 4))) * image_sizes
        return scores, labels, boxes.clamp(min=0).minimum(image_sizes)
