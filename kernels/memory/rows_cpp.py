"""`engram_kernels::rows` in C++: one token at a time, its hashes in the lanes of vector registers.

Remainders without a division, exact for every int64 x and modulus 1 <= p < 2^63. With doubles d near x and v near 1/p,
the low bits of `d * v + 1.5 * 2^52` are a whole number q. `r = x - q * p`, modulo 2^64, plus p where that is negative,
is x mod p if |q - x/p| < 1: rounding to a whole number costs 1/2, and those of x, of 1/p and of their product 2^-53 of
|x/p| each, together 3 * 2^10 / p. So for p >= 2^13, where |x/p| <= 2^50 fits in the low bits, too. For a smaller p,
x is first reduced to `(x >> 32) * (2^32 mod p) + (x & (2^32 - 1))`: the same modulo p, and exact in a double.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import Future
from functools import cache, lru_cache
from string import Template
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.cpp.build import begin, lanes
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.memory.spec import HashSpec

SMALL = 1 << 13
"""Moduli below it are reduced in two steps."""
_SOURCE = Template("""\
#include <cstdint>
#include <cstring>
#include <omp.h>

constexpr int LANES = $lanes, N = $order, K = $heads, H = (N - 1) * K, VECTORS = (H + LANES - 1) / LANES;
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef uint64_t Words __attribute__((vector_size(8 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number, in the low bits

struct Head { Words modulus, offset, back, fold; Doubles inverse; };

// What the heads of vector v hash: n-grams of one order, or of several where K is no multiple of LANES.
static inline Words spread(const uint64_t* mix, int v) {
  if (K % LANES == 0) return mix[v * LANES / K] - (Words){};
  Words x;
  for (int lane = 0; lane < LANES; ++lane) {
    const int head = v * LANES + lane;
    x[lane] = mix[(head < H ? head : H - 1) / K];
  }
  return x;
}

template <bool SMALL> static inline Words row(Words x, const Head& h) {
  if (SMALL) x = (Words)((Longs)x >> 32) * h.fold + (x & 0xffffffffu);
  Doubles shifted = __builtin_convertvector((Longs)x, Doubles) * h.inverse + MAGIC;
  Words r = x - (Words)shifted * h.modulus + h.back;  // back undoes the bits of MAGIC
  return r + ((Words)((Longs)r < 0) & h.modulus) + h.offset;
}

template <bool SMALL>
static void hash(const int64_t* ids, const int64_t* reach, const int64_t* before, const int64_t* constants,
                 int64_t* out, int64_t batch, int64_t length, int threads) {
  const uint64_t* m = (const uint64_t*)constants;
  const uint64_t fill = m[N];
  Head heads[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t* at = constants + N + 1 + v * 5 * LANES;
    memcpy(&heads[v].modulus, at, sizeof(Words));
    memcpy(&heads[v].offset, at + LANES, sizeof(Words));
    memcpy(&heads[v].back, at + 2 * LANES, sizeof(Words));
    memcpy(&heads[v].fold, at + 3 * LANES, sizeof(Words));
    memcpy(&heads[v].inverse, at + 4 * LANES, sizeof(Words));
  }
  const int64_t tokens = batch * length;
  #pragma omp parallel num_threads(threads)
  {
    const int64_t share = tokens / omp_get_num_threads() + 1, first = share * omp_get_thread_num();
    const int64_t last = first + share < tokens ? first + share : tokens;
    int64_t sequence = first / length, at = first % length;
    for (int64_t t = first; t < last; ++t) {
      const int64_t far = reach[t];
      uint64_t mix[N - 1], sum = (uint64_t)ids[t] * m[0];
      for (int i = 1; i < N; ++i) {
        uint64_t x = fill;
        if (far >= i) {
          if (at >= i) x = (uint64_t)ids[t - i];
          else if (before) x = (uint64_t)before[sequence * (N - 1) + N - 1 + at - i];
        }
        sum ^= x * m[i];
        mix[i - 1] = sum;
      }
      for (int v = 0; v < VECTORS; ++v) {
        const Words numbers = row<SMALL>(spread(mix, v), heads[v]);
        const int count = H - v * LANES < LANES ? H - v * LANES : LANES;
        memcpy(out + t * H + v * LANES, &numbers, count * sizeof(int64_t));
      }
      if (++at == length) at = 0, ++sequence;
    }
  }
}

extern "C" void rows(const int64_t* ids, const int64_t* reach, const int64_t* before, const int64_t* constants,
                     int64_t* out, int64_t batch, int64_t length, int small, int threads) {
  (small ? hash<true> : hash<false>)(ids, reach, before, constants, out, batch, length, threads);
}
""")
# Fewer tokens are not worth waking threads for.
_TOKENS_A_THREAD = 2048


def source(order: int, heads: int) -> str:
    """Return the C++ for all hashes of `order` N and `heads` K on this machine."""
    return _SOURCE.substitute(lanes=lanes() // 2, order=order, heads=heads)


def library(spec: HashSpec) -> Future[Any]:
    """Return the library that hashes like `spec`, which is being compiled; the future raises what goes wrong."""
    return _library(spec.order, spec.heads)


def run(ids: Tensor, reach: Tensor, before: Tensor | None, spec: HashSpec) -> Tensor:
    """Compute `hashing.rows` of CPU tensors."""
    B, S = ids.shape
    out = POOL.empty((B, S, len(spec.moduli)), torch.int64)
    if not B * S:
        return out
    inputs = [t.long().contiguous() if t is not None else None for t in (ids, reach, before)]
    constants, small = _constants(spec, lanes() // 2)
    threads = max(1, min(torch.get_num_threads(), B * S // _TOKENS_A_THREAD))
    library(spec).result().rows(
        *(ctypes.c_void_p(t.data_ptr() if t is not None else 0) for t in (*inputs, constants, out)),
        ctypes.c_int64(B),
        ctypes.c_int64(S),
        ctypes.c_int(small),
        ctypes.c_int(threads),
    )
    return out


@cache
def _library(order: int, heads: int) -> Future[Any]:
    return begin(f"engram_rows_{order}_{heads}", lambda: source(order, heads))


@lru_cache(maxsize=64)
def _constants(spec: HashSpec, width: int) -> tuple[Tensor, bool]:
    """Return the kernel's constants: multipliers, fill, and five in turn for every vector of `width` heads."""
    count = -(-len(spec.moduli) // width) * width
    moduli = [*spec.moduli, *[SMALL] * (count - len(spec.moduli))]
    offsets = [*spec.offsets, *[0] * (count - len(spec.moduli))]
    inverses = torch.tensor([1 / p for p in moduli], dtype=torch.float64).view(torch.int64).tolist()
    magic = 0x4338000000000000  # the bits of 1.5 * 2^52
    back = [_signed(magic * p) for p in moduli]
    fold = [(1 << 32) % p for p in moduli]
    values = [*map(_signed, (*spec.multipliers, spec.fill))]
    for v in range(0, count, width):
        for each in (moduli, offsets, back, fold, inverses):
            values += each[v : v + width]
    return torch.tensor(values, dtype=torch.int64), min(spec.moduli) < SMALL


def _signed(x: int) -> int:
    """Return `x` modulo 2^64, as an int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
