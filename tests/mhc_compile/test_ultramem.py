"""UltraMem in converted models: its start, training, generation, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from memories import losses_of, shake_memory, small
from test_generate import DYNAMIC, NO_CACHE, STATIC, generated, padded
from tiny_models import cached, chain, close, gpt2, ids, llama, shake, t5
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from mhc_compile import (
    MHCError,
    TableAdamW,
    UltraMemSettings,
    convert,
    emit,
    export,
    inspect,
    parameter_groups,
    to_residual,
)
from mhc_compile.parameters import owners

V1 = UltraMemSettings(side=8, key_width=8, value_width=8, top=4, layers=(0,), skip=1)
V2 = UltraMemSettings.preset("v2", side=8, key_width=8, value_width=8, input_width=4, top=4, heads=2)


def shake_values(model: Any) -> Any:
    """Let the values say something."""
    generator = torch.Generator().manual_seed(1)
    for held in owners(model).values():
        if held.memories.ultramem is not None:
            with torch.no_grad():
                for name, p in held.in_graph().items():
                    if name.endswith(".projection"):
                        p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            held.table("ultra-mem").start(1, 1.0)
    return model


@pytest.fixture(scope="module")
def trained() -> Any:
    """A converted model whose streams differ and whose values say something."""
    model = convert(llama(), streams=2, ultramem=V1, inner="eager")
    shake(model, 0.5)
    return shake_values(model)


@pytest.mark.parametrize(("make", "streams", "settings"), [(llama, 1, V2), (gpt2, 4, V1)])
def test_the_start_changes_nothing_at_all(make: Any, streams: int, settings: UltraMemSettings) -> None:
    plain = convert(make(), streams=streams, inner="eager")
    model = convert(make(), streams=streams, ultramem=settings, inner="eager")
    with torch.no_grad():
        before = plain(ids()).logits
        assert torch.equal(model(ids()).logits, before)
        shake_values(model)
        assert float((model(ids()).logits - before).abs().max()) > 1e-3
    held = next(iter(owners(model).values()))
    assert held.table("ultra-mem").width == settings.input_width + settings.value_width
    assert len(held.table("ultra-mem").weight) == (2 if settings.shared else 1) * 64


@pytest.mark.parametrize("settings", [pytest.param(V1, marks=pytest.mark.slow), V2], ids=["v1", "v2"])
def test_training_moves_rows_that_were_found_and_all_parameters(settings: UltraMemSettings) -> None:
    model = convert(llama(), streams=2, ultramem=settings, inner="aot_eager").train()
    held = model.model.mhc
    before = {name: p.detach().clone() for name, p in held.named_parameters() if name.startswith("ultramem.")}
    optimizer = TableAdamW(parameter_groups(model, lr=1e-2))
    losses = losses_of(model, optimizer)
    assert losses == sorted(losses, reverse=True)
    after = dict(held.named_parameters())
    assert [name for name, p in before.items() if torch.equal(p, after[name])] == []
    moved = (before["ultramem.table.weight"] != held.table("ultra-mem").weight).any(1)
    assert 0 < int(moved.sum()) < len(moved)
    with pytest.raises(MHCError, match="MHC411"):
        to_residual(model)


def test_decay_and_rates() -> None:
    model = convert(llama(), streams=2, ultramem=V2, inner="eager")
    groups = parameter_groups(model, lr=1e-2, coefficient_lr=1e-4)
    of = {id(p): group for group in groups for p in group["params"]}
    held = model.model.mhc
    decayed = {"query", "keys", "projection", "input"}
    for name, p in held.named_parameters():
        if name.startswith("ultramem.layers"):
            assert bool(of[id(p)]["weight_decay"]) == (name.rsplit(".", 1)[1] in decayed), name
            assert of[id(p)]["lr"] == 1e-2
    rows = of[id(held.table("ultra-mem").weight)]
    assert rows["table"]
    assert rows["lr"] == 4e-2
    assert rows["falls_over"] == 0
    assert parameter_groups(model, lr=1e-2, steps=100)[-1]["falls_over"] == 100
    held.table("ultra-mem").trainable = False
    assert not any(group.get("table") for group in parameter_groups(model, lr=1e-2))


BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    ("cache", "search"),
    [pytest.param(DYNAMIC, BEAMS, marks=pytest.mark.slow), (STATIC, {"attention_mask": padded()})],
    ids=["beams", "left-padded"],
)
def test_caches_change_nothing(trained: Any, cache: dict[str, Any], search: dict[str, Any]) -> None:
    options = {"max_new_tokens": 3, "eos_token_id": 63, **search}
    assert torch.equal(generated(trained, **cache, **options), generated(trained, **NO_CACHE, **options))


def test_calls_that_go_on_equal_the_whole(trained: Any) -> None:
    with torch.no_grad():
        whole = trained(ids(), use_cache=False).logits
        cache, steps = DynamicCache(config=trained.config), []
        for part in ids().split([1, 1, 3, 3], 1):
            steps.append(cached(trained, part, cache).logits)
    assert close(torch.cat(steps, 1), whole, 1e-5)
    assert not hasattr(cache, "mhc_memory")  # nothing is carried on


@pytest.mark.slow
def test_a_memory_of_n_grams_beside_it() -> None:
    layers: dict[str, Any] = {"num_hidden_layers": 1}
    model = convert(llama(**layers), streams=2, engram=small("v41", layers=(0,)), ultramem=V2, inner="eager")
    shake_memory(model)
    shake_values(model)
    with torch.no_grad():
        whole = model(ids(), use_cache=False).logits
        cache, steps = DynamicCache(config=model.config), []
        for part in ids().split([3, 5], 1):
            steps.append(cached(model, part, cache).logits)
    assert close(torch.cat(steps, 1), whole, 1e-5)


@pytest.mark.slow
def test_the_decoder_of_a_pair_gets_it() -> None:
    model = shake_values(convert(t5(num_layers=1), streams=2, ultramem=V2, inner="eager"))
    assert model.encoder.mhc.memories.ultramem is None
    assert model.decoder.mhc.memories.ultramem is not None
    with torch.no_grad():
        whole = model(ids(), decoder_input_ids=ids(), use_cache=False).logits
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        steps = [cached(model, ids(), cache, decoder_input_ids=part).logits for part in ids().split([3, 5], 1)]
    assert close(torch.cat(steps, 1), whole, 1e-5)


def test_models_that_are_given_embeddings(trained: Any) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        before = model(x)
        convert(model, x, ultramem=V2, inner="eager", streams=2)
        assert close(model(x), before)
        shake_values(model)
        assert float((model(x) - before).abs().max()) > 1e-3
        embedded = trained.get_input_embeddings()(ids())
        assert torch.equal(trained(inputs_embeds=embedded).logits, trained(ids()).logits)


def test_half_precision_and_autocast(trained: Any) -> None:
    model = shake_values(convert(llama(num_hidden_layers=1).bfloat16(), streams=1, ultramem=V2, inner="eager"))
    with torch.no_grad():
        assert model(ids()).logits.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert close(trained(ids()).logits.float(), trained(ids()).logits.float())
    assert model.model.mhc.get_parameter("ultramem.layers.0.keys").dtype == torch.float32


def test_a_copy_has_its_own_rows(trained: Any) -> None:
    other = copy.deepcopy(trained)
    other.model.mhc.table("ultra-mem").start(9)
    with torch.no_grad():
        wanted = trained(ids()).logits
        assert not torch.equal(other(ids()).logits, wanted)
        assert torch.equal(trained(ids()).logits, wanted)


def test_models_of_another_eps_before_it_change_nothing() -> None:
    def model(eps: float, **how: Any) -> Any:
        return convert(llama(num_hidden_layers=1, rms_norm_eps=eps), streams=1, inner="eager", **how)

    with torch.no_grad():
        torch._dynamo.reset()
        alone = shake_values(model(1e-6, ultramem=V2))
        wanted = alone(ids()).logits
        torch._dynamo.reset()
        for eps in (1e-1, 1e-2):  # the second time Dynamo makes a variable of it
            model(eps)(ids())
        third = shake_values(model(1e-6, ultramem=V2))
        third.load_state_dict(alone.state_dict())
        assert close(third(ids()).logits, wanted)
        for module in third.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1.0
        assert float((third(ids()).logits - wanted).abs().max()) > 1e-3


def test_exported_programs_read_the_table_as_a_parameter(trained: Any) -> None:
    program = export(trained, ids(), example_kwargs={"use_cache": False})
    with torch.no_grad():
        assert close(program.module()(ids(), use_cache=False).logits, trained(ids()).logits)


def test_inspect_shows_it(trained: Any) -> None:
    found = inspect(trained, ids())
    (memory,) = found.memories
    assert memory.layer == "model.ultra-mem"
    assert memory.rows == 64 * 8
    text = str(found)
    assert "ultramem" in text
    (record,) = (r for r in found.passes if r.name == "ultramem")
    assert "values by the normed input of layers.0#1, added at layers.1#1" in " ".join(record.notes)


def gradients(**options: Any) -> dict[str, torch.Tensor]:
    """Of all parameters and of the rows that were read, after one step."""
    model = convert(chain(), ids(), streams=2, inner="aot_eager", **options).train()
    shake(model)
    shake_values(model)
    model(ids()).square().sum().backward()
    table = model.mhc.table("ultra-mem")
    assert table.gradient is not None
    of_rows = {"rows": table.gradient.rows.float(), "values": table.gradient.values}
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | of_rows


def test_the_kernel_gives_the_same_gradients() -> None:
    found = []
    for kernels in ("none", "all"):
        torch._dynamo.reset()
        found.append(gradients(ultramem=V2, kernels=kernels))
    assert found[0].keys() == found[1].keys()
    assert [n for n in found[0] if not close(found[0][n], found[1][n], 1e-4)] == []


def test_recomputed_streams_give_the_same_gradients() -> None:
    found = []
    for blocks in ("off", 2):
        torch._dynamo.reset()
        found.append(gradients(ultramem=V1, recompute=blocks))
    assert found[0].keys() == found[1].keys()
    assert [n for n in found[0] if not torch.equal(found[0][n], found[1][n])] == []


def test_what_cannot_be_is_refused(trained: Any) -> None:
    for wrong, code in (
        ({"ultramem": "v3"}, "MHC220"),
        ({"ultramem": 3}, "MHC220"),
        ({"ultramem": replace(V1, layers=(1,))}, "MHC226"),
        ({"ultramem": V2, "form": "attnres"}, "MHC204"),
        ({"ultramem": V2, "pipeline": lambda usual: usual.without("ultramem")}, "MHC241"),
    ):
        model = chain()
        with pytest.raises(MHCError, match=code):
            convert(model, ids(), inner="eager", **wrong)  # type: ignore[arg-type]
        assert not owners(model)
    with pytest.raises(MHCError, match="MHC708"):
        emit(trained, "never.py")
