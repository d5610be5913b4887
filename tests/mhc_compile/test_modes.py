"""Models whose streams in training differ from those in evaluation."""

from __future__ import annotations

import pytest
import torch
from memories import shake_memory, small
from tiny_models import VOCAB, Block, chain, close, ids, shake
from torch import Tensor, nn

from mhc_compile import MHCError, convert, stream_parameters
from mhc_compile.checkpoint.manifest import Owner, _owner
from mhc_compile.modes import reads_mode
from mhc_compile.parameters import owners

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Runs all its layers in training and `exit_at` of them in evaluation."""

    def __init__(self, depth: int = 4, exit_at: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.exit_at = exit_at

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if self.training else self.layers[: self.exit_at]:
            x = layer(x)
        return x


class Auxiliary(nn.Module):
    """In training its layers add what another branch computes, before all else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.extra = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.extra(x).tanh()
        for branch in self.branches:
            x = x + branch(x).tanh()
        return x


class DropPath(nn.Module):
    """Stochastic depth as it is written most often: a mask for each sample, over the branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            y = branch(x).tanh()
            if self.training:
                y = y * torch.empty(len(y), 1, 1).bernoulli_(0.5).div(0.5)
            x = x + y
        return x


def outputs(model: nn.Module) -> list[Tensor]:
    modes = [model.train()(X), model.eval()(X)]
    return [out.detach() for out in modes]


@pytest.mark.parametrize("training", [True, False])
def test_an_early_exit_has_parameters_for_all_layers_and_runs_in_both_modes(training: bool) -> None:
    model = Layers()
    before = outputs(model)
    convert(model.train(training), X, inner="eager")
    assert model.training == training
    assert all(module.training == training for module in model.layers.modules())
    sites = list(owners(model)[""].sites)
    assert sites == [f"layers.{i}#0" for i in range(4)]
    assert all(close(got, want) for got, want in zip(outputs(model), before, strict=True))
    shake(model)
    trained = outputs(model)
    assert not any(close(got, want) for got, want in zip(trained, before, strict=True))
    model.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in stream_parameters(model).values())
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    assert close(step.train()(X).detach(), trained[0])
    assert close(step.eval()(X).detach(), trained[1])


def test_a_graph_of_neither_mode_is_still_refused() -> None:
    model = convert(Layers().eval(), X, inner="eager")
    model.exit_at = 3
    with pytest.raises(MHCError, match="MHC206"):
        model(X)


def test_manifests_keep_what_each_mode_holds() -> None:
    held = owners(convert(Layers(), X, inner="eager"))[""]
    assert held.partial == (frozenset({"layers.0#0", "layers.1#0"}),)
    written = Owner.of(held).plain()
    assert _owner(written) == Owner.of(held)
    with pytest.raises(TypeError):
        _owner(written | {"partial": [["layers.9#0"]]})


class Halves(nn.Module):
    """Layers of two blocks, of which evaluation leaves out the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(nn.ModuleDict({"first": Block(), "second": Block()}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer["second"](layer["first"](h) if self.training else h)
        return h


class Exits(Layers):
    """The early exit with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.embed(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_memory_is_read_in_both_modes_where_one_leaves_out_its_site(training: bool) -> None:
    model = convert(Halves().train(training), ids(), engram=small("v41", layers=(1,)), inner="eager")
    assert owners(model)[""].memories.engram.layers[0].site == "layers.1.first#0"
    before = [model.train(mode)(ids()).detach() for mode in (True, False)]
    shake_memory(model)
    for mode, silent in zip((True, False), before, strict=True):
        model.zero_grad()
        got = model.train(mode)(ids())
        assert not close(got.detach(), silent, 1e-2)
        got.square().sum().backward()
        assert all(p.grad.abs().max() > 0 for n, p in stream_parameters(model).items() if n.endswith(".value"))


def test_a_memory_of_a_layer_that_evaluation_leaves_out() -> None:
    model = convert(Exits(), ids(), engram=small("v41", layers=(3,)), inner="eager")
    before = [model.train(mode)(ids()).detach() for mode in (True, False)]
    shake_memory(model)
    after = [model.train(mode)(ids()).detach() for mode in (True, False)]
    assert not close(after[0], before[0], 1e-2)
    assert torch.equal(after[1], before[1])


def test_sites_that_would_mean_other_additions_are_refused() -> None:
    for training in (True, False):
        model = Auxiliary().train(training)
        with pytest.raises(MHCError, match="MHC213") as caught:
            convert(model, X, inner="eager")
        assert "#3" in caught.value.detail
        assert model.training == training
        assert not stream_parameters(model)


def test_drop_path_over_the_branch_is_one_structure() -> None:
    model = DropPath().eval()
    before = model(X)
    convert(model, X, inner="eager")
    assert owners(model)[""].partial == ()
    assert close(model(X), before)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in stream_parameters(model).values())


def test_a_mode_that_breaks_is_left_to_its_own_calls() -> None:
    class Drops(Layers):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or torch.rand(()).item() < 0.5:
                    x = layer(x)
            return x

    model = convert(Drops().eval(), X, inner="eager")
    assert close(model(X), Drops().eval()(X))
    with pytest.raises(MHCError, match="MHC104"):
        model.train()(X)


def drop(x: Tensor, module: nn.Module) -> Tensor:
    return x * 2 if module.training else x


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if getattr(self, "training", False) else x


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)), False),
        (nn.TransformerEncoderLayer(8, 2), False),
        (chain(), False),
        (Calls(), True),
        (Named(), True),
        (Layers(), True),
    ],
)
def test_what_reads_the_mode(model: nn.Module, reads: bool) -> None:
    assert reads_mode(model) == reads
