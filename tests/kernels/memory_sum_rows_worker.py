"""The fused look-up by content against the equations in float64; as a process of its own, cases in JSON, by Triton."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile.kernels.memory import sum_rows, sum_rows_triton
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.kernels.memory.ultramem import expand
from mhc_compile.memory.tables import MemoryTable


def spec(groups: int, read: int, rows: int = 40) -> ContentSpec:
    return ContentSpec(top=3, multiplier=1, reach=rows, offset=0, rows=rows, groups=groups, input=read, eps=1e-5)


def operands(s: ContentSpec, cores: int, tokens: tuple[int, ...] = (2, 5), found: int = 6) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, s.rows, (*tokens, found), generator=rng)
    rows.view(-1)[:3] = 7  # found three times by one token
    return {
        "rows": rows,
        "groups": torch.randint(0, s.groups, rows.shape, generator=rng),
        "scores": torch.randn(*rows.shape, cores, generator=rng).requires_grad_(),
        "input": torch.randn(*tokens, s.input, generator=rng).requires_grad_() if s.input else None,
    }


def fused(table: MemoryTable, s: ContentSpec, p: dict[str, Any]) -> Tensor:
    return torch.ops.engram_kernels.sum_rows(*p.values(), table.anchor, table.handle, table.width, str(s))


def leaves(p: dict[str, Any]) -> list[Tensor]:
    return [t for t in p.values() if t is not None and t.is_floating_point()]


def errors(table: MemoryTable, s: ContentSpec, p: dict[str, Any]) -> dict[str, float]:
    """Of the sums and of every gradient, relative to the largest value; infinite where other rows have a gradient."""
    out = fused(table, s, p)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((out * weights).sum(), [*leaves(p), table.anchor])
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
    names = ("sums", "scores", *(["input"] if s.input else []), "rows")
    pairs = zip(names, (out, *found[:-1], whole), (wanted, *right), strict=True)
    result = {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, a, b in pairs}
    same = torch.equal(taken.rows, p["rows"].unique()) and float(found[-1]) == 0
    return result if same else dict.fromkeys(result, float("inf"))


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def waits(table: MemoryTable, s: ContentSpec, p: dict[str, Any]) -> bool:
    """Whether a launch with a frozen table asks the device for a number, which no CUDA graph can."""
    operands = [t.detach() if t is not None else None for t in p.values()]
    rows, groups, scores, read = operands
    with Called() as called:
        out = sum_rows_triton.run(rows, groups, scores, read, table.weight.detach(), s)
        sum_rows_triton.run_backward(out, rows, groups, scores, read, table.weight.detach(), s, train=False)
    assert "_assert_async" in called.names
    return not called.names.isdisjoint(
        ("_local_scalar_dense", "item", "nonzero", "_unique2", "unique_dim", "is_nonzero")
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        dtype, read = (getattr(torch, case.pop(name)) for name in ("dtype", "read_dtype"))
        groups, width, cores, slice_ = (case.pop(name) for name in ("groups", "read", "cores", "slice"))
        s = spec(groups, width)
        p = operands(s, cores, tuple(case["tokens"]), case["found"])
        if p["input"] is not None:
            p["input"] = p["input"].detach().to(read).requires_grad_()
        p["rows"], p["scores"] = (t.mT.contiguous().mT for t in (p["rows"], p["scores"]))  # of any strides
        table = MemoryTable(s.rows, width + cores * slice_, dtype=dtype).start(1, 1.0)
        by_triton = sum_rows._target(table, p["scores"], p["input"]) == "triton"
        print(json.dumps({"triton": by_triton, "errors": errors(table, s, p), "waits": waits(table, s, p)}), flush=True)
