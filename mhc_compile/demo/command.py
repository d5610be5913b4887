"""`mhc-compile demo`: train, convert, train on, compare."""

from __future__ import annotations

import argparse
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
from mhc_compile.demo.settings import FULL, QUICK, DemoError, settings_for
from mhc_compile.trial.studies import at_least
from mhc_compile.trial.training import LEAST_STEPS, threads

_NEEDED = ("transformers", "tokenizers", "matplotlib")


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="train a small Llama, convert it, and train both forms side by side on real text",
        description="Trains a small residual Llama on the sources of Python's standard library, converts its "
        "checkpoint to 4 streams (the loss does not change), goes on training both on the same batches, and compares "
        "losses, times and streams. Then it adds a memory of n-grams, trains with and without it on equal batches, and "
        "shows what the memory took in. Nothing is downloaded.",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model without Inductor: a minute and a half")
    parser.add_argument(
        "--steps", type=at_least(LEAST_STEPS), metavar="N",
        help=f"optimizer steps before the conversion, and again after it (default {FULL.steps}, quick {QUICK.steps})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("mhc-demo"), metavar="DIR", help="default: ./mhc-demo")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, the batches and the samples")
    parser.add_argument(
        "--seeds", type=at_least(1), metavar="N",
        help=f"repetitions of the training with and without a memory (default {FULL.seeds}, quick {QUICK.seeds})",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration. Returns 0, or 1 where it cannot run here; raises MHC412 for a folder of someone else."""
    begin = time.perf_counter()
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        return _refused(f"the demo needs {', '.join(missing)}: pip install 'mhc-compile[demo]'")
    settings = settings_for(quick=args.quick, steps=args.steps, seed=args.seed, seeds=args.seeds)
    out = OutputFolder(args.out)
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
    return 1
