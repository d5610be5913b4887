"""Put what `mhc_compile/tested.json` records into docs/versions.md.

Run: python docs/versions.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mhc_compile import versions

PAGE = Path(__file__).with_name("versions.md")
BEGIN, END = "<!-- tested: begin -->", "<!-- tested: end -->"
COLUMNS = (*versions.STACK, "tests", "passed", "skipped")


def updated(page: str, rows: list[dict[str, Any]]) -> str:
    """Return the text `page` with the table of `rows` between its marks."""
    assert page.count(BEGIN) == page.count(END) == 1
    lines = [COLUMNS, ("---",) * len(COLUMNS), *([str(row.get(c, "-")) for c in COLUMNS] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table}\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), versions.runs()), encoding="utf-8")
