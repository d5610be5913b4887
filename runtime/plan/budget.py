"""`mhc-compile plan --budget`: what a budget of parameters buys."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings
from mhc_compile.passes.cost import bytes_text
from mhc_compile.runtime.plan.allocation import BEST_SHARES, ROW_BYTES, Allocation, allocate

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_arguments(parser: Any) -> None:
    """Add the arguments of the command `plan` for a budget, in a group of their own."""
    group = parser.add_argument_group("a budget of parameters, without a recipe")
    group.add_argument("--budget", metavar="N", type=_count, help="sparse parameters: experts and memory (26B, 1.5e9)")
    group.add_argument("--engram", choices=sorted(PRESETS), default="paper", help="orders, heads and widths of a row")
    group.add_argument("--hidden", metavar="C", type=int, default=2560, help="hidden size (default: 2560)")
    group.add_argument("--streams", metavar="N", type=int, default=4, help="residual streams (default: 4)")
    group.add_argument("--layers", metavar="N", type=int, help="layers with a memory (default: the preset's)")
    group.add_argument("--row-width", metavar="D", type=int, help="values a row (default: the preset's)")
    group.add_argument("--share", metavar="X", type=float, help="of the budget, for the memory (default: both ends)")


def run(args: argparse.Namespace) -> int:
    """Print how the budget is split. Raises `MHCError` as `allocate` does."""
    changes: dict[str, Any] = {}
    if args.layers is not None:
        changes["layers"] = tuple(range(args.layers))
    if args.row_width is not None:
        changes["row_width"] = args.row_width
    settings = MemorySettings.preset(args.engram, **changes)
    shares = BEST_SHARES if args.share is None else (args.share,)
    allocations = [allocate(args.budget, settings, share=s, hidden=args.hidden, streams=args.streams) for s in shares]
    title = f"{args.budget:,} sparse parameters, {len(settings.layers)} memories as `{settings.name}`"
    table = Table("", *(f"{share:.0%} memory" for share in shares), title=title)
    for cells in zip(*map(_rows, allocations), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    Console().print(table)
    return 0


def _rows(a: Allocation) -> list[tuple[str, str]]:
    return [
        ("parameters of experts", f"{a.experts:,}"),
        ("parameters of tables", f"{a.memory:,}"),
        ("rows per head", f"{a.settings.rows_per_head:,}"),
        ("rows of a table", f"{max(a.rows):,}"),
        ("dense parameters of projections", f"{a.fusion:,}"),
        *((f"bytes of tables, {dtype}", bytes_text(a.table_bytes(dtype))) for dtype in ROW_BYTES),
        ("bytes of rows a token, bfloat16", bytes_text(a.row_traffic("bfloat16"))),
    ]


def _count(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text, re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except ValueError:
        count = 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters (26B, 1.5e9, 300M)")
    return count
