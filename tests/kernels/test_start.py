"""The start keeps the residual network's function, separates the streams, and comes in every shape."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from mhc_compile.kernels import reference
from mhc_compile.kernels.forms import start_values
from mhc_compile.kernels.spec import Convention, Manifold, StreamSpec
from mhc_compile.kernels.start import SINGLE, WIDTH, Start, start_bias, start_head, start_pre

SITES, C = 12, 16
SCRATCH = Start(scratch=True, paper=True)


def branches(dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(C, C, generator=rng, dtype=torch.float64) / C**0.5).to(dtype) for _ in range(SITES)]


def residual(x: Tensor, weights: list[Tensor]) -> Tensor:
    for w in weights:
        x = x + torch.tanh(x @ w)
    return x


def widened(x: Tensor, weights: list[Tensor], sites: list[tuple[Tensor, Tensor, Tensor]], spec: StreamSpec) -> Tensor:
    X = reference.expand(x, spec.streams)
    for w, parameters in zip(weights, sites, strict=True):
        pre, post, H = reference.coefficients(X, *parameters, spec)
        X = reference.distribute(X, torch.tanh(reference.aggregate(X, pre) @ w), post, H)
    return X


def legal_streams(manifold: Manifold) -> list[int]:
    return {"kronecker": [2, 4, 8], "permutations": [2, 4]}.get(manifold, [2, 3, 4, 8])


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("manifold", get_args(Manifold))
def test_the_residual_function_is_kept(convention: Convention, manifold: Manifold) -> None:
    weights = branches(torch.float64)
    x = torch.randn(10, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = residual(x, weights)
    for n in legal_streams(manifold):
        spec = StreamSpec(streams=n, convention=convention, manifold=manifold)
        out = widened(x, weights, [[*start_values(spec, i, C).values()] for i in range(SITES)], spec)
        exact = convention.fields.sinkhorn_eps == 0 or convention is Convention.MEGATRON_MAIN or manifold != "sinkhorn"
        # An eps in the divisors loses about 1e-6 at every site; float32 biases lose 1e-7 in `pre`.
        bound = (2e-6 if exact else 3e-6 * SITES) * want.abs().max()
        assert (reference.reduce(out, spec) - want).abs().max() < bound
        head = StreamSpec(streams=n, convention=convention, exit="head")
        assert (reference.reduce(out, head, start_head(head, C)) - want).abs().max() < bound


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("manifold", get_args(Manifold))
def test_a_single_stream_is_nearly_kept(convention: Convention, manifold: Manifold) -> None:
    weights = branches(torch.float64)
    x = torch.randn(10, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spec = StreamSpec(streams=1, convention=convention, manifold=manifold)
    out = reference.reduce(
        widened(x, weights, [[*start_values(spec, i, C).values()] for i in range(SITES)], spec), spec
    )
    want = residual(x, weights)
    assert (out - want).abs().max() < 1e-3 * want.abs().max()
    assert start_bias(spec, 3)[0] == SINGLE


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("n", range(1, 9))
def test_the_maps_at_the_start(convention: Convention, n: int) -> None:
    spec = StreamSpec(streams=n, convention=convention)
    X = torch.randn(2, n, C, generator=torch.Generator().manual_seed(n))
    for index in range(n + 1):
        pre, post, H = reference.coefficients(X, *start_values(spec, index, C).values(), spec)
        torch.testing.assert_close(
            post, torch.ones_like(post), atol=1.2e-7 if convention.fields.post_eps else 0, rtol=0
        )
        torch.testing.assert_close(pre[0], start_pre(spec, index).float(), atol=1e-6, rtol=0)
        assert n == 1 or pre[0].argmax() == index % n
        assert pre[0].sum() == pytest.approx(1.0, abs=4e-4 if n == 1 else 1e-6)
        torch.testing.assert_close(H[0], torch.eye(n), atol=4e-4 * n, rtol=0)


def test_four_streams_read_mostly_one() -> None:
    assert start_pre(StreamSpec(), 2).tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1])


@pytest.mark.parametrize("manifold", get_args(Manifold))
def test_mixing_starts_near_the_identity(manifold: Manifold) -> None:
    for n in legal_streams(manifold):
        spec = StreamSpec(streams=n, manifold=manifold)
        _, _, H = reference.coefficients(torch.randn(1, n, C), *start_values(spec, 0, C).values(), spec)
        # n! - 1 off entries of exp(-8) weigh 0.04 at five streams.
        assert (H - torch.eye(n)).abs().max() < (0 if manifold in ("identity", "unconstrained") else 0.05) + 1e-9


def test_streams_separate_because_pre_is_not_uniform() -> None:
    weights = branches(torch.float32)[:6]
    x = torch.randn(32, C, generator=torch.Generator().manual_seed(1))
    goal = torch.randn(32, C, generator=torch.Generator().manual_seed(2))
    spec = StreamSpec(iterations=1)
    separation = {}
    for uniform in (False, True):
        sites = [[*start_values(spec, i, C).values()] for i in range(6)]
        for _, _, bias in sites:
            if uniform:
                bias[:4] = -math.log(3.0)
        leaves = [t.requires_grad_() for parameters in sites for t in parameters]
        optimizer = torch.optim.AdamW(leaves, lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (reference.reduce(widened(x, weights, sites, spec), spec) - goal).square().mean()
            loss.backward()
            optimizer.step()
        X = widened(x, weights, sites, spec).detach()
        separation[uniform] = ((X - X.mean(-2, keepdim=True)).abs().max() / X.abs().max()).item()
    assert separation[True] < 1e-5
    assert separation[False] > 50 * separation[True]


@pytest.mark.parametrize("scratch", [False, True])
def test_alpha(scratch: bool) -> None:
    """Coefficients learn at once; above a width alpha falls, so that a step moves logits by no more."""
    begin = Start(scratch=scratch)
    for hidden in (8, WIDTH // 4, 2 * WIDTH):
        phi, alpha, _ = start_values(StreamSpec(), 0, hidden, begin).values()
        assert not phi.any()
        assert alpha.tolist() == [*[min(1.0, WIDTH / (4 * hidden))] * 2, pytest.approx(0.01)]
    published = start_values(StreamSpec(), 0, 8, Start(scratch=scratch, paper=True))["alpha"]
    assert published.tolist() == [pytest.approx(0.01)] * 3


def test_the_published_start_from_scratch() -> None:
    spec = StreamSpec(streams=8)
    torch.manual_seed(0)
    phi, alpha, bias = start_values(spec, 0, 64, SCRATCH).values()
    assert (phi.shape, alpha.tolist(), bias.shape) == ((80, 512), [pytest.approx(0.01)] * 3, (80,))
    assert phi.std() == pytest.approx(0.02, rel=0.05)
    torch.manual_seed(0)
    again = start_values(spec, 0, 64, SCRATCH)["phi"]
    assert torch.equal(phi, again)
    fn, base, scale = start_head(spec, 64, SCRATCH)
    assert fn.std() == pytest.approx(0.02, rel=0.1)
    assert (base.shape, scale.tolist()) == ((8,), [1.0])
    assert all(t.dtype == torch.float32 for t in (phi, alpha, bias, fn, base, scale))
