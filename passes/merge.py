"""Merge values that are computed twice, which hand-written hyper-connections do: for the read, then for the write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mhc_compile.passes.base import gradient_modes, is_tensor, op_name
from mhc_compile.passes.dataflow import Dataflow, storage_root
from mhc_compile.passes.hyperconnections import is_pure
from mhc_compile.passes.ownership import is_owned


def merge_equal(gm: GraphModule) -> None:
    """Replace a value by an equal one before it: the same operation of the same operands, none written in place."""
    flow = Dataflow(gm.graph, is_owned)
    gradients = gradient_modes(gm.graph)
    autocast: list[Any] = []
    seen: dict[Any, Node] = {}
    for node in list(gm.graph.nodes):
        if op_name(node) == "_enter_autocast":
            autocast.append(node.args)
        elif op_name(node) == "_exit_autocast":
            autocast.pop()
        if not is_pure(node) or not all(is_tensor(n) or n.op == "get_attr" for n in node.all_input_nodes):
            continue
        if any(storage_root(n) in flow.writes for n in (node, *node.all_input_nodes)):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs), gradients[node], _frozen(autocast))
        try:
            known = seen.setdefault(key, node)
        except TypeError:  # an argument without a hash
            continue
        if known is not node:
            node.replace_all_uses_with(known)
            gm.graph.erase_node(node)


def _frozen(value: Any) -> Any:
    """Return arguments as something with a hash, in which 1, 1.0 and True differ."""
    match value:
        case list() | tuple():
            return (type(value).__name__, *(_frozen(v) for v in value))
        case dict():
            return tuple((k, _frozen(v)) for k, v in value.items())
        case slice():
            return ("slice", _frozen((value.start, value.stop, value.step)))
        case Node() | Callable() | torch.dtype() | torch.device():
            return value
    return (type(value), value)
