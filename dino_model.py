"""DINO (arXiv 2203.03605): a deformable encoder over four or five scales, mixed query selection, contrastive denoising, look forward twice.

Its layers are Deformable DETR's (arXiv 2010.04159). Over a plain vision transformer it stands on ViTDet's simple pyramid.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_pyramid
from deformable import ProjectedDeformableAttention
from denoising import join, make_denoising, split_queries
from detr_loss import HungarianMatcher, PostProcess, SetCriterion
from layers import ONE_ROW_EACH, Attention, Mlp, in_float32, sine_embedding, small_tensor, unpadded_size

POINTS = 4  # on each level
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

    def forward(self, x, pos, centres, sizes, share, padding):
        """x, pos (B, N, C), centres (B, N, 2) of the cells, sizes, share, padding: see ProjectedDeformableAttention -> (B, N, C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, centres, x, sizes, share, padding)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention around their boxes, feed-forward; each added, then normalised."""

    def __init__(self, dim, heads, ffn_dim, levels, dropout=0.0):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.cross_attn = ProjectedDeformableAttention(dim, heads, [POINTS] * levels)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, query_pos, boxes, memory, sizes, share, padding, bias=None):
        """x, query_pos (B, Q, C), boxes (B, Q, 4), memory (B, N, C), bias: see Attention, the rest as in the encoder -> (B, Q, C)."""
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, bias)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + query_pos, boxes, memory, sizes, share, padding)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DINO(nn.Module):
    """Backbone -> pyramid -> encoder -> the num_queries best of its cells as boxes -> decoder layers that refine them.

    Outputs: of the last layer; in training also `aux_outputs`, `enc` (the selection) and, with targets, `denoising`.
    """

    def __init__(self, backbone, num_classes, num_queries=900, hidden_dim=256, num_heads=8, ffn_dim=2048, encoder_layers=6,
                 decoder_layers=6, dropout=0.0, scales=4, copies=100, pyramid="simple"):  # fmt: skip
        super().__init__()
        self.num_queries, self.copies = num_queries, copies
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, STRIDES[-scales:], hidden_dim)
        if set(self.pyramid.channels) != {hidden_dim}:  # the backbone's own maps
            self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(c, hidden_dim, 1), nn.GroupNorm(8, hidden_dim)) for c in self.pyramid.channels)
        else:
            self.input_proj = nn.ModuleList(nn.Identity() for _ in self.pyramid.channels)
        levels = len(self.pyramid.strides)
        self.level_embed = nn.Parameter(torch.randn(levels, hidden_dim))
        self.encoder = nn.ModuleList(EncoderLayer(hidden_dim, num_heads, ffn_dim, levels, dropout) for _ in range(encoder_layers))
        self.enc_output, self.enc_output_norm = nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)
        self.enc_class_head, self.enc_box_head = nn.Linear(hidden_dim, num_classes), Mlp(hidden_dim, hidden_dim, 4, 3)
        self.content = nn.Embedding(num_queries, hidden_dim)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        self.query_pos = Mlp(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.decoder = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, ffn_dim, levels, dropout) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(decoder_layers))
        self.box_heads = nn.ModuleList(Mlp(hidden_dim, hidden_dim, 4, 3) for _ in range(decoder_layers))
        for head in [self.enc_class_head, *self.class_heads]:
            nn.init.constant_(head.bias, -math.log(99))  # every score starts at 0.01
        for head in [self.enc_box_head, *self.box_heads]:  # every box starts as it was
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

    def forward(self, images, mask, targets=None):
        maps = [project(level) for project, level in zip(self.input_proj, self.pyramid(self.backbone(images)))]
        sizes = [tuple(level.shape[-2:]) for level in maps]
        share, centres, sides, padding = cells(mask.to(images.device, non_blocking=True), sizes, self.pyramid.strides)
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        level_embed = torch.cat([row.expand(h * w, -1) for row, (h, w) in zip(self.level_embed, sizes)])
        pos = sine_embedding(centres[..., [1, 0]], memory.shape[-1] // 2, TEMPERATURE).flatten(2) + level_embed
        pos = pos.to(memory.dtype)
        around = sizes, share, padding
        for layer in self.encoder:
            memory = layer(memory, pos, centres, *around)

        tokens, anchors = self.proposals(memory, centres, sides, padding)
        scores = in_float32(self.enc_class_head, tokens)
        best = scores.detach().amax(-1).masked_fill(padding, -torch.inf).topk(min(self.num_queries, scores.shape[1]), dim=1).indices[..., None]
        pick = lambda x: x.gather(1, best.expand(-1, -1, x.shape[-1]))
        boxes = (in_float32(self.enc_box_head, pick(tokens)) + pick(anchors)).sigmoid()
        enc = {"pred_logits": pick(scores), "pred_boxes": boxes}
        boxes, x = boxes.detach(), self.content.weight[: best.shape[1]].expand(images.shape[0], -1, -1)

        noisy = make_denoising(targets, scores.shape[-1], x.shape[1], self.copies) if self.copies and self.training and targets else None
        x, boxes, bias = join(noisy, self.denoising_class_embed, x, boxes)
        outputs, before = [], boxes
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads):
            query_pos = self.query_pos(sine_embedding(boxes[..., [1, 0, 3, 2]], x.shape[-1] // 2).flatten(2).to(x.dtype))
            x = layer(x, query_pos, boxes, memory, *around, bias)
            normed = self.norm(x)
            shift = in_float32(box_head, normed)
            # Look forward twice: a layer's loss also reaches the shift of the layer before it, but no further.
            outputs.append({"pred_logits": in_float32(class_head, normed), "pred_boxes": (shift + logit(before)).sigmoid()})
            before = (shift + logit(boxes)).sigmoid()
            boxes = before.detach()
        if not self.training:
            return {**outputs[-1], "aux_outputs": []}
        of_copies, of_queries = split_queries(outputs, x.shape[1] - best.shape[1])
        found = {**of_queries[-1], "aux_outputs": of_queries[:-1], "enc": enc}
        if noisy:
            found["denoising"] = {**of_copies[-1], "aux_outputs": of_copies[:-1], "matches": noisy.matches}
        return found

    def class_layers(self):
        """What of the state dict has a row for each class, see checkpoint.copy_classes."""
        return dict.fromkeys(("enc_class_head", "class_heads", "denoising_class_embed"), ONE_ROW_EACH)

    def proposals(self, memory, centres, sides, padding):
        """memory (B, N, C), centres (B, N, 2), sides (N,) of the anchors -> tokens (B, N, C) and anchors (B, N, 4), logits of cxcywh.

        Cells in the padding or too near the border give no token and an infinite anchor.
        """
        anchors = torch.cat([centres, sides[None, :, None].expand(centres.shape[0], -1, 2)], dim=-1)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True) & ~padding[..., None]
        tokens = self.enc_output_norm(self.enc_output(memory.masked_fill(~valid, 0.0)))
        return tokens, anchors.logit().masked_fill(~valid, torch.inf)


def logit(boxes):
    return boxes.clamp(1e-5, 1 - 1e-5).logit()


def cells(mask, sizes, strides):
    """mask (B, H, W) True on padding, sizes [(h, w)] and strides of the levels, finest first -> share (B, L, 2) of each level's width
    and height that is no padding; centres (B, N, 2) x, y of all cells in units of the unpadded picture, and sides (N,) of their
    anchors; padding (B, N), where centres lie beyond it."""
    extents = small_tensor([[w * stride, h * stride] for (h, w), stride in zip(sizes, strides)], mask.device)
    share = unpadded_size(mask)[:, None] / extents
    centres, sides, first = [], [], []
    for level, (h, w) in enumerate(sizes):
        y, x = torch.meshgrid(*((torch.arange(n, device=mask.device) + 0.5) / n for n in (h, w)), indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).flatten(0, 1) / share[:, level, None])
        first.append(torch.stack([x < 1 / w, y < 1 / h], dim=-1).flatten(0, 1))
        sides.append(torch.full((h * w,), 0.05 * 2**level, device=mask.device))
    centres = torch.cat(centres, dim=1)
    padding = ((centres >= 1) & ~torch.cat(first)).any(-1)  # an image may be thinner than half a cell
    return share, centres, torch.cat(sides), padding


def build_dino(backbone, config):
    sizes = (config[key] for key in ("num_classes", "num_queries", "hidden_dim", "num_heads", "ffn_dim"))
    model = DINO(
        backbone, *sizes, encoder_layers=config["encoder_layers"], decoder_layers=config["decoder_layers"], dropout=config["dropout"],
        scales=config["scales"], copies=config["copies"], pyramid=config["pyramid"] or "simple",
    )  # fmt: skip
    matcher = HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    return model, SetCriterion(matcher, class_loss="focal"), PostProcess("focal")
