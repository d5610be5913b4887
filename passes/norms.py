"""Recognise the norm with which a branch begins: `layer_norm`, `rms_norm`, or RMSNorm written out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.kernels.chain import Norm
from mhc_compile.passes.base import is_tensor, op_name, shape, value

_CASTS = ("to", "float", "type_as", "type")
_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


@dataclass(frozen=True)
class BranchNorm:
    """A norm over the last dimension that is all that reads its input."""

    kind: Norm
    eps: float
    weight: Node
    bias: Node | None
    nodes: tuple[Node, ...]
    """In order; the last is the normalised value."""

    @property
    def out(self) -> Node:
        """The normalised value."""
        return self.nodes[-1]


def match_norm(h: Node, besides: Collection[Node] = ()) -> BranchNorm | None:
    """Return the norm of `h` `[..., C]`, if one is its only reader and keeps its dtype; None otherwise.

    Readers `besides` do not count.
    """
    readers = [reader for reader in h.users if reader not in besides]
    norm = None
    if len(readers) == 1 and op_name(readers[0]) in _ARGUMENTS:
        norm = _called(h, readers[0])
    elif readers:
        norm = _written_out(h, readers)
    if norm is None or value(norm.out).dtype != value(h).dtype or shape(norm.out) != shape(h):
        return None
    parameters = [p for p in (norm.weight, norm.bias) if p is not None]
    return norm if all(shape(p) == shape(h)[-1:] for p in parameters) else None


def _called(h: Node, call: Node) -> BranchNorm | None:
    names = _ARGUMENTS[op_name(call)]
    arguments = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    weight, bias = arguments.get("weight"), arguments.get("bias")
    dims = arguments["normalized_shape"]
    over_one = isinstance(dims, (tuple, list)) and len(dims) == 1
    if arguments["input"] is not h or not isinstance(weight, Node) or not over_one:
        return None
    layer = op_name(call) == "layer_norm"
    eps = arguments.get("eps")
    eps = _constant((1e-5 if layer else torch.finfo(value(h).dtype).eps) if eps is None else eps)
    if eps is None:
        return None
    if layer:
        return BranchNorm("layer", eps, weight, bias, (call,)) if isinstance(bias, Node) else None
    return BranchNorm("rms", eps, weight, None, (call,))


def _written_out(h: Node, readers: list[Node]) -> BranchNorm | None:
    """Match `weight * (h * rsqrt(mean(h^2) + eps))`, with casts to float32 and back where they do not matter."""
    nodes: list[Node] = []
    wide = h
    if len(readers) == 1 and op_name(readers[0]) in _CASTS:
        (wide,) = nodes = [readers[0]]
        readers = list(wide.users)
    square = next((u for u in readers if _squares(u, wide)), None)
    mean = _only(square, "mean")
    add = _only(mean, "add")
    root = _only(add, "rsqrt")
    scaled = _only(root, "mul")
    if square is None or mean is None or add is None or root is None or scaled is None:
        return None
    eps = next((number for a in add.args if (number := _constant(a)) is not None), None)
    if eps is None or not _over_the_last(mean) or set(scaled.args) != {wide, root} or set(readers) != {square, scaled}:
        return None
    nodes += [square, mean, add, root, scaled]
    last = scaled
    while (cast := _only(last)) is not None and op_name(cast) in _CASTS:
        nodes.append(cast)
        last = cast
    product = _only(last, "mul")
    if product is None:
        return None
    weight = next((a for a in product.args if a is not last), None)
    if not isinstance(weight, Node) or not is_tensor(weight):
        return None
    nodes.append(product)
    if value(product).dtype != value(h).dtype and (cast := _only(product)) is not None and op_name(cast) in _CASTS:
        nodes.append(cast)
    return BranchNorm("rms", eps, weight, None, tuple(nodes))


def _constant(argument: Any) -> float | None:
    """Return an argument that is one number for this graph; None for any other.

    Dynamo makes attributes variables that differed between two models of a class, an eps among them. Reading the number
    guards it, so that another one is compiled anew: what a norm is must not depend on what else a process compiled.
    """
    if isinstance(argument, Node):
        argument = value(argument)
    return float(argument) if isinstance(argument, float | torch.SymFloat) else None


def _only(node: Node | None, name: str | None = None) -> Node | None:
    """Return the one reader of `node`, if it has one and that is a `name`."""
    if node is None or len(node.users) != 1:
        return None
    (reader,) = node.users
    return reader if name is None or op_name(reader) == name else None


def _squares(node: Node, x: Node) -> bool:
    name = op_name(node)
    if name == "pow":
        return node.args[0] is x and node.args[1] in (2, 2.0)
    return (name == "square" and node.args[0] is x) or (name == "mul" and node.args == (x, x))


def _over_the_last(mean: Node) -> bool:
    arguments: dict[str, Any] = {**dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)), **mean.kwargs}
    dim = arguments.get("dim")
    return (dim in (-1, [-1], (-1,))) and arguments.get("keepdim") is True
