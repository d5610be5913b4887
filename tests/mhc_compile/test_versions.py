"""What ran with what: the record, the bounds and the page that follow from it, and the warning for newer versions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mhc_compile import versions

ROOT = Path(__file__).parents[2]


def span(package: str) -> tuple[Version, Version]:
    found = versions.tested(package)
    assert found is not None, f"no run with {package} is recorded: pytest -m compat --record mhc_compile/tested.json"
    return found


def next_minor(package: str) -> str:
    release = span(package)[1].release[:2]
    return ".".join(map(str, (*release[:-1], release[-1] + 1)))


def bounds() -> dict[str, SpecifierSet]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    listed = [Requirement(line) for line in (*project["dependencies"], *(line for extra in extras for line in extra))]
    return {"python": SpecifierSet(project["requires-python"]), **{r.name: r.specifier for r in listed}}


@pytest.mark.parametrize("package", versions.STACK)
def test_bounds_end_with_the_newest_minor_that_the_tests_ran_with(package: str) -> None:
    specifier = bounds()[package]
    assert span(package)[1] in specifier
    assert next_minor(package) not in specifier


@pytest.mark.parametrize("package", ["python", "torch", "transformers", "triton"])
def test_bounds_begin_with_the_oldest_that_the_tests_ran_with(package: str) -> None:
    oldest = span(package)[0]
    assert oldest in bounds()[package]
    assert f"{oldest.major}.{oldest.minor - 1}.99" not in bounds()[package]


def test_the_page_is_what_the_command_writes() -> None:
    spec = importlib.util.spec_from_file_location("docs_versions", ROOT / "docs" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert command.updated(page, versions.runs()) == page


def test_a_row_replaces_that_of_the_same_stack(
    tmp_path: Path, record_stack: Callable[[Path, str, Mapping[str, int]], None]
) -> None:
    file = tmp_path / "tested.json"
    record_stack(file, "compat", {"passed": 1, "skipped": 0})
    record_stack(file, "not slow", {"passed": 3, "skipped": 1})
    record_stack(file, "compat", {"passed": 2, "skipped": 0})
    rows = json.loads(file.read_text())
    assert [(row["tests"], row["passed"], row["skipped"]) for row in rows] == [("compat", 2, 0), ("not slow", 3, 1)]
    assert all(row["torch"] == versions.installed()["torch"] for row in rows)


def imported(folder: Path, code: str) -> list[str]:
    """The lines that a new process prints, to which the packages in `folder` come first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


def test_newer_versions_are_told_once_by_one_warning(tmp_path: Path) -> None:
    for package in ("torch", "peft"):
        metadata = tmp_path / f"{package}-999.1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 999.1+local\n")
    lines = imported(tmp_path, "import warnings; warnings.simplefilter('always'); import mhc_compile, mhc_compile.cli")
    told = [line for line in lines if "MHC320 newer" in line]
    assert len(told) == 1
    for package in ("torch", "peft"):
        assert f"{package} 999.1 is installed, the newest tested is {span(package)[1]}" in told[0]


def test_tested_versions_are_not_told(tmp_path: Path) -> None:
    if any(versions.newer(package, version) for package, version in versions.installed().items()):
        pytest.fail("these tests run with a version that is newer than the record: pytest --record adds it")
    assert not [line for line in imported(tmp_path, "import mhc_compile") if "MHC320" in line]
