"""Choose the target of a kernel: generated C++ on a CPU, generated Triton on a GPU, otherwise plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from torch import Tensor

from mhc_compile.kernels.cpp.build import no_compiler
from mhc_compile.kernels.in_cpp import Cpp
from mhc_compile.kernels.in_triton import Triton
from mhc_compile.kernels.kernelspec import DIRECTIONS, Direction, KernelSpec, Values
from mhc_compile.kernels.target import Plan, Reference, Source, Target
from mhc_compile.kernels.triton.launch import interprets

TARGETS: dict[str, Target] = {target.name: target for target in (Triton(), Cpp(), Reference())}
_ONLY: ContextVar[str] = ContextVar("only", default="")


@cache
def choose(spec: KernelSpec, device: str) -> tuple[str, str]:
    """Return the target's name for a type of device (`cpu`, `cuda`, ...), and why it is not a faster one, or ""."""
    if device not in ("cpu", "cuda"):
        return "reference", f"no kernels for {device}"
    name = "triton" if device == "cuda" or interprets() else "cpp"
    reason = TARGETS[name].unsupported(spec)
    return ("reference", reason) if reason else (name, "")


def look_for_compilers(device: str) -> None:
    """Find out what this machine can compile, which takes a second in a new process and is kept.

    `choose` does so by itself; called before, it does not count as time of the pass that asks first.
    """
    if device == "cpu" and not interprets():
        no_compiler()


def prepare(spec: KernelSpec, device: str, directions: Sequence[Direction] = DIRECTIONS, *, wait: bool = True) -> None:
    """Begin to compile what will compute `spec`, so that its first call waits less.

    Without `wait` it does not wait at all: plain PyTorch computes, equal to rounding, until the kernel is loaded.
    """
    TARGETS[choose(spec, device)[0]].prepare(spec, directions, wait=wait)


def wait() -> None:
    """Wait until every kernel that is being compiled is loaded: for measurements, and before a process ends."""
    for target in TARGETS.values():
        target.wait()


def source(spec: KernelSpec, direction: Direction, device: str) -> Source:
    """Generate the code of one direction. Raises ValueError where plain PyTorch computes it."""
    name, reason = choose(spec, device)
    if name == "reference":
        raise ValueError(f"{spec.name}: {reason}")
    return TARGETS[name].source(spec, direction)


def run(spec: KernelSpec, direction: Direction, values: Values) -> dict[str, Tensor]:
    """Compute one direction on the device of `values`; return its outputs by name."""
    arguments = spec.call(values, direction)
    name = _ONLY.get() or choose(spec, next(iter(arguments.values())).device.type)[0]
    return TARGETS[name].run(spec, direction, arguments)


class Planned(NamedTuple):
    """The compiled call for one set of shapes and dtypes, and its target."""

    plan: Plan
    target: Target


def planned(spec: KernelSpec, direction: Direction, values: Values) -> Planned | None:
    """Return what computes contiguous `values` of these shapes and dtypes from now on, if their target knows."""
    target = TARGETS[choose(spec, next(iter(values.values())).device.type)[0]]
    plan = target.plan(spec, direction, spec.call(values, direction))
    return None if plan is None else Planned(plan, target)


def may_run(found: Planned) -> bool:
    """Return whether the target of a plan is the one that computes now."""
    return not _ONLY.get() and TARGETS[found.target.name] is found.target


@contextmanager
def only(name: str) -> Iterator[None]:
    """Let one target compute everything meanwhile."""
    token = _ONLY.set(name)
    try:
        yield
    finally:
        _ONLY.reset(token)
