"""Other implementations for benchmark.py to compare with: the same sizes and, for the same network, the same weights.

A contestant is called as `model(images, mask)` for its outputs and as `model(images, mask, targets)` for its loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torchvision
import transformers
from torch import nn
from torchvision.ops import box_convert

from backbones import build_backbone
from detr_loss import HungarianMatcher, SetCriterion
from detr_model import DETR, build_model
from settings import DEFAULTS

CLASSES = 80


class Contestant(nn.Module):
    def __init__(self, model, criterion=None):
        super().__init__()
        self.model, self.criterion = model, criterion


class Ours(Contestant):
    def forward(self, images, mask, targets=None):
        outputs = self.model(images, mask, targets)
        if targets is None:
            return outputs
        return sum(self.criterion(outputs, targets).values())


class Transformers(Contestant):
    def forward(self, images, mask, targets=None):
        pixel_mask = (~mask).long()
        if targets is None:
            return self.model(pixel_values=images, pixel_mask=pixel_mask)
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        return self.model(pixel_values=images, pixel_mask=pixel_mask, labels=labels).loss


class Torchvision(Contestant):
    def forward(self, images, mask, targets=None):
        if targets is None:
            return self.model(list(images))
        h, w = images.shape[-2:]
        scale = torch.tensor([w, h, w, h], device=images.device)
        objects = [  # class 0 is the background
            {"labels": 1 + t["labels"], "boxes": box_convert(t["boxes"], "cxcywh", "xyxy") * scale} for t in targets
        ]
        return sum(self.model(list(images), objects).values())


def build_ours(detector, **settings):
    """One of this repository's detectors and its loss, with the defaults and `settings`, as a contestant."""
    config = DEFAULTS | dict(
        detector=detector,
        backbone_weights=None,
        num_classes=CLASSES,
        num_queries=300,
        hidden_dim=256,
        num_heads=8,
    )
    model, criterion, _ = build_model(config | settings)
    return Ours(model, criterion)


def default_detr():
    """The default detector on ECViT-T."""
    return build_ours("detr", backbone="ecvitt", ffn_dim=1024, decoder_layers=3, num_denoising=40)


def detr():
    """DETR as published, on DINOv2-S: the same network, the same weights."""
    theirs = transformers_detr()
    model = DETR(build_backbone("dinov2-small"), CLASSES, dropout=0.0)
    model.load_state_dict(model.state_dict() | detr_weights(theirs))
    model.backbone.model.load_state_dict(backbone_weights(theirs), strict=False)
    criterion = SetCriterion(HungarianMatcher(1, 5, 2, class_loss="softmax"), class_loss="softmax")
    return Ours(model, criterion), Transformers(theirs)


def transformers_detr():
    backbone = transformers.Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        patch_size=14,
        image_size=518,
        out_features=["stage12"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_queries=100,
        num_labels=CLASSES,
        auxiliary_loss=True,
        dropout=0.0,
        backbone_config=backbone,
    )
    return transformers.DetrForObjectDetection(config)


DETR_NAMES = [  # transformers' part of a parameter's name, ours; replaced in this order
    ("input_projection", "input_proj"),
    ("encoder.layers", "encoder"),
    ("decoder.layers", "decoder"),
    ("decoder.layernorm", "norm"),
    ("encoder_attn_layer_norm", "norm2"),
    ("encoder_attn", "cross_attn"),
    ("o_proj", "out_proj"),
    ("mlp.fc1", "linear1"),
    ("mlp.fc2", "linear2"),
    ("fc1", "linear1"),
    ("fc2", "linear2"),
    ("query_position_embeddings.weight", "query_pos"),
    ("class_labels_classifier", "class_head"),
    ("bbox_predictor", "box_head"),
    ("self_attn_layer_norm", "norm1"),
]


def detr_weights(theirs):
    """transformers' DETR -> the state dict of ours, without the backbone's."""
    state = {}
    for key, value in theirs.state_dict().items():
        if "backbone" in key:
            continue
        key = key.removeprefix("model.")
        for old, new in DETR_NAMES:
            key = key.replace(old, new)
        last_norm = "norm2" if key.startswith("encoder") else "norm3"
        state[key.replace("final_layer_norm", last_norm)] = value
    return state


def backbone_weights(theirs):
    """transformers' DETR -> the state dict of its backbone."""
    marker = "backbone.model."
    return {key.split(marker)[-1]: value for key, value in theirs.state_dict().items() if marker in key}


def ecdet():
    """ECDet-S, and a DEIMv2 of the same widths, depths and points on a ViT of ECViT-T's size."""
    backbone = transformers.DINOv3ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        num_register_tokens=0,
        out_indices=[3, 7, 11],
    )
    config = transformers.Deimv2Config(
        backbone_config=backbone,
        d_model=192,
        encoder_hidden_dim=192,
        encoder_in_channels=[192] * 3,
        decoder_in_channels=[192] * 3,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        decoder_layers=4,
        decoder_n_points=[3, 6, 3],
        hidden_expansion=0.34,
        depth_mult=0.67,
        encoder_activation_function="silu",
        freeze_backbone_batch_norms=False,
        num_labels=CLASSES,
    )
    theirs = transformers.Deimv2ForObjectDetection(config)
    return build_ours("ecdet", size="s", backbone="ecvitt"), Transformers(theirs)


def d_fine():
    """ECDet-S, and D-FINE-S: as many parameters, half the operations, in convolutions (HGNetV2-B0)."""
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        hidden_sizes=[64, 256, 512, 1024],
        use_learnable_affine_block=True,
        out_indices=[2, 3, 4],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[256, 512, 1024],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        freeze_backbone_batch_norms=False,
        num_labels=CLASSES,
    )
    theirs = transformers.DFineForObjectDetection(config)
    return build_ours("ecdet", size="s", backbone="ecvitt"), Transformers(theirs)


def dino():
    """DINO and the two-stage Deformable DETR with box refinement, on DINOv3's ConvNeXt-T.

    Both have 6 encoder and 6 decoder layers, 300 queries and four feature levels.
    """
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[96, 192, 384, 768],
        depths=[3, 3, 9, 3],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_labels=CLASSES,
        two_stage=True,
        with_box_refine=True,
        auxiliary_loss=True,
        two_stage_num_proposals=300,
        dropout=0.0,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        backbone_config=backbone,
    )
    theirs = transformers.DeformableDetrForObjectDetection(config)
    ours = build_ours(
        "dino",
        backbone="dinov3-convnext-tiny",
        ffn_dim=1024,
        encoder_layers=6,
        decoder_layers=6,
        num_denoising=1,
    )
    return ours, Transformers(theirs)


def ssd():
    """The default detector, and torchvision's SSD300 (VGG-16), which resizes every image to 300x300."""
    ours = default_detr()
    theirs = torchvision.models.detection.ssd300_vgg16(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
    )
    return ours, Torchvision(theirs)


def faster_rcnn():
    """The default detector, and torchvision's Faster R-CNN (ResNet-50 with a feature pyramid)."""
    ours = default_detr()
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        min_size=256,
        max_size=1333,
    )
    return ours, Torchvision(theirs)


class Pair(NamedTuple):
    build: Callable  # -> (ours, theirs)
    peer: str
    train_side: int
    train_images: int  # in the batch of the training step
    detect_side: int


PAIRS = {
    "detr": Pair(detr, "transformers' DETR", 224, 8, 448),
    "ecdet": Pair(ecdet, "transformers' DEIMv2", 256, 8, 640),
    "d-fine": Pair(d_fine, "transformers' D-FINE-S", 256, 8, 640),
    "dino": Pair(dino, "transformers' Deformable DETR", 256, 4, 448),
    "ssd": Pair(ssd, "torchvision's SSD300", 256, 8, 320),
    "faster-rcnn": Pair(faster_rcnn, "torchvision's Faster R-CNN", 256, 8, 256),
}
