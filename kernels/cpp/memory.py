"""Memory for large outputs on a CPU, used again once nothing holds it.

PyTorch's CPU allocator returns large blocks to the system, so every call pays page faults for its outputs: 18 ms for 64
MiB where the kernel itself takes 4. Here a block is handed out again when this pool holds the only reference to it.
"""

from __future__ import annotations

import math
from collections import deque
from threading import Lock

import torch
from torch import Tensor, UntypedStorage

# Below this the C library keeps freed memory itself.
SMALLEST = 1 << 22
# Blocks not asked for again among so many requests are given back to the system.
PATIENCE = 512


class Pool:
    """Blocks by size, oldest request first."""

    def __init__(self) -> None:
        self._blocks: dict[int, deque[tuple[int, UntypedStorage]]] = {}
        self._requests = 0
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous CPU tensor."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:  # until a tensor holds the block: before that, another thread would take it for free
            return torch.empty(0, dtype=dtype).set_(self._take(size)).view(shape)

    def _take(self, size: int) -> UntypedStorage:
        self._requests += 1
        if self._requests % PATIENCE == 0:
            self._forget()
        blocks = self._blocks.setdefault(size, deque())
        for _ in range(len(blocks)):
            _, storage = blocks.popleft()
            # Nobody but this pool holds it: no tensor, and so no view or autograd graph either.
            free = torch._C._storage_Use_Count(storage._cdata) == 1
            blocks.append((self._requests, storage))
            if free:
                return storage
        storage = torch.empty(size, dtype=torch.uint8).untyped_storage()
        blocks.append((self._requests, storage))
        return storage

    def _forget(self) -> None:
        oldest = self._requests - PATIENCE
        for size, blocks in list(self._blocks.items()):
            kept = deque(b for b in blocks if b[0] > oldest)
            if kept:
                self._blocks[size] = kept
            else:
                del self._blocks[size]


POOL = Pool()
