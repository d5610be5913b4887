"""The drawing of a model with hyper-connections or attention over depth of its own: of what `native` raised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.base import shape
from mhc_compile.passes.dialect_sites import by_stream, stream_sites
from mhc_compile.passes.fuse_depth import OWN_READ
from mhc_compile.passes.results import OVER_DEPTH, NativeRead
from mhc_compile.report.elements import Drawing

DIALECT = torch.ops.mhc


def draw_native(graph: Graph) -> Drawing:
    """Return the drawing of a dialect graph whose sites are known by the paths of their modules."""
    drawing = Drawing()
    inside = _inside(graph)
    for run in by_stream(stream_sites(graph)):
        paths = [site.name.rpartition("#")[0] for site in run]
        owner = _common(paths)
        specs = [next(str(a) for a in site.coefficients.args if isinstance(a, str)) for site in run]
        sites = [(site.name, path, None, spec) for site, path, spec in zip(run, paths, specs, strict=True)]
        stream, *each, leaves = drawing.add_stream(owner, "; ".join(sorted(set(specs))), sites)
        start = run[0].state
        drawing.at[stream] = start
        if start.target is DIALECT.expand.default:
            drawing.give([start], stream)
        for site, number in zip(run, each, strict=True):
            drawing.at[number] = site.distribute or site.coefficients
            drawing.give([*site.stream, *([site.distribute] if site.distribute is not None else [])], number)
        end = run[-1].distribute
        if end is not None:
            drawing.at[leaves] = end
            drawing.give([u for u in end.users if u.target is DIALECT.reduce.default], leaves)
        for site, number in zip(run, each, strict=True):
            branch = drawing.branch(number)
            if site.distribute is not None:
                y = site.distribute.args[1]
                assert isinstance(y, Node)
                drawing.at[branch] = y
                drawing.give(_upstream(y, inside, drawing), branch)
    _draw_reads(graph, drawing)
    drawing.name_branches()
    return drawing


def _draw_reads(graph: Graph, drawing: Drawing) -> None:
    """Add the reads by attention over depth, each with what follows from it before the next."""
    reads = [n for n in graph.nodes if n.target is OWN_READ]
    if not reads:
        return
    names = [str(n.meta["mhc_site"]) for n in reads]
    paths = [name.rpartition("#")[0] for name in names]
    specs = [str(NativeRead(name, len(n.args[0]), shape(n)[-2])) for name, n in zip(names, reads, strict=True)]
    sites = [(name, path, OVER_DEPTH, spec) for name, path, spec in zip(names, paths, specs, strict=True)]
    stream, *each, leaves = drawing.add_stream(_common(paths), OVER_DEPTH, sites)
    drawing.at[stream] = drawing.at[leaves] = reads[-1]
    last: dict[Node, int] = {}
    for node in graph.nodes:
        following = [last[n] for n in node.all_input_nodes if n in last]
        if node.target is OWN_READ:
            last[node] = reads.index(node)
            drawing.at[each[last[node]]] = node
            drawing.give([node], each[last[node]])
        elif following and max(following) < len(reads) - 1:
            last[node] = max(following)
            drawing.give([node], drawing.branch(each[last[node]]))


def _inside(graph: Graph) -> set[Node]:
    """Return the nodes that read the streams through `aggregate`, up to `distribute`."""
    inside: set[Node] = set()
    for node in graph.nodes:
        if node.target is DIALECT.aggregate.default or (
            node.target is not DIALECT.distribute.default and any(n in inside for n in node.all_input_nodes)
        ):
            inside.add(node)
    return inside


def _upstream(end: Node, inside: set[Node], drawing: Drawing) -> list[Node]:
    """Return the nodes of branches that `end` is computed from and that belong to no element."""
    upstream: dict[Node, None] = {}
    stack = [end]
    while stack:
        node = stack.pop()
        if node in inside and node not in upstream and node not in drawing.of:
            upstream[node] = None
            stack += node.all_input_nodes
    return list(upstream)


def _common(paths: Sequence[str]) -> str:
    """Return the innermost module around all `paths` that holds the list of numbered layers, too."""
    parts = [p.split(".") for p in paths]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    numbers = [i for i, p in enumerate(parts[0]) if p.isdigit()]
    return ".".join(parts[0][: min([shared, *(max(i - 1, 0) for i in numbers)])])
