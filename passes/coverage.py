"""Count the residual adds that joined a stream, and find those that did not: what makes a conversion degenerate.

At the first site of a stream all streams are copies of one value, which no doubly stochastic H changes; what the last H
does is lost in the mean after it. H can learn at the sites in between. A stream that ends and begins again at every
layer has none: it costs parameters and time, and stays a residual model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations

import sympy
from torch.fx import Node

from mhc_compile.passes.base import is_tensor, module_path, op_name, shape, source_line
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.residual_sites import SiteSearch, branches_mask
from mhc_compile.passes.results import ENDS, Coverage, ResidualStream

# Operations that may put a value and what a branch makes of it together.
JOINS = {
    "add", "sub", "rsub", "lerp", "where", "addcmul", "addcdiv", "addmm", "baddbmm", "addbmm", "index_add",
    "index_copy", "index_put", "scatter_add", "scatter", "masked_scatter", "slice_scatter", "select_scatter", "sum",
    "setitem", "maximum", "minimum",
}  # fmt: skip
MAX_LAYER_SITES = 3
"""A graph that is one stream of at most so many sites and nothing else is taken for a layer: a decoder's has three."""


def coverage(flow: Dataflow, search: SiteSearch, streams: Sequence[ResidualStream]) -> Coverage:
    """Compare the sites of `streams` with all that adds to the residual path outside of branches."""
    inside = branches_mask(flow, (site for stream in streams for site in stream.sites))
    around = _around(flow, streams)
    carried = _carried(flow)
    left = [
        node
        for node in flow.nodes
        if op_name(node) in JOINS
        and node not in search.sites
        and flow.bit(node) & around & ~inside
        and _joins(flow, search, carried, node)
    ]
    return Coverage(
        sites=sum(len(stream.sites) for stream in streams),
        left=tuple(map(_place, left)),
        why=tuple(why_no_site(flow, node) for node in left),
        restarts=tuple(_restarts(flow, carried, streams)),
        short=len(streams) > 1 and all(len(stream.sites) <= ENDS for stream in streams),
        alone=_alone(flow, streams),
    )


def why_no_site(flow: Dataflow, node: Node) -> str:
    """Return what keeps a node that joins two values from being a site."""
    operands = [a for a in node.args if isinstance(a, Node) and a in flow.hot]
    if op_name(node) != "add" or len(operands) != 2:
        return f"{op_name(node)} of {len(operands)} values that depend on the input: a site adds two"
    left, right = operands
    if flow.depends(left, right):
        left, right = right, left
    if shape(left) != shape(right):
        return f"adds {list(shape(left))} to {list(shape(right))}"
    if not flow.depends(right, left):
        return "neither operand comes from the other"
    if not flow.between(left, right) & flow.matmuls & ~flow.bit(left):
        return "no layer with parameters between its operands"
    return "its carry is no stream value"


def _around(flow: Dataflow, streams: Sequence[ResidualStream]) -> int:
    """Return a bit mask of what the streams come from and what comes from them."""
    mask = 0
    for stream in streams:
        mask |= flow.ancestors[stream.entry] | flow.descendants[stream.exit]
    return mask


def _carried(flow: Dataflow) -> dict[Node, int]:
    """Return a bit mask of the hot values from which each one can be reached past all contractions with parameters."""
    carried: dict[Node, int] = {}
    for node in flow.nodes:
        mask = flow.bit(node)
        if not mask & flow.matmuls:
            for n in flow.inputs[node]:
                mask |= carried.get(n, 0)
        if node in flow.hot or op_name(node) == "setitem":
            carried[node] = mask
    return carried


def _joins(flow: Dataflow, search: SiteSearch, carried: dict[Node, int], node: Node) -> bool:
    """Return whether `node` puts a value of its own shape together with what parameters make of that value."""
    written = node.args[0] if op_name(node) == "setitem" else node
    if not isinstance(written, Node) or not is_tensor(written) or len(shape(written)) < 2:
        return False
    if is_tensor(node) and search.up(node) is not None:
        return False
    hot = [n for n in flow.inputs[node] if n in flow.hot and is_tensor(n)]
    for carry, branch in permutations(hot, 2):
        for root in reversed(flow.members(carried[carry] & flow.ancestors[branch])):
            if (
                is_tensor(root)
                and shape(root) == shape(written)
                and flow.between(root, branch) & flow.matmuls & ~flow.bit(root)
            ):
                return True
    return False


def _restarts(flow: Dataflow, carried: dict[Node, int], streams: Sequence[ResidualStream]) -> Iterable[str]:
    """Yield the place of each stream that begins with the end of another, of the same size, with no stream between."""
    for stream in streams:
        for other in streams:
            above = other.exit
            if stream is other or above is stream.entry or not carried.get(stream.entry, 0) & flow.bit(above):
                continue
            between = flow.between(above, stream.entry)
            others = (s.add for o in streams if o is not other for s in o.sites)
            if sympy.prod(shape(above)) == sympy.prod(shape(stream.entry)) and not any(
                between & flow.bit(add) for add in others
            ):
                yield _place(stream.entry)


def _alone(flow: Dataflow, streams: Sequence[ResidualStream]) -> int:
    """Return the number of sites of a graph that holds nothing else than one short stream, else 0."""
    if len(streams) != 1 or len(streams[0].sites) > MAX_LAYER_SITES:
        return 0
    stream = streams[0]
    inside = flow.between(stream.entry, stream.exit)
    embeds = any(
        n.op not in ("placeholder", "get_attr") and n in flow.hot for n in flow.nodes if not _in(flow, n, inside)
    )
    return 0 if embeds or stream.entry.op != "placeholder" else len(stream.sites)


def _in(flow: Dataflow, node: Node, mask: int) -> bool:
    return bool(flow.bit(node) & mask) or node.op == "output"


def _place(node: Node) -> str:
    where = source_line(node)
    return f"{op_name(node)} in {module_path(node) or 'the model itself'}" + (f" ({where})" if where else "")
