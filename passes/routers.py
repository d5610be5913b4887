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

from mhc_compile.passes.base import gradient_modes, is_tensor, op_name, value
from mhc_compile.passes.graphs import VIEWS, Writer, after, reachable, readers
from mhc_compile.passes.stages import COUNTER

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "einsum")
_SHAPED = {*VIEWS, "flatten", "unflatten", "contiguous", "to", "float", "type"}
"""What changes no value but in its last digits."""
_ADDS = ("add", "iadd", "add_")
_RISING = {*_SHAPED, *_ADDS, "masked_fill", "masked_fill_", "where", "topk", "sum", "max", "amax"}
"""What does not fall where a score rises."""
_CONSTANT = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "detach")
"""What gives its operand no gradient."""


@dataclass(frozen=True)
class Router:
    """One choice of experts for every token."""

    indices: Node
    """The numbers of the experts chosen, int64 `[..., k]` or `[...]`."""
    experts: int
    biases: tuple[Node, ...]
    """Placeholders with a value an expert that only the choice depends on."""
    unclear: tuple[Node, ...]
    """Those of them that are not simply added to the scores."""


def find_routers(graph: Graph, inputs: Collection[Node], logits: Node, others: Collection[Node] = ()) -> list[Router]:
    """Return the routers that `logits` depend on, in the order of the graph.

    `inputs`: the placeholders that are not the model's own. `others`: further outputs from which gradients come.
    """
    given = reachable(inputs, readers)
    modes = gradient_modes(graph)

    def with_gradient(node: Node) -> list[Node]:
        return [n for n in readers(node) if modes[n] is not False and _passes_on(n)]

    choices = {n: indices for n in graph.nodes if (indices := _chosen(n)) is not None}
    routers = []
    for choice, indices in choices.items():
        scores = choice.all_input_nodes[0]
        experts = int(value(scores).shape[-1])
        inside = reachable([scores], lambda n: () if op_name(n) in _PRODUCTS else n.all_input_nodes)
        products = [n for n in inside if op_name(n) in _PRODUCTS and int(value(n).shape[-1]) == experts]
        scored = any(not given.issuperset(n.all_input_nodes) for n in products)
        if not scored or logits not in reachable([indices], lambda n: () if n in choices else readers(n)):
            continue
        per_expert = [
            n for n in inside - given if n.op == "placeholder" and _floats(n) and value(n).numel() == experts > 1
        ]
        biases = tuple(n for n in per_expert if not {logits, *others} & reachable([n], with_gradient))
        unclear = tuple(n for n in biases if not _is_added(n, inside | {choice}))
        routers.append(Router(indices, experts, biases, unclear))
    return routers


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


def _floats(node: Node) -> bool:
    """Return whether a node may have a gradient: its value is of floating point, or no single tensor."""
    return not is_tensor(node) or value(node).is_floating_point()


def _passes_on(node: Node) -> bool:
    """Return whether a node may give its operands a gradient."""
    return _floats(node) and op_name(node) not in _CONSTANT


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
                below |= reachable([user], lambda n: [m for m in n.users if m in inside and _passes_on(m)])
    return all(op_name(n) in _RISING for n in below)
