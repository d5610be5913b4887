"""Look at a model without changing it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from mhc_compile.capture import Captured, capture, find_marks, private_copy
from mhc_compile.config import Options, split_options, stream_spec
from mhc_compile.convert.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.inspect.inspection import Inspection, KernelReport, LayerView, MemoryReport, SiteReport, StreamReport
from mhc_compile.inspect.layer import input_name, lines_of
from mhc_compile.inspect.reach import reach
from mhc_compile.inspect.topology import topology
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters, owners
from mhc_compile.passes.base import Context, Mark, Pass, module_path, shape, source_line, value
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.fuse import chains_of
from mhc_compile.passes.ownership import OWNED, is_owned
from mhc_compile.passes.residual import ResidualStream
from mhc_compile.pipeline import ANALYSIS, Observer, compile_passes, native_passes, run_passes


def inspect(
    model: nn.Module,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    layer: str | None = None,
    **options: Any,
) -> Inspection:
    """What the compiler sees in `model`, converted or not: streams and sites, what each pass does, or why it refuses.

    The model is neither run nor changed. `example_args` and `example_kwargs` are one call's inputs, used for shapes;
    Hugging Face models need none. `layer` is a module path (`model.layers.0`) whose graph is shown before and after the
    streams are widened. `options` are the fields of `StreamSpec` that an unconverted model would be converted with.

    Raises `MHCError`: MHC204 for options, MHC209 without inputs, MHC507 for a layer that is not in the graph. A model
    that cannot be converted raises nothing: `Inspection.refusal` and `.reach` say why, and `.native` lists the
    hyper-connections that a multi-stream model has of its own.
    """
    given, own = split_options(options)
    settings = Options(**own)
    spec = stream_spec(given)
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    args, kwargs = example_args, dict(example_kwargs or {})
    if not args and not kwargs:
        kwargs = example_inputs(model)
    held = owners(model)
    ours = {id(p) for parameters in held.values() for p in parameters.parameters()}
    about: dict[str, Any] = {
        "model": type(model).__name__,
        "converted": bool(held),
        "parameters": sum(p.numel() for p in model.parameters() if id(p) not in ours),
        "memories": tuple(m for path, parameters in held.items() for m in _memories(path, parameters)),
    }
    watcher = _Watcher(layer)
    try:
        with torch.no_grad():
            captured = capture(model, args, kwargs)
        marks = find_marks(captured.graph) if about["converted"] else _imagined(captured, spec, settings, watcher)
        watcher.begin(marks)
        run_passes(captured.graph, Context(marks=marks), compile_passes(settings), settings, watcher)
    except MHCError as error:
        if error.code == "MHC507":
            raise
        if error.code == "MHC107":
            own_streams, watcher = Context(), _Watcher(None)
            run_passes(captured.graph, own_streams, native_passes(settings), settings, watcher)
            sites = tuple(own_streams.native)
            about["kernels"] = watcher.kernels
            return Inspection(**about, passes=tuple(watcher.records), refusal=error, native=sites)
        found = reach(watcher.normalised) if watcher.normalised is not None else None
        return Inspection(**about, passes=tuple(watcher.records), refusal=error, reach=found)
    view = LayerView(layer, tuple(watcher.before), tuple(watcher.after)) if layer is not None else None
    head = sum(_head_size(m) for m in {m.owner: m for m in marks}.values())
    return Inspection(
        **about,
        streams=watcher.streams(),
        head_parameters=head,
        passes=tuple(watcher.records),
        layer=view,
        kernels=watcher.kernels,
    )


def _memories(owner: str, parameters: StreamParameters) -> Iterator[MemoryReport]:
    if parameters.memory is None:
        return
    for m in parameters.memory.layers:
        table = parameters.table(m.layer)
        held = (p.numel() for name, p in parameters.in_graph().items() if name.startswith(f"engram.{m.layer}."))
        yield MemoryReport(
            layer=f"{owner}.{m.layer}".strip("."),
            orders=f"2..{m.hash.order} x {m.hash.heads}",
            table=table.extra_repr(),
            rows=table.rows * table.width,
            parameters=sum(held),
        )


class _Watcher(Observer):
    """Keeps what the report needs at the passes where it is there to see."""

    def __init__(self, layer: str | None) -> None:
        super().__init__(snapshots=True)
        self.layer = layer
        self.normalised: GraphModule | None = None
        self.before: list[str] = []
        self.after: list[str] = []
        self.begin([])

    def begin(self, marks: Sequence[Mark]) -> None:
        """Start over with the run that is reported."""
        self.records = []
        self.kernels: tuple[KernelReport, ...] = ()
        self.marks = marks
        self.labels = {node: f"mhc.{name}" for m in marks for name, node in m.parameters.items()}
        self.found: list[tuple[ResidualStream, list[str]]] = []

    def run(self, step: Pass, gm: GraphModule, context: Context, options: Options) -> GraphModule:
        """Apply one pass under observation."""
        if step.name == "widen" and self.layer is not None:
            self.before = lines_of(gm, self.layer, self.labels)
        gm = super().run(step, gm, context, options)
        if step.name == "normalize":
            self.normalised = gm
        elif step.name == "residual":
            flow = Dataflow(gm.graph, is_owned)
            self.found = [(s, [topology(flow, s, site) for site in s.sites]) for s in context.streams]
        elif step.name == "fuse":
            self.kernels = tuple(KernelReport(chain, device, n) for (chain, device), n in chains_of(gm).items())
        elif step.name == "widen" and self.layer is not None:
            self.after = lines_of(gm, self.layer, self.labels)
        return gm

    def streams(self) -> tuple[StreamReport, ...]:
        """The streams, their sites named as their parameters are."""
        return tuple(self._stream_report(stream, classes) for stream, classes in self.found)

    def _stream_report(self, stream: ResidualStream, classes: Sequence[str]) -> StreamReport:
        around = [m for m in self.marks if not m.owner or f"{stream.owner}.".startswith(f"{m.owner}.")]
        mark = max(around, key=lambda m: len(m.owner), default=None)
        size = 0
        if mark is not None:
            spec = StreamSpec.parse(mark.spec)
            size = sum(math.prod(s) for s in form_of(spec).shapes(spec, stream.hidden).values())
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
            for site, kind in zip(stream.sites, classes, strict=True)
        ]
        owner, text = (mark.owner, mark.spec) if mark is not None else (stream.owner, "")
        return StreamReport(owner, text, _place(stream.entry), _place(stream.exit), tuple(sites))


def _place(node: Node) -> str:
    if node.op == "placeholder":
        return f"as the input {input_name(node)}"
    return f"at {module_path(node) or 'the model itself'}: {source_line(node) or node.name}"


def _head_size(mark: Mark) -> int:
    return sum(value(node).numel() for name, node in mark.parameters.items() if name.startswith("head."))


def _imagined(captured: Captured, spec: StreamSpec, options: Options, observer: Observer) -> list[Mark]:
    """The marks that the graph would have, were the model converted: a placeholder for each parameter, of shapes alone.

    Raises `MHCError` as the analysis of the graph does.
    """
    analysed, context = private_copy(captured.graph, captured.inputs), Context()
    run_passes(analysed, context, ANALYSIS, options, observer)
    graph = captured.graph.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    fake = next(m for n in graph.nodes if (m := getattr(value(n), "fake_mode", None)))
    marks = []
    for owner in dict.fromkeys(s.owner for s in context.streams):
        mine = [s for s in context.streams if s.owner == owner]
        device, n = value(mine[0].exit).device, spec.streams
        shapes: dict[str, tuple[int, ...]] = {}
        for stream in mine:
            for site in stream.sites:
                own = form_of(spec).shapes(spec, stream.hidden)
                shapes |= {f"{site.name}.{name}": size for name, size in own.items()}
        if spec.exit == "head":
            shapes |= {"head.fn": (n, n * mine[0].hidden), "head.base": (n,), "head.scale": (1,)}
        nodes = {}
        for name, size in shapes.items():
            with graph.inserting_after(last), fake:
                last = graph.placeholder(f"mhc_{owner}_{name}".replace(".", "_").replace("#", "_"))
                last.meta["example_value"] = torch.empty(size, device=device)
            last.meta[OWNED] = True
            nodes[name] = last
        marks.append(Mark(owner, str(spec), nodes))
    return marks
