"""The table of codes: what a row is, and the text that rows are written in."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnostic:
    """One row of the table: what the code means and what a user can do about it."""

    title: str
    way_out: str


def rows(text: str) -> dict[str, Diagnostic]:
    """Return the rows in `text` by code: a line `CODE title`, then the fix in indented lines."""
    parts = re.findall(r"^(MHC\d+) (.+)\n((?: +.+\n)+)", text, re.MULTILINE)
    return {code: Diagnostic(title, " ".join(way_out.split())) for code, title, way_out in parts}
