"""Every setting of a training run: name, default, help; recipes; and what is chosen from the data.

A setting without a default is chosen by `resolve_settings`, which prints its choices.
"""

import argparse
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np

from backbones import PYRAMIDS, find_spec
from checkpoint import SMALLEST_TILE
from datasets import advise_tiles
from detr_model import ATTENTION, DETECTORS
from devices import PRECISIONS, choose_device, choose_precision
from ecdet_model import SIZES
from errors import Offline, UserError
from layouts import LAYOUTS
from transforms import FLIPS

VERSION = "1.0"  # see CHANGES.md

RECIPES = {
    "default": {},
    "meta": dict(  # arXiv 2005.12872 and its code: eight GPUs with two images each; a learning rate for that batch
        detector="detr-2020",
        augment="meta",
        plain_passes=0,
        image_size=800,
        num_queries=100,
        hidden_dim=256,
        num_heads=8,
        ffn_dim=2048,
        decoder_layers=6,
        dropout=0.1,
        batch_size=16,
        device_batch=2,
        epochs=300,
        optimizer="adamw",
        lr=1e-4,
        backbone_lr=1e-5,
        decay_all=True,
        clip=0.1,
        schedule="step",
        warmup=0.0,
        ema=False,
        eval_every=1,
        freeze_backbone=100.0,  # this and the next are not in the paper: our first user asked for them
        keep_every=50,
    ),
    "ecdet": dict(  # arXiv 2603.18739, as published for COCO with batches of 32; what depends on the size is in ECDET
        detector="ecdet",
        augment="strong",
        mosaic=None,
        mosaic_chance=None,
        plain_passes=0,
        plain_end=None,
        image_size=640,
        square=True,
        optimizer="adamw",
        weight_decay=None,
        clip=0.1,
        schedule="flat-cosine",
        warmup_steps=2000,
        ema_horizon=10000,
    ),
    "dino": dict(  # arXiv 2203.03605, twelve epochs of COCO
        detector="dino",
        augment="meta",
        plain_passes=0,
        image_size=800,
        num_queries=900,
        hidden_dim=256,
        num_heads=8,
        ffn_dim=2048,
        encoder_layers=6,
        decoder_layers=6,
        batch_size=16,
        epochs=12,
        optimizer="adamw",
        lr=1e-4,
        backbone_lr=1e-5,
        clip=0.1,
        schedule="step",
        lr_drop=11 / 12,
        warmup=0.0,
        ema=False,
        eval_every=1,
    ),
}

# The ecdet recipe by size (EdgeCrafter 706d037; nano's is S's): epochs, how many of them have mosaics and mix-up, how
# likely each is, the epoch from which images are not augmented, weight decay, learning rates (rest, backbone)
S = dict(epochs=74, mixed=36, chance=0.75, plain_from=72, weight_decay=1e-4, lr=5e-4, backbone_lr=2.5e-5)
L = dict(epochs=50, mixed=24, chance=1.0, plain_from=48, weight_decay=1.25e-4, lr=5e-4, backbone_lr=5e-6)
ECDET = {
    "nano": S,
    "s": S,
    "m": S | dict(epochs=62, mixed=30, plain_from=60),
    "l": L,
    "x": L | dict(backbone_lr=2.5e-6),
}

GROUPS = {
    "data": "data",
    "model": "model",
    "budget": "budget (the first one that is used up ends the run; the schedule follows it)",
    "optim": "optimization",
    "run": "run",
}


def setting(group, default, metavar, help, **options):
    """A field of Settings with what argparse needs to know."""
    options |= {"metavar": metavar} if metavar else {}
    return field(default=default, metadata={"group": group, "options": options | {"help": help}})


of_data, of_model, of_budget, of_optim, of_run = (partial(setting, group) for group in GROUPS)


@dataclass
class Settings:
    data: str = of_data(None, "DIR", "a dataset: COCO, Roboflow, Pascal VOC, YOLO (default: the demo, data/demo)")
    layout: str = of_data(None, None, "layout of the dataset (default: detected, and printed)", choices=LAYOUTS)
    train_split: str = of_data(None, "NAME", "the part to train on, e.g. trainval")
    val_split: str = of_data(None, "NAME", "the part to evaluate on, e.g. test")
    val_fraction: float = of_data(None, "X", "fraction to evaluate on, if the dataset has one part only (default 0.2)")
    image_size: int = of_data(
        None,
        "S",
        "shortest side in evaluation; training draws sides from 0.6 S to S after its first passes; longest sides are "
        "at most 1.67 S (default: chosen from the objects' sizes)",
    )
    square: bool = of_data(
        False, None, "resize to a square instead of keeping the aspect ratio (default in recipe ecdet)"
    )
    classes: str = of_data(None, "A,B,..", "train on these classes alone; the others are background")
    single_class: bool = of_data(False, None, "take all classes for one")
    tile: int = of_data(
        None,
        "N",
        "train on and evaluate in tiles of N pixels at the images' own resolution: for small objects in large images",
    )
    augment: str = of_data(
        "zoom",
        None,
        "zoom: windows of the image's own aspect ratio (default); meta: DETR's crops; strong: colours, zoom-out and "
        "crops as in ECDet",
        choices=("zoom", "meta", "strong"),
    )
    color_jitter: float = of_data(
        0.0, "X", "change brightness, contrast, saturation by up to this fraction (default 0)"
    )
    flip: str = of_data(
        "horizontal",
        None,
        "how images may be mirrored: none (letters, left and right hands: the default if the classes are such), "
        "horizontal (default), both, turns (also by 90 degrees: cells, aerial images)",
        choices=FLIPS,
    )
    rotate: float = of_data(0.0, "DEG", "rotate by up to this many degrees (default 0)")
    plain_passes: int = of_data(8, "N", "passes over the data without augmentation, at the start (default 8)")
    plain_end: float = of_data(
        0.0,
        "X",
        "fraction of the run without augmentation, at its end (default 0.15, at most two passes; ssd: 1; ecdet: 0.03)",
    )
    plain_end_passes: float = of_data(
        0.0, "N", "these are at most so many passes over the data (default 2; 0: no limit)"
    )
    mosaic: float = of_data(
        0.0, "X", "fraction of the run with mosaics and mix-up, at its start (default 0; ecdet: 0.5)"
    )
    mosaic_chance: float = of_data(0.5, "X", "how likely these are in that time (default 0.5; ecdet: 0.75 or 1)")
    workers: int = of_data(None, "N", "processes that load images")
    skip_bad_images: bool = of_data(False, None, "leave out images that can't be read, instead of stopping")
    large_images: bool = of_data(False, None, "open images that look like decompression bombs, such as large scans")
    allow_outside: bool = of_data(False, None, "files may lie outside of DIR, through links, .. or absolute paths")

    recipe: str = of_model(
        None,
        None,
        "meta: DETR as published; ecdet: ECDet as published, the default for an ECDet that does not start from random "
        "weights; dino: DINO as published, 12 epochs; other options still apply",
        choices=RECIPES,
    )
    detector: str = of_model(
        "detr",
        None,
        "detr: ours (default); detr-2020: as published; ecdet: EdgeCrafter's real-time detector; dino: deformable, on "
        "four scales; ssd: torchvision's head, the baseline",
        choices=DETECTORS,
    )
    size: str = of_model(None, None, "ECDet's (default: the one that the backbone belongs to, else m)", choices=SIZES)
    backbone: str = of_model(None, "NAME", "see python check_dims.py (default ecvitt; for the demo ecvit-nano)")
    backbone_weights: str = of_model(
        None,
        "W",
        "pretrained (hub or release), none (from scratch), or the path of a folder or file (default: pretrained if "
        "there are any)",
    )
    init: str = of_model(
        None,
        "FILE",
        "start from this checkpoint, which decides the architecture: best.pth of a run, or a released ECDet "
        "(ecdet_s.pth, a folder, Intellindust/ECDet_S)",
    )
    freeze_backbone: str = of_model(0.0, "N", "epochs before the backbone is trained, or all (default 0; meta: 100)")
    checkpoint_activations: bool = of_model(False, None, "recompute the backbone's activations: less memory, slower")
    shard: bool = of_model(
        False, None, "with torchrun: spread a large backbone and its optimizer over the processes (FSDP)"
    )
    pyramid: str = of_model(
        None,
        None,
        "maps for the detector: own, the backbone's (default for detr); resize, the nearest of them resized (for ecdet "
        "if the backbone's do not fit); simple, ViTDet's (dino, ssd)",
        choices=PYRAMIDS,
    )
    layers: str = of_model(
        None,
        "I,J,..",
        "blocks of a plain ViT, counted from 0, whose maps are used, earlier ones for finer levels; of vggt-1b such as "
        "frame3,global23 (default: the last)",
    )
    patch_size: int = of_model(
        None, "P", "resample a plain ViT's patches: 16 makes DINOv2 fit all others (default: its own)"
    )
    patch_resize: str = of_model(
        "pinv", None, "how: pseudo-inverse (FlexiViT), or like images (default pinv)", choices=("pinv", "bicubic")
    )
    num_queries: int = of_model(
        None,
        "Q",
        "most objects that can be found in an image (default: 100 to 300, ten times the most in a training image, at "
        "least twice)",
    )
    hidden_dim: int = of_model(None, "C", "width of the detector (default 256, with ecvit-nano 128)")
    num_heads: int = of_model(None, "N", "attention heads of the detector (default: one for 32 channels)")
    ffn_dim: int = of_model(None, "C", "hidden width of feed-forward layers (default: four times the width)")
    encoder_layers: int = of_model(None, "N", "DINO's (default 6, with ecvit-nano 1)")
    decoder_layers: int = of_model(None, "N", "(default 3, with ecvit-nano 2; meta and dino: 6)")
    dropout: float = of_model(0.0, "X", "in the detector's transformer (default 0; meta: 0.1)")
    scales: int = of_model(4, None, "DINO's: 8 to 64 pixels, or 4 to 64 (default 4)", choices=(4, 5))
    attention: str = of_model(
        "local",
        None,
        "detr's: local, a few points around each query's box (default); global, the whole map, as before December 2026",
        choices=ATTENTION,
    )
    distinct: float = of_model(
        0.7,
        "IOU",
        "detr's: cells whose boxes overlap a better one's by more than this become queries after all others (default "
        "0.7; 0: off)",
    )
    num_denoising: int = of_model(
        None,
        "N",
        "detr's and DINO's: noisy copies of the objects as additional queries in training (default 40, larger DINOs "
        "100; 0: none)",
    )

    epochs: int = of_budget(None, "N", "passes over the data")
    steps: int = of_budget(None, "N", "steps of the optimizer")
    minutes: float = of_budget(None, "M", "minutes of training; evaluation is not counted")

    batch_size: int = of_optim(None, "B", "images a step (default 16; 8 below 1,000 images)")
    accumulate: int = of_optim(1, "N", "gradient accumulation: batches a step (default 1)")
    device_batch: int = of_optim(
        None,
        "N",
        "most images on a device at a time; the rest of its part of the batch is accumulated, which takes less memory "
        "(default: all; meta: 2)",
    )
    optimizer: str = of_optim(
        "muon",
        None,
        "muon: for the matrices of all that starts from random weights, AdamW for the rest (default; meta: adamw)",
        choices=("muon", "adamw"),
    )
    lr: float = of_optim(
        None,
        None,
        "learning rate (default for a batch of 16: 8e-4 from scratch, else 4e-4; scaled by the batch's square root)",
    )
    backbone_lr: float = of_optim(None, None, "the backbone's (default: lr from scratch, else lr/10)")
    layer_decay: float = of_optim(1.0, "X", "learning rate of a backbone block relative to the next one's (default 1)")
    weight_decay: float = of_optim(1e-4, "X", "AdamW's (default 1e-4)")
    decay_all: bool = of_optim(False, None, "weight decay on norms, biases and embeddings too (default in recipe meta)")
    clip: float = of_optim(1.0, "X", "maximum gradient norm (default 1; meta: 0.1; 0: no limit)")
    schedule: str = of_optim(
        "linear",
        None,
        "how the learning rate falls: linear (default), step (DETR), flat-cosine (DEIM)",
        choices=("linear", "step", "flat-cosine"),
    )
    lr_drop: float = of_optim(
        2 / 3, "X", "fraction of the run after which schedule step falls to a tenth (default 2/3)"
    )
    warmup: float = of_optim(0.03, "X", "fraction of the run in which the learning rate rises (default 0.03)")
    warmup_steps: int = of_optim(None, "N", "most steps of that (default: no limit; ecdet: 2000)")
    ema: bool = of_optim(True, None, "evaluate and keep a running average of the weights, not the last ones (default)")
    ema_horizon: int = of_optim(None, "N", "most steps that the average looks back (default: no limit; ecdet: 10000)")
    precision: str = of_optim(
        "auto",
        None,
        "auto: bfloat16 where the hardware supports it natively, float16 on GPUs that support that alone",
        choices=("auto", *PRECISIONS),
    )
    seed: int = of_optim(0, "N", "of everything that is random (default 0)")

    out: str = of_run(None, "RUN", "folder of the run (default: runs/ and the dataset's name)")
    eval_every: int = of_run(0, "N", "epochs between evaluations (default 0: as often as a tenth of the time allows)")
    save_every: float = of_run(
        60.0,
        "SECONDS",
        "seconds between writings of last.pth, which --resume continues from (default 60; it is also written at the "
        "end and when the run is stopped)",
    )
    keep_every: int = of_run(0, "N", "also keep a checkpoint every N epochs (default 0: none; meta: 50)")
    patience: int = of_run(None, "N", "end after N epochs without a better AP (default: never)")
    tensorboard: bool = of_run(False, None, "also log for TensorBoard, into the run's folder")
    wandb: bool = of_run(False, None, "also log to Weights & Biases")
    mlflow: bool = of_run(False, None, "also log to MLflow")
    exact_sides: bool = of_run(True, None, "round the sides of resized images; earlier versions truncated them")
    num_classes: int = None  # the dataset's
    data_from_run: str = None  # the path of the data, seen from the run's folder
    value_range: list = None  # the training images', see transforms.common_range
    trained_on: str = None  # their fingerprint, see layouts.load_splits
    common_size: list = None  # (height, width) of most of them
    version: str = VERSION  # of this code, which began the run

    @classmethod
    def from_config(cls, config):
        """The settings in a checkpoint; those that it does not know have their defaults."""
        names = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names})


DEFAULTS = vars(Settings())

# what --init decides
ARCHITECTURE = (
    "detector size backbone pyramid layers patch_size hidden_dim num_heads ffn_dim encoder_layers decoder_layers"
)
ARCHITECTURE = (*ARCHITECTURE.split(), "scales", "attention", "num_denoising")
AUGMENTATION = "augment", "color_jitter", "rotate", "mosaic", "plain_passes", "plain_end_passes"
RESUMABLE = ("data", "large_images")  # what may be given with --resume: where the data is now
QUERIES_ARE_WEIGHTS = ("detr-2020", "dino")  # elsewhere they are selected, as many as one likes
POSITIVE = "batch_size accumulate device_batch image_size tile num_queries decoder_layers patch_size epochs steps"
POSITIVE = f"{POSITIVE} minutes patience"


# The command line


def build_parser(description):
    """-> the command line of train.py. Only what is given is in its result."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=formatter, argument_default=argparse.SUPPRESS
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for f in fields(Settings):
        if not f.metadata:
            continue
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        groups[f.metadata["group"]].add_argument(option(f.name), **kind, **f.metadata["options"])
    groups["run"].add_argument("--offline", action=Offline)
    groups["run"].add_argument("--version", action="version", version=VERSION)
    groups["run"].add_argument(
        "--resume", metavar="RUN", help="continue this run, with its own settings; --data DIR if its data was moved"
    )
    return parser


def option(name):
    return "--" + name.replace("_", "-")


def parse_arguments(description):
    """-> (settings given on the command line, run to resume or None). Raises UserError."""
    given = vars(build_parser(description).parse_args())
    resume = given.pop("resume", None)
    changed = [option(key) for key in given if key not in RESUMABLE]
    if resume is not None and changed:
        raise UserError(f"--resume continues with the run's own settings; leave out {', '.join(changed)}")
    return given, resume


# What is chosen


def resolve_settings(given, train, initial=None):
    """Decides every setting, from the data, the device and the checkpoint to start from -> Settings. Prints choices.

    given: those of the command line; train: the training Split; initial: the config of the checkpoint to start from.
    Raises UserError.
    """
    s = start_settings(given | (architecture_of(initial, given, train) if initial else {}), initial)
    check_values(s)
    refuse_ignored(s, given, train)
    before = dict(vars(s))
    resolve_model(s, train, initial)
    resolve_data(s, given, train)
    resolve_budget(s, given, train)
    resolve_optim(s, given, initial)
    resolve_run(s)
    chosen = {key: value for key, value in vars(s).items() if value != before[key]}
    s.data, s.num_classes, s.value_range = str(s.data or "data/demo"), len(train.classes), train.value_range
    s.trained_on, s.common_size = train.fingerprint, most_common_size(train)
    print("chosen: " + ", ".join(f"{key}={value}" for key, value in chosen.items()))
    if train.most_objects > s.num_queries and s.detector != "ssd":
        print(
            f"warning: an image has {train.most_objects} objects, more than the {s.num_queries} queries; "
            "the rest can't be found"
        )
    return s


def most_common_size(split):
    """-> [height, width] of most images of a Split, or of its tiles; of two that are as common, the larger."""
    counts = Counter((record.height, record.width) for record in split.records)
    return [split.side] * 2 if split.side else list(max(counts, key=lambda size: (counts[size], size)))


def architecture_of(initial, given, train):
    """What the checkpoint to start from decides. Raises UserError where an option says something else."""
    decided = [*ARCHITECTURE, *(["num_queries"] if initial["detector"] in QUERIES_ARE_WEIGHTS else [])]
    for key in given:
        if key == "backbone_weights" or (key in decided and initial.get(key) != given[key]):
            raise UserError(
                f"{option(key)} {given[key]}: the architecture and its weights are those of --init {given['init']}; "
                "leave it out"
            )
    settings = {key: initial[key] for key in decided if initial.get(key) is not None}
    if "num_queries" not in settings | given:
        settings["num_queries"] = max(enough_queries(train), initial["num_queries"])
    settings["image_size"] = given.get("image_size", initial["image_size"])
    settings["square"] = given.get("square", initial.get("square", False))
    return settings | {"backbone_weights": "none"}  # they come with the rest


def start_settings(given, initial):
    """The backbone, its weights and the recipe, which other settings depend on -> Settings with the recipe's values."""
    backbone = given.get("backbone")
    if backbone is None:
        smallest = "ecvit-nano" if given.get("data") is None else "ecvitt"
        backbone = SIZES[given["size"]]["backbone"] if "size" in given else smallest
    weights = given.get("backbone_weights") or ("pretrained" if find_spec(backbone).source else "none")
    recipe = given.get("recipe")
    if recipe is None:
        starts_trained = weights != "none" or initial
        recipe = "ecdet" if given.get("detector") == "ecdet" and starts_trained else "default"
    s = Settings(**RECIPES[recipe] | given | dict(recipe=recipe, backbone=backbone, backbone_weights=weights))
    if given.get("mosaic"):
        s.plain_passes = 0  # mosaics begin with the run
    if weights == "none" and not initial:  # random weights are neither worth keeping nor in danger
        s.freeze_backbone = given.get("freeze_backbone", 0.0)
        s.backbone_lr = given.get("backbone_lr")
    if initial:
        s.optimizer = "adamw"  # Muon's steps are for weights that still have to be found
    return s


def check_values(s):
    for key in POSITIVE.split():
        if getattr(s, key) is not None and getattr(s, key) <= 0:
            raise UserError(f"{option(key)} has to be more than 0, not {getattr(s, key)}")
    if (s.num_denoising or 0) < 0:
        raise UserError(f"--num-denoising has to be 0 or more, not {s.num_denoising}")
    if not 0 <= s.distinct < 1:
        raise UserError(f"--distinct has to be an IoU below 1, or 0, not {s.distinct}")
    try:
        s.freeze_backbone = s.freeze_backbone if s.freeze_backbone == "all" else float(s.freeze_backbone)
    except ValueError:
        raise UserError(f"--freeze-backbone takes a number of epochs or all, not {s.freeze_backbone}") from None


def refuse_ignored(s, given, train):
    """Raises UserError for an option of the command line that would change nothing."""
    resampled = s.patch_size not in (None, find_spec(s.backbone).patch) and s.backbone_weights != "none"
    trained = s.freeze_backbone != "all"
    has_parts = "is for a dataset with one part only; this one has several"
    frozen = "--freeze-backbone all leaves the backbone as it is; leave one of them out"
    of_detr = "is for the default detector, detr"
    of_dino = "is for a DINO on a pyramid; add --detector dino, leave out --pyramid own"
    of_transformer = "is for detr, detr-2020 and dino"
    has_transformer = s.detector in ("detr", "detr-2020", "dino")
    rules = (  # setting, whether it is used, why it is not
        ("val_fraction", train.is_fraction, has_parts),
        ("size", s.detector == "ecdet", "is ECDet's; add --detector ecdet"),
        ("scales", s.detector == "dino" and s.pyramid != "own", of_dino),
        ("attention", s.detector == "detr", of_detr),
        ("distinct", s.detector == "detr", of_detr),
        ("num_denoising", s.detector in ("detr", "dino"), "is for detr and dino; an ECDet's size decides it"),
        ("decoder_layers", s.detector != "ssd", "an SSD has no decoder; leave it out"),
        ("encoder_layers", s.detector == "dino", "is DINO's; add --detector dino"),
        ("dropout", has_transformer, of_transformer),
        ("hidden_dim", s.detector != "ecdet", "an ECDet's width is that of its size; give --size"),
        ("num_heads", has_transformer, of_transformer),
        ("ffn_dim", has_transformer, of_transformer),
        ("patch_resize", resampled, "is for pretrained weights with a --patch-size that is not their own"),
        ("optimizer", given.get("optimizer") != "muon" or not s.init, "Muon is for random weights, --init leaves none"),
        ("backbone_lr", trained, frozen),
        ("layer_decay", trained, frozen),
        ("lr_drop", s.schedule == "step", "is for --schedule step"),
        ("ema_horizon", s.ema, "there is no EMA; leave out --no-ema"),
        ("mosaic_chance", s.mosaic != 0, "is for --mosaic"),
    )
    for key, is_used, why in rules:
        if key in given and not is_used:
            raise UserError(f"{option(key)} {given[key]}: {why}")


def choose(s, key, value):
    if getattr(s, key) is None:
        setattr(s, key, value)


def resolve_model(s, train, initial):
    nano = s.backbone == "ecvit-nano"
    if s.detector == "ecdet":
        choose(s, "size", next((size for size, parts in SIZES.items() if parts["backbone"] == s.backbone), "m"))
        choose(s, "decoder_layers", SIZES[s.size]["layers"])
    else:
        choose(s, "hidden_dim", 128 if nano else 256)
        choose(s, "num_heads", s.hidden_dim // 32)
        choose(s, "ffn_dim", 4 * s.hidden_dim)
        choose(s, "decoder_layers", 2 if nano else 6 if s.detector == "dino" else 3)
    if s.detector == "dino":
        choose(s, "encoder_layers", 1 if nano else 6)
        choose(s, "num_denoising", 40 if nano else 100)
    if s.detector == "detr":
        choose(s, "num_denoising", 0 if initial else 40)
    if s.detector == "dino" and not nano:
        choose(s, "num_queries", 900)
    choose(s, "num_queries", max(enough_queries(train), 300 if s.recipe == "ecdet" else 0))


def enough_queries(train):
    """Many more queries than objects: the best of them are matched."""
    return max(100, min(300, 10 * train.most_objects), 2 * train.most_objects)


def resolve_data(s, given, train):
    if given.get("flip") is None and have_sides(train.classes):
        s.flip = "none"
    smallest = 224 if s.backbone == "ecvit-nano" else 640
    if s.tile and s.tile < SMALLEST_TILE:
        raise UserError(f"--tile {s.tile}: has to be {SMALLEST_TILE} pixels or more")
    if s.tile and given.get("image_size") is None:  # whatever a recipe or --init says: tiles are not resized
        s.image_size = s.tile // 32 * 32
    choose(s, "image_size", 128 if s.data is None else choose_image_size(train, smallest))
    advice = None if s.tile else advise_tiles(train, s.image_size)
    if advice:
        print(f"hint: {advice}")
    if s.recipe == "default" and given.get("plain_end") is None:
        s.plain_end, s.plain_end_passes = 0.15, given.get("plain_end_passes", 2.0)
        if s.detector == "ssd" and not {*AUGMENTATION} & {*given}:  # it learns best from whole images
            s.plain_end, s.plain_end_passes = 1.0, 0.0
    if s.recipe == "ecdet":
        published = ECDET[s.size or "s"]
        choose(s, "mosaic", round(published["mixed"] / published["epochs"], 4))
        choose(s, "mosaic_chance", published["chance"])
        choose(s, "plain_end", round(1 - published["plain_from"] / published["epochs"], 4))
    loading_is_cheap = s.image_size < 320 and choose_device().type != "cuda"
    choose(s, "workers", 0 if loading_is_cheap else min(4, os.cpu_count()))


def have_sides(classes):
    """Whether mirrored objects are of other classes, by the classes' names: of left and right, or of letters."""
    names = {name.lower() for name in classes}
    sides = any(name != (other := re.sub("left", "right", name)) and other in names for name in names)
    letters = sum(len(name) == 1 and name.isalpha() for name in names)
    return sides or letters >= 8 and letters > len(names) / 2


def choose_image_size(split, smallest):
    """The shortest side at which a small object (20th percentile) is still 20 pixels wide, within reason."""
    side = np.median([min(r.width, r.height) for r in split.records])
    relative = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) / min(r.width, r.height) for r in split.records for b in r.boxes]
    needed = 20 / max(float(np.quantile(relative, 0.2)), 1e-3)
    return int(min(max(needed, smallest), max(2 * smallest, 640), max(side, smallest)) // 32 * 32)


def resolve_budget(s, given, train):
    images = len(train.records)
    large = s.augment == "strong" and images >= 50000  # about as many images as the ecdet recipe was made for
    choose(s, "batch_size", 32 if large else 8 if images < 1000 else 16)
    if s.epochs is s.steps is s.minutes is None:
        if s.data is None:
            s.epochs, s.minutes = 40, 4.5
        elif large:
            s.epochs = ECDET[s.size or "s"]["epochs"]
        else:
            s.epochs = 100 if images < 5000 else 50 if images < 20000 else 24
    if s.warmup_steps is None:
        return
    # A budget shorter than COCO's epochs: the warm-up takes at most a twentieth of it, and the last tenth is without
    # augmentation.
    steps = min(s.steps or math.inf, (s.epochs or math.inf) * math.ceil(images / (s.batch_size * s.accumulate)))
    known = math.isfinite(steps) and not s.minutes
    s.warmup = round(min(0.05, s.warmup_steps / steps if known else 0.05), 5)
    if (steps < 100_000 or s.minutes) and given.get("plain_end") is None:
        s.plain_end = 0.1


def resolve_optim(s, given, initial):
    scratch = s.backbone_weights == "none" and not initial
    batch = s.batch_size * s.accumulate
    published = ECDET[s.size or "s"]
    if s.recipe == "ecdet":
        choose(s, "weight_decay", published["weight_decay"])
    if s.schedule == "flat-cosine" and s.detector == "ecdet":
        scale = math.sqrt(batch / 32) * (0.5 if initial else 1.0)  # a released file ended with half the learning rate
        lr, backbone_lr = (round(scale * published[key], 8) for key in ("lr", "backbone_lr"))
    else:
        lr = round((8e-4 if scratch else 4e-4) * math.sqrt(batch / 16), 6)
        backbone_lr = (s.lr or lr) / 10
    choose(s, "lr", lr)
    choose(s, "backbone_lr", s.lr if scratch else backbone_lr)
    asked, s.precision = s.precision, choose_precision(s.precision, choose_device())
    if s.shard and s.precision == "float16":  # PyTorch's scaler does not look into the other processes' parts
        if asked == "float16":
            raise UserError("--precision float16 does not go with --shard; use bfloat16 or float32")
        s.precision = "float32"


def resolve_run(s):
    choose(s, "out", next_free(Path("runs") / ("demo" if s.data is None else Path(s.data).resolve().name)))


def next_free(path):
    candidates = [path] + [path.with_name(f"{path.name}-{i}") for i in range(2, 1000)]
    return str(next(p for p in candidates if not p.exists()))
