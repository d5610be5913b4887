"""Notice a lost rank: one whose answer does not come within its time, or that gives no sign of life."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from mhc_compile.diagnostics import MHCError

PULSE = 0.5
"""Seconds between signs of life, and between looks for those of others."""
_LEFT = 1 << 40
"""What a rank that leaves adds to its signs of life."""


def lost(rank: int, size: int, action: str, step: int | None, seconds: float, error: BaseException) -> MHCError:
    """Return MHC605 for an error of a collective or a message."""
    while error.__cause__ is not None:
        error = error.__cause__
    where = action if step is None else f"step {step}, {action}"
    return MHCError("MHC605", f"rank {rank} of {size}, {where}, after {seconds:.1f} s: {first_line(error)}")


@dataclass(frozen=True)
class _Action:
    """What this process is doing, since when."""

    name: str
    step: int | None
    timeout: float
    begun: float = field(default_factory=time.monotonic)


class Watch:
    """Ends this process where an action hangs without an error of its own, or a peer is lost in an action.

    gloo raises once its timeout has passed. A thread that is blocked elsewhere (in a driver, in a library that waits
    for a lost peer) cannot be asked to end: here the process prints a coded message a little later and exits with 1.

    A thread gives a sign of life in `store`, and looks for those of others: the first rank for all, the others for the
    first one. A peer without any for `limit` seconds is lost, whatever this rank is doing; so one that is stopped while
    it compiles is not waited for as long as compiling may take.
    """

    def __init__(self, rank: int, size: int, store: Store | None = None, limit: float = 600.0) -> None:
        self.rank, self.size, self.limit = rank, size, limit
        # A connection of its own: this thread's questions do not wait for the answers to others.
        shared: Any = store  # its class declares no `clone`, which all of them have
        self._store: Any = shared.clone() if shared is not None and size > 1 else None
        watched = range(1, size) if rank == 0 else (0,)
        self._signs = dict.fromkeys(watched, (-1, time.monotonic()))
        """The last sign of life of each peer, and when it was seen first."""
        self._now: _Action | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="mhc-watch", daemon=True).start()

    @contextmanager
    def over(self, name: str, step: int | None, timeout: float) -> Iterator[None]:
        """Watch what is done here. An inner action has its own time; the outer one's begins anew after it."""
        outer, self._now = self._now, _Action(name, step, timeout)
        try:
            yield
        finally:
            self._now = outer and _Action(outer.name, outer.step, outer.timeout)

    def beat(self) -> None:
        """Begin the time of the present action anew, because it makes progress."""
        if (now := self._now) is not None:
            self._now = _Action(now.name, now.step, now.timeout)

    def close(self) -> None:
        """Stop watching; peers do not wait for signs of life any more."""
        self._closed.set()
        self._add(self.rank, _LEFT)

    def _run(self) -> None:
        begun = _Action("between two actions", None, math.inf)
        while not self._closed.wait(PULSE):
            now = self._now
            if now is not None and _late(now.begun, now.timeout):
                self._end(now, TimeoutError("no answer, and no error either"))
            if silent := self._silent():
                text = f"no sign of life of {', '.join(f'rank {r}' for r in silent)} for more than {self.limit:g} s"
                self._end(now or begun, TimeoutError(text))

    def _silent(self) -> list[int]:
        """Give a sign of life, and return the peers that have given none for too long."""
        self._add(self.rank, 1)
        for other, (sign, _) in self._signs.items():
            count = self._add(other, 0)
            if count != sign:
                self._signs[other] = count, time.monotonic()
        if self._store is None:
            return []
        return [other for other, (sign, seen) in self._signs.items() if sign < _LEFT and _late(seen, self.limit)]

    def _add(self, rank: int, signs: int) -> int:
        """Add to the signs of life of a rank, and return how many there are then."""
        if self._store is not None:
            try:
                return int(self._store.add(f"alive/{rank}", signs))
            except (dist.DistError, RuntimeError):  # who holds the store has left, which ends every collective
                self._store = None
        return 0

    def _end(self, action: _Action, error: TimeoutError) -> None:
        seconds = time.monotonic() - action.begun
        print(lost(self.rank, self.size, action.name, action.step, seconds, error), file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def _late(begun: float, timeout: float) -> bool:
    """Return whether so much more time than `timeout` has passed that an error would have come by itself."""
    return time.monotonic() - begun > 1.25 * timeout + 5


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
