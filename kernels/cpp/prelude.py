"""C++ that every generated kernel begins with: vectors, conversions, sums across lanes, exp and sigmoid."""

from __future__ import annotations

from string import Template

from mhc_compile.kernels.cpp.float16 import halves

PRELUDE = Template("""\
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// One vector register of floats. GCC and Clang compile arithmetic on it to the machine's own instructions.
constexpr int LANES = $lanes;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

static inline Lanes all(float x) { return x - (Lanes){}; }
static inline Lanes choose(Ints mask, Lanes a, Lanes b) { return (Lanes)((mask & (Ints)a) | (~mask & (Ints)b)); }
static inline Lanes at_least(Lanes a, Lanes b) { return choose(a < b, b, a); }  // a where either is NaN

static inline Lanes load(const float* p) { Lanes v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }
static inline Lanes load(const bfloat16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Lanes)(__builtin_convertvector(h, Ints) << 16);
}
static inline Lanes rounded(Lanes v, const bfloat16*) {  // to the nearest bfloat16, ties to even; NaN stays NaN
  Ints b = (Ints)v;
  Ints up = b + 0x7fff + ((b >> 16) & 1);
  return (Lanes)((Ints)choose(v == v, (Lanes)up, (Lanes)(b | 0x00400000)) & (int32_t)0xffff0000);
}
static inline Lanes rounded(Lanes v, const float*) { return v; }
static inline void store(bfloat16* p, Lanes v) {
  Halves h = __builtin_convertvector(((Ints)rounded(v, p) >> 16) & 0xffff, Halves);
  memcpy(p, &h, sizeof h);
}
$halves// Past the caches, for results larger than they are: a line that is only written need not be read first.
static inline void stream(float* p, Lanes v) {
#if defined(__AVX512F__) && $lanes == 16
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__) && $lanes == 8
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
template <typename T> static inline void stream(T* p, Lanes v) { store(p, v); }
// The first `count` of a vector's values, the others zero: the end of a row whose width is no multiple of LANES.
template <typename T> static inline Lanes load_part(const T* p, int count) {
  T part[LANES] = {};
  memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <typename T> static inline void store_part(T* p, Lanes v, int count) {
  T part[LANES];
  store(part, v);
  memcpy(p, part, count * sizeof(T));
}

// Lane t of the result is the sum over all lanes of v[t]; v is overwritten.
static inline Lanes sums(Lanes v[LANES]) {
  for (int m = LANES; m > 1; m /= 2)
    for (int i = 0; i < m / 2; ++i)
      v[i] = SHUFFLE(v[2 * i], v[2 * i + 1], $even) + SHUFFLE(v[2 * i], v[2 * i + 1], $odd);
  return v[0];
}

// exp in float32, relative error 1e-7: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline Lanes exp(Lanes x) {
  x = choose(x < -87.0f, all(-87.0f), choose(x > 88.0f, all(88.0f), x));
  Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to a whole number in the low bits
  Lanes k = shifted - 12582912.0f;
  Lanes r = x - k * 0.693359375f + k * 2.12194440e-4f;
  Lanes p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Lanes)(((Ints)shifted - 0x4b400000 + 127) << 23);
}
static inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exp(-x)); }
static inline Lanes root(Lanes x) {
  for (int t = 0; t < LANES; ++t) x[t] = __builtin_sqrtf(x[t]);
  return x;
}
""")

# Rows of C values, for text in which `constexpr int C` stands before it.
ROWS = """\
constexpr int V = (C + LANES - 1) / LANES;           // vectors a row
constexpr int REST = C % LANES;                      // values in the last of them where they do not fill it
template <typename T> static inline Lanes read(const T* row, int v) {
  return REST && v == V - 1 ? load_part(row + v * LANES, REST) : load(row + v * LANES);
}
template <typename T> static inline void write(T* row, int v, Lanes x) {
  if (REST && v == V - 1) store_part(row + v * LANES, x, REST);
  else store(row + v * LANES, x);
}
static inline float total(Lanes v) {
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) sum += v[lane];
  return sum;
}
static float* scratch(int64_t floats) { return (float*)aligned_alloc(64, (floats * 4 + 63) / 64 * 64); }
"""


def prelude(lanes: int) -> str:
    """Return the common source for vectors of `lanes` floats."""
    even = ", ".join(str(2 * i) for i in range(lanes))
    odd = ", ".join(str(2 * i + 1) for i in range(lanes))
    return PRELUDE.substitute(lanes=lanes, even=even, odd=odd, halves=halves(lanes))
