"""The drawing of a model: what lies outside its streams, and streams of layers of sites, each with its branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from torch.fx import Node

from mhc_compile.passes.base import module_path, op_name
from mhc_compile.passes.dataflow import MATMULS
from mhc_compile.report.report import Element

MAX_SITES = 6
"""Sites that one layer may have; where modules with more are nested, the inner ones are the layers."""


class Drawing:
    """The numbered elements, and which element each node belongs to."""

    def __init__(self) -> None:
        self.elements: list[Element] = []
        self.roots: list[int] = []
        self.parent: dict[int, int] = {}
        self.of: dict[Node, int] = {}
        self.at: dict[int, Node] = {}
        """The node whose shape and source line are shown for an element."""
        self.entries: dict[Node, int] = {}
        """Streams by what is expanded into them."""
        self.exits: dict[Node, int] = {}
        """Where streams end, by what is reduced there."""
        self.before: dict[int, int] = {}
        """The site before every site and exit."""
        self.layers: dict[str, int] = {}
        """Layers by module path."""

    def add(self, element: Element, parent: int | None = None, *, first: bool = False) -> int:
        """Add an element below `parent`, or as a root; returns its number."""
        number = len(self.elements)
        self.elements.append(element)
        among = self.roots if parent is None else self.elements[parent].children
        among.insert(0 if first else len(among), number)
        if parent is not None:
            self.parent[number] = parent
        return number

    def give(self, nodes: Sequence[Node], element: int) -> None:
        """Let those of `nodes` belong to `element` that belong to none."""
        for node in nodes:
            self.of.setdefault(node, element)

    @property
    def owners(self) -> list[str]:
        """The modules whose forward holds a stream."""
        return [e.module for e in self.elements if e.kind == "stream"]

    def add_stream(
        self,
        owner: str,
        spec: str | None,
        sites: Sequence[tuple[str, str, str | None, str | None]],
        calls: int = 1,
    ) -> list[int]:
        """Add a stream with its sites (name, module path, topology, specification), their branches, and its exit.

        Returns the numbers of the stream, of its sites in order, and of its exit.
        """
        whole = owner or "the model itself"
        stream = self.add(Element("stream", whole, owner, spec=spec, calls=calls))
        numbers = [stream]
        layers = layers_of(owner, [module for _, module, *_ in sites])
        for (name, module, topology, own_spec), layer in zip(sites, layers, strict=True):
            around = stream if layer is None else self._layer(layer, stream, calls)
            site = self.add(Element("site", name, module, topology=topology, spec=own_spec, calls=calls), around)
            self.add(Element("branch", name, module, calls=calls), site)
            numbers.append(site)
        numbers.append(self.add(Element("exit", f"exit of {whole}", owner, calls=calls)))
        self.before.update(pairwise(numbers[:0:-1]))
        return numbers

    def _layer(self, path: str, stream: int, calls: int) -> int:
        """Return the layer at `path` of a stream; a second stream through the same module has a layer of its own."""
        known = self.layers.get(path)
        if known is None or self.parent[known] != stream:
            known = self.layers[path] = self.add(Element("layer", path, path, calls=calls), stream)
        return known

    def root(self, number: int) -> int:
        """Return the outermost element around `number`."""
        while number in self.parent:
            number = self.parent[number]
        return number

    def branch(self, site: int) -> int:
        """Return the branch of a site."""
        return next(c for c in self.elements[site].children if self.elements[c].kind == "branch")

    def name_branches(self) -> None:
        """Call every branch by the modules that it runs, once it is known which nodes are its.

        It stands for the last of them that contracts with parameters.
        """
        nodes_of: dict[int, list[Node]] = {}
        for node, number in self.of.items():
            nodes_of.setdefault(number, []).append(node)
        for number, nodes in nodes_of.items():
            element = self.elements[number]
            if element.kind == "branch" and (parts := _parts(nodes, element.module)):
                element.name = ", ".join(parts)
                last = next((name for name, contracts in reversed(parts.items()) if contracts), list(parts)[-1])
                element.module = f"{element.module}.{last}".strip(".")


def _parts(nodes: Sequence[Node], base: str) -> dict[str, bool]:
    """Return the modules right below `base` that `nodes` lie in, and whether each contains a contraction."""
    parts: dict[str, bool] = {}
    for node in nodes:
        path = module_path(node)
        inside = path.removeprefix(base).strip(".").split(".")
        if path.startswith(base) and inside[0]:
            name = ".".join(inside[:2] if inside[1:2] and inside[1].isdigit() else inside[:1])
            parts[name] = parts.get(name, False) or op_name(node) in MATMULS
    return parts


def layers_of(owner: str, modules: Sequence[str]) -> list[str | None]:
    """Return the layer of every site of a stream by the path of the site's module, or None.

    A layer is a numbered module: the outermost ones that have a few sites each.
    """
    inside = [m.removeprefix(owner).strip(".") for m in modules]
    most = max((sum(p.isdigit() for p in m.split(".")) for m in inside), default=0)
    layers: list[str | None] = [None] * len(inside)
    for depth in range(1, most + 1):
        layers = [_numbered(owner, m, depth) for m in inside]
        if max(Counter(layers).values()) <= MAX_SITES:
            break
    return layers


def _numbered(owner: str, path: str, depth: int) -> str | None:
    """Return `path` up to its number of this `depth`, or its last one; None for a path without numbers."""
    parts = path.split(".") if path else []
    at = [i for i, p in enumerate(parts) if p.isdigit()][:depth]
    return ".".join([*([owner] if owner else []), *parts[: at[-1] + 1]]) if at else None
