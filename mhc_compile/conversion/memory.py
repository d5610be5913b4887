"""Convert a model in memory, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import nn

from mhc_compile.attach import refuse_wrapped, report_coverage, rewrite_with_parameters
from mhc_compile.capture import Captured, capture
from mhc_compile.config import Options, compile_pipeline, overridden
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT, Start, StartName, start_of
from mhc_compile.memory.parameters import Start as MemoryStart
from mhc_compile.memory.request import NOTHING, Request, requested
from mhc_compile.modes import in_mode, reads_mode
from mhc_compile.overrides import Overrides
from mhc_compile.owner import convert_owners, restore_owners
from mhc_compile.parameters import Model, StreamParameters, at_start, owners, unwrapped
from mhc_compile.passes.base import Context
from mhc_compile.passes.results import Coverage, ResidualStream
from mhc_compile.progress import Progress, reported


def convert(
    model: Model,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    spec: StreamSpec | None = None,
    options: Options | None = None,
    scratch: bool = False,
    start: StartName = "default",
    engram: str | MemorySettings | None = None,
    tokenizer: Any = None,
    engram_start: MemoryStart = "zero",
    over_encoding: str | OverEncodingSettings | None = None,
    ultramem: str | UltraMemSettings | None = None,
    progress: bool | Progress = False,
    **overrides: Unpack[Overrides],
) -> Model:
    """Convert a residual model to its n-stream form in place, and return it.

    The model's function is unchanged (arXiv 2512.24880, function-preserving start); new float32 parameters appear
    under `mhc` of each stream owner. Every call from then on runs through the backend.

    `scratch` is for a model that is to be trained from scratch, whose function need not be kept. With `start="paper"`
    coefficients start as published, where they learn slowly: `alpha` at 0.01, and with `scratch` `phi` from N(0, 0.02).

    `example_args` and `example_kwargs` are the inputs of one call, used for their shapes; Hugging Face models need
    none. `spec` describes the streams, `options` how the model is compiled; `overrides` are fields of either by name
    (`streams=2`, `inner="eager"`). Where residual adds are left, or a stream begins again at every layer, MHC109
    warns; with `strict=True` it is raised.

    Only adds that `sites` (patterns such as `"model.layers.[4-7]"`) or `filter_fn` (of the adding module and the name
    of the site) choose become sites; the others stay residual adds. `progress=True` shows a bar.

    With `engram`, a preset's name or `MemorySettings`, hashed n-gram memories are added at the entry of its layers
    (arXiv 2601.07372), in float32 tables on the model's device; of an encoder and a decoder the decoder gets them. Ids
    are compressed with `tokenizer` where the settings say `compress`; without a tokenizer they are used unchanged. With
    `engram_start="zero"` the function is unchanged, with `"paper"` W_V starts at random.

    With `over_encoding`, `"default"` or `OverEncodingSettings`, embeddings of n-grams are added to those of tokens
    (arXiv 2501.16975): random rows of a float32 table, through a projection that is 0 at the start. Of an encoder and a
    decoder the decoder gets them.

    With `ultramem`, `"v1"`, `"v2"` or `UltraMemSettings`, values of a float32 table are looked up by what the last
    branch of chosen layers reads, and added to what it adds or to what one some layers later does (arXiv 2411.12364,
    2508.18756), through a projection that is 0 at the start.

    The model is traced in training and in evaluation mode: sites that one mode leaves out get parameters, too.

    Raises `MHCError`: MHC1xx where the model's streams cannot be followed, MHC2xx for options or a model converted
    already, MHC213 where training adds to a stream in a module that adds otherwise in evaluation, MHC303 for one that
    is compiled or wrapped. A rejected model is left unchanged.
    """
    _refuse_path(model)
    stream, compiling = overridden(spec, options, overrides)
    if tokenizer is not None and engram is None:
        raise MHCError("MHC220", "a tokenizer without engram=", way_out="name a preset: engram='v41'")
    request = requested(model, engram, over_encoding, lambda: tokenizer, start=engram_start, ultramem=ultramem)
    begin, kwargs = start_of(start, scratch=scratch), example_kwargs or {}
    with reported(progress) as report:
        convert_streams(model, example_args, kwargs, stream, compiling, request, start=begin, progress=report)
    return model


def _refuse_path(model: object) -> None:
    """Raise MHC204 for what is no module: a path, most often."""
    if not isinstance(model, nn.Module):
        way_out = (
            "convert_folder(path, target) converts a checkpoint folder, from_pretrained(folder) loads a converted one"
        )
        raise MHCError("MHC204", f"convert takes a module, not {type(model).__name__} {model!r:.80}", way_out=way_out)


def convert_streams(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    spec: StreamSpec,
    options: Options,
    request: Request = NOTHING,
    *,
    start: Start = DEFAULT,
    progress: Progress = lambda *_: None,
) -> Coverage:
    """Convert `model` as `convert` does, and return how many of its residual adds are part of a stream."""
    refuse_wrapped(model)
    root = unwrapped(model)
    if owners(root):
        raise MHCError("MHC208", f"{type(root).__name__} holds stream parameters")
    if not args and not kwargs:
        kwargs = example_inputs(root)
    progress(0, 3, "finding the streams")
    analysed = find_streams(root, args, kwargs, options)
    progress(1, 3, "finding those of the other mode")
    others = streams_of_other_mode(root, args, kwargs, options)
    progress(2, 3, "rewriting")
    parameters, _ = rewrite_with_parameters(
        root, analysed.graph, analysed.context, spec, options, analysed.inputs,
        start=start, request=request, others=others,
    )  # fmt: skip
    coverage = analysed.context.coverage
    report_coverage(coverage, spec, options, whole=True)
    convert_owners(root, parameters)
    return coverage


def to_residual(model: Model) -> Model:
    """Undo `convert` in place, and return the model with the weights that it has now.

    Raises `MHCError`: MHC410 for a model that is not converted, MHC411 once its stream parameters were trained, MHC204
    for one with `attention`; it is then left unchanged.
    """
    parameters = owners(model)
    if not parameters:
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    refuse_trained(parameters)
    refuse_attention(parameters, "the residual model")
    restore_owners(model)
    return model


def refuse_trained(parameters: Mapping[str, StreamParameters]) -> None:
    """Raise MHC411 where an owner's parameters are no longer at their function-preserving start."""
    for owner, of_owner in parameters.items():
        if not at_start(of_owner):
            raise MHCError("MHC411", f"those of {owner or 'the model'} are not at their start any more")


def refuse_attention(parameters: Mapping[str, StreamParameters], what: str) -> None:
    """Raise MHC204 where calls of an owner see other positions than the model would whose masks are its own."""
    for of_owner in parameters.values():
        if (attention := of_owner.options.attention) is not None:
            way_out = "convert the residual model without attention=; its own weights are in the folder it came from"
            raise MHCError("MHC204", f"{what} would not have attention={attention!r}", way_out=way_out)


def streams_of_other_mode(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> list[ResidualStream]:
    """Return the streams of `model` in training if it is in evaluation mode, and vice versa.

    Empty where nothing in the model reads its mode, and where the other graph cannot be followed: a call in that mode
    says why.
    """
    if not reads_mode(model):
        return []
    try:
        with in_mode(model, training=not model.training):
            return find_streams(model, args, kwargs, replace(options, debug=bool(options.debug))).context.streams
    except MHCError:
        return []


@dataclass
class Analysed(Captured):
    """A captured graph and the results of the passes up to `residual`."""

    context: Context


def find_streams(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options) -> Analysed:
    """Capture one call of `model` without running it, and analyse its graph."""
    with torch.no_grad():
        captured = capture(model, args, kwargs)
    context = Context(inputs=list(captured.inputs) if options.debug == "numeric" else [])
    analysis, _ = compile_pipeline(options).split("residual")
    return Analysed(analysis.run(captured.graph, context, debug=options.debug), captured.inputs, context)
