"""Streams that the analysis refuses, with the place in the user's code, and look-alikes that it does not."""

import pytest
import torch
from layers import IDS, TOKENS, WIDTH, Layers
from stepping import analysed, normal, stepped
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context
from mhc_compile.passes.residual import MAX_OUTER_MATMULS, Residual


def refusal(model: nn.Module, *args: object) -> MHCError:
    """What the analysis says about a graph that it leaves as it is."""
    gm = normal(model, *args)
    before = str(gm.graph)
    context = Context()
    with pytest.raises(MHCError) as caught:
        Residual().apply(gm, context)
    assert str(gm.graph) == before
    assert context.streams == []
    return caught.value


def line_of(error: MHCError) -> str:
    """The text of the user's line that an error names, in this file."""
    assert error.source is not None
    place, _, text = error.source.partition(": ")
    assert "test_residual_refusals.py:" in place, place
    assert str(error).count(error.source) == 1
    return text


class NoStream(Layers):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_mhc101_where_nothing_is_added() -> None:
    error = refusal(NoStream(), IDS)
    assert error.code == "MHC101"
    assert "no add of a carried value and a branch with parameters" in error.detail


class Fork(Layers):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        left = x + self.layers[1](x)
        right = x + self.layers[2](x)  # the second
        return self.head(left), self.head(right)


def test_mhc102_where_the_stream_forks() -> None:
    error = refusal(Wrapper(Fork()), IDS)
    assert error.code == "MHC102"
    assert error.module == "model"
    assert line_of(error) == "right = x + self.layers[2](x)  # the second"
    assert error.node.startswith("%right")


class Wrapper(nn.Module):
    """A module path for the error to name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> object:
        return self.model(*args)


class Sometimes(nn.Module):
    """A tower whose second call leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(ids, 3) * self.tower(ids.flip(1), 2)


class Tower(Layers):
    def forward(self, ids: Tensor, count: int) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers[:count]:
            x = x + layer(x)
        return self.head(x)


def test_mhc102_where_two_calls_of_an_owner_differ() -> None:
    error = refusal(Sometimes(), IDS)
    assert error.code == "MHC102"
    assert "two streams of tower share only some sites: ['#0', '#1']" in error.detail
    assert error.module == "tower"
    assert line_of(error) == "x = x + layer(x)"


class Lost(Layers):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)  # no skip around it
        return self.head(x)


@pytest.mark.parametrize(("layers", "lost"), [(MAX_OUTER_MATMULS, False), (MAX_OUTER_MATMULS + 1, True)])
def test_mhc103_where_layers_lie_outside_all_sites(layers: int, lost: bool) -> None:
    model = Lost(layers)  # one of them in a branch, and the head behind them
    if not lost:
        analysed(model, IDS)
        return
    error = refusal(Wrapper(model), IDS)
    assert error.code == "MHC103"
    assert f"{MAX_OUTER_MATMULS + 1} parameter contractions lie outside all 1 sites" in error.detail
    assert error.module.startswith("model.layers.")
    assert "linear" in error.node


class Reshaped(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        x = x.reshape(2, TOKENS // 2, 2 * WIDTH)
        return x + self.wide(x)  # wider


def test_mhc105_where_the_width_changes() -> None:
    error = refusal(Wrapper(Reshaped()), IDS)
    assert error.code == "MHC105"
    assert f"last dimension {WIDTH} at the entry, {2 * WIDTH} here" in error.detail
    assert (error.module, line_of(error)) == ("model", "return x + self.wide(x)  # wider")


class Overwritten(Layers):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        x[:, 0] = 0.0  # the first token
        return x + self.layers[1](x)


def test_mhc106_where_a_stream_value_is_overwritten() -> None:
    error = refusal(Wrapper(Overwritten()), IDS)
    assert error.code == "MHC106"
    assert (error.module, line_of(error)) == ("model", "x[:, 0] = 0.0  # the first token")
    assert "setitem" in error.node


class Seen(Layers):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        flat = x.view(-1)
        x += self.layers[1](x)  # seen through the view
        x = x + self.layers[2](x)
        return self.head(x) + flat.sum()


def test_mhc106_where_a_view_shows_the_change() -> None:
    error = refusal(Wrapper(Seen()), IDS)
    assert error.code == "MHC106"
    assert (error.module, line_of(error)) == ("model", "x += self.layers[1](x)  # seen through the view")


class OwnInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x += layer(x)  # the caller's tensor
        return self.head(x)


def test_mhc106_where_the_stream_is_an_input_overwritten() -> None:
    error = refusal(Wrapper(OwnInput()), torch.randn(2, TOKENS, WIDTH))
    assert error.code == "MHC106"
    assert "an input of the model" in error.detail
    assert (error.module, line_of(error)) == ("model", "x += layer(x)  # the caller's tensor")


class Activated(Layers):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(F.relu(x, inplace=True))
        return self.head(x)


def test_an_activation_in_place_is_part_of_the_stream() -> None:
    out = stepped(Activated().double(), StreamSpec(streams=3), IDS)
    assert [len(s.chain) for s in out.streams[0].sites] == [0, 1, 1]
    torch.testing.assert_close(out.at_start, out.outputs["captured"], rtol=1e-6, atol=1e-6)


class EmbeddedInPlace(Layers):
    """Dropout in place on the embedding, a view of which is an output: no stream value changes after it is made."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        e = self.embed(ids)
        view = e.view(-1)
        x = F.dropout(e, 0.0, True, True)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x), view


def test_an_embedding_finished_in_place_is_no_overwritten_stream() -> None:
    out = stepped(EmbeddedInPlace().double(), StreamSpec(streams=3), IDS)
    assert [len(s.sites) for s in out.streams] == [3]
    torch.testing.assert_close(out.at_start, out.outputs["captured"], rtol=1e-6, atol=1e-6)


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv1d(3, WIDTH, 1)
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for layer in self.layers:
            x = x + torch.relu(layer(x))  # channels before tokens
        return x


def test_mhc108_where_a_convolution_reads_the_stream() -> None:
    error = refusal(Wrapper(Channels()), torch.randn(2, 3, 5))
    assert error.code == "MHC108"
    assert error.module == "model.layers.0"
    assert "conv1d" in error.node


class Transposed(Layers):
    """A convolution over tokens in a branch, with the channels moved in front of it: nothing to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.layers[0](x))


def test_a_convolution_over_tokens_in_a_branch_is_none_of_them() -> None:
    _, (stream,) = analysed(Transposed(), IDS)
    assert len(stream.sites) == 2


class Broadcast(Layers):
    """Branches that their add broadcasts: one value a sequence, one a token."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x.mean(1, keepdim=True))
        x = x + self.layers[0](x).mean(-1, keepdim=True)
        return self.head(x)


def test_a_broadcast_branch_is_expanded_before_it_is_distributed() -> None:
    out = stepped(Broadcast().double(), StreamSpec(streams=3), IDS)
    torch.testing.assert_close(out.at_start, out.outputs["captured"], rtol=1e-6, atol=1e-6)


class Chunked(Layers):
    """Chunked feed-forward: the stream goes on in parts."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.cat([c + layer(c) for c in x.chunk(3, 1)], 1)
        return self.head(x)


def test_mhc108_where_the_stream_goes_on_in_parts() -> None:
    error = refusal(Wrapper(Chunked()), IDS)
    assert error.code == "MHC108"


class Assigned(Layers):
    """Branches whose rows are written one language at a time, as the adapters of xmod do."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
            y = torch.zeros_like(x)
            for language in range(2):
                rows = ids[:, 0] == language
                y[rows] = layer(x[rows])
            x = x + F.dropout(y, 0.0)
        return self.head(x)


def test_branches_that_are_written_row_by_row() -> None:
    _, (stream,) = analysed(Assigned(), IDS)
    assert len(stream.sites) == 6
