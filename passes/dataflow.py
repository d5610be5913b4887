"""Which value depends on which: the facts about a graph that `normalize` and `residual` reason from.

Ancestor sets are bit masks (Python integers, bit i for node i), so that 6000 nodes cost megabytes and milliseconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, Node

from mhc_compile.passes.base import is_tensor, op_name, value

# Only the shape, dtype or device of the operands matters, never their values.
METADATA_OPS = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "size", "dim", "numel", "is_floating_point",
}  # fmt: skip
# Only the first operand's values matter.
METADATA_SECOND = {"expand_as", "view_as", "reshape_as", "type_as", "to", "mark"}
# The result may share storage with the first operand.
VIEW_OPS = {
    "view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "flatten",
    "unflatten", "contiguous", "to", "float", "half", "bfloat16", "type_as", "getitem", "getattr", "narrow", "select",
    "chunk", "split", "unbind", "detach", "movedim", "swapaxes", "swapdims", "alias", "dropout", "reshape_as",
    "mark",
}  # fmt: skip
# Of these the ones that may change the dtype: where they do, the result is a copy.
CASTS = {"to", "float", "half", "bfloat16", "type_as"}
IN_PLACE_FUNCTIONS = {"iadd", "isub", "imul", "itruediv", "setitem"}
MATMULS = {
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "grouped_mm", "_grouped_mm", "_scaled_mm", "multi_head_attention_forward",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "tensordot", "_weight_int8pack_mm",
}  # fmt: skip
EMBEDDINGS = {"embedding", "embedding_bag", "index_select"}


def writes_first_operand(node: Node) -> bool:
    """Return whether `node` mutates its first operand (`x += y`, `x.add_(y)`, `x[i] = y`, `relu(x, inplace=True)`)."""
    if node.op not in ("call_method", "call_function") or not node.args or not is_tensor(node.args[0]):
        return False
    name = op_name(node)
    if node.op == "call_function" and (name in IN_PLACE_FUNCTIONS or in_place_option(node) is not None):
        return True
    return name.endswith("_") and not name.startswith("_")


def in_place_option(node: Node) -> int | str | None:
    """Return the index or name of the argument that tells a function to work in place, or None."""
    if node.op != "call_function":
        return None
    if node.kwargs.get("inplace") is True:
        return "inplace"
    assert callable(node.target)
    at = _place_of_option(node.target) if any(a is True for a in node.args) else None
    return at if at is not None and at < len(node.args) and node.args[at] is True else None


@cache
def _place_of_option(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        return None
    return names.index("inplace") if "inplace" in names else None


def carries_data(node: Node) -> bool:
    """Return whether the node's value is a tensor, or a tuple or list that holds one."""
    v = value(node)
    return isinstance(v, torch.Tensor) or (isinstance(v, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in v))


def storage_root(node: Node) -> Node:
    """Return the node whose storage `node` may be a view of, through views and in-place results."""
    while _may_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _may_view(node: Node) -> bool:
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or not (name in VIEW_OPS or writes_first_operand(node)):
        return False
    base = node.args[0] if node.args else None
    if not isinstance(base, Node) or not carries_data(base):
        return False
    return not (name in CASTS and is_tensor(node) and is_tensor(base) and value(node).dtype != value(base).dtype)


class Dataflow:
    """Ancestors, dominators and roles of the nodes of one graph.

    `owned(placeholder)` tells parameters and buffers of the model from what a caller passes in.
    """

    def __init__(self, graph: Graph, owned: Callable[[Node], bool]) -> None:
        self.nodes: list[Node] = list(graph.nodes)
        self.index: dict[Node, int] = {n: i for i, n in enumerate(self.nodes)}
        self.inputs: dict[Node, list[Node]] = {}
        self.ancestors: dict[Node, int] = {}
        """Bit mask of all nodes this one's value depends on, itself included."""
        self.hot: set[Node] = set()
        """Nodes whose value depends on what is embedded: float inputs and embedding look-ups."""
        self.parametric: set[Node] = set()
        """Nodes that depend on a parameter or buffer and on nothing hot."""
        self.matmuls = 0
        """Bit mask of the operations that contract a hot value with a parameter."""
        self.writes: dict[Node, list[Node]] = {}
        """Mutating nodes by the storage they mutate."""
        last_write: dict[Node, Node] = {}
        passed_in = [n for n in self.nodes if n.op == "placeholder" and not owned(n)]
        self.content = set(
            passed_in if not any(self._embeds(n) for n in passed_in) else filter(self._is_projected, passed_in)
        )
        """Inputs that hold content where they are floating point; next to token ids, caches and masks do not."""
        for i, node in enumerate(self.nodes):
            inputs = self._data_inputs(node)
            inputs += [w for n in inputs if (w := last_write.get(storage_root(n))) is not None and w not in inputs]
            self.inputs[node] = inputs
            mask = 1 << i
            for n in inputs:
                mask |= self.ancestors[n]
            self.ancestors[node] = mask
            self._assign_role(node, inputs, owned)
            if writes_first_operand(node):
                root = storage_root(node)
                last_write[root] = node
                self.writes.setdefault(root, []).append(node)

    @staticmethod
    def _data_inputs(node: Node) -> list[Node]:
        name = op_name(node)
        if node.op == "output":
            return [n for n in node.all_input_nodes if carries_data(n)]
        if name in METADATA_OPS or not (carries_data(node) or writes_first_operand(node)):
            return []
        if name in METADATA_SECOND:
            first = node.args[0] if node.args else None
            return [first] if isinstance(first, Node) and carries_data(first) else []
        return [n for n in node.all_input_nodes if carries_data(n)]

    @staticmethod
    def _embeds(placeholder: Node) -> bool:
        """Return whether an embedding looks up this input: token ids."""
        users = [u for n in (placeholder, *placeholder.users) for u in (n, *n.users)]
        return any(op_name(u) in EMBEDDINGS and u.op == "call_function" for u in users)

    @staticmethod
    def _is_projected(placeholder: Node) -> bool:
        """Return whether a layer reads this input in a few steps: features, pixels, embeddings; no cache, no mask."""
        front = [placeholder]
        for _ in range(4):
            if any(op_name(u) in MATMULS for n in front for u in n.users):
                return True
            front = [u for n in front for u in n.users if op_name(u) in VIEW_OPS | {"layer_norm", "rms_norm", "pad"}]
        return False

    def _assign_role(self, node: Node, inputs: list[Node], owned: Callable[[Node], bool]) -> None:
        if node.op in ("placeholder", "get_attr"):
            v = value(node)
            if not isinstance(v, torch.Tensor):
                return
            if node.op == "get_attr" or owned(node):
                self.parametric.add(node)
            elif v.is_floating_point() and v.ndim >= 2 and node in self.content:
                self.hot.add(node)
            return
        parametric = [n for n in inputs if n in self.parametric]
        hot = [n for n in inputs if n in self.hot]
        if hot or (op_name(node) in EMBEDDINGS and parametric) or self._looks_up(node):
            self.hot.add(node)
        elif parametric:
            self.parametric.add(node)
        if hot and parametric and self._contracts(node):
            self.matmuls |= 1 << self.index[node]

    def _looks_up(self, node: Node) -> bool:
        """Return whether `node` is `weight[ids]`, an embedding spelt as indexing."""
        if op_name(node) != "getitem" or len(node.args) != 2:
            return False
        table, ids = node.args
        return (
            isinstance(table, Node)
            and table in self.parametric
            and isinstance(ids, Node)
            and is_tensor(ids)
            and ids not in self.parametric
        )

    @staticmethod
    def _contracts(node: Node) -> bool:
        if op_name(node) in MATMULS:
            return True
        # A custom or higher-order operator that takes a parameter: assume that it computes something learned with it.
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(target, torch._ops.OpOverload):
            target = target.overloadpacket
        if not isinstance(target, torch._ops.OpOverloadPacket):
            return False
        return target._qualified_op_name.split("::")[0] not in ("aten", "prims", "mhc")

    def bit(self, node: Node) -> int:
        """Return the node's own bit."""
        return 1 << self.index[node]

    def depends(self, node: Node, on: Node) -> bool:
        """Return whether the value of `node` depends on `on` (or is it)."""
        return bool(self.ancestors[node] >> self.index[on] & 1)

    @cached_property
    def descendants(self) -> dict[Node, int]:
        """Bit mask of all nodes whose value depends on the key, itself included."""
        out = {n: 1 << i for i, n in enumerate(self.nodes)}
        for node in reversed(self.nodes):
            mask = out[node]
            for n in self.inputs[node]:
                out[n] |= mask
        return out

    def between(self, source: Node, sink: Node) -> int:
        """Return the bit mask of the nodes on paths from `source` to `sink`, both included."""
        return self.descendants[source] & self.ancestors[sink]

    def members(self, mask: int) -> list[Node]:
        """Return the nodes of a bit mask, in graph order."""
        out = []
        while mask:
            low = mask & -mask
            out.append(self.nodes[low.bit_length() - 1])
            mask ^= low
        return out

    @cached_property
    def dominators(self) -> dict[Node, Node | None]:
        """For each hot node the last other node that all paths from hot sources pass through (None: no single one)."""
        root = "root"
        g: Any = nx.DiGraph()
        g.add_node(root)
        for node in self.nodes:
            if node in self.hot:
                sources: list[Any] = [n for n in self.inputs[node] if n in self.hot]
                g.add_edges_from((s, node) for s in (sources or [root]))
        idom = nx.immediate_dominators(g, root)
        return {n: None if d == root else d for n, d in idom.items() if n != root}
