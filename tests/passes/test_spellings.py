"""Other spellings of `x + F`: read as adds where they are residual, with the same values and dtypes."""

from collections.abc import Callable

import pytest
import torch
from stepping import apply, captured, run
from torch import Tensor, nn

from mhc_compile.passes.base import Context, call_nodes, op_name
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.residual import Residual

WIDTH = 4
Body = Callable[[Tensor, Tensor, Tensor], Tensor]
INDEX = torch.tensor([1, 0, 1])

BITWISE: dict[str, Body] = {
    "sub": lambda x, y, _w: x - y,
    "sub in place": lambda x, y, _w: x.mul(2.0).sub_(y),
    "subtract": lambda x, y, _w: torch.subtract(x, y),
    "method": lambda x, y, _w: x.sub(y),
    "rsub": lambda x, y, _w: torch.rsub(y, x),
    "from the branch": lambda x, y, _w: y - x,
    "where": lambda x, y, w: torch.where(w > 0, x + y, x),
    "where else": lambda x, y, w: torch.where(w > 0, x, y + x),
    "where method": lambda x, y, w: (x - y).where(w > 0, x),
    "stack": lambda x, y, _w: torch.stack([x, y]).sum(0),
    "stack behind": lambda x, y, _w: torch.stack((y, x), -1).sum(dim=-1),
    "index_add": lambda x, y, _w: x.index_add(0, INDEX[:2], y),
    "index_add in place": lambda x, y, _w: (x * 2).index_add_(0, INDEX[:2], y),
    "scatter_add": lambda x, y, _w: x.scatter_add(0, INDEX[:2, None].expand(2, WIDTH), y),
    "index_put": lambda x, y, _w: x.index_put((INDEX[:2],), y, accumulate=True),
}  # fmt: skip
ROUNDED: dict[str, Body] = {
    "sub with alpha": lambda x, y, _w: torch.sub(x, y, alpha=0.3),
    "addcmul": lambda x, y, w: torch.addcmul(x, w, y, value=0.3),
    "addcmul in place": lambda x, y, w: (x * 2).addcmul_(w, y),
    "addcdiv": lambda x, y, w: x.addcdiv(y, w),
    "lerp": lambda x, y, _w: torch.lerp(x, y, 0.3),
    "lerp from the branch": lambda x, y, _w: y.lerp(x, 0.3),
    "lerp by a tensor": lambda x, y, w: torch.lerp(y, x, torch.sigmoid(w)),
    "lerp in place": lambda x, y, _w: (x * 2).lerp_(y, 0.7),
    "mean of a stack": lambda x, y, w: torch.stack([x, y, w * y]).mean(0),
    "addmm": lambda x, y, w: torch.addmm(x, y, w.expand(WIDTH, WIDTH), beta=0.5, alpha=0.3),
    "addmm in place": lambda x, y, w: (x * 2).addmm_(y, w.expand(WIDTH, WIDTH)),
    "baddbmm": lambda x, y, w: torch.baddbmm(x.view(2, 1, WIDTH), y.view(2, 1, WIDTH), w.expand(2, WIDTH, WIDTH)),
    "addbmm": lambda x, y, w: torch.addbmm(x, y[None], w.expand(1, WIDTH, WIDTH)),
    "repeated indices": lambda x, y, _w: x.index_add(0, INDEX, torch.cat([y, y[:1]]), alpha=0.3),
}  # fmt: skip


class Spelt(nn.Module):
    """A branch that joins its input in the spelling of `body`."""

    def __init__(self, body: Body, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear, self.weight = (
            nn.Linear(WIDTH, WIDTH, dtype=dtype),
            nn.Parameter(torch.rand(WIDTH, dtype=dtype) + 0.5),
        )
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.body(x, self.linear(x), self.weight))


def read(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Context]:
    """What the graph computes before and after, and what `residual` finds in it."""
    found = captured(model, x)
    (wanted,) = run(found.graph, found.inputs)
    context = Context()
    gm = apply(Normalize(), found.graph, context)
    (got,) = run(gm, found.inputs)
    apply(Residual(), gm, context)
    return wanted, got, context


@pytest.mark.parametrize("name", BITWISE)
def test_equal_in_every_bit(name: str) -> None:
    torch.manual_seed(0)
    wanted, got, context = read(Spelt(BITWISE[name]), torch.randn(2, WIDTH, dtype=torch.float64))
    assert torch.equal(got, wanted)
    assert context.coverage.sites == 1


@pytest.mark.parametrize("name", ROUNDED)
def test_equal_up_to_rounding(name: str) -> None:
    torch.manual_seed(0)
    wanted, got, context = read(Spelt(ROUNDED[name]), torch.randn(2, WIDTH, dtype=torch.float64))
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
    assert context.coverage.sites == 1


@pytest.mark.parametrize("name", ["sub", "addcmul", "addcmul in place", "lerp", "addmm", "stack", "where", "index_add"])
def test_narrow_values_stay_narrow(name: str) -> None:
    torch.manual_seed(0)
    body = (BITWISE | ROUNDED)[name]
    wanted, got, context = read(Spelt(body, torch.bfloat16), torch.randn(2, WIDTH, dtype=torch.bfloat16))
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert context.coverage.sites == 1


def test_autocast_gives_what_it_gave() -> None:
    class Cast(Spelt):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x, self.linear(x), self.weight)

    torch.manual_seed(0)
    wanted, got, context = read(Cast(ROUNDED["addmm"], torch.float32), torch.randn(2, WIDTH))
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert context.coverage.sites == 1


def test_what_is_no_residual_add_is_left() -> None:
    """Norms written out, a difference of two projections, modulation, a bias: no carried value meets its branch."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.bias = nn.Parameter(torch.rand(2, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addcmul(self.a(x), self.b(x), x - x.mean(-1, keepdim=True))
            return x + torch.addmm(self.bias, self.a(y) - self.b(y), self.a.weight)

    model = Other()
    gm = apply(Normalize(), captured(model, torch.randn(2, WIDTH)).graph, Context())
    assert [op_name(n) for n in call_nodes(gm) if op_name(n) in ("sub", "addcmul", "addmm", "add")] == [
        "sub", "addcmul", "sub", "addmm", "add",
    ]  # fmt: skip
