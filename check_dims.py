"""What every backbone is, and whether it is so.

    python check_dims.py                          the table; each is built without allocating its weights
    python check_dims.py --size 640               the maps that a 640x640 picture gives
    python check_dims.py --run dinov3-vits16      builds it for real, runs pictures through, compares, takes the time

Exit status 1 where anything disagrees.
"""

import argparse
import statistics
import sys
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones import BACKBONES, LICENCES, build_backbone, find_spec
from ecvit import fold
from errors import UserError, run
from timing import seconds_of


def expected_maps(spec, size):
    """-> the sides of the maps of a square picture, finest first, once it is padded to the coarsest grid."""
    divisor = max(spec.strides)
    padded = -(-size // divisor) * divisor
    return [padded // stride for stride in spec.strides]


def disagreements(name, spec, backbone):
    """What of the table is not true of the module, found by looking at the module itself."""
    shapes = {key: tuple(p.shape) for key, p in backbone.named_parameters()}
    blocks = {int(part) for key in shapes for part in [_number_after(key, ("blocks", "layer", "layers"))] if part is not None}
    wrong = []
    if spec.family == "convnext":
        depthwise = Counter(shape[0] for shape in shapes.values() if shape[1:] == (1, 7, 7))  # one in every block
        if depthwise != Counter(dict(zip(spec.width, spec.depth))):
            wrong.append(f"blocks by width are {dict(depthwise)}, not {dict(zip(spec.width, spec.depth))}")
        widest = max(shape[0] for key, shape in shapes.items() if len(shape) == 2)
        if widest != spec.ffn:
            wrong.append(f"the widest MLP has {widest}, not {spec.ffn}")
    else:
        if len(blocks) != spec.depth:
            wrong.append(f"{len(blocks)} blocks, not {spec.depth}")
        embedding = [shape for key, shape in shapes.items() if "patch_embed" in key and len(shape) == 4]
        if not embedding or embedding[-1] not in ((spec.width, 3, spec.patch, spec.patch), (spec.width, spec.width // 2, 3, 3)):
            wrong.append(f"no patch embedding of width {spec.width} and patch {spec.patch}")
        positions = [shape[-2] for key, shape in shapes.items() if "position" in key] or [0]
        if positions[0] != (1 + spec.grid**2 if spec.grid else 0):
            wrong.append(f"{positions[0]} learned positions, not one and {spec.grid}x{spec.grid}")
        registers = [shape[1] for key, shape in shapes.items() if "register" in key] or [0]
        if registers[0] != spec.registers:
            wrong.append(f"{registers[0]} registers, not {spec.registers}")
        if not any(spec.ffn in shape and ("mlp" in key) for key, shape in shapes.items()) and not any(2 * spec.ffn in shape for shape in shapes.values()):
            wrong.append(f"no MLP of width {spec.ffn}")
    if len(backbone.channels) != len(backbone.strides) or tuple(backbone.strides) != spec.strides:
        wrong.append(f"strides {backbone.strides}, channels {backbone.channels}, not {spec.strides}")
    return wrong


def _number_after(key, words):
    parts = key.split(".")
    return next((b for a, b in zip(parts, parts[1:]) if a in words and b.isdigit()), None)


def licence_of(name):
    spec = find_spec(name)
    family = "vggt" if name.startswith("vggt") else spec.family
    return LICENCES[family] if spec.source else "-"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, metavar="S", help="side of the picture (default 224)")
    parser.add_argument("--run", metavar="NAME", help="build this one for real, with random weights, and run it")
    arguments = parser.parse_args()
    if arguments.size < 1:
        raise UserError(f"--size has to be more than 0, not {arguments.size}")
    names = [arguments.run] if arguments.run else list(BACKBONES)
    wrong = []
    print(f"{'backbone':22s} {'width':>20s} {'depth':>12s} {'heads':>5s} {'ffn':>6s} {'patch':>5s} {'reg.':>4s} {'params (M)':>10s} {'GFLOPs':>7s} {'weights':>13s}  maps at {arguments.size}x{arguments.size}: channels @ height x width (stride)")
    for name in names:
        spec = find_spec(name)
        with torch.device("cpu" if arguments.run else "meta"):
            backbone = build_backbone(name).eval()
        found = disagreements(name, spec, backbone)
        sides = expected_maps(spec, arguments.size)
        with torch.no_grad(), torch.device("cpu" if arguments.run else "meta"), FlopCounterMode(display=False) as counter:
            maps = backbone(torch.zeros(1, 3, arguments.size, arguments.size))
        for feature, channels, side, stride in zip(maps, backbone.channels, sides, spec.strides):
            if tuple(feature.shape) != (1, channels, side, side):
                found.append(f"the map at stride {stride} is {tuple(feature.shape)}, not {(1, channels, side, side)}")
        text = lambda v: "/".join(map(str, v)) if isinstance(v, tuple) else str(v)
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        shapes = "  ".join(f"{m.shape[1]} @ {m.shape[2]}x{m.shape[3]} ({s})" for m, s in zip(maps, spec.strides))
        print(f"{name:22s} {text(spec.width):>20s} {text(spec.depth):>12s} {spec.heads or '-':>5} {spec.ffn:>6d} {spec.patch:>5d} {spec.registers:>4d} {millions:>10.1f} {counter.get_total_flops() / 1e9:>7.1f} {licence_of(name):>13s}  {shapes}")
        wrong += [f"{name}: {what}" for what in found]
    for line in wrong:
        print(f"disagrees: {line}", file=sys.stderr)
    if arguments.run and not wrong:
        images = torch.randn(1, 3, arguments.size, arguments.size).to(memory_format=torch.channels_last)
        folded = fold(backbone.to(memory_format=torch.channels_last))
        with torch.no_grad():
            seconds = statistics.median(seconds_of([lambda: folded(images)], 7)[0])
        print(f"{arguments.run}: built, run and as the table says; {1000 * seconds:.0f} ms for a picture of {arguments.size}x{arguments.size} on this CPU")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run(main)
