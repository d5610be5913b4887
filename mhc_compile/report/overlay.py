"""Lay what probes sampled over the drawing of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Mark
from mhc_compile.passes.match_marks import full_name, sites_of
from mhc_compile.probes.sample import Sample
from mhc_compile.report.report import Element


def overlay(samples: Sequence[Sample], marks: Sequence[Mark], elements: Sequence[Element]) -> str:
    """Give sites and memories the figures of the last sample of their owner; return which samples these are, if any.

    Raises MHC234 for samples of another model.
    """
    sites = {e.full_name: e for e in elements if e.kind == "site"}
    memories = {e.module: e for e in elements if e.kind == "memory"}
    last = {sample.owner: sample for sample in samples}
    for sample in last.values():
        _refuse_other(sample, marks)
        figures = sample.figures()
        for i, name in enumerate(sample.sites):
            # A graph in one mode may be without some of the sites.
            if (element := sites.get(full_name(sample.owner, name))) is not None:
                element.probe = {title: of[i] for title, of in figures.items() if math.isfinite(of[i])}
        for layer, gate in zip(sample.layers, sample.gates(), strict=True):
            if (element := memories.get(f"{sample.owner}.{layer}".strip("."))) is not None and math.isfinite(gate):
                element.probe = {"gate": gate}
    if not samples:
        return ""
    steps = sorted({sample.step for sample in last.values()})
    return f"step {', '.join(map(str, steps))}, the last of {len({sample.step for sample in samples})} sampled"


def _refuse_other(sample: Sample, marks: Sequence[Mark]) -> None:
    whole = "the model itself"
    mark = next((mark for mark in marks if mark.owner == sample.owner), None)
    if mark is None:
        owners = ", ".join(m.owner or whole for m in marks)
        raise MHCError("MHC234", f"samples of {sample.owner or whole}; streams here are those of {owners or 'nothing'}")
    known, sampled = set(sites_of(mark)), set(sample.sites)
    if sampled != known and sampled not in mark.partial:
        more, fewer = sorted(sampled - known), sorted(known - sampled)
        names = [full_name(sample.owner, name) for name in more or fewer]
        raise MHCError("MHC234", f"{names[0]} {'is no site here' if more else 'has no sample'} ({len(names)} such)")
