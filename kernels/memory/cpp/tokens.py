"""C++ for the steps in which tokens do not see each other: gate, add and remember, forward and backward.

A token's streams and keys are read twice, the second time from the cache: for the sums over the width that its gates
are made of, and for what follows from them. With p = query_gain * key_gain, x and k a stream and its key,

    s = rx rk <p x, k> / sqrt(C)      rx = 1 / sqrt(mean(x^2) + eps), rk alike      a = sigmoid(root(s))
    dx = ds (rx rk / sqrt(C) p k - s rx^2 x / C)      dp = ds rx rk / sqrt(C) x k, over all tokens

dp is summed in float32, a sum for each thread, added in the threads' order: two runs are bit-equal.
"""

from __future__ import annotations

from mhc_compile.kernels.kernelspec import Direction
from mhc_compile.kernels.memory.cpp.header import arguments, header
from mhc_compile.kernels.memory.fusion import ROOT_FLOOR
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.target import Source

GATE = """\
constexpr bool SIGNED_ROOT = {signed_root};
constexpr float ROOT_FLOOR = {floor}f;
// The sums over the width that one stream's gate depends on, and <dX', v>.
struct Sums {{ float xx, kk, xk, flow; }};
// a, its slope da/ds, and s with what it is made of.
struct Gate {{ float a, slope, s, rx, rk; }};

static inline Gate gate_of(const Sums& sums) {{
  Gate g;
  g.rx = inverse_root(sums.xx / C + EPS);
  g.rk = inverse_root(sums.kk / C + EPS);
  g.s = sums.xk * g.rx * g.rk * {scale}f;
  const float size = __builtin_fabsf(g.s);
  float root = g.s, slope = 1.0f;
  if (SIGNED_ROOT) {{
    const float r = __builtin_sqrtf(size > ROOT_FLOOR ? size : ROOT_FLOOR);
    root = g.s == 0.0f ? 0.0f : __builtin_copysignf(r, g.s);
    slope = size >= ROOT_FLOOR ? 0.5f / r : 0.0f;
    if (g.s != g.s) root = g.s;
  }}
  g.a = sigmoid(all(root))[0];
  g.slope = slope * g.a * (1.0f - g.a);
  return g;
}}
// p = query_gain * key_gain, rows padded with zeros to whole vectors.
static void multiply(const float* query_gain, const float* key_gain, float* product) {{
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) {{
      const int64_t at = i * (int64_t)C;
      store(product + (i * V + v) * LANES, read(query_gain + at, v) * read(key_gain + at, v));
    }}
}}
"""

SUM_UP = """\
// The sums of stream i of one token.
static inline Sums sum_up(const streams_t* x, const keys_t* k, const float* p, const streams_t* g, const value_t* v) {
  Lanes xx = all(0.0f), kk = all(0.0f), xk = all(0.0f), flow = all(0.0f);
  for (int at = 0; at < V; ++at) {
    if constexpr (GATES) {
      Lanes X = read(x, at), K = read(k, at);
      xx += X * X;
      kk += K * K;
      xk += load(p + at * LANES) * X * K;
    }
    if (ADDS && g) flow += read(g, at) * read(v, at);
  }
  return {total(xx), total(kk), total(xk), total(flow)};
}
"""

FORWARD = """\
extern "C" void forward(void** p, const int64_t* size, int threads) {{
  const int64_t tokens = size[0], length = size[1], before = size[2], x_stride = size[3];
{arguments}
  threads = threads < tokens ? threads : tokens;
  float* product = scratch(N * V * LANES);
  if constexpr (GATES) multiply(query_gain, key_gain, product);
  const bool streaming = ADDS && past_caches(next_X, tokens * N * C);
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t token = 0; token < tokens; ++token) {{
    const int64_t row = token + (token / length + 1) * before;
    const streams_t* x = X + token * x_stride;
    float gate[N];
    for (int i = 0; i < N; ++i) {{
      const int64_t at = i * (int64_t)C;
      if constexpr (GATES)
        gate[i] = gate_of(sum_up(x + at, keys + token * N * C + at, product + i * V * LANES, nullptr, nullptr)).a;
      else gate[i] = a[row * N + i];
    }}
    if constexpr (ADDS) {{
      streams_t* out = next_X + token * N * C;
      for (int v = 0; v < V; ++v) {{
        Lanes memory = read(value + row * C, v);
        for (int i = 0; i < N; ++i)
          put(out + i * (int64_t)C, v, read(x + i * (int64_t)C, v) + gate[i] * memory, streaming);
      }}
    }} else memcpy(a_out + token * N, gate, sizeof gate);
  }}
  free(product);
}}
"""

BACKWARD = """\
extern "C" void backward(void** p, const int64_t* size, int threads) {{
  const int64_t tokens = size[0], length = size[1], before = size[2], x_stride = size[3];
{arguments}
  constexpr int64_t ALL = (int64_t)N * V * LANES;
  threads = threads < tokens ? threads : tokens;
  float* product = scratch(ALL);
  float* sums = scratch(threads * ALL);
  if constexpr (GATES) multiply(query_gain, key_gain, product);
  const bool streaming = GATES && past_caches(d_X, tokens * N * C) && past_caches(d_keys, tokens * N * C);
  #pragma omp parallel num_threads(threads)
  {{
    float* own = sums + omp_get_thread_num() * ALL;
    memset(own, 0, ALL * 4);
    #pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; ++token) {{
      const int64_t row = token + (token / length + 1) * before, at = token * N * C;
      const streams_t* x = X + token * x_stride;
      const value_t* v = value + row * C;
      float gate[N], across[N], along_x[N], along_k[N];
      for (int i = 0; i < N; ++i) {{
        const int64_t of = at + i * (int64_t)C;
        Sums totals = sum_up(x + i * (int64_t)C, keys + of, product + i * V * LANES, d_next_X + of, v);
        if constexpr (GATES) {{
          Gate g = gate_of(totals);
          const float ds = (ADDS ? totals.flow : d_a[token * N + i]) * g.slope;
          gate[i] = g.a;
          across[i] = ds * g.rx * g.rk * {scale}f;
          along_x[i] = ds * g.s * g.rx * g.rx / C;
          along_k[i] = ds * g.s * g.rk * g.rk / C;
        }} else {{
          gate[i] = a[row * N + i];
          d_a_out[row * N + i] = totals.flow;
        }}
      }}
      if (!GATES && token % length == 0) {{  // history takes no part in it
        memset(d_a_out + (row - before) * N, 0, before * N * sizeof(float));
        memset(d_value + (row - before) * C, 0, before * C * sizeof(value_t));
      }}
      for (int c = 0; c < V; ++c) {{
        Lanes memory = all(0.0f);
        for (int i = 0; i < N; ++i) {{
          const int64_t of = at + i * (int64_t)C;
          Lanes flow = ADDS || JOINS ? read(d_next_X + of, c) : all(0.0f);
          memory += gate[i] * flow;
          if constexpr (GATES) {{
            Lanes X = read(x + i * (int64_t)C, c), K = read(keys + of, c), p = load(product + (i * V + c) * LANES);
            float* sum = own + (i * V + c) * LANES;
            store(sum, load(sum) + across[i] * X * K);
            put(d_X + of, c, flow + across[i] * p * K - along_x[i] * X, streaming);
            put(d_keys + of, c, across[i] * p * X - along_k[i] * K, streaming);
          }}
        }}
        if constexpr (ADDS) write(d_value + row * C, c, memory);
      }}
    }}
    if constexpr (GATES) {{
      #pragma omp for schedule(static)
      for (int i = 0; i < N; ++i)
        for (int c = 0; c < V; ++c) {{
          Lanes sum = all(0.0f);
          for (int w = 0; w < omp_get_num_threads(); ++w) sum += load(sums + w * ALL + (i * V + c) * LANES);
          write(d_query_gain + i * (int64_t)C, c, sum * read(key_gain + i * (int64_t)C, c));
          write(d_key_gain + i * (int64_t)C, c, sum * read(query_gain + i * (int64_t)C, c));
        }}
    }}
  }}
  free(product);
  free(sums);
}}
"""
_KNOWN = ("X", "keys", "query_gain", "key_gain", "a", "value")


def passes(step: MemoryStep, direction: Direction) -> dict[str, int]:
    """Return how often the code goes over each wide value: twice where sums over the width come first."""
    counts = dict.fromkeys(step.wide(direction), 1)
    if direction == "forward":
        return counts | ({"X": 2} if step.gates and step.adds else {})
    return counts | ({"X": 2, "keys": 2} if step.gates else {}) | ({"d_next_X": 2} if step.adds else {})


def forward_source(step: MemoryStep, lanes: int) -> Source:
    """Return the whole C++ file of the forward."""
    known = arguments(step, "forward", (*_KNOWN, "next_X")) + "\n  float* a_out = (float*)a;"
    text = "\n".join([header(step, lanes), _gate(step), SUM_UP, FORWARD.format(arguments=known)])
    return Source(text, passes(step, "forward"))


def backward_source(step: MemoryStep, lanes: int) -> Source:
    """Return the whole C++ file of the backward."""
    known = (*_KNOWN, "d_next_X", "d_X", "d_keys", "d_value", "d_query_gain", "d_key_gain", "d_a")
    text = arguments(step, "backward", known) + "\n  float* d_a_out = (float*)d_a;"
    body = BACKWARD.format(arguments=text, scale=step.width**-0.5)
    return Source("\n".join([header(step, lanes), _gate(step), SUM_UP, body]), passes(step, "backward"))


def _gate(step: MemoryStep) -> str:
    root = str(step.spec.signed_root).lower()
    return GATE.format(signed_root=root, floor=ROOT_FLOOR, scale=step.width**-0.5)
