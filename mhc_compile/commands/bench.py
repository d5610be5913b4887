"""`mhc-compile bench NAME`: measure on this machine what docs/figures.md states."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Name = Literal["boundary", "compile-time", "engram", "native", "passes", "probes", "recompute", "step", "ultramem"]


def bench(
    name: Annotated[Name, Parameter(help="What to measure.")],
    /,
    *,
    quick: Annotated[bool, Parameter(help="Small sizes: check that it runs.")] = False,
    json: Annotated[Path | None, Parameter(help="Write all figures to this file.")] = None,
    png: Annotated[Path | None, Parameter(help="Draw the contenders as bars in this file.")] = None,
) -> int:
    """Measure on this machine what docs/figures.md states.

    * `boundary`: the kernel between two layers against Inductor and others
    * `compile-time`: what conversion adds to the time that a first step takes
    * `engram`, `ultramem`: look-ups in tables, and what they add to a step
    * `native`: models that write their hyper-connections out by hand
    * `passes`: the time of each pass
    * `probes`: what probes add to a step
    * `recompute`: memory and time of recompute blocks
    * `step`: a training step with streams against the residual one
    """
    import json as json_module
    import platform

    import torch
    from rich.console import Console

    from mhc_compile.bench.contest import chart

    console = Console()
    console.print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    if png is not None and name == "passes":
        console.print("passes has no contenders to draw: leave out --png", style="red")
        return 2
    figures = import_module(f"mhc_compile.bench.{name.replace('-', '_')}").run(console, quick=quick)
    if json is not None:
        json.write_text(json_module.dumps({"name": name, "torch": torch.__version__, **figures}, indent=2) + "\n")
    if png is not None:
        chart(png, figures["groups"])
        console.print(f"drawn in {png}")
    return 0
