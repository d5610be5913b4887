"""How a memory enters the streams, in plain PyTorch: the ops decompose to it and kernels are compared with it.

Shapes: `n` streams, `C` hidden size, X the streams `[..., n, C]`. Source: Engram (arXiv 2601.07372, section 3) and, for
the signed root, the code of the released systems. Everything is computed in float32, in float64 where an input is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.reference import compute_dtype

# |s| is at least this under the signed root, whose slope would be infinite at 0.
ROOT_FLOOR = 1e-6


def gate(X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: FusionSpec) -> Tensor:
    """Return how much of the memory each stream takes.

    X, keys `[..., n, C]`, gains `[n, C]` -> a `[..., n]` = sigmoid(root(<rmsnorm(X), rmsnorm(keys)> / sqrt(C))), in
    float32 or float64; `root` is the signed root where the specification has it.
    """
    dtype = compute_dtype(X.dtype, keys.dtype, query_gain.dtype, key_gain.dtype)
    query = _rms_norm(X.to(dtype), spec.eps) * query_gain.to(dtype)
    key = _rms_norm(keys.to(dtype), spec.eps) * key_gain.to(dtype)
    similarity = (query * key).sum(-1) / math.sqrt(X.shape[-1])
    if spec.signed_root:
        similarity = similarity.sign() * similarity.abs().clamp(min=ROOT_FLOOR).sqrt()
    return torch.sigmoid(similarity)


def inject(
    X: Tensor,
    a: Tensor,
    value: Tensor,
    reach: Tensor | None,
    conv_gain: Tensor | None,
    conv: Tensor | None,
    spec: FusionSpec,
) -> Tensor:
    """Return X' = X + u + silu(convolution of rmsnorm(u) over the tokens), u = a * value, like X `[B, S, n, C]`.

    a `[B, P' + S, n]`, value `[B, P' + S, C]`: P' rows of history in front, usually 0 or `spec.history`; what lies
    before them counts as zero. conv `[n, C, taps]` is causal and depthwise with `spec.dilation` tokens from tap to tap,
    the last tap on the token itself; a tap more than `reach` `[B, S]` tokens back counts as zero (None: all reach).
    Without conv and conv_gain `[n, C]`: X + u. Raises `MHCError` MHC220 for shapes that do not fit.
    """
    before = check_shapes(X, a, value, conv, spec)
    dtype = compute_dtype(*(t.dtype for t in (X, a, value, conv_gain, conv) if t is not None))
    S = X.shape[1]
    memory = a.to(dtype).unsqueeze(-1) * value.to(dtype).unsqueeze(-2)
    added = memory[:, before:]
    if conv is not None and conv_gain is not None:
        normed = F.pad(_rms_norm(memory, spec.eps) * conv_gain.to(dtype), (0, 0, 0, 0, spec.history, 0))
        convolved = torch.zeros_like(added)
        for tap in range(spec.taps):
            offset = (spec.taps - 1 - tap) * spec.dilation
            start = spec.history + before - offset
            seen = normed[:, start : start + S]
            if offset and reach is not None:
                seen = torch.where((reach >= offset)[..., None, None], seen, 0.0)
            convolved = convolved + seen * conv[..., tap].to(dtype)
        added = added + F.silu(convolved)
    return (X.to(dtype) + added).to(X.dtype)


def check_shapes(X: Tensor, a: Tensor, value: Tensor, conv: Tensor | None, spec: FusionSpec) -> int:
    """Return P', the rows of history before `a` and `value`. Raises `MHCError` MHC220 where `inject` is not defined."""
    before = a.shape[1] - X.shape[1]
    if a.shape[1] != value.shape[1] or before < 0:
        raise MHCError("MHC220", f"{a.shape[1]} gates and {value.shape[1]} values for {X.shape[1]} tokens")
    if conv is not None and (not spec.dilation or conv.shape[-1] != spec.taps):
        raise MHCError("MHC220", f"a convolution of {conv.shape[-1]} taps for {spec}")
    return before


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
