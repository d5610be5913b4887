"""Where to cut a program into stages: by what its sites cost, modelled or measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    """What every site costs, in floating-point operations or seconds of one forward (`by_site`)."""
    graph = program.graph
    return by_site(graph.graph, node_flops(graph) if by == "model" else _Timing(program).costs())


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
