"""The trainable parameters of an owner's memories, as modules nested under its stream parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.engram import ROOT as ENGRAM
from mhc_compile.kernels.memory.engram import Memory
from mhc_compile.kernels.memory.memories import Memories
from mhc_compile.kernels.memory.overencoding_settings import ROOT as OVER_ENCODING
from mhc_compile.kernels.memory.overencoding_settings import OverEncoding
from mhc_compile.kernels.memory.ultramem import RANK
from mhc_compile.kernels.memory.ultramem_settings import ROOT as ULTRAMEM
from mhc_compile.kernels.memory.ultramem_settings import UltraMem
from mhc_compile.memory.tables import MemoryTable

Start = Literal["zero", "paper"]
# The scale of released models' embeddings and projections at their start.
DEVIATION = 0.02
CONTENT_RATIO = 4.0
"""The learning rate at the start of training of values that are looked up by content (arXiv 2411.12364)."""


def lookup_values(
    memories: Memories, streams: int, hidden: int, *, start: Start
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return what makes the initial values of the memories' parameters, tables aside, by their module.

    With `start="zero"` nothing is added to the streams, so that the model's function is unchanged.
    """
    values: dict[str, Callable[[], dict[str, Tensor]]] = {}
    if (engram := memories.engram) is not None:
        of_layer = functools.partial(layer_values, engram, streams, hidden, start=start, device=None)
        values |= {f"{ENGRAM}.{layer}": of_layer for layer in engram.paths}
    if (over := memories.over_encoding) is not None:
        values[OVER_ENCODING] = functools.partial(over_encoding_values, over)
    if (ultramem := memories.ultramem) is not None:
        values |= {f"{ULTRAMEM}.{read}": functools.partial(ultramem_values, ultramem) for read, _ in ultramem.layers}
    return values


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


def over_encoding_values(over: OverEncoding) -> dict[str, Tensor]:
    """Return `projection` [C, H * D], which is 0; it gets a gradient because the rows are random."""
    return {"projection": torch.zeros(over.hidden, len(over.hash.moduli) * over.width)}


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
