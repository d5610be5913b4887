"""A toy's graph with look-ups inserted, and what it computes with every parameter at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepping import CHECKED, captured, randomise, run
from torch import Tensor, nn
from torch.fx import GraphModule

from mhc_compile.attach import append_parameters, graph_inputs, sites_of_owners
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, Pass
from mhc_compile.passes.observer import Observer
from mhc_compile.passes.pipeline import ANALYSIS
from mhc_compile.passes.widen import Widen

SPEC = StreamSpec(streams=3)


@dataclass
class Inserted:
    """The graph, what it takes, and what it gave before the pass."""

    graph: GraphModule
    inputs: list[Any]
    held: StreamParameters
    sites: list[str]
    without: list[Tensor]


def insert(work: Pass, request: Any, model: nn.Module, ids: Tensor) -> Inserted:
    """The passes up to `work`, for what `request` asks; every parameter random and in float64."""
    found, context = captured(model, ids), Context()
    gm = ANALYSIS.run(found.graph, context, debug=CHECKED.debug)
    ((owner, sites),) = sites_of_owners(context.streams, SPEC).items()
    held = randomise(StreamParameters(SPEC, sites, **request.of(context.streams[0].entry, list(sites))), 1)
    for name in held.memories.tables:
        held.table(name).start(5, 1.0)
    context.marks = [append_parameters(gm, owner, held)]
    inputs = [*found.inputs, *graph_inputs(held).values()]
    order = [site.name for site in context.streams[0].sites]
    gm = step(Widen(), gm, context)
    without = run(gm, inputs)
    return Inserted(step(work, gm, context), inputs, held, order, without)


def step(work: Pass, gm: GraphModule, context: Context) -> GraphModule:
    """One pass under observation, which verifies the whole graph."""
    gm = Observer().run(work, gm, context, CHECKED)
    gm.recompile()
    return gm
