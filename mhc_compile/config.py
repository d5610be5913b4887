"""Options of the backend and of `convert`, checked by name and value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.chain import Kind
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.passes.cost import parse_blocks

Inner = Literal["inductor", "aot_eager", "eager"]
Debug = Literal[False, True, "numeric"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a rewritten graph is compiled. Raises `MHCError` MHC204 for a value that is not one of those named.

    MHC625 where the inner compiler cannot do what `recompute` asks for.
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
        if self.mode is not None:
            from torch._inductor import list_mode_options

            known = list_mode_options()
            if self.mode not in known:
                raise MHCError("MHC204", f"mode={self.mode!r}; known: {', '.join(known)}")
            if self.inner != "inductor":
                raise MHCError("MHC204", f"mode={self.mode!r} is one of Inductor's, inner={self.inner!r} has none")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of chain that `kernels` allows, and `engram`, the kernels of memories."""
        known: tuple[str, ...] = (*get_args(Kind), "engram")
        if self.kernels in ("auto", "all", "none"):
            every = self.kernels == "all" or (self.kernels == "auto" and self.inner == "inductor")
            return known if every else ()
        named = [name.strip() for name in self.kernels.split(",")]
        without = [name.startswith("-") for name in named]
        if {name.removeprefix("-") for name in named} - set(known) or len(set(without)) > 1:
            names = ", ".join(known)
            raise MHCError("MHC204", f"kernels={self.kernels!r}; known: auto, all, none, {names}; or all but -KIND")
        return tuple(k for k in known if (f"-{k}" not in named if without[0] else k in named))


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
