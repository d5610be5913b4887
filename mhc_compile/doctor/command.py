"""`mhc-compile doctor`."""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhc_compile.doctor.machine import Check, compilers, devices, folders, stack
from mhc_compile.doctor.selftest import selftest
from mhc_compile.versions import VERSION


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the command line."""
    subparsers.add_parser(
        "doctor",
        help="check the installation and say what to do; bug reports need its output",
        description="Compares the installed versions with those that the tests ran with, tries the compilers, lists "
        "the devices, checks who may write to the caches, and converts, trains, generates with, saves and loads a tiny "
        "model. Prints a line for each; exits with 1 if one says FAIL.",
    )


def checks() -> Iterator[Check]:
    """Make every check, in the order in which they are printed."""
    for group in (stack, compilers, devices, folders):
        yield from group()
    with tempfile.TemporaryDirectory() as folder:
        yield from selftest(Path(folder))


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 - every command's run takes them
    """Print each check as it ends; return 1 if one failed."""
    print(f"mhc-compile {VERSION} on {platform.platform()}")
    failed = []
    for check in checks():
        print(check, flush=True)
        if check.state == "FAIL":
            failed.append(check.name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0
