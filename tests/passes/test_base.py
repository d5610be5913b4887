"""What passes share: names, paths, places, provenance, and erasing what is unused without losing what acts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from goldens import check_golden
from stepping import captured, normal
from torch import Tensor, nn

from mhc_compile.config import Options, compile_pipeline
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import (
    Context,
    call_nodes,
    copy_meta,
    erase_unused,
    module_calls,
    module_path,
    module_stack,
    op_name,
    refuse,
    shape,
    source_line,
)
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.observer import Observer
from mhc_compile.passes.pipeline import Pipeline
from mhc_compile.passes.residual import Residual
from mhc_compile.passes.text import describe
from mhc_compile.passes.widen import Widen


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(
            x * 2,  # the first of several lines
        )


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"a": nn.ModuleList([Inner()])})

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks["a"][0]
        return block(block(x)).sin()


def nodes(name: str) -> list[torch.fx.Node]:
    gm = captured(Outer(), torch.randn(2, 4)).graph
    return [n for n in call_nodes(gm) if op_name(n) == name]


def test_nodes_know_the_modules_around_them() -> None:
    first, second = nodes("linear")
    assert module_stack(first) == ["", "blocks.a.0", "blocks.a.0.linear"]
    assert module_path(first) == module_path(second) == "blocks.a.0.linear"
    assert [p for _, p in module_calls(first)] == module_stack(first)
    assert module_calls(first) != module_calls(second)
    (outside,) = nodes("sin")
    assert module_stack(outside) == [""]


def test_nodes_know_the_line_they_come_from() -> None:
    here = Path(__file__).read_text().splitlines()
    at = next(i for i, line in enumerate(here) if "the first of several lines" in line and "x * 2" in line)
    (mul, _) = nodes("mul")
    place, _, text = source_line(mul).partition(": ")
    assert place.endswith(", in forward")
    file, number = place.removesuffix(", in forward").rsplit(":", 1)
    assert Path(file) == Path(__file__)
    assert int(number) in (at, at + 1)  # a Python that knows columns names the line, others the statement's first
    assert text == here[int(number) - 1].strip()


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        ('  File "a.py", line 3, in forward\n    x = f(x)\n', "a.py:3, in forward: x = f(x)"),
        ('  File "a.py", line 3, in forward\n    x = f(x)\n        ^^^^\n', "a.py:3, in forward: x = f(x)"),
        ('  File "a.py", line 3, in f\n    g()\n    ~^^\n  File "b.py", line 4, in g\n    h\n', "b.py:4, in g: h"),
        ('  File "a b.py", line 3, in <lambda>\n', "a b.py:3, in <lambda>"),
        ("something else", "something else"),
        ("", None),
    ],
)
def test_source_lines_of_any_python(trace: str, line: str | None) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert source_line(node) == line


def test_refusals_name_the_node_the_module_and_the_line() -> None:
    add = nodes("add")[1]
    error = refuse("MHC105", "too wide", add)
    assert isinstance(error, MHCError)
    assert error.node.startswith(f"%{add.name} :")
    assert error.module == "blocks.a.0"
    assert "test_base.py:" in error.source
    assert str(error).splitlines()[0] == "MHC105 shapes change along the stream: too wide"
    assert refuse("MHC101", "nothing").node is None
    (outside,) = nodes("sin")
    assert refuse("MHC105", "x", outside).module == "(root)"


def test_one_name_for_every_spelling() -> None:
    class Spelt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.add(x + x, x).add(x)
            x += x
            return torch.ops.aten.add.Tensor(x, x)

    gm = captured(Spelt(), torch.randn(3)).graph
    assert [op_name(n) for n in call_nodes(gm)] == ["add", "add", "add", "iadd", "add"]


def test_symbolic_sizes_are_expressions_and_guard_nothing() -> None:
    held = []

    def backend(gm: torch.fx.GraphModule, _: object) -> object:
        environment = next(n.meta["example_value"].fake_mode for n in gm.graph.nodes if op_name(n) == "sin").shape_env
        before = len(environment.guards)
        node = next(n for n in gm.graph.nodes if op_name(n) == "sin")
        held.append((shape(node), shape(node) == shape(node.args[0]), len(environment.guards) - before))
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: torch.sin(x + 1), backend=backend)(x)
    ((sizes, same, guards),) = held
    assert not isinstance(sizes[0], int)
    assert sizes[1] == 4
    assert same
    assert guards == 0


def test_erasing_spares_what_acts_and_what_is_not_ours() -> None:
    class Acts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            counts = torch.zeros(4)
            counts.scatter_(0, torch.zeros(4, dtype=torch.int64), 1.0)
            counts.index_add_(0, torch.arange(4), x[0])
            counts[0] = 3.0
            torch.cos(x)
            return x * counts

    gm = captured(Acts(), torch.randn(2, 4)).graph
    before = [op_name(n) for n in call_nodes(gm)]
    assert {"scatter_", "index_add_", "setitem"} <= set(before)
    mul = next(n for n in call_nodes(gm) if op_name(n) == "mul")
    with gm.graph.inserting_before(mul):
        ours = copy_meta(gm.graph.call_function(torch.sin, (mul.args[0],)), mul)
        copy_meta(gm.graph.call_function(torch.exp, (ours,)), mul)
    erase_unused(gm)
    assert [op_name(n) for n in call_nodes(gm)] == before


def test_new_nodes_carry_the_old_ones_provenance() -> None:
    gm = normal(Outer(), torch.randn(2, 4))
    add = next(n for n in call_nodes(gm) if op_name(n) == "add")
    add.meta["ac_graph_id"] = 7
    with gm.graph.inserting_after(add):
        new = copy_meta(gm.graph.call_function(torch.sin, (add,)), add)
    assert source_line(new) == source_line(add)
    assert module_stack(new) == module_stack(add)
    assert new.meta["ac_graph_id"] == 7
    assert new.meta["mhc_from"] == add.name
    assert "example_value" not in new.meta


# --- the order of passes ------------------------------------------------------------------------------------------


def test_passes_print_with_their_options() -> None:
    @dataclass(frozen=True)
    class Optional:
        name: ClassVar[str] = "optional"
        size: int = 3
        deep: bool = False

    assert describe(Optional(size=5)) == "optional{size=5}"
    names = ["normalize", "residual", "widen", "overencoding", "engram", "ultramem", "fuse", "lower"]
    assert [p.name for p in compile_pipeline(Options())] == names


def test_a_pass_that_misses_what_it_requires_does_not_run() -> None:
    gm = captured(Outer(), torch.randn(2, 4)).graph
    before = str(gm.graph)
    for passes in ((Residual(),), (Normalize(), Widen()), (Normalize(), Residual(), Lower())):
        provided = {p for step in passes[:-1] for p in step.provides}
        assert not set(passes[-1].requires) <= provided
    with pytest.raises(MHCError, match=r"MHC241 .*residual requires normal-form[^!]*put normalize before residual"):
        Pipeline((Residual(),)).run(gm, Context())
    assert str(gm.graph) == before


def test_the_observer_keeps_notes_of_each_pass_apart() -> None:
    gm = captured(Outer(), torch.randn(2, 4)).graph
    observer = Observer(snapshots=True)
    context = Context()
    Pipeline((Normalize(), Residual())).run(gm, context, observer)
    first, second = observer.records
    assert (first.name, second.name) == ("normalize", "residual")
    assert (first.notes, context.notes) == ([], [])
    assert second.notes == ["0 parameter contractions outside all branches", "2 of 2 adds"]
    assert second.before == second.after
    assert first.nodes_after == second.nodes_before


# --- golden files -------------------------------------------------------------------------------------------------


def test_a_golden_file_that_differs_fails_until_it_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a-b.txt"
    with pytest.raises(AssertionError, match=r"no golden file a-b\.txt"):
        check_golden(path, "one", accept=False)
    check_golden(path, "one", accept=True)
    check_golden(path, "one\n", accept=False)
    with pytest.raises(AssertionError, match=r"a-b\.txt differs: .*--accept"):
        check_golden(path, "two", accept=False)
    check_golden(path, "two", accept=True)
    check_golden(path, "two", accept=False)


def test_every_golden_file_belongs_to_a_test() -> None:
    here = Path(__file__).parent
    for path in (here / "golden").iterdir():
        stem, _, name = path.stem.partition("-")
        test = rf"def test_{name.partition('[')[0]}\((\w+: \w+, )*golden: Golden\)"
        assert re.search(test, (here / f"test_{stem}.py").read_text()), path.name
