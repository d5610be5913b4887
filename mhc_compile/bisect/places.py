"""Where two forms of one graph can be compared: nodes that kept their names, and what the streams are at each site.

A site has places that every form of a graph has in some shape:

    reads   what the branch reads: the stream's value, `mhc.aggregate`, h of a fused chain
    normed  the same after the norm with which the branch begins, where a fused chain returns that
    pre, post, mix   the coefficients, from `widen` on
    stream  the stream after the site: the add's value, `mhc.distribute`, next_X of a fused chain
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

import mhc_compile.kernels.ops  # noqa: F401  (registers the dialect)
from mhc_compile.bisect.values import Values
from mhc_compile.kernels.chain import Chain
from mhc_compile.passes.base import kernels_of, module_path, op_name, site_path, source_line
from mhc_compile.passes.norms import match_norm
from mhc_compile.passes.results import ResidualStream

PARTS = {
    "reads": "what its branch reads",
    "normed": "what its branch reads, normalised",
    "pre": "its weights pre",
    "post": "its weights post",
    "mix": "its matrix H",
    "stream": "the streams after it",
}
_CHAIN_PARTS = {"next_pre": "pre", "next_post": "post", "next_mix": "mix"}


@dataclass(frozen=True)
class Place:
    """One of the places of one site."""

    site: str
    """Module path and ordinal there: `model.layers.3#0`."""
    part: str
    """A key of `PARTS`."""
    call: int = 0
    """Which call of the site's module, counted from 0."""


@dataclass(frozen=True)
class Source:
    """The node, or one item of its tuple, that gives a place its value."""

    node: str
    item: int | None = None

    def of(self, values: Values) -> Any:
        """Return its value in a run, None where the run has no such node."""
        value = values.get(self.node)
        if self.item is None or value is None:
            return value
        return value[self.item] if isinstance(value, (tuple, list)) and self.item < len(value) else None


@dataclass
class Places:
    """The places of one graph."""

    of: dict[Place, Source] = field(default_factory=dict)
    by_node: dict[str, list[Place]] = field(default_factory=dict)
    """The places that a node gives, by its name."""

    def add(self, site: str, part: str, node: str, item: int | None = None) -> None:
        """Add the next call's place of this name."""
        call = 0
        while (place := Place(site, part, call)) in self.of:
            call += 1
        self.of[place] = Source(node, item)
        self.by_node.setdefault(node, []).append(place)


@dataclass(frozen=True)
class ResidualSite:
    """One site before `widen`: names of nodes, in the normal form and, where they were spelt otherwise, before it."""

    site: str
    module: str
    source: str | None
    reads: tuple[str, ...]
    stream: tuple[str, ...]


def residual_sites(streams: Iterable[ResidualStream]) -> list[ResidualSite]:
    """Return the sites of the streams in order."""
    sites = []
    for stream in streams:
        for site in stream.sites:
            read = next((v for v in (site.previous, *site.chain) if v in site.reads), None)
            path = f"{module_path(site.add)}#{site.name.rpartition('#')[2]}"
            names = (_names(read) if read is not None else (), _names(site.add))
            sites.append(ResidualSite(path, module_path(site.add), source_line(site.add), *names))
    return sites


def _names(node: Node) -> tuple[str, ...]:
    return (node.name, str(node.meta["mhc_from"])) if "mhc_from" in node.meta else (node.name,)


def places_of(gm: GraphModule, residual: Iterable[ResidualSite]) -> Places:
    """Return the places of a graph in any form: of `residual` sites where the stream is not widened yet."""
    places = Places()
    nodes = {n.name: n for n in gm.graph.nodes}
    ours = [n for n in gm.graph.nodes if getattr(n.target, "namespace", "") in ("mhc", "mhc_kernels")]
    if not any(op_name(n) != "mark" for n in ours):
        for site in residual:
            for part, names in (("reads", site.reads), ("stream", site.stream)):
                # The last name that is there: before the normal form an in-place add has the name of what it wrote.
                if present := next((name for name in names if name in nodes), None):
                    places.add(site.site, part, present)
        return places
    for node in ours:
        chain = next((spec for spec in kernels_of(node) if isinstance(spec, Chain)), None)
        if chain is not None:
            _of_chain(places, node, chain)
        elif op_name(node) == "distribute":
            places.add(site_path(node), "stream", node.name)
        elif op_name(node) in ("coefficients", "reference_coefficients"):
            _of_coefficients(places, node)
    return places


def _of_chain(places: Places, node: Node, chain: Chain) -> None:
    names = chain.outputs()
    for i, name in enumerate(names):
        item = i if len(names) > 1 else None
        if name == "next_X" and "mhc_mixes" in node.meta:
            places.add(node.meta["mhc_mixes"], "stream", node.name, item)
        elif "mhc_reads" in node.meta and name == "h":
            places.add(node.meta["mhc_reads"], "reads" if chain.norm == "none" else "normed", node.name, item)
        elif "mhc_reads" in node.meta and name in _CHAIN_PARTS:
            places.add(node.meta["mhc_reads"], _CHAIN_PARTS[name], node.name, item)


def _of_coefficients(places: Places, node: Node) -> None:
    site = site_path(node)
    items = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    for i, part in enumerate(("pre", "post", "mix")):
        places.add(site, part, node.name, i)
    weighs = [u for u in items[0].users if op_name(u) == "aggregate"] if 0 in items else []
    for h in sorted(weighs)[:1]:
        places.add(site, "reads", h.name)
        if (norm := match_norm(h)) is not None:
            places.add(site, "normed", norm.out.name)


@dataclass(frozen=True)
class Pair:
    """One value that both forms of a graph hold."""

    before: Source
    after: Source
    place: Place | None
    """None for a node outside the stream that kept its name."""


def pairs(before: GraphModule, after: GraphModule, residual: list[ResidualSite]) -> Iterator[Pair]:
    """Yield the values that both graphs hold, in the order of the graph `after`."""
    old, new = places_of(before, residual), places_of(after, residual)
    names = {n.name for n in before.graph.nodes if n.op not in ("output", "placeholder")}
    for node in after.graph.nodes:
        if node.op in ("output", "placeholder"):
            continue
        shared = [place for place in new.by_node.get(node.name, ()) if place in old.of]
        # Coefficients first: what is wrong with them is what is wrong with the rest.
        for place in sorted(
            shared, key=lambda p: list(PARTS).index(p.part) if p.part in ("pre", "post", "mix") else -1
        ):
            yield Pair(old.of[place], new.of[place], place)
        if not shared and node.name in names:
            yield Pair(Source(node.name), Source(node.name), None)


def site_of(pair: Pair, after: GraphModule, residual: list[ResidualSite]) -> tuple[str | None, str]:
    """Return the site that a value belongs to and what it is there; of a node in a branch, the branch's site.

    The site is None where the value lies before all sites or after them.
    """
    if pair.place is not None:
        return pair.place.site, PARTS[pair.place.part]
    nodes = {n.name: n for n in after.graph.nodes}
    node = nodes[pair.after.node]
    by_node = places_of(after, residual).by_node
    if not _reached(node, by_node, lambda n: n.all_input_nodes):
        return None, "before the first site"
    ahead = _reached(node, by_node, lambda n: list(n.users))
    streams = [place for place in ahead if place.part == "stream"] or ahead
    if not streams:
        return None, "after the last site"
    return streams[0].site, "its branch"


def _reached(node: Node, by_node: dict[str, list[Place]], step: Any) -> list[Place]:
    """Return the places reached first from `node`, in the order of the graph."""
    reached: list[Node] = []
    seen, stack = {node}, list(step(node))
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.name in by_node:
            reached.append(n)
        else:
            stack += step(n)
    return [place for n in sorted(reached) for place in by_node[n.name]]
