"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum steps whose matrices are made orthogonal.

Every direction of a weight matrix is learnt at one speed, however small its gradient beside the others'. From random
weights that is what gets a detector off the plateau on which it finds objects without telling them apart.
"""

from itertools import groupby

import torch


class Muon(torch.optim.Optimizer):
    """For the matrices inside a network; embeddings, last layers, norms and biases are AdamW's.

    A convolution's weight counts as (out, in * height * width). lr is the step's spectral norm, times sqrt(out / in) where
    that is over 1. Three iterations gave what five do, in 0.6 of the time.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, iterations=3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            shape = lambda p: (len(p), p[0].numel())
            for (rows, columns), alike in groupby(sorted(parameters, key=shape), key=shape):
                alike = list(alike)
                averages = [self.state[p]["momentum"] for p in alike]
                torch._foreach_lerp_(averages, [p.grad for p in alike], 1 - group["momentum"])
                ahead = torch._foreach_lerp([p.grad for p in alike], averages, group["momentum"])  # Nesterov's
                steps = orthogonalize(torch.stack([step.flatten(1) for step in ahead]), group["iterations"])
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(alike, [step.reshape(p.shape) for step, p in zip(steps, alike)], alpha=-scale)


def orthogonalize(x, iterations):
    """x (..., m, n) -> the same singular vectors with singular values drawn towards 1, by a Newton-Schulz iteration.

    The quintic's coefficients are Jordan's: steep at 0, so that few iterations do, and within 0.7..1.2 around 1.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, iterations).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x
