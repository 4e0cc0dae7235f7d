"""What a detector got wrong: which class it took for which, what it saw where nothing is, what it missed."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import batched_nms, box_iou


@dataclass
class Case:
    """A detection and the object that it was matched with, either of which may be missing (None). index: the picture's in its split."""

    index: int
    truth: int | None
    detected: int | None
    score: float
    box: list[float]  # xyxy pixels, the detection's, or the missed object's


def find_cases(split, found, threshold=0.4, iou=0.5):
    """split: layouts.Split; found: {index: detections} of evaluate.evaluate -> [Case] with the detections of at least `threshold`.

    Best first, a detection takes the object of its class that it overlaps most, by `iou` at least; those left over then take what is
    left of other classes. Detections over crowds and difficult objects alone are left out.
    """
    cases = []
    for index, record in enumerate(split.records):
        detections = found.get(index)
        keep = detections["scores"] >= threshold
        scores, labels, boxes = (detections[key][keep].cpu() for key in ("scores", "labels", "boxes"))
        truth, classes = torch.from_numpy(record.boxes).float(), torch.from_numpy(record.labels)
        ignored = torch.from_numpy(record.ignored)
        overlap = box_iou(boxes, truth) if len(truth) else torch.zeros(len(boxes), 0)
        pairs, taken = {}, set()
        for same_class in (True, False):
            for i in scores.argsort(descending=True).tolist():
                options = [j for j in range(len(truth)) if j not in taken and not ignored[j] and overlap[i, j] >= iou and (classes[j] == labels[i] or not same_class)]
                if i not in pairs and options:
                    pairs[i] = max(options, key=lambda j: overlap[i, j])
                    taken.add(pairs[i])
        for i in range(len(boxes)):
            if i not in pairs and ignored.any() and (overlap[i, ignored] >= iou).any():
                continue
            cases.append(Case(index, int(classes[pairs[i]]) if i in pairs else None, int(labels[i]), float(scores[i]), boxes[i].tolist()))
        cases += [Case(index, int(classes[j]), None, 0.0, truth[j].tolist()) for j in range(len(truth)) if j not in taken and not ignored[j]]
    return cases


def confusion(cases, classes):
    """-> (K + 1, K + 1) counts: rows are what objects are, columns what they were taken for; the last of each is "nothing"."""
    counts = np.zeros((classes + 1, classes + 1), dtype=int)
    for case in cases:
        counts[classes if case.truth is None else case.truth, classes if case.detected is None else case.detected] += 1
    return counts


def worst(cases, count=12):
    """-> [Case]: the surest detections of what is not there or is something else, and the largest missed objects, half of each."""
    area = lambda case: (case.box[2] - case.box[0]) * (case.box[3] - case.box[1])
    wrong = sorted((c for c in cases if c.detected is not None and c.detected != c.truth), key=lambda c: -c.score)
    missed = sorted((c for c in cases if c.detected is None), key=area, reverse=True)
    return wrong[: count // 2] + missed[: count // 2]


def doubles(split, found, threshold=0.4, iou=0.7):
    """-> share of the detections of at least `threshold` that a better one of their class overlaps by more than `iou`, with no object
    of their own to show for it. Arguments as find_cases takes them."""
    cases = [case for case in find_cases(split, found, threshold) if case.detected is not None]
    double = 0
    for case in cases:
        if case.truth != case.detected:
            detections = found[case.index]
            better = detections["boxes"][(detections["scores"] > case.score) & (detections["labels"] == case.detected)]
            double += bool((box_iou(torch.tensor([case.box]), better.cpu()) > iou).any())
    return double / max(1, len(cases))


def suppressed(found, iou):
    """The same detections after non-maximum suppression within each class."""
    kept = {index: batched_nms(d["boxes"], d["scores"], d["labels"], iou) for index, d in found.items()}
    return {index: {key: value[kept[index]] for key, value in d.items()} for index, d in found.items()}
