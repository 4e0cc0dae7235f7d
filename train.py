"""Trains a detector. One process, one loop, every setting in one place.

    python train.py                                              the demo: draws a data set, trains on it from nothing
    python train.py --data DIR                                   your data, COCO or Pascal VOC, on a pretrained ECViT
    python train.py --data DIR --backbone dinov3-vits16          another backbone, weights from the Hugging Face hub
    python train.py --data DIR --recipe meta                     DETR as it was published in 2020
    python train.py --resume runs/demo                           goes on exactly where the run was stopped

A run leaves config.json, log.jsonl, last.pth, best.pth, curves.png, train_batch.png and val_samples.png in runs/NAME.
"""

import argparse
import json
import math
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import plots
from backbones import find_spec, parameter_depths
from checkpoint import read_checkpoint, save_checkpoint
from datasets import DetectionDataset, EndlessBatches, collate, load_splits
from demo_data import make_demo
from detr_model import build_model
from errors import UserError, run
from evaluate import evaluate
from transforms import eval_transforms, train_transforms

# Settings. A recipe says where it differs from DEFAULTS; None is decided by `settle`, which prints what it chose.

DEFAULTS = dict(
    # data
    data=None,  # folder of a data set; None: the demo
    train_split=None, val_split=None,  # which parts, where the folder has several
    image_size=None,  # shortest side in evaluation; training sides scale with it
    color_jitter=0.0, rotate=0.0,  # strength in [0, 1]; degrees
    workers=None, skip_bad_images=False,
    # model
    detector="detr",
    backbone=None, backbone_weights=None,
    freeze_backbone=0.0,  # epochs before the backbone is trained; "all": never
    checkpoint_activations=False,
    num_queries=None,  # None: twice the most objects in a picture, 60 at least
    hidden_dim=None, num_heads=None, ffn_dim=None, decoder_layers=3, dropout=0.0,
    # budget: whichever ends first
    epochs=None, steps=None, minutes=None,
    # optimisation
    batch_size=None, accumulate=1,
    lr=None, backbone_lr=None,  # for a batch of 16; scaled by its square root
    layer_decay=1.0,  # learning rate of each backbone block relative to the next
    weight_decay=1e-4, clip=1.0,
    schedule="linear", warmup=0.03,  # share of the budget
    ema=True, precision="auto", seed=0,
    # run
    out=None, eval_every=0, keep_every=0,
)  # fmt: skip

RECIPES = {
    "default": {},
    "meta": dict(  # arXiv 2005.12872
        detector="detr-2020", image_size=800, num_queries=100, hidden_dim=256, num_heads=8, ffn_dim=2048,
        decoder_layers=6, dropout=0.1, epochs=300, lr=1e-4, backbone_lr=1e-5, clip=0.1, schedule="step", warmup=0.0,
        ema=False, freeze_backbone=100.0, keep_every=50, eval_every=1,
    ),
}  # fmt: skip


def parse_arguments(argv=None):
    """-> (settings given on the command line, run to resume or None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="a COCO or Pascal VOC data set (default: the demo, drawn into data/demo)")
    data.add_argument("--train-split", metavar="NAME", help="its part to train on, e.g. trainval")
    data.add_argument("--val-split", metavar="NAME", help="its part to evaluate on, e.g. test")
    data.add_argument("--image-size", type=int, metavar="S", help="shortest side in evaluation; training draws S*0.6 .. S, and longest sides are S*1.67 at most (default: chosen from the objects' sizes)")
    data.add_argument("--color-jitter", type=float, metavar="X", help="brightness, contrast and saturation changed by up to this share (default 0)")
    data.add_argument("--rotate", type=float, metavar="DEG", help="rotation by up to this many degrees (default 0)")
    data.add_argument("--workers", type=int, metavar="N", help="processes that prepare pictures")
    data.add_argument("--skip-bad-images", action="store_true", help="leave out pictures that can't be read, instead of stopping")
    model = parser.add_argument_group("model")
    model.add_argument("--recipe", choices=RECIPES, default="default", help="meta: DETR as published; every option below and above still applies")
    model.add_argument("--backbone", metavar="NAME", help="see python check_dims.py (default: ecvitt; the demo: ecvit-nano)")
    model.add_argument("--backbone-weights", metavar="W", help="pretrained (hub or release), none (from scratch), or the path of a folder or file (default: pretrained where there are any)")
    model.add_argument("--freeze-backbone", metavar="N", help="epochs before the backbone is trained, or all (default 0; meta: 100)")
    model.add_argument("--checkpoint-activations", action="store_true", help="recompute the backbone's activations: less memory, slower")
    model.add_argument("--num-queries", type=int, metavar="Q", help="most detections in a picture (default: twice the most objects in a training picture, 60 at least)")
    budget = parser.add_argument_group("budget (the first that is used up ends the run; the schedule follows it)")
    budget.add_argument("--epochs", type=int, metavar="N")
    budget.add_argument("--steps", type=int, metavar="N")
    budget.add_argument("--minutes", type=float, metavar="M", help="minutes of training; evaluation is not counted")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--batch-size", type=int, metavar="B", help="pictures a step (default 16; 8 below 1,000 pictures)")
    optimisation.add_argument("--accumulate", type=int, metavar="N", help="batches whose gradients are added up for a step (default 1)")
    optimisation.add_argument("--lr", type=float, help="learning rate of a batch of 16 (default 8e-4 from scratch, 4e-4 otherwise)")
    optimisation.add_argument("--backbone-lr", type=float, help="the backbone's (default: lr from scratch, lr/10 otherwise)")
    optimisation.add_argument("--layer-decay", type=float, metavar="X", help="a backbone block's learning rate relative to the next one's (default 1)")
    optimisation.add_argument("--weight-decay", type=float, metavar="X", help="not on norms and biases (default 1e-4)")
    optimisation.add_argument("--clip", type=float, metavar="X", help="longest gradient (default 1; meta: 0.1; 0: none)")
    optimisation.add_argument("--no-ema", dest="ema", action="store_false", help="evaluate and keep the last weights, not their running average")
    optimisation.add_argument("--precision", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where the device is fast at it")
    optimisation.add_argument("--seed", type=int, metavar="N")
    out = parser.add_argument_group("run")
    out.add_argument("--out", metavar="RUN", help="folder of the run (default: runs/ and the data's name)")
    out.add_argument("--eval-every", type=int, metavar="N", help="epochs between evaluations (default 0: as often as a tenth of the time allows)")
    out.add_argument("--keep-every", type=int, metavar="N", help="also keep a checkpoint every N epochs (default 0: none; meta: 50)")
    out.add_argument("--resume", metavar="RUN", help="go on with this run, with its own settings")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", None)
    if resume is not None and set(given) - {"recipe"}:
        extra = ", ".join("--" + key.replace("_", "-") for key in given if key != "recipe")
        raise UserError(f"--resume goes on with the run's own settings; leave out {extra}")
    return given, resume


def settle(given, train, val):
    """Settings with every None decided from the data and the device -> dict. Prints what was chosen."""
    s = DEFAULTS | RECIPES[given["recipe"]] | given
    demo = given.get("data") is None
    if s["backbone"] is None:
        s["backbone"] = "ecvit-nano" if demo else "ecvitt"
    spec = find_spec(s["backbone"])
    if s["backbone_weights"] is None:
        s["backbone_weights"] = "pretrained" if spec.source else "none"
    scratch = s["backbone_weights"] == "none"
    nano = s["backbone"] == "ecvit-nano"
    chosen = {}

    def choose(key, value):
        if s[key] is None:
            s[key] = chosen[key] = value

    choose("image_size", 128 if demo else choose_image_size(train, 240 if nano else 640))
    choose("batch_size", 8 if len(train.records) < 1000 else 16)
    choose("num_queries", max(60, -(-2 * train.most_objects // 10) * 10))
    choose("hidden_dim", 128 if nano else 256)
    choose("num_heads", s["hidden_dim"] // 32)
    choose("ffn_dim", 4 * s["hidden_dim"])
    if s["epochs"] is s["steps"] is s["minutes"] is None:
        pictures = len(train.records)
        chosen["epochs"] = s["epochs"] = 40 if demo else 100 if pictures < 5000 else 50 if pictures < 20000 else 24
        if demo:
            chosen["minutes"] = s["minutes"] = 4.5
    choose("lr", 8e-4 if scratch else 4e-4)
    choose("backbone_lr", s["lr"] if scratch else s["lr"] / 10)
    choose("workers", 0 if demo or s["image_size"] < 320 else 4)
    choose("out", next_free(Path("runs") / ("demo" if demo else Path(s["data"]).resolve().name)))
    s["data"] = str(s["data"] or "data/demo")
    if str(s["freeze_backbone"]) == "all":
        s["freeze_backbone"] = math.inf
    try:
        s["freeze_backbone"] = float(s["freeze_backbone"])
    except ValueError:
        raise UserError(f"--freeze-backbone takes a number of epochs or all, not {s['freeze_backbone']}") from None
    for key in ("batch_size", "accumulate", "image_size", "num_queries", "epochs", "steps", "minutes"):
        if s[key] is not None and s[key] <= 0:
            raise UserError(f"--{key.replace('_', '-')} has to be more than 0, not {s[key]}")
    if s["precision"] == "auto":
        s["precision"] = chosen["precision"] = "bfloat16" if fast_bfloat16() else "float32"
    s["num_classes"] = len(train.classes)
    print("chosen: " + ", ".join(f"{key}={value}" for key, value in chosen.items()))
    if train.most_objects > s["num_queries"]:
        print(f"warning: a picture has {train.most_objects} objects, more than the {s['num_queries']} queries; the rest can't be found")
    return s


def choose_image_size(split, smallest):
    """The shortest side at which a small object (the data's 20th percentile) is still 20 pixels wide, within reason."""
    import numpy as np

    side = np.median([min(r.width, r.height) for r in split.records])
    relative = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) / min(r.width, r.height) for r in split.records for b in r.boxes]
    wanted = 20 / max(float(np.quantile(relative, 0.2)), 1e-3)
    return int(min(max(wanted, smallest), max(2 * smallest, 640), max(side, smallest)) // 16 * 16)


def next_free(path):
    candidates = [path] + [path.with_name(f"{path.name}-{i}") for i in range(2, 1000)]
    return str(next(p for p in candidates if not p.exists()))


def find_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bfloat16():
    """Whether this machine's matrix units take bfloat16: recent GPUs, CPUs with AMX. AVX-512's own is no faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def autocast(settings, device):
    """bfloat16 for what is safe in it, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if settings["precision"] == "bfloat16" else nullcontext()


def build_optimizer(model, s):
    """AdamW: no decay on norms, biases and other vectors; the backbone's blocks at their own learning rates."""
    scale = math.sqrt(s["batch_size"] * s["accumulate"] / 16)
    depths = parameter_depths(model.backbone)
    last = max(depths.values())
    groups = {}
    for name, parameter in model.named_parameters():
        lr = s["lr"]
        if name.startswith("backbone."):
            lr = s["backbone_lr"] * s["layer_decay"] ** (last - depths[name.removeprefix("backbone.")])
        decay = s["weight_decay"] if parameter.ndim > 1 else 0.0
        groups.setdefault((lr * scale, decay), []).append(parameter)
    groups = [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    return torch.optim.AdamW(groups, fused=True)


def learning_rate_factor(progress, s):
    """progress in [0, 1] of the budget -> share of the peak learning rate."""
    warm = min(1.0, progress / s["warmup"]) if s["warmup"] else 1.0
    if s["schedule"] == "step":  # DETR: a tenth for the last third
        return warm * (1.0 if progress < 2 / 3 else 0.1)
    return warm * (1 - progress)


@torch.no_grad()
def update_average(average, model, step):
    """Averages over about the last twelfth of the run so far, so that no budget needs a decay of its own; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), min(1.0, 12 / (step + 12)))
    for ours, theirs in zip(average.buffers(), model.buffers()):
        ours.copy_(theirs)


def main():
    given, resume = parse_arguments()
    saved = None
    if resume is not None:
        saved = read_checkpoint(Path(resume) / "last.pth")
        given = saved["config"]

    # Data
    demo = given.get("data") in (None, "data/demo")
    if demo and not Path("data/demo").exists():
        print("drawing the demo data set into data/demo")
        make_demo("data/demo")
    data = given.get("data") or "data/demo"
    train, val = load_splits(data, given.get("train_split"), given.get("val_split"), given.get("skip_bad_images", False))
    for split in (train, val):
        boxes = sum(int((~r.ignored).sum()) for r in split.records)
        print(f"{split.name}: {len(split.records):,} pictures, {boxes:,} boxes, {len(split.classes)} classes")
        for remark in split.remarks:
            print(f"  {split.name}: {remark}")
    s = saved["config"] if saved else settle(given, train, val)
    if saved and saved["classes"] != train.classes:
        raise UserError(f"{data}: its classes are no longer those that {resume} was trained on")

    # Model
    device = find_device()
    torch.manual_seed(s["seed"])
    model, criterion, postprocess = build_model(s if saved is None else {**s, "backbone_weights": None})
    if s["checkpoint_activations"]:
        model.backbone.checkpoint_activations()
    model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, s)
    average = build_model({**s, "backbone_weights": None})[0].to(device) if s["ema"] else None
    if average is not None:
        average.load_state_dict(model.state_dict())
    divisor = model.backbone.size_divisor
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{s['detector']} on {s['backbone']} ({s['backbone_weights']}), {millions:.1f} M parameters, {device.type}, {s['precision']}")

    # Loaders: training pictures come as one endless stream, cut into full batches.
    jitter = dict(color_jitter=s["color_jitter"], rotate=s["rotate"])
    train_set = DetectionDataset(train, train_transforms(s["image_size"], **jitter))
    val_set = DetectionDataset(val, eval_transforms(s["image_size"]))
    batch, accumulate = s["batch_size"], s["accumulate"]
    steps_per_epoch = math.ceil(len(train_set) / (batch * accumulate))
    step, epoch, spent, best, bad_steps = 0, 0, 0.0, -1.0, 0

    run_folder = Path(s["out"])
    if saved:
        progress_state = saved["training"]
        step, spent, best = progress_state["step"], progress_state["spent"], progress_state["best"]
        model.load_state_dict(progress_state["model"])
        optimizer.load_state_dict(progress_state["optimizer"])
        if average is not None:
            average.load_state_dict(saved["model"])
        torch.set_rng_state(progress_state["rng"])
        if device.type == "cuda" and progress_state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(progress_state["cuda_rng"])
        run_folder = Path(resume)
    elif (run_folder / "last.pth").exists():
        raise UserError(f"{run_folder} already holds a run; go on with --resume {run_folder}, or choose another --out")
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "config.json").write_text(json.dumps(s, indent=1))
    batches = EndlessBatches(len(train_set), batch, s["seed"], first=step * accumulate)
    workers = dict(num_workers=s["workers"], persistent_workers=s["workers"] > 0, worker_init_fn=ignore_interrupts)
    own_generator = torch.Generator()  # the loader draws a number at its start; the training's generator must not notice
    loader = DataLoader(train_set, batch_sampler=batches, collate_fn=lambda b: collate(b, divisor), generator=own_generator, pin_memory=device.type == "cuda", **workers)
    stream = iter(loader)
    val_loader = DataLoader(val_set, batch_size=batch, collate_fn=lambda b: collate(b, divisor), num_workers=s["workers"], worker_init_fn=ignore_interrupts)

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))

    def save(name, **more):
        weights = (average if average is not None else model).state_dict()
        content = {"model": weights, "config": s, "classes": train.classes, "category_ids": train.category_ids}
        save_checkpoint(run_folder / name, content | more)

    def save_last():
        save("last.pth", training={
            "step": step, "spent": spent, "best": best, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        })  # fmt: skip

    # Training
    total_steps = min(s["steps"] or math.inf, (s["epochs"] or math.inf) * steps_per_epoch)
    used = lambda: max(step / total_steps, spent / 60 / s["minutes"] if s["minutes"] else 0.0)
    show_bar = sys.stderr.isatty()
    bar = tqdm(total=100, bar_format="{desc} {percentage:3.0f}% {bar:20} {postfix}", disable=not show_bar, leave=False)
    last_evaluation, evaluation_seconds = time.time(), 0.0
    sums, counted = {}, 0
    while used() < 1 and not stop:
        model.train()
        train_backbone = step // steps_per_epoch >= s["freeze_backbone"]
        if not train_backbone:
            model.backbone.eval()
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(train_backbone)
        step_started = time.time()

        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(max(used(), 1e-3), s)
        for _ in range(accumulate):
            images, mask, targets = next(stream)
            if step == 0 and not (run_folder / "train_batch.png").exists():
                plots.draw_batch(images, mask, targets, train.classes).save(run_folder / "train_batch.png")
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            mask = mask.to(device, non_blocking=True)
            targets = [{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
            with autocast(s, device):
                outputs = model(images, mask, targets)
            losses = criterion(outputs, targets)
            loss = sum(losses.values())
            (loss / accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            counted += 1
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip"] or math.inf)
        if torch.isfinite(norm):
            optimizer.step()
            bad_steps = 0
        else:  # the weights stay as they were
            bad_steps += 1
            tqdm.write(f"step {step}: the loss or a gradient is not finite; step skipped")
            if bad_steps == 10:
                raise UserError(f"ten steps in a row gave no finite loss; try a lower --lr than {s['lr']} or --precision float32. The last good state: --resume {run_folder}")
        optimizer.zero_grad()
        if average is not None:
            update_average(average, model, step)
        step += 1
        spent += time.time() - step_started

        bar.set_description_str(f"epoch {(step - 1) // steps_per_epoch + 1}")
        bar.n = 100 * min(used(), 1)
        left = spent * (1 / max(used(), 1e-6) - 1)
        if show_bar and step % 5 == 0:
            bar.set_postfix_str(f"loss {float(loss):.2f}  {60 * step // max(spent, 1):.0f} steps/min  {int(left) // 60}:{int(left) % 60:02d} left")

        if step % steps_per_epoch and used() < 1:
            continue

        # End of an epoch, or of the budget
        epoch = math.ceil(step / steps_per_epoch)
        row = {"epoch": epoch, "step": step, "minutes": round(spent / 60, 3), "lr": optimizer.param_groups[0]["lr"]}
        row["losses"] = {name: round(float(value) / max(counted, 1), 5) for name, value in sums.items()}
        sums, counted = {}, 0
        due = epoch % s["eval_every"] == 0 if s["eval_every"] else time.time() - last_evaluation >= 9 * evaluation_seconds
        if due or used() >= 1:
            started = time.time()
            detector = average if average is not None else model
            with autocast(s, device):
                figures, found = evaluate(detector, postprocess, val_loader, val, device)
            row |= {name: round(value, 4) for name, value in figures.items()}
            if figures["AP"] > best:
                best = figures["AP"]
                save("best.pth", figures=figures)
                save_samples(run_folder / "val_samples.png", val_set, found, val.classes)
            evaluation_seconds, last_evaluation = time.time() - started, time.time()
        with open(run_folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        if "AP" in row:
            plots.draw_curves(run_folder / "log.jsonl", run_folder / "curves.png")
        shown = f"AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}" if "AP" in row else "AP -"
        tqdm.write(f"epoch {epoch:3d}  {spent / 60:5.1f} min  loss {sum(row['losses'].values()):7.3f}  {shown}")
        save_last()
        if s["keep_every"] and epoch % s["keep_every"] == 0:
            save(f"epoch{epoch:04d}.pth")

    bar.close()
    if stop and used() < 1:
        save_last()
        print(f"stopped at step {step}; go on with: python train.py --resume {run_folder}")
        sys.exit(130)
    print(f"best AP {best:.3f}; pictures and curves are in {run_folder}. Detect with:")
    print(f"  python infer.py PICTURE --checkpoint {run_folder / 'best.pth'}")


def ignore_interrupts(_):
    """Ctrl-C reaches the workers too; the main process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def save_samples(path, val_set, found, classes, count=6, threshold=0.4):
    """Truth and detections side by side on the first validation pictures."""
    from torchvision.transforms.v2 import functional as TF

    samples = []
    for index in range(min(count, len(val_set))):
        image, target = val_set.load(index)
        sure = found[index]["scores"] > threshold
        samples.append((TF.to_pil_image(image), target, {k: v[sure] for k, v in found[index].items()}))
    plots.draw_samples(samples, classes).save(path)


if __name__ == "__main__":
    run(main)
