"""The order of samples: a permutation each epoch, the same from any place on, and as random as it should be."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.runtime.data.order import Order

samples = st.one_of(st.integers(1, 70), st.integers(1, 3000))
seeds = st.integers(0, 2**70)


@given(samples, seeds, st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_sample_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(Order(count, seed)(epoch * count, count)) == list(range(count))


@given(samples, seeds, st.integers(0, 5000), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_any_place_can_be_asked_for(count: int, seed: int, first: int, one: int, two: int) -> None:
    order = Order(count, seed)
    parts = [Order(count, seed)(first, one), order(first + one, two)]
    assert order(first, one + two).tolist() == np.concatenate(parts).tolist()


@given(st.integers(2**30, 2**50), seeds, st.integers(0, 2**50))
@settings(max_examples=30, deadline=None)
def test_huge_epochs_cost_nothing(count: int, seed: int, first: int) -> None:
    found = Order(count, seed)(first, 64)
    assert ((found >= 0) & (found < count)).all()
    epochs = (np.arange(first, first + 64)) // count
    assert len(set(zip(found.tolist(), epochs.tolist(), strict=True))) == 64


def test_the_order_is_what_it_was_in_earlier_versions() -> None:
    # A run that is resumed under another version must go on where it was.
    assert Order(10, 0)(0, 20).tolist() == [9, 1, 3, 5, 0, 6, 2, 7, 8, 4, 8, 9, 1, 4, 6, 0, 5, 2, 3, 7]
    assert Order(10**9, 7)(10**9 - 2, 4).tolist() == [62081284, 67652925, 52077545, 782704956]


def test_every_permutation_is_as_likely() -> None:
    # 24 permutations of 4 samples over 1200 epochs: chi-squared with 23 degrees of freedom exceeds 50 once in 1000.
    order = Order(4, 1)
    counts = Counter(tuple(order(4 * epoch, 4).tolist()) for epoch in range(1200))
    assert sum((counts[p] - 50) ** 2 / 50 for p in counts) + 50 * (24 - len(counts)) < 50


def test_places_are_not_related_to_samples() -> None:
    found = Order(10_000, 3)(0, 10_000).astype(float)
    for shift in (0, 1, 2, 100):
        other = np.arange(10_000.0) if shift == 0 else np.roll(found, shift)
        assert abs(np.corrcoef(found, other)[0, 1]) < 0.04  # four standard deviations
    assert Order(10_000, 3)(0, 100).tolist() != Order(10_000, 4)(0, 100).tolist()
    assert Order(10_000, 3)(0, 100).tolist() != Order(10_000, 3)(10_000, 100).tolist()
