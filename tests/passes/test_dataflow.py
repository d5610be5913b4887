"""Facts about graphs: who writes where, what depends on what, which values come from the embedding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from recipes import recipes
from stepping import captured, normal
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from toys import toy

from mhc_compile.passes.base import is_tensor, op_name, value
from mhc_compile.passes.dataflow import (
    Dataflow,
    carries_data,
    in_place_option,
    storage_root,
    writes_first_operand,
)
from mhc_compile.passes.ownership import is_owned


class Written(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.body = body
        self.embed, self.linear, self.norm = nn.Embedding(11, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("table", torch.randn(11, 4))

    def forward(self, *args: Tensor) -> object:
        return self.body(self, *args)


def graph(body: Callable[..., object], *args: Tensor) -> GraphModule:
    """As Dynamo hands it over: in-place operations and all."""
    return captured(Written(body), *args).graph


def named(gm: GraphModule, name: str) -> Node:
    """The only node of that operation."""
    (node,) = (n for n in gm.graph.nodes if op_name(n) == name)
    return node


X = torch.randn(2, 3, 4)
IDS = torch.arange(6).reshape(2, 3)


# --- writes and views ---------------------------------------------------------------------------------------------


def set_first(x: Tensor) -> Tensor:
    x[0] = 1.0
    return x


def add_one(x: Tensor) -> Tensor:
    x += 1
    return x


WRITES: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "add_": (lambda x: x.add_(1), True),
    "iadd": (add_one, True),
    "setitem": (set_first, True),
    "scatter_": (lambda x: x.scatter_(0, torch.zeros(1, 1, 1, dtype=torch.int64), 1.0), True),
    "relu_": (lambda x: torch.relu_(x), True),
    "relu by name": (lambda x: F.relu(x, inplace=True), True),
    "relu by place": (lambda x: F.relu(x, True), True),
    "dropout": (lambda x: F.dropout(x, 0.0, True, True), True),
    "relu": (lambda x: F.relu(x), False),
    "relu told not to": (lambda x: F.relu(x, inplace=False), False),
    "another option": (lambda x: F.dropout(x, 0.0, True), False),
    "mean": (lambda x: x.mean(-1, True), False),
    "add": (lambda x: x + 1, False),
    "__index__": (lambda x: x[0], False),
}


@pytest.mark.parametrize(("body", "writes"), WRITES.values(), ids=WRITES)
def test_writes(body: Callable[[Tensor], object], writes: bool) -> None:
    gm = graph(lambda _, x: (body(h := x * 2), h), X)
    done = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method") and writes_first_operand(n)]
    assert bool(done) == writes
    flow = Dataflow(gm.graph, is_owned)
    assert flow.writes == ({named(gm, "mul"): done} if writes else {})


def test_in_place_options_are_found_by_name_and_by_place() -> None:
    gm = graph(lambda _, x: F.silu(F.relu(x * 2, inplace=True), True), X)
    assert in_place_option(named(gm, "relu")) == "inplace"
    assert in_place_option(named(gm, "silu")) == 1
    assert in_place_option(named(gm, "mul")) is None


VIEWS: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "view": (lambda x: x.view(-1), True),
    "transpose": (lambda x: x.transpose(0, 1), True),
    "index": (lambda x: x[0], True),
    "chunk": (lambda x: x.chunk(2)[1], True),
    "same dtype": (lambda x: x.to(torch.float32), True),
    "other dtype": (lambda x: x.to(torch.float64), False),
    "half": (lambda x: x.half(), False),
    "product": (lambda x: x * 2, False),
    "clone": (lambda x: x.clone(), False),
}


@pytest.mark.parametrize(("body", "shares"), VIEWS.values(), ids=VIEWS)
def test_views_share_storage(body: Callable[[Tensor], Tensor], shares: bool) -> None:
    gm = graph(lambda _, x: body(x + 1).sin(), X)
    last = named(gm, "sin").args[0]
    assert (storage_root(last) is named(gm, "add")) == shares


def test_a_read_behind_a_write_depends_on_the_write() -> None:
    def body(_: nn.Module, x: Tensor) -> object:
        h = x * 2
        before = h.cos()
        view = h.view(-1)
        view[0] = x.sum()
        return before, h.sin()

    gm = graph(body, X)
    flow = Dataflow(gm.graph, is_owned)
    write = named(gm, "setitem")
    assert flow.depends(named(gm, "sin"), write)
    assert flow.depends(named(gm, "sin"), named(gm, "sum"))
    assert not flow.depends(named(gm, "cos"), write)


# --- dependence ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(recipes())
def test_masks_agree_with_a_walk_over_the_graph(recipe: object) -> None:
    model, ids = toy(recipe)
    gm = normal(model, ids)
    flow = Dataflow(gm.graph, is_owned)
    above: dict[Node, set[Node]] = {}
    for node in flow.nodes:
        above[node] = {node}.union(*(above[n] for n in flow.inputs[node]))
        assert set(flow.members(flow.ancestors[node])) == above[node]
    for node in flow.nodes:
        assert set(flow.members(flow.descendants[node])) == {n for n in flow.nodes if node in above[n]}
    source, sink = flow.nodes[len(flow.nodes) // 3], flow.nodes[-2]
    between = {n for n in flow.nodes if source in above[n] and n in above[sink]}
    assert set(flow.members(flow.between(source, sink))) == between


def test_dominators_are_what_every_path_passes() -> None:
    def body(m: nn.Module, ids: Tensor) -> object:
        x = m.embed(ids).sin()
        left, right = x.exp(), x.cos()
        return (left * right).tanh()

    gm = graph(body, IDS)
    flow = Dataflow(gm.graph, is_owned)
    assert flow.dominators[named(gm, "mul")] is named(gm, "sin")
    assert flow.dominators[named(gm, "tanh")] is named(gm, "mul")
    assert flow.dominators[named(gm, "embedding")] is None


METADATA: dict[str, Callable[[Tensor, Tensor], object]] = {
    "zeros_like": lambda h, _: torch.zeros_like(h),
    "new_zeros": lambda h, _: h.new_zeros(3),
    "size": lambda h, _: torch.ones(h.size(0)),
    "expand_as": lambda h, m: m.expand_as(h),
    "type_as": lambda h, m: m.type_as(h),
}


@pytest.mark.parametrize("body", METADATA.values(), ids=METADATA)
def test_shapes_and_dtypes_are_no_dependence(body: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = graph(lambda m, ids, mask: (body(h := m.embed(ids).sin(), mask).cos(), h), IDS, torch.ones(1, 1, 4))
    flow = Dataflow(gm.graph, is_owned)
    last = named(gm, "cos")
    assert last not in flow.hot
    assert not flow.depends(last, named(gm, "sin"))


# --- roles --------------------------------------------------------------------------------------------------------


def roles(body: Callable[..., object], *args: Tensor) -> tuple[GraphModule, Dataflow]:
    gm = graph(body, *args)
    return gm, Dataflow(gm.graph, is_owned)


def test_embeddings_are_hot_and_parameters_parametric() -> None:
    gm, flow = roles(lambda m, ids: m.linear(m.embed(ids)) * m.table.sin()[0], IDS)
    assert named(gm, "embedding") in flow.hot
    assert named(gm, "linear") in flow.hot
    assert named(gm, "sin") in flow.parametric
    assert flow.members(flow.matmuls) == [named(gm, "linear")]


def test_a_table_read_by_index_is_an_embedding() -> None:
    gm, flow = roles(lambda m, ids: m.table[ids].sin(), IDS)
    assert named(gm, "sin") in flow.hot


def test_beside_token_ids_masks_and_caches_are_no_content() -> None:
    gm, flow = roles(lambda m, ids, mask, past: m.linear(m.embed(ids)) * mask.sin() + past.cos(), IDS, X, X + 1)
    assert named(gm, "sin") not in flow.hot
    assert named(gm, "cos") not in flow.hot


def test_features_that_a_layer_projects_are_content() -> None:
    gm, flow = roles(lambda m, ids, x: m.embed(ids) + m.linear(m.norm(x)).sin(), IDS, X)
    assert named(gm, "sin") in flow.hot
    gm, flow = roles(lambda m, x: m.linear(x).sin(), X)
    assert named(gm, "sin") in flow.hot


def test_a_contraction_without_parameters_is_no_layer() -> None:
    gm, flow = roles(lambda m, ids: (h := m.embed(ids)) @ h.transpose(1, 2), IDS)
    assert named(gm, "matmul") in flow.hot
    assert flow.matmuls == 0


def test_a_custom_operator_with_a_parameter_is_taken_for_a_layer() -> None:
    library = torch.library.Library("mhc_test_dataflow", "DEF")
    library.define("scale(Tensor x, Tensor w) -> Tensor")
    library.impl("scale", lambda x, w: x * w, "CompositeExplicitAutograd")
    torch.library.register_fake("mhc_test_dataflow::scale", lambda x, w: x * w, lib=library)
    try:
        _, flow = roles(lambda m, x: torch.ops.mhc_test_dataflow.scale(m.linear(x), m.table[0]), X)
        assert [op_name(n) for n in flow.members(flow.matmuls)] == ["linear", "scale"]
        _, flow = roles(lambda m, x: torch.ops.mhc_test_dataflow.scale(m.linear(x), x), X)
        assert [op_name(n) for n in flow.members(flow.matmuls)] == ["linear"]
    finally:
        library._destroy()


def test_tuples_that_hold_tensors_carry_data() -> None:
    gm = graph(lambda _, x: x.chunk(2)[0] + x.shape[0], X)
    chunk = named(gm, "chunk")
    assert carries_data(chunk)
    assert not is_tensor(chunk)
    assert isinstance(value(chunk), tuple)


def test_analysing_changes_nothing() -> None:
    gm = graph(lambda m, ids: m.linear(m.embed(ids)), IDS)
    before = str(gm.graph)
    flow = Dataflow(gm.graph, is_owned)
    assert flow.descendants
    assert flow.dominators
    assert str(gm.graph) == before
