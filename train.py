"""Trains a detector. One loop, for one process or several.

    python train.py                                              the demo: draws a data set, trains on it from nothing
    python train.py --data DIR                                   your data, on a pretrained ECViT
    python train.py --data DIR --backbone dinov3-vits16          another backbone, weights from the Hugging Face hub
    python train.py --data DIR --detector ecdet                  another detector
    python train.py --data DIR --init ecdet_s.pth                from a checkpoint: a released ECDet's, or of a run of yours
    python train.py --data DIR --recipe meta                     DETR as it was published in 2020
    python train.py --resume runs/demo                           goes on exactly where the run was stopped
    torchrun --nproc-per-node 8 train.py --data DIR              eight GPUs, which share each batch

A run leaves config.json, log.jsonl, last.pth, best.pth, curves.png, train_batch.png, val_samples.png and, at its
end, precision_recall.png, confusion.png and mistakes.png in runs/NAME.
"""

import atexit
import gc
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet then runs on the CPU
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import distributed
import plots
from backbones import parameter_depths
from checkpoint import read_checkpoint, save_checkpoint, start_from, write_whole
from datasets import DetectionDataset, EndlessBatches, collate, evaluation_batches, proportions_of, start_worker
from demo_data import make_demo
from detr_model import build_model
from devices import autocast, choose_precision
from errors import UserError, run
from evaluate import crowding, draw_report, evaluate
from layouts import load_splits
from muon import Muon
from settings import DEFAULTS, parse_arguments, settle
from transforms import detail_needed, eval_transforms, train_transforms

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

MUON_LR = 30  # Muon's learning rate relative to AdamW's: 0.024 beside 8e-4
MUON_DECAY = 0.1


def main():
    with ExitStack() as held:  # the lock of the run's folder: given back however the run ends
        status = train_detector(held)
    distributed.finish()
    sys.exit(status)


def train_detector(held):
    """held: an ExitStack that takes what has to be closed at the end -> exit status."""
    given, resume = parse_arguments(__doc__)
    rank, world, device = distributed.start()
    saved = read_checkpoint(Path(resume) / "last.pth") if resume else None
    if saved and "optimizers" not in saved.get("training", {}):
        raise UserError(f"{resume}/last.pth: holds no optimiser's state, or one of an earlier version; infer.py and evaluate.py still open it")

    # Data
    with distributed.first_goes_first():
        train, val = prepare_data(saved["config"] if saved else given)
    initial = read_checkpoint(given["init"]) if given.get("init") else None
    s = distributed.from_first(DEFAULTS | saved["config"] if saved else settle(given, train, initial and initial["config"]))
    choose_precision(s["precision"], device)  # is decided; allows or forbids TF32
    pieces = pieces_of_a_batch(s, world)
    if s["shard"] and world == 1 and not saved:
        raise UserError("--shard spreads the backbone over several processes; start them with torchrun --nproc-per-node N train.py")
    shard = s["shard"] and world > 1
    if saved and saved["classes"] != train.classes:
        raise UserError(f"{s['data']}: its classes are no longer those that {resume} was trained on")

    # Model
    torch.manual_seed(s["seed"])
    model, criterion, postprocess = build_model(s, load_weights=not saved)
    if initial:
        start_from(model, initial, train.classes, given["init"])
    if s["checkpoint_activations"]:
        model.backbone.checkpoint_activations()
    average = None  # EMA of the weights: what is evaluated and kept
    if s["ema"]:
        average = build_model(s, load_weights=False)[0].requires_grad_(False)
        average.load_state_dict(model.state_dict())
    model = distributed.synchronize_norms(model, device)
    for part in (model, average) if s["ema"] else (model,):
        if shard:  # which takes no other memory format
            distributed.shard(part.backbone, device)
        part.to(device, memory_format=torch.contiguous_format if shard else torch.channels_last)
    detector = model if average is None else average
    optimizers = build_optimizers(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=s["precision"] == "float16")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{s['detector']} on {s['backbone']} (weights: {s['init'] or s['backbone_weights']}), {millions:.1f} M parameters, {device.type}, {s['precision']}")

    # Where the run stands
    step, spent, best, best_epoch, sums, counted, lr_scale = 0, 0.0, -math.inf, 0, {}, 0, 1.0
    folder = Path(resume or s["out"])

    def restore(saved):
        distributed.load(model, optimizers, saved["training"])
        distributed.load(detector, [], saved)

    if saved:
        restore(saved)
        state = saved["training"]
        step, spent, best, sums, counted = (state[key] for key in ("step", "spent", "best", "sums", "counted"))
        best_epoch, lr_scale = state.get("best_epoch", 0), state.get("lr_scale", 1.0)
        if scaler.is_enabled() and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
    stop = []  # filled by Ctrl-C: the step under way is finished first

    def ask_to_stop(*_):
        stop.append(True)
        if len(stop) > 2:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    if rank:
        torch.manual_seed(s["seed"] + 1000 * rank + step)
    else:
        held.enter_context(locked(folder))
        open_folder(folder, s, step, resumed=bool(saved))
    board = open_board(folder) if s["tensorboard"] and not rank else None
    trained = model if world == 1 else distributed.replicate(model)

    def save(name, **more):
        content = {"model": distributed.whole(detector.state_dict()), "config": s, "classes": train.classes, "category_ids": train.category_ids}
        if not rank:
            save_checkpoint(folder / name, content | more)

    def save_last():
        cuda_rng = torch.cuda.get_rng_state() if device.type == "cuda" else None
        save("last.pth", training={
            "step": step, "spent": spent, "best": best, "best_epoch": best_epoch, "sums": sums, "counted": counted, "lr_scale": lr_scale,
            "model": distributed.whole(model.state_dict()), "optimizers": [distributed.whole(o.state_dict()) for o in optimizers],
            "scaler": scaler.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda_rng,
        })  # fmt: skip

    # The budget decides when training ends, what the learning rate is, and how pictures are augmented.
    step_pictures = s["batch_size"] * s["accumulate"]
    steps_per_epoch = math.ceil(len(train.records) / step_pictures)
    total_steps = min(s["steps"] or math.inf, (s["epochs"] or math.inf) * steps_per_epoch)
    used = lambda step: max(step / total_steps, spent / 60 / s["minutes"] if s["minutes"] else 0.0)
    phase = lambda shown: augmentation_phase(shown // len(train.records), used(shown // step_pictures), s)

    # Loaders: training pictures come as one endless stream, cut into full batches
    pad_and_stack = partial(collate, divisor=model.backbone.size_divisor)
    workers = dict(num_workers=s["workers"], collate_fn=pad_and_stack, worker_init_fn=start_worker, pin_memory=device.type == "cuda")
    cache_bytes = 2**30 // max(1, s["workers"])  # each worker keeps its own
    augmentation = train_transforms(s["image_size"], s["augment"], s["color_jitter"], s["rotate"], s["square"])
    train_set = DetectionDataset(train, augmentation, cache_bytes, detail_needed(s["image_size"], s["augment"]))
    form = s["image_size"], s["square"], s["exact_sides"]
    val_set = DetectionDataset(val, eval_transforms(*form), cache_bytes)
    proportions = None if s["square"] else proportions_of(train)
    batches = EndlessBatches(
        len(train_set), s["batch_size"], s["seed"], phase, step * s["accumulate"], (rank, world), proportions, s["mosaic_chance"], pieces
    )  # fmt: skip
    gc.freeze()  # a later collection would touch, and so copy, what the workers share with this process
    atexit.register(gc.unfreeze)  # or some libraries take the end for a leak
    # A loader draws a number when it starts; with a generator of its own it leaves the training's alone.
    readable = partial(while_readable, save=None if shard else save_last, folder=folder)
    stream = readable(DataLoader(train_set, batch_sampler=batches, generator=torch.Generator(), **workers))
    val_batches = evaluation_batches(val, max(1, s["batch_size"] // world // pieces), model.backbone.size_divisor, *form)
    val_loader = DataLoader(val_set, batch_sampler=distributed.share(val_batches), generator=torch.Generator(), **workers)

    # Training
    last_evaluation, evaluation_seconds, best_found = time.time(), 0.0, None
    last_saved, begun, warm = -math.inf, step, spent  # so that there is something to go back to from the first step on; warm: seconds when the first steps, which are slower, were over
    accumulate = s["accumulate"] * pieces
    stopped = patience_over = rolled_back = False
    skipped, skipped_before, bad = 0, 0, []  # steps without a finite gradient: how many, by the last epoch's end, and the pictures of those in a row
    statistics = [value for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    sound = [value.clone() for value in statistics]
    bar = tqdm(total=100, bar_format="{desc} {percentage:3.0f}% {bar:20} {postfix}", disable=True if rank else None, leave=False)
    with distributed.lost_process(None if shard else save_last, folder):
        while used(step) < 1 and not stopped and not patience_over:
            started = time.time()
            model.train()
            train_backbone = s["freeze_backbone"] != "all" and step // steps_per_epoch >= s["freeze_backbone"]
            model.backbone.requires_grad_(train_backbone).train(train_backbone)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak_lr"] * lr_scale * learning_rate_factor(used(step), s)
            if statistics:
                torch._foreach_copy_(sound, statistics)
            shown, found_losses = [], []
            parts = [next(stream) for _ in range(accumulate)]
            objects = max(1, sum(len(t["labels"]) for *_, targets in parts for t in targets)) / accumulate
            for part, (images, mask, targets) in enumerate(parts):
                trained.require_backward_grad_sync = part == accumulate - 1  # several processes: gradients are sent with the last
                if step == 0 and part == 0 and not rank:
                    plots.draw_batch(images, mask, targets, train.classes).save(folder / "train_batch.png")
                shown += [str(train.records[t["image_id"]].path) for t in targets]
                images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
                targets = [{key: t[key].to(device, non_blocking=True) for key in ("labels", "boxes")} for t in targets]
                with autocast(s["precision"], device):
                    outputs = trained(images, mask, targets)
                losses = criterion(outputs, targets, objects)
                loss = sum(losses.values())
                scaler.scale(loss / accumulate).backward()
                found_losses.append({name: value.detach() for name, value in losses.items()})
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = distributed.clip_gradients(list(model.parameters()), s["clip"] or math.inf)
            if torch.isfinite(norm):
                for optimizer in optimizers:
                    optimizer.step()
                if average is not None:
                    update_average(average, model, step, s["ema_horizon"])
                for losses in found_losses:
                    sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
                counted, bad = counted + len(found_losses), []
            elif answers_overflow(scaler, found_losses, device):
                pass  # the scaler halves its factor: float16 is meant to run into its range now and then
            else:  # the weights stay as they were, and what batch norms have seen
                if statistics:
                    torch._foreach_copy_(statistics, sound)
                skipped, bad = skipped + 1, [*bad, shown]
                tqdm.write(f"step {step}: the loss or a gradient is not finite; step left out, {skipped} so far")
                if len(bad) == 3:
                    if rolled_back or not distributed.from_first((folder / "last.pth").exists()):
                        give_up(bad, folder, rank, s)
                    restore(distributed.from_first(None if rank else read_checkpoint(folder / "last.pth")))
                    rolled_back, lr_scale, bad = True, lr_scale / 2, []
                    tqdm.write(f"three in a row: back to the weights of {folder / 'last.pth'}, with half the learning rate from now on")
            scaler.update()
            model.zero_grad()
            step += 1
            save_due = not bad and time.time() - last_saved >= s["save_every"]
            spent, stopped, save_due = distributed.most_of([spent + time.time() - started, float(bool(stop)), float(save_due)], device)
            if step == begun + 2:
                warm = spent
            if step == begun + 10 and used(step) < 1:
                for line in cost(spent, (spent - warm) / 8, total_steps - step, s, None if saved else given, world):
                    tqdm.write(line)
            if not bar.disable and step % 5 == 0:
                left = spent / used(step) - spent
                bar.n = min(100, 100 * used(step))
                bar.set_description_str(f"epoch {math.ceil(step / steps_per_epoch)}")
                bar.set_postfix_str(f"loss {float(loss):.2f}  {step / spent * 60:.0f} steps/min  {left // 60:.0f}:{left % 60:02.0f} left")
            if step % steps_per_epoch and used(step) < 1:
                if save_due:
                    save_last()
                    last_saved = time.time()
                continue

            # End of an epoch, or of the budget
            epoch = math.ceil(step / steps_per_epoch)
            row = {"epoch": epoch, "step": step, "minutes": round(spent / 60, 3), "lr": optimizers[0].param_groups[-1]["lr"]}
            names = distributed.gathered(dict.fromkeys(sums))  # a process without objects has fewer
            row["losses"] = {name: round(float(distributed.mean_of(sums.get(name, 0.0) / max(1, counted), device)), 5) for name in names}
            row |= {"skipped": skipped} if skipped else {}
            sums, counted = {}, 0
            due = epoch % s["eval_every"] == 0 if s["eval_every"] else time.time() - last_evaluation >= 9 * evaluation_seconds
            figures, over = None, used(step) >= 1
            if over:
                save_last()
            if over or (distributed.from_first(due) and not stopped):
                started = time.time()
                stop_early = lambda: not over and distributed.most_of([float(bool(stop))], device)[0]
                distributed.agree_on_buffers(detector)
                with autocast(s["precision"], device):
                    figures, curves, found = evaluate(detector, postprocess, readable(val_loader), val, device, stop_early)
                stopped = stopped or figures is None
            if figures is not None:
                row |= {name: round(value, 4) for name, value in figures.items()}
                if figures["AP"] >= best:
                    best, best_epoch, best_found = figures["AP"], epoch, (found, curves)
                    save("best.pth", figures=figures)
                    if not rank:
                        draw_samples(val_set, found, val.classes).save(folder / "val_samples.png")
            if not rank:
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
            if board is not None:
                log_scalars(board, row)
            if "AP" in row:
                patience_over = s["patience"] is not None and epoch - best_epoch >= s["patience"]
                if not rank:
                    plots.draw_curves(folder / "log.jsonl", folder / "curves.png")
                last_evaluation, evaluation_seconds = time.time(), time.time() - started
            measured = f"AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}" if "AP" in row else "AP -"
            tqdm.write(f"epoch {epoch:3d}  {spent / 60:5.1f} min  loss {sum(row['losses'].values()):7.3f}  {measured}")
            if save_due or over or best_epoch == epoch:  # last.pth knows how good best.pth is
                save_last()
                last_saved = time.time()
            rolled_back, skipped_before = rolled_back and skipped > skipped_before, skipped
            if s["keep_every"] and epoch % s["keep_every"] == 0:
                save(f"epoch{epoch:04d}.pth")

    bar.close()
    if patience_over or used(step) < 1:
        save_last()
    finished = patience_over or used(step) >= 1
    if best_found is None and finished and distributed.from_first((folder / "best.pth").exists()):  # it was before a --resume
        distributed.load(detector, [], distributed.from_first(None if rank else read_checkpoint(folder / "best.pth")))
        with autocast(s["precision"], device):
            _, curves, found = evaluate(detector, postprocess, readable(val_loader), val, device, lambda: distributed.most_of([float(bool(stop))], device)[0])
        best_found = found and (found, curves)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # all is saved: there is nothing left to stop
    if patience_over:
        print(f"no better AP in {s['patience']} epochs; ended after step {step}")
    elif used(step) < 1:
        print(f"stopped after step {step}; go on with: python train.py --resume {folder}")
        return 130
    if best_found is not None and not rank:
        draw_report(val, *best_found, folder)
    print(f"best AP {best:.3f} after {spent / 60:.1f} minutes of training; curves and pictures are in {folder}. To detect:")
    print(f"  python infer.py PICTURE --checkpoint {folder / 'best.pth'}")
    return 0


def prepare_data(s):
    """-> (training Split, validation Split), checked whole; what was found is printed. The demo is drawn if it is not there."""
    data = s.get("data") or "data/demo"
    if data == "data/demo" and not Path(data).exists():
        print("drawing the demo into data/demo")
        make_demo(data)
    splits = load_splits(
        data, s.get("train_split"), s.get("val_split"), s.get("skip_bad_images", False), s.get("layout"), s.get("val_fraction"), s.get("allow_outside", False)
    )  # fmt: skip
    for split in splits:
        boxes = sum(int((~record.ignored).sum()) for record in split.records)
        print(f"{split.name}: {len(split.records):,} pictures, {boxes:,} boxes, {len(split.classes)} classes")
        for remark in split.remarks:
            print(f"  {split.name}: {remark}")
    if crowding(splits[1]):
        print(f"  {splits[1].name}: {crowding(splits[1])}")
    return splits


@contextmanager
def locked(folder):
    """Makes a run's folder, if it is not there, and keeps other processes out of it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = fcntl and os.open(folder, os.O_RDONLY)
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is training in it; wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another --out") from None
    try:
        yield
    finally:
        if fcntl:
            os.close(descriptor)


def open_folder(folder, s, step, resumed):
    """Begins a new run's folder, or cuts a resumed run's log back to the step that was saved. Raises UserError."""
    log = folder / "log.jsonl"
    if not resumed and (folder / "last.pth").exists():
        raise UserError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out")
    try:
        write_whole(folder / "config.json", json.dumps(s, indent=1).encode())
        write_whole(log, "".join(line for line in read_rows(log) if resumed and json.loads(line)["step"] <= step).encode())
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another --out") from None


def read_rows(log):
    """The lines of log.jsonl; one that was cut off by a crash is left out."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [line for line in lines if line.endswith("}\n")]


def give_up(bad, folder, rank, s):
    """Writes down which pictures led to numbers that are not finite. Raises UserError."""
    by_process = distributed.gathered({rank: bad})
    named = [name for batches in by_process.values() for names in batches for name in names]
    if not rank:
        (folder / "bad_batches.txt").write_text("".join(f"{name}\n" for name in named))
    few = ", ".join(named[:3])
    raise UserError(
        f"three steps in a row without a finite loss, and no way back; their {len(named)} pictures ({few}, ...) are named in {folder / 'bad_batches.txt'}. "
        f"Look at them, or try a lower --lr than {s['lr']}, or --precision float32"
    )


def open_board(folder):
    """TensorBoard's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: TensorBoard is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder))


def log_scalars(board, row):
    """A row of log.jsonl for TensorBoard, by step."""
    scalars = {f"losses/{name.removeprefix('loss_')}": value for name, value in row["losses"].items()}
    scalars |= {f"validation/{name}": value for name, value in row.items() if name.startswith(("AP", "AR", "class/")) and value >= 0}
    for name, value in (scalars | {"lr": row["lr"], "loss": sum(row["losses"].values())}).items():
        board.add_scalar(name, value, row["step"])
    board.flush()


def pieces_of_a_batch(s, world):
    """In how many pieces each process takes its part of a batch, so that device_batch images at most are on a device at a time.
    Raises UserError."""
    part, rest = divmod(s["batch_size"], world)
    if rest:
        raise UserError(f"a batch of {s['batch_size']} can't be shared by {world} processes; choose another --batch-size")
    fewest = math.ceil(part / (s["device_batch"] or part))
    return next(pieces for pieces in range(fewest, part + 1) if part % pieces == 0)


def answers_overflow(scaler, found_losses, device):
    """Whether gradients that are not finite are float16's alone: all processes' losses are finite, and the scaler can give way."""
    broken = not all(bool(value.isfinite()) for losses in found_losses for value in losses.values())
    broken = distributed.most_of([float(broken)], device)[0]
    return scaler.is_enabled() and not broken and scaler.get_scale() > 1


def cost(spent, seconds, steps, s, given, world):
    """What the whole run will take, in lines to print. spent: seconds so far; seconds of a step; steps that are left, at most;
    given: the command line's settings, None for a resumed run."""
    whole = spent + seconds * steps
    if s["minutes"]:
        whole = min(whole, 60 * s["minutes"])
    minutes = math.ceil(whole / 60)
    long = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    more = "" if s["eval_every"] else "; evaluation adds up to a tenth"
    lines = [f"the training will take about {long} on this machine, {seconds:.2g} s a step{more}"]
    if whole <= 3600 or given is None:
        return lines
    start = "python train.py" if world == 1 else f"torchrun --nproc-per-node {world} train.py"
    kept = {key: value for key, value in given.items() if key not in ("epochs", "steps", "minutes", "out")} | {"minutes": 20}
    lines.append("what twenty minutes can give, stopped with Ctrl-C and started as:")
    if s["image_size"] > 224:
        smaller = max(224, s["image_size"] // 2 // 32 * 32)
        lines.append(f"  {start} {as_options(kept | {'image_size': smaller})}")
    if s["backbone"] != "ecvit-nano" and not s["init"]:
        of_the_backbone = ("backbone", "backbone_weights", "size", "layers", "patch_size", "patch_resize", "image_size")
        rest = {key: value for key, value in kept.items() if key not in of_the_backbone}
        lines.append(f"  {start} {as_options(rest | {'backbone': 'ecvit-nano'})}")
    if len(lines) == 2:
        lines.append(f"  {start} {as_options(kept)}")
    return lines


def as_options(given):
    """Settings of the command line -> as one writes them there."""
    words = []
    for key, value in given.items():
        option = key.replace("_", "-")
        words += [f"--no-{option}" if value is False else f"--{option}"] + [str(value)] * (not isinstance(value, bool))
    return shlex.join(words)


def build_optimizers(model, s):
    """-> [AdamW], or [AdamW, Muon] where Muon takes the inner matrices of all that starts from random weights.

    No decay on norms, biases and other vectors; the backbone's blocks at their own learning rates.
    """
    depths = parameter_depths(model.backbone)
    last = max(depths.values())
    groups = {}
    for name, parameter in model.named_parameters():
        lr, from_scratch = s["lr"], s["init"] is None
        if name.startswith("backbone."):
            lr = s["backbone_lr"] * s["layer_decay"] ** (last - depths[name.removeprefix("backbone.")])
            from_scratch = from_scratch and s["backbone_weights"] == "none"
        sharded = s["shard"] and name.startswith("backbone.")  # Muon wants a matrix whole
        muon = s["optimizer"] == "muon" and from_scratch and is_inner_matrix(name, parameter) and not sharded
        if muon:
            lr, decay = MUON_LR * lr, MUON_DECAY
        else:
            decay = s["weight_decay"] if parameter.ndim > 1 or s["decay_all"] else 0.0
        groups.setdefault((muon, lr, decay, sharded), []).append(parameter)
    groups = [(muon, {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}) for (muon, lr, decay, _), parameters in groups.items()]
    optimizers = [torch.optim.AdamW([group for muon, group in groups if not muon], fused=True)]
    if any(muon for muon, _ in groups):
        optimizers.append(Muon([group for muon, group in groups if muon], lr=MUON_LR * s["lr"]))
    return optimizers


def is_inner_matrix(name, parameter):
    """Weights of layers within the network, not those that give classes or boxes, nor embeddings."""
    gives_classes_or_edges = re.search(r"class|score_head|dec_bbox_head\.\d+\.layers\.2|regression_head|content", name)
    return name.endswith(".weight") and not gives_classes_or_edges and min(len(parameter), parameter[0].numel()) >= 16


def augmentation_phase(passes, progress, s):
    """passes over the data, progress in [0, 1) of the budget -> "plain", "varied" or "mixed", see EndlessBatches."""
    if passes < s["plain_passes"] or progress >= 1 - s["plain_end"]:
        return "plain"
    return "mixed" if progress < s["mosaic"] else "varied"


def learning_rate_factor(progress, s):
    """progress in [0, 1) of the budget -> share of the peak learning rate."""
    warm = min(1.0, max(progress, 1e-3) / s["warmup"]) if s["warmup"] else 1.0
    if s["schedule"] == "flat-cosine":  # DEIM: flat for half of the run, then a cosine to half of the peak
        return warm * (0.75 + 0.25 * math.cos(math.pi * max(0.0, 2 * progress - 1)))
    if s["schedule"] == "step":  # DETR: a tenth for the last third
        return warm * (1.0 if progress < s["lr_drop"] else 0.1)
    return warm * (1 - progress)


@torch.no_grad()
def update_average(average, model, step, horizon):
    """EMA whose window grows to a twelfth of the steps so far, so that it fits any budget, or to `horizon` steps at most.

    Batch statistics are averaged as well: those of the last few batches are too noisy to evaluate with.
    """
    weight = max(min(1.0, 12 / (step + 12)), 1 / horizon if horizon else 0.0)
    ours, theirs = ([distributed.local(value) for value in m.state_dict().values()] for m in (average, model))
    real = [i for i, value in enumerate(ours) if value.is_floating_point()]
    torch._foreach_lerp_([ours[i] for i in real], [theirs[i] for i in real], weight)


def while_readable(loader, save, folder):
    """Its batches. Where the next can't be had, saves what was learnt (save may be None); raises UserError where an image or
    a worker is gone, and anything else, a fault of the code, as it came."""
    try:
        yield from loader
    except Exception as error:  # a worker's comes with its traceback as its message
        if save is not None:
            save()
        lost = isinstance(error, RuntimeError) and re.search("DataLoader worker .*(exited|killed)", str(error))
        if not lost and not isinstance(error, (UserError, OSError)):
            raise
        cause = str(error).strip().splitlines()[-1].removeprefix("errors.UserError: ")
        if lost:
            cause = f"a process that prepares pictures was killed, for want of memory perhaps ({str(error).splitlines()[0][:200]})"
        if not (folder / "last.pth").exists():
            raise UserError(f"{cause}; nothing was saved yet") from None
        raise UserError(f"{cause}; what was learnt is saved, go on with --resume {folder}") from None


def draw_samples(dataset, found, classes, count=6, threshold=0.4):
    """Truth and detections side by side on a data set's first pictures -> PIL image."""
    samples = []
    for index in range(min(count, len(dataset))):
        image, target = dataset.load(index)
        sure = found[index]["scores"] > threshold
        samples.append((TF.to_pil_image(image), target, {key: value[sure] for key, value in found[index].items()}))
    return plots.draw_samples(samples, classes)


if __name__ == "__main__":
    run(main)
