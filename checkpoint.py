"""One file that is enough by itself: weights, settings, class names, preprocessing; in `last.pth`, all that a run goes on from."""

import os
from pathlib import Path

import torch

from detr_model import build_model
from errors import UserError

FORMAT = 1


def save_checkpoint(path, content):
    """Writes content under its final name whole or not at all: a temporary file, flushed to disk, then renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error}); free some space or choose another --out") from None


def read_checkpoint(path):
    """A checkpoint's dictionary, on the CPU. No code in the file is run. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the best.pth or last.pth of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on files that are not its own
        raise UserError(f"{path}: not a checkpoint, or cut short ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(content, dict) or not {"format", "model", "config"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of train.py (a backbone's weights go to --backbone-weights)")
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {content['format']}, this one reads {FORMAT})")
    return content


def load_detector(path, device="cpu"):
    """-> (model in eval mode on device, postprocess, checkpoint dictionary)."""
    content = read_checkpoint(path)
    model, _, postprocess = build_model({**content["config"], "backbone_weights": None})
    model.load_state_dict(content["model"])
    return model.to(device).eval(), postprocess, content
