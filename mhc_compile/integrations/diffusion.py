"""What diffusion needs to know of transformers: the mask token, and how a call is given its cache."""

from __future__ import annotations

from typing import Any

from torch import nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import USE_CACHE, Roles

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
