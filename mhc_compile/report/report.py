"""The report of a model: frozen data that text, page, notebook and `diff` read, and whose `asdict` is the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console, ConsoleOptions, RenderResult

from mhc_compile.atomic_write import write_whole
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.results import Coverage
from mhc_compile.rich_text import Printed

FORMAT = 4
"""Changes with the fields of `Report` and with what they mean."""

CodeLine = tuple[str, int, int | None, str]
"""A line of graph code: text, element, source, and dtype and shape of its value."""
Kind = Literal["outside", "stream", "layer", "site", "branch", "memory", "exit"]


@dataclass(frozen=True)
class Time:
    """Milliseconds of a step, or of a part of it, over several runs."""

    ms: float
    """The median of forward and backward together."""
    forward: float
    """The median of the forward alone."""
    backward: float
    low: float
    """The fastest run, forward and backward."""
    high: float


@dataclass
class Element:
    """One part of the drawing of a model; its number is its place in `Report.elements`."""

    kind: Kind
    name: str
    module: str = ""
    """Path of the module it stands for."""
    children: list[int] = field(default_factory=list)
    source: int | None = None
    """Number of the source line."""
    place: str = ""
    """Module and source line of the value that enters (for a stream) or leaves (for its exit); else empty."""
    shape: str = ""
    dtype: str = ""
    topology: str | None = None
    """The topology of a site (`mhc_compile.report.topology`), of a model's own reads; None for other parts."""
    spec: str | None = None
    """The `StreamSpec` as text; None where the stream stays residual."""
    parameters: int = 0
    """Elements of all parameters of this part and its children."""
    added: int = 0
    """Elements of the stream parameters of a site (phi, alpha, bias) or of an exit (`exit="head"`)."""
    block: int | None = None
    stage: int | None = None
    kernels: list[int] = field(default_factory=list)
    """Numbers of the kernels that compute it."""
    unfused: tuple[str, ...] = ()
    """Why chains of its operations have no kernel of their own."""
    bytes_token: int = 0
    """What the fused kernels of a site, an exit or a memory move per token in one forward pass, and backward."""
    bytes_token_backward: int = 0
    limit_token: int = 0
    """The least traffic of any such kernels, forward and backward."""
    calls: int = 1
    """Number of times that one forward pass runs it."""
    time: Time | None = None
    """Milliseconds of its own operations, without those of its children; None where no step ran."""
    probe: dict[str, float] = field(default_factory=dict)
    """Figures of the last probe sample: those of a site (`Sample.figures`), or a memory's mean gate."""

    @property
    def full_name(self) -> str:
        """Module path and ordinal of a site: `model.layers.3#0`."""
        return f"{self.module}#{self.name.rpartition('#')[2]}"

    @property
    def shown(self) -> str:
        """The name in tables of times: a site's full name, a branch's module path, or the element's own name."""
        names = {"site": self.full_name, "branch": self.module, "stream": f"entry of {self.name}"}
        return names.get(self.kind) or self.name or "the model itself"


@dataclass(frozen=True)
class PassReport:
    """One pass: its options, time, and the graph before and after it."""

    name: str
    text: str
    """Name and options."""
    purpose: str
    ms: float
    verify_ms: float
    nodes_before: int
    nodes_after: int
    notes: tuple[str, ...]
    code: tuple[int, ...]
    """The graph after the pass as numbers of `Report.lines`."""


@dataclass(frozen=True)
class Source:
    """A line of the user's code."""

    file: str
    """Relative to where packages are installed, or to the working directory."""
    line: int
    function: str
    text: str
    path: str = ""
    """The file's absolute path where its lines could be read."""
    start: int = 0
    """Number of the first line in `context`."""
    context: tuple[str, ...] = ()
    """The lines around, as they were when the model was inspected."""
    caller: int | None = None
    """Number of the source line that called this function; None for the outermost."""


@dataclass(frozen=True)
class KernelReport:
    """One fused kernel: its code, and the bytes that it moves per token (`KernelSpec.bytes_token`)."""

    name: str
    kind: str
    device: str
    """The type of device it is generated for."""
    calls: int
    """Number of calls in one forward pass."""
    forward: str | None
    """Generated code; None where plain PyTorch computes it."""
    backward: str | None
    bytes_token: int
    """As the generated code counts them."""
    limit_token: int
    """Every value once: what any kernel has to move."""
    bytes_token_backward: int
    limit_token_backward: int
    elements: tuple[int, ...]
    """The elements it computes: the sites before and after a boundary."""

    @property
    def traffic(self) -> tuple[str, str]:
        """How many times the least traffic it moves, forward and backward: `1.29 x`."""
        both = ((self.bytes_token, self.limit_token), (self.bytes_token_backward, self.limit_token_backward))
        forward, backward = (f"{moved / least:.2f} x" if least else "" for moved, least in both)
        return forward, backward


@dataclass(frozen=True)
class BlockReport:
    """Sites whose streams are recomputed together in the backward pass."""

    first: int
    last: int
    kept: int
    """Bytes kept for the backward pass."""
    recomputed: int
    """Bytes recomputed just before the backward pass of the block."""


@dataclass(frozen=True)
class StageReport:
    """One pipeline stage."""

    first: int
    last: int
    parameters: int
    """Elements of the parameters that it reads."""


@dataclass(frozen=True)
class Diagnostic:
    """An error or a warning of this package."""

    code: str
    title: str
    detail: str
    way_out: str
    severity: Literal["error", "warning"]
    node: str | None = None
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class MemoryReport:
    """A table of one owner: the memory at the entry of a layer, or another look-up."""

    layer: str
    """Full module path of the layer; of other look-ups the owner's, and `over-encoding` or `ultra-mem`."""
    orders: str
    """N-grams and hashes per n-gram: `2..3 x 8`; by content values of pairs and heads: `16 of 256^2 x 1`."""
    table: str
    """Rows, width, dtype and storage of the table, and the hit rate of its cache."""
    rows: int
    """Elements of the table."""
    parameters: int
    """Elements of everything else."""


@dataclass(frozen=True)
class LayerReport:
    """The graph of one module before and after `widen`, one line per node."""

    path: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class StepReport:
    """A step that ran under torch's profiler: forward, and backward where something requires gradients."""

    device: str
    inputs: tuple[str, ...]
    """The model's own inputs: `input_ids int64[2, 128]`."""
    warm_up: int
    runs: int
    """Runs that were measured, after those to warm up."""
    time: Time
    parts: float
    """The sum of the medians of all parts. Shares are fractions of it."""
    streams: float
    """The sum of the medians of all entries, sites and exits."""


@dataclass(frozen=True)
class Reach:
    """The walk back from the output along the stream of a model that is not supported."""

    layers: tuple[str, ...]
    """Modules of the parameter contractions passed before the first site, starting at the output."""
    sites: tuple[str, ...]
    """Modules of the adds followed, starting at the output."""
    node: str
    """Where the walk stopped."""
    module: str
    source: str | None
    reason: str
    dismissed: tuple[tuple[str, str], ...]
    """Adds that are not sites: where, and why."""


@dataclass(frozen=True)
class Report(Printed):
    """The streams of a model and what each pass did, or why the model is not supported.

    `str()` and `text()` return plain text; printed by rich (`rich.print`, a rich console) it has tables and colours; a
    notebook shows the page of `html()`. Elements, lines, sources, kernels, blocks and stages refer to each other by
    number, from 0.
    """

    format: int
    versions: dict[str, str]
    model: str
    """The model's class."""
    state: Literal["converted", "not converted", "native", "refused"]
    parameters: int
    """Elements of the model's own parameters."""
    options: dict[str, str]
    elements: tuple[Element, ...]
    roots: tuple[int, ...]
    """The outermost elements, from the inputs to the output."""
    lines: tuple[CodeLine, ...]
    """Every distinct line of graph code."""
    captured: tuple[int, ...]
    """The graph before the first pass."""
    passes: tuple[PassReport, ...]
    sources: tuple[Source, ...]
    kernels: tuple[KernelReport, ...]
    blocks: tuple[BlockReport, ...]
    stages: tuple[StageReport, ...]
    diagnostics: tuple[Diagnostic, ...]
    memories: tuple[MemoryReport, ...]
    coverage: Coverage | None = None
    """How many residual adds are part of a stream; None for a model that is not supported."""
    reach: Reach | None = None
    """How far the stream of a model that is not supported was followed."""
    layer: LayerReport | None = None
    step: StepReport | None = None
    """Times of a step, if `inspect(..., time=True)` ran one."""
    probes: str = ""
    """The sample that the figures in `Element.probe` come from, as text; empty without samples."""
    outputs: dict[str, Any] | None = None
    """What the model computes: see `mhc_compile.diff.outputs`."""

    @property
    def refusal(self) -> Diagnostic | None:
        """Why the model cannot be converted, or None."""
        return next((d for d in self.diagnostics if d.severity == "error"), None)

    def of_kind(self, kind: Kind) -> tuple[Element, ...]:
        """Return the elements of one kind, in the order of the streams."""
        return tuple(e for e in self.elements if e.kind == kind)

    @property
    def streams(self) -> tuple[Element, ...]:
        """The streams."""
        return self.of_kind("stream")

    @property
    def sites(self) -> tuple[Element, ...]:
        """The sites of all streams."""
        return self.of_kind("site")

    def sites_in(self, element: Element) -> Iterator[Element]:
        """Yield the sites of an element in order."""
        for child in (self.elements[number] for number in element.children):
            yield from [child] if child.kind == "site" else self.sites_in(child)

    @property
    def added(self) -> int:
        """Elements of all stream parameters."""
        return sum(e.added for e in self.elements)

    def json(self) -> str:
        """Return `dataclasses.asdict` of the report as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def of(data: dict[str, Any]) -> Report:
        """Return the report whose JSON is `data`. Raises MHC527 for another format."""
        if data.get("format") != FORMAT:
            raise MHCError("MHC527", f"a report of format {data.get('format')}, known is {FORMAT}")
        try:
            return _read(Report, data)
        except (AttributeError, KeyError, TypeError) as error:
            raise MHCError("MHC527", f"the report has no usable {error}") from error

    def html(self, file: str | Path | None = None) -> str:
        """Return a self-contained HTML page, also written to `file`. Raises MHC509 where that fails."""
        from mhc_compile.report.page.page import page

        text = page(self)
        if file is not None:
            write_whole(Path(file), text)
        return text

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        """Return what a notebook shows: the page in a frame, and text where there is no browser."""
        from mhc_compile.report.page.notebook import frame

        return {"text/plain": self.text(), "text/html": frame(self)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from mhc_compile.report.render import render

        yield from render(self)


def _read(hint: Any, data: Any) -> Any:
    """Return the value of type `hint` whose JSON is `data`."""
    args = get_args(hint)
    if get_origin(hint) is UnionType:
        return None if data is None else _read(args[0], data)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: _read(hints[f.name], data[f.name]) for f in fields(hint)})  # type: ignore[operator]
    if get_origin(hint) is tuple:
        return tuple(_read(args[0], item) for item in data) if args[1:] == (...,) else tuple(data)
    return data
