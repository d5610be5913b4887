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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhc_compile.checkpoint.shards import read_shard, sync
from mhc_compile.checkpoint.staging import check_target, staged, sync_folder
from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.quantise import FP8, blocks, quantise
from mhc_compile.memory.rows import FileRows, MappedRows
from mhc_compile.memory.tables import MemoryTable, row_bytes

FORMAT = "mhc_compile.engram.table/1"
NAME = "table"
SHARD_BYTES = 5 << 30
BLOCK_BYTES = 1 << 24
"""Of rows in memory at a time."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class TableInfo:
    """What the files of a table say about it."""

    rows: int
    width: int
    dtype: torch.dtype
    hash_spec: str
    """`str(HashSpec)`, or empty."""
    files: tuple[FileRows, ...]


def write_table(
    folder: str | os.PathLike[str], table: MemoryTable, *, hash_spec: str = "", dtype: torch.dtype | None = None
) -> Path:
    """Write `table` as the new folder `folder`, which appears when all of it is on the disk, or not at all.

    `dtype` narrows the rows while they are written. Raises MHC412 for a folder that exists, and MHC413 where the disk
    is too small or fails.
    """
    size = table.rows * sum(row_bytes(table.width, dtype or table.dtype))
    target = check_target(Path(folder), size=size)
    with staged(target) as staging:
        write_files(staging, NAME, table, hash_spec=hash_spec, dtype=dtype)
    return target


def write_files(
    folder: Path,
    name: str,
    table: MemoryTable,
    *,
    hash_spec: str = "",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write `table` as files `name-...` of a folder that is there, each under its own name only when it is complete.

    A table whose files are not all there is not opened, so an interrupted writing leaves no table; a later one with the
    same name takes their place. Raises MHC413 for a failure of the file system.
    """
    return write_rows(
        folder,
        name,
        row_blocks(table),
        rows=table.rows,
        width=table.width,
        dtype=dtype or table.dtype,
        hash_spec=hash_spec,
        shard_bytes=shard_bytes,
    )


def write_rows(
    folder: Path,
    name: str,
    pieces: Iterable[tuple[Tensor, Tensor | None]],
    *,
    rows: int,
    width: int,
    dtype: torch.dtype,
    hash_spec: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """`write_files` for rows that come piece by piece: values `[r, width]`, and scales where they are float8 already.

    No more than a piece is in memory. Raises MHC223 where the pieces are not `rows` rows of `width` channels.
    """
    per_shard = max(1, shard_bytes // sum(row_bytes(width, dtype)))
    count = -(-rows // per_shard)
    common = {"format": FORMAT, "rows": rows, "width": width, "hash": hash_spec, "writing": secrets.token_hex(8)}
    feed = _Feed(pieces, width, dtype)
    made: list[tuple[Path, Path]] = []
    try:
        for number in range(count):
            first = number * per_shard
            held = min(per_shard, rows - first)
            path = folder / f"{name}-{number + 1:05}-of-{count:05}.safetensors"
            partial = folder / f".{path.name}.mhc-partial"
            made.append((partial, path))
            shard = {**common, "first": first, "shard": number + 1, "shards": count}
            with partial.open("wb") as out:
                _write_shard(out, shard, feed, held, width, dtype)
                sync(out)
        if feed.rest():
            raise MHCError("MHC223", f"more than {rows} rows")
        for stale in _files(folder, name):  # of an earlier writing, with another number of shards perhaps
            stale.unlink()
        for partial, path in made:
            partial.rename(path)
        sync_folder(folder)
    except OSError as error:
        raise MHCError("MHC413", str(error)) from error
    finally:
        for partial, _ in made:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    return [path for _, path in made]


def row_blocks(table: MemoryTable) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The rows of a table in pieces on the CPU, with the scales of float8 ones."""
    step = max(1, BLOCK_BYTES // (4 * table.width))
    return (table.block(begin, min(begin + step, table.rows)) for begin in range(0, table.rows, step))


def read_info(folder: str | os.PathLike[str], name: str = NAME) -> TableInfo:
    """What the table's files say, compared with each other and with their lengths; no row is read.

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
    """The table of a folder, mapped: rows are read from the files when they are looked up.

    `rows`, `width`, `dtype` and `hash_spec` are compared with what the files say where they are given; MHC223 for a
    difference, MHC224 for damaged files. `verify` reads all of it and compares the sha256 of every tensor.
    """
    info = read_info(folder, name)
    wanted = {"rows": rows, "width": width, "dtype": dtype, "hash_spec": hash_spec}
    wrong = [f"{k} {getattr(info, k)}, not {v}" for k, v in wanted.items() if v is not None and v != getattr(info, k)]
    if wrong:
        raise MHCError("MHC223", f"{folder}: {'; '.join(wrong)}")
    if verify:
        for file in info.files:
            _verify(file.path)
    mapped = MappedRows(info.files, row_bytes(info.width, info.dtype))
    return MemoryTable(info.rows, info.width, dtype=info.dtype, storage="mapped", files=mapped, hot_rows=hot_rows)


def fill_rows(table: MemoryTable, folder: str | os.PathLike[str], name: str = NAME, *, hash_spec: str) -> MemoryTable:
    """Fill `table` from the files of a folder: the rows that lie here (`table.begin` to `table.end`), no others read.

    Of ranks that share a table, each verifies the sha256 of its part of the files, so that together they read all.
    Raises MHC223 for files of another table, MHC224 for damaged ones, and MHC228 for float8 rows where the table has
    others.
    """
    mapped = open_table(folder, name, rows=table.rows, width=table.width, hash_spec=hash_spec)
    if FP8 in (mapped.dtype, table.dtype) and mapped.dtype != table.dtype:
        raise MHCError("MHC228", f"{folder} holds {mapped.dtype} rows")
    for file in read_info(folder, name).files[table.rank :: table.size]:
        _verify(file.path)
    step = max(1, BLOCK_BYTES // (4 * table.width))
    if not table.held:
        table.fill(0, torch.empty(0, table.width))  # made
    for begin in range(table.begin, table.end, step):
        table.fill(begin, *mapped.block(begin, min(begin + step, table.end)))
    return table


class _Feed:
    """Pieces of any size, handed out in other sizes, as the planes of rows in `dtype`."""

    def __init__(self, pieces: Iterable[tuple[Tensor, Tensor | None]], width: int, dtype: torch.dtype) -> None:
        self._pieces = iter(pieces)
        self._width, self._dtype = width, dtype
        self._held: list[Tensor] = []

    def _fill(self) -> bool:
        while not self._held or not len(self._held[0]):
            piece = next(self._pieces, None)
            if piece is None:
                return False
            values, scale = piece
            if values.ndim != 2 or values.shape[1] != self._width:
                raise MHCError("MHC223", f"{list(values.shape)}, not rows of {self._width} channels")
            if self._dtype == FP8:
                self._held = list(quantise(values)) if scale is None else [values, scale]
            elif scale is not None:
                raise MHCError("MHC223", f"float8 rows are not widened to {self._dtype}")
            else:
                self._held = [values.to(self._dtype)]
        return True

    def rest(self) -> bool:
        """Whether anything is left."""
        return self._fill()

    def next(self, most: int) -> list[Tensor]:
        """At least one row, at most `most`."""
        if not self._fill():
            raise MHCError("MHC223", "fewer rows than announced")
        given = [t[:most] for t in self._held]
        self._held = [t[most:] for t in self._held]
        return given


def _header(shard: dict[str, Any], sizes: dict[str, tuple[str, list[int], int]]) -> bytes:
    """The file's header; its length does not depend on the digests in it."""
    header: dict[str, Any] = {"__metadata__": {k: str(v) for k, v in shard.items()}}
    at = 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(
    out: BinaryIO, shard: dict[str, Any], feed: _Feed, held: int, width: int, dtype: torch.dtype
) -> None:  # fmt: skip
    sizes = {"weight": (_NAMES[dtype], [held, width], held * width * dtype.itemsize)}
    if dtype == FP8:
        sizes["scale"] = ("F32", [held, blocks(width)], held * blocks(width) * 4)
    begin = len(_header({**shard, **{f"sha256.{n}": _DIGEST for n in sizes}}, sizes))
    places = [begin, begin + sizes["weight"][2]][: len(sizes)]
    digests = [hashlib.sha256() for _ in sizes]
    left = held
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
            said: dict[str, str] = file.metadata() or {}
        if said.get("format") != FORMAT:
            raise MHCError("MHC224", f"{path} is not a file of a table (format {said.get('format')!r})")
        found: dict[str, Any] = {k: int(said[k]) for k in ("rows", "width", "first", "shard", "shards")}
        found |= {"hash": said["hash"], "writing": said["writing"]}
        weight = shard.tensors["weight"]
        held, width = weight.shape
        planes = [weight]
        if weight.dtype == _NAMES[FP8]:
            planes.append(shard.tensors["scale"])
            if (planes[1].dtype, planes[1].shape) != ("F32", (held, blocks(width))):
                raise ValueError(f"scales {planes[1].dtype} {planes[1].shape}")
        if weight.dtype not in _NAMES.values() or width != found["width"] or len(planes) != len(shard.tensors):
            raise ValueError(f"{sorted(shard.tensors)}: {weight.dtype} {weight.shape}")
    except MHCError as error:
        raise error if error.code == "MHC224" else MHCError("MHC224", error.detail) from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise MHCError("MHC224", f"{path}: {type(error).__name__} {error}") from error
    return {**found, "held": held, "dtype": weight.dtype, "starts": tuple(p.start for p in planes)}


def _verify(path: Path) -> None:
    shard = read_shard(path)
    with safe_open(path, framework="np") as file:
        said: dict[str, str] = file.metadata()
    with path.open("rb") as raw:
        for name, info in shard.tensors.items():
            digest = hashlib.sha256()
            raw.seek(info.start)
            left = info.end - info.start
            while piece := raw.read(min(BLOCK_BYTES, left)):
                digest.update(piece)
                left -= len(piece)
            if digest.hexdigest() != said.get(f"sha256.{name}"):
                raise MHCError("MHC224", f"{path}: {name} is not what was written (sha256)")


def _files(folder: Path, name: str) -> list[Path]:
    wanted: Callable[[str], Any] = re.compile(re.escape(name) + r"-\d{5}-of-\d{5}\.safetensors").fullmatch
    try:
        return sorted(p for p in folder.iterdir() if wanted(p.name))
    except OSError as error:
        raise MHCError("MHC224", str(error)) from error
