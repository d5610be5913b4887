"""Cut a backward graph into what is needed at once and what can wait.

    recompute    repeats a part of the forward: its last block, which the backward reads first. No gradient is needed.
    activations  the gradients of inputs that are no parameters, which the stage before waits for
    weights      what only parameters' gradients need

A zero-bubble schedule runs `weights` when it has nothing else to do (Qi et al. 2023, "Zero Bubble Pipeline
Parallelism"), and a rank that waits for a gradient can run `recompute` meanwhile.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.base import value
from mhc_compile.passes.graphs import ancestors, reachable

_CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)
_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


@dataclass(frozen=True)
class Part:
    """A piece of the backward as a graph of its own, which returns a tuple."""

    graph: GraphModule
    inputs: tuple[str, ...]
    """Names of its inputs: placeholders of the whole graph, or outputs of the parts before."""
    outputs: tuple[str, ...]
    """Names of its outputs in the whole graph."""


@dataclass(frozen=True)
class SplitBackward:
    """A backward graph in parts, to be run in this order. A part is None where nothing is left for it to compute."""

    placeholders: tuple[str, ...]
    """Names of the whole graph's inputs, in their order."""
    recompute: Part | None
    activations: Part | None
    weights: Part | None
    gradients: tuple[str | None, ...]
    """Name of the gradient of each input of the forward; None where there is none."""
    deferred: tuple[int, ...]
    """The positions, among `gradients`, of those that `weights` computes."""


def split_backward(gm: GraphModule, weights: Collection[int]) -> SplitBackward:
    """Cut the backward graph `gm` of AOTAutograd, which returns the gradient of each input of the forward.

    `weights` are the positions of the inputs that are parameters. The parts compute together what `gm` does, node by
    node and each node once; views, casts to a wider dtype and constants alone are repeated where a later part reads
    them, because they cost less than what would be kept. A parameter's gradient that `activations` computes on the way
    stays there. Nodes with side effects run in `weights`. `gm` is not changed.
    """
    graph = gm.graph
    output = graph.output_node()
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    results = [n if isinstance(n, Node) else None for n in returned]
    inner = {n for n in results if n is not None}
    first = _last_block(graph)
    early = _whole(ancestors(n for i, n in enumerate(results) if n is not None and i not in weights)) - first
    late = {n for n in ancestors([*inner, *(n for n in graph.nodes if _has_effect(n))]) if n not in early | first}
    first &= ancestors([*early, *late, *(inner & first)])
    sets = [_computing(s) for s in (first, early, late)]
    deferred = tuple(i for i, n in enumerate(results) if n in sets[2])
    recompute, activations, later = _parts(gm, sets, inner)
    return SplitBackward(
        placeholders=tuple(n.name for n in graph.find_nodes(op="placeholder")),
        recompute=recompute,
        activations=activations,
        weights=later,
        gradients=tuple(n.name if n is not None else None for n in results),
        deferred=deferred,
    )


def _parts(gm: GraphModule, sets: Sequence[set[Node]], results: set[Node]) -> list[Part | None]:
    """Return a part for each of the sets of nodes."""
    reads = [_reads(s) for s in sets]
    parts: list[Part | None] = []
    for i, nodes in enumerate(sets):
        later = {n for r in reads[i + 1 :] for n in r}
        gives = [n for n in gm.graph.nodes if n in nodes and (n in later or n in results)]
        parts.append(_part(gm, nodes, reads[i], gives) if nodes else None)
    return parts


def _reads(nodes: set[Node]) -> set[Node]:
    """Return the inputs of a part with these `nodes`: inputs of the graph and values that parts before it compute."""
    inputs = (p for n in nodes for p in n.all_input_nodes)
    seen = reachable(inputs, lambda n: n.all_input_nodes if n not in nodes and _is_repeated(n) else ())
    return {n for n in seen - nodes if not _is_repeated(n)}


def _part(gm: GraphModule, nodes: set[Node], reads: set[Node], gives: Sequence[Node]) -> Part:
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs = [n for n in gm.graph.nodes if n in reads]
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in gm.graph.nodes:
        repeated = _is_repeated(node) and all(n in copies for n in node.all_input_nodes)
        if node not in copies and (node in nodes or repeated):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in gives))
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr") and not _has_effect(node):
            graph.erase_node(node)
    return Part(GraphModule(gm, graph), tuple(n.name for n in inputs), tuple(n.name for n in gives))


def _last_block(graph: Graph) -> set[Node]:
    """Return what repeats the last recompute block, with all that it reads and that waits for no gradient either."""
    free: set[Node] = set()
    for node in graph.nodes:
        waits = "tangents" in node.name or any(n not in free for n in node.all_input_nodes)
        if node.op != "output" and not waits and not _has_effect(node):
            free.add(node)
    tagged = {n: b for n in free if n.op == "call_function" and (b := _block(n)) is not None}
    last = max(tagged.values(), default=None)
    return _whole(ancestors(n for n, block in tagged.items() if block == last))


def _block(node: Node) -> int | None:
    """Return the recompute block of a node that is recomputed, None for any other."""
    return node.meta.get("ac_graph_id") if node.meta.get("recompute") in _RECOMPUTED else None


def _whole(nodes: set[Node]) -> set[Node]:
    """Add every element of the tuples among `nodes`: tuples are not handed over."""
    return nodes | {u for n in nodes for u in n.users if u.target is operator.getitem}


def _computing(nodes: set[Node]) -> set[Node]:
    return {n for n in nodes if n.op not in ("placeholder", "get_attr", "output")}


def _is_repeated(node: Node) -> bool:
    """Return whether a part recomputes `node` rather than reading it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    result = value(node)
    if not isinstance(result, (Tensor, tuple, list)):
        return True  # a size
    if isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        return True
    operand = value(node.all_input_nodes[0]) if node.target in _CASTS else None
    return isinstance(operand, Tensor) and isinstance(result, Tensor) and operand.itemsize < result.itemsize


def _has_effect(node: Node) -> bool:
    return node.op == "call_function" and node.is_impure()
