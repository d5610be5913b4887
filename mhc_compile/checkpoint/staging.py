"""Write a folder so that it is either absent or whole: under another name beside it, renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mhc_compile.diagnostics import MHCError


def check_target(target: Path, source: Path | None = None, *, size: int = 0) -> Path:
    """Return the resolved output folder without writing to it.

    Raises MHC412 where it exists and is not empty, overlaps `source`, or cannot be written, and MHC413 where its disk
    has less than `size` bytes left.
    """
    target = target.absolute().resolve()
    if source is not None:
        source = source.resolve()
        if target == source:
            raise MHCError("MHC412", f"{target} is the input itself")
        if source in target.parents:
            raise MHCError("MHC412", f"{target} lies inside the input {source}")
    try:
        if target.exists() and not target.is_dir():
            raise MHCError("MHC412", f"{target} is a file")
        if target.is_dir() and any(target.iterdir()):
            raise MHCError("MHC412", f"{target} exists and is not empty")
        above = next(p for p in target.parents if p.exists())
    except OSError as error:
        raise MHCError("MHC412", str(error)) from error
    if not above.is_dir():
        raise MHCError("MHC412", f"{above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise MHCError("MHC412", f"no permission to write in {above}")
    disk = shutil.disk_usage(above)
    if disk.total > 0 and disk.free < size:  # the kernel's own folders have no size
        raise MHCError("MHC413", f"{size:,} bytes are needed at {above}, {disk.free:,} are free")
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which becomes `target` when the block ends and is removed when it raises.

    Files of a killed process are removed from it. Raises MHC412 where the folder cannot be made or another process
    is writing it, and MHC413 for a failure of the file system inside the block.
    """
    staging, lock = _take(target)
    try:
        try:
            yield staging
            sync_folders(staging)
            # Atomic, and refused by the system if `target` has got contents meanwhile.
            staging.rename(target)
            sync_folder(target.parent)
        except (OSError, SafetensorError) as error:  # the latter for a write that failed inside the library
            raise MHCError("MHC413", str(error)) from error
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _take(target: Path) -> tuple[Path, int]:
    """Return the staging folder of `target`, emptied, and the descriptor that holds its lock."""
    import fcntl  # not on Windows, where everything but writing folders may still work

    staging = target.parent / f".{target.name}.mhc-partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        # O_NOFOLLOW: a link of that name must not lead the clearing elsewhere.
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise MHCError("MHC412", str(error)) from error
    try:
        # The system drops the lock with the process that holds it, so a killed one leaves none.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in staging.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        os.close(lock)
        busy = isinstance(error, BlockingIOError)
        raise MHCError("MHC412", f"another process is writing {target}" if busy else str(error)) from error
    return staging, lock


def sync_folders(folder: Path) -> None:
    """Wait until the names of all files below `folder` are on the disk."""
    for entry in folder.rglob("*"):
        if entry.is_dir():
            sync_folder(entry)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
