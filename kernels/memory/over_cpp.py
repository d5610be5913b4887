"""`engram_kernels::over_rows` in C++: one token at a time, a division for each token of an n-gram."""

from __future__ import annotations

import ctypes
from concurrent.futures import Future
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp.build import begin
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.memory.spec import OverEncodingSpec

SOURCE = """\
#include <cstdint>

// constants: V, then the modulus and the first row of every table.
extern "C" void over_rows(const int64_t* ids, const int64_t* reach, const int64_t* before, const int64_t* constants,
                          int64_t* out, int64_t batch, int64_t length, int order, int heads, int threads) {
  const int64_t V = constants[0], tables = (int64_t)(order - 1) * heads;
  #pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < batch * length; ++t) {
    const int64_t at = t % length, *previous = before ? before + t / length * (order - 1) + order - 1 : nullptr;
    for (int64_t table = 0; table < tables; ++table) {
      const int64_t m = constants[1 + 2 * table];
      int64_t number = 0;
      for (int64_t i = table / heads + 1; i >= 0; --i) {
        int64_t x = 0;
        if (i == 0 || reach[t] >= i) {
          if (at >= i) x = ids[t - i];
          else if (previous) x = previous[at - i];
        }
        number = (number * V + x) % m;
        number += number < 0 ? m : 0;
      }
      out[t * tables + table] = number + constants[2 + 2 * table];
    }
  }
}
"""
# Fewer tokens are not worth waking threads for.
_TOKENS_A_THREAD = 512


def run(ids: Tensor, reach: Tensor, before: Tensor | None, spec: OverEncodingSpec) -> Tensor:
    """Compute `overencoding.rows` of CPU tensors."""
    B, S = ids.shape
    out = POOL.empty((B, S, len(spec.moduli)), torch.int64)
    inputs = [t.long().contiguous() if t is not None else None for t in (ids, reach, before)]
    constants = _constants(spec)
    threads = max(1, min(torch.get_num_threads(), B * S // _TOKENS_A_THREAD))
    _function()(
        *(ctypes.c_void_p(t.data_ptr() if t is not None else 0) for t in (*inputs, constants, out)),
        ctypes.c_int64(B),
        ctypes.c_int64(S),
        ctypes.c_int(spec.order),
        ctypes.c_int(spec.heads),
        ctypes.c_int(threads),
    )
    return out


@cache
def library() -> Future[Any]:
    """Return the library, which is being compiled; the future raises what goes wrong."""
    return begin("engram_over_rows", lambda: SOURCE)


@cache
def _function() -> Any:
    return library().result().over_rows


@lru_cache(maxsize=64)
def _constants(spec: OverEncodingSpec) -> Tensor:
    pairs = zip(spec.moduli, spec.offsets, strict=True)
    return torch.tensor([spec.vocab, *(x for pair in pairs for x in pair)], dtype=torch.int64)
