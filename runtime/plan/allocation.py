"""Split a budget of parameters between a sparse model and its memory by the published law, and size the tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings, hash_specs, table_rows
from mhc_compile.kernels.memory.ultramem import RANK
from mhc_compile.kernels.memory.ultramem_settings import UltraMem, UltraMemSettings
from mhc_compile.memory.parameters import ultramem_values

BEST_SHARES = (0.20, 0.25)
"""The memory's best share of the sparse budget (arXiv 2601.07372, section 4: validation loss 1.7248 -> 1.7109)."""
ROW_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0 + 4.0 / 32}
"""Bytes a value of a row: float8 has a float32 scale for every 32 channels."""
Settings = MemorySettings | UltraMemSettings


@dataclass(frozen=True)
class Allocation:
    """How a sparse budget (parameters that a token does not all use: experts and tables) is spent."""

    budget: int
    share: float
    experts: int
    """Parameters that remain for experts."""
    settings: Settings
    """With the rows per head, or the values of a layer, that the memory's part pays for."""
    rows: tuple[int, ...]
    """Rows of the tables: of Engram one per layer, of UltraMem one for all layers."""
    width: int
    """Values a row."""
    dense: int
    """Parameters of queries, keys, projections, gains and convolutions, which every token uses."""
    read: int
    """Values of rows that a token reads in all layers."""
    flops: int
    """Multiplications and additions a token, in all layers."""

    @property
    def memory(self) -> int:
        """Parameters in tables."""
        return sum(self.rows) * self.width

    def table_bytes(self, dtype: str) -> int:
        """Return the bytes of all tables with rows of `dtype`."""
        return int(self.memory * ROW_BYTES[dtype])

    def row_traffic(self, dtype: str) -> int:
        """Return the bytes of rows that a token reads in all layers."""
        return int(self.read * ROW_BYTES[dtype])


def allocate(
    budget: int, settings: Settings, *, share: float, hidden: int, streams: int = 1, vocab: int = 1 << 17
) -> Allocation:
    """Spend `share` of `budget` parameters on the memories of `settings.layers`, the rest on experts.

    `streams` and `vocab` are of no matter to UltraMem. Raises MHC220 for a share outside 0 to 1, for a budget that pays
    for no table, and for UltraMem at `"all"` layers, whose number is not known here.
    """
    if not 0 < share < 1:
        raise MHCError("MHC220", f"a share of {share!r} for the memory; between 0 and 1")
    if isinstance(settings, UltraMemSettings):
        return _values(budget, settings, share, hidden)
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
    dense *= layers
    experts = budget - sum(rows) * settings.row_width
    return Allocation(budget, share, experts, sized, rows, settings.row_width, dense, layers * width, 2 * dense)


def _values(budget: int, settings: UltraMemSettings, share: float, hidden: int) -> Allocation:
    """Return the allocation to UltraMem with as many values as the share pays for."""
    if settings.layers == "all":
        detail = 'ultramem: layers="all" of a model that is not known'
        raise MHCError("MHC220", detail, way_out="name them, or --ultramem-layers 12")
    count, width = len(settings.layers), settings.input_width + settings.value_width
    side = math.isqrt(int(budget * share) // (count * width))
    if side < 1:
        detail = f"{share:.0%} of {budget:,} parameters pay for no value; {count * width:,} are the least"
        raise MHCError("MHC220", detail)
    s = replace(settings, side=side)
    memory = UltraMem(settings=s, hidden=hidden, layers=tuple((str(layer), str(layer)) for layer in s.layers))
    with torch.device("meta"):
        dense = sum(p.numel() for p in ultramem_values(memory).values())
    scores = 2 * memory.keys * RANK + s.cores * s.top**2 * RANK  # coarse ones of all keys, fine ones of k x k pairs
    flops = 2 * count * (dense + s.heads * (scores + s.top * width))
    experts = budget - memory.rows * width
    return Allocation(
        budget, share, experts, s, (memory.rows,), width, count * dense, count * s.heads * s.top * width, flops
    )


def _tables(settings: MemorySettings, per_head: int, vocab: int) -> tuple[MemorySettings, tuple[int, ...]]:
    sized = replace(settings, rows_per_head=per_head)
    specs = hash_specs(sized, range(len(settings.layers)), vocab=vocab, fill=0)
    return sized, tuple(table_rows(sized, spec) for spec in specs)
