"""Compiled stages whose weights' gradients come later: the same gradients, and when what is computed."""

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from pipelines import functions, gradients, ids, loss_of, memory, operations, program_of, run, stages_of, tiny
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.split_backward import Part, split_backward
from mhc_compile.runtime.split import SplitFunction, compile_split
from mhc_compile.runtime.stage import Stage
from mhc_compile.runtime.unit import Owned, Unit

AOT = Options(inner="aot_eager", kernels="none", recompute=1)


def made(model: nn.Module, starts: list[int], options: Options, *, split: bool) -> list[Stage]:
    return stages_of(model, program_of(model), starts, list(range(len(starts) + 1)), options, split=split)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def unsplit() -> dict[str, Tensor]:
    """The gradients of two microbatches, each backward as a whole."""
    stages = made(tiny(), [2], AOT, split=False)
    for seed in (1, 2):
        run(stages, ids(1, seed))
    return gradients(stages)


@pytest.fixture(scope="module")
def compiled() -> tuple[list[Stage], list[GraphModule]]:
    """Two stages of two sites, each site a recompute block; and their backward graphs as they were."""
    stages = made(tiny(), [2], AOT, split=True)
    with mock.patch("mhc_compile.runtime.split.split_backward", wraps=split_backward) as splitting:
        run(stages, ids(1))
    return stages, [call.args[0] for call in splitting.call_args_list]


@pytest.fixture
def stages(compiled: tuple[list[Stage], list[GraphModule]]) -> Iterator[list[Stage]]:
    """The stages without gradients."""
    for stage in compiled[0]:
        stage.zero_grad()
    yield compiled[0]
    for stage in compiled[0]:
        for function in functions(stage):
            function.defer = True
            function.deferred.clear()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("defer", [False, True])
def test_gradients_of_the_whole_backward(
    stages: list[Stage], unsplit: dict[str, Tensor], early: bool, defer: bool
) -> None:
    for stage in stages:
        for function in functions(stage):
            function.defer = defer
    for seed in (1, 2):
        run(stages, ids(1, seed), early=early)
    equal(gradients(stages), unsplit)


def test_closures_hold_what_is_missing(stages: list[Stage], unsplit: dict[str, Tensor]) -> None:
    for seed in (1, 2):
        run(stages, ids(1, seed), deferred=False)
    left = {n for s in stages for n, p in s.named_parameters() if p.grad is None}
    assert {n for n in left if n.endswith(("up.weight", "down.weight"))} == {
        n for n in unsplit if n.endswith(("up.weight", "down.weight"))
    }
    for stage in stages:
        assert [len(f.deferred) for f in functions(stage)] == [2]
        stage.dw_builder()()
        assert [len(f.deferred) for f in functions(stage)] == [0]
    found = gradients(stages)
    tied = "embed.weight"  # added up in another order
    torch.testing.assert_close(found.pop(tied), unsplit[tied])
    equal(found, {name: g for name, g in unsplit.items() if name != tied})


def products(part: Part | None, shapes: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of the matrix products in a part that are among `shapes`."""
    nodes = part.graph.graph.nodes if part is not None else ()
    found = [tuple(n.meta["val"].shape) for n in nodes if n.target is torch.ops.aten.mm.default]
    return [s for s in found if s in shapes]


def test_products_of_weights_lie_in_their_half(compiled: tuple[list[Stage], list[GraphModule]]) -> None:
    (function,) = functions(compiled[0][1])
    assert function.parts is not None
    split = function.parts.split
    width = 16
    weights = {(width, 2 * width), (2 * width, width), (64, width), (width, 64)}
    assert len(products(split.weights, weights)) == 5  # two branches of two, and the head
    assert products(split.activations, weights) == []
    assert products(split.recompute, weights) == []
    assert operations(split.activations)["aten.mm.default"] >= 5  # what the stage before waits for
    together = sum(operations(p)["aten.mm.default"] for p in (split.recompute, split.activations, split.weights) if p)
    assert together == sum(n.target is torch.ops.aten.mm.default for n in compiled[1][1].graph.nodes)


def test_first_stage_defers_all(stages: list[Stage]) -> None:
    (function,) = functions(stages[0])
    assert function.parts is not None
    assert function.parts.split.activations is None


class Counted:
    """Counts the recomputations of a function."""

    def __init__(self, function: SplitFunction) -> None:
        assert function.parts is not None
        self.calls = 0
        self.parts, self.run = function.parts, function.parts.recompute
        object.__setattr__(self.parts, "recompute", self)

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return self.run(values)


@pytest.fixture
def counted(stages: list[Stage]) -> Iterator[Counted]:
    (function,) = functions(stages[0])
    found = Counted(function)
    yield found
    object.__setattr__(found.parts, "recompute", found.run)


def backward(out: Any) -> None:
    torch.autograd.backward(out, [torch.ones_like(t) for t in out])


def test_recomputes_once_and_in_the_order_of_forwards(stages: list[Stage], counted: Counted) -> None:
    stage = stages[0]
    first, second = stage(ids(1, 1)), stage(ids(1, 2))
    stage.begin_recompute()
    stage.begin_recompute()
    assert counted.calls == 2
    stage.begin_recompute()  # nothing is left
    backward(second)  # not the expected order
    backward(first)
    assert counted.calls == 2
    stage.dw_builder()()
    early = gradients(stages)
    stage.zero_grad()
    first, second = stage(ids(1, 1)), stage(ids(1, 2))
    backward(second)
    backward(first)
    assert counted.calls == 4
    stage.dw_builder()()
    equal(early, gradients(stages))


def test_results_that_nobody_holds_are_passed_over(stages: list[Stage], counted: Counted) -> None:
    stage = stages[0]
    stage(ids(1, 1))
    gc.collect()
    kept = stage(ids(1, 2))
    stage.begin_recompute()
    assert counted.calls == 1
    backward(kept)
    assert counted.calls == 1
    with torch.no_grad():
        stage(ids(1, 1))
    stage.begin_recompute()
    assert counted.calls == 1


def last_stages(model: nn.Module, cut: int, options: Options) -> list[Stage]:
    """The last stage behind the site `cut`: its backward as a whole, and split."""
    program = program_of(model)
    return [stages_of(model, program, [cut], [1], options, split=split)[0] for split in (False, True)]


def train(stage: Stage) -> list[Tensor]:
    """Two microbatches that come from a stage before; the losses and the gradients that go back."""
    found: list[Tensor] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        crossing = [torch.randn(t.shape).requires_grad_() for t in stage.example_inputs]
        loss = loss_of(stage(*crossing, input_ids=ids(1, seed)), ids(1, seed))
        stage.begin_recompute()
        loss.backward()
        stage.dw_builder()()
        found += [loss.detach(), *(g for t in crossing if (g := t.grad) is not None)]
    return found


def test_inductor_and_fused_kernels() -> None:
    whole, split = last_stages(tiny(2), 1, Options(inner="inductor", kernels="all", recompute="stage"))
    # Inductor fuses other neighbours where a graph is cut, which may round otherwise.
    torch.testing.assert_close(train(split), train(whole), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients([split]), gradients([whole]), rtol=1e-6, atol=1e-6)
    (function,) = functions(split)
    assert function.parts is not None
    parts = function.parts.split
    assert [k for k in operations(parts.recompute) if "mhc_kernels" in k] == ["mhc_kernels.read_rms.default"]
    assert sorted(k for k in operations(parts.activations) if "mhc_kernels" in k) == [
        "mhc_kernels.leave_backward.default",
        "mhc_kernels.read_rms_backward.default",
    ]
    assert not [k for k in operations(parts.weights) if "mhc_kernels" in k]


@pytest.mark.slow
def test_memories_leave_their_gradients_once() -> None:
    whole, split = last_stages(memory(), 2, AOT)
    assert all(torch.equal(a, b) for a, b in zip(train(split), train(whole), strict=True))
    equal(gradients([split]), gradients([whole]))
    (function,) = functions(split)
    assert function.parts is not None
    assert operations(function.parts.split.weights)["engram_kernels.gather_backward.default"] == 1


def test_deferred_gradients_are_laid_out_as_their_parameters() -> None:
    """A fused optimizer reads both in the order of their memory."""
    linear, gradient = nn.Linear(3, 4), torch.randn(3, 4)
    unit: Any = SimpleNamespace(sources=(Owned(linear, "weight", torch.float32),))
    for count in (1, 2):
        Unit._accumulate(unit, 0, gradient.T)
        assert linear.weight.grad is not None
        assert linear.weight.grad.stride() == linear.weight.stride()
        assert torch.equal(linear.weight.grad, count * gradient.T)


def test_no_backward_graph_to_split() -> None:
    gm = symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(MHCError, match="MHC635"):
        compile_split(gm, [torch.ones(2, 2)], Options(inner="eager"), weights=(), accumulate=print)


def test_one_tensor_as_two_inputs() -> None:
    gm = symbolic_trace(lambda a, b: (loss_of(a, b),))
    x = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(MHCError, match="MHC636"):
        compile_split(gm, [x, x], AOT, weights=(), accumulate=print)
