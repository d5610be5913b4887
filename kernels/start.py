"""Initial values of a site's and the head's parameters: function-preserving, or from scratch.

With equal streams, any H whose rows sum to 1, any `pre` that sums to 1 and `post = 1` reproduce the residual network.
`pre` must not be uniform: the gradients of the streams would then be equal too, and the streams would never separate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhc_compile.kernels.spec import StreamSpec

ALPHA = 0.01
LARGEST_PRE = 0.7
OFF = -8.0
SCRATCH_STD = 0.02
# sigmoid never reaches 1, which a single stream would need; sigmoid(8) = 0.9997 still learns.
SINGLE = 8.0


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


def start_phi(shape: tuple[int, ...], *, scratch: bool = False) -> Tensor:
    """Return phi at the start: zero, which keeps the residual network's function, or with `scratch` from N(0, 0.02)."""
    return torch.randn(shape) * SCRATCH_STD if scratch else torch.zeros(shape)


def start_head(spec: StreamSpec, hidden: int, *, scratch: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return fn `[n, n*hidden]`, base `[n]` and scale `[1]` of the learned exit at the start, float32.

    With equal streams the head gives their mean. fn is zero, or drawn from N(0, 0.02) with `scratch`.
    """
    n = spec.streams
    fn = start_phi((n, n * hidden), scratch=scratch)
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
        case "permutations":
            near[0] = 0.0  # the identity comes first
        case "kronecker":
            near[::2] = 0.0
        case "identity":
            pass
    return near
