"""The part of a graph that lies inside one module, one line a node."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import names
from mhc_compile.passes.base import module_stack
from mhc_compile.report.lines import Line

MAX_WIDTH = 160


def lines_of(graph: Sequence[Line], layer: str) -> list[str]:
    """The nodes of a snapshot inside the module `layer`, as `name = op(operands)  dtype[shape]`.

    Raises MHC507 where no node lies in `layer`.
    """
    found = [x for x in graph if x.node.op not in ("placeholder", "output")]
    inside = [x for x in found if _inside(x.node, layer)]
    if not inside:
        modules = dict.fromkeys(p for x in found for p in module_stack(x.node) if p)
        raise MHCError("MHC507", f"{layer!r}; modules in the graph: {names(modules)}")
    return [f"{_cut(x.text)}  {x.form}".rstrip() for x in inside]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 4]}...)"


def _inside(node: Node, layer: str) -> bool:
    return any(p == layer or p.startswith(f"{layer}.") for p in module_stack(node))
