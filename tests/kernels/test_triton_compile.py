"""The generated Triton compiled for GPUs that are not here: 64-bit offsets, tensor cores, registers without spills."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch

from mhc_compile.kernels.chain import Chain, Norm
from mhc_compile.kernels.in_triton import Triton, launcher_of
from mhc_compile.kernels.kernelspec import Direction
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.triton.build import Compiled


def boundary(width: int, dtype: torch.dtype, norm: Norm = "none") -> Chain:
    return Chain(
        kind="boundary", stream=StreamSpec(), width=width, streams_dtype=dtype, branch_dtype=dtype, norm=norm,
        norm_eps=1e-6,
    )  # fmt: skip


pytestmark = pytest.mark.skipif(
    bool(Triton().unsupported(boundary(8, torch.float32))), reason="Triton is not installed"
)
KERNELS = ("forward", "backward", "phi_gradient")
Target = tuple[Literal["cuda", "hip"], int | str]
TARGETS: list[Target] = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]
# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or what an earlier version compiled would be looked at


def compiled_for(chain: Chain, kernel: str, backend: Literal["cuda", "hip"], arch: int | str) -> Compiled:
    direction: Direction = "forward" if kernel == "forward" else "backward"
    return launcher_of(chain).compile_for(chain, direction, kernel, backend, arch)


def spilled(compiled: Compiled, backend: str) -> int:
    """Bytes of memory that a thread keeps values in for want of registers."""
    if backend == "cuda":
        return compiled.registers()[1]
    found = re.search(r"\.private_segment_fixed_size:\s+(\d+)", compiled.texts["amdgcn"])
    assert found
    return int(found[1])


@pytest.mark.parametrize("norm", [n if n == "rms" else pytest.param(n, marks=pytest.mark.slow) for n in get_args(Norm)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_boundary_compiles_for_sm_90(kernel: str, norm: Norm) -> None:
    chain = boundary(1280, torch.bfloat16, norm)
    cut = launcher_of(chain).tiles(chain, kernel, 90)[0]
    compiled = compiled_for(chain, kernel, "cuda", 90)
    assert re.search(r"mma\.sync|wgmma\.mma_async", compiled.texts["ptx"])
    assert compiled.shared <= 227 * 1024
    registers, stack = compiled.registers()
    assert registers <= 255
    assert stack == 0
    # A token's number times a width is formed in 64 bits, from the program's number on.
    ttir = compiled.texts["ttir"]
    assert re.search(rf"arith\.muli .* : tensor<{cut.tokens}x1xi64>", ttir)
    assert not re.search(rf"arith\.muli .* : tensor<{cut.tokens}x1xi32>", ttir)
    assert re.search(r"arith\.extsi %\S+ : i32 to i64", ttir)
    assert len(re.findall(r"tt\.addptr .*x\d+xi64>", ttir)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}{t[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("width", [1280, 4096, 7168])
def test_every_target_compiles_and_keeps_its_values_in_registers(
    width: int, norm: Norm, dtype: torch.dtype, target: Target
) -> None:
    chain, (backend, arch) = boundary(width, dtype, norm), target
    for kernel in KERNELS if norm == "none" else KERNELS[:2]:  # phi's gradient knows no norm
        compiled = compiled_for(chain, kernel, backend, arch)
        used = compiled.registers()[0] if backend == "cuda" else "?"
        print(f"{arch} {chain.name} {kernel}: {used} registers, {compiled.shared} bytes shared")
        assert spilled(compiled, backend) == 0, kernel
        assert compiled.shared <= SHARED[arch]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}{t[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", get_args(Norm))
def test_a_deferred_boundary_keeps_its_values_in_registers(norm: Norm, dtype: torch.dtype, target: Target) -> None:
    chain, (backend, arch) = replace(boundary(4096, dtype, norm), kind="deferred"), target
    for kernel in KERNELS[:2]:  # phi's gradient is a boundary's
        compiled = compiled_for(chain, kernel, backend, arch)
        assert spilled(compiled, backend) == 0, kernel
        assert compiled.shared <= SHARED[arch]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coefficients", "aggregate", "distribute", "read", "reduce", "leave"])
def test_every_kind_compiles(kind: Literal["read"]) -> None:
    chains = [Chain(kind=kind, stream=StreamSpec(exit=how), width=1280) for how in ("mean", "head")]
    if kind == "read":
        chains += [replace(chains[0], norm=norm) for norm in get_args(Norm)[1:]]
    for chain in chains:
        for kernel in KERNELS if chain.projects else KERNELS[:2]:
            compiled = compiled_for(chain, kernel, "cuda", 90)
            assert compiled.registers()[1] == 0
