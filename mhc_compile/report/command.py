"""`mhc-compile inspect`: show a Hugging Face model's residual streams from its configuration alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mhc_compile.atomic_write import write_whole
from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.checkpoint.manifest import NAME
from mhc_compile.configured import configured, refuse_stream_options, weighted
from mhc_compile.diagnostics import MHCError
from mhc_compile.diff.outputs import outputs_of
from mhc_compile.exporting.mlir import Dialect
from mhc_compile.report.examine import inspect
from mhc_compile.report.mlir import mlir_of

COMMAND = "inspect"
_DESCRIPTION = """\
Show what mhc-compile sees in a Hugging Face model: its residual streams and sites, what each pass does, or where a
stream is lost. Only config.json is read (and mhc.json of a converted folder): no weights, no code from the folder.
"""
_EXAMPLES = """\
examples:
  mhc-compile inspect ./Llama-3.2-1B
  mhc-compile inspect ./Llama-3.2-1B --layer model.layers.0 --streams 2
  mhc-compile inspect ./Llama-3.2-1B --passes "normalize,residual,widen,fuse{kinds=boundary},lower"
  mhc-compile inspect ./config.json --recompute auto --stages 4 --html report.html
  mhc-compile inspect ./Llama-3.2-1B --mlir linalg --out llama.mlir
"""

_OF_THE_REPORT = ("layer", "passes", "kernels", "recompute", "stages", "html", "json", "outputs")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        COMMAND,
        help="show a model's residual streams",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=str, help="a checkpoint folder, a config.json, or the id of a Hub repository"
    )
    parser.add_argument("--layer", metavar="PATH", help="show this module's graph before and after: model.layers.0")
    parser.add_argument("--streams", metavar="N", type=int, help="number of streams to convert with (default 4)")
    parser.add_argument("--passes", metavar="TEXT", help="the passes to show in place of the usual: docs/options.md")
    parser.add_argument("--kernels", action="store_true", help="print the generated code of the fused kernels, too")
    parser.add_argument("--recompute", metavar="BLOCKS", help="show the recompute blocks: auto, stage, 6, 2GiB")
    parser.add_argument("--stages", metavar="N", type=int, help="show the model in this many pipeline stages")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as a page")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as data")
    parser.add_argument(
        "--outputs", action="store_true", help="with --json: also run the model, on its weights, for diff to compare"
    )
    parser.add_argument(
        "--mlir", choices=get_args(Dialect), help="print the converted model in MLIR, in place of the report"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the MLIR to a file")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0, or 1 for a model that cannot be converted.

    Raises `MHCError`: MHC508 where there is no model, MHC405 for an architecture that transformers does not have,
    MHC414 for an `mhc.json` that does not fit, MHC304 for `--streams` of a converted folder, MHC509 for a file that
    cannot be written, MHC520 for options that do not go together, and what `inspect` raises for a layer, blocks and
    stages, `convert`, `export` and `to_mlir` for a model in MLIR.
    """
    if args.outputs and args.json is None:
        raise MHCError("MHC520", "--outputs go into the file that --json names")
    if args.mlir is not None or args.out is not None:
        return _mlir(args)
    args.model = local_folder(args.model, weights=args.outputs)
    model, converted = configured(args.model)
    options = _stream_options(args, converted=converted)
    if args.recompute is not None:
        options["recompute"] = int(args.recompute) if args.recompute.isdigit() else args.recompute
    if args.passes is not None:
        options["pipeline"] = args.passes
    report = inspect(model, layer=args.layer, stages=args.stages, **options)
    report.show()
    if args.kernels:
        for kernel in report.kernels:
            for direction, source in (("forward", kernel.forward), ("backward", kernel.backward)):
                if source is not None:
                    print(f"\n===== {kernel.name}, {direction} =====\n{source}")
    if args.outputs:
        report = replace(report, outputs=outputs_of(weighted(args.model)[0], 0, **options))
    for file, text in ((args.html, report.html), (args.json, report.json)):
        if file is not None:
            write_whole(file, text())
            print(f"\nwritten to {file}")
    return 1 if report.refusal else 0


def _stream_options(args: argparse.Namespace, *, converted: bool) -> dict[str, Any]:
    """Return the stream options of an unconverted model. Raises MHC304 for a converted one."""
    options: dict[str, Any] = {} if args.streams is None else {"streams": args.streams}
    if converted:
        refuse_stream_options(args.model, options)
    return options


def _mlir(args: argparse.Namespace) -> int:
    """Print the model in MLIR, or write it to `--out`."""
    if args.mlir is None:
        raise MHCError("MHC520", "--out is for --mlir; --html and --json name the report's files")
    if others := [name for name in _OF_THE_REPORT if getattr(args, name) not in (None, False)]:
        raise MHCError("MHC520", f"--mlir and --{others[0]}")
    args.model = local_folder(args.model, weights=False)
    text = mlir_of(args.model, args.mlir, **_stream_options(args, converted=(args.model / NAME).is_file()))
    if args.out is None:
        print(text)
    else:
        write_whole(args.out, text)
        print(f"written to {args.out}")
    return 0
