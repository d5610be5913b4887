"""Quantisers and the streams: what replaces linear layers, what goes by shape, and lists of what to leave out."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from tiny_models import ids, llama, shake
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers.quantizers.quantizers_utils import should_convert_module

import mhc_compile
from mhc_compile.emitting.file import load


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    converted = mhc_compile.convert(llama(), inner="eager")
    shake(converted)
    emitted = load(mhc_compile.emit(llama(), tmp_path_factory.mktemp("emitted") / "source.py")).add_streams(llama())
    emitted.load_state_dict(converted.state_dict())
    return converted, emitted


@pytest.fixture
def models(both: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A converted model and the emitted one with its weights."""
    return copy.deepcopy(both)


def logits(model: Any) -> Tensor:
    result: Tensor = model(ids()).logits.detach()
    return result


def of_streams(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith((".phi", ".alpha", ".bias"))}


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), Float8WeightOnlyConfig()], ids=["int8", "float8"])
def test_torchao_leaves_the_streams_alone(models: tuple[nn.Module, nn.Module], config: Any) -> None:
    right, results = logits(models[0]), []
    for model in models:
        before = copy.deepcopy(of_streams(model))
        quantize_(model, config)
        assert all(type(p) is nn.Parameter and torch.equal(p, before[name]) for name, p in of_streams(model).items())
        kinds = [type(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
        assert nn.Parameter not in kinds
        results.append(logits(model))
    assert 1e-4 < float((results[0] - right).norm() / right.norm()) < 0.1
    torch.testing.assert_close(*results)


def test_the_names_to_leave_out(models: tuple[nn.Module, nn.Module]) -> None:
    converted, emitted = models
    assert mhc_compile.stream_modules(converted) == ["model.mhc"]
    sites = [f"model.layers.{layer}.mhc_{branch}" for layer in range(2) for branch in ("self_attn", "mlp")]
    assert mhc_compile.stream_modules(emitted) == sites
    assert mhc_compile.stream_modules(llama()) == []
    for model in models:
        names = mhc_compile.stream_modules(model)
        rules = [re.compile(re.escape(name)) for name in names]  # as GPTQ matches them
        left = [name for name, _ in model.named_modules() if not should_convert_module(name, names)]
        assert left == [name for name, _ in model.named_modules() if any(rule.match(name) for rule in rules)]
        parameters = [f"{name}.{p}" for name in left for p, _ in model.get_submodule(name).named_parameters()]
        assert set(parameters) == set(of_streams(model))


def test_a_quantiser_that_goes_by_shape_leaves_out_what_it_is_told(models: tuple[nn.Module, nn.Module]) -> None:
    results = []
    for model in models:
        kept = tuple(f"{name}." for name in mhc_compile.stream_modules(model))
        before = copy.deepcopy(of_streams(model))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim >= 2 and not name.startswith(kept):
                    p.copy_(p.to(torch.float8_e4m3fn))
        assert all(torch.equal(p, before[name]) for name, p in of_streams(model).items())
        results.append(logits(model))
    torch.testing.assert_close(*results)
