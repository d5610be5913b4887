"""The sites of depth forms in a dialect graph: what belongs to them, what it costs, and how `recompute` tags it."""

from __future__ import annotations

import itertools

import pytest
from layers import IDS, FirstFrozen, Layers
from stepping import add_parameters, captured
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.attach import sites_of_owners
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, call_nodes, op_name
from mhc_compile.passes.depth_sites import depth_sites
from mhc_compile.passes.dialect_sites import size_of
from mhc_compile.passes.pipeline import ANALYSIS, Pipeline
from mhc_compile.passes.recompute import Recompute, plan_of
from mhc_compile.passes.widen import Widen

AGAIN, KEPT = CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_SAVE


class Chained(Layers):
    """One layer behind the other."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def dialect(model: Layers, form: str) -> GraphModule:
    """The graph behind `widen`."""
    gm = captured(model.float(), IDS).graph
    context = Context()
    gm = ANALYSIS.run(gm, context)
    spec = StreamSpec(form=form)
    for owner, found in sites_of_owners(context.streams, spec).items():
        context.marks.append(add_parameters(gm, owner, StreamParameters(spec, found)))
    return Pipeline((Widen(),)).run(gm, context, debug=True, provided=("streams",))


@pytest.mark.parametrize("form", ["attnres", "denseformer", "mudd"])
def test_sites(form: str) -> None:
    gm = dialect(Chained(), form)
    (run,) = depth_sites(gm.graph)
    assert [len(site.sources) for site in run] == [1, 2, 3]
    assert [site.begins for site in run] == [True, False, False]
    for site, later in itertools.pairwise(run):
        assert site.output is later.sources[-1]
    assert all(len(site.norms) == 1 for site in run)
    wide = size_of(run[0].sources[0])
    reads = 4 if form == "mudd" else 1
    z = 2 * 4 * IDS.numel() if form == "attnres" else 0
    for k, site in enumerate(run):
        cost = site.cost(fused=True)
        assert (cost.state, cost.branch) == (0 if k else wide, wide)
        assert cost.made == (reads + 1) * wide + (k + 1) * z
        assert site.cost(fused=False).made == (reads + 1) * wide
        assert cost.alone


def test_tags() -> None:
    gm = dialect(Chained(), "attnres")
    context = Context()
    Recompute(2).apply(gm, context)
    policies = {n: n.meta["recompute"] for n in call_nodes(gm) if "recompute" in n.meta}
    again = [(op_name(n), n.meta["ac_graph_id"]) for n, policy in policies.items() if policy is AGAIN]
    assert again == [(name, block) for block in (1, 1, 2) for name in ("attnres", "layer_norm")]
    (run,) = depth_sites(gm.graph)
    assert [n for n, policy in policies.items() if policy is KEPT] == run[-1].sources
    assert [len(block.sites) for block in context.blocks] == [2, 1]
    assert context.notes[0] == "3 sites in 2 blocks of up to 2"


def test_a_budget_is_kept() -> None:
    graph = dialect(Chained(), "attnres").graph
    whole, least = plan_of(graph, "off"), plan_of(graph, "auto")
    assert least.kept < whole.kept
    assert plan_of(graph, f"{(whole.kept + least.peak) // 2}B").rest in (1, 2)


def test_sites_without_gradients_are_left_out() -> None:
    gm = dialect(FirstFrozen(), "denseformer")
    Recompute("stage").apply(gm, Context())
    (run,) = depth_sites(gm.graph)
    assert ["recompute" in site.reads[0].meta for site in run] == [False, True, True]
