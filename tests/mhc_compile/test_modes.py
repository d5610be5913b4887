"""Models whose streams in training differ from those in evaluation."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Block, chain, close, shake
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
