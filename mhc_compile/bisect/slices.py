"""The part of a graph that computes one value from values that both forms of the graph agree on, as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from mhc_compile.bisect.places import Source
from mhc_compile.passes.graphs import reachable

_RELEASED = re.compile(r";  (?:\w+ = )+None[^\n]*")
_COMMENT = re.compile(r"\n\s*#[^\n]*")


def nodes_of(gm: GraphModule, source: Source) -> list[Node]:
    """Return the nodes that hold a value: the node itself, or those that take the item out of its tuple."""
    node = next(n for n in gm.graph.nodes if n.name == source.node)
    if source.item is None:
        return [node]
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == source.item]


def names_of(gm: GraphModule, sources: Iterable[Source]) -> list[str]:
    """Return the names of the nodes that hold these values."""
    there = {n.name for n in gm.graph.nodes}
    return [n.name for s in sources if s.node in there for n in nodes_of(gm, s)]


def slice_of(gm: GraphModule, target: Source | None, stops: Mapping[str, str]) -> GraphModule | None:
    """Return what computes `target` (or the outputs, for None) from the nodes named in `stops` and the inputs.

    Its placeholders have the names that `stops` give to those nodes. None where it calls a body or reads a constant of
    the graph's own, which code alone does not hold.
    """
    ends = gm.graph.output_node().all_input_nodes if target is None else nodes_of(gm, Source(target.node))
    needed = reachable(ends, lambda n: n.all_input_nodes if n in ends or n.name not in stops else ())
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in sorted(needed):
        if node.op == "placeholder" or (node.name in stops and node not in ends):
            copies[node] = graph.placeholder(stops.get(node.name, node.name))
            copies[node].meta = dict(node.meta)
    for node in sorted(needed):
        if node in copies:
            continue
        if node.op in ("get_attr", "call_module"):
            return None
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    out: Any = [copies[n] for n in ends]
    if target is not None:
        out = copies[ends[0]]
        if target.item is not None:
            out = graph.call_function(operator.getitem, (out, target.item))
    graph.output(out)
    return GraphModule(gm, graph)


def code_of(gm: GraphModule, name: str) -> tuple[list[str], list[str]]:
    """Return a graph as a function of this name, and the imports it needs besides torch, as lines."""
    python = gm.graph.python_code("self")
    text = _COMMENT.sub("", _RELEASED.sub("", python.src)).strip()
    text = re.sub(r"def forward\(self(?:, )?", f"def {name}(", text, count=1)
    imports = [ln for ln in _format_import_block(python.globals, sys_importer).splitlines() if ln != "import torch"]
    bound = [re.split(r" import | as |=", ln)[-1 if "=" not in ln else 0].strip() for ln in imports]
    used = [ln for ln, word in zip(imports, bound, strict=True) if re.search(rf"\b{re.escape(word)}\b", text)]
    return [line for line in text.splitlines() if line.strip()], used
