"""Routers: choices of experts, and the biases that balance them, in the ways that models write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile.capture import capture
from mhc_compile.passes.routers import Router, count_loads, find_routers, only_chooses
from mhc_compile.passes.stages import counters_of, outputs_of

EXPERTS, TOKENS, WIDTH = 6, 12, 8


class Mixture(nn.Module):
    """`choose(self, scores)` returns the experts of each token and their weights; `x` goes through these."""

    def __init__(self, choose: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.choose = choose
        self.gate = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.ones(EXPERTS))
        self.register_buffer("bias", torch.linspace(-0.3, 0.3, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        indices, weights = self.choose(self, F.linear(x, self.gate).sigmoid() * self.scale)
        return x + ((x[:, None, None] @ self.experts[indices]).squeeze(-2) * weights[..., None]).sum(1)


def plain(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, indices = torch.topk(scores, 2, dim=-1)
    return indices, weights


def top_one(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    indices = scores.argmax(-1, keepdim=True)
    return indices, scores.gather(1, indices)


def biased(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    indices = (scores + m.bias).topk(2, dim=-1).indices
    return indices, scores.gather(1, indices)


def without_gradients(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        indices = (m.bias.unsqueeze(0) + scores.float()).topk(2, dim=-1).indices
    return indices, scores.gather(1, indices)


def in_groups(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    wanted = scores + m.bias
    of_groups = wanted.view(-1, 3, 2).topk(2, dim=-1)[0].sum(-1)
    groups = torch.topk(of_groups, 2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(of_groups).scatter_(1, groups, 1).bool().repeat_interleave(2, 1)
    indices = wanted.masked_fill(~mask, float("-inf")).topk(2, dim=-1)[1]
    return indices, scores.gather(1, indices)


def with_its_bias(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, indices = torch.topk(scores + m.bias, 2, dim=-1)
    return indices, weights


def multiplied(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    indices = (scores * m.bias).topk(2, dim=-1).indices
    return indices, scores.gather(1, indices)


def subtracted(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    indices = (scores - m.bias).topk(2, dim=-1).indices
    return indices, scores.gather(1, indices)


def turned_round(m: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    indices = (-(scores + m.bias)).topk(2, dim=-1).indices
    return indices, scores.gather(1, indices)


def found(model: nn.Module, x: Tensor) -> tuple[Any, list[Any], list[Router], dict[str, str]]:
    """The graph, its inputs, its routers, and the names of the module's own placeholders."""
    captured = capture(model, (x,), {})
    graph = captured.graph.graph
    own = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    places = list(zip(graph.find_nodes(op="placeholder"), captured.inputs, strict=True))
    given = [n for n, t in places if id(t) not in own]
    routers = find_routers(graph, given, outputs_of(graph))
    return captured.graph, captured.inputs, routers, {n.name: own[id(t)] for n, t in places if id(t) in own}


@pytest.mark.parametrize(
    ("choose", "biases", "chooses"),
    [
        (plain, 0, 0),
        (top_one, 0, 0),
        (biased, 1, 1),
        (without_gradients, 1, 1),
        (in_groups, 1, 1),
        (with_its_bias, 0, 0),
        (multiplied, 0, 1),
        (subtracted, 0, 1),
        (turned_round, 0, 1),
    ],
)
def test_a_router_and_its_load(choose: Any, biases: int, chooses: int) -> None:
    model, x = Mixture(choose), torch.randn(TOKENS, WIDTH)
    gm, inputs, routers, names = found(model, x)
    assert [r.experts for r in routers] == [EXPERTS]
    assert [names[n.name] for n in routers[0].biases] == ["bias"] * biases
    own = [n for n in gm.graph.find_nodes(op="placeholder") if n.name in names]
    assert [names[n.name] for n in own if only_chooses(n, outputs_of(gm.graph))] == ["bias"] * chooses
    output = gm.graph.output_node()
    output.args = ((*output.all_input_nodes, *count_loads(gm.graph, routers, ["layer"])),)
    assert list(counters_of(gm.graph)) == ["layer"]
    gm.recompile()
    *_, load = gm(*inputs)
    indices, _ = model.choose(model, F.linear(x, model.gate).sigmoid() * model.scale)
    assert torch.equal(load, indices.flatten().bincount(minlength=EXPERTS))
    assert not load.requires_grad
    assert counters_of(gm.graph)["layer"].meta["example_value"].shape == load.shape


class Selecting(nn.Module):
    """Attends to the keys with the highest scores, as many as there are tokens; and keeps the largest activations."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        chosen = scores.topk(3, dim=-1).indices
        mask = torch.full_like(scores, float("-inf")).scatter(-1, chosen, 0.0)
        return x + (scores + mask).softmax(-1) @ x


def test_scores_may_be_the_first_of_more() -> None:
    class Shared(Mixture):
        def __init__(self) -> None:
            super().__init__(biased)
            self.more = nn.Parameter(torch.randn(EXPERTS + 1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            scores = F.linear(x, self.more).sigmoid()
            indices, weights = self.choose(self, scores[..., :-1])
            mixed = ((x[:, None, None] @ self.experts[indices]).squeeze(-2) * weights[..., None]).sum(1)
            return x + mixed + scores[..., -1:] * x

    (router,) = found(Shared(), torch.randn(TOKENS, WIDTH))[2]
    assert router.experts == EXPERTS
    assert len(router.biases) == 1


def test_choices_of_keys_and_of_tokens_are_none() -> None:
    x = torch.randn(EXPERTS, WIDTH)
    assert found(Selecting(), x)[2] == []

    class Skipping(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            tokens = (x @ self.gate[0]).topk(3).indices
            return x.index_add(0, tokens, x[tokens] @ self.experts[0])

    assert found(Skipping(plain), x)[2] == []
