"""Tables of a converted checkpoint, which have files of their own because they outgrow everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from mhc_compile.checkpoint.table_files import Piece, open_table, row_blocks, write_files
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.engram import ROOT
from mhc_compile.kernels.memory.overencoding_settings import TABLE as OVER_TABLE
from mhc_compile.kernels.memory.ultramem_settings import TABLE as ULTRAMEM_TABLE
from mhc_compile.memory.compression import Compression
from mhc_compile.memory.parameters import DEVIATION, new_seed
from mhc_compile.memory.tables import MemoryTable, Storage, drawn_rows
from mhc_compile.parameters import StreamParameters

TOKENIZER = "tokenizer.json"
TABLES = ("engram.*.safetensors", f"{OVER_TABLE}*.safetensors", f"{ULTRAMEM_TABLE}*.safetensors")
"""Patterns of the names of the files of tables."""


def write_tables(folder: Path, owners: Mapping[str, StreamParameters], *, dtype: torch.dtype | None = None) -> None:
    """Write every table of `owners` into `folder`; those on the meta device at their start, a block at a time.

    `dtype` narrows the rows: bfloat16, or float8_e4m3fn with a scale for every 32 channels.
    """
    for owner, parameters in owners.items():
        for name, spec in parameters.memories.tables.items():
            table = parameters.table(name)
            pieces: Iterator[Piece] | None = None
            if table.storage != "mapped" and table.weight.is_meta:
                pieces = ((rows, None) for rows in drawn_rows(table.rows, table.width, new_seed(), DEVIATION))
            write_files(folder, table_name(owner, name), table, pieces=pieces, hash_spec=spec.found_by, dtype=dtype)


def read_tables(
    folder: Path, owner: str, parameters: StreamParameters, *, storage: Storage = "device", hot_rows: int = 0
) -> None:
    """Replace the tables of `parameters` by those of `folder`.

    `mapped` leaves the rows on the disk, the others read them in pieces. Raises MHC204 for an unknown storage, MHC223
    for a table that does not fit the owner, MHC224 for damaged files.
    """
    if storage not in get_args(Storage):
        raise MHCError("MHC204", f"tables={storage!r}; known: {', '.join(get_args(Storage))}")
    for name, spec in parameters.memories.tables.items():
        place = parameters.get_submodule(spec.place)
        table = parameters.table(name)
        mapped = open_table(
            folder,
            table_name(owner, name),
            rows=table.rows,
            width=table.width,
            hash_spec=spec.found_by,
            hot_rows=hot_rows,
            verify=storage != "mapped",  # else every row would be read
        )
        held = mapped if storage == "mapped" else _in_memory(mapped, storage, hot_rows)
        held.ratio = table.ratio
        place.add_module("table", held)


def check_tokenizer(folder: Path, parameters: StreamParameters) -> None:
    """Raise MHC222 where the folder's tokenizer is not the one that the memory was made with."""
    memory = parameters.memories.engram
    if memory is None or memory.compression is None or not (folder / TOKENIZER).is_file():
        return
    table = parameters.get_submodule(ROOT).get_buffer("compression")
    known = int(memory.compression["ids"])
    Compression.parse(table[:known].cpu(), memory.compression).check(read_tokenizer(folder))


def read_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer; raise MHC222 where it cannot be read, MHC415 without the package."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MHCError("MHC415", str(error)) from error
    path = folder / TOKENIZER
    if not path.is_file():
        way_out = "save the tokenizer into the folder (tokenizer.save_pretrained), or use uncompressed ids: in Python, "
        way_out += "convert_folder(..., engram=MemorySettings.preset(..., compress=False))"
        raise MHCError("MHC222", f"{path} is missing", way_out=way_out)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what its reader raises for broken JSON has no narrower class
        raise MHCError("MHC222", f"{path}: {error}") from error


def table_name(owner: str, name: str) -> str:
    """Return the prefix of the names of one table's files."""
    parts = (name, owner) if name in (OVER_TABLE, ULTRAMEM_TABLE) else ("engram", owner, name)
    return re.sub(r"[^\w.-]", "_", ".".join(part for part in parts if part))


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
