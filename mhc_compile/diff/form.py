"""One of the two forms that are compared: a report's data, from a model or from a file that `inspect --json` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mhc_compile.checkpoint.manifest import NAME
from mhc_compile.config import STREAM_FIELDS, parse_options
from mhc_compile.configured import configured, weighted
from mhc_compile.diagnostics import MHCError
from mhc_compile.diff.outputs import outputs_of
from mhc_compile.report import inspect
from mhc_compile.report.report import FORMAT

_PARTS = {"versions": dict, "model": dict, "options": dict, "elements": list, "passes": list, "kernels": list}


@dataclass(frozen=True)
class Site:
    """One site, as two forms can be compared by it."""

    name: str
    """Module path and ordinal, `model.layers.3#0`, with the call where there are several."""
    topology: str
    shape: str
    spec: str
    parameters: int
    """Of the site itself, without its branch."""


@dataclass(frozen=True)
class Form:
    """A compiled form of a model."""

    label: str
    """What it was read from, with its options."""
    report: Mapping[str, Any]
    """See `mhc_compile.report.report`."""
    outputs: Mapping[str, Any] | None
    """See `mhc_compile.diff.outputs`; None where nothing was computed."""
    missing: str = ""
    """Why nothing was."""

    @property
    def sites(self) -> list[Site]:
        """In the order of the streams."""
        elements = self.report["elements"]
        found = []
        for e in elements:
            if e["kind"] != "site":
                continue
            own = e["parameters"] - sum(elements[child]["parameters"] for child in e["children"])
            ordinal = e["name"].rpartition("#")[2]
            calls = f", {e['calls']} calls" if e["calls"] > 1 else ""
            name = f"{e['module']}#{ordinal}"
            shape = f"{e['dtype']}{e['shape']}{calls}"
            found.append(Site(name, e["topology"] or "", shape, e["spec"] or "", own))
        return found

    @property
    def nodes(self) -> dict[str, int]:
        """The graph's nodes behind every pass, by its name."""
        captured = {"captured": self.report["passes"][0]["nodes_before"]} if self.report["passes"] else {}
        return captured | {p["name"]: p["nodes_after"] for p in self.report["passes"]}

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """Calls of every fused kernel, and the bytes that one moves a token, forward."""
        return {k["name"]: (k["calls"], k["bytes_token"]) for k in self.report["kernels"]}

    @property
    def bytes_token(self) -> int:
        """What all fused kernels together move a token, forward."""
        return sum(calls * size for calls, size in self.kernels.values())


def read_form(source: str | os.PathLike[str], options: Sequence[str] = (), *, seed: int = 0, run: bool = True) -> Form:
    """The form of a checkpoint folder or a config.json with `options` (`streams=2`), or of a report's JSON.

    `run`: also compute outputs, with the folder's weights or, without some, random ones from `seed`. Raises
    `MHCError`: MHC204 for options, also of a report, which has been made; MHC304 for streams of a converted folder;
    MHC527 for a file that is no report; what `weighted` raises for a model.
    """
    path = Path(source)
    label = " ".join([str(path), *options])
    given = parse_options(options)
    report = None if path.is_dir() else _report(path)
    if report is not None:
        if given:
            raise MHCError("MHC204", f"{path} is a report, made with options of its own: {', '.join(given)}")
        return Form(label, report, report.get("outputs"), f"{path} has no outputs (inspect --json FILE --outputs)")
    # Without weights nothing is computed, and none are read.
    model, converted = configured(path) if not run else weighted(path, seed=seed)[:2]
    if converted and (settled := sorted(STREAM_FIELDS & set(given))):
        raise MHCError("MHC304", f"{settled[0]}; {path / NAME} says how the folder was converted")
    return form_of(model, label, seed=seed, run=run, **given)


def form_of(model: nn.Module, label: str, *, seed: int = 0, run: bool = True, **options: Any) -> Form:
    """The form of a Hugging Face model, which `run` converts in place where it is not."""
    report = inspect(model, **options).data()
    return Form(label, report, outputs_of(model, seed, **options) if run else None, f"{label} was not run")


def _report(path: Path) -> dict[str, Any] | None:
    """The report that a file holds; None for a model's config.json. Raises MHC527 for anything else."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MHCError("MHC527", f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise MHCError("MHC527", f"{path} is no JSON: {error}") from error
    if not isinstance(held, dict) or "format" not in held:
        return None
    if held["format"] != FORMAT:
        raise MHCError("MHC527", f"{path} is of format {held['format']}, known is {FORMAT}")
    if wrong := [name for name, kind in _PARTS.items() if not isinstance(held.get(name), kind)]:
        raise MHCError("MHC527", f"{path} has no {wrong[0]}")
    return held
