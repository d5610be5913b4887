"""Over-Encoding (arXiv 2501.16975): n-grams of ids as numbers to the base V, reduced into small tables; plain PyTorch.

    OE(x)_t = E_1[x_t] + sum_{i=2..n} sum_{j=1..k} E_ij[h_i mod m_ij] W_ij
    h_i = x_t + x_{t-1} V + ... + x_{t-i+1} V^(i-1)

B batch, S tokens, C hidden, n the longest n-gram, k tables an order, H = (n - 1) * k tables in all, order-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError


@dataclass(frozen=True, kw_only=True)
class OverEncodingSpec:
    """Sizes of the tables. Raises `MHCError` MHC220 for those that cannot hash n-grams of the vocabulary."""

    vocab: int
    """V, the base."""
    order: int = 3
    """n, the longest n-gram."""
    moduli: tuple[int, ...]
    """m_ij, order-major: distinct, and coprime with V, or the earlier tokens of an n-gram would not tell rows apart."""

    def __post_init__(self) -> None:
        if self.vocab < 1 or self.order < 2 or not self.moduli or len(self.moduli) % (self.order - 1):
            raise MHCError("MHC220", f"{len(self.moduli)} tables for orders 2 to {self.order} of {self.vocab} ids")
        if min(self.moduli) < 1 or len(set(self.moduli)) < len(self.moduli):
            raise MHCError("MHC220", f"moduli {self.moduli} are not positive and distinct")
        if common := [m for m in self.moduli if math.gcd(m, self.vocab) != 1]:
            raise MHCError("MHC220", f"modulus {common[0]} has a divisor in common with {self.vocab}")
        if max(self.moduli) * self.vocab >= 1 << 63:  # (m - 1) * V + V - 1 is the largest number on the way
            raise MHCError("MHC220", f"modulus {max(self.moduli)} is too large for {self.vocab} ids in 64 bits")

    @property
    def heads(self) -> int:
        """k, tables an order."""
        return len(self.moduli) // (self.order - 1)


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


def indices(ids: Tensor, reach: Tensor | None, spec: OverEncodingSpec) -> Tensor:
    """`h_i mod m_ij` of every token and table: [B, S, H] int64.

    `ids` [B, S] from 0 to V - 1 (`hashing.check_ids`). Left of the call, and of the token's document where `reach`
    [B, S] is given (`hashing.reach`), an n-gram holds zeros. Reduced at every step, nothing exceeds `m * V`.
    """
    S, ids = ids.shape[1], ids.long()
    held = torch.cat([ids.new_zeros(ids.shape[0], spec.order - 1), ids], 1)
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
    return torch.stack(found, -1)


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
    rows = indices(ids, reach, spec)
    for j, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        found = found + table[rows[..., j]] @ projection
    return found
