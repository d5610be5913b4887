"""Split a budget of parameters between a sparse model and its memory by the published law, and size the tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings, hash_specs, table_rows

BEST_SHARES = (0.20, 0.25)
"""The memory's best share of the sparse budget (arXiv 2601.07372, section 4: validation loss 1.7248 -> 1.7109)."""
ROW_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0 + 4.0 / 32}
"""Bytes a value of a row: float8 has a float32 scale for every 32 channels."""


@dataclass(frozen=True)
class Allocation:
    """How a sparse budget (parameters that a token does not all use: experts and tables) is spent."""

    budget: int
    share: float
    experts: int
    """Parameters that remain for experts."""
    settings: MemorySettings
    """With the rows per head that the memory's part pays for."""
    rows: tuple[int, ...]
    """Rows of the tables, one per layer."""
    fusion: int
    """Dense parameters of the memories' projections, gains and convolutions, which every token uses."""

    @property
    def memory(self) -> int:
        """Parameters in tables."""
        return sum(self.rows) * self.settings.row_width

    def table_bytes(self, dtype: str) -> int:
        """Return the bytes of all tables with rows of `dtype`."""
        return int(self.memory * ROW_BYTES[dtype])

    def row_traffic(self, dtype: str) -> int:
        """Return the bytes of rows that a token reads in all layers."""
        return int(len(self.rows) * self.settings.memory_width * ROW_BYTES[dtype])


def allocate(
    budget: int, settings: MemorySettings, *, share: float, hidden: int, streams: int, vocab: int = 1 << 17
) -> Allocation:
    """Spend `share` of `budget` parameters on the memories of `settings.layers`, the rest on experts.

    Raises MHC220 for a share outside 0 to 1 and for a budget that pays for no table.
    """
    if not 0 < share < 1:
        raise MHCError("MHC220", f"a share of {share!r} for the memory; between 0 and 1")
    layers = len(settings.layers)
    per_head = int(budget * share) // (layers * settings.hashes * settings.row_width)
    if per_head < 2:
        least = 2 * layers * settings.memory_width
        raise MHCError("MHC220", f"{share:.0%} of {budget:,} parameters pay for no table; {least:,} are the least")
    sized, rows = _tables(settings, per_head, vocab)
    # Every head takes another prime above `per_head`: too much together where tables are small.
    above = sum(rows) * settings.row_width - int(budget * share)
    if above > 0:
        less = max(2, per_head - -(-above // (layers * settings.memory_width)))
        sized, rows = _tables(settings, less, vocab)
    width, n = settings.memory_width, streams
    dense = (n * hidden + hidden) * width + 2 * n * hidden
    if settings.convolution:
        dense += n * hidden * (1 + settings.taps)
    memory = sum(rows) * settings.row_width
    return Allocation(budget, share, budget - memory, sized, rows, layers * dense)


def _tables(settings: MemorySettings, per_head: int, vocab: int) -> tuple[MemorySettings, tuple[int, ...]]:
    sized = replace(settings, rows_per_head=per_head)
    specs = hash_specs(sized, range(len(settings.layers)), vocab=vocab, fill=0)
    return sized, tuple(table_rows(sized, spec) for spec in specs)
