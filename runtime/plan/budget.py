"""`mhc-compile plan --budget`: what a budget of parameters buys."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import PRESETS as VERSIONS
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.passes.cost import bytes_text
from mhc_compile.runtime.plan.allocation import BEST_SHARES, ROW_BYTES, Allocation, allocate

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_arguments(parser: Any) -> None:
    """Add the arguments of the command `plan` for a budget, in a group of their own."""
    group = parser.add_argument_group("a budget of parameters, without a recipe")
    group.add_argument("--budget", metavar="N", type=_count, help="sparse parameters: experts and memory (26B, 1.5e9)")
    group.add_argument("--engram", choices=sorted(PRESETS), default="paper", help="orders, heads and widths of a row")
    group.add_argument("--ultramem", choices=sorted(VERSIONS), help="add UltraMem, which shares the memory's part")
    group.add_argument("--hidden", metavar="C", type=int, default=2560, help="hidden size (default: 2560)")
    group.add_argument("--streams", metavar="N", type=int, default=4, help="residual streams (default: 4)")
    group.add_argument("--layers", metavar="N", type=int, help="layers with an Engram (default: the preset's)")
    group.add_argument("--row-width", metavar="D", type=int, help="values a row of Engram (default: the preset's)")
    group.add_argument("--share", metavar="X", type=float, help="of the budget, for the memory (default: both ends)")
    group.add_argument("--ultramem-layers", metavar="N", type=int, help="layers that read (default: the version's)")
    group.add_argument("--ultramem-share", metavar="X", type=float, help="of the budget, for UltraMem (default: half)")


def run(args: argparse.Namespace) -> int:
    """Print how the budget is split. Raises `MHCError` as `allocate` does."""
    shares = BEST_SHARES if args.share is None else (args.share,)
    table = Table("", *(f"{share:.0%} memory" for share in shares), title=f"{args.budget:,} sparse parameters")
    for cells in zip(*(_rows(args.budget, _allocations(args, share)) for share in shares), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    Console().print(table)
    return 0


def _allocations(args: argparse.Namespace, share: float) -> dict[str, Allocation]:
    """Return what every kind of memory gets of a share of the budget, by its name in the table.

    Raises MHC220 where UltraMem leaves Engram nothing of the share.
    """
    changes = {"layers": args.layers and tuple(range(args.layers)), "row_width": args.row_width}
    engram = MemorySettings.preset(args.engram, **{k: v for k, v in changes.items() if v is not None})
    sizes = {"hidden": args.hidden, "streams": args.streams}
    if args.ultramem is None:
        return {f"Engram `{engram.name}`": allocate(args.budget, engram, share=share, **sizes)}
    layers = {} if args.ultramem_layers is None else {"layers": tuple(range(args.ultramem_layers))}
    ultramem = UltraMemSettings.preset(args.ultramem, **layers)
    part = share / 2 if args.ultramem_share is None else args.ultramem_share
    if part >= share:
        raise MHCError("MHC220", f"{part:.0%} of the budget for UltraMem; less than the memory's {share:.0%}")
    return {
        f"Engram `{engram.name}`": allocate(args.budget, engram, share=share - part, **sizes),
        f"UltraMem `{args.ultramem}`": allocate(args.budget, ultramem, share=part, **sizes),
    }


def _rows(budget: int, allocations: dict[str, Allocation]) -> list[tuple[str, str]]:
    rows = [("parameters of experts", f"{budget - sum(a.memory for a in allocations.values()):,}")]
    for name, a in allocations.items():
        s = a.settings
        rows += [
            (name, ""),
            ("parameters of tables", f"{a.memory:,}"),
            ("rows per head", f"{s.rows_per_head:,}")
            if isinstance(s, MemorySettings)
            else ("values a layer", f"{s.side**2:,}"),
            ("rows of a table", f"{max(a.rows):,}"),
            ("parameters that all tokens use", f"{a.dense:,}"),
            ("operations a token", f"{a.flops:,}"),
            *((f"bytes of tables, {dtype}", bytes_text(a.table_bytes(dtype))) for dtype in ROW_BYTES),
            ("bytes of rows a token, bfloat16", bytes_text(a.row_traffic("bfloat16"))),
        ]
    return rows


def _count(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text, re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except ValueError:
        count = 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters (26B, 1.5e9, 300M)")
    return count
