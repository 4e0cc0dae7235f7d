"""From an image's file to the tensor that a network sees: reading, then the transforms of training and evaluation, in
the style of DETR (arXiv 2005.12872), built on torchvision's v2 transforms.

Transforms take a uint8 RGB tensor (3, H, W) and a target whose `boxes` are a `tv_tensors.BoundingBoxes` in xyxy pixels.
They give a normalised float tensor and a target with `boxes` cxcywh in [0, 1]; see datasets.py for the other entries.
"""

import importlib.util
import math
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every backbone here was trained with
SCALE, SHIFT = 1 / (255 * torch.tensor(STD)), -torch.tensor(MEAN) / torch.tensor(STD)
MEAN_FILL = {tv_tensors.Image: tuple(round(255 * m) for m in MEAN), "others": 0}  # around a rotated or shrunken image
BILINEAR = v2.InterpolationMode.BILINEAR
PER_BOX = ("labels", "area", "iscrowd")  # entries of a target with one row per box, besides `boxes`
ORIENTATION = 0x0112  # its number in EXIF
SHORT_SIDE, LONG_SIDE = 800, 1333  # of an image at size 800; all lengths scale with the size


# Reading images

# Formats are told apart by content, whatever the suffix. PIL knows many more, some of which run other programs.
SAFE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()
FORMATS = [name for name in (*SAFE_FORMATS, "HEIF") if name in Image.OPEN]
IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "DIB", "MPO")}
# Other images, which are passed over and counted in a folder
CLOSED_SUFFIXES = {".heic", ".heif", ".dng", ".svg", ".psd", ".tga", ".ico", ".eps", ".npy"} - IMAGE_SUFFIXES
# An image over both is refused as a decompression bomb. PIL warns at more pixels, and refuses at twice as many as that.
BOMB_PIXELS, BOMB_PIXELS_PER_BYTE = 2**25, 200
PIL_PIXELS = Image.MAX_IMAGE_PIXELS
LARGE_IMAGES = "DETECTOR_LARGE_IMAGES"  # in the environment, which the processes that load images inherit
HOW_TO_OPEN = "a decompression bomb, or a large image: --large-images opens it"
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def allow_large_images(allowed):
    """Whether images are opened that look like decompression bombs: those that the user knows to be honest."""
    os.environ[LARGE_IMAGES] = "1" if allowed else ""
    Image.MAX_IMAGE_PIXELS = None if allowed else PIL_PIXELS


allow_large_images(bool(os.environ.get(LARGE_IMAGES)))


def open_image(path):
    """-> PIL image, its pixels not yet decoded. Raises OSError, and whatever PIL raises."""
    if not os.path.exists(path):
        raise FileNotFoundError("missing")
    if not os.path.isfile(path):
        raise OSError("not a regular file")
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise OSError(f"more than {2 * PIL_PIXELS:,} pixels: {HOW_TO_OPEN}") from None
    if image.format == "TIFF":
        image.filename = ""  # PIL maps a plain TIFF into memory at the size of the turned image, which scrambles it
    pixels, size = image.width * image.height, os.path.getsize(path)
    if pixels > BOMB_PIXELS and pixels > BOMB_PIXELS_PER_BYTE * size and not os.environ.get(LARGE_IMAGES):
        image.close()
        raise OSError(f"{pixels:,} pixels in {size:,} bytes: {HOW_TO_OPEN}")
    return image


def read_image(path, upright=True, detail=None, value_range=None):
    """Any image file -> RGB PIL image: rotated as its EXIF says, transparency over white, more bits scaled to 8.

    upright: False leaves the pixels as they are stored.
    detail: a JPEG is decoded at a half, a quarter or an eighth of its size if its shortest side keeps `detail` pixels.
    value_range: of more than 8 bits, see common_range; None: the image's own.
    """
    with open_image(path) as image:
        n = reduction(*image.size, detail)
        image.draft(None, (image.width // n, image.height // n))
        image = to_rgb(image, upright, value_range)
    if orientation(image) != 1:
        del image.getexif()[ORIENTATION]  # whoever gets the image would turn it
    return image


def to_rgb(image, upright=True, value_range=None):
    """A PIL image of any mode, which stays as it is -> RGB PIL image; see read_image."""
    if upright and orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image, value_range or common_range([extremes(image)]))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(image, value_range):
    """A PIL image of wide integers or floats -> one of 8 bits, from black at the low end of the range to white."""
    low, high = value_range
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low, posinf=high, neginf=low).clip(low, high)
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


def extremes(image):
    """A PIL image -> its lowest value, its highest, and whether they are floats; None if it has 8 bits or fewer.

    Of floats a thousandth at either end does not count: hot and dead pixels, values that stand for none.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    values = np.asarray(image)
    if image.mode != "F":
        return int(values.min()), int(values.max()), False
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.0, True
    return float(np.quantile(values, 0.001, method="higher")), float(np.quantile(values, 0.999, method="lower")), True


def common_range(found):
    """[extremes of an image] -> (low, high), which become black and white in all these images; None if there is none.

    Integers: from 0 to the most that 8, 10, 12, 14 or 16 bits hold, the fewest that hold all of them. Floats, and
    integers that are negative or still larger: from the lowest value to the highest.
    """
    found = [entry for entry in found if entry]
    if not found:
        return None
    low, high = min(entry[0] for entry in found), max(entry[1] for entry in found)
    if low >= 0 and not any(is_float for _, _, is_float in found):
        low, high = 0, next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits), high)
    return low, high


def reduction(width, height, detail):
    """-> 1, 2, 4 or 8, the factor by which both sides may shrink. It divides them, so that boxes stay exact."""
    if not detail:
        return 1
    for n in (8, 4, 2):
        if min(width, height) // n >= detail and width % n == height % n == 0:
            return n
    return 1


def orientation(image):
    """How a PIL image is to be turned, 1 to 8 as in EXIF; 1, not at all, if its EXIF can't be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises exceptions of many types for broken ones, which viewers pass over
        return 1


def upright_size(image):
    """(width, height) of a PIL image once it is rotated as its EXIF says."""
    if orientation(image) not in (5, 6, 7, 8):
        return image.size
    if image.format == "TIFF":  # PIL turns these itself
        image.load()
        return image.size
    return image.size[::-1]


# Transforms


def resized_sides(height, width, side, longest=math.inf, exact=True):
    """(height, width) of an image after its shortest side is resized to `side`; at least one pixel each.

    The shortest side becomes smaller than `side` if the longest would exceed `longest`. exact=False truncates both, as
    earlier versions did: 480 could then become 479.
    """
    scale = min(side / min(height, width), longest / max(height, width))
    to_pixels = round if exact else int
    return tuple(max(1, to_pixels(n * scale)) for n in (height, width))


class ResizeShortest(v2.Transform):
    """Resizes the shortest side to one of `sides`, redrawn for each image; see resized_sides."""

    def __init__(self, sides, longest=math.inf, exact=True):
        super().__init__()
        self.sides, self.longest, self.exact = list(sides), longest, exact

    def make_params(self, flat_inputs):
        side = self.sides[draw_integer(0, len(self.sides) - 1)]
        return dict(size=resized_sides(*v2.query_size(flat_inputs), side, self.longest, self.exact))

    def transform(self, inpt, params):
        return self._call_kernel(TF.resize, inpt, size=list(params["size"]), antialias=True)


class RandomSizeCrop(v2.Transform):
    """Crops a window whose sides are drawn from [smallest, largest] pixels, each at most the image's own."""

    def __init__(self, smallest, largest):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def window(self, h, w):
        """Height and width of an image -> those of the window."""
        return tuple(draw_integer(min(self.smallest, n), min(self.largest, n)) for n in (h, w))

    def make_params(self, flat_inputs):
        h, w = v2.query_size(flat_inputs)
        height, width = self.window(h, w)
        return dict(top=draw_integer(0, h - height), left=draw_integer(0, w - width), height=height, width=width)

    def transform(self, inpt, params):
        window = self._call_kernel(TF.crop, inpt, **params)
        if not isinstance(window, tv_tensors.Image):
            return window
        # Resizing a view is three times as slow: torch's fast path takes contiguous channels-last memory only.
        return tv_tensors.wrap(window.permute(1, 2, 0).contiguous().permute(2, 0, 1), like=window)


class RandomZoom(RandomSizeCrop):
    """Crops a window of the image's own aspect ratio; its sides are a fraction in [smallest, 1] of the image's."""

    def __init__(self, smallest):
        super().__init__(smallest, 1.0)

    def window(self, h, w):
        fraction = self.smallest + (1 - self.smallest) * float(torch.rand(()))
        return max(1, round(fraction * h)), max(1, round(fraction * w))


class Transpose(v2.Transform):
    """Swaps rows and columns; with flips, that turns an image by 90 degrees."""

    def transform(self, inpt, params):
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return tv_tensors.wrap(inpt[:, [1, 0, 3, 2]], like=inpt, canvas_size=inpt.canvas_size[::-1])
        if isinstance(inpt, tv_tensors.Image):  # the memory stays channels-last, which resizing is fast on
            return tv_tensors.wrap(inpt.permute(2, 1, 0).contiguous().permute(2, 0, 1), like=inpt)
        return inpt


class RandomIoUCrop(v2.RandomIoUCrop):
    """torchvision's, except that it leaves out images a few pixels thin: there torchvision divides by zero."""

    def make_params(self, flat_inputs):
        if min(v2.query_size(flat_inputs)) * self.min_scale < 1:
            return {}
        return super().make_params(flat_inputs)


def draw_integer(low, high):
    """A random integer, uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, ()))


class ToDetector(v2.Transform):
    """The last step: normalises pixels, drops boxes thinner than a pixel, converts the others to cxcywh in [0, 1]."""

    def forward(self, image, target):
        # Resizing takes a box at the border to 640.00006 of 640 pixels, so boxes are clamped, not dropped, for that.
        boxes = torch.as_tensor(TF.clamp_bounding_boxes(target["boxes"]))
        keep = (boxes[:, 2:] - boxes[:, :2] >= 0.99).all(1)  # one pixel, with a tolerance for rounding
        target = target | {key: target[key][keep] for key in PER_BOX}
        image = normalized(image)
        h, w = image.shape[-2:]
        boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / torch.tensor([w, h, w, h])
        return image, target | {"boxes": boxes, "size": torch.tensor([h, w])}


def normalized(image):
    """uint8 (3, H, W) -> float32 (3, H, W), minus ImageNet's mean, divided by its standard deviation.

    The memory stays channels-last, as decoders give it and convolutions take it. Whole rows at a time, in place: four
    times as fast as channel by channel.
    """
    rows = image.as_subclass(torch.Tensor).permute(1, 2, 0).flatten(1).float()
    w = image.shape[-1]
    scale, shift = SCALE.repeat(w), SHIFT.repeat(w)
    return torch.addcmul(shift, rows, scale, out=rows).unflatten(1, (w, 3)).permute(2, 0, 1)


class PickOne:
    """(image, target, draw, is_mosaic) -> (image, target), by the transform that `draw` in [0, 1) picks.

    Without a draw or without transforms, by `plain`. Mosaics have transforms of their own, because their images have
    already been scaled, from shortest sides of at most `tile`.
    """

    def __init__(self, plain, transforms=(), for_mosaics=(), tile=math.inf):
        self.plain, self.transforms, self.for_mosaics, self.tile = plain, transforms, for_mosaics, tile

    def __call__(self, image, target, draw=None, is_mosaic=False):
        transforms = self.for_mosaics if is_mosaic else self.transforms
        if not transforms or draw is None:
            return self.plain(image, target)
        return transforms[int(draw * len(transforms))](image, target)


# Several images made into one


def mosaic(samples, tile=math.inf):
    """Four (image, target), uint8 and xyxy pixels -> one mosaic of two by two images with all their objects (ECDet).

    All are resized to the size of the first, which is shrunk before if its shortest side exceeds `tile`. The mosaic is
    rotated by up to 10 degrees, shifted by up to 0.1 and scaled by 0.5 to 1.5. It keeps the first image's id and
    original size.
    """
    h, w = samples[0][0].shape[-2:]
    h, w = resized_sides(h, w, min(h, w, tile))
    pixels, boxes = [], []
    for (image, target), (x, y) in zip(samples, ((0, 0), (w, 0), (0, h), (w, h))):
        image, box = TF.resize(image, [h, w], antialias=True), TF.resize(target["boxes"], [h, w])
        pixels.append(image.as_subclass(torch.Tensor))
        boxes.append(box.as_subclass(torch.Tensor) + torch.tensor([x, y, x, y]))
    top, bottom = torch.cat(pixels[:2], dim=2), torch.cat(pixels[2:], dim=2)
    image = tv_tensors.Image(torch.cat([top, bottom], dim=1))
    target = dict(samples[0][1])
    target["boxes"] = tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=(2 * h, 2 * w))
    for key in PER_BOX:
        target[key] = torch.cat([t[key] for _, t in samples])
    move = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.5, 1.5), interpolation=BILINEAR, fill=MEAN_FILL)
    return move(image, target)


def mix_up(samples, fraction):
    """[(image, target)], ready for a detector -> each blended with its neighbour (mixup, arXiv 1710.09412).

    A blend has the `fraction` of its own image, and the boxes of both. An image whose neighbour has another size,
    or that has none, stays as it is.
    """
    if len(samples) < 2:
        return samples
    mixed = []
    for (image, target), (other_image, other_target) in zip(samples, samples[-1:] + samples[:-1]):
        if image.shape == other_image.shape:
            image = fraction * image + (1 - fraction) * other_image
            target = target | {key: torch.cat([target[key], other_target[key]]) for key in ("boxes", *PER_BOX)}
        mixed.append((image, target))
    return mixed


# The transforms of training and evaluation


def train_transforms(size=SHORT_SIDE, kind="zoom", color_jitter=0.0, rotate=0.0, square=False, flip="horizontal"):
    """-> PickOne for training.

    kind: "meta" is DETR's augmentation, "zoom" the default one, "strong" ECDet's; see meta_steps, zoom_steps and
    strong_steps. rotate: by up to so many degrees; color_jitter: the strength, 0 for none. Without a draw, the whole
    image is shown at `size`. square: images are resized to squares, whatever their aspect ratio. flip: see FLIPS;
    "turns" also turns half of the batches by 90 degrees, all images of one, so that they stay of one shape.
    """
    before, after = [*FLIPS[flip]], [ToDetector()]
    if rotate:
        before.insert(0, v2.RandomRotation(rotate, interpolation=BILINEAR, fill=MEAN_FILL))
    if color_jitter:
        after.insert(0, v2.ColorJitter(color_jitter, color_jitter, color_jitter, min(color_jitter / 4, 0.5)))

    def compose(steps):
        return v2.Compose([*before, *steps, *after])

    plain = compose([resize_to([size], longest_side(size), square)])
    for_images, for_mosaics = AUGMENTATIONS[kind](size, square)
    if flip == "turns":
        for_images = [turned for steps in for_images for turned in (steps, [Transpose(), *steps])]
    # A larger tile than `size` would only be shrunk again.
    return PickOne(plain, [compose(steps) for steps in for_images], [compose(steps) for steps in for_mosaics], size)


# Most things may be mirrored horizontally and stay what they are, but not letters or left and right hands
FLIPS = {
    "none": [],
    "horizontal": [v2.RandomHorizontalFlip()],
    "both": [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
    "turns": [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
}


def meta_steps(size, square):
    """DETR's augmentation, of images and of mosaics: each a list of alternatives, an alternative a list of transforms.

    The shortest side is drawn from 480..800, or a window of any aspect ratio is cropped first; lengths for size 800.
    """
    longest = longest_side(size)
    resize = resize_to([scaled(n, size) for n in range(480, 801, 32)], longest, square)
    # The limit keeps an image one pixel wide from filling the memory.
    enlarge = ResizeShortest([scaled(n, size) for n in (400, 500, 600)], 10 * longest)
    crop = v2.Compose([enlarge, RandomSizeCrop(scaled(384, size), scaled(600, size)), resize])
    return [[v2.RandomChoice([resize, crop])]], [[resize]]


def zoom_steps(size, square):
    """The default augmentation; see meta_steps.

    Half of the images are cropped to a window of their own aspect ratio. The draw picks the shortest side from the
    multiples of 32 in 480..800, for size 800. A whole batch shares its draw and is padded to multiples of 32, so that
    hardly any padding is computed.
    """
    sides = sorted({min(n, size) for n in range(32, size + 32, 32) if n >= scaled(480, size)})
    zoom = v2.RandomApply([RandomZoom(0.5)], p=0.5)
    return at_each_side([zoom], sides, size, square), at_each_side([], sides, size, square)


def strong_steps(size, square):
    """ECDet's augmentation; see meta_steps.

    Colours are distorted, images are shrunk and cropped to a window (SSD, arXiv 1512.02325). The draw picks the
    shortest side from the multiples of 32 in 0.75..1.25 of `size`.
    """
    sides = range(32 * math.ceil(size * 3 / 4 / 32), size * 5 // 4 + 1, 32)
    distort = v2.RandomPhotometricDistort(p=0.5)
    shrink = v2.RandomZoomOut(fill=MEAN_FILL, side_range=(1.0, 4.0))
    crop = v2.RandomApply([RandomIoUCrop()], p=0.8)  # sets boxes outside to zero, ToDetector drops them
    return at_each_side([distort, shrink, crop], sides, size, square), at_each_side([distort], sides, size, square)


AUGMENTATIONS = {"meta": meta_steps, "zoom": zoom_steps, "strong": strong_steps}


def detail_needed(size, kind):
    """The largest shortest side, in pixels, of which train_transforms can show the full detail.

    That is `size` where the whole image is shown; windows are as small as a half or a quarter of the image.
    """
    return {"meta": 1, "zoom": 2, "strong": 4}[kind] * size


def at_each_side(steps, sides, size, square):
    """For each of `sides` a list of transforms: the steps, then a resize to that side."""
    longest = longest_side(size)
    return [[*steps, resize_to([side], longest * side // size, square)] for side in sides]


def resize_to(sides, longest, square, exact=True):
    """A transform that resizes the shortest side to one of `sides`, redrawn for each image, the longest to `longest` at
    most; square: both to one of `sides`."""
    if not square:
        return ResizeShortest(sides, longest, exact)
    return v2.RandomChoice([v2.Resize([side, side], antialias=True) for side in sides])


def eval_transforms(size=SHORT_SIDE, square=False, exact=True):
    """-> PickOne that resizes the shortest side to `size`, the longest to 1333/800 of it at most.

    square: it resizes both to `size`. exact: see resized_sides.
    """
    return PickOne(v2.Compose([resize_to([size], longest_side(size), square, exact), ToDetector()]))


def longest_side(size):
    """The limit of the longest side where the shortest is `size`."""
    return round(size * LONG_SIDE / SHORT_SIDE)


def scaled(length, size):
    """A length for size 800 -> the same for `size`; at least 16."""
    return max(16, round(length * size / SHORT_SIDE))
