"""The generated Triton: under the interpreter against the float64 reference, and its text and structure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CHAINS, FEW, LATER, name_of

from mhc_compile.kernels import targets
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.in_triton import Triton
from mhc_compile.kernels.kernelspec import Direction
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.traffic import table
from mhc_compile.kernels.triton import tiles

needs_triton = pytest.mark.skipif(
    bool(Triton().unsupported(Chain(kind="boundary", stream=StreamSpec(), width=8))),
    reason="Triton is not installed",
)


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "MHC_COMPILE_CACHE_DIR": str(tmp_path_factory.mktemp("generated")),
    }
    worker = Path(__file__).with_name("triton_worker.py")
    found = subprocess.run(
        [sys.executable, str(worker), request.param], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


@needs_triton
def test_values_and_gradients_are_those_of_the_reference(
    interpreted: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    some = request.node.callspec.params["interpreted"] == "some"
    few = [chain for chain in CHAINS + LATER if chain.stream.streams <= FEW]
    assert len(interpreted) == 1 + (len(few) if some else len(CHAINS + LATER) + 8)
    for row in interpreted[1:]:
        half = "float16" in row["name"]
        # The interpreter cuts bfloat16 off instead of rounding it: twice the error of a rounding.
        floor = 1.2e-2 if half else 4e-6
        for name, (found, plain) in row["errors"].items():
            assert found <= max(floor, 2 * plain), f"{row['name']}: {name} {found} against {plain}"


@needs_triton
def test_outputs_are_written_whole_whatever_comes_in(
    interpreted: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    rows = [row for row in interpreted[1:] if row["seen"]]
    some = request.node.callspec.params["interpreted"] == "some"
    assert len(rows) == len({chain.kind for chain in CHAINS + LATER}) if some else len(rows) > 10
    for row in rows:
        assert row["seen"] == dict.fromkeys(row["seen"], True), row["name"]
        assert len(row["seen"]) == 5


@needs_triton
def test_ops_arrive_there_and_a_float_is_the_sum_of_its_parts(interpreted: list[dict[str, Any]]) -> None:
    assert interpreted[0]["through the op"] is True
    assert interpreted[0]["three parts"] is True


@needs_triton
def test_a_large_mean_leaves_the_variance_its_bits(interpreted: list[dict[str, Any]]) -> None:
    found = interpreted[0]["large mean"]
    assert set(found) >= {"h", "d_X", "d_norm_weight"}
    for name, (ours, plain) in found.items():
        assert ours <= 4 * plain + 1e-6, f"{name} {ours} against {plain}"


@pytest.mark.parametrize("chain", CHAINS + LATER, ids=name_of)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_text_is_python_with_a_real_loop(chain: Chain, direction: Direction) -> None:
    text = Triton().source(chain, direction).text
    compile(text, chain.name, "exec")
    assert f"def {direction}(" in text
    assert "atomic" not in text
    if chain.uses_sinkhorn:
        more = replace(chain, stream=replace(chain.stream, iterations=10 * chain.stream.iterations))
        assert len(Triton().source(more, direction).text.splitlines()) <= len(text.splitlines()) * 1.5
        assert ("def sinkhorn(" if direction == "forward" else "def sinkhorn_backward(") in text


def test_gpus_get_triton_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(kind="boundary", stream=StreamSpec(), width=24)
    targets.choose.cache_clear()
    try:
        found = targets.choose(chain, "cuda")
        assert found == (("triton", "") if not Triton().unsupported(chain) else ("reference", found[1]))
        targets.choose.cache_clear()
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert targets.choose(chain, "cuda") == ("reference", "Triton is not installed")
    finally:
        targets.choose.cache_clear()


@needs_triton
@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Chain(kind="read", stream=StreamSpec(streams=5, manifold="permutations"), width=8), "120 logits"),
        (Chain(kind="read", stream=StreamSpec(iterations=0), width=8), "iteration"),
        (Chain(kind="read", stream=StreamSpec(), width=8, streams_dtype=torch.float64), "float64"),
        (Chain(kind="boundary", stream=StreamSpec(), width=8, streams_dtype=torch.bfloat16), "change"),
        (Chain(kind="aggregate", stream=StreamSpec(), width=8, norm="rms"), "norm"),
    ],
)
def test_what_has_no_kernel_says_why(chain: Chain, reason: str) -> None:
    assert reason in Triton().unsupported(chain)


def test_measured_tiles_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "cache_dir", lambda: tmp_path)
    chain = Chain(kind="boundary", stream=StreamSpec(), width=64)
    choices = tiles.candidates(chain, "forward", 90)
    assert choices[0] == tiles.default(chain, "forward", 90)
    assert len(set(choices)) == len(choices) > 8
    asked: list[tiles.TileConfig] = []

    def seconds(choice: tiles.TileConfig) -> float:
        asked.append(choice)
        if choice == choices[3]:
            raise RuntimeError("out of shared memory")
        return 1.0 if choice == choices[5] else 2.0

    assert tiles.fastest("key", choices, seconds) == choices[5]
    assert asked == choices
    assert tiles.fastest("key", choices, seconds) == choices[5]
    assert asked == choices  # not measured again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpus_whose_matrix_operands_lie_in_registers_are_cut_alike(dtype: torch.dtype) -> None:
    chain = Chain(kind="boundary", stream=StreamSpec(), width=64, streams_dtype=dtype, branch_dtype=dtype)
    cuts = {arch: tiles.default(chain, "forward", arch) for arch in (80, 86, 90, 100, 120)}
    assert cuts[80] == cuts[86] == cuts[120]
    assert cuts[90] == cuts[100]
    assert cuts[80].tokens < cuts[90].tokens


def test_measuring_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHC_COMPILE_AUTOTUNE", raising=False)
    assert not tiles.autotunes()
    monkeypatch.setenv("MHC_COMPILE_AUTOTUNE", "1")
    assert tiles.autotunes()


def test_a_boundary_moves_ten_values_a_token_forward_and_fifteen_backward() -> None:
    row = next(line for line in table(4096).splitlines() if line.startswith("boundary")).split()
    assert 10.0 <= float(row[1]) < 10.2
    assert 15.0 <= float(row[2]) < 15.2
