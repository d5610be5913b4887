"""The objective of Seed Diffusion's first two stages (arXiv 2508.02193): a plain function of logits and ids.

    L = - E_mask [ g'(t) / g(t)  sum_i 1[x_t[i] = m] log p(x_0[i] | x_t) ]      t ~ U(0, 1), g(t) = t
        - E_edit [ sum_i log p(x_0[i] | x_t) ]                                  in the last fifth of the steps

Both are divided by the number of tokens. The first is a bound on the negative log-likelihood of a token, in nats.
"""

from __future__ import annotations

from collections.abc import Callable

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
    It is called once in the first `EDITS_FROM` of the steps, then twice. `valid` [B, S] is False for padding and
    prompts, which are neither corrupted nor counted. `generator` draws the corruption, on its own device.

    Raises MHC204 for `progress` outside of [0, 1] and a mask token that is in `ids` or outside of `vocabulary`.
    """
    if not 0 <= progress <= 1:
        raise MHCError("MHC204", f"progress={progress}", way_out="give the share of the steps done, from 0 to 1")
    if not 0 <= mask_token < vocabulary or bool((ids == mask_token).any()):
        way_out = "add one to the model: mhc_compile.integrations.diffusion.add_mask_token(model, tokenizer)"
        raise MHCError("MHC204", f"the mask token {mask_token} is no token of its own", way_out=way_out)
    rate = LEAST_RATE + (1 - LEAST_RATE) * _uniform(ids, generator)
    noised, masked = mask_tokens(ids, rate, mask_token, valid=valid, generator=generator)
    loss = mask_loss(logits_of(noised), ids, masked, rate, valid=valid)
    if progress < EDITS_FROM:
        return loss
    strength = MOST_EDITS * _uniform(ids, generator)[:, 0]
    noised = edit_tokens(ids, strength, mask_token, vocabulary, valid=valid, generator=generator)
    return loss + edit_loss(logits_of(noised), ids, valid=valid)


def mask_loss(logits: Tensor, ids: Tensor, masked: Tensor, rate: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Return `sum over masked tokens of -log p(id) / rate`, divided by the number of tokens.

    Logits [B, S, V], `ids` and `masked` [B, S], `rate` [B, 1]; float32 or wider. With the schedule g(t) = t the weight
    g'/g is the inverse of the rate.
    """
    counted = ids.numel() if valid is None else valid.sum()
    return (_token_losses(logits, ids) * masked / rate).sum() / counted


def edit_loss(logits: Tensor, ids: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean of `-log p(id)` over all tokens, those that no edit reached among them.

    So the network learns to doubt what it is given: it may not simply copy it.
    """
    losses = _token_losses(logits, ids)
    return losses.mean() if valid is None else (losses * valid).sum() / valid.sum()


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)


def _uniform(ids: Tensor, generator: Generator | None) -> Tensor:
    """Return a number for each row, [B, 1], spread evenly over [0, 1): rows share one offset."""
    offset = torch.rand((1, 1), generator=generator, device=ids.device)
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None] / ids.shape[0]
    return (offset + rows) % 1
