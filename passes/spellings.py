"""Rewrite residual adds that are spelt as another operation into `x + F`, the one spelling that `residual` reads.

`x - F` and `where(mask, x + F, x)` stay equal in every bit (but for the sign of a zero). Fused operations (`addcmul`,
`addcdiv`, `lerp`, `addmm`, `baddbmm`, `addbmm`), sums of a `stack` of more than two and repeated indices of `index_add`
and its like stay equal up to rounding. Only an operation that would be a site is rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mhc_compile.passes.base import copy_meta, is_tensor, op_name, same_shape, shape, value
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.residual_sites import SiteSearch
from mhc_compile.passes.results import Site

PARAMETERS: dict[str, tuple[str, ...]] = {
    "sub": ("input", "other"), "subtract": ("input", "other"), "rsub": ("input", "other"),
    "addcmul": ("input", "tensor1", "tensor2"), "addcdiv": ("input", "tensor1", "tensor2"),
    "lerp": ("input", "end", "weight"),
    "addmm": ("input", "mat1", "mat2"), "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
    "index_add": ("input", "dim", "index", "source"), "scatter_add": ("input", "dim", "index", "src"),
    "index_put": ("input", "indices", "values", "accumulate"),
    "sum": ("input", "dim"), "mean": ("input", "dim"),
    "where": ("condition", "input", "other"),
}  # fmt: skip
"""Names of positional arguments by operation."""
TENSORS = {
    "input", "other", "tensor1", "tensor2", "end", "mat1", "mat2", "batch1", "batch2", "source", "src", "values",
}  # fmt: skip
"""The positional arguments that must be tensors."""
OPTIONS = {"alpha", "beta", "value"}
CONTRACTIONS = {"addmm", "baddbmm", "addbmm"}
ACCUMULATING = {"index_add", "scatter_add", "index_put"}


@dataclass
class Reading:
    """One way to read an operation as `carry + branch`."""

    carry: Node
    sources: Sequence[Node]
    """What the branch is computed from."""
    write: Callable[[_Writer], tuple[Node, Node]]
    """Insert the nodes of the carry and of the branch."""
    contracts: bool = False
    """Whether the operation itself contracts a source with a parameter."""


@dataclass(frozen=True)
class _Operation:
    """What is read: an operation, its arguments by name, and the sites before it."""

    node: Node
    arguments: dict[str, Any]
    search: SiteSearch


@dataclass
class _Writer:
    """Insert nodes before the operation that is rewritten."""

    gm: GraphModule
    node: Node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert `target(*args, **kwargs)` with the shape and dtype that it has."""
        with self.gm.graph.inserting_before(self.node):
            new = copy_meta(self.gm.graph.call_function(target, args, kwargs), self.node)
        fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), value)
        mode = getattr(value(self.node), "fake_mode", None)
        env = None if mode is None else mode.shape_env
        # The sizes agree, or the model's own call would have failed: nothing new is to be assumed about them.
        with mode or nullcontext(), nullcontext() if env is None else env.suppress_guards(), torch.no_grad():
            new.meta["example_value"] = target(*fake_args, **fake_kwargs)
        return new

    def scaled(self, node: Node, factor: object) -> Node:
        """Insert `node * factor`, unless that is `node` itself."""
        return node if isinstance(factor, (int, float)) and factor == 1 else self.call(operator.mul, node, factor)

    def cast(self, node: Node) -> Node:
        """Insert the cast of `node` to the dtype of the operation."""
        dtype = value(self.node).dtype
        if value(node).dtype == dtype:
            return node
        with self.gm.graph.inserting_before(self.node):
            new = copy_meta(self.gm.graph.call_method("to", (node, dtype)), self.node)
        new.meta["example_value"] = value(node).to(dtype)
        return new


def unify_spellings(gm: GraphModule) -> None:
    """Rewrite every operation of `gm` that is a residual add in another spelling into an add."""
    if not any(_candidate(node) for node in gm.graph.nodes):
        return
    flow = Dataflow(gm.graph, is_owned)
    search = SiteSearch(flow, [])
    spelt: list[tuple[Node, Reading]] = []
    for node in flow.nodes:
        if node not in flow.hot or not is_tensor(node):
            continue
        if op_name(node) == "add":
            search.consider(node)
        elif _candidate(node):
            for reading in _readings(node, flow, search):
                root = search.joins(reading.carry, reading.sources, contracts=reading.contracts)
                if root is not None and same_shape(reading.carry, node):
                    search.sites[node] = Site(node, reading.carry, tuple(reading.sources), root)
                    spelt.append((node, reading))
                    break
    for node, reading in spelt:
        _rewrite(gm, node, reading)


def _candidate(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or op_name(node) not in PARAMETERS or not is_tensor(node):
        return False
    if not value(node).is_floating_point() or len(shape(node)) < 2:
        return False
    return op_name(node) not in ("sum", "mean") or _stacked(node) is not None


def _rewrite(gm: GraphModule, node: Node, reading: Reading) -> None:
    writer = _Writer(gm, node)
    old = list(node.all_input_nodes)
    carry, branch = reading.write(writer)
    operands = (carry, branch)
    if torch.result_type(value(carry), value(branch)) != value(node).dtype:  # under autocast
        operands = (writer.cast(carry), writer.cast(branch))
    node.op, node.target, node.args, node.kwargs = "call_function", operator.add, operands, {}
    for unused in old:
        if not unused.users and unused.op in ("call_function", "call_method"):
            gm.graph.erase_node(unused)


def _readings(node: Node, flow: Dataflow, search: SiteSearch) -> Iterator[Reading]:
    """Yield the ways to read `node` as an add; its carry and its sources are hot tensors."""
    arguments = _arguments(node)
    if arguments is None:
        return
    for reading in _READERS[op_name(node)](_Operation(node, arguments, search)):
        reading.contracts = op_name(node) in CONTRACTIONS and any(n in flow.parametric for n in reading.sources)
        reading.sources = [n for n in reading.sources if n in flow.hot]
        if reading.carry in flow.hot and is_tensor(reading.carry) and reading.sources:
            yield reading


def _arguments(node: Node) -> dict[str, Any] | None:
    """Return the arguments by name; None for a spelling with others (old overloads, `out=`, `dtype=`)."""
    names = PARAMETERS[op_name(node)]
    if op_name(node) == "where" and node.op == "call_method":
        names = ("input", "condition", "other")
    if (
        len(node.args) > len(names)
        or not set(node.kwargs) <= {*names, *OPTIONS, "keepdim"}
        or node.kwargs.get("keepdim")
    ):
        return None
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    if any(not is_tensor(arguments.get(name)) for name in TENSORS & set(names)):
        return None
    return arguments


# --- one function for each spelling -------------------------------------------------------------------------------


def _of_difference(op: _Operation) -> Iterator[Reading]:
    left, right = op.arguments["input"], op.arguments["other"]
    if op_name(op.node) == "rsub":
        left, right = right, left
    alpha = op.arguments.get("alpha", 1)
    yield Reading(left, [right], lambda w: (left, w.call(operator.neg, w.scaled(right, alpha))))
    yield Reading(right, [left], lambda w: (w.call(operator.neg, w.scaled(right, alpha)), left))


def _of_product(op: _Operation) -> Iterator[Reading]:
    function = operator.mul if op_name(op.node) == "addcmul" else operator.truediv
    factors = op.arguments["tensor1"], op.arguments["tensor2"]
    yield Reading(
        op.arguments["input"],
        [*factors],
        lambda w: (op.arguments["input"], w.scaled(w.call(function, *factors), op.arguments.get("value", 1))),
    )


def _of_lerp(op: _Operation) -> Iterator[Reading]:
    start, end, weight = op.arguments["input"], op.arguments["end"], op.arguments["weight"]
    weights = [weight] if isinstance(weight, Node) else []
    yield Reading(
        start, [end, *weights], lambda w: (start, w.call(operator.mul, w.call(operator.sub, end, start), weight))
    )

    def from_end(w: _Writer) -> tuple[Node, Node]:
        rest = w.call(operator.sub, 1, weight) if weights else 1 - weight
        return end, w.call(operator.mul, w.call(operator.sub, start, end), rest)

    yield Reading(end, [start, *weights], from_end)


def _of_contraction(op: _Operation) -> Iterator[Reading]:
    _, first, second = (op.arguments[name] for name in PARAMETERS[op_name(op.node)])
    beta = op.arguments.get("beta", 1)

    def write(w: _Writer) -> tuple[Node, Node]:
        product = w.call(torch.mm if op_name(op.node) == "addmm" else torch.bmm, first, second)
        product.meta["example_value"] = value(product).to(value(op.node).dtype)  # under autocast
        if op_name(op.node) == "addbmm":
            product = w.call(torch.sum, product, 0)
        return w.scaled(op.arguments["input"], beta), w.scaled(product, op.arguments.get("alpha", 1))

    if beta != 0:
        yield Reading(op.arguments["input"], [first, second], write)


def _of_accumulation(op: _Operation) -> Iterator[Reading]:
    target, name = op.arguments["input"], op_name(op.node)
    source = op.arguments[{"index_add": "source", "scatter_add": "src", "index_put": "values"}[name]]

    def write(w: _Writer) -> tuple[Node, Node]:
        zeros = w.call(torch.zeros_like, target)
        if name == "index_put":
            return target, w.call(torch.index_put, zeros, op.arguments["indices"], source, accumulate=True)
        added = w.scaled(source, op.arguments.get("alpha", 1))
        return target, w.call(getattr(torch, name), zeros, op.arguments["dim"], op.arguments["index"], added)

    if name != "index_put" or op.arguments.get("accumulate") is True:
        yield Reading(target, [source], write)


def _of_stack(op: _Operation) -> Iterator[Reading]:
    parts = _stacked(op.node)
    assert parts is not None
    for i, carry in enumerate(parts):
        others = [*parts[:i], *parts[i + 1 :]]
        if carry in others:
            continue

        def write(w: _Writer, carry: Node = carry, others: list[Node] = others) -> tuple[Node, Node]:
            share = 1 / len(parts) if op_name(op.node) == "mean" else 1
            branch = reduce(lambda x, y: w.call(operator.add, x, y), others)
            return w.scaled(carry, share), w.scaled(branch, share)

        yield Reading(carry, others, write)


def _stacked(node: Node) -> list[Node] | None:
    """Return the tensors whose `stack` is reduced along the dimension in which they lie."""
    arguments = _arguments(node)
    stack = None if arguments is None else arguments["input"]
    if not isinstance(stack, Node) or op_name(stack) != "stack" or stack.op != "call_function":
        return None
    parts = stack.args[0] if stack.args else stack.kwargs.get("tensors")
    at = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    assert arguments is not None
    dim = arguments.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    rank = len(shape(stack))
    if not isinstance(dim, int) or not isinstance(at, int) or dim % rank != at % rank:
        return None
    if not isinstance(parts, (tuple, list)) or len(parts) < 2 or not all(is_tensor(p) for p in parts):
        return None
    return list(parts)


def _of_where(op: _Operation) -> Iterator[Reading]:
    for carry, added, chosen in (
        (op.arguments["other"], op.arguments["input"], True),
        (op.arguments["input"], op.arguments["other"], False),
    ):
        site = op.search.sites.get(added)
        if site is None or site.carry is not carry:
            continue

        def write(w: _Writer, carry: Node = carry, added: Node = added, chosen: bool = chosen) -> tuple[Node, Node]:
            # The spelling of `added` itself has been rewritten by now; a tree of adds keeps its leaves.
            branches = (
                [n for n in added.args if n is not carry] if carry in added.args else [*op.search.sites[added].branches]
            )
            branch = reduce(lambda x, y: w.call(operator.add, x, y), branches)
            operands = (branch, 0.0) if chosen else (0.0, branch)
            return carry, w.call(torch.where, op.arguments["condition"], *operands)

        yield Reading(carry, site.branches, write)


_READERS: dict[str, Callable[[_Operation], Iterator[Reading]]] = {
    "sub": _of_difference, "subtract": _of_difference, "rsub": _of_difference, "addcmul": _of_product,
    "addcdiv": _of_product, "lerp": _of_lerp, "index_add": _of_accumulation, "scatter_add": _of_accumulation,
    "index_put": _of_accumulation, "sum": _of_stack, "mean": _of_stack, "where": _of_where,
    **dict.fromkeys(CONTRACTIONS, _of_contraction),
}  # fmt: skip
