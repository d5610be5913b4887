"""Initial values of a site's and the head's parameters: function-preserving, or from scratch.

With equal streams, any H whose rows sum to 1, any `pre` that sums to 1 and `post = 1` reproduce the residual network.
`pre` must not be uniform: the gradients of the streams would then be equal too, and the streams would never separate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import StreamSpec

PAPER_ALPHA = 0.01
WIDTH = 4096
"""n*C up to which alpha starts at 1: see `start_alpha`."""
LARGEST_PRE = 0.7
OFF = -8.0
SCRATCH_STD = 0.02
# sigmoid never reaches 1, which a single stream would need; sigmoid(8) = 0.9997 still learns.
SINGLE = 8.0


@dataclass(frozen=True)
class Start:
    """How the parameters of streams start."""

    scratch: bool = False
    """The model is trained from scratch: its function at the start need not be kept."""
    paper: bool = False
    """The published alpha of 0.01, and with `scratch` phi from N(0, 0.02)."""


DEFAULT = Start()
StartName = Literal["default", "paper"]


def start_of(name: StartName, *, scratch: bool = False) -> Start:
    """Return the start that options call `name`. Raises MHC204."""
    if name not in get_args(StartName):
        raise MHCError("MHC204", f"start={name!r}; known: {', '.join(get_args(StartName))}")
    return Start(scratch=scratch, paper=name == "paper")


def start_alpha(spec: StreamSpec, hidden: int, start: Start) -> Tensor:
    """Return alpha `[3]` of pre, post and H at the start, float32: 0.01 as published, but 1 for pre and post.

    phi is zero, so that any alpha keeps the function; coefficients learn in proportion to it (docs/claims.md). A step
    of Adam at the rate lr moves logits by about `alpha * lr * n*C`, so that alpha falls with `n*C` above `WIDTH`. H
    keeps 0.01: mixing that learns faster has lowered no loss, and without a manifold its composite gain explodes.
    """
    alpha = torch.full((3,), PAPER_ALPHA)
    if not start.paper:
        alpha[:2] = min(1.0, WIDTH / (spec.streams * hidden))
    return alpha


def start_pre(spec: StreamSpec, site_index: int) -> Tensor:
    """Return `pre` at the start, `[n]` float64: sums to 1, its largest entry on stream `site_index mod n`."""
    n = spec.streams
    if n == 1:
        return torch.sigmoid(torch.tensor([SINGLE], dtype=torch.float64)) + spec.convention.fields.pre_eps
    weights = torch.full((n,), (1 - LARGEST_PRE) / (n - 1), dtype=torch.float64)
    weights[site_index % n] = LARGEST_PRE
    return weights


def start_bias(spec: StreamSpec, site_index: int) -> Tensor:
    """Return the bias of site `site_index` (counted from 0) at the start: `[rows]` float32, ordered pre | post | mix.

    With `phi = 0` it gives `post = 1`, `start_pre`, and an H near the identity (the identity itself when
    unconstrained).
    """
    n, fields = spec.streams, spec.convention.fields
    pre = torch.logit(start_pre(spec, site_index) - fields.pre_eps)
    post = torch.full((n,), -math.log(fields.post_scale / (1 - fields.post_eps) - 1), dtype=torch.float64)
    return torch.cat([pre, post, _start_mix(spec)]).to(torch.float32)


def start_phi(shape: tuple[int, ...], start: Start) -> Tensor:
    """Return phi at the start: zero, which keeps the residual network's function, or as published from N(0, 0.02)."""
    return torch.randn(shape) * SCRATCH_STD if start.scratch and start.paper else torch.zeros(shape)


def start_head(spec: StreamSpec, hidden: int, start: Start = DEFAULT) -> tuple[Tensor, Tensor, Tensor]:
    """Return fn `[n, n*hidden]`, base `[n]` and scale `[1]` of the learned exit at the start, float32.

    With equal streams the head gives their mean. fn starts as phi does.
    """
    n = spec.streams
    fn = start_phi((n, n * hidden), start)
    mean = torch.full((n,), 1.0 / n - spec.convention.fields.pre_eps, dtype=torch.float64)
    base = torch.logit(mean) if n > 1 else torch.full((1,), SINGLE, dtype=torch.float64)
    return fn, base.to(torch.float32), torch.ones(1, dtype=torch.float32)


def _start_mix(spec: StreamSpec) -> Tensor:
    """Return the mix block of the bias: `[mix_rows]` float64."""
    near = torch.full((spec.mix_rows,), OFF, dtype=torch.float64)
    eye = torch.eye(spec.streams, dtype=torch.float64)
    match spec.manifold:
        case "sinkhorn":
            return (OFF * (1 - eye)).reshape(-1)
        case "unconstrained":
            return eye.reshape(-1)
        case "circulant" | "permutations":
            near[0] = 0.0  # the identity comes first
        case "kronecker":
            near[::2] = 0.0
        case "transportation":
            near[:: spec.streams] = -OFF  # the diagonal
        case "identity":
            pass
    return near
