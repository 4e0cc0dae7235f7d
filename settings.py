"""Every setting of a training run: defaults, recipes, the command line, and what is decided from the data.

A recipe says where it differs from DEFAULTS; what is None in both, and not given, `settle` decides and prints.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np

from backbones import PYRAMIDS, find_spec
from detr_model import ATTENTION, DETECTORS
from devices import PRECISIONS, choose_device, choose_precision
from ecdet_model import SIZES
from errors import UserError
from layouts import LAYOUTS
from weights import Offline

DEFAULTS = dict(
    # data
    data=None,  # folder of a data set; None: the demo
    layout=None,  # see layouts.LAYOUTS; None: by looking
    train_split=None, val_split=None, val_fraction=None,  # which parts, where the folder has several; of a single file's pictures
    image_size=None,  # shortest side in evaluation; training sides scale with it
    augment="zoom",  # see transforms.train_transforms
    color_jitter=0.0, rotate=0.0,  # strength in [0, 1]; degrees
    plain_passes=8, plain_end=0.0,  # passes over the data, and share of the budget at its end, without augmentation
    mosaic=0.0, mosaic_chance=0.5,  # share of the budget with mosaics and mix-up; how likely each is there
    square=False,  # pictures are resized to image_size x image_size, whatever their proportions
    workers=None, skip_bad_images=False, allow_outside=False,
    # model
    detector="detr", size=None,  # ECDet's: nano, s, m, l, x
    backbone=None, backbone_weights=None,
    init=None,  # a checkpoint to start from
    freeze_backbone=0.0,  # epochs before the backbone is trained; "all": never
    checkpoint_activations=False,
    pyramid=None,  # own, resize, simple: how the backbone's maps become those that the detector wants
    layers=None, patch_size=None, patch_resize="pinv",  # a plain ViT's, see backbones.build_backbone
    num_queries=None,
    hidden_dim=None, num_heads=None, ffn_dim=None, encoder_layers=None, decoder_layers=None, dropout=0.0,
    scales=4,  # DINO's
    copies=None,  # detr's and DINO's, see denoising.make_denoising
    attention="local", distinct=0.7,  # detr's, see detr_model.PlainDETR
    # budget: whichever ends first
    epochs=None, steps=None, minutes=None,
    # optimisation
    batch_size=None, accumulate=1,
    device_batch=None,  # images at a time on a device; the rest of its part of the batch is accumulated
    optimizer="muon", lr=None, backbone_lr=None,
    layer_decay=1.0,  # learning rate of each backbone block relative to the next
    weight_decay=1e-4, decay_all=False, clip=1.0,  # decay_all: of norms, biases and embeddings too
    schedule="linear", warmup=0.03,  # share of the budget
    lr_drop=2 / 3,  # share of the budget after which the step schedule falls to a tenth
    warmup_steps=None,  # the warm-up's length at most
    ema=True, ema_horizon=None,  # steps that the EMA looks back at most
    precision="auto", seed=0,
    # run
    out=None, eval_every=0, keep_every=0, patience=None, tensorboard=False, shard=False,
    save_every=60.0,  # seconds between writings of last.pth
    # what earlier checkpoints did otherwise, see checkpoint.EARLIER
    exact_sides=True,  # see transforms.resized_sides
)  # fmt: skip

RECIPES = {
    "default": {},
    "meta": dict(  # arXiv 2005.12872 and its code: eight GPUs with two images each; a learning rate for that batch
        detector="detr-2020", augment="meta", plain_passes=0, image_size=800, num_queries=100, hidden_dim=256, num_heads=8, ffn_dim=2048,
        decoder_layers=6, dropout=0.1, batch_size=16, device_batch=2, epochs=300, optimizer="adamw", lr=1e-4, backbone_lr=1e-5, decay_all=True,
        clip=0.1, schedule="step", warmup=0.0, ema=False, eval_every=1,
        freeze_backbone=100.0, keep_every=50,  # not in the paper: asked for here
    ),
    "ecdet": dict(  # arXiv 2603.18739, as published for COCO with batches of 32; what depends on the size is in ECDET
        detector="ecdet", augment="strong", mosaic=None, mosaic_chance=None, plain_passes=0, plain_end=None, image_size=640, square=True,
        optimizer="adamw", weight_decay=None, clip=0.1, schedule="flat-cosine", warmup_steps=2000, ema_horizon=10000,
    ),
    "dino": dict(  # arXiv 2203.03605, twelve epochs of COCO
        detector="dino", augment="meta", plain_passes=0, image_size=800, num_queries=900, hidden_dim=256, num_heads=8, ffn_dim=2048,
        encoder_layers=6, decoder_layers=6, batch_size=16, epochs=12, optimizer="adamw", lr=1e-4, backbone_lr=1e-5, clip=0.1, schedule="step",
        lr_drop=11 / 12, warmup=0.0, ema=False, eval_every=1,
    ),
}  # fmt: skip

# The ecdet recipe by size (EdgeCrafter 706d037; nano's is S's): epochs, those with mosaics and mix-up and how likely each is, the
# epoch from which images are whole, weight decay, learning rates of all but the backbone and of the backbone
S = dict(epochs=74, mixed=36, chance=0.75, plain_from=72, weight_decay=1e-4, lr=5e-4, backbone_lr=2.5e-5)
ECDET = {
    "nano": S,
    "s": S,
    "m": S | dict(epochs=62, mixed=30, plain_from=60),
    "l": dict(epochs=50, mixed=24, chance=1.0, plain_from=48, weight_decay=1.25e-4, lr=5e-4, backbone_lr=5e-6),
    "x": dict(epochs=50, mixed=24, chance=1.0, plain_from=48, weight_decay=1.25e-4, lr=5e-4, backbone_lr=2.5e-6),
}

ARCHITECTURE = (
    "detector", "size", "backbone", "pyramid", "layers", "patch_size", "hidden_dim", "num_heads", "ffn_dim", "encoder_layers", "decoder_layers",
    "scales", "attention", "copies",
)  # fmt: skip  # what --init decides
QUERIES_ARE_WEIGHTS = ("detr-2020", "dino")  # elsewhere they are selected, as many as one likes


def build_parser(description):
    """-> the command line of train.py. What isn't given isn't in its result."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="a data set: COCO, Roboflow, Pascal VOC, YOLO (default: the demo, drawn into data/demo)")
    data.add_argument("--layout", choices=LAYOUTS, help="how the data set is laid out (default: by looking, and said)")
    data.add_argument("--val-fraction", type=float, metavar="X", help="share of the pictures to evaluate on, where a single file has them all (default 0.2)")
    data.add_argument("--train-split", metavar="NAME", help="its part to train on, e.g. trainval")
    data.add_argument("--val-split", metavar="NAME", help="its part to evaluate on, e.g. test")
    data.add_argument("--image-size", type=int, metavar="S", help="shortest side in evaluation; training draws S*0.6 .. S after its first passes, and longest sides are S*1.67 at most (default: chosen from the objects' sizes)")
    data.add_argument("--augment", choices=["zoom", "meta", "strong"], help="windows of the picture's own proportions, DETR's crops, or colours, zoom-out and crops as ECDet's (default zoom)")
    data.add_argument("--mosaic", type=float, metavar="X", help="share of the run, from its start, with mosaics and mix-up (default 0; ecdet: about a half)")
    data.add_argument("--square", action=argparse.BooleanOptionalAction, help="resize to a square instead of keeping a picture's proportions (default with recipe ecdet)")
    data.add_argument("--color-jitter", type=float, metavar="X", help="brightness, contrast and saturation changed by up to this share (default 0)")
    data.add_argument("--rotate", type=float, metavar="DEG", help="rotation by up to this many degrees (default 0)")
    data.add_argument("--workers", type=int, metavar="N", help="processes that prepare pictures")
    data.add_argument("--skip-bad-images", action="store_true", help="leave out pictures that can't be read, instead of stopping")
    data.add_argument("--allow-outside", action="store_true", help="files may lie outside of DIR, through links, .. or absolute paths")
    model = parser.add_argument_group("model")
    model.add_argument("--recipe", choices=RECIPES, help="meta: DETR as published; ecdet: ECDet as published, the default for an ECDet that does not start from random weights; dino: DINO as published, 12 epochs; every option below and above still applies")
    model.add_argument("--detector", choices=DETECTORS, help="detr: ours (default); detr-2020: as published; ecdet: EdgeCrafter's real-time detector; dino: deformable, over four scales; ssd: torchvision's head, as a baseline")
    model.add_argument("--size", choices=SIZES, help="ECDet's (default: the one that the backbone belongs to, otherwise m)")
    model.add_argument("--backbone", metavar="NAME", help="see python check_dims.py (default: ecvitt; the demo: ecvit-nano)")
    model.add_argument("--backbone-weights", metavar="W", help="pretrained (hub or release), none (from scratch), or the path of a folder or file (default: pretrained where there are any)")
    model.add_argument("--init", metavar="FILE", help="start from this checkpoint: best.pth of a run, or a released ECDet (ecdet_s.pth, a folder, Intellindust/ECDet_S); it decides the architecture")
    model.add_argument("--freeze-backbone", metavar="N", help="epochs before the backbone is trained, or all (default 0; meta: 100)")
    model.add_argument("--checkpoint-activations", action="store_true", help="recompute the backbone's activations: less memory, slower")
    model.add_argument("--shard", action="store_true", help="with torchrun: spread the backbone's weights and its optimiser's state over the processes (FSDP), where they are too large for one GPU")
    model.add_argument("--pyramid", choices=PYRAMIDS, help="maps for the detector: own, the backbone's as they are (default for detr); resize, the nearest of them resized (ecdet, where the own don't fit); simple, ViTDet's (dino, ssd)")
    model.add_argument("--layers", metavar="I,J,..", help="blocks of a plain ViT, counted from 0, whose maps are used, the earliest for the finest level (default: the last alone)")
    model.add_argument("--patch-size", type=int, metavar="P", help="a plain ViT's patches, its filters resampled: 16 for DINOv2 fits every other size here (default: its own)")
    model.add_argument("--patch-resize", choices=["pinv", "bicubic"], help="how: by the pseudo-inverse of FlexiViT or like pictures (default pinv)")
    model.add_argument("--scales", type=int, choices=[4, 5], help="DINO's: 8 to 64 pixels, or 4 to 64 (default 4)")
    model.add_argument("--num-queries", type=int, metavar="Q", help="most objects that can be found in a picture (default: 100 to 300, ten times the most in a training picture, never under twice)")
    model.add_argument("--attention", choices=ATTENTION, help="detr's: local, a few points around each query's box (default); global, the whole map, as before December 2026")
    model.add_argument("--distinct", type=float, metavar="IOU", help="detr's: cells whose boxes overlap a better one's by more become queries after all others (default 0.7; 0: no such rule)")
    model.add_argument("--copies", type=int, metavar="N", help="detr's and DINO's: noisy copies of the objects that training adds to the queries (default 40, larger DINOs 100; 0: none)")
    model.add_argument("--decoder-layers", type=int, metavar="N", help="(default 3, with ecvit-nano 2; meta: 6)")
    budget = parser.add_argument_group("budget (the first that is used up ends the run; the schedule follows it)")
    budget.add_argument("--epochs", type=int, metavar="N")
    budget.add_argument("--steps", type=int, metavar="N")
    budget.add_argument("--minutes", type=float, metavar="M", help="minutes of training; evaluation is not counted")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--batch-size", type=int, metavar="B", help="pictures a step (default 16; 8 below 1,000 pictures)")
    optimisation.add_argument("--accumulate", type=int, metavar="N", help="batches whose gradients are added up for a step (default 1)")
    optimisation.add_argument("--device-batch", type=int, metavar="N", help="most pictures at a time on a device; the rest of its part of the batch is accumulated, which takes less memory (default: all; meta: 2)")
    optimisation.add_argument("--optimizer", choices=["muon", "adamw"], help="muon: for the matrices of all that starts from random weights, AdamW for the rest (default; meta: adamw)")
    optimisation.add_argument("--lr", type=float, help="learning rate (default, for a batch of 16: 8e-4 from scratch, 4e-4 otherwise; for others by the square root)")
    optimisation.add_argument("--backbone-lr", type=float, help="the backbone's (default: lr from scratch, lr/10 otherwise)")
    optimisation.add_argument("--layer-decay", type=float, metavar="X", help="a backbone block's learning rate relative to the next one's (default 1)")
    optimisation.add_argument("--weight-decay", type=float, metavar="X", help="AdamW's, not on norms and biases (default 1e-4)")
    optimisation.add_argument("--clip", type=float, metavar="X", help="longest gradient (default 1; meta: 0.1; 0: none)")
    optimisation.add_argument("--no-ema", dest="ema", action="store_false", help="evaluate and keep the last weights, not their running average")
    optimisation.add_argument("--precision", choices=["auto", *PRECISIONS], help="auto: bfloat16 where the device is fast at it, float16 on GPUs that are fast at that alone")
    optimisation.add_argument("--seed", type=int, metavar="N")
    out = parser.add_argument_group("run")
    out.add_argument("--out", metavar="RUN", help="folder of the run (default: runs/ and the data's name)")
    out.add_argument("--eval-every", type=int, metavar="N", help="epochs between evaluations (default 0: as often as a tenth of the time allows)")
    out.add_argument("--save-every", type=float, metavar="SECONDS", help="seconds between writings of last.pth, what --resume goes on from (default 60; it is written at the end and when the run is stopped, too)")
    out.add_argument("--keep-every", type=int, metavar="N", help="also keep a checkpoint every N epochs (default 0: none; meta: 50)")
    out.add_argument("--patience", type=int, metavar="N", help="end after N epochs without a better AP (default: never)")
    out.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard, into the run's folder")
    out.add_argument("--offline", action=Offline)
    out.add_argument("--resume", metavar="RUN", help="go on with this run, with its own settings")
    return parser


def parse_arguments(description):
    """-> (settings given on the command line, run to resume or None). Raises UserError."""
    given = vars(build_parser(description).parse_args())
    resume = given.pop("resume", None)
    if resume is not None and given:
        extra = ", ".join("--" + key.replace("_", "-") for key in given)
        raise UserError(f"--resume goes on with the run's own settings; leave out {extra}")
    return given, resume


def settle(given, train, initial=None):
    """Settings with every None decided from the data, the device and the checkpoint to start from -> dict. Prints what was chosen.

    initial: the config of that checkpoint.
    """
    demo, pictures = given.get("data") is None, len(train.records)
    given_by_user, given = given, dict(given)
    if initial:
        decided = (*ARCHITECTURE, *["num_queries"] * (initial["detector"] in QUERIES_ARE_WEIGHTS))
        for key in given.keys() & {*decided, "backbone_weights"}:
            if key == "backbone_weights" or initial.get(key) != given[key]:
                raise UserError(f"--{key.replace('_', '-')} {given[key]}: the architecture and its weights are those of --init {given['init']}; leave it out")
        given |= {key: initial[key] for key in decided if initial.get(key) is not None}
        if "num_queries" not in given:
            given["num_queries"] = max(enough_queries(train), initial["num_queries"])
        given.setdefault("image_size", initial["image_size"])
        given.setdefault("square", initial.get("square", False))
        given["backbone_weights"] = "none"  # they come with the rest
    recipe = given.get("recipe")
    ecdet = "ecdet" in (given.get("detector"), recipe)
    backbone = given.get("backbone") or (SIZES[given["size"]]["backbone"] if "size" in given else "ecvit-nano" if demo else "ecvitt")
    spec = find_spec(backbone)
    weights = given.get("backbone_weights") or ("pretrained" if spec.source else "none")
    scratch = weights == "none" and not initial
    recipe = recipe or ("ecdet" if ecdet and not scratch else "default")
    s = DEFAULTS | RECIPES[recipe] | given
    s |= {"backbone": backbone, "backbone_weights": weights}
    for key in ("batch_size", "accumulate", "device_batch", "image_size", "num_queries", "decoder_layers", "patch_size", "epochs", "steps", "minutes", "patience"):
        if s[key] is not None and s[key] <= 0:
            raise UserError(f"--{key.replace('_', '-')} has to be more than 0, not {s[key]}")
    if (s["copies"] or 0) < 0:
        raise UserError(f"--copies has to be 0 or more, not {s['copies']}")
    if not 0 <= s["distinct"] < 1:
        raise UserError(f"--distinct is an IoU under 1, or 0, not {s['distinct']}")
    refuse_ignored(s, given_by_user, spec, train.layout)
    nano = backbone == "ecvit-nano"
    batch = lambda: s["batch_size"] * s["accumulate"]
    chosen = {}
    if given.get("mosaic"):
        s["plain_passes"] = 0  # mosaics begin with the run

    def choose(key, value):
        if s[key] is None:
            s[key] = chosen[key] = value

    if s["detector"] == "ecdet":
        choose("size", next((size for size, parts in SIZES.items() if parts["backbone"] == backbone), "m"))
        choose("decoder_layers", SIZES[s["size"]]["layers"])
    else:
        choose("hidden_dim", 128 if nano else 256)
        choose("num_heads", s["hidden_dim"] // 32)
        choose("ffn_dim", 4 * s["hidden_dim"])
        choose("decoder_layers", 2 if nano else 6 if s["detector"] == "dino" else 3)
    if s["detector"] == "dino":
        choose("encoder_layers", 1 if nano else 6)
        choose("copies", 40 if nano else 100)
    if s["detector"] == "detr":
        choose("copies", 0 if initial else 40)
    choose("image_size", 128 if demo else choose_image_size(train, 224 if nano else 640))
    published = s["augment"] == "strong" and pictures >= 50000  # as many pictures as the recipe was made for, or nearly
    of_ecdet = ECDET[s["size"] or "s"]
    if recipe == "ecdet":
        choose("mosaic", round(of_ecdet["mixed"] / of_ecdet["epochs"], 4))
        choose("mosaic_chance", of_ecdet["chance"])
        choose("plain_end", round(1 - of_ecdet["plain_from"] / of_ecdet["epochs"], 4))
        choose("weight_decay", of_ecdet["weight_decay"])
    choose("batch_size", 32 if published else 8 if pictures < 1000 else 16)
    choose("num_queries", 900 if s["detector"] == "dino" and not nano else max(enough_queries(train), 300 if recipe == "ecdet" else 0))
    if s["epochs"] is s["steps"] is s["minutes"] is None:
        chosen["epochs"] = s["epochs"] = 40 if demo else of_ecdet["epochs"] if published else 100 if pictures < 5000 else 50 if pictures < 20000 else 24
        if demo:
            chosen["minutes"] = s["minutes"] = 4.5
    if s["schedule"] == "flat-cosine" and s["detector"] == "ecdet":
        scale = math.sqrt(batch() / 32) * (0.5 if initial else 1.0)  # a released file ended with half of the learning rate
        lr, backbone_lr = (round(scale * of_ecdet[key], 8) for key in ("lr", "backbone_lr"))
    else:
        lr = round((8e-4 if scratch else 4e-4) * math.sqrt(batch() / 16), 6)
        backbone_lr = (s["lr"] or lr) / 10
    if scratch:  # random weights are neither worth keeping nor in danger
        s["freeze_backbone"] = given.get("freeze_backbone", 0)
        s["backbone_lr"] = given.get("backbone_lr")
        backbone_lr = s["lr"] or lr
    choose("lr", lr)
    choose("backbone_lr", backbone_lr)
    if initial:
        s["optimizer"] = "adamw"  # Muon's steps are for weights that still have to be found
    fit_to_budget(s, chosen, pictures, batch())
    quick = s["image_size"] < 320 and choose_device().type != "cuda"  # preparing a picture is nothing beside a step
    choose("workers", 0 if quick else min(4, os.cpu_count()))
    choose("out", next_free(Path("runs") / ("demo" if demo else Path(s["data"]).resolve().name)))
    s["data"] = str(s["data"] or "data/demo")
    try:
        s["freeze_backbone"] = s["freeze_backbone"] if s["freeze_backbone"] == "all" else float(s["freeze_backbone"])
    except ValueError:
        raise UserError(f"--freeze-backbone takes a number of epochs or all, not {s['freeze_backbone']}") from None
    asked, s["precision"] = s["precision"], choose_precision(s["precision"], choose_device())
    if s["shard"] and s["precision"] == "float16":  # PyTorch's scaler doesn't look into the other processes' parts
        if asked == "float16":
            raise UserError("--precision float16 does not go with --shard; use bfloat16 or float32")
        s["precision"] = "float32"
    if asked == "auto":
        chosen["precision"] = s["precision"]
    s["num_classes"] = len(train.classes)
    print("chosen: " + ", ".join(f"{key}={value}" for key, value in chosen.items()))
    if train.most_objects > s["num_queries"] and s["detector"] != "ssd":
        print(f"warning: a picture has {train.most_objects} objects, more than the {s['num_queries']} queries; the rest can't be found")
    return s


def enough_queries(train):
    """Many more queries than objects: the best of them are matched."""
    return max(100, min(300, 10 * train.most_objects), 2 * train.most_objects)


def refuse_ignored(s, given, spec, layout):
    """Raises UserError for an option of the command line that would change nothing."""
    resampled = s["patch_size"] not in (None, spec.patch) and s["backbone_weights"] != "none"
    trained = s["freeze_backbone"] != "all"
    no_parts = "a single COCO file holds all pictures; --val-fraction decides how many are evaluated on"
    rules = (
        ("val_fraction", layout == "json", f"is for a single COCO file; this is {layout} layout, which has parts of its own"),
        ("train_split", layout != "json", no_parts),
        ("val_split", layout != "json", no_parts),
        ("size", s["detector"] == "ecdet", "is ECDet's; add --detector ecdet"),
        ("scales", s["detector"] == "dino" and s["pyramid"] != "own", "is for a DINO over a pyramid; add --detector dino, leave out --pyramid own"),
        ("attention", s["detector"] == "detr", "is for the default detector, detr"),
        ("copies", s["detector"] in ("detr", "dino"), "is for detr and dino; an ECDet's size decides them, the others have none"),
        ("distinct", s["detector"] == "detr", "is for the default detector, detr"),
        ("decoder_layers", s["detector"] != "ssd", "an SSD has no decoder; leave it out"),
        ("patch_resize", resampled, "is for pretrained weights with a --patch-size that is not their own"),
        ("optimizer", given.get("optimizer") != "muon" or not s["init"], "Muon is for random weights, --init leaves none"),
        ("backbone_lr", trained, "--freeze-backbone all leaves the backbone as it is; leave one of them out"),
        ("layer_decay", trained, "--freeze-backbone all leaves the backbone as it is; leave one of them out"),
    )
    for key, is_used, why in rules:
        if key in given and not is_used:
            raise UserError(f"--{key.replace('_', '-')} {given[key]}: {why}")


def fit_to_budget(s, chosen, pictures, batch):
    """The published recipe's lengths, where the budget is shorter than COCO's epochs: the warm-up takes a twentieth of it at
    most, a tenth at the end is without augmentation at least."""
    if s["warmup_steps"] is None:
        return
    steps = min(s["steps"] or math.inf, (s["epochs"] or math.inf) * math.ceil(pictures / batch))
    s["warmup"] = chosen["warmup"] = round(min(0.05, s["warmup_steps"] / steps if math.isfinite(steps) and not s["minutes"] else 0.05), 5)
    if steps < 100_000 or s["minutes"]:
        s["plain_end"] = chosen["plain_end"] = 0.1


def choose_image_size(split, smallest):
    """The shortest side at which a small object (the data's 20th percentile) is still 20 pixels wide, within reason."""
    side = np.median([min(r.width, r.height) for r in split.records])
    relative = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) / min(r.width, r.height) for r in split.records for b in r.boxes]
    wanted = 20 / max(float(np.quantile(relative, 0.2)), 1e-3)
    return int(min(max(wanted, smallest), max(2 * smallest, 640), max(side, smallest)) // 32 * 32)


def next_free(path):
    candidates = [path] + [path.with_name(f"{path.name}-{i}") for i in range(2, 1000)]
    return str(next(p for p in candidates if not p.exists()))

