"""Measures this machine in three parts and appends what it finds to a file; prints a table of such files.

    python tools/record.py mine.json steps                    training and detection of every detector, 640 pixels
    python tools/record.py mine.json peers                    beside other implementations, in the machine's precision
    python tools/record.py mine.json learning --data DIR      the AP over the minutes, from random weights
    python tools/record.py mine.json yours.json               the table for docs/speed.md, one column a machine

Each part takes at most eight minutes on a GPU and is written row by row: a part that is stopped keeps what it has. A
row that failed says why. Weights are random, images too; a step is the forward and the backward pass, the optimizers
and the average of the weights, on images and objects that are on the device already.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

import benchmark
from peers import PAIRS

from checkpoint import write_atomically
from devices import PRECISIONS, Graphed, autocast, choose_device, choose_precision, seconds_of
from ecvit import fuse
from errors import UserError, run_script
from optim import build_optimizers, update_ema
from settings import DEFAULTS
from weights import first_line

CASES = {  # detector, its backbone; ECDet's is that of its size
    "detr": "ecvitt",
    "ecdet": "ecvitt",
    "dino": "dinov3-convnext-tiny",
    "ssd": "ecvitt",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="JSON; what it holds stays")
    add("what", nargs="*", metavar="WHAT", help=f"{', '.join(PARTS)}, or more files for a table")
    add("--side", type=int, default=640, metavar="S", help="pixels of the images (default 640)")
    add("--batch-size", type=int, default=16, metavar="B", help="of the training step and of detection (default 16)")
    add("--repeats", type=int, default=10, metavar="N", help="timed calls (default 10)")
    add("--detectors", nargs="+", choices=CASES, default=list(CASES), metavar="D", help="of steps (default: all)")
    add("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="P", help="of peers (default: all)")
    add("--compile", action="store_true", help="steps: with torch.compile too, which takes minutes")
    add("--data", type=Path, metavar="DIR", help="learning: the dataset")
    add("--minutes", type=float, default=5, metavar="M", help="learning: of training (default 5)")
    arguments = parser.parse_args()
    if not arguments.what or arguments.what[0] not in PARTS:
        print(table([arguments.file, *map(Path, arguments.what)]))
        return
    for part in arguments.what:
        if part not in PARTS:
            raise UserError(f"{part}: there are {', '.join(PARTS)}")
    if "learning" in arguments.what and not arguments.data:
        raise UserError("learning: name a dataset, --data DIR")
    device = choose_device()
    precision = choose_precision("auto", device)  # also allows TF32
    record = Record(arguments.file, device)
    for part in arguments.what:
        PARTS[part](arguments, device, precision, record)


class Record:
    """The file: {"device", "versions", ..., "rows": [{"part", "name", ...}]}, written after each row."""

    def __init__(self, path, device):
        self.path, self.content = path, {"rows": []}
        if path.exists():
            self.content = read_record(path)
        about = describe(device)
        if self.content.get("device", about["device"]) != about["device"]:
            raise UserError(f"{path}: is of another machine ({self.content['device']}); choose another file")
        self.content |= about

    def add(self, part, name, values):
        """Writes a row in place of that of the same name and prints it."""
        values = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in values.items()}
        rows = [row for row in self.content["rows"] if (row["part"], row["name"]) != (part, name)]
        self.content["rows"] = [*rows, {"part": part, "name": name, **values}]
        lines = ",\n".join(json.dumps(row) for row in self.content["rows"])
        about = {key: value for key, value in self.content.items() if key != "rows"}
        write_atomically(self.path, f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())
        print(f"{part:9s} {name:44s} " + "  ".join(f"{key} {show(value)}" for key, value in values.items()), flush=True)

    def measure(self, part, name, function):
        """Adds what function() returns, or the error that it raises."""
        try:
            values = function()
        except Exception as error:  # one that fails costs no other
            values = {"error": f"{type(error).__name__}: {first_line(error)[:200]}"}
        self.add(part, name, values)


def read_record(path):
    """Raises UserError."""
    try:
        content = json.loads(path.read_text())
        assert isinstance(content["rows"], list)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, nor a part to measure; the parts are {', '.join(PARTS)}") from None
    except (ValueError, KeyError, AssertionError, TypeError, OSError):
        raise UserError(f"{path}: not a file of tools/record.py") from None
    return content


def describe(device):
    """-> the machine and what runs on it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} cores"
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, transformers)}
    return {"device": name, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def show(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Steps


def measure_steps(arguments, device, precision, record):
    """A training step and detection of each detector; the rate of one large product as their limit."""
    others = ["bfloat16", "float16"] if device.type == "cuda" else ["float32"]
    precisions = list(dict.fromkeys([precision, *others]))
    rates = {p: product_rate(device, p) for p in precisions}
    for name, rate in rates.items():
        record.add("steps", f"product of large matrices, {name}", {"TFLOP/s": rate / 1e12})
    modes = ["eager", *(["graph"] if device.type == "cuda" else []), *(["compiled"] if arguments.compile else [])]
    for detector in arguments.detectors:
        for p in precisions:
            for mode in modes:
                if mode == "compiled" and p != precisions[0]:
                    continue
                if mode != "graph":  # matching needs the host in the middle of a step
                    step = partial(train_row, arguments, detector, p, mode, device, rates[p])
                    record.measure("steps", f"{detector}: train, {p}, {mode}", step)
                for count in (1, arguments.batch_size):
                    detect = partial(detect_row, arguments, detector, p, mode, device, rates[p], count)
                    record.measure("steps", f"{detector}: detect {count}, {p}, {mode}", detect)


def product_rate(device, precision):
    """Operations per second of a large product of random matrices in that precision."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=PRECISIONS[precision])
    return 2 * side**3 / statistics.median(seconds_of([partial(torch.matmul, a, a)], 5, device)[0])


def build(detector, device):
    """-> the detector with random weights and its loss."""
    options = dict(detector=detector, size="s", backbone=CASES[detector])
    options |= dict(attention=DEFAULTS["attention"], distinct=DEFAULTS["distinct"])
    options |= dict(num_denoising=100 if detector == "dino" else 40)
    torch.manual_seed(0)
    return benchmark.build(SimpleNamespace(**options), device)


def train_row(arguments, detector, precision, mode, device, rate):
    model, criterion = build(detector, device)
    step = training_step(model.train(), criterion, arguments, precision, mode, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    flops = benchmark.count_flops(step) if mode == "eager" else None
    seconds = statistics.median(seconds_of([step], arguments.repeats, device, warm_up=3)[0])
    row = {"images/s": arguments.batch_size / seconds, "ms": 1000 * seconds}
    if flops:
        row["limit"] = flops / rate / seconds
    if device.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def training_step(model, criterion, arguments, precision, mode, device):
    """-> a function that takes one step as train.py does."""
    settings = SimpleNamespace(
        **DEFAULTS | {"backbone_weights": "none", "optimizer": "muon", "init": None, "lr": 8e-4, "backbone_lr": 8e-4}
    )
    optimizers = build_optimizers(model, settings)
    averages = {key: value.clone() for key, value in model.state_dict().items()}
    ema = SimpleNamespace(state_dict=lambda: averages)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    images, mask = benchmark.random_images(arguments.batch_size, arguments.side, device)
    mask = mask.cpu()
    targets = benchmark.random_targets(arguments.batch_size, 5, device)
    if mode == "compiled":
        model.backbone.compile()

    def step():
        with autocast(precision, device):
            outputs = model(images, mask, targets)
        scaler.scale(sum(criterion(outputs, targets, 5 * len(images)).values())).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).isfinite():
            for optimizer in optimizers:
                optimizer.step()
            update_ema(ema, model, 100, 0)
        scaler.update()
        model.zero_grad()

    return step


@torch.no_grad()
def detect_row(arguments, detector, precision, mode, device, rate, count):
    model = fuse(build(detector, device)[0].eval()).requires_grad_(False)
    images, mask = benchmark.random_images(count, arguments.side, device)
    mask = mask.cpu()
    with autocast(precision, device):
        flops = benchmark.count_flops(partial(model, images, mask))
    if mode == "compiled":
        model.compile()
    with autocast(precision, device):
        detect = partial(Graphed(model) if mode == "graph" else model, images, mask)
        seconds = statistics.median(seconds_of([detect], 3 * arguments.repeats, device, warm_up=4)[0])
    return {"images/s": count / seconds, "ms": 1000 * seconds, "limit": flops / rate / seconds}


# Peers


def measure_peers(arguments, device, precision, record):
    """benchmark.py's comparisons in the precision that this machine is fast in, both in turns in one process."""
    transformers.logging.set_verbosity_error()
    for name in arguments.pairs:
        pair = PAIRS[name]
        try:
            models = benchmark.build_contestants(pair, device)
        except Exception as error:  # a version of transformers that lacks it
            record.add("peers", name, {"error": f"{type(error).__name__}: {first_line(error)[:200]}"})
            continue
        for side in dict.fromkeys([pair.train_side, arguments.side]):
            step = partial(compare_steps, models, pair.train_images, side, precision, arguments.repeats, device)
            record.measure("peers", f"{name}: step, {pair.train_images} of {side}, {precision}", step)
        fuse(models[0].eval()).requires_grad_(False)
        models[1].eval().requires_grad_(False)
        for count in (1, 8):
            detect = partial(compare_detection, models, count, pair.detect_side, precision, arguments.repeats, device)
            record.measure("peers", f"{name}: detect {count} of {pair.detect_side}, {precision}", detect)


def compare_steps(models, count, side, precision, repeats, device):
    images, mask = benchmark.random_images(count, side, device)
    targets = benchmark.random_targets(count, 5, device)
    inputs = [(images, mask.cpu()), (images.contiguous(), mask)]
    steps = [partial(peer_step, m.train(), *given, targets, precision) for m, given in zip(models, inputs)]
    return in_turns(steps, repeats, device)


def peer_step(contestant, images, mask, targets, precision):
    with autocast(precision, images.device):
        loss = contestant(images, mask, targets)
    loss.backward()
    contestant.zero_grad()


@torch.no_grad()
def compare_detection(models, count, side, precision, repeats, device):
    images, mask = benchmark.random_images(count, side, device)
    calls = [partial(models[0], images, mask.cpu()), partial(models[1], images.contiguous(), mask)]
    with autocast(precision, device):
        return in_turns(calls, repeats, device)


def in_turns(functions, repeats, device):
    ours, theirs = benchmark.median_seconds(functions, device, repeats)
    return {"ms": 1000 * ours, "their ms": 1000 * theirs, "ratio": theirs / ours}


# Learning


def measure_learning(arguments, device, precision, record):
    """One run of train.py from random weights: the best AP so far after 1, 3, ... minutes, and the last."""
    with tempfile.TemporaryDirectory() as folder:
        rows = train_and_evaluate(arguments, Path(folder) / "run")
    for minutes in sorted({1.0, 3.0, arguments.minutes}):
        until = [row for row in rows if row["minutes"] <= minutes + 0.05]
        if until and minutes <= arguments.minutes:
            row = max(until, key=lambda row: row["AP"])
            values = {"AP": row["AP"], "AP50": row["AP50"], "steps": until[-1]["step"]}
            record.add("learning", f"{arguments.data.name}, {arguments.side} pixels, {minutes:g} minutes", values)


def train_and_evaluate(arguments, run):
    """-> the rows of log.jsonl with an AP. Raises UserError."""
    command = [sys.executable, Path(__file__).resolve().parents[1] / "train.py", "--data", arguments.data]
    command += ["--backbone", "ecvit-nano", "--backbone-weights", "none", "--image-size", arguments.side]
    command += ["--minutes", arguments.minutes, "--out", run]
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise UserError(f"train.py failed: {result.stdout.splitlines()[-1]}")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "AP" in row]


PARTS = {"steps": measure_steps, "peers": measure_peers, "learning": measure_learning}


# The table


def table(paths):
    """Markdown, one column a file and one row for each name in any of them. Raises UserError."""
    records = [read_record(path) for path in paths]
    found = [{(row["part"], row["name"]): row for row in r["rows"] if row["part"] in PARTS} for r in records]
    names = dict.fromkeys(name for rows in found for name in rows)
    lines = ["| | " + " | ".join(r["device"] for r in records) + " |", "|---" * (1 + len(records)) + "|"]
    for name in names:
        lines.append(f"| {name[1]} | " + " | ".join(cell(rows.get(name)) for rows in found) + " |")
    return "\n".join(lines)


def cell(row):
    if row is None:
        return ""
    return ", ".join(f"{key} {show(value)}" for key, value in row.items() if key not in ("part", "name"))


if __name__ == "__main__":
    run_script(main)
