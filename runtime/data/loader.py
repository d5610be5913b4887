"""Batches of a run by step number, cut over replicas, read ahead in the background; and whether data fits a model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import IDS, POSITIONS
from mhc_compile.runtime.data.order import Mixture
from mhc_compile.runtime.data.shards import DataFolder, Index, open_data
from mhc_compile.runtime.data.tokenizer import has_tokenizer, model_vocabulary, read_tokenizer

_AHEAD = 2


class Loader(AbstractContextManager["Loader"]):
    """The batches of one replica: `batch(step)` depends on the folder, `seed`, `batch` and the step alone.

    Sample i is the window of S + 1 tokens from i * S on: S inputs and the token after each of them. Windows overlap
    by one token, so every token but the first is a target once an epoch. Step s takes places s * batch to
    (s + 1) * batch of the `Order`, and replica r of R the r-th of R equal parts of them: another number of replicas
    trains on the same samples in the same order.

    Of several folders, every `BLOCK` places have so many samples of each as `weights` says in proportion (`Mixture`).

    `pin`: batches lie in pinned memory, from which a GPU copies while it computes. `workers` threads read the coming
    steps ahead (mapped files release the interpreter while the disk is waited for); results do not depend on them. They
    end with `close()`, at the end of a `with` block, or with the process. Raises MHC611 for a folder that is damaged,
    MHC613 where it has too few samples for one batch.
    """

    def __init__(
        self,
        folder: str | Path | Sequence[str | Path],
        *,
        weights: Sequence[float] = (),
        sequence: int,
        batch: int,
        seed: int = 0,
        replicas: int = 1,
        replica: int = 0,
        workers: int = 0,
        documents: bool = False,
        pin: bool = False,
    ) -> None:
        if batch % replicas or not 0 <= replica < replicas:
            raise ValueError(f"a batch of {batch} for replica {replica} of {replicas}")
        self.folders = [open_data(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
        self.sequence = sequence
        samples = [(data.tokens - 1) // sequence for data in self.folders]
        self.samples = sum(samples)
        """How many there are: of one folder, an epoch."""
        if self.samples < batch or not all(samples):
            tokens = sum(data.tokens for data in self.folders)
            names = ", ".join(f"{data.folder}: {count:,}" for data, count in zip(self.folders, samples, strict=True))
            detail = f"{tokens:,} tokens are {self.samples:,} samples of {sequence:,} tokens ({names}), "
            raise MHCError("MHC613", detail + f"one batch takes {batch:,}")
        self.seed = seed
        self._order = Mixture(samples, weights or [1.0] * len(samples), seed)
        self._batch = batch
        self._rows = batch // replicas
        self._begin = replica * self._rows
        self._offset = 0
        self._documents, self._pin = documents, pin
        self._threads = ThreadPoolExecutor(workers, "data") if workers else None
        self._depth = _AHEAD * workers
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the replica's rows b of a step's batch, on the CPU.

        `input_ids` and `labels`, the next tokens, int64 [b, S]. With `documents` also `position_ids`, int64 [b, S],
        which begin at 0 with the window and again with every document. With `documents` or masks in the data also
        `weights`, float32 [b, S]: 0 for labels that do not count (masked ones; with `documents` first tokens of
        documents), for others the labels of the whole batch over those that count. The mean over all of losses times
        weights is the mean loss of labels that count.
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
        first, *others = hashes = [data.sha256 for data in self.folders]
        mixed = {"folders": hashes, "places": self._order.places.tolist()}
        data = {"data": mixed if others else first, "tokenizer": self.folders[0].tokenizer}
        return {**data, "seed": self.seed, "sequence": self.sequence}

    def close(self) -> None:
        """End the threads; `batch` then reads by itself."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._coming.clear()

    def _read(self, step: int) -> dict[str, Tensor]:
        size, own = self.sequence, slice(self._begin, self._begin + self._rows)
        whole = [(self.folders[k], i * size) for k, i in self._order(self.samples_before(step), self._batch)]
        windows = np.stack([self._window(*sample) for sample in whole[own]])
        batch: dict[str, Any] = {IDS: windows[:, :-1], "labels": windows[:, 1:]}
        if self._documents:
            batch[POSITIONS] = np.stack([self._positions(*sample) for sample in whole[own]])
        if self.weighs:
            counted = np.stack([self._counted(*sample) for sample in whole])
            batch["weights"] = counted[own] * np.float32(counted.size / max(counted.sum(dtype=np.int64), 1))
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
        return {name: t.pin_memory() if self._pin else t for name, t in tensors.items()}

    @property
    def weighs(self) -> bool:
        """Whether labels do not all count alike."""
        return self._documents or any(data.masked for data in self.folders)

    def _window(self, data: DataFolder, begin: int) -> Index:
        window = data.read(begin, self.sequence + 1).astype(np.int64)
        if window.max() > data.largest:
            detail = f"{data.folder}: token {window.max()}, the largest one that was written is {data.largest}"
            raise MHCError("MHC611", detail)
        return window

    def _counted(self, data: DataFolder, begin: int) -> NDArray[np.float32]:
        """Return 1 for the labels of a window that count, 0 for the others."""
        counted = data.counted(begin + 1, self.sequence).astype(np.float32)
        if self._documents:  # nothing in the document before says with what the next one begins
            counted[data.starts(begin + 1, self.sequence) - begin - 1] = 0
        return counted

    def _positions(self, data: DataFolder, begin: int) -> Index:
        """Return the position of each token in its document or, where that began before the window, in the window."""
        begun = np.zeros(self.sequence, np.int64)
        starts = data.starts(begin, self.sequence) - begin
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
