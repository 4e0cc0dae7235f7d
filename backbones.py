"""Every backbone by name, and the pyramids over it: pictures in, feature maps out.

A backbone maps images (B, 3, H, W), normalised by ImageNet's statistics, to a list of maps (B, C_l, H/s_l, W/s_l),
finest first, and says so in `name`, `channels`, `strides` and `size_divisor`; other sizes are padded at the right and
bottom. `forward_features` gives the tokens. Adding a backbone of a known family is one row of BACKBONES. A detector that
wants other strides puts a pyramid over it, see `build_pyramid`.
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
from weights import download, load_strictly, load_transformers, read_state_dict, with_patch_size


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
    grid: int = 0  # learned positions along a side, where there are any


ECVIT_RELEASE = "https://github.com/capsule2077/edgecrafter/releases/download/edgecrafterv1/"
MUM_RELEASE = "https://github.com/davnords/mum/releases/download/weights/MuM_ViTLarge.pth"
VGGT_FILE = "https://huggingface.co/facebook/VGGT-1B/resolve/main/model.pt"
CONVNEXT_STRIDES = (4, 8, 16, 32)
LICENCES = {  # of the released weights, as of November 2026; their own texts decide
    "dinov2": "Apache-2.0", "dinov3": "DINOv3", "convnext": "DINOv3", "clip": "MIT", "mae": "CC-BY-NC-4.0", "mum": "MIT (DINOv3)", "vggt": "CC-BY-NC-4.0",
    "ecvit": "EdgeCrafter",
}  # fmt: skip


def _dinov2(width, depth, heads, hub, registers=0, gated=False):
    ffn = (int(4 * width * 2 / 3) + 7) // 8 * 8 if gated else 4 * width
    return Spec("dinov2", width, depth, heads, ffn, 14, registers, gated, f"facebook/dinov2-{hub}", (14,), 37)


def _dinov3(width, depth, heads, ffn, hub, gated=False):
    return Spec("dinov3", width, depth, heads, ffn, 16, 4, gated, f"facebook/dinov3-{hub}-pretrain-lvd1689m", (16,))


def _convnext(widths, depths, hub):
    source = f"facebook/dinov3-convnext-{hub}-pretrain-lvd1689m"
    return Spec("convnext", widths, depths, 0, 4 * widths[-1], 4, 0, False, source, CONVNEXT_STRIDES)


def _ecvit(name, source):
    c = ecvit.CONFIGS[name]
    return Spec("ecvit", c["dim"], c["depth"], c["heads"], c["mlp_ratio"] * c["dim"], 16, 1, False, source, (8, 16, 32))


def _plain(family, width, depth, heads, patch, source):
    return Spec(family, width, depth, heads, 4 * width, patch, 0, False, source, (patch,), 224 // patch)


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


def build_backbone(
    name, weights=None, checkpointing=False, layers=None, patch_size=None, patch_resize="pinv", freeze_norms=None
):
    """A backbone by name.

    weights: "pretrained" (hub or release, kept in the usual caches), None (random), or a path: a Hugging Face folder, one
    of the authors' original files (Meta's, MAE's, MuM's, VGGT's, ECViT's). Every weight of the model has to be in the file and
    the other way round. checkpointing: activations are recomputed in the backward pass, to save memory. layers: blocks of a plain
    ViT, counted from 0, each of which gives a map of its own (default: the last alone). patch_size: resamples a plain ViT's patch
    embedding to patches of that many pixels, see weights.resize_patch_filters for patch_resize. freeze_norms: batch statistics
    that come with the weights stay as they are in training (default: where weights are given). Raises UserError.
    """
    spec = find_spec(name)
    if weights in ("none", ""):
        weights = None
    if weights == "pretrained" and not spec.source:
        raise UserError(f"{name} has no released weights; use --backbone-weights none and train it from scratch")
    plain = spec.family not in ("ecvit", "convnext")
    for option, value in (("--layers", layers), ("--patch-size", patch_size)):
        if value and not plain:
            raise UserError(f"{option}: for plain vision transformers; {name} has maps at strides {', '.join(map(str, spec.strides))} of its own")
    if plain:
        backbone = PlainViT(name, spec, weights, layers, patch_size or spec.patch, patch_resize)
    elif spec.family == "ecvit":
        backbone = ECViTBackbone(name, spec, weights, weights is not None if freeze_norms is None else freeze_norms)
    else:
        backbone = ConvNeXt(name, spec, weights)
    if checkpointing:
        backbone.checkpoint_activations()
    return backbone


def backbone_of(config, load_weights=True):
    """The backbone that a run's settings describe, with its pretrained weights or with random ones that are still to be filled."""
    return build_backbone(
        config["backbone"], config["backbone_weights"] if load_weights else None, layers=parse_layers(config.get("layers")),
        patch_size=config.get("patch_size"), patch_resize=config.get("patch_resize", "pinv"), freeze_norms=is_pretrained(config),
    )  # fmt: skip


def is_pretrained(config):
    """Whether a run's backbone began with weights from elsewhere: its own release's or a checkpoint's."""
    return config.get("backbone_weights") not in (None, "", "none") or bool(config.get("init"))


def parse_layers(text):
    """"2,5,8,11" -> (2, 5, 8, 11); None stays None."""
    try:
        return text and tuple(int(part) for part in str(text).split(","))
    except ValueError:
        raise UserError(f"--layers takes blocks counted from 0, as 2,5,8,11, not {text}") from None


def pad_to_multiple(images, divisor):
    """(B, 3, H, W) -> the same with zeros at the right and bottom, up to multiples of divisor."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % divisor, 0, -h % divisor)) if h % divisor or w % divisor else images


def parameter_depths(backbone):
    """{parameter name: depth}, 0 for the embedding, rising by one a block (ConvNeXt: a stage), for layer-wise learning rates."""
    depths = {}
    for name, _ in backbone.named_parameters():
        block = re.search(r"(?:blocks|layers?|stages)\.(\d+)\.", name)
        at_entry = re.search(r"embed|register_token|pre_layrnorm", name)
        depths[name] = int(block[1]) + 1 if block else 0 if at_entry else None
    last = max((d for d in depths.values() if d is not None), default=0) + 1
    return {name: last if depth is None else depth for name, depth in depths.items()}


class ECViTBackbone(ecvit.ECViT):
    """ECViT from ecvit.py under this file's contract."""

    def __init__(self, name, spec, weights, freeze_norms):
        super().__init__(**ecvit.CONFIGS[name])
        self.name, self.size_divisor, self.freeze_norms = name, 32, freeze_norms
        if weights is None:
            return
        state = read_state_dict(download(spec.source) if weights == "pretrained" else weights)
        if any(key.startswith("backbone.") for key in state):
            load_strictly(self, state, weights)
        else:
            load_strictly(self.backbone, state, weights)
            print(f"{name}: the released file holds the transformer; the pyramid's 1x1 convolutions start from random weights")

    def train(self, mode=True):
        """Batch statistics that came with the weights stay as they are: small batches would only blur them."""
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
    """What the models of transformers have in common here."""

    def checkpoint_activations(self):
        if not self.model.supports_gradient_checkpointing:
            raise UserError(f"{self.name}: transformers can't recompute its activations; leave out --checkpoint-activations")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class ConvNeXt(HuggingFaceBackbone):
    """DINOv3's ConvNeXt: its four stages, not normed."""

    def __init__(self, name, spec, weights):
        super().__init__()
        self.name, self.strides, self.channels, self.size_divisor = name, spec.strides, spec.width, max(spec.strides)
        self.model = load_transformers(name, spec, weights)

    def forward(self, images):
        stages = self.model(pad_to_multiple(images, self.size_divisor), output_hidden_states=True).hidden_states
        return list(stages[-len(self.strides) :])

    def forward_features(self, images, layers=()):
        """-> x_norm (B, 1 + N, C), x_norm_clstoken (B, C), the mean of the others, and x_norm_patchtokens (B, N, C)."""
        if layers:
            raise UserError(f"{self.name}: layers are for vision transformers")
        tokens = self.model(pad_to_multiple(images, self.size_divisor)).last_hidden_state
        return {"x_norm": tokens, "x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}


class PlainViT(HuggingFaceBackbone):
    """DINOv2, DINOv3, CLIP, MAE, MuM and VGGT's patch encoder: one map, the normed patch tokens of the last block, or one of each of
    the blocks `layers`."""

    def __init__(self, name, spec, weights, layers=None, patch_size=None, patch_resize="pinv"):
        super().__init__()
        self.name, self.family, self.layers = name, spec.family, tuple(layers or ())
        if any(not 0 <= block < spec.depth for block in self.layers):
            raise UserError(f"--layers {','.join(map(str, self.layers))}: the blocks of {name} are 0 to {spec.depth - 1}")
        self.patch = patch_size or spec.patch
        resized = replace(spec, patch=self.patch)
        if self.patch == spec.patch or weights is None:
            self.model = load_transformers(name, resized, weights)
        else:
            self.model = with_patch_size(load_transformers(name, spec, weights), resized, patch_resize)
        maps = max(1, len(self.layers))
        self.strides, self.channels, self.size_divisor = (self.patch,) * maps, (spec.width,) * maps, self.patch
        self.prefix = 1 + spec.registers  # tokens before the patches
        if spec.family == "clip":  # it has a mean and deviation of its own: what turns ImageNet's into them
            mean, std, clip_mean, clip_std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD, CLIP_MEAN, CLIP_STD))
            self.register_buffer("scale", std / clip_std, persistent=False)
            self.register_buffer("shift", (mean - clip_mean) / clip_std, persistent=False)

    def tokens(self, images, layers=()):
        """-> normed tokens (B, prefix + N, C) of the last block, and of each of `layers`."""
        options = {"output_hidden_states": True} if layers else {}
        if self.family == "clip":
            images = images * self.scale + self.shift
        if self.family in ("clip", "mae"):
            options["interpolate_pos_encoding"] = True
        if self.family == "mae":  # nothing is masked, and the patches stay in order
            count = math.prod(images.shape[-2:]) // self.patch**2
            options["noise"] = torch.arange(count, dtype=images.dtype, device=images.device).expand(images.shape[0], -1)
        outputs = self.model(images, **options)
        norm = self.final_norm()
        last = norm(outputs.last_hidden_state) if self.family == "clip" else outputs.last_hidden_state
        return last, [norm(outputs.hidden_states[1 + block]) if 2 + block < len(outputs.hidden_states) else last for block in layers]

    def final_norm(self):
        if self.family == "clip":  # transformers applies it to the class token alone
            return getattr(self.model, "vision_model", self.model).post_layernorm
        return self.model.norm if self.family in ("dinov3", "mum") else self.model.layernorm

    def forward(self, images):
        images = pad_to_multiple(images, self.size_divisor)
        last, chosen = self.tokens(images, self.layers)
        grid = tuple(n // self.patch for n in images.shape[-2:])
        return [tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid) for tokens in chosen or [last]]

    def forward_features(self, images, layers=()):
        """-> x_norm (B, 1 + registers + N, C), x_norm_clstoken (B, C), x_norm_patchtokens (B, N, C), and for each of the blocks
        `layers`, by name, "block5" and so on: its normed patch tokens (B, N, C)."""
        last, chosen = self.tokens(pad_to_multiple(images, self.size_divisor), layers)
        named = {f"block{block}": tokens[:, self.prefix :] for block, tokens in zip(layers, chosen)}
        return {"x_norm": last, "x_norm_clstoken": last[:, 0], "x_norm_patchtokens": last[:, self.prefix :]} | named


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnMaps(nn.Module):
    """The backbone's maps as they are."""

    def __init__(self, backbone):
        super().__init__()
        self.channels, self.strides = tuple(backbone.channels), tuple(backbone.strides)

    def forward(self, features):
        return features


class Pyramid(nn.Module):
    """What both pyramids share: which of the backbone's maps each level comes from, and how often it is doubled or halved.

    A level takes the map of the nearest stride; where there are several of that stride, from blocks of different depth, the finest
    level takes the earliest and the coarsest the last. `strides` are the levels' own: with patches of 14 pixels 7, 14, 28 for 8, 16, 32.
    Up to stride 32 the backbone pads pictures to multiples of them; beyond, a map's last row and column may reach over the picture.
    """

    def __init__(self, backbone, strides, dim):
        super().__init__()
        self.sources, self.doublings, self.strides, self.channels = [], [], [], (dim,) * len(strides)
        for level, wanted in enumerate(strides):
            away = [abs(math.log2(stride / wanted)) for stride in backbone.strides]
            nearest = [i for i, distance in enumerate(away) if distance < min(away) + 0.01]
            self.sources.append(nearest[round(level / max(1, len(strides) - 1) * (len(nearest) - 1))])
            stride = backbone.strides[self.sources[-1]]
            self.doublings.append(round(math.log2(stride / wanted)))
            self.strides.append(stride / 2 ** self.doublings[-1])
        exact = [stride for stride, wanted in zip(self.strides, strides) if wanted <= 32]
        backbone.size_divisor = max(backbone.size_divisor, math.ceil(max(exact)))


class ResizedPyramid(Pyramid):
    """The nearest map, resized, by a 1x1 convolution with batch norm: as light as ECViT's own pyramid."""

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
    """ViTDet's simple feature pyramid (arXiv 2203.16527): doubled by transposed convolutions, halved by max-pooling, then a 1x1 and a
    3x3 convolution, each normed."""

    def __init__(self, backbone, strides, dim):
        super().__init__(backbone, strides, dim)
        self.levels = nn.ModuleList()
        for source, doublings in zip(self.sources, self.doublings):
            width, steps = backbone.channels[source], []
            for step in range(doublings):
                steps += [ChannelNorm(width), nn.GELU()] if step else []
                steps.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
                width //= 2
            steps += [nn.MaxPool2d(2, ceil_mode=True)] * -doublings
            steps += [nn.Conv2d(width, dim, 1, bias=False), ChannelNorm(dim), nn.Conv2d(dim, dim, 3, padding=1, bias=False), ChannelNorm(dim)]
            self.levels.append(nn.Sequential(*steps))

    def forward(self, features):
        return [level(features[source]) for source, level in zip(self.sources, self.levels)]


PYRAMIDS = {"own": None, "resize": ResizedPyramid, "simple": SimplePyramid}


def build_pyramid(backbone, kind, strides, dim):
    """backbone -> a module that turns its maps into maps of `dim` channels at about the wanted strides, finest first; its `strides`
    and `channels` say which. kind: see PYRAMIDS; "own" takes the backbone's as they are."""
    return OwnMaps(backbone) if kind == "own" else PYRAMIDS[kind](backbone, strides, dim)
