"""Inspect a model without changing it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhc_compile.attach import append_at_start, report_coverage
from mhc_compile.capture import Captured, capture, find_marks, private_copy
from mhc_compile.config import Options, compile_pipeline, native_pipeline, split_options, stream_spec
from mhc_compile.conversion.example_inputs import LENGTH, example_inputs
from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context, Mark
from mhc_compile.passes.results import NATIVE_CODES
from mhc_compile.probes.sample import read_samples
from mhc_compile.report.collect import collect
from mhc_compile.report.report import Report
from mhc_compile.report.watch import Watcher
from mhc_compile.selection import chosen_coverage

LENGTH_OF_STEP = 128
"""Ids in a row of the step that is run, where no inputs are given."""


def inspect(
    model: nn.Module,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    layer: str | None = None,
    stages: int | None = None,
    time: bool = False,
    trace: str | Path | None = None,
    probes: str | Path | None = None,
    **options: Any,
) -> Report:
    """Return what the compiler sees in `model`, converted or not: streams, sites, what passes do, or why they cannot.

    The model is not changed, and run only where `time` asks for it. `example_args` and `example_kwargs` are one call's
    inputs; Hugging Face models need none. `layer` is a module path (`model.layers.0`) whose graph is shown before and
    after the streams are widened, `stages` a number of pipeline stages to cut the model into. `options` are the fields
    of `StreamSpec` that an unconverted model would be converted with, and those of `Options` (`recompute="auto"`).

    With `time` the converted graph runs under torch's profiler, forward and backward, in the model's own mode:
    `Report.step` and `Element.time` have the milliseconds. `trace` writes the last run as a timeline that Perfetto
    opens, and implies `time`. `probes` is a file of samples (`Probes.write`), whose last ones fill `Element.probe`.

    Raises `MHCError`: MHC204 for options, MHC413, MHC232 and MHC234 for samples that cannot be read or are of another
    model, MHC209 without inputs, MHC507 for a layer that is not in the graph, MHC509
    where `trace` cannot be written, MHC525 where there are no weights to run, MHC620, 621, 626 or 627 for stages and
    blocks that cannot be. A model that cannot be converted raises nothing:
    `Report.refusal` and `.reach` say why, and `.sites` are the hyper-connections that a multi-stream model has of its
    own.
    """
    if stages is not None and stages < 1:
        raise MHCError("MHC204", f"stages={stages}; 1 or more")
    stream_options, compile_options = split_options(options)
    settings = Options(**compile_options)
    spec = stream_spec(stream_options)
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    runs = time or trace is not None
    if runs and any(p.is_meta for p in model.parameters()):
        raise MHCError("MHC525", f"the parameters of {type(model).__name__} are on the meta device")
    samples = () if probes is None else read_samples(probes)
    kwargs = dict(example_kwargs or {})
    if not example_args and not kwargs:
        kwargs = example_inputs(model, LENGTH_OF_STEP if runs else LENGTH)
    watcher = Watcher(stages, runs=runs, trace=None if trace is None else Path(trace))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refusal = _run(model, example_args, kwargs, watcher, settings, spec)
    watcher.runs &= refusal is None or watcher.native is not None
    watcher.samples = samples if refusal is None else ()
    once = {(str(w.message), w.filename, w.lineno): w for w in caught}.values()
    for w in once:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)
    ours = [w.message for w in once if isinstance(w.message, MHCWarning)]
    return collect(model, watcher, settings, spec, layer=layer, refusal=refusal, warnings=ours)


def _run(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watcher: Watcher,
    options: Options,
    spec: StreamSpec,
) -> MHCError | None:
    """Run the passes that compile the model under the watcher; return the error where it cannot be converted."""
    captured = None
    try:
        # In a graph that was captured without gradients, what the model does without them turns them off for the rest.
        with torch.set_grad_enabled(watcher.runs):
            captured = capture(model, args, kwargs)
        watcher.inputs = captured.inputs
        marks = find_marks(captured.graph) if owners(model) else _append_marks(model, captured, spec, options, watcher)
        watcher.begin(marks)
        compile_pipeline(options).run(captured.graph, Context(marks=marks), watcher, debug=options.debug)
    except MHCError as error:
        if error.code.startswith("MHC6") or error.code == "MHC204":  # what was asked for, not the model, is rejected
            raise
        if error.code in NATIVE_CODES and captured is not None:
            watcher.begin([])
            native_pipeline(options).run(captured.graph, Context(), watcher, debug=options.debug)
        return error
    built = StreamSpec.parse(marks[0].spec) if marks else spec
    found = watcher.context
    found.coverage = chosen_coverage(found.coverage, found.streams, {mark.owner: mark.skipped for mark in marks})
    report_coverage(found.coverage, built, replace(options, strict=False), whole=True)
    return None


def _append_marks(
    model: nn.Module, captured: Captured, spec: StreamSpec, options: Options, watcher: Watcher
) -> list[Mark]:
    """Append the stream parameters of an unconverted model to its graph; return their marks."""
    context = Context()
    analysis, _ = compile_pipeline(options).split("residual")
    analysis.run(private_copy(captured.graph), context, watcher, debug=options.debug)
    marks, values = append_at_start(model, captured.graph, spec, options, context.streams)
    watcher.inputs = [*captured.inputs, *(v.requires_grad_(v.is_floating_point()) for v in values)]
    return marks
