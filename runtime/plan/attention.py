"""Attention as fused kernels compute it: a pair of ops with shapes and no values, for counting.

Without a GPU, PyTorch would trace `scaled_dot_product_attention` as matrices of `[S, S]`. Fused kernels never store
those; they keep queries, keys, values, the output and one float32 for each query, and compute the scores again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BACKWARD = 2.5
"""Products of the backward pass over those of the forward: the recomputed scores, and four more."""


@torch.library.custom_op("mhc_plan::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Take q `[..., H, S, D]`, k `[..., Hk, T, D]` and v `[..., Hk, T, E]`; counted, never run."""
    raise NotImplementedError


@torch.library.custom_op("mhc_plan::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take what `attend` took and gave; counted, never run."""
    raise NotImplementedError


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


@attend_backward.register_fake
def _(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return attend_backward(grad, *ctx.saved_tensors)


attend.register_autograd(_backward, setup_context=_save)
ATTEND = torch.ops.mhc_plan.attend.default
ATTEND_BACKWARD = torch.ops.mhc_plan.attend_backward.default


def products(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """Return the multiplications and additions of the forward pass, those of masked scores included."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
