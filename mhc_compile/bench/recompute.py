"""What recomputation saves and costs: bytes that the streams keep for the backward pass, and the time of a step."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile.bench.contest import Contender, contest, distance, show
from mhc_compile.bench.native import gradients
from mhc_compile.capture import capture, find_marks
from mhc_compile.conversion import convert
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import stream_parameters
from mhc_compile.passes.base import Context
from mhc_compile.passes.cost import Plan
from mhc_compile.passes.pipeline import WIDENING
from mhc_compile.passes.recompute import plan_of

KEPT, AGAIN = "everything kept", "recomputed"


class Attention(nn.Module):
    """Causal attention whose heads together are narrower than the stream: what it keeps is told by its width."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.inputs = nn.Linear(width, 3 * heads * size, bias=False)
        self.output = nn.Linear(heads * size, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        q, k, v = self.inputs(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Feed(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Layers of two sites each and nothing else: what it keeps is the streams' or the branches'."""

    def __init__(self, layers: int, width: int, heads: int, size: int) -> None:
        super().__init__()
        hidden = width * 8 // 3 // 16 * 16
        parts = ((Attention(width, heads, size), Feed(width, hidden)) for _ in range(layers))
        self.parts = nn.ModuleList(part for pair in parts for part in pair)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        for part in self.parts:
            x = x + part(x)
        return x


@dataclass(frozen=True)
class StreamBytes:
    """Of one forward and backward."""

    kept: int
    """Held by the stream part between the two."""
    branches: int
    """Held by the branches."""
    transient: int
    """The most that was recomputed and alive at a time."""

    @property
    def peak(self) -> int:
        """What the stream part holds at the beginning of the backward pass."""
        return self.kept + self.transient


def stream_bytes(model: nn.Module, run: Callable[[], Tensor], sizes: Collection[int]) -> StreamBytes:
    """Measure what is kept for the backward pass of `run`, which returns the output [B, S, C] of a compiled `model`.

    A storage is the streams' by the last dimension of what is kept in it, one of `sizes`. What autograd packs is
    counted, by storage, parameters left out; what kernels of streams give during the backward pass, while it is alive.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    of_streams: dict[int, int] = {}
    of_branches: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        ours = t.ndim > 1 and t.shape[-1] in sizes
        if storage.data_ptr() not in parameters:
            (of_streams if ours else of_branches)[storage.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    with _Alive() as alive:
        out.sum().backward()
    return StreamBytes(sum(of_streams.values()), sum(of_branches.values()), alive.most)


class _Alive(TorchDispatchMode):
    """Counts the bytes of what forward kernels of streams give, while it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("mhc_kernels.") and "_backward" not in name:
            for t in out if isinstance(out, (tuple, list)) else (out,):
                self.now += t.nbytes
                weakref.finalize(t, self._free, t.nbytes)
            self.most = max(self.most, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def plan_for(model: nn.Module, x: Tensor, blocks: str | int) -> Plan:
    """Return the cost model's plan for a converted model."""
    captured = capture(model, (x,), {})
    marks = find_marks(captured.graph)
    return plan_of(WIDENING.run(captured.graph, Context(marks=marks)).graph, blocks)


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure bytes and time with and without recomputation; print the tables and return all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers, width, heads, size, batch, length = (2, 64, 3, 16, 2, 32) if quick else (24, 512, 7, 64, 4, 256)
    torch.manual_seed(0)
    base = Stack(layers, width, heads, size).to(device)
    x, weights = (torch.randn(batch, length, width, device=device) for _ in range(2))
    spec = StreamSpec()
    by_name: dict[str, tuple[StreamBytes, Plan]] = {}
    contenders = []
    expected: list[Tensor] = []
    for name, blocks in ((KEPT, "off"), (AGAIN, "auto")):
        torch.manual_seed(0)
        model = convert(copy.deepcopy(base), x, streams=spec.streams, recompute=blocks)
        with torch.no_grad():
            for p in stream_parameters(model).values():
                p.add_(0.02 * torch.randn_like(p))
        step = gradients(model, x, weights)
        expected = expected or [value.double() for value in step()]
        by_name[name] = (
            stream_bytes(model, lambda m=model: m(x), {width, spec.streams, spec.rows + 1}),  # type: ignore[misc]
            plan_for(model, x, blocks),
        )
        contenders.append(Contender(name, step, check=partial(distance, exact=expected), tolerance=0.0))
    shape = f"{2 * layers} sites, n={spec.streams}, C={width}, {batch} x {length} tokens, float32"
    _show_bytes(console, f"stream part, {shape}", by_name)
    rows = contest(console, contenders, ours=KEPT, device=device, shape=shape, rounds=2 if quick else 9)
    title = f"forward and backward, {shape}"
    groups = {title: show(console, title, rows)}
    again = next(r for r in rows if r.name == AGAIN)
    measured, plan = by_name[AGAIN]
    fraction = measured.peak / by_name[KEPT][0].kept
    console.print(
        f"in {len(plan.blocks)} blocks of up to {plan.block} sites the stream part holds {fraction:.1%} of what it "
        f"holds without, at {again.ratio - 1:+.1%} of time; gradients are equal bit by bit"
    )
    figures = {name: asdict(b) | {"predicted": p.kept, "predicted_peak": p.peak} for name, (b, p) in by_name.items()}
    return {"groups": groups, "bytes": figures, "fraction": fraction, "overhead": again.ratio - 1, "block": plan.block}


def _show_bytes(console: Console, title: str, measured: dict[str, tuple[StreamBytes, Plan]]) -> None:
    table = Table("", "kept", "predicted", "recomputed at a time", "predicted", "branches keep", title=title)
    for name, (b, p) in measured.items():
        table.add_row(name, *(f"{v / 2**20:.2f} MiB" for v in (b.kept, p.kept, b.transient, p.transient, b.branches)))
    console.print(table)
