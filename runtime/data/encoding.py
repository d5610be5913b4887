"""Texts to ids in this process or in several others, in the same order either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    """Every piece with its ids (uint32), in order. With `workers` > 0, so many processes encode, each on one thread.

    At most 2 batches a worker are in memory. Raises MHC614 where a text cannot be encoded or a worker ends early.
    """
    if workers:
        yield from _elsewhere(_batches(pieces), tokenizer, workers)
        return
    here = worker.make_encoder(tokenizer.serialised, tokenizer.folder)
    for batch in _batches(pieces):
        try:
            found = here([piece.text for piece in batch])
        except Exception as error:  # whatever a tokenizer raises
            raise MHCError("MHC614", f"the tokenizer in {tokenizer.folder}: {error}") from error
        yield from zip(batch, found, strict=True)


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
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    # A program by its path, isolated from the folder it lies in: nothing of the parent is copied into it, so that its
    # pipes end with the parent, and it starts in a fraction of the time that torch takes.
    command = [sys.executable, "-P", worker.__file__]
    processes: list[subprocess.Popen[bytes]] = []
    threads = ThreadPoolExecutor(workers)
    try:
        idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for _ in range(workers):
            started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            processes.append(started)
            idle.put(started)
        greeting = json.dumps([tokenizer.serialised, tokenizer.folder]).encode()
        fresh = set(processes)

        def ask(batch: Batch) -> list[worker.Ids]:
            # One thread a worker: it writes, then reads, so that neither side waits for the other with a full pipe.
            process = idle.get()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if process in fresh:
                    fresh.remove(process)
                    worker.send(process.stdin, greeting)
                worker.send(process.stdin, json.dumps([piece.text for piece in batch]).encode())
                answer = worker.receive(process.stdout)
            except OSError:
                answer = None
            idle.put(process)
            if answer is None:
                detail = f"a worker ended with exit code {process.wait()}"
                raise MHCError("MHC614", detail, way_out="see what it said above; fewer --workers need less memory")
            return worker.unpack(answer, len(batch))

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
            process.kill()  # ends the read of a thread that waits for it
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was buffered for a worker that is gone
