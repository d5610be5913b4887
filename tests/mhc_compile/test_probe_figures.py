"""What a sampled step records: the figures of the equations, computed apart from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attending
import pytest
import torch
from memories import shake_memory, small
from sampling import converted, needs_compiler, same, sampled
from tiny_models import chain, close, gradients, ids, shake
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional as F

from mhc_compile import UltraMemSettings, convert
from mhc_compile.capture import capture, find_marks
from mhc_compile.gates import gate_values
from mhc_compile.kernels import measures, reference
from mhc_compile.kernels.forms import FORMS, READS, DepthForm, Parameter, register
from mhc_compile.kernels.probe_ops import BINS
from mhc_compile.kernels.spec import FORM_NAMES, StreamSpec
from mhc_compile.kernels.start import Start
from mhc_compile.measure import measure_streams
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context
from mhc_compile.passes.pipeline import WIDENING


class _Reference(Interpreter):
    """The widened graph with every mix's operands, results, and the gradients of streams and branch."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.mixes: list[tuple[Tensor, ...]] = []
        self.pres: list[Tensor] = []

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.mhc.distribute.default:
            X, y, post, mix = self.fetch_args_kwargs_from_env(n)[0]
            X, y = X.clone(), y.clone()
            for t in (X, y):
                t.retain_grad()
            out = torch.ops.mhc.distribute(X, y, post, mix)
            self.mixes.append((X, y, post, mix, out))
            return out
        out = super().run_node(n)
        if n.target is torch.ops.mhc.coefficients.default:
            self.pres.append(out[0])
        return out


def reference_of(model: nn.Module) -> _Reference:
    """One step of the model, computed by the equations."""
    graph = capture(model, (ids(),), {})
    watch = _Reference(WIDENING.run(graph.graph, Context(marks=find_marks(graph.graph))))
    (out,) = watch.run(*graph.inputs)
    F.cross_entropy(out.flatten(0, 1), ids(seed=1).flatten()).backward()
    return watch


@pytest.mark.parametrize(
    "options",
    [
        {"inner": "eager"},
        {"inner": "eager", "convention": "megatron_main"},
        {"inner": "eager", "manifold": "unconstrained"},
        pytest.param({"inner": "aot_eager", "kernels": "all"}, marks=needs_compiler),
        pytest.param(
            {"inner": "aot_eager", "kernels": "all", "convention": "megatron_main"},
            marks=[pytest.mark.slow, needs_compiler],
        ),
        pytest.param({"inner": "aot_eager", "kernels": "read,coefficients", "exit": "sum"}, marks=needs_compiler),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_the_figures_are_those_of_the_equations(options: dict[str, Any]) -> None:
    model = converted(**options)
    expected = reference_of(model)
    model.zero_grad()
    (sample,) = sampled(model)
    rows = []
    composite = torch.eye(4, dtype=torch.float64)
    for (X, y, post, mix, out), pre in zip(expected.mixes, expected.pres, strict=True):
        H = mix.detach().double()
        composite = H @ composite
        after = out.detach().double()
        rows.append(
            {
                "gain_forward_mean": H.abs().sum(-1).amax(-1).mean(),
                "gain_backward_max": H.abs().sum(-2).amax(),
                "composite_forward_max": composite.abs().sum(-1).amax(),
                "composite_backward_mean": composite.abs().sum(-2).amax(-1).mean(),
                "pre_entropy": torch.distributions.Categorical(pre.double()).entropy().mean(),
                "post_entropy": torch.distributions.Categorical(post.double()).entropy().mean(),
                "separation": measures.separation(after).mean(),
                "streams": after.square().mean((0, 1, 3)).sqrt(),
                "branch": y.detach().double().square().mean().sqrt(),
                "pre": pre.double().mean((0, 1)),
                "post": post.double().mean((0, 1)),
                "mix": H.mean((0, 1)),
                "streams_gradient": X.grad.double().square().sum((0, 1, 3)).sqrt(),
                "branch_gradient": y.grad.double().norm(),
            }
        )
    for name in rows[0]:
        wanted = torch.stack([row[name] for row in rows]).detach().float()
        torch.testing.assert_close(sample.values[name], wanted, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    measured = measure_streams(model, ids())[""]
    assert sample.values["separation"].tolist() == pytest.approx(measured.separation, rel=1e-3)
    assert float(sample.values["composite_forward_max"][-1]) == pytest.approx(measured.gain.forward_max, rel=1e-5)
    assert float(sample.values["composite_backward_mean"][-1]) == pytest.approx(measured.gain.backward_mean, rel=1e-5)


def test_distance_and_entropy() -> None:
    exact = reference.sinkhorn(torch.randn(5, 4, 4, dtype=torch.float64), StreamSpec())
    assert measures.distance(exact).max() < 1e-3
    assert measures.distance(torch.tensor([[0.5, 0.5], [0.5, 0.8]])).item() == pytest.approx(0.3)
    assert measures.distance(torch.tensor([[1.4, -0.4], [-0.4, 1.4]])).item() == pytest.approx(0.4)
    assert measures.entropy(torch.ones(3, 4)).tolist() == pytest.approx([math.log(4)] * 3)
    assert measures.entropy(torch.tensor([[0.0, 2.0], [-1.0, 1.0]])).tolist() == pytest.approx([0.0, math.log(2)])


def test_streams_that_are_equal_do_not_separate() -> None:
    model = convert(chain(depth=4), ids(), streams=4, inner="eager")
    (sample,) = sampled(model)
    assert sample.values["separation"].max() < 1e-6
    assert sample.values["gain_forward_max"].max() == pytest.approx(1, abs=1e-5)
    # Rows of pre sum to 1 at the start, its largest entry going from stream to stream.
    assert sample.values["pre"].argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("preset", "kernels"),
    [
        ("v41", "none"),
        pytest.param("paper", "all", marks=needs_compiler),
        pytest.param("paper", "none", marks=pytest.mark.slow),
        pytest.param("v41", "all", marks=[pytest.mark.slow, needs_compiler]),
        pytest.param("qwen_ple", "none", marks=pytest.mark.slow),
        pytest.param("qwen_ple", "all", marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_gates_of_memories(preset: str, kernels: str) -> None:
    model = converted(streams=3, engram=small(preset), inner="aot_eager", kernels=kernels)
    shake_memory(model)
    plain = gradients(model)
    found: list[dict[str, Tensor]] = []
    (sample,) = sampled(model, lambda: found.append(gradients(model)))
    assert same(plain, found[0])
    gates = gate_values(model, ids())
    assert sample.layers == tuple(gates)
    for counts, values in zip(sample.values["gates"], gates.values(), strict=True):
        flat = values.flatten(0, 1).float()
        wanted = torch.stack([torch.histc(flat[:, i], BINS, 0, 1) for i in range(3)])
        # A gate at the edge of two bins may fall into either.
        assert (counts - wanted).abs().sum() <= 2
        assert counts.sum() == wanted.sum()


@pytest.mark.parametrize(
    "kernels", [("none",), pytest.param(("none", "all"), marks=[pytest.mark.slow, needs_compiler])]
)
def test_rows_that_look_ups_read(kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tables see them, over both microbatches of a step, and alike where one kernel reads rows and adds up."""
    asked: dict[int, list[Tensor]] = {}
    gather = MemoryTable.gather

    def watched(table: MemoryTable, rows: Tensor, dtype: torch.dtype) -> Tensor:
        asked.setdefault(table.handle, []).append(rows.flatten())
        return gather(table, rows, dtype)

    values = UltraMemSettings(layers=(0,), skip=1, side=8, key_width=8, value_width=8, top=4)
    samples = []
    for kind in kernels:
        torch.manual_seed(0)
        model = converted(streams=3, engram=small("paper"), ultramem=values, inner="aot_eager", kernels=kind)
        with monkeypatch.context() as patched:
            if kind == "none":
                patched.setattr(MemoryTable, "gather", watched)
            samples += sampled(model, lambda m=model: (m(ids()), m(ids() // 2)))
    plain, fused = samples[0], samples[-1]
    assert plain.look_ups == fused.look_ups == ("layers.0", "layers.1", "ultra-mem.layers.0")
    assert len(asked) == 3
    for i, rows in enumerate(asked.values()):
        shares = torch.bincount(torch.cat(rows)) / len(torch.cat(rows))
        assert plain.values["rows_used"][i] == int((shares > 0).sum())
        assert plain.values["rows_entropy"][i] == pytest.approx(float(torch.special.entr(shares).sum()), rel=1e-5)
    for name in ("rows_used", "rows_entropy"):
        assert torch.equal(plain.values[name], fused.values[name])


def test_an_owner_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(x + 1).sin()

    model = convert(Twice(), ids() // 2, streams=4, inner="eager")
    shake(model)
    calls = [sampled(model, lambda x=x: model.inner(x))[0] for x in (ids() // 2, ids() // 2 + 1)]
    (both,) = sampled(model, lambda: torch.compile(model, backend="mhc", options={"inner": "eager"})(ids() // 2))
    assert both.sites == calls[0].sites
    assert both.tokens == 32
    for name in ("separation", "composite_forward_mean", "mix"):
        assert close(both.values[name], (calls[0].values[name] + calls[1].values[name]) / 2, 1e-5)


# --- depth forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernels", [pytest.param("none", marks=pytest.mark.slow), pytest.param("all", marks=needs_compiler)]
)
def test_figures_of_attention_residuals(kernels: str) -> None:
    model = converted(form="attnres", kernels=kernels)
    (sample,) = sampled(model)
    (own,) = owners(model).values()
    outputs, reads, rows = [model.embed(ids())], [], []
    for name, layer in zip((*own.sites, "head"), (*model.layers, None), strict=True):
        parameters = own.get_submodule(name)
        sources = torch.stack(outputs, -2)
        keys = F.rms_norm(sources, sources.shape[-1:], parameters.gain, eps=1e-6)
        shares = (keys @ parameters.query).softmax(-1)
        h = (shares.unsqueeze(-1) * sources).sum(-2) * len(outputs)
        if layer is None:
            continue
        h.retain_grad()
        reads.append(h)
        y = layer.down(F.gelu(layer.up(layer.norm(h))))
        y.retain_grad()
        rows.append(
            {
                "read": rms(h),
                "newest": rms(outputs[-1]),
                "output": rms(y),
                "weights_entropy": torch.distributions.Categorical(shares).entropy().mean(),
                "weights": F.pad(shares.mean((0, 1)), (0, 4 - len(outputs))),
            }
        )
        outputs.append(y)
    F.cross_entropy(model.head(h).flatten(0, 1), ids(seed=1).flatten()).backward()
    for row, h, y in zip(rows, reads, outputs[1:], strict=True):
        row |= {"read_gradient": h.grad.norm(), "output_gradient": y.grad.norm()}
    assert sample.values.keys() == rows[0].keys()
    assert sample.sites == tuple(own.sites)
    for name in rows[0]:
        wanted = torch.stack([row[name] for row in rows]).detach()
        torch.testing.assert_close(sample.values[name], wanted, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


class Weighted(DepthForm):
    """A form of a user, which tells no weights and has no exit."""

    name = "of_a_user"

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:
        return {"weights": Parameter((index + 1,), lambda: torch.ones(index + 1))}

    def read(self, outputs: Any, places: Any, spec: StreamSpec, **parameters: Tensor) -> Tensor:
        return sum(parameters["weights"][place] * output for place, output in zip(places, outputs, strict=True))


@pytest.fixture
def weighted() -> Iterator[None]:
    register(Weighted())
    yield
    del FORM_NAMES["of_a_user"], READS[FORMS.pop("of_a_user").op]


def test_a_form_of_a_user_is_recorded_too(weighted: None) -> None:
    model = convert(chain(depth=3), ids(), form="of_a_user", inner="eager")
    (sample,) = sampled(model)
    assert list(sample.values) == ["read", "newest", "output", "read_gradient", "output_gradient"]
    assert all(values.min() > 0 for values in sample.values.values())
    # At the start it is the residual network: the gradient of the last output is that of the stream.
    plain = chain(depth=3)
    x = plain.embed(ids())
    for layer in plain.layers:
        x = layer(x)
    x.retain_grad()
    F.cross_entropy(plain.head(x).flatten(0, 1), ids(seed=1).flatten()).backward()
    assert close(sample.values["output_gradient"][-1], x.grad.norm(), 1e-5)


@pytest.mark.parametrize("form", [pytest.param("mudd", marks=pytest.mark.slow), "value_residual"])
def test_forms_of_attentions(form: str) -> None:
    torch._dynamo.reset()
    residual, model = attending.converted("fused", False, form, 0.1)
    plain = gradients(model)
    found: list[dict[str, Tensor]] = []
    (sample,) = sampled(model, lambda: found.append(gradients(model)))
    assert same(plain, found[0])
    (own,) = owners(model).values()
    assert sample.sites == tuple(own.sites)
    named = {name: p.detach().double() for name, p in own.get_submodule(sample.sites[0]).named_parameters()}
    weights = named["weights"]
    if form == "mudd":  # the first site has one row R, over one stream
        x = residual.embed(ids())
        normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        weights = (F.gelu(normed @ named["down"].T) @ named["up"] + weights.flatten())[..., -1:].mean((0, 1))
    torch.testing.assert_close(sample.values["weights"][0, : len(weights)], weights.float())
