"""Hand-written hyper-connections in many spellings: raised where a convention computes them, else left as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from goldens import graph_text
from stepping import apply, captured, raised
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context
from mhc_compile.passes.native import Native
from mhc_compile.passes.normalize import Normalize

N, C, LAYERS = 3, 8, 2
ITERATIONS = 4
V4 = "streams=3 convention=deepseek_v4 manifold=sinkhorn iterations=4 exit=head"
IDS = torch.arange(10).reshape(2, 5)
Golden = Callable[[str], None]


class Connection(nn.Module):
    """DeepSeek-V4's equations; subclasses change one of them, or its spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(0.3 * torch.randn(2 * N + N * N, N * C))
        self.alpha = nn.Parameter(torch.rand(3) + 0.5)
        self.bias = nn.Parameter(torch.randn(2 * N + N * N))

    def project(self, X: Tensor) -> Tensor:
        v = X.flatten(-2)
        return F.linear(v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6), self.phi)

    def maps(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_pre, z_post, z_mix = self.project(X).split([N, N, N * N], -1)
        b_pre, b_post, b_mix = self.bias.split([N, N, N * N])
        a_pre, a_post, a_mix = self.alpha.unbind(0)
        pre = torch.sigmoid(z_pre * a_pre + b_pre) + 1e-6
        post = 2 * torch.sigmoid(z_post * a_post + b_post)
        logits = (z_mix * a_mix + b_mix).unflatten(-1, (N, N))
        return pre, post, self.sinkhorn(logits)

    def sinkhorn(self, logits: Tensor) -> Tensor:
        M = torch.softmax(logits, -1) + 1e-6
        M = M / (M.sum(-2, keepdim=True) + 1e-6)
        for _ in range(ITERATIONS - 1):
            M = M / (M.sum(-1, keepdim=True) + 1e-6)
            M = M / (M.sum(-2, keepdim=True) + 1e-6)
        return M

    def read(self, X: Tensor, pre: Tensor) -> Tensor:
        return (pre.unsqueeze(-1) * X).sum(-2)

    def write(self, X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ X


class Model(nn.Module):
    """A toy Transformer of `LAYERS` sites that ends in a mean."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, C)
        self.connections = nn.ModuleList(make() for _ in range(LAYERS))
        self.layers = nn.ModuleList(nn.Sequential(nn.RMSNorm(C), nn.Linear(C, C), nn.Tanh()) for _ in range(LAYERS))
        self.head = nn.Linear(C, 11)

    def enter(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, N, -1).contiguous()

    def leave(self, X: Tensor) -> Tensor:
        return X.mean(2)

    def forward(self, ids: Tensor) -> Tensor:
        X = self.enter(self.embed(ids))
        for connection, layer in zip(self.connections, self.layers, strict=True):
            pre, post, comb = connection.maps(X)
            X = connection.write(X, layer(connection.read(X, pre)), post, comb)
        return self.head(self.leave(X))


def specs(context: Context) -> list[str]:
    return [site.spec for site in context.native]


def test_one_site(golden: Golden) -> None:
    model = Model(Connection)
    model.connections, model.layers = model.connections[:1], model.layers[:1]
    context, gm = raised(model, IDS)
    assert [site.name for site in context.native] == ["#0"]
    golden(graph_text(gm) + "\n\n" + "\n".join(context.notes))


class Einsum(Connection):
    def read(self, X: Tensor, pre: Tensor) -> Tensor:
        return torch.einsum("bsn,bsnc->bsc", pre, X)

    def write(self, X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return torch.einsum("bsij,bsic->bsjc", comb, X) + torch.einsum("bsn,bsc->bsnc", post, y)


class Batched(Connection):
    """Products by bmm over flattened tokens, chunk instead of split, a root mean square by division."""

    def project(self, X: Tensor) -> Tensor:
        v = X.reshape(*X.shape[:-2], N * C)
        return torch.matmul(v, self.phi.t()) / torch.sqrt((v * v).sum(-1, keepdim=True) / (N * C) + 1e-6)

    def maps(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors = torch.cat([self.alpha[i].expand(k) for i, k in enumerate((N, N, N * N))])
        out = torch.addcmul(self.bias, self.project(X), factors)
        pre, post = torch.chunk(out[..., : 2 * N].sigmoid(), 2, dim=-1)
        return pre + 1e-6, post + post, self.sinkhorn(out[..., 2 * N :].reshape(-1, N, N))

    def sinkhorn(self, logits: Tensor) -> Tensor:
        powers = torch.exp(logits - logits.max(dim=-1, keepdim=True).values)
        M = powers / powers.sum(-1, keepdim=True) + 1e-6
        for step in range(2 * ITERATIONS - 1):
            M = M / (M.sum(2 - (step + 1) % 2, keepdim=True) + 1e-6)
        return M

    def read(self, X: Tensor, pre: Tensor) -> Tensor:
        return torch.bmm(pre.reshape(-1, 1, N), X.reshape(-1, N, C)).view(*X.shape[:-2], C)

    def write(self, X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        mixed = torch.bmm(comb.mT, X.reshape(-1, N, C))
        return torch.baddbmm(mixed, post.reshape(-1, N, 1), y.reshape(-1, 1, C)).view_as(X)


class Turned(Connection):
    """The projection's parameter stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(self.phi.detach().t().contiguous())

    def project(self, X: Tensor) -> Tensor:
        v = X.flatten(2)
        return F.rms_norm(v, (N * C,), eps=1e-6) @ self.phi


@pytest.mark.parametrize("kind", [Einsum, Turned, Batched])
def test_other_spellings_are_raised(kind: type[Connection]) -> None:
    context, gm = raised(Model(kind), IDS)
    assert specs(context) == [V4] * LAYERS, context.notes
    assert any("exit raised" in note and note.endswith("exit=mean") for note in context.notes)
    assert sum(n.target is torch.ops.mhc.distribute.default for n in gm.graph.nodes) == LAYERS


class Paper(Connection):
    """Columns, then rows; the matrix as it is; no eps."""

    def maps(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, H = super().maps(X)
        return pre - 1e-6, post, H

    def sinkhorn(self, logits: Tensor) -> Tensor:
        M = torch.exp(logits - logits.amax(-2, keepdim=True))
        for _ in range(ITERATIONS):
            M = M / M.sum(-2, keepdim=True)
            M = M / M.sum(-1, keepdim=True)
        return M

    def write(self, X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return super().write(X, y, post, comb.mT)


class Liger(Connection):
    def maps(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, H = super().maps(X)
        return pre - 1e-6, post, H.mT


@pytest.mark.parametrize(("kind", "convention"), [(Paper, "paper"), (Liger, "liger")])
def test_other_conventions(kind: type[Connection], convention: str) -> None:
    context, _ = raised(Model(kind), IDS)
    found = {StreamSpec.parse(text) for text in specs(context)}
    assert [(s.convention.value, s.iterations) for s in found] == [(convention, ITERATIONS)], context.notes


class Unfinished(Connection):
    """The last normalisation of the columns is missing."""

    def sinkhorn(self, logits: Tensor) -> Tensor:
        M = torch.softmax(logits, -1) + 1e-6
        M = M / (M.sum(-2, keepdim=True) + 1e-6)
        for i in range(ITERATIONS - 1):
            M = M / (M.sum(-1, keepdim=True) + 1e-6)
            M = M / (M.sum(-2, keepdim=True) + 1e-6) if i < ITERATIONS - 2 else M
        return M


class Untransposed(Connection):
    def write(self, X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return super().write(X, y, post, comb.mT)


class OtherEps(Connection):
    def project(self, X: Tensor) -> Tensor:
        return (
            super().project(X + 0.0) if X.ndim < 3 else F.linear(F.rms_norm(X.flatten(2), (N * C,), eps=3e-6), self.phi)
        )


class OtherMagnitude(Connection):
    def maps(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = super().maps(X)
        return pre, 0.99 * post, comb


class Detached(Connection):
    """The values of a convention, without its gradients."""

    def sinkhorn(self, logits: Tensor) -> Tensor:
        return super().sinkhorn(logits).detach()


class WithoutGradients(Connection):
    def sinkhorn(self, logits: Tensor) -> Tensor:
        with torch.no_grad():
            return super().sinkhorn(logits)


class Dropped(Connection):
    def sinkhorn(self, logits: Tensor) -> Tensor:
        return F.dropout(super().sinkhorn(logits), 1e-12, training=True)


class SharedGain(Connection):
    """One more parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def maps(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = super().maps(X)
        return pre * self.gain, post, comb


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Unfinished, "no convention computes its numbers; nearest is"),
        (Untransposed, "no convention computes its numbers; nearest is"),
        (OtherEps, "no convention computes its numbers; nearest is"),
        (OtherMagnitude, "no convention computes its numbers; nearest is"),
        (Detached, "no convention computes its numbers; nearest is"),
        (WithoutGradients, ""),
        (Dropped, ""),
        (SharedGain, "beside phi it reads"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_near_misses_are_left_alone(kind: type[Connection], reason: str) -> None:
    context, gm = raised(Model(kind), IDS)
    assert specs(context) == []
    assert not any("mhc.coefficients" in str(n.target) for n in gm.graph.nodes)
    assert [note for note in context.notes if "left alone" in note and reason in note], context.notes


class OneOff(Model):
    """One site of several is none of ours."""

    def __init__(self) -> None:
        super().__init__(Connection)
        self.connections[0] = Unfinished()


def test_each_site_stands_for_itself() -> None:
    context, gm = raised(OneOff(), IDS)
    assert specs(context) == [V4]
    assert sum("left alone" in note for note in context.notes) == 1
    assert sum(n.target is torch.ops.mhc.coefficients.default for n in gm.graph.nodes) == 1


class Ends(Model):
    """Other ways in and out."""

    def __init__(self, way: str) -> None:
        super().__init__(Connection)
        self.way = way
        self.fn = nn.Parameter(0.3 * torch.randn(N, N * C))
        self.base = nn.Parameter(torch.randn(N))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def enter(self, x: Tensor) -> Tensor:
        return torch.stack([x] * N, dim=-2) if self.way == "sum" else x[:, :, None].repeat(1, 1, N, 1)

    def leave(self, X: Tensor) -> Tensor:
        if self.way == "sum":
            return X.sum(dim=-2)
        if self.way == "first":
            return X[:, :, 0]
        v = X.flatten(2)
        weights = torch.sigmoid(F.linear(F.rms_norm(v, (N * C,), eps=1e-6), self.fn) * self.scale + self.base) + 1e-6
        return torch.einsum("bsnc,bsn->bsc", X, weights)


@pytest.mark.parametrize("way", ["sum", "head", "first"])
def test_ends(way: str) -> None:
    context, gm = raised(Ends(way), IDS)
    assert specs(context) == [V4] * LAYERS
    reduced = [n for n in gm.graph.nodes if n.target is torch.ops.mhc.reduce.default]
    assert [StreamSpec.parse(n.args[1]).exit for n in reduced] == ([] if way == "first" else [way])
    assert sum(n.target is torch.ops.mhc.expand.default for n in gm.graph.nodes) == 1


def test_half_precision_keeps_the_models_casts() -> None:
    class Rounds(Connection):
        def project(self, X: Tensor) -> Tensor:
            v = X.flatten(2).float()
            return F.linear(v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6), self.phi.float())

        def read(self, X: Tensor, pre: Tensor) -> Tensor:
            return super().read(X, pre).to(X.dtype)

        def write(self, X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
            return super().write(X, y, post.to(X.dtype), comb.to(X.dtype))

    found = captured(Model(Rounds).bfloat16(), IDS)
    context = Context()
    gm = apply(Native(), apply(Normalize(), found.graph, context), context)
    assert specs(context) == [V4] * LAYERS
    for node in gm.graph.nodes:
        if node.target is torch.ops.mhc.distribute.default:
            assert [n.meta["example_value"].dtype for n in node.args] == [torch.bfloat16] * 4
            assert [n.target for n in node.args[2:]] == ["to", "to"]


def test_a_model_without_streams_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C))
    context, _ = raised(model, torch.randn(2, 5, C, dtype=torch.float64))
    assert (context.native, context.notes) == ([], [])
