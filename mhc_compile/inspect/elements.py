"""The drawing of a model: what lies outside its streams, and streams of layers of sites, each with its branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

from mhc_compile.passes.base import module_path
from mhc_compile.passes.residual import ResidualStream

Kind = Literal["outside", "stream", "layer", "site", "branch", "memory", "exit"]
MAX_SITES = 6
"""Sites that one layer may have; where modules with more are nested, the inner ones are the layers."""


@dataclass
class Element:
    """One part of the drawing."""

    kind: Kind
    name: str
    module: str = ""
    """Path of the module that it stands for."""
    children: list[int] = field(default_factory=list)
    topology: str | None = None
    spec: str | None = None
    """Of a converted stream, its `StreamSpec` as text."""
    calls: int = 1
    """How often one forward goes through it."""
    at: Node | None = None
    """The node whose shape and source line are shown."""


@dataclass
class Found:
    """A residual stream with what is only there to see behind the pass that finds it."""

    stream: ResidualStream
    topologies: list[str]
    """The class of every site."""
    branches: list[list[Node]]
    """The nodes of every site's branches."""


class Drawing:
    """Elements by number, and of which nodes it is known to which they belong."""

    def __init__(self) -> None:
        self.elements: list[Element] = []
        self.roots: list[int] = []
        self.parent: dict[int, int] = {}
        self.of: dict[Node, int] = {}
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

    def add_stream(self, owner: str, spec: str | None, sites: Sequence[tuple[str, str, str | None]]) -> list[int]:
        """A stream with its sites (name, path of the module, topology), their branches, and its exit.

        Returns the numbers of the stream, of its sites in order, and of its exit.
        """
        stream = self.add(Element("stream", owner or "the model itself", owner, spec=spec))
        numbers, last = [stream], None
        for (name, module, topology), layer in zip(sites, layers_of(owner, [m for _, m, _ in sites]), strict=True):
            place = stream if layer is None else self.layers.get(layer)
            if place is None or self.parent.get(place, stream) != stream:
                place = self.layers[str(layer)] = self.add(Element("layer", str(layer), str(layer)), stream)
            site = self.add(Element("site", name, module, topology=topology, spec=spec), place)
            self.add(Element("branch", name, module), site)
            if last is not None:
                self.before[site] = last
            last = site
            numbers.append(site)
        leaves = self.add(Element("exit", f"exit of {owner or 'the model itself'}", owner))
        if last is not None:
            self.before[leaves] = last
        return [*numbers, leaves]

    def branch(self, site: int) -> int:
        """The branch of a site."""
        return next(c for c in self.elements[site].children if self.elements[c].kind == "branch")

    def name_branches(self) -> None:
        """Call every branch by the modules that it runs, once it is known which nodes are its."""
        held: dict[int, list[str]] = {}
        for node, number in self.of.items():
            held.setdefault(number, []).append(module_path(node))
        for number, paths in held.items():
            element = self.elements[number]
            base = element.module
            parts = dict.fromkeys(p.removeprefix(base).strip(".").split(".")[0] for p in paths if p.startswith(base))
            names = [p for p in parts if p]
            if element.kind == "branch" and names:
                element.name, element.module = ", ".join(names), f"{base}.{names[-1]}".strip(".")


def draw(found: Sequence[Found], specs: Sequence[str | None]) -> tuple[Drawing, dict[tuple[int, int], int]]:
    """The drawing of residual streams with their specifications; and the site elements by stream and site index.

    A stream that is called several times is drawn once.
    """
    drawing = Drawing()
    known: dict[tuple[str, ...], list[int]] = {}
    numbers: dict[tuple[int, int], int] = {}
    branches: list[tuple[list[Node], int]] = []
    for k, (one, spec) in enumerate(zip(found, specs, strict=True)):
        stream = one.stream
        key = (stream.owner, *(s.name for s in stream.sites))
        if key in known:
            for number in known[key]:
                drawing.elements[number].calls += 1
        else:
            sites = [(s.name, module_path(s.add), t) for s, t in zip(stream.sites, one.topologies, strict=True)]
            known[key] = drawing.add_stream(stream.owner, spec, sites)
        whole, *each, leaves = known[key]
        drawing.entries[stream.entry], drawing.exits[stream.exit] = whole, leaves
        for node, number in ((stream.entry, whole), (stream.exit, leaves)):
            drawing.elements[number].at = drawing.elements[number].at or node
        for i, (site, number) in enumerate(zip(stream.sites, each, strict=True)):
            numbers[k, i] = number
            drawing.elements[number].at = drawing.elements[number].at or site.add
            branch = drawing.branch(number)
            drawing.elements[branch].at = drawing.elements[branch].at or site.branches[0]
            drawing.give([*site.chain, *site.inner_adds, site.add], number)
            branches.append((one.branches[i], branch))
    # Behind all sites: the branch of a site that reads an early value has other sites among what it depends on.
    for nodes, branch in branches:
        drawing.give(nodes, branch)
    drawing.name_branches()
    return drawing, numbers


def layers_of(owner: str, modules: Sequence[str]) -> list[str | None]:
    """The layer of every site of a stream by the path of the site's module; None where it lies in none.

    A layer is a numbered module: the outermost ones that have a few sites each.
    """
    inside = [m.removeprefix(owner).strip(".") for m in modules]
    most = max((sum(p.isdigit() for p in m.split(".")) for m in inside), default=0)
    found: list[str | None] = [None] * len(inside)
    for depth in range(1, most + 1):
        found = [_numbered(owner, m, depth) for m in inside]
        if max(Counter(found).values()) <= MAX_SITES:
            break
    return found


def _numbered(owner: str, path: str, depth: int) -> str | None:
    """`path` up to its number of this `depth`, or its last one; None for a path without."""
    parts = path.split(".") if path else []
    at = [i for i, p in enumerate(parts) if p.isdigit()][:depth]
    return ".".join([*([owner] if owner else []), *parts[: at[-1] + 1]]) if at else None
