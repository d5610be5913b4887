"""Which n-gram a token ends and which rows of a table it reads, in plain PyTorch (arXiv 2601.07372, section 2).

B batch, S tokens of a call, N = `HashSpec.order`, H hashes in all. Everything is int64 and wraps around.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import HashSpec

NOT_USED = -1
"""Stands for an end-of-text id where documents do not end by one."""


def reach(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, carried: Tensor | None, eos: int = NOT_USED
) -> Tensor:
    """Return how many tokens before each one belong to its document: [B, S] int64, 0 for a document's first token.

    `ids` [B, S], as the tokenizer gives them. A document begins with the call unless `carried` [B] says how many of its
    tokens lie before (`carry` gives that), and inside the call

    * after padding and with every padding token: `mask` [B, T >= S], of any dtype, its last S columns count;
    * where `positions` [B or 1, S] do not go on by one, or begin with 0 although tokens are carried;
    * after the id `eos`, unless that is -1.
    """
    S = ids.shape[1]
    at = torch.arange(S, device=ids.device)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if mask is not None:
        padding = mask[:, mask.shape[1] - S :] == 0
        begins = begins | padding | _later(padding[:, :-1])
    if positions is not None:
        begins = begins | _later(positions[:, 1:] != positions[:, :-1] + 1)
        if carried is not None:
            begins = begins | ((positions == 0) & (at == 0))
    if eos != NOT_USED:
        begins = begins | _later(ids[:, :-1] == eos)
    # Where the token's document began: before the call, or at the last beginning up to the token.
    before = at.new_zeros(1, 1) if carried is None else -carried.unsqueeze(1)
    start = torch.where(begins, at, before)
    return at - torch.cummax(start, dim=1).values


def carry(reach: Tensor, ids: Tensor, mask: Tensor | None, eos: int = NOT_USED) -> Tensor:
    """Return the next call's `carried` [B] int64, from `reach` and `ids` [B, S >= 1] of this one."""
    ended = torch.zeros_like(ids[:, -1], dtype=torch.bool)
    if mask is not None:
        ended = ended | (mask[:, -1] == 0)
    if eos != NOT_USED:
        ended = ended | (ids[:, -1] == eos)
    return torch.where(ended, 0, reach[:, -1] + 1)


def window(ids: Tensor, before: Tensor | None, spec: HashSpec) -> Tensor:
    """Return the next call's `before` [B, N - 1]: the last (compressed) ids, left-filled."""
    whole = _with_earlier(ids, before, spec)
    return whole[:, whole.shape[1] - (spec.order - 1) :]


def rows(ids: Tensor, reach: Tensor, before: Tensor | None, spec: HashSpec) -> Tensor:
    """Return the rows of the layer's table that each token reads: [B, S, H] int64, order-major, then head.

    `ids` [B, S] compressed, `reach` [B, S] as `reach` gives it, `before` [B, N - 1] the compressed ids before the
    call (None: nothing is). Where `reach` ends the n-gram, `spec.fill` stands for its earlier tokens.
    """
    S, N, ids = ids.shape[1], spec.order, ids.long()
    whole = _with_earlier(ids, before, spec)
    mix = ids * spec.multipliers[0]
    numbers, offsets = [], iter(spec.offsets)
    moduli = iter(spec.moduli)
    for i in range(1, N):
        earlier = whole[:, N - 1 - i : N - 1 - i + S]
        mix = mix ^ (torch.where(reach >= i, earlier, spec.fill) * spec.multipliers[i])
        numbers += [torch.remainder(mix, next(moduli)) + next(offsets) for _ in range(spec.heads)]
    return torch.stack(numbers, -1)


def check_ids(ids: Tensor, vocab: int) -> None:
    """Raise `MHCError` MHC221 where one of `ids` [...] is `vocab` or more; on a GPU this synchronises."""
    if ids.numel() and (largest := int(ids.max())) >= vocab:
        raise MHCError("MHC221", f"id {largest} in a vocabulary of {vocab}")


def _with_earlier(ids: Tensor, before: Tensor | None, spec: HashSpec) -> Tensor:
    """Return the N - 1 ids before the call and those of the call: [B, N - 1 + S]."""
    if before is None:
        before = ids.new_full((ids.shape[0], spec.order - 1), spec.fill)  # F.pad would round a large fill
    return torch.cat([before, ids], 1)


def _later(x: Tensor) -> Tensor:
    """Shift `x` [B, S - 1] by one token: [B, S], False for the first."""
    return F.pad(x, (1, 0), value=False)
