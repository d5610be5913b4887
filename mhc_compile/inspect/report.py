"""The report as plain data: dictionaries, lists, text and numbers, for the page, for JSON, and to be compared.

    format, versions, model, options
    elements   the drawing: {kind, name, module, children, source, shape, dtype, topology, spec, parameters, block,
               stage, kernels, calls}; an element's number is its place in this list
    roots      numbers of the elements on top, from the inputs to the output
    lines      every distinct line of graph code, [text, element, source, form]
    captured   the graph before the first pass, numbers of lines
    passes     {name, text, ms, verify_ms, nodes_before, nodes_after, notes, code}: `code` is the graph behind the pass
    sources    {file, line, function, text}: lines of the user's code
    kernels    see `mhc_compile.inspect.kernels`
    diagnostics, blocks, stages, memories, native, reach

Numbers of things that are not there are None.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any

import torch

from mhc_compile.diagnostics import TABLE, MHCError, MHCWarning
from mhc_compile.inspect.elements import Drawing, Element, draw
from mhc_compile.inspect.inspection import Inspection
from mhc_compile.inspect.kernels import kernel_entries
from mhc_compile.inspect.lines import Line, Sources, is_buffer, short_path
from mhc_compile.inspect.placement import Placement, in_order
from mhc_compile.inspect.watch import Watcher
from mhc_compile.passes.base import is_tensor, shape, value
from mhc_compile.passes.ownership import is_owned
from mhc_compile.pipeline import Record

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
            "streams": len(found.streams), "sites": len(found.sites),
        },
        "options": _options(found),
        **work.data(),
        "diagnostics": [*([_error(found.refusal)] if found.refusal else ()), *map(_warning, found.warnings)],
        "memories": [asdict(m) for m in found.memories],
        "native": [asdict(s) for s in found.native],
        "reach": None if found.reach is None else asdict(found.reach),
    }  # fmt: skip


class _Report:
    """The parts that number each other."""

    def __init__(self, found: Inspection, watcher: Watcher) -> None:
        self.found, self.watcher = found, watcher
        self.sources = Sources()
        self.lines: dict[tuple[str, int, int | None, str], int] = {}
        self.seen = {line.node.name: line.node for lines in watcher.lines for line in lines}
        self.of_site: dict[tuple[str, str], int] = {}
        """Site elements by the owner and name under which their parameters lie."""
        self.drawing = self._draw()
        nested = not self.drawing.elements
        self.place = Placement(self.drawing, self.seen, found.model, nested=nested)
        if nested and not watcher.lines:
            for path in found.modules:
                self.place.at(path)
        self._place_memories()
        self._place_parameters()

    def data(self) -> dict[str, Any]:
        """Everything that has numbers or is numbered."""
        code = [self._code(lines) for lines in self.watcher.lines]
        last = [line.node for line in self.watcher.lines[-1]] if self.watcher.lines else []
        first = [line.node for line in self.watcher.lines[0]] if self.watcher.lines else []
        roots = in_order(self.drawing, first, self.place)
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
                self._pass(record, text, c)
                for record, text, c in zip(self.found.passes, self.watcher.texts, code[1:], strict=True)
            ],
            "sources": [s._asdict() for s in self.sources.found],
            "kernels": kernels,
            "blocks": blocks,
            "stages": stages,
        }

    # --- the drawing ---------------------------------------------------------------------------------------------

    def _draw(self) -> Drawing:
        watcher = self.watcher
        if not watcher.found:
            return watcher.native or Drawing()
        marks = [watcher.mark_of(one.stream) for one in watcher.found]
        drawing, numbers = draw(watcher.found, [None if m is None else m.spec for m in marks])
        for (k, i), number in numbers.items():
            mark = marks[k]
            if mark is not None:
                self.of_site[mark.owner, watcher.found[k].stream.sites[i].name] = number
                if mark.node is not None:
                    drawing.of.setdefault(mark.node, drawing.entries[watcher.found[k].stream.entry])
        return drawing

    def _place_memories(self) -> None:
        """Elements for memories and over-encodings, with what the passes made for them."""
        drawing, held = self.drawing, self.watcher.memories
        known: dict[tuple[str, str], int] = {}
        for node, (mark, layer) in held.layers.items():
            if (mark.owner, layer) not in known:
                assert mark.memory is not None
                site = next(m.site for m in mark.memory.layers if m.layer == layer)
                below = drawing.parent[self.of_site[mark.owner, site]]
                path = f"{mark.owner}.{layer}".strip(".")
                known[mark.owner, layer] = drawing.add(Element("memory", f"memory at {path}", path), below, first=True)
            drawing.of[node] = known[mark.owner, layer]
        for node, mark in held.over.items():
            if (mark.owner, "") not in known:
                name = f"over-encoding of {mark.owner or 'the model itself'}"
                known[mark.owner, ""] = drawing.add(Element("memory", name, mark.owner))
            drawing.of[node] = known[mark.owner, ""]
        for mark in self.watcher.marks:
            layers = sorted((path for owner, path in known if owner == mark.owner and path), key=len, reverse=True)
            for name, node in [*mark.parameters.items(), *mark.given.items()]:
                layer = next((x for x in layers if f".{x}." in name or f":{x}" in name), None)
                first = known.get((mark.owner, ""), next(iter(known.values()), None))
                if layer is not None:
                    drawing.of[node] = known[mark.owner, layer]
                elif first is not None and (name in mark.given or name.startswith("over_encoding.")):
                    drawing.of[node] = first

    def _place_parameters(self) -> None:
        """Stream parameters are their site's and exit's; the model's own lie where they are read."""
        for mark in self.watcher.marks:
            for name, node in mark.parameters.items():
                site = self.of_site.get((mark.owner, name.rpartition(".")[0]))
                if site is not None:
                    self.drawing.of[node] = site
                elif name.startswith("head."):
                    exits = [i for i, e in enumerate(self.drawing.elements) if e.kind == "exit"]
                    owned = [i for i in exits if self.drawing.elements[i].module.startswith(mark.owner)]
                    self.drawing.of[node] = owned[-1]

    # --- lines ---------------------------------------------------------------------------------------------------

    def _code(self, lines: Sequence[Line]) -> list[int]:
        found = []
        for line in lines:
            key = (line.text, self.place(line.node), self.sources.of(line.node), line.form)
            found.append(self.lines.setdefault(key, len(self.lines)))
        return found

    @staticmethod
    def _pass(record: Record, text: str, code: list[int]) -> dict[str, Any]:
        return {
            "name": record.name, "text": text, "ms": 1e3 * record.seconds,
            "verify_ms": 1e3 * record.verify_seconds, "nodes_before": record.nodes_before,
            "nodes_after": record.nodes_after, "notes": list(record.notes), "code": code,
        }  # fmt: skip

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
        """Note the one part that an element is in, and all that lies in it; a site takes its branch along."""
        elements = self.drawing.elements
        inside: dict[int, set[int]] = {}

        def visit(number: int, given: set[int]) -> set[int]:
            own = of.get(number, set()) or (given if elements[number].kind == "branch" else set())
            below = [visit(child, own) for child in elements[number].children]
            inside[number] = own.union(*below)
            return inside[number]

        for root in self.drawing.roots:
            visit(root, set())
        for number, parts in inside.items():
            if len(parts) == 1:
                where.setdefault(number, {})[name] = next(iter(parts))


def _state(found: Inspection) -> str:
    if found.native:
        return "native"
    return "refused" if found.refusal else "converted" if found.converted else "not converted"


def _options(found: Inspection) -> dict[str, str]:
    """What the model is, or would be, converted and compiled with."""
    specs = list(dict.fromkeys(s.spec for s in found.streams if s.spec)) or [found.spec]
    values = {"streams": "; ".join(specs)}
    values |= {f.name: str(getattr(found.options, f.name)) for f in fields(found.options)}
    stages = found.watcher.count if found.watcher is not None else None
    return values | ({} if stages is None else {"stages": str(stages)})


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
