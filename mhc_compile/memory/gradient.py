"""Gradients of tables: a few rows with values, summed over duplicates and over backward passes in a fixed order."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhc_compile.diagnostics import warn
from mhc_compile.kernels.memory.row_gradients_cpp import sum_duplicates, takes

PATIENCE = 32
"""Backward passes whose gradients may accumulate before a warning."""


class RowGradient(NamedTuple):
    """`rows` `[r]` int64, ascending and all different, and the gradient of each: `values` `[r, width]` float32."""

    rows: torch.Tensor
    values: torch.Tensor


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of `rows` `[m]`, ascending, and the index of each of the m among them."""
    if rows.device.type == "cpu":
        # torch.unique of two threads that share a core with others takes a hundred times as long.
        unique, inverse = np.unique(rows.numpy(), return_inverse=True)
        return torch.from_numpy(unique), torch.from_numpy(inverse)
    return torch.unique(rows, return_inverse=True)


def coalesce(rows: Tensor, values: Tensor) -> RowGradient:
    """Sum `values` `[m, width]` over duplicates in `rows` `[m]`, in float32.

    Duplicates are added in the order in which they come, so that results are bit-identical from run to run.
    """
    values = values.to(torch.float32)
    if takes(values):
        return RowGradient(*sum_duplicates(rows, values))
    rows, inverse = distinct(rows)
    if values.device.type == "cpu":
        return RowGradient(rows, torch.zeros(len(rows), values.shape[-1]).index_add_(0, inverse, values))
    # index_add_ uses atomics on a GPU; this operator sorts.
    return RowGradient(rows, torch.ops.aten.embedding_dense_backward(values, inverse, len(rows), -1, False))


def merge(parts: list[RowGradient]) -> RowGradient:
    """Return the sum of several gradients, on the device of the first."""
    if len(parts) == 1:
        return parts[0]
    device = parts[0].rows.device
    return coalesce(torch.cat([p.rows.to(device) for p in parts]), torch.cat([p.values.to(device) for p in parts]))


class PendingGradient:
    """The gradients of backward passes since an optimizer took them. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[RowGradient] = []
        self._passes = 0

    def add(self, part: RowGradient, name: str = "") -> None:
        """Add the gradient of a backward pass, which nothing else changes.

        Warns once of the table `name` with MHC227 when `PATIENCE` passes have accumulated; never without a name.
        """
        with self._lock:
            self._parts.append(part)
            # Each row is merged a logarithmic number of times, however many passes accumulate.
            while len(self._parts) > 1 and len(self._parts[-1].rows) >= len(self._parts[-2].rows):
                self._parts[-2:] = [merge(self._parts[-2:])]
            self._passes += 1
            impatient = bool(name) and self._passes == PATIENCE
        if impatient:
            warn("MHC227", f"{name}: {PATIENCE} backward passes")

    def peek(self) -> RowGradient | None:
        """Return the sum so far, or None."""
        with self._lock:
            if len(self._parts) > 1:
                self._parts = [merge(self._parts)]
            return self._parts[0] if self._parts else None

    def take(self) -> RowGradient | None:
        """Return the sum so far, or None, and clear it."""
        with self._lock:
            parts, self._parts, self._passes = self._parts, [], 0
        return merge(parts) if parts else None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PendingGradient.__init__(self)  # a copy begins empty
