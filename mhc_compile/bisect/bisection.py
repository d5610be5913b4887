"""The result of `bisect`, as data, as text and for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from mhc_compile.rich_text import Printed, new_table


@dataclass(frozen=True)
class Checked:
    """The result of one step."""

    name: str
    changed: bool
    """Whether it changed the graph."""
    error: float | None = None
    """The largest difference of any value that both graphs hold, in float64, over the value's scale."""
    rounding: float | None = None
    """The largest error in the model's own dtype, as a multiple of what it may be: wrong above 1."""


@dataclass(frozen=True)
class Finding:
    """The first value that left the tolerance."""

    step: str
    """Name of the pass, `kernels` for a generated kernel, or the inner compiler."""
    site: str | None
    """Module path and ordinal, `model.layers.3#0`; None before the first site and after the last."""
    what: str
    """What the value is at its site."""
    node: str
    """The node that computes it in the graph after the step."""
    error: float
    """The largest difference; infinite where a value is not finite or the graph cannot be run."""
    scale: float
    """The largest value."""
    allowed: float
    """The largest error allowed."""
    dtype: str
    """The dtype of the computation."""
    values: str
    """The stream parameters it was computed with."""
    module: str
    """Path of the module that the value belongs to."""
    source: str | None
    """`file:line, in function: text` of the user's line."""
    before: tuple[str, ...] = ()
    """Code that computes the value before the step, or the input of a kernel or compiler."""
    after: tuple[str, ...] = ()
    """The same after it."""


@dataclass(frozen=True)
class Bisection(Printed):
    """The first step and the first site at which a model's results leave the tolerance, or that there is none.

    `str()` is plain text; printed by rich it has tables and colours.
    """

    model: str
    """The model's class."""
    checked: tuple[Checked, ...]
    """The steps up to the one that is wrong, in order."""
    finding: Finding | None = None
    """None: no difference was found."""
    reproducer: Path | None = None
    """The file written."""
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> str | None:
        """The step that is wrong."""
        return self.finding.step if self.finding else None

    @property
    def site(self) -> str | None:
        """The site at which it is."""
        return self.finding.site if self.finding else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _render(self)


def _render(bisection: Bisection) -> Iterator[RenderableType]:
    yield Text.assemble((bisection.model, "bold"), ": every step against the one before")
    numbers = ("difference in float64", "rounding, of what it may be")
    table = new_table("step", *numbers, numbers=numbers)
    for c in bisection.checked:
        if not c.changed:
            table.add_row(Text(c.name), Text("same graph", style="dim"), "")
            continue
        wrong = bisection.step == c.name
        row = [("" if x is None else f"{x:.2g}") for x in (c.error, c.rounding)]
        table.add_row(Text(c.name, style="bold red" if wrong else ""), *row)
    yield table
    if bisection.finding is None:
        yield Text("no difference found", style="green")
    else:
        yield from _finding(bisection.finding)
    for note in bisection.notes:
        yield Text(note)
    if bisection.reproducer is not None:
        yield Text(f"reproducer: python {bisection.reproducer}")


def _finding(f: Finding) -> Iterator[RenderableType]:
    where = f"at site {f.site}" if f.site else f.what
    yield Text.assemble((f"{f.step} is wrong {where}", "bold red"))
    rows = [
        ("value", f"{f.what}, {f.node}, in {f.dtype}, {f.values}"),
        ("error", f"{f.error:.3g} at a scale of {f.scale:.3g}; allowed: {f.allowed:.3g}"),
        ("module", f.module),
        ("source", f.source),
    ]
    for name, content in rows:
        if content:
            yield Text(f"  {name + ':':<8} {content}")
    if f.before == f.after:
        yield from (Text(f"    {line}", no_wrap=True, overflow="ignore") for line in f.before)
        return
    for line in difflib.unified_diff(f.before, f.after, "before", "after", lineterm="", n=len(f.before)):
        if line.startswith("@@"):
            continue
        style = {"-": "red", "+": "green"}.get(line[:1], "")
        yield Text(f"    {line}", style=style, no_wrap=True, overflow="ignore")
