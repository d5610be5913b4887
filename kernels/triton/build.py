"""Write generated Triton to the cache directory, import it, and compile it for GPUs that need not be here."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from mhc_compile.kernels import signature
from mhc_compile.kernels.cache import cache_dir, write_once
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.triton.backward import backward_pointers, backward_source
from mhc_compile.kernels.triton.blocks import Blocks
from mhc_compile.kernels.triton.forward import forward_source

Direction = Literal["forward", "backward"]
Kernel = Literal["forward", "backward", "phi_gradient"]
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def source(chain: Chain, direction: Direction) -> str:
    """The generated Python file of one direction."""
    return (forward_source if direction == "forward" else backward_source)(chain)


@cache
def load(chain: Chain, direction: Direction) -> ModuleType:
    """The generated file as a module, whose kernels Triton compiles at their first call.

    Under `TRITON_INTERPRET=1` they run on CPU tensors. Raises ImportError where there is no Triton.
    """
    return module_of(f"{chain.name}_{direction}", source(chain, direction))


def module_of(name: str, code: str) -> ModuleType:
    """The module of any generated file, from the cache directory. Raises ImportError where there is no Triton."""
    name = f"{name}_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    path = cache_dir() / f"{name}.py"
    write_once(path, code)
    spec = importlib.util.spec_from_file_location(f"mhc_compile_generated.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def precision(chain: Chain, kernel: Kernel, backend: str) -> str:
    """How float32 products are formed on tensor cores: as three TF32 products on NVIDIA, in float32 elsewhere.

    What the backward adds to a gradient that is rounded to half precision is one TF32 product; to a float32 gradient it
    is added without tensor cores, whose layout would leave too few registers.
    """
    if backend != "cuda" or (kernel == "backward" and chain.streams_dtype == torch.float32):
        return "ieee"
    return "tf32" if kernel == "backward" else "tf32x3"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU."""

    texts: dict[str, Any]
    """By file type: `ttir`, `ttgir`, `ptx` and `cubin`, or `amdgcn` and `hsaco`."""
    shared: int
    """Bytes of shared memory a program."""

    def registers(self) -> tuple[int, int]:
        """Registers a thread and bytes of its stack (spilled registers), of a kernel for NVIDIA's GPUs."""
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.texts["cubin"])
            file.flush()
            printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+)", printed.stdout + printed.stderr)
        assert found, printed
        return int(found[1]), int(found[2])


def compile_for(
    chain: Chain, kernel: Kernel, backend: Literal["cuda", "hip"], arch: int | str, blocks: Blocks
) -> Compiled:
    """Compile one kernel of `chain` for an architecture (`("cuda", 90)`, `("hip", "gfx942")`) on any machine.

    Raises ImportError without Triton and what its compiler raises.
    """
    fn = getattr(load(chain, "forward" if kernel == "forward" else "backward"), kernel)
    constants = {"BT": blocks.tokens, "BK": blocks.columns, "PRECISION": precision(chain, kernel, backend)}
    names = pointers(chain, kernel)
    types = {
        name: _POINTERS[dtype_of(chain, name)] if name in names else "constexpr" if name in constants else "i64"
        for name in fn.arg_names
    }
    # What a launch finds for itself: storage begins at multiples of 16 bytes, and so do tokens of such a width.
    aligned = [i for i, name in enumerate(fn.arg_names) if name in names]
    if chain.stream.streams * chain.width % 16 == 0:
        aligned.append(fn.arg_names.index("x_stride"))
    return compile_kernel(fn, types, constants, aligned, backend, arch, blocks)


def compile_kernel(
    fn: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[int],
    backend: Literal["cuda", "hip"],
    arch: int | str,
    blocks: Blocks,
) -> Compiled:
    """Compile any kernel for an architecture; `aligned` are the arguments that are multiples of 16.

    Raises ImportError without Triton and what its compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(fn, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget(backend, arch, 64 if backend == "hip" else 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True},
    )
    return Compiled(dict(compiled.asm), compiled.metadata.shared)


def pointers(chain: Chain, kernel: Kernel) -> tuple[str, ...]:
    """The tensors that a kernel takes, in order."""
    if kernel == "forward":
        return (*signature.inputs(chain), *signature.outputs(chain))
    if kernel == "backward":
        return backward_pointers(chain)
    return ("X", *(("y", "post", "mix") if chain.mixes else ()), "du", "partial")


def dtype_of(chain: Chain, name: str) -> torch.dtype:
    """The dtype of a kernel's tensor."""
    if name in ("dlogits", "du", "sums", "norm_sums", "partial"):
        return torch.float32
    return signature.dtype(chain, name.removeprefix("d_"))
