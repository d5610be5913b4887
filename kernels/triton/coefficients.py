"""Triton for the n x n arithmetic of a site, one vector of tokens per entry: logits -> H and its gradient.

The equations are those of `mhc_compile.kernels.reference` (arXiv 2512.24880, Eq. 7-9). The backward recomputes
Sinkhorn's iterates: some are kept in registers, and each of the others is reached from the kept one before it, so that
no memory is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.mixtures import group_size
from mhc_compile.kernels.reference import LOGIT_FLOOR, sinkhorn_axes, vanishing
from mhc_compile.kernels.spec import StreamSpec

# Values per token that the backward of Sinkhorn keeps in registers, besides the matrix and the gradient it works on. In
# float32 streams wait for memory: a second program on a multiprocessor is worth more than fewer steps.
KEPT_VALUES = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
SUMS = {-2: "Columns sum to 1 afterwards.", -1: "Rows sum to 1 afterwards."}


def entries(n: int, name: str) -> list[str]:
    """Return the names of a matrix's entries, row-major: `m_00`, `m_01`, ..."""
    return [f"{name}_{i}{j}" for i in range(n) for j in range(n)]


def matrix(n: int, *names: str) -> str:
    """Return the entries of matrices as arguments, results or targets of a function; a single one is a tuple too."""
    names_of_entries = [entry for name in names for entry in entries(n, name)]
    return ", ".join(names_of_entries) if len(names_of_entries) > 1 else f"{names_of_entries[0]},"


def line(n: int, name: str, axis: int, a: int) -> list[str]:
    """Return the entries whose sum divides: those of row `a` (axis -1) or of column `a` (axis -2)."""
    return [f"{name}_{a}{b}" if axis == -1 else f"{name}_{b}{a}" for b in range(n)]


def function(name: str, arguments: str, body: list[str], results: str, says: str = "") -> str:
    """Return the text of a Triton function."""
    doc = [f"    # {says}"] if says else []
    lines = ["@triton.jit", f"def {name}({arguments}):", *doc, *(f"    {b}" for b in body)]
    return "\n".join([*lines, f"    return {results}\n"])


def inverse_rms(chain: Chain) -> str:
    """Return the text of `inverse_rms`, from a group's sum of squares to s, and of its backward.

    The gradient of a value is the value times `inverse_rms_backward`, where ds is the gradient of s.
    """
    fields = chain.stream.convention.fields
    share, eps = 1.0 / chain.span, fields.rms_eps
    if fields.rms_inside:
        forward = f"1.0 / tl.sqrt(squares * {share!r} + {eps!r})"
        return function("inverse_rms", "squares", [], forward) + "\n\n" + function(
            "inverse_rms_backward", "ds, s, squares", [], f"-{share!r} * ds * s * s * s"
        )  # fmt: skip
    forward = f"1.0 / (tl.sqrt(squares * {share!r}) + {eps!r})"
    return function("inverse_rms", "squares", [], forward) + "\n\n" + function(
        "inverse_rms_backward", "ds, s, squares", [
            f"rms = tl.sqrt(squares * {share!r})",
            "safe = tl.where(rms > 0.0, rms, 1.0)",
        ], f"tl.where(rms > 0.0, -{share!r} * ds * s * s / safe, 0.0)",
    )  # fmt: skip


def sinkhorn_source(spec: StreamSpec, *, backward: bool, kept_values: int) -> str:
    """Return the text of `sinkhorn(m)` or `sinkhorn_backward(logits, flow)`, in the published orientation."""
    n, axes = spec.streams, sinkhorn_axes(spec)
    m = matrix(n, "m")
    first, second = axes[0], -3 - axes[0]
    parts = [
        function("start", m, list(_start(spec)), m),
        function("first_step", m, list(_step(spec, first)), m, SUMS[first]),
        function("second_step", m, list(_step(spec, second)), m, SUMS[second]),
    ]
    pairs, odd = divmod(len(axes), 2)
    iterate = f"{m} = second_step(*first_step({m}))"
    if not backward:
        body = [f"{m} = start({m})", f"for _ in range({pairs}):", f"    {iterate}"]
        body += [f"{m} = first_step({m})"] * odd
        return "\n\n".join([*parts, function("sinkhorn", m, body, m)])
    f = matrix(n, "f")
    both = matrix(n, "m", "f")
    parts += [
        function("first_step_backward", both, list(_step_backward(spec, first)), f),
        function("second_step_backward", both, list(_step_backward(spec, second)), f),
        function("start_backward", both, list(_start_backward(spec)), f),
        function("sinkhorn_backward", both, list(_walk_back(spec, pairs, odd, kept_values)), f),
    ]
    return "\n\n".join(parts)


def _walk_back(spec: StreamSpec, pairs: int, odd: int, kept_values: int) -> Iterator[str]:
    """Emit the steps from the last iterate to the logits `m`; `f` is the gradient of H, in the end of the logits."""
    n = spec.streams
    m, f, both, logits = matrix(n, "m"), matrix(n, "f"), matrix(n, "m", "f"), matrix(n, "logit")
    segments = min(pairs, max(1, kept_values // (n * n)))
    starts = [pairs * k // segments for k in range(segments)] if pairs else [0]
    ends = [*starts[1:], pairs]
    kept = [matrix(n, f"kept{k}") for k in range(len(starts))]
    yield f"{logits} = {m}"
    yield f"{kept[0]} = start({m})"
    for k in range(1, len(starts)):
        yield f"{kept[k]} = {kept[k - 1]}"
        yield f"for _ in range({starts[k] - starts[k - 1]}):"
        yield f"    {kept[k]} = second_step(*first_step({kept[k]}))"
    if odd:
        yield f"{m} = {kept[-1]}"
        yield f"for _ in range({pairs - starts[-1]}):"
        yield f"    {m} = second_step(*first_step({m}))"
        yield f"{f} = first_step_backward({both})"
    for k in reversed(range(len(starts))) if pairs else []:
        yield f"for back in range({ends[k] - starts[k]}):"
        yield f"    {m} = {kept[k]}"
        yield f"    for _ in range({ends[k] - starts[k] - 1} - back):"
        yield f"        {m} = second_step(*first_step({m}))"
        yield f"    {matrix(n, 'between')} = first_step({m})"
        yield f"    {f} = second_step_backward({matrix(n, 'between', 'f')})"
        yield f"    {f} = first_step_backward({both})"
    yield f"{f} = start_backward({matrix(n, 'logit', 'f')})"


def _nested(function: str, values: list[str]) -> str:
    text = values[0]
    for value in values[1:]:
        text = f"{function}({text}, {value})"
    return text


def _start(spec: StreamSpec) -> Iterator[str]:
    n, fields = spec.streams, spec.convention.fields
    axis = -2 if fields.start == "exp_colmax" else -1
    for a in range(n):
        along = line(n, "m", axis, a)
        yield f"peak = {_nested('tl.maximum', along)}"
        for value in along:
            shifted = f"{value} - peak"
            yield f"{value} = tl.exp({f'tl.maximum({shifted}, {LOGIT_FLOOR!r})' if axis == -2 else shifted})"
        if fields.start == "softmax_eps":
            yield f"inverse = 1.0 / ({' + '.join(along)})"
            for value in along:
                yield f"{value} = {value} * inverse + {fields.sinkhorn_eps!r}"


def _start_backward(spec: StreamSpec) -> Iterator[str]:
    n, fields = spec.streams, spec.convention.fields
    axis = -2 if fields.start == "exp_colmax" else -1
    for a in range(n):
        along, flow = line(n, "m", axis, a), line(n, "f", axis, a)
        yield f"peak = {_nested('tl.maximum', along)}"
        for value, f in zip(along, flow, strict=True):
            yield f"{value} = {value} - peak"
            if fields.start == "exp_colmax":
                yield f"{f} = tl.where({value} < {LOGIT_FLOOR!r}, 0.0, {f} * tl.exp({value}))"
            else:
                yield f"{value} = tl.exp({value})"
                if fields.start == "exp_rowmax":
                    yield f"{f} = {f} * {value}"
        if fields.start == "softmax_eps":
            yield f"inverse = 1.0 / ({' + '.join(along)})"
            for value in along:
                yield f"{value} = {value} * inverse"
            yield f"common = {_products(flow, along)}"
            for value, f in zip(along, flow, strict=True):
                yield f"{f} = {value} * ({f} - common)"


def _divisor(spec: StreamSpec, along: list[str]) -> str:
    fields, total = spec.convention.fields, " + ".join(along)
    return {
        "plain": total,
        "add_eps": f"{total} + {fields.sinkhorn_eps!r}",
        "clamp": f"tl.maximum({total}, {fields.sinkhorn_eps!r})",
    }[fields.divisor]


def _step(spec: StreamSpec, axis: int) -> Iterator[str]:
    for a in range(spec.streams):
        along = line(spec.streams, "m", axis, a)
        yield f"inverse = 1.0 / ({_divisor(spec, along)})"
        for value in along:
            yield f"{value} = {value} * inverse"


def _step_backward(spec: StreamSpec, axis: int) -> Iterator[str]:
    """Emit the backward of a step.

    q = m / d(sum m): dm = (dq - sum(dq * q)) / d, without the second term where the divisor is a constant.
    """
    n, fields = spec.streams, spec.convention.fields
    for a in range(n):
        along, flow = line(n, "m", axis, a), line(n, "f", axis, a)
        yield f"divisor = {_divisor(spec, along)}"
        yield "inverse = 1.0 / divisor"
        if fields.divisor == "clamp":
            for value, f in zip(along, flow, strict=True):
                yield f"{f} = tl.where({value} > {vanishing(torch.float32)!r}, {f}, 0.0)"
        yield f"common = ({_products(flow, along)}) * inverse"
        if fields.divisor == "clamp":
            yield f"common = tl.where(divisor > {fields.sinkhorn_eps!r}, common, 0.0)"
        for f in flow:
            yield f"{f} = ({f} - common) * inverse"


def _products(left: list[str], right: list[str]) -> str:
    return " + ".join(f"{a} * {b}" for a, b in zip(left, right, strict=True))


def mixture_weights(spec: StreamSpec, logit: Callable[[int], str]) -> list[str]:
    """Emit `mix_k`, the weights of a mixture of permutations, from the text of each logit."""
    lines, size = [], group_size(spec)
    for first in range(0, spec.mix_rows, size):
        names = [f"mix_{k}" for k in range(first, first + size)]
        lines += [f"{name} = {logit(first + k)}" for k, name in enumerate(names)]
        lines.append(f"mix_peak = {_nested('tl.maximum', names)}")
        lines += [f"{name} = tl.exp({name} - mix_peak)" for name in names]
        lines.append(f"mix_scale = 1.0 / ({' + '.join(names)})")
        lines += [f"{name} = {name} * mix_scale" for name in names]
    return lines


def site_functions(chain: Chain, *, backward: bool) -> str:
    """Return the text of the functions that compute a kernel's coefficients, or '' where the chain projects nothing."""
    if not chain.projects:
        return ""
    parts = [inverse_rms(chain)]
    if chain.is_hyper_connection:
        return "\n\n".join([*parts, function("tanh", "x", [], "2.0 * tl.sigmoid(2.0 * x) - 1.0")])
    if chain.uses_sinkhorn:
        kept = KEPT_VALUES[chain.streams_dtype]
        parts.append(sinkhorn_source(chain.stream, backward=backward, kept_values=kept))
    return "\n\n".join(parts)


def bias_row(chain: Chain, at: int) -> int:
    """Return the index into the bias of Hyper-Connections for stream `at // rows` and row `at % rows` of phi.

    Row 0 of phi computes the stream's entry of pre, row 1 that of post, row 2 + j its entry of H[j].
    """
    n = chain.n
    i, row = divmod(at, chain.rows)
    return row * n + i if row < 2 else 2 * n + i * n + row - 2


def mix_row(chain: Chain) -> Callable[[int, int], int]:
    """Return the map from (i, j) to the row of phi that produces `H[i][j]` of `sinkhorn` and `unconstrained`."""
    n, transposed = chain.stream.streams, chain.stream.convention.fields.transposed
    return lambda i, j: 2 * n + (j * n + i if transposed else i * n + j)
