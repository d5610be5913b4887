"""The figures of a run: a line of `metrics.jsonl` for every logged step, TensorBoard scalars, a progress bar.

One rank of a job writes and shows them. A run that is killed at any moment leaves a file of whole lines but for the
last one; the run that continues it from a checkpoint drops what the checkpoint does not know of, so that the file has
every step once.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mhc_compile.atomic_write import write_whole
from mhc_compile.diagnostics import MHCError, warn
from mhc_compile.runtime.recipe_tables import MetricsTable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
"""The folder of TensorBoard's event files, beside the file of lines."""
WANDB = "wandb-id.txt"
"""The file with the identity of the run at Weights & Biases."""
_FIRST = ("step", "loss", "auxiliary_loss", "evaluation_loss", "lr", "grad_norm", "tokens_per_second",
          "tokens_per_second_per_device", "mfu", "peak_memory", "seconds")  # fmt: skip
_SHOWN = {"loss": "loss {:.4f}", "auxiliary_loss": "auxiliary {:.4f}", "evaluation_loss": "evaluation {:.4f}",
          "lr": "lr {:.2e}", "grad_norm": "gradient {:.3g}", "tokens_per_second": "{:,.0f} tokens/s",
          "mfu": "MFU {:.1%}"}  # fmt: skip
_REFRESH = 0.1
"""Seconds between two drawings of the bar, at least."""


class Metrics(AbstractContextManager["Metrics"]):
    """Writes what is measured in a training run and shows how far it is; a context manager that closes itself.

    `folder`: where `metrics.jsonl` and `tensorboard/` lie; created if missing. `total_steps`: of the whole run.
    `start`: the steps that the checkpoint this run continues had taken, 0 for a new run; lines of later steps are
    dropped. `shows`: whether this rank writes and shows; on any other all methods do nothing. `console`: where to show,
    standard output by default: a bar on a terminal, a plain line for every step logged elsewhere.

    `wandb`: the project at Weights & Biases that gets the same, with `recipe` as its configuration; a run that goes on
    stays the same one there. `devices`: of all ranks. With `flops`, operations for a token, and `peak`, those of all
    devices a second, a line has the part of them that is used.

    Raises MHC606 on every rank if `tensorboard` or `wandb` is asked for and not installed, and on this one if `wandb`
    begins no run; MHC413 where the folder cannot be written. Later, what cannot be written (a full disk) is left out
    with a warning, MHC607: a run is worth more than its figures.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        start: int = 0,
        shows: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        devices: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        writer = summary_writer() if tensorboard else None
        tracker = wandb_library() if wandb else None
        self.shows = shows
        self.devices, self.flops, self.peak = devices, 0.0, 0.0
        self._wandb: Any = None
        self._events: SummaryWriter | None = None
        self._bar: Progress | None = None
        self._total = total_steps
        self._left_out = False
        self._logged = start if start else -1  # a new run may be evaluated at step 0
        self._clock = clock
        self._drawn = -math.inf
        if not shows:
            return
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._path = path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drop_after(path, start)
            # Without a buffer: a line is one write, and nothing is left over that closing would have to write.
            self._lines: RawIOBase = path.open("ab", buffering=0)
            if writer is not None:
                self._events = writer(str(folder / EVENTS), purge_step=start + 1)
            if tracker is not None:
                self._wandb = _wandb_run(tracker, str(wandb), folder, recipe or {}, resumes=start > 0)
        except OSError as error:
            raise MHCError("MHC413", f"{path}: {error}") from error
        if self._console.is_terminal:
            self._bar, self._task = _bar(self._console, total_steps, start)
        self._begin = clock()
        self._tokens = self._steps = 0
        self._seconds = 0.0

    def progress(self, step: int, loss: float, tokens: int) -> None:
        """Record a step: its number (the first is 1), its loss, and the tokens of all ranks in it."""
        if not self.shows:
            return
        now = self._clock()
        self._seconds += now - self._begin
        self._begin = now
        self._tokens += tokens
        self._steps += 1
        # A thread that draws would be alive when the loader's workers fork: the bar moves with the steps instead.
        if self._bar is not None:
            rate = self._tokens / max(self._seconds, 1e-9)
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
            if now - self._drawn >= _REFRESH:
                self._drawn = now
                self._bar.refresh()

    def log(self, step: int, values: Mapping[str, float], lists: Mapping[str, Sequence[float]] | None = None) -> None:
        """Write one line for `step` and show it; a step is logged once.

        To `values` (`loss`, `lr`, `grad_norm`, `evaluation_loss`, probes) are added `tokens_per_second` and `seconds`,
        a step's mean since the last line. Between `progress` and `log` of one step the clock stands still: evaluate and
        probe there. A figure that is not finite is null in the file. `lists`: counts, such as the load of each expert,
        which are lists in the file and histograms in TensorBoard.
        """
        if not self.shows:
            return
        assert step > self._logged, f"step {step} after {self._logged}"
        if self._steps:
            seconds = max(self._seconds, 1e-9)
            rate = self._tokens / seconds
            speed = {"tokens_per_second": rate, "seconds": seconds / self._steps}
            if self.devices > 1:
                speed["tokens_per_second_per_device"] = rate / self.devices
            if self.peak:
                speed["mfu"] = rate * self.flops / self.peak
            values = {**speed, **values}
        ordered = {name: float(values[name]) for name in (*_FIRST, *values) if name in values}
        line = {name: value if math.isfinite(value) else None for name, value in ordered.items()}
        counts = {name: [int(n) for n in numbers] for name, numbers in (lists or {}).items()}
        text = json.dumps({"step": step, **line, **counts}, allow_nan=False) + "\n"
        self._write(text.encode())
        self._write_events(step, ordered, counts)
        if self._wandb is not None:
            self._wandb.log(ordered, step=step)
        self._logged = step
        self.say(self._text(step, ordered))
        self._tokens = self._steps = 0
        self._seconds = 0.0
        self._begin = self._clock()

    def _write(self, line: bytes) -> None:
        """Append a line, whole or not at all; warn with MHC607 of the first of those that are left out."""
        end = self._lines.seek(0, os.SEEK_END)
        try:
            if self._lines.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                self._lines.truncate(end)
            if not self._left_out:
                warn("MHC607", f"{self._path}: {error}")
            self._left_out = True
        else:
            self._left_out = False

    def _write_events(self, step: int, values: Mapping[str, float], counts: Mapping[str, Sequence[int]]) -> None:
        """Write TensorBoard's scalars and histograms; it takes none after an error, which is a warning, MHC607."""
        if self._events is None:
            return
        try:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            for name, numbers in counts.items():
                self._events.add_histogram(name, np.array(numbers), step)
            self._events.flush()
        except OSError as error:
            warn("MHC607", f"{self._path.parent / EVENTS}: {error}; no more events are written")
            self._events = None

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.shows:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """End the bar and close the files; a second call does nothing."""
        if self.shows:
            self.shows = False
            if self._bar is not None:
                self._bar.refresh()
                self._bar.stop()
            if self._events is not None:
                with suppress(OSError):
                    self._events.close()
            if self._wandb is not None:
                self._wandb.finish()
            self._lines.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, step: int, values: Mapping[str, float]) -> str:
        shown = [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
        if gains := [v for name, v in values.items() if name.startswith("composite_gain/") and name.endswith("_max")]:
            shown.append(f"composite gain {max(gains):.4f}")
        if values.get("seconds") and self._bar is None and step < self._total:
            shown.append(f"{timedelta(seconds=round(values['seconds'] * (self._total - step)))} left")
        return "  ".join([f"step {step:>{len(str(self._total))}}/{self._total}", *shown])


def drop_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step` from a file of metrics, and a line that a killed run did not finish.

    The file is replaced as a whole, or not touched if there is nothing to drop; it need not exist.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line for line in text.splitlines(keepends=True) if _is_up_to(line, step))
    if kept != text:
        write_whole(path, kept, code="MHC413")


def _is_up_to(line: str, step: int) -> bool:
    try:
        entry = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= step


def summary_writer() -> type[SummaryWriter]:
    """Return TensorBoard's writer. Raises MHC606 where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MHCError("MHC606", str(error)) from error
    return SummaryWriter


def wandb_library() -> Any:
    """Return Weights & Biases' library. Raises MHC606 where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise MHCError("MHC606", str(error), way_out="pip install 'mhc-compile[wandb]'") from error


def check_writers(table: MetricsTable) -> None:
    """Raise MHC606 where a library is missing that a recipe writes figures with."""
    if table.tensorboard:
        summary_writer()
    if table.wandb:
        wandb_library()


def _wandb_run(library: Any, project: str, folder: Path, recipe: Mapping[str, Any], *, resumes: bool) -> Any:
    """Return the run at Weights & Biases; one that goes on is the same by the id beside its figures. Raises MHC606."""
    name = folder / WANDB
    if not (resumes and name.is_file()):
        name.write_text(secrets.token_hex(4), encoding="utf-8")
    identity = name.read_text(encoding="utf-8")
    try:
        return library.init(project=project, id=identity, resume="allow", dir=str(folder), config=dict(recipe))
    except library.Error as error:
        way_out = "log in with `wandb login`, or set WANDB_MODE=offline"
        raise MHCError("MHC606", f"wandb begins no run: {error}", way_out=way_out) from error


def _bar(console: Console, total: int, start: int) -> tuple[Progress, TaskID]:
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    )
    bar.start()
    console.show_cursor(True)  # which a killed run would leave hidden
    task = bar.add_task("training", total=total, completed=start, loss="-", rate="-")
    bar.refresh()
    return bar, task
