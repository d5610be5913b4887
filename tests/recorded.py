"""Record the stack that the tests ran with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from packaging.version import Version

from mhc_compile.versions import STACK, installed


def record(path: Path, tests: str, counts: Mapping[str, int]) -> None:
    """Add a row for this stack to `path`, in place of one of the same versions and tests."""
    row = {**installed(), "tests": tests, **counts}
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    key = [row.get(name) for name in (*STACK, "tests")]
    rows = [other for other in rows if [other.get(name) for name in (*STACK, "tests")] != key]
    rows.append(row)
    rows.sort(key=lambda r: ([Version(r[name]) for name in ("torch", "transformers", "python")], r["tests"]))
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
