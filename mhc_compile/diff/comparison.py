"""Two forms of a model side by side, as data, as text and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mhc_compile.diff.form import Form, Site
from mhc_compile.diff.outputs import Numerics, compare_outputs
from mhc_compile.report.fold import fold
from mhc_compile.rich_text import Printed

SAME = 1e-5
"""Outputs that differ by no more of their scale are the same: float32 rounds so, and so do conventions' eps."""


@dataclass(frozen=True)
class SiteChange:
    """A site that only one form has, or that is another one there."""

    name: str
    a: Site | None
    b: Site | None

    @property
    def kind(self) -> str:
        """`only in A`, `only in B`, or what differs."""
        if self.a is None or self.b is None:
            return "only in A" if self.b is None else "only in B"
        a, b = self.a, self.b
        rows = (("topology", a.topology, b.topology), ("shape", a.shape, b.shape),
                ("specification", a.spec, b.spec), ("parameters", a.parameters, b.parameters))  # fmt: skip
        return ", ".join(name for name, x, y in rows if x != y)


@dataclass(frozen=True)
class Comparison(Printed):
    """What differs between two forms. `str()` is plain text; printed by rich it has tables and colours."""

    a: Form
    b: Form
    sites: tuple[SiteChange, ...]
    """Those that differ."""
    nodes: tuple[tuple[str, int | None, int | None], ...]
    """Nodes of the graph behind every pass: its name, in A, in B; None where it did not run."""
    kernels: tuple[tuple[str, tuple[int, int] | None, tuple[int, int] | None], ...]
    """Every fused kernel: its name, calls and bytes a token in A and in B."""
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _render(self)


def compare(a: Form, b: Form) -> Comparison:
    """Compare two forms: sites by their names, passes and kernels by theirs, outputs where both have some."""
    mine, other = {s.name: s for s in a.sites}, {s.name: s for s in b.sites}
    changes = [
        SiteChange(name, mine.get(name), other.get(name))
        for name in dict.fromkeys([*mine, *other])
        if mine.get(name) != other.get(name)
    ]
    missing = "; ".join(f.missing for f in (a, b) if f.outputs is None)
    return Comparison(
        a, b, tuple(changes), tuple(_joined(a.nodes, b.nodes)), tuple(_joined(a.kernels, b.kernels)),
        tuple(compare_outputs(a.outputs, b.outputs, missing)),
    )  # fmt: skip


def _joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*a, *b]):
        yield name, a.get(name), b.get(name)


def _refusal(form: Form) -> str:
    return next((d["code"] for d in form.report["diagnostics"] if d["severity"] == "error"), "")


def _render(c: Comparison) -> Iterator[RenderableType]:
    yield _sides(c)
    yield Text()
    if c.sites:
        yield _sites(c)
    else:
        yield Text(f"sites: the same {len(c.a.sites)}")
    for title, table in (("nodes behind", _nodes(c)), ("fused kernel", _kernels(c))):
        if table is not None:
            yield Text()
            yield table
        else:
            yield Text(f"{title}: the same" if title == "fused kernel" else "nodes: the same behind every pass")
    yield Text()
    yield from map(_numerics, c.numerics)
    if not c.same:
        yield Text("the forms differ", style="bold")
    elif any(n.error is None for n in c.numerics):
        yield Text("no difference between the forms; outputs were not compared", style="green")
    else:
        yield Text("no difference", style="green")


def _sides(c: Comparison) -> Table:
    table = _table("", "A", "B")
    table.add_row("form", Text(c.a.label), Text(c.b.label))
    a, b = c.a.report, c.b.report
    rows: list[tuple[str, Any, Any]] = [
        (key, a["model"].get(key), b["model"].get(key)) for key in ("name", "parameters", "added")
    ]
    x, y = (" ".join(filter(None, (f.report["model"].get("state"), _refusal(f)))) for f in (c.a, c.b))
    rows.append(("state", x, y))
    rows += list(_joined(a["options"], b["options"]))
    rows += list(_joined(a["versions"], b["versions"]))
    for name, x, y in rows:
        if x != y or name in ("name", "state", "parameters", "added", "streams", "mhc_compile"):
            style = "" if x == y else "yellow"
            table.add_row(name, *(Text(f"{v:,}" if isinstance(v, int) else str(v), style=style) for v in (x, y)))
    return table


def _sites(c: Comparison) -> Table:
    table = _table("site", "differs in", "A", "B")
    shared = len({s.name for s in c.a.sites} & {s.name for s in c.b.sites})
    table.title, table.title_justify = f"sites: {len(c.a.sites)} in A, {len(c.b.sites)} in B, {shared} in both", "left"

    def shown(change: SiteChange) -> tuple[str, str, str]:
        return change.kind, _of(change.a, change.b, change.kind), _of(change.b, change.a, change.kind)

    for label, group in fold(c.sites, lambda s: s.name, shown):
        table.add_row(*map(Text, (label, *shown(group[0]))))
    return table


def _of(site: Site | None, other: Site | None, kind: str) -> str:
    """What is to be seen of a site beside the other form's."""
    if site is None or other is None:
        return "-" if site is None else f"{site.topology}, {site.shape}"
    spec = " ".join(word for word in site.spec.split() if word not in other.spec.split())
    held = {"topology": site.topology, "shape": site.shape, "specification": spec or "residual",
            "parameters": f"{site.parameters:,}"}  # fmt: skip
    return "; ".join(held[name] for name in kind.split(", "))


def _nodes(c: Comparison) -> Table | None:
    if all(x == y for _, x, y in c.nodes):
        return None
    table = _table("nodes behind", "A", "B", "B - A", numbers=("A", "B", "B - A"))
    for name, x, y in c.nodes:
        change = "" if x is None or y is None or x == y else f"{y - x:+,}"
        table.add_row(name, *("-" if v is None else f"{v:,}" for v in (x, y)), change)
    return table


def _kernels(c: Comparison) -> Table | None:
    if all(x == y for _, x, y in c.kernels):
        return None
    table = _table(
        "fused kernel", "calls in A", "in B", "bytes a token in A", "in B ", numbers=("calls", "in", "bytes")
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


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        right = bool(numbers) and name.startswith(numbers)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table
