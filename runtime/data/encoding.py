"""Texts to ids in this process or in several others, in the same order either way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from queue import SimpleQueue

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data import worker
from mhc_compile.runtime.data.sources import Piece
from mhc_compile.runtime.data.tokenizer import FolderTokenizer

BATCH = 1 << 18
"""Characters of the pieces that are encoded together, where one piece is not longer."""
_AHEAD = 2

Batch = list[Piece]


def encode(
    pieces: Iterable[Piece], tokenizer: FolderTokenizer, workers: int = 0
) -> Generator[tuple[Piece, worker.Ids], None, None]:
    """Yield every piece with its ids (uint32), in order. With `workers` > 0, as many one-threaded processes encode.

    At most 2 batches per worker are in memory. Raises MHC614 where a text cannot be encoded or a worker ends early.
    """
    if workers:
        yield from _elsewhere(_batches(pieces), tokenizer, workers)
        return
    here = worker.make_encoder(tokenizer.serialised, tokenizer.folder)
    for batch in _batches(pieces):
        try:
            ids = here([piece.text for piece in batch])
        except Exception as error:  # whatever a tokenizer raises
            raise MHCError("MHC614", f"the tokenizer in {tokenizer.folder}: {error}") from error
        yield from zip(batch, ids, strict=True)


def _batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.text) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text) + 1  # empty ones count, or there could be any number of them
    if batch:
        yield batch


def _elsewhere(
    batches: Iterator[Batch], tokenizer: FolderTokenizer, workers: int
) -> Generator[tuple[Piece, worker.Ids], None, None]:
    idle: SimpleQueue[_Worker] = SimpleQueue()
    processes: list[_Worker] = []

    def ask(batch: Batch) -> list[worker.Ids]:
        # One thread a worker: it writes, then reads, so that neither side waits for the other with a full pipe.
        process = idle.get()
        try:
            return process.encode([piece.text for piece in batch])
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            processes.append(_Worker(tokenizer))
            idle.put(processes[-1])
        waiting: deque[tuple[Batch, Future[list[worker.Ids]]]] = deque()
        for batch in batches:
            waiting.append((batch, threads.submit(ask, batch)))
            if len(waiting) > _AHEAD * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        for process in processes:
            process.process.kill()  # ends the read of a thread that waits for it
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.process.wait()
            process.pipe.close()


class _Worker:
    """A process that encodes, and this end of the pipe to it."""

    def __init__(self, tokenizer: FolderTokenizer) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        self.pipe, other = Pipe()
        # A program by its path, isolated from the folder it lies in: nothing of the parent is copied into it, so that
        # its pipe ends with the parent, and it starts in a fraction of the time that torch takes.
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, str(other.fileno())], pass_fds=[other.fileno()], env=environment
        )
        other.close()
        self._greeting: tuple[str | None, str] | None = (tokenizer.serialised, tokenizer.folder)

    def encode(self, texts: list[str]) -> list[worker.Ids]:
        """Return the ids of each text. Raises MHC614 where the process ends instead."""
        try:
            if self._greeting is not None:  # here, so that no process is waited for before it has started
                self.pipe.send(self._greeting)
                self._greeting = None
            self.pipe.send(texts)
            ids: list[worker.Ids] = self.pipe.recv()
        except (EOFError, OSError) as error:
            detail = f"a worker ended with exit code {self.process.wait()}"
            way_out = "see what it said above; fewer --workers need less memory"
            raise MHCError("MHC614", detail, way_out=way_out) from error
        return ids
