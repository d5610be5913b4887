"""Draw the model that a run of passes was about: its streams, its memories, and whose the streams' parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.fx import Node

from mhc_compile.passes.base import module_path
from mhc_compile.passes.marks import State, Table, Weight
from mhc_compile.passes.ownership import INPUT
from mhc_compile.report.elements import Drawing, Element, Found

if TYPE_CHECKING:
    from mhc_compile.report.watch import Watcher

Sites = dict[tuple[str, str], int]
"""Site elements by the owner and the name under which their parameters lie."""


def draw(watcher: Watcher) -> Drawing:
    """The drawing of what was watched; without elements where no stream was found."""
    if not watcher.found:
        return watcher.native or Drawing()
    marks = [watcher.mark_of(one.stream) for one in watcher.found]
    drawing, numbers = _draw_streams(watcher.found, [None if m is None else m.spec for m in marks])
    sites: Sites = {}
    for (k, i), number in numbers.items():
        mark = marks[k]
        if mark is not None:
            sites[mark.owner, watcher.found[k].stream.sites[i].name] = number
            if mark.node is not None:
                drawing.of.setdefault(mark.node, drawing.entries[watcher.found[k].stream.entry])
    _add_memories(drawing, watcher, sites)
    for mark in watcher.marks:
        exits = [i for i, e in enumerate(drawing.elements) if e.kind == "exit" and e.module.startswith(mark.owner)]
        for name, node in mark.parameters.items():
            site = sites.get((mark.owner, name.rpartition(".")[0]))
            if site is not None or name.startswith("head."):
                drawing.of[node] = exits[-1] if site is None else site
    return drawing


def _draw_streams(found: Sequence[Found], specs: Sequence[str | None]) -> tuple[Drawing, dict[tuple[int, int], int]]:
    """The drawing of residual streams with their specifications; and the site elements by stream and site index.

    A stream that is called several times is drawn once.
    """
    drawing = Drawing()
    keys = [(one.stream.owner, *(s.name for s in one.stream.sites)) for one in found]
    known: dict[tuple[str, ...], list[int]] = {}
    numbers: dict[tuple[int, int], int] = {}
    branches: list[tuple[list[Node], int]] = []
    for k, (one, spec, key) in enumerate(zip(found, specs, keys, strict=True)):
        stream = one.stream
        if key not in known:
            sites = [(s.name, module_path(s.add), t) for s, t in zip(stream.sites, one.topologies, strict=True)]
            known[key] = drawing.add_stream(stream.owner, spec, sites, calls=keys.count(key))
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


def _add_memories(drawing: Drawing, watcher: Watcher, sites: Sites) -> None:
    """Add memories, in front of the sites of their layers, and over-encodings, with what was made and held for them."""
    known: dict[tuple[str, str], int] = {}
    for node, (mark, layer) in watcher.memories.layers.items():
        if (mark.owner, layer) not in known:
            assert mark.memory is not None
            site = next(m.site for m in mark.memory.layers if m.layer == layer)
            path = f"{mark.owner}.{layer}".strip(".")
            memory = Element("memory", f"memory at {path}", path)
            known[mark.owner, layer] = drawing.add(memory, drawing.parent[sites[mark.owner, site]], first=True)
        drawing.of[node] = known[mark.owner, layer]
    for node, mark in watcher.memories.over.items():
        if (mark.owner, "") not in known:
            name = f"over-encoding of {mark.owner or 'the model itself'}"
            known[mark.owner, ""] = drawing.add(Element("memory", name, mark.owner))
        drawing.of[node] = known[mark.owner, ""]
    for mark in watcher.marks:
        held = {layer: number for (owner, layer), number in known.items() if owner == mark.owner}
        by_length = sorted(filter(None, held), key=len, reverse=True)
        added = {
            node: next((x for x in by_length if f".{x}." in name), "")  # `engram.layers.3.key`
            for name, node in mark.parameters.items()
            if name.startswith(("engram.", "over_encoding."))
        }
        for x, node in mark.inputs.items():
            if INPUT not in node.meta:  # the ids and the mask are the caller's
                added[node] = x.of if isinstance(x, (Table, Weight, State)) else ""
        for node, layer in added.items() if held else ():
            drawing.of[node] = held.get(layer, next(iter(held.values())))
