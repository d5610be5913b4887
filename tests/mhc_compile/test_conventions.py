"""Conversion between conventions, and parity with Hugging Face's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextHyperConnection, Glm5NextTextHyperHead
from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead

from mhc_compile.conventions import (
    Conversion,
    convert_head,
    convert_site,
    head_from_transformers,
    head_to_transformers,
    site_from_transformers,
    site_to_transformers,
)
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import reference
from mhc_compile.kernels.forms import start_values
from mhc_compile.kernels.spec import Convention, Manifold, StreamSpec
from mhc_compile.kernels.start import Start, start_head

C = 12
V4, PAPER = Convention.DEEPSEEK_V4, Convention.PAPER


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(spec: StreamSpec, std: float = 0.5, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """phi, alpha and bias whose logits have about the given deviation."""
    n = spec.streams
    phi = std * normal(spec.rows, n * C, seed=seed) / (n * C) ** 0.5
    return phi, torch.ones(3, dtype=torch.float64), std * normal(spec.rows, seed=seed + 1)


def difference(before: tuple[Tensor, ...], source: StreamSpec, after: tuple[Tensor, ...], target: StreamSpec) -> float:
    X = normal(100, source.streams, C, seed=7)
    maps = [reference.coefficients(X, *p, s) for p, s in ((before, source), (after, target))]
    return max((a - b).abs().max().item() for a, b in zip(*maps, strict=True))


def convert(source: StreamSpec, target: StreamSpec, **options: Any) -> tuple[float, Conversion]:
    given = parameters(source, **{k: options.pop(k) for k in ("std", "seed") if k in options})
    *new, conversion = convert_site(*given, source, target, **options)
    assert all(t.data_ptr() != g.data_ptr() for t, g in zip(new, given, strict=True))
    return difference(given, source, tuple(new), target), conversion


@pytest.mark.parametrize("manifold", get_args(Manifold))
@pytest.mark.parametrize(("a", "b"), product(Convention, Convention))
def test_every_pair_of_conventions(a: Convention, b: Convention, manifold: Manifold) -> None:
    source, target = (StreamSpec(convention=c, manifold=manifold) for c in (a, b))
    if a.fields.deferred != b.fields.deferred:  # the maps are alike, but weigh the streams of different sites
        with pytest.raises(MHCError, match=r"MHC205 .*of the site before"):
            convert(source, target)
        return
    there, conversion = convert(source, target)
    assert there <= 3 * conversion.bound + 1e-14
    assert conversion.bound < 1e-4
    assert conversion.exact == (conversion.bound < 1e-12)
    assert ("the same function" in conversion.why) == conversion.exact
    assert "256 tokens from N(0, 1)" in conversion.why


def test_v4_and_the_paper_within_eps_but_not_untransposed() -> None:
    source, target = StreamSpec(convention=V4), StreamSpec()
    given = parameters(source, std=1.0)
    phi, alpha, bias, conversion = convert_site(*given, source, target)
    assert conversion.bound < 1e-4
    assert not conversion.exact
    assert "eps" in conversion.why
    assert torch.equal(phi[8:].view(4, 4, -1), given[0][8:].view(4, 4, -1).transpose(0, 1))
    assert difference(given, source, given, target) > 0.1
    back = convert_site(phi, alpha, bias, target, source)
    for got, want in zip(back[:3], given, strict=True):
        assert torch.equal(got, want)


def test_slow_convergence_is_measured_and_refused_beyond_the_tolerance() -> None:
    source, target = StreamSpec(), StreamSpec(convention=Convention.MEGATRON_MAIN)
    with pytest.raises(MHCError, match="larger `tolerance`") as caught:
        convert(source, target, std=6.0)
    assert caught.value.code == "MHC205"
    there, conversion = convert(source, target, std=6.0, tolerance=1.0)
    assert 1e-2 < conversion.bound < 1.0
    assert "rows of H first" in conversion.why
    assert there < 1.0


def test_iterations_are_compared() -> None:
    with pytest.raises(MHCError, match="20 and 0 iterations"):
        convert(StreamSpec(), StreamSpec(iterations=0))
    _, conversion = convert(StreamSpec(), StreamSpec(iterations=40))
    assert conversion.bound < 1e-6


@pytest.mark.parametrize("n", [2, 4, 8])
def test_kronecker_is_a_case_of_sinkhorn(n: int) -> None:
    source = StreamSpec(streams=n, manifold="kronecker")
    for convention in (c for c in Convention if not c.fields.deferred):
        there, conversion = convert(source, StreamSpec(streams=n, convention=convention), std=1.0)
        assert conversion.bound < 1e-4
        assert there <= 3 * conversion.bound + 1e-14
    _, conversion = convert(source, StreamSpec(streams=n, iterations=1), std=1.0)
    assert conversion.exact
    assert conversion.bound < 1e-13
    with pytest.raises(MHCError, match="does not normalise"):
        convert(source, StreamSpec(streams=n, iterations=0), std=1.0)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("manifold", ["kronecker", "circulant"])
def test_some_mixtures_are_a_case_of_permutations(n: int, manifold: Manifold) -> None:
    source, target = (StreamSpec(streams=n, manifold=m) for m in (manifold, "permutations"))
    _, conversion = convert(source, target, std=1.0)
    assert conversion.bound < 1e-10
    assert conversion.exact == (n == 2)


def test_two_streams_mix_by_one_number() -> None:
    names: tuple[Manifold, ...] = ("sinkhorn", "kronecker", "permutations", "circulant")
    for a, b in product(names, names):
        there, conversion = convert(StreamSpec(streams=2, manifold=a), StreamSpec(streams=2, manifold=b))
        assert conversion.bound < 1e-6
        assert there < 1e-5


@pytest.mark.parametrize("manifold", get_args(Manifold))
def test_the_identity_lies_in_every_manifold(manifold: Manifold) -> None:
    source, target = StreamSpec(manifold="identity"), StreamSpec(manifold=manifold)
    there, conversion = convert(source, target)
    assert max(there, conversion.bound) < 1e-11
    assert conversion.exact == (manifold in ("identity", "unconstrained"))


@pytest.mark.parametrize("manifold", ["sinkhorn", "identity", "permutations", "kronecker"])
def test_a_single_stream_has_one_matrix(manifold: Manifold) -> None:
    for other in get_args(Manifold):
        there, conversion = convert(StreamSpec(streams=1, manifold=manifold), StreamSpec(streams=1, manifold=other))
        assert conversion.exact
        assert max(there, conversion.bound) < 1e-13


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (StreamSpec(), StreamSpec(streams=2), "numbers of streams"),
        (StreamSpec(), StreamSpec(manifold="identity"), "mixing would be lost"),
        (StreamSpec(), StreamSpec(manifold="permutations"), "parameters"),
        (StreamSpec(), StreamSpec(manifold="kronecker"), "4 parameters"),
        (StreamSpec(), StreamSpec(manifold="unconstrained"), "linear"),
        (StreamSpec(manifold="unconstrained"), StreamSpec(), "linear"),
        (StreamSpec(manifold="permutations"), StreamSpec(), "permutations"),
        (StreamSpec(streams=1, manifold="unconstrained"), StreamSpec(streams=1), "linear"),
    ],
)
def test_what_is_no_function_of_the_parameters(source: StreamSpec, target: StreamSpec, reason: str) -> None:
    with pytest.raises(MHCError, match=reason) as caught:
        convert_site(*parameters(source), source, target)
    assert caught.value.code == "MHC205"


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="24 rows"):
        convert_site(*parameters(StreamSpec(manifold="identity")), StreamSpec(), StreamSpec(convention=V4))


def test_small_streams_show_the_eps_of_the_norm() -> None:
    source, target = StreamSpec(convention=V4), StreamSpec(convention=Convention.GLM5_NEXT)
    _, large = convert(source, target)
    _, small = convert(source, target, sample=1e-2 * normal(50, 4, C), tolerance=1.0)
    assert small.bound > 100 * large.bound
    assert "50 tokens given" in small.why


def test_dtypes_are_kept() -> None:
    source, target = StreamSpec(convention=V4), StreamSpec()
    phi, alpha, bias = (t.float() for t in parameters(source))
    *new, conversion = convert_site(phi.bfloat16(), alpha, bias.requires_grad_(), source, target)
    assert [t.dtype for t in new] == [torch.bfloat16, torch.float32, torch.float32]
    assert not any(t.requires_grad for t in new)
    assert conversion.bound < 1e-4


def test_heads() -> None:
    head, mean, total = (StreamSpec(convention=V4, exit=e) for e in ("head", "mean", "sum"))
    made, conversion = convert_head(None, mean, head, hidden=C)
    X = normal(5, 4, C)
    assert made is not None
    torch.testing.assert_close(reference.reduce(X, head, made), X.mean(-2), atol=1e-6, rtol=0)
    assert conversion.exact
    assert conversion.bound < 1e-6
    given = start_head(head, C, Start(scratch=True, paper=True))
    kept, conversion = convert_head(given, head, StreamSpec(exit="head"), hidden=C)
    assert kept is not None
    assert all(torch.equal(a, b) for a, b in zip(kept, given, strict=True))
    assert 1e-7 < conversion.bound < 1e-5
    assert convert_head(None, mean, mean, hidden=C)[0] is None
    single = StreamSpec(streams=1, convention=V4)
    assert not convert_head(None, single, StreamSpec(streams=1, convention=V4, exit="head"), hidden=C)[1].exact
    for source, target, value in ((head, mean, given), (total, head, None), (mean, total, None)):
        with pytest.raises(MHCError) as caught:
            convert_head(value, source, target, hidden=C)
        assert caught.value.code == "MHC205"
    with pytest.raises(MHCError, match="numbers of streams"):
        convert_head(None, mean, StreamSpec(streams=2), hidden=C)
    with pytest.raises(ValueError, match="head"):
        convert_head(None, head, head, hidden=C)


@contextmanager
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their modules cast with `.float()`: let it keep float64, so that both sides can be compared exactly."""
    cast = torch.Tensor.float
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else cast(t))
        yield


def their_site(kind: str, iterations: int = 20, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    make: Callable[..., nn.Module]
    config: Any
    if kind == "deepseek_v4":
        config, make = (
            DeepseekV4Config(hidden_size=C, hc_sinkhorn_iters=iterations, **changes),
            DeepseekV4HyperConnection,
        )
    elif kind == "hy_v4":
        config, make = HYV4Config(hidden_size=C, **changes), HYV4HyperConnection
    else:
        config = Glm5NextTextConfig(hidden_size=C, hc_sinkhorn_iters=iterations, **changes)
        make = Glm5NextTextHyperConnection
    module = make(config)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, 0.3 if p.dim() > 1 else 0.7)
    return module


def their_step(module: nn.Module, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The branch input and the next streams, as their decoder layer computes them."""
    dtype = X.dtype
    if isinstance(module, HYV4HyperConnection):
        post, h = module(X)
        return h, (post.float().unsqueeze(-1) * y.float().unsqueeze(-2) + X.float()).to(dtype)
    post, comb, h = module(X)
    return h, post.to(dtype).unsqueeze(-1) * y.unsqueeze(-2) + comb.to(dtype).transpose(-1, -2) @ X


def our_step(module: nn.Module, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    phi, alpha, bias, spec = site_from_transformers(module)
    pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
    return reference.aggregate(X, pre), reference.distribute(X, y, post, H)


def step_and_gradients(step: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, X: Tensor) -> list[Tensor]:
    rng = torch.Generator().manual_seed(5)
    y, seen_h, seen_X = (
        torch.randn(s, generator=rng, dtype=torch.float64) for s in (X[..., 0, :].shape,) * 2 + (X.shape,)
    )
    X, y = X.detach().requires_grad_(), y.to(X.dtype).requires_grad_()
    h, out = step(module, X, y)
    loss = (h.double() * seen_h).sum() + (out.double() * seen_X).sum()
    return [h, out, *torch.autograd.grad(loss, (X, y, *module.parameters()))]


@pytest.mark.parametrize("kind", ["deepseek_v4", "glm5_next"])
@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_parity_with_hugging_face_in_float64(kind: str, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, X = their_site(kind, iterations).double(), normal(2, 5, 4, C)
    spec = site_from_transformers(module)[3]
    assert (spec.convention.value, spec.streams, spec.iterations) == (kind, 4, max(1, iterations))
    assert spec.exit == ("head" if kind == "deepseek_v4" else "mean")
    with in_float64(monkeypatch):
        theirs = step_and_gradients(their_step, module, X)
    for ours, want in zip(step_and_gradients(our_step, module, X), theirs, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)


def test_parity_with_hy_v4_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    module, X = their_site("hy_v4").double(), normal(2, 5, 4, C)
    phi, alpha, bias, spec = site_from_transformers(module)
    assert (spec.convention.value, spec.manifold, spec.exit) == ("hy_v4", "identity", "head")
    with in_float64(monkeypatch):
        theirs = step_and_gradients(their_step, module, X)
        head = HYV4HyperHead(HYV4Config(hidden_size=C)).double()
        for p in head.parameters():
            torch.nn.init.normal_(p, 0.0, 0.5)
        reduced = head(X)
    for ours, want in zip(step_and_gradients(our_step, module, X), theirs, strict=True):
        torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(reference.reduce(X, spec, head_from_transformers(head)), reduced, atol=1e-12, rtol=1e-12)
    module.load_state_dict(site_to_transformers(phi, alpha, bias, spec))
    with pytest.raises(MHCError, match=r"magnitude 1\.5") as caught:
        site_from_transformers(their_site("hy_v4", hc_magnitude=1.5))
    assert caught.value.code == "MHC202"


@pytest.mark.parametrize("kind", ["deepseek_v4", "glm5_next", "hy_v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_rounding_is_no_worse_than_theirs(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = their_site(kind)
    X = normal(4, 32, 4, C).to(dtype)
    theirs, ours = (step_and_gradients(step, module, X) for step in (their_step, our_step))
    with in_float64(monkeypatch):
        exact = step_and_gradients(their_step, module.double(), X.double())
    for got, other, want in zip(ours, theirs, exact, strict=True):
        error, allowed = ((t.double() - want).square().mean().sqrt() for t in (got, other))
        assert error <= 2 * allowed


def test_the_heads_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    head = DeepseekV4HyperHead(DeepseekV4Config(hidden_size=C)).double()
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(0.0, 0.5)
    spec, X = StreamSpec(convention=V4, exit="head"), normal(2, 5, 4, C).requires_grad_()
    leaves = (X, *head.parameters())
    with in_float64(monkeypatch):
        want = head(X)
        want_grads = torch.autograd.grad(want.square().sum(), leaves)
    got = reference.reduce(X, spec, head_from_transformers(head))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), leaves), want_grads, atol=1e-12, rtol=1e-12)
    head.load_state_dict(head_to_transformers(head_from_transformers(head)))
    glm = StreamSpec(convention=Convention.GLM5_NEXT)
    torch.testing.assert_close(reference.reduce(X, glm), Glm5NextTextHyperHead()(X), atol=1e-12, rtol=1e-12)


def test_a_site_goes_to_hugging_face_and_back() -> None:
    source, target = StreamSpec(), StreamSpec(convention=V4)
    *new, _ = convert_site(*start_values(source, 0, C, Start(scratch=True, paper=True)).values(), source, target)
    module = their_site("deepseek_v4")
    module.load_state_dict(site_to_transformers(*new, target))
    for got, want in zip(site_from_transformers(module)[:3], new, strict=True):
        assert torch.equal(got, want)
    for spec in (source, StreamSpec(convention=V4, manifold="identity"), StreamSpec(convention=V4, iterations=0)):
        with pytest.raises(MHCError, match="convert_site first"):
            site_to_transformers(*parameters(spec), spec)


def test_unknown_eps_is_refused() -> None:
    with pytest.raises(MHCError, match=r"rms eps 0\.001") as caught:
        site_from_transformers(their_site("deepseek_v4", rms_norm_eps=1e-3))
    assert caught.value.code == "MHC202"
