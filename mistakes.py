"""What kind of mistake each detection is, what each kind costs in AP50, and from which score on to detect.

The kinds and their costs are TIDE's (arXiv 2008.08115).
"""

from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torchvision.ops import box_iou

KINDS = ("class", "location", "class and location", "duplicate", "background", "missed")
CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
HIT, IGNORED = -1, -2
ENOUGH, SOME = 0.5, 0.1  # IoU with an object from which on a detection hits it; from which on it is about it
MOST = 100  # detections in an image, the best ones; twice as many as it has objects if that is more
DUPLICATE_IOU = 0.7  # with a better detection, of a duplicate in `doubles`
DEFAULT = 0.4  # the score from which on to detect, where nothing better is known
HALVINGS = 20  # of the images, to find out whether a class gains from a threshold of its own


@dataclass
class Findings:
    """D detections, image by image and the best first, and T objects, ignored ones left out, of a Split."""

    classes: list[str]
    image: np.ndarray  # (D,) index of the record
    label: np.ndarray  # (D,)
    score: np.ndarray  # (D,)
    box: np.ndarray  # (D, 4) xyxy pixels
    kind: np.ndarray  # (D,) an index of KINDS, HIT, or IGNORED
    object: np.ndarray  # (D,) index of the object that it hits, or should have hit but for its class or location; or -1
    object_image: np.ndarray  # (T,)
    object_label: np.ndarray  # (T,)
    object_box: np.ndarray  # (T, 4)
    found_at: np.ndarray  # (T,) score of the detection that hits it, -inf where none does

    def detections_of(self, index):
        """The indices of the detections in an image."""
        return np.arange(*np.searchsorted(self.image, (index, index + 1)))

    def objects_of(self, index):
        return np.arange(*np.searchsorted(self.object_image, (index, index + 1)))


def judge(split, found):
    """A Split and {record index: detections}, as evaluate returns them -> Findings."""
    parts, objects, first = [], [], 0
    for index, record in enumerate(split.records):
        most = max(MOST, 2 * len(record.boxes))
        order = found[index]["scores"].argsort(descending=True, stable=True)[:most]
        scores, labels, boxes = (
            found[index][key][order].cpu().double().numpy() for key in ("scores", "labels", "boxes")
        )
        kept, label = ~record.ignored, labels.astype(int)
        kind, own = judge_image(boxes, label, record.boxes[kept], record.labels[kept])
        over_ignored = overlap(boxes, record.boxes[~kept], of_first=True) * (label[:, None] == record.labels[~kept])
        kind[(kind != HIT) & (over_ignored.max(1, initial=0) > ENOUGH)] = IGNORED
        found_at = np.full(kept.sum(), -np.inf)
        found_at[own[kind == HIT]] = scores[kind == HIT]
        parts.append((np.full(len(label), index), label, scores, boxes, kind, np.where(own < 0, -1, own + first)))
        objects.append((np.full(kept.sum(), index), record.labels[kept], record.boxes[kept], found_at))
        first += kept.sum()
    columns = [np.concatenate(column) for rows in (parts, objects) for column in zip(*rows)]
    return Findings(split.classes, *columns)


def judge_image(boxes, labels, object_boxes, object_labels):
    """D detections, best first, and T objects -> kind (D,) and object (D,), see Findings."""
    kind, own = np.full(len(boxes), BACKGROUND), np.full(len(boxes), -1)
    if not len(boxes) or not len(object_boxes):
        return kind, own
    ious = overlap(boxes, object_boxes)
    same = labels[:, None] == object_labels
    of_class, free = ious * same, np.ones(len(object_boxes), dtype=bool)
    for i, row in enumerate(of_class):
        best = (row * free).argmax()
        if row[best] >= ENOUGH and free[best]:
            kind[i], own[i], free[best] = HIT, best, False
    other = ious * ~same
    nearest, nearest_other = of_class.argmax(1), other.argmax(1)
    most, most_other = of_class.max(1), other.max(1)
    missed = kind != HIT
    rules = (  # the first that holds counts
        (LOCATION, (SOME <= most) & (most <= ENOUGH), nearest),
        (CLASS, most_other >= ENOUGH, nearest_other),
        (DUPLICATE, (of_class * ~free).max(1) >= ENOUGH, None),
        (BACKGROUND, ious.max(1) <= SOME, None),
        (BOTH, np.ones(len(boxes), dtype=bool), None),
    )
    for number, holds, objects in rules:
        holds = holds & missed
        kind[holds], missed = number, missed & ~holds
        if objects is not None:
            own[holds] = objects[holds]
    return kind, own


def overlap(boxes, others, of_first=False):
    """IoU (D, T) of boxes (D, 4) and others (T, 4); of_first: the part of the first that lies in the second."""
    first, second = torch.from_numpy(boxes).double(), torch.from_numpy(others).double()
    ious = box_iou(first, second)
    if of_first:
        area, other = ((b[:, 2:] - b[:, :2]).prod(1) for b in (first, second))
        ious = ious * (area[:, None] + other) / (1 + ious) / area[:, None].clamp(min=1e-9)
    return ious.numpy()


# Cases, to be drawn and counted


@dataclass
class Case:
    """A detection and the object that it belongs to; one of them may be missing (None)."""

    index: int  # of the image's record in its split
    truth: int | None  # the object's label
    detected: int | None  # the detection's label
    score: float
    box: list[float]  # xyxy pixels; the detection's, or the missed object's
    kind: int = HIT  # see Findings

    @property
    def area(self):
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def cases_of(findings, threshold=DEFAULT):
    """-> a Case for each detection that scores at least `threshold`, and for each object that none of them has.

    An object that is only taken for another class has the best detection that does so.
    """
    f = findings
    sure, is_found = (f.score >= threshold) & (f.kind != IGNORED), f.found_at >= threshold
    taken = best_of_each(f.object, f.score, sure & (f.kind == CLASS) & ~is_found[f.object])
    cases = []
    for i in np.flatnonzero(sure):
        truth = int(f.object_label[f.object[i]]) if f.kind[i] == HIT or taken[i] else None
        cases.append(
            Case(int(f.image[i]), truth, int(f.label[i]), float(f.score[i]), f.box[i].tolist(), int(f.kind[i]))
        )
    is_found[f.object[taken]] = True
    for j in np.flatnonzero(~is_found):
        box = f.object_box[j].tolist()
        cases.append(Case(int(f.object_image[j]), int(f.object_label[j]), None, 0.0, box, MISSED))
    return cases


def confusion(cases, classes):
    """[Case] and the number of classes K -> counts (K + 1, K + 1).

    Rows are the ground truth, columns the detected classes; the last of each stands for "nothing".
    """
    counts = np.zeros((classes + 1, classes + 1), dtype=int)
    for case in cases:
        row = classes if case.truth is None else case.truth
        column = classes if case.detected is None else case.detected
        counts[row, column] += 1
    return counts


def worst(cases, count=12):
    """-> [Case], half of them the wrong detections with the highest scores, half the largest missed objects."""
    wrong = [case for case in cases if case.detected is not None and case.detected != case.truth]
    missed = [case for case in cases if case.detected is None]
    wrong.sort(key=attrgetter("score"), reverse=True)
    missed.sort(key=attrgetter("area"), reverse=True)
    return wrong[: count // 2] + missed[: count // 2]


def doubles(findings, threshold=DEFAULT, iou=DUPLICATE_IOU):
    """The fraction of the detections that are duplicates, out of those that score at least `threshold`.

    A duplicate overlaps a detection of its class with a higher score by more than `iou`, and has no object of its own.
    """
    f = findings
    sure, duplicates = (f.score >= threshold) & (f.kind != IGNORED), 0
    for i in np.flatnonzero(sure & (f.kind != HIT)):
        own = f.detections_of(f.image[i])
        better = own[(f.label[own] == f.label[i]) & (f.score[own] > f.score[i])]
        duplicates += bool((overlap(f.box[i : i + 1], f.box[better]) > iou).any())
    return duplicates / max(1, int(sure.sum()))


# What each kind costs


def costs(findings):
    """-> AP50, {kind: by how much it would rise without these mistakes}.

    Without them, a detection of the wrong class or location is right if its object is free and no better one is like
    it, and otherwise gone; duplicates and those of background are gone; missed objects do not count.
    """
    f = findings
    counted = f.kind != IGNORED
    hits, is_correctable = f.kind == HIT, np.isin(f.kind, (CLASS, LOCATION)) & (f.object >= 0)
    is_correctable &= ~np.isfinite(f.found_at[f.object])
    best = best_of_each(f.object, f.score, is_correctable)
    positives = np.bincount(f.object_label, minlength=len(f.classes))
    missed = ~np.isfinite(f.found_at)
    missed[f.object[is_correctable]] = False
    ap50 = mean_precision(f.label[counted], f.score[counted], hits[counted], positives)
    gains = {}
    for number, kind in enumerate(KINDS):
        of_kind = f.kind == number
        label, right = (
            np.where(of_kind & best & (number == CLASS), f.object_label[f.object], f.label),
            hits | of_kind & best,
        )
        keep = counted & (~of_kind | best)
        left = positives - np.bincount(f.object_label[missed], minlength=len(positives)) * (number == MISSED)
        gains[kind] = max(0.0, mean_precision(label[keep], f.score[keep], right[keep], left) - ap50)
    return ap50, gains


def best_of_each(groups, scores, allowed):
    """(D,) groups, scores and a mask -> a mask of the best allowed one of each group."""
    order = np.flatnonzero(allowed)[scores[allowed].argsort()[::-1]]
    best = np.zeros(len(groups), dtype=bool)
    best[order[np.unique(groups[order], return_index=True)[1]]] = True
    return best


def mean_precision(labels, scores, hits, positives):
    """AP at one IoU as COCO computes it, precision at 101 recalls, averaged over the classes that have objects."""
    order = scores.argsort()[::-1]
    labels, hits = labels[order], hits[order]
    values = []
    for label in np.flatnonzero(positives):
        right = hits[labels == label].cumsum()
        precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
        places = np.searchsorted(right / positives[label], np.linspace(0, 1, 101))
        values.append(precision[places[places < len(precision)]].sum() / 101)
    return float(np.mean(values)) if values else 0.0


# From which score on to detect


def best_threshold(scores, hits, positives):
    """(D,) scores and hits, and how many objects there are -> the score at which F1 is highest, and that F1."""
    if not len(scores) or not positives:
        return None, 0.0
    order = scores.argsort()[::-1]
    scores, right = scores[order], hits[order].cumsum()
    f1 = 2 * right / (np.arange(1, len(right) + 1) + positives)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold can't part equal scores
    place = int(f1.argmax())
    below = scores[place + 1] if place + 1 < len(scores) else 0.0
    return float((scores[place] + below) / 2), float(f1[place])


def f1_score(scores, hits, positives, threshold):
    sure = scores >= threshold
    return 2 * hits[sure].sum() / max(1, sure.sum() + positives)


def find_thresholds(findings):
    """-> {"score": the threshold with the best F1, "f1": that, "by_class": {name: threshold}}.

    A class has a threshold of its own only if that gains on images that it was not found on: on average over HALVINGS
    random halves of the images, and in more of them than not.
    """
    f = findings
    counted = f.kind != IGNORED
    image, label, score, hits = f.image[counted], f.label[counted], f.score[counted], f.kind[counted] == HIT
    common, best = best_threshold(score, hits, len(f.object_label))
    if not best:
        return {"score": DEFAULT, "f1": 0.0, "by_class": {}}
    splits = []  # (mask of half of the images, the best common score in it)
    for half in halves(f, HALVINGS):
        splits.append((half, best_threshold(score[half[image]], hits[half[image]], half[f.object_image].sum())[0]))
    by_class = {}
    for number in np.unique(f.object_label):
        own, objects = label == number, f.object_image[f.object_label == number]
        parts = image[own], score[own], hits[own]
        gains = [gain_of_own_threshold(*parts, objects, half, shared) for half, shared in splits]
        gains = np.array([gain for gain in gains if gain is not None])
        if len(gains) and gains.mean() > 0 and (gains > 0).mean() > 0.5:
            by_class[f.classes[number]], _ = best_threshold(*parts[1:], len(objects))
    return {"score": common, "f1": best, "by_class": by_class}


def gain_of_own_threshold(image, score, hits, objects, half, shared):
    """How much F1 a class gains in one half of the images by the threshold that is best for it in the other.

    image, score, hits: of its detections; objects: the images of its objects; half: a mask over the images; shared: the
    threshold of all classes. None if there is nothing to compare.
    """
    mine, other = half[image], ~half[image]
    own, _ = best_threshold(score[mine], hits[mine], half[objects].sum())
    count = (~half[objects]).sum()
    if own is None or shared is None or not count:
        return None
    return f1_score(score[other], hits[other], count, own) - f1_score(score[other], hits[other], count, shared)


def describe_thresholds(thresholds):
    """find_thresholds -> a line."""
    own = "".join(f", {name} from {score:.2f} on" for name, score in thresholds["by_class"].items())
    return f"best F1 {thresholds['f1']:.3f}: detections from a score of {thresholds['score']:.2f} on{own}"


def halves(findings, count):
    """Random halves of the images, as masks over them; always the same."""
    images = 1 + max(findings.image.max(initial=0), findings.object_image.max(initial=0))
    rng = np.random.default_rng(0)
    return [rng.permutation(images) < images / 2 for _ in range(count)]


def doubt(scores, threshold):
    """The scores (D,) of all detections in an image -> how near to the threshold they are on average, 1: all are at it.

    Those below a quarter of it are background without doubt.
    """
    near = scores[scores >= threshold / 4]
    room = np.where(near > threshold, 1 - threshold, threshold)  # how far a score can be from the threshold
    return float((1 - np.abs(near - threshold) / room).mean()) if len(near) else 0.0
