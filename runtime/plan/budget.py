"""`mhc-compile plan --budget`: what a budget of parameters buys."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.passes.cost import bytes_text
from mhc_compile.runtime.plan.allocation import BEST_SHARES, ROW_BYTES, Allocation, allocate
from mhc_compile.runtime.plan.arguments import Budget


def show(args: Budget, total: int) -> dict[str, dict[str, Allocation]]:
    """Print how the budget is split; return it by share and kind of memory. Raises `MHCError` as `allocate` does."""
    shares = BEST_SHARES if args.share is None else (args.share,)
    table = Table("", *(f"{share:.0%} memory" for share in shares), title=f"{total:,} sparse parameters")
    allocated = {f"{share:g}": _allocations(args, total, share) for share in shares}
    for cells in zip(*(_rows(total, of_share) for of_share in allocated.values()), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    Console().print(table)
    return allocated


def _allocations(args: Budget, total: int, share: float) -> dict[str, Allocation]:
    """Return what every kind of memory gets of a share of the budget, by its name in the table.

    Raises MHC220 where UltraMem leaves Engram nothing of the share.
    """
    changes = {"layers": args.layers and tuple(range(args.layers)), "row_width": args.row_width}
    engram = MemorySettings.preset(args.engram, **{k: v for k, v in changes.items() if v is not None})
    sizes = {"hidden": args.hidden, "streams": args.streams}
    if args.ultramem is None:
        return {f"Engram `{engram.name}`": allocate(total, engram, share=share, **sizes)}
    layers = {} if args.ultramem_layers is None else {"layers": tuple(range(args.ultramem_layers))}
    ultramem = UltraMemSettings.preset(args.ultramem, **layers)
    part = share / 2 if args.ultramem_share is None else args.ultramem_share
    if part >= share:
        raise MHCError("MHC220", f"{part:.0%} of the budget for UltraMem; less than the memory's {share:.0%}")
    return {
        f"Engram `{engram.name}`": allocate(total, engram, share=share - part, **sizes),
        f"UltraMem `{args.ultramem}`": allocate(total, ultramem, share=part, **sizes),
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
