"""Write how a site computes its mixing matrix H, and what the bias of H starts with, in plain PyTorch."""

from __future__ import annotations

from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import start_bias

LOGITS = "logits = z[..., 2 * n :] * alpha[2] + bias[2 * n :]"
SQUARE = "logits = (z[..., 2 * n :] * alpha[2] + bias[2 * n :]).unflatten(-1, (n, n))"
_OTHERS = {
    "identity": """\
H = torch.eye(n, dtype=dtype, device=X.device).expand(*z.shape[:-1], n, n)
""",
    "circulant": f"""\
{LOGITS}
index = torch.arange(n, device=X.device)
shifts = ((index[:, None] + index) % n)[..., None] == index  # [n, n, n]
H = (torch.softmax(logits, dim=-1) @ shifts.flatten(-2).to(dtype)).unflatten(-1, (n, n))
""",
    "permutations": f"""\
{LOGITS}
order = torch.tensor(list(itertools.permutations(range(n))), device=X.device)
permutations = order[..., None] == torch.arange(n, device=X.device)  # [n!, n, n]
H = (torch.softmax(logits, dim=-1) @ permutations.flatten(-2).to(dtype)).unflatten(-1, (n, n))
""",
    "kronecker": f"""\
{LOGITS}
difference = logits[..., 0::2] - logits[..., 1::2]  # of keeping and swapping, a factor of 2 x 2 each
index = torch.arange(n, device=X.device)
H = z.new_ones(*z.shape[:-1], n, n)
for k in range(difference.shape[-1]):
    swapped = ((index[:, None] ^ index) >> (difference.shape[-1] - 1 - k)) & 1
    H = H * torch.sigmoid(difference[..., k, None, None] * (1 - 2 * swapped))
""",
    "transportation": f"""\
{LOGITS}
gates = torch.sigmoid(logits)
columns, rows = [torch.ones_like(z[..., 0])] * n, []  # what is left of every column
for i in range(n - 1):
    left, entries = torch.ones_like(z[..., 0]), []
    for j in range(n - 1):
        low = left - torch.stack(columns[j + 1 :]).sum(0)
        low, high = low.where(low > 0, 0.0), left.where(left < columns[j], columns[j])
        entries.append(low + (high - low) * gates[..., i * (n - 1) + j])
        left, columns[j] = left - entries[j], columns[j] - entries[j]
    columns[-1] = columns[-1] - left
    rows.append(torch.stack([*entries, left.where(left > 0, 0.0)], -1))
H = torch.stack([*rows, torch.stack([c.where(c > 0, 0.0) for c in columns], -1)], -2)
""",
}
"""The manifolds whose matrices need no iteration (`mhc_compile.kernels.reference.mixing_matrix`)."""
_FIRST = {
    "circulant": "mixing[0] = 0.0",
    "permutations": "mixing[0] = 0.0",
    "kronecker": "mixing[::2] = 0.0",
    "transportation": "mixing[::STREAMS] = 8.0",
}
"""What puts the bias of H next to the identity; all else is -8."""


def mixing(spec: StreamSpec) -> list[str]:
    """Return the lines that compute H `[..., n, n]` from the projection `z`."""
    if spec.manifold in _OTHERS:
        return _OTHERS[spec.manifold].splitlines()
    turned = ".transpose(-1, -2)" if spec.convention.fields.transposed else ""
    if spec.manifold == "unconstrained":
        return [SQUARE, f"H = logits{turned}"]
    return [SQUARE, *_sinkhorn(spec), *([f"H = H{turned}"] if turned else [])]


def mixing_imports(spec: StreamSpec) -> list[str]:
    """Return the imports that the lines of `mixing` need beside PyTorch."""
    return ["import itertools"] if spec.manifold == "permutations" else []


def mixing_start(spec: StreamSpec) -> list[str]:
    """Return the lines that make `mixing`, the start of the bias of H (`mhc_compile.kernels.start.start_bias`)."""
    if spec.manifold in _FIRST:
        return [f"mixing = torch.full(({spec.mix_rows},), -8.0)", *([_FIRST[spec.manifold]] if spec.mix_rows else [])]
    bias = start_bias(spec, 0).tolist()
    off = bias[-2] if spec.streams > 1 else bias[-1]
    return [f"mixing = torch.full((STREAMS, STREAMS), {off + 0.0})", f"mixing.fill_diagonal_({bias[-1] + 0.0})"]


def _sinkhorn(spec: StreamSpec) -> list[str]:
    """Return the lines from the logits `[..., n, n]` to a doubly stochastic H, in the published orientation."""
    fields = spec.convention.fields
    out: list[str] = []
    if fields.start == "softmax_eps":
        out.append(f"H = torch.softmax(logits, dim=-1) + {fields.sinkhorn_eps}")
    else:
        columns = fields.start == "exp_colmax"
        detach = ".detach()" if spec.iterations else ""
        out.append(f"shifted = logits - logits.amax({-2 if columns else -1}, keepdim=True){detach}")
        out.append("H = torch.exp(shifted.clamp(min=-60.0))" if columns else "H = torch.exp(shifted)")
    match fields.order:
        case "columns_rows":
            order, count = [-2, -1], spec.iterations
        case "rows_columns":
            order, count = [-1, -2], spec.iterations
        case _:
            order, count = [-1, -2], max(spec.iterations - 1, 0)
            if spec.iterations:
                out += _step(spec, -2)
    if fields.divisor == "clamp":
        # Entries too small for a gradient that does not overflow.
        out.append("tiny = 1e8 * torch.finfo(dtype).tiny")
    return [*out, f"for _ in range({count}):", *("    " + line for axis in order for line in _step(spec, axis))]


def _step(spec: StreamSpec, axis: int) -> list[str]:
    """Return the lines that make the sums along `axis` 1."""
    fields, total = spec.convention.fields, f"H.sum({axis}, keepdim=True)"
    match fields.divisor:
        case "plain":
            return [f"H = H / {total}"]
        case "add_eps":
            return [f"H = H / ({total} + {fields.sinkhorn_eps})"]
        case "clamp":
            quotient = f"quotient = H / {total}.clamp(min={fields.sinkhorn_eps})"
            return [quotient, "H = quotient.where(H > tiny, quotient.detach())"]
