"""The generated Triton of memories: interpreted against the float64 reference, and compiled for absent GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from memory_steps import STEPS, name_of

from mhc_compile.kernels import targets
from mhc_compile.kernels.in_triton import Triton, launcher_of
from mhc_compile.kernels.kernelspec import DIRECTIONS
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep

triton, launcher = Triton(), launcher_of(STEPS[0])
needs_triton = pytest.mark.skipif(bool(triton.unsupported(STEPS[0])), reason="Triton is not installed")
Target = tuple[Literal["cuda", "hip"], int | str]
TARGETS: list[Target] = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "MHC_COMPILE_CACHE_DIR": str(tmp_path_factory.mktemp("generated")),
    }
    worker = Path(__file__).with_name("memory_triton_worker.py")
    found = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


@needs_triton
def test_values_and_gradients_are_those_of_the_reference(interpreted: list[dict[str, Any]]) -> None:
    assert len(interpreted) == 1 + len(STEPS) + 3
    for row in interpreted[1:]:
        # The interpreter cuts bfloat16 off instead of rounding it: twice the error of a rounding.
        floor = 1.2e-2 if "float16" in row["name"] else 1e-5
        assert row["errors"].keys() >= {"d_value"} or "gate" in row["name"]
        for name, (found, plain) in row["errors"].items():
            assert found <= max(floor, 2 * plain), f"{row['name']}: {name} {found} against {plain}"


@needs_triton
def test_outputs_are_written_whole_whatever_comes_in(interpreted: list[dict[str, Any]]) -> None:
    rows = [row for row in interpreted[1:] if row["seen"]]
    assert len(rows) > 5
    for row in rows:
        assert row["seen"] == dict.fromkeys(("finite", "bit-equal", "strided", "no tokens"), True), row["name"]


@needs_triton
def test_ops_arrive_there_and_long_sequences_are_cut(interpreted: list[dict[str, Any]]) -> None:
    assert interpreted[0] == {"through the op": True, "long sequences": True, "any tile": True}


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_text_is_python_without_atomics(step: MemoryStep) -> None:
    for direction in DIRECTIONS:
        text = triton.source(step, direction).text
        compile(text, step.name, "exec")
        assert "atomic" not in text
        for kernel in launcher.kernels(step, direction):
            assert f"def {kernel}(" in text


@needs_triton
def test_what_has_no_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = MemoryStep(kind="add", streams=2, width=8, spec=FusionSpec(), value_dtype=torch.float64)
    assert "float64" in triton.unsupported(wide)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert triton.unsupported(STEPS[0]) == "Triton is not installed"
    targets.choose.cache_clear()
    assert targets.choose(STEPS[0], "cuda") == ("reference", "Triton is not installed")
    targets.choose.cache_clear()


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_measuring_tries_tiles_of_every_kernel_and_the_default_first(step: MemoryStep) -> None:
    for direction in DIRECTIONS:
        for kernel in launcher.kernels(step, direction):
            tiles = launcher.tiles(step, kernel, 90)
            assert len(set(tiles)) == len(tiles) > 8
            assert tiles[0].stages == 2


def step_of(kind: str, width: int, dtype: torch.dtype) -> MemoryStep:
    plain: Any = kind.removeprefix("joined ")
    return MemoryStep(
        kind=plain, streams=4, width=width, spec=FusionSpec(dilation=3),
        streams_dtype=dtype, keys_dtype=dtype, value_dtype=dtype, joins=plain != kind,
    )  # fmt: skip


@pytest.fixture
def _own_caches(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or what an earlier version compiled would be looked at


@needs_triton
@pytest.mark.usefixtures("_own_caches")
@pytest.mark.parametrize("kind", ["remember", "inject"])
def test_it_compiles_for_sm_90_with_64_bit_offsets(kind: str) -> None:
    step = step_of(kind, 1280, torch.bfloat16)
    for direction in DIRECTIONS:
        kernel = {"inject": {"backward": "walk"}}.get(kind, {}).get(direction, direction)
        compiled = launcher.compile_for(step, direction, kernel, "cuda", 90)
        assert compiled.registers()[1] == 0
        ttir = compiled.texts["ttir"]
        assert re.search(r"arith\.extsi %\S+ : i32 to i64", ttir)
        # A token's number times a width is formed in 64 bits; in 32 bits goes the number of a block of columns alone.
        wide = "i64" if kernel == "walk" else f"tensor<{launcher.tiles(step, kernel, 90)[0].tokens}x1xi64>"
        assert re.search(rf"arith\.muli .* : {wide}", ttir)
        assert not re.search(r"arith\.muli .* : tensor<\d+x1xi32>", ttir)
        assert len(re.findall(r"arith\.muli .* : i32", ttir)) <= 1


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_own_caches")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}{t[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1280, 4096, 7168])
@pytest.mark.parametrize("kind", ["gate", "joined gate", "add", "inject", "remember"])
def test_every_target_compiles_and_keeps_its_values_in_registers(
    kind: str, width: int, dtype: torch.dtype, target: Target
) -> None:
    step = step_of(kind, width, dtype)
    for direction in DIRECTIONS:
        for kernel in launcher.kernels(step, direction):
            compiled = launcher.compile_for(step, direction, kernel, *target)
            if target[0] == "hip":
                assert compiled.texts["hsaco"]
                continue
            registers, stack = compiled.registers()
            print(f"{target[1]} {step.name} {kernel}: {registers} registers, {stack} bytes of stack")
            assert stack == 0, kernel
            assert compiled.shared <= 163 * 1024
