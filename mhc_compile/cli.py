"""The command `mhc-compile`: wires the commands of each room and turns their errors into exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from mhc_compile.bench import command as bench
from mhc_compile.bisect import command as bisect
from mhc_compile.conversion import command as convert
from mhc_compile.demo import command as demo
from mhc_compile.diagnostics import MHCError
from mhc_compile.diff import command as diff
from mhc_compile.doctor import command as doctor
from mhc_compile.emitting import command as emit
from mhc_compile.probes import command as probe
from mhc_compile.report import command as inspect
from mhc_compile.trial import command as trial
from mhc_compile.versions import VERSION

RUNTIME = {
    "data": "mhc_compile.runtime.data.command",
    "train": "mhc_compile.runtime.command",
    "plan": "mhc_compile.runtime.plan.command",
}
"""Commands by the names of their modules, as nothing outside of the runtime imports it; `run` loads what is heavy."""
COMMANDS: dict[str, ModuleType] = {
    "convert": convert, "emit": emit, "inspect": inspect, "diff": diff, "bisect": bisect, "probe": probe,
    "trial": trial, "demo": demo, "bench": bench, "doctor": doctor,
    **{name: import_module(module) for name, module in RUNTIME.items()},
}  # fmt: skip
"""Modules with `add_parser(subparsers)`, which registers the command under this name, and `run(args) -> int`."""
ARGUMENTS = {"MHC201", "MHC202", "MHC203", "MHC204", "MHC220", "MHC240", "MHC241", "MHC520"}
"""Codes of options whose values are not possible: wrong arguments, like those that argparse rejects by itself."""
_EPILOG = """\
mhc-compile COMMAND --help explains a command, with examples.

exit codes: 0 done, 1 refused (the message begins with its code), 2 a wrong argument (which has a code where its value
is one of our own options'), 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser, and one for each command, of options in full: a shortened one would change its meaning with the next
    option that begins so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser, every command registered."""
    top = _Parser(
        prog="mhc-compile",
        description="Rewrite residual Transformers into manifold-constrained hyper-connections (mHC).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"mhc-compile {VERSION}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS.values():
        module.add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = parser().parse_args(argv)
    try:
        code: int = COMMANDS[args.command].run(args)
        return code
    except MHCError as error:
        print(error, file=sys.stderr)
        return 2 if error.code in ARGUMENTS else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
