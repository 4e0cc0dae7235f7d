"""One file that is enough by itself: weights, settings, class names, preprocessing; in `last.pth`, all that a run goes on from."""

import json
import os
import pickle
import re
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file

from detr_model import build_model
from ecvit import fold
from errors import UserError
from files import read_text
from released import fetch_released, released_checkpoint, weights_of
from weights import complain, first_line, load_strictly

FORMAT = 1
LARGEST = dict(num_classes=10**5, num_queries=10**5, hidden_dim=10**4, ffn_dim=10**5, num_heads=10**3, encoder_layers=100, decoder_layers=100, image_size=10**4, patch_size=10**3)


def save_checkpoint(path, content):
    """Writes content under its final name whole or not at all, as `write_whole`. Raises UserError."""
    try:
        write_whole(path, lambda file: torch.save({"format": FORMAT, **content}, file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: can't be written ({error}); what it held before is whole. Free some space, or choose another --out") from None


def write_whole(path, content):
    """Writes a file whole or not at all: under a temporary name, flushed to disk, then renamed. content: bytes, or what writes them to a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_checkpoint(path):
    """A checkpoint's dictionary, on the CPU: a file of train.py, or one of ECDet's released files, a folder of the Hugging Face
    hub that holds one (model.safetensors), or the name of either, which is then downloaded. No code in the file is run.
    Raises UserError."""
    given, path = path, Path(path)
    if not path.exists():
        path = fetch_released(given) or fetch_folder(given) or path
    if path.is_dir() and is_ours(path):
        return read_folder(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the best.pth or last.pth of a run, or ECDet's released file or folder")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds code ({code[1]}), which is never run" if code else first_line(error)[:200]
        raise UserError(f"{path}: not a checkpoint of weights alone: {what}") from None
    except Exception as error:  # torch raises many kinds on files that are not its own
        raise UserError(f"{path}: not a checkpoint, or cut short ({first_line(error)[:200]})") from None
    if isinstance(content, dict) and {"format", "model", "config"} <= content.keys():
        return checked(content, path)
    weights = weights_of(content) if isinstance(content, dict) else None
    if weights is None:
        raise UserError(f"{path}: not a checkpoint of train.py, nor a released ECDet (a backbone's weights go to --backbone-weights)")
    return released_checkpoint(weights, path)


# What earlier versions, whose checkpoints don't have these settings, did without being asked
EARLIER = {"exact_sides": False, "attention": "global", "distinct": 0.0}


def settings_of(config):
    """A checkpoint's settings with those that came later, such that they mean what they meant when it was written."""
    if config["detector"] == "detr" and "attention" not in config:
        config = config | {"copies": 0}  # which were another detector's then
    return EARLIER | config


def refuse_newer(content, path):
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {content['format']}, this one reads {FORMAT})")


def checked(content, path):
    """content as it is, if its settings describe a detector that its weights fit. A checkpoint may come from anywhere: nothing is
    allocated by its settings, nor opened by names in them, before that is sure. Raises UserError."""
    try:
        refuse_newer(content, path)
        config, classes = settings_of(content["config"]), content["classes"]
        if not all(isinstance(name, str) for name in classes) or len(classes) != config["num_classes"] or len(classes) != len(content["category_ids"]):
            raise ValueError("classes, category_ids and num_classes do not belong together")
        for key, most in LARGEST.items():
            if config.get(key) is not None and not 1 <= config[key] <= most:
                raise ValueError(f"{key} is not in 1 .. {most:,}")
        with torch.device("meta"):
            wanted = build_model(config, load_weights=False)[0].state_dict()
        mismatched = [key for key, value in content["model"].items() if key in wanted and value.shape != wanted[key].shape]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"{path}: its settings describe no detector ({type(error).__name__}: {first_line(error)[:200]})") from None
    complain(path, config["detector"], wanted.keys() - content["model"].keys(), content["model"].keys() - wanted.keys(), mismatched)
    return content | {"config": config}


# A Hugging Face folder: model.safetensors, config.json with all else, and a model card


def write_folder(content, folder):
    """Writes a checkpoint's dictionary as a folder that `read_checkpoint` and the Hugging Face hub take. Raises UserError."""
    folder = Path(folder)
    rest = {"format": FORMAT} | {key: content[key] for key in ("config", "classes", "category_ids", "figures") if key in content}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in content["model"].items()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(rest, indent=1))
        (folder / "README.md").write_text(model_card(content))
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error})") from None


def model_card(content):
    config, figures = content["config"], content.get("figures", {})
    rows = "".join(f"| {name} | {value:.3f} |\n" for name, value in figures.items() if value >= 0)
    table = f"\nMeasured while it was trained:\n\n| figure | value |\n|---|---|\n{rows}" if rows else ""
    return (
        f"---\nlibrary_name: pytorch\npipeline_tag: object-detection\n---\n\n# {config['detector']} on {config['backbone']}\n\n"
        f"Detects {len(content['classes'])} classes: {', '.join(content['classes'])}. Pictures are resized to {config['image_size']} pixels.\n{table}\n"
        "```python\nfrom detector import load\n\ndetector = load(\"this folder, or USER/NAME\")\nfound = detector(\"photo.jpg\")\n```\n"
    )


def is_ours(folder):
    try:
        return {"format", "classes", "config"} <= json.loads(read_text(folder / "config.json")).keys()
    except (UserError, ValueError, AttributeError, RecursionError):
        return False


def read_folder(folder):
    """-> a checkpoint's dictionary."""
    rest = json.loads(read_text(folder / "config.json"))
    refuse_newer(rest, folder)
    try:
        weights = load_file(folder / "model.safetensors")
    except Exception as error:  # safetensors raises kinds of its own
        raise UserError(f"{folder}: model.safetensors is missing or broken ({first_line(error)[:200]})") from None
    return checked(rest | {"model": weights}, folder)


def fetch_folder(name):
    """USER/NAME on the hub -> the folder it was downloaded to, or None where the name can't be one."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or Path(str(name)).suffix or Path(str(name)).parent.is_dir():
        return None
    print(f"{name}: is not here; asking the Hugging Face hub for it")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=["model.safetensors", "config.json"]))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{name}: no such file or folder here, and not to be had from the hub ({first_line(error)[:200]})") from None


def load_detector(path, device="cpu", memory_format=torch.channels_last):
    """-> (model for inference on device, its batch norms folded; postprocess; checkpoint dictionary)."""
    content = read_checkpoint(path)
    model, _, postprocess = build_model(content["config"], load_weights=False)
    load_strictly(model, content["model"], path)
    return fold(model).to(device, memory_format=memory_format).eval(), postprocess, content


def start_from(model, content, classes, source):
    """Fills model with a checkpoint's weights. Of its `class_layers` only the rows of those classes that the checkpoint knows by
    name are filled; the others stay as they are. Prints which. Raises UserError."""
    state, own = dict(content["model"]), model.state_dict()
    if classes != content["classes"]:
        known = {name: i for i, name in enumerate(content["classes"])}
        pairs = [(i, known[name]) for i, name in enumerate(classes) if name in known]
        mapped = []
        for layer, (groups, first) in model.class_layers().items():
            for key in [key for key in state if key.startswith(layer + ".") and key in own]:
                state[key] = copy_classes(own[key], state[key], groups, first, len(classes), len(content["classes"]), pairs)
                mapped.append(key)
        anew = [name for name in classes if name not in known]
        kept = ", ".join(classes[i] for i, _ in pairs) or "none"
        print(
            f"{source}: all weights but {len(mapped)} of the layers that give the classes; in these, kept by name: {kept}; "
            f"made anew: {', '.join(anew) or 'none'}"
        )
    load_strictly(model, state, source)


def copy_classes(ours, theirs, groups, first, count, their_count, pairs):
    """A class layer's weight (groups * (first + count + rest), ...) with rows of another's, which has their_count classes: those of
    `pairs` [(our class, theirs)], and what comes before and after the classes in each group, as the background."""
    if len(theirs) != groups * (len(ours) // groups - count + their_count):
        return theirs  # made for something else: loading it says so
    copied = ours.clone()
    to, of = copied.unflatten(0, (groups, -1)), theirs.unflatten(0, (groups, -1))
    to[:, :first], to[:, first + count :] = of[:, :first], of[:, first + their_count :]
    for new, old in pairs:
        to[:, first + new] = of[:, first + old]
    return copied
