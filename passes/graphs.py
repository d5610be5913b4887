"""Read and extend a graph: the one spelling of what several passes do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Graph, Node

from mhc_compile.passes.base import copy_meta, op_name

VIEWS = ("getitem", "view", "reshape", "transpose", "select", "narrow", "unsqueeze", "squeeze", "permute", "expand")


def reachable(roots: Iterable[Node], further: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Return `roots` and all that `further`, called on each, leads to."""
    reached: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += further(node)
    return reached


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Return `nodes` and all that they are computed from."""
    return reachable(nodes, lambda n: n.all_input_nodes)


def after(*nodes: Node) -> Node:
    """Return the first node after all `nodes` that is no input of the graph: the node to insert before."""
    place = max(nodes).next
    while place.op == "placeholder":
        place = place.next
    return place


def writes(node: Node) -> bool:
    """Return whether `node` changes its first operand in place."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    name = op_name(node)
    in_place = name.endswith("_") and not name.endswith("__") and not name.startswith("_")
    return (
        in_place
        if node.op == "call_method"
        else node.op == "call_function" and (node.target is operator.setitem or in_place)
    )


def base_of(node: object) -> Node | None:
    """Return the tensor of which `node` is a view."""
    while isinstance(node, Node) and op_name(node) in VIEWS and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node if isinstance(node, Node) else None


def readers(node: Node) -> list[Node]:
    """Return the nodes that read `node`, or where it writes into a value, that value, directly or through views."""
    base = base_of(node.args[0]) if writes(node) else None
    written = [] if base is None else list(base.users)
    for user in written:  # grows
        if op_name(user) in VIEWS:
            written += user.users
    return [*node.users, *written]


class Writer:
    """Inserts nodes at the graph's insertion point, with the provenance of `like`: module path, source line, tags."""

    def __init__(self, graph: Graph, like: Node | None = None) -> None:
        self.graph = graph
        self.like = like

    def call(self, target: Callable[..., Any], *args: Any, like: Node | None = None) -> Node:
        """Insert the call of a function."""
        return self._with_meta(self.graph.call_function(target, args), like)

    def method(self, name: str, *args: Any, like: Node | None = None) -> Node:
        """Insert the call of a method."""
        return self._with_meta(self.graph.call_method(name, args), like)

    def item(self, node: Node, index: int) -> Node:
        """Return an element of a tuple: the node that there is, or a new one."""
        items = (u for u in node.users if u.target is operator.getitem and u.args[1] == index)
        return next(items, None) or self.call(operator.getitem, node, index, like=node)

    def _with_meta(self, new: Node, like: Node | None) -> Node:
        source = like or self.like
        return new if source is None else copy_meta(new, source)
