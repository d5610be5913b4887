"""`mhc-compile bench NAME`: measure on this machine what docs/figures.md states."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mhc_compile.output import PLAIN, Output

Name = Literal[
    "boundary", "compile-time", "decode", "engram", "gpu", "native", "passes", "probes", "recompute", "static", "step",
    "ultramem",
]  # fmt: skip


def bench(
    name: Annotated[Name, Parameter(help="What to measure.")],
    /,
    *,
    quick: Annotated[bool, Parameter(name=("--quick", "--small"), help="Small sizes: check that it runs.")] = False,
    png: Annotated[Path | None, Parameter(help="Draw the contenders as bars in this file.")] = None,
    minutes: Annotated[float | None, Parameter(help="How long gpu may take; default 8.")] = None,
    out: Annotated[Path | None, Parameter(help="Where gpu writes each part as it ends; default bench_gpu.")] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None, Parameter(help="Where gpu runs; cpu: to see that it runs.")
    ] = None,
    output: Output = PLAIN,
) -> int:
    """Measure on this machine what docs/figures.md states.

    * `boundary`: the kernel between two layers against Inductor and others
    * `compile-time`: what conversion adds to the time that a first step takes
    * `decode`: the first token and those after it, with streams and without
    * `engram`, `ultramem`: look-ups in tables, and what they add to a step
    * `gpu`: everything worth knowing of a GPU, in minutes
    * `native`: models that write their hyper-connections out by hand
    * `passes`: the time of each pass
    * `probes`: what probes add to a step
    * `recompute`: memory and time of recompute blocks
    * `static`: what bounds each Triton kernel, by its machine code
    * `step`: a training step with streams against the residual one
    """
    import platform

    import torch
    from rich.console import Console

    from mhc_compile.bench.contest import chart

    console = Console()
    machine = platform.processor() or platform.machine()
    with output.printing():
        console.print(f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} threads")
    if png is not None and name in ("decode", "gpu", "passes", "static"):
        console.print(f"{name} has no contenders to draw: leave out --png", style="red")
        return 2
    of_gpu = {"minutes": minutes, "out": out, "device": device}
    of_gpu = {flag: value for flag, value in of_gpu.items() if value is not None}
    if of_gpu and name != "gpu":
        console.print(f"{name} knows no {', '.join(f'--{flag}' for flag in of_gpu)}: they are of gpu", style="red")
        return 2
    with output.printing():
        figures = import_module(f"mhc_compile.bench.{name.replace('-', '_')}").run(console, quick=quick, **of_gpu)
    output.write({"name": name, "torch": torch.__version__, **figures})
    if png is not None:
        chart(png, figures["groups"])
        console.print(f"drawn in {png}")
    return 0
