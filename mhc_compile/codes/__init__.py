"""The table of codes: each has a page, a section of the Markdown files beside this one, which are the definition.

`mhc-compile explain` prints a page, errors and warnings take title and fix from it, and the site shows the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Diagnostic:
    """A code: what it means, what a user can do about it, and its page in Markdown, with heading and fix."""

    title: str
    way_out: str
    page: str


def read_codes(folder: Path = Path(__file__).parent) -> dict[str, Diagnostic]:
    """Return the codes of all files in `folder`: sections `## CODE title` that end with a paragraph `Fix: ...`."""
    table = {}
    for path in sorted(folder.glob("*.md")):
        for section in path.read_text(encoding="utf-8").split("\n## ")[1:]:
            heading, body = section.split("\n", 1)
            code, title = heading.split(" ", 1)
            way_out = body.rpartition("\n\nFix: ")[2]
            table[code] = Diagnostic(title, " ".join(way_out.split()), f"## {section.strip()}\n")
    return dict(sorted(table.items()))
