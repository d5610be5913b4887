"""Where to cut a program into stages: by what its sites cost, modelled or measured on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import op_name, value
from mhc_compile.passes.stages import balanced, places
from mhc_compile.runtime.program import Program

Balance = Literal["model", "measure"] | Sequence[int]


def cuts(program: Program, count: int, balance: Balance = "model") -> list[int]:
    """The first site of every stage but the first, for `count` stages.

    `balance`: `model` weighs floating-point operations (embedding and head included), `measure` the seconds that one
    forward takes here, operation by operation; a list has the number of sites of every stage.
    Raises MHC620 for more stages than sites, and for a list that does not add up.
    """
    if not isinstance(balance, str):
        if len(balance) != count or sum(balance) != program.sites or min(balance) < 1:
            detail = f"{list(balance)} sites for {count} stages of a model with {program.sites} sites"
            raise MHCError("MHC620", detail)
        return [sum(balance[:k]) for k in range(1, count)]
    return balanced(site_costs(program, balance), count)


def site_costs(program: Program, by: Literal["model", "measure"] = "model") -> list[float]:
    """What every site costs, in floating-point operations or seconds of one forward.

    A node is counted with the site whose piece computes it; what every piece that reads it may compute again (the
    embedding, masks, a memory's projections), with the first of these.
    """
    count = program.sites
    place = places(program.graph.graph, range(1, count))
    for node in reversed(program.graph.graph.nodes):
        if node not in place:
            place[node] = min((place[u] for u in node.users if u.op != "output"), default=0)
    meter = _Counting(program) if by == "model" else _Timing(program)
    costs = [0.0] * count
    for node, cost in meter.costs().items():
        costs[place[node]] += cost
    return costs


def grouped_flops(a: Sequence[int], b: Sequence[int]) -> int:
    """Operations of a grouped matrix product of shapes `a` and `b`: every row meets the matrix of its group alone.

    PyTorch's own counter has no formula for it.
    """
    return 2 * math.prod(a) * int(b[-1])


class _Counting(Interpreter):
    """Counts the floating-point operations of every node on fake values; of equal nodes, one is computed."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self.found: dict[Node, float] = {}
        self.counter = FlopCounterMode(display=False)
        self._known: dict[str, float] = {}

    def costs(self) -> dict[Node, float]:
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        inputs = [value(n) for n in placeholders]
        mode = next(v.fake_mode for v in inputs if hasattr(v, "fake_mode"))
        with mode, torch.no_grad(), self.counter:
            self.run(*inputs)
        return self.found

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
        self.found[n] = self._known[key]
        return result


def _form(node: Node) -> Any:
    known = value(node)
    return f"{known.dtype} {tuple(known.shape)}" if isinstance(known, torch.Tensor) else node.name


class _Timing(Interpreter):
    """Times every node on tensors of the right shapes, the faster of two runs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self.found: dict[Node, float] = {}

    def costs(self) -> dict[Node, float]:
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        inputs = [_like(value(n)) for n in placeholders]
        for _ in range(2):
            with torch.no_grad():
                self.run(*inputs)
        return self.found

    def run_node(self, n: Node) -> Any:
        begin = time.perf_counter()
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        took = time.perf_counter() - begin
        self.found[n] = min(took, self.found.get(n, took))
        return result


def _like(fake: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape, dtype and device of `fake`; one value for all of it where nothing writes it."""
    one = torch.zeros((), dtype=fake.dtype, device=fake.device)
    if fake.is_floating_point():
        one.fill_(0.02)
    return one.expand(fake.shape)
