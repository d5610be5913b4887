"""Join what is recorded of an expression in several calls into one change of its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import libcst as cst

from mhc_compile.emitting.edits import Edit, Recorded
from mhc_compile.emitting.places import refuse

ADDS = ("add", "inner", "tree", "each", "leave_each")
BESIDE = ("pass_site", "state", "expand", "expand_before")
"""Kinds of edits that go with any other one."""
Changes = dict[cst.CSTNode, list[Edit]]


def changes(recorded: Mapping[cst.CSTNode, list[Recorded]]) -> Changes:
    """Return the edits of one function by expression, without those that change nothing.

    Raises MHC702 where one expression would become one thing in one call and another in the next.
    """
    joined: Changes = {}
    for node, records in recorded.items():
        edits = [edit for edit in _joined(records, node) if edit.kind != "keep"]
        if edits:
            joined[node] = edits
    for edits in joined.values():
        for k, edit in enumerate(edits):
            if edit.kind == "each" and edit.other is not None:
                edits[k] = _each_or_leave(joined, edit, edit.other)
    return joined if any(e.kind != "carry" for edits in joined.values() for e in edits) else {}


def _joined(records: Sequence[Recorded], node: cst.CSTNode) -> list[Edit]:
    """Return the edits of one expression, each once."""
    once: dict[tuple[object, ...], Edit] = {}
    for record in records:
        once.setdefault(_meaning(record.edit), record.edit)
    edits = list(once.values())
    ends = [e for e in edits if e.kind in ("keep", "reduce")]
    if len({e.kind for e in ends}) == 2:
        if len({_meaning(e)[1:] for e in ends}) > 1 or (ends[0].place is None and ends[0].argument is None):
            raise refuse("MHC702", "one expression is read in the stream and outside", records[0].call, node)
        edits = [e for e in edits if e not in ends] + [replace(ends[0], kind="leave")]
    else:
        edits = [e for e in edits if e not in ends[1:]]
    keywords = {e.keyword for e in edits if e.keyword is not None}
    for group in (
        [e for e in edits if e.kind in ADDS],
        [e for e in edits if e.kind not in (*ADDS, *BESIDE)],
        *([e for e in edits if e.keyword == keyword] for keyword in keywords),
    ):
        if len(group) > 1:
            kinds = " and ".join(sorted({e.kind for e in group}))
            raise refuse("MHC702", f"one expression has two meanings: {kinds}", records[0].call, node)
    return edits


def _meaning(edit: Edit) -> tuple[object, ...]:
    """Return what tells edits apart: the kind, then what they name from the module whose code it is."""
    place = edit.place
    relative = place.module.removeprefix(edit.site_module) if place is not None else ""
    nodes = place.nodes if place is not None else None
    return edit.kind, relative, nodes, edit.argument, edit.keyword, edit.other, edit.mixes_carry


def _each_or_leave(joined: Changes, edit: Edit, operand: cst.CSTNode) -> Edit:
    """Return an edit that applies an operation to each stream, and to the end of the stream where it is left."""
    left = next((e for e in joined.get(operand, ()) if e.kind == "leave"), None)
    if left is None:
        return edit
    joined[operand] = [e for e in joined[operand] if e.kind != "leave"]
    return replace(left, kind="leave_each", other=operand)
