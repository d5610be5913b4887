"""Triton for the forward of a chain: one kernel, one block of tokens per program.

The first loop over the columns mixes the streams, writes them and projects them on phi; the coefficients are computed
with a vector of tokens for every entry; the second loop weighs the streams, which the first has left in the caches.
Where the branch begins with a norm, one more loop (of LayerNorm two) goes over the h that the second has written.
"""

from __future__ import annotations

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.mixtures import entries_of, entry_text
from mhc_compile.kernels.target import Source
from mhc_compile.kernels.triton import norm, text
from mhc_compile.kernels.triton.coefficients import bias_row, entries, matrix, mix_row, mixture_weights, site_functions
from mhc_compile.kernels.triton.transportation import fill


def forward_source(chain: Chain) -> Source:
    """Return the whole Python file of the chain's forward: the kernel `forward` and what it calls."""
    parts = [text.header(chain, "forward")]
    if functions := site_functions(chain, backward=False):
        parts.append(functions)
    body = [*text.token_lines(), *text.site_lines(chain), *_weights_known_before(chain)]
    body += _with_coefficients(chain) if chain.projects else _in_one_pass(chain)
    parts.append(text.kernel("forward", (*chain.inputs(), *chain.outputs()), ("tokens", "x_stride"), body))
    return Source("\n\n".join(parts), _passes(chain))


def _passes(chain: Chain) -> dict[str, int]:
    """Count the passes over each wide value: aggregating rereads the streams after projecting, a norm rereads h."""
    passes = dict.fromkeys(chain.wide("forward"), 1)
    if chain.weighs_itself:
        again = ("next_X",) if chain.keeps_streams else ("X", "y")
        passes |= {name: 2 for name in again if name in passes}
    if chain.projects and chain.collapses:
        passes["h"] += {"none": 0, "rms": 2, "layer": 3}[chain.norm]
    return passes


def _weights_known_before(chain: Chain) -> list[str]:
    """Emit `w_i` for chains whose weights do not depend on the streams."""
    n = chain.stream.streams
    if chain.given:
        return [f"w_{i} = tl.load(pre + token * {n} + {i}, live, other=0.0)[:, None]" for i in range(n)]
    if chain.weights in ("mean", "sum"):
        return [f"w_{i} = {1 / n if chain.weights == 'mean' else 1.0!r}" for i in range(n)]
    return []


def _write_streams(chain: Chain) -> list[str]:
    if not chain.keeps_streams:
        return []
    return [f"tl.store(next_X + at + {i * chain.width}, x_{i}, inside)" for i in range(chain.stream.streams)]


def _collapse(chain: Chain) -> list[str]:
    lines = [f"hidden = {norm.weighed(chain, 'w_{}')}", "tl.store(h + at_y, hidden, inside)"]
    return lines if chain.norm == "none" else [*lines, *norm.add_up(chain)]


def _in_one_pass(chain: Chain) -> list[str]:
    body = [*text.stream_lines(chain), *_write_streams(chain)]
    return text.loop(chain, body + (_collapse(chain) if chain.collapses else []))


def _with_coefficients(chain: Chain) -> list[str]:
    n, rows, groups = chain.n, chain.rows, chain.groups
    # What is read again goes last from the caches, what is read once first.
    again = not chain.keeps_streams and chain.weighs_itself
    project = [*text.stream_lines(chain, "" if again else "evict_first"), *_write_streams(chain)]
    for g in range(groups):
        squares = " + ".join(f"x_{i} * x_{i}" for i in range(g, n, groups))
        project.append(f"squares_{g} += tl.sum({squares}, 1)")
    for i in range(n):
        g = i % groups
        if i % groups == 0 or groups == 1:
            project.append(f"p = {text.phi_tile(chain, i, rows_first=False)}")
        project.append(text.add_dot(chain, f"x_{i}", "p", f"u_{g}"))
    if chain.given:
        project += _collapse(chain)
    inside, at = f"live[:, None] & (row < {rows})[None, :]", f"z + token[:, None] * {groups * (rows + 1)}"
    lines = [
        f"row = tl.arange(0, {text.padded_rows(chain)})",
        *(f"u_{g} = tl.zeros([BT, {text.padded_rows(chain)}], tl.float32)" for g in range(groups)),
        *(f"squares_{g} = tl.zeros([BT], tl.float32)" for g in range(groups)),
        *([norm.START] if chain.given and chain.norm != "none" else []),
        *text.loop(chain, project),
        *(f"tl.store({at} + {g * rows} + row[None, :], u_{g}, {inside})" for g in range(groups)),
        *(f"tl.store({text.z_at(chain, groups * rows + g)}, squares_{g}, live)" for g in range(groups)),
        # Threads read now what others of the program have written: z with a token a lane, and the streams.
        "tl.debug_barrier()",
        *coefficient_lines(chain),
    ]
    if "next_pre" in chain.outputs():
        lines += [f"tl.store(next_pre + token * {n} + {i}, w_{i}, live)" for i in range(n)]
    if chain.weights == "site":
        lines += _write_post_and_mix(chain)
    if not chain.weighs_itself:
        return lines if chain.norm == "none" else [*lines, *norm.normalise(chain)]
    lines += [f"w_{i} = w_{i}[:, None]" for i in range(n)]
    if chain.keeps_streams:
        streams = [f"x_{i} = {text.load(f'next_X + at + {i * chain.width}', 'evict_first')}" for i in range(n)]
    else:
        streams = text.stream_lines(chain)
    weigh = text.loop(chain, [*streams, *_collapse(chain)], backwards=True)
    return [*lines, *weigh] if chain.norm == "none" else [*lines, norm.START, *weigh, *norm.normalise(chain)]


def coefficient_lines(chain: Chain) -> list[str]:
    """Emit `w_i`, and where Sinkhorn computes the mixing matrix, its entries `m_ij` in the published orientation."""
    n = chain.n
    lines = [f"s_{g} = inverse_rms(squares_{g})" for g in range(chain.groups)]
    lines += [f"w_{i} = {pre(chain, i)}" for i in range(n)]
    if chain.uses_sinkhorn:
        lines += [f"{name} = {logit(chain, 2 * n + k)}" for k, name in enumerate(entries(n, "m"))]
        lines.append(f"{matrix(n, 'm')} = sinkhorn({matrix(n, 'm')})")
    if chain.fills:
        lines += fill(chain.stream, lambda k: logit(chain, 2 * n + k))
    if chain.mixture:
        lines += mixture_weights(chain.stream, lambda k: logit(chain, 2 * n + k))
    return lines


def logit(chain: Chain, row: int) -> str:
    """Return the text of one row's logit from z in memory, for a vector of tokens."""
    which = 0 if chain.weights == "head" else min(row // chain.stream.streams, 2)
    u = f"tl.load({text.z_at(chain, row)}, live, other=0.0)"
    return f"{u} * s_0 * tl.load(alpha + {which}) + tl.load(bias + {row})"


def hyper_connection(chain: Chain, i: int, row: int) -> str:
    """Return the text of a Hyper-Connections coefficient: stream `i`, row `row` of phi, for a vector of tokens."""
    at = i * chain.rows + row
    u = f"tl.load({text.z_at(chain, at)}, live, other=0.0)"
    return f"tl.load(alpha + {int(row == 1)}) * tanh({u} * s_{i}) + tl.load(bias + {bias_row(chain, at)})"


def pre(chain: Chain, i: int) -> str:
    """Return the text of the weight of stream `i`, for a vector of tokens."""
    if chain.is_hyper_connection:
        return hyper_connection(chain, i, 0)
    eps = chain.stream.convention.fields.pre_eps
    return f"tl.sigmoid({logit(chain, i)}){f' + {eps!r}' if eps else ''}"


def _write_post_and_mix(chain: Chain) -> list[str]:
    n, fields = chain.stream.streams, chain.stream.convention.fields
    eps = f" + {fields.post_eps!r}" if fields.post_eps else ""
    lines = []
    if chain.is_hyper_connection:
        for i in range(n):
            lines.append(f"tl.store(next_post + token * {n} + {i}, {hyper_connection(chain, i, 1)}, live)")
            for j in range(n):
                entry = hyper_connection(chain, i, 2 + j)
                lines.append(f"tl.store(next_mix + token * {n * n} + {j * n + i}, {entry}, live)")
        return lines
    for i in range(n):
        value = f"{fields.post_scale!r} * tl.sigmoid({logit(chain, n + i)}){eps}"
        lines.append(f"tl.store(next_post + token * {n} + {i}, {value}, live)")
    source, mixture = mix_row(chain), entries_of(chain.stream)
    for i in range(n):
        for j in range(n):
            if chain.fills:
                entry = f"m_{i}{j}"
            elif chain.stream.manifold == "sinkhorn":
                entry = f"m_{j}{i}" if fields.transposed else f"m_{i}{j}"
            elif chain.stream.manifold == "unconstrained":
                entry = logit(chain, source(i, j))
            elif chain.mixture:
                entry = entry_text(mixture[i][j], "mix_{}")
            else:
                entry = f"tl.full([BT], {float(i == j)!r}, tl.float32)"
            lines.append(f"tl.store(next_mix + token * {n * n} + {i * n + j}, {entry}, live)")
    return lines
