"""A `Report` as rich tables and text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from mhc_compile.passes.results import OVER_DEPTH
from mhc_compile.report.fold import fold
from mhc_compile.rich_text import new_table

if TYPE_CHECKING:
    from mhc_compile.report.report import (
        Diagnostic,
        Element,
        LayerReport,
        PassReport,
        Reach,
        Report,
        Source,
        StepReport,
    )

MAX_NOTES = 4
"""Notes of one pass shown; more are counted."""


def render(report: Report) -> Iterator[RenderableType]:
    """Yield the sections of the report, in order."""
    yield from _summary(report)
    for section in _sections(report):
        yield Text()
        yield from section


def _sections(report: Report) -> Iterator[Iterator[RenderableType]]:
    if report.state == "native":
        yield _native(report)
    if report.refusal is not None:
        yield _refusal(report.refusal)
    if report.reach is not None:
        yield _reach(report.reach)
    if report.coverage is not None:
        for stream, leaves in zip(report.streams, report.of_kind("exit"), strict=True):
            yield _stream(report, stream, leaves)
        if report.coverage.left:
            yield _left(report)
    if report.step is not None:
        yield _step(report, report.step)
    if report.probes:
        yield iter([Text(f"probes: {report.probes}; the page and the JSON have the figures, `probe` prints them")])
    if report.memories:
        yield _memories(report)
    if report.passes:
        yield _passes(report)
    if report.kernels:
        yield _kernels(report)
    if any(element.unfused for element in report.elements):
        yield _unfused(report)
    if report.layer is not None:
        yield _layer(report.layer)


def _summary(report: Report) -> Iterator[RenderableType]:
    state = "refused" if report.refusal else report.state
    yield Text.assemble((report.model, "bold"), f" ({state}), {report.parameters:,} parameters")
    if report.coverage is not None:
        share = f" ({100 * report.added / report.parameters:.2f} %)" if report.parameters else ""
        verb = "hold" if report.state == "converted" else "would add"
        count = len(report.streams)
        streams = "1 stream" if count == 1 else f"{count} streams"
        sites = f"{len(report.sites)} sites, {report.coverage}"
        yield Text(f"{streams}, {sites}; the sites {verb} {report.added:,} parameters{share}")


def _native(report: Report) -> Iterator[RenderableType]:
    reads = [site for site in report.sites if site.topology == OVER_DEPTH]
    sites = [site for site in report.sites if site.topology != OVER_DEPTH]
    for what, elements, each in (("hyper-connections", sites, "sites"), (OVER_DEPTH, reads, "reads")):
        if elements:
            yield Text(f"{what} of its own: {len(elements)} {each}", style="bold")
        for spec, count in Counter(element.spec for element in elements).items():
            yield Text(f"  {count} x {spec}")
    yield Text('  torch.compile(model, backend="mhc") compiles them as they are; `convert` is for residual models')


def _stream(report: Report, stream: Element, leaves: Element) -> Iterator[RenderableType]:
    times = f", {stream.calls} calls" if stream.calls > 1 else ""
    spec = stream.spec or "stays residual, its owner is not converted"
    yield Text.assemble("stream of ", (stream.module or "the model itself", "bold"), f": {spec}{times}")
    yield Text(f"  enters {stream.place}")
    yield Text(f"  leaves {leaves.place}")
    table = new_table("site", "topology", "shape", "parameters", "source", numbers=("parameters",))

    def shown(site: Element) -> tuple[str, ...]:
        source = "" if site.source is None else _brief(report.sources[site.source])
        added = f"{site.added:,}" if site.spec or not stream.spec else "skipped"
        return site.topology or "", f"{site.dtype}{site.shape}", added, source

    for label, sites in fold(tuple(report.sites_in(stream)), lambda s: s.name, shown):
        topology, form, each, source = shown(sites[0])
        each = each if len(sites) == 1 or each == "skipped" else f"{len(sites)} x {each}"
        table.add_row(*map(Text, (_under(stream.module, label), topology, form, each, source)))
    yield Padding(table, (0, 0, 0, 2))


def _memories(report: Report) -> Iterator[RenderableType]:
    numbers = ("elements", "parameters")
    table = new_table("memory", "n-grams", "table", *numbers, numbers=numbers)
    for m in report.memories:
        table.add_row(*map(Text, (m.layer, m.orders, m.table, f"{m.rows:,}", f"{m.parameters:,}")))
    yield table


def _under(owner: str, name: str) -> str:
    return name if not owner else f"{owner}{name}" if name.startswith("#") else f"{owner}.{name}"


def _passes(report: Report) -> Iterator[RenderableType]:
    numbers = ("nodes in", "nodes out", "added", "removed", "ms")
    table = new_table("pass", *numbers, numbers=numbers)
    before, idle = Counter(report.captured), []
    for p in report.passes:
        after = Counter(p.code)
        added, removed = (after - before).total(), (before - after).total()
        row = (p.name, f"{p.nodes_before}", f"{p.nodes_after}", f"{added}", f"{removed}", f"{p.ms:.1f}")
        if added or removed or p.notes:
            table.add_row(*map(Text, row))
        else:
            idle.append(p.name)
        before = after
    yield table
    if idle:
        yield Text(f"  nothing to do: {', '.join(idle)}", style="dim")
    for p in report.passes:
        yield from _notes(p)


def _notes(step: PassReport) -> Iterator[RenderableType]:
    folded = fold(step.notes, str, lambda _: None)
    for label, same in folded[:MAX_NOTES]:
        yield Text(f"  {step.name}: {label}" + (f" ({len(same)} times)" if len(same) > 1 else ""))
    if len(folded) > MAX_NOTES:
        yield Text(f"  {step.name}: {len(folded) - MAX_NOTES} more notes")


def _kernels(report: Report) -> Iterator[RenderableType]:
    heads = ("calls", "device", "bytes per token", "of the minimum", "backward", "of the minimum")
    table = new_table("fused kernel", *heads, numbers=("calls", "bytes", "of", "backward"))
    for k in report.kernels:
        forward, backward = k.traffic
        row = (f"{k.bytes_token:,}", forward, f"{k.bytes_token_backward:,}", backward)
        table.add_row(*map(Text, (k.name, str(k.calls), k.device, *row)))
    yield table


def _unfused(report: Report) -> Iterator[RenderableType]:
    held = [site for site in report.elements if site.unfused]
    if held:
        yield Text("not fused:", style="bold")
    for label, same in fold(held, lambda e: e.name, lambda e: e.unfused):
        for reason in same[0].unfused:
            yield Text(f"  {label}: {reason}")


def _step(report: Report, step: StepReport) -> Iterator[RenderableType]:
    whole, share = step.time, 100 / max(step.parts, 1e-9)
    yield Text.assemble(
        ("a step: ", "bold"),
        f"{whole.ms:.2f} ms ({whole.low:.2f} to {whole.high:.2f}), forward {whole.forward:.2f}, "
        f"backward {whole.backward:.2f}; the streams' own work {step.streams:.2f} ms, {share * step.streams:.1f} %",
    )
    yield Text(f"  on {step.device}, with {', '.join(step.inputs)}; medians of {step.runs} runs after {step.warm_up}")
    yield Text("  every operation runs by itself (inner=eager); the time between them does not count", style="dim")
    heads = ("forward", "backward", "ms", "share", "each", "low", "high")
    table = new_table("part", *heads, numbers=heads)
    for label, same in fold([e for e in report.elements if e.time], lambda e: e.shown, lambda e: e.kind):
        times = [e.time for e in same if e.time]
        sums = [sum(t.forward for t in times), sum(t.backward for t in times), sum(t.ms for t in times)]
        each = (median(t.ms for t in times), min(t.low for t in times), max(t.high for t in times))
        row = [*(f"{ms:.2f}" for ms in sums), f"{share * sums[2]:.1f} %", *(f"{ms:.2f}" for ms in each)]
        table.add_row(*map(Text, (label, *row)))
    yield Padding(table, (0, 0, 0, 2))


def _left(report: Report) -> Iterator[RenderableType]:
    assert report.coverage is not None
    yield Text("adds that are no sites:", style="bold")
    for where, why in zip(report.coverage.left, report.coverage.why, strict=True):
        yield Text(f"  {where}\n    {why}")


def _layer(view: LayerReport) -> Iterator[RenderableType]:
    for title, lines, other, mark, style in (
        ("before widen", view.before, set(view.after), "-", "red"),
        ("after widen", view.after, set(view.before), "+", "green"),
    ):
        yield Text.assemble((view.path, "bold"), f" {title}: {len(lines)} nodes")
        for line in lines:
            colour, sign = (style, mark) if line not in other else ("", " ")
            yield Text(f"{sign} {line}", style=colour, no_wrap=True, overflow="ignore")


def _refusal(error: Diagnostic) -> Iterator[RenderableType]:
    yield Text(f"refused: {error.code} {error.title}", style="bold red")
    for name, content in (
        ("why", error.detail), ("node", error.node), ("module", error.module), ("source", error.source),
        ("way out", error.way_out),
    ):  # fmt: skip
        if content:
            yield Text(f"  {name + ':':<8} {content}")


def _reach(reach: Reach) -> Iterator[RenderableType]:
    yield Text("followed back from the output:", style="bold")
    for name, modules in (("layers passed", reach.layers), ("sites", reach.sites)):
        labels = [label for label, _ in fold(list(dict.fromkeys(modules)), str, lambda _: None)]
        shown = ", ".join(labels[:6]) + (f", and {len(labels) - 6} more" if len(labels) > 6 else "")
        yield Text(f"  {name + ':':<14} {f'{len(modules)} ({shown})' if modules else 'none'}")
    yield Text(f"  {'stopped at:':<14} {reach.node}, {reach.reason}")
    if reach.source:
        yield Text(f"  {'':<14} in {reach.module}, {reach.source}")
    if reach.dismissed:
        yield Text("adds that are no sites:", style="bold")
        for where, why in reach.dismissed:
            yield Text(f"  {where}\n    {why}")


def _brief(source: Source) -> str:
    return f"{Path(source.file).name}:{source.line}  {source.text}".strip()
