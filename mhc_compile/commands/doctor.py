"""`mhc-compile doctor`: check the installation."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_compile.output import PLAIN, Output
from mhc_compile.versions import VERSION

if TYPE_CHECKING:
    from mhc_compile.doctor.machine import Check


def doctor(*, output: Output = PLAIN) -> int:
    """Check the installation and say what to do; bug reports need its output.

    Compare the installed versions with those that the tests ran with, try the compilers, list the devices, check who
    may write to the caches, and convert, train, generate with, save and load a tiny model. Print a line for each; exit
    with 1 if one says FAIL.
    """
    checks = []
    with output.printing():
        print(f"mhc-compile {VERSION} on {platform.platform()}")
        for check in _checks():
            print(check, flush=True)
            checks.append(check)
        failed = [check.name for check in checks if check.state == "FAIL"]
        print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    output.write({"version": VERSION, "platform": platform.platform(), "checks": checks})
    return 1 if failed else 0


def _checks() -> Iterator[Check]:
    """Make every check, in the order in which they are printed."""
    from mhc_compile.doctor.machine import compilers, devices, folders, stack
    from mhc_compile.doctor.selftest import selftest

    for group in (stack, compilers, devices, folders):
        yield from group()
    with tempfile.TemporaryDirectory() as folder:
        yield from selftest(Path(folder))
