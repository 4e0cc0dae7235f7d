"""Every setting of a training run: defaults, recipes, the command line, and what is decided from the data.

A recipe says where it differs from DEFAULTS; what is None in both, and not given, `settle` decides and prints.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch

from backbones import find_spec
from errors import UserError

DEFAULTS = dict(
    # data
    data=None,  # folder of a data set; None: the demo
    train_split=None, val_split=None,  # which parts, where the folder has several
    image_size=None,  # shortest side in evaluation; training sides scale with it
    augment="zoom",  # see transforms.train_transforms
    color_jitter=0.0, rotate=0.0,  # strength in [0, 1]; degrees
    workers=None, skip_bad_images=False,
    # model
    detector="detr",
    backbone=None, backbone_weights=None,
    freeze_backbone=0.0,  # epochs before the backbone is trained; "all": never
    checkpoint_activations=False,
    num_queries=None,
    hidden_dim=None, num_heads=None, ffn_dim=None, decoder_layers=None, dropout=0.0,
    # budget: whichever ends first
    epochs=None, steps=None, minutes=None,
    # optimisation
    batch_size=None, accumulate=1,
    optimizer="muon", lr=None, backbone_lr=None,
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
        detector="detr-2020", augment="meta", image_size=800, num_queries=100, hidden_dim=256, num_heads=8, ffn_dim=2048,
        decoder_layers=6, dropout=0.1, batch_size=2, epochs=300, optimizer="adamw", lr=1e-4, backbone_lr=1e-5, clip=0.1, schedule="step", warmup=0.0,
        ema=False, freeze_backbone=100.0, keep_every=50, eval_every=1,
    ),
}  # fmt: skip


def parse_arguments(description):
    """-> (settings given on the command line, run to resume or None)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="a COCO or Pascal VOC data set (default: the demo, drawn into data/demo)")
    data.add_argument("--train-split", metavar="NAME", help="its part to train on, e.g. trainval")
    data.add_argument("--val-split", metavar="NAME", help="its part to evaluate on, e.g. test")
    data.add_argument("--image-size", type=int, metavar="S", help="shortest side in evaluation; training draws S*0.6 .. S after its first passes, and longest sides are S*1.67 at most (default: chosen from the objects' sizes)")
    data.add_argument("--augment", choices=["zoom", "meta"], help="windows of the picture's own proportions, or DETR's crops (default zoom; meta: meta)")
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
    model.add_argument("--num-queries", type=int, metavar="Q", help="most objects that can be found in a picture (default: 100 to 300, ten times the most in a training picture, never under twice)")
    model.add_argument("--decoder-layers", type=int, metavar="N", help="(default 3, with ecvit-nano 2; meta: 6)")
    budget = parser.add_argument_group("budget (the first that is used up ends the run; the schedule follows it)")
    budget.add_argument("--epochs", type=int, metavar="N")
    budget.add_argument("--steps", type=int, metavar="N")
    budget.add_argument("--minutes", type=float, metavar="M", help="minutes of training; evaluation is not counted")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--batch-size", type=int, metavar="B", help="pictures a step (default 16; 8 below 1,000 pictures)")
    optimisation.add_argument("--accumulate", type=int, metavar="N", help="batches whose gradients are added up for a step (default 1)")
    optimisation.add_argument("--optimizer", choices=["muon", "adamw"], help="muon: for the matrices of all that starts from random weights, AdamW for the rest (default; meta: adamw)")
    optimisation.add_argument("--lr", type=float, help="learning rate (default, for a batch of 16: 8e-4 from scratch, 4e-4 otherwise; for others by the square root)")
    optimisation.add_argument("--backbone-lr", type=float, help="the backbone's (default: lr from scratch, lr/10 otherwise)")
    optimisation.add_argument("--layer-decay", type=float, metavar="X", help="a backbone block's learning rate relative to the next one's (default 1)")
    optimisation.add_argument("--weight-decay", type=float, metavar="X", help="AdamW's, not on norms and biases (default 1e-4)")
    optimisation.add_argument("--clip", type=float, metavar="X", help="longest gradient (default 1; meta: 0.1; 0: none)")
    optimisation.add_argument("--no-ema", dest="ema", action="store_false", help="evaluate and keep the last weights, not their running average")
    optimisation.add_argument("--precision", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where the device is fast at it")
    optimisation.add_argument("--seed", type=int, metavar="N")
    out = parser.add_argument_group("run")
    out.add_argument("--out", metavar="RUN", help="folder of the run (default: runs/ and the data's name)")
    out.add_argument("--eval-every", type=int, metavar="N", help="epochs between evaluations (default 0: as often as a tenth of the time allows)")
    out.add_argument("--keep-every", type=int, metavar="N", help="also keep a checkpoint every N epochs (default 0: none; meta: 50)")
    out.add_argument("--resume", metavar="RUN", help="go on with this run, with its own settings")
    given = vars(parser.parse_args())
    resume = given.pop("resume", None)
    if resume is not None and set(given) - {"recipe"}:
        extra = ", ".join("--" + key.replace("_", "-") for key in given if key != "recipe")
        raise UserError(f"--resume goes on with the run's own settings; leave out {extra}")
    return given, resume


def settle(given, train):
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

    choose("image_size", 128 if demo else choose_image_size(train, 224 if nano else 640))
    choose("batch_size", 8 if len(train.records) < 1000 else 16)
    most = train.most_objects
    choose("num_queries", max(100, min(300, 10 * most), 2 * most))  # many more than objects: the best of them are matched
    choose("hidden_dim", 128 if nano else 256)
    choose("num_heads", s["hidden_dim"] // 32)
    choose("ffn_dim", 4 * s["hidden_dim"])
    choose("decoder_layers", 2 if nano else 3)
    if s["epochs"] is s["steps"] is s["minutes"] is None:
        pictures = len(train.records)
        chosen["epochs"] = s["epochs"] = 40 if demo else 100 if pictures < 5000 else 50 if pictures < 20000 else 24
        if demo:
            chosen["minutes"] = s["minutes"] = 4.5
    choose("lr", round((8e-4 if scratch else 4e-4) * math.sqrt(s["batch_size"] * s["accumulate"] / 16), 6))
    if scratch:  # random weights are neither worth keeping nor in danger
        s["freeze_backbone"] = given.get("freeze_backbone", 0)
        s["backbone_lr"] = given.get("backbone_lr")
    choose("backbone_lr", s["lr"] if scratch else s["lr"] / 10)
    quick = s["image_size"] < 320 and not torch.cuda.is_available()  # preparing a picture is nothing beside a step
    choose("workers", 0 if quick else min(4, os.cpu_count()))
    choose("out", next_free(Path("runs") / ("demo" if demo else Path(s["data"]).resolve().name)))
    s["data"] = str(s["data"] or "data/demo")
    try:
        s["freeze_backbone"] = math.inf if s["freeze_backbone"] == "all" else float(s["freeze_backbone"])
    except ValueError:
        raise UserError(f"--freeze-backbone takes a number of epochs or all, not {s['freeze_backbone']}") from None
    for key in ("batch_size", "accumulate", "image_size", "num_queries", "decoder_layers", "epochs", "steps", "minutes"):
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
    side = np.median([min(r.width, r.height) for r in split.records])
    relative = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) / min(r.width, r.height) for r in split.records for b in r.boxes]
    wanted = 20 / max(float(np.quantile(relative, 0.2)), 1e-3)
    return int(min(max(wanted, smallest), max(2 * smallest, 640), max(side, smallest)) // 32 * 32)


def next_free(path):
    candidates = [path] + [path.with_name(f"{path.name}-{i}") for i in range(2, 1000)]
    return str(next(p for p in candidates if not p.exists()))


def fast_bfloat16():
    """Whether this machine's matrix units take bfloat16: recent GPUs, CPUs with AMX. AVX-512's own is no faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
