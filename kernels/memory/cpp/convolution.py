"""C++ for `inject`: X' = X + u + silu(y), y the convolution of rmsnorm(u) over the tokens, u_m = a_m v.

rmsnorm(u_m) = q_m v with q_m = a_m r_m, r_m = 1 / sqrt(a_m^2 mean(v^2) + eps), so that a tap of stream m is
`w q_m v`, w = conv * conv_gain. Blocks of rows of one sequence are worked on in tiles of columns, whose w stay in the
cache. Backward, with dy = dX' silu'(y) of a token and the tokens that read a row:

    z = sum_taps w dy        the gradient of q_m v
    dv = sum_m (a_m dX'_m + q_m z_m) - v / C sum_m <z_m, v> (a_m r_m)^3
    da_m = <dX'_m, v> + eps r_m^3 <z_m, v>
    dw = sum_tokens dy q_m v        summed in float32, a sum for each thread, added in the threads' order

dy goes through a ring of as many rows as the convolution looks back; the block's last ones are computed by the next
block, too.
"""

from __future__ import annotations

from mhc_compile.kernels.memory.cpp.header import arguments, header
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.target import Source

SHARED = """\
constexpr int BLOCK = {block};  // rows of a block
constexpr int TILE = 16;        // vectors of a tile
constexpr int64_t WEIGHTS = (int64_t)V * N * TAPS * LANES;
static inline int64_t least(int64_t a, int64_t b) {{ return a < b ? a : b; }}
static inline int64_t most(int64_t a, int64_t b) {{ return a > b ? a : b; }}

// w = conv * conv_gain, so that the values which are used together lie together: [vector][stream][tap].
static void pack(const float* conv_gain, const float* conv, float* packed, int thread, int threads) {{
  for (int v = thread; v < V; v += threads)
    for (int i = 0; i < N; ++i)
      for (int k = 0; k < TAPS; ++k)
        for (int lane = 0; lane < LANES; ++lane) {{
          const int64_t c = v * LANES + lane, at = i * (int64_t)C + c;
          packed[((v * N + i) * TAPS + k) * (int64_t)LANES + lane] = c < C ? conv_gain[at] * conv[at * TAPS + k] : 0.0f;
        }}
}}
// r of rows [first, last) of a sequence.
static void inverses(const value_t* value, const float* a, int64_t first, int64_t last, float* r) {{
  for (int64_t row = first; row < last; ++row) {{
    Lanes squares = all(0.0f);
    for (int v = 0; v < V; ++v) {{
      Lanes x = read(value + row * C, v);
      squares += x * x;
    }}
    const float mean = total(squares) / C;
    for (int i = 0; i < N; ++i) {{
      const float gate = a[row * N + i];
      r[(row - first) * N + i] = inverse_root(gate * gate * mean + EPS);
    }}
  }}
}}
// What a token reads: for every tap where v lies, and every stream's q; 0 where the token does not reach.
struct Reads {{
  const value_t* from[TAPS];
  float q[TAPS][N];
  bool there[TAPS];
}};
static inline Reads look_back(
    const value_t* value, const float* a, int64_t row, int64_t reach, const float* r, int64_t first) {{
  Reads sources;
  for (int k = 0; k < TAPS; ++k) {{
    const int64_t offset = (TAPS - 1 - k) * (int64_t)DILATION;
    sources.there[k] = offset <= row && offset <= reach;
    const int64_t at = sources.there[k] ? row - offset : row;
    sources.from[k] = value + at * C;
    for (int i = 0; i < N; ++i) sources.q[k][i] = sources.there[k] ? a[at * N + i] * r[(at - first) * N + i] : 0.0f;
  }}
  return sources;
}}
"""

FORWARD = """\
extern "C" void forward(void** p, const int64_t* size, int threads) {{
  const int64_t tokens = size[1], batch = size[0] / tokens, before = size[2], x_stride = size[3];
{arguments}
  const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
  threads = least(threads, batch * blocks);  // a token alone is not worth waking others
  float* packed = scratch(WEIGHTS);
  const bool streaming = past_caches(next_X, batch * tokens * N * C);
  #pragma omp parallel num_threads(threads)
  {{
    pack(conv_gain, conv, packed, omp_get_thread_num(), omp_get_num_threads());
    float* r = scratch((BLOCK + HISTORY) * N);
    Reads* reads = (Reads*)malloc(BLOCK * sizeof(Reads));
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < batch * blocks; ++b) {{
      const int64_t sequence = b / blocks, begin = b % blocks * BLOCK, end = least(begin + BLOCK, tokens);
      const value_t* values = value + sequence * (before + tokens) * C;
      const float* gates = a + sequence * (before + tokens) * N;
      const int64_t first = most(before + begin - HISTORY, 0);
      inverses(values, gates, first, before + end, r);
      for (int64_t t = begin; t < end; ++t)
        reads[t - begin] = look_back(values, gates, before + t, reach[sequence * tokens + t], r, first);
      for (int v0 = 0; v0 < V; v0 += TILE)
        for (int64_t t = begin; t < end; ++t) {{
          const Reads& sources = reads[t - begin];
          const float* gate = gates + (before + t) * N;
          const streams_t* x = X + (sequence * tokens + t) * x_stride;
          streams_t* out = next_X + (sequence * tokens + t) * N * C;
          for (int v = v0; v < V && v < v0 + TILE; ++v) {{
            Lanes tap[TAPS];
            for (int k = 0; k < TAPS; ++k) tap[k] = read(sources.from[k], v);
            for (int i = 0; i < N; ++i) {{
              Lanes y = all(0.0f);
              for (int k = 0; k < TAPS; ++k)
                y += load(packed + ((v * N + i) * TAPS + k) * (int64_t)LANES) * (sources.q[k][i] * tap[k]);
              const int64_t at = i * (int64_t)C;
              __builtin_prefetch(x + x_stride + at + v * LANES);
              put(out + at, v, read(x + at, v) + (gate[i] * tap[TAPS - 1] + y * sigmoid(y)), streaming);
            }}
          }}
        }}
    }}
    free(r);
    free(reads);
  }}
  free(packed);
}}
"""

BACKWARD = """\
constexpr int RING = HISTORY + 1;
constexpr int64_t ROW = (int64_t)TILE * LANES;  // of one stream in the ring
// What a thread works with. `none` stands where a token does not reach the row.
struct Work {{
  float *r, *ring, *none, *dv;
  Lanes* sums;  // <dX', v> and <z, v> of every stream of a row
  Reads* reads;
}};
// dy of a token, into the ring; what it adds to dw where the token is one of the block's own.
static inline void through_silu(
    const streams_t* g, const Reads& sources, const float* packed, int v0, int v1, float* dy, float* dw) {{
  for (int v = v0; v < v1; ++v) {{
    Lanes tap[TAPS];
    for (int k = 0; k < TAPS; ++k) tap[k] = read(sources.from[k], v);
    for (int i = 0; i < N; ++i) {{
      const int64_t at = (v * N + i) * TAPS * (int64_t)LANES;
      Lanes y = all(0.0f);
      for (int k = 0; k < TAPS; ++k) y += load(packed + at + k * LANES) * (sources.q[k][i] * tap[k]);
      Lanes s = sigmoid(y);
      __builtin_prefetch(g + (N + i) * (int64_t)C + v * LANES);
      Lanes d = read(g + i * (int64_t)C, v) * (s * (1.0f + y * (1.0f - s)));
      store(dy + i * ROW + (v - v0) * LANES, d);
      if (dw)
        for (int k = 0; k < TAPS; ++k)
          store(dw + at + k * LANES, load(dw + at + k * LANES) + d * (sources.q[k][i] * tap[k]));
    }}
  }}
}}
// One row's part of dv, and of its sums, from the dX' of its own token and the dy of those which read it.
static inline void back_to_row(
    const streams_t* g, const value_t* value, const float* gate, const float* q, const float* const* dy,
    const float* packed, int v0, int v1, float* dv, Lanes* sums) {{
  Lanes with_flow[N] = {{}}, with_z[N] = {{}};
  for (int v = v0; v < v1; ++v) {{
    Lanes x = read(value, v), sum = all(0.0f);
    for (int i = 0; i < N; ++i) {{
      Lanes z = all(0.0f);
      for (int k = 0; k < TAPS; ++k)
        z += load(packed + ((v * N + i) * TAPS + k) * (int64_t)LANES) * load(dy[k] + i * ROW + (v - v0) * LANES);
      sum += q[i] * z;
      with_z[i] += z * x;
      if (g) {{
        Lanes flow = read(g + i * (int64_t)C, v);
        sum += gate[i] * flow;
        with_flow[i] += flow * x;
      }}
    }}
    store(dv + v * LANES, sum);
  }}
  for (int i = 0; i < N; ++i) {{
    sums[i] += with_flow[i];
    sums[N + i] += with_z[i];
  }}
}}

extern "C" void backward(void** p, const int64_t* size, int threads) {{
  const int64_t tokens = size[1], batch = size[0] / tokens, before = size[2], rows = before + tokens;
{arguments}
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  threads = least(threads, batch * blocks);  // a token alone is not worth waking others
  float* packed = scratch(WEIGHTS);
  float* partial = scratch(threads * WEIGHTS);
  #pragma omp parallel num_threads(threads)
  {{
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    pack(conv_gain, conv, packed, thread, team);
    float* dw = partial + thread * WEIGHTS;
    memset(dw, 0, WEIGHTS * 4);
    Work work = {{
      scratch((BLOCK + 2 * HISTORY) * N), scratch(RING * N * ROW), scratch(N * ROW), scratch(BLOCK * V * LANES),
      (Lanes*)scratch(BLOCK * 2 * N * LANES), (Reads*)malloc((BLOCK + HISTORY) * sizeof(Reads))}};
    memset(work.none, 0, N * ROW * 4);
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < batch * blocks; ++b) {{
      const int64_t sequence = b / blocks, begin = b % blocks * BLOCK, end = least(begin + BLOCK, rows);
      const int64_t first = most(begin - HISTORY, 0), last = least(end + HISTORY, rows);
      const value_t* values = value + sequence * rows * C;
      const float* gates = a + sequence * rows * N;
      const streams_t* flow = d_next_X + sequence * tokens * N * C;
      inverses(values, gates, first, last, work.r);
      for (int64_t row = most(begin, before); row < last; ++row)
        work.reads[row - begin] =
            look_back(values, gates, row, reach[sequence * tokens + row - before], work.r, first);
      memset(work.sums, 0, BLOCK * 2 * N * LANES * 4);
      for (int v0 = 0; v0 < V; v0 += TILE) {{
        const int v1 = v0 + TILE < V ? v0 + TILE : V;
        for (int64_t ahead = begin; ahead < end + HISTORY; ++ahead) {{
          if (ahead >= before && ahead < last)
            through_silu(
                flow + (ahead - before) * N * C, work.reads[ahead - begin], packed, v0, v1,
                work.ring + ahead % RING * N * ROW, ahead < end ? dw : nullptr);
          const int64_t row = ahead - HISTORY;
          if (row < begin) continue;
          const float *dy[TAPS], *gate = gates + row * N;
          float q[N];
          for (int i = 0; i < N; ++i) q[i] = gate[i] * work.r[(row - first) * N + i];
          for (int k = 0; k < TAPS; ++k) {{
            const int64_t reader = row + (TAPS - 1 - k) * (int64_t)DILATION;
            const bool there = reader >= before && reader < last && work.reads[reader - begin].there[k];
            dy[k] = there ? work.ring + reader % RING * N * ROW : work.none;
          }}
          back_to_row(
              row >= before ? flow + (row - before) * N * C : nullptr, values + row * C, gate, q, dy, packed, v0, v1,
              work.dv + (row - begin) * V * LANES, work.sums + (row - begin) * 2 * N);
        }}
      }}
      for (int64_t row = begin; row < end; ++row) {{
        float share = 0.0f;
        for (int i = 0; i < N; ++i) {{
          const float gate = gates[row * N + i], r = work.r[(row - first) * N + i];
          const float with_z = total(work.sums[(row - begin) * 2 * N + N + i]), q = gate * r;
          d_a[(sequence * rows + row) * N + i] = total(work.sums[(row - begin) * 2 * N + i]) + EPS * r * r * r * with_z;
          share += with_z * q * q * q / C;
        }}
        for (int v = 0; v < V; ++v)
          write(d_value + (sequence * rows + row) * C, v,
                load(work.dv + ((row - begin) * V + v) * LANES) - share * read(values + row * C, v));
      }}
    }}
    free(work.r); free(work.ring); free(work.none); free(work.dv); free(work.sums); free(work.reads);
    #pragma omp for schedule(static)
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < N; ++i) {{
        Lanes gain = read(conv_gain + i * (int64_t)C, v), d_gain = all(0.0f);
        for (int k = 0; k < TAPS; ++k) {{
          Lanes sum = all(0.0f);
          for (int w = 0; w < team; ++w) sum += load(partial + w * WEIGHTS + ((v * N + i) * TAPS + k) * (int64_t)LANES);
          for (int lane = 0; lane < LANES && v * LANES + lane < C; ++lane) {{
            const int64_t at = (i * (int64_t)C + v * LANES + lane) * TAPS + k;
            d_gain[lane] += sum[lane] * conv[at];
            d_conv[at] = sum[lane] * gain[lane];
          }}
        }}
        write(d_conv_gain + i * (int64_t)C, v, d_gain);
      }}
  }}
  free(packed);
  free(partial);
}}
"""


def forward_source(step: MemoryStep, lanes: int) -> Source:
    """Return the whole C++ file of the forward: values are read for their norms and by every tap."""
    body = FORWARD.format(arguments=arguments(step, "forward", ()))
    text = "\n".join([header(step, lanes), SHARED.format(block=32), body])
    return Source(text, {"X": 1, "value": 1 + step.spec.taps, "next_X": 1})


def backward_source(step: MemoryStep, lanes: int) -> Source:
    """Return the whole C++ file of the backward: values are read for their norms, by every tap, and twice for dv."""
    block = 64 if step.width <= 2048 else 32  # rows of dv that the cache holds beside the ring
    body = BACKWARD.format(arguments=arguments(step, "backward", ()))
    text = "\n".join([header(step, lanes), SHARED.format(block=block), body])
    return Source(text, {"value": 3 + step.spec.taps, "d_next_X": 2, "d_value": 1})
