"""The functions for modules written by hand: one small model made of them, against the same in plain mathematics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_compile.kernels import functions, reference
from mhc_compile.kernels.spec import Convention, StreamSpec

N, C = 4, 12


def parameters(spec: StreamSpec, count: int) -> list[list[Tensor]]:
    rng = torch.Generator().manual_seed(0)
    made = [
        [
            0.3 * torch.randn(spec.rows, N * C, generator=rng),
            torch.rand(3, generator=rng),
            torch.randn(spec.rows, generator=rng),
        ]
        for _ in range(count)
    ]
    return [[p.requires_grad_() for p in site] for site in made]


def head() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(N, N * C, generator=rng), torch.randn(N, generator=rng), torch.rand(1, generator=rng)


@pytest.mark.parametrize("exit_", ["mean", "sum", "head"])
def test_a_model_of_two_sites(exit_: str) -> None:
    spec = StreamSpec(streams=N, exit=exit_)  # type: ignore[arg-type]
    first, second = parameters(spec, 2)
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(2))
    own = head() if exit_ == "head" else None

    X = functions.expand(x, N)
    h, post, mix = functions.read(X, *first, spec)
    X, h, post, mix = functions.boundary(X, torch.tanh(h), post, mix, *second, spec)
    found = functions.leave(X, torch.tanh(h), post, mix, spec, own)
    got = torch.autograd.grad(found.square().sum(), [*first, *second])

    Y = reference.expand(x, N)
    for site in (first, second):
        pre, post, mix = reference.coefficients(Y, *site, spec)
        Y = reference.distribute(Y, torch.tanh(reference.aggregate(Y, pre)), post, mix)
    expected = reference.reduce(Y, spec, own)
    want = torch.autograd.grad(expected.square().sum(), [*first, *second])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_model_whose_pre_is_computed_one_site_ahead() -> None:
    spec = StreamSpec(streams=N, convention=Convention.DEEPSEEK_V41, exit="pre")
    sites = parameters(spec, 3)
    flat = [t for site in sites for t in site]
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(2))

    X = functions.expand(x, N)
    pre, post, mix = functions.coefficients(X, *sites[0], spec)
    y = torch.tanh(X[..., 0, :])
    for site in sites[1:]:
        X, h, pre, post, mix = functions.deferred(X, y, post, mix, pre, *site, spec)
        y = torch.tanh(h)
    found = functions.aggregate(functions.distribute(X, y, post, mix), pre)
    got = torch.autograd.grad(found.square().sum(), flat)

    Y, weights = reference.expand(x, N), torch.eye(N)[0].expand(2, 5, N)
    for site in sites:
        ahead, post, mix = reference.coefficients(Y, *site, spec)
        Y = reference.distribute(Y, torch.tanh(reference.aggregate(Y, weights)), post, mix)
        weights = ahead
    expected = reference.aggregate(Y, weights)
    want = torch.autograd.grad(expected.square().sum(), flat)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_single_functions() -> None:
    spec = StreamSpec(streams=N)
    (site,) = parameters(spec, 1)
    rng = torch.Generator().manual_seed(3)
    X, y = torch.randn(7, N, C, generator=rng), torch.randn(7, C, generator=rng)
    pre, post, mix = functions.coefficients(X, *site, spec)
    for a, b in zip((pre, post, mix), reference.coefficients(X, *site, spec), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(functions.aggregate(X, pre), reference.aggregate(X, pre))
    torch.testing.assert_close(functions.distribute(X, y, post, mix), reference.distribute(X, y, post, mix))
    half = X.bfloat16()
    assert functions.distribute(half, y, post, mix).dtype == torch.float32
    torch.testing.assert_close(functions.reduce(X, spec), X.mean(-2))


def test_a_head_needs_its_parameters() -> None:
    spec = StreamSpec(streams=N, exit="head")
    with pytest.raises(ValueError, match="fn, base and scale"):
        functions.reduce(torch.randn(2, N, C), spec)
    torch.testing.assert_close(
        functions.reduce(torch.ones(2, N, C), spec, head()), reference.reduce(torch.ones(2, N, C), spec, head())
    )


def test_compiled_in_one_graph_and_exported() -> None:
    spec = StreamSpec(streams=N)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sites = torch.nn.ParameterList(p.detach() for site in parameters(spec, 2) for p in site)

        def forward(self, x: Tensor) -> Tensor:
            p = list(self.sites)
            X = functions.expand(x, N)
            h, post, mix = functions.read(X, *p[:3], spec)
            X, h, post, mix = functions.boundary(X, torch.tanh(h), post, mix, *p[3:], spec)
            return functions.leave(X, torch.tanh(h), post, mix, spec)

    model, x = Two(), torch.randn(3, 5, C, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32
