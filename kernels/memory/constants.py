"""Multipliers and moduli of n-gram hashes as released systems derive them (arXiv 2601.07372 and Qwen4-Exp)."""

from __future__ import annotations

import numpy as np

LAYER_PRIME = 10007
"""Seeds of consecutive layers are this far apart, in both derivations."""
_MASK = (1 << 64) - 1
_LARGEST = (1 << 63) - 1


def pcg64_multipliers(seed: int, layer: int, order: int, vocab: int) -> tuple[int, ...]:
    """Return `order` odd multipliers from numpy's PCG64; `layer` is the 0-based index of the layer in the model."""
    drawn = np.random.default_rng(seed + LAYER_PRIME * layer).integers(0, _half(vocab), order, dtype=np.int64)
    return tuple(2 * int(r) + 1 for r in drawn)


def splitmix64_multipliers(seed: int, ordinal: int, order: int, vocab: int) -> tuple[int, ...]:
    """Return `order` odd multipliers from SplitMix64, whose state steps between them; `ordinal` counts memory layers.

    The state stands one step ahead of the generator's own: the first multiplier comes from its second output.
    """
    state = seed + LAYER_PRIME * ordinal
    outputs = (mixed(state + (i + 2) * GAMMA) for i in range(order))
    return tuple(2 * (x % _half(vocab)) + 1 for x in outputs)


GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's step: the odd integer nearest to 2^64 over the golden ratio (Steele, Lea, Flood, OOPSLA 2014)."""


def mixed(state: int) -> int:
    """Return SplitMix64's output for a 64-bit state: Stafford's thirteenth variant of MurmurHash3's finalizer."""
    z = state & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def primes_from(base: int, count: int) -> tuple[int, ...]:
    """Return the first `count` primes that are not less than `base`."""
    from sympy import nextprime

    primes = [base - 1]
    for _ in range(count):
        primes.append(int(nextprime(primes[-1])))
    return tuple(primes[1:])


def _half(vocab: int) -> int:
    """Return the exclusive bound of m: `2 * m + 1` times an id of the vocabulary stays under 2^63."""
    return max(1, _LARGEST // vocab // 2)
