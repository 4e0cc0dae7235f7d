"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): each head of each query looks at a few points."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from layers import small_tensor


def weighted_samples(values, grid, weights):
    """values (N, c, h, w), grid (N, P, Q, 2) in [-1, 1], weights (N, P, Q) -> (N, c, Q): the sums of the weighted samples of each query."""
    if not torch.compiler.is_exporting():
        return WeightedSamples.apply(values, grid, weights)
    return (F.grid_sample(values, grid, align_corners=False) * weights[:, None]).sum(2)


class WeightedSamples(torch.autograd.Function):
    """The samples themselves, P times as large as their sums, are not kept but taken again in the backward pass, and on a CPU both
    passes go in pieces that its cache holds: bytes cost more here than operations."""

    @staticmethod
    def pieces(values, grid, *others):
        rows = len(values)
        if values.device.type == "cpu":  # a megabyte of samples for each thread, and two rows at least, as each thread takes whole ones
            rows = torch.get_num_threads() * max(2, 2**20 // (4 * values.shape[1] * grid.shape[1] * grid.shape[2]))
        return zip(*(x.split(rows) for x in (values, grid, *others)))

    @staticmethod
    def forward(ctx, values, grid, weights):
        ctx.save_for_backward(values, grid, weights)
        samples = (F.grid_sample(v, g, align_corners=False).mul_(w[:, None]).sum(2) for v, g, w in WeightedSamples.pieces(values, grid, weights))
        return torch.cat([*samples])

    @staticmethod
    def backward(ctx, grad):
        found = []
        for v, g, w, of_sums in WeightedSamples.pieces(*ctx.saved_tensors, grad):
            of_weights = F.grid_sample(v, g, align_corners=False).mul_(of_sums[:, :, None]).sum(1)
            of_samples = of_sums[:, :, None] * w[:, None]
            bilinear, zeros = 0, 0
            found.append((*torch.ops.aten.grid_sampler_2d_backward(of_samples, v, g, bilinear, zeros, False, [True, True]), of_weights))
        return tuple(torch.cat(parts) for parts in zip(*found))


class DeformableAttention(nn.Module):
    """Samples the maps of several levels as they are; points: how many a head looks at on each level."""

    def __init__(self, dim, heads, points):
        super().__init__()
        self.heads, self.points = heads, tuple(points)
        total = sum(points)
        self.sampling_offsets = nn.Linear(dim, heads * total * 2)
        self.attention_weights = nn.Linear(dim, heads * total)
        self.register_buffer("num_points_scale", torch.tensor([1 / n for n in points for _ in range(n)]))
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(heads) * (2 * math.pi / heads)
        ray = torch.stack([angles.cos(), angles.sin()], dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, n + 1) for n in points])
        with torch.no_grad():  # every head starts along a ray of its own
            self.sampling_offsets.bias.copy_((ray[:, None] * steps[None, :, None]).flatten())
        for parameter in self.attention_weights.parameters():
            nn.init.zeros_(parameter)

    def forward(self, query, reference, levels, share=None):
        """query (B, Q, C) -> (B, Q, C).

        reference: boxes (B, Q, 4) cxcywh, around which offsets are measured in the box's own size, or points (B, Q, 2), where they
        are measured in cells; both in [0, 1] of what `share` (B, L, 2) of each level's width and height is no padding (default: of
        all). levels: maps (B, C, h, w).
        """
        batch, queries, dim = query.shape
        # queries innermost: long rows are fast
        offsets = self.sampling_offsets(query).transpose(1, 2).contiguous().view(batch, self.heads, -1, 2, queries)
        weights = self.attention_weights(query).transpose(1, 2).contiguous().view(batch, self.heads, -1, queries).softmax(2).flatten(0, 1)
        reference = reference.transpose(1, 2)[:, None, None]  # (B, 1, 1, 4 or 2, Q)
        out = 0
        parts = offsets.split(self.points, dim=2), weights.split(self.points, dim=1), self.num_points_scale.split(self.points)
        for i, (level, part, weight, scale) in enumerate(zip(levels, *parts)):
            ratio = 1 if share is None else share[:, i, None, None, :, None]
            in_cells = reference.shape[-2] == 2
            reach = 2 / small_tensor(level.shape[:1:-1], level.device)[:, None] if in_cells else ratio * reference[..., 2:, :] * scale[:, None, None]
            grid = torch.addcmul(2 * ratio * reference[..., :2, :] - 1, part, reach)
            grid = grid.transpose(-1, -2).flatten(0, 1)
            values = level.reshape(batch * self.heads, dim // self.heads, *level.shape[-2:])
            out = out + weighted_samples(values, grid, weight)
        return out.view(batch, dim, queries).transpose(1, 2)


class ProjectedDeformableAttention(DeformableAttention):
    """The same between a projection of the values and one of the result, as it was published."""

    def __init__(self, dim, heads, points):
        super().__init__(dim, heads, points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query, reference, memory, sizes, share, padding=None):
        """memory (B, N, C): the cells of all levels, whose sizes are [(h, w)]; padding (B, N): True where they are none; see above."""
        values = self.value_proj(memory).float()  # positions between cells need more digits than bfloat16 has
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        parts = values.split([h * w for h, w in sizes], dim=1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes)]
        return self.output_proj(super().forward(query, reference, levels, share).to(query.dtype))
