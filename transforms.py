"""Training and evaluation transforms: DETR's (arXiv 2005.12872), on torchvision's v2 transforms and bounding-box type.

A transform takes a uint8 RGB tensor (3, H, W) and a target whose `boxes` are a `tv_tensors.BoundingBoxes` in xyxy pixels,
and gives a normalised float tensor and a target with `boxes` cxcywh in [0, 1]; see datasets.py for the other entries.
"""

import torch
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every backbone here was trained with
SHORT_SIDE, LONG_SIDE = 800, 1333  # what a size setting of 800 means; others scale everything in proportion


class RandomSizeCrop(v2.Transform):
    """Crops a window whose height and width are drawn from [smallest, largest], each at most the picture's own."""

    def __init__(self, smallest, largest):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs):
        h, w = v2.query_size(flat_inputs)
        draw = lambda low, high: int(torch.randint(low, high + 1, ()))
        height, width = (draw(min(self.smallest, n), min(self.largest, n)) for n in (h, w))
        return dict(top=draw(0, h - height), left=draw(0, w - width), height=height, width=width)

    def transform(self, inpt, params):
        return self._call_kernel(TF.crop, inpt, **params)


class ToDetector(v2.Transform):
    """Last step: scaled and normalised pixels; boxes that are still inside, as cxcywh in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.sanitize = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda inputs: [inputs[1][k] for k in ("labels", "area", "iscrowd")])

    def forward(self, image, target):
        image, target = self.sanitize(image, target)
        image = TF.normalize(TF.to_dtype(image, torch.float32, scale=True), MEAN, STD)
        h, w = image.shape[-2:]
        boxes = box_convert(torch.as_tensor(target["boxes"]), "xyxy", "cxcywh") / torch.tensor([w, h, w, h])
        return image.as_subclass(torch.Tensor), {**target, "boxes": boxes, "size": torch.tensor([h, w])}


def train_transforms(size=SHORT_SIDE, mode="meta"):
    scale = lambda n: max(32, round(n * size / SHORT_SIDE))
    sides = [scale(n) for n in range(480, 801, 32)]
    longest = scale(LONG_SIDE)
    resize = v2.RandomShortestSize(sides, longest, antialias=True)
    crop = v2.Compose([
        v2.RandomShortestSize([scale(n) for n in (400, 500, 600)], antialias=True),
        RandomSizeCrop(scale(384), scale(600)),
        resize,
    ])  # fmt: skip
    if mode == "meta":
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, crop]), ToDetector()])
    if mode == "fix":
        resize = v2.RandomShortestSize([size], longest, antialias=True)
        crop = v2.Compose([v2.RandomShortestSize([scale(n) for n in (400, 500, 600)], antialias=True), RandomSizeCrop(scale(384), scale(600)), resize])
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, crop]), ToDetector()])
    raise ValueError(mode)


def eval_transforms(size=SHORT_SIDE):
    return v2.Compose([v2.RandomShortestSize([size], round(size * LONG_SIDE / SHORT_SIDE), antialias=True), ToDetector()])
