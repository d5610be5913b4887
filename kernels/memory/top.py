"""`engram_kernels::top(values [..., n], k) -> [..., k] int64`: the places of the k largest values, opaque to compilers.

C++ for float32 on a CPU, where `topk` takes as long as the rest of a look-up by content: a search for the k-th largest
value by halving compares whole vectors and moves nothing. Places ascend, and of values equal to the k-th the first are
taken. Elsewhere `topk`, unsorted. No gradient.
"""

from __future__ import annotations

import ctypes
from functools import cache
from string import Template
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.cpp.prelude import prelude

LIBRARY = torch.library.Library("engram_kernels", "FRAGMENT")
SOURCE = Template("""\
#include <vector>

static inline Ints read(const int32_t* p) { Ints v; memcpy(&v, p, sizeof v); return v; }
// Whole numbers in the order of the floats; NaN is larger than all, or smaller with its sign.
static inline Ints in_order(Ints bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

static int64_t at_least(const int32_t* keys, int64_t vectors, int32_t limit) {
  Ints count = {};
  for (int64_t v = 0; v < vectors; ++v) count -= read(keys + v * LANES) >= limit;
  int32_t part[LANES];
  memcpy(part, &count, sizeof part);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

// Write the places of all keys above `limit` and of the first `equal` ones that equal it, in their order.
static void choose_places(const int32_t* keys, int64_t vectors, int32_t limit, int64_t equal, int64_t* places) {
  for (int64_t v = 0; v < vectors; ++v) {
#if defined(__AVX512F__) && $lanes == 16
    const __m512i x = _mm512_loadu_si512(keys + v * LANES);
    uint32_t chosen = _mm512_cmpgt_epi32_mask(x, _mm512_set1_epi32(limit));
    uint32_t same = _mm512_cmpeq_epi32_mask(x, _mm512_set1_epi32(limit));
    for (; same && equal > 0; --equal, same &= same - 1) chosen |= same & -same;
    for (; chosen; chosen &= chosen - 1) *places++ = v * LANES + __builtin_ctz(chosen);
#else
    for (int64_t i = v * LANES; i < (v + 1) * LANES; ++i)
      if (keys[i] > limit || (keys[i] == limit && equal-- > 0)) *places++ = i;
#endif
  }
}

extern "C" void top(const float* values, int64_t* places, int64_t rows, int64_t n, int64_t k, int threads) {
  const int64_t vectors = (n + LANES - 1) / LANES;
  #pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> keys(vectors * LANES);
    #pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(keys.data(), values + r * n, n * sizeof(float));
      for (int64_t i = n; i < vectors * LANES; ++i) keys[i] = -1;  // NaN with its sign
      for (int64_t i = 0; i < vectors * LANES; i += LANES) {
        const Ints x = in_order(read(&keys[i]));
        memcpy(&keys[i], &x, sizeof x);
      }
      // At least k keys reach `low`, fewer reach `high`. Padding is the last to be chosen: it lies at the end.
      int64_t low = INT32_MIN, high = (int64_t)INT32_MAX + 1, reached = n;
      while (high - low > 1 && reached != k) {
        const int64_t middle = low + (high - low) / 2, count = at_least(keys.data(), vectors, (int32_t)middle);
        if (count >= k) low = middle, reached = count;
        else high = middle;
      }
      const int64_t above = low == INT32_MAX ? 0 : at_least(keys.data(), vectors, (int32_t)low + 1);
      choose_places(keys.data(), vectors, (int32_t)low, k - above, places + r * k);
    }
  }
}
""")
# Fewer values are not worth waking a thread for.
_VALUES_A_THREAD = 1 << 15


def source(lanes: int) -> str:
    """Return the C++ for vectors of `lanes` floats."""
    return prelude(lanes) + SOURCE.substitute(lanes=lanes)


def start() -> None:
    """Begin to compile."""
    _library()


def _top(values: Tensor, k: int) -> Tensor:
    n = values.shape[-1]
    if values.device.type != "cpu" or values.dtype != torch.float32 or not 0 < k <= n or build.no_compiler():
        return values.topk(k, -1, sorted=False).indices
    values = values.contiguous()
    rows = values.numel() // n
    places = torch.empty((*values.shape[:-1], k), dtype=torch.int64)
    threads = max(1, min(torch.get_num_threads(), values.numel() // _VALUES_A_THREAD))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, places))
    _library().result().top(*pointers, *map(ctypes.c_int64, (rows, n, k)), ctypes.c_int(threads))
    return places


def _fake(values: Tensor, k: int) -> Tensor:
    return values.new_empty((*values.shape[:-1], k), dtype=torch.int64)


@cache
def _library() -> Any:
    return build.begin("engram_top", lambda: source(build.lanes()))


LIBRARY.define("top(Tensor values, int k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("top", _top, "CompositeExplicitAutograd")
torch.library.register_fake("engram_kernels::top", _fake, lib=LIBRARY)
