"""A look-up and the weighted sums of what it finds, in one op: rows are read once, and nothing of their size is kept.

    engram_kernels::sum_rows(rows [..., M] int64, groups [..., M] int64, scores [..., M, c], input [..., I]?, anchor,
                             handle, width, spec) -> [..., E V]
    engram_kernels::sum_rows_backward(grad, rows, groups, scores, input?, handle, width, spec, train, call)
        -> gradients of scores and input, zero (0-dim float32)

It is `engram::expand` (`mhc_compile.kernels.memory.ultramem`) of `engram_kernels::gather`, whose rules it follows
(`mhc_compile.kernels.memory.gather`). With float32 scores, and rows on the device that computes, it is C++ on a CPU
(float32 rows) and Triton on a GPU (bfloat16 too); else plain PyTorch. The gradient of a table has a row for each
distinct one that was read, added up in the order of the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.kernels.memory import sum_rows_cpp, sum_rows_triton
from mhc_compile.kernels.memory.gather import LIBRARY, call_number, no_second_order
from mhc_compile.kernels.memory.hash_ops import target
from mhc_compile.kernels.memory.registry import table_of
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.kernels.memory.ultramem import expand, expand_backward

if TYPE_CHECKING:
    from mhc_compile.memory.tables import MemoryTable


def start() -> None:
    """Begin to compile what this machine's CPU computes with."""
    if target("cpu") == "cpp":
        sum_rows_cpp.start()


def _sum_rows(
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    input: Tensor | None,
    anchor: Tensor,
    handle: int,
    width: int,
    spec: str,
) -> Tensor:
    del anchor, width
    table, parsed = table_of(handle), ContentSpec.parse(spec)
    run = _TARGETS[_target(table, scores, input)]
    if run is None:
        return expand(table.gather(rows, table.result_dtype), groups, scores, input, parsed)
    return run.run(rows, groups, scores, input, table.weight, parsed)


def _backward(
    grad: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    input: Tensor | None,
    handle: int,
    width: int,
    spec: str,
    train: bool,
    call: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    table, parsed = table_of(handle), ContentSpec.parse(spec)
    run = _TARGETS[_target(table, scores, input)]
    if run is None:
        found = table.gather(rows, table.result_dtype)
        d_found, d_scores, d_input = expand_backward(grad, found, groups, scores, input, parsed)
        if train:
            table.accumulate(rows, d_found.reshape(-1, width))
    else:
        d_scores, d_input, of_rows = run.run_backward(grad, rows, groups, scores, input, table.weight, parsed, train)
        if of_rows is not None:
            table.accumulate(*of_rows, summed=True)
    return d_scores, d_input, torch.zeros((), dtype=torch.float32, device=grad.device)


_TARGETS: dict[str, Any] = {"cpp": sum_rows_cpp, "triton": sum_rows_triton, "reference": None}
_ROWS = {"cpp": (torch.float32,), "triton": (torch.float32, torch.bfloat16)}
_INPUTS = {"cpp": (torch.float32,), "triton": (torch.float32, torch.bfloat16, torch.float16)}


def _target(table: MemoryTable, scores: Tensor, input: Tensor | None) -> str:
    """Return what computes with these: `cpp`, `triton` or `reference`."""
    name = target(scores.device.type)
    if name == "reference" or table.storage != "device" or table.size > 1 or table.weight.device != scores.device:
        return "reference"
    narrow = scores.dtype != torch.float32 or (input is not None and input.dtype not in _INPUTS[name])
    return "reference" if narrow or table.dtype not in _ROWS[name] else name


def _fake(
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    input: Tensor | None,
    anchor: Tensor,
    handle: int,
    width: int,
    spec: str,
) -> Tensor:
    del groups, input, anchor, handle
    parsed = ContentSpec.parse(spec)
    return scores.new_empty((*rows.shape[:-1], parsed.groups * (width - parsed.input)))


def _fake_backward(
    grad: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, input: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    del rows, groups
    read = scores.new_empty(0) if input is None else torch.empty_like(input, memory_format=torch.contiguous_format)
    return scores.new_empty(scores.shape), read, grad.new_empty((), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    rows, groups, scores, read, _, *ctx.static = inputs
    ctx.save_for_backward(rows, groups, scores, read)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, groups, scores, read = ctx.saved_tensors
    train = bool(ctx.needs_input_grad[4])
    d_scores, d_input, zero = torch.ops.engram_kernels.sum_rows_backward(
        grad, rows, groups, scores, read, *ctx.static, train, call_number()
    )
    return None, None, d_scores, None if read is None else d_input, zero if train else None, None, None, None


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    found = "Tensor rows, Tensor groups, Tensor scores, Tensor? input"
    table = "int handle, int width, str spec"
    LIBRARY.define(f"sum_rows({found}, Tensor anchor, {table}) -> Tensor", tags=tags)
    LIBRARY.define(
        f"sum_rows_backward(Tensor grad, {found}, {table}, bool train, int call) -> (Tensor, Tensor, Tensor)", tags=tags
    )
    for name, kernel, fake in (
        ("sum_rows", _sum_rows, _fake),
        ("sum_rows_backward", _backward, _fake_backward),
    ):
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"engram_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd("engram_kernels::sum_rows", _differentiate, setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(
        "engram_kernels::sum_rows_backward", no_second_order, setup_context=_nothing, lib=LIBRARY
    )


_register()
