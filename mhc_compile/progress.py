"""Show how far a conversion is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total, both in bytes or in steps, and a description of the current step."""


@contextmanager
def reported(progress: bool | Progress, *, in_bytes: bool = False) -> Iterator[Progress]:
    """Yield what is called as work goes on: `progress` itself; for True a bar on the standard error; else nothing.

    The bar is shown in a terminal or a notebook alone, and is gone afterwards.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TimeElapsedColumn())
    if in_bytes:
        columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (console.is_terminal or console.is_jupyter)
    with Bar(
        TextColumn("{task.description}"), BarColumn(), *columns, console=console, transient=True, disable=hidden
    ) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
