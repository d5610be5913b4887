"""`mhc-compile doctor`: each check on this machine, and what it says of broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_compile import cli, versions
from mhc_compile.doctor.machine import Check
from mhc_compile.doctor.selftest import STEPS, LlamaTrial, Trial, selftest
from mhc_compile.kernels import cache


@pytest.mark.compat
def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing failed"
    checks = [line for line in lines if line.startswith(("ok  ", "note", "FAIL"))]
    assert not [line for line in checks if line.startswith("FAIL")]
    for name in (*versions.STACK, "C++ compiler", "Triton", "CPU", "cache", "Inductor's cache", *STEPS):
        assert sum(line[6:].startswith(f"{name} ") for line in checks) == 1, name
    assert all(line.startswith("ok") for line in checks[-len(STEPS) :])


def broken(**variables: str) -> tuple[int, str]:
    """The exit code and output of the doctor in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mhc_compile", "doctor"], env=os.environ | variables, capture_output=True, text=True
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_missing_compiler_and_a_cache_that_others_write_to(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    code, out = broken(CXX="/nonexistent/c++", MHC_COMPILE_CACHE_DIR=str(shared))
    assert code == 1
    assert "FAIL  C++ compiler" in out
    assert "do: install gcc or clang" in out
    assert f"FAIL  cache             {shared}: others may write to it" in out
    assert f"do: chmod go-w {shared}" in out
    assert out.splitlines()[-1].startswith("failed: C++ compiler, cache")


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cache.problem(tmp_path / "file" / "cache") == "it cannot be made (Not a directory)"
    assert cache.problem(tmp_path / "new") == ""
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_versions_that_the_tests_do_not_know(tmp_path: Path) -> None:
    for package, version in (("torch", "1.0"), ("peft", "0.1"), ("transformers", "999.0")):
        metadata = tmp_path / f"{package}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    code, out = broken(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert code == 1
    assert "FAIL  torch             1.0 is older than the tests" in out
    assert "note  peft              0.1 is older than the tests" in out
    assert "note  transformers      999.0 is newer than the tests" in out
    span = versions.tested("torch")
    assert span is not None
    assert f"do: install torch {span[1]}" in out


def states(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in selftest(folder)}


def test_without_transformers(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    seen = {name: getattr(trial, name)() for name in STEPS}
    assert seen["load"] == "logits bit-equal"
    assert "transformers is not installed" in seen["generate"]


@pytest.mark.slow
def test_steps_after_one_that_fails_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "model").touch()  # where the checkpoint folder belongs
    checks = states(tmp_path)
    assert [checks[name].state for name in STEPS] == ["ok", "ok", "ok", "FAIL", "note"]
    assert checks["save"].todo
    assert "save failed" in checks["load"].detail


def test_wrong_results_are_found(tmp_path: Path) -> None:
    trial = LlamaTrial(tmp_path)
    trial.convert()
    trial.save()
    with torch.no_grad():
        trial.model.lm_head.weight.add_(1)
    with pytest.raises(Exception, match="the loaded model's logits differ"):
        trial.load()
