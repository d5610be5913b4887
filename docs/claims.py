"""Copy what the examples that try claims wrote into docs/claims.md, their plots to docs/images.

Run: python docs/claims.py FOLDER [FOLDER]   (what was given to their --out)
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
EXAMPLES = ("payoff", "stability", "scaling", "kinds")
"""`kinds` is what `scaling.py --kinds` writes."""


def update(docs: Path, folders: list[Path]) -> list[str]:
    """Write the results in `folders` into `docs`/claims.md; return the names of the examples found there."""
    page = docs / "claims.md"
    text = page.read_text(encoding="utf-8")
    written = [(name, folder) for folder in folders for name in EXAMPLES if (folder / f"{name}.md").exists()]
    for name, folder in written:
        block = (folder / f"{name}.md").read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        assert text.count(begin) == text.count(end) == 1
        text = re.sub(f"{begin}.*?{end}", lambda _, b=begin, e=end, t=block: f"{b}\n{t}{e}", text, flags=re.DOTALL)
        (docs / "images").mkdir(exist_ok=True)
        shutil.copyfile(folder / f"{name}.png", docs / "images" / f"{name}.png")
    unfinished = page.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(page)
    return [name for name, _ in written]


if __name__ == "__main__":
    done = update(DOCS, [Path(folder) for folder in sys.argv[1:]])
    sys.exit(None if done else f"no folder with a table of {', '.join(EXAMPLES)} was named")
