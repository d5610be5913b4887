"""C++ for the manifold `transportation`: H filled entry by entry between the bounds that its sums leave.

The equations are those of `mhc_compile.kernels.reference.fill` (arXiv 2605.21724). The backward fills H again and keeps
what each row and column had left.
"""

# u, s, alpha, bias -> H
TRANSPORTATION = """\
// What was left of each row before an entry and of each column before a row, and the bounds of the entries.
struct Filled {{ Lanes row[N][N], column[N][N], low[N][N], high[N][N], gate[N * N]; }};

static inline Lanes positive(Lanes value) {{ return at_least(value, all(0.0f)); }}
static inline void mixing_matrix(
    const Lanes* u, Lanes s, float alpha, const float* bias, Lanes H[N][N], Filled& at) {{
  gates(u, s, alpha, bias, 2 * N, at.gate, (N - 1) * (N - 1));
  for (int j = 0; j < N; ++j) at.column[0][j] = all(1.0f);
  for (int i = 0; i < N - 1; ++i) {{
    Lanes left = all(1.0f);
    for (int j = 0; j < N - 1; ++j) {{
      Lanes column = at.column[i][j], open = at.column[i][j + 1];
      for (int k = j + 2; k < N; ++k) open += at.column[i][k];
      at.row[i][j] = left;
      at.low[i][j] = positive(left - open);
      at.high[i][j] = choose(left < column, left, column);
      H[i][j] = at.low[i][j] + (at.high[i][j] - at.low[i][j]) * at.gate[i * (N - 1) + j];
      left -= H[i][j];
      at.column[i + 1][j] = column - H[i][j];
    }}
    at.row[i][N - 1] = left;
    at.column[i + 1][N - 1] = at.column[i][N - 1] - left;
    H[i][N - 1] = positive(left);
  }}
  for (int j = 0; j < N; ++j) H[N - 1][j] = positive(at.column[N - 1][j]);
}}
static inline void mixing_matrix(const Lanes* u, Lanes s, float alpha, const float* bias, Lanes H[N][N]) {{
  Filled at;
  mixing_matrix(u, s, alpha, bias, H, at);
}}
static inline void mixing_matrix_backward(
    const Lanes* u, Lanes s, float alpha, const float* bias, const Lanes dH[N][N], Lanes* du, Lanes& ds, Lanes& dalpha,
    Lanes* dbias) {{
  const Lanes zero = all(0.0f);
  Lanes H[N][N], column[N];  // column: the gradient of what a column has left
  Filled at;
  mixing_matrix(u, s, alpha, bias, H, at);
  for (int j = 0; j < N; ++j) column[j] = choose(at.column[N - 1][j] > 0.0f, dH[N - 1][j], zero);
  for (int i = N - 2; i >= 0; --i) {{
    Lanes left = choose(at.row[i][N - 1] > 0.0f, dH[i][N - 1], zero) - column[N - 1];
    for (int j = N - 2; j >= 0; --j) {{
      Lanes gate = at.gate[i * (N - 1) + j], flow = dH[i][j] - left - column[j];
      Lanes low = choose(at.low[i][j] > 0.0f, flow * (1.0f - gate), zero), high = flow * gate;
      auto of_row = at.row[i][j] < at.column[i][j];
      left += low + choose(of_row, high, zero);
      column[j] += choose(of_row, zero, high);
      for (int k = j + 1; k < N; ++k) column[k] -= low;
      row_backward(
          2 * N + i * (N - 1) + j, flow * (at.high[i][j] - at.low[i][j]) * gate * (1.0f - gate), u, s, alpha, du, ds,
          dalpha, dbias);
    }}
  }}
}}
"""
