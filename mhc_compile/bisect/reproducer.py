"""Write a finding as one file that runs with `python`, exits 1 while the error is there, and 0 once it is gone."""

from __future__ import annotations

import base64
import os
import runpy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from mhc_compile.bisect.bisection import Bisection, Finding
from mhc_compile.bisect.search import Wrong
from mhc_compile.bisect.slices import code_of, names_of, slice_of
from mhc_compile.bisect.values import Values
from mhc_compile.capture import private_copy
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Pass, module_path, op_name, value
from mhc_compile.passes.ownership import is_owned
from mhc_compile.versions import VERSION

EMBEDDED = 1 << 20
"""Bytes of inputs up to which all are written down; of more, tensors above `SMALL` are drawn at random."""
SMALL = 1 << 14
LARGEST = 1 << 26
"""Bytes of inputs beyond which none are written down where random ones do not show the error."""

_FILE = '''"""{heading}"""

import sys

import torch
{imports}
from mhc_compile.bisect import replay


{functions}


INPUTS = {{
{inputs}}}

if __name__ == "__main__":
    sys.exit({call})
'''


class _Attempt(NamedTuple):
    """One way to show the error: the file applies `step`, or without one contains the graph `after` it."""

    before: GraphModule
    after: GraphModule
    step: Pass | None


def write_reproducer(path: Path, bisection: Bisection, wrong: Wrong, options: Options) -> str | None:
    """Write the smallest reproducer that shows the error; return why there is none, or None."""
    for attempt in _attempts(wrong):
        for everything in (False, True):
            text = _text(bisection, wrong, attempt, options, everything)
            if text is not None and _shows(path, text):
                return None
    return "no reproducer: no part of the graph shows the error by itself, nor does the whole, from code alone"


def _attempts(wrong: Wrong) -> Iterator[_Attempt]:
    """Yield what computes the value, the site, the whole graph; with the pass applied again, then as recorded."""
    before, after = _unmarked(wrong.before), _unmarked(wrong.after)
    near = wrong.stops()
    site = _in_front_of_site(before, wrong, near[0]), near[1]
    for step in [wrong.step, None] if wrong.step is not None and _fields(wrong.step) is not None else [None]:
        every = [near, ({}, {})] if step is None else [site, ({}, {})] if wrong.spec else [near, site, ({}, {})]
        for old, new in every if wrong.source is not None else [({}, {})]:
            whole = not old
            parts = (
                slice_of(before, None if whole else wrong.source, old),
                slice_of(after, None if whole else wrong.found, new),
            )
            if parts[0] is not None and parts[1] is not None:
                yield _Attempt(parts[0], parts[1], step)


def _unmarked(gm: GraphModule) -> GraphModule:
    copy = private_copy(gm)
    for node in copy.graph.nodes:
        if op_name(node) == "mark" and node.op == "call_function":
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
    return copy


def _in_front_of_site(gm: GraphModule, wrong: Wrong, agreed: Mapping[str, str]) -> dict[str, str]:
    """Return the agreed values that do not depend on what the site's branch reads."""
    site = wrong.finding.site
    reads = [p.before for p in wrong.agreed if p.place and p.place.site == site and p.place.part == "reads"]
    inside = {n.name for n in gm.graph.nodes if n.name in names_of(gm, reads)}
    for node in gm.graph.nodes:
        if any(n.name in inside for n in node.all_input_nodes):
            inside.add(node.name)
    # In a residual graph it is the stream before the site, which stays an input.
    keep = set(names_of(gm, reads)) if wrong.spec else set()
    return {name: as_ for name, as_ in agreed.items() if name not in inside or name in keep}


def _text(bisection: Bisection, wrong: Wrong, attempt: _Attempt, options: Options, everything: bool) -> str | None:
    parts = (
        [attempt.before] if attempt.before is attempt.after or wrong.step is None else [attempt.before, attempt.after]
    )
    values = _values(wrong, parts)
    if values is None:
        return None
    size = sum(t.nbytes for t in values.values() if isinstance(t, Tensor))
    draw = not everything and size > EMBEDDED
    if everything and not EMBEDDED < size <= LARGEST:
        return None  # too many, or as in the attempt before
    f = bisection.finding
    assert f is not None
    names = ["before", "after"] if len(parts) == 2 else ["computes"]
    codes = [code_of(part, name) for part, name in zip(parts, names, strict=True)]
    imports = list(dict.fromkeys(line for _, lines in codes for line in lines))
    owned = {n.name for part in parts for n in part.graph.find_nodes(op="placeholder") if is_owned(n)}
    entries = "".join(
        f"    {name!r}: {_written(v, name in owned, i, draw)},\n" for i, (name, v) in enumerate(values.items())
    )
    functions = "\n\n\n".join("\n".join(lines) for lines, _ in codes)
    return _FILE.format(
        heading=_heading(bisection, f), imports="".join(f"{line}\n" for line in imports), functions=functions,
        inputs=entries, call=_call(wrong, attempt, options),
    )  # fmt: skip


def _heading(bisection: Bisection, f: Finding) -> str:
    where = f"at site {f.site}" if f.site else f"in {f.what}"
    lines = [
        f"{f.step} is wrong {where} of {bisection.model}: {f.what}.",
        "",
        f"Error {f.error:.3g} at a scale of {f.scale:.3g}, allowed {f.allowed:.3g}, in {f.dtype}, with {f.values}.",
        f"Written by mhc-compile {VERSION} with torch {torch.__version__}.",
        *([f"The site's source: {f.source}"] if f.source else []),
        "",
        "Run it with python: it exits with 1 while the error is there, and with 0 once it is gone.",
        "",
    ]
    # A user's line of code may hold anything.
    return "\n".join(lines).replace("\\", "\\\\").replace('"', "'")


def _call(wrong: Wrong, attempt: _Attempt, options: Options) -> str:
    if wrong.step is None:
        if wrong.finding.step == "kernels":
            return "replay.kernel(computes, INPUTS)"
        compiler = {"inner": options.compiler, "mode": options.mode}
        return f"replay.compiled(computes, INPUTS, {compiler!r})"
    tolerance = None if wrong.own_dtype else wrong.tolerance
    ours = [n for n in attempt.before.graph.nodes if getattr(n.target, "namespace", "") in ("mhc", "mhc_kernels")]
    sites = [(module_path(n), str(n.meta.get("mhc_site", ""))) for n in ours]
    step = None
    if attempt.step is not None:
        cls = type(attempt.step)
        step = (cls.__module__, cls.__qualname__, _fields(attempt.step))
    return (
        f"replay.rewritten(\n        before, after, INPUTS, tolerance={tolerance!r},\n        step={step!r},\n"
        f"        sites={sites!r},\n        spec={wrong.spec!r},\n    )"
    )


def _fields(step: Pass) -> dict[str, Any] | None:
    """Return the fields of a pass that another process can create; None where it cannot."""
    cls = type(step)
    values = {f.name: getattr(step, f.name) for f in fields(step)}  # type: ignore[arg-type]
    plain = all(_is_plain(v) for v in values.values())
    return values if plain and cls.__module__ != "__main__" and "<" not in cls.__qualname__ else None


def _is_plain(x: object) -> bool:
    if isinstance(x, (tuple, list)):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, (str, int, float, bool))


def _values(wrong: Wrong, parts: Sequence[GraphModule]) -> Values | None:
    """Return the inputs of the parts, in the dtypes of the graph; None where one cannot be written."""
    old_inputs = dict(
        zip((n.name for n in wrong.before.graph.find_nodes(op="placeholder")), wrong.inputs, strict=False)
    )
    new_inputs = dict(zip((n.name for n in wrong.after.graph.find_nodes(op="placeholder")), wrong.inputs, strict=False))
    values: Values = {}
    for part in parts:
        for node in part.graph.find_nodes(op="placeholder"):
            known = [d[node.name] for d in (old_inputs, wrong.values, new_inputs, wrong.new) if node.name in d]
            if not known:
                return None
            known_value = known[0]
            form = value(node)
            if isinstance(known_value, Tensor):
                known_value = known_value.detach().to(form.dtype if isinstance(form, Tensor) else known_value.dtype)
            elif not isinstance(known_value, (int, float, bool)):
                return None
            values[node.name] = known_value
    return values


def _written(v: Any, parameter: bool, seed: int, draw: bool) -> str:
    if not isinstance(v, Tensor):
        return repr(v)
    dtype, shape, end = str(v.dtype).removeprefix("torch."), list(v.shape), ", parameter=True)" if parameter else ")"
    if draw and v.nbytes > SMALL and v.is_floating_point():
        wide = v.double()
        return f"replay.seeded({dtype!r}, {shape}, {seed}, {float(wide.mean()):.6g}, {float(wide.std()):.6g}{end}"
    data = v.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes() if v.numel() else b""
    return f"replay.raw({dtype!r}, {shape}, {base64.b64encode(data).decode()!r}{end}"


def _shows(path: Path, text: str) -> bool:
    """Write the file, whole or not at all, and keep it if it exits with 1. Raises MHC526 where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.py")
    try:
        temporary.write_text(text, encoding="utf-8")
        if shows := _exits_with_one(temporary):
            temporary.replace(path)
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MHCError("MHC526", f"{path}: {error.strerror}") from error
    return shows


def _exits_with_one(path: Path) -> bool:
    try:
        with redirect_stdout(StringIO()):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        return done.code == 1
    except Exception:  # a part of a graph may not run by itself for many reasons: the next attempt is larger
        return False
    return False
