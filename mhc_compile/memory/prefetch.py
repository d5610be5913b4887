"""Lookups that run while the device computes: a worker thread, and tickets by which their results are claimed.

A ticket is a hint, never a promise: claiming one that is unknown, out of date or was claimed before returns None, and
the caller looks the rows up itself. So a recomputed or removed claim costs time, not correctness.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from functools import cache
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from mhc_compile.memory.lanes import Lookup

INDUCTOR = {"reorder_for_locality": False}
"""Options of Inductor for graphs with `prefetch`: in inference it moves an op to where its result is used, so that a
prefetch would begin after the work that it should overlap with."""
KEPT = 64
"""The number of unclaimed lookups; beyond it the oldest is dropped."""


class Answer(Protocol):
    """The result that a ticket stands for."""

    def result(self, dtype: torch.dtype) -> Tensor:
        """Wait for the values and return them in `dtype`."""


class Desk:
    """The lookups under way in this process, and the thread that runs them, one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Lookup] = SimpleQueue()
        self._open: OrderedDict[int, tuple[Hashable, Answer]] = OrderedDict()
        self._numbers = itertools.count(1)
        self._worker: threading.Thread | None = None

    def submit(self, lookup: Lookup, key: Hashable) -> int:
        """Run `lookup` in the worker and return its ticket; `key` tells the table and its state."""
        with self._lock:
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="mhc-prefetch", daemon=True)
                self._worker.start()
        ticket = self.keep(lookup, key)
        self._queue.put(lookup)
        return ticket

    def keep(self, answer: Answer, key: Hashable) -> int:
        """Return a ticket for a lookup that is running already."""
        with self._lock:
            ticket = next(self._numbers)
            self._open[ticket] = (key, answer)
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
        return ticket

    def claim(self, ticket: int, key: Hashable) -> Answer | None:
        """Return the lookup of a ticket if its key is `key`; a ticket can be claimed once."""
        with self._lock:
            known, answer = self._open.pop(ticket, (None, None))
        return answer if known == key else None

    def __len__(self) -> int:
        return len(self._open)

    def _work(self) -> None:
        while True:
            self._queue.get().run()


@cache
def desk() -> Desk:
    """Return the desk of this process."""
    return Desk()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=desk.cache_clear)  # the parent's worker does not run in a forked child
