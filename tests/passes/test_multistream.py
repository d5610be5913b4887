"""Models that carry several streams already are recognised by shape; those that only look so are not."""

import pytest
import torch
from stepping import normal, site_names
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Context
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.multistream import MAX_PUBLISHED_STREAMS, multistream
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.residual import Residual

WIDTH = 8
IDS = torch.arange(6).reshape(2, 3)


class Streams(nn.Module):
    """Hyper-connections by hand: n streams before the channels, or first of all."""

    def __init__(self, n: int, axis: int, layers: int = 3) -> None:
        super().__init__()
        self.n, self.axis = n, axis
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.mix = nn.ParameterList(torch.eye(n) + 0.1 * torch.randn(n, n) for _ in range(layers))
        self.read = nn.ParameterList(torch.rand(n) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(self.axis)
        x = x.expand(*(self.n if i == self.axis % 4 else s for i, s in enumerate(x.shape)))
        for layer, mix, read in zip(self.layers, self.mix, self.read, strict=True):
            streams = x.movedim(self.axis, -1)
            y = layer(torch.relu(streams @ read))
            x = (streams @ mix).movedim(-1, self.axis) + y.unsqueeze(self.axis)
        return self.head(x.mean(self.axis))


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("axis", [-2, 0], ids=["before channels", "first"])
def test_mhc107_for_a_model_with_streams_of_its_own(n: int, axis: int) -> None:
    gm = normal(Streams(n, axis), IDS)
    before = str(gm.graph)
    with pytest.raises(MHCError) as caught:
        Residual().apply(gm, Context())
    error = caught.value
    assert error.code == "MHC107"
    shape = [n, 2, 3, WIDTH] if axis == 0 else [2, 3, n, WIDTH]
    assert error.detail == f"{n} streams of shape {shape}"
    assert "test_multistream.py:" in error.source
    assert error.node is not None
    assert error.module == "(root)"
    assert str(gm.graph) == before


class Heads(nn.Module):
    """A residual model whose branches, or whose head, work on shapes like those of streams."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.many = nn.Linear(WIDTH, 4 * WIDTH)
        self.one = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            y = layer(x)
            if self.where == "branch":
                y = self.many(y).unflatten(-1, (4, WIDTH)).mean(-2)
            x = x + y
        if self.where == "head":
            return self.one(self.many(x).unflatten(-1, (4, WIDTH)))
        return self.one(x)


@pytest.mark.parametrize("where", ["branch", "head", "nowhere"])
def test_other_uses_of_such_shapes_are_left_alone(where: str) -> None:
    assert site_names(Heads(where), IDS) == ["#0", "#1", "#2"]


class Stacked(nn.Module):
    """A table of n learned positions, looked up beside the tokens, and a stack of hidden states at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        states = []
        for layer in self.layers:
            x = x + layer(x)
            states.append(x)
        return self.head(x), torch.stack(states)


def test_stacked_hidden_states_are_no_streams() -> None:
    assert len(site_names(Stacked(), IDS)) == 3


def test_more_than_published_systems_have_are_no_streams() -> None:
    gm = normal(Streams(MAX_PUBLISHED_STREAMS + 1, -2), IDS)
    assert multistream(Dataflow(gm.graph, is_owned)) is None


def test_nothing_wide_nothing_found() -> None:
    gm = normal(Heads("nowhere"), IDS)
    assert multistream(Dataflow(gm.graph, is_owned)) is None


class SideBySide(nn.Module):
    """n streams in n*C channels of one value: each layer reads a mean and adds its output n times, weighted."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.embed = nn.Embedding(11, n * WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.weights = nn.ModuleList(nn.Linear(n * WIDTH, n) for _ in range(3))
        self.head = nn.Linear(n * WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer, weights in zip(self.layers, self.weights, strict=True):
            y = layer(x.unflatten(-1, (self.n, WIDTH)).mean(-2))
            w = torch.sigmoid(weights(x))
            x = x + (y.unsqueeze(-2) * w.unsqueeze(-1)).flatten(-2)
        return self.head(x)


def test_mhc107_for_streams_side_by_side_in_the_channels() -> None:
    gm = normal(SideBySide(4), IDS)
    with pytest.raises(MHCError, match="4 streams of 8 channels side by side") as caught:
        Residual().apply(gm, Context())
    assert caught.value.code == "MHC107"
