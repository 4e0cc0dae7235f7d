"""How fast a detector is on this machine, with random weights: inference on one picture, and a training step.

    python benchmark.py --detector ecdet --size s                  inference at 640x640; the step: 16 pictures of 256x256, 5 boxes each
    python benchmark.py --detector detr --backbone dinov3-vits16
    python benchmark.py --detector ecdet --size s --compile        inference with torch.compile, its warm-up not counted
    python benchmark.py --relative                                 the same step of ECDet-S's nearest relative in transformers, DEIMv2
"""

import argparse
import resource
import statistics
import time

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from detr_model import DETECTORS, build_model
from ecdet_model import SIZES
from ecvit import fold
from errors import run
from settings import DEFAULTS, fast_bfloat16

CLASSES = 80


def random_targets(pictures, boxes, device):
    """Targets with boxes (T, 4) cxcywh well inside the picture, a tenth to four tenths of it wide and high."""
    make = lambda: torch.cat([0.25 + 0.5 * torch.rand(boxes, 2), 0.1 + 0.3 * torch.rand(boxes, 2)], dim=1)
    return [{"labels": torch.randint(CLASSES, (boxes,), device=device), "boxes": make().to(device)} for _ in range(pictures)]


def build(arguments, device):
    backbone = arguments.backbone or (SIZES[arguments.size]["backbone"] if arguments.detector == "ecdet" else "ecvitt")
    config = DEFAULTS | dict(
        detector=arguments.detector, size=arguments.size, backbone=backbone, backbone_weights=None, num_classes=CLASSES, num_queries=300,
        hidden_dim=256, num_heads=8, ffn_dim=1024, encoder_layers=6, copies=100, decoder_layers={"ecdet": None, "dino": 6}.get(arguments.detector, 3),
    )  # fmt: skip
    model, criterion, _ = build_model(config)
    return model.to(device, memory_format=torch.channels_last), criterion


class Relative(torch.nn.Module):
    """transformers' DEIMv2 with ECDet-S's widths, depths and points: the same kind of backbone, encoder, decoder and losses."""

    def __init__(self, dim=192, ffn=512):
        super().__init__()
        vit = transformers.DINOv3ViTConfig(
            hidden_size=dim, num_hidden_layers=12, num_attention_heads=3, intermediate_size=4 * dim, num_register_tokens=0, out_indices=[3, 7, 11],
        )  # fmt: skip
        config = transformers.Deimv2Config(
            backbone_config=vit, d_model=dim, encoder_hidden_dim=dim, encoder_in_channels=[dim] * 3, decoder_in_channels=[dim] * 3,
            encoder_ffn_dim=ffn, decoder_ffn_dim=ffn, decoder_layers=4, decoder_n_points=[3, 6, 3], hidden_expansion=0.34, depth_mult=0.67,
            encoder_activation_function="silu", freeze_backbone_batch_norms=False, num_labels=CLASSES,
        )  # fmt: skip
        self.model = transformers.Deimv2ForObjectDetection(config)

    def forward(self, images, mask, targets):
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        return self.model(pixel_values=images, pixel_mask=(~mask).long(), labels=labels).loss


def picture_batch(count, side, device):
    images = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return images, torch.zeros(count, side, side, dtype=torch.bool, device=device)


def timed(function, device, repeats):
    """Calls function -> the seconds of each call but the first three."""
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[3:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=DETECTORS, default="ecdet")
    parser.add_argument("--size", choices=SIZES, default="s", help="ECDet's (default s)")
    parser.add_argument("--backbone", metavar="NAME", help="default: the size's own, or ecvitt")
    parser.add_argument("--image-size", type=int, default=640, metavar="S", help="of inference (default 640)")
    parser.add_argument("--train-size", type=int, default=256, metavar="S", help="of the training step (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="of the training step (default 16)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="calls that are timed (default 10)")
    parser.add_argument("--compile", action="store_true", help="inference with torch.compile")
    parser.add_argument("--relative", action="store_true", help="only the training step of transformers' DEIMv2 in ECDet-S's sizes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    precisions = [torch.float32] + [torch.bfloat16] * fast_bfloat16()
    show = lambda what, seconds: print(f"{what:56s} median {1000 * statistics.median(seconds):8.1f} ms, fastest {1000 * min(seconds):8.1f}")

    if arguments.relative:
        model, criterion = Relative().to(device), lambda loss, targets: {"loss": loss}
    else:
        model, criterion = build(arguments, device)
    model.train()
    images, mask = picture_batch(arguments.batch_size, arguments.train_size, device)
    targets = random_targets(arguments.batch_size, 5, device)
    for precision in precisions:

        def step():
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = model(images, mask, targets)
            sum(criterion(outputs, targets).values()).backward()
            model.zero_grad()

        show(f"training step, {len(images)} x {arguments.train_size}x{arguments.train_size}, {str(precision)[6:]}", timed(step, device, arguments.repeats))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the whole process so far: {peak / 2**30:.2f} GiB")
    if arguments.relative:
        return

    model = fold(model.eval()).requires_grad_(False)
    images, mask = picture_batch(1, arguments.image_size, device)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(images, mask)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"inference, folded: {millions:.2f} M parameters, {counter.get_total_flops() / 1e9:.1f} GFLOPs (two a multiplication and addition)")
        detect = torch.compile(model) if arguments.compile else model
        for precision in precisions:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                seconds = timed(lambda: detect(images, mask), device, 3 * arguments.repeats)
            show(f"inference, 1 x {arguments.image_size}x{arguments.image_size}, {str(precision)[6:]}{', compiled' if arguments.compile else ''}", seconds)


if __name__ == "__main__":
    run(main)
