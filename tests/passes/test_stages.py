"""Stages: the pieces of a cut graph, one after the other, compute what the graph computes."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from goldens import graph_text
from hypothesis import given
from hypothesis import strategies as st
from recipes import ONE_BY_ONE, Recipe
from stepping import randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from toys import toy

import mhc_compile
from mhc_compile.capture import capture, find_marks
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context
from mhc_compile.passes.pipeline import WIDENING
from mhc_compile.passes.stages import Piece, balanced, dropout_of, is_random, site_nodes, split_graph

Golden = Callable[[str], None]


def dialect(model: nn.Module, *args: Any, **form: str) -> tuple[GraphModule, list[Any]]:
    """The model's training graph with random streams in the dialect, and its inputs; all in float64."""
    model = mhc_compile.convert(model.double(), *args, streams=2, inner="eager", **form)
    for i, held in enumerate(owners(model).values()):
        randomise(held, i)
    found = capture(model, args, {})
    gm = WIDENING.run(found.graph, Context(marks=find_marks(found.graph)), debug=True)
    return gm, found.inputs


def chained(pieces: Sequence[Piece], gm: GraphModule, inputs: Sequence[Any]) -> list[Tensor]:
    """What the pieces compute one after the other."""
    known = dict(zip([n.name for n in gm.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    out: Any = ()
    for piece in pieces:
        piece.graph.graph.lint()
        names = [n.name for n in piece.graph.graph.nodes if n.op == "placeholder"]
        assert tuple(names[: len(piece.crosses_in)]) == piece.crosses_in
        out = piece.graph(*(known[name] for name in names))
        known |= dict(zip(piece.crosses_out, out, strict=False))
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor | None]:
    total = sum((t * torch.arange(t.numel(), dtype=t.dtype).view_as(t).cos()).sum() for t in outputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(total, wanted, allow_unused=True))  # type: ignore[arg-type]


def check(model: nn.Module, *args: Any, starts: Sequence[int] | None = None, **form: str) -> list[Piece]:
    gm, inputs = dialect(model, *args, **form)
    count = len(site_nodes(gm.graph))
    pieces = split_graph(gm, range(1, count) if starts is None else starts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = [t for t in tree_leaves(gm(*inputs)) if isinstance(t, Tensor)]
        torch.manual_seed(0)
        parts = chained(pieces, gm, inputs)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(whole, inputs), gradients(parts, inputs), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    return pieces


@pytest.mark.parametrize("recipe", [r for r in ONE_BY_ONE if r.sites > 1 and not r.hidden_states], ids=str)
def test_every_topology_cut_at_every_site(recipe: Recipe) -> None:
    model, ids = toy(recipe)
    pieces = check(model.train(), ids)
    assert [s for p in pieces for s in p.sites] == list(range(len(pieces)))


def test_pre_that_is_computed_one_site_ahead_crosses_with_the_streams() -> None:
    model, ids = toy(Recipe(layers=2, style="single"))
    pieces = check(model.train(), ids, convention="deepseek_v41")
    assert [len(p.crosses_in) for p in pieces] == [0, *[2] * (len(pieces) - 1)]


class Attending(nn.Module):
    """Attention and a projection in turn, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 24 if k % 2 == 0 else 8) for k in range(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for k, layer in enumerate(self.layers):
            y = layer(F.rms_norm(x, (8,)))
            x = x + (F.scaled_dot_product_attention(*y.split(8, -1), is_causal=True) if k % 2 == 0 else y.tanh())
        return F.rms_norm(x, (8,))


@pytest.mark.parametrize(
    ("form", "crossing"),
    [
        ("attnres", [0, 2, 3, 4, 5, 6]),  # the entry and the outputs before, of which none is read twice
        ("attnres_block", [0, 2, 2, 2, 3, 3]),
        ("denseformer", [0, 2, 3, 4, 5, 6]),
        ("mudd", [0, 2, 3, 4, 5, 6]),
        ("value_residual", [0, 2]),  # the stream and the first values
    ],
)
def test_earlier_outputs_cross(form: str, crossing: list[int]) -> None:
    torch.manual_seed(0)
    pieces = check(Attending().train(), torch.randint(11, (2, 4)), form=form)
    assert [len(p.crosses_in) for p in pieces] == crossing


def test_hidden_states_may_leave_where_the_streams_cross() -> None:
    model, ids = toy(Recipe(hidden_states=True))
    check(model, ids)


def test_pieces(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=2, style="single"))
    gm, _ = dialect(model, ids)
    golden("\n\n".join(f"{p.crosses_in} -> {p.crosses_out}\n{graph_text(p.graph)}" for p in split_graph(gm, [1])))


class Dropping(nn.Module):
    """Every branch reads the embedding, which a dropout has thinned out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        first = F.dropout(self.embedding(ids), 0.5, self.training)
        x = first
        for layer in self.layers:
            x = x + F.dropout(layer(F.layer_norm(x, (8,)) * first), 0.1, self.training)
        return x


def test_random_values_are_drawn_once() -> None:
    pieces = check(Dropping().train(), torch.randint(11, (2, 4)))
    assert [len(p.crosses_in) for p in pieces] == [0, 2, 2]
    drawn = [n for p in pieces for n in p.graph.graph.nodes if is_random(n)]
    assert len(drawn) == 4
    assert dropout_of(drawn[0]) == 0.5


class Routed(nn.Module):
    """Later branches choose by integers that the first one found."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        order = F.layer_norm(x, (8,)).argsort(-1)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (8,)).gather(-1, order))
        return x


def test_integers_cannot_cross() -> None:
    gm, _ = dialect(Routed(), torch.randint(11, (2, 4)))
    with pytest.raises(MHCError) as caught:
        split_graph(gm, [1])
    assert caught.value.code == "MHC621"
    assert "argsort" in str(caught.value)
    assert caught.value.source is not None


@pytest.mark.parametrize("starts", [[0], [4], [2, 2], [3, 1]])
def test_cuts_that_are_none(starts: list[int]) -> None:
    model, ids = toy(Recipe())
    gm, _ = dialect(model, ids)
    with pytest.raises(MHCError) as caught:
        split_graph(gm, starts)
    assert caught.value.code == "MHC620"


def test_pieces_can_be_cut_again() -> None:
    model, ids = toy(Recipe(layers=3, extra="shared_keys"))
    gm, inputs = dialect(model, ids)
    first, second = split_graph(gm, [2])
    again = split_graph(second.graph, [1, 2, 3], second.crosses_in)
    known = dict(zip([n.name for n in gm.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    known |= dict(zip(first.crosses_out, chained([first], gm, inputs), strict=True))
    out: Any = ()
    for piece in again:
        out = piece.graph(*(known[n.name] for n in piece.graph.graph.nodes if n.op == "placeholder"))
        known |= dict(zip(piece.crosses_out, out, strict=False))
    assert torch.equal(out[0], tree_leaves(gm(*inputs))[0])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_there_is(costs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(costs)))
    starts = balanced(costs, count)
    assert len(starts) == count - 1
    bounds = [0, *starts, len(costs)]
    assert all(a < b for a, b in pairwise(bounds))
    worst = max(sum(costs[a:b]) for a, b in pairwise(bounds))
    assert worst == _best(tuple(costs), count)


def _best(costs: tuple[int, ...], count: int) -> int:
    if count == 1:
        return sum(costs)
    return min(max(sum(costs[:k]), _best(costs[k:], count - 1)) for k in range(1, len(costs) - count + 2))


def test_more_stages_than_sites() -> None:
    with pytest.raises(MHCError, match="MHC620"):
        balanced([1.0, 2.0], 3)
