"""Widening: what it makes of a graph, and that the result computes the n-stream network written out by hand."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import ONE_BY_ONE, Recipe, recipes
from stepping import Stepped, add_parameters, analysed, captured, run, sites_in_order, stepped
from torch import Tensor, nn
from toys import Sites, toy

from mhc_compile.attach import sites_of_owners
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, call_nodes, op_name
from mhc_compile.passes.match_marks import sites_of
from mhc_compile.passes.widen import Widen

Golden = Callable[[str], None]


def error(found: list[Tensor], wanted: list[Tensor] | tuple[Tensor, ...]) -> float:
    """The largest difference, of the largest value."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def check_against_hand(recipe: Recipe, spec: StreamSpec) -> Stepped:
    """Every pass keeps the values, and widening gives what the model's own n-stream form gives."""
    model, ids = toy(recipe)
    out = stepped(model, spec, ids)
    assert sum(len(s.sites) for s in out.streams) == recipe.sites
    assert len(out.streams) == 1
    assert error(out.outputs["normalize"], out.outputs["captured"]) < 1e-14
    assert error(out.outputs["residual"], out.outputs["normalize"]) == 0.0
    # A single stream cannot start at `pre` = 1; the start of several is rounded to float32.
    assert error(out.at_start, out.outputs["captured"]) < (1e-6 if spec.streams > 1 else 1e-2)
    with torch.no_grad():
        by_hand = model.streams(ids, Sites(spec, iter(sites_in_order(out))))
    assert error(out.outputs["widen"], by_hand) < 1e-12
    assert error(out.outputs["lower"], out.outputs["widen"]) < 1e-12
    # The streams were random: had nothing been rewritten, this would be the residual model.
    assert error(out.outputs["widen"], out.outputs["captured"]) > 1e-3 or spec.streams == 1
    return out


@pytest.mark.parametrize("recipe", ONE_BY_ONE, ids=str)
def test_each_feature(recipe: Recipe) -> None:
    check_against_hand(recipe, StreamSpec(streams=3))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(recipes(), st.integers(1, 8))
def test_any_combination_of_features(recipe: Recipe, streams: int) -> None:
    check_against_hand(recipe, StreamSpec(streams=streams))


@pytest.mark.parametrize("form", ["hc", "hc_static"])
@pytest.mark.parametrize("recipe", ONE_BY_ONE, ids=str)
def test_each_feature_in_the_forms_of_hyper_connections(recipe: Recipe, form: str) -> None:
    check_against_hand(recipe, StreamSpec(streams=3, form=form))


@pytest.mark.parametrize("exit", ["mean", "sum"])
def test_exit(exit: str) -> None:
    check = StreamSpec(streams=4, exit=exit)
    model, ids = toy(Recipe(hidden_states=True))
    out = stepped(model, check, ids)
    with torch.no_grad():
        by_hand = model.streams(ids, Sites(check, iter(sites_in_order(out))))
    assert error(out.outputs["widen"], by_hand) < 1e-12


def test_the_learned_exit_is_used_at_the_exit_alone() -> None:
    spec = StreamSpec(streams=3, exit="head")
    model, ids = toy(Recipe(hidden_states=True))
    out = stepped(model, spec, ids)
    reductions = [n for n in call_nodes(out.graph) if op_name(n) == "reduce"]
    assert [len(n.args) for n in reductions] == [2, 5]
    assert ["exit=mean" in n.args[1] for n in reductions] == [True, False]


def test_plain(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1))
    golden(stepped(model, StreamSpec(streams=4), ids).texts["widen"])


def test_hyper_connections(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1))
    golden(stepped(model, StreamSpec(streams=4, form="hc"), ids).texts["widen"])


def test_static_hyper_connections(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1))
    golden(stepped(model, StreamSpec(streams=4, form="hc_static"), ids).texts["widen"])


def test_post_norm(golden: Golden) -> None:
    model, ids = toy(Recipe(style="post", layers=1, norm="rms_by_hand"))
    golden(stepped(model, StreamSpec(streams=2), ids).texts["widen"])


def test_tree_of_adds(golden: Golden) -> None:
    model, ids = toy(Recipe(style="tree", layers=1, carry="masked"))
    golden(stepped(model, StreamSpec(streams=2), ids).texts["widen"])


def test_views_run_once_a_stream(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1, layout="flat_feed", hidden_states=True))
    golden(stepped(model, StreamSpec(streams=2), ids).texts["widen"])


def test_early_read(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=2, extra="early"))
    golden(stepped(model, StreamSpec(streams=2), ids).texts["widen"])


class NoStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.embed(ids))))


def test_no_streams_leave_the_graph_as_it_is() -> None:
    gm = captured(NoStream(), torch.randint(0, 11, (2, 3))).graph
    before = [(n.name, n.op, n.target, n.args) for n in gm.graph.nodes]
    Widen().apply(gm, Context())
    assert [(n.name, n.op, n.target, n.args) for n in gm.graph.nodes] == before


class Frozen(nn.Module):
    """Its first layers get no gradients; a router inside the last computes without them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.embed(ids)
            x = x + self.layers[0](x)
        x = x + self.layers[1](x)
        with torch.no_grad():
            gate = torch.sigmoid(self.layers[2](x)).round()
        x = x + gate * self.layers[2](x)
        return self.head(x)


def frozen(model: nn.Module, exit: str = "mean") -> tuple[list[str], Tensor]:
    """The names of the stream parameters that get a gradient when the model is trained, and its loss."""
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 3))
    gm, streams = analysed(model, ids)
    inputs = captured(model, ids).inputs
    parameters = StreamParameters(StreamSpec(streams=2, exit=exit), sites_of_owners(streams, StreamSpec())[""])
    context = Context(marks=[add_parameters(gm, "", parameters)], streams=streams)
    gm = Widen().apply(gm, context)
    gm.recompile()
    loss = gm(*inputs, *parameters.parameters())[0].square().sum()
    loss.backward()
    return [n for n, p in parameters.named_parameters() if p.grad is not None], loss


def test_sites_behind_frozen_layers_get_gradients() -> None:
    model = Frozen()
    trained, _ = frozen(model)
    assert trained == [f"#{i}.{p}" for i in (1, 2) for p in ("phi", "alpha", "bias")]
    assert model.layers[0][1].weight.grad is None


class FrozenBackbone(Frozen):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.embed(ids)
            for layer in self.layers:
                x = x + layer(x)
        return self.head(x)


def test_a_learned_exit_behind_frozen_layers_gets_gradients() -> None:
    trained, _ = frozen(FrozenBackbone(), exit="head")
    assert trained == ["head.fn", "head.base", "head.scale"]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(style="tree"), Recipe(layout="flat_feed")], ids=str)
def test_new_nodes_say_where_they_come_from(recipe: Recipe) -> None:
    model, ids = toy(recipe)
    out = stepped(model, StreamSpec(streams=2), ids)
    new = [n for n in call_nodes(out.graph) if "mhc_from" in n.meta]
    assert new
    assert all("stack_trace" in n.meta for n in new)
    sites = [n.meta["mhc_site"] for n in new if op_name(n) == "distribute"]
    assert sites == [s.name for s in out.streams[0].sites]


def test_mhc206_for_other_sites_than_the_parameters() -> None:
    model, ids = toy(Recipe())
    gm, streams = analysed(model, ids)
    sites = dict.fromkeys(["layers.0#0", "layers.7#0"], 8)
    mark = add_parameters(gm, "", StreamParameters(StreamSpec(streams=2), sites))
    before = str(gm.graph)
    with pytest.raises(MHCError) as caught:
        Widen().apply(gm, Context(marks=[mark], streams=streams))
    assert caught.value.code == "MHC206"
    assert "sites without parameters: ['layers.0#1', 'layers.1#0', 'layers.1#1']" in str(caught.value)
    assert "parameters without a site: ['layers.7#0']" in str(caught.value)
    assert "toys.py:" in caught.value.source
    assert caught.value.module == "layers.1"
    assert "operator.add" in caught.value.node
    assert sites_of(mark) == list(sites)
    assert str(gm.graph) == before


def test_the_rewritten_graph_runs_twice() -> None:
    model, ids = toy(Recipe())
    out = stepped(model, StreamSpec(streams=4), ids)
    assert torch.equal(run(out.graph, out.inputs)[0], run(out.graph, out.inputs)[0])
