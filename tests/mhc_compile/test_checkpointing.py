"""Gradient checkpointing in a converted model: the same gradients, and the blocks really recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Block, chain, disagree, gradients, ids, llama, loss_of, shake, variants
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_compile import convert


class Recomputing(nn.Module):
    """A block that saves its input alone."""

    def __init__(self, block: Block, **options: Any) -> None:
        super().__init__()
        self.block = block
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, **self.options)


def saved_bytes(model: nn.Module) -> int:
    """Bytes that a training step keeps for the backward pass, parameters aside."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model)
    loss.backward()
    return sum(storages.values())


@pytest.mark.parametrize(("first", "inner", "reentrant"), variants((True, "aot_eager", True), (True, "eager", False)))
def test_switched_on_before_conversion(first: bool, inner: str, reentrant: bool) -> None:
    model = llama().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    convert(model, inner=inner)
    assert not disagree(gradients(model), expected, 2e-6)


@pytest.mark.parametrize(("inner", "reentrant"), variants(("aot_eager", False), ("eager", True)))
def test_switched_on_after_conversion(inner: str, reentrant: bool) -> None:
    model = convert(llama(), inner=inner).train()
    shake(model)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert not disagree(gradients(model), expected, 2e-6)
    model.gradient_checkpointing_disable()
    assert not disagree(gradients(model), expected, 2e-6)


@pytest.mark.parametrize(("outer", "inner"), variants((False, None), (True, "aot_eager"), (False, "aot_eager")))
def test_checkpointed_blocks_are_recomputed(outer: bool, inner: str | None) -> None:
    sizes = []
    for recompute in (False, True):
        torch._dynamo.reset()
        model = convert(llama(num_hidden_layers=3, use_cache=False), inner=inner).train()
        if recompute:
            model.gradient_checkpointing_enable()
        step = torch.compile(model, backend="mhc", options={"inner": "aot_eager"}) if outer else model
        sizes.append(saved_bytes(step))
    assert sizes[1] < 0.35 * sizes[0]


@pytest.mark.parametrize("reentrant", variants(False, True))
def test_blocks_checkpointed_by_hand(reentrant: bool) -> None:
    model = chain(depth=3)
    expected = gradients(model)
    convert(model, ids(), inner="aot_eager")
    plain = saved_bytes(model)
    model = chain(depth=3)
    model.layers = nn.ModuleList(Recomputing(b, use_reentrant=reentrant) for b in model.layers)
    convert(model, ids(), inner="aot_eager")
    found = {name.replace(".block.", "."): g for name, g in gradients(model).items()}
    assert not disagree(found, expected, 2e-6)
    assert saved_bytes(model) < 0.6 * plain


def test_dropout_is_recomputed_as_it_was() -> None:
    model = chain(depth=2, dropout=0.5).train()
    model.layers = nn.ModuleList(Recomputing(b, use_reentrant=False) for b in model.layers)
    convert(model, ids(), inner="aot_eager")
    torch.manual_seed(3)
    loss = loss_of(model)
    direction = torch.randn(model.embed.weight.shape)
    slope = (torch.autograd.grad(loss, model.embed.weight)[0] * direction).sum().item()
    step = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.embed.weight.add_(sign * step * direction)
            torch.manual_seed(3)
            values.append(loss_of(model).item())
            model.embed.weight.sub_(sign * step * direction)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)
