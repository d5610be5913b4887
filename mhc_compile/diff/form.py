"""One of the two forms that are compared: a report, of a model or from a file that `inspect --json` wrote."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.config import split_options
from mhc_compile.configured import configured, refuse_stream_options, weighted
from mhc_compile.diagnostics import MHCError
from mhc_compile.diff.outputs import outputs_of
from mhc_compile.overrides import CompileOverrides
from mhc_compile.report import Report, inspect


@dataclass(frozen=True)
class Form:
    """A compiled form of a model."""

    label: str
    """Name for tables: the path of the folder or file, and the options."""
    report: Report
    missing: str = ""
    """Why the report has no outputs."""

    @property
    def nodes(self) -> dict[str, int]:
        """Nodes of the graph after every pass."""
        captured = {"captured": len(self.report.captured)} if self.report.passes else {}
        return captured | {p.name: p.nodes_after for p in self.report.passes}

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """Calls of every fused kernel, and the bytes that one moves per token, forward."""
        return {k.name: (k.calls, k.bytes_token) for k in self.report.kernels}

    @property
    def bytes_token(self) -> int:
        """Bytes that all fused kernels together move per token, forward."""
        return sum(calls * size for calls, size in self.kernels.values())


def read_form(
    source: str | os.PathLike[str], options: CompileOverrides | None = None, *, seed: int = 0, run: bool = True
) -> Form:
    """Return the form of a checkpoint folder or a config.json with `options` (`streams`, ...), or of a report's JSON.

    `run`: also compute outputs, with the folder's weights or, without any, random ones from `seed`. Raises `MHCError`:
    MHC204 for options, also of a report, which has been made; MHC304 for streams of a converted folder; MHC527 for a
    file that is not a report; what `weighted` raises for a model.
    """
    path = local_folder(source, weights=run)
    values: dict[str, Any] = {**(options or {})}
    shown = (f"{name}={value.value if isinstance(value, Enum) else value}" for name, value in values.items())
    label = " ".join([str(source), *shown])
    split_options(values)
    report = None if path.is_dir() else _report(path)
    if report is not None:
        if values:
            raise MHCError("MHC204", f"{path} is a report, made with options of its own: {', '.join(values)}")
        return Form(label, report, f"{path} has no outputs (inspect --json FILE --outputs)")
    # Without weights nothing is computed, and none are read.
    model, converted = configured(path) if not run else weighted(path, seed=seed)[:2]
    if converted:
        refuse_stream_options(path, values)
    return form_of(model, label, seed=seed, run=run, **values)


def form_of(model: nn.Module, label: str, *, seed: int = 0, run: bool = True, **options: Any) -> Form:
    """Return the form of a Hugging Face model, which `run` converts in place where it is not."""
    report = inspect(model, **options)
    return Form(
        label, replace(report, outputs=outputs_of(model, seed, **options)) if run else report, f"{label} was not run"
    )


def _report(path: Path) -> Report | None:
    """Return the report that a file holds; None for a model's config.json. Raises MHC527 for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MHCError("MHC527", f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise MHCError("MHC527", f"{path} is no JSON: {error}") from error
    return Report.of(data) if isinstance(data, dict) and "format" in data else None
