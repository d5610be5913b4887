"""The command `mhc-compile`: names the commands, and turns their errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from mhc_compile import commands
from mhc_compile.diagnostics import MHCError
from mhc_compile.versions import VERSION

_RUNTIME = {"data": "runtime.data.command", "train": "runtime.command", "plan": "runtime.plan.command"}
_NAMES = ("convert", "emit", "inspect", "diff", "bisect", "probe", "trial", "demo", "bench", "doctor", "explain")
COMMANDS = {
    **{name: f"{commands.__name__}.{name}:{name}" for name in _NAMES},
    **{name: f"mhc_compile.{module}:{name}" for name, module in _RUNTIME.items()},
}
"""The place of each command, imported when it is used. Its signature defines the flags, its docstring the help."""
ARGUMENTS = {"MHC201", "MHC202", "MHC203", "MHC204", "MHC220", "MHC240", "MHC241", "MHC520"}
"""Codes of options whose values are not possible: wrong usage, as a misspelt flag is."""
DIFFERS, USAGE, NOT_SUPPORTED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes. The first is returned by commands that compare or check."""
_HELP = """\
Rewrite residual Transformers into manifold-constrained hyper-connections (mHC).

`mhc-compile COMMAND --help` explains a command, with examples. Exit codes: 0 done; 1 something differs or failed its
check; 2 wrong usage; 3 not supported, or it could not be done (the message begins with a code); 130 interrupted.
"""


def app() -> App:
    """Return the command line with every command registered."""
    made = App(
        name="mhc-compile",
        help=_HELP,
        version=f"mhc-compile {VERSION}",
        help_format="markdown",
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
    )
    for name, command in COMMANDS.items():
        made.command(command, name=name)
    made.register_install_completion_command()
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    try:
        code = app()(argv, exit_on_error=False, print_error=True, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError:
        return USAGE
    except MHCError as error:
        print(error, file=sys.stderr)
        return USAGE if error.code in ARGUMENTS else NOT_SUPPORTED
    except BrokenPipeError:  # who reads the output, `head` for one, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
