"""Look at a model without changing it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mhc_compile.attach import report_coverage
from mhc_compile.capture import capture, find_marks
from mhc_compile.config import Options, compile_pipeline, native_pipeline, split_options, stream_spec
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters, owners
from mhc_compile.passes.base import Context, Mark, value
from mhc_compile.passes.overencoding import TABLE as OVER_TABLE
from mhc_compile.report.imagined import imagined_marks
from mhc_compile.report.inspection import Inspection, LayerView, MemoryReport
from mhc_compile.report.reach import reach
from mhc_compile.report.watch import Watcher


def inspect(
    model: nn.Module,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    layer: str | None = None,
    stages: int | None = None,
    **options: Any,
) -> Inspection:
    """What the compiler sees in `model`, converted or not: streams and sites, what each pass does, or why it refuses.

    The model is neither run nor changed. `example_args` and `example_kwargs` are one call's inputs, used for shapes;
    Hugging Face models need none. `layer` is a module path (`model.layers.0`) whose graph is shown before and after the
    streams are widened, `stages` a number of pipeline stages to cut the model into. `options` are the fields of
    `StreamSpec` that an unconverted model would be converted with, and those of `Options` (`recompute="auto"`).

    Raises `MHCError`: MHC204 for options, MHC209 without inputs, MHC507 for a layer that is not in the graph, MHC620,
    621, 626 or 627 for stages and blocks that cannot be. A model that cannot be converted raises nothing:
    `Inspection.refusal` and `.reach` say why, and `.native` lists the hyper-connections that a multi-stream model has
    of its own.
    """
    if stages is not None and stages < 1:
        raise MHCError("MHC204", f"stages={stages}; 1 or more")
    given, own = split_options(options)
    settings = Options(**own)
    spec = stream_spec(given)
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    args, kwargs = example_args, dict(example_kwargs or {})
    if not args and not kwargs:
        kwargs = example_inputs(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _look(model, args, kwargs, Watcher(settings, layer, stages), settings, spec)
    once = {(str(w.message), w.filename, w.lineno): w for w in caught}.values()
    for w in once:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)
    return replace(found, warnings=tuple(w.message for w in once if isinstance(w.message, MHCWarning)))


def _look(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watcher: Watcher,
    options: Options,
    spec: StreamSpec,
) -> Inspection:
    held = owners(model)
    ours = {id(p) for parameters in held.values() for p in parameters.parameters()}
    about: dict[str, Any] = {
        "model": type(model).__name__,
        "converted": bool(held),
        "parameters": sum(p.numel() for p in model.parameters() if id(p) not in ours),
        "memories": tuple(m for path, parameters in held.items() for m in _memories(path, parameters)),
        "modules": tuple(name for name, _ in model.named_modules() if name),
        "options": options,
        "spec": str(spec),
        "watcher": watcher,
    }
    try:
        with torch.no_grad():
            captured = capture(model, args, kwargs)
        marks = find_marks(captured.graph) if held else imagined_marks(captured, spec, options, watcher)
        watcher.begin(marks)
        compile_pipeline(options).run(captured.graph, Context(marks=marks), watcher, debug=options.debug)
    except MHCError as error:
        if error.code == "MHC507" or error.code.startswith("MHC6"):  # what was asked for, not the model, is refused
            raise
        if error.code == "MHC107":
            own_streams = Context()
            watcher.begin([])
            native_pipeline(options).run(captured.graph, own_streams, watcher, debug=options.debug)
            about |= {"kernels": watcher.kernels, "native": tuple(own_streams.native)}
            return Inspection(**about, passes=tuple(watcher.records), refusal=error)
        found = reach(watcher.normalised) if watcher.normalised is not None else None
        return Inspection(**about, passes=tuple(watcher.records), refusal=error, reach=found)
    layer, coverage = watcher.layer, watcher.coverage
    assert coverage is not None
    built = StreamSpec.parse(marks[0].spec) if marks else spec
    report_coverage(coverage, built, replace(options, strict=False), whole=True)
    return Inspection(
        **about,
        streams=watcher.streams(),
        coverage=coverage,
        head_parameters=sum(_head_size(m) for m in {m.owner: m for m in marks}.values()),
        passes=tuple(watcher.records),
        layer=None if layer is None else LayerView(layer, tuple(watcher.before), tuple(watcher.after)),
        kernels=watcher.kernels,
    )


def _memories(owner: str, parameters: StreamParameters) -> Iterator[MemoryReport]:
    for name in parameters.table_places:
        table, inside = parameters.table(name), f"{parameters.table_places[name]}."
        if name == OVER_TABLE:
            assert parameters.over is not None
            spec = parameters.over.hash
            orders = f"2..{spec.order} x {spec.heads}"
        else:
            assert parameters.memory is not None
            hashes = next(m.hash for m in parameters.memory.layers if m.layer == name)
            orders = f"2..{hashes.order} x {hashes.heads}"
        held = (p.numel() for path, p in parameters.in_graph().items() if path.startswith(inside))
        yield MemoryReport(
            layer=f"{owner}.{name}".strip("."),
            orders=orders,
            table=table.extra_repr(),
            rows=table.rows * table.width,
            parameters=sum(held),
        )


def _head_size(mark: Mark) -> int:
    return sum(value(node).numel() for name, node in mark.parameters.items() if name.startswith("head."))
