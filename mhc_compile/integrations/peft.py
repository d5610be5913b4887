"""PEFT: adapters train and save the streams of the model that they adapt."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from mhc_compile.integrations.attributes import replace_attribute, restore_attributes
from mhc_compile.parameters import StreamParameters


def on_convert(root: nn.Module) -> None:
    """Make the adapters that `root` has already train and save the streams it has just been given.

    The same as converting first and naming the streams in `modules_to_save=["mhc"]`: each adapter gets parameters of
    its own, and without an adapter the model computes what it did before.
    """
    for adapted in _adapted(root):
        saving = {name: c for name, c in adapted.peft_config.items() if hasattr(c, "modules_to_save")}
        for config in saving.values():
            replace_attribute(config, "modules_to_save", sorted({*(config.modules_to_save or ()), "mhc"}))
        for owner in list(adapted.modules()) if saving else []:
            if isinstance(state := owner._modules.get("mhc"), StreamParameters):
                owner._modules["mhc"] = _wrapper(state, list(saving), adapted.active_adapter)


def on_restore(root: nn.Module) -> None:
    """Let the adapters' configurations name what they named before."""
    for adapted in _adapted(root):
        for config in adapted.peft_config.values():
            restore_attributes(config)


def _adapted(root: nn.Module) -> list[Any]:
    peft = sys.modules.get("peft")
    return [] if peft is None else [module for module in root.modules() if isinstance(module, peft.PeftModel)]


def _wrapper(state: StreamParameters, adapters: list[str], active: str) -> nn.Module:
    wrapper: nn.Module = sys.modules["peft"].utils.ModulesToSaveWrapper(state, adapters[0])
    for adapter in adapters[1:]:
        wrapper.update(adapter)  # type: ignore[operator]
    wrapper.set_adapter(active if active in adapters else [])  # type: ignore[operator]
    return wrapper
