"""The trainable parameters of an owner's memories, as modules nested under its stream parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.memories import Memory
from mhc_compile.kernels.memory.ultramem import RANK
from mhc_compile.kernels.memory.ultramem_settings import UltraMem
from mhc_compile.memory.tables import MemoryTable

Start = Literal["zero", "paper"]
# The scale of released models' embeddings and projections at their start.
DEVIATION = 0.02
CONTENT_RATIO = 4.0
"""The learning rate at the start of training of values that are looked up by content (arXiv 2411.12364)."""
ROOT = "engram"
"""The name under which memories lie in `StreamParameters`."""


def layer_values(
    memory: Memory, streams: int, hidden: int, *, start: Start, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Return the parameters of one layer by name, float32, at their start (arXiv 2601.07372, section 3).

    `key` [n*C, d_mem] and `value` [C, d_mem] are W_K and W_V, the gains [n, C], `conv` [n, C, taps]. With
    `start="zero"` W_V is 0, so that the model's function is unchanged; the convolution is 0 in both.
    """
    if start not in get_args(Start):
        raise MHCError("MHC220", f"start={start!r}; known: {', '.join(get_args(Start))}")
    settings, width = memory.settings, memory.settings.memory_width
    gain = torch.full((streams, hidden), 1.0 - settings.gain_offset, device=device)
    values = {
        "key": DEVIATION * torch.randn(streams * hidden, width, device=device),
        "value": (0.0 if start == "zero" else DEVIATION) * torch.randn(hidden, width, device=device),
        "query_gain": gain,
        "key_gain": gain.clone(),
    }
    if memory.fusion.dilation:
        values["conv_gain"] = gain.clone()
        values["conv"] = torch.zeros(streams, hidden, memory.fusion.taps, device=device)
    return values


def ultramem_values(memory: UltraMem) -> dict[str, Tensor]:
    """Return the parameters of one layer that reads by name, float32, at their start (arXiv 2411.12364).

    `query` [2K, C], `keys` [h, 2, n, K, 2], gains [K], `cores` [c, h, 2, 2], for values with an input `input` [I, C],
    and `projection` [C, E*V]: W_o, which is 0, so that the model's function is unchanged.
    """
    s, C = memory.settings, memory.hidden
    gain = torch.full((s.key_width,), s.key_width**-s.gain_power)
    values = {
        "query": torch.randn(2 * s.key_width, C) / s.key_width**0.5,
        "query_gain": gain,
        "keys": torch.randn(s.heads, 2, memory.keys, s.key_width, RANK) / s.key_width**0.5,
        "key_gain": gain.clone(),
        "cores": torch.rand(s.cores, s.heads, RANK, RANK),
        "projection": torch.zeros(C, s.expansion * s.value_width),
    }
    return values | ({"input": torch.randn(s.input_width, C) / C**0.5} if s.input_width else {})


def new_table(rows: int, width: int, device: torch.device | str | None) -> MemoryTable:
    """Return a float32 table with its rows at their start; on the meta device without values.

    Raises MHC223 where memory is not sufficient.
    """
    try:
        table = MemoryTable(rows, width, device=device)
    except (RuntimeError, MemoryError) as error:
        detail = f"{rows:,} rows of {width} float32 are {rows * width / 2**28:.1f} GiB, more than can be allocated"
        way_out = "choose fewer rows_per_head, or convert a folder, which writes tables to the disk piece by piece"
        raise MHCError("MHC223", detail, way_out=way_out) from error
    return table if table.weight.is_meta else table.start(new_seed(), DEVIATION)


def new_seed() -> int:
    """Draw the seed of a table's start from torch's default generator."""
    return int(torch.randint(2**31, ()))


def tables(parameters: nn.Module) -> Iterator[tuple[str, MemoryTable]]:
    """Yield the tables below a module with their names relative to it."""
    return ((name, m) for name, m in parameters.named_modules() if isinstance(m, MemoryTable))
