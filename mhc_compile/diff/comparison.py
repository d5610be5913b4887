"""Two forms of a model side by side, as data, as text and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mhc_compile.diff.form import Form
from mhc_compile.diff.outputs import Numerics, compare_outputs
from mhc_compile.report.fold import fold
from mhc_compile.report.report import Element
from mhc_compile.rich_text import Printed, new_table

SAME = 1e-5
"""Outputs that differ by no more of their scale are the same: float32 rounds so, and so do conventions' eps."""


@dataclass(frozen=True)
class SiteChange:
    """A site that only one form has, or that differs: topology, shape, specification and parameters in either form."""

    name: str
    a: Mapping[str, str] | None
    b: Mapping[str, str] | None

    @property
    def kind(self) -> str:
        """`only in A`, `only in B`, or what differs."""
        if self.a is None or self.b is None:
            return "only in A" if self.b is None else "only in B"
        return ", ".join(name for name, fact in self.a.items() if fact != self.b[name])


@dataclass(frozen=True)
class Comparison(Printed):
    """What differs between two forms. `str()` is plain text; printed by rich it has tables and colours."""

    a: Form
    b: Form
    sites: tuple[SiteChange, ...]
    """Those that differ."""
    nodes: tuple[tuple[str, int | None, int | None], ...]
    """Nodes of the graph after every pass: its name, in A, in B; None where it did not run."""
    kernels: tuple[tuple[str, tuple[int, int] | None, tuple[int, int] | None], ...]
    """Every fused kernel: its name, calls and bytes per token in A and in B."""
    numerics: tuple[Numerics, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs but versions and labels."""
        return not self.sites and all(
            [
                _refusal(self.a) == _refusal(self.b),
                *(x == y for _, x, y in (*self.nodes, *self.kernels)),
                *(n.relative is None or n.relative <= SAME for n in self.numerics),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Return what differs, for JSON: the nodes and kernels by name, each with A's value and B's."""
        return {
            "same": self.same,
            "a": self.a.label,
            "b": self.b.label,
            "sites": self.sites,
            "nodes": {name: {"a": a, "b": b} for name, a, b in self.nodes},
            "kernels": {name: {"a": a, "b": b} for name, a, b in self.kernels},
            "numerics": self.numerics,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _render(self)


def compare(a: Form, b: Form) -> Comparison:
    """Compare two forms: sites by their names, passes and kernels by theirs, outputs where both have some."""
    sites = _joined(*({s.full_name: _facts(s) for s in form.report.sites} for form in (a, b)))
    changes = [SiteChange(*site) for site in sites if site[1] != site[2]]
    missing = "; ".join(filter(None, (f.missing for f in (a, b) if f.report.outputs is None)))
    return Comparison(
        a, b, tuple(changes), tuple(_joined(a.nodes, b.nodes)), tuple(_joined(a.kernels, b.kernels)),
        tuple(compare_outputs(a.report.outputs, b.report.outputs, missing)),
    )  # fmt: skip


def _joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*a, *b]):
        yield name, a.get(name), b.get(name)


def _facts(site: Element) -> dict[str, str]:
    calls = f", {site.calls} calls" if site.calls > 1 else ""
    return {
        "topology": site.topology or "",
        "shape": f"{site.dtype}{site.shape}{calls}",
        "specification": site.spec or "residual",
        "parameters": f"{site.added:,}",
    }


def _refusal(form: Form) -> str:
    return form.report.refusal.code if form.report.refusal else ""


def _render(c: Comparison) -> Iterator[RenderableType]:
    yield _sides(c)
    yield Text()
    if c.sites:
        yield _sites(c)
    else:
        yield Text(f"sites: the same {len(c.a.report.sites)}")
    for rows, table, same in (
        (c.nodes, _nodes, "nodes: the same after every pass"),
        (c.kernels, _kernels, "fused kernel: the same"),
    ):
        if all(x == y for _, x, y in rows):
            yield Text(same)
        else:
            yield Text()
            yield table(c)
    yield Text()
    yield from map(_numerics, c.numerics)
    if not c.same:
        yield Text("the forms differ", style="bold")
    elif any(n.error is None for n in c.numerics):
        yield Text("no difference between the forms; outputs were not compared", style="green")
    else:
        yield Text("no difference", style="green")


def _sides(c: Comparison) -> Table:
    table = new_table("", "A", "B")
    table.add_row("form", Text(c.a.label), Text(c.b.label))
    a, b = c.a.report, c.b.report
    rows: list[tuple[str, Any, Any]] = [
        (key, getattr(a, key), getattr(b, key)) for key in ("model", "parameters", "added")
    ]
    x, y = (f"{f.report.state} {_refusal(f)}".strip() for f in (c.a, c.b))
    rows.append(("state", x, y))
    rows += [*_joined(a.options, b.options), *_joined(a.versions, b.versions)]
    for name, x, y in rows:
        if x != y or name in ("model", "state", "parameters", "added", "streams", "mhc_compile"):
            style = "" if x == y else "yellow"
            table.add_row(name, *(Text(f"{v:,}" if isinstance(v, int) else str(v), style=style) for v in (x, y)))
    return table


def _sites(c: Comparison) -> Table:
    table = new_table("site", "differs in", "A", "B")
    a, b = ({site.full_name for site in form.report.sites} for form in (c.a, c.b))
    table.title, table.title_justify = f"sites: {len(a)} in A, {len(b)} in B, {len(a & b)} in both", "left"

    def shown(change: SiteChange) -> tuple[str, str, str]:
        return change.kind, _of(change.a, change.b, change.kind), _of(change.b, change.a, change.kind)

    for label, group in fold(c.sites, lambda s: s.name, shown):
        table.add_row(*map(Text, (label, *shown(group[0]))))
    return table


def _of(site: Mapping[str, str] | None, other: Mapping[str, str] | None, kind: str) -> str:
    """Return what is shown of a site beside that of the other form."""
    if site is None or other is None:
        return "-" if site is None else f"{site['topology']}, {site['shape']}"
    words = (word for word in site["specification"].split() if word not in other["specification"].split())
    shown = {**site, "specification": " ".join(words)}
    return "; ".join(shown[name] for name in kind.split(", "))


def _nodes(c: Comparison) -> Table:
    table = new_table("nodes after", "A", "B", "B - A", numbers=("A", "B", "B - A"))
    for name, x, y in c.nodes:
        change = "" if x is None or y is None or x == y else f"{y - x:+,}"
        table.add_row(name, *("-" if v is None else f"{v:,}" for v in (x, y)), change)
    return table


def _kernels(c: Comparison) -> Table:
    table = new_table(
        "fused kernel", "calls in A", "in B", "bytes per token in A", "in B ", numbers=("calls", "in", "bytes")
    )
    for name, x, y in c.kernels:
        calls = [f"{v[0]:,}" if v else "-" for v in (x, y)]
        table.add_row(name, *calls, *(f"{v[1]:,}" if v else "-" for v in (x, y)))
    table.add_row("all calls", "", "", f"{c.a.bytes_token:,}", f"{c.b.bytes_token:,}")
    return table


def _numerics(n: Numerics) -> Text:
    where = f"outputs, streams {n.which}: " if n.which else "outputs: "
    if n.error is None:
        return Text(f"{where}not comparable: {n.reason}")
    verdict = "the same" if n.error == 0 else f"differ by {n.error:.3g} at a scale of {n.scale:.3g} ({n.relative:.2g})"
    return Text(f"{where}{verdict}", style="" if (n.relative or 0) <= SAME else "yellow")
