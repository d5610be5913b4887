"""Contenders measured side by side in one process: alternating, gated by correctness, against what copying takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mhc_compile import palette
from mhc_compile.diagnostics import MHCError

_AHEAD = 2_000_000
"""Clocks that a GPU waits before it is timed, about a millisecond."""


@dataclass
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], Any]
    """One round of the work on the inputs that all contenders share; returns what `check` reads."""
    bytes: int | None = None
    """What it must move, for the fraction of the copy bandwidth; None where that is not known."""
    check: Callable[[Any], float] | None = None
    """The error of a result relative to the scale of the float64 reference; None: other equations, not compared."""
    tolerance: float = 1e-4
    """What `check` may return."""
    optional: bool = False
    """Of another package: where it raises or fails its check it is left out with a line, instead of stopping all."""
    prepare: Callable[[], None] | None = None
    """Called before every run and not timed: restores what a run consumes."""


@dataclass(frozen=True)
class Row:
    """What was measured of one contender. Seconds; `ratio` is its median over ours."""

    name: str
    device: str
    shape: str
    median: float
    low: float
    high: float
    ratio: float
    bytes: int | None
    fraction: float | None
    """Of the time that copying `bytes` takes on this device in this run: 1 is the limit."""
    error: float | None


def contest(
    console: Console, contenders: Sequence[Contender], *, ours: str, device: torch.device, shape: str, rounds: int,
    until: float = math.inf,
) -> list[Row]:  # fmt: skip
    """Check every contender, then time them in turn, `rounds` times, or fewer where `time.monotonic()` reaches `until`.

    Raises MHC110 for one that computes wrongly. An optional one that does, or raises, is left out with a line.
    """
    errors: dict[str, float | None] = {}
    able: list[Contender] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(contenders))
        for c in contenders:
            progress.update(task, description=f"checking {c.name}")
            try:
                errors[c.name] = _checked(c)
                able.append(c)
            except Exception as error:  # whatever another package raises
                if not c.optional:
                    raise
                say(console, f"{c.name}: left out: {reason(error)}")
            progress.advance(task)
        seconds: dict[str, list[float]] = {c.name: [] for c in able}
        task = progress.add_task("measuring", total=rounds)
        for done in range(rounds):
            if done and time.monotonic() > until:
                break
            for c in able:
                if c.prepare is not None:
                    c.prepare()
                seconds[c.name].append(timed(c.run, device))
            progress.advance(task)
    rate = copy_rate(device)
    best = statistics.median(seconds[ours])
    rows = []
    for c in able:
        median = statistics.median(seconds[c.name])
        fraction = None if c.bytes is None else c.bytes / rate / median
        rows.append(
            Row(
                c.name, str(device), shape, median, min(seconds[c.name]), max(seconds[c.name]), median / best, c.bytes,
                fraction, errors[c.name],
            )
        )  # fmt: skip
    return rows


def _checked(c: Contender) -> float | None:
    """Return its error in the run that compiles it, after two runs more. Raises MHC110 where it computes wrongly."""
    error = None
    for first in (True, False, False):  # an optimizer's first steps differ from later ones
        if c.prepare is not None:
            c.prepare()
        result = c.run()
        if first and c.check is not None:
            error = c.check(result)
            if not error <= c.tolerance:
                raise MHCError("MHC110", f"{c.name} is off by {error:.3g} of its scale: no figures")
        del result
    return error


def reason(error: Exception) -> str:
    """Return an exception in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def say(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one run. A GPU begins late, so that the time is its own unless the host is much slower."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        taken = time.perf_counter() - start
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(_AHEAD)
        begin.record()
        result = run()
        end.record()
        torch.cuda.synchronize(device)
        taken = begin.elapsed_time(end) / 1e3
    del result
    return taken


def copy_rate(device: torch.device, size: int = 1 << 28) -> float:
    """Measure the bytes per second, read and written, of copying a buffer larger than the caches into memory in use."""
    source, target = (torch.ones(size // 8, dtype=torch.float32, device=device) for _ in range(2))
    target.copy_(source)
    taken = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(9))
    return 2 * source.nbytes / taken


def distance(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest difference of any value, each relative to its own scale."""
    return max(
        float((f.detach().double() - e).abs().max() / e.abs().max().clamp(min=1e-30))
        for f, e in zip(results, exact, strict=True)
    )


def show(console: Console, title: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Print the table; the rows as plain values."""
    table = Table("contender", "median", "spread", "times ours", "bytes", "of copy bandwidth", "error", title=title)
    for r in rows:
        table.add_row(
            r.name, _ms(r.median), f"{_ms(r.low)} .. {_ms(r.high)}", f"{r.ratio:.2f}",
            "" if r.bytes is None else f"{r.bytes / 2**20:.0f} MiB", "" if r.fraction is None else f"{r.fraction:.0%}",
            "other equations" if r.error is None else f"{r.error:.1e}",
        )  # fmt: skip
    console.print(table)
    return [asdict(r) for r in rows]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds < 10 else f"{seconds:.1f} s"


def chart(path: Path, groups: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Draw the medians of every group as bars with their spread. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 1 + 0.5 * sum(len(g) + 2 for g in groups.values())))
    for axis, (title, rows) in zip([axes] if len(groups) == 1 else axes, groups.items(), strict=True):
        names = [r["name"] for r in rows]
        medians = [1e3 * r["median"] for r in rows]
        spread = [[1e3 * (r["median"] - r["low"]) for r in rows], [1e3 * (r["high"] - r["median"]) for r in rows]]
        colors = [palette.look("mhc")["color"] if r["ratio"] == 1 else palette.NEUTRAL for r in rows]  # ours is 1
        bars = axis.barh(names, medians, xerr=spread, color=colors, ecolor="#888888")
        axis.bar_label(bars, [f"{m:.3g} ms, {r['ratio']:.2f} x" for m, r in zip(medians, rows, strict=True)], padding=4)
        axis.margins(x=0.2)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
