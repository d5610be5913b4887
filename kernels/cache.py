"""Where generated code and what it was compiled to are kept: a directory that its owner alone can write."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def cache_dir() -> Path:
    """`$MHC_COMPILE_CACHE_DIR`, or `mhc_compile` in the user's cache directory; made with mode 0700.

    What is in it is loaded and executed. Where somebody else owns the directory or may write to it, or it cannot be
    made, code goes to a new private directory, which the next process will not find.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    wanted = Path(os.environ.get("MHC_COMPILE_CACHE_DIR") or Path(base) / "mhc_compile")
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = wanted.stat()
        if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return wanted
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="mhc_compile_"))


def write_once(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, unless it is there."""
    if path.exists():
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as out:
        out.write(text)
    Path(out.name).replace(path)
