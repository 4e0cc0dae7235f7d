"""ECDet's released files as checkpoints of ours: the size is recognised, the classes are COCO's.

Released as ecdet_{s,m,l,x}.pth and, on the Hugging Face hub, as Intellindust/ECDet_{S,M,L,X} (safetensors).
"""

import re
import urllib.error
from pathlib import Path

import huggingface_hub
import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from backbones import ECVIT_RELEASE
from detr_model import build_model
from ecdet_model import SIZES
from errors import UserError
from refinement import REG_SCALE, UP
from weights import complain, download, first_line, say_licence

FILES = tuple(f"ecdet_{size}.pth" for size in ("s", "m", "l", "x"))
SCORES = "decoder.enc_score_head.weight"
# Constants of the architecture and what the original kept for one picture size: ours are used.
CONSTANTS = re.compile(r"decoder\.(decoder\.)?(up|reg_scale)|decoder\.(anchors|valid_mask)|.*(num_points_scale|rope_embed\.periods)")


def coco_classes():
    """-> the names of COCO's 80 classes and their category ids, in order."""
    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]  # by id, with gaps
    ids = [i for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    return [names[i] for i in ids], ids


def fetch_released(name):
    """The path of a released file that is not here: its name (ecdet_s.pth) or its repository (Intellindust/ECDet_S). Downloads it
    to the usual cache. None where the name is neither."""
    path = Path(name)
    try:
        if path.name in FILES and path.parent.is_dir():
            return download(ECVIT_RELEASE + path.name)
        if re.fullmatch(r"[\w.-]+/ECDet_\w+", str(name)):
            say_licence(str(name))
            return Path(huggingface_hub.hf_hub_download(str(name), "model.safetensors"))
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{name}: can't be downloaded ({first_line(error)}); download it elsewhere and give the path of the file") from None
    return None


def weights_of(content):
    """The state dict in what a released file holds, or None: averaged weights under ema.module, others under model, or bare."""
    ema = content.get("ema")
    state = ema.get("module") if isinstance(ema, dict) else content.get("model", content)
    if not isinstance(state, dict):
        return None
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    return state if SCORES in state and all(isinstance(value, torch.Tensor) for value in state.values()) else None


def released_checkpoint(state, source):
    """A released file's state dict -> a checkpoint's dictionary. Every weight has to fit. Raises UserError."""
    size = recognise_size(state, source)
    num_classes = len(state[SCORES])
    config = {
        "detector": "ecdet", "size": size, "backbone": SIZES[size]["backbone"], "backbone_weights": None, "num_classes": num_classes,
        "num_queries": 300, "decoder_layers": SIZES[size]["layers"], "image_size": 640, "square": True, "exact_sides": True,
    }  # fmt: skip
    own = build_model(config)[0].state_dict()
    constants = {key for key in own | state if CONSTANTS.fullmatch(key)}
    expected = own | {key: torch.tensor([{"up": UP, "reg_scale": REG_SCALE}[key.rsplit(".")[-1]]]) for key in constants if key.endswith(("up", "reg_scale"))}
    same = lambda key: expected[key].shape == state[key].shape and torch.allclose(expected[key].float(), state[key].float(), rtol=1e-3)
    differing = [key for key in constants & expected.keys() & state.keys() if not same(key)]
    if differing:
        print(f"{source}: {len(differing)} constants are not what the architecture says ({', '.join(sorted(differing)[:3])} ...); the architecture's are used")
    weights = {key: value for key, value in state.items() if key not in constants}
    wanted = own.keys() - constants
    misshapen = [key for key in wanted & weights.keys() if own[key].shape != weights[key].shape]
    complain(source, f"ECDet-{size.upper()}", wanted - weights.keys(), weights.keys() - wanted, misshapen)
    weights = {key: value.to(own[key].dtype) for key, value in weights.items()}
    classes, category_ids = coco_classes()
    if num_classes != len(classes):
        classes, category_ids = [f"class {i}" for i in range(num_classes)], list(range(num_classes))
        print(f"{source}: ECDet-{size.upper()} with {num_classes} classes, which are not COCO's; they are called class 0, class 1, ...")
    return {"format": 1, "model": {key: weights.get(key, own[key]) for key in own}, "config": config, "classes": classes, "category_ids": category_ids}


def recognise_size(state, source):
    """The size whose widths the state dict has."""
    keys = ("backbone.backbone.register_token", "encoder.encoder.0.layers.0.linear1.weight", "decoder.decoder.layers.0.linear1.weight")
    found = [tuple(state[key].shape) if key in state else None for key in keys]
    for size, parts in SIZES.items():
        dim = parts["dim"]
        if found[1:] == [(parts["encoder_ffn"], dim), (parts["decoder_ffn"], dim)]:
            return size
    raise UserError(f"{source}: an ECDet, but of none of the sizes {', '.join(SIZES)}: {dict(zip(keys, found))}")
