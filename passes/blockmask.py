"""Rewrite the causal mask of a graph's attentions to a block-causal or a bidirectional one (arXiv 2508.02193).

    scaled_dot_product_attention(..., is_causal=True)      gets a mask of positions
    key <= query, key > query                              key // size <= query // size, key // size > query // size
    tril(x), triu(x, 1)                                    x where blocks of positions are in this order, else 0

The comparisons are those of positions, keys along the last dimension and queries along the one before, that reach the
mask of an attention. What else the mask is made of stays: padding, documents, the beginning of a sliding window. A
position sees its whole block and all blocks before it; blocks count from position 0, cached keys included.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.attention import PRODUCTS, SDPA, mixed_of, scores_of
from mhc_compile.passes.base import Context, is_tensor, op_name, refuse, shape, value
from mhc_compile.passes.graphs import Writer

_ORDERS = {
    "le": "le", "less_equal": "le", "lt": "lt", "less": "lt", "ge": "ge", "greater_equal": "ge", "gt": "gt",
    "greater": "gt",
}  # fmt: skip
_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}
_NOT = ("invert", "bitwise_not", "logical_not")
_FILLED = ("full", "full_like", "new_full", "tensor", "scalar_tensor")
_FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_FLEX = ("flex_attention", "flex_attention_hop")


@dataclass(frozen=True)
class BlockMask:
    """Widens causal attention to blocks of `size` positions; to all positions where `size` is 0.

    Raises MHC204 for a negative size, MHC113 for a graph without causal attention, and for masks that are passed in,
    strict, or hidden in a function.
    """

    size: int = 0

    name: ClassVar[str] = "blockmask"
    requires: ClassVar[tuple[str, ...]] = ("normal-form",)
    provides: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0:
            raise MHCError("MHC204", f"blocks of {self.size!r} positions", way_out="name a size of 1 or more")

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        found: dict[Node, _Order] = {}
        fused: list[Node] = []
        last, free, single = None, 0, 0
        for attention, masks in _attentions(gm.graph):
            last = attention
            search = _Search()
            for mask in masks:
                search.visit(mask, True)
            causal = attention.target is SDPA and _argument(attention, 5, "is_causal") is True
            if causal:
                fused.append(attention)
            elif search.strict is not None:
                raise refuse("MHC113", "a position is masked for itself, which no block is", search.strict)
            elif search.unknown is not None and not search.orders:
                raise refuse("MHC113", "an order that is not key <= query", search.unknown)
            elif search.orders:
                found |= search.orders
            elif search.inputs:
                shown = ", ".join(f"{n.name} {list(shape(n))}" for n in search.inputs)
                raise refuse("MHC113", f"the mask is made outside of the graph: {shown}", attention)
            elif _queries(attention) == 1:
                single += 1
            else:
                free += 1
        if not (found or fused or single):
            detail = "no attention was found" if last is None else "no mask of its attentions compares positions"
            raise refuse("MHC113", detail, last)
        for order in found.values():
            _Rewrite(gm.graph, order.node, self.size).order(order)
        for attention in fused:
            _Rewrite(gm.graph, attention, self.size).fused()
        kind = f"blocks of {self.size}" if self.size else "bidirectional"
        rest = f", {free} attentions see everything" * bool(free) + f", {single} have one query" * bool(single)
        context.notes.append(f"{kind}: {len(found)} comparisons of positions, {len(fused)} flags{rest}")
        return gm


@dataclass(frozen=True)
class _Order:
    """A node that is true, or keeps its operand, where a key is not behind its query; `after`: where it is behind."""

    node: Node
    after: bool
    query: Node | None = None
    key: Node | None = None
    """Positions; None for `tril` and `triu`."""


@dataclass
class _Search:
    """Walks from an attention's mask to the comparisons of positions in it."""

    orders: dict[Node, _Order] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    """Inputs that are masks of queries by keys, as their shapes tell."""
    strict: Node | None = None
    unknown: Node | None = None
    """A comparison of integers that is neither an order of keys and queries nor where a window begins."""
    seen: set[tuple[Node, bool]] = field(default_factory=set)

    def visit(self, node: Any, allows: bool) -> None:
        """Walk up from `node`, true (or larger) where keys are seen, or with `allows` False where they are not."""
        stack = [(node, allows)]
        while stack:
            node, allows = stack.pop()
            if not isinstance(node, Node) or not is_tensor(node) or (node, allows) in self.seen:
                continue
            self.seen.add((node, allows))
            name = op_name(node)
            if name in (*PRODUCTS, "softmax", "linear", "embedding"):
                continue  # scores, and biases by distance
            if node.op in ("placeholder", "get_attr"):
                if _is_square(shape(node)):
                    self.inputs.append(node)
            elif (name == "triu" and _diagonal(node) == 1) or (name == "tril" and _diagonal(node) == 0):
                self.orders[node] = _Order(node, name == "triu")
            elif name in _ORDERS and len(shape(node)) > 1:
                self._order(node, allows)
            else:
                stack += _operands(node, name, allows)

    def _order(self, node: Node, allows: bool) -> None:
        if (compared := _compared(node)) is None:
            self.unknown = node
            return
        key, relation, query = compared
        if relation == ("le" if allows else "gt"):
            self.orders[node] = _Order(node, not allows, query, key)
        elif relation == ("lt" if allows else "ge"):
            self.strict = node


def _operands(node: Node, name: str, allows: bool) -> Iterator[tuple[Any, bool]]:
    """Yield the operands of `node` that a mask is made of, each with whether it allows where it is true or larger."""
    args = node.args
    if name in _NOT or (name == "eq" and args[1] in (0, False)) or name == "rsub" or name == "neg":
        yield args[0], not allows
    elif name == "where" and len(args) == 3:
        yield args[0], allows != (_forbids(args[1]) and not _forbids(args[2]))
        yield from ((a, allows) for a in args[1:])
    elif name in ("masked_fill", "masked_fill_") and len(args) == 3:
        yield args[1], allows == (not _forbids(args[2]))
        yield args[0], allows
    elif name in ("sub", "subtract") and len(args) == 2:
        yield args[0], allows
        yield args[1], not allows
    elif name in ("mul", "multiply", "div", "truediv"):
        yield from ((n, allows != any(map(_negative, args))) for n in node.all_input_nodes)
    elif name == "getitem":
        yield args[0], allows
    else:
        yield from ((n, allows) for n in node.all_input_nodes)


def _compared(node: Node) -> tuple[Node, str, Node] | None:
    """Return key, relation and query where integers along the last dimension are compared with some along the rows."""
    left, right = node.args[:2]
    if not (isinstance(left, Node) and isinstance(right, Node) and is_tensor(left) and is_tensor(right)):
        return None
    if value(left).dtype.is_floating_point or value(right).dtype.is_floating_point:
        return None
    relation = _ORDERS[op_name(node)]
    if _is_row(shape(left)) and _is_column(shape(right)):
        return left, relation, right
    if _is_row(shape(right)) and _is_column(shape(left)):
        return right, _MIRRORED[relation], left
    return None


def _is_square(sizes: tuple[Any, ...]) -> bool:
    """Return whether a mask of these sizes tells queries and keys apart."""
    return len(sizes) > 1 and 1 not in sizes[-2:] and (len(sizes) > 2 or sizes[0] == sizes[1])


def _is_row(sizes: tuple[Any, ...]) -> bool:
    return bool(sizes) and (len(sizes) == 1 or sizes[-2] == 1)


def _is_column(sizes: tuple[Any, ...]) -> bool:
    return len(sizes) > 1 and sizes[-1] == 1


def _attentions(graph: Graph) -> Iterator[tuple[Node, list[Any]]]:
    """Yield every attention's node, the fused one or the softmax, with what its mask is part of."""
    everything = set(graph.nodes)
    for node in graph.nodes:
        if node.target is SDPA:
            yield node, [_argument(node, 3, "attn_mask")]
        elif op_name(node) in _FLEX:
            raise refuse("MHC113", "flex_attention hides its mask in a function", node)
        elif op_name(node) == "softmax" and scores_of(node, everything) and mixed_of(node):
            yield node, [node.args[0] if node.args else node.kwargs["input"]]


def _queries(attention: Node) -> Any:
    """Return the number of queries."""
    return shape(attention)[-2]


def _argument(node: Node, at: int, name: str) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def _diagonal(node: Node) -> Any:
    return _argument(node, 1, "diagonal") or 0


def _negative(a: object) -> bool:
    if isinstance(a, Node) and op_name(a) in _FILLED:
        a = next((x for x in (*reversed(a.args), a.kwargs.get("fill_value")) if isinstance(x, (int, float))), None)
    return isinstance(a, (int, float)) and a < 0


def _forbids(a: object) -> bool:
    """Return whether a mask that has the value `a` forbids: -inf and its like, False."""
    return a is False or _negative(a)


class _Rewrite(Writer):
    """Puts the order of blocks in the place of one order of positions."""

    def __init__(self, graph: Graph, node: Node, size: int) -> None:
        super().__init__(graph, node)
        self.node, self.size = node, size

    def order(self, order: _Order) -> None:
        """Replace a comparison, or a triangle."""
        with self.graph.inserting_before(self.node.next):
            new = self._triangle(order) if order.query is None else self._comparison(order)
        self.node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if not self.node.users:
            self.graph.erase_node(self.node)

    def fused(self) -> None:
        """Give an attention a mask in the place of its flag."""
        node = self.node
        given = dict(zip(_FUSED, node.args, strict=False)) | node.kwargs
        mask = None
        if self.size:
            with self.graph.inserting_before(node):
                queries = self.method("unsqueeze", self._positions(given["query"], -2), -1)
                mask = self._blocks(queries, self._positions(given["key"], -2), after=False)
        operands = tuple(given.pop(name) for name in _FUSED[:3])
        node.args, node.kwargs = operands, {**given, "attn_mask": mask, "is_causal": False}

    def _comparison(self, order: _Order) -> Node:
        if self.size:
            return self._blocks(order.query, order.key, after=order.after)
        return self.call(torch.zeros_like if order.after else torch.ones_like, self.node)

    def _triangle(self, order: _Order) -> Node:
        x = self.node.args[0]
        if not self.size:
            return self.call(torch.zeros_like, x) if order.after else self.call(torch.clone, x)
        queries = self.method("unsqueeze", self._positions(x, -2), -1)
        keep = self._blocks(queries, self._positions(x, -1), after=order.after)
        return self.call(torch.where, keep, x, self.call(torch.zeros_like, x))

    def _positions(self, x: Any, dim: int) -> Node:
        """Return 0, 1, ... along a dimension of `x`."""
        length = value(x).shape[dim]
        new = self.call(torch.arange, length if isinstance(length, int) else self.method("size", x, dim))
        new.kwargs = {"device": value(x).device}
        return new

    def _blocks(self, query: Node | None, key: Node | None, *, after: bool) -> Node:
        """Return where the key's block is not behind the query's, or with `after` where it is."""
        keys, queries = (self.call(operator.floordiv, positions, self.size) for positions in (key, query))
        return self.call(operator.gt if after else operator.le, keys, queries)
