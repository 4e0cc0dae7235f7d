"""DETR: the published detector, and the one that this repository trains by default.

`DETR` is the model of arXiv 2005.12872. `PlainDETR` is a deformable DETR (arXiv 2010.04159) on one map and without an
encoder; its query selection is densely supervised and keeps queries distinct, its scores learn the quality of boxes.

A detector is called as `model(images (B, 3, H, W), mask (B, H, W) True on padding, targets=None)` and returns
`pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the image without padding, and `aux_outputs`, a list
of the same from every earlier layer.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones import backbone_of, build_pyramid
from detr_loss import HungarianMatcher, PostProcess, SetCriterion, to_xyxy
from dino_model import build_dino
from ecdet_model import build_ecdet
from layers import (
    ONE_ROW_EACH,
    DecoderLayer,
    EncoderLayer,
    Mlp,
    ProjectedDeformableAttention,
    box_embedding,
    gather_cells,
    grid_embedding,
    in_float32,
    init_heads,
    is_padded,
    make_cells,
    make_denoising,
    padding_bias,
    prepend_denoising,
    select_queries,
    shift_boxes,
    split_queries,
)
from ssd_model import build_ssd

ATTENTION = "local", "global"
ANCHOR_CELLS = 4  # side of the anchors that the dense predictions start from
POINTS = 8  # that each head of local attention samples
CANDIDATES = 1000  # the best cells, among which duplicates are looked for
ROUNDS = 5  # of looking for duplicates; has to be odd
LAST = 10**6  # rank of a duplicate, higher than any candidate's


def build_model(config, load_weights=True):
    """config: a dict of plain values, as in a run's config.json -> (model, criterion, postprocess).

    load_weights=False builds the same network without loading pretrained weights, for a checkpoint that has them all.
    """
    return DETECTORS[config["detector"]](backbone_of(config, load_weights), config)


# DETR as published


class DETR(nn.Module):
    """DETR (arXiv 2005.12872): the backbone's coarsest map, an encoder, learned queries, K classes and "no object"."""

    def __init__(
        self,
        backbone,
        num_classes,
        num_queries=100,
        hidden_dim=256,
        num_heads=8,
        ffn_dim=2048,
        encoder_layers=6,
        decoder_layers=6,
        dropout=0.1,
        pyramid="own",
    ):
        super().__init__()
        sizes = hidden_dim, num_heads, ffn_dim, dropout
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, (32,), hidden_dim)
        self.input_proj = nn.Conv2d(self.pyramid.channels[-1], hidden_dim, 1)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_layers))
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
        for layer in self.encoder:
            if self.training and layer.dropout.p > 0 and memory.device.type == "cpu":
                # CPUs have no fused attention with dropout: the scores of a ViT's thousands of tokens are recomputed.
                memory = checkpoint(layer, memory, memory_pos, bias, use_reentrant=False)
            else:
                memory = layer(memory, memory_pos, bias)
        query_pos = self.query_pos.expand(images.shape[0], -1, -1)
        queries = torch.zeros_like(query_pos)
        keys, outputs = memory + memory_pos, []
        for layer in self.decoder:
            queries = layer(queries, query_pos, (keys, memory, bias))
            x = self.norm(queries)
            boxes = in_float32(self.box_head, x).sigmoid()
            outputs.append({"pred_logits": in_float32(self.class_head, x), "pred_boxes": boxes})
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def class_layers(self):
        """The layers with rows for classes, see checkpoint.copy_classes."""
        return {"class_head": ONE_ROW_EACH}


def mask_coordinates(padding):
    """padding (B, H, W) -> y, x (B, H, W): DETR's coordinates, counted from 1 up to the padding, then divided by it."""
    rows, columns = (~padding).cumsum(1).float(), (~padding).cumsum(2).float()
    return rows / (rows[:, -1:] + 1e-6), columns / (columns[:, :, -1:] + 1e-6)


def init_as_published(layer):
    """Xavier for every matrix of a transformer layer, zeros for the biases of attention.

    Query, key and value projections count as one matrix of 3C rows, as in PyTorch's MultiheadAttention.
    """
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            stacked = re.search("[qkv]_proj", name) is not None
            nn.init.xavier_uniform_(parameter, gain=math.sqrt(0.5) if stacked else 1.0)
        elif "attn" in name:
            nn.init.zeros_(parameter)


def build_detr(backbone, config):
    model = DETR(
        backbone,
        **model_sizes(config),
        encoder_layers=config["decoder_layers"],
    )
    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2, class_loss="softmax")
    return model, SetCriterion(matcher, class_loss="softmax", no_object_weight=0.1), PostProcess("softmax")


def model_sizes(config):
    """The arguments that DETR and PlainDETR have in common."""
    keys = "num_classes", "num_queries", "hidden_dim", "num_heads", "ffn_dim", "decoder_layers", "dropout"
    return {key: config[key] for key in keys} | {"pyramid": config.get("pyramid") or "own"}


# The default detector


class Neck(nn.Module):
    """Any backbone's maps -> one map of `dim` channels at `stride`: projected, resized, summed, mixed by convolutions.

    If the backbone's finest stride is coarser, it is upsampled twofold at most: there is nothing more to see.
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
                nn.GroupNorm(8, dim),
                nn.Conv2d(dim, dim, 3, padding=1),
                nn.GELU(),
                nn.GroupNorm(8, dim),
                nn.Conv2d(dim, dim, 3, padding=1),
            )
            for _ in range(2)
        )

    def forward(self, features):
        features = features[self.first :]
        size = tuple(self.upsample * n for n in features[0].shape[-2:])
        x = 0
        for projection, feature in zip(self.projections, features):
            level = projection(feature)
            if level.shape[-2:] != size:
                level = F.interpolate(level, size, mode="bilinear", align_corners=False)
            x = x + level
        for block in self.mix:
            x = x + block(x)
        return x


class PlainDETR(nn.Module):
    """The default detector: backbone -> one map -> queries selected from it -> decoder layers that refine their boxes.

    There is no encoder: the backbone is one. The head that selects queries predicts at every cell and is supervised as
    densely ("dense" in the outputs), which is what lets it learn from a few hundred images.

    attention: "local", POINTS samples a head around each query's box, or "global", the whole map, as in checkpoints
    from before December 2026. distinct: the IoU above which a box is a duplicate, see `select_distinct`; 0: none is.
    num_denoising: see make_denoising; 0: none.
    """

    def __init__(
        self,
        backbone,
        num_classes,
        num_queries=300,
        hidden_dim=256,
        num_heads=8,
        ffn_dim=1024,
        decoder_layers=3,
        dropout=0.0,
        pyramid="own",
        attention="local",
        distinct=0.7,
        num_denoising=40,
    ):
        super().__init__()
        if attention not in ATTENTION or not 0 <= distinct < 1:
            raise ValueError(f"attention={attention}, distinct={distinct}: has to be local or global; an IoU, or 0")
        self.num_queries, self.attention, self.distinct = num_queries, attention, distinct
        self.num_denoising = num_denoising
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, (8, 16, 32), hidden_dim)
        self.neck = Neck(self.pyramid.channels, self.pyramid.strides, hidden_dim)
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.dense_class = nn.Linear(hidden_dim, num_classes)
        self.dense_box = Mlp(hidden_dim, hidden_dim, 4, 3)
        self.query_pos = Mlp(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.denoising_class_embed = None
        if num_denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        self.layers = nn.ModuleList()
        for _ in range(decoder_layers):
            local = ProjectedDeformableAttention(hidden_dim, num_heads, [POINTS]) if attention == "local" else None
            self.layers.append(DecoderLayer(hidden_dim, num_heads, ffn_dim, dropout, local))
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(decoder_layers))
        self.box_heads = nn.ModuleList(Mlp(hidden_dim, hidden_dim, 4, 3) for _ in range(decoder_layers))
        init_heads([self.dense_class, *self.class_heads], [self.dense_box, *self.box_heads])

    def forward(self, images, mask, targets=None):
        """-> the outputs of a detector, and "dense", those of every cell; in training also "denoising", those of the
        noisy copies with their `matches`, or None if there is no object."""
        padded, mask = is_padded(mask), mask.to(images.device, non_blocking=True)
        features = self.neck(self.pyramid(self.backbone(images)))
        size = tuple(features.shape[-2:])
        cells = make_cells(mask, [size], [self.neck.stride])
        memory = self.memory_norm(features.flatten(2).transpose(1, 2))

        dense = self.predict_densely(memory, cells)
        best = self.select(dense, cells.padding)
        queries, boxes = gather_cells(memory, best), gather_cells(dense["pred_boxes"], best)
        denoising = None
        if self.num_denoising and self.training and targets:
            denoising = make_denoising(targets, dense["pred_logits"].shape[-1], best.shape[1], self.num_denoising)
        queries, boxes, bias = prepend_denoising(denoising, self.denoising_class_embed, queries, boxes)

        outputs, context = [], self.attended(memory, size, cells, padded)
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            boxes = boxes.detach()  # each layer answers for its own refinement only
            query_pos = self.query_pos(box_embedding(boxes, memory.shape[-1]))
            around = (boxes, *context) if self.attention == "local" else context
            queries = layer(queries, query_pos, around, bias)
            boxes = shift_boxes(boxes, in_float32(box_head, queries))
            outputs.append({"pred_logits": in_float32(class_head, queries), "pred_boxes": boxes})

        copies, outputs = split_queries(outputs, queries.shape[1] - best.shape[1])
        result = {**outputs[-1], "aux_outputs": outputs[:-1], "dense": dense}
        if self.num_denoising and self.training:
            result["denoising"] = None
            if denoising:
                result["denoising"] = {**copies[-1], "aux_outputs": copies[:-1], "matches": denoising.matches}
        return result

    def predict_densely(self, memory, cells):
        """memory (B, N, C) -> class logits (B, N, K) and boxes (B, N, 4) of all cells; the padding scores nothing.

        Anchors are a number of cells, not a fraction of the image: how large an object is can be seen where it is, how
        large the image is can not.
        """
        logits = in_float32(self.dense_class, memory).masked_fill(cells.padding[..., None], -1e4)
        anchors = torch.cat([cells.centres, ANCHOR_CELLS * cells.sizes], dim=-1)
        return {"pred_logits": logits, "pred_boxes": shift_boxes(anchors, in_float32(self.dense_box, memory))}

    def select(self, dense, padding):
        """The dense predictions -> indices (B, Q) of the cells that become queries."""
        logits, boxes = dense["pred_logits"].detach(), dense["pred_boxes"].detach()
        if not self.distinct:
            return select_queries(logits, padding, self.num_queries)
        count = min(self.num_queries, logits.shape[1])
        return select_distinct(logits.amax(-1), boxes, padding, count, self.distinct)

    def attended(self, memory, size, cells, padded):
        """What the decoder's cross-attention takes after its queries and, if it is local, their boxes."""
        if self.attention == "local":
            return memory, [size], cells.valid_ratios, cells.padding if padded else None
        x, y = cells.centres.unflatten(1, size).unbind(-1)
        keys = memory + grid_embedding(y, x, memory.shape[-1]).to(memory.dtype)
        return keys, memory, padding_bias(cells.padding) if padded else None

    def class_layers(self):
        """The layers with rows for classes, see checkpoint.copy_classes."""
        return dict.fromkeys(("dense_class", "class_heads", "denoising_class_embed"), ONE_ROW_EACH)


def select_distinct(scores, boxes, padding, count, overlap):
    """The best boxes that are not duplicates of better ones (DDQ, arXiv 2303.12776), then the duplicates, then padding.

    scores (B, N), boxes (B, N, 4) cxcywh, padding (B, N), which has the lowest scores; overlap: the IoU above which a
    box is a duplicate -> indices (B, count).
    """
    best = scores.topk(min(max(CANDIDATES, count), scores.shape[1]), dim=1).indices
    candidates = to_xyxy(gather_cells(boxes, best))
    chunks = [candidates]
    if (
        boxes.device.type == "cpu" and not torch.compiler.is_exporting()
    ):  # as many images as pairs of boxes fit the cache
        chunks = candidates.split(max(1, 2**20 // best.shape[1] ** 2))
    duplicate = torch.cat([is_duplicate(chunk, overlap) for chunk in chunks]) | padding.gather(1, best)
    rank = torch.arange(best.shape[1], dtype=torch.float32, device=best.device)
    return best.gather(1, (rank + LAST * duplicate).topk(count, dim=1, largest=False).indices)


def is_duplicate(boxes, overlap):
    """boxes (B, M, 4) xyxy, best first -> (B, M): whether a better box, none itself, overlaps by `overlap` (IoU).

    That is what a loop from the best to the worst would find. Here every round corrects the one before; after an odd
    number of rounds, whatever is left of a longer chain counts as a duplicate.
    """
    low, high = boxes.mT.contiguous().unflatten(1, (2, 2)).unbind(1)  # (B, 2, M)
    starts, ends = torch.maximum(low[..., None], low[:, :, None]), torch.minimum(high[..., None], high[:, :, None])
    sides = ends.sub_(starts).clamp_(min=0)
    intersection, area = sides[:, 0].mul_(sides[:, 1]), (high - low).prod(1) * (overlap / (1 + overlap))
    overlaps = (intersection > area[..., None] + area[:, None]).tril(-1).float()
    duplicate = overlaps.new_zeros(overlaps.shape[:2])
    for _ in range(ROUNDS):
        duplicate = (overlaps @ (1 - duplicate)[..., None] > 0)[..., 0].float()
    return duplicate > 0


def build_plain_detr(backbone, config):
    extra = {key: config[key] for key in ("attention", "distinct")}
    model = PlainDETR(backbone, **model_sizes(config), **extra, num_denoising=config["num_denoising"] or 0)
    matcher = HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    return model, SetCriterion(matcher, class_loss="quality"), PostProcess("quality")


DETECTORS = {
    "detr": build_plain_detr,
    "detr-2020": build_detr,
    "ecdet": build_ecdet,
    "dino": build_dino,
    "ssd": build_ssd,
}
