"""Triton for the backward of a chain: one kernel over blocks of tokens, and one for phi's gradient.

`backward`: the weights' gradients <dh, X'> in a first loop over the columns (of LayerNorm in a second, after its mean);
the n x n arithmetic backwards; then G, the gradient of X' (from X' itself, from h, from the projection and its norm),
and from G those of X, y, post and H. X' is recomputed from X and y. `phi_gradient` forms du.T @ X' over fixed
ranges of tokens, whose partial sums are added in their order: two runs are bit-equal.
"""

from __future__ import annotations

import torch

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.mixtures import gradient_text, group_size
from mhc_compile.kernels.target import Source
from mhc_compile.kernels.triton import norm, text
from mhc_compile.kernels.triton.coefficients import entries, matrix, mix_row, mixture_weights, site_functions
from mhc_compile.kernels.triton.forward import logit, pre
from mhc_compile.kernels.triton.transportation import fill, fill_backward

PARAMETERS = ("phi", "alpha", "bias", "norm_weight", "norm_bias")

# A matrix instruction leaves two neighbours of a row to a thread: their sum halves the registers without an exchange.
PAIRS = """\
@triton.jit
def pairs(x, WIDTH: tl.constexpr):
    if WIDTH < x.shape[1]:
        x = tl.sum(tl.reshape(x, [x.shape[0], WIDTH, 2]), 2)
    return x
"""


def backward_source(chain: Chain) -> Source:
    """Return the whole Python file of the chain's backward: `backward`, `phi_gradient` and what they call."""
    parts = [text.header(chain, "backward")]
    if _adds_pairs(chain):
        parts.append(PAIRS)
    if functions := site_functions(chain, backward=True):
        parts.append(functions)
    body = [*text.token_lines(), *text.site_lines(chain)]
    if chain.projects:
        if chain.norm != "none":
            body += [*_weights(chain), *norm.weigh(chain)]
            body += _store_given(chain) if chain.given else []
        elif chain.weighs_itself:
            body += _weigh(chain)
        body += _site_backward(chain)
        # Emitted again: kept, they would fill the registers that Sinkhorn needs.
        body += text.site_lines(chain)
    if chain.given or chain.weighs_itself:
        body += _weights(chain)
    parts.append(text.kernel("backward", backward_pointers(chain), ("tokens", "x_stride"), body + _gradients(chain)))
    if chain.projects:
        pointers = ("X", *(("y", "post", "mix") if chain.mixes else ()), "du", "partial")
        parts.append(text.kernel("phi_gradient", pointers, ("tokens", "per_split", "x_stride"), _phi_gradient(chain)))
    return Source("\n\n".join(parts), _passes(chain))


def _passes(chain: Chain) -> dict[str, int]:
    """Count the passes over each wide value.

    Streams, branch and d_h are read for the weights' gradients, for those of X, and for phi's.
    """
    passes = dict.fromkeys(chain.wide("backward"), 1)
    weighs = {"none": int(chain.weighs_itself), "rms": 1, "layer": 2}[chain.norm]
    reads = weighs + (chain.mixes or chain.projects or chain.given) + chain.projects
    passes |= {name: reads for name in ("X", "y") if name in passes}
    if chain.collapses:
        passes["d_h"] = 1 + (weighs > 0)
    return {name: count for name, count in passes.items() if count}


def backward_pointers(chain: Chain) -> tuple[str, ...]:
    """Return the kernel's tensors: the signature's, and what the gradients of parameters are summed from."""
    taken = tuple(name for name in chain.outputs("backward") if name.removeprefix("d_") not in PARAMETERS)
    extra = (*(("dlogits", "du", "sums") if chain.projects else ()), *(("norm_sums",) if chain.norm != "none" else ()))
    return (*chain.inputs("backward"), *taken, *extra)


def _weigh(chain: Chain) -> list[str]:
    """Emit the gradients `dw_i` of the weights, <dh, x_i>.

    Where the chain mixes they are sums of <dh, branch> and <dh, in_j>, which are a quarter of the work.
    """
    n, mixes = chain.stream.streams, chain.mixes
    names = ["branch", *(f"in_{j}" for j in range(n))] if mixes else [f"x_{i}" for i in range(n)]
    lines = [f"along_{name} = tl.zeros([BT], tl.float32)" for name in names]
    body = [*text.input_lines(chain), f"dh = {text.load('d_h + at_y')}"]
    body += [f"along_{name} += tl.sum(dh * {name}, 1)" for name in names]
    lines += text.loop(chain, body, tiles=4)
    for i in range(n):
        terms = [f"post_{i} * along_branch", *(f"H_{i}{j} * along_in_{j}" for j in range(n))]
        lines.append(f"dw_{i} = {' + '.join(terms) if mixes else f'along_x_{i}'}")
    return lines


def _inverse_rms(chain: Chain) -> list[str]:
    lines = []
    for g in range(chain.groups):
        lines.append(f"squares_{g} = tl.load({text.z_at(chain, chain.groups * chain.rows + g)}, live, other=0.0)")
        lines.append(f"s_{g} = inverse_rms(squares_{g})")
    return lines


def _weights(chain: Chain) -> list[str]:
    """Emit `w_i`: given, or from z."""
    if chain.given:
        return [f"w_{i} = tl.load(pre + token * {chain.n} + {i}, live, other=0.0)" for i in range(chain.n)]
    return [*_inverse_rms(chain), *(f"w_{i} = {pre(chain, i)}" for i in range(chain.n))]


def _store_given(chain: Chain) -> list[str]:
    return [f"tl.store(d_pre + token * {chain.n} + {i}, dw_{i}, live)" for i in range(chain.n)]


def _site_backward(chain: Chain) -> list[str]:
    """Emit du [tokens, groups * rows] and `scale`, from `dw_i`.

    `scale` times X' is the gradient through the norm.
    """
    lines = _inverse_rms(chain)
    if not chain.weighs_itself and chain.weights == "site":
        lines += [f"dw_{i} = tl.load(d_next_pre + token * {chain.n} + {i}, live, other=0.0)" for i in range(chain.n)]
    lines += _flows_of_outputs(chain) if chain.is_hyper_connection else _flows_of_logits(chain)
    # Threads read now what others of the program have written: all rows in one tile.
    lines += ["tl.debug_barrier()", f"row = tl.arange(0, {text.padded_rows(chain)})"]
    for g in range(chain.groups):
        lines += _group_backward(chain, g)
    return lines


def _flows_of_outputs(chain: Chain) -> list[str]:
    """Emit the loads of the gradients of pre, post and H of Hyper-Connections, in the order of the rows of phi."""
    n, lines = chain.n, []
    for i in range(n):
        lines.append(_keep(chain, i * chain.rows, f"dw_{i}"))
        at = {1: f"d_next_post + token * {n} + {i}"}
        at |= {2 + j: f"d_next_mix + token * {n * n} + {j * n + i}" for j in range(n)}
        lines += [_keep(chain, i * chain.rows + r, f"tl.load({x}, live, other=0.0)") for r, x in at.items()]
    return lines


def _flows_of_logits(chain: Chain) -> list[str]:
    n, fields, lines = chain.n, chain.stream.convention.fields, []
    for i in range(n):
        lines.append(f"gate = tl.sigmoid({logit(chain, i)})")
        lines.append(_keep(chain, i, f"dw_{i} * gate * (1.0 - gate)"))
    if chain.weights == "site":
        for i in range(n):
            lines.append(f"gate = tl.sigmoid({logit(chain, n + i)})")
            flow = f"tl.load(d_next_post + token * {n} + {i}, live, other=0.0)"
            lines.append(_keep(chain, n + i, f"{fields.post_scale!r} * {flow} * gate * (1.0 - gate)"))
        lines += _mix_backward(chain)
    return lines


def _group_backward(chain: Chain, g: int) -> list[str]:
    """Emit the gradients of a group's projections, of its norm, of bias and alpha, from those in `dlogits`."""
    n, rows, U = chain.n, chain.rows, chain.groups * chain.rows
    inside = f"live[:, None] & (row < {rows})[None, :]"
    which = "row * 0" if chain.weights == "head" else f"tl.where(row < {n}, 0, tl.where(row < {2 * n}, 1, 2))"
    flow = f"dlogit * tl.load(alpha + {which})[None, :]"
    value = f"u * s_{g}[:, None]"
    if chain.is_hyper_connection:
        flow = "dlogit * tl.load(alpha + tl.where(row == 1, 1, 0))[None, :] * (1.0 - value * value)"
        value = f"tanh({value})"
    return [
        f"dlogit = tl.load(dlogits + token[:, None] * {U} + {g * rows} + row[None, :], {inside}, other=0.0)",
        f"u = tl.load(z + token[:, None] * {U + chain.groups} + {g * rows} + row[None, :], {inside}, other=0.0)",
        f"value = {value}",
        f"du_{g} = {flow}",
        f"ds = tl.sum(du_{g} * u, 1)",
        f"scale_{g} = inverse_rms_backward(ds, s_{g}, squares_{g})",
        f"du_{g} = du_{g} * s_{g}[:, None]",
        f"tl.store(du + token[:, None] * {U} + {g * rows} + row[None, :], du_{g}, {inside})",
        # What this block of tokens adds to the gradients of bias and, row by row, of alpha.
        f"block = tl.program_id(0).to(tl.int64) * {2 * U} + {g * rows} + row",
        f"tl.store(sums + block, tl.sum(dlogit, 0), row < {rows})",
        f"tl.store(sums + block + {U}, tl.sum(dlogit * value, 0), row < {rows})",
    ]


def _keep(chain: Chain, row: int, vector: str) -> str:
    return f"tl.store(dlogits + token * {chain.groups * chain.rows} + {row}, {vector}, live)"


def _mix_backward(chain: Chain) -> list[str]:
    if chain.stream.manifold == "identity":
        return []
    n = chain.stream.streams
    if chain.mixture:
        return _mixture_backward(chain)
    if chain.fills:
        return _fill_backward(chain)
    row_of = mix_row(chain)
    at = {row_of(i, j): i * n + j for i in range(n) for j in range(n)}
    # f: the gradient of H in the published orientation, which is the one of phi's rows.
    lines = [
        f"{name} = tl.load(d_next_mix + token * {n * n} + {at[2 * n + k]}, live, other=0.0)"
        for k, name in enumerate(entries(n, "f"))
    ]
    if chain.stream.manifold == "sinkhorn":
        lines += [f"{name} = {logit(chain, 2 * n + k)}" for k, name in enumerate(entries(n, "m"))]
        lines.append(f"{matrix(n, 'f')} = sinkhorn_backward({matrix(n, 'm', 'f')})")
    return lines + [_keep(chain, 2 * n + k, name) for k, name in enumerate(entries(n, "f"))]


def _flows_of_mix(chain: Chain) -> list[str]:
    """Emit the loads of `f_ij`, the gradients of H."""
    at = f"d_next_mix + token * {chain.n**2}"
    return [f"{name} = tl.load({at} + {k}, live, other=0.0)" for k, name in enumerate(entries(chain.n, "f"))]


def _fill_backward(chain: Chain) -> list[str]:
    first, spec = 2 * chain.n, chain.stream
    lines = [*_flows_of_mix(chain), *fill(spec, lambda k: logit(chain, first + k)), *fill_backward(spec)]
    return [*lines, *(_keep(chain, first + k, f"flow_{k}") for k in range(spec.mix_rows))]


def _mixture_backward(chain: Chain) -> list[str]:
    n, spec, size = chain.stream.streams, chain.stream, group_size(chain.stream)
    lines = _flows_of_mix(chain)
    lines += mixture_weights(spec, lambda k: logit(chain, 2 * n + k))
    lines += [f"flow_{row} = {gradient_text(spec, row, 'mix_{}', 'f_{}{}')}" for row in range(spec.mix_rows)]
    for first in range(0, spec.mix_rows, size):
        group = range(first, first + size)
        lines.append("mix_common = " + " + ".join(f"mix_{k} * flow_{k}" for k in group))
        lines += [_keep(chain, 2 * n + k, f"mix_{k} * (flow_{k} - mix_common)") for k in group]
    return lines


def _gradients(chain: Chain) -> list[str]:
    """Emit G, and from it the gradients of the inputs."""
    n, weighs = chain.n, chain.given and chain.norm == "none"
    lines: list[str] = []
    if weighs:
        lines += [f"dw_{i} = tl.zeros([BT], tl.float32)" for i in range(n)]
    sums, add = ("WIDTH", "pairs({}, WIDTH)") if _adds_pairs(chain) else ("BK", "{}")
    if _adds_pairs(chain):
        # Without matrix instructions a thread has no neighbours.
        width = "BK // 2" if chain.streams_dtype != torch.float32 else 'BK // 2 if PRECISION == "tf32x3" else BK'
        lines.append(f"WIDTH: tl.constexpr = {width}")
    if chain.mixes:
        lines += [f"dpost_{i} = tl.zeros([BT, {sums}], tl.float32)" for i in range(n)]
        lines += [f"{name} = tl.zeros([BT, {sums}], tl.float32)" for name in entries(n, "dH")]
    body = text.stream_lines(chain) if chain.mixes or chain.projects or chain.given else []
    if chain.norm != "none":
        body += norm.gradient(chain)
    elif chain.collapses:
        body.append(f"dh = {text.load('d_h + at_y')}")
    for i in range(n):
        body.append(f"g = {_gradient_of_stream(chain, i)}")
        if chain.projects:
            body.append(f"p = {text.phi_tile(chain, i, rows_first=True)}")
            body.append(f"g = tl.dot(du_{i % chain.groups}, p, g, input_precision=PRECISION)")
        if weighs:
            body.append(f"dw_{i} += tl.sum(dh * x_{i}, 1)")
        if not chain.mixes:
            body.append(f"tl.store(d_X + at + {i * chain.width}, g, inside)")
            continue
        plus = "=" if i == 0 else "+="
        body.append(f"dpost_{i} += {add.format('g * branch')}")
        body += [f"dH_{i}{j} += {add.format(f'g * in_{j}')}" for j in range(n)]
        body.append(f"dy {plus} post_{i}[:, None] * g")
        body += [f"dx_{j} {plus} H_{i}{j}[:, None] * g" for j in range(n)]
    if chain.mixes:
        body.append("tl.store(d_y + at_y, dy, inside)")
        body += [f"tl.store(d_X + at + {j * chain.width}, dx_{j}, inside)" for j in range(n)]
    lines += text.loop(chain, body, backwards=chain.projects)
    if weighs:
        lines += _store_given(chain)
    if chain.mixes:
        lines += [f"tl.store(d_post + token * {n} + {i}, tl.sum(dpost_{i}, 1), live)" for i in range(n)]
        for k, name in enumerate(entries(n, "dH")):
            lines.append(f"tl.store(d_mix + token * {n * n} + {k}, tl.sum({name}, 1), live)")
    return lines


def _adds_pairs(chain: Chain) -> bool:
    """Return whether the gradients of post and H are summed by `pairs`, as a matrix instruction's layout is large."""
    return chain.mixes and chain.projects


def _gradient_of_stream(chain: Chain, i: int) -> str:
    """Return the text of G of stream i without the projection's part."""
    terms = []
    if chain.keeps_streams:
        terms.append(text.load(f"d_next_X + at + {i * chain.width}"))
    if chain.collapses:
        constant = {"mean": f"{1 / chain.stream.streams!r}", "sum": "1.0"}.get(chain.weights)
        terms.append(f"{constant or f'w_{i}[:, None]'} * dh")
    if chain.projects:
        terms.append(f"scale_{i % chain.groups}[:, None] * x_{i}")
    return " + ".join(terms)


def _phi_gradient(chain: Chain) -> list[str]:
    """Emit `phi_gradient`: one program per block of columns and range of tokens, partial [splits, rows, span]."""
    n, rows, width, pad = chain.n, chain.rows, chain.width, text.padded_rows(chain)
    groups, parts = chain.groups, n // chain.groups
    body = ["token = t0 + tl.arange(0, BT)", "live = token < tokens", *text.site_lines(chain)]
    body += [*text.column_lines(chain)[1:], *text.stream_lines(chain)]
    there = f"live[:, None] & (row < {rows})[None, :]"
    at = f"du + token[:, None] * {groups * rows} + row[None, :]"
    body += [f"d_{g} = tl.load({at} + {g * rows}, {there}, other=0.0)" for g in range(groups)]
    body += [text.add_dot(chain, f"tl.trans(x_{i})", f"d_{i % groups}", f"sum_{i // groups}") for i in range(n)]
    return [
        "c = tl.program_id(0) * BK + tl.arange(0, BK)",
        f"row = tl.arange(0, {pad})",
        "first = tl.program_id(1).to(tl.int64) * per_split",
        *(f"sum_{i} = tl.zeros([BK, {pad}], tl.float32)" for i in range(parts)),
        "for t0 in range(first, first + per_split, BT):",
        *text.indent(body, 1),
        f"out = partial + tl.program_id(1).to(tl.int64) * {rows * chain.span}",
        f"out = out + row[None, :] * {chain.span} + c[:, None]",
        f"there = (c < {width})[:, None] & (row < {rows})[None, :]",
        *(f"tl.store(out + {i * width}, sum_{i}, there)" for i in range(parts)),
    ]
