"""Texts to ids in this process or in several others, in the same order either way."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

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
    spawn = get_context("spawn")  # nothing of this process is copied into those
    pool = ProcessPoolExecutor(workers, spawn, worker.begin, (tokenizer.serialised, tokenizer.folder))
    waiting: deque[tuple[Batch, Future[list[worker.Ids]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(worker.encode, [piece.text for piece in batch])))
            if len(waiting) > _AHEAD * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool as error:
        way_out = "see what it said above; fewer --workers need less memory"
        raise MHCError("MHC614", f"a worker ended: {error}", way_out=way_out) from error
    finally:
        pool.shutdown(cancel_futures=True)
