"""COCO's figures (pycocotools) for a detector; as a script, for a checkpoint on a data set.

    python evaluate.py runs/demo/best.pth                  on the data that it was trained with
    python evaluate.py runs/mine/best.pth --data DIR
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

import plots
from checkpoint import load_detector
from datasets import DetectionDataset, collate, proportions_of, read_image, start_worker
from distributed import from_first, gathered, is_first
from errors import UserError, run
from layouts import load_splits
from mistakes import confusion, find_cases, worst
from transforms import eval_transforms
from weights import Offline

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")  # fmt: skip
MANY = 20_000  # detections, from which on several processes pay


@torch.no_grad()
def evaluate(model, postprocess, loader, split, device, stopped=lambda: False):
    """-> figures and curves, see measure, and {index: detections on the CPU}. Of several processes each has a part of the pictures, and
    all get the figures of the whole. stopped: asked before every batch; where it says so -> three times None."""
    model.eval()
    found = {}
    for images, mask, targets in loader:
        if stopped():
            return None, None, None
        outputs = model(images.to(device, memory_format=torch.channels_last, non_blocking=True), mask)
        sizes = torch.stack([t["orig_size"] for t in targets]).to(device)
        for target, detections in zip(targets, postprocess(outputs, sizes)):
            found[target["image_id"]] = {key: value.cpu() for key, value in detections.items()}
    found = gathered(found)
    return *from_first(measure(split, found) if is_first() else None), found


def measure(split, found):
    """-> COCO's twelve figures, -1 where there is nothing to measure, as in pycocotools, and AP by class under "class/NAME"; and for each
    class that has objects {name: (AP50, precision at 101 recalls)}. found: {index of the record: detections, xyxy pixels}.

    Each class is measured on its own, in as many processes as there are cores where there is much to do.
    """
    objects = defaultdict(list)
    for annotation in annotations_of(split):
        objects[annotation["category_id"]].append(annotation)
    rows = result_rows(found)
    if not len(rows) or not objects:
        return dict.fromkeys(NAMES, -1.0 if len(rows) else 0.0), {}
    labels = sorted(objects, key=lambda label: -len(objects[label]))  # the longest first
    rows_of = lambda label: rows[slice(*np.searchsorted(rows[:, 6], (label, label + 1)))]
    parts = in_processes(class_curves, [(objects[label], rows_of(label)) for label in labels], len(rows))

    whole = COCOeval(iouType="bbox")
    p = whole.params
    shape = len(p.iouThrs), len(p.recThrs), len(split.classes), len(p.areaRng), len(p.maxDets)
    whole.eval = {"precision": np.full(shape, -1.0), "recall": np.full(shape[:1] + shape[2:], -1.0)}
    for label, (precision, recall) in zip(labels, parts):
        whole.eval["precision"][:, :, label], whole.eval["recall"][:, label] = precision, recall
    with contextlib.redirect_stdout(io.StringIO()):
        whole.summarize()
    figures, curves = dict(zip(NAMES, whole.stats.tolist())), {}
    for i, name in enumerate(split.classes):
        precision = whole.eval["precision"][:, :, i, 0, -1]
        figures[f"class/{name}"] = float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0
        if (precision > -1).any():
            curves[name] = float(precision[0].mean()), precision[0].tolist()
    return figures, curves


def result_rows(found):
    """All detections (D, 7), class after class: picture, x, y, width, height, score, class, as COCO.loadRes takes them."""
    if not found:
        return np.zeros((0, 7))
    boxes, scores, labels = (torch.cat([d[key] for d in found.values()]).double().numpy() for key in ("boxes", "scores", "labels"))
    pictures = np.repeat(list(found), [len(d["scores"]) for d in found.values()])
    rows = np.column_stack([pictures, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels])
    return rows[labels.argsort(kind="stable")]


def class_curves(task):
    """(a class's annotations, its rows) -> precision (IoUs, recalls, areas, limits) and recall (IoUs, areas, limits) of pycocotools."""
    annotations, rows = task
    images = sorted({*(a["image_id"] for a in annotations), *rows[:, 0].astype(int).tolist()})
    with contextlib.redirect_stdout(io.StringIO()), no_collection():
        truth, nothing = (coco_of(images, {annotations[0]["category_id"]: ""}, those) for those in (annotations, []))
        evaluation = COCOeval(truth, truth.loadRes(rows) if len(rows) else nothing, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def in_processes(function, tasks, detections):
    """[function(task)]; forked processes share the tasks where there are so many detections that it pays."""
    count = min(len(os.sched_getaffinity(0)), len(tasks)) if sys.platform == "linux" and detections > MANY else 1
    if count > 1:
        try:
            with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), start_worker) as pool:
                return list(pool.map(function, tasks))
        except BrokenProcessPool:  # one was killed, for want of memory perhaps
            pass
    return [function(task) for task in tasks]


@contextlib.contextmanager
def no_collection():
    """Looking for garbage among millions of new dictionaries takes a seventh of the time, and there is none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def draw_report(split, found, curves, folder):
    """Writes precision_recall.png, confusion.png and, where there are mistakes, mistakes.png into folder -> their names."""
    cases = find_cases(split, found)
    plots.draw_precision_recall(curves, folder / "precision_recall.png")
    plots.draw_confusion(confusion(cases, len(split.classes)), split.classes, folder / "confusion.png")
    shown = worst(cases)
    if shown:
        load = lambda index: read_image(split.records[index].path, split.records[index].upright)
        plots.draw_cases(shown, load, split.classes).save(folder / "mistakes.png")
    return ["precision_recall.png", "confusion.png"] + ["mistakes.png"] * bool(shown)


def annotations_of(split):
    """Split -> COCO's annotations: picture ids are indices of the records, category ids those of the classes."""
    annotations = []
    for index, record in enumerate(split.records):
        for box, label, area, ignored in zip(record.boxes, record.labels, record.areas, record.ignored):
            x1, y1, x2, y2 = box.tolist()
            annotations.append({
                "id": len(annotations) + 1, "image_id": index, "category_id": int(label), "area": float(area),
                "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(ignored),
            })  # fmt: skip
    return annotations


def coco_of(images, classes, annotations):
    """Picture ids, {category id: name} and annotations -> pycocotools.COCO."""
    coco = COCO()
    categories = [{"id": label, "name": name} for label, name in classes.items()]
    coco.dataset = {"info": {}, "images": [{"id": i} for i in images], "annotations": annotations, "categories": categories}
    coco.createIndex()
    return coco


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="best.pth or last.pth of a run")
    parser.add_argument("--data", metavar="DIR", help="a data set (default: that of the run)")
    parser.add_argument("--val-split", metavar="NAME", help="its part to evaluate on")
    parser.add_argument("--allow-outside", action="store_true", help="files of the data may lie outside of DIR, through links or absolute paths")
    parser.add_argument("--image-size", type=int, metavar="S", help="shortest side (default: that of the run)")
    parser.add_argument("--pictures", metavar="DIR", help="also draws precision over recall, which class was taken for which, and the worst mistakes")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, postprocess, content = load_detector(arguments.checkpoint, device)
    config = content["config"]
    data = arguments.data or config.get("data")
    if data is None:
        raise UserError(f"{arguments.checkpoint} does not say what data it was trained with; give --data DIR")
    _, split = load_splits(
        data, config.get("train_split"), arguments.val_split or config.get("val_split"), layout=None if arguments.data else config.get("layout"),
        val_fraction=config.get("val_fraction", 0.2), allow_outside=arguments.allow_outside or (not arguments.data and config.get("allow_outside", False)),
    )  # fmt: skip
    if split.classes != content["classes"]:
        raise UserError(f"the data's classes {split.classes[:5]} are not the checkpoint's {content['classes'][:5]}")
    data = DetectionDataset(split, eval_transforms(arguments.image_size or config["image_size"], config.get("square", False)))
    order = proportions_of(split).argsort(stable=True).tolist()  # like beside like: less padding
    loader = DataLoader(data, batch_size=arguments.batch_size, sampler=order, collate_fn=partial(collate, divisor=model.backbone.size_divisor))
    figures, curves, found = evaluate(model, postprocess, loader, split, device)
    for name, value in figures.items():
        print(f"{name:24s} {value:.3f}" if value >= 0 else f"{name:24s} -")
    if arguments.pictures:
        folder = Path(arguments.pictures)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{', '.join(draw_report(split, found, curves, folder))} are in {folder}")
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror or error})") from None


if __name__ == "__main__":
    run(main)
