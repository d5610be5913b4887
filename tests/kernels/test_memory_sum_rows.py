"""The fused look-up by content against the equations, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile.kernels.memory import sum_rows
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.kernels.memory.ultramem import expand
from mhc_compile.memory.tables import MemoryTable

TOKENS, FOUND = (2, 5), 6


def spec(groups: int, read: int) -> ContentSpec:
    return ContentSpec(top=3, multiplier=1, reach=40, offset=0, rows=40, groups=groups, input=read, eps=1e-5)


def operands(s: ContentSpec, cores: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, s.rows, (*TOKENS, FOUND), generator=rng)
    rows[0, 0, :3] = 7  # found three times by one token
    return {
        "rows": rows,
        "groups": torch.randint(0, s.groups, rows.shape, generator=rng),
        "scores": torch.randn(*rows.shape, cores, generator=rng).to(dtype).requires_grad_(),
        "input": torch.randn(*TOKENS, s.input, generator=rng).to(dtype).requires_grad_() if s.input else None,
    }


def fused(table: MemoryTable, s: ContentSpec, p: dict[str, Any]) -> Tensor:
    return torch.ops.engram_kernels.sum_rows(*p.values(), table.anchor, table.handle, table.width, str(s))


def leaves(p: dict[str, Any]) -> list[Tensor]:
    return [t for t in p.values() if t is not None and t.is_floating_point()]


@pytest.mark.parametrize(
    ("storage", "dtype"), [("device", torch.float32), ("host", torch.float32), ("device", torch.bfloat16)]
)
@pytest.mark.parametrize(("groups", "read", "cores"), [(4, 0, 2), (1, 3, 1), (4, 3, 3)])
def test_values_and_gradients_are_those_of_the_equations(
    storage: Any, dtype: torch.dtype, groups: int, read: int, cores: int
) -> None:
    s = spec(groups, read)
    table = MemoryTable(s.rows, read + 6, storage=storage, dtype=dtype).start(1, 1.0)
    assert (sum_rows._target(table, torch.zeros(1), None) == "cpp") == (storage == "device" and dtype == torch.float32)
    p = operands(s, cores)
    out = fused(table, s, p)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((out * weights).sum(), [*leaves(p), table.anchor])
    assert found[-1] == 0
    taken = table.take_gradient()
    assert taken is not None

    exact = {
        name: t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in p.items()
    }
    weight = table.weight.detach().double().requires_grad_()
    wanted = expand(weight[exact["rows"]].flatten(-2), *list(exact.values())[1:], s)
    right = torch.autograd.grad((wanted * weights).sum(), [*leaves(exact), weight])
    whole = torch.zeros_like(weight).index_add_(0, taken.rows, taken.values.double())
    tolerance = 1e-6 if dtype == torch.float32 else 0.02  # the rows' gradient is rounded once to theirs
    for a, b in zip((out, *found[:-1], whole), (wanted, *right), strict=True):
        assert float((a - b).detach().abs().max() / b.detach().abs().max()) < tolerance
    assert torch.equal(taken.rows, p["rows"].unique())


def test_a_frozen_table_gets_no_gradient_and_scores_get_theirs() -> None:
    s = spec(1, 0)
    table = MemoryTable(s.rows, 6, trainable=False).start(1, 1.0)
    p = operands(s, 2)
    (gradient,) = torch.autograd.grad(fused(table, s, p).sum(), leaves(p))
    assert bool(gradient.any())
    assert table.gradient is None


def test_rows_outside_are_refused() -> None:
    s = spec(1, 0)
    table = MemoryTable(4, 6).start(1, 1.0)
    with pytest.raises(IndexError, match="a table with 4 rows"):
        fused(table, s, operands(s, 2))


def test_the_registration() -> None:
    s = spec(4, 3)
    table = MemoryTable(s.rows, 9).start(1, 1.0)
    arguments = (*operands(s, 3).values(), table.anchor, table.handle, table.width, str(s))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.engram_kernels.sum_rows.default, arguments, test_utils=checks)
    p = operands(s, 3)
    (first,) = torch.autograd.grad(fused(table, s, p).square().sum(), p["scores"], create_graph=True)
    with pytest.raises(NotImplementedError):
        first.sum().backward()
