"""`mhc-compile plan --budget`: what a budget of parameters buys."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings
from mhc_compile.runtime.plan.allocation import BEST_SHARES, ROW_BYTES, Allocation, allocate

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_arguments(parser: Any) -> None:
    """What the command `plan` takes for a budget, in a group of its own."""
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
    found = [allocate(args.budget, settings, share=s, hidden=args.hidden, streams=args.streams) for s in shares]
    Console().print(_table(found))
    return 0


def _table(found: list[Allocation]) -> Table:
    title = f"{found[0].budget:,} sparse parameters, {len(found[0].rows)} memories as `{found[0].settings.name}`"
    table = Table("", *(f"{a.share:.0%} memory" for a in found), title=title)

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    row("parameters of experts", *(f"{a.experts:,}" for a in found))
    row("parameters of tables", *(f"{a.memory:,}" for a in found))
    row("rows per head", *(f"{a.settings.rows_per_head:,}" for a in found))
    row("rows of a table", *(f"{max(a.rows):,}" for a in found))
    row("dense parameters of projections", *(f"{a.fusion:,}" for a in found))
    for dtype in ROW_BYTES:
        row(f"bytes of tables, {dtype}", *(bytes_text(a.table_bytes(dtype)) for a in found))
    row("bytes of rows a token, bfloat16", *(bytes_text(a.row_traffic("bfloat16")) for a in found))
    return table


def bytes_text(count: int) -> str:
    """A size for a reader."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.4g} {units[power]}"


def _count(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text, re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except ValueError:
        count = 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters (26B, 1.5e9, 300M)")
    return count
