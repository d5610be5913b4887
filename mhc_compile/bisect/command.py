"""`mhc-compile bisect`: find the pass and the site at which a model's results leave the tolerance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mhc_compile.bisect.find import bisect
from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.config import parse_options
from mhc_compile.configured import refuse_stream_options, weighted
from mhc_compile.conversion.example_inputs import seeded_inputs

COMMAND = "bisect"
_DESCRIPTION = """\
Run a Hugging Face model on one batch through every pass, every generated kernel and the inner compiler, and find the
first of them, and the first site, at which results leave the tolerance. Weights are those of the folder, or random ones
where it has none; nothing in it is executed.
"""
_EXAMPLES = """\
examples:
  mhc-compile bisect ./Llama-3.2-1B
  mhc-compile bisect ./Llama-3.2-1B --option streams=2 --option inner=eager
  mhc-compile bisect ./config.json --seed 3 --reproducer wrong.py

exit codes: 0 no difference found, 1 something is wrong, or refused (the message begins with its code)
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        COMMAND,
        help="find the pass and the site at which results go wrong",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=str, help="a checkpoint folder, a config.json, or the id of a Hub repository"
    )
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="as of convert and of the backend: streams=2",
    )
    parser.add_argument("--passes", metavar="TEXT", help="the passes to search in place of the usual: docs/options.md")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of random weights and token ids (default 0)")
    parser.add_argument("--reproducer", metavar="FILE", type=Path, help="write a Python file that shows what is wrong")


def run(args: argparse.Namespace) -> int:
    """Print what was found; returns 0 where nothing is wrong, or 1.

    Raises `MHCError` as `weighted` and `bisect` do; MHC304 for streams of a converted folder, MHC526 where the
    reproducer cannot be written.
    """
    options = parse_options(args.option)
    if args.passes is not None:
        options["pipeline"] = args.passes
    folder = local_folder(args.model)
    model, converted, _ = weighted(folder, seed=args.seed)
    if converted:
        refuse_stream_options(folder, options)
    bisection = bisect(model, example_kwargs=seeded_inputs(model, args.seed), reproducer=args.reproducer, **options)
    bisection.show()
    return 1 if bisection.finding else 0
