"""Hyper-Connections as a form of conversion: whatever a user does with streams works with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import chain, gpt2, ids, llama, logits, loss_of, shake, t5
from torch import nn

import mhc_compile
from mhc_compile import MHCError, convert
from mhc_compile.cli import main
from mhc_compile.measure import measure_streams
from mhc_compile.parameters import owners

FORMS = ["hc", "hc_static"]
# Where the static form takes the same way as the dynamic one.
ONE_IN_CI = ["hc", pytest.param("hc_static", marks=pytest.mark.slow)]


def call(model: nn.Module) -> torch.Tensor:
    if hasattr(model, "encoder") or "T5" in type(model).__name__:
        return model(input_ids=ids(), decoder_input_ids=ids(seed=1)).logits
    return model(ids()).logits


@pytest.mark.parametrize("form", ONE_IN_CI)
@pytest.mark.parametrize("make", [gpt2, t5])
def test_conversion_keeps_the_function(make: Any, form: str) -> None:
    model = make()
    with torch.no_grad():
        before = call(model)
        after = call(convert(model, streams=3, form=form, inner="eager", debug="numeric"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ONE_IN_CI)
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_inner_compiler_gives_the_same(form: str, inner: str) -> None:
    found = []
    for how in ("eager", inner):
        model = convert(llama(), form=form, inner=how)
        shake(model)
        loss = loss_of(model)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_training_moves_the_parameters_and_separates_the_streams(form: str) -> None:
    model = convert(llama(), form=form, inner="eager")
    optimizer = torch.optim.AdamW(mhc_compile.parameter_groups(model, weight_decay=0.1), lr=1e-2)
    first = None
    for _ in range(5):
        loss = loss_of(model)
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first
    fresh = dict(convert(llama(), form=form, inner="eager").named_parameters())
    moved = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if ".mhc." in n and not torch.equal(p, fresh[n])}
    assert moved == ({"phi", "alpha", "bias"} if form == "hc" else {"bias"})
    found = measure_streams(model, {"input_ids": ids()})["model"]
    assert found.separation[-1] > 1e-3
    # Nothing holds the matrices to a manifold.
    assert found.gain.forward_max > 1.001


@pytest.mark.parametrize("form", FORMS)
def test_folders(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "residual")
    source, target, back = (str(tmp_path / name) for name in ("residual", "hc", "back"))
    assert main(["convert", source, target, "--form", form, "--streams", "3"]) == 0
    model = mhc_compile.from_pretrained(target, inner="eager")
    assert {str(p.spec) for p in owners(model).values()} == {f"streams=3 exit=mean form={form}"}
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, llama()(ids()).logits, rtol=1e-5, atol=1e-5)
    assert main(["convert", target, back, "--to", "residual"]) == 0
    shake(model)
    model.save_pretrained(tmp_path / "trained")
    again = mhc_compile.from_pretrained(tmp_path / "trained", inner="eager")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert main(["inspect", target]) == 0
    assert f"form={form}" in capsys.readouterr().out
    assert main(["convert", source, str(tmp_path / "not"), "--form", form, "--manifold", "identity"]) == 2
    assert "MHC204" in capsys.readouterr().err
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("form", ONE_IN_CI)
def test_recomputation(form: str) -> None:
    found = []
    for recompute in ("off", "auto"):
        model = convert(llama(use_cache=False), form=form, inner="aot_eager", recompute=recompute)
        shake(model)
        loss_of(model).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_export_and_the_backend_on_an_unconverted_model(form: str) -> None:
    model = chain(depth=2)
    x = ids()
    with torch.no_grad():
        before = logits(model(x))
        step = torch.compile(model, backend="mhc", options={"form": form, "inner": "eager"})
        torch.testing.assert_close(logits(step(x)), before, rtol=1e-5, atol=1e-6)
        shake(model)
        program = mhc_compile.export(model, x)
        torch.testing.assert_close(logits(program.module()(x)), logits(model(x)), rtol=1e-5, atol=1e-6)


def test_a_memory_beside_them() -> None:
    settings = mhc_compile.MemorySettings.preset("v41", layers=(1,), rows_per_head=50, row_width=4, compress=False)
    model = convert(llama(), form="hc", engram=settings, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, llama()(ids()).logits, rtol=1e-5, atol=1e-5)


def test_a_convention_beside_them_is_refused() -> None:
    with pytest.raises(MHCError, match="MHC204"):
        convert(llama(), form="hc", convention="deepseek_v4")
