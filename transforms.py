"""Training and evaluation transforms: DETR's (arXiv 2005.12872), on torchvision's v2 transforms and bounding-box type.

They take a uint8 RGB tensor (3, H, W) and a target whose `boxes` are a `tv_tensors.BoundingBoxes` in xyxy pixels,
and give a normalised float tensor and a target with `boxes` cxcywh in [0, 1]; see datasets.py for the other entries.
"""

import math

import torch
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every backbone here was trained with
SCALE, SHIFT = 1 / (255 * torch.tensor(STD)), -torch.tensor(MEAN) / torch.tensor(STD)
MEAN_FILL = {tv_tensors.Image: tuple(round(255 * m) for m in MEAN), "others": 0}  # around a turned or shrunken image
BILINEAR = v2.InterpolationMode.BILINEAR
PER_BOX = ("labels", "area", "iscrowd")  # of a target, besides its boxes
SHORT_SIDE, LONG_SIDE = 800, 1333  # what a size setting of 800 means; others scale everything in proportion


def resized_sides(height, width, side, longest=math.inf, exact=True):
    """(height, width) of an image whose shortest side becomes `side`, or less where its longest would be over `longest`;
    a pixel at least. exact=False truncates both, as earlier versions did: 480 could then become 479."""
    scale = min(side / min(height, width), longest / max(height, width))
    return tuple(max(1, round(n * scale) if exact else int(n * scale)) for n in (height, width))


class ResizeShortest(v2.Transform):
    """Resizes the shortest side to one of `sides`, drawn anew for each image; see resized_sides."""

    def __init__(self, sides, longest=math.inf, exact=True):
        super().__init__()
        self.sides, self.longest, self.exact = list(sides), longest, exact

    def make_params(self, flat_inputs):
        side = self.sides[draw_integer(0, len(self.sides) - 1)]
        return dict(size=resized_sides(*v2.query_size(flat_inputs), side, self.longest, self.exact))

    def transform(self, inpt, params):
        return self._call_kernel(TF.resize, inpt, size=list(params["size"]), antialias=True)


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
        window = self._call_kernel(TF.crop, inpt, **params)
        if not isinstance(window, tv_tensors.Image):
            return window
        # A view would be resized at a third of the speed: torch has a fast path for pixel after pixel only.
        return tv_tensors.wrap(window.permute(1, 2, 0).contiguous().permute(2, 0, 1), like=window)


class RandomZoom(RandomSizeCrop):
    """Crops a window of the picture's own proportions, a share in [smallest, 1] of its sides."""

    def __init__(self, smallest):
        super().__init__(smallest, 1.0)

    def window(self, h, w):
        share = self.smallest + (1 - self.smallest) * float(torch.rand(()))
        return max(1, round(share * h)), max(1, round(share * w))


class RandomIoUCrop(v2.RandomIoUCrop):
    """torchvision's, which divides by zero where an image is a few pixels thin."""

    def make_params(self, flat_inputs):
        return super().make_params(flat_inputs) if min(v2.query_size(flat_inputs)) * self.min_scale >= 1 else {}


def draw_integer(low, high):
    """Uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, ()))


class ToDetector(v2.Transform):
    """Last step: scaled and normalised pixels; boxes of which a pixel or more is inside, as cxcywh in [0, 1]."""

    def forward(self, image, target):
        # Resizing takes a box at the border to 640.00006 of 640 pixels: nothing is dropped for being outside, only clamped.
        boxes = torch.as_tensor(TF.clamp_bounding_boxes(target["boxes"]))
        keep = (boxes[:, 2:] - boxes[:, :2] >= 0.99).all(1)  # a pixel, less what rounding takes
        target = target | {key: target[key][keep] for key in PER_BOX}
        image = normalized(image)
        h, w = image.shape[-2:]
        boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / torch.tensor([w, h, w, h])
        return image, target | {"boxes": boxes, "size": torch.tensor([h, w])}


def normalized(image):
    """uint8 (3, H, W) -> float32, minus ImageNet's mean, divided by its deviation; in memory pixel after pixel, as decoders and channels-last
    convolutions have it. Rows of H at once, in place: four times as fast as channel by channel."""
    rows = image.as_subclass(torch.Tensor).permute(1, 2, 0).flatten(1).float()
    w = image.shape[-1]
    scale, shift = SCALE.repeat(w), SHIFT.repeat(w)
    return torch.addcmul(shift, rows, scale, out=rows).unflatten(1, (w, 3)).permute(2, 0, 1)


class PickOne:
    """(image, target, draw, is_mosaic) -> (image, target), by the transform that draw in [0, 1) picks, or by `plain` where it is None.

    A mosaic goes through its own transforms: it has been scaled already, from images whose shortest sides were `tile` at most.
    """

    def __init__(self, plain, transforms=(), for_mosaics=(), tile=math.inf):
        self.plain, self.transforms, self.for_mosaics, self.tile = plain, transforms, for_mosaics, tile

    def __call__(self, image, target, draw=None, is_mosaic=False):
        transforms = self.for_mosaics if is_mosaic else self.transforms
        transform = transforms[int(draw * len(transforms))] if transforms and draw is not None else self.plain
        return transform(image, target)


def mosaic(samples, tile=math.inf):
    """Four (image, target), uint8 and xyxy pixels -> one: set in a square, each resized to the first, whose shortest side counts as
    `tile` at most, and then turned by up to 10 degrees, shifted by up to 0.1 and scaled by 0.5 to 1.5, as for ECDet. The image's id
    and size stay the first's."""
    h, w = samples[0][0].shape[-2:]
    h, w = resized_sides(h, w, min(h, w, tile))
    pixels, boxes = [], []
    for (image, target), (x, y) in zip(samples, ((0, 0), (w, 0), (0, h), (w, h))):
        image, box = TF.resize(image, [h, w], antialias=True), TF.resize(target["boxes"], [h, w])
        pixels.append(image.as_subclass(torch.Tensor))
        boxes.append(box.as_subclass(torch.Tensor) + torch.tensor([x, y, x, y]))
    rows = [torch.cat(pixels[i : i + 2], dim=2) for i in (0, 2)]
    image = tv_tensors.Image(torch.cat(rows, dim=1))
    target = {**samples[0][1], "boxes": tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=(2 * h, 2 * w))}
    for key in PER_BOX:
        target[key] = torch.cat([t[key] for _, t in samples])
    return v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.5, 1.5), interpolation=BILINEAR, fill=MEAN_FILL)(image, target)


def mix_up(samples, share):
    """[(image, target)] of one size, ready for a detector -> each faded into its neighbour, `share` of its own, with the boxes
    of both (arXiv 1710.09412). Pictures whose neighbour has another size, or that have none, stay as they are."""
    if len(samples) < 2:
        return samples
    mixed = []
    for (image, target), (other, more) in zip(samples, samples[-1:] + samples[:-1]):
        if image.shape == other.shape:
            image = share * image + (1 - share) * other
            target = {**target, **{key: torch.cat([target[key], more[key]]) for key in ("boxes", *PER_BOX)}}
        mixed.append((image, target))
    return mixed


def train_transforms(size=SHORT_SIDE, kind="zoom", color_jitter=0.0, rotate=0.0, square=False):
    """-> PickOne for training. Lengths are in proportion to `size`, which stands for 800.

    "meta" is DETR's own: a flip; then the shortest side drawn from 480..800, or first a window of any proportions cut out.
    "zoom" is the default: a flip; in half of the cases a window of the picture's own proportions; then the shortest side
    that `draw` picks from the multiples of 32 in 480..800. `draw` is the same for a whole batch and batches are padded to
    multiples of 32, so that hardly any padding is computed. "strong" is ECDet's: a flip, changed colours, the picture made
    smaller or a window cut out (SSD's, arXiv 1512.02325); then a side that `draw` picks from the multiples of 32 in 0.75..1.25
    of `size`. Where `draw` is None: a flip, the whole picture, at `size`. square: pictures lose their proportions.
    """

    def scaled(n):
        return max(16, round(n * size / SHORT_SIDE))

    longest = longest_side(size)
    before = [v2.RandomRotation(rotate, interpolation=BILINEAR, fill=MEAN_FILL)] if rotate else []
    before.append(v2.RandomHorizontalFlip())
    after = [ToDetector()]
    if color_jitter:
        after.insert(0, v2.ColorJitter(color_jitter, color_jitter, color_jitter, min(color_jitter / 4, 0.5)))
    plain = v2.Compose([*before, resize_to([size], longest, square), *after])
    if kind == "meta":
        resize = resize_to([scaled(n) for n in range(480, 801, 32)], longest, square)
        zoom = ResizeShortest([scaled(n) for n in (400, 500, 600)], 10 * longest)  # a line of pixels is not to fill the memory
        window = v2.Compose([zoom, RandomSizeCrop(scaled(384), scaled(600)), resize])
        return PickOne(
            plain,
            [v2.Compose([*before, v2.RandomChoice([resize, window]), *after])],
            [v2.Compose([*before, resize, *after])],
            size,
        )
    if kind == "strong":
        smaller = v2.RandomZoomOut(fill=MEAN_FILL, side_range=(1.0, 4.0))
        before.append(v2.RandomPhotometricDistort(p=0.5))
        window = [smaller, v2.RandomApply([RandomIoUCrop()], p=0.8)]  # ToDetector drops the boxes that it marks
        sides = range(-(-size * 3 // 4 // 32) * 32, size * 5 // 4 + 1, 32)
    else:
        window = [v2.RandomApply([RandomZoom(0.5)], p=0.5)]
        sides = sorted({min(n, size) for n in range(32, size + 32, 32) if n >= scaled(480)})

    def varied(window):
        return [
            v2.Compose([*before, *window, resize_to([side], longest * side // size, square), *after]) for side in sides
        ]

    return PickOne(plain, varied(window), varied([]), size)  # a larger tile would only be shrunk again


def detail_needed(size, kind):
    """How many pixels of a picture's shortest side train_transforms can show: all of it at `size`, a half or a quarter of it."""
    return {"meta": 1, "zoom": 2, "strong": 4}[kind] * size


def resize_to(sides, longest, square, exact=True):
    """The shortest side becomes one of `sides`, drawn anew for each image, the longest at most `longest`; or both become it."""
    if not square:
        return ResizeShortest(sides, longest, exact)
    return v2.RandomChoice([v2.Resize([side, side], antialias=True) for side in sides])


def eval_transforms(size=SHORT_SIDE, square=False, exact=True):
    """The shortest side `size`, the longest 1333/800 of it at most; or both `size`. exact: see resized_sides."""
    return PickOne(v2.Compose([resize_to([size], longest_side(size), square, exact), ToDetector()]))


def longest_side(size):
    """What the longest side is at most where the shortest is `size`."""
    return round(size * LONG_SIDE / SHORT_SIDE)
