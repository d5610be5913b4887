"""Keep the modules that read a stream from running without it: layers called by hand, other methods of a model.

Each such module has a forward pre-hook. Called eagerly, outside of its owner's forward, it raises MHC313. Traced, it
puts `mhc::inside` in front of the module's first tensor. Our backend takes it out where the graph holds the owner's
mark and raises MHC313 where it does not; under any other backend running the operator raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Mark, module_path, module_stack, source_line
from mhc_compile.passes.results import ResidualStream


def stream_readers(streams: Iterable[ResidualStream]) -> list[str]:
    """Return the paths, below their owner, of the modules in branches of the sites that its own forward adds."""
    paths: dict[str, None] = {}
    for stream in streams:
        below = f"{stream.owner}." if stream.owner else ""
        for site in stream.sites:
            ends = [*site.branches, *(reader for readers in site.reads.values() for reader in readers)]
            for node in ends if site.name.startswith("#") else ():
                inside = [p.removeprefix(below) for p in module_stack(node) if p.startswith(below) and p != ""]
                paths.update(dict.fromkeys(inside[:1]))
    return list(paths)


def guard(owner: nn.Module, readers: Iterable[str]) -> None:
    """Put the pre-hook on the modules `readers` of `owner`, once each."""
    for path in readers:
        try:
            module = owner.get_submodule(path)
        except AttributeError:  # a layer that only a list holds
            continue
        if _inside_owner not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_inside_owner, with_kwargs=True)


def unguard(owner: nn.Module) -> None:
    """Take the pre-hooks off every module of `owner`."""
    for module in owner.modules():
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _inside_owner]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _inside_owner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        raise MHCError("MHC313", f"{type(module).__name__} was called outside of the forward of its model")
    return with_first_tensor(args, kwargs, torch.ops.mhc.inside)


def erase_guards(gm: GraphModule, marks: Sequence[Mark]) -> None:
    """Erase every `mhc::inside` of `gm` and the bodies that it calls. Raises MHC313 for one outside of all `marks`."""
    for body in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        for node in body.graph.find_nodes(op="call_function", target=torch.ops.mhc.inside):
            path = module_path(node)
            if not any(not mark.owner or f"{path}.".startswith(f"{mark.owner}.") for mark in marks):
                detail = "it was called outside of the forward of its model"
                raise MHCError("MHC313", detail, module=path or "(root)", source=source_line(node))
            node.replace_all_uses_with(node.args[0])
            body.graph.erase_node(node)


# --- the first tensor of a call, which carries what a trace is to know ------------------------------------------------


def with_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with the first tensor in them changed; as they are where there is none."""
    for i, argument in enumerate(args):
        if holds_tensor(argument):
            return (*args[:i], _changed(argument, change), *args[i + 1 :]), kwargs
    for name, argument in kwargs.items():
        if holds_tensor(argument):
            return args, {**kwargs, name: _changed(argument, change)}
    return args, kwargs


def holds_tensor(value: Any) -> bool:
    """Return whether there is a tensor in `value`, a tensor, list, tuple or dictionary."""
    if type(value) in (tuple, list):
        return any(holds_tensor(part) for part in value)
    if type(value) is dict:
        return any(holds_tensor(part) for part in value.values())
    return isinstance(value, Tensor)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        key = next(k for k, part in value.items() if holds_tensor(part))
        return {**value, key: _changed(value[key], change)}
    at = next(i for i, part in enumerate(value) if holds_tensor(part))
    return type(value)([*value[:at], _changed(value[at], change), *value[at + 1 :]])
