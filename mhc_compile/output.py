"""Print the text of a command, nothing, or its result as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

_STANDARD = Path("-")


def _file(_: object, path: Path | None) -> None:
    """Raise ValueError for a flag in the place of a file's name."""
    if path is not None and path != _STANDARD and str(path).startswith("-"):
        raise ValueError(f"{path} is a flag, not a file")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """The flags of every command that has a result."""

    json: Annotated[Path | None, Parameter(allow_leading_hyphen=True, validator=_file)] = None
    """Write the result to this file as JSON; -: print it in place of the text."""
    quiet: bool = False
    """Print warnings and errors alone."""

    @contextmanager
    def printing(self) -> Iterator[None]:
        """Drop what is printed to the standard output meanwhile, where flags say so."""
        if not self.quiet and self.json != _STANDARD:
            yield
            return
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            yield

    def write(self, result: object) -> None:
        """Write a result where `--json` says. Text is JSON already; paths and the like become text."""
        if self.json is None:
            return
        from pydantic_core import to_json

        text = result if isinstance(result, str) else to_json(result, indent=2, fallback=str).decode()
        if self.json == _STANDARD:
            sys.stdout.write(text.rstrip() + "\n")
        else:
            from mhc_compile.atomic_write import write_whole

            write_whole(self.json, text.rstrip() + "\n")


PLAIN = Output()
"""A command's output without flags."""
