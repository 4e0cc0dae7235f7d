"""Weights of pretrained backbones: the hub's repositories and folders, and the original authors' files, all loaded strictly.

Meta's, MAE's, MuM's and VGGT's own files are renamed to what transformers reads; what a file holds beyond the backbone (a
decoder, a text tower) is counted and said.
"""

import argparse
import os
import re
import urllib.error
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers

from errors import UserError


def transformers_config(spec):
    """The architecture of a row as transformers' configuration."""
    if spec.family == "convnext":
        return transformers.DINOv3ConvNextConfig(hidden_sizes=list(spec.width), depths=list(spec.depth))
    common = dict(
        hidden_size=spec.width, num_hidden_layers=spec.depth, num_attention_heads=spec.heads, patch_size=spec.patch
    )
    if spec.family in ("dinov3", "mum"):
        biased = spec.width != 4096  # the 7B model alone has no biases in its attention
        return transformers.DINOv3ViTConfig(
            **common, intermediate_size=spec.ffn, num_register_tokens=spec.registers, use_gated_mlp=spec.gated,
            hidden_act="silu" if spec.gated else "gelu", query_bias=biased, value_bias=biased, key_bias=spec.family == "mum",
            pos_embed_rescale=None,  # a detector needs the true positions in training too
        )  # fmt: skip
    common["image_size"] = spec.grid * spec.patch
    if spec.family == "clip":
        return transformers.CLIPVisionConfig(**common, intermediate_size=spec.ffn)
    if spec.family == "mae":
        return transformers.ViTMAEConfig(**common, intermediate_size=spec.ffn, mask_ratio=0.0)
    if spec.registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=spec.registers, **common)
    else:
        config = transformers.Dinov2Config(**common)
    config.mlp_ratio, config.use_swiglu_ffn = 4 if spec.gated else spec.ffn // spec.width, spec.gated
    return config


MODELS = {  # by name: transformers imports a model, a second for all of these, when it is asked for
    "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "dinov3_vit": "DINOv3ViTModel",
    "dinov3_convnext": "DINOv3ConvNextModel", "clip_vision_model": "CLIPVisionModel", "vit_mae": "ViTMAEModel",
}  # fmt: skip


def class_of(config):
    return getattr(transformers, MODELS[config.model_type])


def new_model(config):
    """A transformers model with random weights."""
    return class_of(config)(config)


def load_transformers(name, spec, weights):
    """The transformers model of a row, with random weights or with all of a hub's, folder's or file's. Raises UserError."""
    config = transformers_config(spec)
    if weights is None:
        return new_model(config)
    transformers.utils.logging.set_verbosity_error()  # it prints a table of the keys that the check below reports
    if weights == "pretrained" and spec.source.startswith("https://"):
        weights = download(spec.source)
    is_file = Path(weights).is_file()
    if not is_file and weights != "pretrained" and not Path(weights).is_dir():
        raise UserError(f"{weights}: no such folder or file; --backbone-weights takes pretrained, none, a Hugging Face folder or a .pth")
    source = spec.source if weights == "pretrained" else str(weights)
    strict = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)  # the report below names them all
    model_class = class_of(config)
    if is_file:
        if spec.family not in CONVERSIONS:
            raise UserError(f"{source}: a file; {name} takes a Hugging Face folder, or pretrained")
        try:
            state = CONVERSIONS[spec.family](read_state_dict(weights), source)
        except (KeyError, ValueError, IndexError) as error:  # what every file of this kind has is not there
            raise UserError(f"{source}: not the weights of {name} ({type(error).__name__}: {first_line(error)})") from None
        load = lambda: model_class.from_pretrained(None, config=config, state_dict=state, **strict)
    else:
        if weights == "pretrained":
            say_licence(source)
        check_architecture(source, config, name, weights)
        load = lambda: model_class.from_pretrained(source, config=config, **strict)
    try:
        model, report = fetch(load, source)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{source}: not the weights of {name} ({first_line(error)})") from None
    surplus = set(report["unexpected_keys"])
    beside = {key for key in surplus if BESIDE_THE_BACKBONE.match(key)}
    if beside:
        print(f"{source}: {len(beside)} weights are not the backbone's and are left out: {', '.join(sorted({key.split('.')[0] for key in beside}))}")
    complain(source, name, report["missing_keys"], surplus - beside, report["mismatched_keys"])
    return model


# What the repositories of CLIP and MAE hold besides the backbone.
BESIDE_THE_BACKBONE = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale|(vision_model\.)?embeddings\.position_ids|decoder\.")


def resize_matrix(old, new):
    """(new * new, old * old): what bicubic interpolation makes of a patch of old x old pixels, new x new of them."""
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    return F.interpolate(basis, (new, new), mode="bicubic", antialias=True, align_corners=False).flatten(1).T


def resize_patch_filters(filters, size, method="pinv"):
    """Filters (C, 3, p, p) of a patch embedding for patches of size x size pixels -> (C, 3, size, size).

    "pinv" (FlexiViT, arXiv 2212.08013): such that a patch that was enlarged with its picture gives what it gave before;
    exact for patches enlarged one by one. "bicubic": the filters resized like pictures. "crop": no resampling at all, the
    old filters with zeros around them (or cut), for comparison.
    """
    old = filters.shape[-1]
    if size == old:
        return filters
    if method == "crop":
        before = (size - old) // 2
        return F.pad(filters, (before, size - old - before) * 2)
    if method == "bicubic":
        return F.interpolate(filters, (size, size), mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resize_matrix(old, size).T).to(filters)
    return (filters.flatten(2) @ inverse.T).unflatten(2, (size, size))


def with_patch_size(model, spec, method):
    """A ViT of transformers -> the same network for the patches of spec, which differ in size; positions stay a grid of as many."""
    resized = new_model(transformers_config(spec))
    state = model.state_dict()
    key = next(key for key, value in state.items() if value.ndim == 4 and "patch_embed" in key)
    state[key] = resize_patch_filters(state[key], spec.patch, method)
    resized.load_state_dict(state)
    return resized


class Offline(argparse.Action):
    """A script's --offline: nothing is downloaded from then on; what the caches hold still opens."""

    def __init__(self, **options):
        super().__init__(**options | dict(nargs=0, default=argparse.SUPPRESS, help="download nothing: use only files that are here, and the caches'"))

    def __call__(self, *_):
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True


# Parts of addresses of weights that may not be used commercially, as of November 2026, and whose they are
NOT_COMMERCIAL = {
    "capsule2077/edgecrafter": "EdgeCrafter's", "Intellindust/ECDet": "EdgeCrafter's", "facebook/vit-mae": "MAE's", "facebook/VGGT": "VGGT's",
}  # fmt: skip


def say_licence(source):
    """Prints a line where the weights of that address or repository forbid commercial use."""
    owner = next((owner for part, owner in NOT_COMMERCIAL.items() if part in source), None)
    if owner:
        print(
            f"{source}: {owner} licence forbids commercial use; free for it are --backbone dinov2-small (Apache-2.0) and "
            "--backbone ecvit-nano, which starts from random weights"
        )


def download(url):
    """-> the path of a released file, downloaded once into torch's cache. Raises UserError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(f"{url}: is not in the cache ({path}), and --offline forbids downloading it")
        say_licence(url)
        print(f"downloading {url}")
        fetch(lambda: torch.hub.download_url_to_file(url, str(path)), url)
    return path


def check_architecture(source, config, name, weights):
    """Compares the folder's or repository's config.json with the table before anything large is read."""
    theirs = fetch(lambda: transformers.AutoConfig.from_pretrained(source), source)
    theirs = getattr(theirs, "vision_config", theirs)  # CLIP's repositories hold a text tower too
    fields = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_register_tokens",
              "hidden_sizes", "depths", "use_gated_mlp", "use_swiglu_ffn", "key_bias"]  # fmt: skip
    for field in fields:
        if getattr(theirs, field, None) != getattr(config, field, None):
            found, wanted = getattr(theirs, field, None), getattr(config, field, None)
            raise UserError(f"{source}: its {field} is {found}, that of {name} is {wanted}; name the backbone that the weights belong to")


def fetch(load, source):
    """Calls load(); what can go wrong on the way to a file becomes one clear line."""
    try:
        return load()
    except urllib.error.URLError as error:
        raise UserError(
            f"{source}: can't be downloaded ({error.reason}); check the network, or give the downloaded file as --backbone-weights (a whole "
            "detector as --init or --checkpoint), or --backbone-weights none to train from scratch"
        ) from None
    except OSError as error:
        if is_gated(error):
            raise UserError(
                f"{source} is gated: accept its licence on https://huggingface.co/{source}, then run `hf auth login`; "
                "or give a downloaded folder or Meta's .pth file as --backbone-weights"
            ) from None
        if Path(source).exists():
            raise UserError(f"{source}: can't be read as a Hugging Face folder ({first_line(error)})") from None
        raise UserError(
            f"{source}: can't be reached ({first_line(error)}); check the network, or give a downloaded folder or file as "
            "--backbone-weights, or --backbone-weights none to train from scratch"
        ) from None


def is_gated(error):
    """Whether an error comes from a repository of the hub that one has to be let into."""
    while error is not None:
        if isinstance(error, huggingface_hub.errors.GatedRepoError) or "gated repo" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error):
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def read_state_dict(path):
    """A .pth or .safetensors file -> {key: tensor}; only tensors are unpickled."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on files that are not its own
        raise UserError(f"{path}: can't be read as weights ({first_line(error)})") from None
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no state dict")
    return state


def complain(source, name, missing, surplus, mismatched=()):
    """UserError naming what does not fit, if anything."""
    parts = []
    for what, keys in (("missing", missing), ("surplus", surplus), ("of another shape", mismatched)):
        keys = sorted(str(k[0] if isinstance(k, (tuple, list)) else k) for k in keys)
        if keys:
            parts.append(f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
    if parts:
        raise UserError(f"{source}: not the weights of {name}; {'; '.join(parts)}")


def load_strictly(module, state, source):
    own = module.state_dict()
    mismatched = [k for k in state if k in own and state[k].shape != own[k].shape]
    complain(source, getattr(module, "name", type(module).__name__), own.keys() - state.keys(), state.keys() - own.keys(), mismatched)
    module.load_state_dict(state)


# The authors' original files -> the names of the files on the hub, which transformers itself maps to its modules.


def rename(state, rules):
    """Applies regular-expression rules to every key, in order."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def part_of(state, prefix, what, source):
    """The weights under a prefix, without it, where there are any; how many others there are is said."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if inside:
        print(f"{source}: the {len(inside)} weights of {what} are used, {len(state) - len(inside)} others left out")
    return inside or state


def split_qkv(state, names):
    """Splits each `...qkv.weight` and `...qkv.bias` into the three projections, in the order q, k, v."""
    out = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", key)
        if match:
            out |= {f"{match[1]}.{name}.{match[2]}": part.clone() for name, part in zip(names, value.chunk(3))}
        else:
            out[key] = value
    return out


def without_decoder(state, source):
    """The weights but those of a masked autoencoder's decoder; how many these are is said."""
    kept = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token", "rope_embed_decoder."))}
    if len(kept) < len(state):
        print(f"{source}: {len(state) - len(kept)} weights are the decoder's and are left out")
    return kept


# What DINOv2 and MAE name alike, here and there
COMMON_NAMES = [
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(?:\d+\.)?(\d+)\.(?=[a-z])", r"encoder.layer.\1."),
    (r"attn\.proj\.", "attention.output.dense."),
    (r"attn\.qkv", "attention.attention.qkv"),
    (r"^norm\.", "layernorm."),
]


def convert_dinov2(state, source):
    state = part_of(state, "aggregator.patch_embed.", "VGGT's patch encoder", source)
    state = rename(state, COMMON_NAMES + [
        (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
        (r"mlp\.w12\.", "mlp.weights_in."),
        (r"mlp\.w3\.", "mlp.weights_out."),
    ])  # fmt: skip
    return split_qkv(state, ("query", "key", "value"))


def convert_dinov3(state, source):
    masks = {key: value for key, value in state.items() if key.endswith("qkv.bias_mask")}
    for key, mask in masks.items():
        kept = mask.nan_to_num(1).chunk(3)
        if kept[1].any() or not (kept[0].all() and kept[2].all()):
            raise UserError(f"{source}: {key} does not mask the key bias alone, as every DINOv3 does")
    # Constants of the architecture, and the norm of local crops, which only the pretraining used.
    state = {k: v for k, v in state.items() if k not in masks and k != "rope_embed.periods" and not k.startswith("local_cls_norm.")}
    state = rename(state, [
        (r"^(cls_token)$", r"embeddings.\1"),
        (r"^storage_tokens$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"attn\.proj\.", "attention.o_proj."),
        (r"attn\.qkv", "attention.qkv"),
        (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
        (r"mlp\.(?:fc1|w2)\.", "mlp.up_proj."),
        (r"mlp\.(?:fc2|w3)\.", "mlp.down_proj."),
        (r"mlp\.w1\.", "mlp.gate_proj."),
    ])  # fmt: skip
    if "mask_token" in state:
        state["embeddings.mask_token"] = state.pop("mask_token").reshape(1, 1, -1)
    state = split_qkv(state, ("q_proj", "k_proj", "v_proj"))
    return {k: v for k, v in state.items() if not k.endswith("k_proj.bias")}


def convert_convnext(state, source):
    state = dict(state)
    for part in ("weight", "bias"):  # one module under two names in the original
        twin = state.pop(f"norms.3.{part}", None)
        state[f"norm.{part}"] = state.get(f"norm.{part}") if twin is None else twin
    return rename(state, [
        (r"^norm\.", "layer_norm."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.layers.\2."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample_layers."),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"(layers\.\d+)\.norm\.", r"\1.layer_norm."),
        (r"\.pwconv", ".pointwise_conv"),
    ])  # fmt: skip


def convert_mum(state, source):
    """MuM is a DINOv3 without registers, layer scale and mask token, but with a key bias."""
    periods = state.get("rope_embed.periods")
    if periods is not None and not torch.allclose(periods.float(), 100 ** (torch.arange(len(periods)) / len(periods)), rtol=1e-2):
        raise UserError(f"{source}: its rotary periods are not those of MuM")
    state = without_decoder(state, source)
    width, depth = state["cls_token"].shape[-1], 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    state |= {f"blocks.{i}.ls{j}.gamma": torch.ones(width) for i in range(depth) for j in (1, 2)}
    state |= {"storage_tokens": torch.zeros(1, 0, width), "mask_token": torch.zeros(1, width)}
    biases = {key: value for key, value in state.items() if key.endswith("qkv.bias")}
    converted = convert_dinov3(state, source)
    for key, value in biases.items():  # DINOv3 has no key bias
        converted[f"layer.{key.split('.')[1]}.attention.k_proj.bias"] = value.chunk(3)[1].clone()
    return converted


def convert_mae(state, source):
    state = rename(without_decoder(state, source), COMMON_NAMES + [
        (r"(layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
        (r"(layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
        (r"mlp\.fc1\.", "intermediate.dense."),
        (r"mlp\.fc2\.", "output.dense."),
    ])  # fmt: skip
    return split_qkv(state, ("query", "key", "value"))


CONVERSIONS = {"dinov2": convert_dinov2, "dinov3": convert_dinov3, "convnext": convert_convnext, "mum": convert_mum, "mae": convert_mae}
