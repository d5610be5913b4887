"""Training a converted model: gradients, optimizers, precision, dropout, shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import chain, close, disagree, gpt2, gradients, ids, llama, loss_of, shake, t5, variants
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mhc_compile import OverEncodingSettings, convert, parameter_groups, stream_parameters
from mhc_compile.kernels.spec import StreamSpec


def hf_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids(seed=1)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("make", "inner"), variants((llama, "aot_eager"), (gpt2, "eager"), (t5, "eager")))
def test_gradients_at_the_start_are_those_of_the_residual_model(make: Any, inner: str) -> None:
    model = make()
    expected = hf_gradients(model)
    found = hf_gradients(convert(model, inner=inner))
    assert not disagree(found, expected, 2e-6)
    assert found.keys() - expected.keys() == set(stream_parameters(model))


def test_gradients_in_double_precision_agree_far_beyond_float32() -> None:
    model = chain().double()
    expected = gradients(model)
    # What remains is the start's own rounding: its biases are kept in float32.
    assert not disagree(gradients(convert(model, ids(), inner="eager").double()), expected, 1e-7)


@pytest.mark.compat
def test_three_steps_change_every_stream_parameter() -> None:
    model = convert(llama(), inner="aot_eager").train()
    before = {name: p.detach().clone() for name, p in stream_parameters(model).items()}
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert not [name for name, p in stream_parameters(model).items() if torch.equal(p, before[name])]


def test_coefficients_may_have_a_rate_of_their_own() -> None:
    model = convert(llama(), inner="eager", exit="head", over_encoding=OverEncodingSettings(order=2, heads=2, rows=64))
    named = {id(p): name for name, p in model.named_parameters()}
    coefficients = {name for name in stream_parameters(model) if "over_encoding" not in name}
    groups = parameter_groups(model, weight_decay=0.1, lr=1e-3, coefficient_lr=1e-2)
    assert sorted(named[id(p)] for g in groups for p in g["params"]) == sorted(named.values())
    assert {named[id(p)] for g in groups if g["lr"] == 1e-2 for p in g["params"]} == coefficients
    decay = {named[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert {name.split(".")[-1] for name in coefficients if decay[name]} == {"phi"}
    together = parameter_groups(model, weight_decay=0.1, lr=1e-3)
    assert {named[id(p)]: g["weight_decay"] for g in together for p in g["params"]} == decay


def test_gradients_accumulate_over_batches() -> None:
    model = convert(chain(), ids(), inner="aot_eager")
    shake(model)
    one, two = gradients(model, 0), gradients(model, 1)
    model.zero_grad()
    for seed in (0, 1):
        loss_of(model, seed).backward()
    total = {name: p.grad for name, p in model.named_parameters()}
    assert not disagree(total, {name: one[name] + two[name] for name in one}, 1e-6)


def test_gradients_of_inductor_equal_those_of_the_eager_call() -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model)
    expected = gradients(model)
    model.zero_grad()
    loss_of(torch.compile(model, backend="mhc")).backward()
    assert not disagree({name: p.grad for name, p in model.named_parameters()}, expected, 1e-5)


def test_dropout_of_the_residual_stream_drops_what_it_dropped() -> None:
    model = gpt2(resid_pdrop=0.3, attn_pdrop=0.2, embd_pdrop=0.1).train()
    torch.manual_seed(5)
    expected = model(ids(), labels=ids())
    convert(model, inner="eager")
    assert model.training
    torch.manual_seed(5)
    assert close(model(ids(), labels=ids()).logits, expected.logits)
    model.eval()
    assert torch.equal(model(ids()).logits, model(ids()).logits)


def test_train_and_eval_mode_switch_dropout() -> None:
    model = convert(chain(dropout=0.5), ids(), inner="aot_eager")
    expected = model(ids())
    model.train()
    assert not close(model(ids()), expected)
    model.eval()
    assert torch.equal(model(ids()), expected)


def test_modes_without_gradients() -> None:
    model = convert(chain(), ids(), inner="aot_eager")
    expected = model(ids())
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = model(ids())
        assert close(out, expected)
        assert not out.requires_grad
    model(ids()).sum().backward()


@pytest.mark.parametrize("inner", variants("aot_eager", "eager"))
def test_autocast_keeps_to_the_residual_model(inner: str) -> None:
    model = llama()
    exact = copy.deepcopy(model).double()(ids()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residual = model(ids()).logits
        out = convert(model, inner=inner)(ids(), labels=ids())
        out.loss.backward()
    assert out.logits.dtype == residual.dtype == torch.bfloat16
    error = (out.logits.double() - exact).abs().max()
    assert error <= 2 * (residual.double() - exact).abs().max()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_coefficients_stay_in_float32_under_autocast() -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model, 1.0)
    site = model.mhc.get_submodule("layers.0#0")
    X = torch.randn(2, 3, 4, 32)
    arguments = (X, site.phi, site.alpha, site.bias, str(StreamSpec()))
    plain = torch.ops.mhc.coefficients(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.ops.mhc.coefficients(*arguments)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize(("dtype", "inner"), variants((torch.bfloat16, "aot_eager"), (torch.float16, "eager")))
def test_half_precision_models_err_no_more_than_twice_the_residual(dtype: torch.dtype, inner: str) -> None:
    model = llama()
    exact = copy.deepcopy(model).double()(ids()).logits
    model.to(dtype)
    residual = model(ids()).logits
    out = convert(model, inner=inner)(ids())
    assert out.logits.dtype == dtype
    assert (out.logits.double() - exact).abs().max() <= 2 * (residual.double() - exact).abs().max()
    assert {p.dtype for p in stream_parameters(model).values()} == {torch.float32}
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in stream_parameters(model).values())


def test_a_gradient_scaler_for_float16() -> None:
    model = convert(chain(), ids(), inner="aot_eager")
    before = model.head.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not torch.equal(model.head.weight, before)


@pytest.mark.slow
def test_batch_and_sequence_may_change_with_few_recompiles() -> None:
    shapes = [(2, 8), (2, 12), (3, 12), (4, 5), (3, 20), (7, 9), (1, 7), (2, 1)]
    model = llama()
    expected = [model(ids(*s)).logits for s in shapes]
    convert(model, inner="eager")
    torch._dynamo.utils.counters.clear()
    assert all(close(model(ids(*s)).logits, e) for s, e in zip(shapes, expected, strict=True))
    # Static, then dynamic in one and in both sizes; sizes of 1 are always graphs of their own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def test_more_shapes_than_dynamo_compiles_by_default() -> None:
    model = convert(chain(), ids(), inner="eager")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
        for length in range(2, 14):
            assert model(ids(1, length)).shape == (1, length, 64)


def test_deterministic_algorithms() -> None:
    model = convert(chain(), ids(), inner="aot_eager")
    torch.use_deterministic_algorithms(True)
    try:
        one, two = gradients(model), gradients(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_streams_train_on_frozen_weights() -> None:
    model = convert(chain().requires_grad_(False), ids(), inner="aot_eager")
    assert gradients(model).keys() == set(stream_parameters(model))


@pytest.mark.compat
def test_a_trainer_of_transformers(tmp_path: Path) -> None:
    model = convert(llama(), inner="aot_eager")
    before = {name: p.detach().clone() for name, p in stream_parameters(model).items()}
    data: Any = [{"input_ids": ids(1, seed=i)[0], "labels": ids(1, seed=i)[0]} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    phis = [name for name in before if name.endswith("phi")]
    assert not [name for name in phis if torch.equal(stream_parameters(model)[name], before[name])]
