"""Find attention in a graph, fused or written out, and give its query and key inputs of their own.

    scaled_dot_product_attention(query, key, value)
    matmul(softmax(... matmul(query, key) ...), value)        batched products of any spelling

Found by what is multiplied with what: masks, biases, scales, dropout and casts may lie between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.base import is_tensor, op_name
from mhc_compile.passes.graphs import ancestors, reachable

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Operand:
    """An operand of an operation."""

    reader: Node
    value: Node


@dataclass(frozen=True)
class Attention:
    """The operands of one attention."""

    query: Operand
    key: Operand


def attentions(graph: Graph, source: Node, ends: Sequence[Node]) -> list[Attention]:
    """Return the attentions between `source` and `ends`, in graph order."""
    behind = reachable([source], lambda n: n.users) & ancestors(ends)
    found = []
    for node in graph.nodes:
        if node not in behind:
            continue
        if node.target is _SDPA:
            query, key = (node.args[i] if len(node.args) > i else node.kwargs[x] for i, x in ((0, "query"), (1, "key")))
            found.append(Attention(Operand(node, query), Operand(node, key)))
        elif op_name(node) == "softmax" and (scores := _scores(node, behind)) and _weighs(node):
            query, key = [a for a in scores.args if isinstance(a, Node)][-2:]
            found.append(Attention(Operand(scores, query), Operand(scores, key)))
    return found


def _scores(softmax: Node, behind: set[Node]) -> Node | None:
    """Return the product of queries and keys that a softmax goes over: the nearest one."""
    queue = [softmax]
    for node in queue:  # grows
        if op_name(node) in _PRODUCTS:
            return node
        queue += [n for n in node.all_input_nodes if n in behind and n not in queue]
    return None


def _weighs(softmax: Node) -> bool:
    """Return whether a softmax's result is the left operand of a product."""
    queue = [softmax]
    for node in queue:  # grows
        for user in node.users:
            if op_name(user) in _PRODUCTS:
                operands = [a for a in user.args if isinstance(a, Node)]
                return bool(operands) and operands[0] is node
            if is_tensor(user) and user not in queue:
                queue.append(user)
    return False


def read_apart(graph: Graph, operand: Operand, source: Node, other: Node) -> None:
    """Compute `operand` from `other` where it is computed from `source`, by copies of the nodes between.

    `other` stands before all of them. Nothing happens where the operand does not depend on `source`.
    """
    between = reachable([source], lambda n: n.users) & ancestors([operand.value])
    copies = {source: other}
    for node in [n for n in graph.nodes if n in between and n is not source]:
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    if operand.value in copies:
        operand.reader.replace_input_with(operand.value, copies[operand.value])
