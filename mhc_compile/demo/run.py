"""The demonstration from its beginning to its end: train, convert, train on, compare."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from mhc_compile.demo import memory_report
from mhc_compile.demo.experiment import Outcome, run_experiment
from mhc_compile.demo.memory import run_memory
from mhc_compile.demo.output import ENTRIES, OutputFolder
from mhc_compile.demo.report import draw, numbers, reading, samples, table
from mhc_compile.demo.settings import DemoError, Settings
from mhc_compile.trial.training import threads

_NEEDED = ("transformers", "tokenizers", "matplotlib")


def run(settings: Settings, folder: Path) -> int:
    """Run the demonstration. Returns 0, or 3 where it cannot run here; raises MHC412 for a folder of someone else."""
    begin = time.perf_counter()
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        return _refused(f"the demo needs {', '.join(missing)}: pip install 'mhc-compile[demo]'")
    out = OutputFolder(folder)
    results: dict[str, Any] = {"state": "did not finish"}
    try:
        console = Console()
        with threads(settings.threads):
            outcome = run_experiment(settings, out, console)
            _write(outcome, out)
            _show(outcome, console)
            memory = run_memory(settings, out, console, outcome)
        shown = memory_report.text(memory)
        (out / "memory.txt").write_text(shown, encoding="utf-8")
        seconds = time.perf_counter() - begin
        figures = {**numbers(outcome), "memory": memory_report.numbers(memory)}
        results = {"state": "finished", "seconds": seconds, **figures}
    except DemoError as error:
        return _refused(str(error))
    finally:
        # Whatever was written so far is on record, so that the next run may replace it.
        out.record(results)
    memory_report.show(memory, console)
    console.print()
    console.print(f"In {out.path}: {', '.join(ENTRIES)}. {seconds:.0f} s in all.", highlight=False)
    return 0


def _write(outcome: Outcome, out: OutputFolder) -> None:
    (out / "samples.txt").write_text(samples(outcome) + "\n", encoding="utf-8")
    (out / "inspection.txt").write_text(outcome.inspection + "\n", encoding="utf-8")
    draw(outcome, out / "curves.png")


def _show(outcome: Outcome, console: Console) -> None:
    console.print()
    console.print(table(outcome))
    console.print(reading(outcome), highlight=False)
    console.print()
    console.print(samples(outcome), markup=False, highlight=False)
    console.print()


def _refused(reason: str) -> int:
    print(f"mhc-compile demo: {reason}", file=sys.stderr)
    return 3
