"""Text and tables in a terminal by rich, and the same as plain text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


class Printed:
    """A base for what has a `__rich_console__`: `text()` and `str()` are the same without colours."""

    def text(self, width: int = 150) -> str:
        """Return plain text, its tables `width` characters wide."""
        stream = io.StringIO()
        Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(
            self, crop=False
        )
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def __str__(self) -> str:
        return self.text()

    def show(self) -> None:
        """Print with tables and colours on a terminal; elsewhere as plain text, whose lines are not wrapped."""
        console = Console()
        console.print(self) if console.is_terminal else print(self)


def new_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """Return an empty table without lines; columns that begin with one of `numbers` are right-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        right = bool(numbers) and name.startswith(numbers)
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table
