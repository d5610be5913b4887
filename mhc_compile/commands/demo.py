"""`mhc-compile demo`: convert a trained model, train both forms side by side, look inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from mhc_compile.commands.arguments import Positive
from mhc_compile.trial.studies import LEAST_STEPS

_FULL = "Train from random weights, then with a memory: about seven minutes."
_STEPS = "Optimizer steps after the conversion; with --full before it, too."
_SEEDS = "With --full: repetitions of the training with and without a memory."


def demo(
    *,
    full: Annotated[bool, Parameter(help=_FULL)] = False,
    steps: Annotated[int | None, Parameter(validator=Number(gte=LEAST_STEPS), help=_STEPS)] = None,
    out: Annotated[Path, Parameter(help="The folder of the results.")] = Path("mhc-demo"),
    seed: Annotated[int, Parameter(help="The seed of the batches; with --full of the weights and samples, too.")] = 0,
    seeds: Annotated[Positive | None, Parameter(help=_SEEDS)] = None,
) -> int:
    """Convert a small trained model, watch its streams, train on, and look inside: under two minutes.

    A Llama of half a million parameters ships with the package. Convert it to 4 streams: it writes the same text. Train
    it on beside the residual model and beside streams that any matrix mixes, and watch how much each amplifies. Write
    a report of the converted model. Nothing is downloaded.

    With --full, train a residual model on the sources of Python's standard library first, convert it, train both on,
    then add a memory of n-grams and train with and without it.
    """
    from mhc_compile.demo.run import run
    from mhc_compile.demo.settings import settings_for

    return run(settings_for(full=full, steps=steps, seed=seed, seeds=seeds), out, full=full)
