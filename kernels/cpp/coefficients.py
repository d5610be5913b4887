"""C++ for the n x n arithmetic of a site, one token per lane: projections -> pre, post, H, and its backward.

The equations are those of `mhc_compile.kernels.reference` (arXiv 2512.24880, Eq. 7-9). The backward runs
Sinkhorn's iterations again and keeps them on the stack.
"""

from __future__ import annotations

import torch

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp.transportation import TRANSPORTATION
from mhc_compile.kernels.mixtures import entries_of, entry_text, gradient_text, group_size
from mhc_compile.kernels.reference import LOGIT_FLOOR, sinkhorn_axes, vanishing
from mhc_compile.kernels.spec import StreamSpec

# s is the inverse of the root mean square, from the sum of squares of what a row of phi is multiplied with.
RMS_INSIDE = """\
static inline Lanes inverse_rms(Lanes squares) {{ return 1.0f / root(squares * {share!r}f + {eps!r}f); }}
// d(loss)/d(value) = value * this, where ds is d(loss)/d(inverse_rms).
static inline Lanes inverse_rms_backward(Lanes ds, Lanes s, Lanes squares) {{ return -{share!r}f * ds * s * s * s; }}
"""
RMS_OUTSIDE = """\
static inline Lanes inverse_rms(Lanes squares) {{ return 1.0f / (root(squares * {share!r}f) + {eps!r}f); }}
static inline Lanes inverse_rms_backward(Lanes ds, Lanes s, Lanes squares) {{
  Lanes rms = root(squares * {share!r}f);
  return choose(rms > 0.0f, -{share!r}f * ds * s * s / rms, all(0.0f));
}}
"""

GATES = """\
// The sigmoid of each of `count` logits u*s*alpha + bias, from row `first` on.
static inline void gates(const Lanes* u, Lanes s, float alpha, const float* bias, int first, Lanes* out, int count) {
  for (int j = 0; j < count; ++j) out[j] = sigmoid(u[first + j] * s * alpha + bias[first + j]);
}
// Gradients of one row's logit -> du, and what the row adds to ds, alpha and bias.
static inline void row_backward(
    int row, Lanes dlogit, const Lanes* u, Lanes s, float alpha, Lanes* du, Lanes& ds, Lanes& dalpha, Lanes* dbias) {
  Lanes dz = dlogit * alpha;
  dalpha += dlogit * u[row] * s;
  dbias[row] += dlogit;
  du[row] = dz * s;
  ds += dz * u[row];
}
// The same for the N logits from row `first` on whose sigmoids, times `scale`, have the gradients d.
static inline void gates_backward(
    const Lanes* u, Lanes s, float alpha, const float* bias, int first, float scale, const Lanes* d, Lanes* du,
    Lanes& ds, Lanes& dalpha, Lanes* dbias) {
  Lanes g[N];
  gates(u, s, alpha, bias, first, g, N);
  for (int j = 0; j < N; ++j)
    row_backward(first + j, scale * d[j] * g[j] * (1.0f - g[j]), u, s, alpha, du, ds, dalpha, dbias);
}
"""

SINKHORN = """\
struct Matrix {{ Lanes at[N][N]; }};

static inline void start(Matrix& m) {{
  for (int a = 0; a < N; ++a) {{
    Lanes peak = {line_0};
    for (int b = 1; b < N; ++b) peak = choose({line_b} > peak, {line_b}, peak);
    {start}
  }}
}}
// The sums along rows (axis 1) or columns (axis 0) by which a step divides.
static inline void divisors(const Matrix& m, int axis, Lanes d[N]) {{
  for (int a = 0; a < N; ++a) {{
    Lanes total = axis ? m.at[a][0] : m.at[0][a];
    for (int b = 1; b < N; ++b) total += axis ? m.at[a][b] : m.at[b][a];
    d[a] = {divisor};
  }}
}}
static inline void divide(Matrix& m, int axis, const Lanes d[N]) {{
  for (int a = 0; a < N; ++a) {{
    Lanes inverse = 1.0f / d[a];
    for (int b = 0; b < N; ++b) (axis ? m.at[a][b] : m.at[b][a]) *= inverse;
  }}
}}
constexpr int STEPS = {steps};
static inline int axis_of(int step) {{ return {axis_of}; }}  // 0: columns sum to 1 after it

static inline void sinkhorn(Matrix& m) {{
  Lanes d[N];
  start(m);
  for (int step = 0; step < STEPS; ++step) {{
    divisors(m, axis_of(step), d);
    divide(m, axis_of(step), d);
  }}
}}
// flow: d(loss)/d(H) in, d(loss)/d(logits) out, both in the published orientation.
static void sinkhorn_backward(const Matrix& logits, Matrix& flow) {{
  Matrix kept[STEPS + 1];
  Lanes d[STEPS][N];
  kept[0] = logits;
  start(kept[0]);
  for (int step = 0; step < STEPS; ++step) {{
    kept[step + 1] = kept[step];
    divisors(kept[step], axis_of(step), d[step]);
    divide(kept[step + 1], axis_of(step), d[step]);
  }}
  for (int step = STEPS - 1; step >= 0; --step) {{
    int axis = axis_of(step);
    for (int a = 0; a < N; ++a) {{
      Lanes common = all(0.0f);
      for (int b = 0; b < N; ++b) {{
        int i = axis ? a : b, j = axis ? b : a;{cut}
        common += flow.at[i][j] * kept[step + 1].at[i][j];
      }}{clamped}
      Lanes inverse = 1.0f / d[step][a];
      for (int b = 0; b < N; ++b) {{
        Lanes& f = axis ? flow.at[a][b] : flow.at[b][a];
        f = (f - common) * inverse;
      }}
    }}
  }}
{start_backward}}}
"""

START_SOFTMAX = """\
Lanes total = all(0.0f);
    for (int b = 0; b < N; ++b) {{ m.at[a][b] = exp(m.at[a][b] - peak); total += m.at[a][b]; }}
    Lanes inverse = 1.0f / total;
    for (int b = 0; b < N; ++b) m.at[a][b] = m.at[a][b] * inverse + {eps!r}f;"""
START_COLUMNS = """\
for (int b = 0; b < N; ++b) m.at[b][a] = exp(at_least(m.at[b][a] - peak, all({floor!r}f)));"""
START_ROWS = """\
for (int b = 0; b < N; ++b) m.at[a][b] = exp(m.at[a][b] - peak);"""

START_SOFTMAX_BACKWARD = """\
  for (int a = 0; a < N; ++a) {{
    Lanes common = all(0.0f);
    for (int b = 0; b < N; ++b) {{
      kept[0].at[a][b] -= {eps!r}f;
      common += flow.at[a][b] * kept[0].at[a][b];
    }}
    for (int b = 0; b < N; ++b) flow.at[a][b] = kept[0].at[a][b] * (flow.at[a][b] - common);
  }}
"""
START_COLUMNS_BACKWARD = """\
  for (int a = 0; a < N; ++a) {{
    Lanes peak = logits.at[0][a];
    for (int b = 1; b < N; ++b) peak = choose(logits.at[b][a] > peak, logits.at[b][a], peak);
    for (int b = 0; b < N; ++b)
      flow.at[b][a] = choose(logits.at[b][a] - peak < {floor!r}f, all(0.0f), flow.at[b][a] * kept[0].at[b][a]);
  }}
"""
START_ROWS_BACKWARD = """\
  for (int a = 0; a < N; ++a)
    for (int b = 0; b < N; ++b) flow.at[a][b] *= kept[0].at[a][b];
"""

# u, s, alpha, bias -> H
MIX = {
    "sinkhorn": """\
static inline void mix_logits(const Lanes* u, Lanes s, float alpha, const float* bias, Matrix& m) {{
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {{
      int row = 2 * N + i * N + j;
      m.at[i][j] = u[row] * s * alpha + bias[row];
    }}
}}
static inline void mixing_matrix(const Lanes* u, Lanes s, float alpha, const float* bias, Lanes H[N][N]) {{
  Matrix m;
  mix_logits(u, s, alpha, bias, m);
  sinkhorn(m);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) H[i][j] = m.at[{i}][{j}];
}}
static inline void mixing_matrix_backward(
    const Lanes* u, Lanes s, float alpha, const float* bias, const Lanes dH[N][N], Lanes* du, Lanes& ds, Lanes& dalpha,
    Lanes* dbias) {{
  Matrix logits, flow;
  mix_logits(u, s, alpha, bias, logits);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) flow.at[{i}][{j}] = dH[i][j];
  sinkhorn_backward(logits, flow);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      row_backward(2 * N + i * N + j, flow.at[i][j], u, s, alpha, du, ds, dalpha, dbias);
}}
""",
    "unconstrained": """\
static inline void mixing_matrix(const Lanes* u, Lanes s, float alpha, const float* bias, Lanes H[N][N]) {{
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {{
      int row = 2 * N + {i} * N + {j};
      H[i][j] = u[row] * s * alpha + bias[row];
    }}
}}
static inline void mixing_matrix_backward(
    const Lanes* u, Lanes s, float alpha, const float*, const Lanes dH[N][N], Lanes* du, Lanes& ds, Lanes& dalpha,
    Lanes* dbias) {{
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      row_backward(2 * N + {i} * N + {j}, dH[i][j], u, s, alpha, du, ds, dalpha, dbias);
}}
""",
    "identity": """\
static inline void mixing_matrix(const Lanes*, Lanes, float, const float*, Lanes H[N][N]) {{
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) H[i][j] = all(i == j);
}}
static inline void mixing_matrix_backward(
    const Lanes*, Lanes, float, const float*, const Lanes (*)[N], Lanes*, Lanes&, Lanes&, Lanes*) {{}}
""",
    "transportation": TRANSPORTATION,
}

# u, s, alpha, bias -> the weights of a mixture of permutations, and H from them
MIXTURE = """\
constexpr int LOGITS = {logits}, GROUP = {group};
static inline void weights(const Lanes* u, Lanes s, float alpha, const float* bias, Lanes* w) {{
  for (int first = 0; first < LOGITS; first += GROUP) {{
    Lanes peak, total = all(0.0f);
    for (int k = first; k < first + GROUP; ++k) {{
      w[k] = u[2 * N + k] * s * alpha + bias[2 * N + k];
      peak = k == first ? w[k] : choose(w[k] > peak, w[k], peak);
    }}
    for (int k = first; k < first + GROUP; ++k) {{ w[k] = exp(w[k] - peak); total += w[k]; }}
    for (int k = first; k < first + GROUP; ++k) w[k] /= total;
  }}
}}
static inline void mixing_matrix(const Lanes* u, Lanes s, float alpha, const float* bias, Lanes H[N][N]) {{
  Lanes w[LOGITS];
  weights(u, s, alpha, bias, w);
{entries}}}
static inline void mixing_matrix_backward(
    const Lanes* u, Lanes s, float alpha, const float* bias, const Lanes dH[N][N], Lanes* du, Lanes& ds, Lanes& dalpha,
    Lanes* dbias) {{
  Lanes w[LOGITS], dw[LOGITS];
  weights(u, s, alpha, bias, w);
{gradients}  for (int first = 0; first < LOGITS; first += GROUP) {{
    Lanes common = all(0.0f);
    for (int k = first; k < first + GROUP; ++k) common += w[k] * dw[k];
    for (int k = first; k < first + GROUP; ++k)
      row_backward(2 * N + k, w[k] * (dw[k] - common), u, s, alpha, du, ds, dalpha, dbias);
  }}
}}
"""

SITE = """\
constexpr float PRE_EPS = {pre_eps!r}f, POST_SCALE = {post_scale!r}f, POST_EPS = {post_eps!r}f;
struct Site {{ Lanes pre[N], post[N], H[N][N]; }};

static void site(const Lanes* u, const Lanes* s, const float* alpha, const float* bias, Site& out) {{
  gates(u, *s, alpha[0], bias, 0, out.pre, N);
  gates(u, *s, alpha[1], bias, N, out.post, N);
  for (int j = 0; j < N; ++j) {{ out.pre[j] += PRE_EPS; out.post[j] = out.post[j] * POST_SCALE + POST_EPS; }}
  mixing_matrix(u, *s, alpha[2], bias, out.H);
}}
// d: gradients of pre, post and H. Adds to ds, dalpha [3] and dbias [ROWS].
static void site_backward(
    const Lanes* u, const Lanes* s, const float* alpha, const float* bias, const Site& d, Lanes* du, Lanes* ds,
    Lanes* dalpha, Lanes* dbias) {{
  gates_backward(u, *s, alpha[0], bias, 0, 1.0f, d.pre, du, *ds, dalpha[0], dbias);
  gates_backward(u, *s, alpha[1], bias, N, POST_SCALE, d.post, du, *ds, dalpha[1], dbias);
  mixing_matrix_backward(u, *s, alpha[2], bias, d.H, du, *ds, dalpha[2], dbias);
}}
"""
HEAD = """\
constexpr float PRE_EPS = {pre_eps!r}f;
struct Site {{ Lanes pre[N]; }};

static void site(const Lanes* u, const Lanes* s, const float* alpha, const float* bias, Site& out) {{
  gates(u, *s, alpha[0], bias, 0, out.pre, N);
  for (int j = 0; j < N; ++j) out.pre[j] += PRE_EPS;
}}
static void site_backward(
    const Lanes* u, const Lanes* s, const float* alpha, const float* bias, const Site& d, Lanes* du, Lanes* ds,
    Lanes* dalpha, Lanes* dbias) {{
  gates_backward(u, *s, alpha[0], bias, 0, 1.0f, d.pre, du, *ds, dalpha[0], dbias);
}}
"""
# Hyper-Connections: row 0 of a stream gives its entry of pre, row 1 of post, row 2 + j of H[j].
HYPER_CONNECTIONS = """\
struct Site { Lanes pre[N], post[N], H[N][N]; };

static inline Lanes& entry(Site& site, int i, int row) {
  return row == 0 ? site.pre[i] : row == 1 ? site.post[i] : site.H[row - 2][i];
}
static inline int bias_of(int i, int row) { return row < 2 ? row * N + i : 2 * N + i * N + row - 2; }
static inline Lanes hyperbolic_tangent(Lanes x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

static void site(const Lanes* u, const Lanes* s, const float* alpha, const float* bias, Site& out) {
  for (int i = 0; i < N; ++i)
    for (int row = 0; row < ROWS; ++row)
      entry(out, i, row) =
          alpha[row == 1] * hyperbolic_tangent(u[i * ROWS + row] * s[i]) + bias[bias_of(i, row)];
}
static void site_backward(
    const Lanes* u, const Lanes* s, const float* alpha, const float*, Site& d, Lanes* du, Lanes* ds, Lanes* dalpha,
    Lanes* dbias) {
  for (int i = 0; i < N; ++i)
    for (int row = 0; row < ROWS; ++row) {
      const int at = i * ROWS + row;
      Lanes value = hyperbolic_tangent(u[at] * s[i]), flow = entry(d, i, row);
      Lanes dz = alpha[row == 1] * flow * (1.0f - value * value);
      dalpha[row == 1] += flow * value;
      dbias[bias_of(i, row)] += flow;
      du[at] = dz * s[i];
      ds[i] += dz * u[at];
    }
}
"""


def coefficients_source(chain: Chain) -> str:
    """Return the text of `inverse_rms`, `site` and their backwards for the chain's convention and manifold."""
    fields = chain.stream.convention.fields
    share = 1.0 / chain.span
    rms = (RMS_INSIDE if fields.rms_inside else RMS_OUTSIDE).format(share=share, eps=fields.rms_eps)
    if chain.weights == "head":
        return rms + GATES + HEAD.format(pre_eps=fields.pre_eps)
    if chain.is_hyper_connection:
        return rms + HYPER_CONNECTIONS
    i, j = ("j", "i") if fields.transposed else ("i", "j")
    mix = _mixture(chain.stream) if chain.mixture else MIX[chain.stream.manifold].format(i=i, j=j)
    if chain.stream.manifold == "sinkhorn":
        mix = _sinkhorn(chain.stream) + mix
    return (
        rms + GATES + mix + SITE.format(pre_eps=fields.pre_eps, post_scale=fields.post_scale, post_eps=fields.post_eps)
    )


def _mixture(spec: StreamSpec) -> str:
    entries = "".join(
        f"  H[{i}][{j}] = {entry_text(entry, 'w[{}]')};\n"
        for i, line in enumerate(entries_of(spec))
        for j, entry in enumerate(line)
    )
    gradients = "".join(
        f"  dw[{row}] = {gradient_text(spec, row, 'w[{}]', 'dH[{}][{}]')};\n" for row in range(spec.mix_rows)
    )
    return MIXTURE.format(logits=spec.mix_rows, group=group_size(spec), entries=entries, gradients=gradients)


def _sinkhorn(spec: StreamSpec) -> str:
    fields = spec.convention.fields
    columns = fields.start == "exp_colmax"
    start, start_backward = {
        "softmax_eps": (START_SOFTMAX, START_SOFTMAX_BACKWARD),
        "exp_colmax": (START_COLUMNS, START_COLUMNS_BACKWARD),
        "exp_rowmax": (START_ROWS, START_ROWS_BACKWARD),
    }[fields.start]
    axes = [axis + 2 for axis in sinkhorn_axes(spec)]
    eps, floor = fields.sinkhorn_eps, LOGIT_FLOOR
    clamp = fields.divisor == "clamp"
    small = vanishing(torch.float32)
    return SINKHORN.format(
        line_0="m.at[0][a]" if columns else "m.at[a][0]",
        line_b="m.at[b][a]" if columns else "m.at[a][b]",
        start=start.format(eps=eps, floor=floor),
        start_backward=start_backward.format(eps=eps, floor=floor),
        divisor={"plain": "total", "add_eps": f"total + {eps!r}f", "clamp": f"at_least(total, all({eps!r}f))"}[
            fields.divisor
        ],
        steps=len(axes),
        # Two columns steps in a row never occur: the axes alternate from the first one on.
        axis_of=f"(step + {axes[0]}) % 2",
        cut=f"\n        flow.at[i][j] = choose(kept[step].at[i][j] > {small!r}f, flow.at[i][j], all(0.0f));"
        if clamp
        else "",
        clamped=f"\n      common = choose(d[step][a] > {eps!r}f, common, all(0.0f));" if clamp else "",
    )
