"""The demonstration's folder: what it wrote may be written again, what anyone else put there is never touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhc_compile.diagnostics import MHCError

RESULTS = "results.json"
_MADE_BY = "mhc-compile demo"
CHECKPOINTS = ("residual", "mhc", "mhc-trained", "mhc-memory")
ENTRIES = (*CHECKPOINTS, "report.html", "curves.png", "samples.txt", "inspection.txt", "memory.txt", RESULTS)


class OutputFolder:
    """A folder opened for one run. Raises MHC412 where it cannot be written or holds what no earlier run wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise _refusal(f"{path} is a file")
        if path.is_dir() and any(path.iterdir()):
            for name in self._written_before():
                (path / name).unlink(missing_ok=True)
            for entry in CHECKPOINTS:
                self._remove_if_empty(path / entry)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refusal(str(error)) from error
        if taken := [name for name in ENTRIES if (path / name).exists()]:
            raise _refusal(f"{path / taken[0]} was not written by this command")
        self.record({"state": "started"})

    def _written_before(self) -> list[str]:
        try:
            results = json.loads((self.path / RESULTS).read_text(encoding="utf-8"))
            ours = results["made_by"] == _MADE_BY
            names = [str(name) for name in results["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            ours, names = False, []
        if not ours:
            raise _refusal(f"{self.path} holds files and was not made by this command")
        return [name for name in names if self._is_ours(Path(name))]

    def _is_ours(self, name: Path) -> bool:
        """Return whether a listed name is a plain file of this folder: nothing else is removed."""
        inside = name.parts[:1] and name.parts[0] in ENTRIES and ".." not in name.parts
        linked = any((self.path / part).is_symlink() for part in (name, *name.parents[:-1]))
        return bool(inside) and not linked and (self.path / name).is_file()

    @staticmethod
    def _remove_if_empty(folder: Path) -> None:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()

    def __truediv__(self, name: str) -> Path:
        assert name in ENTRIES
        return self.path / name

    @property
    def entries(self) -> list[str]:
        """What has been written, in the order of `ENTRIES`."""
        return [name for name in ENTRIES if (self.path / name).exists()]

    def record(self, results: dict[str, Any]) -> None:
        """Write the results with the list of files written so far."""
        files = {RESULTS}
        for name in ENTRIES:
            here = self.path / name
            paths = here.rglob("*") if here.is_dir() else [here]
            files |= {p.relative_to(self.path).as_posix() for p in paths if p.is_file()}
        text = json.dumps({"made_by": _MADE_BY, **results, "files": sorted(files)}, indent=2)
        (self.path / RESULTS).write_text(text + "\n", encoding="utf-8")


def _refusal(detail: str) -> MHCError:
    return MHCError("MHC412", detail, way_out="choose another folder with --out")
