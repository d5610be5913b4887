"""Gradients of gradients, and function transforms, of converted models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Block, shake
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from mhc_compile import MHCError, convert

X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def converted() -> nn.Module:
    return convert(Layers().double(), X, inner="eager", kernels="none")


def second(model: nn.Module, x: Tensor) -> Tensor:
    """Return the gradient of the squared norm of a gradient."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def test_second_derivatives_are_those_of_the_residual_model() -> None:
    want = second(Layers().double(), X)
    assert torch.allclose(second(converted(), X), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_second_derivatives_of_trained_streams() -> None:
    model = converted()
    shake(model)
    direction = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x)
        return first

    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(first, x, direction)
    step = 1e-3
    want = (slope(X + step * direction) - slope(X - step * direction)) / (2 * step)
    # The stream parameters are float32, and so is what is computed from them.
    assert torch.allclose(got, want, rtol=0, atol=5e-3 * float(want.abs().max()))


def dual(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(X, torch.ones_like(X)))


def of_parameters(model: nn.Module) -> Any:
    return grad(lambda parameters: functional_call(model, parameters, (X,)).sum())(dict(model.named_parameters()))


@pytest.mark.parametrize(
    "transformed",
    [
        of_parameters,
        lambda model: vmap(lambda x: model(x[None]))(X),
        lambda model: vmap(grad(lambda x: model(x[None]).sum()))(X),
        lambda model: jvp(model, (X,), (torch.ones_like(X),)),
        dual,
    ],
)
def test_transforms_have_a_code_and_leave_the_model_usable(transformed: Callable[[nn.Module], Any]) -> None:
    transformed(Layers().double())
    model = converted()
    with pytest.raises(MHCError, match="MHC311"):
        transformed(model)
    assert torch.allclose(model(X), Layers().double()(X), rtol=1e-5, atol=1e-5)
