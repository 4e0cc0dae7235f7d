"""COCO's figures (pycocotools) for a detector; as a script, for a checkpoint on a data set.

    python evaluate.py runs/demo/best.pth                  on the data that it was trained with
    python evaluate.py runs/mine/best.pth --data DIR
    python evaluate.py runs/mine/best.pth --doubles
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

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet then runs on the CPU
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

import plots
from checkpoint import load_detector
from datasets import DetectionDataset, collate, evaluation_batches, read_image, start_worker
from devices import PRECISIONS, autocast, choose_device, choose_precision
from distributed import from_first, gathered, is_first
from errors import UserError, run
from layouts import LAYOUTS, load_splits
from mistakes import confusion, doubles, find_cases, suppressed, worst
from transforms import eval_transforms
from weights import Offline

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")  # fmt: skip
COCO_LIMIT = 100  # detections of a class in an image that COCO's AP counts
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

    COCO counts the 100 best detections of a class in an image. Where an image has more objects of one, there is "AP_all" as well,
    the AP of all detections. Each class is measured on its own, in as many processes as there are cores where there is much to do.
    """
    objects = defaultdict(list)
    for annotation in annotations_of(split):
        objects[annotation["category_id"]].append(annotation)
    rows = result_rows(found)
    if not len(rows) or not objects:
        return dict.fromkeys(NAMES, -1.0 if len(rows) else 0.0), {}
    limits = [1, 10, COCO_LIMIT]
    if most_of_a_class(split) > COCO_LIMIT:
        limits.append(max(COCO_LIMIT + 1, *(len(d["scores"]) for d in found.values())))
    labels = sorted(objects, key=lambda label: -len(objects[label]))  # the longest first
    rows_of = lambda label: rows[slice(*np.searchsorted(rows[:, 6], (label, label + 1)))]
    parts = in_processes(class_curves, [(objects[label], rows_of(label), limits) for label in labels], len(rows))

    whole = COCOeval(iouType="bbox")
    p = whole.params
    p.maxDets = limits
    shape = len(p.iouThrs), len(p.recThrs), len(split.classes), len(p.areaRng), len(p.maxDets)
    whole.eval = {"precision": np.full(shape, -1.0), "recall": np.full(shape[:1] + shape[2:], -1.0)}
    for label, (precision, recall) in zip(labels, parts):
        whole.eval["precision"][:, :, label], whole.eval["recall"][:, label] = precision, recall
    with contextlib.redirect_stdout(io.StringIO()):
        whole.summarize()
    figures, curves = dict(zip(NAMES, whole.stats.tolist())), {}
    if len(limits) > 3:
        figures["AP_all"] = average_precision(whole.eval["precision"][:, :, :, 0, 3])
    for i, name in enumerate(split.classes):
        precision = whole.eval["precision"][:, :, i, 0, 2]
        figures[f"class/{name}"] = average_precision(precision)
        if (precision > -1).any():
            curves[name] = float(precision[0].mean()), precision[0].tolist()
    return figures, curves


def average_precision(precision):
    """Precision at all thresholds and recalls, -1 where there are no objects -> its mean, -1 where there are none at all."""
    measured = precision > -1
    return float(precision[measured].mean()) if measured.any() else -1.0


def most_of_a_class(split):
    """The most objects of one class in an image."""
    counts = (np.bincount(r.labels[~r.ignored]).max() for r in split.records if not r.ignored.all())
    return int(max(counts, default=0))


def crowding(split):
    """A line that says that COCO's AP can't count all objects of a Split, or None."""
    most = most_of_a_class(split)
    if most > COCO_LIMIT:
        return (
            f"an image has {most} objects of one class, COCO's AP counts the {COCO_LIMIT} best detections of a class in an image: "
            "AP_all, which counts all, is given too"
        )
    return None


def result_rows(found):
    """All detections (D, 7), class after class: picture, x, y, width, height, score, class, as COCO.loadRes takes them."""
    if not found:
        return np.zeros((0, 7))
    boxes, scores, labels = (torch.cat([d[key] for d in found.values()]).double().numpy() for key in ("boxes", "scores", "labels"))
    pictures = np.repeat(list(found), [len(d["scores"]) for d in found.values()])
    rows = np.column_stack([pictures, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels])
    return rows[labels.argsort(kind="stable")]


def class_curves(task):
    """(a class's annotations, its rows, how many detections count) -> precision (IoUs, recalls, areas, limits) and recall (IoUs, areas, limits) of pycocotools."""
    annotations, rows, limits = task
    images = sorted({*(a["image_id"] for a in annotations), *rows[:, 0].astype(int).tolist()})
    with contextlib.redirect_stdout(io.StringIO()), no_collection():
        truth, nothing = (coco_of(images, {annotations[0]["category_id"]: ""}, those) for those in (annotations, []))
        evaluation = COCOeval(truth, truth.loadRes(rows) if len(rows) else nothing, "bbox")
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def in_processes(function, tasks, detections):
    """[function(task)]; several processes share the tasks where there are so many detections that it pays. They are forked, or
    where a GPU is in use, whose threads a fork can't take along, started anew."""
    way, pays = ("spawn", 20 * MANY) if torch.cuda.is_initialized() else ("fork", MANY)  # a new process imports all for 5 s
    count = min(len(os.sched_getaffinity(0)), len(tasks), 16) if sys.platform == "linux" and detections > pays else 1
    if count > 1:
        context = multiprocessing.get_context(way)
        try:
            with ProcessPoolExecutor(count, context, start_worker) as pool:
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
    parser.add_argument("--layout", choices=LAYOUTS, help="of --data (default: by looking)")
    parser.add_argument("--val-split", metavar="NAME", help="its part to evaluate on (default: that of the run)")
    parser.add_argument("--train-split", metavar="NAME", help="its other part, where the classes of both count (default: that of the run)")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out pictures that can't be read")
    parser.add_argument("--allow-outside", action="store_true", help="files of the data may lie outside of DIR, through links or absolute paths")
    parser.add_argument("--image-size", type=int, metavar="S", help="shortest side (default: that of the run)")
    parser.add_argument("--pictures", metavar="DIR", help="also draws precision over recall, which class was taken for which, and the worst mistakes")
    parser.add_argument("--doubles", action="store_true", help="also says how many objects are detected twice, and what non-maximum suppression would give")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="default: float32 on CPUs, bfloat16 or float16 on GPUs that are fast at it")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if arguments.layout and not arguments.data:
        raise UserError(f"--layout {arguments.layout}: is for --data; the run's own data is read as it was for training")
    device = choose_device()
    precision = choose_precision(arguments.precision, device, training=False)
    model, postprocess, content = load_detector(arguments.checkpoint, device)
    config = content["config"]
    of_run = {} if arguments.data else config  # what was let in there says nothing about other data
    data = arguments.data or config.get("data")
    if data is None:
        raise UserError(f"{arguments.checkpoint} does not say what data it was trained with; give --data DIR")
    _, split = load_splits(
        data, arguments.train_split or config.get("train_split"), arguments.val_split or config.get("val_split"),
        arguments.skip_bad_images or of_run.get("skip_bad_images", False), arguments.layout or of_run.get("layout"),
        config.get("val_fraction"), arguments.allow_outside or of_run.get("allow_outside", False), only_val=True,
    )  # fmt: skip
    if split.layout == "json" and (arguments.val_split or arguments.train_split):
        raise UserError(f"--val-split, --train-split: {data} is a single COCO file; it is split as it was for training")
    if split.classes != content["classes"]:
        raise UserError(f"the data's classes {split.classes[:5]} are not the checkpoint's {content['classes'][:5]}")
    form = arguments.image_size or config["image_size"], config.get("square", False), config["exact_sides"]
    divisor = model.backbone.size_divisor
    loader = DataLoader(
        DetectionDataset(split, eval_transforms(*form)), collate_fn=partial(collate, divisor=divisor),
        batch_sampler=evaluation_batches(split, arguments.batch_size, divisor, *form),
    )  # fmt: skip
    with autocast(precision, device):
        figures, curves, found = evaluate(model, postprocess, loader, split, device)
    if crowding(split):
        print(crowding(split))
    for name, value in figures.items():
        print(f"{name:24s} {value:.3f}" if value >= 0 else f"{name:24s} -")
    if arguments.doubles:
        print(f"of the detections with a score of 0.4 or more, {doubles(split, found):.1%} are doubles: a better one of their class overlaps them by an IoU over 0.7, and there is no second object")
        for iou in (0.5, 0.6, 0.7, 0.8, 0.9):
            fewer = measure(split, suppressed(found, iou))[0]
            print(f"NMS at IoU {iou}: " + ", ".join(f"{name} {fewer[name]:.3f} ({fewer[name] - figures[name]:+.3f})" for name in ("AP", "AP50")))
    if arguments.pictures:
        folder = Path(arguments.pictures)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{', '.join(draw_report(split, found, curves, folder))} are in {folder}")
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror or error})") from None


if __name__ == "__main__":
    run(main)
