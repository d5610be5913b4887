"""LoRA adapters around converted models, made before and after the conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import chain, close, disagree, gradients, ids, llama, logits, shake, variants, warned
from torch import nn

from mhc_compile import convert, parameter_groups, stream_parameters
from mhc_compile.parameters import owners


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def converted_first(**options: Any) -> PeftModel:
    return get_peft_model(convert(llama(), inner="eager"), lora(modules_to_save=["mhc"], **options)).eval()


def converted_last(**options: Any) -> PeftModel:
    model = get_peft_model(llama(), lora(**options)).eval()
    return convert(model, inner="eager")


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


both_orders = pytest.mark.parametrize("make", variants(converted_first, converted_last))


@both_orders
def test_the_function_is_unchanged(make: Any) -> None:
    assert close(logits(make()(ids())), llama()(ids()).logits)


@both_orders
def test_adapters_and_streams_train_and_nothing_else(make: Any) -> None:
    model = make()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    streams = set(stream_parameters(model))
    assert len(streams) == 12
    assert streams < trained
    assert all("lora_" in name for name in trained - streams)
    assert gradients(model).keys() == trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warned() as codes:
        train(model)
    assert not codes
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained


@pytest.mark.compat
@both_orders
def test_an_adapter_saves_and_loads_its_streams(make: Any, tmp_path: Path) -> None:
    model = make()
    train(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(convert(llama(), inner="eager"), str(tmp_path)).eval()
    assert close(logits(again(ids())), logits(model(ids())))


@both_orders
def test_without_its_adapter_the_model_is_what_it_was(make: Any) -> None:
    model = make()
    train(model)
    out = logits(model(ids()))
    with model.disable_adapter():
        assert close(logits(model(ids())), llama()(ids()).logits)
    assert torch.equal(logits(model(ids())), out)


@both_orders
def test_merging_keeps_the_trained_streams(make: Any) -> None:
    model = make()
    train(model)
    expected = logits(model(ids()))
    merged = model.merge_and_unload()
    assert close(logits(merged(ids())), expected, 1e-5)
    assert list(owners(merged)) == ["model"]
    assert set(stream_parameters(merged)) == {n for n in merged.state_dict() if ".mhc." in n}


@both_orders
def test_adapters_under_torch_compile(make: Any) -> None:
    model = make()
    train(model)
    expected = logits(model(ids()))
    assert close(logits(torch.compile(model, backend="mhc", options={"inner": "eager"})(ids())), expected)


@pytest.mark.parametrize("before", variants(True, False))
def test_gradient_checkpointing_on_frozen_weights(before: bool) -> None:
    expected = gradients(converted_last().train())
    model = llama(use_cache=False)
    if before:
        model.gradient_checkpointing_enable()
    model = convert(get_peft_model(model, lora()), inner="aot_eager").train()
    if not before:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert not disagree(gradients(model), expected, 1e-5)


def test_two_adapters_have_streams_of_their_own() -> None:
    model = converted_first()
    train(model)
    first = logits(model(ids()))
    model.add_adapter("other", lora(modules_to_save=["mhc"]))
    model.set_adapter("other")
    assert close(logits(model(ids())), llama()(ids()).logits)
    model.set_adapter("default")
    assert torch.equal(logits(model(ids())), first)


def test_streams_that_peft_froze_are_told_and_can_be_thawed() -> None:
    model = get_peft_model(convert(llama(), inner="eager"), lora())
    with warned() as codes:
        found = gradients(model.train())
    assert codes == ["MHC210"]
    assert not found.keys() & set(stream_parameters(model))
    for p in stream_parameters(model).values():
        p.requires_grad_()
    assert found.keys() | set(stream_parameters(model)) == gradients(model).keys()


def test_no_warning_of_frozen_streams_where_nothing_trains() -> None:
    model = get_peft_model(convert(llama(), inner="eager"), lora())
    with warned() as codes:
        model.eval()(ids())
        with torch.no_grad():
            model.train()(ids())
        convert(chain(), ids(), inner="eager").requires_grad_(False).train()(ids())
    assert not codes


def test_an_unconverted_model_with_adapters_at_its_first_call() -> None:
    model = get_peft_model(llama(), lora())
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    with warned() as codes:
        found = gradients(step)
    assert codes == ["MHC302"]
    assert {name.removeprefix("_orig_mod.") for name in found} > set(stream_parameters(model))
    shake(model)
    assert torch.equal(logits(step(ids())), logits(model(ids())))


def test_prompt_tuning() -> None:
    model = convert(llama(), inner="eager")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(model, config)
    for p in stream_parameters(model).values():
        p.requires_grad_()
    prompted(input_ids=ids(), labels=ids()).loss.backward()
    assert {name for name, p in prompted.named_parameters() if p.grad is not None} > set(stream_parameters(prompted))
