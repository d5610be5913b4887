"""`mhc-compile bench gpu` on a CPU: parts end in time and are saved, failures are recorded, kernels are gated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mhc_compile.bench import gpu, gpu_gates
from mhc_compile.bench.gpu_parts import Finding, Setting
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.triton import tiles

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 3
    assert "MHC529" in (said := capsys.readouterr().err)
    assert "--device cpu --small" in said
    assert not list(tmp_path.iterdir())


def test_its_options_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "boundary", "--minutes", "3"]) == 2
    assert main(["bench", "gpu", "--png", "bars.png"]) == 2
    assert "--minutes" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_a_coded_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MHCError, match="MHC412"):
        gpu.run(Console(quiet=True), quick=True, out=tmp_path / "file", device="cpu", parts=())


def two(s: Setting) -> Iterator[Finding]:
    yield Finding("first", "1 ms", {"of": s.device.type})
    yield Finding("first", "2 ms")
    yield Finding("second", "3 ms")


def fails(s: Setting) -> Iterator[Finding]:
    yield Finding("before it failed", f"{s.small}")
    raise RuntimeError("an illegal | memory access\nand many more lines")


def endless(s: Setting) -> Iterator[Finding]:
    for i in range(10**6):
        yield Finding(f"number {i}", "")
        time.sleep(0.01)


def test_parts_are_saved_and_a_failure_stops_one_alone(tmp_path: Path) -> None:
    parts = (gpu.Part("two", two, 1), gpu.Part("fails", fails, 1), gpu.Part("two again", two, 1))
    figures = gpu.run(Console(quiet=True), quick=True, minutes=1, out=tmp_path, device="cpu", parts=parts)
    assert [part["error"] for part in figures["parts"]] == ["", "RuntimeError: an illegal | memory access", ""]
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == [
        "01_two.json",
        "02_fails.json",
        "03_two_again.json",
    ]
    saved = json.loads((tmp_path / "02_fails.json").read_text())
    assert saved["findings"]["before it failed"]["figure"] == "True"
    rows = (tmp_path / "figures.md").read_text().splitlines()
    assert rows.count("| first | 2 ms | `mhc-compile bench gpu` |") == 2  # the later one of the same
    assert "| fails | stopped: RuntimeError: an illegal / memory access | `mhc-compile bench gpu` |" in rows
    assert all(row.count("|") == 4 for row in rows[2:])


def test_time_is_shared_out(tmp_path: Path) -> None:
    parts = (gpu.Part("endless", endless, 1), gpu.Part("two", two, 1), gpu.Part("last", endless, 1))
    begun = time.monotonic()
    figures = gpu.run(Console(quiet=True), quick=True, minutes=0.02, out=tmp_path, device="cpu", parts=parts)
    assert [part["error"] for part in figures["parts"]] == [
        "no time left for the rest", "", "no time left for the rest",
    ]  # fmt: skip
    assert time.monotonic() - begun < 30  # a thousand times less than the parts would take
    late = gpu.run(Console(quiet=True), quick=True, minutes=0, out=tmp_path, device="cpu", parts=parts)
    assert {part["error"] for part in late["parts"]} == {"no time left"}


def test_kernels_are_gated_by_what_plain_pytorch_reaches() -> None:
    gates = [*gpu_gates.gates(small=True)]
    assert {gate.spec.kind for gate in gates} == {"boundary", "distribute", "gate", "attend"}
    assert {gate.scale for gate in gates} == {1.0, gpu_gates.LARGE}
    gate = next(gate for gate in gates if gate.spec.kind == "distribute")
    errors = gpu_gates.measure(gate, CPU, "cpp")
    assert set(errors) == {"next_X", "d_X", "d_y", "d_post", "d_mix"}
    assert gpu_gates.failures(gate, errors, CPU) == []
    assert gpu_gates.failures(gate, {**errors, "d_X": (0.1, 0.0)}, CPU) == ["d_X 1.0e-01 against 0.0e+00"]
    assert gpu_gates.failures(gate, {**errors, "d_X": (float("nan"), 0.0)}, CPU) != []
    assert len([*gpu_gates.gates(small=False)]) > 60


def test_tiles_that_were_measured_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tiles.shipped(), dict)  # the file of the package is readable
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"boundary_0": {"tokens": 16, "columns": 64, "warps": 8, "stages": 3}}))
    monkeypatch.setattr(tiles, "SHIPPED", path)
    tiles.shipped.cache_clear()
    try:
        assert tiles.shipped() == {"boundary_0": tiles.TileConfig(tokens=16, columns=64, warps=8, stages=3)}
    finally:
        tiles.shipped.cache_clear()


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["-m", "mhc_compile", "bench", "gpu", "--small", "--device", "cpu", "--minutes", "30"]
    found = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path)], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    saved = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("0*.json"))]
    assert [part["name"] for part in saved] == [part.name for part in gpu.PARTS]
    assert {part["name"]: part["error"] for part in saved} == {part.name: "" for part in gpu.PARTS}
    assert all(part["findings"] for part in saved)
    (gated,) = saved[0]["findings"].values()
    assert gated["figure"] == "7 of 7 as exact as plain PyTorch"
    assert "DIFFER" not in (tmp_path / "figures.md").read_text()
    winners = json.loads((tmp_path / "tiles.json").read_text())
    assert len(winners) == 3
    assert all(tiles.TileConfig(**tile).tokens >= 16 for tile in winners.values())
