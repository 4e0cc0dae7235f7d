"""Prints the table of all backbones, and checks that the modules agree with it.

    python check_dims.py                          all backbones; no memory is allocated for their weights
    python check_dims.py --size 640               the maps of a 640x640 image
    python check_dims.py --run dinov3-vits16      builds one with random weights, runs it, checks it and times it

Exit status 1 if anything disagrees.
"""

import argparse
import re
import statistics
import sys
from collections import Counter
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones import BACKBONES, LICENCES, build_backbone, find_spec
from devices import seconds_of
from ecvit import fuse
from errors import UserError, run_script

COLUMNS = {  # title: format
    "backbone": "<22",
    "width": ">20",
    "depth": ">12",
    "heads": ">5",
    "ffn": ">6",
    "patch": ">5",
    "reg.": ">4",
    "params (M)": ">10",
    "GFLOPs": ">7",
    "weights": ">13",
}


def expected_maps(spec, size):
    """The sides of the maps of a square image, finest first; images are padded to the coarsest grid."""
    divisor = max(spec.strides)
    padded = -(-size // divisor) * divisor
    return [padded // stride for stride in spec.strides]


def disagreements(name, spec, backbone):
    """What differs between a row of the table and the module itself, a list of phrases."""
    shapes = {key: tuple(parameter.shape) for key, parameter in backbone.named_parameters()}
    check = convnext_disagreements if spec.family == "convnext" else vit_disagreements
    wrong = check(spec, shapes)
    if len(backbone.channels) != len(backbone.strides) or tuple(backbone.strides) != spec.strides:
        wrong.append(f"strides {backbone.strides}, channels {backbone.channels}, not {spec.strides}")
    return wrong


def convnext_disagreements(spec, shapes):
    """shapes: {parameter name: shape} of a ConvNeXt."""
    wrong = []
    expected = dict(zip(spec.width, spec.depth))
    depthwise = Counter(shape[0] for shape in shapes.values() if shape[1:] == (1, 7, 7))  # one in every block
    if depthwise != Counter(expected):
        wrong.append(f"blocks by width are {dict(depthwise)}, not {expected}")
    widest = max(shape[0] for shape in shapes.values() if len(shape) == 2)
    if widest != spec.ffn:
        wrong.append(f"the widest MLP has {widest}, not {spec.ffn}")
    return wrong


def vit_disagreements(spec, shapes):
    """shapes: {parameter name: shape} of a vision transformer."""
    wrong = []
    blocks = {block_number(key) for key in shapes} - {None}
    if len(blocks) != spec.depth:
        wrong.append(f"{len(blocks)} blocks, not {spec.depth}")
    embedding = [shape for key, shape in shapes.items() if "patch_embed" in key and len(shape) == 4]
    linear, stem = (spec.width, 3, spec.patch, spec.patch), (spec.width, spec.width // 2, 3, 3)
    if not embedding or embedding[-1] not in (linear, stem):
        wrong.append(f"no patch embedding of width {spec.width} and patch {spec.patch}")
    positions = next((shape[-2] for key, shape in shapes.items() if re.search("position|pos_embed", key)), 0)
    if positions != (1 + spec.grid**2 if spec.grid else 0):
        wrong.append(f"{positions} learned positions, not one and {spec.grid}x{spec.grid}")
    registers = next((shape[-2] for key, shape in shapes.items() if "register" in key), 0)
    if registers != spec.registers:
        wrong.append(f"{registers} registers, not {spec.registers}")
    has_mlp = any("mlp" in key and spec.ffn in shape for key, shape in shapes.items())
    has_gated_mlp = any(2 * spec.ffn in shape for shape in shapes.values())  # value and gate in one matrix
    if not has_mlp and not has_gated_mlp:
        wrong.append(f"no MLP of width {spec.ffn}")
    return wrong


def block_number(key):
    """ "model.layer.3.norm.weight" -> "3"; None for parameters outside the blocks."""
    parts = key.split(".")
    for part, following in zip(parts, parts[1:]):
        if part in ("blocks", "layer", "layers") and following.isdigit():
            return following
    return None


def licence_of(name):
    """Licence of a backbone's released weights; "-" if there are none."""
    spec = find_spec(name)
    if not spec.source:
        return "-"
    if name.startswith("vggt"):  # its family is dinov2
        return LICENCES["vggt"]
    return LICENCES[spec.family]


def check_backbone(name, backbone, size, device):
    """Runs a backbone on one square image -> its row of the table, [what disagrees with the table]."""
    spec = find_spec(name)
    wrong = disagreements(name, spec, backbone)
    with torch.no_grad(), torch.device(device), FlopCounterMode(display=False) as counter:
        maps = backbone(torch.zeros(1, 3, size, size))
    for feature, channels, side, stride in zip(maps, backbone.channels, expected_maps(spec, size), spec.strides):
        actual, expected = tuple(feature.shape), (1, channels, side, side)
        if actual != expected:
            wrong.append(f"the map at stride {stride} is {actual}, not {expected}")
    return table_row(name, spec, backbone, maps, counter.get_total_flops()), wrong


def table_row(name, spec, backbone, maps, flops):
    """One line of the table."""
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    cells = [
        name,
        by_stage(spec.width),
        by_stage(spec.depth),
        spec.heads or "-",
        spec.ffn,
        spec.patch,
        spec.registers,
        f"{millions:.1f}",
        f"{flops / 1e9:.1f}",
        licence_of(name),
    ]
    sizes = [f"{m.shape[1]} @ {m.shape[2]}x{m.shape[3]} ({stride})" for m, stride in zip(maps, spec.strides)]
    return format_line(cells, "  ".join(sizes))


def by_stage(value):
    """One number, or one for each stage -> text."""
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def format_line(cells, maps):
    """Aligns the cells of COLUMNS; maps is the last column."""
    aligned = [f"{cell:{alignment}}" for cell, alignment in zip(cells, COLUMNS.values())]
    return " ".join(aligned) + "  " + maps


@torch.no_grad()
def time_backbone(backbone, size):
    """Median seconds for one random image on the CPU, with batch norms folded into the convolutions."""
    images = torch.randn(1, 3, size, size).to(memory_format=torch.channels_last)
    folded = fuse(backbone.to(memory_format=torch.channels_last))
    return statistics.median(seconds_of([partial(folded, images)], 7)[0])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, metavar="S", help="side of the image (default 224)")
    parser.add_argument("--run", metavar="NAME", help="build only this one, with random weights, and run it")
    arguments = parser.parse_args()
    if arguments.size < 1:
        raise UserError(f"--size has to be more than 0, not {arguments.size}")
    return arguments


def main():
    arguments = parse_arguments()
    size, single = arguments.size, arguments.run
    device = "cpu" if single else "meta"  # tensors on "meta" have shapes but no data
    wrong = []
    print(format_line(COLUMNS, f"maps at {size}x{size}: channels @ height x width (stride)"))
    for name in [single] if single else BACKBONES:
        with torch.device(device):
            backbone = build_backbone(name).eval()
        row, problems = check_backbone(name, backbone, size, device)
        print(row)
        wrong += [f"{name}: {problem}" for problem in problems]
    for line in wrong:
        print(f"disagrees: {line}", file=sys.stderr)
    if single and not wrong:
        milliseconds = 1000 * time_backbone(backbone, size)
        print(
            f"{single}: built, run and as the table says; "
            f"{milliseconds:.0f} ms for an image of {size}x{size} on this CPU"
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run_script(main)
