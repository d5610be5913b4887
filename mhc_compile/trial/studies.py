"""What the examples that try published claims share: runs in several processes, statistics over seeds, their files."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

WARM_UP_STEPS = 2
"""The first steps compile; they are not timed."""
LEAST_STEPS = WARM_UP_STEPS + 3


@dataclass(frozen=True)
class Claim:
    """A published finding, and whether it shows here by a criterion that was set before the runs."""

    finding: str
    published: str
    here: str
    criterion: str
    holds: bool

    @property
    def row(self) -> tuple[str, ...]:
        """Of the table of claims."""
        return self.finding, self.published, self.here, self.criterion, "yes" if self.holds else "**no**"


CLAIMS_HEAD = ("finding", "published", "here", "counts as reproduced if", "reproduces")


def parser(description: str, folder: str) -> argparse.ArgumentParser:
    """Return a parser of `quick` and `out`, the options of every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a size that shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder of the results (%(default)s)")
    return parser


def in_processes(run: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> list[Result]:
    """Run `run(job)` for every job; return results in the order of `jobs`, printed as they become known.

    `run` must be importable by name, and its argument and result must pickle. With one process it runs in this one.
    """
    if processes == 1:
        return _told(jobs, map(run, jobs))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return _told(jobs, pool.map(run, jobs))


def _told(jobs: Sequence[Job], results: Iterable[Result]) -> list[Result]:
    begin, done = time.perf_counter(), []
    for job, result in zip(jobs, results, strict=True):
        done.append(result)
        print(f"  {len(done)} of {len(jobs)} after {time.perf_counter() - begin:.0f} s: {job}: {result}", flush=True)
    return done


def plus_minus(values: Sequence[float], digits: int = 4, *, sign: bool = False) -> str:
    """Return the mean and, of several, the standard deviation (with n - 1)."""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def smooth(curves: Sequence[Sequence[float]], over: int = 10) -> list[float]:
    """Return the mean of curves of the same length, averaged over the last few steps."""
    means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    return [statistics.fmean(means[max(0, i + 1 - over) : i + 1]) for i in range(len(means))]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns after the first are right-aligned where all their cells begin like numbers."""
    assert all(len(row) == len(head) for row in rows)

    def numeric(column: int) -> bool:
        return column > 0 and all(row[column][:1] in "0123456789+-–" for row in rows)

    line = "|".join(" ---: " if numeric(i) else " --- " for i in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])


def write(folder: Path, name: str, text: str, numbers: dict[str, Any], figure: Any) -> None:
    """Write `name`.md, `name`.json and `name`.png (a matplotlib figure) to `folder`, each replaced as a whole.

    `numbers` get the processor time of this process and of those that it has ended, in seconds.
    """
    used = os.times()
    spent = used.user + used.system + used.children_user + used.children_system
    folder.mkdir(parents=True, exist_ok=True)

    def png(path: Path) -> None:
        figure.savefig(path, dpi=80, format="png")

    writers: dict[str, Callable[[Path], Any]] = {
        "md": lambda path: path.write_text(text + "\n", encoding="utf-8"),
        "json": lambda path: path.write_text(
            json.dumps({**numbers, "processor_seconds": spent}, indent=1) + "\n", encoding="utf-8"
        ),
        "png": png,
    }
    for ending, put in writers.items():
        unfinished = folder / f".{name}.{ending}.{os.getpid()}"
        put(unfinished)
        unfinished.replace(folder / f"{name}.{ending}")
