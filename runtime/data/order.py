"""The order of samples: a permutation a seed and an epoch determine, computed for single places, never written out."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
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
        places = np.arange(first, first + count)
        epochs, within = places // self.samples, places % self.samples
        parts = [self._permute(within[epochs == epoch], int(epoch)) for epoch in np.unique(epochs)]
        return np.concatenate([np.empty(0, np.int64), *parts])

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


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on all of a value's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
