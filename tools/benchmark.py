"""Measures how fast a detector is on this machine, with random weights: a training step, and inference on one image.

    python tools/benchmark.py --detector ecdet --size s              training: 16 images of 256x256, inference: 640x640
    python tools/benchmark.py --detector detr --backbone dinov3-vits16
    python tools/benchmark.py --detector ecdet --size s --compile    inference with torch.compile, without its warm-up
    python tools/benchmark.py --peers                                versus other implementations, see peers.py; minutes
    python tools/benchmark.py --peers detr matcher                   versus some of them
    python tools/benchmark.py --growth growth.png --detector detr    how a training step's time grows with its inputs

An image has 5 boxes in a training step. --peers times both implementations in turns in one process, and measures their
memory in a process each. Its ratio is theirs / ours. Its limit is the time that the matrix products of ours would take
at the rate of a large one, as a fraction of our time.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from peers import CLASSES, PAIRS, Ours

import plots
from datasets import DetectionDataset, Draw, collate, group_by_aspect_ratio
from detr_loss import HungarianMatcher
from detr_model import ATTENTION, DETECTORS, build_model
from devices import autocast, choose_device, choose_precision, seconds_of
from distributed import start_worker
from ecdet_model import SIZES
from ecvit import fuse
from errors import UserError, run_script
from metrics import annotations_of, coco_of, measure
from settings import DEFAULTS
from splits import Record, Split
from transforms import MEAN, STD, detail_needed, train_transforms

# What is measured


def build(arguments, device, classes=CLASSES, queries=300):
    """The detector of the command line, with random weights -> model, criterion."""
    backbone = SIZES[arguments.size]["backbone"] if arguments.detector == "ecdet" else "ecvitt"
    config = DEFAULTS | dict(
        detector=arguments.detector,
        size=arguments.size,
        backbone=arguments.backbone or backbone,
        backbone_weights=None,
        num_classes=classes,
        num_queries=queries,
        hidden_dim=256,
        num_heads=8,
        ffn_dim=1024,
        encoder_layers=6,
        num_denoising=arguments.num_denoising,
        decoder_layers={"ecdet": None, "dino": 6}.get(arguments.detector, 3),
        attention=arguments.attention,
        distinct=arguments.distinct,
    )
    model, criterion, _ = build_model(config)
    return model.to(device, memory_format=torch.channels_last), criterion


def random_images(count, side, device):
    """-> images (count, 3, side, side) in channels-last order, mask (count, side, side) without padding."""
    images = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return images, torch.zeros(count, side, side, dtype=torch.bool, device=device)


def random_targets(images, boxes, device, classes=CLASSES):
    """-> [{"labels" (boxes,), "boxes" (boxes, 4)}], one for each of so many images."""
    return [
        {"labels": torch.randint(classes, (boxes,), device=device), "boxes": random_boxes(boxes).to(device)}
        for _ in range(images)
    ]


def random_boxes(count):
    """-> (count, 4) cxcywh in [0, 1]; centres in the middle half of the image, widths and heights 0.1 to 0.4."""
    return torch.cat([0.25 + 0.5 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)], dim=1)


def training_step(contestant, images, mask, targets):
    """Forward and backward pass; the gradients are dropped."""
    contestant(images, mask, targets).backward()
    contestant.zero_grad()


def contestants(name, device):
    """-> (ours, theirs); a batch for training (images, mask, targets); a batch for detection (images, mask)."""
    pair = PAIRS[name]
    models = build_contestants(pair, device)
    images, mask = random_images(pair.train_images, pair.train_side, device)
    targets = random_targets(pair.train_images, 5, device)
    return models, (images, mask, targets), random_images(8, pair.detect_side, device)


def build_contestants(pair, device):
    torch.manual_seed(0)
    ours, theirs = (model.to(device) for model in pair.build())
    return ours.to(memory_format=torch.channels_last), theirs


# Time, operations, memory


def median_seconds(functions, device, repeats, warm_up=2):
    """Calls the functions in turns -> the median time of each."""
    return [statistics.median(seconds) for seconds in seconds_of(functions, repeats, device, warm_up)]


def count_flops(function):
    """Calls the function -> its floating-point operations, two for a multiplication and an addition."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def product_rate(device, n=4096):
    """Operations per second of a large float32 matrix product."""
    a = torch.randn(n, n, device=device)
    return 2 * n**3 / min(seconds_of([partial(torch.matmul, a, a)], 5, device)[0])


def peak_memory(name, which, device):
    """GiB that three training steps of a contestant, "ours" or "theirs", need in addition to what was there before."""
    models, batch, _ = contestants(name, device)
    model = models[which == "theirs"].train()
    del models
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    before = memory_in_use(device)
    for _ in range(3):
        training_step(model, *batch)
    return memory_in_use(device, peak=True) - before


def memory_in_use(device, peak=False):
    """GiB that this process uses of the GPU's memory, or of the CPU's; peak: the most since the last reset."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return allocated / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    kibibytes = fields["VmHWM" if peak else "VmRSS"].split()[0]
    return int(kibibytes) / 2**20


def process_peak_memory(device):
    """The most bytes that this process has used since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# One detector


def measure_detector(arguments, device, precisions):
    """Prints the times of a training step and of inference, in each of the precisions, and the peak memory."""
    model, criterion = build(arguments, device)
    measure_training(model.train(), criterion, arguments, device, precisions)
    print(f"peak memory of the whole process so far: {process_peak_memory(device) / 2**30:.2f} GiB")
    model = fuse(model.eval()).requires_grad_(False)
    measure_inference(model, arguments, device, precisions)


def measure_training(model, criterion, arguments, device, precisions):
    images, mask = random_images(arguments.batch_size, arguments.train_size, device)
    targets = random_targets(arguments.batch_size, 5, device)
    shape = f"{len(images)} x {arguments.train_size}x{arguments.train_size}"
    for precision in precisions:
        step = partial(autocast_step, model, criterion, images, mask, targets, precision)
        print_times(f"training step, {shape}, {precision}", seconds_of([step], arguments.repeats, device)[0])


def autocast_step(model, criterion, images, mask, targets, precision):
    with autocast(precision, images.device):
        outputs = model(images, mask, targets)
    sum(criterion(outputs, targets).values()).backward()
    model.zero_grad()


@torch.no_grad()
def measure_inference(model, arguments, device, precisions):
    images, mask = random_images(1, arguments.image_size, device)
    flops = count_flops(partial(model, images, mask))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"inference, folded: {parameters / 1e6:.2f} M parameters, {flops / 1e9:.1f} GFLOPs "
        "(a multiplication and an addition are two)"
    )
    shape = f"1 x {arguments.image_size}x{arguments.image_size}"
    compiled = ", compiled" if arguments.compile else ""
    detect = partial(torch.compile(model) if arguments.compile else model, images, mask)
    for precision in precisions:
        with autocast(precision, device):
            seconds = seconds_of([detect], 3 * arguments.repeats, device)[0]
        print_times(f"inference, {shape}, {precision}{compiled}", seconds)


def print_times(name, seconds):
    median, fastest = 1000 * statistics.median(seconds), 1000 * min(seconds)
    print(f"{name:56s} median {median:8.1f} ms, fastest {fastest:8.1f}")


# --growth

GROWTH = {
    "pixels": (256, 384, 512, 768, 1024),
    "batch": (1, 2, 4, 8, 16, 32),
    "queries": (100, 200, 300, 600, 900),
    "classes": (3, 30, 300, 1203),
    "boxes": (1, 10, 100, 300),
}


def measure_growth(arguments, device):
    """Times training steps while one input grows, and prints the times.

    -> {input: ([its size relative to the smallest], [the step's time relative to that with the smallest])}; the size of
    "pixels" is their number.
    """
    growth = {}
    for name, values in GROWTH.items():
        seconds = [step_seconds(arguments, device, **{name: value}) for value in values]
        power = 2 if name == "pixels" else 1
        sizes = [(value / values[0]) ** power for value in values]
        growth[name] = sizes, [second / seconds[0] for second in seconds]
        times = ", ".join(f"{value}: {1000 * second:.0f} ms" for value, second in zip(values, seconds))
        print(f"{name:8s} {times}", flush=True)
    return growth


def step_seconds(arguments, device, pixels=256, batch=2, queries=300, classes=CLASSES, boxes=5):
    """The fastest of three training steps; pixels: the images' side, batch: how many, boxes: in each."""
    model, criterion = build(arguments, device, classes, queries)
    images, mask = random_images(batch, pixels, device)
    targets = random_targets(batch, boxes, device, classes)
    step = partial(training_step, Ours(model.train(), criterion), images, mask, targets)
    return min(seconds_of([step], 3, device, warm_up=1)[0])


# --peers: a detector and its peer


def compare_all(names, device, repeats):
    """Prints the rows of these comparisons, or of all. Raises UserError."""
    for name in names:
        if name not in PAIRS and name not in OTHERS:
            raise UserError(f"--peers {name}: there are {', '.join([*PAIRS, *OTHERS])}")
    transformers.logging.set_verbosity_error()
    print(
        f"a product of 4096x4096 float32 matrices: {product_rate(device) / 1e9:.0f} GFLOP/s; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{'':34s} {'ours':>11s} {'theirs':>14s}    {'ratio':>5s} {'limit':>6s}")
    for name in names or [*PAIRS, *OTHERS]:
        if name in PAIRS:
            compare(name, device, repeats)
        else:
            OTHERS[name](device, repeats)


def print_row(name, peer, ours, theirs, limit=None):
    """Prints our and their time, their ratio, and the limit as a fraction of our time; all are given in seconds."""
    fraction = f"{limit / ours:6.0%}" if limit else "     -"
    times = f"{1000 * ours:8.1f} ms    {1000 * theirs:8.1f} ms    {theirs / ours:5.2f}"
    print(f"{name:34s} {times} {fraction}  {peer}", flush=True)


def compare(name, device, repeats):
    """Prints the rows of one of PAIRS: a training step, detection, the memory of the step."""
    pair = PAIRS[name]
    (ours, theirs), (images, mask, targets), (test_images, test_mask) = contestants(name, device)
    step = partial(training_step, ours.train(), images, mask, targets)
    their_step = partial(training_step, theirs.train(), images.contiguous(), mask, targets)
    flops = count_flops(step)
    rate = product_rate(device)  # just before the timing, as it changes with the machine's load
    seconds = median_seconds([step, their_step], device, repeats)
    print_row(f"{name}: step, {pair.train_images} of {pair.train_side}", pair.peer, *seconds, flops / rate)

    fuse(ours.eval()).requires_grad_(False)
    theirs.eval()
    for count in (1, 8):
        seconds, flops = detection_seconds(ours, theirs, test_images[:count], test_mask[:count], repeats)
        print_row(f"{name}: detect, {count} of {pair.detect_side}", pair.peer, *seconds, flops / rate)

    memory = [peak_memory_alone(name, which) for which in ("ours", "theirs")]
    ratio = memory[1] / memory[0]
    print(f"{name + ': memory of the step':34s} {memory[0]:8.2f} GiB   {memory[1]:8.2f} GiB   {ratio:5.2f}")


@torch.no_grad()
def detection_seconds(ours, theirs, images, mask, repeats):
    """-> [our median time, theirs], our floating-point operations."""
    detect = partial(ours, images, mask)
    their_detect = partial(theirs, images.contiguous(), mask)
    flops = count_flops(detect)
    return median_seconds([detect, their_detect], images.device, repeats), flops


def peak_memory_alone(name, which):
    """peak_memory in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# --peers mixed

ASPECT_RATIOS = {  # (width, height): images in a hundred, about as in COCO
    (640, 480): 34,
    (640, 427): 32,
    (640, 360): 3,
    (500, 333): 3,
    (612, 612): 4,
    (480, 640): 12,
    (427, 640): 10,
    (333, 500): 2,
}


def compare_mixed(device, repeats, images=128, steps=8):
    """Training steps of DETR on images of several aspect ratios: our batches are of similar ones, theirs random."""
    pair = PAIRS["detr"]
    ours, theirs = build_contestants(pair, device)
    weights = torch.tensor([*ASPECT_RATIOS.values()]).float()
    sizes = torch.tensor(list(ASPECT_RATIOS))[torch.multinomial(weights, images, replacement=True)]
    resized = (sizes * pair.train_side / sizes.amin(1, keepdim=True)).round().int()
    random_order = torch.arange(images)  # as the sizes were drawn at random
    grouped_order = group_by_aspect_ratio(random_order, sizes[:, 0] / sizes[:, 1], pair.train_images)
    our_batches, their_batches = (order.view(-1, pair.train_images) for order in (grouped_order, random_order))

    every = len(our_batches) // steps
    divisor = ours.model.backbone.size_divisor
    our_steps = mixed_steps(ours, resized, our_batches[::every], divisor, torch.channels_last, device)
    their_steps = mixed_steps(theirs, resized, their_batches[::every], 1, torch.contiguous_format, device)
    flops = count_flops(partial(call_all, our_steps))
    functions = [partial(call_all, our_steps), partial(call_all, their_steps)]
    seconds = [total / steps for total in median_seconds(functions, device, min(repeats, 2), warm_up=1)]
    limit = flops / steps / product_rate(device)
    print_row("mixed: detr's step, 8 of COCO's mix", pair.peer, *seconds, limit)
    padded = [padded_pixels(batches, resized) for batches in (our_batches, their_batches)]
    ratio = padded[1] / padded[0]
    print(f"{'mixed: padded / image pixels':34s} {padded[0]:8.2f}       {padded[1]:8.2f}       {ratio:5.2f}")


def mixed_steps(contestant, sizes, batches, divisor, memory_format, device):
    """sizes (N, 2) width, height; batches (S, B) indices into them -> S functions, each a training step of a batch."""
    contestant.train()
    steps = []
    for batch in batches:
        images, mask, _ = collate([(torch.randn(3, h, w), None) for w, h in sizes[batch].tolist()], divisor)
        images = images.contiguous(memory_format=memory_format).to(device)
        targets = random_targets(len(batch), 5, device)
        steps.append(partial(training_step, contestant, images, mask.to(device), targets))
    return steps


def call_all(functions):
    for function in functions:
        function()


def padded_pixels(batches, sizes):
    """The pixels of the batches, each padded to its widest and highest image, relative to those of the images."""
    pixels = batches.shape[1] * sizes[batches].amax(1).prod(1).sum()
    return float(pixels / sizes.prod(1).sum())


# --peers matcher


def compare_matchers(device, repeats):
    """Six layers, 8 images of 20 objects, 300 queries: ours matches all at once, transformers' layer by layer."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher as Theirs

    torch.manual_seed(0)
    logits = torch.randn(6, 8, 300, CLASSES + 1, device=device)
    boxes = 0.25 + 0.5 * torch.rand(6, 8, 300, 4, device=device)
    targets = random_targets(8, 20, device)
    match = partial(HungarianMatcher(1, 5, 2, class_loss="softmax"), logits, boxes, targets)
    their_match = partial(match_layer_by_layer, Theirs(1, 5, 2), logits, boxes, targets)
    seconds = median_seconds([match, their_match], device, repeats)
    print_row("matcher: 6 x 8 x 300, 20 objects", "transformers'", *seconds)


def match_layer_by_layer(matcher, logits, boxes, targets):
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    return [matcher({"logits": logit, "pred_boxes": box}, labels) for logit, box in zip(logits, boxes)]


# --peers loading, photos


def compare_loading(device, repeats, width=640, height=480, rounds=8):
    """Meta's transforms of JPEGs in one worker: ours, and torchvision's transforms that are nearest to them."""
    with tempfile.TemporaryDirectory() as folder:
        records = random_jpegs(Path(folder), 12, width, height)
        draws = [Draw(i, seed, side=0.5) for seed in range(rounds) for i in range(len(records))]
        split = Split("train", ["a"], [1], records)
        ours = DetectionDataset(split, train_transforms(800, "meta"), detail=detail_needed(800, "meta"))
        options = dict(batch_size=None, sampler=draws, num_workers=1, persistent_workers=True)
        our_loader = DataLoader(Loading(ours), worker_init_fn=start_worker, **options)
        their_loader = DataLoader(Loading(TorchvisionDataset(records)), **options)
        functions = [partial(iterate, our_loader), partial(iterate, their_loader)]
        seconds = median_seconds(functions, torch.device("cpu"), repeats)
    each = [total / len(draws) for total in seconds]
    print_row(f"loading: {width}x{height}, Meta's", "torchvision's", *each)


def random_jpegs(folder, count, width, height):
    """Writes smooth random images into the folder -> [Record], each with 7 boxes."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        path = folder / f"{i}.jpg"
        pixels = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        pixels.resize((width, height), Image.BICUBIC).save(path, quality=92)
        corner = rng.uniform(0, 0.6 * height, (7, 2))
        boxes = np.concatenate([corner, corner + height * rng.uniform(0.04, 0.3, (7, 2))], axis=1)
        labels, areas, ignored = np.zeros(7, dtype=np.int64), np.full(7, 900.0), np.zeros(7, dtype=bool)
        records.append(Record(i, path, width, height, boxes, labels, areas, ignored))
    return records


class TorchvisionDataset(torch.utils.data.Dataset):
    """Records through torchvision's own transforms, indexed by a Draw."""

    def __init__(self, records):
        self.records = records
        resize = v2.RandomShortestSize(list(range(480, 801, 32)), 1333)
        crop = v2.RandomCrop((492, 492))  # the mean of Meta's sides
        resize_crop_resize = v2.Compose([v2.RandomShortestSize([500, 550, 600]), crop, resize])
        self.transforms = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomHorizontalFlip(),
                v2.RandomChoice([resize, resize_crop_resize]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                v2.SanitizeBoundingBoxes(),
                v2.ConvertBoundingBoxFormat("CXCYWH"),
                v2.ToPureTensor(),
            ]
        )

    def __getitem__(self, draw):
        torch.default_generator.manual_seed(draw.seed)
        record = self.records[draw.index]
        image = Image.open(record.path).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(record.boxes).float(), format="XYXY", canvas_size=(record.height, record.width)
        )
        return self.transforms(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels)})


class Loading(torch.utils.data.Dataset):
    """Loads a dataset's samples and drops them: sending them between processes is not part of the comparison."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        self.dataset[index]
        return 0


def iterate(loader):
    for _ in loader:
        pass


# --peers evaluation


def compare_evaluation(device, repeats, pictures=5000):
    """COCO's metrics of so many images: ours, and pycocotools' as documented, through files."""
    split, detections = random_detections(pictures)
    functions = [partial(measure, split, detections), partial(evaluate_through_files, split, detections)]
    seconds = median_seconds(functions, torch.device("cpu"), 1, warm_up=0)
    print_row(f"evaluation: {pictures} images", "pycocotools'", *seconds)


def random_detections(images):
    """-> Split of images with 7 objects of 80 classes, {index: 300 detections near them}."""
    rng = np.random.default_rng(0)
    records, detections = [], {}
    for i in range(images):
        corner, size = rng.uniform(0, 400, (7, 2)), rng.uniform(10, 200, (7, 2))
        boxes, labels = np.concatenate([corner, corner + size], axis=1), rng.integers(0, CLASSES, 7)
        ignored = np.zeros(7, dtype=bool)
        records.append(Record(i, Path(f"{i}.jpg"), 640, 640, boxes, labels, size.prod(1), ignored))
        near = rng.integers(0, 7, 300)  # the object that each detection is near
        detected_labels = np.where(rng.random(300) < 0.6, labels[near], rng.integers(0, CLASSES, 300))
        detected_boxes = boxes[near] + rng.normal(0, 15, (300, 4))
        detections[i] = {
            "scores": torch.from_numpy(rng.random(300)),
            "labels": torch.from_numpy(detected_labels),
            "boxes": torch.from_numpy(detected_boxes),
        }
    return Split("val", [str(i) for i in range(CLASSES)], list(range(CLASSES)), records), detections


def evaluate_through_files(split, detections):
    """pycocotools' evaluation of one file of detections against one of annotations."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        annotations_file, results_file = Path(folder, "annotations.json"), Path(folder, "results.json")
        ground_truth = coco_of(range(len(split.records)), dict(enumerate(split.classes)), annotations_of(split))
        annotations_file.write_text(json.dumps(ground_truth.dataset))
        results_file.write_text(json.dumps(coco_results(detections)))
        coco = COCO(str(annotations_file))
        evaluation = COCOeval(coco, coco.loadRes(str(results_file)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()


def coco_results(detections):
    """{image id: detections} -> COCO's list of results, with boxes as x, y, width, height."""
    results = []
    for image_id, detected in detections.items():
        scores, labels, boxes = (detected[key].tolist() for key in ("scores", "labels", "boxes"))
        for score, label, (x1, y1, x2, y2) in zip(scores, labels, boxes):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return results


OTHERS = {
    "mixed": compare_mixed,
    "matcher": compare_matchers,
    "loading": compare_loading,
    "photos": partial(compare_loading, width=4000, height=3000, rounds=1),
    "evaluation": compare_evaluation,
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detector", choices=DETECTORS, default="ecdet")
    add("--size", choices=SIZES, default="s", help="of ecdet (default s)")
    add("--backbone", metavar="NAME", help="default: that of the size, or ecvitt")
    add("--attention", choices=ATTENTION, default=DEFAULTS["attention"], help="of detr, as in train.py")
    add("--distinct", type=float, metavar="IOU", default=DEFAULTS["distinct"], help="of detr, as in train.py")
    add("--num-denoising", type=int, metavar="N", help="of detr and dino, as in train.py (default 40, of dino 100)")
    add("--image-size", type=int, default=640, metavar="S", help="of inference (default 640)")
    add("--train-size", type=int, default=256, metavar="S", help="of the training step (default 256)")
    add("--batch-size", type=int, default=16, metavar="B", help="of the training step (default 16)")
    add("--repeats", type=int, default=10, metavar="N", help="timed calls (default 10)")
    add("--compile", action="store_true", help="inference with torch.compile")
    peers = f"compare with other implementations: {', '.join([*PAIRS, *OTHERS])} (default: all)"
    add("--peers", nargs="*", metavar="NAME", help=peers)
    add("--growth", metavar="FILE", help="draw how a training step's time grows with its inputs")
    add("--memory", nargs=2, help=argparse.SUPPRESS)  # --peers calls it: NAME, ours or theirs
    arguments = parser.parse_args()
    if arguments.num_denoising is None:
        arguments.num_denoising = 100 if arguments.detector == "dino" else 40
    return arguments


def main():
    arguments = parse_arguments()
    device = choose_device()
    torch.manual_seed(0)
    precisions = ["float32"]
    if choose_precision("auto", device) == "bfloat16":  # allows TF32 too, for everything below
        precisions.append("bfloat16")
    if arguments.memory:
        print(peak_memory(*arguments.memory, device))
    elif arguments.growth:
        plots.draw_growth(measure_growth(arguments, device), arguments.growth)
    elif arguments.peers is not None:
        compare_all(arguments.peers, device, arguments.repeats)
    else:
        measure_detector(arguments, device, precisions)


if __name__ == "__main__":
    run_script(main)
