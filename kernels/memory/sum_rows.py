"""A look-up and the weighted sums of what it finds, in one op: rows are read once, and nothing of their size is kept.

    engram_kernels::sum_rows(rows [..., M] int64, groups [..., M] int64, scores [..., M, c], input [..., I]?, anchor,
                             handle, width, spec) -> [..., E V]
    engram_kernels::sum_rows_backward(grad, rows, groups, scores, input?, handle, width, spec, train, call)
        -> gradients of scores and input, zero (0-dim float32)

It is `engram::expand` (`mhc_compile.kernels.memory.ultramem`) of `engram_kernels::gather`, whose rules it follows
(`mhc_compile.kernels.memory.gather`). C++ for float32 rows and scores on a CPU; else plain PyTorch. The gradient of a
table has a row for each distinct one that was read, added up in the order of the tokens.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.memory.gather import LIBRARY, call_number, no_second_order
from mhc_compile.kernels.memory.registry import table_of
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.kernels.memory.ultramem import expand, expand_backward

if TYPE_CHECKING:
    from mhc_compile.memory.tables import MemoryTable

SOURCE = """\
#include <cstdint>

struct Sizes { int64_t tokens, found, cores, input, slice, groups, width; };

static float product(const float* a, const float* b, int64_t n) {
  float sum = 0;
  #pragma omp simd reduction(+:sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

static void add(float* to, const float* from, float factor, int64_t n) {
  #pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

extern "C" void sum_rows(const int64_t* rows, const int64_t* groups, const float* scores, const float* input,
                         const float* table, float* out, const Sizes* sizes, int threads) {
  const Sizes z = *sizes;
  const int64_t V = z.cores * z.slice;
  #pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < z.tokens; ++t) {
    float* sums = out + t * z.groups * V;
    for (int64_t i = 0; i < z.groups * V; ++i) sums[i] = 0;
    for (int64_t m = t * z.found; m < (t + 1) * z.found; ++m) {
      const float* row = table + rows[m] * z.width;
      const float scale = z.input ? product(row, input + t * z.input, z.input) : 1;
      for (int64_t c = 0; c < z.cores; ++c)
        add(sums + groups[m] * V + c * z.slice, row + z.input + c * z.slice, scores[m * z.cores + c] * scale, z.slice);
    }
  }
}

// kept: of every row found its scale and the gradient of that, for the rows' gradient.
extern "C" void sum_rows_scores(const int64_t* rows, const int64_t* groups, const float* scores, const float* input,
                                const float* table, const float* grad, float* d_scores, float* d_input, float* kept,
                                const Sizes* sizes, int threads) {
  const Sizes z = *sizes;
  const int64_t V = z.cores * z.slice;
  #pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < z.tokens; ++t) {
    for (int64_t i = 0; i < z.input; ++i) d_input[t * z.input + i] = 0;
    for (int64_t m = t * z.found; m < (t + 1) * z.found; ++m) {
      const float *row = table + rows[m] * z.width, *of = grad + (t * z.groups + groups[m]) * V;
      const float scale = z.input ? product(row, input + t * z.input, z.input) : 1;
      float d_scale = 0;
      for (int64_t c = 0; c < z.cores; ++c) {
        const float d = product(row + z.input + c * z.slice, of + c * z.slice, z.slice);
        d_scores[m * z.cores + c] = d * scale;
        d_scale += d * scores[m * z.cores + c];
      }
      add(d_input + t * z.input, row, d_scale, z.input);
      kept[2 * m] = scale;
      kept[2 * m + 1] = d_scale;
    }
  }
}

// order: the rows found, those of the same row of the table one after the other; those of row u begin at begins[u].
extern "C" void sum_rows_values(const int64_t* groups, const float* scores, const float* input, const float* grad,
                                const float* kept, const int64_t* order, const int64_t* begins, int64_t distinct,
                                float* d_rows, const Sizes* sizes, int threads) {
  const Sizes z = *sizes;
  const int64_t V = z.cores * z.slice;
  #pragma omp parallel for num_threads(threads)
  for (int64_t u = 0; u < distinct; ++u) {
    float* d_row = d_rows + u * z.width;
    for (int64_t i = 0; i < z.width; ++i) d_row[i] = 0;
    for (int64_t i = begins[u]; i < begins[u + 1]; ++i) {
      const int64_t m = order[i], t = m / z.found;
      add(d_row, input + t * z.input, kept[2 * m + 1], z.input);
      for (int64_t c = 0; c < z.cores; ++c)
        add(d_row + z.input + c * z.slice, grad + (t * z.groups + groups[m]) * V + c * z.slice,
            scores[m * z.cores + c] * kept[2 * m], z.slice);
    }
  }
}
"""
# Less than this many values are not worth waking a thread for.
_VALUES_A_THREAD = 1 << 15


def start() -> None:
    """Begin to compile."""
    _library()


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
    del anchor
    table, parsed = table_of(handle), ContentSpec.parse(spec)
    if not _in_cpp(table, scores, input):
        return expand(table.gather(rows, table.result_dtype), groups, scores, input, parsed)
    _refuse_outside(rows, table)
    sizes, threads = _sizes(scores, width, parsed)
    out = POOL.empty((*rows.shape[:-1], parsed.groups * (width - parsed.input)), torch.float32)
    operands = _contiguous(rows, groups, scores, input, table.weight)
    _library().result().sum_rows(*operands, *_pointers(out), sizes, threads)
    return out


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
    zero = torch.zeros((), dtype=torch.float32, device=grad.device)
    if not _in_cpp(table, scores, input):
        found = table.gather(rows, table.result_dtype)
        d_found, d_scores, d_input = expand_backward(grad, found, groups, scores, input, parsed)
        if train:
            table.accumulate(rows, d_found.reshape(-1, width))
        return d_scores, d_input, zero
    sizes, threads = _sizes(scores, width, parsed)
    d_scores = POOL.empty(tuple(scores.shape), torch.float32)
    d_input = torch.empty(0) if input is None else torch.empty_like(input, memory_format=torch.contiguous_format)
    kept = POOL.empty((*rows.shape, 2), torch.float32)
    functions, grad = _library().result(), grad.contiguous()
    operands = _contiguous(rows, groups, scores, input, table.weight)
    functions.sum_rows_scores(*operands, *_pointers(grad, d_scores, d_input, kept), sizes, threads)
    if train:
        distinct, inverse = rows.reshape(-1).unique(return_inverse=True)
        order = inverse.argsort(stable=True)
        begins = torch.cat((inverse.new_zeros(1), inverse.bincount(minlength=len(distinct)).cumsum(0)))
        d_rows = POOL.empty((len(distinct), width), torch.float32)
        places = (*_pointers(grad, kept, order, begins), ctypes.c_int64(len(distinct)), *_pointers(d_rows))
        functions.sum_rows_values(*operands[1:4], *places, sizes, threads)
        table.accumulate(distinct, d_rows)
    return d_scores, d_input, zero


def _in_cpp(table: MemoryTable, scores: Tensor, input: Tensor | None) -> bool:
    """Return whether the C++ kernels take these."""
    narrow = [t for t in (scores, input) if t is not None and t.dtype != torch.float32]
    plain = table.storage == "device" and table.size == 1 and table.dtype == torch.float32
    return plain and not narrow and scores.device.type == table.weight.device.type == "cpu" and not build.no_compiler()


def _refuse_outside(rows: Tensor, table: MemoryTable) -> None:
    if rows.numel():
        least, most = map(int, rows.aminmax())
        if least < 0 or most >= table.rows:
            raise IndexError(f"rows from {least} to {most} of a table with {table.rows} rows")


def _sizes(scores: Tensor, width: int, spec: ContentSpec) -> tuple[Any, ctypes.c_int]:
    *tokens, found, cores = scores.shape
    count = torch.Size(tokens).numel()
    threads = max(1, min(torch.get_num_threads(), count * found * width // _VALUES_A_THREAD))
    slice_ = (width - spec.input) // cores
    sizes = (ctypes.c_int64 * 7)(count, found, cores, spec.input, slice_, spec.groups, width)
    return sizes, ctypes.c_int(threads)


def _contiguous(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Return pointers that keep contiguous copies alive."""
    return _pointers(*(None if t is None else t.detach().contiguous() for t in tensors))


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    pointers = []
    for t in tensors:
        pointer: Any = ctypes.c_void_p(0 if t is None else t.data_ptr())
        pointer.tensor = t
        pointers.append(pointer)
    return pointers


@cache
def _library() -> Any:
    return build.begin("engram_sum_rows", lambda: SOURCE)


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
