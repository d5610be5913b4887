"""Convert a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from mhc_compile.attach import refuse_wrapped, report_coverage, rewrite_with_parameters
from mhc_compile.capture import Captured, capture
from mhc_compile.config import Options, compile_pipeline, split_options, stream_spec
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.memory.parameters import Start
from mhc_compile.memory.request import MemoryRequest, OverEncodingRequest, over_requested, requested
from mhc_compile.modes import other_mode, reads_mode
from mhc_compile.owner import convert_owners
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context
from mhc_compile.passes.results import Coverage, ResidualStream

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    scratch: bool = False,
    engram: str | MemorySettings | MemoryRequest | None = None,
    tokenizer: Any = None,
    engram_start: Start = "zero",
    over_encoding: str | OverEncodingSettings | OverEncodingRequest | None = None,
    **options: Any,
) -> Model:
    """Turn a residual model into its n-stream form, in place; returns the model.

    The model's function is unchanged (arXiv 2512.24880, function-preserving start); new float32 parameters appear
    under `mhc` of each stream owner. Every call from then on runs through the backend. With `scratch`, `phi` starts
    from N(0, 0.02), for a model that is to be trained from its beginning.

    `example_args` and `example_kwargs` are one call's inputs, used for shapes; Hugging Face models need none.
    `options`: fields of `StreamSpec` (`streams`, `convention`, `manifold`, `iterations`, `exit`, `form`) and of
    `Options` (`inner`, `mode`, `debug`, `strict`). Where residual adds are left, or a stream begins again at every
    layer, MHC109 warns; with `strict=True` it is raised.

    With `engram`, a preset's name or `MemorySettings`, hashed n-gram memories are added at the entry of its layers
    (arXiv 2601.07372), in float32 tables on the model's device; of an encoder and a decoder the decoder gets them. Ids
    are compressed as `tokenizer` tells, which stands for the settings' `compress`; without one they are taken as they
    are. With `engram_start="zero"` the function is unchanged, with `"paper"` W_V starts at random.

    With `over_encoding`, `"default"` or `OverEncodingSettings`, embeddings of n-grams are added to those of tokens
    (arXiv 2501.16975): random rows of a float32 table, through a projection that is 0 at the start. Of an encoder and a
    decoder the decoder gets them.

    The model is looked at in training and in evaluation: sites that one mode leaves out have parameters, too.

    Raises `MHCError`: MHC1xx where the model's streams cannot be followed, MHC2xx for options or a model converted
    already, MHC213 where training adds to a stream in a module that adds otherwise in evaluation, MHC303 for one that
    is compiled or wrapped. A refused model is left as it was.
    """
    _refuse_other_than_module(model)
    arguments = {"engram": engram, "tokenizer": tokenizer, "engram_start": engram_start, "over_encoding": over_encoding}
    convert_with_coverage(model, example_args, example_kwargs or {}, scratch=scratch, **arguments, **options)
    return model


def convert_with_coverage(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    scratch: bool = False,
    engram: str | MemorySettings | MemoryRequest | None = None,
    tokenizer: Any = None,
    engram_start: Start = "zero",
    over_encoding: str | OverEncodingSettings | OverEncodingRequest | None = None,
    **options: Any,
) -> Coverage:
    """Convert `model` as `convert` does, and return how many of its residual adds are part of a stream."""
    stream, own = split_options(options)
    spec, settings = stream_spec(stream), Options(**own)
    requests = (requested(engram, tokenizer, model, start=engram_start), over_requested(over_encoding))
    refuse_wrapped(model)
    root = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
    if owners(root):
        raise MHCError("MHC208", f"{type(root).__name__} holds stream parameters")
    if not args and not kwargs:
        args, kwargs = (), example_inputs(root)
    found = find_streams(root, args, kwargs, settings)
    made, _ = rewrite_with_parameters(
        root,
        found.graph,
        found.context,
        spec,
        settings,
        found.inputs,
        scratch=scratch,
        requests=[r for r in requests if r is not None],
        others=streams_of_other_mode(root, args, kwargs, settings),
    )
    coverage = found.context.coverage
    report_coverage(coverage, spec, settings, whole=True)
    convert_owners(root, made)
    return coverage


def _refuse_other_than_module(model: object) -> None:
    """Raise MHC204 for what is no module: a path, most often."""
    if not isinstance(model, nn.Module):
        way_out = (
            "convert_folder(path, target) converts a checkpoint folder, from_pretrained(folder) loads a converted one"
        )
        raise MHCError("MHC204", f"convert takes a module, not {type(model).__name__} {model!r:.80}", way_out=way_out)


def streams_of_other_mode(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> list[ResidualStream]:
    """Return the streams of `model` in training if it is in evaluation mode, and the other way round.

    Empty where nothing in the model reads its mode, and where the other graph cannot be followed: a call in that mode
    says why.
    """
    if not reads_mode(model):
        return []
    try:
        with other_mode(model):
            return find_streams(model, args, kwargs, replace(options, debug=bool(options.debug))).context.streams
    except MHCError:
        return []


@dataclass
class Analysed(Captured):
    """A captured graph with what the passes up to `residual` found in it."""

    context: Context


def find_streams(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options) -> Analysed:
    """Capture one call of `model` without running it, and analyse its graph."""
    with torch.no_grad():
        captured = capture(model, args, kwargs)
    context = Context(inputs=list(captured.inputs) if options.debug == "numeric" else [])
    analysis, _ = compile_pipeline(options).split("residual")
    return Analysed(analysis.run(captured.graph, context, debug=options.debug), captured.inputs, context)
