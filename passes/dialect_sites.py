"""Which nodes of a dialect graph belong to the streams at each site, and which to its branch.

A site begins with its *state*: the `distribute` of the site before, `expand`, or an input of the graph. To the streams
belongs everything after it up to what the branch reads: norms of each stream, a memory's gate and what it admits,
coefficients, casts, `aggregate`, the branch's entry norm. To the branch belongs F's output, which `distribute` reads;
what lies between belongs to neither.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Expr
from torch.fx import Graph, Node

from mhc_compile.kernels.forms import COEFFICIENTS
from mhc_compile.passes.base import is_tensor, op_name, shape, value
from mhc_compile.passes.cost import SiteCost
from mhc_compile.passes.graphs import reachable
from mhc_compile.passes.norms import match_norm
from mhc_compile.passes.stages import is_random

DIALECT = torch.ops.mhc
ENGRAM = torch.ops.engram
_VIEWS = ("view", "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze", "expand_as")


@dataclass
class StreamSite:
    """One site of a dialect graph."""

    name: str
    """As in `meta["mhc_site"]`; empty where none was recorded."""
    coefficients: Node
    state: Node
    """Where the streams come from: the `distribute` of the site before, or what its stream starts with."""
    distribute: Node | None
    """The `distribute` that ends the site; None where the graph ends inside it."""
    stream: list[Node] = field(default_factory=list)
    """What can be recomputed from `state`, in order."""
    branch: list[Node] = field(default_factory=list)
    """F's output, with the views through which `distribute` reads it."""

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes that carry the tags of a block."""
        yield from self.stream
        yield from self.branch
        if self.distribute is not None:
            yield self.distribute

    @property
    def weighs(self) -> list[Node]:
        """The `aggregate`s: one, or more where the branch reads several values of the stream."""
        return [n for n in self.stream if n.target is DIALECT.aggregate.default]

    @property
    def is_boundary(self) -> bool:
        """Whether `fuse` merges the site and the `distribute` before it into one kernel."""
        reads = [self.coefficients.args[0], *(h.args[0] for h in self.weighs)]
        return self.state.target is DIALECT.distribute.default and reads == [self.state, self.state]

    def cost(self, *, joined: bool = False) -> SiteCost:
        """Return the bytes that the site's kernels keep for the backward pass, in the sizes of the graph."""
        spread = {n for n in self.stream if is_tensor(n)}
        read = {x for n in (*self.stream, self.distribute) if n is not None for x in _streams_read(n)}
        parameters = [p for p in self.coefficients.args[1:] if isinstance(p, Node)]
        items = {int(n.args[1]): n for n in self.coefficients.users if n.target is operator.getitem}  # type: ignore[arg-type]
        weighs = self.weighs
        kept = sum((size_of(x) for x in read & spread if x is not self.state), sympy.S.Zero)
        for h in weighs:
            norm = match_norm(h)
            kept += size_of(norm.out if norm is not None else h)
        kept += sum((size_of(n) for i, n in items.items() if i > 0 or len(weighs) != 1), sympy.S.Zero)
        if 0 in items:
            tokens = sympy.prod(shape(items[0])[:-1])
            # z, of which mHC has a row for the flattened streams, Hyper-Connections for each stream.
            rows, columns = shape(parameters[0])[0], shape(parameters[0])[-1]
            groups = max(1, math.prod(shape(self.state)[-2:]) // columns) if len(shape(parameters[0])) > 1 else 1
            kept += tokens * groups * (rows + 1) * value(items[0]).dtype.itemsize
        # A branch that several sites read is kept once, here.
        branch = size_of(self.branch[0]) if self.branch else sympy.S.Zero
        return SiteCost(size_of(self.state), kept, branch, size_of(parameters[0]), joined)


def coefficient_nodes(graph: Graph) -> list[Node]:
    """Return the coefficients of every site of n streams, in the order of the stream."""
    return [n for n in graph.nodes if n.target in COEFFICIENTS]


def stream_sites(graph: Graph) -> list[StreamSite]:
    """Return the sites of a dialect graph in the order of their streams."""
    outside = _depending(graph) - _inside_branches(graph)
    sites = []
    taken: set[Node] = set()
    for coefficients in coefficient_nodes(graph):
        ends = _ends(coefficients)
        weighs = [n for n in ends if n.target is DIALECT.aggregate.default]
        distribute = next((n for n in ends if n.target is DIALECT.distribute.default), None)
        site = StreamSite(
            str(coefficients.meta.get("mhc_site", "")), coefficients, _state(coefficients, outside), distribute
        )
        norms = [norm.nodes for h in weighs if (norm := match_norm(h)) is not None]
        members = {*weighs, coefficients, *(n for nodes in norms for n in nodes)}
        roots = [coefficients, *weighs] if distribute is None else [coefficients, *weighs, distribute]
        members |= _between(roots, outside)
        site.stream = sorted(n for n in members if n not in taken and not is_random(n))
        taken.update(site.stream)
        if distribute is not None:
            site.branch = [n for n in _unwrapped(distribute.args[1]) if n not in taken and n.op != "placeholder"]
        sites.append(site)
    return sites


def by_stream(sites: Iterable[StreamSite]) -> list[list[StreamSite]]:
    """Return the sites of every stream, in order."""
    every: list[list[StreamSite]] = []
    ending: dict[Node, list[StreamSite]] = {}
    for site in sites:
        run = ending.get(site.state)
        if run is None:
            run = []
            every.append(run)
        run.append(site)
        if site.distribute is not None:
            ending[site.distribute] = run
    return every


def size_of(node: Node) -> Expr:
    """Return the bytes of a tensor, in the sizes of the graph."""
    return sympy.prod(shape(node)) * value(node).dtype.itemsize


def size_hints(graph: Graph) -> dict[Any, int]:
    """Return the current value of every dynamic size of the graph, without adding a guard."""
    hints: dict[Any, int] = {}
    for node in filter(is_tensor, graph.nodes):
        for d in value(node).shape:
            if not isinstance(d, int) and d.node.expr.is_Symbol and d.node.hint is not None:
                hints[d.node.expr] = int(d.node.hint)
    return hints


def _ends(coefficients: Node) -> list[Node]:
    """Return the `aggregate`s and the `distribute` that read the coefficients, through casts."""
    ends = (DIALECT.aggregate.default, DIALECT.distribute.default)

    def readers(node: Node) -> list[Node]:
        casts = (u for u in node.users if u.target is operator.getitem or op_name(u) == "to" or u.target in ends)
        return list(casts) if node.target not in ends else []

    return sorted(n for n in reachable([coefficients], readers) if n.target in ends)


def _carried(graph: Graph) -> set[Node]:
    """Return the inputs of the graph that are streams: what crosses into a pipeline stage."""
    shapes = {shape(coefficients.args[0]) for coefficients in coefficient_nodes(graph)}  # type: ignore[arg-type]
    return {n for n in graph.nodes if n.op == "placeholder" and is_tensor(n) and shape(n) in shapes}


def _depending(graph: Graph) -> set[Node]:
    """Return what depends on the streams, including what they start with."""
    depending = _carried(graph)
    for node in graph.nodes:
        if node.target is DIALECT.expand.default or any(n in depending for n in node.all_input_nodes):
            depending.add(node)
    return depending


def _state(coefficients: Node, outside: set[Node]) -> Node:
    """Return where the streams that the site reads come from, above the operations on each stream."""
    node = coefficients.args[0]
    assert isinstance(node, Node)
    while not _is_state(node):
        above = [n for n in node.all_input_nodes if n in outside]
        if not above:
            break
        node = max(above)  # the latest: an earlier state may be added to it
    return node


def _is_state(node: Node) -> bool:
    return node.op == "placeholder" or node.target in (DIALECT.distribute.default, DIALECT.expand.default)


def _inside_branches(graph: Graph) -> set[Node]:
    """Return what reads the streams through `aggregate` or `reduce`, up to `distribute`."""
    inside: set[Node] = set()
    opens = (DIALECT.aggregate.default, DIALECT.reduce.default)
    for node in graph.nodes:
        if node.target is not DIALECT.distribute.default and any(
            n in inside or n.target in opens for n in node.all_input_nodes
        ):
            inside.add(node)
    return inside


def _between(roots: Iterable[Node], allowed: set[Node]) -> set[Node]:
    """Return what lies between the states and `roots`, without the states and the roots that end other sites."""

    def above(node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if n in allowed and not _is_state(n)]

    return reachable((n for root in roots for n in above(root)), above)


def _streams_read(node: Node) -> list[Node]:
    """Return the n-stream values that an op of the dialect or of a memory reads."""
    in_dialect = getattr(node.target, "namespace", "") in ("mhc", "engram")
    return [node.args[0]] if in_dialect and isinstance(node.args[0], Node) and len(node.all_input_nodes) > 1 else []


def _unwrapped(branch: object) -> list[Node]:
    """Return `branch` and, where it is a view, what it views."""
    values = []
    while isinstance(branch, Node):
        values.append(branch)
        branch = branch.args[0] if op_name(branch) in _VIEWS and branch.args else None
    return values
