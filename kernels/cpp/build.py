"""Compile generated C++ with the compiler and flags of `torch.compile` and load it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, lru_cache
from pathlib import Path
from threading import BoundedSemaphore, Thread
from typing import Any

import torch

from mhc_compile.diagnostics import warn
from mhc_compile.kernels.cache import cache_dir, write_once
from mhc_compile.kernels.cpp.prelude import prelude

# Multiplications and additions may fuse, as in the reference's matrix products; lane loops are unrolled into registers.
FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-funroll-loops", "-w")

_COMPILERS = BoundedSemaphore(os.cpu_count() or 1)


@lru_cache(maxsize=1)
def vector_isa() -> Any:
    """Return the vector instructions of this machine as `torch.compile` detects them, false without any.

    That compiles and loads a file for each kind of instructions in every new process. The name of what was found is
    kept for the next one, beside what it depends on; it is compared with names that torch knows, and never executed.
    """
    from torch._inductor import config, cpu_vec_isa

    known = {str(isa): isa for isa in cpu_vec_isa.supported_vec_isa_list}
    machine: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    asked = [torch.__version__, str(config.cpp.cxx), config.cpp.simdlen, os.environ.get("ATEN_CPU_CAPABILITY"), machine]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = cache_dir() / f"vectors_{key}.txt"
    name = path.read_text() if machine and path.exists() else ""
    if name in known:
        return known[name]
    isa = cpu_vec_isa.pick_vec_isa()
    if machine and str(isa) in known:
        write_once(path, str(isa))
    return isa


@lru_cache(maxsize=1)
def lanes() -> int:
    """Return the floats in a vector register of this machine, or 4."""
    isa = vector_isa()
    return max(4, isa.nelements()) if isa else 4


@cache
def compiler_problem() -> str:
    """Return why C++ cannot be compiled on this machine, or '' where a small file compiles and loads."""
    try:
        probe = 'extern "C" int probe() { return omp_get_max_threads(); }'
        ctypes.CDLL(str(compiled("probe", prelude(lanes()) + probe)))
    except Exception as error:  # whatever the machinery of torch.compile raises for a missing or broken compiler
        first = str(error).strip().splitlines()
        return f"{type(error).__name__}: {first[0] if first else 'no compiler'}"
    return ""


@cache
def no_compiler() -> bool:
    """Return whether this machine compiles no C++, and warn once per process where it does not."""
    problem = compiler_problem()
    if problem:
        warn("MHC309", problem)
    return bool(problem)


def begin(name: str, code: Callable[[], str]) -> Future[ctypes.CDLL]:
    """Begin to generate and compile `code`, one job per core at a time. The future raises what goes wrong."""
    future: Future[ctypes.CDLL] = Future()

    def work() -> None:
        try:
            with _COMPILERS:
                path = compiled(name, code())
            future.set_result(ctypes.CDLL(str(path)))
        except BaseException as error:  # any error reaches the caller that waits for the kernel
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def compiled(name: str, code: str) -> Path:
    """Return the library of `code`, from the cache or compiled. Raises what the machinery of `torch.compile` raises."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    options = CppTorchOptions(vec_isa=vector_isa(), include_pytorch=False, extra_flags=FLAGS)
    command = CppBuilder(name="o", sources="i", BuildOption=options).get_command_line()
    key = hashlib.sha256(f"{command}\n{code}".encode()).hexdigest()[:16]
    directory = cache_dir()
    library = directory / f"{name}_{key}.so"
    if not library.exists():
        text = library.with_suffix(".cpp")
        write_once(text, code)
        with tempfile.TemporaryDirectory(dir=directory) as work:  # a killed compiler leaves nothing that is loaded
            builder = CppBuilder(name="kernel", sources=str(text), BuildOption=options, output_dir=work)
            builder.build()
            Path(builder.get_target_file_path()).replace(library)
    return library
