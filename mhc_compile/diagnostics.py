"""Every error and warning of this package: one table of codes, one exception, one warning.

This module imports nothing of ours but the codes, so every room of the house may import it.
"""

from __future__ import annotations

import warnings

from mhc_compile.codes.compiler import COMPILER
from mhc_compile.codes.row import Diagnostic
from mhc_compile.codes.training import TRAINING

TABLE: dict[str, Diagnostic] = {**COMPILER, **TRAINING}


class MHCError(Exception):
    """A coded error: `code` is a key of `TABLE`; the text names node, module path and source line if there are any.

    `code`, `detail`, `node`, `module` and `source` are what it was made of; the last three are None where unknown.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        node: str | None = None,
        module: str | None = None,
        source: str | None = None,
        way_out: str | None = None,
    ) -> None:
        self.code = code
        self.detail = detail
        self.node = node
        self.module = module
        self.source = source
        row = TABLE[code]
        lines = [f"{code} {row.title}" + (f": {detail}" if detail else "")]
        if node:
            lines.append(f"  node:   {node}")
        if module:
            lines.append(f"  module: {module}")
        if source:
            lines.append(f"  source: {source}")
        lines.append(f"  fix: {way_out or row.way_out}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.detail, str(self)))


class _Rebuilt(MHCError):
    """An `MHCError` that crossed a process boundary: same code and text."""

    def __init__(self, code: str, detail: str, text: str) -> None:
        Exception.__init__(self, text)
        self.code, self.detail = code, detail
        self.node = self.module = self.source = None


def _rebuild(code: str, detail: str, text: str) -> MHCError:
    return _Rebuilt(code, detail, text)


class MHCWarning(UserWarning):
    """A coded warning: its text begins with `code`, a key of `TABLE`."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code, detail)  # with which other processes make it again
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        row = TABLE[self.code]
        return f"{self.code} {row.title}" + (f": {self.detail}" if self.detail else "") + f"\n  fix: {row.way_out}"


def warn(code: str, detail: str = "", *, stacklevel: int = 2) -> None:
    """Issue the coded warning `code` with the table's title and fix."""
    warnings.warn(MHCWarning(code, detail), stacklevel=stacklevel + 1)
