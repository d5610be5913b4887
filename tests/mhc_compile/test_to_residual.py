"""Taking a converted model back, in memory."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import hooks
from folders import with_streams
from leftovers import changed, parts_of
from memories import small
from peft import LoraConfig, get_peft_model
from tiny_models import ids, llama
from torch import nn
from transformers import DynamicCache, LlamaModel

from mhc_compile import MHCError, OverEncodingSettings, convert, to_residual
from mhc_compile.parameters import is_converted, owners


@pytest.mark.compat
def test_to_residual_undoes_convert(tmp_path: Path) -> None:
    model = llama()
    kind, names = type(model.model), set(model.state_dict())
    with torch.no_grad():
        before = model(ids()).logits
        assert to_residual(convert(model, inner="eager")) is model
        assert torch.equal(model(ids()).logits, before)
    assert type(model.model) is kind
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "residual")
    assert (tmp_path / "residual" / "model.safetensors").is_file()
    convert(model, streams=2, inner="eager")
    assert owners(model)["model"].spec.streams == 2


def test_to_residual_refuses_trained_streams() -> None:
    model = with_streams(llama())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(MHCError, match="MHC411"):
        to_residual(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert is_converted(model.model)


def test_to_residual_refuses_a_residual_model() -> None:
    with pytest.raises(MHCError, match="MHC410"):
        to_residual(llama())


# --- nothing is left --------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return llama()


def adapted() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def frozen() -> nn.Module:
    model = llama().requires_grad_(False)
    model.enable_input_require_grads()
    return model


def with_its_own_forward() -> nn.Module:
    model = llama()
    model.model.forward = model.model.forward
    return model


LOOKUPS = {"engram": small("v41"), "over_encoding": OverEncodingSettings(order=2, heads=2, rows=30)}


@pytest.mark.parametrize(
    ("make", "options"),
    [(plain, {}), (plain, LOOKUPS), (adapted, {}), (frozen, {}), (with_its_own_forward, {})],
    ids=["plain", "lookups", "adapted", "frozen", "own forward"],
)
def test_nothing_is_left_behind(make: Any, options: dict[str, Any]) -> None:
    model = make().eval()
    call = {"input_ids": ids(), "output_hidden_states": bool(options)}
    with torch.no_grad():
        model(input_ids=ids())  # the libraries load parts of theirs
        before, crop = parts_of(model), vars(DynamicCache.__mro__[1])["crop"]
        convert(model, inner="eager", **options)
        model(**call)
        assert changed(before, parts_of(model))
        assert (vars(DynamicCache.__mro__[1])["crop"] is crop) == (not options)
    to_residual(model)
    assert changed(before, parts_of(model)) == []


def test_nothing_is_left_of_torchs_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    before = parts_of(model)
    convert(model, x, inner="eager")
    model(x)
    to_residual(model)
    assert changed(before, parts_of(model)) == []


def test_hooks_of_accelerate_call_the_residual_forward_again() -> None:
    model = convert(llama(), inner="eager")
    hooks.add_hook_to_module(model.model, hooks.ModelHook())
    to_residual(model)
    hooks.remove_hook_from_module(model.model)
    assert model.model.forward == types.MethodType(LlamaModel.forward, model.model)
    assert torch.equal(model(ids()).logits, llama()(ids()).logits)


def test_caches_follow_until_the_last_owner_is_restored() -> None:
    cache = DynamicCache.__mro__[1]
    crop = vars(cache)["crop"]
    first, second = (convert(llama(), inner="eager", **LOOKUPS) for _ in range(2))
    third = copy.deepcopy(second)
    for model in (first, second):
        to_residual(model)
        assert vars(cache)["crop"] is not crop
    to_residual(third)
    assert vars(cache)["crop"] is crop
