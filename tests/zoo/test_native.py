"""Published models that write their hyper-connections out by hand: raised whole, as exact as they are, and trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from sweep import logits_of, loss_of
from torch import Tensor, nn

import mhc_compile
from mhc_compile.capture import Captured, capture
from mhc_compile.diagnostics import MHCWarning
from mhc_compile.passes.base import Context
from mhc_compile.passes.native import Native
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.numeric import Float64Interpreter, widen
from mhc_compile.passes.observer import Observer
from mhc_compile.passes.pipeline import Pipeline

SITES = {
    "deepseek_v4": (4, "streams=4 convention=deepseek_v4 manifold=sinkhorn iterations=20 exit=head"),
    "text/glm5_next_text": (8, "streams=4 convention=glm5_next manifold=sinkhorn iterations=20 exit=mean"),
    "hy_v4": (6, "streams=4 convention=hy_v4 manifold=identity iterations=0 exit=head"),
}


# The third has 4000 nodes and a linear attention in Python: half a minute a test.
QUICK = [n if n != "text/glm5_next_text" else pytest.param(n, marks=pytest.mark.slow) for n in SITES]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Nothing is left out and warned of, unless a test says so.
        warnings.simplefilter("error", MHCWarning)
        yield


def far_from_start(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model with coefficients that differ from token to token and from stream to stream."""
    model, inputs = models.named(name)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "hc" in key:
                p.copy_((0.05 if p.ndim > 1 else 1.0) * torch.randn(p.shape, generator=rng))
    return model, inputs


def raised(found: Captured) -> tuple[Any, Context, list[str]]:
    """The graph behind `native`, verified whole, and the notes of the pass."""
    context, observer = Context(), Observer()
    steps = (Normalize(), Native())
    gm = Pipeline(steps).run(found.graph, context, observer, debug=True)
    return gm, context, observer.records[-1].notes


def in_float64(found: Captured, model: nn.Module) -> list[Tensor]:
    """The output in float64 and the gradients of its squares by the parameters, in the model's order."""
    inputs = [widen(x.detach().clone()) if isinstance(x, Tensor) else x for x in found.inputs]
    place = {id(x): i for i, x in enumerate(found.inputs)}
    leaves = [inputs[place[id(p)]].requires_grad_() for p in model.parameters() if id(p) in place]
    return [(out := logits_of(Float64Interpreter(found.graph).run(*inputs))).detach(), *gradients(out, leaves)]


def results(forward: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], found: Captured) -> list[Tensor]:
    held = {id(x) for x in found.inputs}
    out = logits_of(forward(**inputs))
    return [out.detach(), *gradients(out, [p for p in model.parameters() if id(p) in held])]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(out.double().square().sum(), leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]


def errors(got: list[Tensor], want: list[Tensor], floor: float = 1e-6) -> Tensor:
    """The root mean square error of each tensor as a share of its scale, or of `floor` times the largest."""
    assert [t.shape for t in got] == [t.shape for t in want]
    rms = torch.tensor(
        [
            [float(t.double().square().mean().sqrt()) for t in (a.double() - b, b)]
            for a, b in zip(got, want, strict=True)
        ]
    )
    # What a router gets through ties is zero up to rounding.
    return rms[:, 0] / rms[:, 1].clamp(min=floor * float(rms[:, 1].max()))


@pytest.mark.parametrize("name", SITES)
def test_every_site_is_raised_and_exact_in_float64(name: str) -> None:
    model, inputs = far_from_start(name)
    found = capture(model, (), inputs)
    before, size = in_float64(found, model), len(found.graph.graph.nodes)
    count, spec = SITES[name]
    gm, context, notes = raised(found)
    assert [site.spec for site in context.native] == [spec] * count
    assert len({site.name for site in context.native}) == count
    assert f"{count} hand-written sites raised: {spec}" in notes
    assert f"exit raised: {spec}" in notes
    assert sum(note.startswith("entry raised") for note in notes) == 1
    assert not any("left alone" in note for note in notes)
    text = str(gm.graph)
    for op, times in {"expand": 1, "coefficients": count, "aggregate": count, "distribute": count, "reduce": 1}.items():
        assert text.count(f"torch.ops.mhc.{op}.default") == times
    assert len(gm.graph.nodes) < 0.75 * size
    assert float(errors(in_float64(found, model), before).max()) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", QUICK)
def test_as_exact_as_the_eager_model(name: str, dtype: torch.dtype) -> None:
    ours, theirs = [], []
    for seed in (0, 1):
        torch._dynamo.reset()
        model, inputs = far_from_start(name, seed)
        # Weights that the dtype holds, so that float64 computes with the same ones.
        found = capture(model.to(dtype).float(), (), inputs)
        exact = in_float64(found, model)
        model.to(dtype)
        compiled = torch.compile(model, backend="mhc", fullgraph=True, options={"inner": "eager"})
        ours.append(errors(results(compiled, model, inputs, found), exact, 1e-4))
        theirs.append(errors(results(model, model, inputs, found), exact, 1e-4))
        assert len(dict(model.named_parameters())) == len(dict(models.named(name)[0].named_parameters()))
    a, b = torch.stack(ours), torch.stack(theirs)
    assert float(a[:, 0].square().mean().sqrt()) <= 2 * float(b[:, 0].square().mean().sqrt())
    assert float(a.square().mean().sqrt()) <= 2 * float(b.square().mean().sqrt())


# No part of compat: under torch 2.11 AOTAutograd does not trace the backward of transformers' grouped experts.
@pytest.mark.parametrize("name", QUICK)
def test_a_training_step_follows_the_eager_model(name: str) -> None:
    losses = []
    for backend in ("eager", "mhc"):
        torch._dynamo.reset()
        model, inputs = far_from_start(name)
        model.train()
        options = {"inner": "aot_eager"} if backend == "mhc" else None
        step = torch.compile(model, backend=backend, fullgraph=True, options=options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            out = logits_of(step(**inputs))
            loss = loss_of(out, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    assert losses[5] < losses[3]


@pytest.mark.parametrize("name", ["deepseek_v4", pytest.param("hy_v4", marks=pytest.mark.compat)])
def test_generation_is_that_of_the_eager_model(name: str) -> None:
    model, inputs = far_from_start(name)
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    want = model.generate(inputs["input_ids"], **given)
    model.forward = torch.compile(model.forward, backend="mhc", options={"inner": "eager"})
    assert torch.equal(model.generate(inputs["input_ids"], **given), want)


def test_debug_compares_the_passes() -> None:
    model, inputs = far_from_start("hy_v4")
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "debug": "numeric"})
    with torch.no_grad():
        assert float(errors([logits_of(step(**inputs))], [logits_of(model(**inputs))])[0]) < 1e-5


def test_stream_options_that_are_not_the_models_own_are_refused() -> None:
    model, inputs = far_from_start("deepseek_v4")
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "streams": 2})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        step(**inputs)
    assert caught.value.inner_exception.code == "MHC304"


@pytest.mark.filterwarnings("default::mhc_compile.diagnostics.MHCWarning")
@pytest.mark.parametrize(
    ("name", "codes", "why"),
    [
        ("gemma3n_text", {"MHC308"}, "4 streams of shape"),
        ("qwen4_exp_text", {"MHC308", "MHC305"}, "4 streams of 32 channels side by side"),
    ],
)
def test_other_streams_are_left_to_the_inner_compiler(name: str, codes: set[str], why: str) -> None:
    model, inputs = models.named(name)
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", MHCWarning)
        got = logits_of(step(**inputs))
    texts = [str(w.message) for w in caught if issubclass(w.category, MHCWarning)]
    assert {text[:6] for text in texts} == codes
    assert any(why in text for text in texts)
    # A break is told with its place.
    assert name != "qwen4_exp_text" or any("modeling_qwen4_exp.py" in text for text in texts)
    with torch.no_grad():
        assert torch.equal(got, logits_of(model(**inputs)))


@pytest.mark.slow
def test_a_break_through_the_sites_is_said_and_the_rest_is_raised() -> None:
    model, inputs = far_from_start("text/glm5_next_text")
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", MHCWarning)
        got = logits_of(step(**inputs))
        assert float(errors([got], [logits_of(model(**inputs))])[0]) < 1e-4
    texts = [str(w.message) for w in caught if issubclass(w.category, MHCWarning)]
    assert any(text.startswith("MHC310") and "modeling_glm5_next.py" in text for text in texts)


def test_convert_still_refuses_and_names_the_way() -> None:
    model, inputs = models.named("deepseek_v4")
    with pytest.raises(mhc_compile.MHCError, match=r"torch\.compile\(model, backend=\"mhc\"\)") as caught:
        mhc_compile.convert(model, streams=4, inner="eager", example_kwargs=inputs)
    assert caught.value.code == "MHC107"


def test_inspect_lists_the_sites() -> None:
    model, inputs = models.named("hy_v4")
    found = mhc_compile.inspect(model, example_kwargs=inputs)
    count, spec = SITES["hy_v4"]
    assert found.refusal is not None
    assert found.refusal.code == "MHC107"
    assert [site.spec for site in found.sites] == [spec] * count
    assert found.sites[1].name == "model.layers.0#1"
    text = found.text()
    assert f"hyper-connections of its own: {count} sites" in text
    assert f"{count} x {spec}" in text
    assert "native: 6 hand-written sites raised" in text


def test_dynamic_shapes_and_an_eps_that_changes_afterwards() -> None:
    model, inputs = far_from_start("hy_v4")
    step = torch.compile(model, backend="mhc", dynamic=True, options={"inner": "eager"})
    with torch.no_grad():
        for length in (12, 7):
            given = {**inputs, "input_ids": inputs["input_ids"][:, :length]}
            got = logits_of(step(**given))
            assert float(errors([got], [logits_of(model(**given))])[0]) < 1e-5
        # Under dynamic=True Dynamo takes the eps for a variable: the specification holds it under a guard.
        model.model.layers[0].attn_hc.hc_eps = 0.3
        changed = logits_of(model(**given))
        assert float(errors([changed], [got])[0]) > 1e-2
        assert float(errors([logits_of(step(**given))], [changed])[0]) < 1e-5


def test_checkpointed_layers_and_autocast() -> None:
    model, inputs = far_from_start("deepseek_v4")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = torch.compile(model, backend="mhc", fullgraph=True, options={"inner": "aot_eager"})
    both = []
    for forward in (model, step):
        loss_of(logits_of(forward(**inputs)), inputs).backward()
        both.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert float(errors([both[1]], [both[0]])[0]) < 1e-5
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, want = logits_of(step(**inputs)), logits_of(model(**inputs))
    with torch.no_grad():
        exact = logits_of(model(**inputs))
    assert got.dtype == want.dtype
    assert float(errors([got], [exact])[0]) <= 2 * float(errors([want], [exact])[0])


def over_depth(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model with queries off their start, which is zero."""
    model, inputs = models.named(name)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(".query"):
                p.copy_(torch.randn(p.shape, generator=rng))
    return model, inputs


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("inkling2_text", ["model.layers.0.mlp_input", "model.layers.1.attention_input", "model.layers.1.mlp_input"]),
        pytest.param("inkling2_loop_text", [], marks=pytest.mark.slow),
        pytest.param("image_text/inkling2", [], marks=pytest.mark.slow),
    ],
)
def test_attention_over_depth_is_raised_and_trains(name: str, paths: list[str]) -> None:
    model, inputs = over_depth(name)
    _, context, notes = raised(capture(model, (), inputs))
    assert len(context.native_reads) >= 4
    assert [r.name for r in context.native_reads[:3]] == [f"{path}#0" for path in paths] or not paths
    assert {r.queries for r in context.native_reads} == {1, 3}
    assert not any("left alone" in note for note in notes)
    torch._dynamo.reset()
    model.train()
    compiled = torch.compile(model, backend="mhc", fullgraph=True, options={"inner": "aot_eager", "kernels": "all"})
    both = []
    for forward in (model, compiled):
        out = logits_of(forward(**inputs))
        out.double().square().mean().backward()
        both.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert float(errors(both[1], both[0]).max()) < 1e-4


@pytest.mark.slow
def test_attention_over_depth_generates_with_caches_and_compiles_with_inductor() -> None:
    model, inputs = over_depth("inkling2_text")
    prompt = inputs["input_ids"][:, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, backend="mhc", options={"inner": "eager"})
    for use_cache in (True, False):
        assert torch.equal(model.generate(prompt, use_cache=use_cache, **options), expected)
    del model.forward
    torch._dynamo.reset()
    with torch.no_grad():
        plain = logits_of(model(**inputs))
        compiled = logits_of(torch.compile(model, backend="mhc")(**inputs))
    assert float((compiled - plain).abs().max() / plain.abs().max()) < 1e-5
