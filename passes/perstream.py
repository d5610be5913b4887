"""Apply what a residual model does to its stream between two sites (norms, scales, casts, views) to every stream."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.base import copy_meta, is_tensor, op_name, shape

# Elementwise in one operand: the same call serves [..., C] and [..., n, C].
UNARY = {
    "to", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "dropout", "neg", "abs", "rsqrt",
    "sqrt", "pow", "square", "tanh", "sigmoid", "silu", "gelu", "relu", "exp", "reciprocal",
}  # fmt: skip
# Elementwise in several: operands from outside the stream get a dimension for the streams.
POINTWISE = {"add", "sub", "mul", "truediv", "div", "where", "masked_fill", "maximum", "minimum", "clamp", "multiply"}
REDUCTIONS = {"mean", "sum", "var", "amax"}
NORMS = {"layer_norm", "rms_norm"}


def apply_per_stream(graph: Graph, source: Node, chain: Sequence[Node], wide: dict[Node, Node], n: int) -> None:
    """Extend `wide` (plain stream value -> its [..., n, C] form) over `chain`, whose values come from `source`.

    Operations with a form for the extra dimension are rewritten; a chain with any other operation runs once per stream.
    """
    members = {source, *chain}
    if all(has_wide_form(node, members, len(shape(source))) for node in chain):
        for node in chain:
            # Before the next node, not after this one: FX puts what is inserted "after" in reverse order.
            with graph.inserting_before(node.next):
                wide[node] = _widened(graph, node, members, wide)
    elif chain:
        _once_per_stream(graph, source, chain, wide, n)


def has_wide_form(node: Node, members: set[Node], ndim: int) -> bool:
    """Return whether one call of `node` computes all streams at once; `members` are n-stream, the rest is not."""
    name = op_name(node)
    inside = [a for a in node.all_input_nodes if a in members]
    if not is_tensor(node) or len(shape(node)) != ndim or any(len(shape(a)) != ndim for a in inside):
        return False
    if name in UNARY:
        return node.all_input_nodes == inside
    if name in POINTWISE:
        return True
    if name in REDUCTIONS:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
        return dim in (-1, (-1,), [-1]) and keep is True
    if name in NORMS:
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return isinstance(sizes, (tuple, list, torch.Size)) and len(sizes) == 1
    return False


def _widened(graph: Graph, node: Node, members: set[Node], wide: dict[Node, Node]) -> Node:
    extended: dict[Node, Node] = {}
    if op_name(node) in POINTWISE:
        for a in node.all_input_nodes:
            if a not in members and is_tensor(a) and len(shape(a)) >= 2:
                extended[a] = copy_meta(graph.call_method("unsqueeze", (a, -2)), node)

    def swap(a: Node) -> Node:
        return wide[a] if a in members else extended.get(a, a)

    new = graph.create_node(
        node.op, node.target, torch.fx.map_arg(node.args, swap), torch.fx.map_arg(node.kwargs, swap)
    )
    return copy_meta(new, node)


def _once_per_stream(graph: Graph, source: Node, chain: Sequence[Node], wide: dict[Node, Node], n: int) -> None:
    following = {node: node.next for node in chain}
    with graph.inserting_before(following[chain[0]]):
        parts = copy_meta(graph.call_function(torch.unbind, (wide[source], -2)), chain[0])
        each = [copy_meta(graph.call_function(operator.getitem, (parts, i)), chain[0]) for i in range(n)]
    per_stream: list[dict[Node, Node]] = [{source: part} for part in each]
    for node in chain:
        # After this node, not after the chain: what reads it may come before the chain's end.
        with graph.inserting_before(following[node]):
            for env in per_stream:
                env[node] = copy_meta(graph.node_copy(node, lambda a, env=env: env.get(a, a)), node)  # type: ignore[misc]
            if is_tensor(node) and len(shape(node)) >= 1:
                stacked: Any = graph.call_function(torch.stack, ([env[node] for env in per_stream], -2))
                wide[node] = copy_meta(stacked, node)
