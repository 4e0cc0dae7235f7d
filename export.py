"""Exports a detector as one file that needs none of this code: ONNX or torch.export.

ONNX needs: pip install onnx onnxscript onnxruntime.

    python export.py runs/mine/best.pth                                runs/mine/best.onnx
    python export.py runs/mine/best.pth --int8                         runs/mine/best.int8.onnx too, a third as large
    python export.py ecdet_s.pth --format torch                        ecdet_s.pt2
    python infer.py photo.jpg --checkpoint runs/mine/best.onnx

The graph takes `images` (B, 3, H, W), RGB in [0, 1]: B is free, H and W are fixed or, with --any-size, multiples of 32.
It returns `scores` and `labels` (B, D) and `boxes` (B, D, 4) xyxy pixels, best first; the classes are in the file's
metadata. The file is only written if its detections in the image agree with PyTorch's. --int8 calibrates on training
images, and both --int8 and --half print the AP of all files on the validation images.
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from checkpoint import FILE_SUFFIXES, load_detector
from demo_data import draw_picture
from detector import ExportedDetector, canvas_size, load, to_canvas, to_image
from devices import seconds_of
from errors import Offline, UserError, run_script, writing
from evaluate import evaluate_one_by_one, load_run_splits
from quantize import to_half, to_int8
from tiles import cut_into_tiles
from transforms import MEAN, STD, allow_large_images, longest_side, read_image, resized_sides
from weights import first_line

# How the run's data was read
OF_DATA = ("train_split", "val_split", "val_fraction", "classes", "single_class", "trained_on")
CALIBRATION_IMAGES = 100
SCORES_WITHIN, BOXES_WITHIN = 1e-3, 0.5  # how far an exported detection may be off: in score, and in pixels


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="as for infer.py")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument(
        "--image",
        "--picture",
        metavar="FILE",
        help="decides the size, and is the image that the file is checked with (default: a drawing of the shape that "
        "most training images have)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of the graph (default: the size at which the image enters the network in PyTorch)",
    )
    parser.add_argument(
        "--any-size",
        action="store_true",
        help="the graph takes images of any size that is padded to multiples of 32 (of a plain ViT's patch)",
    )
    parser.add_argument("--int8", action="store_true", help="of ONNX: write a copy in int8 too, a third as large")
    parser.add_argument(
        "--half", action="store_true", help="of ONNX: write a copy in float16 too, half as large, for GPUs"
    )
    parser.add_argument("--data", metavar="DIR", help="of --int8 and --half: a dataset (default: that of the run)")
    parser.add_argument("--out", metavar="FILE", help="default: the checkpoint's name with another ending")
    parser.add_argument("--large-images", action="store_true", help="open images that look like decompression bombs")
    parser.add_argument("--offline", action=Offline)
    return parser.parse_args()


@torch.no_grad()
def main():
    arguments = parse_arguments()
    allow_large_images(arguments.large_images)
    model, postprocess, content = load_detector(arguments.checkpoint, memory_format=torch.contiguous_format)
    if not hasattr(postprocess, "best"):
        raise UserError(
            f"{arguments.checkpoint}: a detector of kind {content['config']['detector']} is not exported; "
            "its non-maximum suppression can't be part of a graph"
        )
    suffix, trace, save = FORMATS[arguments.format]
    splits = load_data(arguments, content)
    out = Path(arguments.out or default_output(arguments.checkpoint, suffix))
    if splits and out.suffix != suffix:
        raise UserError(f"--out {out}: has to end in {suffix} for --int8 and --half")
    image = to_image(arguments.image or drawn_image(content["config"]), content["config"].get("value_range"))
    divisor = model.backbone.size_divisor
    if arguments.any_size and arguments.image_size:
        raise UserError(
            "--any-size: takes images of the size that the network was trained with; leave out --image-size"
        )
    height, width = arguments.image_size or canvas_size(image, content["config"], divisor)
    if height % divisor or width % divisor or min(height, width) < 1:
        raise UserError(f"--image-size {height} {width}: both have to be multiples of {divisor}")

    metadata = metadata_of(content, height, width, divisor if arguments.any_size else None)
    graph = Graph(model, postprocess).eval()
    canvas = to_canvas(image, height, width, metadata["square"])[0]
    images = torch.stack([canvas, canvas.flip(2)])  # two, so that the exporter does not take B to be one
    try:
        program = trace(graph, images, metadata)
    except (RuntimeError, ValueError, TypeError) as error:  # torch's exporters raise exceptions of many types
        if not arguments.any_size:
            raise
        raise UserError(
            f"--any-size: {arguments.checkpoint} can only be exported for one size ({first_line(error)[:200]}); "
            "leave it out"
        ) from None
    batches = check_batches(images, metadata)
    exported, score, pixels = write_checked(partial(save, program, metadata), graph, batches, out, suffix)

    size = "any size" if arguments.any_size else f"{height}x{width}"
    if not (arguments.any_size or arguments.image or arguments.image_size or metadata["square"]):
        shape = "most training images have" if content["config"].get("common_size") else "a square has"
        print(f"for the shape that {shape}; others are made to fit: --image takes a photo's shape, --any-size all")
    print(f"{out}: {size}; differs from PyTorch by {score:.1e} in score and {pixels:.1e} pixels at most")
    calls = [partial(exported.run, images[:1]), partial(graph, images[:1])]
    theirs, ours = (1000 * statistics.median(seconds) for seconds in seconds_of(calls, 10))
    print(f"one image of {height}x{width}: {theirs:.1f} ms, PyTorch {ours:.1f} ms")
    if splits:
        write_smaller(arguments, out, metadata, *splits)


def drawn_image(config):
    """-> PIL image, one of the demo's, of the shape that most training images have; a square if that is not known."""
    size, common = config["image_size"], config.get("common_size") or (1, 1)
    height, width = resized_sides(*common, size, longest_side(size))
    return Image.fromarray(draw_picture(np.random.default_rng(0))[0]).resize((width, height))


def default_output(checkpoint, suffix):
    """A file, a folder or a name on the hub -> the path of the exported file: next to it, or here."""
    path = Path(checkpoint)
    if path.is_file() or path.suffix in FILE_SUFFIXES:
        return path.with_suffix(suffix)
    path = path.resolve() if path.is_dir() else Path(path.name)
    return path.with_name(path.name + suffix)


def load_data(arguments, content):
    """-> [training Split, validation Split] for --int8 and --half, or None. Raises UserError."""
    smaller = [f"--{name}" for name in SMALLER if getattr(arguments, name)]
    if smaller and arguments.format != "onnx":
        raise UserError(f"{smaller[0]}: is for --format onnx")
    if arguments.data and not smaller:
        raise UserError(f"--data {arguments.data}: is for --int8 and --half; leave it out")
    if not smaller:
        return None
    return load_run_splits(
        arguments.checkpoint, content, arguments.data, only_val=False, large_images=arguments.large_images
    )


def write_smaller(arguments, out, metadata, train, val):
    """Writes the copies that are asked for next to `out`, and prints the size, the AP and the time of each file."""
    print(f"{'':34s} {'MB':>6s} {'AP':>6s} {'AP50':>6s} {'ms':>6s}")
    print_quality(out, val)
    for name, convert in SMALLER.items():
        if getattr(arguments, name):
            smaller = out.with_name(f"{out.stem}.{name}{out.suffix}")
            unfinished = smaller.with_name(f"{smaller.stem}.partial.onnx")
            try:
                with writing(smaller):
                    convert(out, unfinished, canvases(train, metadata))
                    unfinished.replace(smaller)
            finally:
                unfinished.unlink(missing_ok=True)
            print_quality(smaller, val)


def print_quality(path, split):
    figures, _, _, seconds = evaluate_one_by_one(load(path, threshold=0.0), split)
    megabytes = path.stat().st_size / 1e6
    figures = f"{figures['AP']:6.3f} {figures['AP50']:6.3f}"
    print(f"{str(path)[-34:]:34s} {megabytes:6.1f} {figures} {1000 * seconds:6.1f}", flush=True)


def canvases(split, metadata):
    """Arrays (1, 3, H, W), as the graph takes them, of images drawn with a fixed seed."""
    if metadata["tile"]:
        split = cut_into_tiles(split, metadata["tile"], for_training=True)
    order = np.random.default_rng(0).permutation(len(split.records))[:CALIBRATION_IMAGES]
    for record in (split.records[i] for i in order):
        image = read_image(record.path, record.upright, value_range=split.value_range)
        image = image.crop(record.tile) if record.tile else image
        height, width = metadata["height"], metadata["width"]
        if metadata["divisor"]:
            height, width = canvas_size(image, metadata, metadata["divisor"])
        yield to_canvas(image, height, width, metadata["square"])[0][None].numpy()


# name: function of a file of ONNX, the smaller file to write, images to calibrate with
SMALLER = {"int8": to_int8, "half": to_half}


def metadata_of(content, height, width, divisor):
    """What an exported file says about itself. divisor: of height and width if they are free, else None."""
    config = content["config"]
    return {
        "classes": content["classes"],
        "category_ids": content["category_ids"],
        "height": height,
        "width": width,
        "square": config.get("square", False),
        "value_range": config.get("value_range"),
        "divisor": divisor,
        "image_size": config["image_size"],
        "thresholds": content.get("thresholds"),
        "tile": config.get("tile"),
        "data": {key: config.get(key) for key in OF_DATA},
    }


class Graph(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> scores (B, D), labels (B, D), boxes (B, D, 4) xyxy in pixels of `images`."""

    def __init__(self, model, postprocess):
        super().__init__()
        self.model, self.best = model, postprocess.best
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, images):
        batch, _, height, width = images.shape
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=images.device)
        outputs = self.model((images - self.mean) / self.std, mask)
        return self.best(outputs, torch.tensor([[height, width]]).expand(batch, 2))


def free_dimensions(divisor):
    """divisor: of H and W if they are free, else None -> the dynamic shapes of `images` for torch's exporters."""
    Dim = torch.export.Dim
    free = {0: Dim("batch")}
    if divisor:
        free[2] = divisor * Dim("rows", min=2, max=256)
        free[3] = divisor * Dim("columns", min=2, max=256)
    return free


def trace_onnx(graph, images, metadata):
    """-> ONNX model. Raises UserError if a package is missing, and what torch's exporter raises."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 - ExportedDetector needs it
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install onnx onnxscript onnxruntime") from None
    program = torch.onnx.export(
        graph,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["scores", "labels", "boxes"],
        dynamic_shapes={"images": free_dimensions(metadata["divisor"])},
        verbose=False,
    )
    program.optimize()
    proto = program.model_proto
    proto.metadata_props.append(onnx.StringStringEntryProto(key="detector", value=json.dumps(metadata)))
    return proto


def save_onnx(proto, metadata, path):
    import onnx

    onnx.save(proto, str(path))


def trace_torch(graph, images, metadata):
    """-> ExportedProgram. Raises what torch's exporter raises."""
    return torch.export.export(graph, (images,), dynamic_shapes={"images": free_dimensions(metadata["divisor"])})


def save_torch(program, metadata, path):
    torch.export.save(program, str(path), extra_files={"detector": json.dumps(metadata)})


FORMATS = {"onnx": (".onnx", trace_onnx, save_onnx), "torch": (".pt2", trace_torch, save_torch)}


def check_batches(images, metadata):
    """images (2, 3, H, W) -> batches of them in each size and number that the graph has to be right for."""
    batches = [images, images[:1]]
    if metadata["divisor"]:
        wider = images.shape[2], images.shape[3] + metadata["divisor"]
        batches += [images.mT.contiguous(), F.interpolate(images, wider, mode="bilinear")]
    return batches


def write_checked(save, graph, batches, out, suffix):
    """Writes `out` by calling save(path), but only if its detections in the batches are those of graph.

    suffix: of the format, by which ExportedDetector knows it; `out` may have another.
    -> ExportedDetector, the largest differences in score and in pixels. Raises UserError.
    """
    unchecked = out.with_name(f"{out.stem}.partial{suffix}")
    try:
        with writing(out, also=[RuntimeError]):  # which torch.export raises if it can't write
            save(unchecked)
        exported = ExportedDetector(unchecked)
        score, pixels = compare(exported.run, graph, batches)
        if score > SCORES_WITHIN or pixels > BOXES_WITHIN:
            raise UserError(
                f"{out}: not written: the graph's detections differ from PyTorch's by {score:.1e} in score, "
                f"{pixels:.2f} pixels"
            )
        with writing(out):
            unchecked.replace(out)
    finally:
        unchecked.unlink(missing_ok=True)
    return exported, score, pixels


def compare(exported, graph, batches):
    """Two functions of images -> the largest differences of their detections in score and in pixels."""
    differences = []
    for images in batches:
        found, expected = exported(images), graph(images)
        for i in range(len(images)):
            differences.append(furthest([part[i] for part in expected], [part[i] for part in found]))
    scores, pixels = zip(*differences)
    return max(scores), max(pixels)


def furthest(ours, theirs):
    """Detections (scores, labels, boxes) in the same image -> the largest differences in score and in pixels.

    Each of ours is compared with the nearest of theirs of its class, as near ties may be in another order.
    """
    scores, labels, boxes = ours
    other_scores, other_labels, other_boxes = theirs
    apart = torch.maximum(
        (scores[:, None] - other_scores).abs() / SCORES_WITHIN,
        (boxes[:, None] - other_boxes).abs().amax(-1) / BOXES_WITHIN,
    )
    nearest = apart.masked_fill(labels[:, None] != other_labels, torch.inf).argmin(1)
    if (labels != other_labels[nearest]).any():
        return math.inf, math.inf
    return float((scores - other_scores[nearest]).abs().max()), float((boxes - other_boxes[nearest]).abs().max())


if __name__ == "__main__":
    run_script(main)
