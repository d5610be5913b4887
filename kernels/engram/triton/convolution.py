"""Triton for `inject`; the equations are those of `mhc_compile.kernels.engram.cpp.convolution`.

`statistics` finds r of every row; `forward` then has all it needs for any tile of tokens and columns. A program of
`walk`, which is the backward, goes through every `dilation`-th row of a sequence from one end of its chunk to the
other: what a tap reads now is what the next tap reads a step later, so that each value is read, and each dy computed,
once, but for taps - 1 steps at the chunk's end. It leaves dw, dv without its last term, and the sums over its columns,
from which `finish` forms da and dv. No sum depends on what runs first.
"""

from __future__ import annotations

from mhc_compile.kernels.engram.entry import Entry
from mhc_compile.kernels.engram.triton.tokens import header
from mhc_compile.kernels.triton.text import indent, kernel, load

NUMBERS = ("tokens", "length", "before", "x_stride")
POINTERS = {
    "statistics": ("a", "value", "r"),
    "forward": ("X", "a", "value", "reach", "conv_gain", "conv", "r", "next_X"),
    "walk": ("a", "value", "reach", "conv_gain", "conv", "d_next_X", "r", "dv", "sums", "partial"),
    "finish": ("a", "value", "r", "dv", "sums", "d_a", "d_value"),
}
"""The tensors of each kernel, in order: r [rows, n], dv [rows, C], sums [blocks of columns, rows, 2n], partial
[programs of the walk's first axis, n, taps, C], all float32, besides those of the entry."""


def forward_source(entry: Entry) -> str:
    """The whole Python file of the forward."""
    n, C, taps = entry.streams, entry.width, entry.spec.taps
    body = [
        "token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)",
        "live = token < tokens",
        "row = token + (token // length + 1) * before",
        "start = token // length * (length + before)",
        "c = tl.program_id(1) * BK + tl.arange(0, BK)",
        f"cols = c < {C}",
        "inside = live[:, None] & cols[None, :]",
        "far = tl.load(reach + token, live, other=0)",
    ]
    for k in range(taps):
        offset = (taps - 1 - k) * entry.spec.dilation
        tile = f"value + (row - {offset})[:, None] * {C} + c[None, :]"
        body += [
            f"there_{k} = live & (row - {offset} >= start) & (far >= {offset})",
            f"v_{k} = tl.load({tile}, there_{k}[:, None] & cols[None, :], other=0.0).to(tl.float32)",
        ]
    for i in range(n):
        body.append("y = tl.zeros([BT, BK], tl.float32)")
        for k in range(taps):
            at = f"(row - {(taps - 1 - k) * entry.spec.dilation}) * {n} + {i}"
            q = [f"tl.load({name} + {at}, there_{k}, other=0.0)" for name in ("a", "r")]
            body += [_weight(entry, i, k, "w"), f"y += w[None, :] * (({' * '.join(q)})[:, None] * v_{k})"]
        body += [
            f"gate = tl.load(a + row * {n} + {i}, live, other=0.0)[:, None]",
            f"x = {load(f'X + token[:, None] * x_stride + c[None, :] + {i * C}')}",
            f"there = next_X + token[:, None] * {n * C} + c[None, :] + {i * C}",
            f"tl.store(there, x + (gate * v_{taps - 1} + y * tl.sigmoid(y)), inside)",
        ]
    text = kernel("forward", POINTERS["forward"], NUMBERS, body, ("BT", "BK"))
    return header(entry, "forward") + _statistics(entry) + "\n\n" + text


def backward_source(entry: Entry) -> str:
    """The whole Python file of the backward."""
    parts = [_statistics(entry), _walk(entry), _finish(entry)]
    return header(entry, "backward") + "\n\n".join(parts)


def _weight(entry: Entry, i: int, k: int, name: str) -> str:
    C, taps = entry.width, entry.spec.taps
    gain, conv = f"conv_gain + {i * C} + c", f"conv + ({i * C} + c) * {taps} + {k}"
    return f"{name} = tl.load({gain}, cols, other=0.0) * tl.load({conv}, cols, other=0.0)"


def _row_lines() -> list[str]:
    return ["row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)", "live = row < rows"]


def _columns(entry: Entry, body: list[str]) -> list[str]:
    lines = [
        "c = c0 + tl.arange(0, BK)",
        f"inside = live[:, None] & (c < {entry.width})[None, :]",
        f"at_value = row[:, None] * {entry.width} + c[None, :]",
    ]
    return [f"for c0 in range(0, {entry.width}, BK):", *indent([*lines, *body], 1)]


def _statistics(entry: Entry) -> str:
    n = entry.streams
    body = [*_row_lines(), "squares = tl.zeros([BT, BK], tl.float32)"]
    body += _columns(entry, [f"v = {load('value + at_value')}", "squares += v * v"])
    body.append(f"mean = tl.sum(squares, 1) * {1 / entry.width!r}")
    for i in range(n):
        body += [
            f"gate = tl.load(a + row * {n} + {i}, live, other=0.0)",
            f"tl.store(r + row * {n} + {i}, 1.0 / tl.sqrt(gate * gate * mean + {float(entry.spec.eps)!r}), live)",
        ]
    return kernel("statistics", POINTERS["statistics"], ("rows",), body, ("BT", "BK"))


def _finish(entry: Entry) -> str:
    n = entry.streams
    body = [*_row_lines(), *(f"{name}_{i} = tl.zeros([BT], tl.float32)" for i in range(n) for name in ("flow", "z"))]
    body += [f"there = sums + row * {2 * n}", "for block in range(0, column_blocks):"]
    for i in range(n):
        body.append(f"    flow_{i} += tl.load(there + {i}, live, other=0.0)")
        body.append(f"    z_{i} += tl.load(there + {n + i}, live, other=0.0)")
    body.append(f"    there += rows.to(tl.int64) * {2 * n}")
    body.append("share = tl.zeros([BT], tl.float32)")
    for i in range(n):
        body += [
            f"gate = tl.load(a + row * {n} + {i}, live, other=0.0)",
            f"inverse = tl.load(r + row * {n} + {i}, live, other=0.0)",
            "q = gate * inverse",
            f"da = flow_{i} + {float(entry.spec.eps)!r} * inverse * inverse * inverse * z_{i}",
            f"tl.store(d_a + row * {n} + {i}, da, live)",
            f"share += z_{i} * q * q * q * {1 / entry.width!r}",
        ]
    last = f"{load('dv + at_value')} - share[:, None] * {load('value + at_value')}"
    body += _columns(entry, [f"tl.store(d_value + at_value, {last}, inside)"])
    return kernel("finish", POINTERS["finish"], ("rows", "column_blocks"), body, ("BT", "BK"))


def _walk(entry: Entry) -> str:
    """STEPS steps a program and the taps - 1 that its last rows are read by; `_j` is what was seen j steps ago."""
    n, C, taps, d = entry.streams, entry.width, entry.spec.taps, entry.spec.dilation
    lags, streams = range(1, taps), range(n)
    lines = [
        f"residue = tl.program_id(0).to(tl.int64) % {d}",
        f"chunk = tl.program_id(0).to(tl.int64) // {d} % chunks",
        f"sequence = tl.program_id(0).to(tl.int64) // {d} // chunks",
        "rows = length + before",
        f"first = chunk * STEPS * {d} + residue",
        "c = tl.program_id(1) * BK + tl.arange(0, BK)",
        f"cols = c < {C}",
        "sums_of = sums + tl.program_id(1).to(tl.int64) * total_rows * " + str(2 * n),
        *(_weight(entry, i, k, f"w_{i}_{k}") for i in streams for k in range(taps)),
        *(f"dw_{i}_{k} = tl.zeros([BK], tl.float32)" for i in streams for k in range(taps)),
    ]
    for j in lags:
        lines += [f"row = first - {j * d}", "here = (row >= 0) & (row < rows)"]
        lines += [f"v_{j} = {_value(entry)}.to(tl.float32)", *_read_gates(entry, j)]
        lines += [f"far_{j} = first * 0 - 1", f"direct_{j} = tl.zeros([BK], tl.float32)"]
        lines += [f"dy_{i}_{j} = tl.zeros([BK], tl.float32)" for i in streams]
    lines += ["row = first", *_ahead(entry), f"steps = tl.minimum(STEPS, (rows - first + {d - 1}) // {d})"]
    lines.append(f"for step in range(0, steps + {taps - 1}):")
    return kernel(
        "walk", POINTERS["walk"], ("length", "before", "chunks", "total_rows"),
        [*lines, *indent(_step(entry), 1), *_store_weights(entry)], ("STEPS", "BK"),
    )  # fmt: skip


def _ahead(entry: Entry) -> list[str]:
    """The loads of `row` that travel far, asked for a step before they are used."""
    n, C = entry.streams, entry.width
    lines = ["here = row < rows", f"next_v = {_value(entry)}"]
    lines += ["is_token = here & (row >= before)", "token = sequence * length + row - before"]
    for i in range(n):
        flow = f"d_next_X + token * {n * C} + c + {i * C}"
        lines.append(f"next_flow_{i} = tl.load({flow}, {_columns_where(entry, 'is_token')}, other=0.0)")
    return lines


def _value(entry: Entry) -> str:
    at = f"value + (sequence * rows + row) * {entry.width} + c"
    return f"tl.load({at}, {_columns_where(entry, 'here')}, other=0.0)"


def _read_gates(entry: Entry, j: int) -> list[str]:
    """Every stream's q of the row, where it is `here`."""
    n = entry.streams
    at = "(sequence * rows + row)"
    lines = []
    for i in range(n):
        lines.append(f"gate_{i} = tl.load(a + {at} * {n} + {i}, here, other=0.0)")
        lines.append(f"q_{i}_{j} = gate_{i} * tl.load(r + {at} * {n} + {i}, here, other=0.0)")
    return lines


def _columns_where(entry: Entry, condition: str) -> str:
    """All columns or none. The interpreter makes integers of a condition that is broadcast."""
    return f"c < tl.where({condition}, {entry.width}, 0)"


def _step(entry: Entry) -> list[str]:
    n, C, taps, d = entry.streams, entry.width, entry.spec.taps, entry.spec.dilation
    far = taps - 1
    lines = ["v_0 = next_v.to(tl.float32)", *(f"flow_{i} = next_flow_{i}.to(tl.float32)" for i in range(n))]
    lines += [f"row = first + (step + 1) * {d}", *_ahead(entry)]
    lines += [
        f"row = first + step * {d}",
        "here = row < rows",
        *_read_gates(entry, 0),
        "is_token = here & (row >= before)",
        "token = sequence * length + row - before",
        "far_0 = tl.load(reach + token, is_token, other=-1)",
        f"own = here & (row < first + STEPS * {d})",
        "direct_0 = tl.zeros([BK], tl.float32)",
        f"sums_at = sums_of + (sequence * rows + row) * {2 * n}",
    ]
    for i in range(n):
        lines.append("y = tl.zeros([BK], tl.float32)")
        for k in range(taps):
            j = far - k
            lines += [f"h_{k} = tl.where(far_0 >= {j * d}, q_{i}_{j}, 0.0) * v_{j}", f"y += w_{i}_{k} * h_{k}"]
        lines += [
            "s = tl.sigmoid(y)",
            f"dy_{i}_0 = flow_{i} * (s * (1.0 + y * (1.0 - s)))",
            f"kept = tl.where(own, dy_{i}_0, 0.0)",
            *(f"dw_{i}_{k} += kept * h_{k}" for k in range(taps)),
            f"direct_0 += gate_{i} * flow_{i}",
            f"tl.store(sums_at + {i}, tl.sum(flow_{i} * v_0, 0), own)",
        ]
    # The row that the current token reads through its first tap: all who read it have been seen.
    lines += [
        f"back = row - {far * d}",
        "done = (back >= first) & (back < rows)",
        f"sums_at = sums_of + (sequence * rows + back) * {2 * n}",
        f"gradient = direct_{far}",
    ]
    for i in range(n):
        lines.append("z = tl.zeros([BK], tl.float32)")
        for k in range(taps):
            lines.append(f"z += w_{i}_{k} * tl.where(far_{k} >= {(far - k) * d}, dy_{i}_{k}, 0.0)")
        lines += [
            f"gradient += q_{i}_{far} * z",
            f"tl.store(sums_at + {n + i}, tl.sum(z * v_{far}, 0), done)",
        ]
    lines.append(f"tl.store(dv + (sequence * rows + back) * {C} + c, gradient, {_columns_where(entry, 'done')})")
    for j in range(far, 0, -1):
        names = ["v", "far", "direct", *(f"{name}_{i}" for name in ("q", "dy") for i in range(n))]
        lines += [f"{name}_{j} = {name}_{j - 1}" for name in names]
    return lines


def _store_weights(entry: Entry) -> list[str]:
    n, C, taps = entry.streams, entry.width, entry.spec.taps
    lines = [f"out = partial + tl.program_id(0).to(tl.int64) * {n * taps * C} + c"]
    return lines + [f"tl.store(out + {(i * taps + k) * C}, dw_{i}_{k}, cols)" for i in range(n) for k in range(taps)]
