"""The fused kernels as functions, for people with modules of their own.

    h, post, mix = read(X, phi, alpha, bias, spec)                          # the first site
    X, h, post, mix = boundary(X, y, post, mix, phi, alpha, bias, spec)     # from one site to the next
    out = leave(X, y, post, mix, spec)                                      # the exit

Shapes: X `[..., n, C]` streams, y and h `[..., C]`, pre and post `[..., n]`, mix (H) `[..., n, n]`, phi `[rows, n*C]`,
alpha `[3]`, bias `[rows]` with `spec.rows` rows; `...` any leading dimensions, tokens. Streams, y and h are float32,
bfloat16 or float16 (float64 by plain PyTorch), parameters and coefficients float32. All are differentiable once, and
work eagerly, under `torch.compile`, autocast and fake tensors. Where no kernel exists, plain PyTorch computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mhc_compile.kernels.ops  # noqa: F401  (registers the ops)
from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import StreamSpec

Head = tuple[Tensor, Tensor, Tensor]
_OPS = torch.ops.mhc_kernels


def expand(x: Tensor, streams: int) -> Tensor:
    """Return `streams` equal copies of x `[..., C]`: `[..., n, C]`, the entry."""
    return reference.expand(x, streams)


def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute pre, post and H of one site (arXiv 2512.24880, Eq. 7-9)."""
    pre, post, mix, _ = _OPS.coefficients(X, phi, alpha, bias, str(spec))
    return pre, post, mix


def aggregate(X: Tensor, pre: Tensor) -> Tensor:
    """Compute the branch input `h = pre @ X` (Eq. 3)."""
    return _OPS.aggregate(X, pre, str(StreamSpec(streams=X.shape[-2])))


def distribute(X: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """Compute the next streams `H @ X + outer(post, y)` (Eq. 3), in the dtype to which X and y promote."""
    if torch.promote_types(X.dtype, y.dtype) != X.dtype:
        X = X.to(y.dtype)
    return _OPS.distribute(X, y, post, mix, str(StreamSpec(streams=X.shape[-2])))


def read(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `coefficients` and `aggregate` in one kernel: h, post, H."""
    h, post, mix, _ = _OPS.read(X, phi, alpha, bias, str(spec))
    return h, post, mix


def boundary(
    X: Tensor, y: Tensor, post: Tensor, mix: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `distribute` of one site and `read` of the next in one kernel: the next X, h, post and H.

    post and mix are those of the site whose branch computed y; phi, alpha and bias those of the next.
    """
    X, h, post, mix, _ = _OPS.boundary(X, y, post, mix, phi, alpha, bias, str(spec))
    return X, h, post, mix


def deferred(
    X: Tensor,
    y: Tensor,
    post: Tensor,
    mix: Tensor,
    pre: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    spec: StreamSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `boundary` where `pre` was computed one site ahead (DeepSeek-V4.1): the next X, h, pre, post and H.

    h is weighed with the `pre` given; the one returned, of the next site, weighs what the site after it reads.
    """
    X, h, pre, post, mix, _ = _OPS.deferred(X, y, post, mix, pre, phi, alpha, bias, str(spec))
    return X, h, pre, post, mix


def reduce(X: Tensor, spec: StreamSpec, head: Head | None = None) -> Tensor:
    """Reduce n streams to one as `spec.exit` says.

    The exit is a mean, a sum, or a learned head (fn `[n, n*C]`, base `[n]`, scale `[1]`).

    Raises ValueError where the exit is a head and `head` is missing.
    """
    if spec.exit != "head":
        return _OPS.reduce(X, str(spec))
    fn, base, scale = _needed(head)
    return _OPS.reduce_head(X, fn, scale, base, str(spec))[0]


def leave(X: Tensor, y: Tensor, post: Tensor, mix: Tensor, spec: StreamSpec, head: Head | None = None) -> Tensor:
    """Compute `distribute` of the last site and `reduce` in one kernel, with the same arguments and errors."""
    if spec.exit != "head":
        return _OPS.leave(X, y, post, mix, str(spec))
    fn, base, scale = _needed(head)
    return _OPS.leave_head(X, y, post, mix, fn, scale, base, str(spec))[0]


def _needed(head: Head | None) -> Head:
    if head is None:
        raise ValueError("an exit of 'head' needs its parameters fn, base and scale")
    return head
