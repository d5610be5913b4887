"""Decide which module holds each site's parameters, and how the code that adds gets to them.

A site lives in the module whose method evaluates its add, or, where that method runs several times for one module (a
helper that adds, a layer that is called again), in the module of the caller, which then passes it on as an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType

import libcst as cst
from torch import nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.events import Call, Event
from mhc_compile.emitting.instrument import Function, unwrapped

Key = tuple[str, str]
"""The owner and the name of a site."""
Nodes = tuple[cst.CSTNode, ...]


def refuse(code: str, detail: str, call: Call | None = None, node: cst.CSTNode | None = None) -> MHCError:
    """Return the coded error with the line of `node`, or of the beginning of the call's function."""
    if call is None:
        return MHCError(code, detail)
    line = call.function.line(node or call.function.tree)
    return MHCError(code, detail, module=call.module or "(root)", source=line)


@dataclass(frozen=True)
class Place:
    """Where a site's parameters live."""

    module: str
    """Path of the module that holds them."""
    nodes: Nodes
    """The add, then the calls of what adds; the last is in the module's code."""
    row: int = 0
    """In a loop, which of its evaluations."""
    count: int = 1
    """How often that is evaluated in one call: more than once in a loop."""


@dataclass
class Route:
    """The calls from the one in whose code a site is named by its attribute, to the one that adds."""

    made: Event
    """The evaluation of the add."""
    steps: list[tuple[Call, cst.CSTNode]] = field(default_factory=list)
    """Every call, innermost first, with the expression: the add, then the calls of what adds."""

    @property
    def home(self) -> Call:
        """The call whose module holds the site."""
        return self.steps[-1][0]

    @property
    def node(self) -> cst.CSTNode:
        """The expression of `home`."""
        return self.steps[-1][1]

    @property
    def nodes(self) -> Nodes:
        """All expressions, from the add to that of `home`."""
        return tuple(node for _, node in self.steps)

    def argument(self, call: Call) -> Nodes | None:
        """Return the expressions up to that of `call`, if it gets the site as an argument."""
        level = next((k for k, (c, _) in enumerate(self.steps[:-1]) if c is call), None)
        return None if level is None else self.nodes[: level + 1]


def routes(model: nn.Module, made: Mapping[Key, list[Event]]) -> dict[Key, list[Route]]:
    """Return the routes to every site, one for each call of its owner. Raises MHC701 and MHC702."""
    out = {key: [_extended(model, Route(e, [(e.call, e.node)])) for e in events] for key, events in made.items()}
    while clashes := _clashes(out):
        for route in clashes:
            _up(route)
            _extended(model, route)
    return out


def _clashes(routes: Mapping[Key, list[Route]]) -> list[Route]:
    """Return the routes of different sites that would be one attribute, though no one loop evaluates them."""
    users: dict[tuple[str, Nodes], list[tuple[Key, Route]]] = {}
    for key, of_site in routes.items():
        for route in of_site:
            users.setdefault((route.home.module, route.nodes), []).append((key, route))
    clashing = []
    for shared in users.values():
        for key, route in shared:
            if any(other != key and r.home is not route.home for other, r in shared):
                clashing.append(route)
    return clashing


def _extended(model: nn.Module, route: Route) -> Route:
    while method_name(module := model.get_submodule(route.home.module), route.home.function) is None:
        if any(route.home.function.code in _codes(vars(cls).values()) for cls in type(module).__mro__):
            raise refuse("MHC701", "it is called by `super()`, and a method overrides it", route.home)
        _up(route)
    return route


def _up(route: Route) -> None:
    call = route.home
    expression = call.expression()
    if call.caller is None or not isinstance(expression, cst.Call):
        raise refuse("MHC702", "what adds is called several times, and no method passes its site on", call, route.node)
    caller = call.caller
    # A wrapper hands all its keywords on by itself.
    while _hands_keywords_on(caller, expression) and caller.caller is not None:
        outer = caller.expression()
        if not isinstance(outer, cst.Call):
            break
        caller, expression = caller.caller, outer
    route.steps.append((caller, expression))


def _hands_keywords_on(call: Call, expression: cst.Call) -> bool:
    own = call.function.tree.params.star_kwarg
    if own is None or not set(call.function.code.co_freevars) - {"__class__"}:
        return False
    return any(
        a.star == "**" and isinstance(a.value, cst.Name) and a.value.value == own.name.value for a in expression.args
    )


def places(routes: Mapping[Key, list[Route]]) -> dict[Key, Place]:
    """Return where every site lives."""
    first = {key: of_site[0] for key, of_site in routes.items()}
    rounds = Counter((route.home, route.nodes) for route in first.values())
    rows: Counter[tuple[Call, Nodes]] = Counter()
    out: dict[Key, Place] = {}
    for key, route in first.items():
        where = (route.home, route.nodes)
        out[key] = Place(route.home.module, route.nodes, rows[where], rounds[where])
        rows[where] += 1
    return out


def method_name(module: nn.Module, function: Function) -> str | None:
    """Return by which name the class of `module` has `function`, under whatever decorators; None if it has not."""
    seen: set[str] = set()
    for cls in type(module).__mro__:
        for name, attribute in vars(cls).items():
            # An overridden method, which `super()` called, cannot be written into a subclass.
            if name not in seen and function.code in _codes([attribute]):
                return name
        seen.update(vars(cls))
    return None


def _codes(attributes: Iterable[object]) -> set[CodeType]:
    """Return the code of functions and of those that they wrap."""
    return {function.__code__ for function in unwrapped(attributes)}
