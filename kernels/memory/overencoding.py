"""Over-Encoding (arXiv 2501.16975): n-grams of ids as numbers to the base V, reduced into small tables; plain PyTorch.

    OE(x)_t = E_1[x_t] + sum_{i=2..n} sum_{j=1..k} E_ij[h_i mod m_ij] W_ij
    h_i = x_t + x_{t-1} V + ... + x_{t-i+1} V^(i-1)

B batch, S tokens, C hidden, n the longest n-gram, k tables an order, H = (n - 1) * k tables in all, order-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import OverEncodingSpec


def overencoding_spec(vocab: int, rows: int, *, order: int = 3, heads: int = 1) -> OverEncodingSpec:
    """`heads` tables an order, their sizes the smallest from `rows` on that will do."""
    if min(vocab, rows, heads) < 1 or order < 2:
        raise MHCError("MHC220", f"over-encoding: vocab={vocab}, rows={rows}, order={order}, heads={heads}")
    found: list[int] = []
    at = rows
    while len(found) < heads * (order - 1):
        if math.gcd(at, vocab) == 1:
            found.append(at)
        at += 1
    return OverEncodingSpec(vocab=vocab, order=order, moduli=tuple(found))


def indices(ids: Tensor, reach: Tensor | None, spec: OverEncodingSpec, before: Tensor | None = None) -> Tensor:
    """`h_i mod m_ij` of every token and table: [B, S, H] int64.

    `ids` [B, S] from 0 to V - 1 (`hashing.check_ids`), `before` [B, n - 1] the ids in front of the call (None: nothing
    is). Left of that, and of the token's document where `reach` [B, S] is given (`hashing.reach`), an n-gram holds
    zeros. Reduced at every step, nothing exceeds `m * V`.
    """
    return torch.stack(_numbers(ids, reach, before, spec), -1)


def rows(ids: Tensor, reach: Tensor, before: Tensor | None, spec: OverEncodingSpec) -> Tensor:
    """As `indices`, of the one table that holds the rows of all, each behind those of the one before."""
    found = zip(_numbers(ids, reach, before, spec), spec.offsets, strict=True)
    return torch.stack([number + offset for number, offset in found], -1)


def _numbers(ids: Tensor, reach: Tensor | None, before: Tensor | None, spec: OverEncodingSpec) -> list[Tensor]:
    S, ids = ids.shape[1], ids.long()
    if before is None:
        before = ids.new_zeros(ids.shape[0], spec.order - 1)
    held = torch.cat([before, ids], 1)
    earlier = [held[:, spec.order - 1 - i : spec.order - 1 - i + S] for i in range(spec.order)]
    if reach is not None:
        earlier = [torch.where(reach >= i, x, 0) for i, x in enumerate(earlier)]
    found = []
    moduli = iter(spec.moduli)
    for length in range(2, spec.order + 1):
        for _ in range(spec.heads):
            modulus = next(moduli)
            number = torch.zeros_like(ids)
            for x in reversed(earlier[:length]):  # from the oldest token, as Horner does
                number = torch.remainder(number * spec.vocab + x, modulus)
            found.append(number)
    return found


def embed(
    ids: Tensor,
    reach: Tensor | None,
    embedding: Tensor,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor],
    spec: OverEncodingSpec,
) -> Tensor:
    """OE(x) [B, S, C] of `embedding` [V, C], `tables` [m_ij, C/(n k)] and `projections` [C/(n k), C]."""
    found = embedding[ids]
    numbers = indices(ids, reach, spec)
    for j, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        found = found + table[numbers[..., j]] @ projection
    return found
