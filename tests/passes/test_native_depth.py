"""Hand-written attention over depth in many spellings: raised where it is `attend_normalised`, else left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from stepping import apply, captured, raised
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile.bisect import bisect
from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.passes.base import Context
from mhc_compile.passes.fuse_depth import OWN_READ
from mhc_compile.passes.normalize import Normalize
from mhc_compile.passes.residual import Residual

C, LAYERS = 8, 2
IDS = torch.arange(10).reshape(2, 5)


class Read(nn.Module):
    """Inkling2's equations; subclasses change one of them, or its spelling."""

    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(C) if queries == 1 else torch.randn(queries, C))

    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        blocks = sources[0].new_zeros(*sources[0].shape[:-1], 0, C)
        for source in sources:
            blocks = torch.cat([blocks, source.unsqueeze(-2)], dim=-2)
        return blocks

    def norm(self, X: Tensor) -> Tensor:
        return X * torch.rsqrt(X.square().mean(-1, keepdim=True) + 1e-6)

    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        query = self.query.view(-1, C).expand(*X.shape[:-2], -1, -1)
        shares = torch.softmax(query @ normed.transpose(2, 3) * C**-0.5, -1)
        h = F.dropout(shares, p=0.0, training=self.training) @ normed
        return h.transpose(1, 2).contiguous().transpose(1, 2)

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.attend(self.stack(sources)).unbind(-2)


class Model(nn.Module):
    """A toy Transformer whose sublayers read earlier values; one of them by three queries."""

    def __init__(self, make: Callable[..., Read]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, C)
        self.reads = nn.ModuleList([make(), make(queries=3), make()])
        self.layers = nn.ModuleList(nn.Sequential(nn.RMSNorm(C), nn.Linear(C, C), nn.Tanh()) for _ in range(LAYERS))
        self.head = nn.Linear(C, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        sources = [x, self.layers[0](x)]
        for read in self.reads[:-1]:
            layer = self.layers[1]
            sources.append(sum(layer(h) for h in read(sources)))
        return self.head(self.reads[-1](sources)[0])


class Stacked(Read):
    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(sources), 2)

    def norm(self, X: Tensor) -> Tensor:
        return F.rms_norm(X, (C,), eps=1e-6)

    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        shares = torch.einsum("btnc,qc->btqn", normed, self.query.reshape(-1, C)).div(math.sqrt(C)).softmax(-1)
        return torch.einsum("btqn,btnc->btqc", shares, normed)


class Fused(Read):
    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.cat([source[..., None, :] for source in sources], 2)

    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        query = self.query.view(-1, C).expand(*X.shape[:-2], -1, -1)
        return F.scaled_dot_product_attention(query, normed, normed)


class Unscaled(Read):
    """Without the dimension of the queries where there is one."""

    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        if self.query.ndim > 1:
            return (normed @ self.query.T).softmax(-2).transpose(-1, -2) @ normed
        return ((normed @ self.query).softmax(-1)[..., None] * normed).sum(-2)

    def forward(self, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        h = self.attend(self.stack(sources))
        return h.unbind(-2) if self.query.ndim > 1 else (h,)


@pytest.mark.parametrize("make", [Read, Stacked, Fused, Unscaled])
def test_every_spelling_is_raised(make: Callable[..., Read]) -> None:
    context, gm = raised(Model(make), IDS)
    assert [(r.sources, r.queries) for r in context.native_reads] == [(2, 1), (3, 3), (4, 1)]
    assert [r.name for r in context.native_reads] == [f"reads.{i}#0" for i in range(3)]
    assert "1 hand-written reads raised: 3 queries over 3 sources" in context.notes
    targets = [n.target for n in gm.graph.nodes]
    assert targets.count(OWN_READ) == 3
    # Neither the stacks nor what follows from them is left.
    assert not {torch.cat, torch.stack, torch.softmax, torch.einsum, F.scaled_dot_product_attention} & set(targets)
    assert "softmax" not in targets


class Gain(Read):
    def __init__(self, queries: int = 1) -> None:
        super().__init__(queries)
        self.gain = nn.Parameter(torch.rand(C) + 0.5)

    def norm(self, X: Tensor) -> Tensor:
        return super().norm(X) * self.gain


class ValuesAsTheyAre(Read):
    def attend(self, X: Tensor) -> Tensor:
        return torch.softmax(self.query.view(-1, C) @ self.norm(X).transpose(-1, -2) * C**-0.5, -1) @ X


class OtherEps(Read):
    def norm(self, X: Tensor) -> Tensor:
        return X * torch.rsqrt(X.square().mean(-1, keepdim=True) + 1e-5)


class OtherScale(Read):
    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        return torch.softmax(self.query.view(-1, C) @ normed.transpose(-1, -2) / C, -1) @ normed


class Dropping(Read):
    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        shares = torch.softmax(self.query.view(-1, C) @ normed.transpose(-1, -2) * C**-0.5, -1)
        return F.dropout(shares, p=1e-9, training=True) @ normed


@pytest.mark.parametrize("make", [ValuesAsTheyAre, OtherEps, OtherScale])
def test_another_function_is_left_alone_and_said(make: Callable[..., Read]) -> None:
    context, gm = raised(Model(make), IDS)
    assert context.native_reads == []
    assert (
        sum("left alone: attention over" in note and "sources of another kind" in note for note in context.notes) == 3
    )
    assert OWN_READ not in [n.target for n in gm.graph.nodes]


class AfterNothing(Read):
    """Stacks with an empty tensor of one dimension, as caches do."""

    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.cat([sources[0].new_zeros(0), super().stack(sources)], dim=-2)


@pytest.mark.parametrize("make", [Gain, Dropping, AfterNothing])
def test_what_is_no_such_read_is_left_alone(make: Callable[..., Read]) -> None:
    context, gm = raised(Model(make), IDS)
    assert (context.native_reads, OWN_READ in [n.target for n in gm.graph.nodes]) == ([], False)


class Watched(Read):
    """A read whose shares something else reads, too."""

    def attend(self, X: Tensor) -> Tensor:
        normed = self.norm(X)
        shares = torch.softmax(self.query.view(-1, C) @ normed.transpose(-1, -2) * C**-0.5, -1)
        return shares @ normed + shares.sum()


def test_what_else_is_read_stays() -> None:
    context, gm = raised(Model(Watched), IDS)
    assert len(context.native_reads) == 3
    assert [n.target for n in gm.graph.nodes].count(torch.softmax) == 3


class HalfBlocks(Model):
    """Earlier values in bfloat16, the newest in float32, as under a checkpoint in bfloat16."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        sources = [x.bfloat16(), self.layers[0](x).bfloat16()]
        h = self.reads[0](sources)[0] + self.reads[1]([*sources, x])[0]
        return self.head(h.float())


class Float(Read):
    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        return super().stack(sources).float()


@pytest.mark.parametrize(
    ("model", "tolerance"), [(Model(Read), 1e-5), (HalfBlocks(Float), 1e-2)], ids=["float32", "mixed"]
)
def test_a_compiled_model_computes_the_same(model: nn.Module, tolerance: float) -> None:
    torch._dynamo.reset()
    both = []
    options = {"inner": "aot_eager", "kernels": "all"}
    for forward in (model, torch.compile(model, backend="mhc", fullgraph=True, options=options)):
        model.zero_grad()
        out = forward(IDS)
        out.square().sum().backward()
        both.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(both[1], both[0], strict=True):
        assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def test_the_report_says_what_was_raised() -> None:
    report = mhc_compile.inspect(Model(Read), IDS, kernels="all")
    assert report.state == "native"
    assert report.refusal is not None
    assert report.refusal.code == "MHC112"
    assert [site.name for site in report.sites] == [f"reads.{i}#0" for i in range(3)]
    text = report.text()
    assert "attention over depth of its own: 3 reads" in text
    assert "1 x 3 queries over 3 sources" in text
    assert "attend_n3_q3_c8_float32" in text


@pytest.mark.parametrize("make", [Read, OtherEps])
def test_convert_refuses_with_its_own_reason(make: Callable[..., Read]) -> None:
    found = captured(Model(make), IDS)
    context = Context()
    gm = apply(Normalize(), found.graph, context)
    with pytest.raises(MHCError, match=r'compile\(model, backend="mhc"\)') as caught:
        apply(Residual(), gm, context)
    assert caught.value.code == "MHC112"
    assert "3 reads of up to 4 earlier values" in caught.value.detail


def compiled(make: Callable[..., Read], **options: Any) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    model = Model(make)
    with torch.no_grad():
        return torch.compile(model, backend="mhc", options={"inner": "eager", **options})(IDS), model(IDS)


def test_the_backend_leaves_another_function_to_the_inner_compiler() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MHCWarning)
        got, want = compiled(OtherEps)
    assert [str(w.message)[:6] for w in caught if issubclass(w.category, MHCWarning)] == ["MHC308"]
    assert torch.equal(got, want)


def test_stream_options_do_not_fit() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(Read, streams=2)
    assert caught.value.inner_exception.code == "MHC304"


def test_bisect_judges_the_kernels() -> None:
    bisection = bisect(Model(Read), IDS, inner="eager", kernels="all")
    assert bisection.finding is None
    assert [step.name for step in bisection.checked] == ["normalize", "native", "fuse", "lower", "kernels"]
