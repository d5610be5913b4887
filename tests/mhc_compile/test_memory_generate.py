"""`generate()` with memories: whatever the cache carries on, the tokens are those of the run without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from memories import PRESETS, with_memory
from test_generate import DYNAMIC, NO_CACHE, STATIC, generated, padded
from tiny_models import cache_in, cached, close, ids, llama, shake, t5, variants
from transformers import DynamicCache, StaticCache

from mhc_compile import MHCError

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "left-padded": {"attention_mask": padded()},
}


def speaking(preset: str, **fields: Any) -> Any:
    """A converted model whose streams differ and whose memories say something."""
    model = with_memory(llama(eos_token_id=5, num_hidden_layers=len(fields["layers"])), preset, **fields)
    shake(model, 0.5)
    return model


@pytest.fixture(scope="module")
def trained() -> Any:
    return speaking("paper", layers=(0, 1))  # the one with a convolution and a look-back of three tokens


@pytest.mark.parametrize("cache", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "search", [pytest.param(s, marks=pytest.mark.compat) if s == "greedy" else s for s in SEARCHES]
)
def test_caches_change_nothing(trained: Any, cache: dict[str, Any], search: str) -> None:
    options = {"max_new_tokens": 5, "eos_token_id": 63, **SEARCHES[search]}
    assert torch.equal(generated(trained, **cache, **options), generated(trained, **NO_CACHE, **options))


@pytest.mark.parametrize("preset", variants(*(p for p in PRESETS if p != "paper")))
@pytest.mark.slow
def test_other_presets(preset: str) -> None:
    model = speaking(preset, layers=(0,))
    for search in ("beams", "left-padded"):
        options = {"max_new_tokens": 4, "eos_token_id": 63, **SEARCHES[search]}
        assert torch.equal(generated(model, **DYNAMIC, **options), generated(model, **NO_CACHE, **options))
    test_calls_that_go_on_equal_the_whole(model, [1, 6, 1], "dynamic")


def test_left_padding_changes_nothing_for_the_tokens_behind_it(trained: Any) -> None:
    padding = torch.full((2, 3), 7)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids())], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wide = torch.cat([padding, ids()], 1)
        wanted = trained(ids()).logits
        assert close(trained(wide, attention_mask=mask, position_ids=positions).logits[:, 3:], wanted)
        # The padding's own ids are not looked at.
        wide[:, :3] = 9
        assert close(trained(wide, attention_mask=mask, position_ids=positions).logits[:, 3:], wanted)


@pytest.mark.parametrize(
    ("cut", "kind"), variants(([3, 5], "own"), ([1] * 8, "static"), ([1, 6, 1], "dynamic")), ids=str
)
def test_calls_that_go_on_equal_the_whole(trained: Any, cut: list[int], kind: str) -> None:
    with torch.no_grad():
        whole = trained(ids(), use_cache=False).logits
        caches = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config=config, max_cache_len=16)}
        cache = None if kind == "own" else caches[kind](config=trained.config)
        steps = []
        for part in ids().split(cut, 1):
            out = cached(trained, part, cache, use_cache=True)
            cache = cache_in(out)
            steps.append(out.logits)
    assert close(torch.cat(steps, 1), whole, 1e-5)


@pytest.mark.slow
def test_a_copied_cache_goes_its_own_way(trained: Any) -> None:
    first, second = ids().split([4, 4], 1)
    with torch.no_grad():
        whole = trained(ids(), use_cache=False).logits[:, 4:]
        cache = cache_in(trained(first, use_cache=True))
        other = copy.deepcopy(cache)
        cached(trained, torch.full_like(second, 3), other)
        assert close(cached(trained, second, cache).logits, whole, 1e-5)


def test_a_cache_used_again_starts_anew(trained: Any) -> None:
    with torch.no_grad():
        cache = StaticCache(config=trained.config, max_cache_len=16)
        whole = cached(trained, ids(), cache).logits
        cache.reset()
        assert close(cached(trained, ids(), cache).logits, whole, 1e-6)


@pytest.mark.slow
def test_a_compiled_model_generates_the_same(trained: Any) -> None:
    expected = generated(trained)
    compiled = torch.compile(trained, backend="mhc", options={"inner": "eager"})
    assert torch.equal(generated(compiled), expected)
    with torch.no_grad():
        cache = DynamicCache(config=trained.config)
        steps = [cached(compiled, part, cache).logits for part in ids().split([3, 1, 4], 1)]
        assert close(torch.cat(steps, 1), trained(ids(), use_cache=False).logits, 1e-5)


@pytest.mark.slow
def test_the_decoder_of_a_pair_gets_the_memory() -> None:
    model = with_memory(t5(num_layers=1), layers=(0,))
    assert model.encoder.mhc.memories.engram is None
    assert model.decoder.mhc.memories.engram is not None
    without = generated(model, max_new_tokens=4, num_beams=2, **NO_CACHE)
    assert torch.equal(generated(model, max_new_tokens=4, num_beams=2, **DYNAMIC), without)


def test_caches_without_the_state_are_refused(trained: Any) -> None:
    cache = cache_in(trained(ids(), use_cache=True))  # with gradients: not for generation
    with pytest.raises(MHCError, match="MHC229"), torch.no_grad():
        cached(trained, ids()[:, :1], cache)
    with torch.no_grad():
        cache = cache_in(trained(ids(), use_cache=True))
        with pytest.raises(MHCError, match=r"MHC229.*taken back"):
            cache.crop(-2)
