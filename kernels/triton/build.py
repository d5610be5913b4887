"""Write generated Triton to the cache directory, import it, and compile it, also for GPUs that this machine lacks."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mhc_compile.kernels.cache import cache_dir, write_once
from mhc_compile.kernels.triton.tiles import TileConfig


def module_of(name: str, code: str) -> ModuleType:
    """Return the module of a generated file, from the cache directory. Raises ImportError where there is no Triton."""
    name = f"{name}_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    path = cache_dir() / f"{name}.py"
    write_once(path, code)
    spec = importlib.util.spec_from_file_location(f"mhc_compile_generated.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU."""

    texts: dict[str, Any]
    """By file type: `ttir`, `ttgir`, `ptx` and `cubin`, or `amdgcn` and `hsaco`."""
    shared: int
    """Bytes of shared memory per program."""

    def registers(self) -> tuple[int, int]:
        """Return the registers per thread and bytes of its stack (spilled registers) of a kernel for NVIDIA GPUs."""
        usage = re.search(r"REG:(\d+) STACK:(\d+)", self._read_by("cuobjdump", "-res-usage"))
        assert usage
        return int(usage[1]), int(usage[2])

    def disassembly(self) -> str:
        """Return the machine code of a kernel for NVIDIA GPUs as text, an instruction or a label per line."""
        return self._read_by("nvdisasm", "-c")

    def _read_by(self, tool: str, option: str) -> str:
        """Return what a tool that Triton ships prints about the cubin."""
        import triton

        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.texts["cubin"])
            file.flush()
            printed = subprocess.run([path, option, file.name], capture_output=True, text=True, check=True)
        return printed.stdout + printed.stderr


def compile_kernel(
    fn: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[int],
    backend: Literal["cuda", "hip"],
    arch: int | str,
    tile: TileConfig,
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
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
    )
    return Compiled(dict(compiled.asm), compiled.metadata.shared)
