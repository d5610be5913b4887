"""An `Inspection` as rich tables and text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mhc_compile.diagnostics import TABLE, MHCError
from mhc_compile.passes.observer import Record
from mhc_compile.passes.results import NativeSite
from mhc_compile.report.fold import fold
from mhc_compile.report.lines import short_path
from mhc_compile.report.reach import Reach

if TYPE_CHECKING:
    from mhc_compile.report.inspection import (
        Inspection,
        KernelReport,
        LayerView,
        MemoryReport,
        SiteReport,
        StreamReport,
    )

MAX_NOTES = 4
"""Notes of one pass shown; more are counted."""


def render(found: Inspection) -> Iterator[RenderableType]:
    """The sections of the report, in order."""
    yield from _summary(found)
    if found.native:
        yield Text()
        yield from _native(found.native)
    if found.refusal is not None:
        yield Text()
        yield from _refusal(found.refusal)
    if found.reach is not None:
        yield Text()
        yield from _reach(found.reach)
    for stream, calls in Counter(found.streams).items():
        yield Text()
        yield from _stream(stream, calls)
    if found.memories:
        yield Text()
        yield _memories(found.memories)
    if found.passes:
        yield Text()
        yield _passes(found.passes)
        yield from _notes(found.passes)
    if found.kernels:
        yield Text()
        yield _kernels(found.kernels)
    if found.layer is not None:
        yield Text()
        yield from _layer(found.layer)


def _summary(found: Inspection) -> Iterator[RenderableType]:
    state = "refused" if found.refusal else "converted" if found.converted else "not converted"
    yield Text.assemble((found.model, "bold"), f" ({state}), {found.parameters:,} parameters")
    if found.streams:
        share = f" ({100 * found.added / found.parameters:.2f} %)" if found.parameters else ""
        verb = "hold" if found.converted else "would add"
        count = len(set(found.streams))
        streams = "1 stream" if count == 1 else f"{count} streams"
        sites = f"{len(found.sites)} sites, {found.coverage}"
        yield Text(f"{streams}, {sites}; the sites {verb} {found.added:,} parameters{share}")


def _native(sites: Sequence[NativeSite]) -> Iterator[RenderableType]:
    yield Text(f"hyper-connections of its own: {len(sites)} sites", style="bold")
    for spec, count in Counter(site.spec for site in sites).items():
        yield Text(f"  {count} x {spec}")
    yield Text('  torch.compile(model, backend="mhc") compiles them as they are; `convert` is for residual models')


def _stream(stream: StreamReport, calls: int) -> Iterator[RenderableType]:
    times = f", {calls} calls" if calls > 1 else ""
    spec = stream.spec or "stays residual, its owner is not converted"
    yield Text.assemble("stream of ", (stream.owner or "the model itself", "bold"), f": {spec}{times}")
    yield Text(f"  enters {short_path(stream.entry)}")
    yield Text(f"  leaves {short_path(stream.exit)}")
    table = _table("site", "topology", "shape", "parameters", "source", numbers=("parameters",))
    for label, sites in fold(stream.sites, lambda s: s.name, _alike):
        site = sites[0]
        each = f"{site.parameters:,}"
        table.add_row(
            *map(
                Text,
                (
                    _under(stream.owner, label),
                    site.topology,
                    f"{site.dtype}[{', '.join(site.shape)}]",
                    each if len(sites) == 1 else f"{len(sites)} x {each}",
                    _brief(site.source or ""),
                ),
            )
        )
    yield Padding(table, (0, 0, 0, 2))


def _memories(memories: Sequence[MemoryReport]) -> RenderableType:
    numbers = ("elements", "parameters")
    table = _table("memory", "n-grams", "table", *numbers, numbers=numbers)
    for m in memories:
        table.add_row(*map(Text, (m.layer, m.orders, m.table, f"{m.rows:,}", f"{m.parameters:,}")))
    return table


def _alike(site: SiteReport) -> tuple[object, ...]:
    return site.topology, site.shape, site.dtype, site.parameters, site.source


def _under(owner: str, name: str) -> str:
    return name if not owner else f"{owner}{name}" if name.startswith("#") else f"{owner}.{name}"


def _passes(records: Sequence[Record]) -> RenderableType:
    numbers = ("nodes in", "nodes out", "added", "removed", "ms")
    table = _table("pass", *numbers, numbers=numbers)
    for r in records:
        before, after = Counter(r.before.splitlines()), Counter(r.after.splitlines())
        new, gone = (after - before).total(), (before - after).total()
        row = (r.name, f"{r.nodes_before}", f"{r.nodes_after}", f"{new}", f"{gone}", f"{1e3 * r.seconds:.1f}")
        table.add_row(*map(Text, row))
    return table


def _notes(records: Sequence[Record]) -> Iterator[RenderableType]:
    for r in records:
        folded = fold(r.notes, str, lambda _: None)
        for label, same in folded[:MAX_NOTES]:
            yield Text(f"  {r.name}: {label}" + (f" ({len(same)} times)" if len(same) > 1 else ""))
        if len(folded) > MAX_NOTES:
            yield Text(f"  {r.name}: {len(folded) - MAX_NOTES} more notes")


def _kernels(kernels: Sequence[KernelReport]) -> RenderableType:
    table = _table("fused kernel", "calls", "device", "bytes a token", numbers=("calls", "bytes"))
    for k in kernels:
        table.add_row(*map(Text, (k.spec.name, str(k.calls), k.device, f"{k.bytes_token('forward'):,}")))
    return table


def _layer(view: LayerView) -> Iterator[RenderableType]:
    for title, lines, other, mark, style in (
        ("before widen", view.before, set(view.after), "-", "red"),
        ("after widen", view.after, set(view.before), "+", "green"),
    ):
        yield Text.assemble((view.path, "bold"), f" {title}: {len(lines)} nodes")
        for line in lines:
            colour, sign = (style, mark) if line not in other else ("", " ")
            yield Text(f"{sign} {line}", style=colour, no_wrap=True, overflow="ignore")


def _refusal(error: MHCError) -> Iterator[RenderableType]:
    yield Text.assemble((f"refused: {error.code} {TABLE[error.code].title}", "bold red"))
    for name, content in (
        ("why", error.detail), ("node", error.node), ("module", error.module), ("source", error.source),
        ("way out", TABLE[error.code].way_out),
    ):  # fmt: skip
        if content:
            yield Text(f"  {name + ':':<8} {short_path(content)}")


def _reach(reach: Reach) -> Iterator[RenderableType]:
    yield Text("followed back from the output:", style="bold")
    for name, modules in (("layers passed", reach.layers), ("sites", reach.sites)):
        labels = [label for label, _ in fold(list(dict.fromkeys(modules)), str, lambda _: None)]
        shown = ", ".join(labels[:6]) + (f", and {len(labels) - 6} more" if len(labels) > 6 else "")
        yield Text(f"  {name + ':':<14} {f'{len(modules)} ({shown})' if modules else 'none'}")
    yield Text(f"  {'stopped at:':<14} {reach.node}, {reach.reason}")
    if reach.source:
        yield Text(f"  {'':<14} in {reach.module}, {short_path(reach.source)}")
    if reach.dismissed:
        yield Text("adds that are no sites:", style="bold")
        for where, why in reach.dismissed:
            yield Text(f"  {short_path(where)}\n    {why}")


def _table(*columns: str, numbers: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        right = name.startswith(numbers)
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _brief(source: str) -> str:
    """`file:line  text` of a source line."""
    place, _, text = source.partition(": ")
    path, _, _ = place.partition(", in ")
    return f"{Path(path).name}  {text}".strip()
