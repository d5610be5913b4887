"""Corrupt token ids as Seed Diffusion does (arXiv 2508.02193): by masks, and by edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from mhc_compile.diagnostics import MHCError


def mask_tokens(
    ids: Tensor, rate: Tensor, mask_token: int, *, valid: Tensor | None = None, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return ids [B, S] of which each is replaced by `mask_token` with probability `rate` [B, 1], and where.

    Where `valid` [B, S] is False, ids stay: padding, a prompt.
    """
    masked = torch.rand(ids.shape, generator=generator, device=ids.device) < rate
    if valid is not None:
        masked &= valid
    return torch.where(masked, mask_token, ids), masked


def edit_tokens(
    ids: Tensor,
    strength: Tensor,
    mask_token: int,
    vocabulary: int,
    *,
    valid: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Return ids [B, S] after `floor(length * strength)` edits of each row; `strength` is [B], `length` its valid ids.

    What is `edited` is fitted to its row again: cut at the end, or filled there with `mask_token`. Where `valid`
    [B, S] is False, ids stay. `generator` draws one seed for each row, so that a row's edits do not depend on the ids
    of others. Raises MHC204 for a strength outside of [0, 1].
    """
    if bool(((strength < 0) | (strength > 1)).any()):
        raise MHCError("MHC204", f"edits of {strength.tolist()} of a row", way_out="give shares from 0 to 1")
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    seeds = torch.randint(2**62, (len(ids),), generator=generator, device=ids.device).tolist()
    out = ids.clone()
    for row, at, share, seed in zip(out, valid, strength.tolist(), seeds, strict=True):
        tokens = row[at].tolist()
        own = Generator().manual_seed(seed)
        changed = edited(tokens, int(len(tokens) * share), mask_token, vocabulary, own)[: len(tokens)]
        changed += [mask_token] * (len(tokens) - len(changed))
        row[at] = torch.tensor(changed, dtype=ids.dtype, device=ids.device)
    return out


def edited(
    tokens: Sequence[int], count: int, mask_token: int, vocabulary: int, generator: Generator | None = None
) -> list[int]:
    """Return `tokens` after `count` edits, one after the other, drawn by a `generator` on the CPU.

    Each is an insertion, a deletion or a substitution with equal probability, at a place drawn from all there are. New
    tokens are drawn from `vocabulary` without `mask_token`; a substitution never puts the same token back. An edit of
    an empty row inserts.
    """
    out = list(tokens)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def token(other_than: int) -> int:
        skipped = sorted({mask_token, other_than} & set(range(vocabulary)))
        drawn = draw(vocabulary - len(skipped))
        for skip in skipped:
            drawn += drawn >= skip
        return drawn

    for _ in range(count):
        kind = draw(3) if out else 0
        at = draw(len(out) + 1 if kind == 0 else len(out))
        if kind == 0:
            out.insert(at, token(mask_token))
        elif kind == 1:
            del out[at]
        else:
            out[at] = token(out[at])
    return out
