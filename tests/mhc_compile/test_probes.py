"""Probes: sampled steps have the results of plain ones, are compiled once, and record what the equations say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling import converted, needs_compiler, same, sampled
from tiny_models import chain, close, gradients, ids, llama, logits, loss_of, shake, state, t5, warned
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mhc_compile import MHCError, Probes, convert
from mhc_compile.measure import measure_streams
from mhc_compile.parameters import owners


def results(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients and the random state behind them."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of(model)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found, torch.get_rng_state()


# --- what stays as it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options"),
    [
        {"inner": "eager"},
        pytest.param({"inner": "aot_eager", "kernels": "all"}, marks=needs_compiler),
        pytest.param({"inner": "aot_eager", "kernels": "all", "recompute": "auto"}, marks=needs_compiler),
        pytest.param(
            {"inner": "aot_eager", "kernels": "all", "recompute": "auto", "form": "attnres"}, marks=needs_compiler
        ),
        {"inner": "eager", "form": "hc"},
        {"inner": "eager", "form": "hc_static"},
        {"inner": "eager", "convention": "deepseek_v4"},
        pytest.param({"inner": "inductor", "kernels": "all"}, marks=[pytest.mark.slow, needs_compiler]),
        pytest.param({"inner": "inductor", "kernels": "none"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_sampled_step_has_the_results_of_a_plain_one(options: dict[str, Any]) -> None:
    model = converted(chain(depth=3, dropout=0.1), **options).train()
    before = copy.deepcopy(model.state_dict())
    plain = results(model)
    found: list[Any] = []
    (sample,) = sampled(model, lambda: found.append(results(model)))
    (probed,) = found
    assert torch.equal(plain[0], probed[0])
    assert same(plain[1], probed[1])
    assert torch.equal(plain[2], probed[2])
    assert same(before, model.state_dict())
    gradient = "output_gradient" if options.get("form") == "attnres" else "branch_gradient"
    assert sample.values[gradient].min() > 0
    again = results(model)
    assert torch.equal(plain[0], again[0])
    assert same(plain[1], again[1])


def test_sampling_compiles_one_more_graph_and_no_other() -> None:
    torch._dynamo.reset()
    model = converted(inner="aot_eager")
    counters = torch._dynamo.utils.counters
    probes = Probes(model, every=3)
    counters.clear()
    compiled = []
    for _ in range(8):
        with probes.step():
            loss_of(model).backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled == [1, *[2] * 7]
    assert counters["aot_autograd"]["total"] == 2
    assert [sample.step for sample in probes.samples] == [0, 3, 6]
    with torch.no_grad():
        loss_of(model)
        with probes.step(), probes.step():  # the second one is the ninth
            loss_of(model)
        assert counters["stats"]["unique_graphs"] == 4


def test_the_model_keeps_nothing_of_a_sampled_step() -> None:
    model = converted()
    loss_of(model)
    before, names = state(model), [vars(m).keys() for m in model.modules()]
    sampled(model, lambda: loss_of(model))
    with pytest.raises(ZeroDivisionError):
        sampled(model, lambda: 1 / 0)
    assert state(model) == before
    assert [vars(m).keys() for m in model.modules()] == names
    assert all(p.probe_slot is None for p in owners(model).values())


@needs_compiler
@pytest.mark.parametrize(
    ("form", "recompute"), [("mhc", "off"), ("mhc", "auto"), pytest.param("attnres", "auto", marks=pytest.mark.slow)]
)
def test_no_more_is_kept_for_the_backward_pass(form: str, recompute: str) -> None:
    depth = 6 if form == "mhc" else 3
    model = converted(chain(depth=depth), inner="aot_eager", kernels="all", form=form, recompute=recompute)

    def kept() -> int:
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_of(model)
        return sum(held.values())

    plain = kept()
    found: list[int] = []
    sampled(model, lambda: found.append(kept()))
    assert found == [plain]


def test_outputs_without_gradients_stay_without() -> None:
    model = converted(inner="aot_eager")
    for p in model.parameters():
        p.requires_grad_(False)
    found: list[Tensor] = []
    with warned():
        (sample,) = sampled(model, lambda: found.append(logits(model(ids()))))
    assert not found[0].requires_grad
    assert "branch_gradient" not in sample.values


# --- however the model is called ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_from_outside() -> None:
    model = converted(llama())
    (expected,) = sampled(model)
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    plain = gradients(step)
    found: list[dict[str, Tensor]] = []
    (sample,) = sampled(step, lambda: found.append(gradients(step)))
    assert same(plain, found[0])
    assert sample.sites == expected.sites
    assert all(close(sample.values[name], t, 1e-5) for name, t in expected.values.items())


def test_a_model_converted_by_its_first_call() -> None:
    model = chain()
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "streams": 2})
    probes = Probes(step, every=5)
    with warned() as codes:
        for _ in range(7):
            with probes.step():
                step(ids()).sum().backward()
    assert codes == ["MHC302"]
    assert [sample.step for sample in probes.samples] == [1, 5]
    assert probes.samples[0].sites == ("layers.0#0", "layers.1#0")


def test_microbatches_are_one_sample() -> None:
    model = converted(inner="aot_eager")
    parts = [sampled(model, lambda seed=seed: loss_of(model, seed).backward())[0] for seed in (0, 1)]
    (both,) = sampled(model, lambda: [loss_of(model, seed).backward() for seed in (0, 1)])
    assert both.tokens == sum(part.tokens for part in parts)
    for name, value in both.values.items():
        pair = torch.stack([part.values[name] for part in parts])
        squares = name in ("streams", "branch")
        if name.endswith("_max"):
            expected = pair.amax(0)
        elif name.endswith("_gradient"):
            expected = pair.square().sum(0).sqrt()
        else:
            expected = pair.square().mean(0).sqrt() if squares else pair.mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode: Callable[[], Any]) -> None:
    model = converted(inner="aot_eager")
    (trained,) = sampled(model)
    with mode():
        (sample,) = sampled(model, lambda: model(ids()))
    assert set(trained.values) - set(sample.values) == {"streams_gradient", "branch_gradient"}
    assert all(torch.equal(t, trained.values[name]) for name, t in sample.values.items())


def test_two_owners() -> None:
    model = convert(t5(), streams=4, inner="eager")
    shake(model)
    batch = {"input_ids": ids(), "labels": ids(2, 5), "use_cache": False}
    encoder, decoder = sampled(model, lambda: model(**batch).loss.backward())
    assert (encoder.owner, decoder.owner) == ("encoder", "decoder")
    assert (encoder.tokens, decoder.tokens) == (16, 10)
    assert all(s.values["streams_gradient"].min() > 0 for s in (encoder, decoder))
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    again = sampled(model, lambda: step(**batch).loss.backward())
    for a, b in zip(again, (encoder, decoder), strict=True):
        assert all(close(a.values[name], t, 1e-4) for name, t in b.values.items())
    expected = measure_streams(model, batch)
    assert encoder.values["separation"].tolist() == pytest.approx(expected["encoder"].separation, rel=1e-4)
    assert decoder.values["separation"].tolist() == pytest.approx(expected["decoder"].separation, rel=1e-4)


def test_generation() -> None:
    model = converted(llama())
    found: list[Tensor] = []
    with torch.no_grad():
        expected = model.generate(ids(1, 4), max_new_tokens=3, do_sample=False)
        (sample,) = sampled(model, lambda: found.append(model.generate(ids(1, 4), max_new_tokens=3, do_sample=False)))
    assert torch.equal(found[0], expected)
    assert sample.tokens == expected.shape[1] - 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_recorded_once(reentrant: bool) -> None:
    model = converted(inner="aot_eager")
    x = torch.randn(2, 8, 32, requires_grad=True)

    def run() -> None:
        h = checkpoint(lambda x: model(ids()) + x.sum(), x, use_reentrant=reentrant)
        F.cross_entropy(h.flatten(0, 1), ids().flatten()).backward()

    (sample,) = sampled(model, run)
    assert sample.tokens == 16
    assert ("branch_gradient" in sample.values) != reentrant


@pytest.mark.slow
def test_layers_that_are_checkpointed() -> None:
    model = converted(llama(), inner="aot_eager").train()
    model.gradient_checkpointing_enable()
    plain = gradients(model)
    found: list[dict[str, Tensor]] = []
    (sample,) = sampled(model, lambda: found.append(gradients(model)))
    assert same(plain, found[0])
    assert sample.tokens == 16


def test_numeric_debugging() -> None:
    (sample,) = sampled(converted(debug="numeric"))
    assert sample.tokens == 16


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = converted()
    for every in (0, 1.5, True):
        with pytest.raises(MHCError, match="MHC204"):
            Probes(model, every=every)  # type: ignore[arg-type]
    with pytest.raises(MHCError, match="MHC410"):
        sampled(chain())
    probes = Probes(model)
    with pytest.raises(MHCError, match="MHC231"), probes.step(), Probes(model).step():
        pass
    loss_of(model)
    assert all(p.probe_slot is None for p in owners(model).values())
    with warned() as codes, Probes(model).step():
        pass
    assert codes == ["MHC230"]
