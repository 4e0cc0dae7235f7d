"""Checkpoints: one file with weights, settings and class names; `last.pth` also has all that a run is resumed from.

A checkpoint's dictionary has `format`, `model` (a state dict), `config`, `classes` and `category_ids`, and may have
`figures`; runs.py adds `training`. A folder for the Hugging Face hub and ECDet's released files are read as the same.
"""

import json
import math
import os
import pickle
import re
import urllib.error
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.detection import SSD300_VGG16_Weights

from backbones import ECVIT_RELEASE
from detr_model import build_model
from ecdet_loss import REG_SCALE, UP
from ecdet_model import SIZES
from ecvit import fuse
from errors import UserError, writing
from files import read_text
from weights import check_keys, download, first_line, load_strictly, say_licence

FORMAT = 1
LARGEST = dict(
    num_classes=10**5,
    num_queries=10**5,
    hidden_dim=10**4,
    ffn_dim=10**5,
    num_heads=10**3,
    encoder_layers=100,
    decoder_layers=100,
    image_size=10**4,
    patch_size=10**3,
)
SMALLEST_TILE = 32
EARLIER = {"exact_sides": False, "attention": "global", "distinct": 0.0}  # what versions without these settings did


def load_detector(path, device="cpu", memory_format=torch.channels_last):
    """path: see read_checkpoint -> (model for inference on device, batch norms folded; postprocess; dictionary)."""
    content = read_checkpoint(path)
    refuse_not_finite(content["model"], path)
    model, _, postprocess = build_model(content["config"], load_weights=False)
    load_strictly(model, content["model"], path)
    return fuse(model).to(device, memory_format=memory_format).eval(), postprocess, content


def refuse_not_finite(state, source):
    """Raises UserError if a weight of a state dict is NaN or infinite."""
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{source}: {len(broken)} of its {len(state)} weights are not finite ({', '.join(broken[:3])}): its "
            "training diverged, or the file is damaged; take another checkpoint, or train with a lower --lr"
        )


def save_checkpoint(path, content):
    """Writes a checkpoint's dictionary whole or not at all, see write_atomically. Raises UserError."""
    hint = "; what it held before is whole. Free some space, or choose another --out"
    with writing(path, hint, also=[RuntimeError]):  # which torch.save raises if the disk is full
        write_atomically(path, partial(torch.save, {"format": FORMAT, **content}))


def write_atomically(path, content):
    """Writes a file whole or not at all: under a temporary name, flushed to disk, then renamed.

    content: bytes, or a function that writes them to a file.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".partial")
    try:
        with open(unfinished, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_checkpoint(path):
    """A checkpoint -> its dictionary, on the CPU. No code in the file is run. Raises UserError.

    path: a file of train.py, one of ECDet's released files, a folder of the Hugging Face hub that holds one of them
    (model.safetensors), or the name of a released file or repository, which is downloaded.
    """
    given, path = path, Path(path)
    if not path.exists():
        path = fetch_released(given) or fetch_folder(given) or path
    if path.name == "model.safetensors" and is_ours(path.parent):
        path = path.parent
    if path.is_dir() and is_ours(path):
        return read_folder(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; give the best.pth or last.pth of a run, or ECDet's released file or folder"
        )
    content = read_file(path)
    if isinstance(content, dict) and {"format", "model", "config"} <= content.keys():
        return checked(content, path)
    weights = released_weights(content) if isinstance(content, dict) else None
    if weights is None:
        raise UserError(
            f"{path}: not a checkpoint of train.py, nor a released ECDet "
            "(a backbone's weights go to --backbone-weights)"
        )
    return released_checkpoint(weights, path)


def read_file(path):
    """A .safetensors file, or one of torch.save without code -> its content, on the CPU. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds code ({code[1]}), which is never run" if code else first_line(error)[:200]
        raise UserError(f"{path}: not a checkpoint of weights alone: {reason}") from None
    except Exception as error:  # torch raises exceptions of many types for other files
        raise UserError(f"{path}: not a checkpoint, or cut short ({first_line(error)[:200]})") from None


def checked(content, path):
    """A checkpoint's dictionary -> the same with all settings, if these describe a detector that its weights fit.

    A checkpoint may come from anywhere: before that is sure, nothing is allocated by its settings or opened by names in
    them. Raises UserError.
    """
    weights = content["model"]
    try:
        refuse_newer(content, path)
        config = settings_of(content["config"])
        check_settings(config, content)
        with torch.device("meta"):
            expected = build_model(config, load_weights=False)[0].state_dict()
        mismatched = [key for key, value in weights.items() if key in expected and value.shape != expected[key].shape]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise UserError(
            f"{path}: its settings describe no detector ({type(error).__name__}: {first_line(error)[:200]})"
        ) from None
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    check_keys(path, config["detector"], missing, unexpected, mismatched)
    return content | {"config": config}


def refuse_newer(content, path):
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {content['format']}, this one reads {FORMAT})")


def settings_of(config):
    """A checkpoint's settings -> the same with those added since, set to what the code did when it was written."""
    if "copies" in config:  # an earlier name
        config = {"num_denoising": config["copies"]} | {key: value for key, value in config.items() if key != "copies"}
    if config["detector"] == "detr" and "attention" not in config:
        config = config | {"num_denoising": 0}  # only DINO had these then
    return EARLIER | config


def data_of(config, folder):
    """The dataset that the run in a folder was trained on: as it was given, or as it lies seen from the folder."""
    data, from_run = config.get("data"), config.get("data_from_run")
    if data and from_run and not os.path.exists(data) and os.path.exists(os.path.join(folder, from_run)):
        return os.path.normpath(os.path.join(folder, from_run))
    return data


def check_settings(config, content):
    """Raises ValueError if the classes are inconsistent or a setting is out of range."""
    classes = content["classes"]
    named = all(isinstance(name, str) for name in classes)
    if not named or not len(classes) == config["num_classes"] == len(content["category_ids"]):
        raise ValueError("classes, category_ids and num_classes do not belong together")
    for key, largest in LARGEST.items():
        if config.get(key) is not None and not 1 <= config[key] <= largest:
            raise ValueError(f"{key} is not in 1 .. {largest:,}")
    check_thresholds(content.get("thresholds"))
    tile, data = config.get("tile"), config.get("data_from_run")
    if tile is not None and not SMALLEST_TILE <= tile <= LARGEST["image_size"] or not isinstance(data, str | None):
        raise ValueError("tile or data_from_run is out of range")
    low, high = config.get("value_range") or (0, 1)
    if not -math.inf < low <= high < math.inf:
        raise ValueError("value_range is not from a number to a larger one")
    height, width = config.get("common_size") or (1, 1)
    if min(height, width) < 1 or not isinstance(config.get("trained_on"), str | None):
        raise ValueError("common_size or trained_on is out of range")


def check_thresholds(found):
    """Raises ValueError, KeyError or TypeError if these are not mistakes.find_thresholds' or None."""
    if found is not None and not all(0 <= score <= 1 for score in (found["score"], *found["by_class"].values())):
        raise ValueError("thresholds are not in 0 .. 1")


# Fine-tuning: a new model starts from a checkpoint's weights


def start_from(model, content, classes, source):
    """Loads a checkpoint's weights into a model for other classes. Prints which rows it kept. Raises UserError.

    In the layers of `model.class_layers()`, only the rows of classes that the checkpoint has by name are loaded; the
    others keep their initial values.
    """
    state, own = dict(content["model"]), model.state_dict()
    if classes != content["classes"]:
        known = {name: i for i, name in enumerate(content["classes"])}
        pairs = [(i, known[name]) for i, name in enumerate(classes) if name in known]
        count, their_count = len(classes), len(content["classes"])
        mapped = 0
        for layer, (groups, first) in model.class_layers().items():
            for key in [key for key in state if key.startswith(layer + ".") and key in own]:
                state[key] = copy_classes(own[key], state[key], groups, first, count, their_count, pairs)
                mapped += 1
        kept = ", ".join(classes[i] for i, _ in pairs) or "none"
        new = ", ".join(name for name in classes if name not in known) or "none"
        print(
            f"{source}: weights loaded; {mapped} tensors have rows for classes; kept by name: {kept}; "
            f"newly initialised: {new}"
        )
    refuse_not_finite(state, source)
    load_strictly(model, state, source)


def copy_classes(ours, theirs, groups, first, count, their_count, pairs):
    """A class layer's weight with rows copied from another's, which has their_count classes -> a new tensor.

    ours: (groups * (first + count + rest), ...). The rows are those of `pairs` [(our class, their class)], and in each
    group what comes before and after the classes, such as the background.
    """
    if len(theirs) != groups * (len(ours) // groups - count + their_count):
        return theirs  # from another architecture: loading it raises the error
    copied = ours.clone()
    to, of = copied.unflatten(0, (groups, -1)), theirs.unflatten(0, (groups, -1))
    to[:, :first], to[:, first + count :] = of[:, :first], of[:, first + their_count :]
    for new, old in pairs:
        to[:, first + new] = of[:, first + old]
    return copied


# A folder for the Hugging Face hub: model.safetensors, config.json with all else, and a model card

FOLDER = "model.safetensors", "config.json", "README.md"
FILE_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".onnx", ".pt2", ".safetensors"}
MODEL_CARD = """---
library_name: pytorch
pipeline_tag: object-detection
---

# {detector} on {backbone}

Detects {count} classes: {names}. Images are resized to {image_size} pixels.
{table}
```python
from detector import load

detector = load("this folder, or USER/NAME")
detections = detector("photo.jpg")
```
"""


def write_folder(content, folder):
    """Writes a checkpoint's dictionary as a folder for read_checkpoint and the Hugging Face hub. Raises UserError.

    What was written so before is overwritten; other files of these names are not.
    """
    folder = Path(folder)
    for name in () if is_ours(folder) else FOLDER:
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: would be overwritten; choose another folder")
    keys = [key for key in ("config", "classes", "category_ids", "figures", "thresholds") if key in content]
    rest = {"format": FORMAT} | {key: content[key] for key in keys}
    weights = {key: value.contiguous() for key, value in content["model"].items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(rest, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(model_card(content), encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def model_card(content):
    config, table = content["config"], ""
    rows = [f"| {name} | {value:.3f} |\n" for name, value in content.get("figures", {}).items() if value >= 0]
    if rows:
        table = "\nMeasured during training:\n\n| figure | value |\n|---|---|\n" + "".join(rows)
    return MODEL_CARD.format(
        detector=config["detector"],
        backbone=config["backbone"],
        count=len(content["classes"]),
        names=", ".join(content["classes"]),
        image_size=config["image_size"],
        table=table,
    )


def is_ours(folder):
    try:
        return {"format", "classes", "config"} <= json.loads(read_text(folder / "config.json")).keys()
    except (UserError, ValueError, AttributeError, RecursionError):
        return False


def read_folder(folder):
    """A folder of write_folder -> a checkpoint's dictionary. Raises UserError."""
    rest = json.loads(read_text(folder / "config.json"))
    refuse_newer(rest, folder)
    try:
        weights = load_file(folder / "model.safetensors")
    except Exception as error:  # safetensors has exceptions of its own
        raise UserError(f"{folder}: model.safetensors is missing or broken ({first_line(error)[:200]})") from None
    return checked(rest | {"model": weights}, folder)


def fetch_folder(name):
    """USER/NAME on the hub -> the folder it is downloaded to, or None if the name can't be one. Raises UserError."""
    path = Path(str(name))  # such as me/bccd-v1.0
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or path.suffix in FILE_SUFFIXES or path.parent.is_dir():
        return None
    print(f"{name}: no such file or folder here; asking the Hugging Face hub for it")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=["model.safetensors", "config.json"]))
    except Exception as error:  # the hub's client raises exceptions of many types
        raise UserError(
            f"{name}: no such file or folder here, and the hub can't provide it ({first_line(error)[:200]})"
        ) from None


# ECDet's released files, ecdet_{s,m,l,x}.pth or, on the Hugging Face hub, Intellindust/ECDet_{S,M,L,X}, as checkpoints:
# the size is recognised by the shapes of the weights, the classes are COCO's.

FILES = tuple(f"ecdet_{size}.pth" for size in ("s", "m", "l", "x"))
SCORES = "decoder.enc_score_head.weight"
# Constants of the architecture, and what the original kept for a single image size: ours are used.
CONSTANTS = re.compile(
    r"decoder\.(decoder\.)?(up|reg_scale)|decoder\.(anchors|valid_mask)|.*(num_points_scale|rope_embed\.periods)"
)
CONSTANT_VALUES = {"up": UP, "reg_scale": REG_SCALE}  # that a released file has and our state dict has not
CONSTANT_KEYS = {f"decoder.{name}" for name in CONSTANT_VALUES}


def fetch_released(name):
    """The name of a released file (ecdet_s.pth) or repository (Intellindust/ECDet_S) -> the file's path, downloaded.

    None if the name is neither. Raises UserError.
    """
    path = Path(name)
    try:
        if path.name in FILES and path.parent.is_dir():
            return download(ECVIT_RELEASE + path.name)
        if re.fullmatch(r"[\w.-]+/ECDet_\w+", str(name)):
            say_licence(str(name))
            return Path(huggingface_hub.hf_hub_download(str(name), "model.safetensors"))
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"{name}: can't be downloaded ({first_line(error)}); download it elsewhere and give the path of the file"
        ) from None
    return None


def released_weights(content):
    """The content of a released file -> its state dict, or None if it is something else.

    The averaged weights are under ema.module, others under model, or the file holds the state dict itself.
    """
    ema = content.get("ema")
    state = ema.get("module") if isinstance(ema, dict) else content.get("model", content)
    if not isinstance(state, dict):
        return None
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    if SCORES not in state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None
    return state


def released_checkpoint(state, source):
    """A released file's state dict -> a checkpoint's dictionary. Every weight has to fit. Raises UserError."""
    size, num_classes = recognise_size(state, source), len(state[SCORES])
    config = {
        "detector": "ecdet",
        "size": size,
        "backbone": SIZES[size]["backbone"],
        "backbone_weights": None,
        "num_classes": num_classes,
        "num_queries": 300,
        "decoder_layers": SIZES[size]["layers"],
        "image_size": 640,
        "square": True,
        "exact_sides": True,
    }
    name, own = f"ECDet-{size.upper()}", build_model(config)[0].state_dict()
    constants = {key for key in own | state if CONSTANTS.fullmatch(key)}
    compare_constants(state, own, constants, source)
    weights = {key: value for key, value in state.items() if key not in constants}
    expected = own.keys() - constants
    mismatched = [key for key in expected & weights.keys() if own[key].shape != weights[key].shape]
    check_keys(source, name, expected - weights.keys(), weights.keys() - expected, mismatched)
    classes, category_ids = coco_classes()
    if num_classes == len(classes) and CONSTANT_KEYS <= state.keys():
        print(f"{source}: a released {name}; its 80 classes are taken to be COCO's")
    else:
        classes, category_ids = [f"class {i}" for i in range(num_classes)], list(range(num_classes))
        print(
            f"{source}: {name} with {num_classes} classes, whose names are not in the file; they are called class 0, "
            "class 1, ... (a folder of ours has the names in its config.json, next to model.safetensors)"
        )
    return {
        "format": FORMAT,
        "model": {key: weights[key].to(value.dtype) if key in weights else value for key, value in own.items()},
        "config": config,
        "classes": classes,
        "category_ids": category_ids,
    }


def recognise_size(state, source):
    """A released file's state dict -> the size that has its shapes, "s", "m", "l" or "x". Raises UserError."""
    keys = (
        "backbone.backbone.register_token",
        "encoder.encoder.0.layers.0.linear1.weight",
        "decoder.decoder.layers.0.linear1.weight",
    )
    shapes = [tuple(state[key].shape) if key in state else None for key in keys]
    for size, parts in SIZES.items():
        dim = parts["dim"]
        if shapes[1:] == [(parts["encoder_ffn"], dim), (parts["decoder_ffn"], dim)]:
            return size
    raise UserError(f"{source}: an ECDet, but of none of the sizes {', '.join(SIZES)}: {dict(zip(keys, shapes))}")


def compare_constants(state, own, constants, source):
    """Prints a line if constants of a released file's state dict are not those of our architecture."""
    expected = dict(own)
    for key in constants:
        name = key.rsplit(".", 1)[-1]
        if name in CONSTANT_VALUES:
            expected[key] = torch.tensor([CONSTANT_VALUES[name]])
    differing = []
    for key in sorted(constants & expected.keys() & state.keys()):
        ours, theirs = expected[key], state[key]
        if ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), rtol=1e-3):
            differing.append(key)
    if differing:
        print(
            f"{source}: {len(differing)} constants are not those of the architecture ({', '.join(differing[:3])} ...); "
            "the architecture's are used"
        )


def coco_classes():
    """-> the names of COCO's 80 classes and their category ids, in order."""
    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]  # by id, with gaps
    ids = [i for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    return [names[i] for i in ids], ids
