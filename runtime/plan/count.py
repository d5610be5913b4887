"""Operations and bytes of a graph of ATen nodes, by what bounds each on an accelerator.

Contractions (matrix products, attention) are kernels of their own: each takes the longer of its products and of its
traffic. Everything between them is pointwise and taken to be fused: what it costs is reading what contractions and
the graph's inputs give and writing what contractions and the outputs take, each value once.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mhc_compile.passes.base import op_name, value
from mhc_compile.passes.flops import grouped_flops
from mhc_compile.runtime.plan.attention import ATTEND, ATTEND_BACKWARD, BACKWARD, products

_VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "squeeze", "unsqueeze",
    "alias", "detach", "as_strided", "split", "split_with_sizes", "chunk", "unbind", "diagonal", "lift_fresh_copy",
}  # fmt: skip
_PICKS = {"embedding", "index", "gather", "index_select"}
"""Read as many values as they give, however many there are to choose from."""


@dataclass(frozen=True)
class Operation:
    """One kernel: multiplications and additions, and bytes to and from memory."""

    flops: float
    moved: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the seconds at these rates."""
        return max(self.flops / flops, self.moved / bandwidth)


def total(operations: Iterable[Operation], flops: float, bandwidth: float) -> float:
    """Return the seconds of all of them, one after the other."""
    return sum(o.seconds(flops, bandwidth) for o in operations)


def flops_of(node: Node) -> int:
    """Return the multiplications and additions of a contraction; 0 for anything else."""
    if node.op != "call_function":
        return 0
    shapes = [tuple(value(a).shape) for a in node.args if isinstance(a, Node) and isinstance(value(a), torch.Tensor)]
    if node.target is ATTEND:
        return products(*shapes)
    if node.target is ATTEND_BACKWARD:
        return int(BACKWARD * products(*shapes[1:4]))
    if "grouped_mm" in op_name(node):  # transformers' own backward op gives both gradients
        return grouped_flops(*shapes[:2]) * (2 if "backward" in op_name(node) else 1)
    packet = getattr(node.target, "overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    values: list[Any] = [value(a) if isinstance(a, Node) else a for a in node.args]
    keywords = {name: value(a) if isinstance(a, Node) else a for name, a in node.kwargs.items()}
    return int(formula(*values, **keywords, out_val=value(node)))


def operations(nodes: Sequence[Node], outputs: Collection[Node]) -> tuple[Operation, ...]:
    """Return the kernels of `nodes`, a part of a graph in its order, of which `outputs` are read later."""
    inside = set(nodes)
    kernels = []
    read: set[Node] = set()
    written: set[Node] = set()
    picked = 0
    heavy = {n for n in nodes if flops_of(n)}
    for node in nodes:
        if is_view(node):
            continue
        sources = {source(i) for i in node.all_input_nodes}
        if node in heavy:
            moved = sum(size_of(i) for i in node.all_input_nodes) + size_of(node)
            kernels.append(Operation(flops_of(node), moved))
            written |= {s for s in sources if s in inside and s not in heavy}
        elif op_name(node) in _PICKS:
            picked += size_of(node)
        else:
            read |= {s for s in sources if s not in inside or s in heavy}
    written |= {s for n in outputs if (s := source(n)) in inside and s not in heavy}
    fused = picked + sum(size_of(n) for n in read | written)
    return (*kernels, Operation(0, fused)) if fused else tuple(kernels)


def source(node: Node) -> Node:
    """Return the value of which `node` is a view, or one of several results."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_view(node: Node) -> bool:
    """Return whether `node` computes nothing."""
    return node.target is operator.getitem or (node.op == "call_function" and op_name(node) in _VIEWS)


def size_of(node: Node) -> int:
    """Return the bytes of the tensors that `node` gives."""
    return sum(t.nbytes for t in tree_leaves(value(node)) if isinstance(t, torch.Tensor))
