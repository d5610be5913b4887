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
from mhc_compile.runtime.plan.count import size_of
from mhc_compile.runtime.program import Program

Balance = Literal["model", "measure"] | Sequence[int]
INTENSITY = 250.0
"""Operations of bfloat16 matrices in the time of a byte to or from memory: of accelerators, 150 to 300."""


def cuts(program: Program, count: int, balance: Balance = "model", *, accelerated: bool | None = None) -> list[int]:
    """Return the first site of every stage but the first, for `count` stages.

    `balance`: `model` weighs what sites compute and move (`site_costs`, embedding and head included), `measure` the
    seconds that one forward takes here, operation by operation; a list has the number of sites of every stage.
    Raises MHC620 for more stages than sites, and for a list that does not add up.
    """
    if not isinstance(balance, str):
        if len(balance) != count or sum(balance) != program.sites or min(balance) < 1:
            detail = f"{list(balance)} sites for {count} stages of a model with {program.sites} sites"
            raise MHCError("MHC620", detail)
        return list(accumulate(balance[:-1]))
    return balanced(site_costs(program, balance, accelerated=accelerated), count)


def site_costs(
    program: Program, by: Literal["model", "measure"] = "model", *, accelerated: bool | None = None
) -> list[float]:
    """Return what every site costs, in floating-point operations or seconds of one forward (`by_site`).

    `accelerated`: the time of a microbatch, forward and backward, in the operations that an accelerator does in it;
    experts that few tokens reach take the time of reading their weights. None: where the program is for one.
    """
    graph = program.graph
    if by == "measure":
        return by_site(graph.graph, _Timing(program).costs())
    flops = node_flops(graph)
    if accelerated is None:
        accelerated = value(graph.graph.find_nodes(op="placeholder")[0]).device.type != "cpu"
    return by_site(graph.graph, _times(program, flops) if accelerated else flops)


def _times(program: Program, flops: dict[Node, float]) -> dict[Node, float]:
    """Return the time of every node, in operations; what is pointwise in a branch is taken to be free."""
    times = {}
    for node, operations in flops.items():
        known = value(node)
        if node.op == "placeholder" and program.names.get(node.name) in program.parameters:
            # Once a microbatch its gradient is read and added to the float32 one.
            times[node] = INTENSITY * known.numel() * (known.itemsize + 2 * torch.float32.itemsize)
        elif operations:
            times[node] = 3 * max(operations, INTENSITY * (size_of(node) + sum(map(size_of, node.all_input_nodes))))
        else:
            times[node] = 3 * INTENSITY * size_of(node) if getattr(node.target, "namespace", "") == "mhc" else 0.0
    logits = program.graph.graph.output_node().all_input_nodes[0]
    times[logits] += INTENSITY * (2 * size_of(logits) + 8 * torch.float32.itemsize * value(logits).numel())
    return times


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
