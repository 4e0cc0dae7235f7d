"""DINO (arXiv 2203.03605): mixed query selection, contrastive denoising, look forward twice.

Its layers are Deformable DETR's (arXiv 2010.04159), with an encoder over four or five scales. Plain vision transformers
get ViTDet's simple pyramid (arXiv 2203.16527).

B images, N cells of all levels, Q queries, C channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_pyramid
from detr_loss import HungarianMatcher, PostProcess, SetCriterion
from layers import (
    ONE_ROW_EACH,
    DecoderLayer,
    Mlp,
    ProjectedDeformableAttention,
    box_embedding,
    gather_cells,
    in_float32,
    init_heads,
    make_cells,
    make_denoising,
    prepend_denoising,
    select_queries,
    sine_embedding,
    split_queries,
)

POINTS = 4  # sampled by each head on each level
TEMPERATURE = 20  # of the cells' position embedding
STRIDES = (4, 8, 16, 32, 64)  # five scales; four leave out the finest


class EncoderLayer(nn.Module):
    """Deformable self-attention among the cells of all levels, then feed-forward; each added, then normalised."""

    def __init__(self, dim, heads, ffn_dim, levels, dropout=0.0):
        super().__init__()
        self.self_attn = ProjectedDeformableAttention(dim, heads, [POINTS] * levels)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos, centres, sizes, valid_ratios, padding):
        """x, pos (B, N, C), centres (B, N, 2) of the cells -> (B, N, C); else see ProjectedDeformableAttention."""
        attended = self.self_attn(x + pos, centres, x, sizes, valid_ratios, padding)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DINO(nn.Module):
    """Backbone -> pyramid -> encoder -> the boxes of its `num_queries` best cells -> decoder layers that refine them.

    Outputs: those of the last layer; in training also `aux_outputs`, `enc` (the selection) and, with targets,
    `denoising`: the outputs of the noisy copies, and their `matches`.
    """

    def __init__(
        self,
        backbone,
        num_classes,
        num_queries=900,
        hidden_dim=256,
        num_heads=8,
        ffn_dim=2048,
        encoder_layers=6,
        decoder_layers=6,
        dropout=0.0,
        scales=4,
        num_denoising=100,
        pyramid="simple",
    ):
        super().__init__()
        self.num_queries, self.num_denoising = num_queries, num_denoising
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, STRIDES[-scales:], hidden_dim)
        self.input_proj = nn.ModuleList(nn.Identity() for _ in self.pyramid.channels)
        if set(self.pyramid.channels) != {hidden_dim}:  # the backbone's own maps
            for i, channels in enumerate(self.pyramid.channels):
                convolution = nn.Conv2d(channels, hidden_dim, 1)
                self.input_proj[i] = nn.Sequential(convolution, nn.GroupNorm(8, hidden_dim))
        levels = len(self.pyramid.strides)
        sizes = hidden_dim, num_heads, ffn_dim
        self.level_embed = nn.Parameter(torch.randn(levels, hidden_dim))
        self.encoder = nn.ModuleList(EncoderLayer(*sizes, levels, dropout) for _ in range(encoder_layers))
        self.enc_output, self.enc_output_norm = nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)
        self.enc_class_head, self.enc_box_head = nn.Linear(hidden_dim, num_classes), Mlp(hidden_dim, hidden_dim, 4, 3)
        self.content = nn.Embedding(num_queries, hidden_dim)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        self.query_pos = Mlp(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.decoder = nn.ModuleList()
        for _ in range(decoder_layers):
            attention = ProjectedDeformableAttention(hidden_dim, num_heads, [POINTS] * levels)
            self.decoder.append(DecoderLayer(*sizes, dropout, attention))
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(decoder_layers))
        self.box_heads = nn.ModuleList(Mlp(hidden_dim, hidden_dim, 4, 3) for _ in range(decoder_layers))
        init_heads([self.enc_class_head, *self.class_heads], [self.enc_box_head, *self.box_heads])

    def forward(self, images, mask, targets=None):
        maps = [project(level) for project, level in zip(self.input_proj, self.pyramid(self.backbone(images)))]
        sizes = [tuple(level.shape[-2:]) for level in maps]
        cells = make_cells(
            mask.to(images.device, non_blocking=True), sizes, self.pyramid.strides, border_is_padding=True
        )
        around = sizes, cells.valid_ratios, cells.padding
        memory = self.encode(maps, cells, around)

        tokens, anchors = self.propose(memory, cells, sizes)
        scores = in_float32(self.enc_class_head, tokens)
        best = select_queries(scores, cells.padding, self.num_queries)
        boxes = (in_float32(self.enc_box_head, gather_cells(tokens, best)) + gather_cells(anchors, best)).sigmoid()
        enc = {"pred_logits": gather_cells(scores, best), "pred_boxes": boxes}
        boxes, x = boxes.detach(), self.content.weight[: best.shape[1]].expand(images.shape[0], -1, -1)

        denoising = None
        if self.num_denoising and self.training and targets:
            denoising = make_denoising(targets, scores.shape[-1], x.shape[1], self.num_denoising)
        x, boxes, bias = prepend_denoising(denoising, self.denoising_class_embed, x, boxes)
        outputs = self.decode(x, boxes, memory, around, bias)
        if not self.training:
            return {**outputs[-1], "aux_outputs": []}
        copies, outputs = split_queries(outputs, x.shape[1] - best.shape[1])
        result = {**outputs[-1], "aux_outputs": outputs[:-1], "enc": enc}
        if denoising:
            result["denoising"] = {**copies[-1], "aux_outputs": copies[:-1], "matches": denoising.matches}
        return result

    def encode(self, maps, cells, around):
        """maps [(B, C, h, w)] -> the memory (B, N, C) of all levels; around: sizes, valid_ratios, padding."""
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        sizes = [level.shape[-2:] for level in maps]
        level_embed = torch.cat([row.expand(h * w, -1) for row, (h, w) in zip(self.level_embed, sizes)])
        pos = sine_embedding(cells.centres.flip(-1), memory.shape[-1] // 2, TEMPERATURE).flatten(2) + level_embed
        pos = pos.to(memory.dtype)
        for layer in self.encoder:
            memory = layer(memory, pos, cells.centres, *around)
        return memory

    def propose(self, memory, cells, sizes):
        """memory (B, N, C) -> tokens (B, N, C) and anchors (B, N, 4), logits of cxcywh.

        Cells in the padding or too near the border give no token and an infinite anchor.
        """
        sides = [torch.full((h * w,), 0.05 * 2**level, device=memory.device) for level, (h, w) in enumerate(sizes)]
        anchors = torch.cat([cells.centres, torch.cat(sides)[None, :, None].expand_as(cells.centres)], dim=-1)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True) & ~cells.padding[..., None]
        tokens = self.enc_output_norm(self.enc_output(memory.masked_fill(~valid, 0.0)))
        return tokens, anchors.logit().masked_fill(~valid, torch.inf)

    def decode(self, x, boxes, memory, around, bias):
        """x (B, Q, C), boxes (B, Q, 4), memory (B, N, C), bias of self-attention -> [outputs of each layer]."""
        outputs, previous = [], boxes
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads):
            query_pos = self.query_pos(box_embedding(boxes, x.shape[-1]).to(x.dtype))
            x = layer(x, query_pos, (boxes, memory, *around), bias)
            normed = self.norm(x)
            shift = in_float32(box_head, normed)
            # Look forward twice: a layer's loss also reaches the shift of the layer before it, but no further.
            refined = (shift + logit(previous)).sigmoid()
            outputs.append({"pred_logits": in_float32(class_head, normed), "pred_boxes": refined})
            previous = (shift + logit(boxes)).sigmoid()
            boxes = previous.detach()
        return outputs

    def class_layers(self):
        """The layers with rows for classes, see checkpoint.copy_classes."""
        return dict.fromkeys(("enc_class_head", "class_heads", "denoising_class_embed"), ONE_ROW_EACH)


def logit(boxes):
    """boxes (..., 4) in [0, 1] -> their logits, finite also at 0 and 1."""
    return boxes.clamp(1e-5, 1 - 1e-5).logit()


def build_dino(backbone, config):
    """-> model, criterion, postprocess; see detr_model.build_model."""
    keys = (
        "num_classes",
        "num_queries",
        "hidden_dim",
        "num_heads",
        "ffn_dim",
        "encoder_layers",
        "decoder_layers",
        "dropout",
        "scales",
        "num_denoising",
    )
    model = DINO(backbone, **{key: config[key] for key in keys}, pyramid=config["pyramid"] or "simple")
    matcher = HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    return model, SetCriterion(matcher, class_loss="focal"), PostProcess("focal")
