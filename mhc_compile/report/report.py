"""The report as plain data: dictionaries, lists, text and numbers, for the page, for JSON, and to be compared.

    format, versions, model, options
    elements   the drawing: {kind, name, module, children, source, shape, dtype, topology, spec, parameters, block,
               stage, kernels, calls}; an element's number is its place in this list
    roots      numbers of the elements on top, from the inputs to the output
    lines      every distinct line of graph code, [text, element, source, form]
    captured   the graph before the first pass, numbers of lines
    passes     {name, text, purpose, ms, verify_ms, nodes_before, nodes_after, notes, code}: `code` is the
               graph behind the pass, `purpose` what the pass is for
    sources    {file, line, function, text}: lines of the user's code
    kernels    see `mhc_compile.report.kernels`
    diagnostics, blocks, stages, memories, native, reach

Numbers of things that are not there are None.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from mhc_compile.diagnostics import TABLE, MHCError, MHCWarning
from mhc_compile.passes.base import is_tensor, shape, value
from mhc_compile.passes.observer import Record
from mhc_compile.passes.ownership import is_owned
from mhc_compile.report.draw import draw
from mhc_compile.report.elements import Element
from mhc_compile.report.kernels import kernel_entries
from mhc_compile.report.lines import Line, Sources, is_buffer, short_path
from mhc_compile.report.placement import Placement, in_order
from mhc_compile.report.reach import Reach

if TYPE_CHECKING:
    from mhc_compile.report.inspection import Inspection
    from mhc_compile.report.watch import Watcher

FORMAT = 1
"""Changes when what the data means does."""


def data_of(found: Inspection) -> dict[str, Any]:
    """The report of an inspection."""
    watcher = found.watcher
    assert watcher is not None
    work = _Report(found, watcher)
    return {
        "format": FORMAT,
        "versions": {
            "mhc_compile": version("mhc-compile"), "torch": torch.__version__, "python": platform.python_version()
        },
        "model": {
            "name": found.model, "state": _state(found), "parameters": found.parameters, "added": found.added,
            "adds": str(found.coverage or ""),
        },
        "options": _options(found),
        **work.data(),
        "diagnostics": [*([_error(found.refusal)] if found.refusal else ()), *map(_warning, found.warnings)],
        "memories": [asdict(m) for m in found.memories],
        "native": [asdict(s) for s in found.native],
        "reach": _reach(found.reach),
    }  # fmt: skip


class _Report:
    """The parts that number each other."""

    def __init__(self, found: Inspection, watcher: Watcher) -> None:
        self.found, self.watcher = found, watcher
        self.sources = Sources()
        self.lines: dict[tuple[str, int, int | None, str], int] = {}
        self.seen = {line.node.name: line.node for lines in watcher.lines for line in lines}
        self.drawing = draw(watcher)
        nested = not self.drawing.elements
        self.place = Placement(self.drawing, self.seen, found.model, nested=nested)
        if nested and not watcher.lines:
            for path in found.modules:
                self.place.at(path)

    def data(self) -> dict[str, Any]:
        """Everything that has numbers or is numbered."""
        code = [self._code(lines) for lines in self.watcher.lines]
        last = [line.node for line in self.watcher.lines[-1]] if self.watcher.lines else []
        first = [line.node for line in self.watcher.lines[0]] if self.watcher.lines else []
        roots = in_order(self.drawing, first, self.place)
        self._show_last(last)
        kernels = kernel_entries(self.found.kernels, last, self.place)
        blocks, stages, where = self._parts()
        elements = [self._element(e) for e in self.drawing.elements]
        for number, size in self._parameters().items():
            elements[number]["parameters"] = size
        for number, parts in where.items():
            elements[number] |= parts
        for k, kernel in enumerate(kernels):
            for number in kernel["elements"]:
                elements[number]["kernels"].append(k)
        return {
            "elements": elements,
            "roots": roots,
            "lines": [list(key) for key in self.lines],
            "captured": code[0] if code else [],
            "passes": [
                _pass(*parts)
                for parts in zip(self.found.passes, self.watcher.texts, self.watcher.purposes, code[1:], strict=True)
            ],
            "sources": [s._asdict() for s in self.sources.found],
            "kernels": kernels,
            "blocks": blocks,
            "stages": stages,
        }

    # --- lines ---------------------------------------------------------------------------------------------------

    def _show_last(self, nodes: Sequence[Node]) -> None:
        """Elements of which no node is shown yet show the last tensor that they give."""
        for node in reversed(nodes):
            element = self.drawing.elements[self.place(node)]
            if element.at is None and is_tensor(node) and node.op not in ("placeholder", "output"):
                element.at = node

    def _code(self, lines: Sequence[Line]) -> list[int]:
        found = []
        for line in lines:
            key = (line.text, self.place(line.node), self.sources.of(line.node), line.form)
            found.append(self.lines.setdefault(key, len(self.lines)))
        return found

    # --- elements ------------------------------------------------------------------------------------------------

    def _element(self, element: Element) -> dict[str, Any]:
        at = element.at
        tensor = at if at is not None and is_tensor(at) else None
        return {
            "kind": element.kind, "name": element.name, "module": element.module, "children": element.children,
            "source": None if at is None else self.sources.of(at),
            "shape": "" if tensor is None else f"[{', '.join(map(str, shape(tensor)))}]",
            "dtype": "" if tensor is None else str(value(tensor).dtype).removeprefix("torch."),
            "topology": element.topology, "spec": element.spec, "parameters": 0, "block": None, "stage": None,
            "kernels": [], "calls": element.calls,
        }  # fmt: skip

    def _parameters(self) -> dict[int, int]:
        """Elements of the parameters of every element, of what lies in it among them."""
        found: dict[int, int] = {}
        first = self.watcher.lines[0] if self.watcher.lines else []
        for line in first:
            if (
                line.node.op == "placeholder"
                and is_owned(line.node)
                and is_tensor(line.node)
                and not is_buffer(line.node)
            ):
                number: int | None = self.place(line.node)
                while number is not None:
                    found[number] = found.get(number, 0) + value(line.node).numel()
                    number = self.drawing.parent.get(number)
        return found

    def _parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[int, dict[str, int]]]:
        """Blocks, stages, and in which of them elements are."""
        where: dict[int, dict[str, int]] = {}
        blocks, of = [], dict[int, set[int]]()
        for k, block in enumerate(self.watcher.blocks or ()):
            inside = list(dict.fromkeys(map(self.place, block.sites)))
            blocks.append({"first": inside[0], "last": inside[-1], "kept": block.kept, "again": block.again})
            of |= {number: {k} for number in inside}
        self._spread(where, "block", of)
        stages, of = [], dict[int, set[int]]()
        for k, stage in enumerate(self.watcher.stages):
            inside = list(dict.fromkeys(map(self.place, stage.sites)))
            stages.append({"first": inside[0], "last": inside[-1], "parameters": stage.parameters})
            for node in stage.nodes:
                if node.op != "placeholder":
                    of.setdefault(self.place(node), set()).add(k)
            of |= {number: {k} for number in inside}
        self._spread(where, "stage", of)
        return blocks, stages, where

    def _spread(self, where: dict[int, dict[str, int]], name: str, of: dict[int, set[int]]) -> None:
        """Note the one part that an element is in: a branch is where its site is, a layer where all its sites are."""
        elements = self.drawing.elements

        def visit(number: int, around: set[int]) -> set[int]:
            kind = elements[number].kind
            parts = around if kind == "branch" else of.get(number, set())
            below = [visit(child, parts) for child in elements[number].children]
            if kind in ("stream", "layer"):
                parts = set().union(*below)
            if len(parts) == 1:
                where.setdefault(number, {})[name] = next(iter(parts))
            return parts

        for root in self.drawing.roots:
            visit(root, set())


def _pass(record: Record, text: str, purpose: str, code: list[int]) -> dict[str, Any]:
    return {
        "name": record.name, "text": text, "purpose": purpose, "ms": 1e3 * record.seconds,
        "verify_ms": 1e3 * record.verify_seconds, "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after, "notes": list(record.notes), "code": code,
    }  # fmt: skip


def _state(found: Inspection) -> str:
    if found.native:
        return "native"
    return "refused" if found.refusal else "converted" if found.converted else "not converted"


def _options(found: Inspection) -> dict[str, str]:
    """What the model is, or would be, converted and compiled with."""
    held = [*(s.spec for s in found.streams), *(s.spec for s in found.native)]
    specs = dict.fromkeys(filter(None, held)) or [found.spec]
    values = {"streams": "; ".join(specs)}
    values |= {f.name: str(getattr(found.options, f.name)) for f in fields(found.options)}
    stages = found.watcher.count if found.watcher is not None else None
    return values | ({} if stages is None else {"stages": str(stages)})


def _reach(reach: Reach | None) -> dict[str, Any] | None:
    if reach is None:
        return None
    return asdict(reach) | {
        "layers": list(reach.layers), "sites": list(reach.sites),
        "source": reach.source and short_path(reach.source),
        "dismissed": [[short_path(where), why] for where, why in reach.dismissed],
    }  # fmt: skip


def _error(error: MHCError) -> dict[str, Any]:
    return _diagnostic(error.code, error.detail, "error") | {
        "node": error.node, "module": error.module, "source": None if error.source is None else short_path(error.source)
    }  # fmt: skip


def _warning(warning: MHCWarning) -> dict[str, Any]:
    return _diagnostic(warning.code, warning.detail, "warning")


def _diagnostic(code: str, detail: str, severity: str) -> dict[str, Any]:
    row = TABLE[code]
    return {
        "code": code, "title": row.title, "detail": detail, "node": None, "module": None, "source": None,
        "way_out": row.way_out, "severity": severity,
    }  # fmt: skip
