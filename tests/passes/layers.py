"""Layers and token ids for forwards to be written around."""

import torch
from torch import Tensor, nn

WIDTH, TOKENS = 8, 4


class Layers(nn.Module):
    """Layers for a forward to be written around."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 11)


class FirstFrozen(Layers):
    """Three residual sites, the first of which runs without gradients."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            x = x + self.layers[0](x)
        x = x + self.layers[1](x)
        return self.head(x + self.layers[2](x))


IDS = torch.arange(8).reshape(2, TOKENS)
