"""Observe a run of passes and keep what a report needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from mhc_compile.passes.base import Context, Mark, Pass, is_tensor, value
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.flops import by_site, first_places, node_flops
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.observer import Debug, Observer
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.recompute import Recompute
from mhc_compile.passes.stages import balanced, site_nodes, split_graph
from mhc_compile.probes.sample import Sample
from mhc_compile.report.draw import StreamView
from mhc_compile.report.elements import Drawing
from mhc_compile.report.lines import Line, Snapshots, is_buffer
from mhc_compile.report.native import draw_native
from mhc_compile.report.topology import topology


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a graph."""

    sites: tuple[Node, ...]
    """Their coefficients."""
    nodes: frozenset[Node]
    """What it computes and no stage before it does."""
    parameters: int
    """Elements of the parameters that it reads."""


class Watcher(Observer):
    """An observer that keeps every graph as lines, and the results of passes that later passes change."""

    def __init__(self, stages: int | None = None, *, runs: bool = False, trace: Path | None = None) -> None:
        super().__init__()
        self.count = stages
        self.runs = runs
        """Whether a step of the graph after the last pass is to be run."""
        self.trace = trace
        """The file that the timeline of that step is written to; None writes none."""
        self.samples: Sequence[Sample] = ()
        """Samples of probes to be laid over the drawing."""
        self.inputs: list[Any] = []
        """The values of the graph's inputs."""
        self.begin([])

    def begin(self, marks: Sequence[Mark]) -> None:
        """Start over with the run that is reported."""
        self.records = []
        self.marks = marks
        self.context = Context()
        self.steps: list[Pass] = []
        self.shots = Snapshots({node: f"mhc.{name}" for m in marks for name, node in m.parameters.items()})
        self.graphs: list[list[Line]] = []
        """The graph before the first pass and after every pass."""
        self.gm: GraphModule | None = None
        """The graph after the last pass."""
        self.without_streams: GraphModule | None = None
        """The graph after the last pass before streams were found."""
        self.views: list[StreamView] = []
        self.native: Drawing | None = None
        """The drawing of a model with hyper-connections or attention over depth of its own."""
        self.widening: int | None = None
        """Number of the first graph whose streams are widened."""
        self.stages: list[Stage] = []

    def run(self, step: Pass, gm: GraphModule, context: Context, debug: Debug) -> GraphModule:
        """Apply one pass under observation."""
        if not self.graphs:
            self.graphs.append(self.shots.take(gm.graph))
        if self.count is not None and not self.stages and isinstance(step, Recompute | Fuse):
            self.stages = _stages(gm, self.count)
        self.gm = gm = super().run(step, gm, context, debug)
        self.context = context
        self.steps.append(step)
        self.graphs.append(self.shots.take(gm.graph))
        if not context.streams:
            self.without_streams = gm
        elif not self.views:
            self.views = _views(gm, context)
        if (context.native or context.native_reads) and self.native is None:
            self.native = draw_native(gm.graph)
        if context.widened and self.widening is None:
            self.widening = len(self.graphs) - 1
        return gm

    @property
    def streams(self) -> list[StreamView]:
        """The residual streams, their sites named as their parameters where they were widened."""
        named = {site.add: site for widened in self.context.widened for site in widened.stream.sites}
        views = []
        for view in self.views:
            sites = tuple(named.get(site.add, site) for site in view.stream.sites)
            views.append(replace(view, stream=replace(view.stream, sites=sites)))
        return views

    @property
    def nodes(self) -> list[Node]:
        """The nodes of all graphs, also those that were erased."""
        return list(dict.fromkeys(line.node for lines in self.graphs for line in lines))


def _views(gm: GraphModule, context: Context) -> list[StreamView]:
    flow = Dataflow(gm.graph, is_owned)
    views = []
    for stream in context.streams:
        topologies, branches = zip(*(topology(flow, stream, site) for site in stream.sites), strict=True)
        views.append(StreamView(stream, topologies, branches))
    return views


def _stages(gm: GraphModule, count: int) -> list[Stage]:
    """Return the graph in `count` stages of about equal cost.

    Raises MHC620 for more stages than sites, MHC621 where the graph cannot be cut between them.
    """
    coefficient_calls = site_nodes(gm.graph)
    starts = balanced(by_site(gm.graph, node_flops(gm)), count)
    places = first_places(gm.graph, starts)
    stages = []
    for k, piece in enumerate(split_graph(gm, starts)):
        names = {n.name for n in piece.graph.graph.nodes if n.op == "placeholder"}
        owned = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in names and is_owned(n)]
        stages.append(
            Stage(
                sites=tuple(coefficient_calls[i] for i in piece.sites),
                nodes=frozenset(n for n, place in places.items() if place == k),
                parameters=sum(value(n).numel() for n in owned if is_tensor(n) and not is_buffer(n)),
            )
        )
    return stages
