"""`mhc-compile diff`: two compiled forms of a model side by side."""

from __future__ import annotations

import argparse
from typing import Any

from mhc_compile.diff.comparison import compare
from mhc_compile.diff.form import read_form

COMMAND = "diff"
_DESCRIPTION = """\
Compare two compiled forms of a model: their sites, the nodes of their graphs, the bytes that their kernels move, and
what they compute from the same weights and inputs. A and B are checkpoint folders, config.json files, or reports that
`mhc-compile inspect MODEL --json FILE` wrote, perhaps with another version of this package.
"""
_EXAMPLES = """\
examples:
  mhc-compile diff ./Llama-3.2-1B ./Llama-3.2-1B --b streams=2
  mhc-compile diff ./Llama-3.2-1B ./Llama-3.2-1B --a kernels=all --b kernels=all --b convention=deepseek_v4
  mhc-compile diff before.json ./Llama-3.2-1B

exit codes: 0 no difference, 1 the forms differ, or refused (the message begins with its code)
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        COMMAND,
        help="compare two compiled forms of a model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("a", "b"):
        parser.add_argument(
            name.upper(), type=str, help="a checkpoint folder, a config.json, a Hub repository's id, or a report's JSON"
        )
    for name in ("a", "b"):
        parser.add_argument(
            f"--{name}", metavar="NAME=VALUE", action="append", default=[], dest=f"options_{name}",
            help=f"an option of {name.upper()}, of convert or of the backend: streams=2",
        )  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of random weights and inputs (default 0)")
    parser.add_argument("--no-run", action="store_true", help="compare graphs alone, without weights")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; returns 0 where nothing differs, or 1. Raises `MHCError` as `read_form` does."""
    a, b = (
        read_form(path, options, seed=args.seed, run=not args.no_run)
        for path, options in ((args.A, args.options_a), (args.B, args.options_b))
    )
    comparison = compare(a, b)
    comparison.show()
    return 0 if comparison.same else 1
