"""Recomputation end to end: gradients equal bit by bit, fewer bytes kept, branches never run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attending import Attending
from memories import shake_memory, small
from tiny_models import Block, chain, code_of, disagree, ids, llama, loss_of, shake
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile import MHCError, convert, inspect
from mhc_compile.bench.recompute import Stack, StreamBytes, plan_for, stream_bytes
from mhc_compile.config import Options, compile_pipeline, lowering
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.cost import Plan

needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")


class PostNorm(Block):
    """A block whose norm stands behind its add."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


def post_norm() -> nn.Module:
    model = chain(depth=3)
    torch.manual_seed(1)
    model.layers = nn.ModuleList(PostNorm() for _ in range(3))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "post-norm": post_norm,
    "dropout": lambda: chain(depth=3, dropout=0.3),
    "llama": lambda: llama(use_cache=False),
}


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def trained(model: nn.Module, blocks: str | int, **options: Any) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    """Loss, gradients, and the operations of the backward pass."""
    torch._dynamo.reset()
    model = convert(model, ids(), recompute=blocks, **options).train()
    shake(model)
    if "engram" in options:
        shake_memory(model)
    torch.manual_seed(5)
    loss = loss_of(model)
    with Counting() as ops:
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, ops.seen


def assert_equal(one: tuple[Tensor, dict[str, Tensor], Any], two: tuple[Tensor, dict[str, Tensor], Any]) -> None:
    assert torch.equal(one[0], two[0])
    assert set(one[1]) == set(two[1])
    assert [name for name, g in one[1].items() if not torch.equal(g, two[1][name])] == []


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_and_no_branch_runs_again(name: str) -> None:
    kept = trained(MODELS[name](), "off", inner="aot_eager", kernels="all")
    again = trained(MODELS[name](), 2, inner="aot_eager", kernels="all")
    assert_equal(kept, again)
    more = again[2] - kept[2]
    stream = {op for op in more if op.startswith("mhc_kernels.")}
    assert stream
    # A norm of each stream is computed again, too; all else are views.
    views = {"aten.view.default", "aten.t.default", "aten.detach.default", "aten.unsqueeze.default"}
    assert set(more) - stream - views <= ({"aten.native_layer_norm.default"} if name == "post-norm" else set())


@needs_compiler
def test_memories_are_added_again_and_not_looked_up() -> None:
    options = {"inner": "aot_eager", "kernels": "all", "engram": small("paper")}
    kept = trained(llama(use_cache=False), "off", **options)
    again = trained(llama(use_cache=False), "stage", **options)
    assert_equal(kept, again)
    more = again[2] - kept[2]
    assert more["engram_kernels.recall.default"] == 2
    assert not [op for op in more if "gather" in op or "rows" in op or "mm" in op]


def test_plain_pytorch_is_computed_again_too() -> None:
    kept = trained(post_norm(), "off", inner="aot_eager")
    again = trained(post_norm(), 2, inner="aot_eager")
    assert_equal(kept, again)
    assert (again[2] - kept[2])["mhc_kernels.sinkhorn.default"] > 0


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One training step of a small model."""

    bytes: StreamBytes
    plan: Plan
    gradients: dict[str, Tensor]

    def assert_predicted(self) -> None:
        """Bytes are within 5 % of what the cost model says."""
        assert self.bytes.kept == pytest.approx(self.plan.kept, rel=0.05)
        assert self.bytes.transient == pytest.approx(self.plan.transient, rel=0.05)


def measured(blocks: str | int, inner: str, layers: int, form: str = "mhc") -> Measured:
    torch._dynamo.reset()
    torch.manual_seed(0)
    width, x = 48, torch.randn(2, 20, 48)
    model = convert(Stack(layers, width, 3, 7), x, inner=inner, kernels="all", recompute=blocks, form=form)
    shake(model)
    of_kernels = {4, StreamSpec().rows + 1} if form == "mhc" else {2 * (k + 1) for k in range(2 * layers)}
    found = stream_bytes(model, lambda: model(x), {width, *of_kernels})
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Measured(found, plan_for(model, x, blocks), gradients)


@needs_compiler
def test_bytes_are_those_predicted() -> None:
    kept, again = measured("off", "aot_eager", 3), measured("auto", "aot_eager", 3)
    for found in (kept, again):
        found.assert_predicted()
    assert len(again.plan.blocks) == 3
    assert all(torch.equal(g, again.gradients[name]) for name, g in kept.gradients.items())
    some = measured(f"{kept.plan.whole * 3 // 4}B", "aot_eager", 3)
    some.assert_predicted()
    assert some.plan.rest > 0
    assert some.bytes.kept < 0.77 * kept.bytes.kept


@needs_compiler
def test_depth_forms_keep_the_outputs_alone() -> None:
    kept, again = measured("off", "aot_eager", 2, "attnres"), measured("auto", "aot_eager", 2, "attnres")
    for found in (kept, again):
        assert found.bytes.kept == pytest.approx(found.plan.kept, rel=0.01)
    assert [len(block) for block in again.plan.blocks] == [1] * 4
    assert again.bytes.kept < 0.45 * kept.bytes.kept
    assert 0 < again.bytes.transient < again.plan.transient  # where norms, which are no kernels, are counted
    assert all(torch.equal(g, again.gradients[name]) for name, g in kept.gradients.items())


DEPTH = ["denseformer", "mudd", "value_residual"]


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form != "value_residual")) for form in DEPTH]
)
def test_reads_of_depth_forms_in_plain_pytorch(form: str) -> None:
    def plain() -> nn.Module:
        return Attending(spelling="fused", joined=False)

    kept = trained(plain(), "off", inner="aot_eager", form=form)
    again = trained(plain(), 1, inner="aot_eager", form=form)
    assert_equal(kept, again)
    attention = [op for op in again[2] - kept[2] if "attention" in op or "mm" in op]
    assert attention == (["aten.mm.default"] if form == "mudd" else [])  # of the weights


@needs_compiler
@pytest.mark.slow
def test_inductor_keeps_as_little_and_computes_the_same() -> None:
    # One block: the graph is the one without recomputation but for its tags, which caches must not mistake.
    kept, again = measured("off", "inductor", 2), measured("stage", "inductor", 2)
    for found in (kept, again):
        found.assert_predicted()
    assert again.bytes.kept < 0.6 * kept.bytes.kept
    assert all(torch.equal(g, again.gradients[name]) for name, g in kept.gradients.items())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_under_inductor(name: str) -> None:
    assert_equal(trained(MODELS[name](), "off"), trained(MODELS[name](), 2))


# --- the option -------------------------------------------------------------------------------------------------------


def test_the_eager_inner_compiler_refuses() -> None:
    with pytest.raises(MHCError, match="MHC625"):
        convert(chain(), ids(), inner="eager", recompute="auto")
    assert Options(inner="eager", recompute="off").recompute == "off"


def test_options_of_the_backend() -> None:
    model = convert(chain(), ids(), inner="eager")
    step = torch.compile(model, backend="mhc", options={"inner": "aot_eager", "recompute": "sometimes"})
    with pytest.raises(Exception, match="recompute='sometimes'") as raised:
        step(ids())
    assert code_of(raised.value) == "MHC204"
    step = torch.compile(model, backend="mhc", options={"inner": "aot_eager", "recompute": "auto"})
    loss_of(step).backward()


def test_lengths_may_vary() -> None:
    model = convert(chain(depth=3), ids(), inner="aot_eager", recompute="1MiB")
    plain = chain(depth=3)
    for length in (8, 12, 20):
        x = ids(length=length)
        model.zero_grad()
        plain.zero_grad()
        for m in (model, plain):
            m(x).square().mean().backward()
        theirs = dict(plain.named_parameters())
        ours = {name: p.grad for name, p in model.named_parameters() if name in theirs and p.grad is not None}
        assert not disagree(ours, {name: p.grad for name, p in theirs.items()}, 1e-5)  # type: ignore[misc]


def test_without_gradients_nothing_is_tagged() -> None:
    model = convert(chain(), ids(), inner="aot_eager", recompute="2B")  # of which no training step is possible
    with torch.no_grad():
        model(ids())
    with pytest.raises(MHCError, match="MHC626"):
        model(ids())


def test_passes_and_what_inspect_tells() -> None:
    assert [p.name for p in lowering(Options(recompute=3))] == ["recompute", "fuse", "lower"]
    assert "recompute" not in [p.name for p in compile_pipeline(Options())]
    found = inspect(chain(depth=4), ids(), recompute=2)
    (record,) = (r for r in found.passes if r.name == "recompute")
    assert record.notes[0] == "4 sites in 2 blocks of up to 2"
    assert "keeps" in record.notes[1]
    deep = inspect(chain(depth=4), ids(), form="attnres", recompute=2)
    (record,) = (r for r in deep.passes if r.name == "recompute")
    assert record.notes[0] == "4 sites in 2 blocks of up to 2"
    sites = [deep.elements[number].name for block in deep.blocks for number in (block.first, block.last)]
    assert [name.split("#")[0] for name in sites] == [f"layers.{i}" for i in range(4)]
