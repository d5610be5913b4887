"""To which element of the drawing a node belongs: by the site that made it, else by where its module lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.passes.base import kernels_of, module_path
from mhc_compile.passes.ownership import is_owned
from mhc_compile.report.elements import Drawing
from mhc_compile.report.lines import input_name
from mhc_compile.report.report import Element

INPUTS, OUTPUT = "(inputs)", "(output)"
"""Names of what stands at both ends, which no module can have."""


class Placement:
    """Finds and remembers the element of every node; elements outside the streams are added as they are met.

    `seen` are all nodes of all graphs by name, those that were erased meanwhile, too. `model` names what lies in no
    module.
    """

    def __init__(self, drawing: Drawing, seen: dict[str, Node], model: str, *, nested: bool = False) -> None:
        self.drawing, self.seen, self.model, self.nested = drawing, seen, model, nested
        self.outside: dict[str, int] = {}
        self.paths = self._learn()

    def __call__(self, node: Node) -> int:
        """Return the element of `node`."""
        chain = []
        while node not in self.drawing.of:
            chain.append(node)
            origin = self._find(node)
            if isinstance(origin, Node) and origin not in chain:
                node = origin
                continue
            self.drawing.of[node] = self.at(module_path(node)) if isinstance(origin, Node) else origin
        for one in reversed(chain):
            self.drawing.of.setdefault(one, self._inherited(one, self.drawing.of[node]))
            node = one
        return self.drawing.of[node]

    def _find(self, node: Node) -> int | Node:
        """Return the element of `node`, or the node that it came from."""
        if node.op == "placeholder":
            return self.at(input_name(node).rpartition(".")[0]) if is_owned(node) else self._special(INPUTS)
        if node.op == "output":
            return self._special(OUTPUT)
        origin = self.seen.get(str(node.meta.get("mhc_from")))
        if origin is None or origin is node:
            return self.at(module_path(node))
        ends = {torch.ops.mhc.expand.default: self.drawing.entries, torch.ops.mhc.reduce.default: self.drawing.exits}
        elements: dict[Any, int] = ends.get(node.target, {})  # type: ignore[call-overload]
        return elements.get(origin, origin)

    def _inherited(self, node: Node, element: int) -> int:
        """Return the element of a node made from one of `element`: a kernel with the branch's norm is the site's."""
        fused = bool(kernels_of(node))
        return self.drawing.parent[element] if fused and self.drawing.elements[element].kind == "branch" else element

    # --- by module path ------------------------------------------------------------------------------------------

    def _learn(self) -> dict[str, int]:
        """Return the elements of module paths whose nodes all belong to one element, and of layers."""
        elements: dict[str, set[int]] = {}
        for node, number in self.drawing.of.items():
            if self.drawing.elements[number].kind != "memory":  # what was added there lies in others' modules
                elements.setdefault(module_path(node), set()).add(number)
        around = {p for owner in self.drawing.owners for p in prefixes(owner)}
        learnt = {p: next(iter(e)) for p, e in elements.items() if len(e) == 1 and p not in around}
        return learnt | self.drawing.layers

    def at(self, path: str) -> int:
        """Return the element of what lies in the module at `path`."""
        if path not in self.paths:
            above = next((p for p in reversed(list(prefixes(path))[:-1]) if p in self.paths), None)
            self.paths[path] = self._special(self._cut(path)) if above is None or self.nested else self.paths[above]
        return self.paths[path]

    def _cut(self, path: str) -> str:
        """Return `path` cut to the module beside the streams' owners, or below the deepest that holds it."""
        if self.nested:
            return path
        parts = path.split(".") if path else []
        shared = 0
        for owner in self.drawing.owners:
            names = owner.split(".") if owner else []
            same = next((i for i, (a, b) in enumerate(zip(parts, names, strict=False)) if a != b), None)
            shared = max(shared, min(len(parts), len(names)) if same is None else same)
        end = shared + 1
        while end < len(parts) and parts[end].isdigit():
            end += 1
        return ".".join(parts[:end])

    def _special(self, path: str) -> int:
        """Return the element outside the streams at `path`, below its parent's in a nested drawing."""
        if path not in self.outside:
            parent = None
            if self.nested and "." in path:
                parent = self._special(path.rpartition(".")[0])
            numbered = self.nested and path.rpartition(".")[2].isdigit()
            ends = path in (INPUTS, OUTPUT)
            name, module = (path.strip("()"), "") if ends else (path or self.model, path)
            self.outside[path] = self.drawing.add(Element("layer" if numbered else "outside", name, module), parent)
        return self.outside[path]


def prefixes(path: str) -> Iterable[str]:
    """Return `""`, `a`, `a.b`, ... up to `path`."""
    parts = path.split(".") if path else []
    return (".".join(parts[:i]) for i in range(len(parts) + 1))


def in_order(drawing: Drawing, captured: Sequence[Node], place: Placement) -> list[int]:
    """Return the roots in the order of the captured graph, exits and over-encodings next to their streams.

    A stream is where its first site is.
    """
    first: dict[int, float] = {}
    for i, node in enumerate(captured):
        number = place(node)
        if drawing.elements[number].kind == "stream" or (node.op == "placeholder" and is_owned(node)):
            continue
        first.setdefault(drawing.root(number), i)
    last = float(len(captured))
    for root in drawing.roots:
        element = drawing.elements[root]
        if element.kind == "exit":
            first[root] = first.get(drawing.root(drawing.before[root]), last) + 0.5
        elif element.kind == "memory":
            streams = (r for r in drawing.roots if drawing.elements[r].kind == "stream")
            first[root] = min(first.get(r, last) for r in streams if drawing.elements[r].module == element.module) - 0.5
    return sorted(drawing.roots, key=lambda r: first.get(r, last))
