"""The pass `probe`: what it adds to a graph, that the graph computes what it did, and which graphs it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from goldens import graph_text
from recipes import ONE_BY_ONE, Recipe
from stepping import CHECKED, add_parameters, captured, normal, randomise, run, stepped
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import toy

from mhc_compile.attach import sites_of_owners
from mhc_compile.kernels import measures
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.probe_ops import layout, watch
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, Mark, call_nodes, value
from mhc_compile.passes.fuse import KERNELS, Fuse
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.pipeline import ANALYSIS, Pipeline
from mhc_compile.passes.probe import Probe
from mhc_compile.passes.results import Probed
from mhc_compile.passes.widen import Widen

Golden = Callable[[str], None]
SPEC = StreamSpec(streams=3)
SLOT = {"dtype": torch.float64, "requires_grad": True}


@dataclass
class Recorded:
    """A graph before and after the pass, what both computed, and what was added to the outputs."""

    plain: str
    text: str
    graph: GraphModule
    probed: list[Probed]
    before: list[Tensor]
    after: list[Tensor]
    added: list[Tensor]
    sites: list[str]


def recorded(model: nn.Module, *args: Any, spec: StreamSpec = SPEC, kernels: tuple[str, ...] = ()) -> Recorded:
    """The pass on the graph of a model whose stream parameters are random."""
    found, context = captured(model, *args), Context()
    gm = ANALYSIS.run(found.graph, context, debug=CHECKED.debug)
    inputs: list[Any] = list(found.inputs)
    for owner, sites in sites_of_owners(context.streams, spec).items():
        held = randomise(StreamParameters(spec, sites), 0)
        if kernels:
            held.float()
        mark = add_parameters(gm, owner, held)
        inputs += [*held.parameters(), torch.zeros(len(sites), spec.streams + 1, **SLOT)]  # type: ignore[arg-type]
        mark.probe = add_slot(gm, mark, inputs[-1])
        context.marks.append(mark)
    names = [site.name for stream in context.streams for site in stream.sites]
    gm = Pipeline((Widen(), Fuse(kernels), Lower())).run(gm, context, debug=CHECKED.debug, provided={"streams"})
    plain, before = graph_text(gm), run(gm, inputs)
    gm = Pipeline((Probe(),)).run(gm, context, debug=CHECKED.debug, provided={"kernels"})
    out = run(gm, inputs)
    return Recorded(plain, graph_text(gm), gm, context.probed, before, out[: len(before)], out[len(before) :], names)


def add_slot(gm: GraphModule, mark: Mark, slot: Tensor) -> torch.fx.Node:
    """The slot as the graph's last input."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(f"slot_{mark.owner}")
    node.meta["example_value"] = value(last).fake_mode.from_tensor(slot, static_shapes=True)
    return node


def figures(table: Tensor, n: int) -> list[dict[str, Tensor]]:
    """Every row of what was recorded, by name."""
    sizes = [torch.Size(shape).numel() for shape in layout(n).values()]
    return [
        {name: t.reshape(shape) for (name, shape), t in zip(layout(n).items(), row.split(sizes), strict=True)}
        for row in table
    ]


def kernels_of(text: str) -> list[str]:
    """The ops of streams in a graph's text, without their operands."""
    names = (line.partition(" = ")[2].partition("(")[0] for line in text.splitlines())
    return [name for name in names if name.startswith(("mhc.", "mhc_kernels."))]


def test_one_layer(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1))
    out = recorded(model, ids)
    golden(out.text)


@pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")
def test_one_layer_in_kernels(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1))
    out = recorded(model.float(), ids, kernels=KERNELS)
    assert kernels_of(out.text) == kernels_of(out.plain)
    golden(out.text)


@pytest.mark.parametrize("recipe", ONE_BY_ONE, ids=str)
def test_every_topology_computes_the_same_and_records_every_site(recipe: Recipe) -> None:
    model, ids = toy(recipe)
    out = recorded(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(out.after, out.before, strict=True))
    assert kernels_of(out.text) == kernels_of(out.plain)
    (probed,), (table,) = out.probed, out.added
    assert probed.sites == probed.rows == out.sites
    assert len(out.sites) == recipe.sites
    rows = figures(table, 3)
    assert all(row["tokens"] == ids.numel() for row in rows)
    torch.testing.assert_close(rows[0]["composite_forward_max"], rows[0]["gain_forward_max"])
    # A product of doubly stochastic matrices is one.
    assert all(row["composite_backward_mean"] == pytest.approx(1, abs=0.2) for row in rows)


def test_composites_are_products_of_one_streams_mixes() -> None:
    model, ids = toy(Recipe(layers=2))
    out = recorded(model, ids, spec=StreamSpec(streams=3, manifold="unconstrained"))
    targets = {n.target: n for n in call_nodes(out.graph)}
    assert watch in targets
    rows = figures(out.added[0], 3)
    sites = [n for n in call_nodes(out.graph) if n.target is torch.ops.mhc_probes.site.default]
    assert [n.args[5] is None for n in sites] == [True, False, False, False]
    assert rows[-1]["composite_forward_max"] != pytest.approx(float(rows[-1]["gain_forward_max"]), rel=0.1)


def test_composed_is_the_product() -> None:
    A, B = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(measures.composed(A, B), A @ B)


def test_graphs_without_a_slot_stay_as_they_are() -> None:
    gm = normal(nn.Linear(4, 4), torch.randn(2, 4))
    before, context = graph_text(gm), Context()
    assert graph_text(Probe().apply(gm, context)) == before
    model, ids = toy(Recipe(layers=1))
    out = stepped(model, SPEC, ids)
    assert out.graph is not None
    context = Context(marks=[Mark("", str(SPEC), {})])
    before = graph_text(out.graph)
    assert graph_text(Probe().apply(out.graph, context)) == before
    assert context.probed == []


def test_composites_begin_anew_where_tokens_change_places() -> None:
    class Transposing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 11)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x = x + self.layers[0](x)
            x = x + self.layers[1](x)
            x = x.transpose(0, 1)
            x = x + self.layers[2](x)
            x = x + self.layers[3](x)
            return self.head(x)

    out = recorded(Transposing().double(), torch.arange(6).reshape(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(out.after, out.before, strict=True))
    sites = [n for n in call_nodes(out.graph) if n.target is torch.ops.mhc_probes.site.default]
    assert [n.args[5] is None for n in sites] == [True, False, True, False]
