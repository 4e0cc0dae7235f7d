"""Trains a detector, on one process or several.

    python train.py                                              the demo: draws a dataset, trains on it from scratch
    python train.py --data DIR                                   your data, on a pretrained ECViT
    python train.py --data DIR --backbone dinov3-vits16          another backbone, weights from the Hugging Face hub
    python train.py --data DIR --detector ecdet                  another detector
    python train.py --data DIR --init ecdet_s.pth                starts from a checkpoint: a released ECDet or your own
    python train.py --data DIR --recipe meta                     DETR as published in 2020
    python train.py --resume runs/demo                           continues exactly where the run was stopped
    python train.py --resume runs/mine --data NEW                the same, after the data was moved
    torchrun --nproc-per-node 8 train.py --data DIR              eight GPUs, which share each batch

A run writes config.json, log.jsonl, last.pth, best.pth, curves.png, train_batch.png, val_samples.png and, at its end,
precision_recall.png, confusion.png, mistakes.png and report.html into runs/NAME.
"""

import atexit
import gc
import math
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet runs on the CPU
import torch
from torch.utils.data import DataLoader

import distributed
from checkpoint import data_of, read_checkpoint, start_from
from datasets import DetectionDataset, EndlessBatches, aspect_ratios_of, collate, evaluation_batches
from demo_data import make_demo
from detr_model import build_model
from devices import autocast, choose_precision
from errors import UserError, run_script
from layouts import load_splits
from metrics import crowding
from optim import build_optimizers, learning_rate_factor, set_learning_rate, update_ema
from resolve import resolve_settings
from runs import Run
from settings import Settings, parse_arguments
from tiles import cut_into_tiles
from transforms import allow_large_images, detail_needed, eval_transforms, train_transforms

DEMO = "data/demo"


def main():
    status = train()
    distributed.finish()
    sys.exit(status)


def train():
    """-> exit status: 0, or 130 if the run was stopped."""
    given, resume = parse_arguments(__doc__)
    device = distributed.start()
    train_split, val_split, s, saved, initial = prepare(given, resume, device)
    torch.manual_seed(s.seed)
    model, criterion, postprocess = build_model(vars(s), load_weights=not saved)
    if not saved:
        s.random_parts = list(getattr(model.backbone, "random_parts", ()))
    if initial:
        start_from(model, initial, train_split.classes, s.init)
    model, ema = place(model, s, device)
    optimizers = build_optimizers(model, s)
    print(describe(model, s, device))

    with Run(s, train_split, val_split, model, ema, optimizers, device, saved, given) as run:
        return fit(run, criterion, postprocess)


def fit(run, criterion, postprocess):
    """The training loop, for every detector -> exit status."""
    s, model, ema, optimizers, scaler, device = run.s, run.model, run.ema, run.optimizers, run.scaler, run.device
    model.backbone.requires_grad_(True)  # DDP leaves out what has no gradient when it starts
    replica = distributed.replicate(model) if distributed.world_size() > 1 else model
    batches, val_loader = build_loaders(run, model.backbone.size_divisor)
    pieces = s.accumulate * count_pieces(s)
    if run.lacks_last_evaluation:
        run.evaluate(postprocess, val_loader)
        run.finish_epoch()

    while not run.is_over:
        run.begin_step()
        model.train()
        run.freeze_backbone()
        set_learning_rate(optimizers, run.state.lr_scale * learning_rate_factor(run.progress, s))

        step_batches = [next(batches) for _ in range(pieces)]
        run.show_batch(*step_batches[0])
        objects = sum(len(t["labels"]) for *_, targets in step_batches for t in targets)
        objects = distributed.average_count(objects, device) / pieces
        for i, (images, mask, targets) in enumerate(step_batches):
            replica.require_backward_grad_sync = i == pieces - 1  # processes exchange gradients once a step
            images, targets = to_device(images, targets, device)
            with autocast(s.precision, device):
                outputs = replica(images, mask, targets)
            losses = criterion(outputs, targets, objects)
            scaler.scale(sum(losses.values()) / pieces).backward()
            run.add_losses(losses)

        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if distributed.clip_gradients(list(model.parameters()), s.clip or math.inf).isfinite():
            for optimizer in optimizers:
                optimizer.step()
            update_ema(ema, model, run.step, s.ema_horizon)
            run.count_losses()
        else:
            run.skip_step(step_batches)
        scaler.update()
        model.zero_grad()
        run.finish_step()

        if run.epoch_is_over:
            if run.evaluation_is_due():
                run.evaluate(postprocess, val_loader)
            run.finish_epoch()

    return run.finish(postprocess, val_loader)


def prepare(given, resume, device):
    """The command line's settings, the run to resume or None -> training and validation Split, Settings, the last.pth
    to resume from and the checkpoint to start from, each or None. Raises UserError."""
    saved = read_checkpoint(Path(resume) / "last.pth") if resume else None
    if saved and "optimizers" not in saved.get("training", {}):
        raise UserError(
            f"{resume}/last.pth: holds no optimizer state, or that of an earlier version; "
            "infer.py and evaluate.py still open it"
        )
    config = saved["config"] | {"data": data_of(saved["config"], resume)} | given if saved else given
    allow_large_images(config.get("large_images", False))
    data = config.get("data") or DEMO
    if saved and data != DEMO and not Path(data).exists():
        raise UserError(f"{data}: no such folder; if it was moved, add where it is now: --data DIR")
    with distributed.main_process_first():
        train_split, val_split = load_data(config)
    initial = read_checkpoint(given["init"]) if given.get("init") else None
    if saved:
        s = Settings.from_config(config | {"out": str(resume)})
    else:
        s = resolve_settings(given, train_split, initial and initial["config"])
    s = distributed.broadcast(s)
    s.data_from_run = path_from(s.data, s.out)
    train_split.value_range = val_split.value_range = s.value_range
    choose_precision(s.precision, device)  # allows or forbids TF32
    count_pieces(s)
    if s.shard and distributed.world_size() == 1 and not saved:
        raise UserError(
            "--shard spreads the backbone over several processes; start them with torchrun --nproc-per-node N train.py"
        )
    if saved and saved["classes"] != train_split.classes:
        raise UserError(f"{s.data}: its classes are no longer those that {resume} was trained on")
    if saved:
        compare_counts(saved["training"].get("images"), [train_split, val_split], resume)
    return train_split, val_split, s, saved, initial


def path_from(path, folder):
    """The relative path that leads from a folder to a path; None from one drive of Windows to another."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return None


def compare_counts(before, splits, resume):
    """Prints a line if the splits have not as many images as before; None: the run did not say how many."""
    now = [len(split.records) for split in splits]
    if before and before != now:
        print(f"warning: {now[0]:,} + {now[1]:,} images, but {resume} was trained on {before[0]:,} + {before[1]:,}")


def load_data(s):
    """s: a dict of settings -> (training Split, validation Split), validated; what was found is printed.

    The demo is drawn if it is not there.
    """
    data = s.get("data") or DEMO
    if data == DEMO and not Path(data).exists():
        print(f"drawing the demo into {DEMO}")
        make_demo(data)
    keys = "train_split", "val_split", "skip_bad_images", "layout", "val_fraction", "allow_outside"
    keys = *keys, "classes", "single_class"
    splits = load_splits(data, **{key: s[key] for key in keys if s.get(key) is not None})
    if s.get("tile"):
        splits[0] = cut_into_tiles(splits[0], s["tile"], for_training=True)
    for split in splits:
        print("\n".join(split.describe()))
    if crowding(splits[1]):
        print(f"  {splits[1].name}: {crowding(splits[1])}")
    return splits


def place(model, s, device):
    """The model and its EMA, or None, on the device, with synchronised norms and sharded backbones where asked for."""
    if s.checkpoint_activations:
        model.backbone.checkpoint_activations()
    ema = None
    if s.ema:
        ema = build_model(vars(s), load_weights=False)[0].requires_grad_(False)
        ema.load_state_dict(model.state_dict())
    model = distributed.synchronize_norms(model, device)
    sharded = s.shard and distributed.world_size() > 1
    for part in (model, ema) if s.ema else (model,):
        if sharded:
            distributed.shard(part.backbone, device)
        part.to(device, memory_format=torch.contiguous_format if sharded else torch.channels_last)
    return model, ema


def describe(model, s, device):
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    weights = s.init or s.backbone_weights
    return (
        f"{s.detector} on {s.backbone} (weights: {weights}), {millions:.1f} M parameters, {device.type}, {s.precision}"
        f"; images are flipped: {s.flip}"
    )


def build_loaders(run, divisor):
    """-> an endless iterator over training batches, and a loader of the validation images.

    Images are padded to multiples of `divisor`.
    """
    s, train_split, val_split = run.s, run.train, run.shown
    rank, world, pieces = distributed.rank(), distributed.world_size(), count_pieces(s)
    cache_bytes = 2**30 // max(1, s.workers)  # every worker has a cache of its own
    options = dict(
        num_workers=s.workers,
        collate_fn=partial(collate, divisor=divisor),
        worker_init_fn=distributed.start_worker,
        pin_memory=run.device.type == "cuda",
    )
    augmentation = train_transforms(s.image_size, s.augment, s.color_jitter, s.rotate, s.square, s.flip)
    dataset = DetectionDataset(train_split, augmentation, cache_bytes, detail_needed(s.image_size, s.augment))
    batches = EndlessBatches(
        len(dataset),
        s.batch_size,
        s.seed,
        run.phase,
        first=run.step * s.accumulate,
        process=(rank, world),
        aspect_ratios=None if s.square else aspect_ratios_of(train_split),
        mixing=s.mosaic_chance,
        pieces=pieces,
    )
    resizing = s.image_size, s.square, s.exact_sides
    val_dataset = DetectionDataset(val_split, eval_transforms(*resizing), cache_bytes)
    val_batches = evaluation_batches(val_split, max(1, s.batch_size // world // pieces), divisor, *resizing)
    gc.freeze()  # a later collection would touch, and so copy, the memory that workers share with this process
    atexit.register(gc.unfreeze)  # or some libraries take the end for a leak
    # A loader draws a number when it starts; with a generator of its own it leaves that of the training alone.
    loader = DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
    val_batches = distributed.my_part(val_batches)
    val_loader = DataLoader(val_dataset, batch_sampler=val_batches, generator=torch.Generator(), **options)
    return run.loading(loader), val_loader


def count_pieces(s):
    """In how many pieces each process takes its part of a batch, so that at most device_batch images are on a device at
    a time. Raises UserError."""
    part, rest = divmod(s.batch_size, distributed.world_size())
    if rest:
        raise UserError(
            f"a batch of {s.batch_size} can't be shared by {distributed.world_size()} processes; "
            "choose another --batch-size"
        )
    fewest = math.ceil(part / (s.device_batch or part))
    return next(pieces for pieces in range(fewest, part + 1) if part % pieces == 0)


def to_device(images, targets, device):
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    return images, [{key: t[key].to(device, non_blocking=True) for key in ("labels", "boxes")} for t in targets]


if __name__ == "__main__":
    run_script(main)
