"""The mathematics of the streams against an independent per-token version, its algebra, and published facts."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import MAX_PERMUTATION_STREAMS, Convention, Manifold, StreamSpec

FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def legal(**fixed: Any) -> st.SearchStrategy[StreamSpec]:
    """Every legal specification with the given fields fixed."""

    def build(convention: Convention, manifold: Manifold, n: int, iterations: int) -> StreamSpec:
        if manifold == "permutations":
            n = min(n, MAX_PERMUTATION_STREAMS)
        if manifold == "kronecker":
            n = 1 << (n.bit_length() - 1)
        return StreamSpec(streams=n, convention=convention, manifold=manifold, iterations=iterations)

    return st.builds(
        build,
        convention=st.sampled_from(Convention),
        manifold=st.sampled_from([fixed["manifold"]] if "manifold" in fixed else list(get_args(Manifold))),
        n=st.integers(1, 8),
        iterations=st.sampled_from([0, 1, 2, 20]),
    )


def site(
    spec: StreamSpec, seed: int, lead: tuple[int, ...] = (3, 2), C: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, phi, alpha and bias of one random site."""
    rng = torch.Generator().manual_seed(seed)
    n = spec.streams
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(*lead, n, C, generator=rng, dtype=torch.float64).to(dtype),
        (0.5 * torch.randn(spec.rows, n * C, generator=rng, dtype=torch.float64)).to(parameters),
        torch.rand(3, generator=rng, dtype=torch.float64).to(parameters),
        torch.randn(spec.rows, generator=rng, dtype=torch.float64).to(parameters),
    )


TRANSPOSED = ("deepseek_v4", "glm5_next", "hy_v4", "deepseek_v41")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def token(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec) -> tuple[list[Any], list[Any], Tensor]:
    """One token's pre, post and H, written down element by element with Python's own floats."""
    n, name = spec.streams, spec.convention.value
    v = [float(x) for x in X.reshape(-1)]
    square = sum(x * x for x in v) / len(v)
    inside = 1e-5 if name in ("glm5_next", "hy_v4") else 1e-6
    r = math.sqrt(square) + 1e-6 if name == "megatron_main" else math.sqrt(square + inside)
    z = [sum(float(w) * x for w, x in zip(row, v, strict=True)) / r for row in phi]
    scale = [*[float(alpha[0])] * n, *[float(alpha[1])] * n, *[float(alpha[2])] * spec.mix_rows]
    out = [s * a + float(b) for s, a, b in zip(scale, z, bias, strict=True)]
    eps = 1e-6 if name in TRANSPOSED else 0.0
    pre = [sigmoid(o) + eps for o in out[:n]]
    post = [2 * sigmoid(o) + (1e-6 if name == "hy_v4" else 0.0) for o in out[n : 2 * n]]
    return pre, post, token_mix(out[2 * n :], spec)


def token_mix(mix: list[float], spec: StreamSpec) -> Tensor:
    n, name = spec.streams, spec.convention.value
    H = torch.zeros(n, n, dtype=torch.float64)
    if spec.manifold == "identity":
        return torch.eye(n, dtype=torch.float64)
    if spec.manifold == "circulant":
        for k, w in enumerate(softmax(mix)):
            H += w * torch.eye(n, dtype=torch.float64).roll(k, 1)
        return H
    if spec.manifold == "permutations":
        for w, order in zip(softmax(mix), itertools.permutations(range(n)), strict=True):
            for i, j in enumerate(order):
                H[i, j] += w
        return H
    if spec.manifold == "kronecker":
        H = torch.ones(1, 1, dtype=torch.float64)
        for pair in zip(mix[::2], mix[1::2], strict=True):
            keep, swap = softmax(list(pair))
            H = torch.kron(H, torch.tensor([[keep, swap], [swap, keep]], dtype=torch.float64))
        return H
    if spec.manifold == "transportation":
        for i, j in itertools.product(range(n), repeat=2):
            row, column = 1 - float(H[i].sum()), 1 - float(H[:, j].sum())
            if j == n - 1:
                H[i, j] = row
            elif i == n - 1:
                H[i, j] = column
            else:
                others = sum(1 - float(H[:, k].sum()) for k in range(j + 1, n))
                low, high = max(0.0, row - others, column - (n - 1 - i)), min(row, column)
                H[i, j] = low + (high - low) * sigmoid(mix[i * (n - 1) + j])
        return H
    M = [[mix[i * n + j] for j in range(n)] for i in range(n)]
    published = torch.tensor(M, dtype=torch.float64)
    if spec.manifold == "sinkhorn":
        published = token_sinkhorn(M, spec)
    return published.T if name in TRANSPOSED else published


def token_sinkhorn(M: list[list[float]], spec: StreamSpec) -> Tensor:
    n, name = spec.streams, spec.convention.value
    if name == "paper":
        peak = [max(row[j] for row in M) for j in range(n)]
        A = torch.tensor([[math.exp(max(row[j] - peak[j], -60)) for j in range(n)] for row in M], dtype=torch.float64)
        for _ in range(spec.iterations):
            A = A / A.sum(0, keepdim=True)
            A = A / A.sum(1, keepdim=True)
        return A
    if name == "megatron_main":
        A = torch.tensor([[math.exp(x - max(row)) for x in row] for row in M], dtype=torch.float64)
        for _ in range(spec.iterations):
            A = A / A.sum(1, keepdim=True).clamp(min=1e-6)
            A = A / A.sum(0, keepdim=True).clamp(min=1e-6)
        return A
    A = torch.tensor([softmax(row) for row in M], dtype=torch.float64) + 1e-6
    for step in range(spec.iterations):
        if step:
            A = A / (A.sum(1, keepdim=True) + 1e-6)
        A = A / (A.sum(0, keepdim=True) + 1e-6)
    return A


@FEW
@given(legal(), st.integers(0, 10**6))
def test_coefficients_agree_with_the_equations(spec: StreamSpec, seed: int) -> None:
    X, phi, alpha, bias = site(spec, seed, lead=(2,))
    pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
    for t in range(2):
        want_pre, want_post, want_H = token(X[t], phi, alpha, bias, spec)
        torch.testing.assert_close(pre[t], torch.tensor(want_pre, dtype=torch.float64), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(post[t], torch.tensor(want_post, dtype=torch.float64), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(H[t], want_H, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("manifold", get_args(Manifold))
def test_coefficients_agree_with_the_equations_at_four_streams(convention: Convention, manifold: Manifold) -> None:
    spec = StreamSpec(convention=convention, manifold=manifold)
    X, phi, alpha, bias = site(spec, 1, lead=(1,))
    got = reference.coefficients(X, phi, alpha, bias, spec)
    for value, want in zip(got, token(X[0], phi, alpha, bias, spec), strict=True):
        want = want if isinstance(want, Tensor) else torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(value[0], want, atol=1e-12, rtol=1e-12)


@FEW
@given(legal(), st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from([(), (3,), (2, 3), (0, 2)]))
def test_shapes_and_dtypes(spec: StreamSpec, seed: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    X, phi, alpha, bias = site(spec, seed, lead=lead, dtype=dtype)
    n, C = X.shape[-2:]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
    assert (pre.shape, post.shape, H.shape) == ((*lead, n), (*lead, n), (*lead, n, n))
    assert pre.dtype == post.dtype == H.dtype == wide
    h = reference.aggregate(X, pre)
    assert (h.shape, h.dtype) == ((*lead, C), dtype)
    for branch in (h, h.to(torch.float64), h.to(torch.bfloat16)):
        out = reference.distribute(X, branch, post, H)
        assert (out.shape, out.dtype) == (X.shape, torch.promote_types(dtype, branch.dtype))
        assert out.is_contiguous()
    for end in ("mean", "sum"):
        one = reference.reduce(X, StreamSpec(streams=n, exit=end))
        assert (one.shape, one.dtype) == ((*lead, C), dtype)
    many = reference.expand(h, n)
    assert (many.shape, many.dtype) == ((*lead, n, C), dtype)
    assert many.is_contiguous()


@FEW
@given(legal(), st.integers(0, 10**6))
def test_mixing_keeps_the_manifold(spec: StreamSpec, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    H = reference.mixing_matrix(torch.randn(7, spec.mix_rows, generator=rng, dtype=torch.float64), spec)
    rows, columns = (H.sum(-1) - 1).abs().max(), (H.sum(-2) - 1).abs().max()
    if spec.manifold == "unconstrained":
        assert H.isfinite().all()
        return
    assert (H >= 0).all()
    if spec.manifold != "sinkhorn":
        assert max(rows, columns) < 1e-12
    elif spec.iterations >= 1:
        first, last = (
            (rows, columns) if spec.convention in (Convention.MEGATRON_MAIN, Convention.LIGER) else (columns, rows)
        )
        assert last < 1e-4  # eps over a small sum
        assert first < (0.05 if spec.iterations == 20 else spec.streams)


@FEW
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_transportation_reaches_every_doubly_stochastic_matrix(n: int, seed: int) -> None:
    """The gates of a random matrix, read off its entries, fill it again."""
    rng = torch.Generator().manual_seed(seed)
    eye = torch.eye(n, dtype=torch.float64)
    weights = torch.rand(3, generator=rng, dtype=torch.float64)
    H = sum(w * eye[torch.randperm(n, generator=rng)] for w in weights / weights.sum())
    gates = torch.zeros(n - 1, n - 1, dtype=torch.float64)
    for i, j in itertools.product(range(n - 1), repeat=2):
        row, column = 1 - H[i, :j].sum(), 1 - H[:i, j].sum()
        low = (row - (1 - H[:i, j + 1 :].sum(0)).sum()).clamp(min=0)
        high = torch.minimum(row, column)
        gates[i, j] = (H[i, j] - low) / (high - low) if high - low > 1e-12 else 0.5
    torch.testing.assert_close(reference.fill(gates.flatten(), n), H, atol=1e-12, rtol=0)


@FEW
@given(st.integers(2, 8), st.sampled_from(Convention), st.sampled_from(["sinkhorn", "identity", "unconstrained"]))
def test_renaming_the_streams_renames_the_maps(n: int, convention: Convention, manifold: Manifold) -> None:
    spec = StreamSpec(streams=n, convention=convention, manifold=manifold)
    X, phi, alpha, bias = site(spec, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    pairs = (order[:, None] * n + order).reshape(-1) if spec.mix_rows else order[:0]
    rows = torch.cat([order, n + order, 2 * n + pairs])
    turned = phi.view(spec.rows, n, -1)[:, order].reshape(spec.rows, -1)[rows]
    pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
    again = reference.coefficients(X[..., order, :], turned, alpha, bias[rows], spec)
    for got, want in zip(again, (pre[..., order], post[..., order], H[..., order, :][..., order]), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    y = torch.randn(*X.shape[:-2], X.shape[-1], dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    out = reference.distribute(X, y, post, H)
    torch.testing.assert_close(reference.distribute(X[..., order, :], y, again[1], again[2]), out[..., order, :])
    torch.testing.assert_close(reference.aggregate(X[..., order, :], again[0]), reference.aggregate(X, pre))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 9))
def test_mixes(n: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(n)
    X, y = (torch.randn(3, *s, generator=rng, dtype=torch.float64).to(dtype) for s in ((n, 6), (6,)))
    pre, post, H = (
        torch.rand(3, *s, generator=rng, dtype=torch.float64).to(torch.float32) for s in ((n,), (n,), (n, n))
    )
    want = torch.einsum("tij,tjc->tic", H.double(), X.double()) + torch.einsum("ti,tc->tic", post.double(), y.double())
    torch.testing.assert_close(reference.distribute(X, y, post, H), want.to(dtype))
    torch.testing.assert_close(
        reference.aggregate(X, pre), torch.einsum("ti,tic->tc", pre.double(), X.double()).to(dtype)
    )
    torch.testing.assert_close(reference.reduce(X, StreamSpec(streams=n)), X.double().mean(-2).to(dtype))
    torch.testing.assert_close(reference.reduce(X, StreamSpec(streams=n, exit="sum")), X.double().sum(-2).to(dtype))


@pytest.mark.parametrize("convention", Convention)
def test_the_head(convention: Convention) -> None:
    spec = StreamSpec(convention=convention, exit="head")
    X, phi, alpha, bias = site(spec, 3)
    fn, base, scale = phi[:4], bias[:4], alpha[:1]
    pre, _, _ = reference.coefficients(X, phi, alpha, bias, spec)
    torch.testing.assert_close(reference.reduce(X, spec, (fn, base, scale)), reference.aggregate(X, pre))
    with pytest.raises(ValueError, match="head"):
        reference.reduce(X, spec)


def test_expand_is_never_a_view() -> None:
    x = torch.ones(2, 3)
    for n in (1, 4):
        many = reference.expand(x, n)
        many.zero_()
        assert x.eq(1).all()


@FEW
@given(
    legal(manifold="sinkhorn"), st.sampled_from([0.0, 30.0, 1e2, 1e4]), st.sampled_from([torch.float32, torch.float64])
)
def test_extreme_logits_stay_finite(spec: StreamSpec, scale: float, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(spec.streams)
    logits = (scale * torch.randn(50, spec.streams, spec.streams, generator=rng, dtype=dtype)).requires_grad_()
    H = reference.sinkhorn(logits, spec)
    assert H.isfinite().all()
    (grad,) = torch.autograd.grad(H.square().sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("manifold", get_args(Manifold))
@pytest.mark.parametrize("sign", [-1e4, 1e4])
def test_extreme_parameters_stay_finite(manifold: Manifold, sign: float) -> None:
    spec = StreamSpec(manifold=manifold)
    X, phi, alpha, bias = site(spec, 0, dtype=torch.float32)
    bias[::2] = sign
    leaves = [t.requires_grad_() for t in (X, phi, alpha, bias)]
    pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
    out = reference.distribute(X, reference.aggregate(X, pre), post, H)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("convention", Convention)
def test_zero_streams_have_finite_gradients(convention: Convention) -> None:
    spec = StreamSpec(convention=convention, iterations=2)
    _, phi, alpha, bias = site(spec, 0)
    X = torch.zeros(2, 4, 5, dtype=torch.float64, requires_grad=True)
    pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
    (grad,) = torch.autograd.grad((reference.distribute(X, reference.aggregate(X, pre), post, H)).sum(), X)
    assert grad.isfinite().all()


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("manifold", get_args(Manifold))
def test_gradients_are_those_of_float64(convention: Convention, manifold: Manifold) -> None:
    spec = StreamSpec(convention=convention, manifold=manifold, iterations=5)
    narrow = site(spec, 5, C=16, dtype=torch.float32)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in narrow]
        pre, post, H = reference.coefficients(*leaves, spec)
        out = reference.distribute(leaves[0], reference.aggregate(leaves[0], pre).sin(), post, H)
        grads.append(torch.autograd.grad(reference.reduce(out, spec).square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max().clamp(min=1e-3)


def test_gradcheck() -> None:
    for convention in Convention:
        spec = StreamSpec(streams=2, convention=convention, iterations=2)
        leaves = [t.requires_grad_() for t in site(spec, 7, lead=(1,), C=2)]
        assert torch.autograd.gradcheck(lambda *t, spec=spec: reference.coefficients(*t, spec), leaves)


@pytest.mark.parametrize(("std", "bound"), [(0.1, 1e-6), (1.0, 5e-5), (3.0, 0.2)])
def test_v4_is_the_transpose_of_the_paper(std: float, bound: float) -> None:
    """With `comb = H.T` the systems differ by V4's eps alone, which weighs more the more slowly Sinkhorn converges."""
    paper, v4 = StreamSpec(), StreamSpec(convention=Convention.DEEPSEEK_V4)
    logits = std * torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (reference.sinkhorn(logits, paper) - reference.sinkhorn(logits.mT, v4)).abs()
    assert difference.max() < bound
    assert difference.max() > bound / 20  # they are not the same function


def test_an_untransposed_v4_checkpoint_is_far_off() -> None:
    paper, v4 = StreamSpec(), StreamSpec(convention=Convention.DEEPSEEK_V4)
    logits = torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    untransposed = reference.sinkhorn(logits, v4).sub(reference.sinkhorn(logits, paper)).abs().mean()
    assert untransposed == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize(("std", "moved"), [(1.0, 9e-4), (3.0, 5e-2)])
def test_the_order_of_the_normalisations_matters(std: float, moved: float) -> None:
    logits = std * torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paper, megatron = (
        reference.sinkhorn(logits, StreamSpec(convention=c)) for c in (Convention.PAPER, Convention.MEGATRON_MAIN)
    )
    assert moved / 20 < (paper - megatron).abs().max() < moved * 3


def test_no_iterations_is_the_start_alone() -> None:
    logits = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for convention in Convention:
        spec = StreamSpec(convention=convention, iterations=0)
        start = reference.sinkhorn_start(logits, spec)
        assert torch.equal(reference.sinkhorn(logits, spec), start.mT if convention.fields.transposed else start)
        assert reference.sinkhorn_axes(spec) == []
