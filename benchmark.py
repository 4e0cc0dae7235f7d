"""How fast a detector is on this machine, with random weights: inference on one picture, and a training step.

    python benchmark.py --detector ecdet --size s                  inference at 640x640; the step: 16 pictures of 256x256, 5 boxes each
    python benchmark.py --detector detr --backbone dinov3-vits16
    python benchmark.py --detector ecdet --size s --compile        inference with torch.compile, its warm-up not counted
    python benchmark.py --peers                                    beside what people would use instead, see peers.py; minutes
    python benchmark.py --peers detr matcher                       beside some of them
    python benchmark.py --growth growth.png --detector detr        how a training step grows with queries, pixels, classes, boxes, pictures

In --peers the two take turns in one process; memory is each one's alone, in a process of its own. The limit is the time that the step's
matrix products would take at the rate of a large one.
"""

import argparse
import collections
import contextlib
import io
import json
import resource
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

import plots
from datasets import DetectionDataset, by_proportions, collate, start_worker
from detr_loss import HungarianMatcher
from detr_model import ATTENTION, DETECTORS, build_model
from devices import choose_device, choose_precision
from ecdet_model import SIZES
from ecvit import fold
from errors import UserError, run
from evaluate import annotations_of, coco_of, measure
from layouts import Record, Split
from peers import CLASSES, PAIRS, Ours
from settings import DEFAULTS
from timing import seconds_of
from transforms import MEAN, STD, detail_needed, train_transforms


def random_targets(pictures, boxes, device, classes=CLASSES):
    """Targets with boxes (T, 4) cxcywh well inside the picture, a tenth to four tenths of it wide and high."""
    make = lambda: torch.cat([0.25 + 0.5 * torch.rand(boxes, 2), 0.1 + 0.3 * torch.rand(boxes, 2)], dim=1)
    return [{"labels": torch.randint(classes, (boxes,), device=device), "boxes": make().to(device)} for _ in range(pictures)]


def build(arguments, device, classes=CLASSES, queries=300):
    backbone = arguments.backbone or (SIZES[arguments.size]["backbone"] if arguments.detector == "ecdet" else "ecvitt")
    config = DEFAULTS | dict(
        detector=arguments.detector, size=arguments.size, backbone=backbone, backbone_weights=None, num_classes=classes, num_queries=queries,
        hidden_dim=256, num_heads=8, ffn_dim=1024, encoder_layers=6, copies=arguments.copies, decoder_layers={"ecdet": None, "dino": 6}.get(arguments.detector, 3),
        attention=arguments.attention, distinct=arguments.distinct,
    )  # fmt: skip
    model, criterion, _ = build_model(config)
    return model.to(device, memory_format=torch.channels_last), criterion


def picture_batch(count, side, device):
    images = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return images, torch.zeros(count, side, side, dtype=torch.bool, device=device)


def in_turns(functions, device, repeats, warm_up=2):
    """-> the median seconds of each."""
    return [statistics.median(found) for found in seconds_of(functions, repeats, device, warm_up)]


def product_rate(device, n=4096):
    """Operations a second of a large float32 matrix product."""
    a = torch.randn(n, n, device=device)
    return 2 * n**3 / min(seconds_of([lambda: a @ a], 5, device)[0])


def training_step(model, images, mask, targets):
    def step():
        model(images, mask, targets).backward()
        model.zero_grad()

    return step


def contestants(name, device):
    """-> ours, theirs, and what they are given: the training step's batch, and pictures to detect in."""
    make, _, side, pictures, detect_side = PAIRS[name]
    torch.manual_seed(0)
    models = [model.to(device) for model in make()]
    models[0].to(memory_format=torch.channels_last)
    images, mask = picture_batch(pictures, side, device)
    return models, (images, mask, random_targets(pictures, 5, device)), picture_batch(8, detect_side, device)


def compare(name, device, repeats):
    """Prints the rows of one peer."""
    (ours, theirs), batch, (images, mask) = contestants(name, device)
    _, whose, side, pictures, detect_side = PAIRS[name]
    with FlopCounterMode(display=False) as counter:
        training_step(ours.train(), *batch)()
    rate = product_rate(device)  # now: it changes with what else the machine does
    limit = counter.get_total_flops() / rate
    plain = batch[0].contiguous(), *batch[1:]
    seconds = in_turns([training_step(ours, *batch), training_step(theirs.train(), *plain)], device, repeats)
    show(f"{name}: step, {pictures} of {side}", whose, *seconds, limit)
    fold(ours.eval()).requires_grad_(False)
    theirs.eval()
    for count in (1, 8):
        given = images[:count], mask[:count]
        plain = given[0].contiguous(), given[1]
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                ours(*given)
            seconds = in_turns([lambda: ours(*given), lambda: theirs(*plain)], device, repeats)
        show(f"{name}: detect, {count} of {detect_side}", whose, *seconds, counter.get_total_flops() / rate)
    peaks = [float(subprocess.run([sys.executable, __file__, "--memory", name, which], capture_output=True, text=True, check=True).stdout) for which in ("ours", "theirs")]
    print(f"{name + ': memory of the step':34s} {peaks[0]:8.2f} GiB   {peaks[1]:8.2f} GiB   {peaks[1] / peaks[0]:5.2f}")


# pictures of a hundred, about as in COCO
MIX = {(640, 480): 34, (640, 427): 32, (640, 360): 3, (500, 333): 3, (612, 612): 4, (480, 640): 12, (427, 640): 10, (333, 500): 2}


def compare_mixed(device, repeats, pictures=128, chosen=8):
    """Steps of DETR over pictures of several proportions, in batches of 8 as each side makes them: ours like with like, theirs by chance."""
    make, whose, side, size, _ = PAIRS["detr"]
    torch.manual_seed(0)
    models = [model.to(device) for model in make()]
    models[0].to(memory_format=torch.channels_last)
    drawn = torch.tensor(list(MIX))[torch.multinomial(torch.tensor([*MIX.values()]).float(), pictures, replacement=True)]
    sides = (drawn * side / drawn.amin(1, keepdim=True)).round().int()
    by_chance = torch.arange(pictures)
    steps, padded = [], []
    for model, order, divisor in zip(models, (by_proportions(by_chance, drawn[:, 0] / drawn[:, 1], size), by_chance), (models[0].model.backbone.size_divisor, 1)):
        batches, order = [], order.view(-1, size)
        padded.append(float(size * sides[order].amax(1).prod(1).sum() / sides.prod(1).sum()))
        for batch in order[:: pictures // size // chosen]:
            images, mask, _ = collate([(torch.randn(3, h, w), None) for w, h in sides[batch].tolist()], divisor)
            images = images if model is models[0] else images.contiguous()
            batches.append((images.to(device), mask.to(device), random_targets(size, 5, device)))
        steps.append([training_step(model.train(), *batch) for batch in batches])
    with FlopCounterMode(display=False) as counter:
        for step in steps[0]:
            step()
    seconds = in_turns([lambda each=each: [step() for step in each] for each in steps], device, min(repeats, 2), warm_up=1)
    show("mixed: detr's step, 8 of COCO's mix", whose, *(found / chosen for found in seconds), counter.get_total_flops() / chosen / product_rate(device))
    print(f"{'mixed: pixels, of the unpadded':34s} {padded[0]:8.2f}       {padded[1]:8.2f}       {padded[1] / padded[0]:5.2f}")


def show(what, whose, ours, theirs, limit=None):
    share = f"{limit / ours:6.0%}" if limit else "     -"
    print(f"{what:34s} {1000 * ours:8.1f} ms    {1000 * theirs:8.1f} ms    {theirs / ours:5.2f} {share}  {whose}", flush=True)


def peak_memory(name, which, device):
    """GiB that three steps need at most, besides what was there before the first."""
    models, batch, _ = contestants(name, device)
    model = models[which == "theirs"].train()
    del models
    step = training_step(model, *batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before = memory_of_this_process(device, "VmRSS")
    for _ in range(3):
        step()
    return memory_of_this_process(device, "VmHWM") - before


def memory_of_this_process(device, line):
    if device.type == "cuda":
        return (torch.cuda.memory_allocated() if line == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**30
    return next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(line)) / 2**20


def compare_matchers(device, repeats):
    """Six layers, 8 pictures of 20 objects, 300 queries: ours at once, transformers' one after the other."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher as Theirs

    torch.manual_seed(0)
    logits, boxes = torch.randn(6, 8, 300, CLASSES + 1, device=device), 0.25 + 0.5 * torch.rand(6, 8, 300, 4, device=device)
    targets = random_targets(8, 20, device)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    ours, theirs = HungarianMatcher(1, 5, 2, class_loss="softmax"), Theirs(1, 5, 2)
    each = lambda: [theirs({"logits": logit, "pred_boxes": box}, labels) for logit, box in zip(logits, boxes)]
    show("matcher: 6 x 8 x 300, 20 objects", "transformers'", *in_turns([lambda: ours(logits, boxes, targets), each], device, repeats))


def compare_loading(device, repeats, width=640, height=480, rounds=8):
    """Meta's transforms on pictures, in one worker each: ours, and the nearest to them that torchvision's own parts make."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for i in range(12):
            path = Path(folder) / f"{i}.jpg"
            pixels = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
            pixels.save(path, quality=92)
            corner = rng.uniform(0, 0.6 * height, (7, 2))
            boxes = np.concatenate([corner, corner + height * rng.uniform(0.04, 0.3, (7, 2))], axis=1)
            records.append(Record(i, path, width, height, boxes, np.zeros(7, dtype=np.int64), np.full(7, 900.0), np.zeros(7, dtype=bool)))
        ours = DetectionDataset(Split("train", ["a"], [1], records), train_transforms(800, "meta"), detail=detail_needed(800, "meta"))
        sides = [range(480, 801, 32), (500, 550, 600)]
        resize = v2.RandomShortestSize(list(sides[0]), 1333)
        window = v2.Compose([v2.RandomShortestSize(list(sides[1])), v2.RandomCrop((492, 492)), resize])  # the mean of Meta's sides
        reference = v2.Compose([
            v2.ToImage(), v2.RandomHorizontalFlip(), v2.RandomChoice([resize, window]), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
            v2.SanitizeBoundingBoxes(), v2.ConvertBoundingBoxFormat("CXCYWH"), v2.ToPureTensor(),
        ])  # fmt: skip

        def load_theirs(index):
            torch.default_generator.manual_seed(index[1])
            record = records[index[0]]
            image = Image.open(record.path).convert("RGB")
            boxes = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes).float(), format="XYXY", canvas_size=(height, width))
            reference(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels)})

        drawn = [(i, seed, 0.5, False) for seed in range(rounds) for i in range(len(records))]
        settings = dict(batch_size=None, sampler=drawn, num_workers=1, persistent_workers=True)
        loaders = DataLoader(Loaded(ours.__getitem__), worker_init_fn=start_worker, **settings), DataLoader(Loaded(load_theirs), **settings)
        seconds = in_turns([lambda loader=loader: collections.deque(loader, maxlen=0) for loader in loaders], torch.device("cpu"), repeats)
    show(f"loading: {width}x{height}, Meta's", "torchvision's", *(found / len(drawn) for found in seconds))


class Loaded(torch.utils.data.Dataset):
    """Makes what a data set gives, and gives nothing: what sending it between processes takes depends on how it is sent."""

    def __init__(self, load):
        self.load = load

    def __getitem__(self, index):
        self.load(index)
        return 0


GROWTH = {"pixels": (256, 384, 512, 768, 1024), "batch": (1, 2, 4, 8, 16, 32), "queries": (100, 200, 300, 600, 900), "classes": (3, 30, 300, 1203), "boxes": (1, 10, 100, 300)}


def measure_growth(arguments, device):
    """-> {what grows: ([how many times as much as at first], [how many times as long a step takes])}, one thing at a time, printed as it is found."""
    found = {}
    for name, values in GROWTH.items():
        seconds = []
        for value in values:
            sizes = {"pixels": 256, "batch": 2, "queries": 300, "classes": CLASSES, "boxes": 5} | {name: value}
            model, criterion = build(arguments, device, sizes["classes"], sizes["queries"])
            images, mask = picture_batch(sizes["batch"], sizes["pixels"], device)
            targets = random_targets(sizes["batch"], sizes["boxes"], device, sizes["classes"])
            step = training_step(Ours(model.train(), criterion), images, mask, targets)
            seconds.append(min(seconds_of([step], 3, device, warm_up=1)[0]))
        much = [(value / values[0]) ** (2 if name == "pixels" else 1) for value in values]
        found[name] = much, [second / seconds[0] for second in seconds]
        print(f"{name:8s} " + ", ".join(f"{value}: {1000 * second:.0f} ms" for value, second in zip(values, seconds)), flush=True)
    return found


def compare_evaluation(device, repeats, pictures=5000):
    """COCO's figures of so many pictures with 7 objects of 80 classes and 300 detections: ours, and pycocotools as it says, through files."""
    rng = np.random.default_rng(0)
    records, found = [], {}
    for i in range(pictures):
        corner, size = rng.uniform(0, 400, (7, 2)), rng.uniform(10, 200, (7, 2))
        records.append(Record(i, Path(f"{i}.jpg"), 640, 640, np.concatenate([corner, corner + size], axis=1), rng.integers(0, CLASSES, 7), size.prod(1), np.zeros(7, dtype=bool)))
        near = rng.integers(0, 7, 300)
        labels = np.where(rng.random(300) < 0.6, records[-1].labels[near], rng.integers(0, CLASSES, 300))
        boxes = records[-1].boxes[near] + rng.normal(0, 15, (300, 4))
        found[i] = {"scores": torch.from_numpy(rng.random(300)), "labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes)}
    split = Split("val", [str(i) for i in range(CLASSES)], list(range(CLASSES)), records)

    def theirs():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            truth, detections = Path(folder, "truth.json"), Path(folder, "detections.json")
            truth.write_text(json.dumps(coco_of(range(pictures), dict(enumerate(split.classes)), annotations_of(split)).dataset))
            detections.write_text(json.dumps([
                {"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                for i, d in found.items() for score, label, (x1, y1, x2, y2) in zip(*(d[key].tolist() for key in ("scores", "labels", "boxes")))
            ]))  # fmt: skip
            coco = COCO(str(truth))
            evaluation = COCOeval(coco, coco.loadRes(str(detections)), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

    show(f"evaluation: {pictures} pictures", "pycocotools'", *(found[0] for found in seconds_of([lambda: measure(split, found), theirs], 1, warm_up=0)))


def compare_all(names, device, repeats):
    others = {"mixed": compare_mixed, "matcher": compare_matchers, "loading": compare_loading, "photos": partial(compare_loading, width=4000, height=3000, rounds=1), "evaluation": compare_evaluation}
    unknown = [name for name in names if name not in {**PAIRS, **others}]
    if unknown:
        raise UserError(f"--peers {unknown[0]}: there are {', '.join([*PAIRS, *others])}")
    transformers.logging.set_verbosity_error()
    print(f"a product of 4096x4096 float32 matrices: {product_rate(device) / 1e9:.0f} GFLOP/s; {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'':34s} {'ours':>11s} {'theirs':>14s}    {'ratio':>5s} {'limit':>6s}")
    for name in names or [*PAIRS, *others]:
        if name in PAIRS:
            compare(name, device, repeats)
        else:
            others[name](device, repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=DETECTORS, default="ecdet")
    parser.add_argument("--size", choices=SIZES, default="s", help="ECDet's (default s)")
    parser.add_argument("--backbone", metavar="NAME", help="default: the size's own, or ecvitt")
    parser.add_argument("--attention", choices=ATTENTION, default=DEFAULTS["attention"], help="detr's, as train.py's")
    parser.add_argument("--distinct", type=float, metavar="IOU", default=DEFAULTS["distinct"], help="detr's, as train.py's")
    parser.add_argument("--copies", type=int, metavar="N", help="detr's and DINO's, as train.py's (default 40, DINO's 100)")
    parser.add_argument("--image-size", type=int, default=640, metavar="S", help="of inference (default 640)")
    parser.add_argument("--train-size", type=int, default=256, metavar="S", help="of the training step (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="of the training step (default 16)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="calls that are timed (default 10)")
    parser.add_argument("--compile", action="store_true", help="inference with torch.compile")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"beside {', '.join(PAIRS)}, mixed, matcher, loading, photos, evaluation (default: all of them)")
    parser.add_argument("--growth", metavar="FILE", help="draws how a training step grows")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.copies is None:
        arguments.copies = 100 if arguments.detector == "dino" else 40
    device = choose_device()
    torch.manual_seed(0)
    precisions = [torch.float32] + [torch.bfloat16] * (choose_precision("auto", device) == "bfloat16")
    report = lambda what, seconds: print(f"{what:56s} median {1000 * statistics.median(seconds):8.1f} ms, fastest {1000 * min(seconds):8.1f}")

    if arguments.memory:
        print(peak_memory(*arguments.memory, device))
        return
    if arguments.growth:
        plots.draw_growth(measure_growth(arguments, device), arguments.growth)
        return
    if arguments.peers is not None:
        compare_all(arguments.peers, device, arguments.repeats)
        return
    model, criterion = build(arguments, device)
    model.train()
    images, mask = picture_batch(arguments.batch_size, arguments.train_size, device)
    targets = random_targets(arguments.batch_size, 5, device)
    for precision in precisions:

        def step():
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = model(images, mask, targets)
            sum(criterion(outputs, targets).values()).backward()
            model.zero_grad()

        report(f"training step, {len(images)} x {arguments.train_size}x{arguments.train_size}, {str(precision)[6:]}", seconds_of([step], arguments.repeats, device)[0])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the whole process so far: {peak / 2**30:.2f} GiB")
    model = fold(model.eval()).requires_grad_(False)
    images, mask = picture_batch(1, arguments.image_size, device)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(images, mask)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"inference, folded: {millions:.2f} M parameters, {counter.get_total_flops() / 1e9:.1f} GFLOPs (two a multiplication and addition)")
        detect = torch.compile(model) if arguments.compile else model
        for precision in precisions:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                seconds = seconds_of([lambda: detect(images, mask)], 3 * arguments.repeats, device)[0]
            report(f"inference, 1 x {arguments.image_size}x{arguments.image_size}, {str(precision)[6:]}{', compiled' if arguments.compile else ''}", seconds)


if __name__ == "__main__":
    run(main)
