"""The search for residual adds: what looks like one inside a branch is none."""

from collections.abc import Callable

import pytest
import torch
from goldens import graph_text, streams_text
from recipes import Recipe
from stepping import analysed, normal, stepped
from torch import Tensor, nn
from torch.nn import functional as F
from toys import toy

from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, is_tensor, op_name, source_line
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.residual import Residual
from mhc_compile.passes.residual_sites import SiteSearch

Golden = Callable[[str], None]
WIDTH, TOKENS = 8, 4


class Rotary(nn.Module):
    """Attention whose queries and keys are rotated: `q * cos + rotate(q) * sin`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        angle = torch.arange(TOKENS)[:, None] / 10.0 ** torch.arange(WIDTH // 2)
        self.register_buffer("cos", torch.cos(angle).repeat(1, 2))
        self.register_buffer("sin", torch.sin(angle).repeat(1, 2))

    def rotate(self, q: Tensor) -> Tensor:
        left, right = q.chunk(2, -1)
        return (q * self.cos) + (torch.cat([-right, left], -1) * self.sin)

    def forward(self, h: Tensor) -> Tensor:
        q, k = self.rotate(self.q(h)), self.rotate(self.k(h))
        return self.out(F.scaled_dot_product_attention(q, k, self.v(h), is_causal=True))


class StateSpace(nn.Module):
    """A scan with Mamba's skip: `y + D * u`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.steps = nn.Linear(WIDTH, WIDTH)
        self.D = nn.Parameter(torch.ones(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        u, z = self.inside(h).chunk(2, -1)
        u = F.silu(u)
        y = torch.cumsum(F.softplus(self.steps(u)) * u, 1)
        return self.out((y + u * self.D) * F.silu(z))


class Experts(nn.Module):
    """A sum over chosen experts plus a shared one; the variable is called `residuals`, as in published code."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        residuals = h
        weights = torch.softmax(self.router(h), -1)
        routed = torch.zeros_like(h).flatten(0, 1)
        everyone = torch.arange(routed.shape[0])
        for i, expert in enumerate(self.experts):
            routed.index_add_(0, everyone, (expert(h) * weights[..., i, None]).flatten(0, 1))
        return routed.view(h.shape) + self.shared(residuals)


class Adapter(nn.Module):
    """A bottleneck around the branch's own output: `y + up(down(y))`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        y = self.first(h)
        return y + self.up(torch.relu(self.down(y)))


class ShortConvolution(nn.Module):
    """A causal convolution over tokens with a skip around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        u = self.inside(h)
        u = u + self.conv(u.transpose(1, 2))[..., :TOKENS].transpose(1, 2)
        return self.out(u)


class InputSkip(nn.Module):
    """A skip around a layer of the branch from the branch's very input: `h + f(h)`, then on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.first(h)
        return self.out(torch.relu(h))


class Model(nn.Module):
    def __init__(self, branch: type[nn.Module], layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.branches = nn.ModuleList(branch() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(norm(x))  # the only addition to the stream
        return self.head(x)


LOOKALIKES = [Rotary, StateSpace, Experts, Adapter, ShortConvolution, InputSkip]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("branch", LOOKALIKES)
def test_lookalikes_inside_a_branch_are_no_sites(branch: type[nn.Module], layers: int) -> None:
    model = Model(branch, layers).double()
    ids = torch.randint(0, 11, (2, TOKENS))
    out = stepped(model, StreamSpec(streams=4), ids)
    (stream,) = out.streams
    assert [site.name for site in stream.sites] == [f"#{i}" for i in range(layers)]
    for a, b in zip(out.at_start, out.outputs["captured"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("branch", LOOKALIKES)
def test_sites_are_the_lines_that_add_to_the_stream(branch: type[nn.Module]) -> None:
    _, (stream,) = analysed(Model(branch, 2), torch.randint(0, 11, (2, TOKENS)))
    for site in stream.sites:
        assert source_line(site.add).endswith(
            "in forward: x = x + branch(norm(x))  # the only addition to the stream"
        ), source_line(site.add)


@pytest.mark.parametrize("branch", LOOKALIKES)
def test_lookalikes_are_there_to_be_mistaken(branch: type[nn.Module]) -> None:
    gm = normal(Model(branch, 1), torch.randint(0, 11, (2, TOKENS)))
    adds = [n for n in gm.graph.nodes if op_name(n) == "add" and is_tensor(n) and len(n.all_input_nodes) == 2]
    assert len(adds) >= 2


def test_the_notes_say_what_was_left_alone() -> None:
    gm = normal(Model(Adapter, 2), torch.randint(0, 11, (2, TOKENS)))
    context = Context()
    Residual().apply(gm, context)
    left = [n for n in context.notes if "adds within the branch of another site: left alone" in n]
    assert len(left) == 2


def found(recipe: Recipe) -> str:
    model, ids = toy(recipe)
    gm, streams = analysed(model, ids)
    return f"{graph_text(gm)}\n\n{streams_text(gm, streams)}"


def test_parallel(golden: Golden) -> None:
    golden(found(Recipe(style="parallel", layers=1)))


def test_tree(golden: Golden) -> None:
    golden(found(Recipe(style="tree", layers=1, carry="doubled")))


def test_scaled_carry(golden: Golden) -> None:
    golden(found(Recipe(layers=1, carry="affine", branch="layer_scale")))


def test_embedding_in_stream(golden: Golden) -> None:
    golden(found(Recipe(style="single", layers=2, extra="embedding_in_stream")))


def test_norm_written_out(golden: Golden) -> None:
    golden(found(Recipe(style="post", layers=1, norm="layer_by_hand")))


class Spelt(nn.Module):
    """Two layers around the stream, the second as the test spells it."""

    def __init__(self, second: Callable[["Spelt", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.second = second
        self.embed = nn.Embedding(11, WIDTH)
        self.f, self.g, self.h = (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        x = e + self.f(e)
        return self.head(self.second(self, x, e))


def read_again(m: Spelt, x: Tensor, e: Tensor) -> Tensor:
    y = x + m.g(x)
    return (y + m.h(e)) * torch.sigmoid(y)


SECOND = {
    "branch first": (lambda m, x, _: m.g(x) + x, 2),
    "tree, carry last": (lambda m, x, _: m.g(x) + (m.h(x) + x), 2),
    "tree, carry in the middle": (lambda m, x, _: (m.g(x) + x) + m.h(x), 2),
    "tree of a doubled carry": (lambda m, x, _: (x + x) + m.g(x) + m.h(x), 2),
    "tree through the layer before": (lambda m, x, e: x + m.g(e), 1),
    "sum of a list": (lambda m, x, _: sum([x, m.g(x), m.h(x)]), 2),
    "older value through a layer": (read_again, 3),
    "older value beside the branch": (lambda m, x, e: x + (m.g(x) + m.h(e)), 2),
    "older value in a tree": (lambda m, x, e: (x + m.g(x)) + m.h(e), 2),
    "older value as it is": (lambda _, x, e: x + e, 1),
    "older value scaled": (lambda _, x, e: x + 0.5 * e, 1),
    "copy of an older value": (lambda _, x, e: x + e.clone(), 1),
    "no layer": (lambda _, x, __: x + torch.relu(x), 1),
    "itself": (lambda _, x, __: x + x, 1),
    "weights alone": (lambda m, x, _: x + m.head.weight[0], 1),
}


@pytest.mark.parametrize(("second", "sites"), SECOND.values(), ids=SECOND)
def test_what_is_a_site(second: Callable[[Spelt, Tensor, Tensor], Tensor], sites: int) -> None:
    out = stepped(Spelt(second).double(), StreamSpec(streams=3), torch.randint(0, 11, (2, TOKENS)))
    assert [len(s.sites) for s in out.streams] == [sites]
    for a, b in zip(out.at_start, out.outputs["captured"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_carry_is_chosen_by_structure_not_by_place() -> None:
    for spelling in ("branch first", "tree, carry last", "tree, carry in the middle"):
        _, (stream,) = analysed(Spelt(SECOND[spelling][0]), torch.randint(0, 11, (2, TOKENS)))
        assert stream.sites[1].carry is stream.sites[0].add, spelling


def test_nothing_to_find() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) + 1.0

    gm = normal(Chain(), torch.randn(2, TOKENS, WIDTH))
    before = str(gm.graph)
    assert SiteSearch(Dataflow(gm.graph, is_owned), []).find() == []
    assert str(gm.graph) == before
