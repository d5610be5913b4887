"""Check versions, compilers, devices and cache folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.version import Version

from mhc_compile import versions
from mhc_compile.kernels import cache
from mhc_compile.kernels.cpp import build

REQUIRED = ("python", "torch")
State = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line of the output: what was checked, its state, the details, and what to do about it."""

    name: str
    state: State
    detail: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.name:<16}  {self.detail}" + (f"\n{'':24}do: {self.todo}" if self.todo else "")


def stack() -> Iterator[Check]:
    """Compare each installed version with those that the tests ran with."""
    present = versions.installed()
    for package in versions.STACK:
        span = versions.tested(package)
        if span is None:
            yield Check(package, "note", f"{present.get(package, 'not installed')}; no run of the tests is recorded")
            continue
        oldest, newest = span
        known = f"tested with {oldest}" + (f" to {newest}" if newest != oldest else "")
        version = present.get(package)
        if version is None:
            yield Check(package, "note", f"not installed; {known}")
        elif versions.newer(package, version):
            todo = f"if something breaks, install {package} {newest}"
            yield Check(package, "note", f"{version} is newer than the tests; {known}", todo)
        elif Version(version).release[:2] < oldest.release[:2]:
            state: State = "FAIL" if package in REQUIRED else "note"
            yield Check(package, state, f"{version} is older than the tests; {known}", f"install {package} {newest}")
        else:
            yield Check(package, "ok", f"{version}; {known}")


def compilers() -> Iterator[Check]:
    """Compile a small C++ file as kernels are compiled; look for Triton where a GPU needs it."""
    if problem := build.compiler_problem():
        yield Check("C++ compiler", "FAIL", problem, "install gcc or clang, or set CXX to one that is installed")
    else:
        yield Check("C++ compiler", "ok", f"compiles and loads kernels, {build.lanes()} float32 values per register")
    if importlib.util.find_spec("triton") is not None:
        yield Check("Triton", "ok", "installed" if torch.cuda.is_available() else "installed; kernels for CPUs are C++")
    elif torch.cuda.is_available():
        yield Check("Triton", "FAIL", "not installed, and the kernels for GPUs are Triton", "pip install triton")
    else:
        yield Check("Triton", "ok", "not installed, and not needed without a GPU")


def devices() -> Iterator[Check]:
    """List the CPU and the accelerators, with what has no kernels of ours."""
    yield Check("CPU", "ok", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            name = f"cuda:{index}"
            detail = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
            if torch.version.hip is None and properties.major < 8:
                yield Check(name, "note", f"{detail}: kernels are for 8.0 and later", "use it with kernels='none'")
            else:
                yield Check(name, "ok", detail)
    elif (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        yield Check(str(accelerator), "note", "no kernels for this device", "use it with kernels='none'")
    else:
        yield Check("GPU", "ok", "none that torch can use")


def folders() -> Iterator[Check]:
    """Check that others cannot write where generated code is kept: what lies there is loaded and run."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache

    for name, folder, variable in (
        ("cache", cache.configured(), "MHC_COMPILE_CACHE_DIR"),
        ("Inductor's cache", Path(inductor_cache()), "TORCHINDUCTOR_CACHE_DIR"),
    ):
        if problem := cache.problem(folder):
            todo = f"chmod go-w {folder}, or set {variable} to a folder that you alone can write"
            yield Check(name, "FAIL", f"{folder}: {problem}", todo)
        else:
            yield Check(name, "ok", f"{folder}: you alone can write there")
