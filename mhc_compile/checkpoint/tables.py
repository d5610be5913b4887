"""The tables of memories beside a converted checkpoint: files of their own, because they outgrow everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from tokenizers import Tokenizer
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.engram.compression import TABLE, Compression
from mhc_compile.engram.files import open_table, row_blocks, write_rows
from mhc_compile.engram.parameters import DEVIATION, ROOT, new_seed
from mhc_compile.kernels.engram.memory import LayerMemory
from mhc_compile.kernels.engram.tables import MemoryTable, Storage, drawn_rows
from mhc_compile.parameters import StreamParameters

TOKENIZER = "tokenizer.json"
TABLES = "engram.*.safetensors"
"""Every file of a table."""


def write_tables(folder: Path, held: Mapping[str, StreamParameters]) -> None:
    """Write every table of the owners into `folder`; those on the meta device at their start, a block at a time."""
    for owner, parameters in held.items():
        for layer in layers_of(parameters):
            table = parameters.table(layer.layer)
            is_meta = table.storage != "mapped" and table.weight.is_meta
            write_rows(
                folder,
                table_name(owner, layer.layer),
                _start(table) if is_meta else row_blocks(table),
                rows=table.rows,
                width=table.width,
                dtype=table.dtype,
                hash_spec=str(layer.hash),
            )


def read_tables(
    folder: Path, owner: str, parameters: StreamParameters, *, storage: Storage = "device", hot_rows: int = 0
) -> None:
    """Put the tables of `folder` into the places of those of `parameters`.

    `mapped` leaves the rows on the disk, the others read them in pieces. Raises MHC204 for an unknown storage, MHC223
    for a table that does not fit the memory, MHC224 for damaged files.
    """
    if storage not in get_args(Storage):
        raise MHCError("MHC204", f"tables={storage!r}; known: {', '.join(get_args(Storage))}")
    for layer in layers_of(parameters):
        place = parameters.get_submodule(f"{ROOT}.{layer.layer}")
        width = parameters.table(layer.layer).width
        name = table_name(owner, layer.layer)
        mapped = open_table(folder, name, rows=layer.rows, width=width, hash_spec=str(layer.hash), hot_rows=hot_rows)
        place.add_module("table", mapped if storage == "mapped" else _in_memory(mapped, storage, hot_rows))


def check_tokenizer(folder: Path, parameters: StreamParameters) -> None:
    """Raise MHC222 where the folder's tokenizer is not the one whose ids the memory was made for."""
    memory = parameters.memory
    if memory is None or memory.compression is None or not (folder / TOKENIZER).is_file():
        return
    table = parameters.get_submodule(ROOT).get_buffer("compression")
    known = int(memory.compression["ids"])
    Compression.from_tensors({TABLE: table[:known].cpu()}, memory.compression).check(read_tokenizer(folder))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer. Raises MHC222 where it has none that can be read."""
    path = folder / TOKENIZER
    if not path.is_file():
        way_out = "save the tokenizer into the folder (tokenizer.save_pretrained), or choose compress=False"
        raise MHCError("MHC222", f"{path} is missing", way_out=way_out)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what its reader raises for broken JSON has no narrower class
        raise MHCError("MHC222", f"{path}: {error}") from error


def layers_of(parameters: StreamParameters) -> tuple[LayerMemory, ...]:
    """The memories of an owner, none where it has none."""
    return () if parameters.memory is None else parameters.memory.layers


def table_name(owner: str, layer: str) -> str:
    """What the files of one table begin with."""
    return re.sub(r"[^\w.-]", "_", ".".join(part for part in ("engram", owner, layer) if part))


def _start(table: MemoryTable) -> Iterator[tuple[Tensor, None]]:
    return ((block, None) for block in drawn_rows(table.rows, table.width, new_seed(), DEVIATION))


def _in_memory(mapped: MemoryTable, storage: Storage, hot_rows: int) -> MemoryTable:
    table = MemoryTable(
        mapped.rows,
        mapped.width,
        dtype=mapped.dtype,
        storage=storage,
        device="cpu",
        hot_rows=hot_rows if storage == "host" else 0,
    )
    first = 0
    for values, scale in row_blocks(mapped):
        table.fill(first, values, scale)
        first += len(values)
    return table
