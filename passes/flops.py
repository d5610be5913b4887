"""What the sites of a dialect graph cost in floating-point operations, which is what stages are balanced by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.passes.base import op_name, value
from mhc_compile.passes.stages import places, site_nodes


def node_flops(gm: GraphModule) -> dict[Node, float]:
    """Return the floating-point operations of every node in one forward; nothing is computed."""
    return _Counting(gm).costs()


def by_site(graph: Graph, costs: Mapping[Node, float]) -> list[float]:
    """Return what every site costs, given the costs of nodes.

    A node is counted with the site whose piece computes it; what every piece that reads it may recompute (the
    embedding, masks, a memory's projections), with the first of these.
    """
    count = len(site_nodes(graph))
    place = first_places(graph, range(1, count))
    costs_by_site = [0.0] * count
    for node, cost in costs.items():
        costs_by_site[place[node]] += cost
    return costs_by_site


def first_places(graph: Graph, starts: Sequence[int]) -> dict[Node, int]:
    """Return the piece of every node; for what several pieces compute, the first of them."""
    place = places(graph, starts)
    for node in reversed(graph.nodes):
        if node not in place:
            place[node] = min((place[u] for u in node.users if u.op != "output"), default=0)
    return place


def grouped_flops(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the operations of a grouped matrix product of shapes `a` and `b`: a row meets its group's matrix alone.

    PyTorch's own counter has no formula for it.
    """
    return 2 * math.prod(a) * int(b[-1])


class _Counting(Interpreter):
    """Counts the floating-point operations of every node on fake values; of equal nodes, one is computed."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.flops: dict[Node, float] = {}
        self.counter = FlopCounterMode(display=False)
        self._known: dict[str, float] = {}

    def costs(self) -> dict[Node, float]:
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        inputs = [value(n) for n in placeholders]
        mode = next(v.fake_mode for v in inputs if hasattr(v, "fake_mode"))
        with mode, torch.no_grad(), self.counter:
            self.run(*inputs)
        return self.flops

    def run_node(self, n: Node) -> Any:
        key = f"{n.op} {n.target} {map_arg((n.args, n.kwargs), _form)}"
        result = value(n)
        if key not in self._known or result is None:
            before = self.counter.get_total_flops()
            result = super().run_node(n)
            self._known[key] = float(self.counter.get_total_flops() - before)
            if "grouped_mm" in op_name(n):
                a, b = (value(i) for i in n.all_input_nodes[:2])
                self._known[key] += grouped_flops(a.shape, b.shape)
        self.flops[n] = self._known[key]
        return result


def _form(node: Node) -> Any:
    known = value(node)
    return f"{known.dtype} {tuple(known.shape)}" if isinstance(known, torch.Tensor) else node.name
