"""Compares ways to give a plain ViT patches of another size: how far do its features move from the original's?

    python tools/compare_patches.py                                dinov2-base, 14 to 16 pixels, random images
    python tools/compare_patches.py --image street.jpg --backbone dinov2-small
    python tools/compare_patches.py --backbone dinov2-small --weights none

The patch filters are resampled (by pseudo-inverse or bicubically), padded, or newly initialised. The networks see the
same images, enlarged with the patches. Prints the relative differences of their features to the original's, and draws
the distributions into --out.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from backbones import build_backbone, find_spec
from detector import to_image
from errors import Offline, UserError, run_script, writing
from plots import pyplot
from transforms import MEAN, STD, allow_large_images
from weights import with_patch_size

METHODS = {"pinv": "pseudo-inverse", "bicubic": "bicubic", "crop": "none (zeros around)", "new": "newly initialised"}


def with_patches(backbone, spec, size, method):
    """A copy of a backbone for patches of size x size pixels; method: one of METHODS."""
    variant = build_backbone(backbone.name, None, patch_size=size).eval()
    resample = "pinv" if method == "new" else method
    variant.model = with_patch_size(backbone.model, replace(spec, patch=size), resample).eval()
    if method == "new":
        torch.nn.init.trunc_normal_(patch_embedding(variant).weight, std=0.02)
    return variant


def patch_embedding(backbone):
    return next(m for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d))


def activations(backbone, pixels):
    """-> the patch embeddings, and the normalised tokens of the last block."""
    outputs = []

    def store(module, inputs, output):
        outputs.append(output)

    hook = patch_embedding(backbone).register_forward_hook(store)
    features = backbone(pixels)[0]
    hook.remove()
    return outputs[0], features


def relative_difference(values, reference):
    return float((values - reference).norm() / reference.norm())


def load_pixels(path, patches, patch_size):
    """An image, resized to `patches` patches along its shortest side -> (1, 3, H, W) normalised, [rows, columns]."""
    image = to_image(path)
    grid = [max(1, round(patches * n / min(image.size))) for n in (image.height, image.width)]
    pixels = TF.normalize(TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True), MEAN, STD)[None]
    return resize_patches(pixels, grid, patch_size), grid


def random_pixels(patches, patch_size):
    """-> (2, 3, H, W) of random numbers, [rows, columns] of patches."""
    grid = [patches, patches * 5 // 4]
    return torch.randn(2, 3, *(patch_size * n for n in grid)), grid


def resize_patches(pixels, grid, patch_size):
    return F.interpolate(pixels, [patch_size * n for n in grid], mode="bicubic", antialias=True)


def compare(backbone, spec, new, pixels, grid):
    """Prints a row for each of METHODS -> {name: (patch embeddings, features)}, the original's first."""
    original = activations(backbone, pixels)
    results = {f"{spec.patch} pixels, as it is": original}
    resized = resize_patches(pixels, grid, new)
    header = f"filters for {new} pixels"
    print(f"{header:26s} {'embeddings':>10s} {'features':>10s}")
    for method, name in METHODS.items():
        embeddings, features = activations(with_patches(backbone, spec, new, method), resized)
        differences = relative_difference(embeddings, original[0]), relative_difference(features, original[1])
        print(f"{name:26s} {differences[0]:10.4f} {differences[1]:10.4f}")
        results[f"{new} pixels, {name}"] = embeddings, features
    return results


def draw_distributions(values, out, title):
    """values: {name: (embeddings, features)} -> histograms of both, a panel each. Raises UserError."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (panel, name) in enumerate(zip(panels, ("patch embeddings", "normalised tokens of the last block"))):
        draw_histograms(panel, {label: pair[i] for label, pair in values.items()})
        panel.set(xlabel="activation", ylabel="density", title=name, yscale="log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    with writing(out, "; choose another --out", also=[ValueError]):
        figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_histograms(panel, tensors):
    """tensors: {label: values}; the first is drawn as a thick line for the others to lie on."""
    reach = max(float(values.abs().flatten()[:1_000_000].quantile(0.999)) for values in tensors.values())
    edges = torch.linspace(-reach, reach, 161)
    centres = (edges[1:] + edges[:-1]) / 2
    for number, (label, values) in enumerate(tensors.items()):
        density = torch.histogram(values.flatten().float(), edges, density=True).hist
        if number == 0:
            style = dict(linewidth=3, linestyle="-", alpha=0.5)
        else:
            style = dict(linewidth=1.5, linestyle="-" if number == 1 else "--", alpha=1)
        panel.plot(centres, density, label=label, color=f"C{number}", **style)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov2-base", metavar="NAME", help="a plain ViT (default dinov2-base)")
    parser.add_argument(
        "--weights", default="pretrained", metavar="W", help="as train.py's --backbone-weights (default pretrained)"
    )
    parser.add_argument("--patch-size", type=int, default=16, metavar="P", help="default 16")
    parser.add_argument("--image", "--picture", metavar="FILE", help="default: random pixels")
    parser.add_argument(
        "--grid", type=int, default=16, metavar="N", help="patches along an image's shortest side (default 16)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="patches.png", metavar="FILE", help="default: patches.png")
    parser.add_argument("--large-images", action="store_true", help="open images that look like decompression bombs")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if find_spec(arguments.backbone).family in ("ecvit", "convnext"):
        raise UserError(f"--backbone {arguments.backbone}: not a plain vision transformer")
    if arguments.patch_size < 1 or arguments.grid < 1:
        raise UserError("--patch-size and --grid have to be more than 0")
    return arguments


@torch.no_grad()
def main():
    arguments = parse_arguments()
    allow_large_images(arguments.large_images)
    torch.manual_seed(arguments.seed)
    spec = find_spec(arguments.backbone)
    backbone = build_backbone(arguments.backbone, arguments.weights).eval()
    if arguments.image:
        pixels, grid = load_pixels(arguments.image, arguments.grid, spec.patch)
    else:
        pixels, grid = random_pixels(arguments.grid, spec.patch)
    print(
        f"{arguments.backbone}, {len(pixels)} images of {grid[0]}x{grid[1]} patches; "
        f"relative differences to patches of {spec.patch} pixels:"
    )
    results = compare(backbone, spec, arguments.patch_size, pixels, grid)
    title = f"{arguments.backbone}: patches of {spec.patch} pixels, and of {arguments.patch_size} on the enlarged image"
    draw_distributions(results, arguments.out, title)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    run_script(main)
