"""The generated Triton compiled for GPUs that are not here: 64-bit offsets, tensor cores, registers without spills."""

from __future__ import annotations

import re
from typing import Literal, get_args

import pytest
import torch

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.triton import blocks, build
from mhc_compile.kernels.triton import run as triton_run


def boundary(width: int, dtype: torch.dtype) -> Chain:
    return Chain(kind="boundary", stream=StreamSpec(), width=width, streams_dtype=dtype, branch_dtype=dtype)


pytestmark = pytest.mark.skipif(
    triton_run.unsupported(boundary(8, torch.float32)) is not None, reason="Triton is not installed"
)
KERNELS = get_args(build.Kernel)
Target = tuple[Literal["cuda", "hip"], int | str]
TARGETS: list[Target] = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or what an earlier version compiled would be looked at


@pytest.mark.parametrize("kernel", KERNELS)
def test_boundary_compiles_for_sm_90(kernel: build.Kernel) -> None:
    chain = boundary(1280, torch.bfloat16)
    compiled = build.compile_for(chain, kernel, "cuda", 90, blocks.default(chain, kernel))
    assert re.search(r"mma\.sync|wgmma\.mma_async", compiled.texts["ptx"])
    assert compiled.shared <= 227 * 1024
    registers, stack = compiled.registers()
    assert registers <= 255
    assert stack == 0
    # A token's number times a width is formed in 64 bits, from the program's number on.
    ttir, tokens = compiled.texts["ttir"], blocks.default(chain, kernel).tokens
    assert re.search(rf"arith\.muli .* : tensor<{tokens}x1xi64>", ttir)
    assert not re.search(rf"arith\.muli .* : tensor<{tokens}x1xi32>", ttir)
    assert re.search(r"arith\.extsi %\S+ : i32 to i64", ttir)
    assert len(re.findall(r"tt\.addptr .*x\d+xi64>", ttir)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}{t[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1280, 4096, 7168])
def test_every_target_compiles_and_keeps_its_values_in_registers(
    width: int, dtype: torch.dtype, target: Target
) -> None:
    chain = boundary(width, dtype)
    for kernel in KERNELS:
        compiled = build.compile_for(chain, kernel, *target, blocks.default(chain, kernel))
        if target[0] == "hip":
            assert compiled.texts["hsaco"]
            continue
        registers, stack = compiled.registers()
        print(f"{target[1]} {chain.name} {kernel}: {registers} registers, {stack} bytes of stack")
        # On the others a few values of one kernel go through the stack.
        assert stack <= (0 if target[1] == 90 else 64), kernel
        assert compiled.shared <= (163 if target[1] == 80 else 227) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coefficients", "aggregate", "distribute", "read", "reduce", "leave"])
def test_every_kind_compiles(kind: Literal["read"]) -> None:
    chains = [Chain(kind=kind, stream=StreamSpec(exit=how), width=1280) for how in ("mean", "head")]
    for chain in chains:
        for kernel in KERNELS if chain.projects else KERNELS[:2]:
            compiled = build.compile_for(chain, kernel, "cuda", 90, blocks.default(chain, kernel))
            assert compiled.registers()[1] == 0
