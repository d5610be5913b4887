"""Normal form: one spelling for each idiom, nothing that the model does lost or moved."""

from collections.abc import Callable

import pytest
import torch
from goldens import graph_text
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import apply, captured, normal, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from mhc_compile.passes.base import Context, call_nodes, op_name
from mhc_compile.passes.normalize import Normalize

Golden = Callable[[str], None]
Body = Callable[[Tensor, Tensor], object]


class Written(nn.Module):
    """A module whose forward is a function of two tensors."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, y: Tensor) -> object:
        return self.body(x, y)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)


def normalised(body: Body, *args: Tensor) -> tuple[str, list[str]]:
    """The graph before and after as text, its values unchanged; and the notes of the pass."""
    found = captured(Written(body), *args)
    before, wanted = graph_text(found.graph), run(found.graph, found.inputs)
    context = Context()
    gm = apply(Normalize(), found.graph, context)
    for a, b in zip(run(gm, found.inputs), wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    return f"{before}\n\n{graph_text(gm)}", context.notes


def unchanged(body: Body, *args: Tensor) -> list[str]:
    """Assert that the pass leaves every node alone; returns its notes."""
    found = captured(Written(body), *args)
    before = [(n, n.op, n.target, n.args, dict(n.kwargs)) for n in found.graph.graph.nodes]
    context = Context()
    gm = apply(Normalize(), found.graph, context)
    assert [(n, n.op, n.target, n.args, dict(n.kwargs)) for n in gm.graph.nodes] == before
    return context.notes


# --- one spelling -------------------------------------------------------------------------------------------------


def test_spellings_of_add(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        a = torch.add(x, y)
        b = a.add(y)
        c = b.add(other=y)
        d = torch.add(c, y, alpha=0.5)
        return torch.add(input=d, other=y)

    golden(normalised(body, *inputs())[0])


def test_in_place_arithmetic(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x * 2
        h += y
        h.add_(y)
        h -= y
        h.sub_(y)
        h *= y
        h.mul_(3)
        h /= 2
        h.div_(y)
        return h

    golden(normalised(body, *inputs())[0])


def test_in_place_options(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = F.relu(x + y, inplace=True)
        return F.silu(h, True) + h

    golden(normalised(body, *inputs())[0])


def test_in_place_add_keeps_the_dtype(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x.to(torch.bfloat16)  # a copy
        h += y
        h += y
        return h

    golden(normalised(body, *inputs(torch.float32))[0])


def test_readers_before_and_after_a_mutation(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x * 2
        before = h + 1
        h += y
        view = h.view(4, 2)
        h *= 2
        return before, view, h

    text, notes = normalised(body, *inputs())
    golden(text)
    assert [n.split(" kept")[0][:8] for n in notes] == ["in-place"]  # the view is read after `h *= 2`


def test_checkpointed_layers_are_inlined(golden: Golden) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 4)
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside(x).requires_grad_()
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    found = captured(Stack().double(), torch.randn(2, 4, dtype=torch.float64))
    before, wanted = graph_text(found.graph), run(found.graph, found.inputs)
    context = Context()
    gm = apply(Normalize(), found.graph, context)
    golden(f"{before}\n\n{graph_text(gm)}")
    assert torch.equal(run(gm, found.inputs)[0], wanted[0])
    assert [n.meta.get("ac_graph_id") for n in call_nodes(gm)] == [None, 1, 1, 2, 2]
    assert context.notes == [f"checkpointed block {i} inlined and tagged for recomputation" for i in (1, 2)]
    assert not [n for n in gm.graph.nodes if n.op == "get_attr"]


def test_weighted_addition_in_place() -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x * 2
        h.add_(y, alpha=0.5)
        return h

    text, _ = normalised(body, *inputs())
    # Some versions of Dynamo multiply by themselves.
    assert text.split("\n\n")[1].replace("torch.mul", "mul").splitlines() == [
        "%0 = mul(x, 2): [2, 4]",
        "%1 = mul(y, 0.5): [2, 4]",
        "%2 = add(%0, %1): [2, 4]",
        "return [%2]",
    ]


@pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 13), reason="Dynamo traces requires_grad_() from 2.13 on")
def test_requires_grad_on_the_stream_is_dropped(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = (x * 2).requires_grad_()
        return h + y

    with torch.no_grad():  # as `convert` captures
        text, _ = normalised(body, *inputs())
    golden(text)


# --- negative cases -----------------------------------------------------------------------------------------------


def test_normal_form_is_left_alone() -> None:
    assert unchanged(lambda x, y: (x + y) * 2 - torch.relu(x @ y.T).sum(), *inputs()) == []


def test_normalising_twice_changes_nothing_more() -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x * 2
        h += y
        return torch.add(h, y, alpha=2)

    gm = normal(Written(body), *inputs())
    once = str(gm.graph)
    assert str(apply(Normalize(), gm, Context()).graph) == once


def test_an_input_that_the_caller_sees_change_is_left_alone() -> None:
    def body(x: Tensor, y: Tensor) -> object:
        x += y
        return x * 2

    assert unchanged(body, *inputs()) == []


def test_a_value_with_a_view_read_later_is_left_alone() -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x * 2
        view = h.view(-1)
        h += y
        return view.sum(), h

    (note,) = unchanged(body, *inputs())
    assert "iadd" in note
    assert "another view of its operand is read afterwards" in note


def test_writes_through_indices_survive() -> None:
    def body(x: Tensor, y: Tensor) -> object:
        index = torch.zeros(2, dtype=torch.int64)
        counts = torch.zeros(4, dtype=x.dtype)
        counts.scatter_(0, index, 1.0)
        table = torch.zeros_like(x)
        table.index_add_(0, index, y)
        table[0, 1] = 5.0
        table.masked_fill_(y > 0, 2.0)
        out = torch.empty_like(x)
        torch.mul(x, y, out=out)
        return table * counts + out

    text, _ = normalised(body, *inputs())
    after = text.split("\n\n")[1]
    for name in ("scatter_", "index_add_", "setitem", "masked_fill_", "out="):
        assert name in after
    unchanged(body, *inputs())


def test_switches_of_autocast_and_gradients_stay_in_place(golden: Golden) -> None:
    def body(x: Tensor, y: Tensor) -> object:
        with torch.no_grad():
            h = torch.add(x, y)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = h @ y.transpose(0, 1)
            h += 1
        h += y.sum()
        return h

    text, _ = normalised(body, *inputs(torch.float32))
    golden(text)
    before, after = ([line.split(" = ")[1].split("(")[0] for line in t.splitlines()[:-1]] for t in text.split("\n\n"))
    switch = ("torch._set_grad_enabled", "torch._enter_autocast", "torch._exit_autocast")
    # What stands between two switches stays between them.
    assert [n if n in switch else "." for n in before] == [n if n in switch else "." for n in after]
    assert sum(n in switch for n in before) == 4


# --- random programs ----------------------------------------------------------------------------------------------


def taking_one(f: Callable[[Tensor], object]) -> Body:
    return lambda a, _: f(a)


STEPS: dict[str, Body] = {
    "clone": taking_one(lambda a: a.clone()),
    "view": taking_one(lambda a: a.view(4, 2)),
    "transpose": taking_one(lambda a: a.transpose(0, 1)),
    "slice": taking_one(lambda a: a[1:]),
    "chunk": taking_one(lambda a: a.chunk(2)),
    "to": taking_one(lambda a: a.to(torch.float64)),
    "reshape": taking_one(lambda a: a.reshape(-1)),
    "add": lambda a, b: a.sum() + b,
    "alpha": lambda a, b: torch.add(a, b.sum(), alpha=0.5),
    "add_": lambda a, b: a.add_(b.mean(), alpha=0.5),
    "mul_": taking_one(lambda a: a.mul_(0.5)),
    "sub_": lambda a, b: a.sub_(b.amax()),
    "relu": taking_one(lambda a: F.relu(a, inplace=True)),
    "dropout": taking_one(lambda a: F.dropout(a, 0.0, True, True)),
}


class Program(nn.Module):
    """Runs steps over a growing list of tensors, many of them views of one another, and returns them all."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        held = [x + 1.0, x * 2.0, x.float()]
        for name, i, j in self.steps:
            a, b = held[i % len(held)], held[j % len(held)]
            if name == "iadd":
                a += b if a.shape == b.shape else b.sum()
                held[i % len(held)] = a
            elif name == "setitem":
                a[0] = b.mean()
            else:
                made = STEPS[name](a, b)
                held += [made] if isinstance(made, Tensor) else list(made)
        return tuple(held)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([*STEPS, "iadd", "iadd", "setitem"]), st.integers(0, 5), st.integers(0, 5)),
        min_size=2,
        max_size=8,
    )
)
def test_programs_that_mutate_views_compute_the_same(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Program(steps), torch.randn(4, 2, dtype=torch.float64)
    try:
        wanted = model(x)
    except (RuntimeError, IndexError):
        return  # a view or an in-place addition that these shapes do not allow
    found = captured(model, x)
    gm = apply(Normalize(), found.graph, Context())
    for a, b in zip(run(gm, found.inputs), wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "steps",
    [
        [("dropout", 1, 0), ("view", 1, 0), ("iadd", 1, 0)],
        [("iadd", 2, 0), ("iadd", 2, 1), ("mul_", 2, 0)],
        [("view", 0, 0), ("mul_", 3, 0), ("iadd", 0, 1)],
    ],
)
def test_programs_that_went_wrong(steps: list[tuple[str, int, int]]) -> None:
    test_programs_that_mutate_views_compute_the_same.hypothesis.inner_test(steps)


def test_only_additions_are_left_of_in_place_additions() -> None:
    def body(x: Tensor, y: Tensor) -> object:
        h = x * 2
        for _ in range(3):
            h += torch.relu(y)
        return h

    gm = normal(Written(body), *inputs())
    assert [op_name(n) for n in call_nodes(gm)] == ["mul", "relu", "add", "relu", "add", "relu", "add"]
