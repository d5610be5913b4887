"""The convention deepseek_v41: a site's `pre` weighs the streams for the site after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import chain, gpt2, ids, learned, llama, logits, predicted, shake, t5, used
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile import MHCError, convert
from mhc_compile.kernels import reference
from mhc_compile.parameters import owners

V41 = {"convention": "deepseek_v41"}


def by_hand(model: Any, tokens: Tensor) -> Tensor:
    """The equations over the branches of a `Chain`, whose layers are x + F(x)."""
    (parameters,) = owners(model).values()
    X = reference.expand(model.embed(tokens), parameters.spec.streams)
    pre = F.one_hot(torch.tensor(0), parameters.spec.streams).to(X.dtype)
    for name, layer in zip(parameters.sites, model.layers, strict=True):
        own = dict(parameters.get_submodule(name).named_parameters())
        values = (own[key].double() for key in ("phi", "alpha", "bias"))
        later, post, H = reference.coefficients(X, *values, parameters.spec)
        h = torch.einsum("...n,...nc->...c", pre, X)
        y = layer.down(F.gelu(layer.up(layer.norm(h))))
        X = H @ X + post[..., None] * y[..., None, :]
        pre = later
    return model.head(torch.einsum("...n,...nc->...c", pre, X))


@pytest.mark.parametrize("manifold", ["sinkhorn", "identity"])
def test_the_equations(manifold: str) -> None:
    model, tokens = chain(depth=4).double(), ids()
    convert(model, tokens, **V41, manifold=manifold, inner="eager")
    shake(model)
    expected = by_hand(model, tokens)
    wanted = torch.autograd.grad(expected.square().mean(), list(model.parameters()), allow_unused=True)
    result = logits(model(tokens))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(result.square().mean(), list(model.parameters()), allow_unused=True)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "make", [llama, pytest.param(gpt2, marks=pytest.mark.slow), pytest.param(t5, marks=pytest.mark.slow)]
)
def test_conversion_keeps_the_function(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        before = predicted(model)
        after = predicted(convert(model, **V41, inner="eager", debug="numeric"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_kernels_compute_the_same_and_its_gradients() -> None:
    """What the branch reads is fused into the mixing before it: its weights are known by then."""
    results = []
    for kernels in ("none", "all"):
        model = convert(llama(), **V41, inner="eager", kernels=kernels)
        results.append(learned(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    kinds = {kernel.kind for kernel in mhc_compile.inspect(model).kernels}
    assert kinds == {"coefficients", "deferred", "carry"}  # the first site, those between, the exit


@pytest.mark.parametrize("blocks", ["stage", pytest.param(2, marks=pytest.mark.slow)])
def test_recomputed_streams_are_the_same(blocks: str | int) -> None:
    results = []
    for recompute in ("off", blocks):
        model = convert(llama(), **V41, inner="aot_eager", recompute=recompute)
        results.append(learned(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_generation_and_folders(tmp_path: Path) -> None:
    used(convert(llama(), **V41, inner="eager"), tmp_path)


def test_its_exit_is_the_last_sites() -> None:
    with pytest.raises(MHCError, match=r"MHC204 .*one site ahead"):
        convert(llama(), exit="pre")
