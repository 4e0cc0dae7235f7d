"""Looks at features: the first three principal components of a backbone's patch tokens as colours, beside the picture.

    python features.py street.jpg --backbone dinov3-vits16 clip-vitb16 ecvitt      one sheet, a column for each
    python features.py street.jpg --backbone dinov2-base --layers 2,5,8,11         a column for each block
    python features.py a.jpg b.jpg --backbone mum-vitl16=MuM_ViTLarge.pth          with weights from a file
    python features.py a.jpg --checkpoint runs/NAME/best.pth                       of a detector that you trained

Components are those of all the pictures together, so that a colour means the same in each of them.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from backbones import build_backbone, find_spec, parse_layers
from checkpoint import load_detector
from detector import to_image
from errors import UserError, run
from plots import heading, tile
from transforms import MEAN, STD
from weights import Offline


@torch.no_grad()
def patch_tokens(backbone, image, size, layers):
    """A PIL image, its shortest side resized to about size -> [(h, w, C)], a grid of tokens for each of `layers`, or of the last block."""
    patch = getattr(backbone, "patch", None) or find_spec(backbone.name).patch
    patch = max(backbone.strides) if find_spec(backbone.name).family == "convnext" else patch
    scale = size / min(image.size)
    width, height = (max(1, round(n * scale / patch)) * patch for n in image.size)
    pixels = TF.normalize(TF.to_dtype(TF.pil_to_tensor(image.resize((width, height), Image.BICUBIC)), torch.float32, scale=True), MEAN, STD)
    columns, rows = (-(-n // backbone.size_divisor) * backbone.size_divisor // patch for n in (width, height))
    features = backbone.forward_features(pixels[None], layers=layers or ())
    chosen = [features[f"block{block}"] for block in layers] if layers else [features["x_norm_patchtokens"]]
    return [tokens[0].unflatten(0, (rows, columns))[: height // patch, : width // patch] for tokens in chosen]


def principal_colours(grids):
    """[(h, w, C)] -> [(h, w, 3)] in [0, 1]: the first three principal components of all together, from their 2nd to their 98th percentile."""
    tokens = torch.cat([grid.flatten(0, 1) for grid in grids]).double()
    mean = tokens.mean(0)
    _, directions = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    directions = directions[:, -3:].flip(1)
    directions = directions * directions.sum(0).sign()  # an eigenvector's sign is arbitrary
    values = (tokens - mean) @ directions
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    colours = lambda grid: (((grid.double() - mean) @ directions - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).float()
    return [colours(grid) for grid in grids]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--backbone", nargs="+", default=[], metavar="NAME[=WEIGHTS]", help="see python check_dims.py; weights as in train.py's --backbone-weights (default pretrained)")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="the backbones of detectors")
    parser.add_argument("--layers", metavar="I,J,..", help="blocks, counted from 0 (default: the last alone)")
    parser.add_argument("--image-size", type=int, default=448, metavar="S", help="shortest side (default 448)")
    parser.add_argument("--out", default="features.png", metavar="FILE", help="default: features.png")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if not arguments.backbone and not arguments.checkpoint:
        raise UserError("which features? give --backbone NAME or --checkpoint FILE")
    if arguments.image_size < 1:
        raise UserError(f"--image-size has to be more than 0, not {arguments.image_size}")
    layers = parse_layers(arguments.layers)

    images = [to_image(path) for path in arguments.pictures]
    columns = [[heading(image, Path(path).name) for image, path in zip(images, arguments.pictures)]]
    for entry in [*arguments.backbone, *arguments.checkpoint]:
        if entry in arguments.backbone:
            name, _, weights = entry.partition("=")
            backbone = build_backbone(name, weights or "pretrained", layers=layers if find_spec(name).family != "ecvit" else None).eval()
        else:
            backbone = load_detector(entry)[0].backbone
            name = f"{backbone.name} of {Path(entry).parent.name or entry}"
        depth = find_spec(backbone.name).depth
        if layers and isinstance(depth, int) and max(layers) >= depth:
            raise UserError(f"--layers {arguments.layers}: the blocks of {name} are 0 to {depth - 1}")
        found = [patch_tokens(backbone, image, arguments.image_size, layers) for image in images]
        for number, grids in enumerate(zip(*found)):
            title = name + (f", block {layers[number]}" if layers else "")
            column = [TF.to_pil_image(colours.permute(2, 0, 1)).resize(image.size, Image.NEAREST) for colours, image in zip(principal_colours(grids), images)]
            columns.append([heading(picture, title) for picture in column])
            print(f"{title}: {len(grids)} pictures, {grids[0].shape[0]}x{grids[0].shape[1]} tokens of {grids[0].shape[2]}")
    sheet = tile([column[row] for row in range(len(images)) for column in columns], len(columns))
    try:
        sheet.save(arguments.out)
    except (OSError, ValueError) as error:
        raise UserError(f"{arguments.out}: can't be written ({error})") from None
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    run(main)
