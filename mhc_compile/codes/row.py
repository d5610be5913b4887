"""One row of the table of codes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnostic:
    """One row of the table: what the code means and what a user can do about it."""

    title: str
    way_out: str
