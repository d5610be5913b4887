"""Batches of a run by step number, cut over replicas, read ahead in the background; and whether data fits a model."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import IDS, POSITIONS
from mhc_compile.runtime.data.order import Order
from mhc_compile.runtime.data.shards import Index, open_data
from mhc_compile.runtime.data.tokenizer import has_tokenizer, model_vocabulary, read_tokenizer

_AHEAD = 2


class Loader(AbstractContextManager["Loader"]):
    """The batches of one replica: `batch(step)` depends on the folder, `seed`, `batch` and the step alone.

    Sample i is the window of S + 1 tokens from i * S on: S inputs and the token after each of them. Windows overlap
    by one token, so every token but the first is a target once an epoch. Step s takes places s * batch to
    (s + 1) * batch of the `Order`, and replica r of R the r-th of R equal parts of them: another number of replicas
    trains on the same samples in the same order.

    `workers` threads read the coming steps ahead (mapped files release the interpreter while the disk is waited for);
    results do not depend on them. They end with `close()`, at the end of a `with` block, or with the process. Raises
    MHC611 for a folder that is damaged, MHC613 where it has too few samples for one batch.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        sequence: int,
        batch: int,
        seed: int = 0,
        replicas: int = 1,
        replica: int = 0,
        workers: int = 0,
        documents: bool = False,
    ) -> None:
        if batch % replicas or not 0 <= replica < replicas:
            raise ValueError(f"a batch of {batch} for replica {replica} of {replicas}")
        self.data = open_data(folder)
        self.sequence = sequence
        self.samples = (self.data.tokens - 1) // sequence
        """How many there are: an epoch."""
        if self.samples < batch:
            detail = f"{self.data.tokens:,} tokens in {folder} are {self.samples:,} samples of {sequence:,} tokens, "
            raise MHCError("MHC613", detail + f"one batch takes {batch:,}")
        self.seed = seed
        self._order = Order(self.samples, seed)
        self._batch = batch
        self._rows = batch // replicas
        self._begin = replica * self._rows
        self._offset = 0
        self._documents = documents
        self._threads = ThreadPoolExecutor(workers, "data") if workers else None
        self._depth = _AHEAD * workers
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the replica's rows b of a step's batch, on the CPU.

        `input_ids` and `labels`, the next tokens, int64 [b, S]. With `documents` also `position_ids`, int64 [b, S],
        which begin at 0 with the window and again with every document.
        """
        future = self._coming.pop(step, None)
        if self._threads is not None:
            window = range(step + 1, step + 1 + self._depth)
            for other in [s for s in self._coming if s not in window]:
                self._coming.pop(other).cancel()
            for coming in window:
                if coming not in self._coming:
                    self._coming[coming] = self._threads.submit(self._read, coming)
        return self._read(step) if future is None else future.result()

    def samples_before(self, step: int) -> int:
        """Return the number of samples in the batches before `step`."""
        return self._offset + step * self._batch

    def resume(self, step: int, samples: int) -> None:
        """Let `step` be the batch behind so many samples; before, it is the one behind `step` batches of this size."""
        self._offset = samples - step * self._batch

    def describe(self) -> dict[str, Any]:
        """Return what must be equal for a step number to mean the same samples, as plain JSON."""
        data = {"data": self.data.sha256, "tokenizer": self.data.tokenizer}
        return {**data, "seed": self.seed, "sequence": self.sequence}

    def close(self) -> None:
        """End the threads; `batch` then reads by itself."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._coming.clear()

    def _read(self, step: int) -> dict[str, Tensor]:
        size = self.sequence
        begins = self._order(self.samples_before(step) + self._begin, self._rows) * size
        windows = np.stack([self.data.read(int(begin), size + 1) for begin in begins]).astype(np.int64)
        if windows.max() > self.data.largest:
            detail = f"{self.data.folder}: token {windows.max()}, the largest one that was written is "
            raise MHCError("MHC611", f"{detail}{self.data.largest}")
        batch = {IDS: windows[:, :-1], "labels": windows[:, 1:]}
        if self._documents:
            batch[POSITIONS] = np.stack([self._positions(int(begin)) for begin in begins])
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}

    def _positions(self, begin: int) -> Index:
        """Return the position of each token in its document or, where that began before the window, in the window."""
        begun = np.zeros(self.sequence, np.int64)
        starts = self.data.starts(begin, self.sequence) - begin
        begun[starts] = starts
        return np.arange(self.sequence) - np.maximum.accumulate(begun)


def check_tokenizer(data_folder: str | Path, model_folder: str | Path) -> None:
    """Raise MHC612 where the ids of the data do not mean to the model what they meant to the data's tokenizer.

    The tokenizers are the same if all ids stand for the same texts. For a model folder without a tokenizer, and beside
    that for any, the largest id must be below `vocab_size` in config.json. Raises MHC611 and MHC614 for folders that
    cannot be read.
    """
    data = open_data(data_folder)
    if has_tokenizer(model_folder):
        model = read_tokenizer(model_folder)
        if model.sha256 != data.tokenizer:
            sizes = f"{data.vocabulary:,} ids, the model's {model.vocabulary:,}"
            detail = sizes if data.vocabulary != model.vocabulary else "its ids stand for other texts"
            raise MHCError("MHC612", f"{data_folder} and {model_folder}: {detail}")
    known = model_vocabulary(model_folder)
    if known is not None and data.largest >= known:
        raise MHCError("MHC612", f"{data_folder} has token {data.largest:,}, {model_folder} a vocabulary of {known:,}")
