"""A trained detector, from Python.

from detector import load

detector = load("runs/demo/best.pth")           # also a released ECDet, an exported file, a Hugging Face folder or name
detections = detector("photo.jpg")              # {"scores" (D,), "labels" (D,), "boxes" (D, 4) xyxy pixels, "names"}
detections = detector([image, array, "b.png"])  # a list for a list: paths, PIL images, arrays (H, W, 3) uint8 RGB
                                                # or RGBA, (H, W) grey of 8 or 16 bits: the same as their files
detector.save("folder")                         # model.safetensors, config.json and a model card
to_supervision(detections)                      # supervision.Detections, for its trackers and counters
"""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from checkpoint import LARGEST, check_thresholds, load_detector, write_folder
from datasets import collate, equal_batches
from devices import Graphed, autocast, choose_precision, find_device
from errors import UserError
from mistakes import DEFAULT
from tiles import detect_in_tiles
from transforms import MEAN, eval_transforms, longest_side, read_image, resized_sides, to_rgb


def load(source, device=None, image_size=None, threshold=None, tile=None, precision="auto"):
    """source: a checkpoint, see checkpoint.read_checkpoint, or a file of export.py -> Detector. Raises UserError.

    image_size: shortest side of the network's input (default: that of the training); threshold: lowest score that is
    returned (default: that with the best F1 in validation, for some classes one of their own; 0.4 if the checkpoint
    has none); tile: larger images are cut into tiles of that many pixels, 0 for image_size; precision: see
    devices.choose_precision; device: such as "cuda:1" (default: a GPU if there is one).
    """
    check_options(image_size, threshold)
    if Path(source).suffix in (".onnx", ".pt2"):
        if precision != "auto":
            raise UserError(f"--precision {precision}: {source} computes as it was exported; leave it out")
        if device is not None:
            raise UserError(f"--device {device}: {source} computes on what its runtime finds; leave it out")
        return ExportedDetector(source, threshold, tile, image_size)
    device = find_device(device)
    model, postprocess, content = load_detector(source, device)
    precision = choose_precision(precision, device, training=False)
    return Detector(model, postprocess, content, device, image_size, threshold, tile, precision)


def check_options(image_size, threshold):
    """Raises UserError."""
    if image_size is not None and not 1 <= image_size <= LARGEST["image_size"]:
        raise UserError(f"--image-size {image_size}: has to be in 1 .. {LARGEST['image_size']:,}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: has to be a score, in 0 .. 1")


def thresholds_of(content, threshold):
    """What a checkpoint or an exported file says, unless a threshold is given -> threshold, {class: its own}."""
    found = content.get("thresholds")
    if threshold is not None or not found:
        return DEFAULT if threshold is None else threshold, {}
    return found["score"], found["by_class"]


class Detector:
    """A network with its preprocessing and its classes; called with an image or a list of images.

    Label i is called `classes[i]`; `category_ids[i]` is its id in the training dataset.
    """

    def __init__(
        self, model, postprocess, content, device, image_size=None, threshold=None, tile=None, precision="float32"
    ):
        config = content["config"]
        image_size = image_size or config["image_size"]
        self.model, self.postprocess, self.content = model, postprocess, content
        self.graphed = Graphed(model)
        self.classes, self.category_ids = content["classes"], content["category_ids"]
        self.device, self.precision = device, precision
        self.threshold, self.by_class = thresholds_of(content, threshold)
        self.autocast, self.value_range = autocast(precision, device), config.get("value_range")
        self.tile = image_size if tile == 0 else tile or config.get("tile")
        self.transform = eval_transforms(image_size, config.get("square", False), config["exact_sides"])

    def __call__(self, sources, threshold=None, batch_size=8):
        """A path, PIL image or array -> {"scores", "labels", "boxes", "names"}, best first, on the CPU; list -> list.

        threshold: lowest score that is returned (default: that of `load`). Raises UserError if an image can't be read.
        """
        if not isinstance(sources, (list, tuple)):
            return self([sources], threshold)[0]
        detect = partial(self.detect_above, self.lowest_scores(threshold))
        results = []
        for start in range(0, len(sources), batch_size):
            images = [self.open(source) for source in sources[start : start + batch_size]]
            if self.tile is None:
                results += detect(images)
            else:
                results += [detect_in_tiles(detect, image, self.tile, self.lowest_scores()) for image in images]
        for detections in results:
            detections["names"] = [self.classes[label] for label in detections["labels"]]
        return results

    def open(self, source):
        """A path, PIL image or array -> RGB PIL image, its values scaled as in training. Raises UserError."""
        return to_image(source, self.value_range)

    def lowest_scores(self, threshold=None):
        """The lowest score of each class that is returned (K,); threshold: of all classes."""
        if threshold is not None:
            return torch.full((len(self.classes),), threshold)
        return torch.tensor([self.by_class.get(name, self.threshold) for name in self.classes])

    def detect_above(self, lowest, images):
        """`detect` without the detections whose score is below the `lowest` of their class."""
        results = []
        for detections in self.detect(images):
            keep = detections["scores"] >= lowest[detections["labels"]]
            results.append({key: value[keep] for key, value in detections.items()})
        return results

    @torch.no_grad()
    def detect(self, images):
        """PIL images -> [{"scores", "labels", "boxes"}], everything that the network detects, on the CPU.

        Only images that are padded to the same size share a batch: no image affects the detections in another.
        """
        divisor = self.model.backbone.size_divisor
        inputs = [self.transform(*unlabelled(image)) for image in images]
        sizes = [pixels.shape[-2:] for pixels, _ in inputs]
        results = [None] * len(images)
        for batch in equal_batches(sizes, len(images), divisor):
            pixels, mask, _ = collate([inputs[i] for i in batch], divisor)
            original_sizes = torch.tensor([[images[i].height, images[i].width] for i in batch], device=self.device)
            if self.graphed.model is not self.model:
                self.graphed = Graphed(self.model)
            with self.graphed.lock:  # another thread's call would overwrite the outputs
                with self.autocast:
                    outputs = self.graphed(pixels.to(self.device, memory_format=torch.channels_last), mask)
                for i, detections in zip(batch, self.postprocess(outputs, original_sizes)):
                    results[i] = {key: value.cpu() for key, value in detections.items()}
        return results

    def save(self, folder):
        """Writes a folder for `load` and the Hugging Face hub: weights, settings, a model card. Raises UserError."""
        write_folder(self.content, folder)

    def push(self, repository, **options):
        """Uploads what `save` writes to USER/NAME on the Hugging Face hub, created if it does not exist.

        options: of huggingface_hub.HfApi.upload_folder, whose result is returned.
        """
        import tempfile

        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api = huggingface_hub.HfApi()
            api.create_repo(repository, exist_ok=True)
            return api.upload_folder(repo_id=repository, folder_path=folder, **options)


def to_image(source, value_range=None):
    """A path, PIL image, array or tensor -> RGB PIL image. Raises UserError.

    The same pixels give the same image however they come, see transforms.read_image. Arrays are (H, W) grey, (H, W, 2)
    with alpha, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8 or uint16; (H, W) may also be bool, int32 or float32.
    value_range: see transforms.common_range.
    """
    if isinstance(source, (str, Path)):
        try:
            return read_image(source, value_range=value_range)
        except Exception as error:  # PIL raises exceptions of many types for broken files
            raise UserError(f"{source}: can't be read ({error})") from None
    image = source if isinstance(source, Image.Image) else array_to_image(source)
    try:
        return to_rgb(image, value_range=value_range)
    except Exception as error:  # an image whose file is read only now
        raise UserError(f"a PIL image of mode {image.mode} can't be read ({error})") from None


def array_to_image(array):
    """An array or tensor, see to_image -> PIL image. Raises UserError."""
    if isinstance(array, torch.Tensor):
        array = array.cpu().numpy()
    if not isinstance(array, np.ndarray):
        given = type(array).__name__
    elif 0 in array.shape:
        given = f"one without pixels, of shape {array.shape}"
    elif array.ndim == 2 and array.dtype in (bool, np.uint8, np.uint16, np.int32, np.float32):
        return Image.fromarray(array)
    elif has_channels_last(array) and array.dtype in (np.uint8, np.uint16):
        if array.dtype == np.uint16:
            array = (array >> 8).astype(np.uint8)  # what PIL reads from colour files of 16 bits
        return Image.fromarray(array)
    else:
        given = f"{array.dtype} of shape {array.shape}"
    raise UserError(f"an image has to be a path, a PIL image or an array (H, W, 3) of uint8, not {given}")


def has_channels_last(array):
    """Whether an array is (H, W, 2), (H, W, 3) or (H, W, 4); a (3, H, 4) is rather one with its channels first."""
    if array.ndim != 3:
        return False
    return array.shape[2] == 3 or (array.shape[2] in (2, 4) and array.shape[0] > 4)


def unlabelled(image):
    """A PIL image -> (image, target) as transforms take them, without any box."""
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(image.height, image.width))
    none = torch.zeros(0, dtype=torch.long)
    return tv_tensors.Image(TF.pil_to_tensor(image)), {"boxes": boxes, "labels": none, "area": none, "iscrowd": none}


def to_supervision(found):
    """The detections in one image -> supervision.Detections. Raises UserError if supervision is not installed."""
    try:
        import supervision
    except ImportError:
        raise UserError("supervision is not installed; pip install supervision") from None
    return supervision.Detections(
        xyxy=found["boxes"].numpy(),
        confidence=found["scores"].numpy(),
        class_id=found["labels"].numpy(),
        data={"class_name": np.array(found["names"], dtype=str)},
    )


# Files of export.py


class ExportedDetector(Detector):
    """A Detector from a file of export.py. If its graph has a fixed size, images are resized to fit and padded."""

    def __init__(self, path, threshold=None, tile=None, image_size=None):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        about, self.run = open_onnx(path) if path.suffix == ".onnx" else open_torch(path)
        height, width = about["height"], about["width"]
        if image_size and not about.get("divisor"):
            raise UserError(
                f"--image-size {image_size}: {path} was exported for {height}x{width} alone; export it with --any-size"
            )
        self.about = about | ({"image_size": image_size} if image_size else {})
        self.classes, self.category_ids = about["classes"], about["category_ids"]
        self.device = torch.device("cpu")
        try:
            check_thresholds(about.get("thresholds"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: its thresholds are not those of export.py ({error})") from None
        self.threshold, self.by_class = thresholds_of(about, threshold)
        self.value_range = about.get("value_range")
        self.tile = (image_size or min(height, width)) if tile == 0 else tile or about.get("tile")

    def save(self, folder):
        raise UserError("an exported file can't be saved as a folder; load the checkpoint that it was made from")

    def detect(self, images):
        results = []
        for image in images:
            height, width = self.about["height"], self.about["width"]
            if self.about.get("divisor"):
                height, width = canvas_size(image, self.about, self.about["divisor"])
            canvas, scale = to_canvas(image, height, width, self.about["square"])
            scores, labels, boxes = (part[0] for part in self.run(canvas[None]))
            limit = torch.tensor([image.width, image.height] * 2)
            boxes = (boxes / torch.tensor(scale * 2)).clamp(min=0).minimum(limit)
            results.append({"scores": scores, "labels": labels, "boxes": boxes})
        return results


def open_onnx(path):
    """-> the metadata that export.py wrote, and a function of images (B, 3, H, W) in [0, 1]. Raises UserError."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: needs onnxruntime; pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        about = json.loads(session.get_modelmeta().custom_metadata_map["detector"])
    except Exception as error:  # onnxruntime has exceptions of its own
        raise UserError(f"{path}: not an ONNX file of export.py ({type(error).__name__}: {str(error)[:200]})") from None
    return about, partial(run_onnx, session)


def run_onnx(session, images):
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def open_torch(path):
    """open_onnx for a file of torch.export."""
    extra = {"detector": ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
        return json.loads(extra["detector"]), torch.no_grad()(program.module())
    except Exception as error:  # torch raises exceptions of many types for other files
        raise UserError(f"{path}: not a file of export.py ({type(error).__name__}: {str(error)[:200]})") from None


def canvas_size(image, config, divisor):
    """The (height, width) in which an image enters the network, padding included."""
    size = config["image_size"]
    if config.get("square"):
        sides = size, size
    else:
        sides = resized_sides(image.height, image.width, size, longest_side(size))
    return tuple(math.ceil(side / divisor) * divisor for side in sides)


def to_canvas(image, height, width, square):
    """A PIL image -> (3, height, width) in [0, 1], resized to fit, and the factors (x, y) by which it was scaled.

    Unless `square`, it keeps its aspect ratio; the rest, at the right and the bottom, has the mean colour.
    """
    fitted_width, fitted_height = width, height
    if not square:
        scale = min(width / image.width, height / image.height)
        fitted_width = max(1, min(width, round(image.width * scale)))
        fitted_height = max(1, min(height, round(image.height * scale)))
    pixels = TF.resize(TF.pil_to_tensor(image), (fitted_height, fitted_width), antialias=True)
    canvas = torch.tensor(MEAN)[:, None, None].repeat(1, height, width)
    canvas[:, :fitted_height, :fitted_width] = TF.to_dtype(pixels, torch.float32, scale=True)
    return canvas, (fitted_width / image.width, fitted_height / image.height)
