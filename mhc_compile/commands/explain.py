"""`mhc-compile explain`: the page of a code."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markdown import Markdown

from mhc_compile.diagnostics import TABLE, MHCError
from mhc_compile.output import PLAIN, Output
from mhc_compile.rich_text import new_table


def explain(
    code: Annotated[str | None, Parameter(help="MHC207, or 207 alone. Without it all codes are listed.")] = None,
    *,
    output: Output = PLAIN,
) -> int:
    """Explain the code of an error or a warning: what happened, a smallest example, and the fix.

    ```
    mhc-compile explain MHC207
    mhc-compile explain
    ```
    """
    codes = list(TABLE) if code is None else [_known(code)]
    console = Console()
    console.width = min(console.width, 80)
    with output.printing():
        if code is None:
            table = new_table("code", "what is wrong")
            for name in codes:
                table.add_row(name, TABLE[name].title)
            console.print(table)
        else:
            console.print(Markdown(TABLE[codes[0]].page, code_theme="ansi_dark"))
    rows = [{"code": c, "title": TABLE[c].title, "fix": TABLE[c].way_out, "page": TABLE[c].page} for c in codes]
    output.write(rows if code is None else rows[0])
    return 0


def _known(code: str) -> str:
    """Return the code in `TABLE` that was meant."""
    name = f"MHC{code.upper().removeprefix('MHC')}"
    if name not in TABLE:
        near = get_close_matches(name, TABLE, n=1)
        way_out = f"did you mean {near[0]}? " * bool(near) + "mhc-compile explain lists all codes"
        raise MHCError("MHC204", f"there is no code {code}", way_out=way_out)
    return name
