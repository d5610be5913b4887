"""C++ that loads and stores float16: by the machine's instructions where it has them, else by arithmetic on the bits.

Storing rounds to the nearest, ties to even; from 65520 on it gives an infinity, as a cast in PyTorch does.
"""

from __future__ import annotations

from string import Template

HALVES = Template("""\
struct float16 { uint16_t bits; };
#if defined(__F16C__)
static inline Lanes widened(Halves h) { return (Lanes)$widen; }
static inline Halves narrowed(Lanes v) { return (Halves)$narrow; }
#else
static inline Ints choose(Ints mask, Ints a, Ints b) { return (mask & a) | (~mask & b); }
static inline Lanes widened(Halves h) {
  Ints b = __builtin_convertvector(h, Ints), size = b & 0x7fff, none = {};
  Ints normal = (size << 13) + choose(size >= 0x7c00, none + (224 << 23), none + (112 << 23));  // exponent 15 -> 127
  Lanes small = __builtin_convertvector(size, Lanes) * 0x1p-24f;
  return (Lanes)(choose(size < 0x400, (Ints)small, normal) | (b & 0x8000) << 16);
}
static inline Halves narrowed(Lanes v) {
  Ints b = (Ints)v, size = b & 0x7fffffff, none = {};
  Ints normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  Ints small = (Ints)((Lanes)size + 0.5f) - 0x3f000000;  // the last bit of 0.5f is worth float16's smallest number
  Ints special = choose(size > 0x7f800000, none + 0x7e00, none + 0x7c00);  // NaN, infinity
  Ints found = choose(size >= 0x477ff000, special, choose(size < 0x38800000, small, normal));
  return __builtin_convertvector(found | ((b >> 16) & 0x8000), Halves);
}
#endif
static inline Lanes load(const float16* p) { Halves h; memcpy(&h, p, sizeof h); return widened(h); }
static inline void store(float16* p, Lanes v) { Halves h = narrowed(v); memcpy(p, &h, sizeof h); }
static inline Lanes rounded(Lanes v, const float16*) { return widened(narrowed(v)); }
""")
# By the floats in a vector: F16C's conversions of h and v. The 0 rounds to the nearest whatever the thread's mode is.
_WIDEN = {
    16: "_mm512_cvtph_ps((__m256i)h)",
    8: "_mm256_cvtph_ps((__m128i)h)",
    4: "_mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)h))",
}
_NARROW = {
    16: "_mm512_cvtps_ph((__m512)v, 0)",
    8: "_mm256_cvtps_ph((__m256)v, 0)",
    4: "_mm_cvtsi128_si64(_mm_cvtps_ph((__m128)v, 0))",
}


def halves(lanes: int) -> str:
    """Return the text for vectors of `lanes` floats; it follows the types `Lanes`, `Ints` and `Halves`."""
    return HALVES.substitute(widen=_WIDEN.get(lanes, ""), narrow=_NARROW.get(lanes, ""))
