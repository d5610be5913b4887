"""Find where a graph chooses experts, what balances them, and count the tokens that each of them gets.

By structure. A choice (`topk`, `argmax`) over the last dimension of scores, which a product with weights gives, is a
router's if the numbers chosen reach the output without another choice on the way, as those of groups do not. A bias
that balances is added to the scores, one value an expert, and reaches the output through the numbers chosen alone: it
has no gradient, and a training loop moves it by the loads (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.base import is_tensor, op_name, value
from mhc_compile.passes.graphs import VIEWS, Writer, after, reachable, readers
from mhc_compile.passes.stages import COUNTER

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "einsum")
_SHAPED = {*VIEWS, "flatten", "unflatten", "contiguous", "to", "float", "type"}
"""Ops that keep every value, up to rounding."""
_ADDS = ("add", "iadd", "add_")
_RISING = {*_SHAPED, *_ADDS, "masked_fill", "masked_fill_", "where", "topk", "sum", "max", "amax"}
"""Ops whose result never falls when a score rises."""
_CONSTANT = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full")
"""Ops that read only the shape of their operand."""


@dataclass(frozen=True)
class Router:
    """One choice of experts for every token."""

    indices: Node
    """The numbers of the experts chosen, int64 `[..., k]` or `[...]`."""
    experts: int
    biases: tuple[Node, ...]
    """Placeholders with a value an expert that are added to the scores, and that only the choice depends on."""


def find_routers(graph: Graph, inputs: Collection[Node], outputs: Sequence[Node]) -> list[Router]:
    """Return the routers that the first of `outputs`, the logits, depends on, in the order of the graph.

    `inputs`: the placeholders that are not the model's own.
    """
    given = reachable(inputs, readers)
    choices = {n: indices for n in graph.nodes if (indices := _chosen(n)) is not None}
    routers = []
    for choice, indices in choices.items():
        scores = choice.all_input_nodes[0]
        experts = _width(scores)
        inside = reachable([scores], lambda n: () if op_name(n) in _PRODUCTS else n.all_input_nodes)
        # Scores may be the first of more: those of experts that every token goes to follow.
        cut = [
            m for n in inside if op_name(n) in ("getitem", "narrow") and _width(n) == experts for m in n.all_input_nodes
        ]
        widths = {experts, *map(_width, cut)} - {0}
        products = [n for n in inside if op_name(n) in _PRODUCTS and _width(n) in widths]
        weighted = any(_width(n) in value(m).shape for n in products for m in n.all_input_nodes if m not in given)
        if not weighted or outputs[0] not in reachable(readers(indices), lambda n: () if n in choices else readers(n)):
            continue
        own = [n for n in sorted(inside - given) if n.op == "placeholder" and value(n).numel() == experts]
        biases = [n for n in own if only_chooses(n, outputs) and _is_added(n, inside | {choice})]
        routers.append(Router(indices, experts, tuple(biases)))
    return routers


def only_chooses(node: Node, outputs: Collection[Node]) -> bool:
    """Return whether `outputs` depend on the floating-point vector `node` through integers and booleans alone."""
    fake = value(node)
    if not fake.is_floating_point() or not 1 < fake.numel() == max(fake.shape):
        return False
    values = reachable([node], lambda n: filter(_has_values, readers(n)))
    return values.isdisjoint(outputs) and not reachable([node], readers).isdisjoint(outputs)


def count_loads(graph: Graph, routers: Sequence[Router], names: Sequence[str]) -> list[Node]:
    """Add the counters of `routers`, called `names`: how many tokens each expert gets, int64 `[experts]`."""
    counters = []
    for router, name in zip(routers, names, strict=True):
        indices = router.indices
        with graph.inserting_before(after(indices)):
            write = Writer(graph, indices)
            flat = write.method("reshape", indices, -1)
            operands = write.method("new_zeros", indices, router.experts), 0, flat, write.call(torch.ones_like, flat)
            count = write.call(torch.scatter_add, *operands)
        with torch.no_grad():
            flat.meta["example_value"] = value(indices).reshape(-1)
            operands[0].meta["example_value"] = count.meta["example_value"] = value(indices).new_zeros(router.experts)
            operands[3].meta["example_value"] = torch.ones_like(value(flat))
        count.meta[COUNTER] = name
        counters.append(count)
    return counters


def _chosen(node: Node) -> Node | None:
    """Return the numbers that a choice over the last dimension gives; None if `node` is none, or nothing reads them."""
    scores = next(iter(node.all_input_nodes), None)
    if op_name(node) not in ("topk", "argmax") or scores is None or not is_tensor(scores):
        return None
    place, unsaid = (2, -1) if op_name(node) == "topk" else (1, None)
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else unsaid)
    ndim = value(scores).ndim
    if not isinstance(dim, int) or not ndim or dim % ndim != ndim - 1:
        return None
    if op_name(node) == "argmax":
        return node
    return next((u for u in node.users if op_name(u) == "getitem" and u.args[1] == 1), None)


def _width(node: Node) -> int:
    """Return the last dimension of a tensor; 0 of a scalar, and of what is no tensor."""
    return int(value(node).shape[-1]) if is_tensor(node) and value(node).ndim else 0


def _has_values(node: Node) -> bool:
    """Return whether a node may have floating-point or complex values that depend on its operands'."""
    exact = is_tensor(node) and not value(node).is_floating_point() and not value(node).is_complex()
    return not exact and op_name(node) not in _CONSTANT


def _is_added(bias: Node, inside: Collection[Node]) -> bool:
    """Return whether `bias` is added to scores, and what is made of the sum, `inside` the router, rises with it."""
    ahead, below = [bias], set()
    for node in ahead:  # grows: the bias in other shapes
        for user in node.users:
            if op_name(user) in _SHAPED:
                ahead.append(user)
            elif op_name(user) not in _ADDS or user.kwargs:
                return False
            else:
                below |= reachable([user], lambda n: [m for m in n.users if m in inside and _has_values(m)])
    return all(op_name(n) in _RISING and n.kwargs.get("largest", True) for n in below)
