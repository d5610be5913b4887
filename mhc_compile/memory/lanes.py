"""One lookup in storage that is not on the compute device: ids there, rows back, on a stream of its own.

A `Lookup` goes through three hands. Its maker (the thread that computes) sends the ids off; whoever calls `run`, the
same thread or the worker of `mhc_compile.memory.prefetch`, reads the rows, each one once, and sends them
back; and `result`, called by the maker's thread again, waits for them and puts them in their places. A lane is what
differs between devices: nothing on a CPU; on CUDA pinned memory, a stream of its own for both copies, and events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mhc_compile.memory.hot import Rows

Read = Callable[[Rows], list[Tensor]]
"""Different, ascending rows -> their planes on the CPU, `[rows, ...]` each."""
Finish = Callable[[list[Tensor]], Tensor]
"""Planes on the compute device -> values `[rows, width]`."""


class Lane(Protocol):
    """How ids leave a compute device and rows reach it."""

    def send_ids(self, rows: Tensor) -> None:
        """Begin to move `rows` to the CPU; in the computing thread."""

    def ids(self) -> Tensor:
        """`rows` on the CPU, when they have arrived; in any thread."""

    def send(self, tensors: list[Tensor]) -> None:
        """Begin to move `tensors` to the device; in any thread."""

    def receive(self) -> list[Tensor]:
        """What `send` moved, for use by the current stream; in the computing thread."""


class HostLane:
    """Computing on the CPU: nothing moves."""

    def send_ids(self, rows: Tensor) -> None:
        """Keep `rows`: a copy, because whoever reads them later must not see what became of them."""
        self._ids = rows.clone()

    def ids(self) -> Tensor:
        """The copy."""
        return self._ids

    def send(self, tensors: list[Tensor]) -> None:
        """Keep `tensors`."""
        self._moved = tensors

    def receive(self) -> list[Tensor]:
        """The same tensors."""
        return self._moved


class CudaLane:
    """Computing on CUDA: both copies asynchronous, through pinned memory, on one stream for each device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)

    def send_ids(self, rows: Tensor) -> None:
        """Copy to pinned memory behind what the current stream has computed so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._ids = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._ids.copy_(rows, non_blocking=True)
            rows.record_stream(self._stream)
            self._arrived = torch.cuda.Event(blocking=True)  # the worker sleeps instead of spinning
            self._arrived.record(self._stream)

    def ids(self) -> Tensor:
        """The pinned copy, when it is complete."""
        self._arrived.synchronize()
        return self._ids

    def send(self, tensors: list[Tensor]) -> None:
        """Copy from pinned memory; the pinned copies live until the transfer is over."""
        with torch.cuda.stream(self._stream):
            self._pinned = [t.pin_memory() for t in tensors]
            self._moved = [t.to(self._device, non_blocking=True) for t in self._pinned]
            self._ready = self._stream.record_event()

    def receive(self) -> list[Tensor]:
        """The tensors; the current stream waits for the copy, the CPU does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._ready)
        for t in self._moved:
            t.record_stream(current)
        return self._moved


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def lane_for(device: torch.device) -> Lane:
    """A new lane. Other devices than CUDA and the CPU copy synchronously in `Lookup.result`."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class Lookup:
    """`rows` `[..., H]` of a table with `limit` rows, `width` channels each. `run` once, then `result`."""

    def __init__(self, rows: Tensor, limit: int, width: int, read: Read, finish: Finish) -> None:
        self.shape = tuple(rows.shape)
        self._device, self._limit, self._width = rows.device, limit, width
        self._read, self._finish = read, finish
        self._lane = lane_for(rows.device)
        self._lane.send_ids(rows if rows.device.type in ("cuda", "cpu") else rows.cpu())
        self._done = threading.Event()
        self._error: Exception | None = None

    def run(self) -> Lookup:
        """Read the rows. An error is kept for `result`."""
        try:
            self._run()
        except Exception as error:  # whatever reading a table raises: the worker lives on, and who asked gets it
            self._error = error
        finally:
            self._done.set()
        return self

    def _run(self) -> None:
        flat: Any = self._lane.ids().reshape(-1).numpy()
        found, inverse = np.unique(flat, return_inverse=True)
        if len(found) and (found[0] < 0 or found[-1] >= self._limit):
            raise IndexError(f"rows from {found[0]} to {found[-1]} of a table with {self._limit} rows")
        self._lane.send([*self._read(found), torch.from_numpy(inverse.reshape(-1))])

    def result(self, dtype: torch.dtype) -> Tensor:
        """The values `[..., H * width]` in `dtype` on the device of the ids. Waits for `run`; raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        *planes, inverse = (t.to(self._device) for t in self._lane.receive())
        values = self._finish(planes).to(dtype).index_select(0, inverse)
        return values.reshape(*self.shape[:-1], self.shape[-1] * self._width)
