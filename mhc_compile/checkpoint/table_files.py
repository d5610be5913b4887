"""Tables as files: safetensors shards that say what they hold, written whole or not at all, opened without a read.

A table `NAME` of a folder is `NAME-00001-of-00003.safetensors` and so on, each with a run of rows: a tensor `weight`
`[rows, width]` (F32, BF16 or F8_E4M3) and, for float8, `scale` `[rows, width / 32]` (F32). Their metadata say which
rows of how many, how they are hashed, the sha256 of each tensor, and which writing they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhc_compile.checkpoint.shards import read_shard, sync
from mhc_compile.checkpoint.staging import sync_folder
from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.quantise import FP8, blocks, quantise
from mhc_compile.memory.rows import FileRows, MappedRows
from mhc_compile.memory.tables import MemoryTable, row_bytes

FORMAT = "mhc_compile.engram.table/1"
NAME = "table"
SHARD_BYTES = 5 << 30
BLOCK_BYTES = 1 << 24
"""Bytes of rows in memory at a time."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
_DIGEST = "0" * 64
Piece = tuple[Tensor, Tensor | None]
"""Values `[r, width]`, and the scales of values that are float8 already."""


@dataclass(frozen=True, kw_only=True)
class TableInfo:
    """The contents of the headers of a table's files."""

    rows: int
    width: int
    dtype: torch.dtype
    hash_spec: str
    """`str(HashSpec)`, or empty."""
    files: tuple[FileRows, ...]


def write_files(
    folder: Path,
    name: str,
    table: MemoryTable,
    *,
    pieces: Iterable[Piece] | None = None,
    hash_spec: str = "",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write `table` as files `name-...` of an existing folder, each under its own name only when it is complete.

    A table is opened only if all of its files are there, so an interrupted write leaves no table; a later one with the
    same name replaces them. `pieces` are the rows where they are not those of `table`; no more than a piece is in
    memory. Raises MHC413 for a failure of the file system, MHC223 where the pieces are not `table.rows` rows of
    `table.width` channels.
    """
    dtype = dtype or table.dtype
    per_shard = max(1, shard_bytes // sum(row_bytes(table.width, dtype)))
    count = -(-table.rows // per_shard)
    common = {
        "format": FORMAT, "rows": table.rows, "width": table.width, "hash": hash_spec, "writing": secrets.token_hex(8),
    }  # fmt: skip
    feed = _Feed(row_blocks(table) if pieces is None else pieces, table.width, dtype)
    paths: list[tuple[Path, Path]] = []
    try:
        for number in range(count):
            first = number * per_shard
            path = folder / f"{name}-{number + 1:05}-of-{count:05}.safetensors"
            partial = folder / f".{path.name}.mhc-partial"
            paths.append((partial, path))
            shard = {**common, "first": first, "shard": number + 1, "shards": count}
            with partial.open("wb") as out:
                _write_shard(out, shard, feed, min(per_shard, table.rows - first))
                sync(out)
        if feed.fill():
            raise MHCError("MHC223", f"more than {table.rows} rows")
        for stale in _files(folder, name):  # of an earlier write, with another number of shards perhaps
            stale.unlink()
        for partial, path in paths:
            partial.rename(path)
        sync_folder(folder)
    except OSError as error:
        raise MHCError("MHC413", str(error)) from error
    finally:
        for partial, _ in paths:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    return [path for _, path in paths]


def row_blocks(table: MemoryTable) -> Iterator[Piece]:
    """Yield the rows of a table in pieces on the CPU."""
    step = max(1, BLOCK_BYTES // (4 * table.width))
    return (table.block(begin, min(begin + step, table.rows)) for begin in range(0, table.rows, step))


def read_info(folder: str | os.PathLike[str], name: str = NAME) -> TableInfo:
    """Read the headers of the table's files and compare them with each other and with the files' lengths.

    Raises MHC224 for files that are missing, cut short, of another format, or of different writings.
    """
    paths = _files(Path(folder), name)
    if not paths:
        raise MHCError("MHC224", f"{folder} holds no table {name!r}")
    shards = [_read_header(path) for path in paths]
    first = shards[0]
    same = ("rows", "width", "hash", "writing", "shards", "dtype")
    at = 0
    for number, shard in enumerate(shards):
        if any(shard[key] != first[key] for key in same) or (shard["shard"], shard["first"]) != (number + 1, at):
            raise MHCError("MHC224", f"{paths[number]} is not the continuation of {paths[max(number - 1, 0)]}")
        at += shard["held"]
    if at != first["rows"] or len(shards) != first["shards"]:
        raise MHCError("MHC224", f"{folder}: {len(shards)} of {first['shards']} files of {name!r}, {at:,} rows")
    dtype = next(d for d, text in _NAMES.items() if text == first["dtype"])
    files = tuple(FileRows(path, s["held"], s["starts"]) for path, s in zip(paths, shards, strict=True))
    return TableInfo(rows=at, width=first["width"], dtype=dtype, hash_spec=first["hash"], files=files)


def open_table(
    folder: str | os.PathLike[str],
    name: str = NAME,
    *,
    rows: int | None = None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    hash_spec: str | None = None,
    hot_rows: int = 0,
    verify: bool = False,
) -> MemoryTable:
    """Open the table of a folder as a mapped one: rows are read from the files when they are looked up.

    Raises MHC223 where `rows`, `width`, `dtype` or `hash_spec` differ from the files, and MHC224 for damaged files.
    `verify` reads all of them and compares the sha256 of every tensor.
    """
    info = read_info(folder, name)
    known = {"rows": rows, "width": width, "dtype": dtype, "hash_spec": hash_spec}
    wrong = [f"{k} {getattr(info, k)}, not {v}" for k, v in known.items() if v is not None and v != getattr(info, k)]
    if wrong:
        raise MHCError("MHC223", f"{folder}: {'; '.join(wrong)}")
    if verify:
        for file in info.files:
            _verify(file.path)
    mapped = MappedRows(info.files, row_bytes(info.width, info.dtype))
    return MemoryTable(info.rows, info.width, dtype=info.dtype, storage="mapped", files=mapped, hot_rows=hot_rows)


def fill_rows(table: MemoryTable, folder: str | os.PathLike[str], name: str = NAME, *, hash_spec: str) -> MemoryTable:
    """Fill the rows of `table` on this rank (`table.begin` to `table.end`) from the files of a folder.

    Each of the ranks that share a table verifies the sha256 of a part of the files; together they verify all. Raises
    MHC223 for files of another table, MHC224 for damaged ones, and MHC228 for float8 rows and a table of another dtype.
    """
    mapped = open_table(folder, name, rows=table.rows, width=table.width, hash_spec=hash_spec)
    if FP8 in (mapped.dtype, table.dtype) and mapped.dtype != table.dtype:
        raise MHCError("MHC228", f"{folder} holds {mapped.dtype} rows")
    for file in read_info(folder, name).files[table.rank :: table.size]:
        _verify(file.path)
    step = max(1, BLOCK_BYTES // (4 * table.width))
    if not table.held:
        table.fill(0, torch.empty(0, table.width))  # allocates it
    for begin in range(table.begin, table.end, step):
        table.fill(begin, *mapped.block(begin, min(begin + step, table.end)))
    return table


class _Feed:
    """Pieces of any size, returned in other sizes, as the planes of rows in `dtype`."""

    def __init__(self, pieces: Iterable[Piece], width: int, dtype: torch.dtype) -> None:
        self._pieces = iter(pieces)
        self.width, self.dtype = width, dtype
        self._planes: list[Tensor] = []

    def fill(self) -> bool:
        """Read the next piece where nothing is left of the last one; return whether there are rows."""
        while not self._planes or not len(self._planes[0]):
            piece = next(self._pieces, None)
            if piece is None:
                return False
            values, scale = piece
            if values.ndim != 2 or values.shape[1] != self.width:
                raise MHCError("MHC223", f"{list(values.shape)}, not rows of {self.width} channels")
            if self.dtype == FP8:
                self._planes = list(quantise(values)) if scale is None else [values, scale]
            elif scale is not None:
                raise MHCError("MHC223", f"float8 rows are not widened to {self.dtype}")
            else:
                self._planes = [values.to(self.dtype)]
        return True

    def next(self, most: int) -> list[Tensor]:
        """Return at least one row and at most `most`."""
        if not self.fill():
            raise MHCError("MHC223", "fewer rows than announced")
        planes = [t[:most] for t in self._planes]
        self._planes = [t[most:] for t in self._planes]
        return planes


def _header(shard: dict[str, Any], sizes: dict[str, tuple[str, list[int], int]]) -> bytes:
    """Return the file's header; its length does not depend on the digests in it."""
    header: dict[str, Any] = {"__metadata__": {k: str(v) for k, v in shard.items()}}
    at = 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(out: BinaryIO, shard: dict[str, Any], feed: _Feed, rows: int) -> None:
    sizes = {"weight": (_NAMES[feed.dtype], [rows, feed.width], rows * feed.width * feed.dtype.itemsize)}
    if feed.dtype == FP8:
        sizes["scale"] = ("F32", [rows, blocks(feed.width)], rows * blocks(feed.width) * 4)
    begin = len(_header({**shard, **{f"sha256.{n}": _DIGEST for n in sizes}}, sizes))
    places = [begin, begin + sizes["weight"][2]][: len(sizes)]
    digests = [hashlib.sha256() for _ in sizes]
    left = rows
    while left:
        planes = feed.next(left)
        left -= len(planes[0])
        for number, plane in enumerate(planes):
            raw: Any = plane.contiguous().view(torch.uint8).numpy()
            data = memoryview(raw).cast("B")
            out.seek(places[number])
            out.write(data)
            digests[number].update(data)
            places[number] += len(data)
    out.seek(0)
    out.write(_header({**shard, **{f"sha256.{n}": d.hexdigest() for n, d in zip(sizes, digests, strict=True)}}, sizes))


def _read_header(path: Path) -> dict[str, Any]:
    try:
        shard = read_shard(path)
        with safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise MHCError("MHC224", f"{path} is not a file of a table (format {metadata.get('format')!r})")
        header: dict[str, Any] = {k: int(metadata[k]) for k in ("rows", "width", "first", "shard", "shards")}
        header |= {"hash": metadata["hash"], "writing": metadata["writing"]}
        weight = shard.tensors["weight"]
        rows, width = weight.shape
        planes = [weight]
        if weight.dtype == _NAMES[FP8]:
            planes.append(shard.tensors["scale"])
            if (planes[1].dtype, planes[1].shape) != ("F32", (rows, blocks(width))):
                raise ValueError(f"scales {planes[1].dtype} {planes[1].shape}")
        if weight.dtype not in _NAMES.values() or width != header["width"] or len(planes) != len(shard.tensors):
            raise ValueError(f"{sorted(shard.tensors)}: {weight.dtype} {weight.shape}")
    except MHCError as error:
        raise error if error.code == "MHC224" else MHCError("MHC224", error.detail) from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise MHCError("MHC224", f"{path}: {type(error).__name__} {error}") from error
    return {**header, "held": rows, "dtype": weight.dtype, "starts": tuple(p.start for p in planes)}


def _verify(path: Path) -> None:
    shard = read_shard(path)
    with safe_open(path, framework="np") as file:
        metadata: dict[str, str] = file.metadata()
    with path.open("rb") as raw:
        for name, info in shard.tensors.items():
            digest = hashlib.sha256()
            raw.seek(info.start)
            left = info.end - info.start
            while piece := raw.read(min(BLOCK_BYTES, left)):
                digest.update(piece)
                left -= len(piece)
            if digest.hexdigest() != metadata.get(f"sha256.{name}"):
                raise MHCError("MHC224", f"{path}: {name} is not what was written (sha256)")


def _files(folder: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + r"-\d{5}-of-\d{5}\.safetensors")
    try:
        return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name))
    except OSError as error:
        raise MHCError("MHC224", str(error)) from error
