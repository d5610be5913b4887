"""Fusing: the largest chains that a kernel exists for, the same values, and a note for every chain left alone."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from recipes import ONE_BY_ONE, Recipe
from stepping import Stepped, analysed, stepped
from torch import Tensor, nn
from toys import toy

from mhc_compile.attach import append_parameters, sites_of_owners
from mhc_compile.kernels import targets
from mhc_compile.kernels.chain import Kind
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, call_nodes
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.pipeline import ANALYSIS, Pipeline
from mhc_compile.passes.widen import Widen

Golden = Callable[[str], None]
SPEC = StreamSpec(streams=3)
pytestmark = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")


def fused(model: nn.Module, *args: Any, spec: StreamSpec = SPEC, step: Fuse | None = None, **kwargs: Any) -> Stepped:
    out = stepped(model.float(), spec, *args, fuse=step or Fuse(), **kwargs)
    for before, after in zip(out.outputs["widen"], out.outputs["fuse"], strict=True):
        torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-5)
    return out


def ops(out: Stepped) -> list[str]:
    """The stream ops in order; the norm that is fused into one is not told."""
    assert out.graph is not None
    targets = [str(n.target) for n in call_nodes(out.graph)]
    names = [t.split(".")[1] for t in targets if t.startswith(("mhc.", "mhc_kernels."))]
    return [name.removesuffix("_layer").removesuffix("_rms") for name in names]


def norms(out: Stepped) -> list[str]:
    """The fused ops that end with a norm."""
    assert out.graph is not None
    names = [str(n.target).split(".")[1] for n in call_nodes(out.graph) if str(n.target).startswith("mhc_kernels.")]
    return [name for name in names if name.endswith(("_layer", "_rms"))]


@pytest.mark.parametrize(
    ("norm", "kind"), [("layer", "layer"), ("rms", "rms"), ("rms_by_hand", "rms"), ("layer_by_hand", None)]
)
def test_the_norm_of_a_branch_is_fused_into_its_chain(norm: str, kind: str | None) -> None:
    model, ids = toy(Recipe(layers=1, norm=norm))  # type: ignore[arg-type]
    assert norms(fused(model, ids)) == ([] if kind is None else [f"read_{kind}", f"boundary_{kind}"])


def test_a_norm_that_is_not_all_that_reads_stays_outside() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 11)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x = x + self.layers[0](self.norms[0](x)) + self.layers[1](self.norms[1](x))
            return self.head(x + self.layers[0](self.norms[0](x)))

    torch.manual_seed(0)
    out = fused(Two(), torch.arange(6).reshape(2, 3))
    assert "read" in ops(out)
    assert norms(out) == ["boundary_layer"]


def test_a_stream_becomes_read_boundaries_and_leave(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1))
    out = fused(model, ids)
    assert ops(out) == ["expand", "read", "boundary", "leave"]
    golden(f"{out.texts['widen']}\n\n{out.texts['fuse']}")


@pytest.mark.parametrize(
    ("form", "expected"),
    [("hc", ["expand", "read", "boundary", "leave"]), ("hc_static", ["expand", "aggregate", "carry", "leave"])],
)
def test_hyper_connections_are_fused_too(form: str, expected: list[str]) -> None:
    """Static coefficients are given to the kernel that mixes and weighs."""
    model, ids = toy(Recipe(layers=1))
    assert ops(fused(model, ids, spec=StreamSpec(streams=3, form=form))) == expected


# The recipe with a cast computes in float64, for which there are no kernels.
@pytest.mark.parametrize("recipe", [r for r in ONE_BY_ONE if r.extra != "cast"], ids=str)
def test_every_topology_computes_the_same(recipe: Recipe) -> None:
    model, ids = toy(recipe)
    out = fused(model, ids)
    found = ops(out)
    assert "coefficients" in found or "read" in found or "boundary" in found
    assert "reference_coefficients" not in found


def test_a_norm_of_each_stream_separates_distribute_from_read() -> None:
    model, ids = toy(Recipe(layers=1, style="post"))
    assert ops(fused(model, ids)) == ["expand", "read", "distribute", "read", "leave"]


def test_a_learned_head_is_fused_with_the_last_distribute() -> None:
    model, ids = toy(Recipe(layers=1))
    spec = StreamSpec(streams=3, convention="deepseek_v4", exit="head")  # type: ignore[arg-type]
    assert ops(fused(model, ids, spec=spec)) == ["expand", "read", "boundary", "leave_head"]


def test_hidden_states_keep_the_streams() -> None:
    model, ids = toy(Recipe(layers=2, hidden_states=True))
    found = ops(fused(model, ids))
    assert found.count("boundary") == 3
    assert "reduce" in found


KINDS = get_args(Kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_switched_off(kind: str) -> None:
    model, ids = toy(Recipe(layers=1))
    out = fused(model, ids, step=Fuse(tuple(k for k in KINDS if k != kind)))
    assert out.graph is not None
    targets = [str(n.target).split(".")[:2] for n in call_nodes(out.graph)]
    assert ["mhc_kernels", kind] not in targets
    if kind in ("read", "boundary", "leave"):
        assert f"1 x {kind} not fused: switched off" in out.notes


def test_nothing_is_fused_without_kernels() -> None:
    model, ids = toy(Recipe(layers=1))
    found = ops(fused(model, ids, step=Fuse(())))
    assert set(found) == {"expand", "reference_coefficients", "aggregate", "distribute", "reduce"}


def test_a_manifold_without_a_kernel_is_left_with_its_reason() -> None:
    model, ids = toy(Recipe(layers=1))
    out = fused(model, ids, spec=StreamSpec(streams=5, manifold="permutations"))
    assert "boundary" not in ops(out)
    assert "1 x boundary not fused: no C++ kernel for permutations with 120 logits" in out.notes


def test_float64_is_left_alone() -> None:
    model, ids = toy(Recipe(layers=1))
    out = stepped(model.double(), SPEC, ids, fuse=None)
    assert "reference_coefficients" in ops(out)


class Blocks(nn.Module):
    """Two layers, the second of which is run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        with torch.no_grad():
            x = x + self.layers[1](x)
        x = x + self.layers[2](x)
        return self.head(x)


def test_no_chain_crosses_a_gradient_mode() -> None:
    torch.manual_seed(0)
    out = fused(Blocks(), torch.arange(6).reshape(2, 3))
    assert any("gradients are switched on or off inside it" in note for note in out.notes)


def test_no_chain_crosses_a_recompute_boundary() -> None:
    model, ids = toy(Recipe(layers=2, style="single"))

    class Blocked(Fuse):
        def apply(self, gm: Any, context: Any) -> Any:
            for node in gm.graph.nodes:
                node.meta["ac_graph_id"] = 1 if "layers_1" in str(node.args) + node.name else 0
            return super().apply(gm, context)

    out = fused(model, ids, step=Blocked())
    assert any("it crosses a recompute boundary" in note for note in out.notes)


def test_without_a_compiler_everything_stays_plain_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler_problem", lambda: "CppCompileError: no g++")
    for cached in (targets.choose, build.no_compiler):
        cached.cache_clear()
    model, ids = toy(Recipe(layers=2))
    try:
        with pytest.warns(UserWarning, match="MHC309") as caught:
            out = fused(model, ids)
    finally:
        for cached in (targets.choose, build.no_compiler):
            cached.cache_clear()
    assert len([w for w in caught if "MHC309" in str(w.message)]) == 1
    assert "reference_coefficients" in ops(out)


def test_the_search_for_compilers_is_no_part_of_the_pass_and_only_for_streams() -> None:
    model, ids = toy(Recipe(layers=2))
    gm, streams = analysed(model.float(), ids)
    held = {owner: StreamParameters(SPEC, sites) for owner, sites in sites_of_owners(streams, SPEC).items()}
    context = Context(marks=[append_parameters(gm, owner, parameters) for owner, parameters in held.items()])
    build.no_compiler.cache_clear()
    Fuse().prepare(torch.fx.symbolic_trace(nn.Linear(4, 4)))
    assert build.no_compiler.cache_info().currsize == 0
    observed = 0

    class Counting(Fuse):
        def apply(self, gm: Any, context: Any) -> Any:
            nonlocal observed
            observed = build.no_compiler.cache_info().currsize
            return super().apply(gm, context)

    Pipeline((*ANALYSIS, Widen(), Counting())).run(gm, context)
    assert observed == 1
