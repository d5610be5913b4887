"""Triton for `inject`; the equations are those of `mhc_compile.kernels.memory.cpp.convolution`.

`statistics` computes r of every row; `forward` then has all it needs for any tile of tokens and columns. A program of
`walk`, which is the backward, goes through every `dilation`-th row of a sequence from one end of its chunk to the
other: what a tap reads now is what the next tap reads a step later, so that each value is read, and each dy computed,
once, but for taps - 1 steps at the chunk's end. It leaves dw, dv without its last term, and the sums over its columns,
from which `finish` forms da and dv. No sum depends on what runs first.
"""

from __future__ import annotations

from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.memory.triton.tokens import header
from mhc_compile.kernels.target import Source
from mhc_compile.kernels.triton.text import indent, kernel, load

NUMBERS = ("tokens", "length", "before", "x_stride")
POINTERS = {
    "statistics": ("a", "value", "r"),
    "forward": ("X", "a", "value", "reach", "conv_gain", "conv", "r", "next_X"),
    "walk": ("a", "value", "reach", "conv_gain", "conv", "d_next_X", "r", "dv", "sums", "partial"),
    "finish": ("a", "value", "r", "dv", "sums", "d_a", "d_value"),
}
"""The tensors of each kernel, in order: r [rows, n], dv [rows, C], sums [blocks of columns, rows, 2n], partial
[programs of the walk's first axis, n, taps, C], all float32, besides those of the step."""


def forward_source(step: MemoryStep) -> Source:
    """Return the whole Python file of the forward."""
    n, C, taps = step.streams, step.width, step.spec.taps
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
        offset = (taps - 1 - k) * step.spec.dilation
        tile = f"value + (row - {offset})[:, None] * {C} + c[None, :]"
        body += [
            f"there_{k} = live & (row - {offset} >= start) & (far >= {offset})",
            f"v_{k} = tl.load({tile}, there_{k}[:, None] & cols[None, :], other=0.0).to(tl.float32)",
        ]
    for i in range(n):
        body.append("y = tl.zeros([BT, BK], tl.float32)")
        for k in range(taps):
            at = f"(row - {(taps - 1 - k) * step.spec.dilation}) * {n} + {i}"
            q = [f"tl.load({name} + {at}, there_{k}, other=0.0)" for name in ("a", "r")]
            body += [_weight(step, i, k, "w"), f"y += w[None, :] * (({' * '.join(q)})[:, None] * v_{k})"]
        body += [
            f"gate = tl.load(a + row * {n} + {i}, live, other=0.0)[:, None]",
            f"x = {load(f'X + token[:, None] * x_stride + c[None, :] + {i * C}')}",
            f"there = next_X + token[:, None] * {n * C} + c[None, :] + {i * C}",
            f"tl.store(there, x + (gate * v_{taps - 1} + y * tl.sigmoid(y)), inside)",
        ]
    text = kernel("forward", POINTERS["forward"], NUMBERS, body, ("BT", "BK"))
    text = header(step, "forward") + _statistics(step) + "\n\n" + text
    return Source(text, {"X": 1, "value": 1 + taps, "next_X": 1})


def backward_source(step: MemoryStep) -> Source:
    """Return the whole Python file of the backward."""
    parts = [_statistics(step), _walk(step), _finish(step)]
    passes = {"value": len(parts), "d_next_X": 1, "dv": 2, "d_value": 1}
    return Source(header(step, "backward") + "\n\n".join(parts), passes)


def _weight(step: MemoryStep, i: int, k: int, name: str) -> str:
    C, taps = step.width, step.spec.taps
    gain, conv = f"conv_gain + {i * C} + c", f"conv + ({i * C} + c) * {taps} + {k}"
    return f"{name} = tl.load({gain}, cols, other=0.0) * tl.load({conv}, cols, other=0.0)"


def _row_lines() -> list[str]:
    return ["row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)", "live = row < rows"]


def _columns(step: MemoryStep, body: list[str]) -> list[str]:
    lines = [
        "c = c0 + tl.arange(0, BK)",
        f"inside = live[:, None] & (c < {step.width})[None, :]",
        f"at_value = row[:, None] * {step.width} + c[None, :]",
    ]
    return [f"for c0 in range(0, {step.width}, BK):", *indent([*lines, *body], 1)]


def _statistics(step: MemoryStep) -> str:
    n = step.streams
    body = [*_row_lines(), "squares = tl.zeros([BT, BK], tl.float32)"]
    body += _columns(step, [f"v = {load('value + at_value')}", "squares += v * v"])
    body.append(f"mean = tl.sum(squares, 1) * {1 / step.width!r}")
    for i in range(n):
        body += [
            f"gate = tl.load(a + row * {n} + {i}, live, other=0.0)",
            f"tl.store(r + row * {n} + {i}, 1.0 / tl.sqrt(gate * gate * mean + {float(step.spec.eps)!r}), live)",
        ]
    return kernel("statistics", POINTERS["statistics"], ("rows",), body, ("BT", "BK"))


def _finish(step: MemoryStep) -> str:
    n = step.streams
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
            f"da = flow_{i} + {float(step.spec.eps)!r} * inverse * inverse * inverse * z_{i}",
            f"tl.store(d_a + row * {n} + {i}, da, live)",
            f"share += z_{i} * q * q * q * {1 / step.width!r}",
        ]
    last = f"{load('dv + at_value')} - share[:, None] * {load('value + at_value')}"
    body += _columns(step, [f"tl.store(d_value + at_value, {last}, inside)"])
    return kernel("finish", POINTERS["finish"], ("rows", "column_blocks"), body, ("BT", "BK"))


def _walk(step: MemoryStep) -> str:
    """Emit `walk`: STEPS steps per program, and taps - 1 that read its last rows; `_j` is a value of j steps ago."""
    n, C, taps, d = step.streams, step.width, step.spec.taps, step.spec.dilation
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
        *(_weight(step, i, k, f"w_{i}_{k}") for i in streams for k in range(taps)),
        *(f"dw_{i}_{k} = tl.zeros([BK], tl.float32)" for i in streams for k in range(taps)),
    ]
    for j in lags:
        lines += [f"row = first - {j * d}", "here = (row >= 0) & (row < rows)"]
        lines += [f"v_{j} = {_value(step)}.to(tl.float32)", *_read_gates(step, j)]
        lines += [f"far_{j} = first * 0 - 1", f"direct_{j} = tl.zeros([BK], tl.float32)"]
        lines += [f"dy_{i}_{j} = tl.zeros([BK], tl.float32)" for i in streams]
    lines += ["row = first", *_ahead(step), f"steps = tl.minimum(STEPS, (rows - first + {d - 1}) // {d})"]
    lines.append(f"for step in range(0, steps + {taps - 1}):")
    return kernel(
        "walk", POINTERS["walk"], ("length", "before", "chunks", "total_rows"),
        [*lines, *indent(_step(step), 1), *_store_weights(step)], ("STEPS", "BK"),
    )  # fmt: skip


def _ahead(step: MemoryStep) -> list[str]:
    """Emit the loads of `row` from device memory, a step before they are used."""
    n, C = step.streams, step.width
    lines = ["here = row < rows", f"next_v = {_value(step)}"]
    lines += ["is_token = here & (row >= before)", "token = sequence * length + row - before"]
    for i in range(n):
        flow = f"d_next_X + token * {n * C} + c + {i * C}"
        lines.append(f"next_flow_{i} = tl.load({flow}, {_columns_where(step, 'is_token')}, other=0.0)")
    return lines


def _value(step: MemoryStep) -> str:
    at = f"value + (sequence * rows + row) * {step.width} + c"
    return f"tl.load({at}, {_columns_where(step, 'here')}, other=0.0)"


def _read_gates(step: MemoryStep, j: int) -> list[str]:
    """Emit every stream's q of the row, where it is `here`."""
    n = step.streams
    at = "(sequence * rows + row)"
    lines = []
    for i in range(n):
        lines.append(f"gate_{i} = tl.load(a + {at} * {n} + {i}, here, other=0.0)")
        lines.append(f"q_{i}_{j} = gate_{i} * tl.load(r + {at} * {n} + {i}, here, other=0.0)")
    return lines


def _columns_where(step: MemoryStep, condition: str) -> str:
    """Return the mask of all columns or none.

    The interpreter makes integers of a condition that is broadcast.
    """
    return f"c < tl.where({condition}, {step.width}, 0)"


def _step(step: MemoryStep) -> list[str]:
    n, C, taps, d = step.streams, step.width, step.spec.taps, step.spec.dilation
    far = taps - 1
    lines = ["v_0 = next_v.to(tl.float32)", *(f"flow_{i} = next_flow_{i}.to(tl.float32)" for i in range(n))]
    lines += [f"row = first + (step + 1) * {d}", *_ahead(step)]
    lines += [
        f"row = first + step * {d}",
        "here = row < rows",
        *_read_gates(step, 0),
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
    lines.append(f"tl.store(dv + (sequence * rows + back) * {C} + c, gradient, {_columns_where(step, 'done')})")
    for j in range(far, 0, -1):
        names = ["v", "far", "direct", *(f"{name}_{i}" for name in ("q", "dy") for i in range(n))]
        lines += [f"{name}_{j} = {name}_{j - 1}" for name in names]
    return lines


def _store_weights(step: MemoryStep) -> list[str]:
    n, C, taps = step.streams, step.width, step.spec.taps
    lines = [f"out = partial + tl.program_id(0).to(tl.int64) * {n * taps * C} + c"]
    return lines + [f"tl.store(out + {(i * taps + k) * C}, dw_{i}_{k}, cols)" for i in range(n) for k in range(taps)]
