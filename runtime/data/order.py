"""The order of samples: a permutation a seed and an epoch determine, computed for single places, never written out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
BLOCK = 1000
"""Places in which every folder of a mixture has its exact part."""
_LEAST_HALF = 3
"""Bits of half a number at least, so that few samples get as many permutations as many do."""


class Order:
    """Places 0, 1, 2, ... of an endless order of `samples` samples: each once an epoch, every epoch another way.

    A Feistel network (Luby and Rackoff, 1988) permutes the numbers of an even number of bits; where it leads out of the
    range it is applied again (cycle walking: Black and Rogaway, 2002), which permutes exactly the range. So a place
    costs the same wherever it is, and nothing is kept. The order depends on no library's random numbers.
    """

    def __init__(self, samples: int, seed: int) -> None:
        assert samples > 0
        self.samples = samples
        self.seed = seed
        self._half = max(_LEAST_HALF, -(-(samples - 1).bit_length() // 2))

    def __call__(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the samples at places `first` to `first + count`, that one excluded: int64 [count]."""
        return self.at(np.arange(first, first + count))

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples at any places: int64, as many."""
        epochs, within = places // self.samples, places % self.samples
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            samples[epochs == epoch] = self._permute(within[epochs == epoch], int(epoch))
        return samples

    def _permute(self, within: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        digest = hashlib.shake_128(f"{self.seed} {epoch}".encode()).digest(8 * _ROUNDS)
        keys = np.frombuffer(digest, "<u8")
        samples = self._feistel(within.astype(np.uint64), keys)
        while (outside := samples >= self.samples).any():
            samples[outside] = self._feistel(samples[outside], keys)
        return samples.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half = np.uint64(self._half)
        shift = np.uint64(64 - self._half)
        left, right = values >> half, values & np.uint64((1 << self._half) - 1)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) >> shift)
        return left << half | right


class Mixture:
    """Places 0, 1, 2, ... of an endless order over several folders, so many of every `BLOCK` places for each of them.

    A block has the next samples of each folder's own `Order`, mixed by another one. `parts`: in proportion, rounded to
    whole places.
    """

    def __init__(self, samples: Sequence[int], parts: Sequence[float], seed: int) -> None:
        self._orders = [Order(count, seed) for count in samples]
        self._mixed = Order(BLOCK, seed)
        ends = np.rint(np.cumsum([0.0, *parts]) / sum(parts) * BLOCK).astype(np.int64)
        self._ends, self.places = ends, np.diff(ends)

    def __call__(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the folders at places `first` to `first + count`, that one excluded, and the samples in them."""
        if len(self._orders) == 1:
            return [(0, int(sample)) for sample in self._orders[0](first, count)]
        within = self._mixed(first, count)
        folders = np.searchsorted(self._ends, within, side="right") - 1
        blocks = np.arange(first, first + count) // BLOCK
        own = blocks * self.places[folders] + within - self._ends[folders]
        samples = np.empty_like(own)
        for k, order in enumerate(self._orders):
            samples[folders == k] = order.at(own[folders == k])
        return list(zip(folders.tolist(), samples.tolist(), strict=True))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on all of a value's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
