"""Write a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mhc_compile.diagnostics import MHCError


def write_whole(path: Path, text: str, *, code: str = "MHC509") -> None:
    """Put `text` in the place of `path` in one step. Raises `code` where that fails; the file is as it was then."""
    try:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a name, text that is no Unicode
        raise MHCError(code, f"{path}: {error}") from error
