"""Recomputation: which nodes are tagged how, what `fuse` makes of them, and what the cost model says of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from goldens import Printer
from layers import IDS, FirstFrozen, Layers
from recipes import ONE_BY_ONE, Recipe
from stepping import CHECKED, add_parameters, captured
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from toys import toy

from mhc_compile.attach import sites_of_owners
from mhc_compile.capture import private_copy
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, call_nodes, kernels_of, op_name, value
from mhc_compile.passes.dialect_sites import stream_sites
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.pipeline import ANALYSIS, Pipeline
from mhc_compile.passes.recompute import Recompute, is_tagged, plan_of
from mhc_compile.passes.stages import site_nodes, split_graph
from mhc_compile.passes.widen import Widen

Golden = Callable[[str], None]
SPEC = StreamSpec(streams=3)
AGAIN, KEPT = CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_SAVE
needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")


def dialect(model: nn.Module, *args: Any, spec: StreamSpec = SPEC) -> GraphModule:
    """The graph behind `widen`, in float32, as the backend would have it."""
    gm = captured(model.float(), *args).graph
    context = Context()
    gm = ANALYSIS.run(gm, context, debug=CHECKED.debug)
    for owner, found in sites_of_owners(context.streams, spec).items():
        context.marks.append(add_parameters(gm, owner, StreamParameters(spec, found)))
    return Pipeline((Widen(),)).run(gm, context, debug=CHECKED.debug, provided=("streams",))


def tagged(gm: GraphModule, blocks: str | int) -> tuple[GraphModule, list[str]]:
    context = Context()
    return Recompute(blocks).apply(gm, context), context.notes


def fused(gm: GraphModule) -> GraphModule:
    return Fuse().apply(gm, Context())


def tags(gm: GraphModule) -> dict[Node, tuple[CheckpointPolicy, int | None]]:
    nodes = call_nodes(gm)
    return {n: (n.meta["recompute"], n.meta.get("ac_graph_id")) for n in nodes if "recompute" in n.meta}


def kernels(gm: GraphModule) -> list[tuple[str, str, int | None]]:
    """The stream kernels in order with their tags."""
    found = []
    for n in call_nodes(gm):
        if str(n.target).startswith("mhc_kernels."):
            name = str(n.target).split(".")[1].removesuffix("_layer").removesuffix("_rms")
            policy = n.meta.get("recompute")
            found.append((name, policy.name if policy else "", n.meta.get("ac_graph_id")))
    return found


def names(gm: GraphModule) -> list[str]:
    return [name for name, *_ in kernels(gm)]


def chain(layers: int) -> GraphModule:
    model, ids = toy(Recipe(layers=layers, style="single"))
    return dialect(model, ids)


# --- tags -------------------------------------------------------------------------------------------------------------


def test_blocks_of_two_sites(golden: Golden) -> None:
    gm, notes = tagged(chain(3), 2)
    printer, lines = Printer(gm), ["tag            block"]
    for n in call_nodes(gm):
        policy, block = n.meta.get("recompute"), n.meta.get("ac_graph_id")
        lines.append(f"{policy.name if policy else '':<15}{block or '':<7}{printer.names[n]} = {printer.call(n)}")
    golden("\n".join([*lines, "", *notes]))


@needs_compiler
def test_what_begins_a_block_is_one_kernel_and_kept() -> None:
    gm = fused(tagged(chain(5), 2)[0])
    assert kernels(gm) == [
        ("read", "MUST_RECOMPUTE", 1),
        ("boundary", "MUST_RECOMPUTE", 1),
        ("boundary", "MUST_SAVE", 2),
        ("boundary", "MUST_RECOMPUTE", 2),
        ("boundary", "MUST_SAVE", 3),
        ("leave", "", None),
    ]
    for n in call_nodes(gm):
        if n.target is torch.ops.mhc_kernels.boundary_layer.default:
            assert {(u.meta["recompute"], u.meta["ac_graph_id"]) for u in n.users} == {tags(gm)[n]}


@needs_compiler
@pytest.mark.parametrize("recipe", [r for r in ONE_BY_ONE if r.extra != "cast"], ids=str)
def test_every_topology_has_the_same_kernels_and_no_branch_is_made_again(recipe: Recipe) -> None:
    model, ids = toy(recipe)
    plain = dialect(model, ids)
    inside = {"linear", "cumsum", "gelu", "sigmoid", "cat", "embedding"}
    for blocks in ("stage", 1):
        gm, _ = tagged(private_copy(plain), blocks)
        again = {op_name(n) for n, (policy, _) in tags(gm).items() if policy is AGAIN}
        assert {"coefficients", "aggregate"} <= again
        assert not again & inside
        assert names(fused(gm)) == names(fused(private_copy(plain)))


def test_every_branch_keeps_its_output() -> None:
    gm, _ = tagged(chain(3), "stage")
    for site in stream_sites(gm.graph):
        assert site.distribute is not None
        assert tags(gm)[site.distribute.args[1]] == (KEPT, None)  # type: ignore[index]


def test_norms_of_each_stream_are_made_again_from_the_state_in_front_of_them() -> None:
    model, ids = toy(Recipe(layers=2, style="post"))
    gm, _ = tagged(dialect(model, ids), 1)
    found = stream_sites(gm.graph)
    for block, site in enumerate(found[1:], 2):
        norms = [n for n in site.stream if op_name(n) == "layer_norm" and value(n).ndim == 4]
        assert [tags(gm)[n] for n in norms] == [(AGAIN, block)]
        assert tags(gm)[site.state][0] is KEPT


def test_sites_without_gradients_are_left_out() -> None:
    gm, _ = tagged(dialect(FirstFrozen(), IDS), "stage")
    first, second, third = site_nodes(gm.graph)
    assert first not in tags(gm)
    assert tags(gm)[second] == tags(gm)[third] == (AGAIN, 1)


def test_layers_that_a_user_checkpoints_keep_their_own_tags() -> None:
    class Checkpointed(Layers):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x = x + self.layers[0](x)
            x = checkpoint(lambda h: h + self.layers[1](h), x, use_reentrant=False)
            return self.head(x + self.layers[2](x))

    gm, _ = tagged(dialect(Checkpointed(), IDS), "stage")
    first, second, third = site_nodes(gm.graph)
    theirs = CheckpointPolicy.PREFER_RECOMPUTE
    assert tags(gm)[second] == (theirs, 1)
    assert tags(gm)[first] == (AGAIN, 2)
    assert tags(gm)[third] == (AGAIN, 3)
    linear = next(n for n in call_nodes(gm) if op_name(n) == "linear" and "layers.1" in str(n.meta["nn_module_stack"]))
    assert tags(gm)[linear] == (theirs, 1)
    states = {site.coefficients: site.state for site in stream_sites(gm.graph)}
    assert tags(gm)[states[second]][0] is tags(gm)[states[third]][0] is KEPT


def test_two_streams_have_blocks_of_their_own() -> None:
    class Two(Layers):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + layer(x)
            y = self.embed(ids + 1)
            for layer in self.layers:
                y = y + layer(y)
            return self.head(x), self.head(y)

    gm, _ = tagged(dialect(Two(), IDS), "stage")
    assert [n.meta["ac_graph_id"] for n in site_nodes(gm.graph)] == [1, 1, 1, 2, 2, 2]


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "sizes"),
    [("off", ()), ("stage", (5,)), (2, (2, 2, 1)), (9, (5,)), ("auto", (2, 2, 1)), ("1GiB", ())],
)
def test_blocks_of_five_sites(blocks: str | int, sizes: tuple[int, ...]) -> None:
    gm, _ = tagged(chain(5), blocks)
    held = [n.meta.get("ac_graph_id") for n in site_nodes(gm.graph)]
    assert held == ([None] * 5 if not sizes else [i + 1 for i, size in enumerate(sizes) for _ in range(size)])
    assert is_tagged(gm.graph) == bool(sizes)


def test_a_stage_begins_with_what_crosses_into_it() -> None:
    pieces = split_graph(chain(5), [2])
    for piece, sizes in zip(pieces, ((2,), (2, 1)), strict=True):
        tagged(piece.graph, 2)
        held = [n.meta.get("ac_graph_id") for n in site_nodes(piece.graph.graph)]
        assert held == [i + 1 for i, size in enumerate(sizes) for _ in range(size)]
        first, *_ = stream_sites(piece.graph.graph)
        assert (first.state.op == "placeholder") == bool(piece.crosses_in)
        assert tags(piece.graph)[first.coefficients] == (AGAIN, 1)


def test_a_graph_without_streams_is_left_as_it_is() -> None:
    gm = captured(nn.Linear(4, 4), torch.randn(2, 4)).graph
    before = str(gm.graph)
    _, notes = tagged(gm, "auto")
    assert str(gm.graph) == before
    assert notes == ["no site is there to be computed again"]


def test_a_budget_leaves_the_last_sites_as_they_are() -> None:
    whole, least = plan_of(chain(5).graph, "off"), plan_of(chain(5).graph, "auto")
    budget = (whole.whole + least.peak) // 2
    plan = plan_of(chain(5).graph, f"{budget}B")
    assert least.peak <= plan.peak <= budget
    assert 0 < plan.rest < 5
    gm, notes = tagged(chain(5), f"{budget}B")
    held = [n.meta.get("ac_graph_id") for n in site_nodes(gm.graph)]
    assert held.count(None) == plan.rest
    assert held[-1] is None
    assert f"{plan.rest} sites keep all" in notes[0]


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC626 .*2 B for 5 sites; the least possible is"):
        tagged(chain(5), "2B")


def test_a_budget_needs_sizes() -> None:
    model, ids = toy(Recipe(layers=2))
    gm = dialect(model, ids)
    for site in stream_sites(gm.graph):
        mode = value(site.state).fake_mode
        for node in (site.state, site.coefficients, *site.stream, *site.branch):
            held = value(node)
            if isinstance(held, Tensor):
                tokens = mode.shape_env.create_unbacked_symint()
                node.meta["example_value"] = mode.from_tensor(torch.empty(1)).new_empty((tokens, *held.shape[1:]))
    assert tagged(gm, "auto")[1]
    with pytest.raises(MHCError, match="MHC627"):
        plan_of(dialect_without_tags(gm).graph, "1GiB")


def dialect_without_tags(gm: GraphModule) -> GraphModule:
    for n in gm.graph.nodes:
        n.meta.pop("recompute", None)
        n.meta.pop("ac_graph_id", None)
    return gm


# --- costs ------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("style", ["single", "pre", "post"])
def test_costs_are_what_the_kernels_save(style: str) -> None:
    model, ids = toy(Recipe(layers=3, style=style))  # type: ignore[arg-type]
    gm = dialect(model, ids)
    plan = plan_of(gm.graph, "off")
    fused(gm)
    saved: set[Node] = set()
    z = 0
    for n in call_nodes(gm):
        if not (specs := kernels_of(n)):
            continue
        (chain,) = specs
        names = dict(zip(chain.inputs(), n.args, strict=False))
        saved |= {names[i] for i in names if i in ("X", "y", "post", "mix", "pre")}  # type: ignore[misc]
        outputs = chain.outputs()
        if "z" in outputs:
            z += 4 * (chain.stream.rows + 1) * ids.numel()
            # What the branch reads and keeps.
            saved |= {u for u in n.users if u.args[1] == outputs.index("h")}
        if str(n.target).startswith("mhc_kernels.distribute"):
            saved.add(n)  # the norm of each stream keeps what it reads
    assert plan.whole == z + sum(value(n).numel() * value(n).dtype.itemsize for n in saved)
