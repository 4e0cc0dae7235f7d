"""SSD (arXiv 1512.02325): torchvision's head, default boxes, losses and non-maximum suppression over any backbone. The baseline."""

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
    """Backbone -> pyramid -> torchvision's SSD head, a class and a shift for every default box.

    Outputs: `cls_logits` (B, A, 1 + K) with the background first and `bbox_regression` (B, A, 4), torchvision's; `anchors` (A, 4) xyxy in
    pixels of the padded batch; `pixels` (B, 2) width and height of the unpadded pictures there. `pred_logits` (B, A, K + 1) and
    `pred_boxes` (B, A, 4) are the same in the form of the other detectors, before non-maximum suppression.
    """

    def __init__(self, backbone, num_classes, hidden_dim=256, pyramid="simple"):
        super().__init__()
        self.backbone = backbone
        self.pyramid = build_pyramid(backbone, pyramid, STRIDES, hidden_dim)
        levels = len(self.pyramid.strides)
        scales = [0.07, *(0.15 + 0.9 * i / (levels - 1) for i in range(levels))]  # SSD300's, spread over as many levels as there are
        self.boxes = DefaultBoxGenerator([[2]] + [[2, 3]] * (levels - 1), scales=scales, steps=list(self.pyramid.strides))
        self.box_coder = parts_of_ssd(1 + num_classes).box_coder
        self.head = SSDHead(list(self.pyramid.channels), self.boxes.num_anchors_per_location(), 1 + num_classes)

    def forward(self, images, mask, targets=None):
        features = [feature.float() for feature in self.pyramid(self.backbone(images))]
        with torch.autocast(images.device.type, enabled=False):
            found = self.head(features)
        anchors = self.boxes(ImageList(images, [tuple(images.shape[-2:])]), features)[0]
        pixels = unpadded_size(mask.to(images.device, non_blocking=True))
        boxes = self.box_coder.decode_single(found["bbox_regression"].flatten(0, 1), anchors.repeat(len(images), 1)).view_as(found["bbox_regression"])
        found["pred_logits"] = found["cls_logits"].roll(-1, dims=-1)
        found["pred_boxes"] = box_convert(boxes, "xyxy", "cxcywh") / pixels.repeat(1, 2)[:, None]
        return found | {"anchors": anchors, "pixels": pixels, "aux_outputs": []}

    def class_layers(self):
        """What of the state dict has a row for each class, see checkpoint.copy_classes: for each default box of a cell the
        background's, then the classes'."""
        per_level = self.boxes.num_anchors_per_location()
        return {f"head.classification_head.module_list.{i}": (boxes, 1) for i, boxes in enumerate(per_level)}


def parts_of_ssd(classes, most=0):
    """torchvision's SSD for its matching, losses, box coding and suppression alone. classes: with the background; most: objects
    that have to find a place among the detections."""
    return SSD(
        nn.Identity(), DefaultBoxGenerator([[2]]), (1, 1), classes, head=nn.Identity(), score_thresh=0.01,
        detections_per_img=max(300, most), topk_candidates=max(400, most),
    )  # fmt: skip


class SSDCriterion(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.ssd = parts_of_ssd(1 + num_classes)

    def forward(self, outputs, targets, objects=None):
        """-> {"loss_bbox", "loss_class"}, averaged over the matched boxes, whatever `objects`: smooth L1, and cross-entropy over the matched boxes and three times as many hard negatives."""
        anchors, in_pixels, matches = outputs["anchors"], [], []
        for target, (width, height) in zip(targets, outputs["pixels"].tolist()):
            boxes = box_convert(target["boxes"].float(), "cxcywh", "xyxy") * anchors.new_tensor([width, height, width, height])
            in_pixels.append({"boxes": boxes, "labels": 1 + target["labels"]})
            none = torch.full((len(anchors),), -1, device=anchors.device)
            matches.append(self.ssd.proposal_matcher(box_iou(boxes, anchors)) if len(boxes) else none)
        losses = self.ssd.compute_loss(in_pixels, outputs, [anchors] * len(targets), matches)
        return {"loss_bbox": losses["bbox_regression"], "loss_class": losses["classification"]}


class SSDPostProcess(nn.Module):
    def __init__(self, num_classes, most=0):
        super().__init__()
        self.ssd = parts_of_ssd(1 + num_classes, most)

    @torch.no_grad()
    def forward(self, outputs, sizes):
        """sizes (B, 2) height, width of the pictures -> B dicts: scores and labels (D,), boxes (D, 4) xyxy pixels, best first."""
        pixels = outputs["pixels"]
        found = self.ssd.postprocess_detections(outputs, [outputs["anchors"]] * len(pixels), [(h, w) for w, h in pixels.tolist()])
        scales = (sizes.to(pixels.device)[:, [1, 0]] / pixels).repeat(1, 2)
        return [{"scores": d["scores"], "labels": d["labels"] - 1, "boxes": d["boxes"] * scale} for d, scale in zip(found, scales)]


def build_ssd(backbone, config):
    num_classes = config["num_classes"]
    model = SSDDetector(backbone, num_classes, config["hidden_dim"], config["pyramid"] or "simple")
    return model, SSDCriterion(num_classes), SSDPostProcess(num_classes, config["num_queries"])
