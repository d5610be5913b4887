"""Describe how the expressions of the user's source change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import libcst as cst

from mhc_compile.emitting.events import Call
from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.places import Key, Nodes, Place

Kind = Literal[
    "keep",  # no change
    "expand",  # `expand(e, STREAMS)`: the stream begins
    "expand_before",  # a statement before the one that reads the name `other`
    "read",  # `site.aggregate(e)`
    "carry",  # the operand of the add `other` that is the stream
    "add",  # `site.distribute(carry, rest)`
    "inner",  # an add of a tree, whose branch is kept alone
    "tree",  # `site.distribute(other, rest)` around the last add of a tree
    "reduce",  # `reduce(e)`
    "leave",  # `leave(site, e)`: `reduce(e)` after the last site of the stream, `e` after the others
    "first",  # `first_stream(e)`: what only looks at shape, dtype or device
    "each",  # `each_stream(lambda x: ..., e)` of the operand `other`
    "leave_each",  # `leave_each(site, lambda x: ..., e)`: both
    "state",  # `(name := e)`: what the branch reads, where the add carries something else
    "pass_site",  # `f(..., mhc=site)`: what is called adds
]


@dataclass(frozen=True)
class Edit:
    """Describes how one expression changes."""

    kind: Kind
    place: Place | None = None
    site_module: str = ""
    """Path of the module whose source says `self`, where the edit names a site."""
    argument: Nodes | None = None
    """In place of `place` the expressions for which the function gets the site as an argument."""
    keyword: tuple[Function, Nodes] | None = None
    """The function that is passed a site, and the expressions for which."""
    other: cst.CSTNode | None = None
    mixes_carry: bool = True
    """Whether the coefficients are computed from the streams that are carried."""


@dataclass(frozen=True)
class Recorded:
    """An edit with the call in which it was found necessary."""

    edit: Edit
    call: Call


@dataclass
class Edits:
    """All that changes, by function and expression, and how code names sites."""

    of: dict[Function, dict[cst.CSTNode, list[Recorded]]] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    arguments: dict[Function, list[Nodes]] = field(default_factory=dict)
    """By function the expressions for which it gets sites as arguments."""
    first: dict[Nodes, cst.CSTNode] = field(default_factory=dict)
    """By nodes of a place in a loop the expression that names its site first in each round."""
    fixed: dict[tuple[Nodes, cst.CSTNode], int] = field(default_factory=dict)
    """The round of a loop for each expression that names the site of that round alone, by the place's nodes."""
    evaluated: set[int] = field(default_factory=set)
    """The evaluations at which expressions are a stream."""

    def add(self, call: Call, node: cst.CSTNode, edit: Edit) -> None:
        """Record `edit` of `node`; the same in another call is one."""
        recorded = self.of.setdefault(call.function, {}).setdefault(node, [])
        if not any(r.edit == edit and r.call.module == call.module for r in recorded):
            recorded.append(Recorded(edit, call))

    def recorded(self, call: Call, node: cst.CSTNode) -> list[Recorded]:
        """Return what is recorded of `node` in the code of `call`."""
        return self.of.get(call.function, {}).get(node, [])
