"""`mhc-compile bench NAME`."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mhc_compile.bench import (
    boundary,
    compile_time,
    engram,
    gpu,
    native,
    passes,
    probes,
    recompute,
    static,
    step,
    ultramem,
)
from mhc_compile.bench.contest import chart

BENCHMARKS = {
    "boundary": boundary,
    "compile-time": compile_time,
    "engram": engram,
    "gpu": gpu,
    "native": native,
    "passes": passes,
    "probes": probes,
    "recompute": recompute,
    "static": static,
    "step": step,
    "ultramem": ultramem,
}


def add_parser(subparsers: Any) -> None:
    """Add `bench` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure on this machine what docs/figures.md states",
        description="\n".join(
            f"{name}: {(module.__doc__ or '').partition(chr(10))[0]}" for name, module in BENCHMARKS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--quick", "--small", action="store_true", help="small sizes: checks that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the contenders as bars in FILE")
    only = parser.add_argument_group("gpu")
    only.add_argument("--minutes", type=float, metavar="N", help="how long gpu may take (8)")
    only.add_argument("--out", type=Path, metavar="DIR", help="where gpu writes each part as it ends (bench_gpu)")
    only.add_argument("--device", choices=("cuda", "cpu"), help="where gpu runs (cuda); cpu: to see that it runs")


def run(args: argparse.Namespace) -> int:
    """Run one benchmark."""
    console = Console()
    console.print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    if args.png is not None and args.name in ("gpu", "passes", "static"):
        console.print(f"{args.name} has no contenders to draw: leave out --png", style="red")
        return 2
    given = {name: value for name in ("minutes", "out", "device") if (value := getattr(args, name)) is not None}
    if given and args.name != "gpu":
        console.print(f"{args.name} knows no {', '.join(f'--{name}' for name in given)}: they are of gpu", style="red")
        return 2
    figures = BENCHMARKS[args.name].run(console, quick=args.quick, **given)
    if args.json is not None:
        args.json.write_text(json.dumps({"name": args.name, "torch": torch.__version__, **figures}, indent=2) + "\n")
    if args.png is not None:
        chart(args.png, figures["groups"])
        console.print(f"drawn in {args.png}")
    return 0
