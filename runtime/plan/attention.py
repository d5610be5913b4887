"""Attention as fused kernels compute it: a pair of ops with shapes and no values, for counting.

Without a GPU, PyTorch would trace `scaled_dot_product_attention` as matrices of `[S, S]`. Fused kernels never store
those; they keep queries, keys, values, the output and one float32 for each query, and compute the scores again.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

LIBRARY = torch.library.Library("mhc_plan", "DEF")
BACKWARD = 2.5
"""Products of the backward pass over those of the forward: the recomputed scores, and four more."""


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Return uninitialised `[..., H, S, E]` and `[..., H, S]`.

    q is `[..., H, S, D]`, k `[..., Hk, T, D]` and v `[..., Hk, T, E]`.
    """
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _attend_backward(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    sums: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _never(*_: Any) -> NoReturn:
    raise NotImplementedError("counted, never run")


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.mhc_plan.attend_backward(grad, *ctx.saved_tensors)
    return gradients


LIBRARY.define("attend(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
LIBRARY.define(
    "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums) -> (Tensor, Tensor, Tensor)"
)
for _name, _fake in (("attend", _attend), ("attend_backward", _attend_backward)):
    torch.library.register_fake(f"mhc_plan::{_name}", _fake, lib=LIBRARY)
    LIBRARY.impl(_name, _never, "CPU")
torch.library.register_autograd("mhc_plan::attend", _backward, setup_context=_save, lib=LIBRARY)

ATTEND = torch.ops.mhc_plan.attend.default
ATTEND_BACKWARD = torch.ops.mhc_plan.attend_backward.default


def products(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """Return the multiplications and additions of the forward pass, those of masked scores included."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
