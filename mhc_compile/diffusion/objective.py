"""The objective of Seed Diffusion's first two stages (arXiv 2508.02193): a plain function of logits and ids.

    L = - E_mask [ g'(t) / g(t)  sum_i 1[x_t[i] = m] log p(x_0[i] | x_t) ]      t ~ U(0, 1)
        - E_edit [ sum_i log p(x_0[i] | x_t) ]                                  added in the last fifth of the steps

Both sums are divided by the number of tokens. The first is a bound on the negative log-likelihood of a token, in nats
(MDLM, arXiv 2406.07524; RADD, arXiv 2406.03736). Published are: masks with probability g(t) in the first 80% of the
steps, `floor(length * alpha_t)` edits with alpha_t in [0, 0.1] in the rest beside them, and that what is not masked is
predicted, too, and not copied to the output. The paper leaves open, and chosen here is:

    g                    g(t) = t, the linear schedule of LLaDA (arXiv 2502.09992), whose weight is 1 / t
    t                    spread evenly over the rows of a batch, with one random offset, which lowers the variance
    alpha_t              0.1 t, another t for each row, spread in the same way
    the kinds of edits   insertions, deletions and substitutions with equal probability, one after the other
    new tokens           drawn evenly from the vocabulary
    the length           rows keep theirs: see `edit_tokens`
    the terms            weigh the same, each a mean over tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from mhc_compile.diagnostics import MHCError
from mhc_compile.diffusion.corruption import edit_tokens, mask_tokens

EDITS_FROM = 0.8
"""The share of the steps after which edits are added."""
MOST_EDITS = 0.1
"""Edits are at most so many of a row's tokens: their schedule is `MOST_EDITS * t`."""
LEAST_RATE = 1e-3
"""The least probability with which a token is masked: the weight in the loss is its inverse."""


@dataclass(frozen=True)
class Corrupted:
    """A corrupted batch."""

    ids: Tensor
    """[B, S]."""
    weights: Tensor
    """float32 [B, S]: how much `-log p` of the original token counts at each place; the loss is the sum of these,
    divided by the number of tokens."""


def denoising_loss(
    logits_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    progress: float,
    *,
    mask_token: int,
    vocabulary: int,
    valid: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Return the loss of a batch at `progress`, the share of the training steps done before it.

    `logits_of` is the network: from ids [B, S] the logits [B, S, V] of the token at each place itself, not of the next.
    It is called for each of what `corrupt` returns for the same arguments.
    """
    corrupted = corrupt(ids, progress, mask_token=mask_token, vocabulary=vocabulary, valid=valid, generator=generator)
    counted = ids.numel() if valid is None else valid.sum()
    return torch.stack([weighted_loss(logits_of(c.ids), ids, c.weights) for c in corrupted]).sum() / counted


def corrupt(
    ids: Tensor,
    progress: float,
    *,
    mask_token: int,
    vocabulary: int,
    valid: Tensor | None = None,
    generator: Generator | None = None,
) -> list[Corrupted]:
    """Return what the network is to restore at `progress`: ids [B, S] masked, in the last fifth also ids with edits.

    `vocabulary` is the number of ids that new tokens are drawn from, the mask token's among them. `valid` [B, S] is
    False for padding and prompts, which are neither corrupted nor counted. `generator` draws the corruption, on its own
    device; what it draws for a row does not depend on other rows' ids.

    Raises MHC204 for `progress` outside of [0, 1] and a mask token that is in `ids` or outside of `vocabulary`.
    """
    if not 0 <= progress <= 1:
        raise MHCError("MHC204", f"progress={progress}", way_out="give the share of the steps done, from 0 to 1")
    if not 0 <= mask_token < vocabulary or bool((ids == mask_token).any()):
        way_out = "add one to the model: mhc_compile.integrations.diffusion.add_mask_token(model, tokenizer)"
        raise MHCError("MHC204", f"the mask token {mask_token} is no token of its own", way_out=way_out)
    rate = LEAST_RATE + (1 - LEAST_RATE) * _uniform(ids, generator)
    masked_ids, masked = mask_tokens(ids, rate, mask_token, valid=valid, generator=generator)
    corrupted = [Corrupted(masked_ids, masked / rate)]
    if progress >= EDITS_FROM:
        strength = MOST_EDITS * _uniform(ids, generator)[:, 0]
        edited_ids = edit_tokens(ids, strength, mask_token, vocabulary, valid=valid, generator=generator)
        every = torch.ones(ids.shape, device=ids.device)
        corrupted.append(Corrupted(edited_ids, every if valid is None else every * valid))
    return corrupted


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of `-log p(id) * weight` over all tokens: logits [B, S, V], ids and weights [B, S].

    In float32, or float64 for logits in float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def _uniform(ids: Tensor, generator: Generator | None) -> Tensor:
    """Return a number for each row, [B, 1], spread evenly over [0, 1): rows share one offset."""
    offset = torch.rand((1, 1), generator=generator, device=ids.device)
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None] / ids.shape[0]
    return (offset + rows) % 1
