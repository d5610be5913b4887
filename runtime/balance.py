"""Where to cut a program into stages: by what its sites cost, modelled or measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch.fx import Interpreter, Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import value
from mhc_compile.passes.flops import by_site, node_flops
from mhc_compile.passes.stages import balanced
from mhc_compile.runtime.program import Program

Balance = Literal["model", "measure"] | Sequence[int]


def cuts(program: Program, count: int, balance: Balance = "model") -> list[int]:
    """Return the first site of every stage but the first, for `count` stages.

    `balance`: `model` weighs floating-point operations (embedding and head included), `measure` the seconds that one
    forward takes here, operation by operation; a list has the number of sites of every stage.
    Raises MHC620 for more stages than sites, and for a list that does not add up.
    """
    if not isinstance(balance, str):
        if len(balance) != count or sum(balance) != program.sites or min(balance) < 1:
            detail = f"{list(balance)} sites for {count} stages of a model with {program.sites} sites"
            raise MHCError("MHC620", detail)
        return list(accumulate(balance[:-1]))
    return balanced(site_costs(program, balance), count)


def site_costs(program: Program, by: Literal["model", "measure"] = "model") -> list[float]:
    """Return what every site costs, in floating-point operations or seconds of one forward (`by_site`)."""
    graph = program.graph
    return by_site(graph.graph, node_flops(graph) if by == "model" else _Timing(program).costs())


class _Timing(Interpreter):
    """Times every node on tensors of the right shapes, the faster of two runs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self.seconds: dict[Node, float] = {}

    def costs(self) -> dict[Node, float]:
        inputs = [_like(value(n)) for n in self.graph.find_nodes(op="placeholder")]
        for _ in range(2):
            with torch.no_grad():
                self.run(*inputs)
        return self.seconds

    def run_node(self, n: Node) -> Any:
        begin = time.perf_counter()
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        took = time.perf_counter() - begin
        self.seconds[n] = min(took, self.seconds.get(n, took))
        return result


def _like(fake: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the shape, dtype and device of `fake`, whose elements share one value in memory."""
    one = torch.full((), 0.02 if fake.is_floating_point() else 0, dtype=fake.dtype, device=fake.device)
    return one.expand(fake.shape)
