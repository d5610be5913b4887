"""Who computes how a memory enters the streams: generated C++ on a CPU, Triton on a GPU, plain PyTorch anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from torch import Tensor

from mhc_compile.kernels.engram import plain
from mhc_compile.kernels.engram.cpp import run as cpp
from mhc_compile.kernels.engram.entry import Direction, Entry, Sizes
from mhc_compile.kernels.engram.triton import run as triton
from mhc_compile.kernels.providers import Provider, no_compiler
from mhc_compile.kernels.triton.run import interprets

Run = Callable[[Entry, Direction, Mapping[str, Tensor], Sizes], dict[str, Tensor]]
SOURCE: dict[Provider, Callable[[Entry, Direction], str]] = {"cpp": cpp.source, "triton": triton.source}
RUN: dict[Provider, Run] = {"cpp": cpp.run, "triton": triton.run, "reference": plain.run}


@cache
def choose(entry: Entry, device: str) -> tuple[Provider, str]:
    """The provider of `entry` on a type of device (`cpu`, `cuda`, ...), and why it is not a faster one (or nothing)."""
    if device == "cuda" or (device == "cpu" and interprets()):
        reason = triton.unsupported(entry) or ""
        return ("reference", reason) if reason else ("triton", "")
    if device == "cpu":
        reason = cpp.unsupported(entry) or ("no C++ compiler" if no_compiler() else "")
        return ("reference", reason) if reason else ("cpp", "")
    return "reference", f"no kernels for {device}"


def prepare(entry: Entry, device: str) -> None:
    """Begin to compile what will compute `entry`, so that its first call does not wait."""
    if choose(entry, device)[0] == "cpp":
        cpp.start(entry)


def source(entry: Entry, direction: Direction, device: str) -> str:
    """The code generated for `entry`. Raises ValueError where it has none: plain PyTorch computes it."""
    provider, reason = choose(entry, device)
    if provider == "reference":
        raise ValueError(f"{entry.name}: {reason}")
    return SOURCE[provider](entry, direction)


def run(entry: Entry, direction: Direction, values: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Compute one direction with the provider of the values' device. Results by name."""
    provider, _ = choose(entry, next(iter(values.values())).device.type)
    return RUN[provider](entry, direction, values, sizes)
