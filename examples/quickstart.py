"""Convert a small residual Transformer that is plain PyTorch, and train both forms side by side.

Run: python examples/quickstart.py
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import mhc_compile


class Block(nn.Module):
    """Pre-norm attention and MLP: two residual adds, so two sites."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TinyLM(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 64, layers: int = 4, length: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(1), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(n, device=ids.device))
        for block in self.blocks:
            x = block(x, self.mask[:n, :n])
        return self.head(self.norm(x))


def batch(generator: torch.Generator, size: int = 16, length: int = 32, vocabulary: int = 64) -> torch.Tensor:
    """Return sequences that count upwards by a step of 1 to 4 from a random start: easy to learn, easy to check."""
    start = torch.randint(0, vocabulary, (size, 1), generator=generator)
    step = torch.randint(1, 5, (size, 1), generator=generator)
    return (start + step * torch.arange(length + 1)) % vocabulary


def train(model: nn.Module, steps: int, seed: int) -> list[float]:
    """Train with AdamW on next-token prediction; return the losses."""
    optimizer = torch.optim.AdamW(mhc_compile.parameter_groups(model), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = batch(generator)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    residual = TinyLM()
    train(residual, 30, seed=1)

    ids = batch(torch.Generator().manual_seed(2))[:, :-1]
    converted = mhc_compile.convert(copy.deepcopy(residual), ids, streams=4, inner="eager")
    difference = (converted(ids) - residual(ids)).abs().max() / residual(ids).abs().max()
    print(mhc_compile.inspect(converted, ids))
    print(f"logits moved by {difference:.1e} of their scale by the conversion")

    for name, model in (("residual", residual), ("4 streams", converted)):
        losses = train(model, 60, seed=3)
        print(f"{name:>10}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
