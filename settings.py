"""Every setting of a training run: name, default, help; and recipes.

A setting without a default is chosen by resolve.py, which prints its choices.
"""

import argparse
from dataclasses import dataclass, field, fields
from functools import partial

from backbones import PYRAMIDS
from detr_model import ATTENTION, DETECTORS
from devices import PRECISIONS
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
    trained_on: str = None  # their fingerprint, see splits.fingerprint
    common_size: list = None  # (height, width) of most of them
    random_parts: list = None  # of the backbone, that pretrained weights do not hold: they are trained like the rest
    version: str = VERSION  # of this code, which began the run

    @classmethod
    def from_config(cls, config):
        """The settings in a checkpoint; those that it does not know have their defaults."""
        names = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names})


DEFAULTS = vars(Settings())

RESUMABLE = ("data", "large_images")  # what may be given with --resume: where the data is now


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
