"""A form whose state is the list of earlier outputs, as every form is used: conversion, training, folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import chain, gpt2, ids, llama, logits, loss_of
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import mhc_compile
from mhc_compile import MHCError, convert
from mhc_compile.conversion import to_residual
from mhc_compile.kernels import forms
from mhc_compile.kernels.forms import DepthForm, Parameter
from mhc_compile.kernels.spec import FORM_NAMES, StreamSpec
from mhc_compile.kernels.start import Start
from mhc_compile.parameters import owners


class EachChannel(DepthForm):
    """A weight for every channel of every earlier output, and one for all, as in a list of residual branches."""

    name = "each_channel"

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:
        return {
            "weights": Parameter((index + 1, hidden), lambda: torch.ones(index + 1, hidden)),
            "scale": Parameter((1,), lambda: torch.ones(1)),
        }

    def read(self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor) -> Tensor:
        weights = parameters["weights"] * parameters["scale"]
        total = sum(weights[place] * output for place, output in zip(places, outputs, strict=True))
        return total.to(outputs[0].dtype)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    forms.register(EachChannel())
    yield
    del forms.FORMS["each_channel"], FORM_NAMES["each_channel"]


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(vocab_size=100, attn_implementation="sdpa", **sizes)).eval()


def converted(model: nn.Module, **options: object) -> nn.Module:
    return convert(model, form="each_channel", inner="eager", **options)


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_conversion_keeps_the_function_and_every_weight_learns(make: type[nn.Module]) -> None:
    """The streams of BERT go through a norm after every site, where its lists begin again."""
    model = make()
    with torch.no_grad():
        before = logits(model(ids()))
        after = logits(converted(model, debug="numeric")(ids()))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    logits(model(ids())).square().mean().backward()
    (parameters,) = owners(model).values()
    for site in parameters.sites:
        gradient = parameters.get_parameter(f"{site}.weights").grad
        assert gradient is not None
        assert gradient.abs().max() > 0
    if make is llama:
        shapes = [tuple(parameters.get_parameter(f"{site}.weights").shape) for site in parameters.sites]
        assert shapes == [(i + 1, parameters.hidden) for i in range(len(shapes))]


def test_the_weights_weigh() -> None:
    """Without earlier outputs every branch reads the embedding alone."""
    model = convert(chain(depth=2), ids(), form="each_channel", inner="eager")
    (parameters,) = owners(model).values()
    before = logits(model(ids())).detach()
    with torch.no_grad():
        for site in parameters.sites:
            parameters.get_parameter(f"{site}.weights")[1:] = 0
    assert not torch.allclose(logits(model(ids())), before)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_and_the_way_back(inner: str, tmp_path: Path) -> None:
    model = convert(llama(), form="each_channel", inner=inner)
    optimizer = torch.optim.AdamW(mhc_compile.parameter_groups(model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = mhc_compile.from_pretrained(tmp_path)
    assert {str(p.spec) for p in owners(again).values()} == {"streams=4 exit=mean form=each_channel"}
    with torch.no_grad():
        torch.testing.assert_close(logits(again(ids())), logits(model(ids())), rtol=1e-4, atol=1e-5)
    with pytest.raises(MHCError, match="MHC41"):
        to_residual(model)


def test_to_residual() -> None:
    model = llama()
    before = logits(model(ids())).detach()
    assert torch.equal(logits(to_residual(converted(model))(ids())), before)


def test_a_memory_needs_streams() -> None:
    settings = mhc_compile.MemorySettings.preset("v41", layers=(1,), rows_per_head=50, row_width=4, compress=False)
    with pytest.raises(MHCError, match=r"MHC204 .*each_channel"):
        converted(llama(), engram=settings)


def test_names_that_are_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC204 .*already"):
        forms.register(EachChannel())
    other = type("Other", (EachChannel,), {"name": "not-a-name"})
    with pytest.raises(MHCError, match=r"MHC204 .*identifier"):
        forms.register(other())
