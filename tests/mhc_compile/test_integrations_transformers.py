"""Roles of arguments: what is ids, mask, positions and cache, by any name, and what cannot be told."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memories import shake_memory, small
from tiny_models import HIDDEN, VOCAB, cache_argument, close, ids, llama, shake
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.models.rwkv.modeling_rwkv import RwkvModel
from transformers.models.xlstm.modeling_xlstm import xLSTMCache, xLSTMModel

from mhc_compile import MHCError, OverEncodingSettings, convert
from mhc_compile.integrations.transformers import Roles, cache_of, ids_of, is_filled, mask_of, positions_of, unknown_of


class Attention(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(HIDDEN)
        self.project, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        q, k, v = self.project(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(-2))


@dataclasses.dataclass
class Answer:
    scores: Tensor
    past: Any = None
    state: Any = None


class Speaker(nn.Module):
    """A causal model by a user's own hand."""

    def __init__(self, answer: Callable[[Tensor, Any], Any] = Answer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.kinds = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Attention(i) for i in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.answer = answer

    def run(self, tokens: Tensor, cache: Any, more: Tensor | None = None) -> Any:
        x = self.embed(tokens)
        if more is not None:
            x = x + more
        for layer in self.layers:
            x = x + layer(x, cache)
        return self.answer(self.head(x), cache)


class Plain(Speaker):
    def forward(self, tokens: Tensor, what_came_before: Any = None) -> Any:
        return self.run(tokens, what_came_before)


class Makes(Speaker):
    """Makes its cache itself."""

    def forward(self, tokens: Tensor, past: Any = None) -> Any:
        return self.run(tokens, DynamicCache() if past is None else past)


class TwoIntegers(Speaker):
    def forward(self, kinds: Tensor, tokens: Tensor) -> Any:
        return self.run(tokens, None, self.kinds(kinds))


class Named(Speaker):
    def forward(self, kinds: Tensor, input_ids: Tensor) -> Any:
        return self.run(input_ids, None, self.kinds(kinds))


class Flags(Speaker):
    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Any:
        return self.run(tokens, None, None if keep is None else keep.unsqueeze(-1) * 0.5)


class Targets(Speaker):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        answer = self.run(tokens, None)
        return answer if targets is None else F.cross_entropy(answer.scores.flatten(0, 1), targets.flatten())


class Lists(Speaker):
    def forward(self, tokens: Tensor, state: list[Tensor] | None = None) -> Answer:
        return self.run(tokens, None, None if not state else state[0])


def speaking(model: nn.Module, *example: Any) -> Any:
    """The model converted, with a memory and n-grams that say something."""
    over = OverEncodingSettings(order=3, heads=2, rows=97)
    model = convert(model.eval(), *example, engram=small("paper", layers=(0, 1)), over_encoding=over, inner="eager")
    shake(model, 0.5)
    shake_memory(model)
    return model


def as_tuple(scores: Tensor, cache: Any) -> Any:
    return scores, (cache,)


def as_dict(scores: Tensor, cache: Any) -> Any:
    return {"scores": scores, "inner": {"kept": cache}}


ANSWERS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Tensor, Any]]]] = {
    "dataclass": (Answer, lambda out: (out.scores, out.past)),
    "tuple": (as_tuple, lambda out: (out[0], out[1][0])),
    "dict": (as_dict, lambda out: (out["scores"], out["inner"]["kept"])),
}


@pytest.mark.parametrize("form", ANSWERS)
def test_a_cache_by_any_name_carries_the_memory(form: str) -> None:
    answer, read = ANSWERS[form]
    model = speaking(Makes(answer), ids())
    with torch.no_grad():
        whole, cache = read(model(ids()))
        assert set(cache.mhc_memory) > {(part, of) for part in ("ids", "reach") for of in ("", "over-encoding")}
        steps, cache = [], None
        for part in ids().split([3, 1, 4], 1):
            scores, cache = read(model(part, cache))
            steps.append(scores)
    assert close(torch.cat(steps, 1), whole, 1e-5)


def test_a_cache_under_an_unheard_of_name() -> None:
    model = speaking(Plain(), ids())
    with torch.no_grad():
        whole = model(ids()).scores
        cache = DynamicCache()
        steps = [model(part, what_came_before=cache).scores for part in ids().split([1, 1, 6], 1)]
        assert close(torch.cat(steps, 1), whole, 1e-5)
        # Also in another process, where nothing but the pickle says that the model has a memory.
        other, cache = pickle.loads(pickle.dumps(model)), DynamicCache()
        first = other(ids()[:, :4], cache).scores
        cache.batch_select_indices(torch.tensor([1]))
        second = other(ids()[1:, 4:], cache).scores
    assert close(torch.cat([first[1:], second], 1), whole[1:], 1e-5)


def test_a_filled_cache_of_a_plain_model_is_refused() -> None:
    model = speaking(Plain(), ids())
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    with torch.no_grad(), pytest.raises(MHCError, match="MHC229"):
        model(ids(), cache)


def test_two_integer_tensors_cannot_be_told_apart() -> None:
    model = speaking(TwoIntegers(), ids(seed=1), ids())
    with torch.no_grad(), pytest.raises(MHCError, match=r"MHC236.* \[2, 8\] of the model may be ids"):
        model(ids(seed=1), ids())
    named = speaking(Named(), ids(seed=1), ids())
    with torch.no_grad():
        scores = named(ids(seed=1), ids()).scores
        # N-grams are those of `input_ids`, although the other table is as long: what follows a token changes with it.
        named.kinds.weight.zero_()
        assert torch.equal(named(ids(seed=1), ids()).scores, named(ids(seed=2), ids()).scores)
    assert scores.isfinite().all()


def test_a_boolean_tensor_may_be_a_mask() -> None:
    model = speaking(Flags(), ids())
    with torch.no_grad():
        assert model(ids()).scores.isfinite().all()
        with pytest.raises(MHCError, match=r"MHC236.*keep"):
            model(ids(), ids() > 9)


def test_targets_are_read_behind_the_streams() -> None:
    model = speaking(Targets(), ids())
    loss = model(ids(), ids(seed=1))
    assert close(loss, F.cross_entropy(model(ids()).scores.flatten(0, 1), ids(seed=1).flatten()))


def test_lists_of_tensors_cannot_carry_a_memory() -> None:
    model = speaking(Lists(), ids())
    with torch.no_grad(), pytest.raises(MHCError, match=r"MHC229.*state is a list"):
        model(ids(), [torch.zeros(2, 8, HIDDEN)])


# --- roles without a model --------------------------------------------------------------------------------------------


def test_roles_of_transformers_own_forwards() -> None:
    roles = Roles.of(type(llama().model).forward)
    assert roles.conventional
    assert cache_argument(llama()) in roles.carried
    mask = torch.ones(2, 8)
    arguments = roles.named((ids(), mask), {"position_ids": ids(), "token_type_ids": ids(), "seen": ids() > 3})
    assert ids_of(roles, arguments) is arguments["input_ids"]
    assert mask_of(arguments) is mask
    assert positions_of(arguments) is arguments["position_ids"]
    assert not unknown_of(roles, arguments)
    assert ids_of(roles, roles.named((), {"inputs_embeds": mask, "token_type_ids": ids()})) is None
    assert mask_of({"attention_mask": torch.ones(2, 1, 8, 8)}) is None
    assert xLSTMCache in Roles.of(xLSTMModel.forward).caches
    assert "state" in Roles.of(RwkvModel.forward).carried


def test_arguments_of_a_wrapped_forward() -> None:
    roles = Roles.of(lambda *args, **kwargs: (args, kwargs))
    arguments = roles.named((ids(), DynamicCache()), {"scale": 2.0})
    assert ids_of(roles, arguments) is arguments["*0"]
    assert roles.named((), {"input_ids": ids(), "others": ids()}).keys() == {"input_ids", "others"}


def test_two_caches_are_refused() -> None:
    speaking(Plain(), ids())  # from here on caches are known
    roles, cache = Roles.of(Plain.forward), DynamicCache()
    assert cache_of(roles, {"a": cache, "b": cache, "c": None}) is cache
    with pytest.raises(MHCError, match="MHC236"):
        cache_of(roles, {"a": cache, "b": copy.copy(cache)})


def test_filled_caches() -> None:
    speaking(Plain(), ids())
    assert not is_filled(DynamicCache())
    assert not is_filled(StaticCache(config=llama().config, max_cache_len=8))
    assert is_filled(object())
