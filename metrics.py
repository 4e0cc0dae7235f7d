"""COCO's figures of detections: those of pycocotools, computed class by class and in several processes."""

import contextlib
import io
import multiprocessing
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch

from distributed import start_worker
from files import garbage_collection_paused

NAMES = "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large".split()


COCO_LIMIT = 100  # detections of a class in an image that COCO's AP counts
MANY = 20_000  # detections from which on several processes pay off


def measure(split, found):
    """Compares detections with a Split's ground truth -> (figures, curves).

    found: {record index: {"boxes" (D, 4) xyxy pixels, "labels" (D,), "scores" (D,)}}.
    figures: COCO's twelve by their NAMES, and AP by class under "class/NAME". As in pycocotools, -1 means that there is
    nothing to measure.
    curves: {name of a class that has objects: (AP50, precision at 101 recalls)}.

    COCO counts the 100 best detections of a class in an image. If an image has more objects of a class, figures also
    has "AP_all", the AP of all detections. Each class is measured on its own, so that several processes can help.
    """
    objects = defaultdict(list)
    for annotation in annotations_of(split):
        objects[annotation["category_id"]].append(annotation)
    rows = result_rows(found)
    if not len(rows) or not objects:
        return dict.fromkeys(NAMES, -1.0 if len(rows) else 0.0), {}

    limits = [1, 10, COCO_LIMIT]
    if most_of_a_class(split) > COCO_LIMIT:
        limits.append(max(COCO_LIMIT + 1, *(len(detections["scores"]) for detections in found.values())))
    labels = sorted(objects, key=lambda label: len(objects[label]), reverse=True)  # the longest tasks start first
    tasks = [(objects[label], rows_of_class(rows, label), limits) for label in labels]
    results = in_processes(class_curves, tasks, len(rows))

    stats, precision = summarize(dict(zip(labels, results)), len(split.classes), limits)
    precision = precision[:, :, :, 0]  # objects of all areas
    figures, curves = dict(zip(NAMES, stats)), {}
    if len(limits) > 3:
        figures["AP_all"] = average_precision(precision[..., 3])
    for label, name in enumerate(split.classes):
        class_precision = precision[:, :, label, 2]
        figures[f"class/{name}"] = average_precision(class_precision)
        if (class_precision > -1).any():
            at_iou50 = class_precision[0]
            curves[name] = float(at_iou50.mean()), at_iou50.tolist()
    return figures, curves


def annotations_of(split):
    """Split -> COCO's annotations; image ids are record indices, category ids are labels."""
    annotations = []
    for index, record in enumerate(split.records):
        for box, label, area, ignored in zip(record.boxes, record.labels, record.areas, record.ignored):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(label),
                    "area": float(area),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": int(ignored),
                }
            )
    return annotations


def result_rows(found):
    """{record index: detections} -> rows (D, 7), sorted by class, as COCO.loadRes takes them.

    A row: image id, x, y, width, height, score, category id.
    """
    if not found:
        return np.zeros((0, 7))
    boxes, scores, labels = (
        torch.cat([detections[key] for detections in found.values()]).double().numpy()
        for key in ("boxes", "scores", "labels")
    )
    images = np.repeat(list(found), [len(detections["scores"]) for detections in found.values()])
    rows = np.column_stack([images, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels])
    return rows[labels.argsort(kind="stable")]


def rows_of_class(rows, label):
    """The slice of result_rows with one class."""
    start, end = np.searchsorted(rows[:, 6], (label, label + 1))
    return rows[start:end]


def most_of_a_class(split):
    """The most objects of one class in an image."""
    counts = (np.bincount(r.labels[~r.ignored]).max() for r in split.records if not r.ignored.all())
    return int(max(counts, default=0))


def crowding(split):
    """A line for the user if a Split has images with more objects than COCO's AP counts, else None."""
    most = most_of_a_class(split)
    if most <= COCO_LIMIT:
        return None
    return (
        f"an image has {most} objects of one class, but COCO's AP counts only the {COCO_LIMIT} best detections of a "
        "class in an image; AP_all counts all of them"
    )


def class_curves(task):
    """(annotations of a class, its result rows, numbers of detections that count) -> pycocotools' precision and recall.

    precision (IoUs, recalls, areas, limits); recall (IoUs, areas, limits).
    """
    from pycocotools.cocoeval import COCOeval  # like scipy and transformers: imported once it is needed

    annotations, rows, limits = task
    images = sorted({*(a["image_id"] for a in annotations), *rows[:, 0].astype(int).tolist()})
    category = {annotations[0]["category_id"]: ""}
    with contextlib.redirect_stdout(io.StringIO()), garbage_collection_paused():
        ground_truth = coco_of(images, category, annotations)
        detections = ground_truth.loadRes(rows) if len(rows) else coco_of(images, category, [])
        evaluation = COCOeval(ground_truth, detections, "bbox")
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def coco_of(images, classes, annotations):
    """Image ids, {category id: name} and annotations -> pycocotools.COCO."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i} for i in images],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in classes.items()],
    }
    coco.createIndex()
    return coco


def in_processes(function, tasks, detections):
    """-> [function(task)]. Several processes share the tasks if there are enough detections for that to pay off."""
    # A fork loses the threads of a GPU in use; a spawned process takes 5 s to import everything.
    spawn = torch.cuda.is_initialized()
    count = 1
    if sys.platform == "linux" and detections > (20 * MANY if spawn else MANY):
        count = min(len(os.sched_getaffinity(0)), len(tasks), 16)
    if count > 1:
        context = multiprocessing.get_context("spawn" if spawn else "fork")
        try:
            with ProcessPoolExecutor(count, context, start_worker) as pool:
                return list(pool.map(function, tasks))
        except BrokenProcessPool:  # a process was killed, perhaps for lack of memory
            pass
    return [function(task) for task in tasks]


def summarize(results, num_classes, limits):
    """{label: class_curves} -> (COCO's twelve figures, precision (IoUs, recalls, K, areas, limits)).

    Precision is -1 for classes without results.
    """
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(iouType="bbox")
    params = evaluation.params
    params.maxDets = limits
    ious, recalls, areas = len(params.iouThrs), len(params.recThrs), len(params.areaRng)
    precision = np.full((ious, recalls, num_classes, areas, len(limits)), -1.0)
    recall = np.full((ious, num_classes, areas, len(limits)), -1.0)
    for label, (class_precision, class_recall) in results.items():
        precision[:, :, label] = class_precision
        recall[:, label] = class_recall
    evaluation.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return evaluation.stats.tolist(), precision


def average_precision(precision):
    """Precision, -1 where there are no objects -> its mean over the other entries, -1 if there are none."""
    measured = precision > -1
    return float(precision[measured].mean()) if measured.any() else -1.0
