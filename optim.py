"""How weights change: Muon and AdamW, the learning rate's schedule, and the EMA of the weights.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes momentum steps whose matrices are orthogonal: every
direction of a weight matrix is learnt at one speed, however small its gradient. From random weights that is what gets a
detector off the plateau on which it finds objects without telling them apart.
"""

import math
import re
from itertools import groupby

import torch

import distributed
from backbones import parameter_depths

MUON_LR = 30  # Muon's learning rate relative to AdamW's: 0.024 for 8e-4
MUON_DECAY = 0.1


class Muon(torch.optim.Optimizer):
    """For the matrices inside a network; embeddings, last layers, norms and biases are AdamW's.

    A convolution's weight counts as (out, in * height * width). lr is the step's spectral norm, times sqrt(out / in) if
    that is above 1. Three iterations match five here at 60 % of the cost; they compute in
    `dtype` (default: the weights').
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, iterations=3, dtype=None):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations, dtype=dtype)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            for (rows, columns), same in groupby(sorted(parameters, key=matrix_shape), key=matrix_shape):
                same = list(same)
                momenta = [self.state[p]["momentum"] for p in same]
                torch._foreach_lerp_(momenta, [p.grad for p in same], 1 - group["momentum"])
                nesterov = torch._foreach_lerp([p.grad for p in same], momenta, group["momentum"])
                matrices = torch.stack([step.flatten(1) for step in nesterov])
                steps = orthogonalize(matrices, group["iterations"], group.get("dtype")).to(matrices.dtype)
                steps = [step.reshape(p.shape) for step, p in zip(steps, same)]
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, steps, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def matrix_shape(parameter):
    return len(parameter), parameter[0].numel()


def orthogonalize(x, iterations, dtype=None):
    """x (..., m, n) -> the same singular vectors with singular values near 1, by a Newton-Schulz iteration.

    The quintic's coefficients are Jordan's: steep at 0, so that few iterations do, and within 0.7..1.2 around 1.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, iterations, dtype).mT
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)).to(dtype or x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


def build_optimizers(model, s):
    """-> [AdamW], or [AdamW, Muon] if Muon takes the inner matrices of everything that starts from random weights.

    No weight decay on norms, biases and other vectors; the backbone's blocks have their own learning rates.
    """
    depths = parameter_depths(model.backbone)
    last = max(depths.values())
    groups = {}
    for name, parameter in model.named_parameters():
        lr, from_scratch = s.lr, s.init is None
        if name.startswith("backbone.") and name.split(".")[1] not in (s.random_parts or ()):
            lr = s.backbone_lr * s.layer_decay ** (last - depths[name.removeprefix("backbone.")])
            from_scratch = from_scratch and s.backbone_weights == "none"
        sharded = s.shard and name.startswith("backbone.")  # Muon needs whole matrices
        muon = s.optimizer == "muon" and from_scratch and is_inner_matrix(name, parameter) and not sharded
        if muon:
            lr, decay = MUON_LR * lr, MUON_DECAY
        else:
            decay = s.weight_decay if parameter.ndim > 1 or s.decay_all else 0.0
        groups.setdefault((muon, lr, decay, sharded), []).append(parameter)
    of_adamw, of_muon = [], []
    for (muon, lr, decay, _), parameters in groups.items():
        group = {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        (of_muon if muon else of_adamw).append(group)
    optimizers = [torch.optim.AdamW(of_adamw, fused=True)]
    dtype = torch.bfloat16 if s.precision == "bfloat16" else None
    return optimizers + ([Muon(of_muon, lr=MUON_LR * s.lr, dtype=dtype)] if of_muon else [])


def is_inner_matrix(name, parameter):
    """Whether it is a layer within the network: neither one that gives classes or boxes, nor an embedding."""
    output_or_embedding = re.search(r"class|score_head|dec_bbox_head\.\d+\.layers\.2|regression_head|content", name)
    return name.endswith(".weight") and not output_or_embedding and min(matrix_shape(parameter)) >= 16


def set_learning_rate(optimizers, factor):
    """Every group's learning rate becomes `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def learning_rate_factor(progress, s):
    """progress in [0, 1) of the budget -> fraction of the peak learning rate."""
    warm = min(1.0, max(progress, 1e-3) / s.warmup) if s.warmup else 1.0
    if s.schedule == "flat-cosine":  # DEIM: flat for half of the run, then a cosine to half of the peak
        return warm * (0.75 + 0.25 * math.cos(math.pi * max(0.0, 2 * progress - 1)))
    if s.schedule == "step":  # DETR: a tenth for the last third
        return warm * (1.0 if progress < s.lr_drop else 0.1)
    return warm * (1 - progress)


@torch.no_grad()
def update_ema(ema, model, step, horizon):
    """EMA whose window grows to a twelfth of the steps so far, which fits any budget, or to at most `horizon` steps.

    Batch norms' statistics are averaged too: those of the last few batches are too noisy to evaluate with.
    """
    if ema is None:
        return
    weight = max(min(1.0, 12 / (step + 12)), 1 / horizon if horizon else 0.0)
    averages, values = ([distributed.local_shard(v) for v in m.state_dict().values()] for m in (ema, model))
    real = [i for i, value in enumerate(averages) if value.is_floating_point()]
    torch._foreach_lerp_([averages[i] for i in real], [values[i] for i in real], weight)
