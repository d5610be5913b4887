"""What the source says around an expression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import libcst as cst

LOOPS = (cst.For, cst.While, cst.CompFor)
Parents = Mapping[cst.CSTNode, cst.CSTNode]


def all_nodes(node: cst.CSTNode) -> list[cst.CSTNode]:
    """Return `node` and all below it, in the order of the source."""
    return [node, *(below for child in node.children for below in all_nodes(child))]


def around(parents: Parents, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yield what holds `node`, innermost first."""
    while node in parents:
        node = parents[node]
        yield node


def within(node: cst.CSTNode | None, tree: cst.CSTNode) -> bool:
    """Return whether `node` is `tree` or a part of it."""
    return node is tree or any(within(node, child) for child in tree.children)


def targets(statement: cst.CSTNode | None) -> list[str]:
    """Return the names to which a statement or an expression assigns its whole value."""
    assigned: list[cst.CSTNode] = []
    if isinstance(statement, cst.Assign):
        assigned = [t.target for t in statement.targets]
    elif isinstance(statement, (cst.AnnAssign, cst.NamedExpr)):
        assigned = [statement.target]
    return [t.value for t in assigned if isinstance(t, cst.Name)]


def assigns(statement: cst.CSTNode, name: str, value: cst.CSTNode) -> bool:
    """Return whether a statement assigns the value of the expression `value` to `name`."""
    return name in targets(statement) and getattr(statement, "value", None) is value


def text(node: cst.CSTNode) -> str:
    """Return the source of `node` on one line, cut off where it is long."""
    return " ".join(cst.Module([]).code_for_node(node).split())[:80]
