"""What probes cost: a sampled training step against a plain one of the same model, and the mean of 50 steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mhc_compile.bench.contest import Contender, contest, show
from mhc_compile.bench.step import subject, training
from mhc_compile.conversion import convert
from mhc_compile.probes import Probes

EVERY = 50
PLAIN, SAMPLED = "plain step", "sampled step"


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure forward, backward and optimizer with and without sampling; print the table and return all rows."""
    base, ids, shape = subject(quick=quick)
    model = convert(base, streams=4)
    step = training(torch.compile(model, backend="mhc"), ids)
    expected = step()
    contenders = [Contender(PLAIN, step), Contender(SAMPLED, _within(Probes(model, every=1), step))]
    for c in contenders:  # equal bit by bit
        c.check, c.tolerance = lambda loss: float((loss - expected).abs()), 0.0
    rows = contest(console, contenders, ours=PLAIN, device=ids.device, shape=shape, rounds=3 if quick else 9)
    title = f"probes, {shape}"
    groups = {title: show(console, title, rows)}
    plain, sampled = (next(r.median for r in rows if r.name == name) for name in (PLAIN, SAMPLED))
    overhead = ((EVERY - 1) * plain + sampled) / (EVERY * plain) - 1
    console.print(f"sampled every {EVERY} steps, probes add {overhead:+.2%} to the mean step")
    return {"groups": groups, "overhead": overhead, "ratio": sampled / plain}


def _within(probes: Probes, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def sampled() -> Tensor:
        with probes.step():
            return step()

    return sampled
