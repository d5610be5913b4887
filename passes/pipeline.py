"""A pipeline is a value: passes in the order in which they run, as an object and as text, and those that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch._dynamo.utils import dynamo_timed
from torch.fx import GraphModule

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Context, Pass
from mhc_compile.passes.blockmask import BlockMask
from mhc_compile.passes.engram import Engram
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.native import Native
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.observer import Debug, Observer
from mhc_compile.passes.overencoding import OverEncode
from mhc_compile.passes.probe import Probe
from mhc_compile.passes.recompute import Recompute
from mhc_compile.passes.residual import Residual
from mhc_compile.passes.text import describe, parse
from mhc_compile.passes.ultramem import LookUpByContent
from mhc_compile.passes.widen import Widen

TIMED = "mhc_compile.passes"
_OURS: tuple[type[Any], ...] = (
    Normalize, Residual, Native, Widen, OverEncode, Engram, LookUpByContent, BlockMask, Recompute, Fuse, Lower, Probe,
)  # fmt: skip
BUILT_IN = {cls.name: cls for cls in _OURS}


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str()` writes it as text, which `Pipeline.parse` reads back; methods return new pipelines.

    Methods that take the name of a pass raise MHC240 where the pipeline has none of this name.
    """

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(map(describe, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Return the pipeline written as `text`: see `mhc_compile.passes.text`. Raises MHC240."""
        return Pipeline(parse(text, BUILT_IN))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes."""
        return tuple(step.name for step in self.passes)

    @property
    def provides(self) -> frozenset[str]:
        """What a graph has after all passes."""
        return frozenset(name for step in self.passes for name in step.provides)

    def before(self, name: str, *new: Pass) -> Pipeline:
        """Insert passes before the first pass `name`."""
        at = self._index(name)
        return Pipeline((*self.passes[:at], *new, *self.passes[at:]))

    def after(self, name: str, *new: Pass) -> Pipeline:
        """Insert passes after the first pass `name`."""
        at = self._index(name) + 1
        return Pipeline((*self.passes[:at], *new, *self.passes[at:]))

    def without(self, *names: str) -> Pipeline:
        """Leave passes out."""
        for name in names:
            self._index(name)
        return Pipeline(tuple(step for step in self.passes if step.name not in names))

    def replace(self, name: str, new: Pass) -> Pipeline:
        """Put `new` in the place of the first pass `name`."""
        at = self._index(name)
        return Pipeline((*self.passes[:at], new, *self.passes[at + 1 :]))

    def split(self, name: str) -> tuple[Pipeline, Pipeline]:
        """Return the passes up to the first pass `name`, which is among them, and those after it."""
        at = self._index(name) + 1
        return Pipeline(self.passes[:at]), Pipeline(self.passes[at:])

    def shared_with(self, other: Pipeline) -> tuple[Pipeline, Pipeline, Pipeline]:
        """Return the passes that both begin with, the rest of this pipeline, and the rest of `other`."""
        same = (mine == theirs for mine, theirs in zip(self, other, strict=False))
        count = next((i for i, equal in enumerate(same) if not equal), min(len(self.passes), len(other.passes)))
        return Pipeline(self.passes[:count]), Pipeline(self.passes[count:]), Pipeline(other.passes[count:])

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise MHCError("MHC240", f"no pass {name!r} in {self}")
        return self.names.index(name)

    def check(self, provided: Iterable[str] = ()) -> None:
        """Raise MHC241 where a pass requires what neither a pass before it nor the graph, `provided`, has."""
        there = set(provided)
        for step in self.passes:
            for requirement in step.requires:
                if requirement not in there:
                    makers = " or ".join(name for name, cls in BUILT_IN.items() if requirement in cls.provides)
                    fix = f"put {makers or f'a pass that provides {requirement}'} before {step.name}"
                    raise MHCError("MHC241", f"{step.name} requires {requirement} in {self}", way_out=fix)
            there |= set(step.provides)

    def run(
        self,
        gm: GraphModule,
        context: Context,
        observer: Observer | None = None,
        *,
        debug: Debug = False,
        provided: Iterable[str] = (),
    ) -> GraphModule:
        """Run the passes over `gm`, a private copy. `provided`: what the graph has of earlier passes. Raises MHC241."""
        self.check(provided)
        observer = observer or Observer()
        # Shown by `torch._dynamo.utils.compile_times()` beside the compiler's own phases.
        with dynamo_timed(TIMED):
            for step in self.passes:
                gm = observer.run(step, gm, context, debug)
            gm.recompile()
        return gm


ANALYSIS = Pipeline((Normalize(), Residual()))
NATIVE = Pipeline((Normalize(), Native()))
WIDENING = Pipeline((*ANALYSIS, Widen(), OverEncode(), Engram(), LookUpByContent()))
"""What a converted model's graph goes through before kernels hide the equations."""
EXPORT = Pipeline(
    (*ANALYSIS, Widen(), OverEncode(portable=True), Engram(portable=True), LookUpByContent(portable=True))
)
