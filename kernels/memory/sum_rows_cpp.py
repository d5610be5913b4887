"""`engram_kernels::sum_rows` in C++, for float32 rows, scores and inputs.

Of a table larger than the caches most time goes into waiting for rows: each is asked for while those before it are
worked on. The forward goes token by token. The backward goes row by row of the table, so that a row is read once, and
its gradient written once, however many tokens found it; what a token reads is then added up token by token. Sums are
in the order of the tokens, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.cpp.prelude import prelude
from mhc_compile.kernels.memory.row_gradients_cpp import SORT_ROWS, pointers, sorted_rows
from mhc_compile.kernels.memory.spec import ContentSpec

SOURCE = """\
struct Sizes { int64_t tokens, found, cores, input, slice, groups, width; };
typedef float Few __attribute__((vector_size(16)));

static inline Few few(const float* p) { Few v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, Few v) { memcpy(p, &v, sizeof v); }

static float product(const float* a, const float* b, int64_t n) {
  Lanes wide[4] = {};
  Few narrow = {};
  float sum = 0;
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int v = 0; v < 4; ++v) wide[v] += load(a + i + v * LANES) * load(b + i + v * LANES);
  for (; i + LANES <= n; i += LANES) wide[0] += load(a + i) * load(b + i);
  for (; i + 4 <= n; i += 4) narrow += few(a + i) * few(b + i);
  for (; i < n; ++i) sum += a[i] * b[i];
  const Lanes all = wide[0] + wide[1] + (wide[2] + wide[3]);
  float part[LANES];
  store(part, all);
  for (int lane = 0; lane < LANES; lane += 4) narrow += few(part + lane);
  return sum + (narrow[0] + narrow[1] + (narrow[2] + narrow[3]));
}

// to = factor * from, added to what is there unless it is the first.
static void add(float* __restrict__ to, const float* __restrict__ from, float factor, int64_t n, bool first = false) {
  int64_t i = 0;
  if (first) {
    for (; i + LANES <= n; i += LANES) store(to + i, factor * load(from + i));
    for (; i + 4 <= n; i += 4) store(to + i, factor * few(from + i));
    for (; i < n; ++i) to[i] = factor * from[i];
  } else {
    for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + factor * load(from + i));
    for (; i + 4 <= n; i += 4) store(to + i, few(to + i) + factor * few(from + i));
    for (; i < n; ++i) to[i] += factor * from[i];
  }
}

static void ask_for(const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(from + i);
  __builtin_prefetch(from + n - 1);
}

constexpr int64_t AHEAD = 2;  // rows

extern "C" void sum_rows(const int64_t* rows, const int64_t* groups, const float* scores, const float* input,
                         const float* table, float* out, const Sizes* sizes, int threads) {
  const Sizes z = *sizes;
  const int64_t V = z.cores * z.slice, all = z.tokens * z.found;
  #pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < z.tokens; ++t) {
    float* sums = out + t * z.groups * V;
    memset(sums, 0, z.groups * V * sizeof(float));
    for (int64_t m = t * z.found; m < (t + 1) * z.found; ++m) {
      if (m + AHEAD < all) ask_for(table + rows[m + AHEAD] * z.width, z.width);
      const float* row = table + rows[m] * z.width;
      const float scale = z.input ? product(row, input + t * z.input, z.input) : 1;
      for (int64_t c = 0; c < z.cores; ++c)
        add(sums + groups[m] * V + c * z.slice, row + z.input + c * z.slice, scores[m * z.cores + c] * scale, z.slice);
    }
  }
}

// d_rows: null where the table has no gradient. kept: of every row found the gradient of its product with the input.
extern "C" void sum_rows_backward(const int64_t* groups, const float* scores, const float* input, const float* table,
                                  const float* grad, const int64_t* order, const int64_t* begins,
                                  const int64_t* distinct, int64_t count, float* d_scores, float* d_rows, float* kept,
                                  const Sizes* sizes, int threads) {
  const Sizes z = *sizes;
  const int64_t V = z.cores * z.slice, all = z.tokens * z.found;
  #pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t u = 0; u < count; ++u) {
    const float* row = table + distinct[u] * z.width;
    float* d_row = d_rows ? d_rows + u * z.width : nullptr;
    if (u + 1 < count) ask_for(table + distinct[u + 1] * z.width, z.width);
    for (int64_t i = begins[u]; i < begins[u + 1]; ++i) {
      if (i + AHEAD < all) {
        const int64_t next = order[i + AHEAD];
        ask_for(grad + (next / z.found * z.groups + groups[next]) * V, V);
      }
      const int64_t m = order[i], t = m / z.found;
      const float *of = grad + (t * z.groups + groups[m]) * V, *read = input + t * z.input;
      const float scale = z.input ? product(row, read, z.input) : 1;
      float d_scale = 0;
      for (int64_t c = 0; c < z.cores; ++c) {
        const float score = scores[m * z.cores + c];
        const float d = product(row + z.input + c * z.slice, of + c * z.slice, z.slice);
        d_scores[m * z.cores + c] = d * scale;
        d_scale += d * score;
        if (d_row) add(d_row + z.input + c * z.slice, of + c * z.slice, score * scale, z.slice, i == begins[u]);
      }
      if (z.input) kept[m] = d_scale;
      if (d_row) add(d_row, read, d_scale, z.input, i == begins[u]);
    }
  }
}

extern "C" void sum_rows_input(const int64_t* rows, const float* table, const float* kept, float* d_input,
                               const Sizes* sizes, int threads) {
  const Sizes z = *sizes;
  const int64_t all = z.tokens * z.found;
  #pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < z.tokens; ++t) {
    for (int64_t m = t * z.found; m < (t + 1) * z.found; ++m) {
      if (m + AHEAD < all) ask_for(table + rows[m + AHEAD] * z.width, z.input);
      add(d_input + t * z.input, table + rows[m] * z.width, kept[m], z.input, m == t * z.found);
    }
  }
}
"""
# Less than this many values are not worth waking a thread for.
_VALUES_A_THREAD = 1 << 15


def start() -> None:
    """Begin to compile."""
    _library()


def run(rows: Tensor, groups: Tensor, scores: Tensor, input: Tensor | None, table: Tensor, spec: ContentSpec) -> Tensor:
    """Compute `expand` of the rows of `table`. Raises IndexError for a row out of range."""
    _most(rows, table)
    sizes, threads = _sizes(scores, table, spec)
    out = POOL.empty((*rows.shape[:-1], spec.groups * (table.shape[1] - spec.input)), torch.float32)
    _library().result().sum_rows(*pointers(rows, groups, scores, input, table, out), sizes, threads)
    return out


def run_backward(
    grad: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    input: Tensor | None,
    table: Tensor,
    spec: ContentSpec,
    train: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Compute the gradients of scores and input, and where `train` the distinct rows, ascending, with theirs."""
    count, width, functions = rows.numel(), table.shape[1], _library().result()
    sizes, threads = _sizes(scores, table, spec)
    order, begins, distinct = sorted_rows(functions, rows, _most(rows, table))
    d_scores = POOL.empty(tuple(scores.shape), torch.float32)
    # A size that does not depend on the rows: the next step has the memory again.
    d_rows = POOL.empty((min(count, len(table)), width), torch.float32) if train else None
    d_input = torch.empty(0) if input is None else torch.empty_like(input, memory_format=torch.contiguous_format)
    kept = torch.empty(count if spec.input else 0)
    operands = pointers(groups, scores, input, table, grad, order, begins, distinct)
    results = pointers(d_scores, d_rows, kept)
    functions.sum_rows_backward(*operands, ctypes.c_int64(len(distinct)), *results, sizes, threads)
    if input is not None:
        functions.sum_rows_input(*pointers(rows, table, kept, d_input), sizes, threads)
    return d_scores, d_input, None if d_rows is None else (distinct, d_rows[: len(distinct)])


def _most(rows: Tensor, table: Tensor) -> int:
    """Return the largest row. Raises IndexError for one out of range."""
    if not rows.numel():
        return 0
    least, most = map(int, rows.aminmax())
    if least < 0 or most >= len(table):
        raise IndexError(f"rows from {least} to {most} of a table with {len(table)} rows")
    return most


def _sizes(scores: Tensor, table: Tensor, spec: ContentSpec) -> tuple[Any, ctypes.c_int]:
    *tokens, found, cores = scores.shape
    count, width = torch.Size(tokens).numel(), table.shape[1]
    threads = max(1, min(torch.get_num_threads(), count * found * width // _VALUES_A_THREAD))
    slice_ = (width - spec.input) // cores
    sizes = (ctypes.c_int64 * 7)(count, found, cores, spec.input, slice_, spec.groups, width)
    return sizes, ctypes.c_int(threads)


@cache
def _library() -> Any:
    return build.begin("engram_sum_rows", lambda: prelude(build.lanes()) + SORT_ROWS + SOURCE)
