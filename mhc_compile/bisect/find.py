"""`bisect`: the first pass and the first site at which a model's results leave the tolerance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from mhc_compile.bisect import inner, kernels
from mhc_compile.bisect.bisection import Bisection, Checked
from mhc_compile.bisect.places import Pair, Source, places_of, site_of
from mhc_compile.bisect.reproducer import write_reproducer
from mhc_compile.bisect.search import Search, Wrong, not_finite
from mhc_compile.bisect.slices import code_of, nodes_of, slice_of
from mhc_compile.bisect.subject import subject_of
from mhc_compile.bisect.values import Values, run_as_it_is
from mhc_compile.config import Options, compile_pipeline, native_pipeline, split_options, stream_spec
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import kernels_of, op_name


def bisect(
    model: nn.Module,
    *example_args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    reproducer: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Bisection:
    """Find the first step that changes the model's results on one batch, and the site at which it does.

    `example_args` and `example_kwargs` are one call's inputs; Hugging Face models need none. The model is run in its
    own mode, with dropout off and everything else that is random seeded; it is not changed. `options` are
    the fields of `StreamSpec`, for a model that is not converted, and those of `Options`: which passes are searched,
    which kernels are judged and which inner compiler (`inner="eager"`: none).
    `tolerance` is a relative error in float64 in place of `TOLERANCE` and `START_TOLERANCE`
    (`mhc_compile.bisect.search`). `reproducer` names a Python file to be written when something is wrong.

    Raises `MHCError`: MHC204 for options, MHC209 without inputs, MHC525 for a model without weights, MHC526 for a
    reproducer in a folder that is not there, and what `convert` raises for a model whose streams cannot be found.
    """
    stream_options, compile_options = split_options(options)
    settings, spec = Options(**compile_options), stream_spec(stream_options)
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if any(p.is_meta for p in model.parameters()):
        raise MHCError("MHC525", f"the parameters of {type(model).__name__} are on the meta device")
    path = None if reproducer is None else Path(reproducer)
    if path is not None and not path.absolute().parent.is_dir():
        raise MHCError("MHC526", f"{path.absolute().parent} is no folder")
    args, kwargs = example_args, dict(example_kwargs or {})
    if not args and not kwargs:
        kwargs = example_inputs(model)
    subject = subject_of(model, args, kwargs, spec, settings)
    search = Search(subject, tolerance)
    wrong = search.run(native_pipeline(settings) if subject.native else compile_pipeline(settings))
    notes: list[str] = []
    if wrong is None:
        values = search.values()
        if (name := not_finite(values, search.graph)) is not None:
            notes.append(f"the model's own results are not numbers from {name} on: nothing after it could be compared")
        wrong = _kernels(search) or _inner(search, values, settings)
    bisection = Bisection(type(model).__name__, tuple(search.checked), notes=tuple(notes))
    return bisection if wrong is None else _reported(bisection, wrong, settings, path)


def _kernels(search: Search) -> Wrong | None:
    """Return the first fused call whose kernel is wrong."""
    subject, gm = search.subject, search.graph
    largest: float | None = None
    values = run_as_it_is(gm, subject.own, {})
    for node in filter(kernels_of, gm.graph.nodes):
        judged = kernels.judge(node.target, [values[a.name] if isinstance(a, Node) else a for a in node.args])
        if not judged:
            continue
        j = kernels.worst(judged)
        largest = max(largest or 0.0, j.ratio)
        if not j.kernel.error <= j.allowed:
            search.checked.append(Checked("kernels", True, None, largest))
            parts = ("mhc_mixes", "mhc_reads") if j.mixes else ("mhc_reads", "mhc_mixes")
            site = next((node.meta[part] for part in parts if part in node.meta), None)
            what = f"{j.name} of {j.spec.name}"
            dtype = str(next(iter(j.spec.floats().values()))).removeprefix("torch.")
            finding = search.finding("kernels", site, what, node, j.kernel, j.allowed, dtype, added=False)
            source = Source(node.name)
            inputs = [Pair(Source(n.name), Source(n.name), None) for n in node.all_input_nodes]
            return Wrong(finding, None, gm, gm, source, source, inputs, subject.own, values, own_dtype=True)
    if largest is not None:
        search.checked.append(Checked("kernels", True, None, largest))
    return None


def _inner(search: Search, values: Values, options: Options) -> Wrong | None:
    gm, inputs = search.graph, search.subject.own
    if options.inner == "eager" or any(op_name(n) == "mark" for n in gm.graph.nodes):
        return None
    d, limit, dtype = inner.judge_outputs(gm, inputs, options, values)
    search.checked.append(Checked(options.compiler, True, None, d.error / max(limit, 1e-300) if d.error else 0.0))
    if d.error <= limit:
        return None
    name = str(dtype).removeprefix("torch.")
    place = inner.judge_places(gm, inputs, options, values)
    site, what, node, source = None, "the outputs of the graph", gm.graph.output_node(), None
    agreed: list[Pair] = []
    if place is not None:
        at, source, d, limit = place
        node = nodes_of(gm, source)[0]
        site, what = site_of(Pair(source, source, at), gm, [])
        agreed = [
            Pair(s, s, p) for p, s in places_of(gm, []).of.items() if nodes_of(gm, s) and nodes_of(gm, s)[0] < node
        ]
    finding = search.finding(options.compiler, site, what, node, d, limit, name, added=False)
    return Wrong(finding, None, gm, gm, source, source, agreed, inputs, values, own_dtype=True)


def _reported(bisection: Bisection, wrong: Wrong, options: Options, path: Path | None) -> Bisection:
    before, after = _code(wrong)
    finding = replace(wrong.finding, before=before, after=after)
    bisection = replace(bisection, finding=finding)
    if path is None:
        return bisection
    note = write_reproducer(path, bisection, wrong, options)
    return replace(bisection, reproducer=path) if note is None else replace(bisection, notes=(*bisection.notes, note))


def _code(wrong: Wrong) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the code of both sides of a finding."""
    if wrong.source is None or wrong.found is None:
        return (), ()
    before, after = wrong.stops()
    parts = slice_of(wrong.before, wrong.source, before), slice_of(wrong.after, wrong.found, after)
    old, new = (tuple(code_of(part, "computes")[0]) if part is not None else () for part in parts)
    return old, new
