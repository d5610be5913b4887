"""Hyper-Connections: the equations of arXiv 2409.19606 against loops and another implementation; their start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import hc, reference
from mhc_compile.kernels.forms import COEFFICIENTS, FORMS, form_of, start_values, width_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT

C, TOKENS = 12, 5
HC: list[str] = ["hc", "hc_static"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_site(spec: StreamSpec, seed: int = 0) -> list[Tensor]:
    parameters = form_of(spec).parameters(spec, 0, C, DEFAULT).values()
    return [normal(*p.shape, seed=seed + i).requires_grad_() for i, p in enumerate(parameters)]


def by_loops(X: Tensor, site: list[Tensor], spec: StreamSpec) -> tuple[Tensor, Tensor, Tensor]:
    """One token at a time, in the paper's own orientation: A_m [n], B [n] and A_r [n, n]."""
    n = spec.streams
    found = []
    for token in X:
        bias = site[-1]
        A_m, B, A_r = bias[:n].clone(), bias[n : 2 * n].clone(), bias[2 * n :].reshape(n, n).clone()
        if spec.form == "hc":
            phi, alpha, _ = site
            for i, stream in enumerate(token):
                normed = stream / (stream.square().mean() + 1e-6).sqrt()
                A_m[i] = A_m[i] + alpha[0] * torch.tanh(normed @ phi[0])
                B[i] = B[i] + alpha[1] * torch.tanh(normed @ phi[1])
                for j in range(n):
                    A_r[i, j] = A_r[i, j] + alpha[0] * torch.tanh(normed @ phi[2 + j])
        found.append((A_m, B, A_r))
    A_m, B, A_r = (torch.stack(part) for part in zip(*found, strict=True))
    return A_m, B, A_r


@pytest.mark.parametrize("form", HC)
@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_the_papers_equations(form: str, n: int) -> None:
    spec = StreamSpec(streams=n, form=form)
    X, y, site = normal(TOKENS, n, C, seed=9).requires_grad_(), normal(TOKENS, C, seed=8), random_site(spec)
    pre, post, H = form_of(spec).op(X, *site, str(spec))
    ours = (reference.aggregate(X, pre), reference.distribute(X, y, post, H))
    A_m, B, A_r = by_loops(X, site, spec)
    theirs = (
        torch.einsum("ti,tic->tc", A_m, X),
        torch.einsum("tij,tic->tjc", A_r, X) + torch.einsum("ti,tc->tic", B, y),
    )
    weights = [normal(*o.shape, seed=7) for o in ours]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), [X, *site])
        for out in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_parity_with_another_implementation() -> None:
    theirs = pytest.importorskip("hyper_connections", reason="the package hyper-connections is not installed")
    n, spec = 4, StreamSpec(streams=4, form="hc")
    module = theirs.HyperConnections(n, dim=C, layer_index=2).double()
    start = start_values(spec, 2, C)
    torch.testing.assert_close(module.static_alpha[:, 0].detach().float(), start["bias"][:n])
    phi, alpha, bias = random_site(spec)
    with torch.no_grad():
        module.dynamic_alpha_fn.copy_(torch.cat([phi[:1], phi[2:]]).t())
        module.dynamic_beta_fn.copy_(phi[1])
        module.dynamic_alpha_scale.copy_(alpha[0])
        module.dynamic_beta_scale.copy_(alpha[1])
        module.static_alpha.copy_(torch.cat([bias[:n, None], bias[2 * n :].reshape(n, n)], 1))
        module.static_beta.copy_(bias[n : 2 * n])
    X = 1e4 * normal(TOKENS, n, C, seed=3)  # beside which the eps of either norm is nothing
    h, add = module(X.transpose(0, 1).reshape(n * TOKENS, C).reshape(n, TOKENS, C).transpose(0, 1).flatten(0, 1))
    pre, post, H = hc.dynamic(X, phi, alpha, bias)
    torch.testing.assert_close(reference.aggregate(X, pre), h, rtol=1e-10, atol=1e-8)
    y = normal(TOKENS, C, seed=4)
    torch.testing.assert_close(reference.distribute(X, y, post, H).flatten(0, 1), add(y), rtol=1e-10, atol=1e-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.sampled_from(HC), st.randoms(use_true_random=False))
def test_streams_can_be_renamed(n: int, form: str, random: object) -> None:
    """Permuting streams and parameters alike permutes the result."""
    order = list(range(n))
    random.shuffle(order)  # type: ignore[attr-defined]
    spec = StreamSpec(streams=n, form=form)
    X, site = normal(TOKENS, n, C, seed=1), [p.detach() for p in random_site(spec, seed=2)]
    bias = site[-1]
    renamed = torch.cat([
        bias[:n][order], bias[n : 2 * n][order], bias[2 * n :].reshape(n, n)[order][:, order].flatten()
    ])  # fmt: skip
    others = [torch.cat([site[0][:2], site[0][2:][order]]), site[1]] if form == "hc" else []
    op = form_of(spec).op
    pre, post, H = op(X, *site, str(spec))
    again = op(X[:, order], *others, renamed, str(spec))
    for a, b in zip(again, (pre[:, order], post[:, order], H[:, order][:, :, order]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", HC)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_start_keeps_the_residual_function_and_separates_the_streams(form: str, n: int) -> None:
    spec = StreamSpec(streams=n, form=form)
    x, weights = normal(TOKENS, C, seed=0), [normal(C, C, seed=i) for i in range(6)]
    sites = [[p.double().requires_grad_() for p in start_values(spec, i, C).values()] for i in range(len(weights))]
    want, X = x, reference.expand(x, n)
    for w, site in zip(weights, sites, strict=True):
        want = want + torch.tanh(want @ w)
        pre, post, H = form_of(spec).op(X, *site, str(spec))
        X = reference.distribute(X, torch.tanh(reference.aggregate(X, pre) @ w), post, H)
    out = reference.reduce(X, spec)
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
    out.square().sum().backward()
    # Site 1 reads stream 1: what it is given by the streams differs from the beginning, and so will they.
    gradient = sites[0][-1].grad[n : 2 * n]
    assert n == 1 or (gradient - gradient.mean()).abs().max() > 1e-3 * gradient.abs().max()


def test_forms_have_what_widen_needs() -> None:
    for name in ("mhc", *HC):
        form, spec = FORMS[name], StreamSpec(streams=3, form=name)
        assert form.op in COEFFICIENTS
        parameters = form.parameters(spec, 1, C, DEFAULT)
        assert {k: tuple(v.shape) for k, v in start_values(spec, 1, C).items()} == {
            k: p.shape for k, p in parameters.items()
        }
        assert [a.name for a in form.op._schema.arguments] == ["streams", *parameters, "spec"]
        shapes = {f"a#0.{k}": p.shape for k, p in parameters.items()}
        assert width_of(spec, 1, "a#0", shapes) == (1 if name == "hc_static" else C)
        assert StreamSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "given", [{"manifold": "identity"}, {"convention": "liger"}, {"iterations": 5}, {"exit": "head"}]
)
def test_what_only_mhc_has_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(MHCError, match="MHC204"):
        StreamSpec(form="hc", **given)  # type: ignore[arg-type]


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(MHCError, match="known: mhc, hc, hc_static"):
        StreamSpec(form="hcx")  # type: ignore[arg-type]


def test_the_text_of_mhc_has_no_form() -> None:
    """Folders and graphs of before there were other forms read the same."""
    assert "form" not in str(StreamSpec())
    assert str(StreamSpec(form="hc", streams=2)) == "streams=2 exit=mean form=hc"
