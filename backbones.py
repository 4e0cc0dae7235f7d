"""Every backbone by name, and the pyramids on top: images in, feature maps out.

A backbone maps images (B, 3, H, W), normalised by ImageNet's statistics, to a list of maps (B, C_l, H/s_l, W/s_l),
finest first. Its attributes `name`, `channels`, `strides` and `size_divisor` describe them; images whose sides are not
multiples of `size_divisor` are padded at the right and bottom. `forward_features` returns the tokens.

To add a backbone of a known family, add one row to BACKBONES. A detector that needs other strides puts a pyramid on
top, see `build_pyramid`.
"""

import difflib
import math
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import ecvit
from errors import UserError
from transforms import MEAN, STD
from vggt import VGGTBackbone
from weights import download, load_strictly, load_transformers, read_state_dict, with_patch_size


@dataclass(frozen=True)
class Spec:
    """Architecture of a backbone, and the source of its weights.

    width, depth: one number, or one for each stage; ffn: hidden width of a block's MLP.
    """

    family: str
    width: int | tuple[int, ...]
    depth: int | tuple[int, ...]
    heads: int
    ffn: int
    patch: int
    strides: tuple[int, ...]
    source: str  # repository on the hub, or URL of the released file; "" if no weights are released
    registers: int = 0
    gated: bool = False  # SwiGLU instead of an MLP
    grid: int = 0  # learned positions along a side; 0 for other kinds of positions


ECVIT_RELEASE = "https://github.com/capsule2077/edgecrafter/releases/download/edgecrafterv1/"
MUM_RELEASE = "https://github.com/davnords/mum/releases/download/weights/MuM_ViTLarge.pth"
VGGT_FILE = "https://huggingface.co/facebook/VGGT-1B/resolve/main/model.pt"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LICENCES = {  # of the released weights, as of November 2026; the licence texts themselves decide
    "dinov2": "Apache-2.0",
    "dinov3": "DINOv3",
    "convnext": "DINOv3",
    "clip": "MIT",
    "mae": "CC-BY-NC-4.0",
    "mum": "MIT (DINOv3)",
    "vggt": "CC-BY-NC-4.0",
    "ecvit": "EdgeCrafter",
}


def _dinov2(width, depth, heads, hub, registers=0, gated=False):
    return Spec(
        family="dinov2",
        width=width,
        depth=depth,
        heads=heads,
        ffn=(int(4 * width * 2 / 3) + 7) // 8 * 8 if gated else 4 * width,
        patch=14,
        strides=(14,),
        source=f"facebook/dinov2-{hub}",
        registers=registers,
        gated=gated,
        grid=37,
    )


def _dinov3(width, depth, heads, ffn, hub, gated=False):
    return Spec(
        family="dinov3",
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        patch=16,
        strides=(16,),
        source=f"facebook/dinov3-{hub}-pretrain-lvd1689m",
        registers=4,
        gated=gated,
    )


def _convnext(widths, depths, hub):
    return Spec(
        family="convnext",
        width=widths,
        depth=depths,
        heads=0,
        ffn=4 * widths[-1],
        patch=4,
        strides=(4, 8, 16, 32),
        source=f"facebook/dinov3-convnext-{hub}-pretrain-lvd1689m",
    )


def _ecvit(name, source):
    config = ecvit.CONFIGS[name]
    return Spec(
        family="ecvit",
        width=config["dim"],
        depth=config["depth"],
        heads=config["heads"],
        ffn=config["mlp_ratio"] * config["dim"],
        patch=16,
        strides=(8, 16, 32),
        source=source,
        registers=1,
    )


def _plain(family, width, depth, heads, patch, source):
    return Spec(
        family=family,
        width=width,
        depth=depth,
        heads=heads,
        ffn=4 * width,
        patch=patch,
        strides=(patch,),
        source=source,
        grid=224 // patch,
    )


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
    "clip-vitb16": _plain("clip", 768, 12, 12, 16, "openai/clip-vit-base-patch16"),
    "clip-vitb32": _plain("clip", 768, 12, 12, 32, "openai/clip-vit-base-patch32"),
    "clip-vitl14": _plain("clip", 1024, 24, 16, 14, "openai/clip-vit-large-patch14"),
    "mae-vitb16": _plain("mae", 768, 12, 12, 16, "facebook/vit-mae-base"),
    "mae-vitl16": _plain("mae", 1024, 24, 16, 16, "facebook/vit-mae-large"),
    "mae-vith14": _plain("mae", 1280, 32, 16, 14, "facebook/vit-mae-huge"),
    "mum-vitl16": replace(_plain("mum", 1024, 24, 16, 16, MUM_RELEASE), grid=0),
    "vggt-vitl14": replace(_dinov2(1024, 24, 16, "", registers=4), source=VGGT_FILE),
    "vggt-1b": replace(_dinov2(1024, 24, 16, "", registers=4), family="vggt", source=VGGT_FILE),
    "ecvit-nano": _ecvit("ecvit-nano", ""),
    "ecvitt": _ecvit("ecvitt", ECVIT_RELEASE + "ecvitt.pth"),
    "ecvittplus": _ecvit("ecvittplus", ECVIT_RELEASE + "ecvittplus.pth"),
    "ecvits": _ecvit("ecvits", ECVIT_RELEASE + "ecvits.pth"),
    "ecvitsplus": _ecvit("ecvitsplus", ECVIT_RELEASE + "ecvitsplus.pth"),
}


def find_spec(name):
    """The row of BACKBONES with that name. Raises UserError with the nearest names if there is none."""
    if name not in BACKBONES:
        nearest = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.3) or list(BACKBONES)
        raise UserError(
            f"no backbone is called '{name}'; the nearest: {', '.join(nearest)} (python check_dims.py lists all)"
        )
    return BACKBONES[name]


def build_backbone(
    name, weights=None, checkpointing=False, layers=None, patch_size=None, patch_resize="pinv", freeze_norms=None
):
    """Builds a backbone by name. Raises UserError.

    weights: "pretrained" (from the hub or a release, cached as usual), None (random), or a path: a Hugging Face folder
        or one of the authors' original files (Meta's, MAE's, MuM's, VGGT's, ECViT's). Missing and unexpected weights
        are errors.
    checkpointing: recompute activations in the backward pass, to save memory.
    layers: blocks of a plain ViT, counted from 0, or names of VGGT's, see vggt.Aggregator.layer_names; each gives a map
        (default: only the last block).
    patch_size: resample a plain ViT's patch embedding to patches of that many pixels.
    patch_resize: how, see weights.resize_patch_filters.
    freeze_norms: keep the batch statistics of the weights unchanged in training (default: if weights are given).
    """
    spec = find_spec(name)
    if weights in ("none", ""):
        weights = None
    if weights == "pretrained" and not spec.source:
        raise UserError(f"{name} has no released weights; use --backbone-weights none and train it from scratch")
    if freeze_norms is None:
        freeze_norms = weights is not None
    if spec.family in ("ecvit", "convnext"):
        refuse_plain_options(name, spec, layers, patch_size)
    if spec.family == "ecvit":
        backbone = ECViTBackbone(name, spec, weights, freeze_norms)
    elif spec.family == "convnext":
        backbone = ConvNeXt(name, spec, weights)
    elif spec.family == "vggt":
        refuse_plain_options(name, spec, None, patch_size)
        backbone = VGGTBackbone(name, spec, weights, layers)
    else:
        backbone = PlainViT(name, spec, weights, layers, patch_size or spec.patch, patch_resize)
    if checkpointing:
        backbone.checkpoint_activations()
    return backbone


def refuse_plain_options(name, spec, layers, patch_size):
    """Raises UserError if an option is given that only plain vision transformers have."""
    for option, value in (("--layers", layers), ("--patch-size", patch_size)):
        if value:
            strides = ", ".join(map(str, spec.strides))
            raise UserError(
                f"{option}: for plain vision transformers only; {name} has its own maps at strides {strides}"
            )


def backbone_of(config, load_weights=True):
    """The backbone that a run's settings describe; load_weights=False leaves it random, for a checkpoint to fill."""
    return build_backbone(
        config["backbone"],
        config["backbone_weights"] if load_weights else None,
        layers=parse_layers(config.get("layers")),
        patch_size=config.get("patch_size"),
        patch_resize=config.get("patch_resize", "pinv"),
        freeze_norms=is_pretrained(config),
    )


def is_pretrained(config):
    """Whether a run's backbone started from trained weights: those of its release or of a checkpoint."""
    return config.get("backbone_weights") not in (None, "", "none") or bool(config.get("init"))


def parse_layers(text):
    """The value of --layers, "2,5,8,11" -> (2, 5, 8, 11), "frame3,global23" -> ("frame3", "global23"); None stays None.
    Raises UserError."""
    if not text:
        return text
    parts = [part.strip() for part in str(text).split(",")]
    if all(re.fullmatch(r"[a-z_]+\d*", part) for part in parts):  # VGGT's names
        return tuple(parts)
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise UserError(f"--layers takes blocks counted from 0, such as 2,5,8,11, not {text}") from None


def pad_to_multiple(images, divisor):
    """images (B, 3, H, W) -> the same with zeros at the right and bottom, up to multiples of divisor."""
    h, w = images.shape[-2:]
    if h % divisor or w % divisor:
        return F.pad(images, (0, -w % divisor, 0, -h % divisor))
    return images


def parameter_depths(backbone):
    """{parameter name: depth}, for layer-wise learning rates.

    The embedding has depth 0; each block (ConvNeXt: each stage; VGGT: each pair after those of its encoder) adds one,
    and so does what follows the last block.
    """
    depths = {}
    encoder = getattr(getattr(getattr(backbone, "aggregator", None), "patch_embed", None), "blocks", ())
    for name, _ in backbone.named_parameters():
        block = re.search(r"(?:blocks|layers?|stages)\.(\d+)\.", name)
        if re.search(r"aggregator\.(patch_embed\.norm|patch_projection|camera_token|register_token)", name):
            depths[name] = len(encoder)
        elif block:
            is_pair = re.search(r"(frame|global)_blocks", name)
            depths[name] = int(block[1]) + 1 + (len(encoder) if is_pair else 0)
        elif re.search(r"embed|register_token|pre_layrnorm", name):
            depths[name] = 0
        else:
            depths[name] = None  # after the last block
    last = 1 + max((depth for depth in depths.values() if depth is not None), default=0)
    return {name: last if depth is None else depth for name, depth in depths.items()}


class ECViTBackbone(ecvit.ECViT):
    """ECViT from ecvit.py with the attributes of a backbone and images of any size."""

    def __init__(self, name, spec, weights, freeze_norms):
        super().__init__(**ecvit.CONFIGS[name])
        self.name, self.size_divisor, self.freeze_norms = name, 32, freeze_norms
        self.random_parts = ()  # that pretrained weights do not hold
        if weights is None:
            return
        state = read_state_dict(download(spec.source) if weights == "pretrained" else weights)
        if any(key.startswith("backbone.") for key in state):
            load_strictly(self, state, weights)
        else:
            load_strictly(self.backbone, state, weights)
            self.random_parts = "projector", "skip"
            print(
                f"{name}: the file holds only the transformer; the pyramid's 1x1 convolutions start from random weights"
            )

    def train(self, mode=True):
        """Keeps the batch statistics of pretrained weights: those of small batches would be noisier."""
        super().train(mode)
        if self.freeze_norms:
            self.backbone.patch_embed.eval()
        return self

    def forward(self, images):
        return super().forward(pad_to_multiple(images, self.size_divisor))

    def forward_features(self, images, layers=()):
        return super().forward_features(pad_to_multiple(images, self.size_divisor), layers)

    def checkpoint_activations(self):
        self.backbone.gradient_checkpointing = True


class HuggingFaceBackbone(nn.Module):
    """Base of the backbones whose `model` comes from transformers."""

    def checkpoint_activations(self):
        if not self.model.supports_gradient_checkpointing:
            raise UserError(
                f"{self.name}: transformers can't recompute its activations; leave out --checkpoint-activations"
            )
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class ConvNeXt(HuggingFaceBackbone):
    """DINOv3's ConvNeXt: the outputs of its four stages, not normalised."""

    def __init__(self, name, spec, weights):
        super().__init__()
        self.name, self.strides, self.channels, self.size_divisor = name, spec.strides, spec.width, max(spec.strides)
        self.model = load_transformers(name, spec, weights)

    def forward(self, images):
        stages = self.model(pad_to_multiple(images, self.size_divisor), output_hidden_states=True).hidden_states
        return list(stages[-len(self.strides) :])

    def forward_features(self, images, layers=()):
        """images -> x_norm (B, 1 + N, C), x_norm_clstoken (B, C), pooled from the map, x_norm_patchtokens (B, N, C)."""
        if layers:
            raise UserError(f"{self.name}: layers are for vision transformers")
        tokens = self.model(pad_to_multiple(images, self.size_divisor)).last_hidden_state
        return {"x_norm": tokens, "x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}


class PlainViT(HuggingFaceBackbone):
    """DINOv2, DINOv3, CLIP, MAE, MuM and VGGT's patch encoder.

    One map, the normalised patch tokens of the last block, or one for each block in `layers`.
    """

    def __init__(self, name, spec, weights, layers=None, patch_size=None, patch_resize="pinv"):
        super().__init__()
        self.name, self.family, self.layers = name, spec.family, tuple(layers or ())
        if any(isinstance(block, str) or not 0 <= block < spec.depth for block in self.layers):
            listed = ",".join(map(str, self.layers))
            raise UserError(f"--layers {listed}: the blocks of {name} are 0 to {spec.depth - 1}")
        self.patch = patch_size or spec.patch
        resized = replace(spec, patch=self.patch)
        if self.patch == spec.patch or weights is None:
            self.model = load_transformers(name, resized, weights)
        else:
            self.model = with_patch_size(load_transformers(name, spec, weights), resized, patch_resize)
        maps = max(1, len(self.layers))
        self.strides, self.channels, self.size_divisor = (self.patch,) * maps, (spec.width,) * maps, self.patch
        self.prefix = 1 + spec.registers  # tokens before the patches
        if spec.family == "clip":  # images come normalised by ImageNet's statistics; CLIP has its own
            mean, std, clip_mean, clip_std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD, CLIP_MEAN, CLIP_STD))
            self.register_buffer("scale", std / clip_std, persistent=False)
            self.register_buffer("shift", (mean - clip_mean) / clip_std, persistent=False)

    def tokens(self, images, layers=()):
        """images -> normalised tokens (B, prefix + N, C) of the last block, [those of each block in `layers`]."""
        if self.family == "clip":
            images = images * self.scale + self.shift
        outputs = self.model(images, **self.model_options(images, layers))
        norm = self.final_norm()
        last = norm(outputs.last_hidden_state) if self.family == "clip" else outputs.last_hidden_state
        chosen = []
        for block in layers:
            is_last = block + 2 >= len(outputs.hidden_states)  # hidden_states[0] is the embedding
            chosen.append(last if is_last else norm(outputs.hidden_states[block + 1]))
        return last, chosen

    def model_options(self, images, layers):
        """Keyword arguments of the model's forward."""
        options = {}
        if layers:
            options["output_hidden_states"] = True
        if self.family in ("clip", "mae"):
            options["interpolate_pos_encoding"] = True
        if self.family == "mae":  # rising noise keeps the patches in order; its mask ratio is 0
            count = math.prod(images.shape[-2:]) // self.patch**2
            options["noise"] = torch.arange(count, dtype=images.dtype, device=images.device).expand(images.shape[0], -1)
        return options

    def final_norm(self):
        """The layer normalisation after the last block."""
        if self.family == "clip":  # transformers applies it to the class token alone
            return getattr(self.model, "vision_model", self.model).post_layernorm
        return self.model.norm if self.family in ("dinov3", "mum") else self.model.layernorm

    def forward(self, images):
        images = pad_to_multiple(images, self.size_divisor)
        last, chosen = self.tokens(images, self.layers)
        grid = tuple(n // self.patch for n in images.shape[-2:])
        return [tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid) for tokens in chosen or [last]]

    def forward_features(self, images, layers=()):
        """images -> x_norm (B, 1 + registers + N, C), x_norm_clstoken (B, C), x_norm_patchtokens (B, N, C).

        For each block in `layers` also "block5" and so on: its normalised patch tokens (B, N, C).
        """
        last, chosen = self.tokens(pad_to_multiple(images, self.size_divisor), layers)
        named = {f"block{block}": tokens[:, self.prefix :] for block, tokens in zip(layers, chosen)}
        return {"x_norm": last, "x_norm_clstoken": last[:, 0], "x_norm_patchtokens": last[:, self.prefix :]} | named


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnMaps(nn.Module):
    """The backbone's maps, unchanged."""

    def __init__(self, backbone):
        super().__init__()
        self.channels, self.strides = tuple(backbone.channels), tuple(backbone.strides)

    def forward(self, features):
        return features


class Pyramid(nn.Module):
    """Base of the pyramids: chooses each level's source map, and how often its resolution doubles (negative: halves).

    A level takes the map of the nearest stride. If several blocks of different depth have that stride, the finest level
    takes the earliest block and the coarsest level the last. `strides` holds the resulting strides: patches of 14
    pixels give 7, 14, 28 for the targets 8, 16, 32.

    The backbone's `size_divisor` grows such that levels up to stride 32 cover the padded image exactly. The last row
    and column of a coarser level may reach beyond the image.
    """

    def __init__(self, backbone, strides, dim):
        super().__init__()
        self.sources, self.doublings, self.strides, self.channels = [], [], [], (dim,) * len(strides)
        for level, target in enumerate(strides):
            source = nearest_map(backbone.strides, target, level / max(1, len(strides) - 1))
            stride = backbone.strides[source]
            doublings = round(math.log2(stride / target))
            self.sources.append(source)
            self.doublings.append(doublings)
            self.strides.append(stride / 2**doublings)
        exact = [stride for stride, target in zip(self.strides, strides) if target <= 32]
        backbone.size_divisor = max(backbone.size_divisor, math.ceil(max(exact)))


def nearest_map(strides, target, position):
    """Index of the map with the stride nearest to target; among equals, that at position (0: first, 1: last)."""
    distances = [abs(math.log2(stride / target)) for stride in strides]
    nearest = [i for i, distance in enumerate(distances) if distance < min(distances) + 0.01]
    return nearest[round(position * (len(nearest) - 1))]


class ResizedPyramid(Pyramid):
    """Resizes the nearest map, then applies a 1x1 convolution with batch norm: as light as ECViT's own pyramid."""

    def __init__(self, backbone, strides, dim):
        super().__init__(backbone, strides, dim)
        self.projections = nn.ModuleList(ecvit.ConvNorm(backbone.channels[i], dim, 1) for i in self.sources)

    def forward(self, features):
        levels = []
        for source, doublings, projection in zip(self.sources, self.doublings, self.projections):
            x = features[source]
            if doublings:
                size = tuple(math.ceil(n * 2**doublings) for n in x.shape[-2:])
                x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            levels.append(projection(x))
        return levels


class SimplePyramid(Pyramid):
    """ViTDet's simple feature pyramid (arXiv 2203.16527)."""

    def __init__(self, backbone, strides, dim):
        super().__init__(backbone, strides, dim)
        self.levels = nn.ModuleList(
            simple_level(backbone.channels[source], dim, doublings)
            for source, doublings in zip(self.sources, self.doublings)
        )

    def forward(self, features):
        return [level(features[source]) for source, level in zip(self.sources, self.levels)]


def simple_level(width, dim, doublings):
    """One level of the simple pyramid: map (B, width, h, w) -> (B, dim, h * 2**doublings, w * 2**doublings).

    Transposed convolutions double, max-pooling halves (rounding up). A 1x1 and a 3x3 convolution follow, each with
    a norm.
    """
    steps = []
    for step in range(doublings):
        if step:
            steps += [ChannelNorm(width), nn.GELU()]
        steps.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    steps += [nn.MaxPool2d(2, ceil_mode=True)] * -doublings  # none where doublings is positive
    steps += [
        nn.Conv2d(width, dim, 1, bias=False),
        ChannelNorm(dim),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        ChannelNorm(dim),
    ]
    return nn.Sequential(*steps)


PYRAMIDS = {"own": None, "resize": ResizedPyramid, "simple": SimplePyramid}


def build_pyramid(backbone, kind, strides, dim):
    """Builds a module: the backbone's maps -> maps of `dim` channels at about the target strides, finest first.

    kind: a key of PYRAMIDS; "own" leaves the maps unchanged. The module's `strides` and `channels` describe its maps.
    """
    if kind == "own":
        return OwnMaps(backbone)
    return PYRAMIDS[kind](backbone, strides, dim)
