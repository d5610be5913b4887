"""Modules and inputs are known by identity, however a forward is wrapped and whatever its arguments are called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.capture import capture
from mhc_compile.parameters import owners
from mhc_compile.passes.base import module_path, op_name
from mhc_compile.passes.ownership import is_owned
from mhc_compile.report.lines import input_name, is_buffer

X = torch.randn(2, 3, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x)) * self.scale


class Body(nn.Module):
    """A model whose forward a test wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(model: nn.Module, *inputs: Tensor) -> Any:
        return function(model, *inputs)

    return wrapped


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "plain": plain,
    "wraps": named,
    "twice": lambda f: plain(named(f)),
    "another name for self": renamed,
}


def wrapped_class(wrapper: Callable[..., Any]) -> type[Body]:
    return type("Body", (Body,), {"forward": wrapper(Body.forward)})


@pytest.fixture(params=WRAPPERS)
def model(request: pytest.FixtureRequest) -> Body:
    return wrapped_class(WRAPPERS[request.param])()


def check_converted(model: nn.Module, residual: Tensor, sites: list[str]) -> None:
    assert [name for p in owners(model).values() for name in p.sites] == sites
    torch.testing.assert_close(model(X), residual)
    for parameters in owners(model).values():
        for parameter in parameters.parameters():
            parameter.data += torch.randn_like(parameter)
    changed = model(X)
    assert not torch.allclose(changed, residual)
    changed.sum().backward()
    assert all(p.grad is not None for m in owners(model).values() for p in m.parameters())


def test_a_wrapped_forward_converts(model: Body) -> None:
    residual = model(X)
    check_converted(mhc_compile.convert(model, X, inner="eager"), residual, ["blocks.0#0", "blocks.1#0"])


def test_a_wrapped_owner_inside_another_module(model: Body) -> None:
    outer = nn.Sequential(nn.Linear(8, 8), model)
    residual = outer(X)
    mhc_compile.convert(outer, X, inner="eager")
    assert list(owners(outer)) == ["1"]
    check_converted(outer, residual, ["blocks.0#0", "blocks.1#0"])


def test_a_wrapped_forward_converts_at_its_first_call(model: Body) -> None:
    residual = model(X)
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    with pytest.warns(mhc_compile.MHCWarning, match="MHC302"):
        torch.testing.assert_close(step(X), residual)
    check_converted(model, residual, ["blocks.0#0", "blocks.1#0"])


def test_a_partial_bound_on_the_instance() -> None:
    model = Body()
    residual = model(X)
    model.forward = functools.partial(plain(Body.forward), model)  # type: ignore[method-assign]
    graph = capture(model, (X,), {}).graph
    adds = [module_path(n) for n in graph.graph.nodes if op_name(n) == "add"]
    assert adds == ["blocks.0", "blocks.1"]
    check_converted(mhc_compile.convert(model, X, inner="eager"), residual, ["blocks.0#0", "blocks.1#0"])


def test_a_partial_bound_on_the_instance_comes_back() -> None:
    model = Body()
    model.forward = bound = functools.partial(plain(Body.forward), model)  # type: ignore[method-assign]
    residual = model(X)
    assert mhc_compile.to_residual(mhc_compile.convert(model, X, inner="eager")).forward is bound
    torch.testing.assert_close(model(X), residual)


def test_inputs_have_the_names_of_the_model_and_of_its_caller(model: Body) -> None:
    graph = capture(model, (X,), {}).graph
    inputs = {input_name(n): (is_owned(n), is_buffer(n)) for n in graph.graph.nodes if n.op == "placeholder"}
    assert inputs.pop("blocks.1.inner.weight") == (True, False)
    assert inputs.pop("blocks.0.scale") == (True, True)
    (argument,) = [name for name, (owned, _) in inputs.items() if not owned]
    assert argument in ("x", "args.1", "inputs.0")


def test_layers_that_only_a_list_holds_have_their_places() -> None:
    class Hidden(Body):
        def __init__(self) -> None:
            super().__init__()
            blocks = list(self.blocks)
            del self.blocks
            self.blocks = blocks  # type: ignore[assignment]

    graph = capture(Hidden(), (X,), {}).graph
    assert [module_path(n) for n in graph.graph.nodes if op_name(n) == "add"] == ["blocks.0", "blocks.1"]
