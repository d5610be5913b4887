"""Draw the model that a run of passes analysed: streams, memories, and the parameters of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from mhc_compile.passes.base import Mark, module_path, source_line, value
from mhc_compile.passes.lookups import MEMORY
from mhc_compile.passes.marks import State, Table, Weight
from mhc_compile.passes.match_marks import full_name
from mhc_compile.passes.ownership import INPUT
from mhc_compile.passes.results import ResidualStream
from mhc_compile.report.elements import Drawing
from mhc_compile.report.lines import input_name, short_path
from mhc_compile.report.report import Element

if TYPE_CHECKING:
    from mhc_compile.report.watch import Watcher

Sites = dict[tuple[str, str], int]
"""Numbers of sites by owner and name."""


@dataclass(frozen=True)
class StreamView:
    """A residual stream with what the graph shows of it only before `widen`."""

    stream: ResidualStream
    topologies: tuple[str, ...]
    """The topology of every site."""
    branches: tuple[list[Node], ...]
    """The nodes of every site's branches."""


def draw(watcher: Watcher) -> Drawing:
    """Return the drawing of the model that was watched; without elements where no stream was found."""
    if not watcher.streams:
        return watcher.native or Drawing()
    marks = [_mark_of(view.stream, watcher.marks) for view in watcher.streams]
    drawing, numbers = _draw_streams(watcher.streams, marks)
    sites: Sites = {}
    for (k, i), number in numbers.items():
        mark = marks[k]
        if mark is not None:
            sites[mark.owner, watcher.streams[k].stream.sites[i].name] = number
            if mark.node is not None:
                drawing.of.setdefault(mark.node, drawing.entries[watcher.streams[k].stream.entry])
    _add_memories(drawing, watcher, sites)
    counted: set[Node] = set()
    for mark in watcher.marks:
        exits = [i for i, e in enumerate(drawing.elements) if e.kind == "exit" and e.module.startswith(mark.owner)]
        for name, node in mark.parameters.items():
            at = exits[-1] if name.startswith("head.") else sites.get((mark.owner, name.rpartition(".")[0]))
            if at is not None:
                drawing.of[node] = at
                drawing.elements[at].added += 0 if node in counted else value(node).numel()
                counted.add(node)
    return drawing


def _mark_of(stream: ResidualStream, marks: Sequence[Mark]) -> Mark | None:
    """Return the mark of the converted owner around `stream`, None where it stays residual."""
    around = [m for m in marks if not m.owner or f"{stream.owner}.".startswith(f"{m.owner}.")]
    return max(around, key=lambda m: len(m.owner), default=None)


def _draw_streams(
    views: Sequence[StreamView], marks: Sequence[Mark | None]
) -> tuple[Drawing, dict[tuple[int, int], int]]:
    """Return the drawing of residual streams and the numbers of the sites by stream and site index.

    A stream that is called several times is drawn once.
    """
    drawing = Drawing()
    keys = [(view.stream.owner, *(s.name for s in view.stream.sites)) for view in views]
    drawn: dict[tuple[str, ...], list[int]] = {}
    numbers: dict[tuple[int, int], int] = {}
    branches: list[tuple[list[Node], int]] = []
    for k, (view, mark, key) in enumerate(zip(views, marks, keys, strict=True)):
        stream = view.stream
        spec = None if mark is None else mark.spec
        skipped = set() if mark is None else {full_name(mark.owner, name) for name in mark.skipped}
        if key not in drawn:
            sites = [
                (s.name, module_path(s.add), t, None if full_name(stream.owner, s.name) in skipped else spec)
                for s, t in zip(stream.sites, view.topologies, strict=True)
            ]
            drawn[key] = drawing.add_stream(stream.owner, spec, sites, calls=keys.count(key))
        whole, *each, leaves = drawn[key]
        drawing.entries[stream.entry], drawing.exits[stream.exit] = whole, leaves
        for node, number in ((stream.entry, whole), (stream.exit, leaves)):
            drawing.at.setdefault(number, node)
            drawing.elements[number].place = drawing.elements[number].place or _place(node)
        for i, (site, number) in enumerate(zip(stream.sites, each, strict=True)):
            numbers[k, i] = number
            branch = drawing.branch(number)
            drawing.at.setdefault(number, site.add)
            drawing.at.setdefault(branch, site.branches[0])
            drawing.give([*site.chain, *site.inner_adds, site.add], number)
            branches.append((view.branches[i], branch))
    # After all sites: the branch of a site that reads an early value has other sites among what it depends on.
    for nodes, branch in branches:
        drawing.give(nodes, branch)
    drawing.name_branches()
    return drawing, numbers


def _place(node: Node) -> str:
    if node.op == "placeholder":
        return f"as the input {input_name(node)}"
    return f"at {module_path(node) or 'the model itself'}: {short_path(source_line(node) or node.name)}"


def _add_memories(drawing: Drawing, watcher: Watcher, sites: Sites) -> None:
    """Add memories to the sites of their layers, and over-encodings, with their nodes, parameters and inputs."""
    numbers: dict[tuple[str, str], int] = {}
    for node in watcher.nodes:
        if MEMORY not in node.meta:
            continue
        owner, layer, site = node.meta[MEMORY]
        if (owner, layer) not in numbers:
            if layer:
                path = f"{owner}.{layer}".strip(".")
                numbers[owner, layer] = drawing.add(
                    Element("memory", f"memory at {path}", path), drawing.parent[sites[owner, site]], first=True
                )
            else:
                name = f"over-encoding of {owner or 'the model itself'}"
                numbers[owner, layer] = drawing.add(Element("memory", name, owner))
        drawing.of[node] = numbers[owner, layer]
    for mark in watcher.marks:
        of_owner = {layer: number for (owner, layer), number in numbers.items() if owner == mark.owner}
        by_length = sorted(filter(None, of_owner), key=len, reverse=True)
        layers = {
            node: next((x for x in by_length if f".{x}." in name), "")  # `engram.layers.3.key`
            for name, node in mark.parameters.items()
            if name.startswith(("engram.", "over_encoding.", "ultramem."))
        }
        for x, node in mark.inputs.items():
            if INPUT not in node.meta:  # the ids and the mask are the caller's
                layers[node] = x.of if isinstance(x, (Table, Weight, State)) else ""
        for node, layer in layers.items() if of_owner else ():
            drawing.of[node] = of_owner.get(layer, next(iter(of_owner.values())))
