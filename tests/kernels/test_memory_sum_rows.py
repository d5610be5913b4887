"""The fused look-up by content against the equations, values and gradients; its Triton compiled for absent GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory_sum_rows_worker as worker
import pytest
import torch
from memory_sum_rows_worker import errors, fused, leaves, operands, spec

from mhc_compile.kernels.memory import sum_rows
from mhc_compile.kernels.memory.sum_rows_triton import KERNELS, WARPS, Launch
from mhc_compile.memory.tables import MemoryTable

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


@pytest.mark.parametrize(
    ("storage", "dtype"), [("device", torch.float32), ("host", torch.float32), ("device", torch.bfloat16)]
)
@pytest.mark.parametrize(("groups", "read", "cores"), [(4, 0, 2), (1, 3, 1), (4, 3, 3)])
def test_values_and_gradients_are_those_of_the_equations(
    storage: Any, dtype: torch.dtype, groups: int, read: int, cores: int
) -> None:
    s = spec(groups, read)
    table = MemoryTable(s.rows, read + 6, storage=storage, dtype=dtype).start(1, 1.0)
    in_cpp = storage == "device" and dtype == torch.float32
    assert sum_rows._target(table, torch.zeros(1), None) == ("cpp" if in_cpp else "reference")
    # The rows' gradient is rounded once to theirs.
    assert max(errors(table, s, operands(s, cores)).values()) < (1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(("read", "slice_"), [(0, 16 * 4 + 16 + 7), (37, 20)])
def test_many_rows_and_whole_vectors_by_any_number_of_threads(read: int, slice_: int) -> None:
    s = spec(4, read, rows=5000)  # sorted by more digits than one
    table, p = MemoryTable(s.rows, read + 2 * slice_).start(1, 1.0), operands(s, 2, (3, 99), 16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert max(errors(table, s, p).values()) < 1e-6
        out = fused(table, s, p)
        gradients = torch.autograd.grad(out.square().sum(), [*leaves(p), table.anchor])
        taken = table.take_gradient()
        assert taken is not None
        results.append([out, *gradients, *taken])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_tokens_at_all() -> None:
    s = spec(4, 3)
    table, p = MemoryTable(s.rows, 9).start(1, 1.0), operands(s, 2)
    p = {name: t[:0] if t is not None else None for name, t in p.items()}
    out = fused(table, s, p)
    assert out.shape == (0, 5, 24)
    out.sum().backward()


def test_a_gradient_is_kept_until_it_is_taken_whatever_comes_next() -> None:
    s = spec(1, 0, rows=1 << 14)
    table, p = MemoryTable(s.rows, 256).start(1, 1.0), operands(s, 2, (512,), 16)
    fused(table, s, p).sum().backward()
    first = table.take_gradient()
    assert first is not None
    before = first.values.clone()
    fused(table, s, {**p, "scores": p["scores"].detach().requires_grad_()}).square().sum().backward()
    assert torch.equal(first.values, before)
    s = spec(1, 0)
    table = MemoryTable(s.rows, 6, trainable=False).start(1, 1.0)
    p = operands(s, 2)
    (gradient,) = torch.autograd.grad(fused(table, s, p).sum(), leaves(p))
    assert bool(gradient.any())
    assert table.gradient is None


def test_rows_outside_are_refused() -> None:
    s = spec(1, 0)
    table = MemoryTable(4, 6).start(1, 1.0)
    with pytest.raises(IndexError, match="a table with 4 rows"):
        fused(table, s, operands(s, 2))


def test_the_registration() -> None:
    s = spec(4, 3)
    table = MemoryTable(s.rows, 9).start(1, 1.0)
    arguments = (*operands(s, 3).values(), table.anchor, table.handle, table.width, str(s))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.engram_kernels.sum_rows.default, arguments, test_utils=checks)
    p = operands(s, 3)
    (first,) = torch.autograd.grad(fused(table, s, p).square().sum(), p["scores"], create_graph=True)
    with pytest.raises(NotImplementedError):
        first.sum().backward()


CASES = [
    {"groups": groups, "read": read, "cores": cores, "slice": width, "tokens": tokens, "found": found}
    | {"dtype": dtype, "read_dtype": read_dtype}
    for groups, read, cores, width, tokens, found, dtype, read_dtype in (
        (4, 0, 2, 8, (2, 3), 6, "bfloat16", "float32"),
        (1, 3, 1, 5, (3,), 20, "float32", "float32"),
        (4, 300, 3, 2, (1, 2), 5, "float32", "bfloat16"),
        (2, 7, 2, 16, (2,), 3, "bfloat16", "bfloat16"),
        (1, 0, 2, 270, (2,), 3, "float32", "float32"),
    )
]


@needs_triton
def test_triton_gives_the_equations_values_and_gradients() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    lines = "\n".join(map(json.dumps, CASES))
    found = subprocess.run(
        [sys.executable, str(Path(worker.__file__))], env=environment, input=lines, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-4000:]
    seen = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(seen) == len(CASES)
    for case, row in zip(CASES, seen, strict=True):
        assert row["triton"]
        assert not row["waits"]
        for name, error in row["errors"].items():
            # What is read in bfloat16 has a gradient in bfloat16.
            rounded = name == "input" and case["read_dtype"] == "bfloat16"
            assert error < (8e-3 if rounded else 1e-6), (case, name)


@needs_triton
@pytest.mark.parametrize("arch", [90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("read", [0, 192])
def test_triton_compiles_with_64_bit_offsets_and_without_spills(
    read: int, dtype: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mhc_compile.kernels.memory import sum_rows_kernel
    from mhc_compile.kernels.triton.build import compile_kernel
    from mhc_compile.kernels.triton.tiles import TileConfig

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = Launch(tokens=1, M=16, READ=read, CORES=2, SLICE=96 if read else 256, GROUPS=1 if read else 4)
    for name in KERNELS:
        if name in ("scales", "read_gradient") and not read:
            continue
        kernel, constants = getattr(sum_rows_kernel, name), launch.constants(name)
        whole = dict.fromkeys(("rows", "groups", "order", "begins"), "*i64")
        narrow = dict.fromkeys(("table", "read", "d_read"), f"*{dtype}")
        kinds = whole | narrow | dict.fromkeys(constants, "constexpr")
        types = {each: kinds.get(each, "*fp32") for each in kernel.arg_names}
        aligned = [i for i, each in enumerate(kernel.arg_names) if each not in constants]
        tile = TileConfig(tokens=constants["BM"], columns=constants["BK"], warps=WARPS)
        compiled = compile_kernel(kernel, types, constants, aligned, "cuda", arch, tile)
        registers, stack = compiled.registers()
        assert registers <= 128, name
        assert stack == 0, name
        ttir = compiled.texts["ttir"]
        # A row's number times a width is formed in 64 bits; in 32 bits goes a program's own place in a token.
        assert re.search(r"arith\.muli .* : (tensor<\d+x1x)?i64", ttir), name
        assert not re.search(r"arith\.muli .* : tensor<[\dx]+xi32>", ttir), name
