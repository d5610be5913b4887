"""Safetensors files as streams of bytes: their headers, and a copy that checks and hashes what passes through."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhc_compile.diagnostics import MHCError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""The dtypes of plain checkpoints; the narrower floats of the format belong to quantised ones."""
CHUNK = 1 << 24
"""Bytes in memory at a time; a multiple of every element size."""

Moved = Callable[[int], None]
"""Called with the number of bytes after each write."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header was read and agrees with the file's length."""

    path: Path
    size: int
    tensors: dict[str, TensorInfo]
    partial: bool = False
    """The file holds other tensors as well, which a copy leaves out."""

    def without(self, left_out: Container[str]) -> Shard:
        """Return the file without the tensors whose names are in `left_out`."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in left_out}
        return replace(self, tensors=kept, partial=self.partial or len(kept) < len(self.tensors))


def read_shard(path: Path) -> Shard:
    """Read the file's header. Raises MHC403 for a file that is truncated or not of this format."""
    try:
        # The library compares the header with the length of the file; no tensor is read. As "pt" it would map the file
        # as memory of this process, which a limit on that may forbid.
        with safe_open(path, framework="np"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise MHCError("MHC403", f"{path}: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), start, end)
    return Shard(path, path.stat().st_size, tensors)


def read_tensors(files: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Return the tensors of these names, each from its file."""
    tensors: dict[str, Tensor] = {}
    for path in {shard.path for shard in files.values()}:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name, shard in files.items() if shard.path == path}
    return tensors


def copy_shard(shard: Shard, target: Path, moved: Moved, *, refuse_nonfinite: bool = False) -> str:
    """Copy the file in pieces of `CHUNK` bytes and return its sha256; of a partial one, its tensors under a new header.

    Raises MHC408 at the first NaN or infinity with `refuse_nonfinite`, and MHC403 if the file became shorter.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with shard.path.open("rb") as source, target.open("xb") as out:

        def move(count: int) -> memoryview:
            piece = buffer[:count]
            if source.readinto(piece) != count:
                raise MHCError("MHC403", f"{shard.path} ends early")
            digest.update(piece)
            out.write(piece)
            moved(count)
            return piece

        # The format stores tensors without gaps, after the header.
        tensors = sorted(shard.tensors.items(), key=lambda item: item[1].start)
        if shard.partial:
            digest.update(head := header(tensors))
            out.write(head)
        else:
            tensors.insert(0, ("the header", TensorInfo("U8", (), 0, tensors[0][1].start if tensors else shard.size)))
        for name, tensor in tensors:
            dtype = DTYPES.get(tensor.dtype, torch.uint8)
            checked = refuse_nonfinite and (dtype.is_floating_point or dtype.is_complex)
            position = source.seek(tensor.start)
            while position < tensor.end:
                piece = move(min(CHUNK, tensor.end - position))
                position += len(piece)
                if checked and not torch.frombuffer(piece, dtype=dtype).isfinite().all():
                    raise MHCError("MHC408", f"{name} in {shard.path}")
        sync(out)
    return digest.hexdigest()


def header(tensors: Sequence[tuple[str, TensorInfo]]) -> bytes:
    """Return the beginning of a file that holds these tensors in this order, padded so that they are aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        end = position + tensor.end - tensor.start
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def copy_file(source: Path, target: Path) -> None:
    """Copy any other file, and wait until it is on the disk."""
    with source.open("rb") as file, target.open("xb") as out:
        shutil.copyfileobj(file, out, CHUNK)
        sync(out)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its sha256."""
    # The library reads the memory of each tensor: contiguous, on the CPU, and none of them shared.
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        sync(file)
    return sha256(path)


def write_text(path: Path, text: str) -> None:
    """Write a new text file, and wait until it is on the disk."""
    with path.open("xb") as out:
        out.write(text.encode())
        sync(out)


def read_json(path: Path, code: str = "MHC402") -> dict[str, Any]:
    """Return the JSON object in a file. Raises `code` for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MHCError(code, f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise MHCError(code, f"{path} holds no JSON object")
    return content


def sha256(path: Path) -> str:
    """Return the hash of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(file: BinaryIO) -> None:
    """Return when the file's contents are on the disk."""
    file.flush()
    os.fsync(file.fileno())
