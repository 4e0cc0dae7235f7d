"""ECViT, the small vision transformer of EdgeCrafter (arXiv 2603.18739), with its three-level pyramid.

Modules have the names of the released files: `ecvitt.pth` and the others load without renaming.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from layers import attend

# dim: width D; depth: blocks; pyramid_dim: width of the pyramid (None: D); skip: add the stem's map to the finest level
CONFIGS = {
    "ecvit-nano": dict(dim=128, heads=2, mlp_ratio=4, depth=6, pyramid_dim=None, skip=True),
    "ecvitt": dict(dim=192, heads=3, mlp_ratio=4, depth=12, pyramid_dim=None, skip=False),
    "ecvittplus": dict(dim=256, heads=4, mlp_ratio=4, depth=12, pyramid_dim=None, skip=False),
    "ecvits": dict(dim=384, heads=6, mlp_ratio=4, depth=12, pyramid_dim=256, skip=False),
    "ecvitsplus": dict(dim=384, heads=6, mlp_ratio=6, depth=12, pyramid_dim=256, skip=False),
}


class ConvNorm(nn.Module):
    """Convolution without bias, then batch normalisation."""

    def __init__(self, in_dim, out_dim, kernel_size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x):
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fuse(self):
        """Folds the norm's scale and shift into the convolution; outputs stay those of eval mode."""
        if isinstance(self.norm, nn.Identity):
            return
        self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
        self.norm = nn.Identity()


def fuse(model):
    """Folds every module that has a `fuse` method, in place, for inference -> model.

    Afterwards the model's state dict no longer fits a checkpoint's.
    """
    for module in list(model.modules()):
        if hasattr(module, "fuse"):
            module.fuse()
    return model


class PatchEmbed(nn.Module):
    """Four stride-2 convolutions: (B, 3, H, W) -> (B, D/2, H/8, W/8) and (B, D, H/16, W/16)."""

    def __init__(self, dim):
        super().__init__()
        widths = [3, dim // 8, dim // 4, dim // 2]
        self.convs = nn.ModuleList(ConvNorm(i, o, 3, stride=2) for i, o in zip(widths, widths[1:]))
        self.proj = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.proj(x)


class RotaryEmbedding(nn.Module):
    """2D rotary position embedding (RoFormer, arXiv 2104.09864) of a grid of patches.

    Coordinates run over (-1, 1) along each axis, so all image sizes use the same range.
    """

    def __init__(self, head_dim, base=100.0):
        super().__init__()
        self.register_buffer("periods", base ** (2 * torch.arange(head_dim // 4) / (head_dim // 2)))

    def forward(self, h, w):
        """-> sin, cos, each (1 + h * w, head_dim): first the register, which has no position, then the patches."""
        periods = self.periods.float()
        row, column = (2 * (torch.arange(n, device=periods.device) + 0.5) / n - 1 for n in (h, w))
        angles_y = (2 * math.pi * row[:, None] / periods)[:, None].expand(h, w, -1)
        angles_x = (2 * math.pi * column[:, None] / periods)[None].expand(h, w, -1)
        angles = torch.cat([angles_y, angles_x], dim=-1).flatten(0, 1).tile(2)
        angles = F.pad(angles, (0, 0, 1, 0))
        return angles.sin(), angles.cos()


def rotate(x, sin, cos):
    """Rotates x (..., N, d) by the angles of sin, cos (N, d)."""
    sin, cos = sin.to(x.dtype), cos.to(x.dtype)
    if torch.compiler.is_exporting():
        return apply_rotation(x, sin, cos)
    return Rotation.apply(x, sin, cos)


def apply_rotation(x, sin, cos):
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[:, half:])
    return rotated


class Rotation(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation: half of autograd's work, and x need not be stored."""

    @staticmethod
    def forward(ctx, x, sin, cos):
        ctx.save_for_backward(sin, cos)
        return apply_rotation(x, sin, cos)

    @staticmethod
    def backward(ctx, grad):
        sin, cos = ctx.saved_tensors
        return apply_rotation(grad, -sin, cos), None, None


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, sin, cos):
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).split([2, 1])
        q, k = rotate(qk, sin, cos)
        x = attend(q, k, v[0])
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block without layer scale."""

    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x, sin, cos):
        x = x + self.attn(self.norm1(x), sin, cos)
        return x + self.mlp(self.norm2(x))


class ECViTTrunk(nn.Module):
    """The transformer without the pyramid, as in the released backbone files."""

    def __init__(self, dim, heads, mlp_ratio, depth):
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.register_token = nn.Parameter(torch.empty(1, 1, dim))
        self.rope_embed = RotaryEmbedding(dim // heads)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self):
        """Every block starts as the identity, so that from random weights the convolutions learn first."""
        nn.init.trunc_normal_(self.register_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)

    def forward(self, images):
        """images (B, 3, H, W) -> stem map (B, D/2, H/8, W/8), grid (h, w), [tokens (B, 1 + N, D) after each block]."""
        stem, patches = self.patch_embed(images)
        h, w = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.register_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        sin, cos = self.rope_embed(h, w)
        outputs = []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, sin, cos, use_reentrant=False)
            else:
                x = block(x, sin, cos)
            outputs.append(x)
        return stem, (h, w), outputs


class ECViT(nn.Module):
    """ECViT with its pyramid: (B, 3, H, W), H and W multiples of 32 -> maps at strides 8, 16, 32, finest first.

    All levels are the same map, the mean of the last two blocks' patch tokens, at three sizes. `skip` adds the stem's
    stride-8 map to the finest level: at the nano model's image sizes, stride 16 alone is too coarse for small boxes.
    """

    strides = (8, 16, 32)

    def __init__(self, dim, heads, mlp_ratio, depth, pyramid_dim=None, skip=False):
        super().__init__()
        self.backbone = ECViTTrunk(dim, heads, mlp_ratio, depth)
        widths = [dim] if pyramid_dim is None else [pyramid_dim] * 3
        self.projector = nn.ModuleList(ConvNorm(dim, width, 1) for width in widths)
        self.skip = ConvNorm(dim // 2, dim, 1) if skip else None
        self.channels = (pyramid_dim or dim,) * 3

    def forward(self, images):
        stem, (h, w), tokens = self.backbone(images)
        mean = (tokens[-2][:, 1:] + tokens[-1][:, 1:]) / 2
        mean = mean.transpose(1, 2).unflatten(2, (h, w))
        fine = F.interpolate(mean, size=(2 * h, 2 * w), mode="bilinear", align_corners=False)
        coarse = F.interpolate(mean, size=(h // 2, w // 2), mode="bilinear", align_corners=False)
        levels = [fine, mean, coarse]
        for level, projector in zip(range(3 - len(self.projector), 3), self.projector):  # three, or one for the last
            levels[level] = projector(levels[level])
        if self.skip is not None:
            levels[0] = levels[0] + self.skip(stem)
        return levels

    def forward_features(self, images, layers=()):
        """images -> x_norm (B, 1 + N, D), register first, and x_norm_patchtokens (B, N, D), without a final norm.

        For each block in `layers` also "block5" and so on: its patch tokens (B, N, D). ECViT has no class token.
        """
        tokens = self.backbone(images)[2]
        named = {f"block{block}": tokens[block][:, 1:] for block in layers}
        return {"x_norm": tokens[-1], "x_norm_patchtokens": tokens[-1][:, 1:]} | named
