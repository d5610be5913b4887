"""`mhc-compile plan`: what a recipe's training run will take, or what a budget of parameters buys."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mhc_compile.diagnostics import MHCError
from mhc_compile.output import PLAIN, Output
from mhc_compile.runtime.plan.arguments import Budget


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Rates:
    """The hardware of every rank, by name or in numbers."""

    hardware: str | None = None
    """The GPU of every rank: a100, h100, ...; default b200."""
    flops: float | None = None
    """Operations per second, instead of the hardware's."""
    bandwidth: float | None = None
    """The memory bandwidth, bytes per second."""
    link: float | None = None
    """The bandwidth to a rank of the same node, bytes per second each way."""
    network: float | None = None
    """The bandwidth to a rank of another node, bytes per second each way."""
    node: int | None = None
    """Ranks per node; default 8."""
    memory: float | None = None
    """The memory of a rank, bytes."""


_DEFAULT = Rates()
_NO_BUDGET = Budget()


def plan(
    recipe: Annotated[Path | None, Parameter(help="A TOML file.")] = None,
    /,
    *overrides: Annotated[str, Parameter(name="SECTION.FIELD=VALUE", help="Fields that differ from the recipe's.")],
    rates: Rates = _DEFAULT,
    measure: Annotated[bool, Parameter(help="Measure on this machine instead, and compare.")] = False,
    budget: Budget = _NO_BUDGET,
    output: Output = PLAIN,
) -> int:
    """Say what a recipe takes: memory, time, traffic; or split a parameter budget.

    Plan a training run from its recipe and its model's config.json alone: what every rank holds, recompute blocks, and
    under every pipeline schedule the time of a step, its bubbles and what the streams send between stages, by
    simulation. No weights are needed, and no GPU. Times follow from peak rates: they are bounds, and their ratios are
    what to compare.

    With `--measure`, small models: times are measured on this machine, the schedules are simulated with them and then
    run for real on as many local processes.

    With `--budget`, and no recipe: split sparse parameters between experts and an n-gram memory (Engram) by the
    published law, 20 to 25 % for the memory (arXiv 2601.07372); with `--ultramem` between those and values that are
    looked up by content (arXiv 2411.12364).

    ```sh
    mhc-compile plan examples/recipes/671b.toml
    mhc-compile plan recipe.toml parallel.stages=8 recompute.blocks=auto --hardware h200 --json plan.json
    mhc-compile plan recipe.toml --flops 989e12 --bandwidth 3.35e12 --link 450e9 --network 50e9 --memory 80e9
    mhc-compile plan recipe.toml --measure
    mhc-compile plan --budget 26B --engram paper --hidden 2560
    mhc-compile plan --budget 1.5B --engram v41 --hidden 1024 --layers 2 --share 0.2
    mhc-compile plan --budget 26B --hidden 2560 --ultramem v2 --ultramem-layers 12
    ```
    """
    if (recipe is None) == (budget.budget is None):
        raise MHCError("MHC600", "name either a recipe or --budget")
    if recipe is not None:
        _plan(recipe, overrides, rates, output, measured=measure)
    elif budget.budget is not None:
        from mhc_compile.runtime.plan.budget import show

        with output.printing():
            allocated = show(budget, budget.budget)
        output.write(allocated)
    return 0


def _plan(path: Path, overrides: Sequence[str], rates: Rates, output: Output, *, measured: bool) -> None:
    """Print the plan. Raises what `read_recipe`, `count` and `compare` raise, and MHC641 where it does not fit."""
    from rich.console import Console

    from mhc_compile.runtime.plan.hardware import hardware
    from mhc_compile.runtime.recipe import read_recipe

    recipe = read_recipe(path, overrides)
    if measured:
        from mhc_compile.runtime.measure_step import measure, show_measured

        figures = measure(recipe)
        with output.printing():
            show_measured(figures, Console())
        output.write(figures)
        return
    from mhc_compile.runtime.plan.compare import compare, does_not_fit
    from mhc_compile.runtime.plan.model import count
    from mhc_compile.runtime.plan.report import plain, show

    numbers = {name: getattr(rates, name) for name in ("flops", "bandwidth", "link", "memory")}
    named = rates.hardware or (None if None not in numbers.values() else "b200")
    device = hardware(named, **numbers, network=rates.network, node=rates.node)
    console = Console()
    with output.printing():
        gc.disable()  # millions of objects with few cycles: looking for some takes a tenth of the time
        try:
            with console.status("capturing the model"):
                counted = count(recipe)
            with console.status("simulating schedules"):
                compared = compare(recipe, counted, device)
        finally:
            gc.enable()
        show(compared, console)
    output.write(plain(compared))
    if not compared.fits:
        raise does_not_fit(compared)
