"""Gradients of tables on a CPU, in C++: duplicates of rows are added up, and AdamW moves the rows of a step."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.cpp.prelude import prelude

SORT_ROWS = """\
#include <vector>

// Sort by rows, equal ones in the order in which they come: those of row distinct[u] are order[begins[u]] and so on.
extern "C" int64_t sort_rows(const int64_t* rows, int64_t count, int64_t most, int64_t* order, int64_t* begins,
                             int64_t* distinct) {
  constexpr int BITS = 11;
  std::vector<int64_t> other(count);
  int64_t *from = order, *to = other.data();
  for (int64_t i = 0; i < count; ++i) from[i] = i;
  for (int shift = 0; shift == 0 || (shift < 63 && most >> shift); shift += BITS) {
    int64_t first[(1 << BITS) + 1] = {};
    for (int64_t i = 0; i < count; ++i) ++first[(rows[i] >> shift & ((1 << BITS) - 1)) + 1];
    for (int64_t d = 0; d < 1 << BITS; ++d) first[d + 1] += first[d];
    for (int64_t i = 0; i < count; ++i) to[first[rows[from[i]] >> shift & ((1 << BITS) - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (from != order) memcpy(order, from, count * sizeof(int64_t));
  int64_t u = 0;
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || rows[order[i]] != rows[order[i - 1]]) distinct[u] = rows[order[i]], begins[u++] = i;
  begins[u] = count;
  return u;
}
"""
SOURCE = """\
#include <cmath>

extern "C" void sum_duplicates(const float* values, const int64_t* order, const int64_t* begins, int64_t count,
                               int64_t width, float* sums, int threads) {
  #pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t u = 0; u < count; ++u) {
    float* sum = sums + u * width;
    memcpy(sum, values + order[begins[u]] * width, width * sizeof(float));
    for (int64_t i = begins[u] + 1; i < begins[u + 1]; ++i) {
      const float* value = values + order[i] * width;
      int64_t c = 0;
      for (; c + LANES <= width; c += LANES) store(sum + c, load(sum + c) + load(value + c));
      for (; c < width; ++c) sum[c] += value[c];
    }
  }
}

struct Factors { int32_t step; float size, root; };

// One vector, or the last `part` values of a row.
static inline void move(float* weight, float* first, float* second, const float* gradient, double beta1, double beta2,
                 const Factors& f, double eps, int part) {
  Lanes g = part < LANES ? load_part(gradient, part) : load(gradient);
  Lanes m = part < LANES ? load_part(first, part) : load(first);
  Lanes s = part < LANES ? load_part(second, part) : load(second);
  Lanes w = part < LANES ? load_part(weight, part) : load(weight);
  m += (float)(1.0 - beta1) * (g - m);
  s = s * (float)beta2 + (float)(1.0 - beta2) * (g * g);
  w -= f.size * m / (root(s) / f.root + (float)eps);
  if (part < LANES) store_part(first, m, part), store_part(second, s, part), store_part(weight, w, part);
  else store(first, m), store(second, s), store(weight, w);
}

extern "C" void adamw_rows(float* weight, float* first, float* second, int32_t* steps, const int64_t* rows,
                           const float* gradient, int64_t count, int64_t width, double lr, double beta1, double beta2,
                           double eps, int threads) {
  #pragma omp parallel num_threads(threads)
  {
    Factors known[256] = {};  // by number of steps: most rows share few
    #pragma omp for
    for (int64_t u = 0; u < count; ++u) {
      if (u + 2 < count)
        for (int64_t c = 0; c < width; c += 16) {
          const int64_t next = rows[u + 2] * width + c;
          __builtin_prefetch(weight + next), __builtin_prefetch(first + next), __builtin_prefetch(second + next);
        }
      const int32_t step = ++steps[rows[u]];
      Factors& f = known[step & 255];
      if (f.step != step)
        f = {step, (float)(lr / (1.0 - std::pow(beta1, step))), (float)std::sqrt(1.0 - std::pow(beta2, step))};
      const int64_t at = rows[u] * width;
      for (int64_t c = 0; c < width; c += LANES)
        move(weight + at + c, first + at + c, second + at + c, gradient + u * width + c, beta1, beta2, f, eps,
             width - c < LANES ? (int)(width - c) : LANES);
    }
  }
}
"""
# Less than this many values are not worth waking a thread for.
_VALUES_A_THREAD = 1 << 15


def takes(*tensors: Tensor) -> bool:
    """Return whether these are for the functions here: float32, on a CPU, with a compiler."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and not build.no_compiler()


def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of `rows` `[m]`, ascending, and the sums of their `values` `[m, width]`, in order."""
    functions, (count, width) = _library().result(), values.shape
    most = int(rows.max()) if count else 0
    order, begins, distinct = sorted_rows(functions, rows, most)
    sums = POOL.empty((count, width), torch.float32)[: len(distinct)]
    sizes = (ctypes.c_int64(len(distinct)), ctypes.c_int64(width))
    functions.sum_duplicates(*pointers(values, order, begins), *sizes, *pointers(sums), _threads(values))
    return distinct, sums


def adamw(
    weight: Tensor,
    state: dict[str, Tensor],
    rows: Tensor,
    gradient: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Move the `rows` `[r]` of `weight`, all different, by their `gradient` `[r, width]`; each counts its own steps."""
    tensors = (weight, state["exp_avg"], state["exp_avg_sq"], state["row_step"], rows, gradient)
    sizes = map(ctypes.c_int64, gradient.shape)
    factors = map(ctypes.c_double, (lr, *betas, eps))
    _library().result().adamw_rows(*pointers(*tensors), *sizes, *factors, _threads(gradient))


def sorted_rows(functions: Any, rows: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order of `rows` by a library that has `SORT_ROWS`, where each distinct one begins, and these."""
    count = rows.numel()
    order, begins, distinct = torch.empty(count, dtype=torch.int64), *torch.empty(2, count + 1, dtype=torch.int64)
    functions.sort_rows.restype = ctypes.c_int64
    sizes = (ctypes.c_int64(count), ctypes.c_int64(most))
    number = functions.sort_rows(*pointers(rows), *sizes, *pointers(order, begins, distinct))
    return order, begins, distinct[:number]


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Return pointers that keep contiguous copies alive."""
    result = []
    for t in tensors:
        contiguous = None if t is None else t.detach().contiguous()
        pointer: Any = ctypes.c_void_p(0 if contiguous is None else contiguous.data_ptr())
        pointer.tensor = contiguous
        result.append(pointer)
    return result


def _threads(values: Tensor) -> ctypes.c_int:
    return ctypes.c_int(max(1, min(torch.get_num_threads(), values.numel() // _VALUES_A_THREAD)))


@cache
def _library() -> Any:
    return build.begin("row_gradients", lambda: prelude(build.lanes()) + SORT_ROWS + SOURCE)
