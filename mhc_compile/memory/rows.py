"""Storage of rows as bytes outside of the compute device: in memory, or in files that are mapped and never loaded.

Both return *planes*: one byte array `[rows, bytes]` for each tensor of a table, its weight and (float8) its scales.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.hot import Planes, Rows

# Rows a thread reads at a time: page faults of a disk are waited for side by side.
PIECE = 1024
READERS = 16


@dataclass(frozen=True)
class FileRows:
    """The rows of one file: how many, and where each plane begins, in bytes from the beginning of the file."""

    path: Path
    rows: int
    starts: tuple[int, ...]


class MappedRows:
    """Rows of files, in their order, through read-only shared mappings: pages come and go as the system likes.

    A file must not be changed in place while it is mapped (the process would die of SIGBUS where it became shorter);
    replace it by renaming. Raises MHC224 where a file is too short or cannot be opened.
    """

    def __init__(self, files: Sequence[FileRows], row_bytes: Sequence[int]) -> None:
        self.files = tuple(files)
        self.row_bytes = tuple(row_bytes)
        self._ends = np.cumsum([f.rows for f in self.files])
        self._planes = [self._map(f) for f in self.files]

    @property
    def rows(self) -> int:
        """The rows of all files together."""
        return int(self._ends[-1])

    def _map(self, file: FileRows) -> Planes:
        spans = [(at, file.rows * n) for at, n in zip(file.starts, self.row_bytes, strict=True)]
        try:
            descriptor = os.open(file.path, os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                if any(at + n > size for at, n in spans):
                    raise MHCError("MHC224", f"{file.path} has {size:,} bytes; its rows would need more")
                mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise MHCError("MHC224", f"{file.path}: {error}") from error
        # A row's neighbours are not read next: without this, the system reads 128 KiB for a row of 100 bytes.
        mapped.madvise(mmap.MADV_RANDOM)
        return [
            np.frombuffer(mapped, np.uint8, count=n, offset=at).reshape(file.rows, -1 if file.rows else width)
            for (at, n), width in zip(spans, self.row_bytes, strict=True)
        ]

    def read(self, rows: Rows) -> Planes:
        """Return the bytes of the ascending `rows`; several threads read large calls."""
        out = [np.empty((len(rows), n), np.uint8) for n in self.row_bytes]
        cuts = [0, *np.searchsorted(rows, self._ends).tolist()]
        tasks = []
        for number, planes in enumerate(self._planes):
            first = int(self._ends[number]) - self.files[number].rows
            for begin in range(cuts[number], cuts[number + 1], PIECE):
                piece = slice(begin, min(begin + PIECE, cuts[number + 1]))
                tasks.append((planes, rows[piece] - first, [o[piece] for o in out]))
        if len(tasks) == 1:
            _take(*tasks[0])
        elif tasks:
            list(readers().map(_take, *zip(*tasks, strict=True)))
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MappedRows.__init__(self, state["files"], state["row_bytes"])


class MemoryRows:
    """Rows of tensors on the CPU, without a copy of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._planes = [t.detach().view(torch.uint8).numpy() for t in tensors]

    def read(self, rows: Rows) -> Planes:
        """Return the bytes of `rows`."""
        out = [np.empty((len(rows), plane.shape[1]), np.uint8) for plane in self._planes]
        _take(self._planes, rows, out)
        return out


def _take(planes: Planes, rows: Rows, out: Planes) -> None:
    # Not "raise", which would go through a buffer: the table has compared the rows with its bounds.
    for plane, target in zip(planes, out, strict=True):
        np.take(plane, rows, axis=0, out=target, mode="clip")


@cache
def readers() -> ThreadPoolExecutor:
    """Return the threads of this process that read files."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="mhc-rows")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=readers.cache_clear)  # the parent's threads do not run in a forked child
