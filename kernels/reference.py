"""Every stream operation in plain PyTorch, which the ops decompose to and kernels are tested against.

Shapes: `n` streams, `C` hidden size, `...` any leading dimensions (tokens), `X` the streams `[..., n, C]`. Sources: mHC
(arXiv 2512.24880, Eq. 3 and 7-9), DeepSeek-V4's released module, mHC-lite (arXiv 2601.05732), KromHC (arXiv
2601.21579).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.kernels.spec import ConventionFields, StreamSpec

Sinkhorn = Callable[[Tensor, StreamSpec], Tensor]
Head = tuple[Tensor, Tensor, Tensor]
# exp(-60) is far below the rounding of a sum of n ones and far above float32's smallest number.
LOGIT_FLOOR = -60.0


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtypes` are combined: float32, or float64 where one of them is."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def expand(x: Tensor, n: int) -> Tensor:
    """Return `n` equal streams of `x`: `[..., C]` -> `[..., n, C]`, same dtype, contiguous and never a view of `x`."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]).clone(memory_format=torch.contiguous_format)


def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec, *, sinkhorn: Sinkhorn | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the three maps of one site (arXiv 2512.24880, Eq. 7-8), in max(float32, dtype of X).

    X `[..., n, C]`, phi `[rows, n*C]` (rows ordered pre | post | mix), alpha `[3]`, bias `[rows]` -> pre `[..., n]`,
    post `[..., n]`, H `[..., n, n]`, where `X' = H @ X + outer(post, y)` in every convention. `sinkhorn` replaces the
    projection of the logits (same signature as `sinkhorn` of this module).
    """
    n, fields = spec.streams, spec.convention.fields
    z = _normalised_projection(X, phi, fields)
    dtype = z.dtype
    alpha, bias = alpha.to(dtype), bias.to(dtype)
    pre = branch_weights(z, alpha, bias, spec)
    post = fields.post_scale * torch.sigmoid(z[..., n : 2 * n] * alpha[1] + bias[n : 2 * n])
    if fields.post_eps:
        post = post + fields.post_eps
    logits = z[..., 2 * n :] * alpha[2] + bias[2 * n :]
    return pre, post, mixing_matrix(logits, spec, sinkhorn=sinkhorn)


def branch_weights(z: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec) -> Tensor:
    """Compute `pre` `[..., n]` from the normalised projection z `[..., rows]`.

    alpha `[3]`, bias `[rows]`, all of one dtype.
    """
    n, eps = spec.streams, spec.convention.fields.pre_eps
    pre = torch.sigmoid(z[..., :n] * alpha[0] + bias[:n])
    return pre + eps if eps else pre


def mixing_matrix(logits: Tensor, spec: StreamSpec, *, sinkhorn: Sinkhorn | None = None) -> Tensor:
    """Compute H `[..., n, n]` from the logits `[..., mix_rows]` of the manifold, in their dtype.

    `sinkhorn` and `unconstrained` read the logits as a row-major matrix, transposed where the convention is;
    `circulant` takes the weights of the shifts by 0, 1, ...; `permutations` orders them as `itertools.permutations`
    does; `kronecker` takes (keep, swap) pairs, leftmost factor first; `transportation` the entries but those of
    the last row and column, row by row.
    """
    n, lead = spec.streams, logits.shape[:-1]
    match spec.manifold:
        case "sinkhorn":
            return (sinkhorn or _SINKHORN)(logits.reshape(*lead, n, n), spec)
        case "unconstrained":
            H = logits.reshape(*lead, n, n)
            return H.transpose(-1, -2) if spec.convention.fields.transposed else H
        case "identity":
            eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
            return eye.expand(*lead, n, n).clone(memory_format=torch.contiguous_format)
        case "circulant":
            return (torch.softmax(logits, dim=-1) @ _shift_table(n, logits)).reshape(*lead, n, n)
        case "permutations":
            return (torch.softmax(logits, dim=-1) @ _permutation_table(n, logits)).reshape(*lead, n, n)
        case "kronecker":
            return _kronecker(logits, n)
        case "transportation":
            return fill(torch.sigmoid(logits), n)


def fill(gates: Tensor, n: int) -> Tensor:
    """Compute a doubly stochastic H `[..., n, n]` from gates in (0, 1) `[..., (n-1)^2]` (arXiv 2605.21724).

    Row by row, each entry lies where its gate says between the least and the most that the rest of its row and of its
    column allow; what is left of a row and of a column fills the last ones. Every doubly stochastic matrix is reached.
    The rows still open can take whatever a column has left, so that they give no lower bound.
    """
    one = torch.ones_like(gates[..., 0] if n > 1 else gates.sum(-1))
    columns, rows = [one] * n, []
    for i in range(n - 1):
        left, entries = one, []
        for j in range(n - 1):
            low = _positive(left - torch.stack(columns[j + 1 :]).sum(0))
            high = torch.where(left < columns[j], left, columns[j])
            entries.append(low + (high - low) * gates[..., i * (n - 1) + j])
            left, columns[j] = left - entries[j], columns[j] - entries[j]
        columns[-1] = columns[-1] - left
        rows.append(torch.stack([*entries, _positive(left)], -1))
    return torch.stack([*rows, torch.stack([_positive(c) for c in columns], -1)], -2)


def _positive(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 0.0)


def sinkhorn(logits: Tensor, spec: StreamSpec) -> Tensor:
    """Compute a doubly stochastic H by Sinkhorn-Knopp (arXiv 2512.24880, Eq. 9).

    The convention says how it starts, orders and divides.

    logits `[..., n, n]`, the published matrix row-major -> H of the same shape and dtype. `iterations=0` is the start
    alone.
    """
    fields = spec.convention.fields
    matrix = sinkhorn_start(logits, spec)
    for axis in sinkhorn_axes(spec):
        total = matrix.sum(axis, keepdim=True)
        if fields.divisor == "add_eps":
            total = total + fields.sinkhorn_eps
        elif fields.divisor == "clamp":
            total = total.clamp(min=fields.sinkhorn_eps)
        quotient = matrix / total
        cut = fields.divisor == "clamp"
        matrix = quotient.where(matrix > vanishing(matrix.dtype), quotient.detach()) if cut else quotient
    return matrix.transpose(-1, -2) if fields.transposed else matrix


_SINKHORN = sinkhorn


def sinkhorn_start(logits: Tensor, spec: StreamSpec) -> Tensor:
    """Return the positive matrix `[..., n, n]` that the iterations begin with, in the published orientation."""
    fields = spec.convention.fields
    if fields.start == "softmax_eps":
        return torch.softmax(logits, dim=-1) + fields.sinkhorn_eps
    columns = fields.start == "exp_colmax"
    peak = logits.amax(-2 if columns else -1, keepdim=True)
    if spec.iterations:
        peak = peak.detach()  # the first normalisation cancels it
    shifted = logits - peak
    return torch.exp(shifted.clamp(min=LOGIT_FLOOR) if columns else shifted)


def vanishing(dtype: torch.dtype) -> float:
    """Return the size up to which entries get no gradient where divisors are clamped.

    The gradient grows as the inverse of the entry, and overflows.
    """
    return 1e8 * torch.finfo(dtype).tiny


def sinkhorn_axes(spec: StreamSpec) -> list[int]:
    """Return the axes summed in turn (-2: columns sum to 1 afterwards, -1: rows), in the published orientation."""
    pairs = {"columns_rows": [-2, -1], "rows_columns": [-1, -2], "columns_then_rows_columns": [-1, -2]}
    order = spec.convention.fields.order
    if order != "columns_then_rows_columns" or not spec.iterations:
        return pairs[order] * spec.iterations
    return [-2, *pairs[order] * (spec.iterations - 1)]


def aggregate(X: Tensor, pre: Tensor) -> Tensor:
    """Compute the branch input `h = pre @ X` (arXiv 2512.24880, Eq. 3).

    X `[..., n, C]`, pre `[..., n]` -> `[..., C]` in X's dtype, accumulated in float32 (float64 where it occurs).
    """
    dtype = compute_dtype(X.dtype, pre.dtype)
    return (pre.to(dtype).unsqueeze(-1) * X.to(dtype)).sum(-2).to(X.dtype)


def distribute(X: Tensor, y: Tensor, post: Tensor, H: Tensor) -> Tensor:
    """Compute the next streams `X' = H @ X + outer(post, y)` (arXiv 2512.24880, Eq. 3), accumulated as in `aggregate`.

    X `[..., n, C]`, y `[..., C]` (the branch output), post `[..., n]`, H `[..., n, n]` -> `[..., n, C]` in the dtype to
    which X and y promote.
    """
    result = torch.promote_types(X.dtype, y.dtype)
    dtype = compute_dtype(result, post.dtype, H.dtype)
    X, H = X.to(dtype), H.to(dtype)
    # One broadcast product per stream: Inductor fuses them into a single kernel, which a batched 4x4 product is not.
    out = post.to(dtype).unsqueeze(-1) * y.to(dtype).unsqueeze(-2)
    for j in range(X.shape[-2]):
        out = torch.addcmul(out, H[..., :, j, None], X[..., j, None, :])
    return out.to(result)


def reduce(X: Tensor, spec: StreamSpec, head: Head | None = None) -> Tensor:
    """Reduce n streams to one at the exit: X `[..., n, C]` -> `[..., C]`, X's dtype, accumulated as in `aggregate`.

    `spec.exit` chooses the mean, the sum, or DeepSeek-V4's learned head, whose weights are `sigmoid(scale * z + base) +
    pre_eps` with fn `[n, n*C]`, base `[n]` and scale `[1]` in `head`. Raises ValueError where the exit is a head and
    `head` is missing.
    """
    if spec.exit == "head":
        if head is None:
            raise ValueError("an exit of 'head' needs its parameters fn, base and scale")
        fn, base, scale = head
        z = _normalised_projection(X, fn, spec.convention.fields)
        weights = torch.sigmoid(z * scale.to(z.dtype) + base.to(z.dtype)) + spec.convention.fields.pre_eps
        return aggregate(X, weights)
    total = X.to(compute_dtype(X.dtype)).sum(-2)
    return (total / spec.streams if spec.exit == "mean" else total).to(X.dtype)


def _normalised_projection(X: Tensor, phi: Tensor, fields: ConventionFields) -> Tensor:
    """Compute `(v @ phi.T) / r` with `v` the flattened streams and `r` their root mean square: `[..., rows]`."""
    v = X.flatten(-2).to(compute_dtype(X.dtype))
    if fields.rms_inside:
        scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + fields.rms_eps)
    else:
        # vector_norm's gradient at zero is zero; that of a square root is infinite.
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        scale = 1.0 / (norm / math.sqrt(v.shape[-1]) + fields.rms_eps)
    return F.linear(v, phi.to(v.dtype)) * scale


def _kronecker(logits: Tensor, n: int) -> Tensor:
    lead, powers = logits.shape[:-1], n.bit_length() - 1
    # A factor's softmax over (keep, swap) is a sigmoid of their difference; it swaps where the bits of i and j differ.
    difference = logits[..., 0::2] - logits[..., 1::2]
    index = torch.arange(n, device=logits.device)
    differing = index[:, None] ^ index
    H = logits.new_ones(*lead, n, n)
    for k in range(powers):
        swapped = (differing >> (powers - 1 - k)) & 1
        H = H * torch.sigmoid(difference[..., k, None, None] * (1 - 2 * swapped))
    return H


def _shift_table(n: int, like: Tensor) -> Tensor:
    """Compute the n cyclic shifts `[n, n*n]`, the identity first; export carries no constant."""
    index = torch.arange(n, device=like.device)
    target = (index[:, None] + index) % n
    return (target[..., None] == index).flatten(-2).to(like.dtype)


def _permutation_table(n: int, like: Tensor) -> Tensor:
    """Compute the n! permutation matrices `[n!, n*n]` in lexicographic order; export carries no constant."""
    count = torch.arange(math.factorial(n), device=like.device)
    index = torch.arange(n, device=like.device)
    order: list[Tensor] = []
    for i in reversed(range(n)):
        digit = (count // math.factorial(n - 1 - i)) % (n - i)
        order = [digit, *(later + (later >= digit) for later in order)]
    return (torch.stack(order, dim=-1)[..., None] == index).flatten(-2).to(like.dtype)
