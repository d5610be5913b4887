"""Compare the streams that a model has in training with those that it has in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from mhc_compile.diagnostics import MHCError

Sites = dict[str, dict[str, int]]
"""By owner: the sites' names, in the order of the stream, with C."""
FLAG = "training"


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module of `model` into training or evaluation mode; restore each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer of `model` afterwards: a norm of batches changes its averages at every call in training."""
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


def reads_mode(model: nn.Module) -> bool:
    """Return whether functions that the model's classes define or call name the flag `training`.

    torch's own modules do, and add to a stream in no mode.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    others = [cls for cls in classes if not cls.__module__.startswith("torch.")]
    seen: set[FunctionType] = set()
    todo = [f for cls in others for value in vars(cls).values() for f in _functions(value)]
    while todo:
        function = todo.pop()
        if function in seen or str(function.__module__).startswith("torch."):
            continue
        seen.add(function)
        named = set(_names(function.__code__))
        if FLAG in named:
            return True
        todo += [f for name in named for f in _functions(function.__globals__.get(name))]
        todo += [f for cell in function.__closure__ or () for f in _functions(_content(cell))]
    return False


def _functions(value: Any) -> list[FunctionType]:
    parts = (value, *(getattr(value, name, None) for name in ("__func__", "__wrapped__", "fget", "func")))
    return [part for part in parts if isinstance(part, FunctionType)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names and strings that a function's code and the code in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def joined_sites(now: Sites, other: Sites) -> tuple[Sites, dict[str, tuple[frozenset[str], ...]]]:
    """Return the sites of both modes by owner, and the smaller sets of them that one mode has.

    A mode may leave out whole modules. Raises MHC213 where a module that both modes run has other sites in one of them,
    because equal numbers would then name different additions.
    """
    sites, partial = {}, {}
    for owner in [*now, *(path for path in other if path not in now)]:
        modes = [mode[owner] for mode in (now, other) if owner in mode]
        _refuse_mixed(owner, modes)
        larger = max(modes, key=len)
        sites[owner] = larger | {name: hidden for mode in modes for name, hidden in mode.items() if name not in larger}
        partial[owner] = tuple(frozenset(mode) for mode in modes if len(mode) < len(sites[owner]))
    return sites, partial


def _refuse_mixed(owner: str, modes: Sequence[dict[str, int]]) -> None:
    one, two = modes[0], modes[-1]
    shared = {_module_of(name) for name in one} & {_module_of(name) for name in two}
    wrong = [name for name in one | two if _module_of(name) in shared and one.get(name) != two.get(name)]
    if wrong:
        raise MHCError("MHC213", f"{', '.join(wrong)}: not the same in both, in modules that both run", module=owner)


def _module_of(site: str) -> str:
    return site.partition("#")[0]
