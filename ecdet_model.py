"""ECDet (arXiv 2603.18739): hybrid encoder, query selection, and a deformable decoder that refines edge distributions.

Module names follow the released files, so that `ecdet_s.pth` and its sisters load as they are. The decoder is D-FINE's
(arXiv 2410.13842), but its deformable attention has no value and output projections, and a gate in place of a residual.

B images, N cells of all maps, Q queries, D noisy copies, C channels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_pyramid
from detr_loss import HungarianMatcher, PostProcess
from ecdet_loss import REG_MAX, RefinementCriterion, corners_to_boxes
from ecvit import ConvNorm
from errors import UserError
from layers import (
    ONE_ROW_EACH,
    DeformableAttention,
    Mlp,
    attend,
    gather_cells,
    in_float32,
    init_heads,
    make_denoising,
    select_queries,
    shift_boxes,
    split_queries,
    unpadded_size,
)

HEADS, POINTS = 8, (3, 6, 3)  # of attention; sampling points on each level
TOP_BINS = 4  # the most likely bins of an edge's distribution, from which its quality is estimated


class ConvNormAct(ConvNorm):
    """Convolution, batch normalisation, SiLU."""

    def forward(self, x):
        return F.silu(super().forward(x))


class RepVgg(nn.Module):
    """RepVGG (arXiv 2101.03697): a 3x3 and a 1x1 convolution in parallel, each normalised; SiLU of their sum."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 1)

    def forward(self, x):
        if self.conv2 is None:
            return F.silu(self.conv1(x))
        return F.silu(self.conv1(x) + self.conv2(x))

    @torch.no_grad()
    def fuse(self):
        """Replaces both by one 3x3 convolution, for inference: the 1x1 is added to its centre."""
        if self.conv2 is None:
            return
        self.conv1.fuse()
        self.conv2.fuse()
        self.conv1.conv.weight += F.pad(self.conv2.conv.weight, (1, 1, 1, 1))
        self.conv1.conv.bias += self.conv2.conv.bias
        self.conv2 = None


class CspStage(nn.Module):
    """Half of the channels go through `depth` RepVGG blocks, the other half are added to their output."""

    def __init__(self, in_dim, dim, depth):
        super().__init__()
        self.conv1 = ConvNormAct(in_dim, 2 * dim, 1)
        self.bottlenecks = nn.Sequential(*(RepVgg(dim) for _ in range(depth)))

    def forward(self, x):
        shortcut, x = self.conv1(x).chunk(2, dim=1)
        return shortcut + self.bottlenecks(x)


class FuseBlock(nn.Module):
    """Mixes a level of the pyramid after its neighbour was added (ELAN): (B, C, H, W) -> the same."""

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
    """A 1x1 convolution over the channels, then a depthwise 3x3 of stride 2."""

    def __init__(self, dim):
        super().__init__()
        self.cv1, self.cv2 = ConvNorm(dim, dim, 1), ConvNorm(dim, dim, 3, stride=2, groups=dim)

    def forward(self, x):
        return self.cv2(self.cv1(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention of x (B, N, C); pos is added to queries and keys, not to values.

    With a bias (D, N), the first D tokens are noisy copies: the bias is added to their scores, and the other tokens do
    not see them.
    """

    def __init__(self, dim):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, pos, bias=None):
        dim = x.shape[-1]
        w_qk, w_v = self.in_proj_weight.split([2 * dim, dim])
        b_qk, b_v = self.in_proj_bias.split([2 * dim, dim])
        q, k = F.linear(x + pos, w_qk, b_qk).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        v = F.linear(x, w_v, b_v).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if bias is None:
            x = attend(q, k, v)
        else:
            d = len(bias)
            copies = attend(q[:, :, :d], k, v, bias)
            others = attend(q[:, :, d:], k[:, :, d:], v[:, :, d:])
            x = torch.cat([copies, others], dim=2)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention among the cells of one level, then feed-forward; each added, then normalised."""

    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.self_attn = SelfAttention(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, pos):
        x = self.norm1(x + self.self_attn(x, pos))
        return self.norm2(x + self.linear2(F.silu(self.linear1(x))))


def position_embedding(h, w, dim, device=None):
    """Sines and cosines of x, then of y -> (h * w, dim).

    The rows have x as the outer axis although the tokens that they are added to have y: the released weights were
    trained so. On square maps it makes no difference to what can be learned.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    grid = torch.meshgrid(torch.arange(w, device=device), torch.arange(h, device=device), indexing="ij")
    x, y = (axis.reshape(-1, 1) * frequency for axis in grid)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class HybridEncoder(nn.Module):
    """Maps (B, C, h, w) at strides 8, 16, 32 -> the same, mixed.

    Attention on the coarsest map, then a top-down and a bottom-up path through the pyramid.
    """

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
        laterals = []
        for lateral, fuse, finer in zip(self.lateral_convs, self.fpn_blocks, maps[-2::-1]):
            laterals.append(lateral(x))
            x = fuse(F.interpolate(laterals[-1], scale_factor=2.0, mode="nearest") + finer)
        levels = [x]
        for downsample, fuse, coarser in zip(self.downsample_convs, self.pan_blocks, laterals[::-1]):
            levels.append(fuse(downsample(levels[-1]) + coarser))
        return levels


class Gateway(nn.Module):
    """Two learned gates in place of a residual: how much to keep of the old, how much to take of the new."""

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
    """Self-attention among queries, deformable cross-attention through a gate, feed-forward."""

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
    """Corrects the scores (B, Q, K) by the sharpness of the edges' distributions, corners (B, Q, 4 * 33)."""

    def __init__(self):
        super().__init__()
        self.reg_conf = Mlp(4 * (TOP_BINS + 1), 64, 1, 2, F.silu)
        nn.init.zeros_(self.reg_conf.layers[-1].weight)
        nn.init.zeros_(self.reg_conf.layers[-1].bias)

    def forward(self, scores, corners):
        top = corners.unflatten(-1, (4, REG_MAX + 1)).softmax(-1).topk(TOP_BINS, dim=-1).values
        sharpness = torch.cat([top, top.mean(-1, keepdim=True)], dim=-1).flatten(-2)
        return scores + in_float32(self.reg_conf, sharpness)


class RefinementLayers(nn.Module):
    """Holds the decoder's layers and its quality estimators under the names of the released files."""

    def __init__(self, dim, ffn_dim, layers, distributions):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, ffn_dim) for _ in range(layers))
        self.lqe_layers = nn.ModuleList(LocationQuality() for _ in range(layers if distributions else 0))


class Decoder(nn.Module):
    """Selects queries from the maps and refines their boxes, layer by layer.

    distributions: the layers refine distributions over each edge's distance; otherwise they shift boxes in units of the
    box's own size. num_denoising: see make_denoising.
    """

    def __init__(self, dim, ffn_dim, num_classes, num_queries=300, layers=4, num_denoising=100, distributions=True):
        super().__init__()
        self.num_queries, self.num_denoising, self.distributions = num_queries, num_denoising, distributions
        self.decoder = RefinementLayers(dim, ffn_dim, layers, distributions)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = Mlp(dim, dim, 4, 3, F.silu)
        self.query_pos_head = Mlp(4, dim, dim, 3, F.silu)
        self.pre_bbox_head = Mlp(dim, dim, 4, 3, F.silu)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(layers))
        out_dim = 4 * (REG_MAX + 1) if distributions else 4
        self.dec_bbox_head = nn.ModuleList(Mlp(dim, dim, out_dim, 3, F.silu) for _ in range(layers))
        box_heads = [self.enc_bbox_head, self.pre_bbox_head, *self.dec_bbox_head]
        init_heads([self.enc_score_head, *self.dec_score_head], box_heads)

    def fuse(self):
        """Removes the heads that only training needs."""
        self.denoising_class_embed = None
        last = len(self.dec_score_head) - 1
        for heads in (self.dec_score_head, self.decoder.lqe_layers):
            for i in range(min(last, len(heads))):
                heads[i] = nn.Identity()

    def forward(self, levels, valid_ratio=None, targets=None):
        """-> {"pred_logits" (B, Q, K), "pred_boxes" (B, Q, 4)} of the last layer.

        levels: maps (B, C, h, w) at strides 8, 16, 32; valid_ratio (B, 2), the fraction of their width and height that
        is not padding, to which boxes are relative.

        In training also `aux_outputs`, `pre` and `enc`; for the losses of distributions, `pred_corners` (B, Q, 4 * 33)
        and `initial_boxes` (B, Q, 4), which they are relative to; and, with targets, `denoising`: the same outputs of
        the noisy copies, and their `matches`.
        """
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        if valid_ratio is None:
            valid_ratio = memory.new_ones(memory.shape[0], 2, dtype=torch.float32)
        anchors, valid, padding = make_anchors([level.shape[-2:] for level in levels], valid_ratio)
        memory = memory * valid.to(memory.dtype)
        scores = in_float32(self.enc_score_head, memory)
        best = select_queries(scores, padding, self.num_queries)
        tokens = gather_cells(memory, best)
        boxes = (in_float32(self.enc_bbox_head, tokens) + gather_cells(anchors, best)).sigmoid()
        valid_ratio = valid_ratio.repeat(1, 2)[:, None]
        enc = {"pred_logits": gather_cells(scores, best), "pred_boxes": boxes / valid_ratio}

        x, boxes, bias, denoising = tokens.detach(), boxes.detach(), None, None
        if self.training and targets:
            denoising = make_denoising(targets, scores.shape[-1], x.shape[1], self.num_denoising)
        if denoising:
            x = torch.cat([self.denoising_class_embed(denoising.labels).to(x.dtype), x], dim=1)
            boxes = torch.cat([denoising.boxes * valid_ratio, boxes], dim=1)
            bias = torch.zeros(denoising.blocked.shape, device=x.device).masked_fill(denoising.blocked, -torch.inf)
        outputs, pre = self.refine(x, boxes, levels, valid_ratio, bias)
        if not self.training:
            return {**outputs[-1], "aux_outputs": []}
        copies, outputs = split_queries([*outputs, pre], x.shape[1] - best.shape[1])
        result = {**as_outputs(outputs), "enc": enc}
        if denoising:
            result["denoising"] = {**as_outputs(copies), "matches": denoising.matches}
        return result

    def refine(self, x, boxes, levels, valid_ratio, bias):
        """x (B, Q, C), boxes (B, Q, 4) -> [outputs of each layer], and `pre`, those of the boxes before refinement.

        Outside of training only the last layer has outputs.
        """
        pos = self.query_pos_head(boxes.to(x.dtype)).clamp(-10, 10)
        for level in levels:
            if level.requires_grad:
                level.register_hook(to_channels_last)
        levels = [level.float().contiguous() for level in levels]  # bfloat16 is too coarse for positions between cells
        to_boxes = corners_to_boxes if self.distributions else shift_boxes
        last = len(self.decoder.layers) - 1
        outputs, corners, previous = [], 0, 0
        for i, layer in enumerate(self.decoder.layers):
            x = layer(x, pos, boxes, levels, bias)
            scores = in_float32(self.dec_score_head[i], x) if self.training or i == last else None
            if i == 0:
                boxes = (in_float32(self.pre_bbox_head, x) + boxes.clamp(1e-5, 1 - 1e-5).logit()).sigmoid()
                pre = {"pred_logits": scores, "pred_boxes": boxes / valid_ratio}
                initial = boxes.detach()
            corners = in_float32(self.dec_bbox_head[i], x + previous) + corners
            boxes = to_boxes(initial, corners)
            if scores is not None:
                outputs.append({"pred_logits": scores, "pred_boxes": boxes / valid_ratio})
                if self.distributions:
                    outputs[-1] |= {"pred_corners": corners, "initial_boxes": initial / valid_ratio}
                    outputs[-1]["pred_logits"] = self.decoder.lqe_layers[i](scores, corners)
            boxes, previous = boxes.detach(), x.detach()
        return outputs, pre


def to_channels_last(grad):
    """Gradients go back to the pyramid in the memory format in which convolutions are fast."""
    return grad.contiguous(memory_format=torch.channels_last)


def as_outputs(layers):
    """Outputs [first layer's, ..., last layer's, pre] -> one dictionary."""
    *aux, last, pre = layers
    return {**last, "aux_outputs": aux, "pre": pre}


def make_anchors(sizes, valid_ratio):
    """sizes [(h, w)] of the levels, finest first, valid_ratio (B, 2) -> anchors, valid (B, N, 1), padding (B, N).

    Anchors (B, N, 4) are logits of cxcywh, infinite where invalid. Those too near the border are invalid but may be
    selected, as in the original; padding may not.
    """
    anchors, first = [], []
    for level, (h, w) in enumerate(sizes):
        y, x = torch.meshgrid(*((torch.arange(n, device=valid_ratio.device) + 0.5) / n for n in (h, w)), indexing="ij")
        side = torch.full_like(x, 0.05 * 2**level)
        anchors.append(torch.stack([x, y, side, side], dim=-1).flatten(0, 1))
        first.append(torch.stack([x < 1 / w, y < 1 / h], dim=-1).flatten(0, 1))
    anchors, first = torch.cat(anchors)[None], torch.cat(first)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    # The first column and row are never padding, as an image may be thinner than half a cell.
    padding = ((anchors[..., :2] >= valid_ratio[:, None]) & ~first).any(-1)
    valid = valid & ~padding[..., None]
    return anchors.logit().masked_fill(~valid, torch.inf), valid, padding


class ECDet(nn.Module):
    """Backbone -> pyramid -> hybrid encoder -> decoder; see Decoder.forward for the outputs.

    By default a backbone with maps of `dim` channels at strides 8, 16, 32 (ECViT) feeds the encoder directly, any other
    through a pyramid that resizes its maps. Raises UserError.
    """

    def __init__(
        self,
        backbone,
        dim,
        num_classes,
        encoder_ffn,
        csp_depth,
        csp_expansion,
        decoder_ffn,
        layers=4,
        num_denoising=100,
        distributions=True,
        num_queries=300,
        pyramid=None,
    ):
        super().__init__()
        self.backbone = backbone
        fits = tuple(backbone.strides) == (8, 16, 32) and set(backbone.channels) == {dim}
        if pyramid == "own" and not fits:
            raise UserError(
                f"--pyramid own: this ECDet takes maps at strides 8, 16, 32 of {dim} channels; {backbone.name} has "
                f"{backbone.strides} of {backbone.channels}; leave --pyramid out"
            )
        self.pyramid = build_pyramid(backbone, pyramid or ("own" if fits else "resize"), (8, 16, 32), dim)
        self.encoder = HybridEncoder(dim, encoder_ffn, csp_expansion, csp_depth)
        self.decoder = Decoder(dim, decoder_ffn, num_classes, num_queries, layers, num_denoising, distributions)

    def forward(self, images, mask, targets=None):
        features = self.pyramid(self.backbone(images))
        h, w = (n * self.pyramid.strides[0] for n in features[0].shape[-2:])
        width, height = unpadded_size(mask.to(images.device, non_blocking=True)).unbind(1)
        valid_ratio = torch.stack([width / w, height / h], dim=1)
        return self.decoder(self.encoder(features), valid_ratio, targets)

    def class_layers(self):
        """The layers with rows for classes, see checkpoint.copy_classes."""
        names = ("enc_score_head", "dec_score_head", "denoising_class_embed")
        return {f"decoder.{name}": ONE_ROW_EACH for name in names}


def widths(backbone, dim, encoder_ffn, csp_depth, csp_expansion, decoder_ffn, layers=4, **more):
    """A row of SIZES: the backbone of the released file, and ECDet's arguments."""
    return dict(
        backbone=backbone,
        dim=dim,
        encoder_ffn=encoder_ffn,
        csp_depth=csp_depth,
        csp_expansion=csp_expansion,
        decoder_ffn=decoder_ffn,
        layers=layers,
        **more,
    )


# nano is ours: with fewer noisy copies and without distributions it learns more in a short run, see docs/choices.md
SIZES = {
    "nano": widths("ecvit-nano", 128, 512, 1, 0.5, 512, layers=2, num_denoising=40, distributions=False),
    "s": widths("ecvitt", 192, 512, 2, 0.34, 512),
    "m": widths("ecvittplus", 256, 512, 2, 0.75, 1024),
    "l": widths("ecvits", 256, 1024, 3, 0.75, 1024),
    "x": widths("ecvitsplus", 256, 2048, 3, 1.5, 2048),
}


def build_ecdet(backbone, config):
    """-> model, criterion, postprocess; see detr_model.build_model."""
    sizes = {key: value for key, value in SIZES[config["size"]].items() if key != "backbone"}
    if config["decoder_layers"]:
        sizes["layers"] = config["decoder_layers"]
    model = ECDet(
        backbone,
        num_classes=config["num_classes"],
        num_queries=config["num_queries"],
        pyramid=config.get("pyramid"),
        **sizes,
    )
    matcher = HungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    return model, RefinementCriterion(matcher), PostProcess("quality")
