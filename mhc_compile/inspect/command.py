"""`mhc-compile inspect`: show a Hugging Face model's residual streams from its configuration alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from mhc_compile.checkpoint.configured import configured
from mhc_compile.checkpoint.manifest import NAME
from mhc_compile.diagnostics import MHCError
from mhc_compile.inspect.examine import inspect
from mhc_compile.inspect.writing import write_whole

COMMAND = "inspect"
_DESCRIPTION = """\
Show what mhc-compile sees in a Hugging Face model: its residual streams and sites, what each pass does, or where a
stream is lost. Only config.json is read (and mhc.json of a converted folder): no weights, no code from the folder.
"""
_EXAMPLES = """\
examples:
  mhc-compile inspect ./Llama-3.2-1B
  mhc-compile inspect ./Llama-3.2-1B --layer model.layers.0 --streams 2
  mhc-compile inspect ./config.json --recompute auto --stages 4 --html report.html
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        COMMAND,
        help="show a model's residual streams",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder, or a config.json")
    parser.add_argument("--layer", metavar="PATH", help="show this module's graph before and after: model.layers.0")
    parser.add_argument("--streams", metavar="N", type=int, help="number of streams to convert with (default 4)")
    parser.add_argument("--kernels", action="store_true", help="print the generated code of the fused kernels, too")
    parser.add_argument("--recompute", metavar="BLOCKS", help="show the blocks computed again: auto, stage, 6, 2GiB")
    parser.add_argument("--stages", metavar="N", type=int, help="show the model in this many pipeline stages")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as a page")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as data")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0, or 1 for a model that cannot be converted.

    Raises `MHCError`: MHC508 where there is no model, MHC405 for an architecture that transformers does not have,
    MHC414 for an `mhc.json` that does not fit, MHC304 for `--streams` of a converted folder, MHC509 for a file that
    cannot be written, and what `inspect` raises for a layer, blocks and stages.
    """
    model, converted = configured(args.model)
    options: dict[str, Any] = {} if args.streams is None else {"streams": args.streams}
    if converted and options:
        raise MHCError("MHC304", f"--streams {args.streams}; {args.model / NAME} says how the folder was converted")
    if args.recompute is not None:
        options["recompute"] = int(args.recompute) if args.recompute.isdigit() else args.recompute
    found = inspect(model, layer=args.layer, stages=args.stages, **options)
    console = Console()
    # Source lines are long: in a pipe or a file they are not broken at 80 characters.
    console.print(found) if console.is_terminal else print(found)
    if args.kernels:
        for kernel in found.kernels:
            for direction in ("forward", "backward"):
                print(f"\n===== {kernel.chain.name}, {direction} =====\n{kernel.source(direction)}")
    for file, text in ((args.html, found.html), (args.json, found.json)):
        if file is not None:
            write_whole(file, text())
            print(f"\nwritten to {file}")
    return 1 if found.refusal else 0
