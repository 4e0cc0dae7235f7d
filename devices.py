"""What to compute on and in which precision: one choice for every script."""

from contextlib import nullcontext

import torch

from errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(local_rank=None):
    """-> torch.device: a CUDA GPU (the one of that rank), Apple's GPU, or the CPU. Apple's serves one process alone."""
    if torch.cuda.is_available():
        return torch.device("cuda" if local_rank is None else f"cuda:{local_rank}")
    return torch.device("mps" if torch.backends.mps.is_available() and local_rank is None else "cpu")


def choose_precision(asked, device, training=True):
    """"auto" -> bfloat16 where the processor multiplies in it, float16 on other GPUs that have such units, else float32; a CPU detects
    in float32. Anything else stays. Also allows TF32 in what float32 remains, unless float32 was asked for. Raises UserError."""
    if asked not in ("auto", *PRECISIONS):
        raise UserError(f"--precision {asked}: it is auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if asked == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = asked != "float32"
    if asked != "auto":
        return asked
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if device.type == "cuda":  # T4, V100; before them float16 was slow
        return "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"
    multiplies = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16"))  # elsewhere it is emulated
    return "bfloat16" if device.type == "cpu" and training and multiplies else "float32"


def autocast(precision, device):
    """The context in which a network computes in that precision where it is safe."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, PRECISIONS[precision])
