"""Write a model's own source with the streams in it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from mhc_compile.atomic_write import write_whole
from mhc_compile.attach import refuse_wrapped
from mhc_compile.capture import capture
from mhc_compile.config import overridden, split_options
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.events import read_events
from mhc_compile.emitting.file import Source, Writer, load_text
from mhc_compile.emitting.gate import Expected, cast, runs_in
from mhc_compile.emitting.graph_rewrite import GraphRewrite, analysed
from mhc_compile.emitting.instrument import Function, Keys, functions_around, probes
from mhc_compile.emitting.roles import find_edits
from mhc_compile.emitting.traced import Traced
from mhc_compile.emitting.training import runs_in_training_alone
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.overrides import StreamOverrides
from mhc_compile.owner import restore_owners
from mhc_compile.parameters import StreamParameters, attention_of, names, owners, unwrapped


def emit(
    model: nn.Module,
    file: str | os.PathLike[str],
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    spec: StreamSpec | None = None,
    **overrides: Unpack[StreamOverrides],
) -> Path:
    """Write a Python module that holds the source of `model` with n streams in it, and return its path.

    The classes whose methods hold the streams become subclasses of the model's own, with the rewritten methods;
    everything else of the source is kept. `add_streams(model)` of the file gives a residual model these classes and the
    parameters of its sites. The file needs PyTorch and the model's own package, not this one.

    `model` is residual, or converted by `convert`; it stays as it is. `example_args` and `example_kwargs` are the
    inputs of one call, as for `convert`. `spec` and `overrides` describe the streams of a residual model.

    Before the file is written, the module is compared with the graph rewrite: outputs and all gradients, at the start
    and with every stream parameter perturbed, in float64 where the model computes in it.

    Raises `MHCError`: MHC1xx as `convert` does, MHC303, MHC412 for a file that is there already and MHC509 for one that
    cannot be written, MHC701 to 708 for what cannot be rewritten, with its source line, and MHC709 if the module
    computed something else; nothing is written then.
    """
    path = Path(file)
    if path.exists():
        raise MHCError("MHC412", f"{path} is there already", way_out="name another file, or remove this one")
    refuse_wrapped(model)
    stream = stream_overridden(spec, overrides)
    residual = copy.deepcopy(unwrapped(model)).eval()
    if (attention := attention_of(residual.modules())) is not None:
        way_out = "convert without attention=, emit, and give the emitted model a mask of its own"
        raise MHCError("MHC204", f"emit writes streams, not attention={attention!r}", way_out=way_out)
    if converted := owners(residual):
        stream = one_spec(converted)
        restore_owners(residual)
    kwargs = dict(example_kwargs or {})
    if not example_args and not kwargs:
        kwargs = example_inputs(residual)
    source = checked_source(residual, example_args, kwargs, stream)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MHCError("MHC509", f"{path.parent}: {error}") from error
    write_whole(path, source.text)
    return path


def checked_source(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], spec: StreamSpec) -> Source:
    """Return the source of a residual model that computes what the graph rewrite does. `model` is changed meanwhile.

    Raises MHC1xx and MHC701 to 709.
    """
    dtype = torch.float64
    if not runs_in(model.double(), dtype, args, kwargs):
        dtype = torch.float32
        model.float()
    args, kwargs = cast(args, dtype), cast(kwargs, dtype)
    rewrite = GraphRewrite(model, spec)
    expected = [Expected(rewrite, args, kwargs)]
    functions = functions_around(model, rewrite.inside, rewrite.outside)
    source = source_of(model, args, kwargs, rewrite, functions)
    if places := runs_in_training_alone(model, functions, args, kwargs):
        expected.append(Expected(GraphRewrite(model, spec), args, kwargs, training=True))
    module = load_text(source.text, "emitted")
    errors = [expected[0].difference(source, module)]
    for in_training in expected[1:]:
        try:
            errors.append(in_training.difference(source, module))
        except MHCError as error:
            raise MHCError("MHC706", f"in training another add or read runs: {error}", source=places[0]) from error
    return replace(source, difference=max(errors))


def source_of(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rewrite: GraphRewrite,
    functions: Sequence[Function],
) -> Source:
    """Return the source of a residual model with n streams written into `functions`, unchecked.

    `rewrite` has been called.
    """
    keys = Keys()
    with probes(functions, keys), torch.no_grad():
        captured = capture(model, args, kwargs)
    events = read_events(captured.graph, functions, keys)
    nodes = list(captured.graph.graph.nodes)
    graph, context = analysed(captured.graph)
    edits = find_edits(Traced(model, graph.graph, nodes, events), context.streams)
    return Writer(model, context.streams, edits).source(rewrite.spec)


def stream_overridden(spec: StreamSpec | None, overrides: Mapping[str, Any]) -> StreamSpec:
    """Return `spec` with the fields in `overrides` replaced. Raises MHC204 for options of compiling."""
    if options := sorted(split_options(overrides)[1]):
        raise MHCError("MHC204", f"{options[0]} has no meaning for a model's source", way_out="leave it out")
    return overridden(spec, None, overrides)[0]


def one_spec(converted: Mapping[str, StreamParameters]) -> StreamSpec:
    """Return the specification of a converted model's streams. Raises MHC708 where its source cannot be written."""
    specs = {parameters.spec for parameters in converted.values()}
    if len(specs) > 1 or any(parameters.memories.kinds for parameters in converted.values()):
        raise MHCError("MHC708", "memories and streams of several kinds have no source")
    if skipped := [name for parameters in converted.values() for name in parameters.skipped]:
        raise MHCError("MHC708", f"the source has streams at every add, and {names(skipped)} were not chosen as sites")
    return specs.pop()
