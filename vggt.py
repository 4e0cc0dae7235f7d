"""VGGT (arXiv 2503.11651), the part before its heads: the aggregator, and the features that it gives to detectors.

B scenes, S frames, N patches of a frame, P = 5 + N tokens, C channels. Modules have the names of the released files, so
that VGGT-1B's `model.pt` loads without renaming. vggt_heads.py has the heads, and reconstruct.py is the command.
"""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from errors import UserError
from transforms import MEAN, STD
from weights import download, load_strictly, read_state_dict

SPECIAL = 5  # tokens before the patches of a frame: one of the camera, four registers
VGGT_1B = dict(dim=1024, heads=16, pairs=24, patch=14, encoder_depth=24)
SMALL = 1e-6  # deviation of new special tokens


class Attention(nn.Module):
    """Self-attention (B, N, C) -> (B, N, C), with normalised queries and keys where `qk_norm`, turned by `rotation`."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotation=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim, hidden, out=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out or dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block with layer scale."""

    def __init__(self, dim, heads, eps=1e-5, qk_norm=False, scale=0.01):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn, self.mlp = Attention(dim, heads, qk_norm), Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim, scale), LayerScale(dim, scale)

    def forward(self, x, rotation=None):
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


def recomputed(block):
    """The block, whose activations are recomputed in the backward pass."""
    return partial(checkpoint, block, use_reentrant=False)


def rotation_of(h, w, dim, device=None):
    """cos, sin (SPECIAL + h * w, 2, dim / 4) of the rotary positions for heads of `dim` channels.

    The first half of the channels turns by the row, the second by the column, both counted from 1. Special tokens are
    at 0: they are not turned.
    """
    rows, columns = torch.meshgrid(
        torch.arange(1, h + 1, device=device), torch.arange(1, w + 1, device=device), indexing="ij"
    )
    positions = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    positions = F.pad(positions, (0, 0, SPECIAL, 0)).float()
    frequencies = 100.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, heads, P, d); channel k of each half is paired with channel k + d / 4."""
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, heads, P, 2, d / 4)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3)


class PatchEncoder(nn.Module):
    """DINOv2 with four registers -> x_norm_patchtokens (B, N, C), whose positions are resized with antialiasing."""

    def __init__(self, dim, heads, depth, patch=14, grid=37):
        super().__init__()
        self.grid, self.patch, self.dim = grid, patch, dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid**2, dim))
        self.register_tokens = nn.Parameter(SMALL * torch.randn(1, 4, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # of its own training
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-6, scale=1.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.recomputes = False  # activations, in the backward pass

    def forward_features(self, images):
        patches = self.patch_embed["proj"](images)
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(*patches.shape[-2:]).to(patches.dtype)
        first = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], dim=1)
        tokens = torch.cat([first.expand(len(images), -1, -1).to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = recomputed(block)(tokens) if self.recomputes and self.training else block(tokens)
        return {"x_norm_patchtokens": self.norm(tokens)[:, first.shape[1] :]}

    def positions(self, h, w):
        """-> (1, h * w, C)."""
        own = self.pos_embed[:, 1:]
        if (h, w) == (self.grid, self.grid):
            return own
        own = own.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()
        return F.interpolate(own, (h, w), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


class PatchConvolution(nn.Module):
    """The encoder of a single convolution, which VGGT's authors also offer."""

    def __init__(self, dim, patch=14):
        super().__init__()
        self.patch, self.dim = patch, dim
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward_features(self, images):
        return {"x_norm_patchtokens": self.proj(images).flatten(2).transpose(1, 2)}


class Aggregator(nn.Module):
    """Patches of all frames, and special tokens, through attention within each frame and among all, in turns.

    encoder: a module that returns (B * S, N, width), row by row, for normalised images (B * S, 3, H, W), or whose
    `forward_features` returns that as "x_norm_patchtokens", such as a plain ViT of backbones.py; its attributes `patch`
    and `dim` or `channels` say how large patches and tokens are. Where its width is not `dim`, a projection is in
    between.
    """

    def __init__(self, encoder, dim, heads, pairs):
        super().__init__()
        width = encoder.dim if hasattr(encoder, "dim") else encoder.channels[-1]
        self.patch, self.dim, self.heads = encoder.patch, dim, heads
        self.patch_embed = encoder
        self.patch_projection = nn.Identity() if width == dim else nn.Linear(width, dim)
        self.camera_token = nn.Parameter(SMALL * torch.randn(1, 2, 1, dim))  # of the first frame, of all others
        self.register_token = nn.Parameter(SMALL * torch.randn(1, 2, SPECIAL - 1, dim))
        self.frame_blocks = nn.ModuleList(Block(dim, heads, qk_norm=True) for _ in range(pairs))
        self.global_blocks = nn.ModuleList(Block(dim, heads, qk_norm=True) for _ in range(pairs))
        self.recomputes = False

    def forward(self, images, keep=None):
        """images (B, S, 3, H, W), normalised -> {pair: (B, S, P, 2C)}: the tokens after its frame block and after its
        global block. keep: the pairs that are returned (default: all)."""
        entries, frame = {}, None
        for name, i, tokens in self.run(images):
            if name == "frame":
                frame = tokens
            elif name == "global" and (keep is None or i in keep):
                entries[i] = torch.cat([frame, tokens], dim=-1)
        return entries

    def run(self, images):
        """Yields ("patch_embed", 0, (B, S, N, C)), then after each block ("frame" or "global", pair, (B, S, P, C))."""
        batch, frames, _, height, width = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height}x{width}: both have to be multiples of {self.patch}")
        encode = getattr(self.patch_embed, "forward_features", self.patch_embed)
        patches = encode(images.flatten(0, 1))
        patches = patches["x_norm_patchtokens"] if isinstance(patches, dict) else patches
        patches = self.patch_projection(patches).unflatten(0, (batch, frames))
        yield "patch_embed", 0, patches
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)], dim=1)
        special = special.expand(batch, -1, -1, -1)
        x = torch.cat([special.to(patches.dtype), patches], dim=2)
        cos, sin = rotation_of(height // self.patch, width // self.patch, self.dim // self.heads, x.device)
        everywhere = cos.repeat(frames, 1, 1), sin.repeat(frames, 1, 1)
        for i, (within, among) in enumerate(zip(self.frame_blocks, self.global_blocks)):
            if self.recomputes and self.training:
                within, among = recomputed(within), recomputed(among)
            x = within(x.flatten(0, 1), (cos, sin)).unflatten(0, (batch, frames))
            yield "frame", i, x
            x = among(x.flatten(1, 2), everywhere).unflatten(1, (frames, -1))
            yield "global", i, x

    def layer_names(self, layers):
        """["patch_embed", "frame", "global", "all", or single ones such as "frame3"] -> names. Raises UserError."""
        pairs = range(len(self.frame_blocks))
        groups = {kind: [f"{kind}{i}" for i in pairs] for kind in ("frame", "global")}
        groups["all"] = ["patch_embed", *(name for pair in zip(*groups.values()) for name in pair)]
        names = [name for layer in layers for name in groups.get(layer, [layer])]
        unknown = [str(name) for name in names if name not in groups["all"]]
        if unknown:
            raise UserError(
                f"--layers {','.join(unknown)}: VGGT's are patch_embed, frame0 to frame{pairs[-1]}, global0 to "
                f"global{pairs[-1]}, frame, global, all"
            )
        return list(dict.fromkeys(names))

    def forward_features(self, images, layers=("global",)):
        """images (B, S, 3, H, W), normalised, or (B, 3, H, W), scenes of one frame; layers: see layer_names
        -> {"global5": {"x_norm_patchtokens": (B * S, N, C)}, ...}, not normalised, in spite of the name."""
        images, wanted = images if images.ndim == 5 else images[:, None], self.layer_names(layers)
        found = {}
        for kind, i, tokens in self.run(images):
            name = kind if kind == "patch_embed" else f"{kind}{i}"
            if name in wanted:
                patches = tokens if kind == "patch_embed" else tokens[:, :, SPECIAL:]
                found[name] = {"x_norm_patchtokens": patches.flatten(0, 1)}
            if len(found) == len(wanted):
                break
        return {name: found[name] for name in wanted}


def build_aggregator(dim, heads, pairs, patch=14, encoder_depth=24, encoder=None):
    """-> Aggregator; encoder: "conv", another one, see Aggregator, or None for VGGT's own."""
    if encoder is None:
        encoder = PatchEncoder(dim, heads, encoder_depth, patch)
    elif encoder == "conv":
        encoder = PatchConvolution(dim, patch)
    return Aggregator(encoder, dim, heads, pairs)


def normalize(images):
    """images (..., 3, H, W) in [0, 1] -> normalised by ImageNet's statistics."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def read_vggt(source, parts, url=None):
    """A released file, the hub's folder, or "pretrained", which downloads `url` -> {key: tensor} of the parts, such as
    ("aggregator", "depth_head"). Prints what the file has besides. Raises UserError."""
    path = Path(download(url) if source == "pretrained" else source)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "model.pt") if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: holds neither model.safetensors nor model.pt")
        path = files[0]
    state = read_state_dict(path, mmap=True)
    others = Counter(key.split(".")[0] for key in state if key.split(".")[0] not in parts)
    if others:
        counts = ", ".join(f"{count} of {part}" for part, count in sorted(others.items()))
        print(f"{path}: weights that are not needed here are left out: {counts}")
    return {key: value for key, value in state.items() if key.split(".")[0] in parts}


def fill(module, state, source):
    """Loads a state dict strictly into a module on the meta device, in the precision of its parameters: the weights are
    in memory once. Raises UserError."""
    own = module.state_dict()
    state = {key: value.to(own[key].dtype, copy=True) if key in own else value for key, value in state.items()}
    load_strictly(module, state, source, assign=True)


class VGGTBackbone(nn.Module):
    """The aggregator as a detector's backbone: each image is a scene of one frame; a map for each of `layers`."""

    def __init__(self, name, spec, weights, layers=None):
        super().__init__()
        self.name, self.patch, self.size_divisor = name, spec.patch, spec.patch
        with torch.device("meta") if weights is not None else nullcontext():
            self.aggregator = build_aggregator(spec.width, spec.heads, spec.depth, spec.patch, spec.depth)
        self.layers = self.aggregator.layer_names(layers or [f"global{spec.depth - 1}"])
        self.strides, self.channels = (spec.patch,) * len(self.layers), (spec.width,) * len(self.layers)
        if weights is not None:
            fill(self, read_vggt(weights, ["aggregator"], spec.source), weights)

    def checkpoint_activations(self):
        self.aggregator.recomputes = self.aggregator.patch_embed.recomputes = True

    def forward(self, images):
        images = self.padded(images)
        grid = tuple(n // self.patch for n in images.shape[-2:])
        features = self.aggregator.forward_features(images, self.layers)
        return [f["x_norm_patchtokens"].transpose(1, 2).unflatten(2, grid) for f in features.values()]

    def forward_features(self, images, layers=()):
        """images (B, 3, H, W) -> x_norm_patchtokens (B, N, C) of the last of its own layers, and for each of `layers`,
        see Aggregator.layer_names, {"x_norm_patchtokens"}."""
        features = self.aggregator.forward_features(self.padded(images), [*layers, self.layers[-1]])
        last = features[self.layers[-1]]["x_norm_patchtokens"]
        return {"x_norm_patchtokens": last} | {name: features[name] for name in self.aggregator.layer_names(layers)}

    def padded(self, images):
        """A pyramid on top may have raised size_divisor."""
        h, w = images.shape[-2:]
        return F.pad(images, (0, -w % self.size_divisor, 0, -h % self.size_divisor))
