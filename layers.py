"""What the detectors are made of: attention, transformer layers, cells of a map, queries, noisy copies.

B images, Q queries, N cells or tokens, C channels, L levels, (h, w) the size of a map. Boxes are cxcywh in [0, 1] of
the image without its padding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

PRIOR = 0.01  # every score before training (focal loss, arXiv 1708.02002)
LABEL_NOISE = 0.25  # fraction of the noisy copies that get a random label
ONE_ROW_EACH = 1, 0  # a layer with one row for each class, see checkpoint.copy_classes


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


def init_heads(class_heads, box_heads):
    """Every score starts at PRIOR and every box as its anchor, or as the layer before left it."""
    for head in class_heads:
        nn.init.constant_(head.bias, math.log(PRIOR / (1 - PRIOR)))
    for head in box_heads:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)


def in_float32(module, x):
    """module(x) in float32, also under autocast: bfloat16's eight bits are too coarse for boxes and score ranking."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return module(x)
    with torch.autocast(kind, enabled=False):
        return module(x.float())


def to_device(indices, device):
    """Index tensors (M,) on the host -> on the device, in one copy."""
    return torch.stack(indices).to(device, non_blocking=True).unbind()


# Positions and padding


def sine_embedding(positions, dim, temperature=10000):
    """positions (...) in [0, 1] -> (..., dim): sines and cosines of 2 pi position in turn, as in DETR."""
    index = torch.arange(0, dim, 2, device=positions.device)
    angles = positions[..., None] * (2 * math.pi) / temperature ** (index / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def grid_embedding(y, x, dim):
    """y, x (B, H, W) in [0, 1] -> (B, H * W, dim): half for the row, half for the column."""
    return torch.cat([sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)], dim=-1).flatten(1, 2)


def box_embedding(boxes, dim):
    """boxes (B, Q, 4) -> (B, Q, 2 * dim): sine embeddings of y, x, h, w, as in DAB-DETR (arXiv 2201.12329)."""
    yxhw = boxes.unflatten(-1, (2, 2)).flip(-1).flatten(-2)
    return sine_embedding(yxhw, dim // 2).flatten(2)


def is_padded(mask):
    """Whether mask (B, H, W) has any padding. Exported networks take none. A mask on the host costs no waiting."""
    return not torch.compiler.is_exporting() and bool(mask.any())


def padding_bias(padding):
    """padding (B, N) -> (B, 1, 1, N), to be added to attention scores."""
    return torch.zeros(padding.shape, device=padding.device).masked_fill(padding, -torch.inf)[:, None, None]


def unpadded_size(mask):
    """mask (B, H, W), True on padding at the right and the bottom -> (B, 2), width and height of the image in it."""
    return torch.stack([(~mask).any(1).sum(1), (~mask).any(2).sum(1)], dim=1)


@dataclass
class Cells:
    """The cells of the maps of all levels, finest first, in units of the image without its padding."""

    centres: torch.Tensor  # (B, N, 2), x and y
    sizes: torch.Tensor  # (B, N, 2), width and height
    padding: torch.Tensor  # (B, N), True for cells in the padding
    valid_ratios: torch.Tensor  # (B, L, 2), the fraction of each map's width and height that is not padding


def make_cells(mask, sizes, strides, border_is_padding=False):
    """mask (B, H, W), True on padding; sizes [(h, w)] and strides of the maps -> Cells.

    A cell is in the padding if its centre is (border_is_padding: or on the border). The first of a row or column never
    is, as an image may be thinner than half a cell.
    """
    image_size = unpadded_size(mask)
    centres, cell_sizes, padding, ratios = [], [], [], []
    for (h, w), stride in zip(sizes, strides):
        cell = stride / image_size
        y, x = (torch.arange(n, device=mask.device) + 0.5 for n in (h, w))
        y, x = y * cell[:, 1:], x * cell[:, :1]
        centres.append(torch.stack([x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)], -1).flatten(1, 2))
        cell_sizes.append(cell[:, None].expand(-1, h * w, -1))
        rows, columns = (is_beyond(n, border_is_padding) for n in (y, x))
        padding.append((rows[:, :, None] | columns[:, None, :]).flatten(1))
        ratios.append(1 / torch.stack([cell[:, 0] * w, cell[:, 1] * h], dim=1))
    parts = (torch.cat(part, dim=1) for part in (centres, cell_sizes, padding))
    return Cells(*parts, torch.stack(ratios, dim=1))


def is_beyond(centres, border_is_padding):
    """centres (B, n) of a map's rows or columns -> (B, n), True on padding."""
    beyond = centres >= 1 if border_is_padding else centres > 1
    return torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, 1:]], dim=1)


# Attention


def attend(q, k, v, bias=None, dropout=0.0):
    """Scaled dot-product attention. q (..., Q, d), k and v (..., N, d); bias is added to the scores -> (..., Q, d).

    In training in bfloat16 on a CPU, scores have bfloat16's digits, and no query may be kept from all keys.
    """
    bias = None if bias is None else bias.to(q.dtype)
    small = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 512 and not dropout
    if small and torch.is_grad_enabled() and q.requires_grad:
        # The fused kernel's backward pass is slow in bfloat16 on CPUs: 2 to 8 times the time of plain products.
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


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
        x = attend(q, k, v, bias, dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) without projections of values and output.

    Each head of each query samples the maps at a few points; points: how many on each level.
    """

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

    def forward(self, query, reference, levels, valid_ratios=None):
        """query (B, Q, C) -> (B, Q, C).

        reference: boxes (B, Q, 4), whose own size is the unit of the offsets, or points (B, Q, 2), where the unit is a
        cell; in [0, 1] of the image without padding, which is the fraction valid_ratios (B, L, 2) of the maps' width
        and height (default: all of it). levels: maps (B, C, h, w).
        """
        batch, queries, dim = query.shape
        # Queries come last: long rows are fast.
        offsets = self.sampling_offsets(query).transpose(1, 2).contiguous().view(batch, self.heads, -1, 2, queries)
        weights = self.attention_weights(query).transpose(1, 2).contiguous().view(batch, self.heads, -1, queries)
        weights = weights.softmax(2).flatten(0, 1)
        reference = reference.transpose(1, 2)[:, None, None]  # (B, 1, 1, 4 or 2, Q)
        by_level = zip(levels, offsets.split(self.points, dim=2), weights.split(self.points, dim=1))
        scales = self.num_points_scale.split(self.points)
        out = 0
        for i, (level, offset, weight) in enumerate(by_level):
            ratio = 1 if valid_ratios is None else valid_ratios[:, i, None, None, :, None]
            if reference.shape[-2] == 2:
                h, w = level.shape[-2:]
                unit = torch.cat([reference.new_full((1, 1), 2 / n) for n in (w, h)])
            else:
                unit = ratio * reference[..., 2:, :] * scales[i][:, None, None]
            grid = torch.addcmul(2 * ratio * reference[..., :2, :] - 1, offset, unit)
            grid = grid.transpose(-1, -2).flatten(0, 1)
            values = level.reshape(batch * self.heads, dim // self.heads, *level.shape[-2:])
            out = out + weighted_samples(values, grid, weight)
        return out.view(batch, dim, queries).transpose(1, 2)


class ProjectedDeformableAttention(DeformableAttention):
    """Deformable attention as published, with projections of values and output."""

    def __init__(self, dim, heads, points):
        super().__init__(dim, heads, points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query, reference, memory, sizes, valid_ratios, padding=None):
        """memory (B, N, C): the cells of maps of sizes [(h, w)]; padding (B, N); else as DeformableAttention."""
        values = self.value_proj(memory).float()  # bfloat16 has too few digits for positions between cells
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        parts = values.split([h * w for h, w in sizes], dim=1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes)]
        return self.output_proj(super().forward(query, reference, levels, valid_ratios).to(query.dtype))


def weighted_samples(values, grid, weights):
    """values (N, c, h, w), grid (N, P, Q, 2) in [-1, 1], weights (N, P, Q) -> (N, c, Q), each query's weighted sum."""
    if not torch.compiler.is_exporting():
        return WeightedSamples.apply(values, grid, weights)
    return (F.grid_sample(values, grid, align_corners=False) * weights[:, None]).sum(2)


class WeightedSamples(torch.autograd.Function):
    """Samples again in the backward pass instead of keeping the samples, which are P times as large as their sums.

    On CPUs both passes work in chunks that fit the cache: moving bytes costs more there than computing.
    """

    @staticmethod
    def chunks(values, grid, *others):
        rows = len(values)
        if values.device.type == "cpu":  # a megabyte of samples a thread; at least two rows, as threads take whole rows
            samples = 4 * values.shape[1] * grid.shape[1] * grid.shape[2]
            rows = torch.get_num_threads() * max(2, 2**20 // samples)
        return zip(*(x.split(rows) for x in (values, grid, *others)))

    @staticmethod
    def forward(ctx, values, grid, weights):
        ctx.save_for_backward(values, grid, weights)
        sums = []
        for v, g, w in WeightedSamples.chunks(values, grid, weights):
            sums.append(F.grid_sample(v, g, align_corners=False).mul_(w[:, None]).sum(2))
        return torch.cat(sums)

    @staticmethod
    def backward(ctx, grad):
        grads = []
        bilinear, zeros, align_corners = 0, 0, False
        for v, g, w, grad_sums in WeightedSamples.chunks(*ctx.saved_tensors, grad):
            grad_weights = F.grid_sample(v, g, align_corners=False).mul_(grad_sums[:, :, None]).sum(1)
            grad_samples = grad_sums[:, :, None] * w[:, None]
            grad_values, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad_samples, v, g, bilinear, zeros, align_corners, [True, True]
            )
            grads.append((grad_values, grad_grid, grad_weights))
        return tuple(torch.cat(parts) for parts in zip(*grads))


# Transformer layers


class EncoderLayer(nn.Module):
    """Self-attention among cells, then feed-forward; each added, then normalised."""

    def __init__(self, dim, heads, ffn_dim, dropout=0.0):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos, bias=None):
        """x, pos (B, N, C), bias: see Attention -> (B, N, C)."""
        q = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, bias)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward; each added, then normalised."""

    def __init__(self, dim, heads, ffn_dim, dropout=0.0, cross_attn=None):
        """cross_attn: the module that looks at the memory (default: attention to all of it)."""
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.cross_attn = cross_attn or Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, query_pos, memory, bias=None):
        """x, query_pos (B, Q, C) -> (B, Q, C).

        memory: what the cross-attention takes after its query; bias: of the self-attention, see Attention.
        """
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, bias)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + query_pos, *memory)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


# Queries and their boxes


def select_queries(scores, padding, count):
    """scores (B, N, K) of all cells, padding (B, N) -> indices (B, Q) of the best ones, by their best class."""
    best = scores.detach().amax(-1).masked_fill(padding, -torch.inf)
    return best.topk(min(count, best.shape[1]), dim=1).indices


def gather_cells(x, indices):
    """x (B, N, C), indices (B, Q) -> (B, Q, C)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def shift_boxes(boxes, deltas):
    """boxes, deltas (..., 4) cxcywh -> boxes moved by deltas measured in their own size (R-CNN, arXiv 1311.2524).

    The same deltas mean the same pattern of pixels wherever the object is and however large the image; a shift of
    logits, as in Deformable DETR, does not. Clamped to [0, 1], sizes to at least 1e-4.
    """
    centres = boxes[..., :2] + deltas[..., :2] * boxes[..., 2:]
    sizes = boxes[..., 2:] * deltas[..., 2:].clamp(-4, 4).exp()
    return torch.cat([centres.clamp(0.0, 1.0), sizes.clamp(1e-4, 1.0)], dim=-1)


# Contrastive denoising (DINO, arXiv 2203.03605): noisy copies of the objects as extra queries, which need no matching.
# A positive copy has to find its object again; a negative one, moved further, has to learn that it is none.


@dataclass
class Denoising:
    """D noisy copies in each image."""

    labels: torch.Tensor  # (B, D) in 0..K, K for none
    boxes: torch.Tensor  # (B, D, 4)
    blocked: torch.Tensor  # (D, D + Q), True where a copy (row) must not see a query
    matches: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # image, query, object of the batch, (M,) each


def make_denoising(targets, num_classes, num_queries, num_denoising=100):
    """targets: B dicts with `labels` (T,) and `boxes` (T, 4) -> Denoising, or None where no image has an object.

    As many groups of a positive and a negative copy of every object as fit `num_denoising`, at least one. Groups do not
    see each other, nor do the num_queries matching queries, which come after them, see any of them.
    """
    counts = [len(t["labels"]) for t in targets]
    most = max(counts)
    if most == 0:
        return None
    groups = max(1, num_denoising // most)
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True, padding_value=num_classes)
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).float()
    place = torch.arange(2 * groups * most)
    negative = place // most % 2 == 1

    exists = torch.arange(most) < torch.tensor(counts)[:, None]  # computed on the host, which then need not wait
    numbers = exists.flatten().cumsum(0).view_as(exists) - 1
    image, query = (exists.repeat(1, 2 * groups) & ~negative).nonzero(as_tuple=True)
    matches = to_device((image, query, numbers[image, query % most]), labels.device)
    place, negative = (x.to(labels.device, non_blocking=True) for x in (place, negative))

    labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)
    flipped = (torch.rand(labels.shape, device=labels.device) < LABEL_NOISE) & (labels < num_classes)
    labels = torch.where(flipped, torch.randint_like(labels, num_classes), labels)
    sign = torch.randint_like(boxes, 2) * 2 - 1
    shift = sign * (torch.rand_like(boxes) + negative[:, None]) * boxes[..., 2:].repeat(1, 1, 2) / 2
    moved = (box_convert(boxes, "cxcywh", "xyxy") + shift).clamp(0, 1)
    x1, y1, x2, y2 = moved.unbind(-1)  # edges may have crossed
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1).abs(), (y2 - y1).abs()], dim=-1)

    group = torch.cat([place // (2 * most), place.new_full((num_queries,), -1)])
    blocked = (group[None] != -1) & (group[: len(place), None] != group[None])
    return Denoising(labels, boxes, blocked, matches)


def prepend_denoising(denoising, embedding, queries, boxes):
    """queries (B, Q, C), boxes (B, Q, 4) -> the same with the noisy copies in front, and an attention bias.

    denoising may be None; embedding: of K + 1 labels; the bias (D + Q, D + Q), or None, keeps groups apart.
    """
    if denoising is None:
        return queries, boxes, None
    copies, everything = denoising.blocked.shape
    blocked = torch.cat([denoising.blocked, denoising.blocked.new_zeros(everything - copies, everything)])
    blocked[copies:, :copies] = True
    bias = torch.zeros(blocked.shape, device=queries.device).masked_fill(blocked, -torch.inf)
    queries = torch.cat([embedding(denoising.labels).to(queries.dtype), queries], dim=1)
    return queries, torch.cat([denoising.boxes, boxes], dim=1), bias


def split_queries(outputs, count):
    """outputs of the layers, [{name: (B, Q, ...)}] -> those of the first `count` queries, and those of the rest."""
    first, rest = [], []
    for layer in outputs:
        parts = {key: value.split([count, value.shape[1] - count], dim=1) for key, value in layer.items()}
        first.append({key: part[0] for key, part in parts.items()})
        rest.append({key: part[1] for key, part in parts.items()})
    return first, rest
