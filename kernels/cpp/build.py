"""Compile generated C++ with the compiler and flags of `torch.compile` and load it."""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from mhc_compile.kernels.cache import cache_dir, write_once
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp.backward import backward_source
from mhc_compile.kernels.cpp.forward import forward_source

Direction = Literal["forward", "backward"]
# Multiplications and additions may fuse, as in the reference's matrix products; lane loops are unrolled into registers.
FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-funroll-loops", "-w")


@lru_cache(maxsize=1)
def lanes() -> int:
    """Floats in a vector register of this machine, as `torch.compile` finds it; 4 where it finds none."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa = pick_vec_isa()
    return max(4, isa.nelements()) if isa else 4


def source(chain: Chain, direction: Direction) -> str:
    """The generated C++ of one direction for this machine."""
    return (forward_source if direction == "forward" else backward_source)(chain, lanes())


@cache
def load(chain: Chain, direction: Direction) -> Any:
    """The compiled function, from the cache or compiled now. Raises what the compiler raises where there is none."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    code = source(chain, direction)
    options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=False, extra_flags=FLAGS)
    command = CppBuilder(name="o", sources="i", BuildOption=options).get_command_line()
    key = hashlib.sha256(f"{command}\n{code}".encode()).hexdigest()[:16]
    directory = cache_dir()
    library = directory / f"{chain.name}_{direction}_{key}.so"
    if not library.exists():
        text = library.with_suffix(".cpp")
        write_once(text, code)
        with tempfile.TemporaryDirectory(dir=directory) as work:  # a killed compiler leaves nothing that is loaded
            builder = CppBuilder(name="kernel", sources=str(text), BuildOption=options, output_dir=work)
            builder.build()
            Path(builder.get_target_file_path()).replace(library)
    return getattr(ctypes.CDLL(str(library)), direction)
