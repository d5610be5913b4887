"""A bounded cache of the most frequently used rows, in front of slow storage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Planes = list[npt.NDArray[np.uint8]]
Load = Callable[[Rows], Planes]
"""Rows as bytes: one array `[rows, bytes]` for each tensor of the table (its weight, its scales)."""

WAYS = 8
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class HotRows:
    """At most `capacity` rows, least recently used out first.

    The cache is associative by sets, as a processor's is: a row may lie in the `WAYS` places of its set, and the least
    recently used row of the set makes room. So every step is one array operation for all rows of a call, whatever the
    capacity; a capacity of `WAYS` and fewer is one set, a plain LRU. Threads may share it.
    """

    def __init__(self, capacity: int, row_bytes: Sequence[int]) -> None:
        self.row_bytes = tuple(row_bytes)
        self.ways = max(1, min(WAYS, capacity))
        self.sets = max(1, capacity // self.ways)
        self._lock = threading.Lock()
        self._make()

    def _make(self) -> None:
        self._tags = np.full((self.sets, self.ways), -1, np.int64)
        self._used = np.zeros((self.sets, self.ways), np.int64)
        self._kept: Planes = [np.empty((self.sets * self.ways, n), np.uint8) for n in self.row_bytes]
        self._turn = np.zeros(self.sets, np.int64)
        self._now = self._era = 0
        self.hits = self.asked = 0

    @property
    def capacity(self) -> int:
        """Rows it can hold."""
        return self.sets * self.ways

    @property
    def hit_rate(self) -> float:
        """Share of the rows requested since the start (or `clear`) that were cached; 0 before the first."""
        return self.hits / self.asked if self.asked else 0.0

    def clear(self) -> None:
        """Forget all rows and counts."""
        with self._lock:
            self._tags.fill(-1)
            self._used.fill(0)
            self._era += 1
            self._now = self.hits = self.asked = 0

    def __len__(self) -> int:
        return int((self._tags >= 0).sum())

    def fetch(self, rows: Rows, load: Load) -> Planes:
        """Return the bytes of the distinct `rows`; `load` is called once with those that are missing, if any."""
        with self._lock:
            era = self._era
            place = self._find(rows)
            cached = place >= 0
            self._now += 1
            self._used.reshape(-1)[place[cached]] = self._now
            self.hits += int(cached.sum())
            self.asked += len(rows)
            # A missing row's place is clipped to the first: what is copied from there is overwritten below.
            out = [np.take(kept, place, axis=0, mode="clip") for kept in self._kept]
        if cached.all():
            return out
        missing = np.flatnonzero(~cached)
        loaded = load(rows[missing])  # the slow part, while other threads go on
        for whole, part in zip(out, loaded, strict=True):
            whole[missing] = part
        with self._lock:
            if era == self._era:  # else the table has changed meanwhile
                self._insert(rows[missing], loaded)
        return out

    def _set_of(self, rows: Rows) -> Rows:
        mixed = (rows.astype(np.uint64) * _SPREAD) >> np.uint64(32)
        return ((mixed * np.uint64(self.sets)) >> np.uint64(32)).astype(np.int64)

    def _find(self, rows: Rows) -> Rows:
        """Return the place of every row, or -1."""
        sets = self._set_of(rows)
        place = np.full(len(rows), -1, np.int64)
        for way in range(self.ways):
            here = self._tags[:, way][sets] == rows
            place[here] = sets[here] * self.ways + way
        return place

    def _insert(self, rows: Rows, loaded: Planes) -> None:
        left = np.flatnonzero(self._find(rows) < 0)  # another thread may have been faster
        sets = self._set_of(rows)
        for _ in range(self.ways):
            if not len(left):
                return
            # One row of each set a round: the one that was written last.
            self._turn[sets[left]] = left
            mine = self._turn[sets[left]] == left
            now, left = left[mine], left[~mine]
            way = self._used.take(sets[now], axis=0).argmin(1)
            # What this call has used stays: rows that come in together would push each other out.
            idle = self._used[sets[now], way] < self._now
            now, place = now[idle], (sets[now] * self.ways + way)[idle]
            self._tags.reshape(-1)[place] = rows[now]
            self._used.reshape(-1)[place] = self._now
            for kept, part in zip(self._kept, loaded, strict=True):
                kept[place] = part.take(now, axis=0)

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HotRows.__init__(self, state["capacity"], state["row_bytes"])  # a copy begins empty
