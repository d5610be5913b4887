"""Options of the backend and of `convert`, checked by name and value, and the pipelines that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from torch import nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.overrides import Inner
from mhc_compile.passes.blockmask import BlockMask
from mhc_compile.passes.cost import parse_blocks
from mhc_compile.passes.fuse import KERNELS, Fuse, Fused
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.observer import Debug
from mhc_compile.passes.pipeline import NATIVE, WIDENING, Pipeline
from mhc_compile.passes.recompute import Recompute

OPTIONAL = ("recompute", "fuse")
"""Passes without which a graph computes the same."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a rewritten graph is compiled.

    Raises `MHCError`: MHC204 for an unknown value, MHC625 where the inner compiler cannot do what `recompute` asks for,
    MHC240 and MHC241 for a `pipeline` that cannot run.
    """

    inner: Inner | None = None
    """The compiler of the rewritten graph. None: Inductor under `torch.compile`; in plain calls of a converted model
    no compiler (`for_calls`)."""
    mode: str | None = None
    """Inductor's mode: `default`, `reduce-overhead`, `max-autotune`, ..."""
    kernels: str = "auto"
    """Which fused kernels may be used: `auto` (all, but none under an `inner` of `aot_eager` or `eager`, which are for
    debugging graphs), `all`, `none`, or kinds of chain and `engram` separated by commas (`boundary,read`); with a minus
    before each, all but those (`-leave`). Where no kernel exists, plain PyTorch is used."""
    recompute: str | int = "off"
    """Recompute stream activations in the backward pass instead of storing them: `off`; `auto`, blocks of sites with
    the smallest peak memory; `stage`, all sites as one block; a number of sites per block; or the bytes that the
    streams may occupy ("2GiB"). The inner compiler `eager` stores everything."""
    attention: str | None = None
    """Replace causal attention: with `block:16` a position sees its block of 16 and all blocks before it, with
    `bidirectional` everything. This changes the model's function (`mhc_compile.passes.blockmask`)."""
    strict: bool = False
    """Raise MHC109 instead of warning where not every residual add is part of a stream."""
    debug: Debug = False
    """True: verify the whole graph after each pass. `"numeric"`: also compare it before and after in float64."""
    pipeline: Pipeline | str | Callable[[Pipeline], Pipeline] | None = None
    """The passes for converted models: a pipeline, its text, or a function that returns one from the default. One with
    the pass `native` is for models that write their hyper-connections out by hand instead."""
    disable: str = ""
    """Passes to leave out, separated by commas: `recompute`, `fuse`."""
    sites: str = ""
    """Choose which residual adds of an unconverted model become sites, by patterns of names separated by commas:
    `model.layers.[4-7]`, `*.mlp`, `*#1`. A module's path stands for all in it. The others stay residual adds."""
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    """Choose sites as `sites` does, by a function of the adding module and the site's name: `model.layers.4#0`."""

    def __post_init__(self) -> None:
        if self.inner not in (None, *get_args(Inner)):
            raise MHCError("MHC204", f"inner={self.inner!r}; known: {', '.join(get_args(Inner))}")
        if self.debug not in get_args(Debug):
            raise MHCError("MHC204", f"debug={self.debug!r}; known: False, True, 'numeric'")
        if not isinstance(self.strict, bool):
            raise MHCError("MHC204", f"strict={self.strict!r}; known: False, True")
        if not isinstance(self.sites, str):
            raise MHCError("MHC204", f"sites={self.sites!r} is no text", way_out="separate patterns by commas")
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise MHCError("MHC204", f"filter_fn={self.filter_fn!r} is no function of a module and a name")
        _ = self.kinds, self.masking
        if parse_blocks(self.recompute)[0] != "off" and self.inner == "eager":
            raise MHCError("MHC625", f"recompute={self.recompute!r}")
        if unknown := set(self.disabled) - set(OPTIONAL):
            raise MHCError("MHC204", f"disable={min(unknown)!r}; may be left out: {', '.join(OPTIONAL)}")
        for chosen in (compile_pipeline(self), native_pipeline(self)):
            chosen.check()
        if self.mode is not None:
            from torch._inductor import list_mode_options

            known = list_mode_options()
            if self.mode not in known:
                raise MHCError("MHC204", f"mode={self.mode!r}; known: {', '.join(known)}")
            if self.compiler != "inductor":
                raise MHCError("MHC204", f"mode={self.mode!r} is one of Inductor's, inner={self.inner!r} has none")

    @property
    def compiler(self) -> Inner:
        """The compiler of the rewritten graph."""
        return self.inner or "inductor"

    def for_calls(self) -> Options:
        """Return the options of calls outside of `torch.compile`, which are not to wait for a compiler.

        The kernels run, and what is between them runs as PyTorch does without a compiler. Where `inner`, or what only a
        compiler can do, was asked for, it is done.
        """
        if self.inner is not None or self.mode is not None or parse_blocks(self.recompute)[0] != "off":
            return self
        return replace(self, inner="eager", kernels="all" if self.kernels == "auto" else self.kernels)

    @property
    def kinds(self) -> tuple[Fused, ...]:
        """The kinds of chain that `kernels` allows, and `engram`, the kernels of memories."""
        if self.kernels in ("auto", "all", "none"):
            every = self.kernels == "all" or (self.kernels == "auto" and self.compiler == "inductor")
            return KERNELS if every else ()
        named = [name.strip() for name in self.kernels.split(",")]
        without = [name.startswith("-") for name in named]
        if {name.removeprefix("-") for name in named} - set(KERNELS) or len(set(without)) > 1:
            names = ", ".join(KERNELS)
            raise MHCError("MHC204", f"kernels={self.kernels!r}; known: auto, all, none, {names}; or all but -KIND")
        return tuple(k for k in KERNELS if (f"-{k}" not in named if without[0] else k in named))

    @property
    def masking(self) -> tuple[BlockMask, ...]:
        """The pass that `attention` asks for, if any."""
        if self.attention is None:
            return ()
        kind, _, size = str(self.attention).partition(":")
        if self.attention == "bidirectional":
            return (BlockMask(),)
        if kind != "block" or not size.isdecimal() or int(size) < 1:
            raise MHCError("MHC204", f"attention={self.attention!r}; known: block:SIZE, bidirectional")
        return (BlockMask(int(size)),)

    @property
    def disabled(self) -> tuple[str, ...]:
        """The passes that `disable` names."""
        return tuple(name.strip() for name in self.disable.split(",") if name.strip())

    def without_recompute(self) -> Options:
        """Return options for a graph without a backward pass."""
        return replace(self, disable=",".join({*self.disabled, "recompute"}))


def compile_pipeline(options: Options) -> Pipeline:
    """Return the passes for the graph of a converted model."""
    chosen = _chosen(Pipeline((*WIDENING, *options.masking, *lowering(options))), options)
    for name in ("residual", "widen"):
        if name not in chosen.names:
            raise MHCError("MHC241", f"{chosen} leaves the model residual", way_out=f"keep the pass {name}")
    return chosen


def native_pipeline(options: Options) -> Pipeline:
    """Return the passes for the graph of a model with hyper-connections of its own."""
    return _chosen(Pipeline((*NATIVE, *options.masking, *lowering(options))), options)


def lowering(options: Options) -> Pipeline:
    """Return the passes that lower the dialect to kernels and plain PyTorch, for a graph or a pipeline stage."""
    recompute = () if options.recompute == "off" else (Recompute(options.recompute, options.kinds),)
    return Pipeline((*recompute, Fuse(options.kinds), Lower()))


def _chosen(default: Pipeline, options: Options) -> Pipeline:
    """Return `default`, or what `options.pipeline` puts in its place, without the passes that `disable` names."""
    option, chosen, native = options.pipeline, default, "native" in default.names
    if callable(option):
        chosen = default if native else option(default)
    elif option is not None:
        named = Pipeline.parse(option) if isinstance(option, str) else option
        chosen = default if isinstance(named, Pipeline) and ("native" in named.names) != native else named
    if not isinstance(chosen, Pipeline):
        raise MHCError("MHC204", f"pipeline={option!r}; known: a Pipeline, its text, or a function that returns one")
    return Pipeline(tuple(step for step in chosen if step.name not in options.disabled))


STREAM_FIELDS = {f.name for f in fields(StreamSpec)}
OPTION_FIELDS = {f.name for f in fields(Options)}


def split_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort keyword options into those of `StreamSpec` and those of `Options`. Raises MHC204 for an unknown name."""
    options = options or {}
    if unknown := sorted(options.keys() - STREAM_FIELDS - OPTION_FIELDS):
        known = ", ".join(sorted(STREAM_FIELDS | OPTION_FIELDS))
        raise MHCError("MHC204", f"unknown option {unknown[0]!r}; known: {known}")
    stream = {name: value for name, value in options.items() if name in STREAM_FIELDS}
    return stream, {name: value for name, value in options.items() if name in OPTION_FIELDS}


def stream_spec(values: Mapping[str, Any]) -> StreamSpec:
    """Return a `StreamSpec` from keyword options; exit and manifold default to the convention's own."""
    if "convention" in values and values.get("form", "mhc") == "mhc":
        known = StreamSpec(convention=values["convention"]).convention.fields
        values = {"exit": known.exit, "manifold": known.manifold, **values}
    return StreamSpec(**values)


def overridden(
    spec: StreamSpec | None, options: Options | None, overrides: Mapping[str, Any]
) -> tuple[StreamSpec, Options]:
    """Return `spec` and `options`, by default those of their classes, with the fields in `overrides` replaced."""
    stream, compiling = split_options(overrides)
    return (
        stream_spec(stream) if spec is None else replace(spec, **stream),
        replace(options or Options(), **compiling),
    )


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Parse options written as `name=value`: `["streams=2", "kernels=all"]`. Raise MHC204 for other text.

    Values are checked where they are used (`StreamSpec`, `Options`).
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise MHCError("MHC204", f"{name} is given twice" if equals else f"{text!r} is not name=value")
        options[name] = int(value) if value.isdigit() else {"True": True, "False": False}.get(value, value)
    split_options(options)
    return options
