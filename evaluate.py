"""COCO's figures (pycocotools) for a detector, and its mistakes; as a script, for a checkpoint on a dataset.

python evaluate.py runs/demo/best.pth                      on the data of the run
python evaluate.py runs/mine/best.pth --data DIR
python evaluate.py runs/mine/best.pth --doubles
python evaluate.py runs/mine/best.pth --report             report.html, for any browser
python evaluate.py runs/mine/best.pth --pictures DIR
"""

import argparse
import os
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that Apple's GPUs lack run on the CPU
import numpy as np
import torch
from torchvision.ops import batched_nms

from checkpoint import data_of, load_detector
from datasets import DetectionDataset, collate, evaluation_batches
from detector import check_options, load
from devices import PRECISIONS, ahead, autocast, choose_device, choose_precision
from distributed import all_gather, broadcast, is_main_process
from errors import Offline, UserError, run_script, writing
from layouts import LAYOUTS, load_splits
from metrics import crowding, measure
from mistakes import (
    DEFAULT,
    DUPLICATE_IOU,
    describe_thresholds,
    doubles,
    find_thresholds,
    judge,
)
from report import draw_report, write_report
from splits import NoSuchSplit
from tiles import cut_into_tiles, join_tiles
from transforms import allow_large_images, eval_transforms, read_image

LOWEST_SCORE = 0.01  # of detections in tiles; there are many tiles


@torch.no_grad()
def evaluate(model, postprocess, loader, split, device, stop=None):
    """Runs a model on a split -> (figures, curves, {record index: detections on the CPU}); see metrics.measure.

    With several processes, each one gets a part of the images, and all return the figures of the whole split.
    stop: called before every batch; once it returns True, the result is (None, None, None).
    Of a Split of tiles, the result is that of the whole images.
    """
    model.eval()
    found = {}
    for images, mask, targets in loader:
        if stop is not None and stop():
            return None, None, None
        outputs = model(images.to(device, memory_format=torch.channels_last, non_blocking=True), mask)
        sizes = torch.stack([t["orig_size"] for t in targets]).to(device)
        for target, detections in zip(targets, postprocess(outputs, sizes)):
            if split.whole is not None:
                sure = detections["scores"] >= LOWEST_SCORE
                detections = {key: value[sure] for key, value in detections.items()}
            found[target["image_id"]] = {key: value.cpu() for key, value in detections.items()}
    found = all_gather(found)
    if split.whole is not None:  # which takes a while, so once is enough
        split, found = split.whole, join_all(split, found) if is_main_process() else {}
    figures, curves = broadcast(measure(split, found) if is_main_process() else None)
    return figures, curves, found


def join_all(tiles, found):
    """A Split of tiles and the detections in them {index: ...} -> those in the whole images {record index: ...}."""
    parts = defaultdict(list)
    for index, tile in enumerate(tiles.records):
        parts[tile.whole].append((tile.tile, found[index]))
    sizes = [(record.width, record.height) for record in tiles.whole.records]
    return {index: join_tiles(parts[index], *size, tiles.side) for index, size in enumerate(sizes)}


# Duplicates


def suppressed(found, iou):
    """The same detections after non-maximum suppression (NMS) within each class."""
    survivors = {}
    for index, detections in found.items():
        keep = batched_nms(detections["boxes"], detections["scores"], detections["labels"], iou)
        survivors[index] = {key: value[keep] for key, value in detections.items()}
    return survivors


# The script


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="best.pth or last.pth of a run")
    parser.add_argument("--data", metavar="DIR", help="a dataset (default: that of the run)")
    parser.add_argument("--layout", choices=LAYOUTS, help="of --data (default: recognised by its files)")
    parser.add_argument("--val-split", metavar="NAME", help="the split to evaluate on (default: that of the run)")
    parser.add_argument(
        "--train-split",
        metavar="NAME",
        help="the training split, needed if the classes are those of both splits (default: that of the run)",
    )
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out images that can't be read")
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="allow files of the dataset outside of DIR, through links or absolute paths",
    )
    parser.add_argument(
        "--large-images",
        action="store_true",
        help="open images that look like decompression bombs, such as large scans",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="S", help="shortest side in pixels (default: that of the run)"
    )
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="also draw precision-recall curves, the confusion matrix and the worst mistakes into this folder",
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="report.html",
        metavar="FILE",
        help="also write a page with the figures, and the images with their mistakes (default: report.html)",
    )
    parser.add_argument(
        "--doubles",
        "--duplicates",
        action="store_true",
        help="also print the fraction of duplicate detections, and the figures after non-maximum suppression (NMS)",
    )
    parser.add_argument("--batch-size", type=int, metavar="B", help="images at a time (default 8)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", *PRECISIONS],
        help="default: float32 on CPUs, bfloat16 or float16 on GPUs that are fast at it",
    )
    parser.add_argument("--offline", action=Offline)
    return parser


def load_run_splits(checkpoint, content, data=None, only_val=True, **options):
    """The data of a checkpoint's run, or other data -> [training Split, validation Split]; options: those of
    layouts.load_splits, and large_images. Raises UserError."""
    config, trained_on = content["config"], content["config"].get("trained_on")
    of_run = {} if data else config  # these settings of the run say nothing about other data
    own = data_of(config, Path(checkpoint).parent)
    folder, is_own = data or own, not data or own is not None and os.path.realpath(data) == os.path.realpath(own)
    if folder is None:
        raise UserError(f"{checkpoint} does not say what data it was trained with; give --data DIR")
    allow_large_images(options.pop("large_images", False) or of_run.get("large_images", False))
    read = partial(
        load_splits,
        folder,
        skip_bad_images=options.get("skip_bad_images") or of_run.get("skip_bad_images", False),
        layout=options.get("layout") or of_run.get("layout"),
        val_fraction=config.get("val_fraction"),
        allow_outside=options.get("allow_outside") or of_run.get("allow_outside", False),
        only_val=only_val,
        classes=config.get("classes"),
        single_class=config.get("single_class", False),
        trained_on=None if is_own or not only_val else trained_on,
    )
    asked = [options.get(key) for key in ("train_split", "val_split")]
    try:
        splits = read(asked[0] or config.get("train_split"), asked[1] or config.get("val_split"))
    except NoSuchSplit:
        if not data or any(asked):
            raise
        splits = read()  # other data, whose splits have other names than the run's
    if is_own and trained_on not in (None, splits[0].fingerprint):
        print(f"warning: {folder}: the training images are no longer those of {checkpoint}; others may be among these")
    for split in splits[1:] if only_val else splits:
        match_classes(split, content, folder)
        split.value_range = config.get("value_range")
    return splits


def match_classes(split, content, folder):
    """Gives a Split the classes of a checkpoint, whose names are the same, in place. Raises UserError."""
    names, known = split.classes, {name: label for label, name in enumerate(content["classes"])}
    if names == content["classes"]:
        return
    used = sorted({int(label) for record in split.records for label in record.labels})
    unknown = [names[label] for label in used if names[label] not in known]
    if unknown or len(known) < len(content["classes"]) or len(set(names)) < len(names):
        unknown = unknown or names
        raise UserError(
            f"{folder}: its classes are not those of the checkpoint; it has {', '.join(unknown[:10])}, "
            f"the checkpoint {', '.join(content['classes'][:10])}"
        )
    new_labels = np.array([known.get(name, -1) for name in names])
    for record in split.records:
        record.labels = new_labels[record.labels]
    split.classes, split.category_ids = content["classes"], content["category_ids"]


def load_split(arguments, content):
    """The Split that the command line asks for, see load_run_splits."""
    keys = "data", "large_images", "train_split", "val_split", "skip_bad_images", "layout", "allow_outside"
    options = {key: getattr(arguments, key) for key in keys}
    return load_run_splits(arguments.checkpoint, content, **options)[1]


def batches_of(split, arguments, config, divisor, device):
    """Yields the batches of a Split; divisor: of their sides. Threads open the next images, so that no GPU waits."""
    resizing = arguments.image_size or config["image_size"], config.get("square", False), config["exact_sides"]
    dataset = DetectionDataset(split, eval_transforms(*resizing))
    batches = evaluation_batches(split, arguments.batch_size or 8, divisor, *resizing)
    # Tiles of an image share it, so they come from one thread; on a CPU the network needs the others.
    threads = 4 if device.type != "cpu" and split.whole is None else 1
    return ahead(lambda batch: collate(dataset.__getitems__(batch), divisor), batches, threads)


def print_figures(figures):
    for name, value in figures.items():
        print(f"{name:24s} {value:.3f}" if value >= 0 else f"{name:24s} -")


def print_duplicates(split, found, findings, figures):
    """Prints the fraction of duplicates, and the change that NMS would make to figures."""
    print(
        f"of the detections with a score of at least {DEFAULT}, {doubles(findings):.1%} are duplicates: "
        f"a better one of the same class overlaps them by an IoU over {DUPLICATE_IOU}, and there is no second object"
    )
    for iou in (0.5, 0.6, 0.7, 0.8, 0.9):
        after_nms, _ = measure(split, suppressed(found, iou))
        changes = [f"{name} {after_nms[name]:.3f} ({after_nms[name] - figures[name]:+.3f})" for name in ("AP", "AP50")]
        print(f"NMS at IoU {iou}: {', '.join(changes)}")


def evaluate_checkpoint(arguments, device):
    """-> the Split, and evaluate's figures, curves and detections in it."""
    precision = choose_precision(arguments.precision, device, training=False)
    model, postprocess, content = load_detector(arguments.checkpoint, device)
    split = load_split(arguments, content)
    side = content["config"].get("tile")
    shown = cut_into_tiles(split, side, for_training=False) if side else split
    loader = batches_of(shown, arguments, content["config"], model.backbone.size_divisor, device)
    with autocast(precision, device):
        figures, curves, found = evaluate(model, postprocess, loader, shown, device)
    return split, figures, curves, found


def evaluate_exported(arguments):
    """The same for a file of export.py, and prints how long an image takes. Raises UserError."""
    if not arguments.data:
        raise UserError(f"{arguments.checkpoint}: does not say what data it was trained with; give --data DIR")
    if arguments.batch_size is not None:
        raise UserError(f"--batch-size {arguments.batch_size}: an exported file gets image by image; leave it out")
    options = {"image_size": arguments.image_size, "precision": arguments.precision}
    detector = load(arguments.checkpoint, threshold=0.0, **options)
    names = {"classes": detector.classes, "category_ids": detector.category_ids}
    split = load_split(arguments, {"config": detector.about.get("data", {}), **names})
    split.value_range = detector.value_range
    figures, curves, found, seconds = evaluate_one_by_one(detector, split)
    print(f"{arguments.checkpoint}: {1000 * seconds:.1f} ms an image")
    return split, figures, curves, found


def evaluate_one_by_one(detector, split):
    """-> measure's figures and curves of a Detector, its detections, the median seconds of an image."""
    if detector.tile:
        detector.threshold = LOWEST_SCORE
    found, seconds = {}, []
    for index, record in enumerate(split.records):
        image = read_image(record.path, record.upright, value_range=split.value_range)
        started = time.perf_counter()
        found[index] = detector(image)
        del found[index]["names"]
        seconds.append(time.perf_counter() - started)
    return *measure(split, found), found, float(np.median(seconds))


def main():
    arguments = build_parser().parse_args()
    if arguments.layout and not arguments.data:
        raise UserError(
            f"--layout {arguments.layout}: is for --data; the run's own data is read as it was for training"
        )
    check_options(arguments.image_size, None)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: has to be at least 1")
    device = choose_device()
    if Path(arguments.checkpoint).suffix in (".onnx", ".pt2"):
        split, figures, curves, found = evaluate_exported(arguments)
    else:
        split, figures, curves, found = evaluate_checkpoint(arguments, device)

    print("\n".join(split.describe()))
    remark = crowding(split)
    if remark:
        print(remark)
    print_figures(figures)
    findings = judge(split, found)
    thresholds = find_thresholds(findings)
    print(describe_thresholds(thresholds))
    if arguments.doubles:
        print_duplicates(split, found, findings, figures)
    if arguments.pictures:
        folder = Path(arguments.pictures)
        with writing(folder, "; choose another --pictures"):
            folder.mkdir(parents=True, exist_ok=True)
            names = draw_report(split, findings, thresholds, curves, folder)
        print(f"{', '.join(names)} are in {folder}")
    if arguments.report:
        with writing(arguments.report, "; choose another --report"):
            write_report(arguments.report, arguments.checkpoint, split, findings, thresholds, figures, curves)
        print(f"{arguments.report}: open it in a browser")


if __name__ == "__main__":
    run_script(main)
