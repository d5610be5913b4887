"""C++ for the backward of a chain.

Per block of TOKENS tokens: recompute the streams X' from X and y, then the weights' gradients, the n x n arithmetic
backwards, the gradient G of X' (from X' itself, from h, from the projection and its norm), and from G those of X, y,
post and H. phi's gradient is summed in float32, one sum per thread, added in the order of the threads: two runs are
bit-equal.
"""

from __future__ import annotations

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp.forward import (
    FORWARD_ARGUMENTS,
    MIX,
    TAKE,
    collapse_source,
    header,
    load_tokens,
    unpack,
)
from mhc_compile.kernels.cpp.norm import norm_source
from mhc_compile.kernels.target import Source

WEIGH = """\
// d(loss)/d(weights) = <dh, X'[i]> of one token.
static inline void weigh(const float* x, const {dh_type}* dh, float* dweights) {{
  Lanes sum[N] = {{}};
  for (int v = 0; v < V; ++v) {{
    Lanes d = read(dh, v);
    for (int i = 0; i < N; ++i) sum[i] += d * load(x + (i * V + v) * LANES);
  }}
  for (int i = 0; i < N; ++i) {{
    float total = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) total += sum[i][lane];
    dweights[i] = total;
  }}
}}
"""

GATHER = """\
// G, the gradient of one token's X', but for the projection's part.
static inline void gather({arguments}float* g) {{
  for (int v = 0; v < V; ++v) {{{dh}
    for (int i = 0; i < N; ++i) store(g + (i * V + v) * LANES, {value});
  }}
}}
"""

PROJECT_BACKWARD = """\
constexpr int TILE_TOKENS = TOKENS;
// G += phi.T @ du, dphi += outer(du, X') of a group for TOKENS tokens; du [tokens][U].
static void project_backward(const float* x, const float* packed, const float* du, float* g, float* dphi) {{
  for (int t0 = 0; t0 < TOKENS; t0 += TILE_TOKENS)
    for (int64_t k = 0; k < SPAN; ++k) {{
      Lanes value[TILE_TOKENS], grad[TILE_TOKENS];
      for (int t = 0; t < TILE_TOKENS; ++t) {{
        value[t] = load(x + (t0 + t) * STRIDE + k * LANES);
        grad[t] = load(g + (t0 + t) * STRIDE + k * LANES);
      }}
      for (int r = 0; r < ROWS; ++r) {{
        Lanes p = load(packed + (k * ROWS + r) * LANES), sum = load(dphi + (k * ROWS + r) * LANES);
        for (int t = 0; t < TILE_TOKENS; ++t) {{
          const float d = du[(t0 + t) * U + r];
          grad[t] += d * p;
          sum += d * value[t];
        }}
        store(dphi + (k * ROWS + r) * LANES, sum);
      }}
      for (int t = 0; t < TILE_TOKENS; ++t) store(g + (t0 + t) * STRIDE + k * LANES, grad[t]);
    }}
}}
// The sum of all threads' [vector][row] sums, as phi lies.
static void unpack(const float* partial, float* dphi, int thread, int threads) {{
  for (int64_t k = thread; k < SPAN; k += threads)
    for (int r = 0; r < ROWS; ++r) {{
      Lanes sum = all(0.0f);
      for (int w = 0; w < threads; ++w) sum += load(partial + ((w * SPAN + k) * ROWS + r) * LANES);
      write(dphi + (r * (N / GROUPS) + k / V) * (int64_t)C, k % V, sum);
    }}
}}
"""

MIX_BACKWARD = """\
// One token: dX = H.T @ G, dy = post @ G, dH[i][j] = <G[i], X[j]>, dpost[i] = <G[i], y>.
static inline void mix_backward(
    const float* g, const streams_t* X, const branch_t* y, const float* post, const float* H, streams_t* dX,
    branch_t* dy, float* dpost, float* dH) {{
  Lanes with_x[N][N] = {{}}, with_y[N] = {{}};
  for (int v = 0; v < V; ++v) {{
    Lanes in[N], branch = read(y, v), grad[N], sum = all(0.0f);
    for (int j = 0; j < N; ++j) in[j] = read(X + j * (int64_t)C, v);
    for (int i = 0; i < N; ++i) {{
      grad[i] = load(g + (i * V + v) * LANES);
      sum += post[i] * grad[i];
      with_y[i] += grad[i] * branch;
      for (int j = 0; j < N; ++j) with_x[i][j] += grad[i] * in[j];
    }}
    write(dy, v, sum);
    for (int j = 0; j < N; ++j) {{
      sum = all(0.0f);
      for (int i = 0; i < N; ++i) sum += H[i * N + j] * grad[i];
      write(dX + j * (int64_t)C, v, sum);
    }}
  }}
  for (int i = 0; i < N; ++i) {{
    dpost[i] = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) dpost[i] += with_y[i][lane];
    for (int j = 0; j < N; ++j) {{
      dH[i * N + j] = 0.0f;
      for (int lane = 0; lane < LANES; ++lane) dH[i * N + j] += with_x[i][j][lane];
    }}
  }}
}}
"""
GIVE = """\
static inline void give(const float* g, streams_t* dX) {{
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) write(dX + i * (int64_t)C, v, load(g + (i * V + v) * LANES));
}}
"""

BACKWARD = """\
extern "C" void backward(void** p, const int64_t* size, int threads) {{
  const int64_t tokens = size[0], x_stride = size[1];
{arguments}
  const int64_t blocks = (tokens + TOKENS - 1) / TOKENS;
{shared}
  #pragma omp parallel num_threads(threads)
  {{
    const int thread = omp_get_thread_num();
    float* x = scratch(TOKENS * STRIDE);
    float* g = scratch(TOKENS * STRIDE);
    memset(x, 0, TOKENS * STRIDE * 4);
    memset(g, 0, TOKENS * STRIDE * 4);
{prepare}
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {{
      const int64_t first = b * TOKENS;
      const int m = tokens - first < TOKENS ? tokens - first : TOKENS;
      if (m < TOKENS) memset(x + m * STRIDE, 0, (TOKENS - m) * STRIDE * 4);  // or 0 * inf from the block before
{body}
    }}
{collect}
    free(x);
    free(g);
  }}
{finish}}}
"""

_PREPARE = """\
    pack(phi, packed, thread, omp_get_num_threads());
    float* own = partial + thread * SPAN * ROWS * LANES;
    memset(own, 0, SPAN * ROWS * LANES * 4);
    Lanes dalpha[{alphas}] = {{}}, dbias[{biases}] = {{}};
    #pragma omp barrier"""
_COLLECT = """\
    for (int k = 0; k < {alphas}; ++k) small[thread * SMALL + k] = total(dalpha[k]);
    for (int r = 0; r < {biases}; ++r) small[thread * SMALL + {alphas} + r] = total(dbias[r]);
    #pragma omp barrier
    unpack(partial, d_phi, thread, omp_get_num_threads());"""
_FINISH = """\
  for (int k = 0; k < SMALL; ++k) {{
    float sum = 0.0f;
    for (int w = 0; w < threads; ++w) sum += small[w * SMALL + k];
    (k < {alphas} ? d_alpha[k] : d_bias[k - {alphas}]) = sum;
  }}
  free(packed);
  free(partial);
  free(small);
"""
_SHARED = """\
  constexpr int SMALL = {biases} + {alphas};
  float* packed = scratch(SPAN * ROWS * LANES);
  float* partial = scratch(threads * SPAN * ROWS * LANES);
  float* small = scratch(threads * SMALL);
  memset(small, 0, threads * SMALL * 4);"""
# The gradients of the norm's weight and bias, one row of sums per thread.
_NORM_SHARED = """
  constexpr int64_t NORM = {count} * V * LANES;
  float* sums = scratch(threads * NORM);
  memset(sums, 0, threads * NORM * 4);"""
_NORM_PREPARE = """
    float* dh = scratch(TOKENS * V * LANES);
    float* own_norm = sums + thread * NORM;"""
_NORM_FINISH = """\
  for (int w = 1; w < threads; ++w)
    for (int64_t k = 0; k < NORM; ++k) sums[k] += sums[w * NORM + k];
  for (int k = 0; k < C; ++k) {{ d_norm_weight[k] = sums[k];{bias} }}
  free(sums);
"""
BACKWARD_ARGUMENTS = {
    **{k: v for k, v in FORWARD_ARGUMENTS.items() if not k.startswith("next") and k != "h"},
    "z": "const float* z",
    "d_next_X": "const streams_t* d_next_X", "d_h": "const streams_t* d_h", "d_next_pre": "const float* d_next_pre",
    "d_next_post": "const float* d_next_post", "d_next_mix": "const float* d_next_H",
    "d_norm_weight": "float* d_norm_weight", "d_norm_bias": "float* d_norm_bias",
    "d_X": "streams_t* d_X", "d_y": "branch_t* d_y", "d_post": "float* d_post", "d_mix": "float* d_H",
    "d_pre": "float* d_pre", "d_phi": "float* d_phi", "d_alpha": "float* d_alpha", "d_bias": "float* d_bias",
}  # fmt: skip


def backward_source(chain: Chain, lanes: int) -> Source:
    """Return the whole C++ file of the chain's backward."""
    parts = [header(chain, lanes)]
    parts.append(MIX.format(out_arg="", write="") if chain.mixes else TAKE.format())
    normed = chain.norm != "none"
    if normed:
        parts += [collapse_source(chain), norm_source(chain, backward=True)]
    if chain.collapses:
        parts.append(WEIGH.format(dh_type="float" if normed else "streams_t"))
    parts.append(_gather(chain))
    parts.append(MIX_BACKWARD.format() if chain.mixes else GIVE.format())
    if chain.projects:
        parts.append(PROJECT_BACKWARD.format())
    names = (*chain.inputs("backward"), *chain.outputs("backward"))
    pieces = {
        name: text.format(alphas=chain.scales, biases=chain.biases) if chain.projects else ""
        for name, text in (("shared", _SHARED), ("prepare", _PREPARE), ("collect", _COLLECT), ("finish", _FINISH))
    }
    if normed:
        pieces["shared"] += _NORM_SHARED.format(count=2 if chain.norm == "layer" else 1)
        pieces["prepare"] += _NORM_PREPARE.format()
        pieces["collect"] += "\n    free(dh);"
        pieces["finish"] += _NORM_FINISH.format(
            bias=" d_norm_bias[k] = sums[V * LANES + k];" if chain.norm == "layer" else ""
        )
    parts.append(BACKWARD.format(arguments=unpack(names, BACKWARD_ARGUMENTS), body=_body(chain), **pieces))
    return Source("\n".join(parts), _passes(chain))


def _passes(chain: Chain) -> dict[str, int]:
    """Count the passes over each wide value.

    X and y are read for X' and again for the gradients of H and post; d_h for those of the weights and of X'.
    """
    passes = dict.fromkeys(chain.wide("backward"), 1)
    if chain.mixes:
        passes |= {"X": 2, "y": 2}
    elif not _reads_streams(chain):
        del passes["X"]
    if chain.collapses and chain.norm == "none" and (chain.projects or chain.given):
        passes["d_h"] = 2
    return passes


def _reads_streams(chain: Chain) -> bool:
    return chain.mixes or chain.projects or chain.given


def _gather(chain: Chain) -> str:
    arguments, terms = "", []
    if chain.keeps_streams:
        arguments += "const streams_t* dX, "
        terms.append("read(dX + i * (int64_t)C, v)")
    if chain.collapses:
        arguments += f"const {'streams_t' if chain.norm == 'none' else 'float'}* dh, const float* weights, "
        terms.append("weights[i] * d")
    if chain.projects:
        arguments += "const float* x, const float* scale, "
        terms.append("scale[i % GROUPS] * load(x + (i * V + v) * LANES)")
    dh = "\n    Lanes d = read(dh, v);" if chain.collapses else ""
    return GATHER.format(arguments=arguments, dh=dh, value=" + ".join(terms))


def _dh(chain: Chain) -> str:
    """Return the text of one token's gradient of h: `d_h` itself, or the result of the norm's backward."""
    return "d_h + (first + t) * C" if chain.norm == "none" else "dh + t * V * LANES"


def _weigh(chain: Chain, weights: str, dweights: str) -> list[str]:
    """Emit the gradients of the weights of the block's tokens, where there is a norm after its own backward."""
    lines = []
    if chain.norm != "none":
        bias = ", own_norm + V * LANES" if chain.norm == "layer" else ""
        lines.append(f"""\
      for (int t = 0; t < m; ++t) {{
        float* row = dh + t * V * LANES;
        collapse(x + t * STRIDE, {weights}, row);
        normalise_backward(row, d_h + (first + t) * C, norm_weight, own_norm{bias});
      }}""")
    return [*lines, f"      for (int t = 0; t < m; ++t) weigh(x + t * STRIDE, {_dh(chain)}, {dweights});"]


def _site(chain: Chain) -> list[str]:
    """Emit the recomputed coefficients and the gradients of the projections (`du_of`) and of the norms (`scale_of`)."""
    lines = []
    lines.append("""\
      Lanes u[Z], du[U] = {}, s[GROUPS], ds[GROUPS] = {}, scale[GROUPS];
      tokens_to_lanes(z + first * Z, Z, m, u);
      for (int g = 0; g < GROUPS; ++g) s[g] = inverse_rms(u[U + g]);
      Site found, d;
      site(u, s, alpha, bias, found);""")
    if chain.weighs_itself:
        lines.append("""\
      float weights[TOKENS * N], dweights[TOKENS * N];
      lanes_to_tokens(found.pre, N, m, weights, N);""")
        lines += _weigh(chain, "weights + t * N", "dweights + t * N")
        lines.append("      tokens_to_lanes(dweights, N, m, d.pre);")
    else:
        lines.append("      tokens_to_lanes(d_next_pre + first * N, N, m, d.pre);")
    if chain.weights == "site":
        lines.append("""\
      tokens_to_lanes(d_next_post + first * N, N, m, d.post);
      tokens_to_lanes(d_next_H + first * N * N, N * N, m, &d.H[0][0]);""")
    lines.append("""\
      site_backward(u, s, alpha, bias, d, du, ds, dalpha, dbias);
      for (int g = 0; g < GROUPS; ++g) scale[g] = inverse_rms_backward(ds[g], s[g], u[U + g]);
      float du_of[TOKENS * U] = {}, scale_of[TOKENS * GROUPS];
      lanes_to_tokens(du, U, m, du_of, U);
      lanes_to_tokens(scale, GROUPS, m, scale_of, GROUPS);""")
    return lines


def _body(chain: Chain) -> str:
    n = chain.stream.streams
    lines = [load_tokens(chain, keeps=False, squares=False)] if _reads_streams(chain) else []
    weights = "weights + t * N"
    if chain.weights in ("mean", "sum"):
        value = f"{1 / n!r}f" if chain.weights == "mean" else "1.0f"
        lines.append(f"      const float weights[N] = {{{', '.join([value] * n)}}};")
        weights = "weights"
    if chain.given:
        weights = "pre + (first + t) * N"
        lines += _weigh(chain, weights, "d_pre + (first + t) * N")
    if chain.projects:
        lines += _site(chain)
    gather = []
    if chain.keeps_streams:
        gather.append("d_next_X + (first + t) * N * C")
    if chain.collapses:
        gather += [_dh(chain), weights]
    if chain.projects:
        gather += ["x + t * STRIDE", "scale_of + t * GROUPS"]
    lines.append(f"      for (int t = 0; t < m; ++t) gather({', '.join(gather)}, g + t * STRIDE);")
    if chain.projects:
        lines.append("""\
      for (int i = 0; i < GROUPS; ++i)
        project_backward(x + i * SPAN * LANES, packed, du_of + i * ROWS, g + i * SPAN * LANES, own);""")
    if chain.mixes:
        lines.append("""\
      for (int t = 0; t < m; ++t) {
        const int64_t token = first + t;
        mix_backward(
            g + t * STRIDE, X + token * x_stride, y + token * C, post + token * N, H + token * N * N,
            d_X + token * N * C, d_y + token * C, d_post + token * N, d_H + token * N * N);
      }""")
    else:
        lines.append("      for (int t = 0; t < m; ++t) give(g + t * STRIDE, d_X + (first + t) * N * C);")
    return "\n".join(lines)
