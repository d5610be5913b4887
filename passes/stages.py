"""Split a rewritten graph into pipeline stages at sites; what crosses is the state: n streams, or earlier outputs.

    piece k = the slice of the graph between what crosses cut k and what crosses cut k + 1

A value that does not depend on the streams (rotary tables, masks, positions, hashes of token ids, a memory's rows) is
recomputed in every piece that reads it, and a parameter that several pieces read (a tied embedding) is an input of
each of them: their gradients must be summed. What depends on the streams is computed in one piece: a site's own nodes
in the piece of the site, everything else as late as its readers allow. Besides the state, cuts are crossed by what
later branches read of earlier ones (the values of the first layer, the output of an encoder).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch.fx import Graph, GraphModule, Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.form import ENTRY
from mhc_compile.kernels.forms import COEFFICIENTS, READS
from mhc_compile.passes.base import is_tensor, op_name, refuse, switches_gradients, value
from mhc_compile.passes.graphs import ancestors, base_of, reachable, readers, writes

DIALECT = torch.ops.mhc
SITE = "mhc_site"
"""Key in the `meta` of the name of the site that begins with a node, or of the one after which a node is the state."""
COUNTER = "mhc_counter"
"""Key in the `meta` of the name of a counter: a small tensor without gradient, counted for every microbatch. Counters
are the last outputs of a graph, and of the piece that computes what they count."""
_RANDOM = ("rand", "randn", "rand_like", "randn_like", "bernoulli", "multinomial", "normal_", "uniform_", "bernoulli_")


@dataclass(frozen=True)
class Piece:
    """One pipeline stage, or a part of one, as a graph of its own."""

    graph: GraphModule
    """Its placeholders: what crosses into it, then those of the whole graph that it reads, in their order."""
    sites: tuple[int, ...]
    """Its sites, counted from 0 in the order of the whole graph."""
    crosses_in: tuple[str, ...]
    """Names, in the whole graph, of the values that it is given; the names of its first placeholders."""
    crosses_out: tuple[str, ...]
    """Names of the values that it returns; empty for the last piece, whose outputs are those of the graph."""


def site_nodes(graph: Graph) -> list[Node]:
    """Return the node with which each site begins, in the order of the stream: its coefficients, or its read."""
    return [n for n in graph.nodes if n.target in COEFFICIENTS or (n.target in READS and SITE in n.meta)]


def outputs_of(graph: Graph) -> list[Node]:
    """Return the outputs of a graph without its counters."""
    return [n for n in graph.output_node().all_input_nodes if COUNTER not in n.meta]


def counters_of(graph: Graph) -> dict[str, Node]:
    """Return the counters of a graph by name, in the order in which they follow its other outputs."""
    return {n.meta[COUNTER]: n for n in graph.output_node().all_input_nodes if COUNTER in n.meta}


def split_graph(gm: GraphModule, starts: Sequence[int], given: Sequence[str] = ()) -> list[Piece]:
    """Cut the dialect graph `gm` before the sites numbered `starts` (ascending, from 1 up); `gm` is not changed.

    `given` names the placeholders that hold streams, where the graph is a piece itself.

    Raises MHC620 for cuts that are none, and MHC621 where a value would cross that cannot be sent with a gradient.
    """
    count = len(site_nodes(gm.graph))
    bounds = [0, *starts, count]
    if any(a >= b for a, b in pairwise(bounds)):
        raise MHCError("MHC620", f"{len(starts) + 1} parts of {count} sites, beginning at {bounds[:-1]}")
    place = places(gm.graph, starts, given)
    crossing = [_crossing(place, k) for k in range(1, len(starts) + 1)]
    for node in {n for nodes in crossing for n in nodes}:
        if not is_tensor(node) or not value(node).is_floating_point():
            raise refuse("MHC621", f"{op_name(node)} gives no floating-point tensor", node)
    ends = [*crossing, outputs_of(gm.graph)]
    counters = counters_of(gm.graph).values()
    pieces = []
    for k, (inside, out) in enumerate(zip([[], *crossing], ends, strict=True)):
        pieces.append(
            Piece(
                graph=_slice(gm, inside, [*out, *(n for n in counters if place.get(n, 0) == k)]),
                sites=tuple(range(bounds[k], bounds[k + 1])),
                crosses_in=tuple(n.name for n in inside),
                crosses_out=tuple(n.name for n in out) if k < len(starts) else (),
            )
        )
    return pieces


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Cut `costs` (one per site) into `count` runs so that the most expensive run is as cheap as possible.

    Of such cuts, those with evener runs (by their squares) are taken. Returns the first site of every run but the
    first. Raises MHC620 for more runs than sites.
    """
    if count > len(costs):
        raise MHCError("MHC620", f"{count} stages for {len(costs)} sites")
    total = [0.0, *accumulate(costs)]
    never = float("inf")
    best = [[(never, never)] * (len(costs) + 1) for _ in range(count + 1)]
    cut_at = [[0] * (len(costs) + 1) for _ in range(count + 1)]
    best[0][0] = (0.0, 0.0)
    for k in range(1, count + 1):
        for end in range(k, len(costs) + 1):
            for begin in range(k - 1, end):
                (dearest, squares), run = best[k - 1][begin], total[end] - total[begin]
                if (better := (max(dearest, run), squares + run * run)) < best[k][end]:
                    best[k][end], cut_at[k][end] = better, begin
    starts, end = [], len(costs)
    for k in range(count, 0, -1):
        end = cut_at[k][end]
        starts.append(end)
    return starts[::-1][1:]


def places(graph: Graph, starts: Sequence[int], given: Sequence[str] = ()) -> dict[Node, int]:
    """Return the piece of every node that depends on the streams. Others belong to whichever piece reads them."""
    first = {node: sum(i >= s for s in starts) for i, node in enumerate(site_nodes(graph))}
    anchored: dict[Node, int] = {}
    piece_of: dict[str, int] = {}
    for node in graph.nodes:
        name = node.meta.get(SITE, "")
        if node in first:
            piece_of[name] = first[node]
            if node.target in COEFFICIENTS:
                anchored |= dict.fromkeys(node.users, first[node])
        if name in piece_of:  # where the site begins, and the state after it
            anchored[node] = piece_of[name]
    place: dict[Node, int] = {}
    depends = _depending(graph, given)
    for node in reversed(graph.nodes):
        if node.op == "output":
            place[node] = len(starts)
        elif node in depends:
            # A write into a value belongs to the pieces that read it afterwards; a write that nothing reads, to none.
            later = [place[u] for u in readers(node) if u in place and not (COUNTER in node.meta and u.op == "output")]
            if node in anchored or later:
                place[node] = anchored.get(node, min(later, default=0))
    counted = ancestors(counters_of(graph).values())
    for node in graph.nodes:  # what only counters read is computed with the last value that it reads
        if node in depends and node in counted and node not in place:
            place[node] = max((place[n] for n in node.all_input_nodes if n in place), default=0)
    return place


def _depending(graph: Graph, given: Sequence[str]) -> set[Node]:
    """Return the nodes that depend on the streams, or on random draws, which no two pieces would repeat alike."""
    depending: set[Node] = set()
    for node in graph.nodes:
        begins = node.target is DIALECT.expand.default or ENTRY in node.meta or node.name in given or is_random(node)
        if begins or any(n in depending for n in node.all_input_nodes):
            depending.add(node)
    return depending


def is_random(node: Node) -> bool:
    """Return whether `node` draws random numbers: an active dropout, a generator."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    if "dropout" in name:
        return dropout_of(node) > 0
    return name in _RANDOM


def dropout_of(node: Node) -> float:
    """Return the probability with which an operation named like a dropout drops; 0 where it is not training."""
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return float(p) if training else 0.0  # type: ignore[arg-type]


def _crossing(place: dict[Node, int], k: int) -> list[Node]:
    """Return what is computed before cut k and read after it, in the order of the graph."""
    inner = (n for n in place if n.op not in ("placeholder", "output") and COUNTER not in n.meta)
    return sorted(n for n in inner if place[n] < k and any(place.get(u, 0) >= k for u in n.users))


def _slice(gm: GraphModule, inside: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """Return the part of the graph that computes `outputs` from `inside` and the placeholders."""
    needed = _needed(gm.graph, inside, outputs)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inside:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {k: v for k, v in node.meta.items() if k in ("example_value", "val")}
    for node in gm.graph.nodes:
        if node.op != "output" and node not in copies and (node in needed or _is_region(node)):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in outputs))
    _drop_empty_regions(graph)
    return GraphModule(gm, graph)


def _needed(graph: Graph, inside: Sequence[Node], outputs: Sequence[Node]) -> set[Node]:
    needed: set[Node] = set()

    def need(nodes: Iterable[Node]) -> None:
        needed.update(reachable(nodes, lambda n: [m for m in n.all_input_nodes if m not in inside]))

    need(n for n in outputs if n not in inside)
    writers = [n for n in graph.nodes if writes(n)]
    # What is written into a needed value is needed, and what that reads.
    while new := [w for w in writers if w not in needed and base_of(w.args[0]) in needed]:
        need(new)
    return needed


def _is_region(node: Node) -> bool:
    return switches_gradients(node) or op_name(node) in ("_enter_autocast", "_exit_autocast")


def _drop_empty_regions(graph: Graph) -> None:
    """Erase switches of gradients or autocast that affect no node."""
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            after = node.next
            if switches_gradients(node) and switches_gradients(after):  # which says again what holds
                graph.erase_node(node)
                changed = True
            elif op_name(node) == "_enter_autocast" and op_name(after) == "_exit_autocast" and after.args[0] is node:
                graph.erase_node(after)
                graph.erase_node(node)
                changed = True
