"""Lookups as ops `engram_kernels::*`, opaque to every compiler; a table is named by its handle.

    engram_kernels::gather(rows [..., H] int64, anchor, handle, width, dtype=None) -> [..., H * width]
    engram_kernels::prefetch(rows, handle) -> ticket (0-dim int64 on the CPU)
    engram_kernels::collect(ticket, rows, anchor, handle, width, dtype=None) -> as gather
    engram_kernels::gather_backward(grad, rows, handle, width, call) -> zero (0-dim float32)

`prefetch` begins a lookup that `collect`, with the same rows, ends; for a table on the compute device it does
nothing, and `collect` is `gather`. `anchor` is the table's 0-dim leaf that makes the result differentiable. `dtype`
(float32 where it is None) must be the table's `result_dtype`: a graph from a compiler's cache knows its arguments
alone.

The forward ops are pure: they may be recomputed, merged and dropped. The backward op leaves its gradient in
`table.gradient` and returns a zero as the gradient of the anchor, which keeps it alive; `call` differs from call to
call within a graph, or else common subexpression elimination would merge two backwards with equal arguments into one.
None of them goes into a CUDA graph, which would not run them again. Gradients of gradients raise NotImplementedError.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mhc_compile.kernels.memory.registry import table_of

LIBRARY = torch.library.Library("engram_kernels", "FRAGMENT")

_ELSEWHERE = itertools.count()
_CALLS: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()


def call_number() -> int:
    """Return numbers from 0 in each compilation, so that a compiler's cache knows its graphs in other processes."""
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return next(_ELSEWHERE)
    return next(_CALLS.setdefault(context, itertools.count()))


def _gather(rows: Tensor, anchor: Tensor, handle: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    del anchor, width
    return table_of(handle).gather(rows, dtype or torch.float32)


def _prefetch(rows: Tensor, handle: int) -> Tensor:
    return torch.tensor(table_of(handle).prefetch(rows), dtype=torch.int64, device="cpu")


def _collect(
    ticket: Tensor, rows: Tensor, anchor: Tensor, handle: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    del anchor, width
    return table_of(handle).collect(int(ticket), rows, dtype or torch.float32)


def _gather_backward(grad: Tensor, rows: Tensor, handle: int, width: int, call: int) -> Tensor:  # noqa: ARG001
    table_of(handle).accumulate(rows, grad.reshape(-1, width))
    return torch.zeros((), dtype=torch.float32, device=grad.device)


def _fake_gather(rows: Tensor, anchor: Tensor, handle: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    del anchor, handle
    return rows.new_empty((*rows.shape[:-1], rows.shape[-1] * width), dtype=dtype or torch.float32)


def _fake_collect(
    ticket: Tensor, rows: Tensor, anchor: Tensor, handle: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    del ticket
    return _fake_gather(rows, anchor, handle, width, dtype)


def _fake_prefetch(rows: Tensor, handle: int) -> Tensor:  # noqa: ARG001
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_backward(grad: Tensor, rows: Tensor, handle: int, width: int, call: int) -> Tensor:  # noqa: ARG001
    return grad.new_empty((), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    rows, _, handle, width, *_ = inputs[-5:]
    ctx.save_for_backward(rows)
    ctx.static = (handle, width)
    ctx.count = len(inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    zero = torch.ops.engram_kernels.gather_backward(grad, rows, *ctx.static, call_number())
    before = ctx.count - 4  # inputs before the anchor: rows, and the ticket
    return (*(None,) * before, zero, None, None, None)


def no_second_order(ctx: Any, *grads: Tensor) -> NoReturn:
    """Raise NotImplementedError, in place of the gradient of a gradient."""
    raise NotImplementedError("a lookup is linear in the table and has no second derivative")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    table = "int handle, int width"
    ops = {
        f"gather(Tensor rows, Tensor anchor, {table}, ScalarType? dtype=None) -> Tensor": (_gather, _fake_gather),
        "prefetch(Tensor rows, int handle) -> Tensor": (_prefetch, _fake_prefetch),
        f"collect(Tensor ticket, Tensor rows, Tensor anchor, {table}, ScalarType? dtype=None) -> Tensor": (
            _collect,
            _fake_collect,
        ),
        f"gather_backward(Tensor grad, Tensor rows, {table}, int call) -> Tensor": (_gather_backward, _fake_backward),
    }
    kernel: Any
    fake: Any
    for schema, (kernel, fake) in ops.items():
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema, tags=tags)
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"engram_kernels::{name}", fake, lib=LIBRARY)
    for name in ("gather", "collect"):
        torch.library.register_autograd(f"engram_kernels::{name}", _differentiate, setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(
        "engram_kernels::gather_backward", no_second_order, setup_context=_nothing, lib=LIBRARY
    )


_register()
