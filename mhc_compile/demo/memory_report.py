"""The second part's outcome as tables and numbers."""

from __future__ import annotations

import io
import statistics
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mhc_compile.demo.memory import MemoryOutcome, Opened
from mhc_compile.parameters import owners
from mhc_compile.trial.training import paired, spread

LISTED = 12
"""N-grams a layer that are printed, of those whose gates open most."""
_LEAST = 4
"""And of those whose gates open least."""


def numbers(outcome: MemoryOutcome) -> dict[str, Any]:
    """Return the measurements as plain values."""
    pairs = [(a, b) for r in outcome.repetitions for a, b in zip(*r.before, strict=True)]
    by_name = {"without": outcome.plain, "with": outcome.memory}
    return {
        "relative_change_by_adding": max(abs(b - a) / a for a, b in pairs),
        "seeds": [
            {
                "seed": r.seed,
                "at_start": dict(zip(by_name, map(statistics.fmean, r.before), strict=True)),
                "at_end": dict(zip(by_name, map(statistics.fmean, r.after), strict=True)),
                "difference": r.difference,
            }
            for r in outcome.repetitions
        ],
        "difference": _mean_and_spread(outcome),
        "seconds_per_step": {name: asdict(spread(c.timed)) for name, c in by_name.items()},
        "seconds_ratio": asdict(paired(outcome.plain, outcome.memory)),
        "parameters": {"dense": outcome.dense, "rows": outcome.rows},
        "gates": {layer: [asdict(o) for o in _ends(gates)] for layer, gates in outcome.gates.items()},
        "mapped": {
            "relative_change": outcome.mapped_change,
            "tables": [asdict(c) for c in outcome.caches],
        },
    }


def _mean_and_spread(outcome: MemoryOutcome) -> dict[str, float | None]:
    differences = [r.difference for r in outcome.repetitions]
    return {
        "mean": statistics.fmean(differences),
        "standard_deviation": statistics.stdev(differences) if len(differences) > 1 else None,
        "low": min(differences),
        "high": max(differences),
    }


def show(outcome: MemoryOutcome, console: Console) -> None:
    """Print everything."""
    console.print()
    console.print(_losses(outcome))
    console.print(_reading(outcome), highlight=False)
    for layer, gates in outcome.gates.items():
        console.print()
        console.print(_gates(layer, gates))
    console.print()
    console.print(_caches(outcome), highlight=False)


def text(outcome: MemoryOutcome) -> str:
    """Return what `show` prints as plain text."""
    stream = io.StringIO()
    show(outcome, Console(file=stream, width=120))
    return stream.getvalue()


def _losses(outcome: MemoryOutcome) -> Table:
    steps = len(outcome.memory.losses)
    out = Table(title=f"mHC without and with a memory: held-out loss, {steps} steps", title_justify="left")
    for name in ("seed", "at the start", "without", "with a memory", "difference"):
        out.add_column(name, justify="right")
    for r in outcome.repetitions:
        start, without, with_memory = (statistics.fmean(v) for v in (r.before[1], *r.after))
        out.add_row(str(r.seed), f"{start:.6f}", f"{without:.4f}", f"{with_memory:.4f}", f"{r.difference:+.4f}")
    return out


def _reading(outcome: MemoryOutcome) -> str:
    figures = numbers(outcome)
    delta, ratio, size = figures["difference"], figures["seconds_ratio"], figures["parameters"]
    count = len(outcome.repetitions)
    memories = [m for p in owners(outcome.memory.model).values() if (m := p.memories.engram) is not None]
    read = sum(m.settings.memory_width * len(m.layers) for m in memories)
    way = "lower" if delta["mean"] < 0 else "higher"
    over = f"{count} seeds, standard deviation {delta['standard_deviation']:.4f}" if count > 1 else "one seed"
    return (
        f"What to look at: adding the memory moved the held-out loss {_moved(figures['relative_change_by_adding'])}. "
        f"After training on the same batches it is {abs(delta['mean']):.4f} {way} "
        f"with the memory ({over}), which adds {size['rows']:,} parameters in rows, of which a token reads "
        f"{read:,}, and {size['dense']:,} others. A step with it takes {ratio['median']:.2f} times as long "
        f"({ratio['low']:.2f}-{ratio['high']:.2f})."
    )


def _moved(change: float) -> str:
    return f"of no batch by more than {change:.0e} of it" if change else "of no batch at all"


def _ends(gates: list[Opened]) -> list[Opened]:
    """Return the widest gates and the narrowest."""
    return gates if len(gates) <= LISTED + _LEAST else [*gates[:LISTED], *gates[-_LEAST:]]


def _gates(layer: str, gates: list[Opened]) -> Table:
    out = Table(title=f"What the memory at {layer} takes in, and leaves out", title_justify="left")
    out.add_column("the tokens up to here")
    out.add_column("gate", justify="right")
    out.add_column("times in the held-out text", justify="right")
    rows = _ends(gates)
    for i, o in enumerate(rows):
        last_of_top = i + 1 == LISTED < len(rows)
        out.add_row(Text(repr(o.text)), f"{o.gate:.3f}", str(o.seen), end_section=last_of_top)
    return out


def _caches(outcome: MemoryOutcome) -> str:
    first = (
        f"The same model with its tables left in their files: this moved the held-out loss "
        f"{_moved(outcome.mapped_change)}. One sequence after the other, of the rows that each asks for, the cache of "
        "recently used ones, empty at first, held"
    )
    lines = [f"  {c.hit_rate:.0%} at {c.layer} (at most {c.hot_rows:,} of {c.rows:,})" for c in outcome.caches]
    return "\n".join([first, *lines])
