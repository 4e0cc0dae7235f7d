"""What train.py's settings become: from the command line, the data, the device and the checkpoint to start from.

`resolve_settings` decides every setting that was not given, and refuses those that would be ignored.
"""

import math
import os
import re
import shlex
from collections import Counter
from pathlib import Path

from backbones import find_spec
from checkpoint import LARGEST, SMALLEST_TILE
from datasets import advise_tiles, choose_image_size
from devices import choose_device, choose_precision
from ecdet_model import SIZES
from errors import UserError
from settings import ECDET, RECIPES, Settings, option

# What --init decides
ARCHITECTURE = "detector size backbone pyramid layers patch_size hidden_dim num_heads ffn_dim encoder_layers".split()
ARCHITECTURE += "decoder_layers scales attention num_denoising".split()
QUERIES_ARE_WEIGHTS = ("detr-2020", "dino")  # elsewhere they are selected, as many as one likes
AUGMENTATION = "augment", "color_jitter", "rotate", "mosaic", "plain_passes", "plain_end_passes"
POSITIVE = "batch_size accumulate device_batch image_size tile num_queries decoder_layers patch_size".split()
POSITIVE += "epochs steps minutes patience".split()
WIDTHS = 8  # --hidden-dim is a multiple of it, for the groups of the norms


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
            f"the rest can't be found; --num-queries {train.most_objects} or more"
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
    if given.get("mosaic") and "plain_passes" not in given:
        s.plain_passes = 0  # mosaics begin with the run
    if weights == "none" and not initial:  # random weights are neither worth keeping nor in danger
        s.freeze_backbone = given.get("freeze_backbone", 0.0)
        s.backbone_lr = given.get("backbone_lr")
    if initial:
        s.optimizer = "adamw"  # Muon's steps are for weights that still have to be found
    return s


def check_values(s):
    for key in POSITIVE:
        if getattr(s, key) is not None and getattr(s, key) <= 0:
            raise UserError(f"{option(key)} has to be more than 0, not {getattr(s, key)}")
    for key, largest in LARGEST.items():  # beyond, no checkpoint is opened
        value = getattr(s, key)
        if value is not None and not 1 <= value <= largest:
            raise UserError(f"{option(key)} {value}: has to be in 1 .. {largest:,}")
    for key in ("lr", "backbone_lr"):
        if (getattr(s, key) or 0) < 0:
            raise UserError(f"{option(key)} {getattr(s, key)}: has to be 0 or more")
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
        choose(s, "num_heads", max(1, s.hidden_dim // 32))
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
    if s.detector in ("detr", "dino") and s.hidden_dim % WIDTHS:
        raise UserError(f"--hidden-dim {s.hidden_dim}: has to be a multiple of {WIDTHS}")
    if s.detector in ("detr", "detr-2020", "dino") and s.hidden_dim % s.num_heads:
        raise UserError(f"--num-heads {s.num_heads}: has to divide --hidden-dim, {s.hidden_dim}")


def enough_queries(train):
    """Many more queries than objects: the best of them are matched."""
    return max(100, min(300, 10 * train.most_objects), 2 * train.most_objects)


def resolve_data(s, given, train):
    if given.get("flip") is None and have_sides(train.classes):
        s.flip = "none"
    smallest = 224 if s.backbone == "ecvit-nano" else 640
    if s.tile and not SMALLEST_TILE <= s.tile <= LARGEST["image_size"]:
        raise UserError(f"--tile {s.tile}: has to be in {SMALLEST_TILE} .. {LARGEST['image_size']:,} pixels")
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
    steps = min(s.steps or math.inf, (s.epochs or math.inf) * math.ceil(images / (s.batch_size * s.accumulate)))
    known = math.isfinite(steps) and not s.minutes
    asked = given.get("warmup", 0.05 if s.recipe == "ecdet" else s.warmup or 0.05)
    s.warmup = round(min(asked, s.warmup_steps / steps) if known else asked, 5)
    is_shorter = steps < 100_000 or s.minutes  # than COCO's epochs: the last tenth is without augmentation
    if s.recipe == "ecdet" and is_shorter and given.get("plain_end") is None:
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


def describe_cost(train_seconds, step_seconds, steps_left, s, given, world):
    """Lines that say how long a run will take and, beyond an hour, how to make it shorter.

    train_seconds: so far; steps_left: at most; given: the command line's settings, None for a resumed run.
    """
    total = train_seconds + step_seconds * steps_left
    if s.minutes:
        total = min(total, 60 * s.minutes)
    minutes = math.ceil(total / 60)
    duration = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    more = "" if s.eval_every else "; evaluation adds up to a tenth"
    lines = [f"training will take about {duration} on this machine, {step_seconds:.2g} s a step{more}"]
    if total <= 3600 or given is None:
        return lines
    start = "python train.py" if world == 1 else f"torchrun --nproc-per-node {world} train.py"
    given = {key: value for key, value in given.items() if key not in ("epochs", "steps", "minutes", "out")}
    given["minutes"] = 20
    lines.append("for what twenty minutes can give, stop it with Ctrl-C and start it as:")
    if s.image_size > 224:
        smaller = max(224, s.image_size // 2 // 32 * 32)
        lines.append(f"  {start} {as_options(given | {'image_size': smaller})}")
    if s.backbone != "ecvit-nano" and not s.init:
        of_the_backbone = "backbone", "backbone_weights", "size", "layers", "patch_size", "patch_resize", "image_size"
        rest = {key: value for key, value in given.items() if key not in of_the_backbone}
        lines.append(f"  {start} {as_options(rest | {'backbone': 'ecvit-nano'})}")
    if len(lines) == 2:
        lines.append(f"  {start} {as_options(given)}")
    return lines


def as_options(given):
    """Settings from the command line -> the words that give them."""
    words = []
    for key, value in given.items():
        option = key.replace("_", "-")
        words += [f"--no-{option}" if value is False else f"--{option}"] + [str(value)] * (not isinstance(value, bool))
    return shlex.join(words)
