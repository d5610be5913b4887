"""What `inspect` found, as data, as text and for a terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult

from mhc_compile.atomic_write import write_whole
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.kernels import targets
from mhc_compile.kernels.kernelspec import Direction, KernelSpec
from mhc_compile.kernels.target import Source
from mhc_compile.passes.observer import Record
from mhc_compile.passes.results import Coverage, NativeSite
from mhc_compile.report.reach import Reach
from mhc_compile.rich_text import Printed

if TYPE_CHECKING:
    from mhc_compile.report.watch import Watcher


@dataclass(frozen=True)
class SiteReport:
    """One residual add."""

    name: str
    """Relative to the stream's owner: its parameters are `<owner>.mhc.<name>.phi`, ..."""
    module: str
    """Path of the module whose forward holds the add."""
    source: str | None
    """`file:line, in function: text` of the add."""
    shape: tuple[str, ...]
    """Of the residual stream at the add."""
    dtype: str
    topology: str
    """Its class: see `mhc_compile.report.topology`."""
    parameters: int
    """Elements of phi, alpha and bias; 0 in a stream that stays residual."""


@dataclass(frozen=True)
class StreamReport:
    """One residual stream, from its entry to its exit."""

    owner: str
    """Path of the module whose forward holds the whole stream; `""` is the model itself."""
    spec: str
    """The owner's `StreamSpec` as text; `""` for a stream that stays residual beside converted ones."""
    entry: str
    """Module path and source of the value that is expanded into n streams."""
    exit: str
    """The same of the last add, behind which the streams are reduced to one."""
    sites: tuple[SiteReport, ...]


@dataclass(frozen=True)
class MemoryReport:
    """The memory at the entry of one layer."""

    layer: str
    """The layer's full module path."""
    orders: str
    """Which n-grams it knows, by how many hashes each: `2..3 x 8`."""
    table: str
    """Rows, width, dtype and storage of its table, and the hit rate of its cache."""
    rows: int
    """Elements of the table."""
    parameters: int
    """Elements of everything else."""


@dataclass(frozen=True)
class LayerView:
    """The graph of one module before and after `widen`, one line a node."""

    path: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class KernelReport:
    """One fused kernel that the compiled model calls."""

    spec: KernelSpec
    device: str
    """The type of device it is generated for."""
    calls: int
    """How often one forward calls it."""

    def source(self, direction: Direction) -> Source | None:
        """Return the generated code of its `forward` or `backward`; None where plain PyTorch computes it."""
        try:
            return targets.source(self.spec, direction, self.device)
        except ValueError:
            return None

    def bytes_token(self, direction: Direction) -> int:
        """Return the bytes that a token moves, as the code counts them; at least, where plain PyTorch computes it."""
        source = self.source(direction)
        return self.spec.bytes_token(direction, source.passes if source else None)


@dataclass(frozen=True)
class Inspection(Printed):
    """The streams of a model, what the passes did with them, or where they were lost.

    `str()` and `text()` are plain text; printed by rich (`rich.print`, a rich console, a notebook) it has tables and
    colours; `html()` is a page of that.
    """

    model: str
    """The model's class."""
    converted: bool
    parameters: int
    """Elements of the model's own parameters."""
    streams: tuple[StreamReport, ...] = ()
    coverage: Coverage | None = None
    """How many residual adds are part of a stream; None for a refused model."""
    memories: tuple[MemoryReport, ...] = ()
    head_parameters: int = 0
    """Elements of the learned exits (`exit="head"`)."""
    passes: tuple[Record, ...] = ()
    """What each pass changed; `before` and `after` hold the graph's text."""
    layer: LayerView | None = None
    refusal: MHCError | None = None
    """Why the model cannot be converted, or None."""
    reach: Reach | None = field(default=None)
    """For a refused model: how far the stream was followed."""
    native: tuple[NativeSite, ...] = ()
    """For a model with several streams already (MHC107): its own hyper-connections that the backend raises."""

    kernels: tuple[KernelReport, ...] = ()
    """The fused kernels under Inductor."""
    warnings: tuple[MHCWarning, ...] = ()
    """What this package warned of on the way."""
    options: Options = field(default_factory=Options)
    spec: str = ""
    """The `StreamSpec` that an unconverted model would be converted with, as text."""
    modules: tuple[str, ...] = ()
    """Paths of the model's modules."""
    watcher: Watcher | None = field(default=None, repr=False, compare=False)
    """What `data` is made from."""

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all streams; those of an owner that is called twice, once."""
        found = {(s.owner, site.name): site for s in self.streams for site in s.sites}
        return tuple(found.values())

    @property
    def added(self) -> int:
        """Elements of all stream parameters."""
        return sum(site.parameters for site in self.sites) + self.head_parameters

    def data(self) -> dict[str, Any]:
        """All of the report as plain data (`mhc_compile.report.report`), made at the first call."""
        return self._data

    @cached_property
    def _data(self) -> dict[str, Any]:
        from mhc_compile.report.report import data_of

        return data_of(self)

    def json(self) -> str:
        """The data as JSON."""
        return json.dumps(self.data(), ensure_ascii=False, separators=(",", ":"))

    def html(self, file: str | Path | None = None) -> str:
        """A self-contained HTML page, written to `file` where one is named. Raises MHC509 where that fails."""
        from mhc_compile.report.page.page import page

        text = page(self.data())
        if file is not None:
            write_whole(Path(file), text)
        return text

    def _repr_html_(self) -> str:
        """The page in a frame, for notebooks."""
        from mhc_compile.report.page.notebook import frame

        return frame(self.data())

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        """What a notebook shows: the page, and plain text where there is no browser."""
        return {"text/plain": self.text(), "text/html": self._repr_html_()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from mhc_compile.report.render import render

        yield from render(self)
