"""No part of a converted model runs residual: it runs with its streams in the model's forward, or raises MHC313."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import chain, close, ids, llama, shake, state, t5
from torch import Tensor, nn

from mhc_compile import MHCError, convert, to_residual
from mhc_compile.capture import capture, find_marks

X = torch.randn(2, 5, 16)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x)).tanh()


class Encoder(nn.Module):
    """Adds in its layers; `forward` is one of several methods that run them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def encode(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


class Flat(nn.Module):
    """Adds in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(3)])
        self.mixes = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def encode(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x)).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


CALLS: dict[str, Callable[[Any], Any]] = {
    "method": lambda m: m.encode(X),
    "layer": lambda m: m.layers[1](X),
    "loop": lambda m: [layer(X) for layer in m.layers[1:]],
    "sequence": lambda m: nn.Sequential(*m.layers)(X),
    "copy of a layer": lambda m: copy.deepcopy(m.layers[0])(X),
    "forward of the class": lambda m: Encoder.forward(m, X),
}


@pytest.fixture
def encoder() -> Encoder:
    model = convert(Encoder(), X, inner="eager")
    shake(model)
    return model


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("how", ["eager", "mhc", "aot_eager", "eager backend"])
def test_parts_of_a_model_do_not_run_without_their_streams(
    encoder: Encoder, call: Callable[[Any], Any], how: str
) -> None:
    def run() -> Any:
        return call(encoder)

    if how == "mhc":
        run = torch.compile(run, backend="mhc", options={"inner": "eager"})
    elif how != "eager":
        run = torch.compile(run, backend=how.split()[0])
    with pytest.raises(Exception, match="MHC313"):
        run()


def test_branches_of_adds_in_the_owner_itself_are_guarded() -> None:
    model = convert(Flat(), X, inner="eager")
    shake(model)
    for run in (model.encode, torch.compile(model.encode, backend="mhc"), torch.compile(model.encode, backend="eager")):
        with pytest.raises(Exception, match="MHC313"):
            run(X)
    model.head(model.embed(X))
    assert not torch.equal(model(X), Flat.forward(to_residual_copy(model), X))


def to_residual_copy(model: nn.Module) -> nn.Module:
    fresh = Flat()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mhc.")})
    return fresh


def test_the_model_runs_in_every_way_as_before(encoder: Encoder) -> None:
    expected = encoder(X)
    assert close(encoder.forward(X), expected)
    assert close(copy.deepcopy(encoder)(X), expected)
    assert close(torch.compile(encoder, backend="mhc")(X), expected)
    assert close(torch.compile(lambda x: 2 * encoder(x), backend="mhc")(X), 2 * expected)
    outer = nn.Sequential(encoder, nn.Identity())
    assert close(torch.compile(outer, backend="mhc")(X), expected)
    assert close(pickle.loads(pickle.dumps(encoder))(X), expected)


def test_a_method_beside_the_forward_in_one_graph_is_refused(encoder: Encoder) -> None:
    @torch.compile(backend="mhc", options={"inner": "eager"})
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return encoder(x), encoder.head(encoder.encode(x))

    with pytest.raises(Exception, match=r"MHC206|MHC313"):
        both(X)


def test_layers_that_are_checkpointed_are_guarded_and_run() -> None:
    model = convert(llama(), inner="eager").train()
    model.gradient_checkpointing_enable()
    expected = model(ids()).logits
    assert expected.requires_grad
    hidden = model.model.embed_tokens(ids())
    with pytest.raises(MHCError, match="MHC313"):
        model.model.layers[0](hidden)


def test_parts_of_transformers_models() -> None:
    model = convert(t5(), inner="eager")
    hidden = model.shared(ids())
    with pytest.raises(MHCError, match="MHC313"):
        model.encoder.block[0](hidden)
    assert model.encoder(input_ids=ids()).last_hidden_state.shape == hidden.shape
    model.lm_head(hidden)


def test_to_residual_takes_the_guards_away() -> None:
    model = chain()
    before, modules = state(model), {name: dict(vars(m)) for name, m in model.named_modules()}
    expected = model.layers[0](torch.ones(2, 3, 32))
    to_residual(convert(model, ids(), inner="eager"))
    assert torch.equal(model.layers[0](torch.ones(2, 3, 32)), expected)
    assert state(model) == before
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == {k: set(v) for k, v in modules.items()}


def test_analysed_graphs_hold_no_guards(encoder: Encoder) -> None:
    graph = capture(encoder, (X,), {}).graph
    assert find_marks(graph)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.mhc.inside)


def test_a_guarded_layer_is_named(encoder: Encoder) -> None:
    with pytest.raises(MHCError, match=r"MHC313.*\n.*to_residual") as caught:
        encoder.encode(X)
    assert "Layer" in str(caught.value)
