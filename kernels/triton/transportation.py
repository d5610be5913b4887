"""Triton for the manifold `transportation`: H filled entry by entry between the bounds that its sums leave.

The equations are those of `mhc_compile.kernels.reference.fill` (arXiv 2605.21724), written out for every entry with a
vector of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mhc_compile.kernels.spec import StreamSpec


def fill(spec: StreamSpec, logit: Callable[[int], str]) -> Iterator[str]:
    """Emit `m_ij`, the entries of H, and what their backward needs, from the text of each of the (n-1)^2 logits.

    That is `row_ij`, what row i has left before entry j, `column_ij`, what column j has left before row i, `low_ij`
    and `high_ij`, the bounds of an entry, and `gate_ij`, where it lies between them.
    """
    n = spec.streams
    last = n - 1
    for j in range(n):
        yield f"column_0{j} = tl.full([BT], 1.0, tl.float32)"
    for i in range(last):
        yield f"row_{i}0 = tl.full([BT], 1.0, tl.float32)"
        for j in range(last):
            at = f"{i}{j}"
            opened = " + ".join(f"column_{i}{k}" for k in range(j + 1, n))
            yield f"gate_{at} = tl.sigmoid({logit(i * last + j)})"
            yield f"low_{at} = tl.maximum(row_{at} - ({opened}), 0.0)"
            yield f"high_{at} = tl.minimum(row_{at}, column_{at})"
            yield f"m_{at} = low_{at} + (high_{at} - low_{at}) * gate_{at}"
            yield f"row_{i}{j + 1} = row_{at} - m_{at}"
            yield f"column_{i + 1}{j} = column_{at} - m_{at}"
        yield f"m_{i}{last} = tl.maximum(row_{i}{last}, 0.0)"
        yield f"column_{i + 1}{last} = column_{i}{last} - row_{i}{last}"
    for j in range(n):
        yield f"m_{last}{j} = tl.maximum(column_{last}{j}, 0.0)"


def fill_backward(spec: StreamSpec) -> Iterator[str]:
    """Emit `flow_k`, the gradients of the logits, from `f_ij`, those of H, after `fill`."""
    last = spec.streams - 1
    for j in range(spec.streams):
        yield f"d_column_{j} = tl.where(column_{last}{j} > 0.0, f_{last}{j}, 0.0)"
    for i in reversed(range(last)):
        yield f"d_row = tl.where(row_{i}{last} > 0.0, f_{i}{last}, 0.0) - d_column_{last}"
        for j in reversed(range(last)):
            at = f"{i}{j}"
            yield f"d_entry = f_{at} - d_row - d_column_{j}"
            yield f"d_low = tl.where(low_{at} > 0.0, d_entry * (1.0 - gate_{at}), 0.0)"
            yield f"d_high = d_entry * gate_{at}"
            yield f"d_row += d_low + tl.where(row_{at} < column_{at}, d_high, 0.0)"
            yield f"d_column_{j} += tl.where(row_{at} < column_{at}, 0.0, d_high)"
            for k in range(j + 1, last + 1):
                yield f"d_column_{k} -= d_low"
            yield f"flow_{i * last + j} = d_entry * (high_{at} - low_{at}) * gate_{at} * (1.0 - gate_{at})"
