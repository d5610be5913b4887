"""Read a probed capture: the calls that ran and, in each, the value of every expression that was evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import libcst as cst
from torch.fx import GraphModule, Node

from mhc_compile.emitting.instrument import Function, Keys, passed, seen
from mhc_compile.passes.base import module_path


@dataclass(eq=False)
class Call:
    """One call of a probed function."""

    function: Function
    caller: Call | None
    module: str
    """Path of the innermost module that was running."""
    events: list[Event] = field(default_factory=list)
    ended: int = 0
    """The number of events of the caller before the call returned: the next one is the call expression's."""

    @property
    def callers(self) -> Iterator[Call]:
        """Yield this call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.caller

    def expression(self) -> cst.CSTNode | None:
        """Return the expression of the caller whose evaluation this call was."""
        events = self.caller.events[self.ended :] if self.caller is not None else []
        return next((e.node for e in events if isinstance(e.node, (cst.Call, cst.Attribute, cst.Subscript))), None)


@dataclass(eq=False)
class Event:
    """One evaluation of one expression."""

    call: Call
    node: cst.CSTNode
    what: str
    """`target` for the variable of `x += y` before it, `result` for it afterwards, empty for expressions."""
    value: Node | None
    """The graph node of the value; None where it is no tensor."""
    order: int
    """The number of the event in the capture."""
    at: int
    """The number of nodes of the graph before it."""


def read_events(gm: GraphModule, functions: Sequence[Function], keys: Keys) -> list[Event]:
    """Return the events in the markers of `gm`, in order, and erase the markers."""
    events: list[Event] = []
    stack: list[Call] = []
    at = 0
    for node in list(gm.graph.nodes):
        if node.target is seen:
            value, key = node.args
            assert isinstance(value, Node)
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
            _add(events, stack, keys, int(key), value, at)
        elif node.target is passed:
            key, kind = node.args
            if kind == "enter":
                stack.append(Call(functions[int(key)], stack[-1] if stack else None, module_path(node)))
            elif kind == "leave":
                call = stack.pop()
                call.ended = len(call.caller.events) if call.caller is not None else 0
            else:
                _add(events, stack, keys, int(key), None, at)
            gm.graph.erase_node(node)
        else:
            at += 1
    return events


def _add(events: list[Event], stack: list[Call], keys: Keys, key: int, value: Node | None, at: int) -> None:
    function, node, what = keys.places[key]
    call = stack[-1]
    assert call.function is function
    event = Event(call, node, what, value, len(events), at)
    call.events.append(event)
    events.append(event)
