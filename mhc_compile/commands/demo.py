"""`mhc-compile demo`: a residual model and its converted form trained side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from mhc_compile.commands.arguments import Positive
from mhc_compile.trial.studies import LEAST_STEPS

_STEPS = "Optimizer steps before the conversion, and again after it."
_SEEDS = "Repetitions of the training with and without a memory."


def demo(
    *,
    quick: Annotated[bool, Parameter(help="A smaller model without Inductor: a minute and a half.")] = False,
    steps: Annotated[int | None, Parameter(validator=Number(gte=LEAST_STEPS), help=_STEPS)] = None,
    out: Annotated[Path, Parameter(help="The folder of the results.")] = Path("mhc-demo"),
    seed: Annotated[int, Parameter(help="The seed of the weights, the batches and the samples.")] = 0,
    seeds: Annotated[Positive | None, Parameter(help=_SEEDS)] = None,
) -> int:
    """Train a small Llama, convert it, and train both forms side by side on real text.

    Train a small residual Llama on the sources of Python's standard library, convert its checkpoint to 4 streams (the
    loss does not change), go on training both on the same batches, and compare losses, times and streams. Then add a
    memory of n-grams, train with and without it on equal batches, and show what the memory took in. Nothing is
    downloaded.
    """
    from mhc_compile.demo.run import run
    from mhc_compile.demo.settings import settings_for

    return run(settings_for(quick=quick, steps=steps, seed=seed, seeds=seeds), out)
