"""Training and evaluation transforms: DETR's (arXiv 2005.12872), on torchvision's v2 transforms and bounding-box type.

They take a uint8 RGB tensor (3, H, W) and a target whose `boxes` are a `tv_tensors.BoundingBoxes` in xyxy pixels,
and give a normalised float tensor and a target with `boxes` cxcywh in [0, 1]; see datasets.py for the other entries.
"""

import torch
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every backbone here was trained with
SHORT_SIDE, LONG_SIDE = 800, 1333  # what a size setting of 800 means; others scale everything in proportion


class RandomSizeCrop(v2.Transform):
    """Crops a window whose height and width are drawn from [smallest, largest] pixels, each at most the picture's own."""

    def __init__(self, smallest, largest):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def window(self, h, w):
        return tuple(draw_integer(min(self.smallest, n), min(self.largest, n)) for n in (h, w))

    def make_params(self, flat_inputs):
        h, w = v2.query_size(flat_inputs)
        height, width = self.window(h, w)
        return dict(top=draw_integer(0, h - height), left=draw_integer(0, w - width), height=height, width=width)

    def transform(self, inpt, params):
        return self._call_kernel(TF.crop, inpt, **params)


class RandomZoom(RandomSizeCrop):
    """Crops a window of the picture's own proportions, a share in [smallest, 1] of its sides."""

    def __init__(self, smallest):
        super().__init__(smallest, 1.0)

    def window(self, h, w):
        share = self.smallest + (1 - self.smallest) * float(torch.rand(()))
        return max(1, round(share * h)), max(1, round(share * w))


def draw_integer(low, high):
    """Uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, ()))


def per_box_entries(inputs):
    """What of (image, target) has an entry for each box."""
    return [inputs[1][key] for key in ("labels", "area", "iscrowd")]


class ToDetector(v2.Transform):
    """Last step: scaled and normalised pixels; boxes that are still inside, as cxcywh in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.sanitize = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=per_box_entries)

    def forward(self, image, target):
        image, target = self.sanitize(image, target)
        image = TF.normalize(TF.to_dtype(image, torch.float32, scale=True), MEAN, STD)
        h, w = image.shape[-2:]
        boxes = box_convert(torch.as_tensor(target["boxes"]), "xyxy", "cxcywh") / torch.tensor([w, h, w, h])
        return image.as_subclass(torch.Tensor), {**target, "boxes": boxes, "size": torch.tensor([h, w])}


class PickOne:
    """(image, target, draw) -> (image, target), by the transform that draw in [0, 1) picks, or by `plain` where it is None."""

    def __init__(self, plain, transforms=()):
        self.plain, self.transforms = plain, transforms

    def __call__(self, image, target, draw):
        transform = self.transforms[int(draw * len(self.transforms))] if self.transforms and draw is not None else self.plain
        return transform(image, target)


def train_transforms(size=SHORT_SIDE, kind="zoom", color_jitter=0.0, rotate=0.0):
    """-> PickOne for training. Lengths are in proportion to `size`, which stands for 800.

    "meta" is DETR's own: a flip; then the shortest side drawn from 480..800, or first a window of any proportions cut out.
    "zoom" is the default: a flip; in half of the cases a window of the picture's own proportions; then the shortest side
    that `draw` picks from the multiples of 32 in 480..800. `draw` is the same for a whole batch and batches are padded to
    multiples of 32, so that hardly any padding is computed. Where `draw` is None: a flip, the whole picture, at 800.
    """
    scaled = lambda n: max(16, round(n * size / SHORT_SIDE))
    longest = scaled(LONG_SIDE)
    before = [v2.RandomRotation(rotate)] if rotate else []
    before.append(v2.RandomHorizontalFlip())
    after = [ToDetector()]
    if color_jitter:
        after.insert(0, v2.ColorJitter(color_jitter, color_jitter, color_jitter, min(color_jitter / 4, 0.5)))
    if kind == "meta":
        resize = v2.RandomShortestSize([scaled(n) for n in range(480, 801, 32)], longest, antialias=True)
        zoom = v2.RandomShortestSize([scaled(n) for n in (400, 500, 600)], antialias=True)
        window = v2.Compose([zoom, RandomSizeCrop(scaled(384), scaled(600)), resize])
        return PickOne(v2.Compose([*before, v2.RandomChoice([resize, window]), *after]))
    whole = lambda side: v2.RandomShortestSize([side], longest, antialias=True)
    window = v2.RandomApply([RandomZoom(0.5)], p=0.5)
    sides = sorted({min(n, size) for n in range(32, size + 32, 32) if n >= scaled(480)})
    return PickOne(v2.Compose([*before, whole(size), *after]), [v2.Compose([*before, window, whole(side), *after]) for side in sides])


def eval_transforms(size=SHORT_SIDE):
    """The shortest side `size`, the longest 1333/800 of it at most."""
    return PickOne(v2.Compose([v2.RandomShortestSize([size], round(size * LONG_SIDE / SHORT_SIDE), antialias=True), ToDetector()]))
