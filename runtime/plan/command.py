"""`mhc-compile plan`: what a recipe's training run will take, or what a budget of parameters buys."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.arguments import add_recipe_arguments
from mhc_compile.runtime.plan import budget

NAME = "plan"
_DESCRIPTION = """\
Plan a training run from its recipe and its model's config.json alone: what every rank holds,
recompute blocks, and under every pipeline schedule the time of a step, its bubbles and what the
streams send between stages, by simulation. No weights are needed, and no GPU. Times follow from
peak rates: they are bounds, and their ratios are what to compare.

With --measure, small models: times are measured on this machine, the schedules are simulated with
them and then run for real on as many local processes.

With --budget, and no recipe: split sparse parameters between experts and an n-gram memory (Engram)
by the published law, 20 to 25 % for the memory (arXiv 2601.07372); with --ultramem between those
and values that are looked up by content (arXiv 2411.12364).
"""
_EXAMPLES = """\
examples:
  mhc-compile plan examples/recipes/671b.toml
  mhc-compile plan recipe.toml parallel.stages=8 recompute.blocks=auto --hardware h200 --json plan.json
  mhc-compile plan recipe.toml --flops 989e12 --bandwidth 3.35e12 --link 450e9 --network 50e9 --memory 80e9
  mhc-compile plan recipe.toml --measure
  mhc-compile plan --budget 26B --engram paper --hidden 2560
  mhc-compile plan --budget 1.5B --engram v41 --hidden 1024 --layers 2 --share 0.2
  mhc-compile plan --budget 26B --hidden 2560 --ultramem v2 --ultramem-layers 12
"""


def add_parser(subparsers: Any) -> None:
    """Register the command with argparse."""
    parser = subparsers.add_parser(
        NAME,
        help="what a recipe takes: memory, time, traffic; or split a parameter budget",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser)
    parser.add_argument("--hardware", metavar="NAME", help="of every rank: a100, h100, ... (default: b200)")
    parser.add_argument("--flops", metavar="F", type=float, help="operations a second, instead of the hardware's")
    parser.add_argument("--bandwidth", metavar="B", type=float, help="of its memory, bytes a second")
    parser.add_argument("--link", metavar="L", type=float, help="to a rank of the same node, bytes a second each way")
    parser.add_argument("--network", metavar="L", type=float, help="to a rank of another node")
    parser.add_argument("--node", metavar="N", type=int, help="ranks a node (default: 8)")
    parser.add_argument("--memory", metavar="M", type=float, help="bytes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that is printed, and more, as JSON")
    parser.add_argument("--measure", action="store_true", help="measure on this machine instead, and compare")
    budget.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan. Raises what `read_recipe`, `count` and `compare` raise, and MHC641 where it does not fit."""
    if (args.recipe is None) == (args.budget is None):
        raise MHCError("MHC600", "name either a recipe or --budget")
    if args.budget is not None:
        return budget.run(args)
    # Here, because every command is registered when any of them runs.
    from mhc_compile.runtime.plan.hardware import hardware
    from mhc_compile.runtime.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.overrides)
    if args.measure:
        from mhc_compile.runtime.measure_step import measure, show_measured

        measured = measure(recipe)
        show_measured(measured, Console())
        _write(args.json, measured)
        return 0
    from mhc_compile.runtime.plan.compare import compare, does_not_fit
    from mhc_compile.runtime.plan.model import count
    from mhc_compile.runtime.plan.report import plain, show

    rates = {name: getattr(args, name) for name in ("flops", "bandwidth", "link", "memory")}
    named = args.hardware or (None if None not in rates.values() else "b200")
    device = hardware(named, **rates, network=args.network, node=args.node)
    console = Console()
    with console.status("capturing the model"):
        counted = count(recipe)
    with console.status("simulating schedules"):
        gc.disable()  # millions of tuples without cycles: looking for some takes a third of the time
        try:
            compared = compare(recipe, counted, device)
        finally:
            gc.enable()
    show(compared, console)
    _write(args.json, plain(compared))
    if not compared.fits:
        raise does_not_fit(compared)
    return 0


def _write(path: Path | None, content: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
