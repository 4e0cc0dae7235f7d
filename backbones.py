"""Every backbone by name: pictures in, feature maps out.

A backbone maps images (B, 3, H, W), normalised by ImageNet's statistics, to a list of maps (B, C_l, H/s_l, W/s_l),
finest first, and says so in `name`, `channels`, `strides` and `size_divisor`; other sizes are padded at the right and
bottom. `forward_features` gives the tokens. Adding a backbone of a known family is one row of BACKBONES.
"""

import difflib
import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ecvit
from errors import UserError


@dataclass(frozen=True)
class Spec:
    """What a backbone is. width, depth: one number, or one for each stage; ffn: hidden width of a block's MLP."""

    family: str
    width: int | tuple[int, ...]
    depth: int | tuple[int, ...]
    heads: int
    ffn: int
    patch: int
    registers: int
    gated: bool  # SwiGLU instead of an MLP
    source: str  # repository of the hub, or address of the released file; "" where there are no weights
    strides: tuple[int, ...] = ()


ECVIT_RELEASE = "https://github.com/capsule2077/edgecrafter/releases/download/edgecrafterv1/"
CONVNEXT_STRIDES = (4, 8, 16, 32)


def _dinov2(width, depth, heads, hub, registers=0, gated=False):
    ffn = (int(4 * width * 2 / 3) + 7) // 8 * 8 if gated else 4 * width
    return Spec("dinov2", width, depth, heads, ffn, 14, registers, gated, f"facebook/dinov2-{hub}", (14,))


def _dinov3(width, depth, heads, ffn, hub, gated=False):
    return Spec("dinov3", width, depth, heads, ffn, 16, 4, gated, f"facebook/dinov3-{hub}-pretrain-lvd1689m", (16,))


def _convnext(widths, depths, hub):
    source = f"facebook/dinov3-convnext-{hub}-pretrain-lvd1689m"
    return Spec("convnext", widths, depths, 0, 4 * widths[-1], 4, 0, False, source, CONVNEXT_STRIDES)


def _ecvit(name, source):
    c = ecvit.CONFIGS[name]
    return Spec("ecvit", c["dim"], c["depth"], c["heads"], c["mlp_ratio"] * c["dim"], 16, 1, False, source, (8, 16, 32))


BACKBONES = {
    "dinov2-small": _dinov2(384, 12, 6, "small"),
    "dinov2-base": _dinov2(768, 12, 12, "base"),
    "dinov2-large": _dinov2(1024, 24, 16, "large"),
    "dinov2-giant": _dinov2(1536, 40, 24, "giant", gated=True),
    "dinov2-small-reg": _dinov2(384, 12, 6, "with-registers-small", registers=4),
    "dinov2-base-reg": _dinov2(768, 12, 12, "with-registers-base", registers=4),
    "dinov2-large-reg": _dinov2(1024, 24, 16, "with-registers-large", registers=4),
    "dinov2-giant-reg": _dinov2(1536, 40, 24, "with-registers-giant", registers=4, gated=True),
    "dinov3-vits16": _dinov3(384, 12, 6, 1536, "vits16"),
    "dinov3-vits16plus": _dinov3(384, 12, 6, 1536, "vits16plus", gated=True),
    "dinov3-vitb16": _dinov3(768, 12, 12, 3072, "vitb16"),
    "dinov3-vitl16": _dinov3(1024, 24, 16, 4096, "vitl16"),
    "dinov3-vith16plus": _dinov3(1280, 32, 20, 5120, "vith16plus", gated=True),
    "dinov3-vit7b16": _dinov3(4096, 40, 32, 8192, "vit7b16", gated=True),
    "dinov3-convnext-tiny": _convnext((96, 192, 384, 768), (3, 3, 9, 3), "tiny"),
    "dinov3-convnext-small": _convnext((96, 192, 384, 768), (3, 3, 27, 3), "small"),
    "dinov3-convnext-base": _convnext((128, 256, 512, 1024), (3, 3, 27, 3), "base"),
    "dinov3-convnext-large": _convnext((192, 384, 768, 1536), (3, 3, 27, 3), "large"),
    "ecvit-nano": _ecvit("ecvit-nano", ""),
    "ecvitt": _ecvit("ecvitt", ECVIT_RELEASE + "ecvitt.pth"),
    "ecvittplus": _ecvit("ecvittplus", ECVIT_RELEASE + "ecvittplus.pth"),
    "ecvits": _ecvit("ecvits", ECVIT_RELEASE + "ecvits.pth"),
    "ecvitsplus": _ecvit("ecvitsplus", ECVIT_RELEASE + "ecvitsplus.pth"),
}


def find_spec(name):
    """The row of that name; UserError with the nearest names where there is none."""
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.3) or list(BACKBONES)
        raise UserError(f"no backbone is called '{name}'; the nearest: {', '.join(near)} (python check_dims.py lists all)")
    return BACKBONES[name]


def build_backbone(name, weights=None, checkpointing=False):
    """A backbone by name.

    weights: "pretrained" (hub or release, kept in the usual caches), None (random), or a path: a Hugging Face folder, one
    of Meta's original .pth files, or ECViT's .pth. Every weight of the model has to be in the file and the other way
    round. checkpointing: activations are recomputed in the backward pass, to save memory. Raises UserError.
    """
    spec = find_spec(name)
    if weights in ("none", ""):
        weights = None
    if weights == "pretrained" and not spec.source:
        raise UserError(f"{name} has no released weights; use --backbone-weights none and train it from scratch")
    backbone = (ECViTBackbone if spec.family == "ecvit" else HuggingFaceBackbone)(name, spec, weights)
    if checkpointing:
        backbone.checkpoint_activations()
    return backbone


def pad_to_multiple(images, divisor):
    """(B, 3, H, W) -> the same with zeros at the right and bottom, up to multiples of divisor."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % divisor, 0, -h % divisor)) if h % divisor or w % divisor else images


def parameter_depths(backbone):
    """{parameter name: depth}, 0 for the embedding, rising by one a block (ConvNeXt: a stage), for layer-wise learning rates."""
    depths = {}
    for name, _ in backbone.named_parameters():
        block = re.search(r"(?:blocks|layer|stages)\.(\d+)\.", name)
        at_entry = re.search(r"embed|register_token", name)
        depths[name] = int(block[1]) + 1 if block else 0 if at_entry else None
    last = max((d for d in depths.values() if d is not None), default=0) + 1
    return {name: last if depth is None else depth for name, depth in depths.items()}


class ECViTBackbone(ecvit.ECViT):
    """ECViT from ecvit.py under this file's contract."""

    def __init__(self, name, spec, weights):
        super().__init__(**ecvit.CONFIGS[name])
        self.name, self.size_divisor, self.pretrained = name, 32, weights is not None
        if weights is None:
            return
        if weights == "pretrained":
            state = fetch(lambda: torch.hub.load_state_dict_from_url(spec.source, map_location="cpu", weights_only=True), spec.source)
        else:
            state = read_state_dict(weights)
        if any(key.startswith("backbone.") for key in state):
            load_strictly(self, state, weights)
        else:
            load_strictly(self.backbone, state, weights)
            print(f"{name}: the released file holds the transformer; the pyramid's 1x1 convolutions start from random weights")

    def train(self, mode=True):
        """Batch statistics that came with the weights stay as they are: small batches would only blur them."""
        super().train(mode)
        if self.pretrained:
            self.backbone.patch_embed.eval()
        return self

    def forward(self, images):
        return super().forward(pad_to_multiple(images, self.size_divisor))

    def forward_features(self, images):
        return super().forward_features(pad_to_multiple(images, self.size_divisor))

    def checkpoint_activations(self):
        self.backbone.gradient_checkpointing = True


class HuggingFaceBackbone(nn.Module):
    """DINOv2 and DINOv3, plain ViT or ConvNeXt, through transformers.

    A ViT gives one map, its normed patch tokens; a ConvNeXt gives its four stages, not normed.
    """

    def __init__(self, name, spec, weights):
        super().__init__()
        self.name, self.spec = name, spec
        is_vit = spec.family != "convnext"
        self.strides, self.channels = spec.strides, (spec.width,) if is_vit else spec.width
        self.size_divisor = max(self.strides)
        self.prefix = 1 + spec.registers  # tokens before the patches
        self.model = load_transformers(name, spec, weights)

    def forward(self, images):
        images = pad_to_multiple(images, self.size_divisor)
        if self.spec.family == "convnext":
            stages = self.model(images, output_hidden_states=True).hidden_states
            return list(stages[-len(self.strides) :])
        return [self.to_map(self.model(images).last_hidden_state, images)]

    def forward_features(self, images):
        """-> x_norm (B, 1 + registers + N, C), x_norm_clstoken (B, C), x_norm_patchtokens (B, N, C)."""
        tokens = self.model(pad_to_multiple(images, self.size_divisor)).last_hidden_state
        return {"x_norm": tokens, "x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, self.prefix :]}

    def intermediate_maps(self, images, blocks):
        """Normed maps (B, C, H/s, W/s) of a ViT after the given blocks, counted from 0."""
        images = pad_to_multiple(images, self.size_divisor)
        hidden = self.model(images, output_hidden_states=True).hidden_states[-self.spec.depth :]
        norm = self.model.norm if self.spec.family == "dinov3" else self.model.layernorm
        return [self.to_map(norm(hidden[block]), images) for block in blocks]

    def to_map(self, tokens, images):
        grid = tuple(n // self.spec.patch for n in images.shape[-2:])
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid)

    def checkpoint_activations(self):
        if not self.model.supports_gradient_checkpointing:
            raise UserError(f"{self.name}: transformers can't recompute its activations; leave out --checkpoint-activations")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def transformers_config(spec):
    """The architecture of a row as transformers' configuration."""
    if spec.family == "convnext":
        return transformers.DINOv3ConvNextConfig(hidden_sizes=list(spec.width), depths=list(spec.depth))
    common = dict(
        hidden_size=spec.width, num_hidden_layers=spec.depth, num_attention_heads=spec.heads, patch_size=spec.patch
    )
    if spec.family == "dinov3":
        return transformers.DINOv3ViTConfig(
            **common, intermediate_size=spec.ffn, num_register_tokens=spec.registers, use_gated_mlp=spec.gated,
            hidden_act="silu" if spec.gated else "gelu",
            query_bias=spec.width != 4096, value_bias=spec.width != 4096,  # the 7B model alone has neither
            pos_embed_rescale=None,  # a detector needs the true positions in training too
        )  # fmt: skip
    if spec.registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=spec.registers, **common)
    else:
        config = transformers.Dinov2Config(**common)
    config.image_size, config.use_swiglu_ffn = 518, spec.gated
    return config


def load_transformers(name, spec, weights):
    """The transformers model of a row, with random weights or with all of a hub's, folder's or file's."""
    config = transformers_config(spec)
    if weights is None:
        return transformers.AutoModel.from_config(config)
    transformers.utils.logging.set_verbosity_error()  # it prints a table of the keys that the check below reports
    is_file = Path(weights).is_file()
    if not is_file and weights != "pretrained" and not Path(weights).is_dir():
        raise UserError(f"{weights}: no such folder or file; --backbone-weights takes pretrained, none, a Hugging Face folder or a .pth")
    source = spec.source if weights == "pretrained" else str(weights)
    strict = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)  # the report below names them all
    if is_file:
        state = META_CONVERSIONS[spec.family](read_state_dict(weights), source)
        load = lambda: type(transformers.AutoModel.from_config(config)).from_pretrained(
            None, config=config, state_dict=state, **strict
        )
    else:
        check_architecture(source, config, name, weights)
        load = lambda: transformers.AutoModel.from_pretrained(source, config=config, **strict)
    try:
        model, report = fetch(load, source)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{source}: not the weights of {name} ({first_line(error)})") from None
    complain(source, name, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return model


def check_architecture(source, config, name, weights):
    """Compares the folder's or repository's config.json with the table before anything large is read."""
    theirs = fetch(lambda: transformers.AutoConfig.from_pretrained(source), source)
    fields = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_register_tokens",
              "hidden_sizes", "depths", "use_gated_mlp", "use_swiglu_ffn"]  # fmt: skip
    for field in fields:
        if getattr(theirs, field, None) != getattr(config, field, None):
            found, wanted = getattr(theirs, field, None), getattr(config, field, None)
            raise UserError(f"{source}: its {field} is {found}, that of {name} is {wanted}; name the backbone that the weights belong to")


def fetch(load, source):
    """Calls load(); what can go wrong on the way to a file becomes one clear line."""
    try:
        return load()
    except urllib.error.URLError as error:
        raise UserError(f"{source}: can't be downloaded ({error.reason}); download it elsewhere and give its path as --backbone-weights") from None
    except OSError as error:
        text = str(error)
        if "gated" in text.lower() or "401" in text or "403" in text:
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


# Meta's original files -> the names of the files on the hub, which transformers itself maps to its modules.


def rename(state, rules):
    """Applies regular-expression rules to every key, in order."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


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


def convert_dinov2(state, source):
    state = rename(state, [
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.(?:\d+\.)?(\d+)\.(?=[a-z])", r"encoder.layer.\1."),
        (r"attn\.proj\.", "attention.output.dense."),
        (r"attn\.qkv", "attention.attention.qkv"),
        (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
        (r"mlp\.w12\.", "mlp.weights_in."),
        (r"mlp\.w3\.", "mlp.weights_out."),
        (r"^norm\.", "layernorm."),
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


META_CONVERSIONS = {"dinov2": convert_dinov2, "dinov3": convert_dinov3, "convnext": convert_convnext}
