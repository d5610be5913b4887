"""Lookups that run while the device computes: a worker thread, and tickets to claim their results by.

A ticket is a hint, never a promise: whoever claims one that is unknown, was claimed before, or is out of date gets None
and looks the rows up itself. So a recomputed or removed claim costs time, not correctness.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from mhc_compile.memory.lanes import Lookup

INDUCTOR = {"reorder_for_locality": False}
"""Options of Inductor for graphs with `prefetch`: in inference it moves an op to where its result is used, so that a
prefetch would begin behind what it was to run beside."""
KEPT = 64
"""Lookups that may wait to be claimed; the oldest is dropped for one more."""


class Answer(Protocol):
    """What a ticket stands for."""

    def result(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`; waits for them."""


class Desk:
    """The lookups under way in this process, and the thread that runs them, one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Lookup] = SimpleQueue()
        self._open: OrderedDict[int, tuple[Hashable, Answer]] = OrderedDict()
        self._numbers = itertools.count(1)
        self._worker: threading.Thread | None = None

    def submit(self, lookup: Lookup, key: Hashable) -> int:
        """Run `lookup` in the worker; returns its ticket. `key` says for which state of which table it is good."""
        with self._lock:
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="mhc-prefetch", daemon=True)
                self._worker.start()
        ticket = self.keep(lookup, key)
        self._queue.put(lookup)
        return ticket

    def keep(self, answer: Answer, key: Hashable) -> int:
        """A ticket for what is under way already."""
        with self._lock:
            ticket = next(self._numbers)
            self._open[ticket] = (key, answer)
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
        return ticket

    def claim(self, ticket: int, key: Hashable) -> Answer | None:
        """The lookup of a ticket if it is good for `key`; a ticket is good once."""
        with self._lock:
            held = self._open.pop(ticket, None)
        return held[1] if held is not None and held[0] == key else None

    def __len__(self) -> int:
        return len(self._open)

    def _work(self) -> None:
        while True:
            self._queue.get().run()


_DESK: list[Desk] = []
_MAKING = threading.Lock()


def desk() -> Desk:
    """The one of this process."""
    with _MAKING:
        if not _DESK:
            _DESK.append(Desk())
        return _DESK[0]


def _forget() -> None:
    """In a forked child: the parent's worker is not here."""
    global _MAKING
    _DESK.clear()
    _MAKING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
