"""Generate block after block, several positions at a time (arXiv 2508.02193)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.diffusion.attend import block_of
from mhc_compile.integrations.diffusion import CachedCalls
from mhc_compile.integrations.transformers import without_cache

Order = Literal["surest", "leftmost"]


@dataclass(frozen=True)
class Sampled:
    """What `sample` made."""

    ids: Tensor
    """[B, S], the prompt first."""
    new: float
    """Tokens of a row that are not the prompt's, on average over the rows."""
    forwards: int
    """Calls of the model."""
    needed: float
    """Calls that filled tokens of a row, on average over the rows: those that each takes alone. In the others a row
    waits for rows whose block is not filled yet."""

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a row for each call that it needed; decoding one after the other makes 1."""
        return self.new / self.needed


@torch.no_grad()
def sample(
    model: Any,
    prompt: Tensor,
    new: int = 0,
    *,
    mask_token: int,
    threshold: float = 0.9,
    least: int = 1,
    order: Order = "surest",
    shift: bool = False,
    cached: bool | None = None,
) -> Sampled:
    """Return `prompt` [B, P] with its mask tokens filled, continued by `new` tokens.

    They are filled block after block, of those that `model` attends to; new tokens begin as mask tokens. Each call of
    the model accepts the most probable token at every position where its probability is at least `threshold`, and
    whatever theirs is at the `least` positions of each row that are first in `order`: the surest, or the leftmost ones.
    Accepted tokens stay. The result depends on nothing random. With `shift` the logits at a place are those of the next
    token (`mhc_compile.integrations.diffusion.beside_clean`).

    Keys and values of finished blocks are cached (`cached`, by default where there are blocks): a call computes the
    block at hand, the first one of a block also the block before, whose tokens are final by then. Blocks do not see
    later ones, so the tokens are those that are sampled without a cache. Nor do mask tokens in the prompt see what
    comes after their block: for that use bidirectional attention, in training as well.

    `model` is a causal language model of transformers, in evaluation mode, that `attend` or `convert(attention=...)`
    gave blocks or bidirectional attention. Positions count from 0, so rows are not padded.

    Raises MHC204 for a model without either, numbers that are not possible, and a cache from which tokens cannot be
    taken back.
    """
    block = block_of(model)
    cached = bool(block) if cached is None else cached
    if cached and not block:
        raise MHCError("MHC204", "cached=True with bidirectional attention", way_out="leave cached out, or use blocks")
    masked = int((prompt == mask_token).sum())
    _check(prompt, masked, new, least, order)
    end = prompt.shape[1] + new
    ids = torch.cat([prompt, prompt.new_full((prompt.shape[0], new), mask_token)], 1)
    calls: CachedCalls | _WholeCalls = CachedCalls(model) if cached else _WholeCalls(model)
    forwards = begin = kept = needed = 0
    before = torch.empty(0)
    while begin < end:
        stop = min(begin + block, end) if block else end
        while waiting := int((ids[:, begin:stop] == mask_token).any(1).sum()):
            needed += waiting
            logits = calls(ids[:, kept:stop])
            forwards += 1
            if kept < begin:  # in the first call of a block, or without a cache
                before = logits[:, begin - kept - 1 : begin - kept]
            logits = logits[:, begin - kept :]
            if shift:
                logits = torch.cat([before if begin else logits[:, :1], logits[:, :-1]], 1)
            if isinstance(calls, CachedCalls):
                calls.take_back(stop - begin, left=begin)
                kept = begin
            ids[:, begin:stop] = _accepted(logits, ids[:, begin:stop], mask_token, threshold, least, order)
        begin = stop
    return Sampled(ids, new + masked / len(prompt), forwards, needed / len(prompt))


def _check(prompt: Tensor, masked: int, new: int, least: int, order: Order) -> None:
    """Raise MHC204 for arguments that are not possible, or where there is nothing to fill."""
    if order not in get_args(Order):
        raise MHCError("MHC204", f"order={order!r}; known: {', '.join(get_args(Order))}")
    if prompt.ndim != 2 or new < 0 or least < 1 or not new + masked:
        detail = f"prompt={list(prompt.shape)}, {masked} mask tokens, new={new}, least={least}"
        way_out = "give a prompt [B, P] with mask tokens, or new=1 and more, and least=1 or more"
        raise MHCError("MHC204", detail, way_out=way_out)


class _WholeCalls:
    """Calls a model on everything."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits [B, S, V] of `ids` [B, S]."""
        logits: Tensor = self.model(input_ids=ids, **without_cache(self.model)).logits
        return logits


def _accepted(logits: Tensor, ids: Tensor, mask_token: int, threshold: float, least: int, order: Order) -> Tensor:
    """Return `ids` [B, S] with the masked ones replaced of which `logits` [B, S, V] are sure enough."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    wanted = logits.index_fill(-1, torch.tensor(mask_token, device=ids.device), -torch.inf)
    confidence, best = wanted.softmax(-1).max(-1)
    masked = ids == mask_token
    confidence = confidence.masked_fill(~masked, -1.0)
    leftmost = torch.arange(ids.shape[1], 0, -1, device=ids.device) * masked
    rank = confidence if order == "surest" else leftmost
    first = rank.topk(min(least, ids.shape[1]), dim=-1).indices
    accept = (confidence >= threshold).scatter(-1, first, True) & masked
    return torch.where(accept, best, ids)
