"""Who computes a fused chain: generated C++ on a CPU, generated Triton on a GPU, plain PyTorch anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

from torch import Tensor

from mhc_compile.diagnostics import warn
from mhc_compile.kernels import plain
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.cpp import run as cpp
from mhc_compile.kernels.triton import build as triton_build
from mhc_compile.kernels.triton import run as triton

Provider = Literal["triton", "cpp", "reference"]
Values = Mapping[str, Tensor]
Run = Callable[[Chain, build.Direction, Values, tuple[str, ...], tuple[int, ...]], Values]
SOURCE: dict[Provider, Callable[[Chain, build.Direction], str]] = {"cpp": build.source, "triton": triton_build.source}
RUN: dict[Provider, Run] = {"cpp": cpp.run, "triton": triton.run, "reference": plain.run}


@cache
def choose(chain: Chain, device: str) -> tuple[Provider, str]:
    """The provider of `chain` on a type of device (`cpu`, `cuda`, ...), and why it is not a faster one (or nothing)."""
    if device == "cuda" or (device == "cpu" and triton.interprets()):
        reason = triton.unsupported(chain) or ""
        return ("reference", reason) if reason else ("triton", "")
    if device == "cpu":
        reason = cpp.unsupported(chain) or ("no C++ compiler" if no_compiler() else "")
        return ("reference", reason) if reason else ("cpp", "")
    return "reference", f"no kernels for {device}"


@cache
def no_compiler() -> bool:
    """Whether this machine compiles no C++, which is said once a process."""
    problem = build.compiler_problem()
    if problem:
        warn("MHC309", problem)  # once a process
    return bool(problem)


def look_for_compilers(device: str) -> None:
    """Find out what this machine can compile, which takes a second in a new process and is kept.

    `choose` does so by itself; called before, it does not count as time of the pass that asks first.
    """
    if device == "cpu" and not triton.interprets():
        no_compiler()


def prepare(chain: Chain, device: str) -> None:
    """Begin to compile what will compute `chain`, so that its first call does not wait."""
    if choose(chain, device)[0] == "cpp":
        build.start(chain)


def source(chain: Chain, direction: build.Direction, device: str) -> str:
    """The code generated for `chain`. Raises ValueError where it has none: plain PyTorch computes it."""
    provider, reason = choose(chain, device)
    if provider == "reference":
        raise ValueError(f"{chain.name}: {reason}")
    return SOURCE[provider](chain, direction)


def run(
    chain: Chain, direction: build.Direction, values: Values, wanted: tuple[str, ...], lead: tuple[int, ...]
) -> Values:
    """Compute one direction with the provider of the streams' device. Results by name."""
    provider, _ = choose(chain, values["X"].device.type)
    return RUN[provider](chain, direction, values, wanted, lead)
