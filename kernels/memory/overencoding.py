"""Over-Encoding (arXiv 2501.16975): n-grams of ids as numbers to the base V, reduced into small tables; plain PyTorch.

    OE(x)_t = E_1[x_t] + sum_{i=2..n} sum_{j=1..k} E_ij[h_i mod m_ij] W_ij
    h_i = x_t + x_{t-1} V + ... + x_{t-i+1} V^(i-1)

B batch, S tokens, C hidden, n the longest n-gram, k tables an order, H = (n - 1) * k tables in all, order-major.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import OverEncodingSpec


def overencoding_spec(vocab: int, rows: int, *, order: int = 3, heads: int = 1) -> OverEncodingSpec:
    """Return `heads` tables per order; their sizes are the smallest ones from `rows` on that are coprime with `vocab`.

    Raises MHC220 for numbers that are too small.
    """
    if min(vocab, rows, heads) < 1 or order < 2:
        raise MHCError("MHC220", f"over-encoding: vocab={vocab}, rows={rows}, order={order}, heads={heads}")
    coprime = (size for size in itertools.count(rows) if math.gcd(size, vocab) == 1)
    moduli = tuple(itertools.islice(coprime, heads * (order - 1)))
    return OverEncodingSpec(vocab=vocab, order=order, moduli=moduli)


def rows(ids: Tensor, reach: Tensor | None, before: Tensor | None, spec: OverEncodingSpec) -> Tensor:
    """Return `h_i mod m_ij` of every token and table plus the table's first row: [B, S, H] int64.

    `ids` [B, S] from 0 to V - 1 (`hashing.check_ids`), `before` [B, n - 1] the ids before the call, or None. Before
    them, and before the token's document where `reach` [B, S] is given (`hashing.reach`), an n-gram holds zeros.
    Reduced at every step, no number exceeds `m * V`.
    """
    S, ids = ids.shape[1], ids.long()
    if before is None:
        before = ids.new_zeros(ids.shape[0], spec.order - 1)
    whole = torch.cat([before, ids], 1)
    earlier = [whole[:, spec.order - 1 - i : spec.order - 1 - i + S] for i in range(spec.order)]
    if reach is not None:
        earlier = [torch.where(reach >= i, x, 0) for i, x in enumerate(earlier)]
    numbers = []
    for table, (modulus, offset) in enumerate(zip(spec.moduli, spec.offsets, strict=True)):
        number = torch.zeros_like(ids)
        for x in reversed(earlier[: 2 + table // spec.heads]):  # from the oldest token, as Horner does
            number = torch.remainder(number * spec.vocab + x, modulus)
        numbers.append(number + offset)
    return torch.stack(numbers, -1)
