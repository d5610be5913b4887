"""Hyper-Connections (arXiv 2409.19606), the unconstrained ancestor of mHC.

With the streams X `[n, C]` of a token and the branch F:

    h  = A_m.T X                      what the branch reads: pre = A_m
    X' = A_r.T X + outer(B, F(h))     H = A_r.T, post = B

    static:   A_m, A_r and B are parameters
    dynamic:  Xb = norm(X) for each stream
              A_m = s_a tanh(Xb W_m) + A_m0,  A_r = s_a tanh(Xb W_r) + A_r0,  B = s_b tanh(Xb W_b) + B0

The norm is RMSNorm without a gain: W absorbs a gain. Everything is computed in max(float32, dtype of X)
with autocast off. `bias` holds A_m0 `[n]`, B0 `[n]` and A_r0 `[n, n]` row-major, rows of A_r being the streams that are
read; `phi` `[n + 2, C]` the rows W_m, W_b and the n columns of W_r; `alpha` s_a and s_b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.kernels.reference import compute_dtype

RMS_EPS = 1e-6
SCALE = 0.01

Three = tuple[Tensor, Tensor, Tensor]


def start_bias(n: int, index: int) -> Tensor:
    """Return the bias of site `index` (counted from 0) at the start, float32: A_m0 = e_{l mod n}, B0 = 1, A_r0 = I.

    With phi = 0 and equal streams that is the residual network; the published scales are 0.01.
    """
    one = torch.zeros(n)
    one[index % n] = 1.0
    return torch.cat([one, torch.ones(n), torch.eye(n).flatten()])


def dynamic(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Three:
    """Compute pre `[..., n]`, post `[..., n]`, H `[..., n, n]` of X `[..., n, C]`, in max(float32, X's dtype)."""
    dtype = compute_dtype(X.dtype)
    n, X = X.shape[-2], X.to(dtype)
    normed = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + RMS_EPS)
    z = torch.tanh(F.linear(normed, phi.to(dtype)))
    alpha, bias = alpha.to(dtype), bias.to(dtype)
    pre = alpha[0] * z[..., 0] + bias[:n]
    post = alpha[1] * z[..., 1] + bias[n : 2 * n]
    mix = alpha[0] * z[..., 2:] + bias[2 * n :].reshape(n, n)
    return pre, post, mix.transpose(-1, -2)


def weights(z: Tensor, alpha: Tensor, bias: Tensor, width: int) -> Tensor:
    """Return pre `[..., n]` from what a kernel keeps: n projections on the rows of phi and n sums of squares."""
    n = math.isqrt(bias.numel() + 1) - 1
    scale = torch.rsqrt(z[..., -n:] / width + RMS_EPS)
    first = z[..., :-n].unflatten(-1, (n, n + 2))[..., 0]
    return alpha[0].to(z.dtype) * torch.tanh(first * scale) + bias[:n].to(z.dtype)


def static(X: Tensor, bias: Tensor) -> Three:
    """Return pre, post and H, the same for every token, from the parameters alone."""
    n, lead = X.shape[-2], X.shape[:-2]
    bias = bias.to(compute_dtype(X.dtype))
    pre, post, mix = bias[:n], bias[n : 2 * n], bias[2 * n :].reshape(n, n).t()
    return pre.repeat(*lead, 1), post.repeat(*lead, 1), mix.repeat(*lead, 1, 1)
