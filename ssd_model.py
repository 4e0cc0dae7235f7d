"""SSD (arXiv 1512.02325), the baseline: torchvision's head, default boxes, losses and non-maximum suppression.

It runs over any backbone. B images, A default boxes, K classes, D detections.
"""

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import box_convert, box_iou

from backbones import build_pyramid
from layers import unpadded_size

STRIDES = (8, 16, 32, 64, 128)


class SSDDetector(nn.Module):
    """Backbone -> pyramid -> torchvision's SSD head, which predicts classes and a shift for every default box.

    Outputs: torchvision's `cls_logits` (B, A, 1 + K), the background first, and `bbox_regression` (B, A, 4); `anchors`
    (A, 4) xyxy in pixels of the padded batch; `pixels` (B, 2), width and height of the images in it without their
    padding. `pred_logits` (B, A, K + 1) and `pred_boxes` (B, A, 4) are the same predictions in the form of the other
    detectors, before non-maximum suppression.
    """

    def __init__(self, backbone, num_classes, hidden_dim=256, pyramid="simple"):
        super().__init__()
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, STRIDES, hidden_dim)
        levels = len(self.pyramid.strides)
        # The scales of SSD300, spread over as many levels as there are.
        scales = [0.07] + [0.15 + 0.9 * i / max(1, levels - 1) for i in range(levels)]
        aspect_ratios = [[2]] + [[2, 3]] * (levels - 1)
        self.boxes = DefaultBoxGenerator(aspect_ratios, scales=scales, steps=list(self.pyramid.strides))
        self.box_coder = ssd_parts(1 + num_classes).box_coder
        self.head = SSDHead(list(self.pyramid.channels), self.boxes.num_anchors_per_location(), 1 + num_classes)

    def forward(self, images, mask, targets=None):
        features = [feature.float() for feature in self.pyramid(self.backbone(images))]
        with torch.autocast(images.device.type, enabled=False):
            outputs = self.head(features)
        anchors = self.boxes(ImageList(images, [tuple(images.shape[-2:])]), features)[0]
        pixels = unpadded_size(mask.to(images.device, non_blocking=True))
        shifts = outputs["bbox_regression"]
        boxes = self.box_coder.decode_single(shifts.flatten(0, 1), anchors.repeat(len(images), 1)).view_as(shifts)
        outputs["pred_logits"] = outputs["cls_logits"].roll(-1, dims=-1)
        outputs["pred_boxes"] = box_convert(boxes, "xyxy", "cxcywh") / pixels.repeat(1, 2)[:, None]
        return outputs | {"anchors": anchors, "pixels": pixels, "aux_outputs": []}

    def class_layers(self):
        """The layers with rows for classes, see checkpoint.copy_classes.

        For each default box of a cell they have a row for the background, then one for each class.
        """
        per_level = self.boxes.num_anchors_per_location()
        return {f"head.classification_head.module_list.{i}": (boxes, 1) for i, boxes in enumerate(per_level)}


def ssd_parts(classes, min_detections=0):
    """torchvision's SSD without a network: its matching, losses, box coding and non-maximum suppression.

    classes: with the background; min_detections: at least so many objects of an image can be detected.
    """
    return SSD(
        nn.Identity(),
        DefaultBoxGenerator([[2]]),
        (1, 1),
        classes,
        head=nn.Identity(),
        score_thresh=0.01,
        detections_per_img=max(300, min_detections),
        topk_candidates=max(400, min_detections),
    )


class SSDCriterion(nn.Module):
    """Smooth L1 over the matched boxes; cross-entropy over these and three times as many hard negatives."""

    def __init__(self, num_classes):
        super().__init__()
        self.ssd = ssd_parts(1 + num_classes)

    def forward(self, outputs, targets, objects=None):
        """outputs: SSDDetector's; targets: B dicts with `labels` (T,) and `boxes` (T, 4) cxcywh in [0, 1]
        -> {"loss_bbox", "loss_class"}, averaged over the matched boxes, whatever `objects`."""
        anchors = outputs["anchors"]
        in_pixels, matches = [], []
        for target, (width, height) in zip(targets, outputs["pixels"].tolist()):
            scale = anchors.new_tensor([width, height, width, height])
            boxes = box_convert(target["boxes"].float(), "cxcywh", "xyxy") * scale
            in_pixels.append({"boxes": boxes, "labels": 1 + target["labels"]})
            if len(boxes):
                matches.append(self.ssd.proposal_matcher(box_iou(boxes, anchors)))
            else:
                matches.append(torch.full((len(anchors),), -1, device=anchors.device))
        losses = self.ssd.compute_loss(in_pixels, outputs, [anchors] * len(targets), matches)
        return {"loss_bbox": losses["bbox_regression"], "loss_class": losses["classification"]}


class SSDPostProcess(nn.Module):
    """Outputs -> detections after non-maximum suppression; min_detections: see ssd_parts."""

    def __init__(self, num_classes, min_detections=0):
        super().__init__()
        self.ssd = ssd_parts(1 + num_classes, min_detections)

    @torch.no_grad()
    def forward(self, outputs, sizes):
        """sizes (B, 2), height and width of the images -> B dicts of D detections, best first: `scores` and `labels`
        (D,), `boxes` (D, 4) xyxy in pixels."""
        pixels = outputs["pixels"]
        image_shapes = [(h, w) for w, h in pixels.tolist()]
        detections = self.ssd.postprocess_detections(outputs, [outputs["anchors"]] * len(pixels), image_shapes)
        scales = (sizes.to(pixels.device)[:, [1, 0]] / pixels).repeat(1, 2)
        return [
            {"scores": d["scores"], "labels": d["labels"] - 1, "boxes": d["boxes"] * scale}
            for d, scale in zip(detections, scales)
        ]


def build_ssd(backbone, config):
    """-> model, criterion, postprocess; see detr_model.build_model."""
    num_classes = config["num_classes"]
    model = SSDDetector(backbone, num_classes, config["hidden_dim"], config["pyramid"] or "simple")
    return model, SSDCriterion(num_classes), SSDPostProcess(num_classes, config["num_queries"])
