"""ECDet (arXiv 2603.18739): hybrid encoder, query selection, and a deformable decoder that refines edge distributions.

Module names follow the released files, so `ecdet_s.pth` and its sisters load as they are. The decoder is D-FINE's (arXiv
2410.13842) without value and output projections in its deformable attention, and with gates for residuals around it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_pyramid
from deformable import DeformableAttention
from denoising import make_denoising, split_queries
from detr_loss import HungarianMatcher, PostProcess
from ecdet_loss import RefinementCriterion
from ecvit import ConvNorm
from errors import UserError
from layers import ONE_ROW_EACH, Mlp, in_float32, small_tensor, unpadded_size
from refinement import REG_MAX, corners_to_boxes, shift_boxes

HEADS, POINTS = 8, (3, 6, 3)  # sampling points on each level
TOP_BINS = 4  # of an edge's distribution, as evidence of its quality


class ConvNormAct(ConvNorm):
    """Convolution, batch normalisation, SiLU."""

    def forward(self, x):
        return F.silu(super().forward(x))


class RepVgg(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, each normalised; SiLU of their sum (arXiv 2101.03697)."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 1)

    def forward(self, x):
        return F.silu(self.conv1(x) if self.conv2 is None else self.conv1(x) + self.conv2(x))

    @torch.no_grad()
    def fold(self):
        """One 3x3 convolution in place of both: the 1x1 is its centre."""
        if self.conv2 is None:
            return
        self.conv1.fold()
        self.conv2.fold()
        self.conv1.conv.weight += F.pad(self.conv2.conv.weight, (1, 1, 1, 1))
        self.conv1.conv.bias += self.conv2.conv.bias
        self.conv2 = None


class CspStage(nn.Module):
    """Half of the channels pass by, half go through `depth` RepVGG blocks; the two are added."""

    def __init__(self, in_dim, dim, depth):
        super().__init__()
        self.conv1 = ConvNormAct(in_dim, 2 * dim, 1)
        self.bottlenecks = nn.Sequential(*(RepVgg(dim) for _ in range(depth)))

    def forward(self, x):
        past, through = self.conv1(x).chunk(2, dim=1)
        return past + self.bottlenecks(through)


class FuseBlock(nn.Module):
    """What mixes a level of the pyramid after its neighbour was added: (B, C, H, W) -> the same."""

    def __init__(self, dim, expansion, depth):
        super().__init__()
        inner = round(expansion * dim // 2)
        self.cv1 = ConvNormAct(dim, 2 * dim, 1)
        self.cv2 = nn.Sequential(CspStage(dim, inner, depth))
        self.cv3 = nn.Sequential(CspStage(inner, inner, depth))
        self.cv4 = ConvNormAct(2 * (dim + inner), dim, 1)

    def forward(self, x):
        pieces = list(self.cv1(x).chunk(2, dim=1))
        pieces.append(self.cv2(pieces[-1]))
        pieces.append(self.cv3(pieces[-1]))
        return self.cv4(torch.cat(pieces, dim=1))


class Downsample(nn.Module):
    """1x1 over channels, then 3x3 of stride 2 in each channel."""

    def __init__(self, dim):
        super().__init__()
        self.cv1, self.cv2 = ConvNorm(dim, dim, 1), ConvNorm(dim, dim, 3, stride=2, groups=dim)

    def forward(self, x):
        return self.cv2(self.cv1(x))


class SelfAttention(nn.Module):
    """Multi-head attention of x (B, N, C) in itself; pos is added to queries and keys, not to values.

    With a bias (D, N), the first D of x are noisy copies: the bias is added to their scores, and the others do not see them.
    """

    def __init__(self, dim):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * dim, dim)), nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, pos, bias=None):
        dim = x.shape[-1]
        (w_qk, w_v), (b_qk, b_v) = (parameter.split([2 * dim, dim]) for parameter in (self.in_proj_weight, self.in_proj_bias))
        q, k = F.linear(x + pos, w_qk, b_qk).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        v = F.linear(x, w_v, b_v).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if bias is None:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            copies = len(bias)
            of_copies = F.scaled_dot_product_attention(q[:, :, :copies], k, v, attn_mask=bias.to(q.dtype))
            x = torch.cat([of_copies, F.scaled_dot_product_attention(*(part[:, :, copies:] for part in (q, k, v)))], dim=2)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward among the cells of one level; each added, then normalised."""

    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.self_attn = SelfAttention(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, pos):
        x = self.norm1(x + self.self_attn(x, pos))
        return self.norm2(x + self.linear2(F.silu(self.linear1(x))))


def position_embedding(h, w, dim, device=None):
    """Sines and cosines of x, then of y -> (h * w, dim). Its rows run with x as the outer axis although the tokens that they
    are added to run with y outermost: the released weights were trained so, and on square maps it makes no difference to
    what can be learnt."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    grid = torch.meshgrid(torch.arange(w, device=device), torch.arange(h, device=device), indexing="ij")
    x, y = (axis.reshape(-1, 1) * frequency for axis in grid)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class HybridEncoder(nn.Module):
    """Maps at strides 8, 16, 32, all of width C -> the same, mixed: attention on the coarsest, then down and up the pyramid."""

    def __init__(self, dim, ffn_dim, expansion, depth, levels=3):
        super().__init__()
        layer = nn.Module()
        layer.layers = nn.ModuleList([EncoderLayer(dim, ffn_dim)])
        self.encoder = nn.ModuleList([layer])
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, 1) for _ in range(levels - 1))
        self.fpn_blocks = nn.ModuleList(FuseBlock(dim, expansion, depth) for _ in range(levels - 1))
        self.downsample_convs = nn.ModuleList(nn.Sequential(Downsample(dim)) for _ in range(levels - 1))
        self.pan_blocks = nn.ModuleList(FuseBlock(dim, expansion, depth) for _ in range(levels - 1))

    def forward(self, maps):
        x = maps[-1]
        pos = position_embedding(*x.shape[-2:], x.shape[1], x.device).to(x.dtype)
        tokens = self.encoder[0].layers[0](x.flatten(2).transpose(1, 2), pos)
        x = tokens.transpose(1, 2).unflatten(2, x.shape[-2:])
        waiting = []
        for lateral, fuse, finer in zip(self.lateral_convs, self.fpn_blocks, maps[-2::-1]):
            waiting.append(lateral(x))
            x = fuse(F.interpolate(waiting[-1], scale_factor=2.0, mode="nearest") + finer)
        levels = [x]
        for downsample, fuse, coarser in zip(self.downsample_convs, self.pan_blocks, waiting[::-1]):
            levels.append(fuse(downsample(levels[-1]) + coarser))
        return levels


class Gateway(nn.Module):
    """Two gates in place of a residual: how much of the old, how much of the new."""

    def __init__(self, dim):
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, old, new):
        a, b = self.gate(torch.cat([old, new], dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(a * old + b * new)


class DecoderLayer(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.self_attn = SelfAttention(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, HEADS, POINTS)
        self.gateway = Gateway(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, pos, boxes, levels, bias=None):
        """x, pos (B, Q, C), boxes (B, Q, 4), levels: maps (B, C, h, w), bias: see SelfAttention -> (B, Q, C)."""
        x = self.norm1(x + self.self_attn(x, pos, bias))
        x = self.gateway(x, self.cross_attn(x + pos, boxes, levels))
        y = self.linear2(F.silu(self.linear1(x)))
        return self.norm2((x + y).clamp(-65504, 65504))  # float16's range


class LocationQuality(nn.Module):
    """Adds to the scores what the sharpness of the edges' distributions says about the box."""

    def __init__(self):
        super().__init__()
        self.reg_conf = Mlp(4 * (TOP_BINS + 1), 64, 1, 2, F.silu)
        nn.init.zeros_(self.reg_conf.layers[-1].weight)
        nn.init.zeros_(self.reg_conf.layers[-1].bias)

    def forward(self, scores, corners):
        top = corners.unflatten(-1, (4, REG_MAX + 1)).softmax(-1).topk(TOP_BINS, dim=-1).values
        return scores + in_float32(self.reg_conf, torch.cat([top, top.mean(-1, keepdim=True)], dim=-1).flatten(-2))


class RefinementLayers(nn.Module):
    """The decoder's layers and the quality estimators, in the place where the released files have them."""

    def __init__(self, dim, ffn_dim, layers, distributions):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, ffn_dim) for _ in range(layers))
        self.lqe_layers = nn.ModuleList(LocationQuality() for _ in range(layers if distributions else 0))


class Decoder(nn.Module):
    """Selects queries from the memory and refines their boxes, layer by layer: as distributions over each edge's distance, or,
    without `distributions`, by shifts in the box's own size. copies: see make_denoising."""

    def __init__(self, dim, ffn_dim, num_classes, num_queries=300, layers=4, copies=100, distributions=True):
        super().__init__()
        self.num_queries, self.copies, self.distributions = num_queries, copies, distributions
        self.decoder = RefinementLayers(dim, ffn_dim, layers, distributions)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = Mlp(dim, dim, 4, 3, F.silu)
        self.query_pos_head = Mlp(4, dim, dim, 3, F.silu)
        self.pre_bbox_head = Mlp(dim, dim, 4, 3, F.silu)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(layers))
        self.dec_bbox_head = nn.ModuleList(Mlp(dim, dim, 4 * (REG_MAX + 1) if distributions else 4, 3, F.silu) for _ in range(layers))
        for head in [self.enc_score_head, *self.dec_score_head]:
            nn.init.constant_(head.bias, -math.log(99))  # every score starts at 0.01
        for head in [self.enc_bbox_head, self.pre_bbox_head, *self.dec_bbox_head]:  # every box starts as it was
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

    def fold(self):
        """Leaves out the heads that only training needs."""
        self.denoising_class_embed = None
        last = len(self.dec_score_head) - 1
        for heads in (self.dec_score_head, self.decoder.lqe_layers):
            for i in range(min(last, len(heads))):
                heads[i] = nn.Identity()

    def forward(self, levels, share=None, targets=None):
        """levels: maps (B, C, h, w) at strides 8, 16, 32; share (B, 2), the part of their width and height that is no padding.

        -> outputs of the last layer, boxes relative to that part; in training also `aux_outputs`, `pre` and `enc`, what the
        losses of distributions need (`pred_corners` (B, Q, 4 * 33) and the boxes `initial_boxes` (B, Q, 4) that they are relative
        to), and, with targets, `denoising`: the same outputs of the noisy copies, and their `matches`.
        """
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        share = memory.new_ones(memory.shape[0], 2, dtype=torch.float32) if share is None else share
        anchors, valid, padding = make_anchors([level.shape[-2:] for level in levels], share)
        memory = memory * valid.to(memory.dtype)
        scores = in_float32(self.enc_score_head, memory)
        best = scores.detach().amax(-1).masked_fill(padding, -torch.inf).topk(min(self.num_queries, scores.shape[1]), dim=1).indices[..., None]
        pick = lambda x: x.gather(1, best.expand(-1, -1, x.shape[-1]))
        tokens = pick(memory)
        boxes = (in_float32(self.enc_bbox_head, tokens) + pick(anchors)).sigmoid()
        share = share.repeat(1, 2)[:, None]
        enc = {"pred_logits": pick(scores), "pred_boxes": boxes / share}

        x, boxes, copies, bias = tokens.detach(), boxes.detach(), 0, None
        noisy = make_denoising(targets, scores.shape[-1], x.shape[1], self.copies) if self.training and targets else None
        if noisy:
            x = torch.cat([self.denoising_class_embed(noisy.labels).to(x.dtype), x], dim=1)
            boxes, copies = torch.cat([noisy.boxes * share, boxes], dim=1), noisy.labels.shape[1]
            bias = torch.zeros(noisy.blocked.shape, device=x.device).masked_fill(noisy.blocked, -torch.inf)
        pos = self.query_pos_head(boxes.to(x.dtype)).clamp(-10, 10)
        for level in levels:
            if level.requires_grad:  # gradients come back in the layout that the convolutions are fast with
                level.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        levels = [level.float().contiguous() for level in levels]  # positions between cells need more digits than bfloat16 has
        corners, before, outputs, last = 0, 0, [], len(self.decoder.layers) - 1
        for i, layer in enumerate(self.decoder.layers):
            x = layer(x, pos, boxes, levels, bias)
            scores = in_float32(self.dec_score_head[i], x) if self.training or i == last else None
            if i == 0:
                boxes = (in_float32(self.pre_bbox_head, x) + boxes.clamp(1e-5, 1 - 1e-5).logit()).sigmoid()
                pre = {"pred_logits": scores, "pred_boxes": boxes / share}
                initial = boxes.detach()
            corners = in_float32(self.dec_bbox_head[i], x + before) + corners
            boxes = (corners_to_boxes if self.distributions else shift_boxes)(initial, corners)
            if scores is not None:
                outputs.append({"pred_logits": scores, "pred_boxes": boxes / share})
                if self.distributions:
                    outputs[-1] |= {"pred_corners": corners, "initial_boxes": initial / share}
                    outputs[-1]["pred_logits"] = self.decoder.lqe_layers[i](scores, corners)
            boxes, before = boxes.detach(), x.detach()
        if not self.training:
            return {**outputs[-1], "aux_outputs": []}
        of_copies, of_queries = split_queries([*outputs, pre], copies)
        found = {**as_outputs(of_queries), "enc": enc}
        if noisy:
            found["denoising"] = {**as_outputs(of_copies), "matches": noisy.matches}
        return found


def as_outputs(layers):
    """[first layer's, ..., last layer's, pre] -> one dictionary."""
    *aux, last, pre = layers
    return {**last, "aux_outputs": aux, "pre": pre}


def make_anchors(sizes, share):
    """sizes [(h, w)] of the levels, finest first, share (B, 2) of width and height that is no padding -> anchors (B, N, 4),
    logits of cxcywh, infinite where invalid, valid (B, N, 1), and padding (B, N).

    Those too near the border are invalid but may be selected, as in the original; padding is not.
    """
    anchors, first = [], []
    for level, (h, w) in enumerate(sizes):
        y, x = torch.meshgrid(*((torch.arange(n, device=share.device) + 0.5) / n for n in (h, w)), indexing="ij")
        side = torch.full_like(x, 0.05 * 2**level)
        anchors.append(torch.stack([x, y, side, side], dim=-1).flatten(0, 1))
        first.append(torch.stack([x < 1 / w, y < 1 / h], dim=-1).flatten(0, 1))
    anchors, first = torch.cat(anchors)[None], torch.cat(first)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    padding = ((anchors[..., :2] >= share[:, None]) & ~first).any(-1)  # an image may be thinner than half a cell
    valid = valid & ~padding[..., None]
    return anchors.logit().masked_fill(~valid, torch.inf), valid, padding


class ECDet(nn.Module):
    """A backbone -> hybrid encoder -> decoder. See Decoder.forward for the outputs.

    A backbone with strides 8, 16, 32 of the width `dim` (ECViT) feeds the encoder directly, any other through a pyramid.
    """

    def __init__(self, backbone, dim, num_classes, encoder_ffn, csp_depth, csp_expansion, decoder_ffn, layers=4, copies=100,
                 distributions=True, num_queries=300, pyramid=None):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        fits = tuple(backbone.strides) == (8, 16, 32) and set(backbone.channels) == {dim}
        if pyramid == "own" and not fits:
            raise UserError(f"--pyramid own: this ECDet takes maps at strides 8, 16, 32 of {dim} channels; {backbone.name} has {backbone.strides} of {backbone.channels}")
        self.pyramid = build_pyramid(backbone, pyramid or ("own" if fits else "resize"), (8, 16, 32), dim)
        self.encoder = HybridEncoder(dim, encoder_ffn, csp_expansion, csp_depth)
        self.decoder = Decoder(dim, decoder_ffn, num_classes, num_queries, layers, copies, distributions)

    def forward(self, images, mask, targets=None):
        features = self.pyramid(self.backbone(images))
        h, w = (n * self.pyramid.strides[0] for n in features[0].shape[-2:])
        share = unpadded_size(mask.to(images.device, non_blocking=True)) / small_tensor([w, h], images.device)
        return self.decoder(self.encoder(features), share, targets)

    def class_layers(self):
        """What of the state dict has a row for each class, see checkpoint.copy_classes."""
        names = ("enc_score_head", "dec_score_head", "denoising_class_embed")
        return {f"decoder.{name}": ONE_ROW_EACH for name in names}


# the backbone of the released files, width, encoder FFN, CSP depth and expansion, decoder FFN and layers; nano is ours: it learns
# more in its minutes from fewer noisy copies and without distributions, see docs/choices.md
SIZES = {
    "nano": dict(backbone="ecvit-nano", dim=128, encoder_ffn=512, csp_depth=1, csp_expansion=0.5, decoder_ffn=512, layers=2, copies=40, distributions=False),
    "s": dict(backbone="ecvitt", dim=192, encoder_ffn=512, csp_depth=2, csp_expansion=0.34, decoder_ffn=512, layers=4),
    "m": dict(backbone="ecvittplus", dim=256, encoder_ffn=512, csp_depth=2, csp_expansion=0.75, decoder_ffn=1024, layers=4),
    "l": dict(backbone="ecvits", dim=256, encoder_ffn=1024, csp_depth=3, csp_expansion=0.75, decoder_ffn=1024, layers=4),
    "x": dict(backbone="ecvitsplus", dim=256, encoder_ffn=2048, csp_depth=3, csp_expansion=1.5, decoder_ffn=2048, layers=4),
}


def build_ecdet(backbone, config):
    sizes = dict(SIZES[config["size"]])
    sizes.pop("backbone")
    if config["decoder_layers"]:
        sizes["layers"] = config["decoder_layers"]
    model = ECDet(backbone, num_classes=config["num_classes"], num_queries=config["num_queries"], pyramid=config.get("pyramid"), **sizes)
    return model, RefinementCriterion(HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)), PostProcess("quality")
