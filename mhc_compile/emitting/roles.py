"""Find all that changes in the user's source when its streams are n streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import libcst as cst
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.beginning import begin
from mhc_compile.emitting.edits import Edit, Edits
from mhc_compile.emitting.events import Call, Event
from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.judge import Judge, Judged
from mhc_compile.emitting.places import Key, Nodes, Place, Route, places, refuse, routes
from mhc_compile.emitting.syntax import all_nodes, around, targets, within
from mhc_compile.emitting.traced import Traced
from mhc_compile.passes.base import is_tensor, op_name, same_shape, shape
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.perstream import POINTWISE, has_wide_form
from mhc_compile.passes.residual_sites import SiteSearch
from mhc_compile.passes.results import ResidualStream, Site

LAID_OUT_ANEW = {"view", "reshape", "transpose", "permute", "flatten", "unflatten", "swapaxes", "movedim"}
WIDE = ("read", "carry", "reduce", "first", "state")
"""Kinds of edits that take an expression for n streams."""
BEGINS = ("expand", "expand_before")


def find_edits(traced: Traced, streams: Sequence[ResidualStream]) -> Edits:
    """Return all edits for the streams of a traced model. Raises MHC701 to 706 for what cannot be rewritten."""
    made: dict[Key, list[Event]] = {}
    for stream in streams:
        for site in stream.sites:
            origin = traced.origin(site.add)
            if origin is None or origin not in traced.maker:
                named = f"{stream.owner}.{site.name}".strip(".")
                raise refuse("MHC701", f"the add of {named} lies in code whose source cannot be read")
            made.setdefault((stream.owner, site.name), []).append(traced.maker[origin])
    every_route = routes(traced.model, made)
    edits = Edits(places=places(every_route))
    entries = {origin for s in streams if (origin := traced.origin(s.entry)) is not None}
    for stream in streams:
        _add_stream(traced, stream, every_route, edits, entries)
    _refuse_two_meanings(traced, edits)
    for function in list(edits.of):
        _reduce_unevaluated(traced, function, edits)
    return edits


def _add_stream(
    traced: Traced,
    stream: ResidualStream,
    every_route: dict[Key, list[Route]],
    edits: Edits,
    entries: set[Node],
) -> None:
    """Make the edits for one stream, which may begin earlier: equal streams stay equal until the first site."""
    before = {f: {node: [*records] for node, records in of.items()} for f, of in edits.of.items()}
    judge = Judge(traced, stream, every_route)
    try:
        entries.add(judge.entry)
        return _StreamEdits(judge, edits).run(entries)
    except MHCError as error:
        earlier = _earlier(traced, stream) if error.code == "MHC703" else None
        if earlier is None:
            raise
    edits.of = before
    return _add_stream(traced, earlier, every_route, edits, entries)


def _earlier(traced: Traced, stream: ResidualStream) -> ResidualStream | None:
    """Return the stream with the value before its first one as its first, if it is carried on without a layer."""
    search = SiteSearch(Dataflow(traced.graph, is_owned), [])
    above = search.up(stream.entry)
    if above is None or shape(above) != shape(stream.entry) or above.op == "placeholder":
        return None
    flow, first = search.flow, stream.sites[0]
    region = flow.members(flow.between(above, stream.entry) & ~flow.bit(above))
    first = replace(first, previous=above, chain=(*region, *first.chain))
    return replace(stream, entry=above, sites=(first, *stream.sites[1:]))


def _refuse_two_meanings(traced: Traced, edits: Edits) -> None:
    """Raise MHC702 for an expression that is a stream in one evaluation and something else in another."""
    for event in traced.events:
        kinds = [r.edit.kind for r in edits.recorded(event.call, event.node)]
        if event.what != "result" and event.order not in edits.evaluated and any(k in WIDE for k in kinds):
            raise refuse("MHC702", "one expression is the stream and something else", event.call, event.node)


def _reduce_unevaluated(traced: Traced, function: Function, edits: Edits) -> None:
    """Record `reduce` for what code that did not run would put away: hidden states that a caller may ask for."""
    events = [e for e in traced.events if e.call.function is function and isinstance(e.node, cst.Name) and not e.what]
    streams = {e.node: e.order in edits.evaluated for e in events}
    names = {n.value for n, is_stream in streams.items() if is_stream and isinstance(n, cst.Name)}
    ordered, begun = [], not any(r.edit.kind in BEGINS for rs in edits.of[function].values() for r in rs)
    for node in all_nodes(function.tree):
        begun |= any(r.edit.kind in BEGINS for r in edits.of[function].get(node, ()))
        if isinstance(node, cst.Name) and node.value in names:
            ordered.append((node, begun))
    for at, (node, begun) in enumerate(ordered):
        if node in streams or not isinstance(function.parents[node], cst.Element) or not events:
            continue
        same = [n for n, _ in ordered if n in streams and n.value == node.value]
        earlier = [n for n, _ in ordered[:at]]
        before = next((streams[n] for n in reversed(same) if n in earlier), begun)
        after = next((streams[n] for n in same if n not in earlier), True)
        if before and after and not any(isinstance(n, cst.AssignTarget) for n in around(function.parents, node)):
            edits.add(events[0].call, node, Edit("reduce"))


class _StreamEdits:
    """The edits for one stream."""

    def __init__(self, judge: Judge, edits: Edits) -> None:
        self.judge, self.edits, self.traced = judge, edits, judge.traced
        self.stream, self.routes = judge.stream, judge.routes
        self.readers: dict[str, Event] = {}
        """By site the evaluation that its branch reads."""
        self.named: dict[str, list[tuple[int, cst.CSTNode]]] = {}
        """By site which evaluations name it, where it lives."""

    def run(self, entries: set[Node]) -> None:
        """Record them all."""
        judged = self.judge.judge()
        self._pass_sites()
        beginning = begin(self.judge, judged, self.edits, entries)
        for event, _, role, site in judged:
            if role == "read" and site is not None:
                self.readers.setdefault(site.name, event)
        names = set(beginning.names)
        for one in judged:
            event = one.event
            if event.value is self.judge.entry:
                if event.order <= beginning.order:
                    continue
                expanded = any(r.edit.kind == "expand" for r in self.edits.recorded(event.call, event.node))
                if event.call is beginning.call and isinstance(event.node, cst.Name) and not expanded:
                    if event.node.value not in names:
                        continue
                    names.update(targets(one.reader.node) if one.reader.kind == "assign" else ())
            self._edit(one)
        self._refuse_missing()
        self._number_rounds()

    def _pass_sites(self) -> None:
        """Record what passes sites on to the functions that add."""
        for site in self.stream.sites:
            route = self.routes[site.name]
            for (inner, _), (call, node) in pairwise(route.steps):
                nodes = route.argument(inner)
                assert nodes is not None
                known = self.edits.arguments.setdefault(inner.function, [])
                known += [nodes] if nodes not in known else []
                where = self._site(call, site, node)
                self.edits.add(call, node, Edit("pass_site", *where, keyword=(inner.function, nodes)))
            if len(route.steps) > 1:
                self.named.setdefault(site.name, []).append((route.steps[-2][0].events[0].order, route.node))

    def _name(self, site: Site, event: Event) -> None:
        """Note that what becomes of an expression names the site, before its operands are evaluated."""
        if event.call is not self.routes[site.name].home:
            return
        events = event.call.events
        at = events.index(event)
        while at and within(events[at - 1].node, event.node):
            at -= 1
        self.named.setdefault(site.name, []).append((events[at].order, event.node))

    def _named(self, site: Site) -> str:
        return f"{self.stream.owner}.{site.name}".strip(".")

    def _edit(self, judged: Judged) -> None:
        event, reader, role, site = judged
        self.edits.evaluated.add(event.order)
        call, node = event.call, event.node
        match role:
            case "chain":
                self._chain(judged)
            case "read":
                assert site is not None
                self.edits.add(call, node, Edit("read", *self._site(call, site, node)))
                self._name(site, event)
            case "carry":
                self._carry(judged)
            case "first":
                self.edits.add(call, node, Edit("first"))
            case "keep" | "reduce":
                self.edits.add(call, node, self._after_add(Edit(role), event))
            case _:
                raise refuse("MHC704", f"what reads the stream in {reader} was not followed", call, node)

    def _after_add(self, edit: Edit, event: Event) -> Edit:
        """Return the edit of an expression with the site whose sum it is, if it is one and can be named."""
        assert event.value is not None
        kind, site = self.judge.kinds[event.value]
        if site is None or kind != "add":
            return edit
        place, module, argument = self._site(event.call, site, event.node, required=False)
        return replace(edit, place=place, site_module=module, argument=argument)

    def _site(
        self, call: Call, site: Site, node: cst.CSTNode, *, required: bool = True
    ) -> tuple[Place | None, str, Nodes | None]:
        """Return where the site lives and the path of the module whose code names it; or for what it is an argument.

        Where the code cannot name it: raises MHC705 if it is `required`.
        """
        place, route = self.edits.places[self.stream.owner, site.name], self.routes[site.name]
        if (argument := route.argument(call)) is not None:
            return None, "", argument
        prefix = f"{call.module}." if call.module else ""
        below = place.module.startswith(prefix) and not any(p.isdigit() for p in place.module[len(prefix) :].split("."))
        if call is not route.home and (place.count > 1 or not (place.module == call.module or below)):
            if not required:
                return None, "", None
            reads, lives = call.module or "the root", place.module or "the root"
            raise refuse("MHC705", f"{reads} reads for a site of {lives}", call, node)
        return place, call.module, None

    def _chain(self, judged: Judged) -> None:
        """Keep an operation between two sites where one call computes all streams; else apply it to each."""
        event, reader, _, site = judged
        assert site is not None
        members = {site.previous, *site.chain}
        whole = True
        for origin in reader.computed(self.traced.captured):
            for node in self.traced.analysed.get(origin, ()):
                if node not in members:
                    continue
                outside = [a for a in node.all_input_nodes if a not in members and is_tensor(a) and len(shape(a)) >= 2]
                whole &= has_wide_form(node, members, len(shape(site.add))) and op_name(node) not in LAID_OUT_ANEW
                whole &= op_name(node) not in POINTWISE or not outside
        self.edits.add(event.call, event.node, self._after_add(Edit("keep"), event))
        if not whole:
            self.edits.add(event.call, reader.node, Edit("each", other=event.node))

    def _carry(self, judged: Judged) -> None:
        """Write a site's add, of which `judged` is the stream's operand."""
        event, reader, _, site = judged
        assert site is not None
        call, node, add = event.call, event.node, reader.node
        if any(not same_shape(b, site.add) for b in site.branches):
            raise refuse("MHC706", f"the branch of {self._named(site)} is broadcast", call, add)
        where, made = self._site(call, site, node), self.routes[site.name].made
        self.edits.add(call, node, Edit("carry", other=add))
        self._name(site, made)
        if self.judge.trees[site.name]:
            if not (isinstance(node, cst.Name) and made.call is call and isinstance(made.node, cst.BinaryOperation)):
                raise refuse("MHC706", f"the adds of {self._named(site)} are spread over statements", call, add)
            self.edits.add(call, add, Edit("inner", *where))
            self.edits.add(call, made.node, Edit("tree", *where, other=node))
            return
        read_at = next((v for v in (site.previous, *site.chain) if v in site.reads), site.carry)
        mixes_carry = self.traced.origin(read_at) is self.traced.origin(site.carry)
        if not mixes_carry:
            self.edits.add(call, self._state(site, call, read_at, add), Edit("state"))
        self.edits.add(call, add, Edit("add", *where, mixes_carry=mixes_carry))

    def _state(self, site: Site, call: Call, read_at: Node, add: cst.CSTNode) -> cst.CSTNode:
        """Return the expression of `call` that has the streams which the site's branch reads."""
        reading = self.readers.get(site.name)
        if reading is not None and reading.call is call:
            return reading.node
        made, value = self.routes[site.name].made, self.traced.origin(read_at)
        having = [e for e in call.events if e.value is value and e.order < made.order and not e.what]
        if not having:
            detail = f"{self._named(site)} adds to another value than its branch reads"
            raise refuse("MHC706", detail, call, add)
        return having[-1].node

    def _refuse_missing(self) -> None:
        """Raise MHC704 for a site whose add was not met."""
        for site in self.stream.sites:
            call, node = self.routes[site.name].steps[0]
            if not any(r.edit.kind in ("add", "tree") for r in self.edits.recorded(call, node)):
                raise refuse("MHC704", f"the stream was not followed to {self._named(site)}", call, node)

    def _number_rounds(self) -> None:
        """Find how each round of a loop gets its site: from the expression that names it first, or by its number."""
        looped = [s for s in self.stream.sites if self.edits.places[self.stream.owner, s.name].count > 1]
        rounds = Counter((self.routes[s.name].nodes, node) for s in looped for _, node in self.named[s.name])
        for site in looped:
            route, place = self.routes[site.name], self.edits.places[self.stream.owner, site.name]
            alone = [node for _, node in self.named[site.name] if rounds[route.nodes, node] == 1]
            self.edits.fixed.update({(route.nodes, node): place.row for node in alone})
            _, first = min((n for n in self.named[site.name] if n[1] not in alone), key=lambda named: named[0])
            if self.edits.first.setdefault(route.nodes, first) is not first:
                raise refuse("MHC702", f"{self._named(site)} is read in another way than others", route.home, first)
