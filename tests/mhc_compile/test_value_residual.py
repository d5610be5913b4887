"""Value residual: the published equation by hand over a model's own modules, in float64; caches, folders, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attending import SPELLINGS, Attending, C, converted
from tiny_models import chain, gpt2, ids, learned, llama, predicted, shake, static_cache_agrees, t5, used
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile import MHCError, convert, stream_parameters
from mhc_compile.conversion import to_residual
from mhc_compile.parameters import owners


def by_hand(plain: Attending, converted: nn.Module, input_ids: Tensor) -> Tensor:
    """Compute `plain`, whose second attention keeps a part of the first one's values."""
    (parameters,) = owners(converted).values()
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
    plain, model = converted(spelling, joined, "value_residual", 0.5)
    expected, result = by_hand(plain, model, ids()), model(ids())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    (own,) = stream_parameters(model).values()
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), [own]) for x in (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "make", [llama, pytest.param(gpt2, marks=pytest.mark.slow), pytest.param(t5, marks=pytest.mark.slow)]
)
def test_conversion_keeps_the_function_and_goes_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        before = predicted(model)
        after = predicted(convert(model, form="value_residual", inner="eager", debug="numeric"))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(predicted(to_residual(model)), before, rtol=0, atol=0)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_generation_and_folders(inner: str, tmp_path: Path) -> None:
    model = convert(llama(), form="value_residual", inner=inner)
    (parameters,) = owners(model).values()
    assert list(parameters.sites) == ["layers.1#0"]  # the second attention; the first one's values are the residual
    learned(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    used(model, tmp_path)


def test_a_static_cache() -> None:
    model = convert(llama(), form="value_residual", inner="eager")
    shake(model, 0.5)
    assert static_cache_agrees(model)


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
