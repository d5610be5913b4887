"""`mhc-compile doctor`: check the installation."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_compile.versions import VERSION

if TYPE_CHECKING:
    from mhc_compile.doctor.machine import Check


def doctor() -> int:
    """Check the installation and say what to do; bug reports need its output.

    Compare the installed versions with those that the tests ran with, try the compilers, list the devices, check who
    may write to the caches, and convert, train, generate with, save and load a tiny model. Print a line for each; exit
    with 1 if one says FAIL.
    """
    print(f"mhc-compile {VERSION} on {platform.platform()}")
    failed = []
    for check in _checks():
        print(check, flush=True)
        if check.state == "FAIL":
            failed.append(check.name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


def _checks() -> Iterator[Check]:
    """Make every check, in the order in which they are printed."""
    from mhc_compile.doctor.machine import compilers, devices, folders, stack
    from mhc_compile.doctor.selftest import selftest

    for group in (stack, compilers, devices, folders):
        yield from group()
    with tempfile.TemporaryDirectory() as folder:
        yield from selftest(Path(folder))
