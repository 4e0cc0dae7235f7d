"""DETR: the published detector and the one this repository trains by default.

`DETR` is the model of arXiv 2005.12872. `PlainDETR` is a one-map deformable DETR (arXiv 2010.04159) without an encoder, whose
selection of queries is taught densely and keeps them apart; scores learn the quality of their box.

A detector is called as `model(images (B, 3, H, W), mask (B, H, W) True on padding)` and returns
`pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the unpadded picture, and `aux_outputs`, the same of
every earlier layer.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones import backbone_of, build_pyramid
from deformable import ProjectedDeformableAttention
from denoising import join, make_denoising, split_queries
from detr_loss import HungarianMatcher, PostProcess, SetCriterion, to_xyxy
from dino_model import build_dino
from ecdet_model import build_ecdet
from layers import ONE_ROW_EACH, Attention, Mlp, grid_embedding, in_float32, is_padded, padding_bias, sine_embedding, small_tensor, unpadded_size
from refinement import shift_boxes
from ssd_model import build_ssd

ANCHOR_CELLS = 4  # side of the boxes that the dense predictions start from
ATTENTION = "local", "global"
POINTS = 8  # that a head of local attention looks at
CANDIDATES = 1000  # cells among which doubles are looked for, at least as many as there are queries
ROUNDS = 5  # of looking for doubles, odd: so many boxes of a chain, each another's double, are told apart
LATER = 10**6  # more than there can be candidates


def build_model(config, load_weights=True):
    """config: a plain dict of values, as a run's config.json holds -> (model, criterion, postprocess).

    load_weights=False: the same network without the backbone's pretrained weights, for a checkpoint that brings all weights.
    """
    return DETECTORS[config["detector"]](backbone_of(config, load_weights), config)


def mask_coordinates(padding):
    """padding (B, H, W) -> y, x (B, H, W): DETR's coordinates, counted from 1 over what is not padding, the last being 1."""
    rows, columns = (~padding).cumsum(1).float(), (~padding).cumsum(2).float()
    return rows / (rows[:, -1:] + 1e-6), columns / (columns[:, :, -1:] + 1e-6)


def cell_coordinates(mask, size, stride):
    """Centres of a map's cells and the side of one, in units of the unpadded picture.

    mask (B, H, W) True on padding, which lies at the right and the bottom; size (h, w) of the map -> y (B, h), x (B, w),
    over 1 on padding, and cell (B, 2), width and height.
    """
    cell = stride / unpadded_size(mask)
    y, x = (torch.arange(n, device=mask.device) + 0.5 for n in size)
    return y * cell[:, 1:], x * cell[:, :1], cell


def beyond(centres):
    """centres (B, n) of a map's rows or columns -> (B, n), True on padding. The first never is: an image may be thinner than half
    a cell."""
    return torch.cat([torch.zeros_like(centres[:, :1], dtype=torch.bool), centres[:, 1:] > 1], dim=1)


class Neck(nn.Module):
    """Any backbone's maps -> one map of C channels at `stride`: projected, resized, summed, mixed by 3x3 convolutions.

    A backbone whose finest stride is coarser is upsampled twofold at most: beyond that there is nothing to see.
    """

    def __init__(self, channels, strides, dim, stride=8):
        super().__init__()
        used = [i for i, s in enumerate(strides) if s >= stride] or [len(strides) - 1]
        self.first = used[0]
        self.upsample = 2 if strides[self.first] > stride else 1
        self.stride = strides[self.first] // self.upsample
        self.projections = nn.ModuleList(nn.Conv2d(channels[i], dim, 1) for i in used)
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(),
                nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, features):
        features = features[self.first :]
        size = tuple(self.upsample * n for n in features[0].shape[-2:])
        x = 0
        for projection, feature in zip(self.projections, features):
            level = projection(feature)
            x = x + (level if level.shape[-2:] == size else F.interpolate(level, size, mode="bilinear", align_corners=False))
        for block in self.mix:
            x = x + block(x)
        return x


class EncoderLayer(nn.Module):
    """Self-attention among pixels, then feed-forward; each added, then normalised."""

    def __init__(self, dim, heads, ffn_dim, dropout=0.0):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos, bias=None):
        """x, pos (B, N, C), bias: see Attention -> (B, N, C)."""
        placed = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x, bias)))
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
        """x, query_pos (B, Q, C); memory: what the cross-attention takes after its query; bias, of the self-attention: see Attention -> (B, Q, C)."""
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, bias)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + query_pos, *memory)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


def init_as_published(layer):
    """Xavier over every matrix of a transformer layer, where query, key and value projections count as one of 3C rows, and
    attention without biases: what PyTorch's MultiheadAttention and the authors' code do together."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            together = re.search("[qkv]_proj", name) is not None
            nn.init.xavier_uniform_(parameter, gain=math.sqrt(0.5) if together else 1.0)
        elif "attn" in name:
            nn.init.zeros_(parameter)


class DETR(nn.Module):
    """DETR as published (arXiv 2005.12872): the backbone's coarsest map, 6 + 6 layers, learned queries, K classes and "no object"."""

    def __init__(self, backbone, num_classes, num_queries=100, hidden_dim=256, num_heads=8, ffn_dim=2048,
                 encoder_layers=6, decoder_layers=6, dropout=0.1, pyramid="own"):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, (32,), hidden_dim)
        self.input_proj = nn.Conv2d(self.pyramid.channels[-1], hidden_dim, 1)
        self.encoder = nn.ModuleList(EncoderLayer(hidden_dim, num_heads, ffn_dim, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, ffn_dim, dropout) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.query_pos = nn.Parameter(torch.randn(num_queries, hidden_dim))
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)
        self.box_head = Mlp(hidden_dim, hidden_dim, 4, 3)
        for layer in [*self.encoder, *self.decoder]:
            init_as_published(layer)

    def forward(self, images, mask, targets=None):
        padded, mask = is_padded(mask), mask.to(images.device, non_blocking=True)
        features = self.input_proj(self.pyramid(self.backbone(images))[-1])
        padding = F.interpolate(mask[:, None].float(), features.shape[-2:])[:, 0].bool()
        memory_pos = grid_embedding(*mask_coordinates(padding), features.shape[1]).to(features.dtype)
        memory = features.flatten(2).transpose(1, 2)
        bias = padding_bias(padding.flatten(1)) if padded else None
        # With dropout the attention among a ViT's thousands of tokens has no fused kernel on CPUs: it is recomputed, not kept.
        recompute = self.training and self.encoder[0].dropout.p > 0 and memory.device.type == "cpu"
        for layer in self.encoder:
            memory = checkpoint(layer, memory, memory_pos, bias, use_reentrant=False) if recompute else layer(memory, memory_pos, bias)
        query_pos = self.query_pos.expand(images.shape[0], -1, -1)
        queries = torch.zeros_like(query_pos)
        placed, outputs = memory + memory_pos, []
        for layer in self.decoder:
            queries = layer(queries, query_pos, (placed, memory, bias))
            x = self.norm(queries)
            outputs.append({"pred_logits": in_float32(self.class_head, x), "pred_boxes": in_float32(self.box_head, x).sigmoid()})
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def class_layers(self):
        """What of the state dict has a row for each class, see checkpoint.copy_classes."""
        return {"class_head": ONE_ROW_EACH}


def select_distinct(scores, boxes, padding, count, overlap):
    """The `count` best-scored boxes, where the doubles of better ones come after all others (DDQ, arXiv 2303.12776), and what is padding last.

    scores (B, N), boxes (B, N, 4) cxcywh, padding (B, N) with the lowest scores, overlap: IoU -> indices (B, count).
    """
    best = scores.topk(min(max(CANDIDATES, count), scores.shape[1]), dim=1).indices
    candidates = to_xyxy(boxes.gather(1, best[..., None].expand(-1, -1, 4)))
    pieces = [candidates]
    if boxes.device.type == "cpu" and not torch.compiler.is_exporting():  # as many images at a time as the cache holds pairs of
        pieces = candidates.split(max(1, 2**20 // best.shape[1] ** 2))
    double = torch.cat([is_double(piece, overlap) for piece in pieces]) | padding.gather(1, best)
    place = torch.arange(best.shape[1], dtype=torch.float32, device=best.device)
    return best.gather(1, (place + LATER * double).topk(count, dim=1, largest=False).indices)


def is_double(boxes, overlap):
    """boxes (B, M, 4) xyxy, best first -> (B, M), True where the IoU with a better one that is no double itself is over `overlap`.

    That is what a loop from the best to the worst would find. Here each round corrects the one before; after an odd number what is left
    of a longer chain counts as double.
    """
    low, high = boxes.mT.contiguous().unflatten(1, (2, 2)).unbind(1)  # (B, 2, M)
    pairs = torch.minimum(high[..., None], high[:, :, None]).sub_(torch.maximum(low[..., None], low[:, :, None])).clamp_(min=0)
    shared, area = pairs[:, 0].mul_(pairs[:, 1]), (high - low).prod(1) * (overlap / (1 + overlap))
    overlaps = (shared > area[..., None] + area[:, None]).tril(-1).float()
    double = overlaps.new_zeros(overlaps.shape[:2])
    for _ in range(ROUNDS):
        double = (overlaps @ (1 - double)[..., None] > 0)[..., 0].float()
    return double > 0


class PlainDETR(nn.Module):
    """The default detector: backbone -> one map -> Q queries selected from it -> decoder layers that look around their boxes and refine them.

    There is no transformer encoder: the backbone is one. The head that selects the queries predicts at every pixel and is
    taught as densely ("dense" in the outputs), which is what lets it learn from a few hundred images.

    attention: "local", POINTS samples a head around each query's box; "global", the whole map, as checkpoints of before
    December 2026 have it. distinct: IoU over which a box is another's double, see `select_distinct`; 0: none is. copies: see
    make_denoising; 0: none.
    """

    def __init__(self, backbone, num_classes, num_queries=300, hidden_dim=256, num_heads=8, ffn_dim=1024,
                 decoder_layers=3, dropout=0.0, pyramid="own", attention="local", distinct=0.7, copies=40):  # fmt: skip
        super().__init__()
        if attention not in ATTENTION or not 0 <= distinct < 1:
            raise ValueError(f"attention={attention}, distinct={distinct}: local or global; an IoU, or 0")
        self.num_queries, self.attention, self.distinct, self.copies = num_queries, attention, distinct, copies
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, (8, 16, 32), hidden_dim)
        self.neck = Neck(self.pyramid.channels, self.pyramid.strides, hidden_dim)
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.dense_class = nn.Linear(hidden_dim, num_classes)
        self.dense_box = Mlp(hidden_dim, hidden_dim, 4, 3)
        self.query_pos = Mlp(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes) if copies else None
        look = lambda: ProjectedDeformableAttention(hidden_dim, num_heads, [POINTS]) if attention == "local" else None
        self.layers = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, ffn_dim, dropout, look()) for _ in range(decoder_layers))
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(decoder_layers))
        self.box_heads = nn.ModuleList(Mlp(hidden_dim, hidden_dim, 4, 3) for _ in range(decoder_layers))
        for head in [self.dense_class, *self.class_heads]:
            nn.init.constant_(head.bias, -math.log(99))  # every score starts at 0.01 (focal loss, arXiv 1708.02002)
        for head in [self.dense_box, *self.box_heads]:  # every box starts as its anchor or as the layer before left it
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

    def forward(self, images, mask, targets=None):
        padded, mask = is_padded(mask), mask.to(images.device, non_blocking=True)
        features = self.neck(self.pyramid(self.backbone(images)))
        size = features.shape[-2:]
        y, x, cell = cell_coordinates(mask, size, self.neck.stride)
        padding = (beyond(y)[:, :, None] | beyond(x)[:, None, :]).flatten(1)
        memory = self.memory_norm(features.flatten(2).transpose(1, 2))

        dense = self.dense_predictions(memory, y, x, cell, padding)
        best = self.select(dense["pred_logits"].detach().amax(-1), dense["pred_boxes"].detach(), padding)[..., None]
        queries = memory.gather(1, best.expand(-1, -1, memory.shape[-1]))
        boxes = dense["pred_boxes"].gather(1, best.expand(-1, -1, 4))
        if self.attention == "local":
            share = 1 / (cell * small_tensor(size[::-1], cell.device))[:, None]
            looked_at = memory, [size], share, padding if padded else None
        else:
            placed = memory + grid_embedding(y[:, :, None].expand(-1, -1, size[1]), x[:, None].expand(-1, size[0], -1), memory.shape[-1]).to(memory.dtype)
            looked_at = placed, memory, padding_bias(padding) if padded else None
        noisy = make_denoising(targets, dense["pred_logits"].shape[-1], queries.shape[1], self.copies) if self.copies and self.training and targets else None
        queries, boxes, bias = join(noisy, self.denoising_class_embed, queries, boxes)
        outputs = []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            boxes = boxes.detach()  # each layer answers for its own refinement only
            query_pos = self.query_pos(sine_embedding(boxes[..., [1, 0, 3, 2]], memory.shape[-1] // 2).flatten(2))
            queries = layer(queries, query_pos, (boxes, *looked_at) if self.attention == "local" else looked_at, bias)
            boxes = shift_boxes(boxes, in_float32(box_head, queries))
            outputs.append({"pred_logits": in_float32(class_head, queries), "pred_boxes": boxes})
        of_copies, outputs = split_queries(outputs, queries.shape[1] - best.shape[1])
        found = {**outputs[-1], "aux_outputs": outputs[:-1], "dense": dense}
        if self.copies and self.training:
            found["denoising"] = noisy and {**of_copies[-1], "aux_outputs": of_copies[:-1], "matches": noisy.matches}
        return found

    def select(self, scores, boxes, padding):
        """scores and padding (B, N), boxes (B, N, 4) of the map's cells -> (B, Q): those that become queries."""
        count = min(self.num_queries, scores.shape[1])
        return select_distinct(scores, boxes, padding, count, self.distinct) if self.distinct else scores.topk(count, dim=1).indices

    def class_layers(self):
        """What of the state dict has a row for each class, see checkpoint.copy_classes."""
        return dict.fromkeys(("dense_class", "class_heads", "denoising_class_embed"), ONE_ROW_EACH)

    def dense_predictions(self, memory, y, x, cell, padding):
        """Class logits (B, N, K) and a box (B, N, 4) from every pixel of the memory (B, N, C); the padding scores nothing.

        Boxes start as anchors of a fixed number of cells, not of a share of the picture: how large an object is can be seen
        where it is, how large the picture is can not.
        """
        logits = in_float32(self.dense_class, memory).masked_fill(padding[..., None], -1e4)
        centre = torch.stack([x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=-1).flatten(1, 2)
        anchors = torch.cat([centre, (ANCHOR_CELLS * cell)[:, None].expand_as(centre)], dim=-1)
        boxes = shift_boxes(anchors, in_float32(self.dense_box, memory))
        return {"pred_logits": logits, "pred_boxes": boxes}


def build_detr(backbone, config):
    sizes = (config[key] for key in ("num_classes", "num_queries", "hidden_dim", "num_heads", "ffn_dim"))
    layers = config["decoder_layers"]
    model = DETR(backbone, *sizes, encoder_layers=layers, decoder_layers=layers, dropout=config["dropout"], pyramid=config.get("pyramid") or "own")
    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2, class_loss="softmax")
    return model, SetCriterion(matcher, class_loss="softmax", no_object_weight=0.1), PostProcess("softmax")


def build_plain_detr(backbone, config):
    sizes = (config[key] for key in ("num_classes", "num_queries", "hidden_dim", "num_heads", "ffn_dim"))
    model = PlainDETR(
        backbone, *sizes, decoder_layers=config["decoder_layers"], dropout=config["dropout"], pyramid=config.get("pyramid") or "own",
        attention=config["attention"], distinct=config["distinct"], copies=config["copies"] or 0,
    )  # fmt: skip
    matcher = HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    return model, SetCriterion(matcher, class_loss="quality"), PostProcess("quality")


DETECTORS = {"detr": build_plain_detr, "detr-2020": build_detr, "ecdet": build_ecdet, "dino": build_dino, "ssd": build_ssd}
