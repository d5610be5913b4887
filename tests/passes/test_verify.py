"""The verifier: metadata is computed again, the dialect's rules hold, and a wrong pass is named."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from recipes import Recipe
from stepping import CHECKED, add_parameters, analysed, captured, normal, stepped
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from toys import toy

from mhc_compile.attach import sites_of_owners
from mhc_compile.config import Options
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, call_nodes, copy_meta, op_name, value
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.passes.verify import VerificationError, verify
from mhc_compile.passes.widen import Widen

Change = Callable[[GraphModule, Node], None]


def planted(change: Change, options: Options = CHECKED) -> None:
    """Run a pass that does `change` to the first matmul of a small model."""

    @dataclass(frozen=True)
    class Planted:
        name: ClassVar[str] = "planted"
        requires: ClassVar[tuple[str, ...]] = ()
        provides: ClassVar[tuple[str, ...]] = ()

        def apply(self, gm: GraphModule, context: Context) -> GraphModule:
            change(gm, next(n for n in call_nodes(gm) if op_name(n) == "linear"))
            return gm

    found = captured(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
    Pipeline((Normalize(), Planted())).run(found.graph, Context(), debug=options.debug)


def insert(gm: GraphModule, node: Node, method: str, *args: object) -> None:
    """Put a method call behind `node`, whose recorded value it keeps."""
    with gm.graph.inserting_after(node):
        new = copy_meta(gm.graph.call_method(method, (node, *args)), node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta["example_value"] = value(node)


PLANTED: dict[str, tuple[Change, str]] = {
    "shape": (lambda gm, node: insert(gm, node, "sum", 0), r"float32\[3, 6\] on cpu and is now torch.float32\[6\]"),
    "dtype": (lambda gm, node: insert(gm, node, "double"), r"torch.float32\[3, 6\] on cpu and is now torch.float64"),
    "kind": (lambda gm, node: insert(gm, node, "unbind"), r"float32\[3, 6\] on cpu and is now tuple"),
}


@pytest.mark.parametrize(("change", "problem"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_found(change: Change, problem: str) -> None:
    with pytest.raises(VerificationError, match=rf"after pass planted: %.*{problem}"):
        planted(change)


def test_a_node_that_cannot_be_computed_fails() -> None:
    with pytest.raises((VerificationError, RuntimeError)):
        planted(lambda _, node: node.replace_input_with(node.args[1], node.args[2]))


def test_new_nodes_are_checked_in_every_run() -> None:
    def change(gm: GraphModule, node: Node) -> None:
        insert(gm, node, "sum", 0)
        del next(n for n in gm.graph.nodes if op_name(n) == "sum").meta["example_value"]
        next(n for n in gm.graph.nodes if op_name(n) == "sum").args = (node, 7)  # no such dimension

    with pytest.raises(IndexError):
        planted(change, Options(inner="eager"))


def test_new_nodes_get_their_value_recorded() -> None:
    gm = normal(nn.Linear(4, 4), torch.randn(2, 4))
    node = next(n for n in call_nodes(gm) if op_name(n) == "linear")
    with gm.graph.inserting_after(node):
        new = copy_meta(gm.graph.call_method("sum", (node, 0)), node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    verify(gm, whole=False, after="x")
    assert tuple(value(new).shape) == (4,)


class Switches(nn.Module):
    """Autocast and gradients switched within the forward, and in-place writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                z = self.b(y.float())
            y = self.a(z)
        with torch.no_grad():
            counts = torch.zeros(4)
            counts.scatter_(0, torch.zeros(4, dtype=torch.int64), 1.0)
        return y + z, counts + self.b(x)


def test_operations_under_autocast_are_computed_under_autocast() -> None:
    gm = normal(Switches(), torch.randn(2, 4))
    assert {value(n).dtype for n in call_nodes(gm) if op_name(n) == "linear"} == {torch.bfloat16, torch.float32}
    verify(gm, whole=True, after="x")
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_left_as_it_was_where_a_check_fails() -> None:
    gm = normal(Switches(), torch.randn(2, 4))
    first = next(n for n in call_nodes(gm) if op_name(n) == "linear")
    first.meta["example_value"] = first.meta["example_value"].float()
    with pytest.raises(VerificationError, match=r"its value was torch\.float32"):
        verify(gm, whole=True, after="x")
    assert not torch.is_autocast_enabled("cpu")


def test_a_graph_captured_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm = normal(nn.Linear(4, 4), torch.randn(2, 4))
        verify(gm, whole=True, after="x")
    assert value(next(iter(call_nodes(gm)))).dtype == torch.bfloat16


def test_a_graph_without_recorded_values_is_left_alone() -> None:
    verify(torch.fx.symbolic_trace(nn.Linear(2, 2)), whole=True, after="x")


# --- the dialect's rules ------------------------------------------------------------------------------------------


def wide_graph() -> GraphModule:
    model, ids = toy(Recipe(layers=1, style="single"))
    gm, streams = analysed(model, ids)
    parameters = StreamParameters(StreamSpec(streams=3), sites_of_owners(streams, StreamSpec())[""])
    context = Context(marks=[add_parameters(gm, "", parameters)], streams=streams)
    return Widen().apply(gm, context)


def with_fake(node: Node, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Make `node` record another value than it has."""
    v = value(node)
    with v.fake_mode:
        node.meta["example_value"] = torch.empty(shape or v.shape, dtype=dtype)


BROKEN: dict[str, tuple[str, Callable[[Node], None], str]] = {
    "phi": ("coefficients", lambda n: with_fake(n.args[1], 15, 23), r"phi is \(15, 23\), not \(15, 24\)"),
    "alpha": ("coefficients", lambda n: with_fake(n.args[2], 4), r"alpha is \(4,\), not \(3,\)"),
    "bias": ("coefficients", lambda n: with_fake(n.args[3], 14), r"bias is \(14,\), not \(15,\)"),
    "specification": (
        "coefficients",
        lambda n: n.update_arg(4, str(StreamSpec(streams=2))),
        "3 streams, specification streams=2",
    ),
    "whole numbers": (
        "expand",
        lambda n: with_fake(n.args[0], dtype=torch.int64),
        "its first operand is no floating-point tensor",
    ),
    "pre": ("aggregate", lambda n: n.update_arg(1, n.args[1].next.next), "`pre` does not fit"),
    "branch": ("distribute", lambda n: with_fake(n.args[1], 2, 3, 7), r"the branch is \(2, 3, 7\)"),
    "post": ("distribute", lambda n: n.update_arg(2, n.args[3]), "`post` does not fit the streams"),
    "mix": ("distribute", lambda n: n.update_arg(3, n.args[2]), "`mix` does not fit the streams"),
}  # fmt: skip


@pytest.mark.parametrize(("op", "change", "problem"), BROKEN.values(), ids=BROKEN)
def test_the_dialect_is_held_to_its_rules(op: str, change: Callable[[Node], None], problem: str) -> None:
    gm = wide_graph()
    verify(gm, whole=False, after="widen")
    node = next(n for n in call_nodes(gm) if op_name(n) == op)
    change(node)
    with pytest.raises(VerificationError, match=rf"after pass widen: .*{op}.*: {problem}"):
        verify(gm, whole=False, after="widen")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recorded_values_are_what_the_ops_compute(dtype: torch.dtype) -> None:
    model, ids = toy(Recipe(hidden_states=True))
    out = stepped(model.to(dtype), StreamSpec(streams=3), ids)

    class Check(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            found = super().run_node(n)
            if n.op == "call_function" and getattr(n.target, "namespace", "") in ("mhc", "mhc_kernels"):
                for got, recorded in zip(
                    found if isinstance(found, tuple) else [found],
                    value(n) if isinstance(value(n), tuple) else [value(n)],
                    strict=True,
                ):
                    assert (tuple(got.shape), got.dtype) == (tuple(recorded.shape), recorded.dtype), n.format_node()
            return found

    with torch.no_grad():
        Check(out.graph).run(*out.inputs)
