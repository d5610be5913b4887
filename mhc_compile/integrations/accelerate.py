"""Accelerate: it replaces `forward` on the instance and calls the original through an attribute."""

from __future__ import annotations

import types

from torch import nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import is_converted

_OLD, _ORIGINAL = "_old_forward", "_original_forward"


def refuse_unconvertible(owner: nn.Module, path: str) -> None:
    """Raise MHC207 where `Accelerator.unwrap_model` would restore the residual forward over ours."""
    if _ORIGINAL in vars(owner):
        raise MHCError("MHC207", f"accelerate has replaced {type(owner).__name__}.forward", module=path)


def wraps_forward(owner: nn.Module) -> bool:
    """Return whether accelerate's hooks wrap the forward of `owner`."""
    old = vars(owner).get(_OLD)
    return isinstance(old, types.MethodType) and old.__self__ is owner


def on_convert(root: nn.Module) -> None:
    """Have the hooks call the converted forward."""
    for owner in root.modules():
        if is_converted(owner) and wraps_forward(owner):
            vars(owner)[_OLD] = types.MethodType(type(owner).forward, owner)


def on_restore(root: nn.Module) -> None:
    """Have the hooks call the residual forward again."""
    for owner in root.modules():
        if is_converted(owner) and wraps_forward(owner):
            vars(owner)[_OLD] = types.MethodType(type(owner)._mhc_base.forward, owner)  # type: ignore[attr-defined]
