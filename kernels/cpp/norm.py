"""C++ for the branch's own norm of h, forward and backward, one token at a time on a row of floats in the cache."""

from __future__ import annotations

from mhc_compile.kernels.chain import Chain

STATISTICS = """\
// Values behind the width are none of the row.
static inline Lanes within(Lanes x, int v) {{
  if (REST && v == V - 1)
    for (int lane = REST; lane < LANES; ++lane) x[lane] = 0.0f;
  return x;
}}
// The mean that is taken off and the inverse of the root mean square of what is left.
struct Statistics {{ float mean, inverse; }};
static inline Statistics statistics(const float* row) {{
  Lanes sum = all(0.0f);
  float mean = 0.0f;{mean}
  for (int v = 0; v < V; ++v) {{
    Lanes x = within(load(row + v * LANES) - mean, v);
    sum += x * x;
  }}
  return {{mean, 1.0f / __builtin_sqrtf(total(sum) / C + {eps!r}f)}};
}}
"""
MEAN = """
  for (int v = 0; v < V; ++v) sum += load(row + v * LANES);
  mean = total(sum) / C;
  sum = all(0.0f);"""

NORMALISE = """\
static inline void normalise(const float* row, const float* weight{bias_argument}, streams_t* h) {{
  Statistics found = statistics(row);
  for (int v = 0; v < V; ++v) {{
    Lanes x = (load(row + v * LANES) - found.mean) * found.inverse;
    write(h, v, x * read(weight, v){bias});
  }}
}}
"""

NORMALISE_BACKWARD = """\
// `row` holds h and gets d(loss)/d(h); dweight{and_bias} of this thread are added to.
static inline void normalise_backward(
    float* row, const streams_t* dh, const float* weight, float* dweight{dbias_argument}) {{
  Statistics found = statistics(row);
  Lanes with_x = all(0.0f){plain_start};
  for (int v = 0; v < V; ++v) {{
    Lanes x = within((load(row + v * LANES) - found.mean) * found.inverse, v), d = read(dh, v);
    store(dweight + v * LANES, load(dweight + v * LANES) + d * x);{dbias}
    Lanes g = d * read(weight, v);
    with_x += g * x;{plain_add}
    store(row + v * LANES, x);
  }}
  float share = total(with_x) / C{plain_share};
  for (int v = 0; v < V; ++v) {{
    Lanes x = load(row + v * LANES), g = read(dh, v) * read(weight, v);
    store(row + v * LANES, within((g - x * share{plain_off}) * found.inverse, v));
  }}
}}
"""


def norm_source(chain: Chain, *, backward: bool) -> str:
    """Return the text of `statistics` and of `normalise` or `normalise_backward` for the chain's norm."""
    layer = chain.norm == "layer"
    text = STATISTICS.format(eps=chain.norm_eps, mean=MEAN if layer else "")
    if not backward:
        return text + NORMALISE.format(
            bias_argument=", const float* bias" if layer else "", bias=" + read(bias, v)" if layer else ""
        )
    return text + NORMALISE_BACKWARD.format(
        and_bias=" and dbias" if layer else "",
        dbias_argument=", float* dbias" if layer else "",
        dbias="\n    store(dbias + v * LANES, load(dbias + v * LANES) + d);" if layer else "",
        plain_start=", plain = all(0.0f)" if layer else "",
        plain_add="\n    plain += g;" if layer else "",
        plain_share=", off = total(plain) / C" if layer else "",
        plain_off=" - off" if layer else "",
    )
