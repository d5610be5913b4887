"""Manifolds whose H is a mixture of permutations: a polynomial in weights that are softmaxes of the logits.

    circulant       H = sum_k w_k P^k with the shift P by one stream: n logits
    permutations    H = sum over all permutations (arXiv 2601.05732): n! logits
    kronecker       H = product of 2 x 2 mixtures of keep and swap (arXiv 2601.21579): 2 log2 n logits, by pairs

All are doubly stochastic to rounding. The kernels of both targets are generated from the terms given here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from mhc_compile.kernels.spec import StreamSpec

MIXTURES = ("circulant", "permutations", "kronecker")
MAX_ROWS = 24
"""Kernels keep a weight and its gradient per logit in registers: as many as four streams have permutations."""

Entry = list[tuple[int, ...]]
"""The terms whose sum is an entry of H, each the weights, by their logit's number, that it is the product of."""


def group_size(spec: StreamSpec) -> int:
    """Return over how many consecutive logits each softmax goes."""
    return 2 if spec.manifold == "kronecker" else spec.mix_rows


def entries_of(spec: StreamSpec) -> list[list[Entry]]:
    """Return the terms of H `[n][n]`."""
    n = spec.streams
    H: list[list[Entry]] = [[[] for _ in range(n)] for _ in range(n)]
    match spec.manifold:
        case "circulant":
            for i, k in itertools.product(range(n), repeat=2):
                H[i][(i + k) % n].append((k,))
        case "permutations":
            for number, order in enumerate(itertools.permutations(range(n))):
                for i, j in enumerate(order):
                    H[i][j].append((number,))
        case "kronecker":
            bits = n.bit_length() - 1
            for i, j in itertools.product(range(n), repeat=2):
                # The leftmost factor acts on the highest bit of the stream's number.
                H[i][j].append(tuple(2 * f + ((i ^ j) >> (bits - 1 - f) & 1) for f in range(bits)))
    return H


def entry_text(entry: Entry, weight: str) -> str:
    """Return the text of an entry of H, where `weight` formats the name of a weight."""
    return " + ".join(" * ".join(weight.format(row) for row in term) for term in entry)


def gradient_text(spec: StreamSpec, row: int, weight: str, gradient: str) -> str:
    """Return the text of the gradient of weight `row` from those of H, named by `gradient` with i and j."""
    parts = [
        " * ".join([gradient.format(i, j), *(weight.format(other) for other in term if other != row)])
        for i, j, term in _terms(spec)
        if row in term
    ]
    return " + ".join(parts)


def _terms(spec: StreamSpec) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    for i, line in enumerate(entries_of(spec)):
        for j, entry in enumerate(line):
            for term in entry:
                yield i, j, term
