"""Exports a detector as one file that needs none of this code: ONNX (pip install onnx onnxscript onnxruntime), or torch.export's.

    python export.py runs/mine/best.pth --picture photo.jpg            runs/mine/best.onnx
    python export.py ecdet_s.pth --format torch                        ecdet_s.pt2
    python infer.py photo.jpg --checkpoint runs/mine/best.onnx

The graph takes `images` (B, 3, H, W), RGB in [0, 1], B as you like, H and W fixed or, with --any-size, multiples of 32, and
gives `scores` and `labels` (B, D) and `boxes` (B, D, 4) xyxy pixels, best first; what labels mean is in the file's metadata.
Before it is called done, its detections in the picture are compared with PyTorch's.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_detector
from demo_data import draw_picture
from detector import ExportedDetector, canvas_size, to_canvas, to_image
from errors import UserError, run
from timing import seconds_of
from transforms import MEAN, STD
from weights import Offline, first_line

SCORES_WITHIN, BOXES_WITHIN = 1e-3, 0.5  # what an exported detection may differ by: in score, and in pixels


class Graph(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> scores (B, D), labels (B, D), boxes (B, D, 4) xyxy pixels of them."""

    def __init__(self, model, postprocess):
        super().__init__()
        self.model, self.best = model, postprocess.best
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, images):
        batch, _, height, width = images.shape
        outputs = self.model((images - self.mean) / self.std, torch.zeros(batch, height, width, dtype=torch.bool, device=images.device))
        return self.best(outputs, torch.tensor([[height, width]]).expand(batch, 2))


def furthest(ours, theirs):
    """Two detections (scores, labels, boxes) of one picture -> the largest differences in score and in pixels, each of ours against the
    nearest of theirs of the same class: near ties may change places."""
    scores, labels, boxes = ours
    other_scores, other_labels, other_boxes = theirs
    apart = torch.maximum((scores[:, None] - other_scores).abs() / SCORES_WITHIN, (boxes[:, None] - other_boxes).abs().amax(-1) / BOXES_WITHIN)
    nearest = apart.masked_fill(labels[:, None] != other_labels, torch.inf).argmin(1)
    same = labels == other_labels[nearest]
    if not same.all():
        return math.inf, math.inf
    return float((scores - other_scores[nearest]).abs().max()), float((boxes - other_boxes[nearest]).abs().max())


def free_dimensions(divisor):
    """divisor: of H and W where they are free, None where they are fixed -> what torch's exporters take as dynamic shapes."""
    Dim = torch.export.Dim
    return {0: Dim("batch")} | ({2: divisor * Dim("rows", min=2, max=256), 3: divisor * Dim("columns", min=2, max=256)} if divisor else {})


def write_onnx(graph, images, path, metadata):
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx wants it
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install onnx onnxscript onnxruntime") from None
    program = torch.onnx.export(
        graph, (images,), dynamo=True, input_names=["images"], output_names=["scores", "labels", "boxes"],
        dynamic_shapes={"images": free_dimensions(metadata["divisor"])}, verbose=False,
    )  # fmt: skip
    program.optimize()
    proto = program.model_proto
    proto.metadata_props.append(onnx.StringStringEntryProto(key="detector", value=json.dumps(metadata)))
    onnx.save(proto, str(path))


def write_torch(graph, images, path, metadata):
    program = torch.export.export(graph, (images,), dynamic_shapes={"images": free_dimensions(metadata["divisor"])})
    torch.export.save(program, str(path), extra_files={"detector": json.dumps(metadata)})


FORMATS = {"onnx": (".onnx", write_onnx), "torch": (".pt2", write_torch)}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="as infer.py's")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument("--picture", metavar="FILE", help="decides the size, and is what the file is checked with (default: one of the demo's)")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="of the graph (default: what the picture gets in PyTorch)")
    parser.add_argument("--any-size", action="store_true", help="the graph takes pictures of any size that is padded to multiples of 32 (of a plain ViT's patch)")
    parser.add_argument("--out", metavar="FILE", help="default: the checkpoint's name with another ending")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    model, postprocess, content = load_detector(arguments.checkpoint, memory_format=torch.contiguous_format)
    if not hasattr(postprocess, "best"):
        raise UserError(f"{arguments.checkpoint}: a detector of kind {content['config']['detector']} is not exported; its non-maximum suppression is no part of a graph")
    ending, write = FORMATS[arguments.format]
    out = Path(arguments.out) if arguments.out else Path(arguments.checkpoint).with_suffix(ending)
    image = to_image(arguments.picture) if arguments.picture else to_image(draw_picture(np.random.default_rng(0))[0])
    divisor = model.backbone.size_divisor
    height, width = arguments.image_size or canvas_size(image, content["config"], divisor)
    if height % divisor or width % divisor or min(height, width) < 1:
        raise UserError(f"--image-size {height} {width}: both have to be multiples of {divisor}")

    square = content["config"].get("square", False)
    graph = Graph(model, postprocess).eval()
    canvas = to_canvas(image, height, width, square)[0]
    images = torch.stack([canvas, canvas.flip(2)])  # two, so that nothing takes the batch to be one
    tried = [images, images[:1]] + [images.mT.contiguous(), F.interpolate(images, (height, width + divisor), mode="bilinear")] * arguments.any_size
    metadata = {"classes": content["classes"], "category_ids": content["category_ids"], "height": height, "width": width, "square": square}
    metadata |= {"divisor": divisor if arguments.any_size else None, "image_size": content["config"]["image_size"]}
    partial = out.with_name(out.stem + ".partial" + ending)
    try:
        try:
            write(graph, images, partial, metadata)
        except (RuntimeError, ValueError, TypeError) as error:  # torch's exporters raise many kinds
            if not arguments.any_size:
                raise
            raise UserError(f"--any-size: {arguments.checkpoint} can only be exported for one size ({first_line(error)[:200]}); leave it out") from None
        exported = ExportedDetector(partial)
        apart = []
        for given in tried:
            found, wanted = exported.run(given), graph(given)
            for i in range(len(given)):
                apart.append(furthest([part[i] for part in wanted], [part[i] for part in found]))
        score, pixels = (max(values) for values in zip(*apart))
        if score > SCORES_WITHIN or pixels > BOXES_WITHIN:
            raise UserError(f"{out}: not written: the graph's detections differ from PyTorch's by {score:.1e} in score, {pixels:.2f} pixels")
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
    calls = seconds_of([lambda: exported.run(images[:1]), lambda: graph(images[:1])], 10)
    theirs, ours = (1000 * statistics.median(seconds) for seconds in calls)
    print(f"{out}: {'any size' if arguments.any_size else f'{height}x{width}'}; differs from PyTorch by {score:.1e} in score and {pixels:.1e} pixels at most")
    print(f"one picture of {height}x{width}: {theirs:.1f} ms, PyTorch {ours:.1f} ms")


if __name__ == "__main__":
    run(main)
