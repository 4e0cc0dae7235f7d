"""Draws features: the first three principal components of a backbone's patch tokens as colours, next to the image.

    python tools/features.py street.jpg --backbone dinov3-vits16 clip-vitb16 ecvitt    one sheet, a column for each
    python tools/features.py street.jpg --backbone dinov2-base --layers 2,5,8,11       a column for each block
    python tools/features.py street.jpg --backbone vggt-1b --layers frame0,global23    of VGGT's
    python tools/features.py a.jpg b.jpg --backbone mum-vitl16=MuM_ViTLarge.pth        with weights from a file
    python tools/features.py a.jpg --checkpoint runs/NAME/best.pth                     of a detector that you trained

The components are computed over all images together, so that a colour means the same in each of them.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from backbones import build_backbone, find_spec, parse_layers
from checkpoint import load_detector
from detector import to_image
from errors import Offline, UserError, run_script, writing
from plots import heading, tile
from transforms import MEAN, STD, allow_large_images


@torch.no_grad()
def patch_tokens(backbone, image, size, layers):
    """A PIL image -> [(h, w, C)], a grid of tokens for each of `layers`; without layers, that of the last block.

    The image is resized first, so that its shortest side is about `size` and both are multiples of the patch's.
    """
    patch = patch_side(backbone)
    scale = size / min(image.size)
    width, height = (max(1, round(n * scale / patch)) * patch for n in image.size)
    pixels = TF.pil_to_tensor(image.resize((width, height), Image.BICUBIC))
    pixels = TF.normalize(TF.to_dtype(pixels, torch.float32, scale=True), MEAN, STD)
    features = backbone.forward_features(pixels[None], layers=layers or ())
    sequences = [features["x_norm_patchtokens"]]
    if layers and hasattr(backbone, "aggregator"):
        sequences = [features[name]["x_norm_patchtokens"] for name in backbone.aggregator.layer_names(layers)]
    elif layers:
        sequences = [features[f"block{block}"] for block in layers]
    divisor = backbone.size_divisor  # the backbone pads the image to a multiple of it
    columns, rows = (-(-n // divisor) * divisor // patch for n in (width, height))
    grids = [tokens[0].unflatten(0, (rows, columns)) for tokens in sequences]
    return [grid[: height // patch, : width // patch] for grid in grids]


def patch_side(backbone):
    """The side in pixels of the square that a token stands for."""
    spec = find_spec(backbone.name)
    if spec.family == "convnext":
        return max(backbone.strides)
    return getattr(backbone, "patch", spec.patch)


def principal_colours(grids):
    """[(h, w, C)] -> [(h, w, 3)] in [0, 1]: the first three principal components of all grids together.

    0 is their 2nd percentile, 1 their 98th.
    """
    tokens = torch.cat([grid.flatten(0, 1) for grid in grids]).double()
    mean = tokens.mean(0)
    _, directions = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    directions = directions[:, -3:].flip(1)
    directions = directions * directions.sum(0).sign()  # an eigenvector's sign is arbitrary
    values = (tokens - mean) @ directions
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    contrast = (high - low).clamp(min=1e-9)
    projections = [(grid.double() - mean) @ directions for grid in grids]
    return [((projection - low) / contrast).clamp(0, 1).float() for projection in projections]


def open_backbones(arguments, layers):
    """Yields (name, backbone), one after the other. Raises UserError."""
    for entry in arguments.backbone:
        name, _, weights = entry.partition("=")
        has_fixed_maps = find_spec(name).family == "ecvit"  # its blocks have tokens all the same
        map_layers = None if has_fixed_maps else layers
        yield name, build_backbone(name, weights or "pretrained", layers=map_layers).eval()
    for entry in arguments.checkpoint:
        backbone = load_detector(entry)[0].backbone
        yield f"{backbone.name} of {Path(entry).parent.name or entry}", backbone


def titles_of(backbone, name, layers):
    """The titles of the columns of a backbone. Raises UserError if it has no such layers."""
    if not layers:
        return [name]
    if hasattr(backbone, "aggregator"):
        return [f"{name}, {layer}" for layer in backbone.aggregator.layer_names(layers)]
    depth = find_spec(backbone.name).depth
    if any(isinstance(block, str) for block in layers):
        raise UserError(
            f"--layers {','.join(map(str, layers))}: those names are VGGT's; {name} has blocks, such as 2,5,8"
        )
    if layers and isinstance(depth, int) and max(layers) >= depth:
        blocks = ",".join(map(str, layers))
        raise UserError(f"--layers {blocks}: the blocks of {name} are 0 to {depth - 1}")
    return [f"{name}, block {block}" for block in layers]


def draw_columns(titles, backbone, images, size, layers):
    """-> a column for each of the layers: a list of PIL images, one for each image. Prints the grids' sizes."""
    tokens = [patch_tokens(backbone, image, size, layers) for image in images]
    columns = []
    for title, grids in zip(titles, zip(*tokens)):
        column = []
        for colours, image in zip(principal_colours(grids), images):
            drawing = TF.to_pil_image(colours.permute(2, 0, 1)).resize(image.size, Image.NEAREST)
            column.append(heading(drawing, title))
        columns.append(column)
        rows, cols, channels = grids[0].shape
        print(f"{title}: {len(grids)} images, {rows}x{cols} tokens of {channels}")
    return columns


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--backbone",
        nargs="+",
        default=[],
        metavar="NAME[=WEIGHTS]",
        help="see python check_dims.py; weights as in train.py's --backbone-weights (default pretrained)",
    )
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="the backbones of detectors")
    parser.add_argument(
        "--layers", metavar="I,J,..", help="blocks, counted from 0, or VGGT's layers (default: the last alone)"
    )
    parser.add_argument("--image-size", type=int, default=448, metavar="S", help="shortest side (default 448)")
    parser.add_argument("--out", default="features.png", metavar="FILE", help="default: features.png")
    parser.add_argument("--large-images", action="store_true", help="open images that look like decompression bombs")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if not arguments.backbone and not arguments.checkpoint:
        raise UserError("which features? give --backbone NAME or --checkpoint FILE")
    if arguments.image_size < 1:
        raise UserError(f"--image-size has to be more than 0, not {arguments.image_size}")
    return arguments


def main():
    arguments = parse_arguments()
    allow_large_images(arguments.large_images)
    layers = parse_layers(arguments.layers)
    images = [to_image(path) for path in arguments.images]
    columns = [[heading(image, Path(path).name) for image, path in zip(images, arguments.images)]]
    for name, backbone in open_backbones(arguments, layers):
        titles = titles_of(backbone, name, layers)
        columns += draw_columns(titles, backbone, images, arguments.image_size, layers)
    sheet = tile([column[row] for row in range(len(images)) for column in columns], len(columns), most_pixels=math.inf)
    with writing(arguments.out, "; choose another --out", also=[ValueError]):
        sheet.save(arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    run_script(main)
