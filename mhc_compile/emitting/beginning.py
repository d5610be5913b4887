"""Find the expression at which a stream begins, and which names hold n streams from there on."""

from __future__ import annotations

from typing import NamedTuple

import libcst as cst
from torch.fx import Node

from mhc_compile.emitting.edits import Edit, Edits
from mhc_compile.emitting.events import Call, Event
from mhc_compile.emitting.judge import Judge, Judged
from mhc_compile.emitting.places import refuse
from mhc_compile.emitting.syntax import LOOPS, around, assigns, targets


class Beginning(NamedTuple):
    """Names the call, the event and the variables at which a stream is expanded."""

    call: Call
    order: int
    """The event after which the first value of the stream is n streams."""
    names: set[str]
    """Names of the call's code that hold it."""


def begin(judge: Judge, judged: list[Judged], edits: Edits, entries: set[Node]) -> Beginning:
    """Record where the stream is expanded. Raises MHC703; `entries` are the first values of all streams."""
    feeding = [
        j.event for j in judged
        if j.event.value is judge.entry
        and (j.role in ("carry", "chain", "read") or (j.role == "keep" and j.reader.kind == "use"))
    ]  # fmt: skip
    if not feeding:
        name = judge.top.function.code.co_qualname
        raise refuse("MHC703", f"{name} does not pass the stream's first value on", judge.top)
    first = next((e for e in feeding if e.call is judge.top), feeding[0])
    if not isinstance(first.node, cst.Name):
        return _at_value(judge, first, edits, entries)
    return _at_assignment(judge, judged, first, edits, entries) or _before(judge, judged, first, edits)


def _at_value(judge: Judge, first: Event, edits: Edits, entries: set[Node]) -> Beginning:
    """Expand what is passed on at once, or where it is made."""
    call, parents = first.call, first.call.function.parents
    made = first
    if any(isinstance(n, LOOPS) for n in around(parents, first.node)):
        made = judge.traced.maker.get(judge.entry, first)
        if made.call is not call or any(isinstance(n, LOOPS) for n in around(parents, made.node)):
            raise refuse("MHC703", "the stream's first value is made in a loop", call, first.node)
    _expand(judge, made, edits, entries)
    return Beginning(call, made.order - (made is first), set(targets(parents.get(made.node))))


def _at_assignment(
    judge: Judge, judged: list[Judged], first: Event, edits: Edits, entries: set[Node]
) -> Beginning | None:
    """Expand what the name is assigned from."""
    assert isinstance(first.node, cst.Name)
    call, name = first.call, first.node.value
    parents = call.function.parents
    outside = list(around(parents, first.node))
    for event, reader, _, _ in reversed(judged):
        if event.call is not call or event.value is not judge.entry or event.order >= first.order:
            continue
        # An assignment under a condition leaves the name as it was where the condition does not hold.
        blocks = [n for n in around(parents, reader.node) if isinstance(n, cst.BaseCompoundStatement)]
        once = call is not judge.top and sum(e.node is event.node for e in judge.traced.events) == 1
        if assigns(reader.node, name, event.node) and (once or all(b in outside for b in blocks)):
            _expand(judge, event, edits, entries)
            return Beginning(call, event.order, {name})
    return None


def _before(judge: Judge, judged: list[Judged], first: Event, edits: Edits) -> Beginning:
    """Expand the name in a statement of its own."""
    assert isinstance(first.node, cst.Name)
    call, parents = first.call, first.call.function.parents
    if call is not judge.top:
        raise refuse("MHC703", "the stream begins in a layer", call, first.node)
    statements = [n for n in around(parents, first.node) if isinstance(n, (*LOOPS, cst.SimpleStatementLine))]
    statement = statements[-1]
    if isinstance(statement, cst.CompFor):
        raise refuse("MHC703", "the stream's first value is read in a comprehension", call, first.node)
    edits.add(call, statement, Edit("expand_before", other=first.node))
    inside = {n for n in parents if statement in around(parents, n)}
    order = min(j.event.order for j in judged if j.event.call is call and j.event.node in inside)
    return Beginning(call, order - 1, {first.node.value})


def _expand(judge: Judge, event: Event, edits: Edits, entries: set[Node]) -> None:
    """Record that the value of an expression is expanded: wherever it is evaluated, a stream must begin."""
    if any(e.node is event.node and e.value not in entries for e in judge.traced.events):
        raise refuse("MHC703", "the stream's first value comes from what runs again later", event.call, event.node)
    edits.add(event.call, event.node, Edit("expand"))
