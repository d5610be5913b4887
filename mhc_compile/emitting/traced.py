"""A captured model with the expressions of its source, and what reads their values."""

from __future__ import annotations

import libcst as cst
from torch import nn
from torch.fx import Graph, Node

from mhc_compile.emitting.events import Event
from mhc_compile.emitting.syntax import text


class Traced:
    """The events of a capture, and how its nodes and those of the analysed graph belong together."""

    def __init__(self, model: nn.Module, graph: Graph, captured: list[Node], events: list[Event]) -> None:
        self.model, self.graph, self.captured, self.events = model, graph, captured, events
        self.names = {n.name: n for n in captured}
        self.analysed: dict[Node, list[Node]] = {}
        """The nodes of the analysed graph that stand for one that was captured."""
        for node in graph.nodes:
            if (origin := self.origin(node)) is not None:
                self.analysed.setdefault(origin, []).append(node)
        self.maker: dict[Node, Event] = {}
        """The first expression that had each value."""
        for event in events:
            if event.value is not None and event.what != "target":
                self.maker.setdefault(event.value, event)

    def origin(self, node: Node) -> Node | None:
        """Return the captured node for which `node` of the analysed graph stands."""
        return self.names.get(str(node.meta.get("mhc_from", node.name)))

    def users(self, value: Node) -> set[Node]:
        """Return the captured nodes that read a captured one."""
        readers = (user for node in self.analysed.get(value, ()) for user in node.users)
        return {origin for user in readers if (origin := self.origin(user)) is not None}


_PASSED_ON = (
    cst.Element, cst.Tuple, cst.List, cst.DictElement, cst.Dict, cst.StarredElement, cst.StarredDictElement,
)  # fmt: skip


class Reader:
    """What reads the value of an expression: `kind` is assign, return, look (a comparison), statement or use."""

    def __init__(self, event: Event) -> None:
        parents = event.call.function.parents
        node = event.node
        # Of `x += y`, whose own event `x` is.
        above = node if event.what == "target" else parents[node]
        while isinstance(above, _PASSED_ON) or (isinstance(above, cst.IfExp) and node is not above.test):
            node, above = above, parents[above]
        if isinstance(above, cst.Arg):
            above = parents[above]
        self.kind, self.attribute = "use", ""
        if isinstance(above, (cst.Assign, cst.AnnAssign, cst.NamedExpr)):
            self.kind = "assign"
        elif isinstance(above, cst.Return):
            self.kind = "return"
        elif isinstance(above, cst.Attribute):
            self.attribute = above.attr.value
            call = parents[above]
            above = call if isinstance(call, cst.Call) and call.func is above else above
        elif isinstance(above, (cst.Comparison, cst.UnaryOperation)):
            self.kind = "look"
        elif not isinstance(above, (cst.Call, cst.BinaryOperation, cst.Subscript, cst.AugAssign)):
            self.kind = "statement"
        self.node: cst.CSTNode = above
        self.result: Event | None = None
        """The evaluation of the reader that followed."""
        self.before: Event | None = None
        """What was evaluated last before it."""
        if self.kind == "use":
            events = event.call.events
            for k in range(events.index(event) + 1, len(events)):
                if events[k].node is above and events[k].what in ("", "result"):
                    self.result, self.before = events[k], events[k - 1]
                    break

    def computed(self, captured: list[Node]) -> set[Node]:
        """Return the nodes of the graph that the reader's evaluation made, after its operands."""
        if self.result is None or self.before is None:
            return set()
        return set(captured[self.before.at : self.result.at])

    def __str__(self) -> str:
        return text(self.node)
