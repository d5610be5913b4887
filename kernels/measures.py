"""Formulas that describe the streams: gains of mixes, their distance from the manifold, entropy, separation.

Shapes: `n` streams, `C` hidden size, `...` any leading dimensions (tokens). Everything is computed in the dtype given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def separation(X: Tensor) -> Tensor:
    """Compute per token the streams' RMS deviation from their mean relative to it: X `[..., n, C]` -> `[...]`."""
    mean = X.mean(-2, keepdim=True)
    spread = (X - mean).square().sum((-2, -1)).div(X.shape[-2]).sqrt()
    return spread / torch.linalg.vector_norm(mean.squeeze(-2), dim=-1).clamp(min=torch.finfo(X.dtype).tiny)


def gains(H: Tensor) -> tuple[Tensor, Tensor]:
    """Compute how much a mix amplifies: the largest row sum of `|H|` (forward) and column sum (backward).

    H `[..., n, n]`, a site's or a product of several -> two of `[...]` (arXiv 2512.24880, section 3.2).
    """
    sizes = H.abs()
    return sizes.sum(-1).amax(-1), sizes.sum(-2).amax(-1)


def distance(H: Tensor) -> Tensor:
    """Compute the distance of H `[..., n, n]` from doubly stochastic.

    It is the largest `|sum - 1|` of a row or column, or `-entry`.
    """
    off = torch.maximum((H.sum(-1) - 1).abs().amax(-1), (H.sum(-2) - 1).abs().amax(-1))
    return torch.maximum(off, -H.amin((-2, -1)))


def entropy(weights: Tensor) -> Tensor:
    """Compute the entropy (nats) of the n streams' shares `|w| / sum |w|`: `[..., n]` -> `[...]`, from 0 to log n."""
    sizes = weights.abs()
    shares = sizes / sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.special.entr(shares).sum(-1)


def composed(H: Tensor, earlier: Tensor) -> Tensor:
    """Compute `H @ earlier`, both `[..., n, n]`, without the narrower products that matrix units take."""
    return (H.unsqueeze(-1) * earlier.unsqueeze(-3)).sum(-2)
