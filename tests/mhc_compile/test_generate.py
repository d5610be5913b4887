"""`generate()` of converted models: every cache and search gives the tokens of the run without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, cached, close, ids, llama, shake, t5, variants
from torch import Tensor
from transformers import CompileConfig, DynamicCache

from mhc_compile import convert, to_residual
from mhc_compile.parameters import owners

NO_CACHE: dict[str, Any] = {"use_cache": False}
DYNAMIC: dict[str, Any] = {"use_cache": True}
STATIC: dict[str, Any] = {"cache_implementation": "static"}


def generated(model: Any, *, seed: int = 0, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids())}
    return model.generate(ids(), **(settings | options))


def padded() -> Tensor:
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    return mask


@pytest.fixture(scope="module")
def trained() -> Any:
    """A converted model whose streams differ."""
    model = convert(llama(), inner="eager")
    shake(model, 0.5)
    return model


def test_two_graphs_serve_every_prompt() -> None:
    model, plain = convert(llama()), convert(llama(), inner="eager")
    shake(model, 0.5)
    plain.load_state_dict(model.state_dict())
    torch._dynamo.utils.counters.clear()
    prompts = [ids(batch, length, seed=length) for batch, length in ((2, 8), (3, 5), (5, 5), (2, 11))]
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings) for prompt in prompts]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for prompt, tokens in zip(prompts[:2], found, strict=False):
        assert torch.equal(tokens, plain.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))


def test_generation_at_the_start_is_that_of_the_residual_model() -> None:
    model = llama()
    expected = generated(model)
    assert torch.equal(generated(convert(model, inner="eager")), expected)


@pytest.mark.parametrize("cache", [DYNAMIC, STATIC])
@pytest.mark.parametrize(
    "search",
    [pytest.param({}, marks=pytest.mark.compat), {"do_sample": True}, {"num_beams": 2}, {"attention_mask": padded()}],
    ids=["greedy", "sampling", "beams", "left-padded"],
)
def test_caches_change_nothing(trained: Any, cache: dict[str, Any], search: dict[str, Any]) -> None:
    assert torch.equal(generated(trained, **cache, **search), generated(trained, **NO_CACHE, **search))


def test_left_padding_changes_nothing_for_the_tokens_behind_it(trained: Any) -> None:
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids())], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = trained(torch.cat([padding, ids()], 1), attention_mask=mask, position_ids=positions).logits
        assert close(out[:, 3:], trained(ids()).logits)


def test_logits_of_single_steps_equal_those_of_the_whole(trained: Any) -> None:
    with torch.no_grad():
        whole = trained(ids()).logits
        cache = DynamicCache(config=trained.config)
        steps = [cached(trained, ids()[:, i : i + 1], cache).logits for i in range(ids().shape[1])]
    assert close(torch.cat(steps, 1), whole, 1e-5)


def test_a_compiled_model_generates_the_same(trained: Any) -> None:
    expected = generated(trained)
    compiled = torch.compile(trained, backend="mhc", options={"inner": "eager"})
    assert torch.equal(generated(compiled), expected)


def test_static_caches_that_generate_compiles_by_itself() -> None:
    model = convert(llama(num_hidden_layers=1), inner="eager")
    shake(model, 0.5)
    expected = generated(model, max_new_tokens=3, **NO_CACHE)
    config = CompileConfig(mode=None, options={"inner": "aot_eager"})  # type: ignore[arg-type]
    config._compile_all_devices = True  # transformers does so on a GPU
    assert torch.equal(generated(model, max_new_tokens=3, **STATIC, compile_config=config), expected)
    assert config.backend == "inductor"
    model = to_residual(convert(llama(num_hidden_layers=1), inner="eager"))
    assert "get_compiled_call" not in vars(model)


@pytest.mark.parametrize("cache", variants({"num_beams": 2}, DYNAMIC, STATIC), ids=["beams", "dynamic", "static"])
def test_encoder_and_decoder_streams(cache: dict[str, Any]) -> None:
    model = convert(t5(), inner="eager")
    shake(model, 0.5)
    assert list(owners(model)) == ["encoder", "decoder"]
    without = generated(model, max_new_tokens=3, **(cache | NO_CACHE if "num_beams" in cache else NO_CACHE))
    assert torch.equal(generated(model, max_new_tokens=3, **cache), without)


def test_hidden_states_of_generation_are_means_of_the_streams(trained: Any) -> None:
    out = generated(trained, output_hidden_states=True, return_dict_in_generate=True)
    assert all(h.shape[-1] == HIDDEN for step in out.hidden_states for h in step)
