"""The folder of a run's checkpoints: which of them are whole, who may write, and what may go."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mhc_compile.checkpoint.staging import sync_folder
from mhc_compile.diagnostics import MHCError

_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|removed)")


class RunFolder:
    """`step-00000123` is the whole checkpoint of step 123; hidden folders are being written or removed.

    A checkpoint gets its name by one rename, when everything in it is on the disk, and loses it by one before anything
    in it is removed: whatever carries such a name is whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    def claim(self) -> None:
        """Make the folder, take it for this process, and clear what a killed run left unfinished.

        Raises MHC619 where another run has it, or where it cannot be created or written.
        """
        import fcntl  # not on Windows, where everything but training may still work

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            # A lock of the process, not of the descriptor: a child that this process forks does not keep it, and the
            # system drops it with the process, so a killed run leaves none.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in self.path.iterdir():
                if _LEFTOVER.fullmatch(entry.name) and not entry.is_symlink():
                    shutil.rmtree(entry)
        except BlockingIOError as error:
            self.release()
            raise MHCError("MHC619", f"another run is writing checkpoints to {self.path}") from error
        except OSError as error:
            self.release()
            raise MHCError("MHC619", f"{self.path}: {error}") from error

    def release(self) -> None:
        """Release the folder for other runs."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        if not self.path.is_dir():
            return []
        return sorted(int(m[1]) for p in self.path.iterdir() if (m := _STEP.fullmatch(p.name)))

    def whole(self, step: int) -> Path:
        """Return the folder of a complete checkpoint."""
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Return the folder of a checkpoint that is being written."""
        return self.path / f".step-{step:08d}.partial"

    def publish(self, step: int, keep: int) -> None:
        """Give a finished checkpoint its name; then remove the oldest ones beyond `keep`."""
        sync_folder(self.partial(step))
        self.partial(step).rename(self.whole(step))
        sync_folder(self.path)
        for old in self.steps()[:-keep]:
            hidden = self.path / f".step-{old:08d}.removed"
            self.whole(old).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)  # what stays is cleared at the next start

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is none any more, and return its new place."""
        aside = self.path / f"damaged-step-{step:08d}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.path / f"damaged-step-{step:08d}-{number}"
        try:
            self.whole(step).rename(aside)
        except OSError as error:
            raise MHCError("MHC619", f"{self.whole(step)}: {error}") from error
        return aside

    def discard(self, step: int) -> None:
        """Remove what a failed save has written."""
        shutil.rmtree(self.partial(step), ignore_errors=True)
