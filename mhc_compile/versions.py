"""Tell which versions the tests ran with, and warn of newer ones.

`tested.json` beside this file has a row for each stack; `pytest --record=FILE` writes it and `python docs/versions.py`
renders it. The bounds in pyproject.toml follow from it, which `tests/mhc_compile/test_versions.py` checks.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from mhc_compile.diagnostics import warn

VERSION = "0.1.0"
"""Of this package."""
PACKAGES = ("torch", "transformers", "triton", "accelerate", "peft", "torch-mlir")
"""Packages of whose internals something is used: a new minor version may break them."""
STACK = ("python", *PACKAGES)
TESTED = Path(__file__).with_name("tested.json")


def installed() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed, without local parts such as +cpu."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = Version(metadata.version(package)).public
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def runs(path: Path = TESTED) -> list[dict[str, Any]]:
    """Return the rows of `path`: versions by package, `tests` (what pytest selected), `passed` and `skipped`."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def tested(package: str) -> tuple[Version, Version] | None:
    """Return the oldest and the newest version of a package in `STACK` that the tests ran with; None without a run."""
    versions = [Version(row[package]) for row in runs() if package in row]
    return (min(versions), max(versions)) if versions else None


def newer(package: str, version: str) -> bool:
    """Return whether `version` belongs to a newer minor version than those that the tests ran with."""
    span = tested(package)
    return span is not None and Version(version).release[:2] > span[1].release[:2]


def warn_of_newer() -> None:
    """Issue one warning (MHC320) that names each installed version that is newer than the tests, and the tested one."""
    named = [
        f"{package} {version} is installed, the newest tested is {span[1]}"
        for package, version in installed().items()
        if (span := tested(package)) is not None and newer(package, version)
    ]
    if named:
        warn("MHC320", "; ".join(named), stacklevel=3)
