"""Judge what an expression is whose value is the stream: read by a site, carried, changed, or read otherwise."""

from __future__ import annotations

from typing import NamedTuple

import libcst as cst
from torch.fx import Node

from mhc_compile.emitting.events import Call, Event
from mhc_compile.emitting.places import Key, Route, method_name, refuse
from mhc_compile.emitting.traced import Reader, Traced
from mhc_compile.passes.results import ResidualStream, Site


class Judged(NamedTuple):
    """An evaluation whose value is the stream: its reader, its role and the site that has to do with it.

    Roles are kinds of edits (`read`, `carry`, `reduce`, `first`, `keep`), `chain` where the model changes its stream
    between two sites, and `unknown`.
    """

    event: Event
    reader: Reader
    role: str
    site: Site | None = None


class Judge:
    """Knows one stream in terms of the capture."""

    def __init__(self, traced: Traced, stream: ResidualStream, every_route: dict[Key, list[Route]]) -> None:
        self.traced, self.stream = traced, stream
        entry = traced.origin(stream.entry)
        if entry is None:
            raise refuse("MHC701", f"the stream begins with {stream.entry.name}, which no expression makes")
        self.entry = entry
        self.kinds: dict[Node, tuple[str, Site | None]] = {entry: ("entry", None)}
        """What each captured node is: entry, chain, inner or add, and of which site."""
        self.trees: dict[str, list[Node]] = {}
        """By site the inner adds of its tree along its carry."""
        self.reads: dict[tuple[Node, Node], Site] = {}
        """The site for which a node reads a value of the stream."""
        self.branches: dict[tuple[Node, Node], Site] = {}
        """The site whose add has a value of the stream as its branch."""
        self.routes: dict[str, Route] = {}
        for site in stream.sites:
            self._enter(site)
        for site in stream.sites:
            add = self._origin(site.add)
            self.kinds[add] = ("add", site)
            made = traced.maker[add]
            self.routes[site.name] = next(r for r in every_route[stream.owner, site.name] if r.made is made)
            for branch in site.branches:
                if (origin := traced.origin(branch)) in self.kinds and origin is not None:
                    self.branches[add, origin] = site
        self.top = self._top()
        self.holders = self._holders()

    def _enter(self, site: Site) -> None:
        origin = self.traced.origin
        for node in site.chain:
            if (captured := origin(node)) is not None:
                self.kinds.setdefault(captured, ("chain", site))
        here, path = site.carry, []
        while (above := next((a for a in site.inner_adds if here in a.args and a not in path), None)) is not None:
            path.append(above)
            here = above
        self.trees[site.name] = [self._origin(a) for a in path]
        self.kinds |= dict.fromkeys(self.trees[site.name], ("inner", site))
        for value, readers in site.reads.items():
            for reader in readers:
                if (a := origin(value)) is not None and (b := origin(reader)) is not None:
                    self.reads.setdefault((a, b), site)

    def _origin(self, node: Node) -> Node:
        origin = self.traced.origin(node)
        if origin is None:
            raise refuse("MHC701", f"no expression makes {node.name}")
        return origin

    def _top(self) -> Call:
        """Return the innermost call of a method that holds the entry, all adds and all readers of the exit."""
        origin, maker = self.traced.origin, self.traced.maker
        ends = [route.home for route in self.routes.values()]
        outside = [self.entry, *(o for user in self.stream.exit.users if (o := origin(user)) is not None)]
        ends += [maker[node].call for node in outside if node in maker]
        shared = list(ends[0].callers)
        for call in ends[1:]:
            callers = set(call.callers)
            shared = [c for c in shared if c in callers]
        model = self.traced.model
        methods = [c for c in shared if method_name(model.get_submodule(c.module), c.function) is not None]
        if not methods:
            raise refuse("MHC701", "no one method holds the whole stream")
        return methods[0]

    def _holders(self) -> set[Call]:
        """Return the calls in whose code values are the stream."""
        holders = {self.top}
        for route in self.routes.values():
            callers = list(route.made.call.callers)
            if self.top in callers:
                holders.update(callers[: callers.index(self.top)])
        for node, (kind, _) in self.kinds.items():
            made = self.traced.maker.get(node)
            # A method that another of the module calls may change the stream, too.
            if kind == "chain" and made is not None:
                call = made.call
                if any(call.caller is h and call.module == h.module for h in holders):
                    holders.add(call)
        return holders

    def judge(self) -> list[Judged]:
        """Return all evaluations whose value is the stream, in order. Raises MHC702."""
        return [
            self._judged(event, Reader(event))
            for event in self.traced.events
            if event.value in self.kinds and event.call in self.holders and event.what != "result"
        ]

    def _judged(self, event: Event, reader: Reader) -> Judged:
        if reader.kind == "return":
            return Judged(event, reader, "reduce" if event.call is self.top else "keep")
        if reader.kind != "use":
            return Judged(event, reader, "keep")
        if reader.result is None:
            return Judged(event, reader, "unknown")
        return self._operand(event, reader, reader.result) or self._read(event, reader, reader.result)

    def _operand(self, event: Event, reader: Reader, result: Event) -> Judged | None:
        """Judge an operand of a site's add, or what is passed to code that holds sites."""
        assert event.value is not None
        kind, of = self.kinds.get(result.value, ("", None)) if result.value is not None else ("", None)
        made = result.value in reader.computed(self.traced.captured)
        made = made and result.value is not None and self.traced.maker[result.value].call is event.call
        if kind in ("add", "inner") and made and result.value is not None:
            if self.kinds[event.value][0] == "inner":
                return Judged(event, reader, "keep")
            branch = self.branches.get((result.value, event.value))
            return Judged(event, reader, "carry" if branch is None else "read", branch or of)
        for call in self.holders:
            if call.caller is event.call and call.expression() is reader.node:
                ended = (e for e in event.call.events[call.ended :] if e.node is reader.node)
                if next(ended, None) is result:
                    return Judged(event, reader, "keep")
        return None

    def _read(self, event: Event, reader: Reader, result: Event) -> Judged:
        """Judge a value by the nodes that its reader made."""
        assert event.value is not None
        computed = reader.computed(self.traced.captured)
        reading = self.traced.users(event.value) & computed
        if reader.attribute and not reading:
            return Judged(event, reader, "first" if result.value is None else "keep")
        kind, of = self.kinds.get(result.value, ("", None)) if result.value is not None else ("", None)
        if kind == "chain":
            return Judged(event, reader, "chain", of)
        if any(self.kinds.get(node, ("", None))[0] == "chain" for node in computed):
            return Judged(event, reader, "unknown")
        sites = {s.name: s for user in reading if (s := self.reads.get((event.value, user))) is not None}
        if len(sites) > 1:
            raise refuse("MHC702", f"one expression is read by the sites {', '.join(sites)}", event.call, event.node)
        if sites:
            return Judged(event, reader, "read", next(iter(sites.values())))
        kept = not reading and (isinstance(reader.node, cst.Subscript) or self._taken_out(event, result))
        return Judged(event, reader, "keep" if kept else "reduce")

    def _taken_out(self, event: Event, result: Event) -> bool:
        """Return whether a value that is put away is taken out of where it lies later on: the stream still."""
        return any(
            e.value is event.value and e.order > event.order and isinstance(e.node, (cst.Subscript, cst.Call))
            for e in self.traced.events
            if e.call in self.holders and e is not result
        )
