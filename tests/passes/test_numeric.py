"""`debug="numeric"`: a pass that changes the results is found, one that does not is left in peace."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from recipes import Recipe
from stepping import captured, run
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from toys import toy

import mhc_compile
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Context, Pass, op_name
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.numeric import TOLERANCE, compare, run_float64
from mhc_compile.passes.pipeline import ANALYSIS, Pipeline

NUMERIC = Options(inner="eager", debug="numeric")


@dataclass(frozen=True)
class SwapsOperands:
    """Wrong on purpose: turns `a / b` into `b / a`."""

    name: ClassVar[str] = "swaps_operands"
    requires: ClassVar[tuple[str, ...]] = ("normal-form",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        for node in gm.graph.nodes:
            if op_name(node) == "truediv":
                node.args = (node.args[1], node.args[0])
        return gm


@dataclass(frozen=True)
class DropsAnOutput:
    """Wrong on purpose: returns less."""

    name: ClassVar[str] = "drops_an_output"
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        last = next(n for n in gm.graph.nodes if n.op == "output")
        last.args = (last.args[0][:1],)
        return gm


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y / (x + 3), y


def run_with(step: Pass, options: Options = NUMERIC) -> GraphModule:
    found = captured(Difference(), torch.randn(2, 4))
    context = Context(inputs=found.inputs)
    return Pipeline((Normalize(), step)).run(found.graph, context, debug=options.debug)


def test_mhc110_names_the_wrong_pass() -> None:
    with pytest.raises(MHCError) as caught:
        run_with(SwapsOperands())
    assert caught.value.code == "MHC110"
    assert "pass swaps_operands moved output 0 by" in caught.value.detail


def test_mhc110_for_an_output_less() -> None:
    with pytest.raises(MHCError, match=r"pass drops_an_output changed the number of outputs from 2 to 1") as caught:
        run_with(DropsAnOutput())
    assert caught.value.code == "MHC110"


def test_without_it_a_wrong_pass_is_not_found() -> None:
    run_with(SwapsOperands(), Options(inner="eager", debug=True))


@pytest.mark.parametrize("streams", [2, 8])
@pytest.mark.parametrize("style", ["pre", "post"])
def test_right_passes_are_left_in_peace(style: str, streams: int) -> None:
    model, ids = toy(Recipe(style=style, hidden_states=True))
    with torch.no_grad():
        before = model(ids)
    mhc_compile.convert(model, ids, streams=streams, inner="eager", debug="numeric")
    with torch.no_grad():
        after = model(ids)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_analysis_of_a_model_in_bfloat16_is_compared_in_float64() -> None:
    model, ids = toy(Recipe())
    found = captured(model.to(torch.bfloat16), ids)
    ANALYSIS.run(found.graph, Context(inputs=found.inputs), debug=NUMERIC.debug)


class Mixed(nn.Module):
    """Casts, a half-precision constant, dropout, autocast, attention with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        y = F.dropout(y.float(), 0.5, True)
        y = y.half() + torch.ones(4, dtype=torch.bfloat16)
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)
        return y.to(torch.float32) + torch.zeros_like(x, dtype=torch.float16)


def test_everything_runs_in_float64_and_drops_nothing() -> None:
    model = Mixed()
    x = torch.randn(2, 3, 4)
    found = captured(model, x)
    (out,) = run_float64(found.graph, found.inputs)
    assert out.dtype == torch.float64
    weight, bias = model.linear.weight.double(), model.linear.bias.double()
    y = F.linear(x.double(), weight, bias) + 1.0
    torch.testing.assert_close(out, F.scaled_dot_product_attention(y, y, y).detach(), rtol=1e-14, atol=1e-14)


def test_the_inputs_and_the_random_state_stay_as_they_were() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += torch.rand_like(x)
            return x * 2

    x = torch.randn(3)
    found = captured(Overwrites(), x)
    kept, state = x.clone(), torch.get_rng_state()
    first = run_float64(found.graph, found.inputs)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], run_float64(found.graph, found.inputs)[0])
    assert not torch.equal(first[0], run(found.graph, found.inputs)[0].double())


BASE = torch.tensor([1.0, -100.0, 3.0], dtype=torch.float64)
INFINITE = torch.tensor([float("-inf"), float("nan"), 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("before", "after", "equal"),
    [
        (BASE, BASE, True),
        (BASE, BASE + 0.9 * TOLERANCE * 100, True),
        (BASE, BASE + 1.1 * TOLERANCE * 100, False),
        (BASE, torch.full_like(BASE, float("nan")), False),
        (INFINITE, INFINITE.clone(), True),
        (INFINITE, INFINITE.nan_to_num(0.0), False),
        (INFINITE, torch.tensor([float("inf"), float("nan"), 1.0]), False),
        (INFINITE, torch.tensor([float("-inf"), float("nan"), 2.0]), False),
        (torch.zeros(3), torch.zeros(3), True),
        (torch.zeros(3), torch.full((3,), 1e-20), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.ones(3, 1), torch.ones(1, 3), False),
    ],
)
def test_compare(before: Tensor, after: Tensor, equal: bool) -> None:
    if equal:
        compare([before], [after], "x")
        return
    with pytest.raises(MHCError, match=r"pass x (moved|changed) output 0") as caught:
        compare([before], [after], "x")
    assert caught.value.code == "MHC110"
