"""A trained detector from Python.

    from detector import load
    detector = load("runs/demo/best.pth")            # a file of train.py, a released ECDet, a Hugging Face folder or repository
    found = detector("photo.jpg")                    # {"scores" (D,), "labels" (D,), "boxes" (D, 4) xyxy pixels, "names": [...]}
    found = detector([image, array, "more.png"])     # a list for a list: paths, PIL images, arrays (H, W, 3) uint8 RGB
    detector.save("folder")                          # model.safetensors, config.json and a model card
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from checkpoint import load_detector, write_folder
from datasets import collate, equal_batches, read_image
from devices import autocast, choose_device, choose_precision
from errors import UserError
from tiles import detect_in_tiles
from transforms import MEAN, eval_transforms, longest_side, resized_sides


def load(source, device=None, image_size=None, threshold=0.4, tile=None, precision="auto"):
    """source: see checkpoint.read_checkpoint; image_size: shortest side (default: that of the training); threshold: lowest score that
    is given; tile: larger pictures are cut into tiles of that many pixels, 0 for image_size; precision: see devices.choose_precision
    -> Detector. Raises UserError."""
    if Path(source).suffix in (".onnx", ".pt2"):
        if precision != "auto":
            raise UserError(f"--precision {precision}: {source} computes as it was exported; leave it out")
        return ExportedDetector(source, threshold, tile, image_size)
    device = torch.device(device) if device else choose_device()
    model, postprocess, content = load_detector(source, device)
    precision = choose_precision(precision, device, training=False)
    return Detector(model, postprocess, content, device, image_size, threshold, tile, precision)


class Detector:
    """`classes` and `category_ids` say what labels mean; called with a picture or a list of them."""

    def __init__(self, model, postprocess, content, device, image_size=None, threshold=0.4, tile=None, precision="float32"):
        self.model, self.postprocess, self.content, self.device, self.threshold = model, postprocess, content, device, threshold
        self.classes, self.category_ids, self.precision = content["classes"], content["category_ids"], precision
        config = content["config"]
        self.tile = (image_size or config["image_size"]) if tile == 0 else tile
        self.transform = eval_transforms(image_size or config["image_size"], config.get("square", False), config["exact_sides"])

    def __call__(self, pictures, threshold=None, batch_size=8):
        """A path, PIL image or array -> {"scores", "labels", "boxes", "names"}, best first, on the CPU; a list of them -> a list.

        Raises UserError where a picture can't be read or is of no kind that is known.
        """
        if not isinstance(pictures, (list, tuple)):
            return self([pictures], threshold)[0]
        found, least = [], self.threshold if threshold is None else threshold
        for start in range(0, len(pictures), batch_size):
            images = [to_image(picture) for picture in pictures[start : start + batch_size]]
            if self.tile is None:
                found += self.detect(images)
            else:  # what is below the threshold in its tile is not worth merging
                sure = lambda images: [self.above(detections, least) for detections in self.detect(images)]
                found += [detect_in_tiles(sure, image, self.tile) for image in images]
        found = [self.above(detections, least) for detections in found]
        return [detections | {"names": [self.classes[label] for label in detections["labels"]]} for detections in found]

    @torch.no_grad()
    def detect(self, images):
        """PIL images -> [{"scores", "labels", "boxes"}] with everything that the network finds, on the CPU. Only images that are
        padded to the same size share a batch: what is found in one doesn't depend on the others."""
        divisor, found = self.model.backbone.size_divisor, [None] * len(images)
        inputs = [self.transform(*unlabelled(image)) for image in images]
        for batch in equal_batches([pixels.shape[-2:] for pixels, _ in inputs], len(images), divisor):
            pixels, mask, _ = collate([inputs[i] for i in batch], divisor)
            with autocast(self.precision, self.device):
                outputs = self.model(pixels.to(self.device, memory_format=torch.channels_last), mask)
            sizes = torch.tensor([[images[i].height, images[i].width] for i in batch], device=self.device)
            for i, detections in zip(batch, self.postprocess(outputs, sizes)):
                found[i] = {key: value.cpu() for key, value in detections.items()}
        return found

    def above(self, detections, threshold):
        return {key: value[detections["scores"] >= threshold] for key, value in detections.items()}

    def save(self, folder):
        """Writes model.safetensors, config.json and README.md, the model card: what `load` and the Hugging Face hub take."""
        write_folder(self.content, folder)

    def push(self, repository, **options):
        """Uploads the same to a repository of the Hugging Face hub, USER/NAME, made if it is not there; options: of upload_folder."""
        import tempfile

        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api = huggingface_hub.HfApi()
            api.create_repo(repository, exist_ok=True)
            return api.upload_folder(repo_id=repository, folder_path=folder, **options)


class ExportedDetector(Detector):
    """The same from a file of export.py. Where its graph takes pictures of one size, others are made to fit and padded."""

    def __init__(self, path, threshold=0.4, tile=None, image_size=None):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        about, self.run = (open_onnx if path.suffix == ".onnx" else open_torch)(path)
        if image_size and not about.get("divisor"):
            raise UserError(f"--image-size {image_size}: {path} was exported for {about['height']}x{about['width']} alone; export it with --any-size")
        self.about = about | ({"image_size": image_size} if image_size else {})
        self.classes, self.category_ids, self.threshold, self.device = about["classes"], about["category_ids"], threshold, torch.device("cpu")
        self.tile = (image_size or min(about["height"], about["width"])) if tile == 0 else tile

    def detect(self, images):
        about, found = self.about, []
        for image in images:
            height, width = canvas_size(image, about, about["divisor"]) if about.get("divisor") else (about["height"], about["width"])
            canvas, scale = to_canvas(image, height, width, about["square"])
            scores, labels, boxes = (part[0] for part in self.run(canvas[None]))
            limit = torch.tensor([image.width, image.height] * 2)
            found.append({"scores": scores, "labels": labels, "boxes": (boxes / torch.tensor(scale * 2)).clamp(min=0).minimum(limit)})
        return found


def open_onnx(path):
    """-> what the file says about itself, and a function of images (B, 3, H, W) in [0, 1]. Raises UserError."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: needs onnxruntime; pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        about = json.loads(session.get_modelmeta().custom_metadata_map["detector"])
    except Exception as error:  # onnxruntime raises kinds of its own
        raise UserError(f"{path}: not an ONNX file of export.py ({type(error).__name__}: {str(error)[:200]})") from None
    return about, lambda images: [torch.from_numpy(part) for part in session.run(None, {"images": images.numpy()})]


def open_torch(path):
    extra = {"detector": ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
        return json.loads(extra["detector"]), torch.no_grad()(program.module())
    except Exception as error:  # torch raises many kinds on files that are not its own
        raise UserError(f"{path}: not a file of export.py ({type(error).__name__}: {str(error)[:200]})") from None


def canvas_size(image, config, divisor):
    """(height, width) that a picture gets on its way into the network, padding included."""
    if config.get("square"):
        sides = (config["image_size"],) * 2
    else:
        size = config["image_size"]
        sides = resized_sides(image.height, image.width, size, longest_side(size))
    return tuple(math.ceil(side / divisor) * divisor for side in sides)


def to_canvas(image, height, width, square):
    """A PIL image -> (3, height, width) in [0, 1], resized to fit, in its proportions unless square, padded with the mean colour at the right
    and bottom; and by how much it was scaled, (x, y)."""
    scale = min(width / image.width, height / image.height)
    sides = (width, height) if square else (max(1, min(width, round(image.width * scale))), max(1, min(height, round(image.height * scale))))
    pixels = TF.to_dtype(TF.resize(TF.pil_to_tensor(image), sides[::-1], antialias=True), torch.float32, scale=True)
    canvas = torch.tensor(MEAN)[:, None, None].repeat(1, height, width)
    canvas[:, : sides[1], : sides[0]] = pixels
    return canvas, (sides[0] / image.width, sides[1] / image.height)


def to_supervision(found):
    """What a Detector gives for a picture -> supervision.Detections. Raises UserError where supervision is not installed."""
    try:
        import supervision
    except ImportError:
        raise UserError("supervision is not installed; pip install supervision") from None
    return supervision.Detections(
        xyxy=found["boxes"].numpy(), confidence=found["scores"].numpy(), class_id=found["labels"].numpy(), data={"class_name": np.array(found["names"], dtype=str)},
    )  # fmt: skip


def unlabelled(image):
    """A PIL image -> image and target without boxes, as transforms take them."""
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(image.height, image.width))
    none = torch.zeros(0, dtype=torch.long)
    return tv_tensors.Image(TF.pil_to_tensor(image)), {"boxes": boxes, "labels": none, "area": none, "iscrowd": none}


def to_image(picture):
    """A path, PIL image or array (H, W, 3) or (H, W) uint8 -> RGB PIL image."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, (str, Path)):
        try:
            return read_image(picture)
        except Exception as error:  # PIL raises many kinds on broken files
            raise UserError(f"{picture}: can't be read ({error})") from None
    if isinstance(picture, torch.Tensor):
        picture = picture.cpu().numpy()
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
        return Image.fromarray(picture).convert("RGB")
    kind = f"{picture.dtype} of shape {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise UserError(f"a picture is a path, a PIL image or an array (H, W, 3) of uint8, not {kind}")
