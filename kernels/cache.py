"""Where generated code and what it was compiled to are kept: a directory that its owner alone can write."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path


def configured() -> Path:
    """Return `$MHC_COMPILE_CACHE_DIR`, or `mhc_compile` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("MHC_COMPILE_CACHE_DIR") or Path(base) / "mhc_compile")


def problem(directory: Path) -> str:
    """Make `directory` with mode 0700 if it is missing, and return why no code can be kept there, or ""."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        return f"it cannot be made ({error.strerror})"
    if status.st_uid != os.getuid():
        return "somebody else owns it"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it"
    return "" if os.access(directory, os.W_OK) else "you may not write to it"


@lru_cache(maxsize=1)
def cache_dir() -> Path:
    """Return the `configured` directory.

    What is in it is loaded and executed. Where it has a `problem`, code goes to a new private directory, which the next
    process will not find.
    """
    directory = configured()
    return Path(tempfile.mkdtemp(prefix="mhc_compile_")) if problem(directory) else directory


def write_once(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, unless it is there."""
    if path.exists():
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as out:
        out.write(text)
    Path(out.name).replace(path)
