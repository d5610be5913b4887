"""Adapt transformers' models to diffusion: add a mask token, mask in training, and call with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import IDS, MASK, POSITIONS, USE_CACHE, Roles

_WAY_OUT = "sample without a cache: sample(..., cached=False)"


def add_mask_token(model: nn.Module, tokenizer: Any, token: str = "<|mask|>") -> int:
    """Return the id of the tokenizer's mask token; where it has none, `token` is added to it.

    The embedding, and the head that shares it, get a row for it where they have none to spare.
    """
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": token})
    added = int(tokenizer.mask_token_id)
    whole: Any = model
    if added >= whole.get_input_embeddings().weight.shape[0]:
        whole.resize_token_embeddings(added + 1)
    return added


def beside_clean(model: Any, clean: Tensor, block: int, *, shift: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the network of `denoising_loss` for ids `clean` [B, S] whose blocks see clean blocks before them.

    So does a block in sampling. A call with corrupted ids runs `model` once, on both one after the other, with a mask
    [B, 1, 2S, 2S] and positions of its own. The model has causal attention: `attend` comes after training, with the
    same `block`, and sees the same. Layers without attention and memories would see the clean ids as what came before.

    With `shift` the token at a place is predicted at the place before it, as next tokens are, and the first of a block
    where the clean blocks end: a network of next tokens keeps what it knows. Sample with `shift`, too.
    """
    length = clean.shape[1]
    places = torch.arange(length, device=clean.device).repeat(2)
    blocks, corrupted = places // block, torch.arange(2 * length, device=clean.device) >= length
    query, key = blocks[:, None], blocks[None]
    own = corrupted[:, None] & (query == key)
    before = torch.where(corrupted[:, None], key < query, key <= query)
    mask = torch.where(corrupted[None], own, before).expand(len(clean), 1, -1, -1)
    given = {MASK: mask, POSITIONS: places.expand(len(clean), -1), USE_CACHE: False}
    begins = ((places % block == 0) & (places > 0))[:length, None]

    def network(ids: Tensor) -> Tensor:
        of_clean, logits = model(**{IDS: torch.cat([clean, ids], 1)}, **given).logits.split(length, 1)
        return torch.where(begins, shifted(of_clean), shifted(logits)) if shift else logits

    return network


def shifted(logits: Tensor) -> Tensor:
    """Return the logits [B, S, V] of the place before each place; the first place, which has none, keeps its own."""
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


class CachedCalls:
    """Calls a model of transformers on one piece of a sequence after the other, and takes tokens back.

    Raises MHC204 where the model keeps no cache, or one that tokens cannot be taken back from.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache: Any = None
        self._names = Roles.of(type(model).forward).carried

    def __call__(self, ids: Any) -> Any:
        """Return the logits [B, S, V] of `ids` [B, S], which follow those in the cache, and join them."""
        given = {} if self.cache is None else self.cache
        output = self.model(input_ids=ids, **{USE_CACHE: True}, **given)
        self.cache = {name: output[name] for name in self._names if hasattr(output.get(name), "crop")}
        if not self.cache:
            raise MHCError("MHC204", f"cached=True: {type(self.model).__name__} returns no cache", way_out=_WAY_OUT)
        return output.logits

    def take_back(self, count: int, *, left: int) -> None:
        """Take the last `count` tokens back, after which `left` of them are left."""
        if not left:
            self.cache = None
            return
        for cache in self.cache.values():
            try:
                cache.crop(-count)
            except (ValueError, NotImplementedError, AttributeError) as error:
                raise MHCError("MHC204", f"cached=True: {type(cache).__name__}: {error}", way_out=_WAY_OUT) from error
