"""DETR: positions, attention, the published detector and the one this repository trains by default.

`DETR` is the model of arXiv 2005.12872. `PlainDETR` keeps its shape (one map, global attention, no anchors by hand, no
NMS) and adds what made its successors converge: queries selected from the memory, boxes refined by every layer, and
cross-attention that knows where each pixel lies relative to the query's box.

A detector is called as `model(images (B, 3, H, W), mask (B, H, W) True on padding)` and returns
`pred_logits` (B, Q, K), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the unpadded picture, and `aux_outputs`, the same of
every earlier layer.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_backbone
from detr_loss import DenseCriterion, HungarianMatcher, PostProcess, SetCriterion


def build_model(config):
    """config: a plain dict of values, as a run's config.json holds -> (model, criterion, postprocess)."""
    return DETECTORS[config["detector"]](config)


def inverse_sigmoid(x, eps=1e-4):
    x = x.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x))


def valid_extent(mask):
    """mask (B, H, W) True on padding at the right and the bottom -> heights, widths (B,) of what is not padding."""
    valid = ~mask
    return valid.any(2).sum(1), valid.any(1).sum(1)


def sine_embedding(positions, dim, temperature=10000):
    """positions (..., ) in [0, 1] -> (..., dim): interleaved sines and cosines of 2 pi position, as in DETR."""
    index = torch.arange(dim, device=positions.device) // 2
    angles = positions[..., None] * (2 * math.pi) / temperature ** (2 * index / dim)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


class Mlp(nn.Module):
    """`layers` linear layers with ReLU between them."""

    def __init__(self, in_dim, hidden_dim, out_dim, layers):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention; bias (broadcastable to (B, heads, Q, N)) is added to the scores."""

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


class Neck(nn.Module):
    """Any backbone's maps -> one map of C channels at `stride`: projected, resized, summed, mixed by two 3x3 convolutions.

    A backbone whose finest stride is coarser is upsampled twofold at most: beyond that there is nothing to see.
    """

    def __init__(self, channels, strides, dim, stride=8):
        super().__init__()
        used = [i for i, s in enumerate(strides) if s >= stride] or [len(strides) - 1]
        self.first = used[0]
        self.upsample = 2 if strides[self.first] > stride else 1
        self.stride = strides[self.first] // self.upsample
        self.projections = nn.ModuleList(nn.Conv2d(channels[i], dim, 1) for i in used)
        self.mix = nn.Sequential(
            nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(),
            nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1),
        )  # fmt: skip

    def forward(self, features):
        features = features[self.first :]
        size = tuple(self.upsample * n for n in features[0].shape[-2:])
        x = 0
        for projection, feature in zip(self.projections, features):
            level = projection(feature)
            x = x + (level if level.shape[-2:] == size else F.interpolate(level, size, mode="bilinear", align_corners=False))
        return x + self.mix(x)


class BoxPositionBias(nn.Module):
    """What a pixel's place relative to a query's box adds to their attention score, per head (Plain-DETR's BoxRPE,
    arXiv 2308.01904): one small network for the horizontal and one for the vertical offset, measured in box sizes."""

    def __init__(self, heads, hidden_dim=64):
        super().__init__()
        self.x_axis = Mlp(2, hidden_dim, heads, 2)
        self.y_axis = Mlp(2, hidden_dim, heads, 2)

    def forward(self, boxes, x, y):
        """boxes (B, Q, 4) cxcywh, x (B, W) and y (B, H) pixel centres in the boxes' units -> (B, heads, Q, H * W)."""
        cx, cy, w, h = boxes.float().clamp(min=1e-3).unbind(-1)
        bias_x = self.x_axis(self.offsets(x, cx, w)).permute(0, 3, 1, 2)[:, :, :, None, :]
        bias_y = self.y_axis(self.offsets(y, cy, h)).permute(0, 3, 1, 2)[:, :, :, :, None]
        return (bias_x + bias_y).flatten(3)

    @staticmethod
    def offsets(pixels, centres, sizes):
        """-> (B, Q, pixels, 2): the signed logarithm of the offset in box sizes, and the logarithm of the size."""
        offset = 4 * (pixels[:, None, :] - centres[:, :, None]) / sizes[:, :, None]
        return torch.stack([offset.sign() * offset.abs().log1p(), sizes.log()[:, :, None].expand_as(offset)], dim=-1)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward; each added, then normalised."""

    def __init__(self, dim, heads, ffn_dim, dropout=0.0):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.cross_attn = Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, query_pos, memory, memory_pos, bias=None):
        """x, query_pos (B, Q, C), memory, memory_pos (B, N, C), bias: see Attention -> (B, Q, C)."""
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + query_pos, memory + memory_pos, memory, bias)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class PlainDETR(nn.Module):
    """The default detector: backbone -> one map -> Q queries selected from it -> decoder layers that refine their boxes.

    There is no transformer encoder: the backbone is one. In training the head that selects the queries is itself taught
    on every pixel ("dense"), several pixels to an object, which is what lets it learn from a few hundred pictures.
    """

    def __init__(self, backbone, num_classes, num_queries=300, hidden_dim=256, num_heads=8, ffn_dim=1024,
                 decoder_layers=3, dropout=0.0, cross="rpe"):  # fmt: skip
        super().__init__()
        self.num_queries = num_queries
        self.cross = cross
        self.backbone = backbone
        self.neck = Neck(backbone.channels, backbone.strides, hidden_dim)
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.dense_class = nn.Linear(hidden_dim, num_classes)
        self.dense_box = Mlp(hidden_dim, hidden_dim, 4, 3)
        self.query_pos = Mlp(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        if cross == "rpe": self.position_bias = nn.ModuleList(BoxPositionBias(num_heads) for _ in range(decoder_layers))
        self.layers = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, ffn_dim, dropout) for _ in range(decoder_layers))
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(decoder_layers))
        self.box_heads = nn.ModuleList(Mlp(hidden_dim, hidden_dim, 4, 3) for _ in range(decoder_layers))
        for head in [self.dense_class, *self.class_heads]:
            nn.init.constant_(head.bias, -math.log(99))  # every score starts at 0.01 (focal loss, arXiv 1708.02002)
        for head in [self.dense_box, *self.box_heads]:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

    def forward(self, images, mask, targets=None):
        features = self.neck(self.backbone(images))
        h, w = features.shape[-2:]
        memory = self.memory_norm(features.flatten(2).transpose(1, 2))
        heights, widths = valid_extent(mask)
        y = (torch.arange(h, device=mask.device) + 0.5) / h * mask.shape[1] / heights[:, None]
        x = (torch.arange(w, device=mask.device) + 0.5) / w * mask.shape[2] / widths[:, None]
        padding = ((y > 1)[:, :, None] | (x > 1)[:, None, :]).flatten(1)

        dense = self.dense_predictions(memory, x, y, padding)
        scores = dense["pred_logits"].detach().amax(-1).float()
        top = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices[..., None]
        queries = memory.gather(1, top.expand(-1, -1, memory.shape[-1]))
        boxes = dense["pred_boxes"].detach().gather(1, top.expand(-1, -1, 4))

        dim = memory.shape[-1] // 2
        grid_y = sine_embedding(y, dim)[:, :, None].expand(-1, h, w, -1)
        grid_x = sine_embedding(x, dim)[:, None].expand(-1, h, w, -1)
        memory_pos = torch.cat([grid_y, grid_x], dim=-1).flatten(1, 2).to(memory.dtype)
        outputs = []
        for i, layer in enumerate(self.layers):
            boxes = boxes.detach()
            query_pos = self.query_pos(sine_embedding(boxes[..., [1, 0, 3, 2]], dim).flatten(2))
            bias = torch.zeros(1, device=boxes.device)
            if self.cross == "rpe":
                bias = self.position_bias[i](boxes, x, y)
            bias = bias.masked_fill(padding[:, None, None], -torch.inf) if padding.any() else (bias if self.cross == "rpe" else None)
            queries = layer(queries, query_pos, memory, memory_pos, bias)
            boxes = (self.box_heads[i](queries).float() + inverse_sigmoid(boxes)).sigmoid()
            outputs.append({"pred_logits": self.class_heads[i](queries).float(), "pred_boxes": boxes})
        return {**outputs[-1], "aux_outputs": outputs[:-1], "dense": dense}

    def dense_predictions(self, memory, x, y, padding):
        """Class logits and a box from every pixel of the memory (B, N, C); pixels of the padding score nothing."""
        logits = self.dense_class(memory).float().masked_fill(padding[..., None], -1e4)
        b, h, w = len(y), y.shape[1], x.shape[1]
        centre = torch.stack([x[:, None].expand(b, h, w), y[:, :, None].expand(b, h, w)], dim=-1).flatten(1, 2)
        anchors = torch.cat([centre, torch.full_like(centre, 0.1)], dim=-1)
        boxes = (self.dense_box(memory).float() + inverse_sigmoid(anchors)).sigmoid()
        return {"pred_logits": logits, "pred_boxes": boxes}


def build_plain_detr(config):
    backbone = build_backbone(config["backbone"], config["backbone_weights"])
    model = PlainDETR(
        backbone, config["num_classes"], config["num_queries"], config["hidden_dim"], config["num_heads"],
        config["ffn_dim"], config["decoder_layers"], config["dropout"], config.get("cross", "rpe"),
    )  # fmt: skip
    matcher = HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = SetCriterion(matcher, class_loss=config.get("class_loss", "mal"), weights=dict(cls=1, bbox=5, giou=2), dense=DenseCriterion(config.get("dense_k", 4)))
    return model, criterion, PostProcess("sigmoid")


DETECTORS = {"detr": build_plain_detr}
