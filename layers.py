"""Layers and position embeddings that several detectors are made of."""

import math

import torch
import torch.nn.functional as F
from torch import nn


ONE_ROW_EACH = 1, 0  # of a layer with a row for each class, see checkpoint.copy_classes


class Mlp(nn.Module):
    """`layers` linear layers with an activation between them."""

    def __init__(self, in_dim, hidden_dim, out_dim, layers, activation=F.relu):
        super().__init__()
        self.activation = activation
        dims = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def in_float32(module, x):
    """module(x), in float32 (TF32 where that is allowed) also under autocast: what comes out in the eight bits of bfloat16 is too
    coarse for a box, or to rank scores by."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return module(x)
    with torch.autocast(kind, enabled=False):
        return module(x.float())


def sine_embedding(positions, dim, temperature=10000):
    """positions (...) in [0, 1] -> (..., dim): sines and cosines of 2 pi position in turn, as in DETR."""
    index = torch.arange(0, dim, 2, device=positions.device)
    angles = positions[..., None] * (2 * math.pi) / temperature ** (index / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def grid_embedding(y, x, dim):
    """y, x (B, H, W) in [0, 1] -> (B, H * W, dim): half for the row, half for the column."""
    return torch.cat([sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)], dim=-1).flatten(1, 2)


def unpadded_size(mask):
    """mask (B, H, W) True on padding, which lies at the right and the bottom -> (B, 2) width and height of what is none."""
    return torch.stack([(~mask).any(1).sum(1), (~mask).any(2).sum(1)], dim=1)


def small_tensor(values, device):
    """torch.tensor(values) on the device. With device=... the host would wait until the device has done all that it was given so far."""
    return torch.tensor(values).to(device, non_blocking=True)


def is_padded(mask):
    """Whether mask (B, H, W) holds any padding; an exported network takes none. Asked on the host, if it is there, it costs no waiting."""
    return not torch.compiler.is_exporting() and bool(mask.any())


def padding_bias(padding):
    """padding (B, N) -> what to add to attention scores, (B, 1, 1, N)."""
    return torch.zeros(padding.shape, device=padding.device).masked_fill(padding, -torch.inf)[:, None, None]


class Attention(nn.Module):
    """Multi-head attention; bias, broadcast to (B, heads, Q, N), is added to the scores."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, query, key, value, bias=None):
        """query (B, Q, C), key and value (B, N, C) -> (B, Q, C)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))
