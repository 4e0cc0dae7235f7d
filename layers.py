"""Layers that several detectors are made of."""

import torch.nn.functional as F
from torch import nn


class Mlp(nn.Module):
    """`layers` linear layers with an activation between them."""

    def __init__(self, in_dim, hidden_dim, out_dim, layers, activation=F.relu):
        super().__init__()
        self.activation = activation
        dims = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
