"""What patches of another size do to a plain ViT's features: the network as it is against its filters resampled, two ways, and new ones.

    python compare_patches.py                                        dinov2-base with its weights, 14 pixels against 16, random pictures
    python compare_patches.py --picture street.jpg --backbone dinov2-small
    python compare_patches.py --backbone dinov2-small --weights none

The resampled networks see the same pictures, enlarged with the patches. Prints how far their features are from the original's
(relative differences) and draws the distributions of both into --out.
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from backbones import build_backbone, find_spec
from detector import to_image
from errors import UserError, run
from plots import pyplot
from transforms import MEAN, STD
from weights import Offline, with_patch_size

METHODS = {"pinv": "pseudo-inverse", "bicubic": "bicubic", "crop": "none (zeros around)", "new": "newly initialised"}


def with_patches(backbone, spec, size, method):
    """A copy of a backbone for patches of size x size pixels, with filters by METHODS."""
    variant = build_backbone(backbone.name, None, patch_size=size).eval()
    variant.model = with_patch_size(backbone.model, replace(spec, patch=size), "pinv" if method == "new" else method).eval()
    if method == "new":
        filters = patch_embedding(variant).weight
        torch.nn.init.trunc_normal_(filters, std=0.02)
    return variant


def patch_embedding(backbone):
    return next(m for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d))


def draw_distributions(values, out, title):
    """values: {name: (embeddings, features)} -> histograms, one panel for each of the two."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (panel, what) in enumerate(zip(panels, ("patch embeddings", "normed tokens of the last block"))):
        reach = max(float(v[i].abs().flatten()[:1_000_000].quantile(0.999)) for v in values.values())
        edges = torch.linspace(-reach, reach, 161)
        for number, (name, pair) in enumerate(values.items()):
            density = torch.histogram(pair[i].flatten().float(), edges, density=True).hist
            panel.plot((edges[1:] + edges[:-1]) / 2, density, label=name, color=f"C{number}", linewidth=3 if number == 0 else 1.5, linestyle="-" if number < 2 else "--", alpha=0.5 if number == 0 else 1)
        panel.set(xlabel="activation", ylabel="density", title=what, yscale="log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: can't be written ({error})") from None
    plt.close(figure)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov2-base", metavar="NAME", help="a plain ViT (default dinov2-base)")
    parser.add_argument("--weights", default="pretrained", metavar="W", help="as train.py's --backbone-weights (default pretrained)")
    parser.add_argument("--patch-size", type=int, default=16, metavar="P", help="default 16")
    parser.add_argument("--picture", metavar="FILE", help="default: random pixels")
    parser.add_argument("--grid", type=int, default=16, metavar="N", help="patches along a picture's shortest side (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="patches.png", metavar="FILE", help="default: patches.png")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    spec = find_spec(arguments.backbone)
    if spec.family in ("ecvit", "convnext"):
        raise UserError(f"--backbone {arguments.backbone}: not a plain vision transformer")
    if arguments.patch_size < 1 or arguments.grid < 1:
        raise UserError("--patch-size and --grid have to be more than 0")
    backbone = build_backbone(arguments.backbone, arguments.weights).eval()
    old, new = spec.patch, arguments.patch_size
    if arguments.picture:
        image = to_image(arguments.picture)
        grid = [max(1, round(arguments.grid * n / min(image.size))) for n in (image.height, image.width)]
        pixels = TF.normalize(TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True), MEAN, STD)[None]
        pixels = F.interpolate(pixels, [old * n for n in grid], mode="bicubic", antialias=True)
    else:
        grid = [arguments.grid, arguments.grid * 5 // 4]
        pixels = torch.randn(2, 3, *(old * n for n in grid))
    resized = F.interpolate(pixels, [new * n for n in grid], mode="bicubic", antialias=True)

    values = {}
    print(f"{arguments.backbone}, {len(pixels)} pictures of {grid[0]}x{grid[1]} patches; relative differences to patches of {old} pixels:")
    print(f"{'filters for ' + str(new) + ' pixels':26s} {'embeddings':>10s} {'features':>10s}")
    for method in (None, *METHODS):
        network, x = (backbone, pixels) if method is None else (with_patches(backbone, spec, new, method), resized)
        embedding = []
        hook = patch_embedding(network).register_forward_hook(lambda module, inputs, output: embedding.append(output))
        features = network(x)[0]
        hook.remove()
        name = f"{old} pixels, as it is" if method is None else f"{new} pixels, {METHODS[method]}"
        values[name] = embedding[0], features
        if method:
            away = [float((mine - original).norm() / original.norm()) for mine, original in zip(values[name], next(iter(values.values())))]
            print(f"{METHODS[method]:26s} {away[0]:10.4f} {away[1]:10.4f}")
    draw_distributions(values, arguments.out, f"{arguments.backbone}: patches of {old} pixels, and of {new} on the picture enlarged with them")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    run(main)
