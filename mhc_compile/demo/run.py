"""The demonstration from its beginning to its end, short or in full."""

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
from mhc_compile.demo.output import OutputFolder
from mhc_compile.demo.report import draw, numbers, reading, samples, table
from mhc_compile.demo.settings import DemoError, Settings
from mhc_compile.demo.short import next_commands, run_short
from mhc_compile.trial.training import threads

_NEEDED = ("transformers", "tokenizers")
_NEEDED_IN_FULL = (*_NEEDED, "matplotlib")


def run(settings: Settings, folder: Path, *, full: bool = False, console: Console | None = None) -> int:
    """Run the demonstration. Returns 0, or 3 where it cannot run here; raises MHC412 for a folder of someone else."""
    begin, used = time.perf_counter(), time.process_time()
    needed = _NEEDED_IN_FULL if full else _NEEDED
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return _refused(f"the demo needs {', '.join(missing)}: pip install 'mhc-compile[demo]'")
    out = OutputFolder(folder)
    results: dict[str, Any] = {"state": "did not finish"}
    console = console or Console()
    try:
        with threads(settings.threads):
            figures = (_run_full if full else run_short)(settings, out, console)
        seconds = time.perf_counter() - begin
        used = time.process_time() - used
        results = {"state": "finished", "seconds": seconds, "processor_seconds": used, **figures}
    except DemoError as error:
        return _refused(str(error))
    finally:
        # Whatever was written so far is on record, so that the next run may replace it.
        out.record(results)
    lines = [f"In {out.path}: {', '.join(out.entries)}. {seconds:.0f} s, {used:.0f} of the processor."]
    if not full:
        lines += ["Next:", *(f"  {command}" for command in next_commands(out))]
    console.print("", *lines, sep="\n", highlight=False, soft_wrap=True)
    return 0


def _run_full(settings: Settings, out: OutputFolder, console: Console) -> dict[str, Any]:
    """Train a model and its converted form from random weights, then a memory; return the measurements."""
    outcome = run_experiment(settings, out, console)
    _write(outcome, out)
    _show(outcome, console)
    memory = run_memory(settings, out, console, outcome)
    (out / "memory.txt").write_text(memory_report.text(memory), encoding="utf-8")
    memory_report.show(memory, console)
    return {**numbers(outcome), "memory": memory_report.numbers(memory)}


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
