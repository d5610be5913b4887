"""Backward graphs in parts: what lies where, and that the parts together compute what the whole does."""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from goldens import graph_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.split_backward import Part, SplitBackward, split_backward

Golden = Callable[[str], None]

SIZE = 4


def traced(function: Callable[..., Any], count: int) -> GraphModule:
    """A backward graph of `count` square inputs, its tangents those that `function` calls so."""
    return make_fx(function, tracing_mode="fake")(*(torch.ones(SIZE, SIZE) for _ in range(count)))


def two_layers(x: Tensor, w1: Tensor, w2: Tensor, tangents_1: Tensor) -> list[Tensor]:
    """The backward of silu(x @ w1) @ w2, which repeats the forward of the hidden layer."""
    a = x @ w1
    sigmoid = torch.sigmoid(a)
    hidden = a * sigmoid
    d_hidden = tangents_1 @ w2.t()
    d_a = d_hidden * (sigmoid + hidden * (1 - sigmoid))
    return [d_a @ w1.t(), x.t() @ d_a, hidden.t() @ tangents_1]


def tag(gm: GraphModule, names: Collection[str], block: int = 0) -> None:
    """Mark nodes as computed again, as part of a block."""
    for node in gm.graph.nodes:
        if node.name in names:
            node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": block}


def parts(split: SplitBackward) -> list[Part]:
    return [p for p in (split.recompute, split.activations, split.weights) if p is not None]


def run(split: SplitBackward, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """What the parts compute, one after the other."""
    values: dict[str, Any] = dict(zip(split.placeholders, inputs, strict=True))
    for part in parts(split):
        part.graph.graph.lint()
        values |= dict(zip(part.outputs, part.graph(*(values[n] for n in part.inputs)), strict=True))
    return [None if name is None else values[name] for name in split.gradients]


def calls(part: Part | None) -> Counter[str]:
    nodes = part.graph.graph.nodes if part is not None else ()
    return Counter(str(n.target).split(".")[1] for n in nodes if n.op == "call_function")


def check(gm: GraphModule, weights: Collection[int], count: int) -> SplitBackward:
    """The graph in parts, which give bit by bit what it gives."""
    split = split_backward(gm, weights)
    inputs = [torch.randn(SIZE, SIZE) for _ in range(count)]
    whole = gm(*inputs)
    for expected, found in zip(whole, run(split, inputs), strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or torch.equal(expected, found)
    return split


def test_two_layers(golden: Golden) -> None:
    gm = traced(two_layers, 4)
    tag(gm, {"mm", "sigmoid", "mul"})
    split = check(gm, {1, 2}, 4)
    text = [f"whole\n{graph_text(gm)}"]
    for name, part in (("recompute", split.recompute), ("activations", split.activations), ("weights", split.weights)):
        assert part is not None
        text.append(f"\n{name}: {', '.join(part.inputs)} -> {', '.join(part.outputs)}\n{graph_text(part.graph)}")
    golden("\n".join(text))
    assert split.deferred == (1, 2)


def test_no_tags_no_recomputation() -> None:
    split = check(traced(two_layers, 4), {1, 2}, 4)
    assert split.recompute is None
    assert calls(split.activations)["mm"] == 3  # the hidden layer, and two gradients
    assert calls(split.weights)["mm"] == 2


def test_first_stage_has_no_activations_to_wait_for() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor | None]:
        return [None, x.t() @ tangents_1]

    split = check(traced(backward, 3), {1}, 3)
    assert split.activations is None
    assert calls(split.weights) == {"t": 1, "mm": 1}


def test_frozen_weights_leave_nothing_to_defer() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor | None]:
        return [tangents_1 @ w.t(), None]

    split = check(traced(backward, 3), {1}, 3)
    assert split.weights is None
    assert split.deferred == ()


def test_gradient_that_arrives_as_it_is() -> None:
    split = check(traced(lambda x, b, tangents_1: [tangents_1, tangents_1], 3), {1}, 3)  # noqa: ARG005
    assert parts(split) == []
    assert split.gradients == ("tangents_1_1", "tangents_1_1")


def test_weight_gradient_on_the_way_stays_there() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor]:
        d_w = x.t() @ tangents_1
        return [d_w @ w, d_w]

    split = check(traced(backward, 3), {1}, 3)
    assert split.weights is None
    assert split.deferred == ()


def test_elements_of_tuples_are_handed_over() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor]:
        values, places = torch.sort(tangents_1)
        return [values + w, x.gather(0, places)]

    split = check(traced(backward, 3), {1}, 3)
    assert split.weights is not None
    assert "getitem_1" in split.weights.inputs
    assert calls(split.weights) == {"gather": 1}


def test_views_and_wider_casts_are_repeated() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor]:
        narrow = (tangents_1 @ w).to(torch.bfloat16)
        wide = narrow.to(torch.float32)
        flat = wide.t().reshape(-1)
        return [flat.view(SIZE, SIZE) * 2, flat.view(SIZE, SIZE) * x]

    split = check(traced(backward, 3), {1}, 3)
    assert split.weights is not None
    kept = [n for n in split.weights.graph.graph.nodes if n.op == "placeholder" and n.name != "x_1"]
    assert [n.meta["val"].dtype for n in kept] == [torch.float32]  # the reshape had to copy

    def views(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor]:
        wide = (tangents_1 @ w).to(torch.bfloat16).to(torch.float32).t()
        return [wide * 2, wide * x]

    split = check(traced(views, 3), {1}, 3)
    assert split.weights is not None
    kept = [n for n in split.weights.graph.graph.nodes if n.op == "placeholder" and n.name != "x_1"]
    assert [n.meta["val"].dtype for n in kept] == [torch.bfloat16]


def test_the_last_block_alone_is_recomputed_early() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor]:
        first = torch.sin(x)  # block 0
        last = torch.exp(w)  # block 1
        free = torch.cos(w)  # of no block
        d_last = tangents_1 * last
        d_first = d_last * first * free
        return [d_first, d_last]

    gm = traced(backward, 3)
    tag(gm, {"sin"}, 0)
    tag(gm, {"exp"}, 1)
    split = check(gm, {1}, 3)
    assert calls(split.recompute) == {"exp": 1}
    assert calls(split.activations) == {"sin": 1, "cos": 1, "mul": 3}


def test_side_effects_happen_with_the_weights() -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor) -> list[Tensor | None]:
        torch.ops.aten._assert_async.msg(torch.ones(()), "never")
        return [tangents_1 * w, None]

    gm = traced(backward, 3)
    assert any("_assert_async" in str(n.target) for n in gm.graph.nodes)
    split = check(gm, {1}, 3)
    assert calls(split.weights)["_assert_async"] == 1
    assert calls(split.activations)["_assert_async"] == 0


OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.mul,
    torch.mm,
    lambda a, b: a.t() @ b,
    lambda a, b: torch.sort(a).values + b,
    lambda a, b: torch.var_mean(a, dim=0, keepdim=True)[1] * b,
    lambda a, b: a.view(2, 2 * SIZE).reshape(SIZE, SIZE) - b,
]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 99), st.integers(0, 99)), min_size=1),
    results=st.lists(st.one_of(st.none(), st.integers(0, 99)), min_size=1, max_size=5),
    weights=st.sets(st.integers(0, 4)),
    tagged=st.sets(st.integers(0, 20)),
)
def test_any_graph(
    steps: list[tuple[int, int, int]], results: list[int | None], weights: set[int], tagged: set[int]
) -> None:
    def backward(x: Tensor, w: Tensor, tangents_1: Tensor, tangents_2: Tensor) -> list[Tensor | None]:
        values = [x, w, tangents_1, tangents_2]
        for operation, a, b in steps:
            values.append(OPERATIONS[operation](values[a % len(values)], values[b % len(values)]))
        return [None if r is None else values[r % len(values)] for r in results]

    gm = traced(backward, 4)
    computing = [n for n in gm.graph.nodes if n.op == "call_function"]
    tag(gm, {n.name for i, n in enumerate(computing) if i in tagged})
    split = check(gm, weights, 4)
    found = Counter(n.name for p in parts(split) for n in p.graph.graph.nodes if _costs(n))
    assert all(count == 1 for count in found.values()), "each value is computed once"
    if split.recompute is not None:
        assert not any("tangents" in name for name in split.recompute.inputs)


def _costs(node: Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem and not node.target.is_view


@pytest.mark.parametrize("weights", [(), (0, 1, 2)])
def test_all_or_nothing_is_weights(weights: tuple[int, ...]) -> None:
    split = check(traced(two_layers, 4), weights, 4)
    assert (split.weights is None) == (not weights)
    assert (split.activations is None) == bool(weights)
