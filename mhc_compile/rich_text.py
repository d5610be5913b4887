"""Plain text of what rich prints with tables and colours."""

from __future__ import annotations

import io

from rich.console import Console


class Printed:
    """A base for what has a `__rich_console__`: `text()` and `str()` are the same without colours."""

    def text(self, width: int = 150) -> str:
        """Plain text, its tables `width` characters wide."""
        stream = io.StringIO()
        Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(
            self, crop=False
        )
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def __str__(self) -> str:
        return self.text()
