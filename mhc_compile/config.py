"""Options of the backend and of `convert`, checked by name and value, and the pipelines that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.passes.cost import parse_blocks
from mhc_compile.passes.fuse import KERNELS, Fuse, Fused
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.observer import Debug
from mhc_compile.passes.pipeline import NATIVE, WIDENING, Pipeline
from mhc_compile.passes.recompute import Recompute

Inner = Literal["inductor", "aot_eager", "eager"]
OPTIONAL = ("recompute", "fuse")
"""Passes without which a graph computes the same."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a rewritten graph is compiled. Raises `MHCError` MHC204 for a value that is not one of those named.

    MHC625 where the inner compiler cannot do what `recompute` asks for, MHC240 and MHC241 for a `pipeline` that cannot
    run.
    """

    inner: Inner = "inductor"
    """What compiles the rewritten graph."""
    mode: str | None = None
    """Inductor's mode: `default`, `reduce-overhead`, `max-autotune`, ..."""
    kernels: str = "auto"
    """Which fused kernels may be used: `auto` (all under Inductor, none under the other inner compilers, which are for
    looking at graphs), `all`, `none`, or kinds of chain and `engram` separated by commas (`boundary,read`); with a
    minus before each, all but those (`-leave`). Where no kernel exists plain PyTorch computes."""
    recompute: str | int = "off"
    """What of the streams is computed again in the backward pass, so that it need not be kept: `off`; `auto`, blocks of
    sites with the smallest peak; `stage`, all sites as one block; a number of sites a block; or bytes that the stream
    part may hold ("2GiB"). The inner compiler `eager` keeps everything."""
    strict: bool = False
    """Refuse a model of which not every residual add joins a stream, instead of warning (MHC109)."""
    debug: Debug = False
    """True: verify the whole graph after each pass. `"numeric"`: also compare it before and after in float64."""
    pipeline: Pipeline | str | Callable[[Pipeline], Pipeline] | None = None
    """The passes for converted models: a pipeline, its text, or a function that returns one from the default. One with
    the pass `native` is for models that write their hyper-connections out by hand instead."""
    disable: str = ""
    """Passes to leave out, separated by commas: `recompute`, `fuse`."""

    def __post_init__(self) -> None:
        if self.inner not in get_args(Inner):
            raise MHCError("MHC204", f"inner={self.inner!r}; known: {', '.join(get_args(Inner))}")
        if self.debug not in get_args(Debug):
            raise MHCError("MHC204", f"debug={self.debug!r}; known: False, True, 'numeric'")
        if not isinstance(self.strict, bool):
            raise MHCError("MHC204", f"strict={self.strict!r}; known: False, True")
        _ = self.kinds
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
            if self.inner != "inductor":
                raise MHCError("MHC204", f"mode={self.mode!r} is one of Inductor's, inner={self.inner!r} has none")

    @property
    def kinds(self) -> tuple[Fused, ...]:
        """The kinds of chain that `kernels` allows, and `engram`, the kernels of memories."""
        if self.kernels in ("auto", "all", "none"):
            every = self.kernels == "all" or (self.kernels == "auto" and self.inner == "inductor")
            return KERNELS if every else ()
        named = [name.strip() for name in self.kernels.split(",")]
        without = [name.startswith("-") for name in named]
        if {name.removeprefix("-") for name in named} - set(KERNELS) or len(set(without)) > 1:
            names = ", ".join(KERNELS)
            raise MHCError("MHC204", f"kernels={self.kernels!r}; known: auto, all, none, {names}; or all but -KIND")
        return tuple(k for k in KERNELS if (f"-{k}" not in named if without[0] else k in named))

    @property
    def disabled(self) -> tuple[str, ...]:
        """The passes that `disable` names."""
        return tuple(name.strip() for name in self.disable.split(",") if name.strip())

    def without_recompute(self) -> Options:
        """Return options for a graph without a backward pass."""
        return replace(self, disable=",".join({*self.disabled, "recompute"}))


def compile_pipeline(options: Options) -> Pipeline:
    """Return what a converted model's graph goes through."""
    chosen = _chosen(Pipeline((*WIDENING, *lowering(options))), options)
    for name in ("residual", "widen"):
        if name not in chosen.names:
            raise MHCError("MHC241", f"{chosen} leaves the model residual", way_out=f"keep the pass {name}")
    return chosen


def native_pipeline(options: Options) -> Pipeline:
    """Return what the graph of a model with hyper-connections of its own goes through."""
    return _chosen(Pipeline((*NATIVE, *lowering(options))), options)


def lowering(options: Options) -> Pipeline:
    """Return what turns the dialect into kernels and plain PyTorch, of a whole graph or a pipeline stage's."""
    recompute = () if options.recompute == "off" else (Recompute(options.recompute, options.kinds),)
    return Pipeline((*recompute, Fuse(options.kinds), Lower()))


def _chosen(default: Pipeline, options: Options) -> Pipeline:
    """Return `default`, or what `options.pipeline` puts in its place, without the passes that `disable` names."""
    wanted = options.pipeline
    chosen = default
    native = "native" in default.names
    if callable(wanted) and not native:
        chosen = wanted(default)
    elif wanted is not None and not callable(wanted):
        named = Pipeline.parse(wanted) if isinstance(wanted, str) else wanted
        chosen = default if isinstance(named, Pipeline) and ("native" in named.names) != native else named
    if not isinstance(chosen, Pipeline):
        raise MHCError("MHC204", f"pipeline={wanted!r}; known: a Pipeline, its text, or a function that returns one")
    return Pipeline(tuple(step for step in chosen if step.name not in options.disabled))


STREAM_FIELDS = {f.name for f in fields(StreamSpec)}
OPTION_FIELDS = {f.name for f in fields(Options)}


def split_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort keyword options into those of `StreamSpec` and those of `Options`. Raises MHC204 for an unknown name."""
    given = dict(options or {})
    if unknown := sorted(set(given) - STREAM_FIELDS - OPTION_FIELDS):
        known = ", ".join(sorted(STREAM_FIELDS | OPTION_FIELDS))
        raise MHCError("MHC204", f"unknown option {unknown[0]!r}; known: {known}")
    return (
        {k: v for k, v in given.items() if k in STREAM_FIELDS},
        {k: v for k, v in given.items() if k in OPTION_FIELDS},
    )


def stream_spec(given: Mapping[str, Any]) -> StreamSpec:
    """A `StreamSpec` from keyword options; exit and manifold default to the convention's own."""
    values = dict(given)
    if "convention" in values and values.get("form", "mhc") == "mhc":
        convention = values["convention"]
        if not isinstance(convention, Convention):
            StreamSpec(convention=convention)  # refuses an unknown name
            convention = Convention(convention)
        values = {"exit": convention.fields.exit, "manifold": convention.fields.manifold} | values
    return StreamSpec(**values)


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options written as `name=value`, for commands: `["streams=2", "kernels=all"]`. Raises MHC204 for other text.

    Values are checked where they are used (`split_options`, `StreamSpec`, `Options`).
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given or name in found:
            raise MHCError("MHC204", f"{text!r} is no name=value" if not given else f"{name} is given twice")
        found[name] = int(value) if value.isdigit() else {"True": True, "False": False}.get(value, value)
    split_options(found)
    return found
