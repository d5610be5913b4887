"""Recognise models that carry several residual streams already, by the shape of what flows from input to output."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import is_tensor, op_name, refuse, shape
from mhc_compile.passes.dataflow import CASTS, Dataflow
from mhc_compile.passes.results import Site

MAX_PUBLISHED_STREAMS = 16
"""The published systems carry 2 to 8."""
EARLY, LATE = 0.3, 0.7
"""Shares of the model's parameter contractions before the first and the last multi-stream value."""


def multistream(flow: Dataflow) -> MHCError | None:
    """Return MHC107 if all that flows from an embedding to an output passes values with one more small dimension.

    Streams lie before the channels ([B, S, n, C]: DeepSeek-V4, Hy, Qwen) or first of all ([n, B, S, C]: AltUp), and
    from the first layers to the last: a head that predicts several tokens has such values at the end only.
    """
    embedded = [n for n in flow.hot if is_tensor(n) and not any(i in flow.hot for i in flow.inputs[n])]
    # Of the highest rank: beside embeddings [B, S, C] a table of positions [S, C] is embedded too.
    rank = max((len(shape(n)) for n in embedded), default=0)
    plain = {shape(n) for n in embedded if len(shape(n)) == rank}
    wide = [n for n in flow.nodes if n in flow.hot and is_tensor(n) and _streams(shape(n), plain)]
    if not wide:
        return None
    depth = {n: (flow.ancestors[n] & flow.matmuls).bit_count() / flow.matmuls.bit_count() for n in wide}
    if min(depth.values()) > EARLY or max(depth.values()) < LATE:
        return None
    # The last values may be a head's own: they do not count as what the layers pass on.
    layers = {n for n in wide if depth[n] < max(depth.values())}
    around = set(embedded)
    for node in flow.nodes:
        if node in flow.hot and node not in layers and any(i in around for i in flow.inputs[node]):
            around.add(node)
    results = [n for n in flow.inputs[flow.nodes[-1]] if n in flow.hot]
    if not results or results[0] in around:
        return None
    last = wide[-1]
    return refuse("MHC107", f"{_streams(shape(last), plain)} streams of shape {list(shape(last))}", last)


def side_by_side(flow: Dataflow, sites: list[Site]) -> MHCError | None:
    """Return MHC107 if a site adds one vector of C channels times n weights: n streams in n*C channels.

    `x + flatten(y[..., None, :] * w[..., :, None])` is how the low-rank gated residual of Qwen4 writes to its streams.
    """
    for site in sites:
        channels = shape(site.add)[-1]
        for branch in site.branches:
            node = branch
            while op_name(node) in ("flatten", "view", "reshape", *CASTS) and isinstance(node.args[0], Node):
                node = node.args[0]
            if op_name(node) != "mul":
                continue
            factors = [shape(n)[-2:] for n in flow.inputs[node] if n in flow.hot and len(shape(n)) > 2]
            if len(factors) != 2:
                continue
            (a, b), (c, d) = sorted(factors, key=lambda f: f[0] == 1)
            if b == c == 1 and a != 1 and a * d == channels and a <= MAX_PUBLISHED_STREAMS:
                return refuse("MHC107", f"{a} streams of {d} channels side by side, each with its weight", site.add)
    return None


def _streams(wide: tuple[Any, ...], plain: set[tuple[Any, ...]]) -> int:
    for at in (len(wide) - 2, 0):
        n = wide[at] if len(wide) >= 3 else 0
        if isinstance(n, int) and 2 <= n <= MAX_PUBLISHED_STREAMS and (*wide[:at], *wide[at + 1 :]) in plain:
            return n
    return 0
