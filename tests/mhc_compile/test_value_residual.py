"""Value residual: the published equation by hand over a model's own modules, in float64; caches, folders, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attending import SPELLINGS, Attending, C
from tiny_models import chain, gpt2, ids, llama, logits, loss_of, shake, t5
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile import MHCError, convert, stream_parameters
from mhc_compile.conversion import to_residual
from mhc_compile.parameters import owners


def by_hand(plain: Attending, converted: nn.Module, input_ids: Tensor) -> Tensor:
    """What `plain` computes when its second attention keeps a part of the first one's values."""
    (parameters,) = owners(converted).values()
    assert list(parameters.sites) == ["#2"] or len(parameters.sites) == 1
    (weights,) = (p.double() for p in parameters.parameters())
    x, first = plain.embed(input_ids), None
    for k in range(2):
        h = plain.norms[2 * k](x)
        weight, bias = plain.projections[k].weight, plain.projections[k].bias
        query, key, value = F.linear(h, weight, bias).split(C, -1)
        value = value if first is None else weights[0] * first + weights[1] * value
        first = value if first is None else first
        heads = (y.unflatten(-1, (2, C // 2)).transpose(1, 2) for y in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + plain.outs[k](mixed.transpose(1, 2).flatten(2))
        x = x + plain.mlps[k](plain.norms[2 * k + 1](x))
    return plain.head(x)


@pytest.mark.parametrize(("spelling", "joined"), SPELLINGS)
def test_the_equation(spelling: str, joined: bool) -> None:
    model, tokens = Attending(spelling=spelling, joined=joined).double().eval(), ids()
    with torch.no_grad():
        before = model(tokens)
    plain = copy.deepcopy(model)
    convert(model, tokens, form="value_residual", inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)
    shake(model, 0.5)
    expected, result = by_hand(plain, model, tokens), model(tokens)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert (result - before).abs().max() > 1e-3
    (own,) = stream_parameters(model).values()
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), [own]) for x in (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def call(model: Any) -> Tensor:
    if "T5" in type(model).__name__:
        return model(input_ids=ids(), decoder_input_ids=ids(seed=1)).logits
    return logits(model(ids()))


@pytest.mark.parametrize(
    "make", [llama, pytest.param(gpt2, marks=pytest.mark.slow), pytest.param(t5, marks=pytest.mark.slow)]
)
def test_conversion_keeps_the_function_and_goes_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        before = call(model)
        after = call(convert(model, form="value_residual", inner="eager", debug="numeric"))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(call(to_residual(model)), before, rtol=0, atol=0)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_generation_and_folders(inner: str, tmp_path: Path) -> None:
    model = convert(llama(), form="value_residual", inner=inner)
    assert len(mhc_compile.inspect(model).sites) >= 1
    shake(model, 0.5)
    for _ in range(2):
        loss_of(model).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    generated = [
        model.generate(ids()[:1, :4], max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (False, True)
    ]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path)
    again = mhc_compile.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(again(ids())), logits(model(ids())), rtol=1e-4, atol=1e-5)


def test_a_static_cache() -> None:
    model = convert(llama(), form="value_residual", inner="eager")
    shake(model, 0.5)
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids()[:1, :4], use_cache=False, **settings)
    assert torch.equal(plain, model.generate(ids()[:1, :4], cache_implementation="static", **settings))


def test_a_model_without_a_second_attention_is_refused() -> None:
    model = chain(depth=3)
    with pytest.raises(MHCError, match=r"MHC204 .*second attention"):
        convert(model, ids(), form="value_residual")
    assert not owners(model)


class Shared(nn.Module):
    """Attention whose keys are its values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, C)
        self.projections = nn.ModuleList(nn.Linear(C, C) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for projection in self.projections:
            h = projection(F.rms_norm(x, (C,)))[:, None]
            x = x + F.scaled_dot_product_attention(h, h, h).squeeze(1)
        return x


def test_keys_that_are_values_are_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC108 .*one projection"):
        convert(Shared(), ids(), form="value_residual")
