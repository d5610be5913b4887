"""Lookups as ops: values, gradients and their side effect, in eager mode and under the compilers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_compile.diagnostics import MHCWarning
from mhc_compile.kernels.memory import gather, row_gradients_cpp
from mhc_compile.memory.gradient import PATIENCE, PendingGradient, RowGradient, coalesce, merge
from mhc_compile.memory.tables import MemoryTable

ops = torch.ops.engram_kernels
ROWS, WIDTH, HEADS = 60, 6, 4
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
STORAGES = ["device", "host"]


def table(storage: str = "device", **options: Any) -> MemoryTable:
    return MemoryTable(ROWS, WIDTH, storage=storage, **options).start(0, 1.0)


def inputs(t: MemoryTable) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, ROWS, (2, 5, HEADS)), t.anchor, torch.randn(HEADS * WIDTH, 3, requires_grad=True)


def plain(t: MemoryTable) -> Function:
    return lambda rows, a, w: (ops.gather(rows, a, t.handle, WIDTH) @ w).square().sum()


def twice_equal(t: MemoryTable) -> Function:
    """Two lookups, whose backwards are equal expressions."""

    def run(rows: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return (ops.gather(rows, a, t.handle, WIDTH) + ops.gather(rows, a, t.handle, WIDTH)).sum() + w.sum()

    return run


def several(t: MemoryTable) -> Function:
    def run(rows: Tensor, a: Tensor, w: Tensor) -> Tensor:
        x = (ops.gather(rows, a, t.handle, WIDTH) @ w).square().sum()
        return x + (ops.gather(rows + 0, a, t.handle, WIDTH) @ w).sum() + ops.gather(rows * 0, a, t.handle, WIDTH).sum()

    return run


def ahead(t: MemoryTable) -> Function:
    def run(rows: Tensor, a: Tensor, w: Tensor) -> Tensor:
        ticket = ops.prefetch(rows, t.handle)
        scale = torch.tanh(w @ w.T).sum()
        return (ops.collect(ticket, rows, a, t.handle, WIDTH) @ w * scale).square().sum()

    return run


def recomputed(t: MemoryTable, inside: Callable[[MemoryTable], Function], reentrant: bool = False) -> Function:
    part = inside(t)
    return lambda rows, a, w: checkpoint(part, rows, a, w, use_reentrant=reentrant) * 2


FORMS: dict[str, Callable[[MemoryTable], Function]] = {
    "plain": plain,
    "twice_equal": twice_equal,
    "several": several,
    "ahead": ahead,
    "recomputed": lambda t: recomputed(t, plain),
    "recomputed_ahead": lambda t: recomputed(t, ahead),
}


def by_weight(form: str, t: MemoryTable, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and the dense gradient of the weight, by plain indexing."""
    rows, _, w = args
    weight = t.weight.detach().clone().requires_grad_()

    def look(r: Tensor) -> Tensor:
        return weight[r].flatten(-2)

    match form.removeprefix("recomputed_").removeprefix("recomputed") or "plain":
        case "plain":
            loss = (look(rows) @ w).square().sum()
        case "twice_equal":
            loss = 2 * look(rows).sum() + w.sum()
        case "several":
            loss = (look(rows) @ w).square().sum() + (look(rows) @ w).sum() + look(rows * 0).sum()
        case "ahead":
            loss = (look(rows) @ w * torch.tanh(w @ w.T).sum()).square().sum()
    loss = loss * (2 if form.startswith("recomputed") else 1)
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


def agree(t: MemoryTable, loss: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    found = t.take_gradient()
    assert found is not None
    dense = torch.zeros(ROWS, WIDTH).index_add_(0, found.rows, found.values)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense, wanted[1], rtol=1e-4, atol=1e-4)
    assert t.gradient is None


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("form", FORMS)
def test_eager(form: str, storage: str) -> None:
    t = table(storage)
    args = inputs(t)
    for _ in range(2):
        loss = FORMS[form](t)(*args)
        loss.backward()
        agree(t, loss, by_weight(form, t, args))


def test_reentrant_checkpointing() -> None:
    t = table()
    args = inputs(t)
    loss = recomputed(t, plain, reentrant=True)(*args)
    loss.backward()
    agree(t, loss, by_weight("recomputed", t, args))


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


# The partitioner and its common subexpression elimination are Inductor's in "aot_eager_decomp_partition", too.
COMPILED = [
    *((form, s, b) for form in FORMS for s, b in (("device", "aot_eager"), ("host", "aot_eager_decomp_partition"))),
    ("several", "device", "inductor"),
    ("recomputed_ahead", "host", "inductor"),
]


@pytest.mark.parametrize(("form", "storage", "backend"), COMPILED)
def test_compiled(form: str, storage: str, backend: str, own_cache: None) -> None:
    torch._dynamo.reset()
    t = table(storage)
    compiled = torch.compile(FORMS[form](t), backend=backend, fullgraph=True)
    args = inputs(t)
    for _ in range(2):
        loss = compiled(*args)
        loss.backward()
        agree(t, loss, by_weight(form, t, args))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(*args), by_weight_loss(form, t, args), rtol=1e-4, atol=1e-4)
    assert t.gradient is None


def by_weight_loss(form: str, t: MemoryTable, args: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return by_weight(form, t, args)[0]


def test_graphs_from_the_cache(own_cache: None) -> None:
    t = table()
    args = inputs(t)
    counters = torch._dynamo.utils.counters
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        loss = torch.compile(twice_equal(t), fullgraph=True)(*args)
        loss.backward()
        agree(t, loss, by_weight("twice_equal", t, args))
        found.append((counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]))
        with torch._functorch.config.patch(enable_autograd_cache=False):  # the graphs' own cache, without the outer one
            torch._dynamo.reset()
            loss = torch.compile(twice_equal(t), fullgraph=True)(*args)
            loss.backward()
            agree(t, loss, by_weight("twice_equal", t, args))
    assert found[0][0] == 0
    assert found[1][0] == 1


def test_equal_backwards_would_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why backward calls are numbered: without that, a compiler runs one of two equal ones.
    t = table()
    args = inputs(t)
    found = []
    for number in (gather.call_number, lambda: 0):
        monkeypatch.setattr(gather, "call_number", number)
        torch._dynamo.reset()
        torch.compile(twice_equal(t), backend="aot_eager_decomp_partition")(*args).backward()
        taken = t.take_gradient()
        assert taken is not None
        found.append(taken.values)
    torch.testing.assert_close(found[0], 2 * found[1])


def test_dynamic_shapes() -> None:
    t = table()
    torch._dynamo.reset()
    compiled = torch.compile(plain(t), backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (3, 5, 9):
        rows, a, w = torch.randint(0, ROWS, (2, tokens, HEADS)), t.anchor, torch.randn(HEADS * WIDTH, 3)
        loss = compiled(rows, a, w)
        loss.backward()
        agree(t, loss, by_weight("plain", t, (rows, a, w)))


def test_ops_are_registered_well() -> None:
    t = table("host")
    rows, a, _ = inputs(t)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.gather.default, (rows, a, t.handle, WIDTH, None), test_utils=tests)
    ticket = ops.prefetch(rows, t.handle)
    torch.library.opcheck(ops.collect.default, (ticket, rows, a, t.handle, WIDTH), test_utils=tests)
    for op in (ops.gather, ops.collect, ops.prefetch, ops.gather_backward):
        assert torch.Tag.cudagraph_unsafe in op.default.tags


def test_dtypes_and_the_anchor() -> None:
    t = MemoryTable(ROWS, WIDTH, dtype=torch.bfloat16).start(0)
    rows = torch.randint(0, ROWS, (7, 2))
    found = t(rows)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert t.gradient is not None
    assert t.gradient.values.dtype == torch.float32
    assert t.anchor.grad is not None
    assert t.anchor.grad.item() == 0
    assert t.weight.grad is None
    t.trainable = False
    assert not t(rows).requires_grad


def test_no_second_derivative() -> None:
    t = table()
    args = inputs(t)
    (first,) = torch.autograd.grad(plain(t)(*args), t.anchor, create_graph=True)
    with pytest.raises(NotImplementedError):
        first.backward()


def test_a_retained_graph_counts_again() -> None:
    t = table()
    args = inputs(t)
    loss = plain(t)(*args)
    loss.backward(retain_graph=True)
    loss.backward()
    wanted = by_weight("plain", t, args)
    agree(t, loss, (wanted[0], 2 * wanted[1]))


def test_exported() -> None:
    t = table("host")
    rows = torch.randint(0, ROWS, (2, 3, HEADS))
    program = torch.export.export(t, (rows,))
    assert torch.equal(program.module()(rows), t(rows))


# Gradients.

pairs = st.lists(st.tuples(st.integers(0, 9), st.integers(-50, 50)), min_size=1, max_size=40)


@given(st.lists(pairs, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_gradients_add_up(calls: list[list[tuple[int, int]]]) -> None:
    pending = PendingGradient()
    wanted = torch.zeros(10, 2)
    for call in calls:
        rows, values = torch.tensor([r for r, _ in call]), torch.tensor([[v, -v] for _, v in call])
        pending.add(coalesce(rows, values))
        wanted.index_add_(0, rows, values.float())
    for found in (pending.peek(), pending.take()):
        assert found is not None
        assert found.rows.tolist() == sorted({r for call in calls for r, _ in call})
        assert torch.equal(found.values, wanted[found.rows])  # small integers: exact in any order
    assert pending.take() is None


@pytest.mark.parametrize("width", [5, 16, 40])
def test_sums_are_those_of_plain_pytorch(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, values = torch.randint(0, 9000, (5000,)), torch.randn(5000, width)
    results = []
    for in_cpp in (True, False):
        monkeypatch.setattr(row_gradients_cpp.build, "no_compiler", lambda in_cpp=in_cpp: not in_cpp)
        results.append([coalesce(rows, values), coalesce(rows[:0], values[:0])])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours.rows, plain.rows)
        assert torch.equal(ours.values, plain.values)


def test_gradients_are_equal_bit_by_bit() -> None:
    rows, values = torch.randint(0, 50, (4, 3000)), torch.randn(4, 3000, 16) * torch.logspace(-4, 4, 16)
    found = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        pending = PendingGradient()
        for r, v in zip(rows, values, strict=True):
            pending.add(coalesce(r, v))
        found.append(pending.take())
    assert all(torch.equal(f.values, found[0].values) and torch.equal(f.rows, found[0].rows) for f in found)
    # And the order is that of the duplicates.
    exact = torch.zeros(16)
    for v in values[0][rows[0] == rows[0, 0]]:
        exact += v
    one = coalesce(rows[0], values[0])
    assert torch.equal(one.values[one.rows == rows[0, 0]][0], exact)


def test_merging_keeps_parts_apart() -> None:
    a = RowGradient(torch.tensor([1, 3]), torch.ones(2, 2))
    b = RowGradient(torch.tensor([0, 3]), torch.full((2, 2), 2.0))
    found = merge([a, b])
    assert (found.rows.tolist(), found.values[:, 0].tolist()) == ([0, 1, 3], [2.0, 1.0, 3.0])
    assert a.values.eq(1).all()


def test_gradients_that_nobody_takes() -> None:
    t = table()
    rows = torch.randint(0, ROWS, (3, 2))
    losses = [t(rows).sum() for _ in range(PATIENCE + 5)]
    with pytest.warns(MHCWarning, match="MHC227") as seen:
        torch.autograd.backward(losses)
    assert len(seen) == 1
    found = t.take_gradient()
    assert found is not None
    assert found.values.sum().item() == (PATIENCE + 5) * rows.numel() * WIDTH


def test_a_model_that_is_gone_leaves_nothing() -> None:
    t = table("host")
    handle = t.handle
    rows = torch.randint(0, ROWS, (3, 2))
    model = nn.Sequential(t)
    model(rows).sum().backward()
    del t, model
    gc.collect()
    with pytest.raises(LookupError):
        ops.gather(rows, torch.zeros(()), handle, WIDTH)
