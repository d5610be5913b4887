"""Keep what a report needs of a run of passes, at the passes where it is there to see."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule, Node

from mhc_compile.config import Options
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, Mark, Pass, module_path, module_stack, shape, source_line, value
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.fuse import kernels_in
from mhc_compile.passes.observer import Debug, Observer
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.results import Coverage, ResidualStream
from mhc_compile.passes.text import describe
from mhc_compile.report.elements import Drawing, Found
from mhc_compile.report.inspection import KernelReport, SiteReport, StreamReport
from mhc_compile.report.layer import lines_of
from mhc_compile.report.lines import Line, Snapshots, input_name
from mhc_compile.report.native import draw_native
from mhc_compile.report.parts import Block, Stage, blocks_of, stages_of
from mhc_compile.report.topology import branch_nodes, topology


@dataclass
class Memories:
    """Which nodes look n-grams up, and for what."""

    layers: dict[Node, tuple[Mark, str]] = field(default_factory=dict)
    """The memory's layer by node."""
    over: dict[Node, Mark] = field(default_factory=dict)
    """The nodes of over-encodings."""


class Watcher(Observer):
    """An observer that keeps snapshots, streams, kernels, and the graph of one `layer` before and after `widen`."""

    def __init__(self, options: Options, layer: str | None, stages: int | None = None) -> None:
        super().__init__()
        self.options = options
        self.layer, self.count = layer, stages
        self.normalised: GraphModule | None = None
        self.before: list[str] = []
        self.after: list[str] = []
        self.begin([])

    def begin(self, marks: Sequence[Mark]) -> None:
        """Start over with the run that is reported."""
        self.records = []
        self.kernels: tuple[KernelReport, ...] = ()
        self.marks = marks
        self.shots = Snapshots({node: f"mhc.{name}" for m in marks for name, node in m.parameters.items()})
        self.found: list[Found] = []
        self.coverage: Coverage | None = None
        self.lines: list[list[Line]] = []
        """The graph before the first pass and after every pass."""
        self.texts: list[str] = []
        """The passes with their options."""
        self.purposes: list[str] = []
        """What the passes are for."""
        self.native: Drawing | None = None
        """Of a model with hyper-connections of its own."""
        self.memories = Memories()
        self.blocks: list[Block] | None = None
        self.stages: list[Stage] = []

    def run(self, step: Pass, gm: GraphModule, context: Context, debug: Debug) -> GraphModule:
        """Apply one pass under observation."""
        if not self.lines:
            self.lines.append(self.shots.take(gm.graph))
        if self.blocks is None and step.name in ("recompute", "fuse"):
            self.blocks = blocks_of(gm.graph, self.options)
            self.stages = stages_of(gm, self.count) if self.count is not None else []
        if step.name == "widen" and self.layer is not None:
            self.before = lines_of(self.lines[-1], self.layer)
        gm = super().run(step, gm, context, debug)
        self.lines.append(self.shots.take(gm.graph))
        self.records[-1].before, self.records[-1].after = (
            "\n".join(line.text for line in lines) for lines in self.lines[-2:]
        )
        self.texts.append(describe(step))
        self.purposes.append(_purpose(step))
        if step.name == "normalize":
            self.normalised = gm
        elif step.name == "residual":
            self.found, self.coverage = _found(gm, context), context.coverage
        elif step.name == "native" and context.native:
            self.native = draw_native(gm.graph)
        elif step.name in ("engram", "overencoding"):
            self._look_for_memories(step.name, context)
        elif step.name == "fuse":
            self.kernels = tuple(KernelReport(spec, device, n) for (spec, device), n in kernels_in(gm).items())
        elif step.name == "widen":
            named = {widened.stream.entry: widened.stream for widened in context.widened}
            self.found = [replace(f, stream=named.get(f.stream.entry, f.stream)) for f in self.found]
            self.after = lines_of(self.lines[-1], self.layer) if self.layer is not None else []
        return gm

    def _look_for_memories(self, name: str, context: Context) -> None:
        before = {line.node for line in self.lines[-2]}
        new = [line.node for line in self.lines[-1] if line.node not in before]
        for widened in context.widened:
            mark = widened.mark
            if name == "overencoding" and mark.over is not None:
                self.memories.over |= {n: mark for n in new if mark.owner in module_stack(n)}
            elif name == "engram" and mark.memory is not None:
                sinks = {m.layer: widened.reads[m.site] for m in mark.memory.layers if m.site in widened.reads}
                self.memories.layers |= {n: (mark, layer) for n, layer in _claimed(new, sinks).items()}

    # --- streams -------------------------------------------------------------------------------------------------

    def mark_of(self, stream: ResidualStream) -> Mark | None:
        """The mark of the converted owner around `stream`, None where it stays residual."""
        around = [m for m in self.marks if not m.owner or f"{stream.owner}.".startswith(f"{m.owner}.")]
        return max(around, key=lambda m: len(m.owner), default=None)

    def streams(self) -> tuple[StreamReport, ...]:
        """The streams, their sites named as their parameters are."""
        return tuple(self._stream_report(one) for one in self.found)

    def _stream_report(self, found: Found) -> StreamReport:
        stream, mark = found.stream, self.mark_of(found.stream)
        size = 0
        if mark is not None:
            spec = StreamSpec.parse(mark.spec)
            size = sum(math.prod(p.shape) for p in form_of(spec).parameters(spec, 0, stream.hidden).values())
        sites = [
            SiteReport(
                name=site.name,
                module=module_path(site.add),
                source=source_line(site.add),
                shape=tuple(map(str, shape(site.add))),
                dtype=str(value(site.add).dtype).removeprefix("torch."),
                topology=kind,
                parameters=size,
            )
            for site, kind in zip(stream.sites, found.topologies, strict=True)
        ]
        owner, text = (mark.owner, mark.spec) if mark is not None else (stream.owner, "")
        return StreamReport(owner, text, _place(stream.entry), _place(stream.exit), tuple(sites))


def _purpose(step: Pass) -> str:
    """The first line of what the pass's file says it is for; nothing for a pass of a file that says nothing."""
    written = sys.modules[type(step).__module__].__doc__ or ""
    return written.strip().partition("\n")[0].rstrip(".").replace("`", "")


def _found(gm: GraphModule, context: Context) -> list[Found]:
    flow = Dataflow(gm.graph, is_owned)
    return [
        Found(s, [topology(flow, s, site) for site in s.sites], [branch_nodes(flow, s, site) for site in s.sites])
        for s in context.streams
    ]


def _claimed(new: Sequence[Node], sinks: Mapping[str, Node]) -> dict[Node, str]:
    """The layer of every one of the nodes that a memory's pass made: of the first layer that reads it.

    What nobody reads (it writes the state) is of the layer whose values it reads.
    """
    found: dict[Node, str] = {}
    among = set(new)
    for layer, sink in sinks.items():
        stack = [sink]
        while stack:
            for node in stack.pop().all_input_nodes:
                if node in among and node not in found:
                    found[node] = layer
                    stack.append(node)
    for node in new:
        if node not in found and sinks:
            found[node] = next((found[n] for n in node.all_input_nodes if n in found), next(iter(sinks)))
    return found


def _place(node: Node) -> str:
    if node.op == "placeholder":
        return f"as the input {input_name(node)}"
    return f"at {module_path(node) or 'the model itself'}: {source_line(node) or node.name}"
