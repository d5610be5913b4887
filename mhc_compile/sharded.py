"""Run an owner whose layers FSDP2 shards one by one: its graph cannot hold their hooks, which Dynamo does not trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mhc_compile.diagnostics import MHCError


@contextmanager
def gathered_layers(owner: nn.Module) -> Iterator[None]:
    """Gather the weights of the sharded modules inside `owner`, and run these without FSDP's hooks.

    The hooks of a module sharded around them, `owner` or one above, reduce their gradients and shard them again at the
    end of the backward; without gradients they are sharded again here. Raises MHC212 where nothing around them is
    sharded, and where they have a dtype of their own, to which their hooks would cast.
    """
    layers = _sharded_inside(owner)
    if not layers:
        yield
        return
    hooks = [(table, key, hook) for layer in layers for table, key, hook in _hooks_of(layer)]
    for layer in layers:
        _refuse(owner, layer)
        layer.unshard()
    order = {id(table): dict(table) for table, _, _ in hooks}
    for table, key, _ in hooks:
        del table[key]
    try:
        yield
    finally:
        for table in {id(table): table for table, _, _ in hooks}.values():
            table.clear()
            table.update(order[id(table)])
        if not torch.is_grad_enabled():
            for layer in layers:
                layer.reshard()


def _sharded_inside(owner: nn.Module) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in owner.modules() if module is not owner and isinstance(module, FSDPModule)]


def _hooks_of(layer: Any) -> list[tuple[dict[int, Any], int, Any]]:
    """Return FSDP's own hooks of `layer`, with the tables that hold them and their keys there."""
    state = layer._get_fsdp_state()
    tables = (layer._forward_pre_hooks, layer._forward_hooks)
    return [(t, key, hook) for t in tables for key, hook in t.items() if getattr(hook, "__self__", None) is state]


def _refuse(owner: nn.Module, layer: Any) -> None:
    state = layer._get_fsdp_state()
    if state._is_root is not False:
        raise MHCError("MHC212", "its layers are sharded and nothing around them is", module=type(owner).__name__)
    if state._mp_policy.param_dtype is not None:
        raise MHCError("MHC212", "its layers have a dtype of their own (mp_policy)", module=type(owner).__name__)
