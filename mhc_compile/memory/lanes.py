"""One lookup in storage that is not on the compute device: ids travel there and rows back, on a stream of their own.

A `Lookup` has three steps. The computing thread sends the ids; whoever calls `run`, the same thread or the worker of
`mhc_compile.memory.prefetch`, reads each distinct row once and sends the rows back; and `result`, called in the
computing thread again, waits for them and expands duplicates. A lane is what differs between devices: nothing moves on
a CPU; CUDA uses pinned memory, a stream of its own for both copies, and events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhc_compile.memory.hot import Rows

Read = Callable[[Rows], list[Tensor]]
"""Different, ascending rows -> their planes on the CPU, `[rows, ...]` each."""
Finish = Callable[[list[Tensor]], Tensor]
"""Planes on the compute device -> values `[rows, width]`."""


class Lane:
    """How ids leave a compute device and rows reach it; this one is for computing on the CPU, where nothing moves."""

    def send_ids(self, rows: Tensor) -> None:
        """Begin to move `rows` to the CPU, in the computing thread; a copy, as the caller may change them later."""
        self._ids = rows.clone()

    def ids(self) -> Tensor:
        """Wait for `rows` and return them on the CPU; in any thread."""
        return self._ids

    def send(self, tensors: list[Tensor]) -> None:
        """Begin to move `tensors` to the device; in any thread."""
        self._moved = tensors

    def receive(self) -> list[Tensor]:
        """Return the tensors of `send` for use by the current stream; in the computing thread."""
        return self._moved


class CudaLane(Lane):
    """Computing on CUDA: both copies asynchronous, through pinned memory, on one stream for each device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)

    def send_ids(self, rows: Tensor) -> None:
        """Copy `rows` to pinned memory once the current stream has computed them."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._ids = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._ids.copy_(rows, non_blocking=True)
            rows.record_stream(self._stream)
            self._arrived = torch.cuda.Event(blocking=True)  # the worker sleeps instead of spinning
            self._arrived.record(self._stream)

    def ids(self) -> Tensor:
        """Wait for the pinned copy and return it."""
        self._arrived.synchronize()
        return self._ids

    def send(self, tensors: list[Tensor]) -> None:
        """Copy from pinned memory, which is kept until the transfer is complete."""
        with torch.cuda.stream(self._stream):
            self._pinned = [t.pin_memory() for t in tensors]
            self._moved = [t.to(self._device, non_blocking=True) for t in self._pinned]
            self._ready = self._stream.record_event()

    def receive(self) -> list[Tensor]:
        """Return the tensors; the current stream waits for the copy, the CPU does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._ready)
        for t in self._moved:
            t.record_stream(current)
        return self._moved


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def lane_for(device: torch.device) -> Lane:
    """Return a new lane. Devices other than CUDA and the CPU copy synchronously in `Lookup.result`."""
    return CudaLane(device) if device.type == "cuda" else Lane()


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
        """Read the rows; keep an error for `result`."""
        try:
            self._run()
        except Exception as error:  # whatever reading a table raises belongs to the caller, not to the worker
            self._error = error
        finally:
            self._done.set()
        return self

    def _run(self) -> None:
        flat: Any = self._lane.ids().reshape(-1).numpy()
        rows, inverse = np.unique(flat, return_inverse=True)
        if len(rows) and (rows[0] < 0 or rows[-1] >= self._limit):
            raise IndexError(f"rows from {rows[0]} to {rows[-1]} of a table with {self._limit} rows")
        self._lane.send([*self._read(rows), torch.from_numpy(inverse.reshape(-1))])

    def result(self, dtype: torch.dtype) -> Tensor:
        """Wait for `run`; return `[..., H * width]` in `dtype` on the device of the ids, or raise the error."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        *planes, inverse = (t.to(self._device) for t in self._lane.receive())
        values = self._finish(planes).to(dtype).index_select(0, inverse)
        return values.reshape(*self.shape[:-1], self.shape[-1] * self._width)
