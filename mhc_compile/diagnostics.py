"""Every error and warning of this package: one table of codes, one exception, one warning.

It imports nothing of this package but the codes, so that every other module may import it.
"""

from __future__ import annotations

import warnings
from functools import partial

from mhc_compile.codes import Diagnostic, read_codes

TABLE: dict[str, Diagnostic] = read_codes()


class MHCError(Exception):
    """A coded error: `code` is a key of `TABLE`; the text names node, module path and source line if there are any.

    `code`, `detail`, `node`, `module` and `source` are the constructor's arguments; the last three are None if unknown.
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
        self.way_out = way_out or TABLE[code].way_out
        places = [
            f"  {f'{name}:':<7} {place}" for name in ("node", "module", "source") if (place := getattr(self, name))
        ]
        super().__init__("\n".join([_heading(code, detail), *places, _ending(code, self.way_out)]))

    def __reduce__(self) -> tuple[object, ...]:
        places = {name: getattr(self, name) for name in ("node", "module", "source", "way_out")}
        return (partial(MHCError, self.code, self.detail, **places), ())


class MHCWarning(UserWarning):
    """A coded warning: its text begins with `code`, a key of `TABLE`."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code, detail)  # with which other processes make it again
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{_heading(self.code, self.detail)}\n{_ending(self.code, TABLE[self.code].way_out)}"


def _heading(code: str, detail: str) -> str:
    return f"{code} {TABLE[code].title}" + (f": {detail}" if detail else "")


def _ending(code: str, way_out: str) -> str:
    return f"  fix: {way_out}\n  more: mhc-compile explain {code}"


def warn(code: str, detail: str = "", *, stacklevel: int = 2) -> None:
    """Issue the coded warning `code` with the table's title and fix."""
    warnings.warn(MHCWarning(code, detail), stacklevel=stacklevel + 1)
