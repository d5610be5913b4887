"""Make functions of what a program's notes say belongs together (`mhc_compile.exporting.outline`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node, map_arg
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from mhc_compile.exporting.outline import CHAIN, SINKHORN, note_on


class _Call(HigherOrderOperator):
    """`CALL(name, *arguments)`: a call of a function by its name, to be imported and never run."""

    def __init__(self) -> None:
        super().__init__("mhc_call")

    def __call__(self, name: str, *arguments: Any) -> Any:
        return super().__call__(name, *arguments)


CALL = _Call()


@dataclass
class Function:
    """A graph whose placeholders are the arguments and whose output is the tuple of results."""

    name: str
    body: GraphModule
    arguments: list[str]
    """The name of each argument as `KernelSpec.inputs` has it; "" where that does not show."""
    results: list[str]


def split(gm: GraphModule, parameters: Mapping[str, str]) -> list[Function]:
    """Turn the chains of `gm` into calls of functions, in place; return the functions, callees before callers.

    Chains that compute the same on the same shapes share a function. `parameters` are the paths of the placeholders
    that are parameters.
    """
    outliner = _Outliner(gm, parameters)
    outliner.outline("sinkhorn", lambda node: _number(node) if note_on(node, SINKHORN) else None)
    outliner.outline("chain", _number)
    gm.graph.lint()
    return outliner.functions


def _number(node: Node) -> Hashable:
    note = note_on(node, CHAIN)
    return note["call"] if note else None


class _Outliner:
    def __init__(self, gm: GraphModule, parameters: Mapping[str, str]) -> None:
        self.gm = gm
        self.parameters = parameters
        self.functions: list[Function] = []
        self.known: dict[Hashable, Function] = {}
        self.names: Counter[str] = Counter()

    def outline(self, prefix: str, number: Callable[[Node], Hashable]) -> None:
        """Make a function of every set of nodes that have one `number`."""
        parts: dict[Hashable, dict[Node, int | None]] = {}
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and (key := number(node)) is not None:
                parts.setdefault(key, {})[node] = None
        order = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        parts = {
            key: dict.fromkeys(sorted((*part, *_between(part, order)), key=order.__getitem__))
            for key, part in parts.items()
        }
        notes = [next(iter(part)).meta["custom"] for part in parts.values()]
        fuse_by_partitions(self.gm, list(parts.values()), f"{prefix}_", always_return_tuple=True)
        calls = {node.target: node for node in self.gm.graph.nodes if node.op == "call_module"}
        for i, custom in enumerate(notes):
            self._call(calls[f"{prefix}_{i}"], custom, inner=prefix == "sinkhorn")

    def _call(self, node: Node, custom: dict[str, Any], *, inner: bool) -> None:
        """Replace a call of a submodule by one of a function."""
        body = self.gm.get_submodule(str(node.target))
        assert isinstance(body, GraphModule)
        self.gm.delete_submodule(str(node.target))
        note = custom[CHAIN]
        if inner:
            names, takes, gives = custom[SINKHORN]["name"], ["logits"], ["H"]
        else:
            names = note["name"]
            takes = _arguments(node, note, self.parameters)
            gives = _by_shape(list(body.graph.output_node().args[0]), note, note["gives"])  # type: ignore[arg-type]
        order = sorted(range(len(takes)), key=lambda i: _place(takes[i], note["takes"]))
        _reorder(body, order)
        function = self._function(names, body, [takes[i] for i in order], gives)
        with self.gm.graph.inserting_before(node):
            call = self.gm.graph.call_function(CALL, (function.name, *(node.args[i] for i in order)))
        call.meta = {"val": node.meta["val"], "custom": {CHAIN: note}}
        node.replace_all_uses_with(call)
        for item in call.users:
            item.meta["custom"] = {CHAIN: note}
        self.gm.graph.erase_node(node)

    def _function(self, name: str, body: GraphModule, takes: list[str], gives: list[str]) -> Function:
        key = _text(body)
        if key not in self.known:
            count = self.names[name]
            self.names[name] += 1
            self.known[key] = Function(f"{name}_{count}" if count else name, body, takes, gives)
            self.functions.append(self.known[key])
        return self.known[key]


def _between(part: Mapping[Node, object], order: Mapping[Node, int]) -> set[Node]:
    """Return the nodes on paths from one node of `part` to another: notes may have gaps, a function must not."""
    last = max(order[n] for n in part)
    after: set[Node] = set()
    waiting = list(part)
    while waiting:
        new = [u for u in waiting.pop().users if order[u] < last and u not in part and u not in after]
        after.update(new)
        waiting += new
    inside: set[Node] = set()
    for node in sorted(after, key=lambda n: -order[n]):
        if any(u in part or u in inside for u in node.users):
            inside.add(node)
    return inside


def _arguments(call: Node, note: dict[str, Any], parameters: Mapping[str, str]) -> list[str]:
    """Return the name of each argument of a chain."""
    named = []
    for node in call.all_input_nodes:
        path = parameters.get(node.name, "")
        leaf = path.rpartition(".")[2]
        named.append(leaf if ".mhc." in f".{path}" or not leaf else f"norm_{leaf}")
    unnamed = _by_shape(
        [n for n, name in zip(call.all_input_nodes, named, strict=True) if not name], note, note["takes"]
    )
    rest = iter(unnamed)
    return [name or next(rest) for name in named]


_TAILS = {
    "X": "nC", "next_X": "nC", "keys": "nC", "y": "C", "h": "C", "value": "C", "mix": "nn", "next_mix": "nn",
    "pre": "n", "post": "n", "next_pre": "n", "next_post": "n", "a": "n", "reach": "",
}  # fmt: skip
"""The sizes after those of the tokens."""


def _by_shape(nodes: list[Node], note: dict[str, Any], names: list[str]) -> list[str]:
    """Return which of `names` each node is, by the sizes after the tokens; `""` where two have the same."""
    n, C = note["streams"], note["width"]
    by_tail: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        if name in _TAILS:
            by_tail.setdefault(tuple({"n": n, "C": C}[size] for size in _TAILS[name]), []).append(name)
    shapes = [tuple(node.meta["val"].shape) if isinstance(node.meta["val"], Tensor) else () for node in nodes]
    tokens = max((len(s) for s in shapes), default=0) - max((len(t) for t in by_tail), default=0)
    tails = [s[tokens:] for s in shapes]
    candidates = [by_tail.get(tail, []) for tail in tails]
    return [f[0] if len(f) == 1 and tails.count(tail) == 1 else "" for f, tail in zip(candidates, tails, strict=True)]


def _place(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)


def _reorder(body: GraphModule, order: list[int]) -> None:
    placeholders = body.graph.find_nodes(op="placeholder")
    for i in reversed(order):
        body.graph._root.append(placeholders[i])


def _text(body: GraphModule) -> str:
    """Return what the function computes, without names: equal texts are equal functions."""
    numbers: dict[Node, int] = {}
    lines = []
    for node in body.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        numbers[node] = len(numbers)
        lines.append(f"{node.op} {node.target if callable(node.target) else ''} {args} {kwargs} {_form(node)}")
    return "\n".join(lines)


def _form(node: Node) -> object:
    val = node.meta.get("val")
    values = val if isinstance(val, (tuple, list)) else [val]
    return [
        (v.dtype, [d if isinstance(d, int) else "?" for d in v.shape]) if isinstance(v, Tensor) else type(v)
        for v in values
    ]
