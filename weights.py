"""Weights of pretrained backbones: repositories on the hub, local folders and the original authors' files.

Every loader is strict: a missing, unexpected or misshapen weight is an error. The files of Meta, MAE, MuM and VGGT are
renamed to the names that transformers reads. Weights of other parts (a decoder, a text tower) are ignored and counted.
"""

import re
import urllib.error
import zipfile
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F

from errors import UserError

MODELS = {  # names, not classes: transformers imports a class on access, and all of these together take a second
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "dinov3_convnext": "DINOv3ConvNextModel",
    "clip_vision_model": "CLIPVisionModel",
    "vit_mae": "ViTMAEModel",
}

# Fields of transformers' configurations that have to agree with BACKBONES
ARCHITECTURE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "num_register_tokens",
    "hidden_sizes",
    "depths",
    "use_gated_mlp",
    "use_swiglu_ffn",
    "key_bias",
)

# What the repositories of CLIP and MAE hold in addition to the backbone
OTHER_PARTS = re.compile(
    r"text_model\.|text_projection\.|visual_projection\.|logit_scale|"
    r"(vision_model\.)?embeddings\.position_ids|decoder\."
)

PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "ema.", "teacher.")  # that wrappers put before all keys
WRAPPERS = ("model", "state_dict", "teacher", "ema", "module")  # keys under which a file may hold its state dict
CLASSIFIER = re.compile(r"(head|head_dist|fc|classifier)\.")  # of timm's files and torchvision's

# Weights that must not be used commercially, as of November 2026: part of their URL or repository, and their owner
NOT_COMMERCIAL = {
    "capsule2077/edgecrafter": "EdgeCrafter's",
    "Intellindust/ECDet": "EdgeCrafter's",
    "facebook/vit-mae": "MAE's",
    "facebook/VGGT": "VGGT's",
}


def transformers_config(spec):
    """The architecture of a row of BACKBONES as transformers' configuration."""
    import transformers  # here, as it takes a second and only some backbones need it

    if spec.family == "convnext":
        return transformers.DINOv3ConvNextConfig(hidden_sizes=list(spec.width), depths=list(spec.depth))
    common = dict(
        hidden_size=spec.width, num_hidden_layers=spec.depth, num_attention_heads=spec.heads, patch_size=spec.patch
    )
    if spec.family in ("dinov3", "mum"):
        biased = spec.width != 4096  # only the 7B model has no biases in its attention
        return transformers.DINOv3ViTConfig(
            **common,
            intermediate_size=spec.ffn,
            num_register_tokens=spec.registers,
            use_gated_mlp=spec.gated,
            hidden_act="silu" if spec.gated else "gelu",
            query_bias=biased,
            value_bias=biased,
            key_bias=spec.family == "mum",
            pos_embed_rescale=None,  # a detector needs the true positions in training too
        )
    common["image_size"] = spec.grid * spec.patch
    if spec.family == "clip":
        return transformers.CLIPVisionConfig(**common, intermediate_size=spec.ffn)
    if spec.family == "mae":
        return transformers.ViTMAEConfig(**common, intermediate_size=spec.ffn, mask_ratio=0.0)
    if spec.registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=spec.registers, **common)
    else:
        config = transformers.Dinov2Config(**common)
    config.use_swiglu_ffn = spec.gated
    config.mlp_ratio = 4 if spec.gated else spec.ffn // spec.width  # transformers takes two thirds of it for SwiGLU
    return config


def class_of(config):
    """The transformers class of a configuration."""
    import transformers

    return getattr(transformers, MODELS[config.model_type])


def new_model(config):
    """A transformers model with random weights."""
    if config.model_type == "dinov3_vit":
        keep_no_positions()
    return class_of(config)(config)


def keep_no_positions():
    """transformers keeps DINOv3's positions for the last 32 sizes of images; a CUDA graph reads them for longer."""
    from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

    cached = getattr(dinov3, "get_patches_center_coordinates", None)
    if hasattr(cached, "__wrapped__"):
        dinov3.get_patches_center_coordinates = cached.__wrapped__


def load_transformers(name, spec, weights):
    """The transformers model of a row of BACKBONES. Raises UserError.

    weights: None (random), "pretrained", the path of a Hugging Face folder or of one of the authors' files.
    """
    import transformers

    config = transformers_config(spec)
    if weights is None:
        return new_model(config)
    if spec.family in ("dinov3", "mum"):
        keep_no_positions()
    transformers.utils.logging.set_verbosity_error()  # no table of the keys that check_report reports
    if weights == "pretrained" and spec.source.startswith("https://"):
        weights = download(spec.source)
    from_hub, is_file = weights == "pretrained", Path(weights).is_file()
    if not (from_hub or is_file or Path(weights).is_dir()):
        raise UserError(
            f"{weights}: no such folder or file; "
            "--backbone-weights takes pretrained, none, a Hugging Face folder or a .pth file"
        )
    source = spec.source if from_hub else str(weights)
    # With mismatched sizes ignored, check_report names all of them instead of transformers the first
    options = dict(config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    model_class, location = class_of(config), source
    if is_file:
        location, options["state_dict"] = None, read_original(weights, name, spec.family, source)
    else:
        if from_hub:
            say_licence(source)
        check_architecture(source, config, name)
    try:
        with fetching(source):
            model, report = model_class.from_pretrained(location, **options)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{source}: not the weights of {name} ({first_line(error)})") from None
    check_report(source, name, report)
    return model


def read_original(path, name, family, source):
    """One of the authors' files -> its state dict by transformers' names. Raises UserError."""
    if family not in CONVERSIONS:
        raise UserError(f"{source}: is a file, but {name} takes a Hugging Face folder or pretrained")
    try:
        return CONVERSIONS[family](read_state_dict(path), source)
    except (KeyError, ValueError, IndexError) as error:  # a weight that every such file has is missing
        raise UserError(f"{source}: not the weights of {name} ({type(error).__name__}: {first_line(error)})") from None


def check_report(source, name, report):
    """Checks transformers' report on a loaded model; weights of other parts than the backbone are only counted."""
    unexpected = set(report["unexpected_keys"])
    others = {key for key in unexpected if OTHER_PARTS.match(key)}
    if others:
        parts = sorted({key.split(".")[0] for key in others})
        print(f"{source}: {len(others)} weights are not the backbone's and are left out: {', '.join(parts)}")
    mismatched = [key for key, *_ in report["mismatched_keys"]]  # each with its two shapes
    check_keys(source, name, report["missing_keys"], unexpected - others, mismatched)


def check_architecture(source, config, name):
    """Compares a folder's or repository's config.json with BACKBONES, before any large file is read."""
    import transformers

    with fetching(source):
        stored = transformers.AutoConfig.from_pretrained(source)
    stored = getattr(stored, "vision_config", stored)  # CLIP's repositories hold a text tower too
    for field in ARCHITECTURE_FIELDS:
        actual, expected = getattr(stored, field, None), getattr(config, field, None)
        if actual != expected:
            raise UserError(
                f"{source}: its {field} is {actual}, that of {name} is {expected}; "
                "name the backbone that the weights belong to"
            )


# Patch embeddings of another patch size


def resize_matrix(old, new):
    """The matrix (new * new, old * old) of bicubic interpolation from old x old to new x new pixels."""
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    return F.interpolate(basis, (new, new), mode="bicubic", antialias=True, align_corners=False).flatten(1).T


def resize_patch_filters(filters, size, method="pinv"):
    """Filters (C, 3, p, p) of a patch embedding -> (C, 3, size, size), for patches of size x size pixels.

    method: "pinv" (FlexiViT, arXiv 2212.08013) gives for an enlarged image what the old filters gave for the original,
    exactly if each patch is enlarged by itself. "bicubic" resizes the filters like images. "crop" does not resample: it
    surrounds the old filters by zeros or crops them, for comparison.
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
    """A ViT of transformers -> the same network with spec's patch size; the grid of positions keeps its size."""
    resized = new_model(transformers_config(spec))
    state = model.state_dict()
    key = next(key for key, value in state.items() if value.ndim == 4 and "patch_embed" in key)
    state[key] = resize_patch_filters(state[key], spec.patch, method)
    resized.load_state_dict(state)
    return resized


# Downloads


def say_licence(source):
    """Prints a line if the weights of that URL or repository must not be used commercially."""
    owner = next((owner for part, owner in NOT_COMMERCIAL.items() if part in source), None)
    if owner:
        print(
            f"{source}: {owner} licence forbids commercial use; for commercial use choose --backbone dinov2-small "
            "(Apache-2.0) or --backbone ecvit-nano, which starts from random weights"
            + (", or apply for facebook/VGGT-1B-Commercial on the hub" if "VGGT" in source else "")
        )


def download(url):
    """Path of a released file, downloaded once into torch's cache. Raises UserError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(f"{url}: is not in the cache ({path}), and --offline forbids downloading it")
        say_licence(url)
        print(f"downloading {url}")
        with fetching(url):
            torch.hub.download_url_to_file(url, str(path))
    return path


@contextmanager
def fetching(source):
    """Around whatever reads source from the network or the disk: what goes wrong becomes a UserError."""
    try:
        yield
    except urllib.error.URLError as error:
        raise UserError(
            f"{source}: can't be downloaded ({error.reason}); check the network, or give the downloaded file as "
            "--backbone-weights (a whole detector as --init or --checkpoint), or --backbone-weights none to train from "
            "scratch"
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
            f"{source}: can't be reached ({first_line(error)}); check the network, or give a downloaded folder or file "
            "as --backbone-weights, or --backbone-weights none to train from scratch"
        ) from None


def is_gated(error):
    """Whether an error comes from a repository on the hub that requires accepting a licence."""
    while error is not None:
        if isinstance(error, huggingface_hub.errors.GatedRepoError) or "gated repo" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error):
    """The first line of an error's message, at most 300 characters; its type if the message is empty."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


# State dicts


def read_state_dict(path, mmap=False):
    """A .pth or .safetensors file -> {key: tensor}. Only tensors are unpickled. mmap: weights are read from the file
    when they are used, if it is not of PyTorch before 1.6. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            mmap = mmap and zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds on files that are not its own
        raise UserError(f"{path}: can't be read as weights ({first_line(error)})") from None
    while isinstance(state, dict):
        inside = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inside is None:
            break
        state = inside
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict")
    return without_prefixes(state, path)


def without_prefixes(state, source):
    """Takes the PREFIXES off the keys that all have them, a classifier's apart, and prints which; what is left has to
    fit, as always. ECViT's own `backbone.` stays: next to it there is a `projector.`."""
    removed = []
    while True:
        prefixes = {
            next((p for p in PREFIXES if key.startswith(p)), None) for key in state if not CLASSIFIER.match(key)
        }
        prefix = prefixes.pop() if len(prefixes) == 1 else None
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        removed.append(prefix)
    if any("._orig_mod." in key for key in state):  # of parts that torch.compile has wrapped
        state = {key.replace("._orig_mod.", "."): value for key, value in state.items()}
        removed.append("_orig_mod.")
    if removed:
        print(f"{source}: {', '.join(removed)} taken off the names of its {len(state)} weights")
    return state


def check_keys(source, name, missing, unexpected, mismatched=()):
    """Raises UserError, naming the first keys of each kind, unless all three collections of keys are empty."""
    problems = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if keys:
            listed = ", ".join(sorted(map(str, keys))[:5]) + (", ..." if len(keys) > 5 else "")
            problems.append(f"{len(keys)} {kind}: {listed}")
    heads = sorted({key.split(".")[0] for key in map(str, unexpected) if CLASSIFIER.match(key)})
    if heads:
        problems.append(
            f"{', '.join(heads)}: a classifier's, which a backbone has not; save the file without them, for example "
            f"torch.save({{k: v for k, v in state.items() if not k.startswith({tuple(h + '.' for h in heads)})}}, path)"
        )
    if problems:
        raise UserError(f"{source}: not the weights of {name}; {'; '.join(problems)}")


def load_strictly(module, state, source, assign=False):
    """Loads a state dict that has to fit the module exactly. assign: its tensors become the module's.

    Raises UserError.
    """
    own = module.state_dict()
    mismatched = [key for key in state if key in own and state[key].shape != own[key].shape]
    name = getattr(module, "name", type(module).__name__)
    check_keys(source, name, own.keys() - state.keys(), state.keys() - own.keys(), mismatched)
    module.load_state_dict(state, assign=assign)


# Conversions of the authors' files to the names of the files on the hub, which transformers maps to its modules


def rename(state, rules):
    """Applies the rules (pattern, replacement) to every key, in order."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def select_part(state, prefix, part, source):
    """The weights whose keys start with prefix, which is removed; all weights if there are none. Prints the counts."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if inside:
        print(f"{source}: the {len(inside)} weights of {part} are used, {len(state) - len(inside)} others left out")
    return inside or state


def split_qkv(state, names):
    """Splits each `...qkv.weight` and `...qkv.bias` into three projections; names: those of q, k and v."""
    projections = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", key)
        if match:
            parent, kind = match.groups()
            for name, part in zip(names, value.chunk(3)):
                projections[f"{parent}.{name}.{kind}"] = part.clone()
        else:
            projections[key] = value
    return projections


def without_decoder(state, source):
    """Removes the weights of a masked autoencoder's decoder, and prints how many they are."""
    of_decoder = ("decoder_", "mask_token", "rope_embed_decoder.")
    encoder = {key: value for key, value in state.items() if not key.startswith(of_decoder)}
    if len(encoder) < len(state):
        print(f"{source}: {len(state) - len(encoder)} weights are the decoder's and are left out")
    return encoder


SHARED_NAMES = [  # of DINOv2 and MAE
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(?:\d+\.)?(\d+)\.(?=[a-z])", r"encoder.layer.\1."),
    (r"attn\.proj\.", "attention.output.dense."),
    (r"attn\.qkv", "attention.attention.qkv"),
    (r"^norm\.", "layernorm."),
]
DINOV2_NAMES = [
    *SHARED_NAMES,
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
    (r"mlp\.w12\.", "mlp.weights_in."),
    (r"mlp\.w3\.", "mlp.weights_out."),
]
MAE_NAMES = [
    *SHARED_NAMES,
    (r"(layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
]
DINOV3_NAMES = [
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
]
CONVNEXT_NAMES = [
    (r"^norm\.", "layer_norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.layers.\2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample_layers."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"(layers\.\d+)\.norm\.", r"\1.layer_norm."),
    (r"\.pwconv", ".pointwise_conv"),
]
# Constants of DINOv3's architecture, and the norm of local crops, which only the pretraining used
DINOV3_UNUSED = re.compile(r".*qkv\.bias_mask|rope_embed\.periods|local_cls_norm\..*")


def convert_dinov2(state, source):
    """Meta's DINOv2 files, and VGGT's, whose patch encoder is a DINOv2."""
    state = select_part(state, "aggregator.patch_embed.", "VGGT's patch encoder", source)
    return split_qkv(rename(state, DINOV2_NAMES), ("query", "key", "value"))


def convert_dinov3(state, source):
    """Meta's DINOv3 files."""
    for name, mask in state.items():
        if name.endswith("qkv.bias_mask"):
            query, key, value = mask.nan_to_num(1).chunk(3)
            if key.any() or not (query.all() and value.all()):
                raise UserError(f"{source}: {name} does not mask only the key bias, as every DINOv3 does")
    state = {key: value for key, value in state.items() if not DINOV3_UNUSED.fullmatch(key)}
    state = rename(state, DINOV3_NAMES)
    if "mask_token" in state:
        state["embeddings.mask_token"] = state.pop("mask_token").reshape(1, 1, -1)
    state = split_qkv(state, ("q_proj", "k_proj", "v_proj"))
    return {key: value for key, value in state.items() if not key.endswith("k_proj.bias")}


def convert_convnext(state, source):
    """Meta's DINOv3 ConvNeXt files."""
    state = dict(state)
    for kind in ("weight", "bias"):  # the last norm has two names in the original, norm and norms.3
        if (twin := state.pop(f"norms.3.{kind}", None)) is not None:
            state[f"norm.{kind}"] = twin
    return rename(state, CONVNEXT_NAMES)


def convert_mum(state, source):
    """MuM's files: a DINOv3 without registers, layer scale and mask token, but with a key bias."""
    check_mum_periods(state, source)
    state = without_decoder(state, source)
    width = state["cls_token"].shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    state |= {f"blocks.{i}.ls{j}.gamma": torch.ones(width) for i in range(depth) for j in (1, 2)}
    state |= {"storage_tokens": torch.zeros(1, 0, width), "mask_token": torch.zeros(1, width)}
    biases = {key: value for key, value in state.items() if key.endswith("qkv.bias")}
    converted = convert_dinov3(state, source)
    for key, value in biases.items():  # convert_dinov3 drops the key biases
        block = key.split(".")[1]
        converted[f"layer.{block}.attention.k_proj.bias"] = value.chunk(3)[1].clone()
    return converted


def check_mum_periods(state, source):
    """Raises UserError if the file's rotary periods are not those that transformers computes."""
    periods = state.get("rope_embed.periods")
    if periods is None:
        return
    expected = 100 ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods.float(), expected, rtol=1e-2):
        raise UserError(f"{source}: its rotary periods are not those of MuM")


def convert_mae(state, source):
    """MAE's files, with or without the decoder."""
    state = without_decoder(state, source)
    return split_qkv(rename(state, MAE_NAMES), ("query", "key", "value"))


CONVERSIONS = {
    "dinov2": convert_dinov2,
    "dinov3": convert_dinov3,
    "convnext": convert_convnext,
    "mum": convert_mum,
    "mae": convert_mae,
}
