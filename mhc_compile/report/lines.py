"""A graph's nodes as lines of text, `name = op(operands)`, and the source lines that they come from."""

from __future__ import annotations

import linecache
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from mhc_compile.passes.base import op_name, value
from mhc_compile.passes.ownership import INPUT, OWNED, is_owned
from mhc_compile.report.report import Source

Labels = Mapping[Node, str]
"""Names of placeholders that have none of their own."""
CONTEXT = 3
"""Lines shown before and after a source line."""
# The text of a frame is missing where its file could not be read.
_FRAME = re.compile(r'^ *File "(.*)", line (\d+), in (.*)\n?((?! *File ").*)', re.MULTILINE)


class Line(NamedTuple):
    """One node of a graph as it was at one time."""

    node: Node
    text: str
    form: str
    """What it gives: `float32[2, 16, 64]`, or nothing where that is no tensor."""


class Snapshots:
    """Takes snapshots of a graph as it changes; of nodes that stayed as they were, lines are made once."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._made: dict[Node, tuple[object, ...]] = {}
        self._lines: dict[Node, Line] = {}
        self._names: dict[Node, str] = {}

    def take(self, graph: Graph) -> list[Line]:
        """Return a line for every node of `graph` as it is now, in order."""
        for node in graph.nodes:
            if node not in self._names:
                name = input_name(node) if node.op == "placeholder" else node.name
                self._names[node] = self.labels.get(node) or name
        return [self._line(node) for node in graph.nodes]

    def _line(self, node: Node) -> Line:
        state = (node.op, node.target, node.args, node.kwargs, value(node))
        if not all(a is b for a, b in zip(state, self._made.get(node, (None,)), strict=False)):
            self._made[node] = state
            self._lines[node] = Line(node, line_text(node, self._names), form(state[-1]))
        return self._lines[node]


def line_text(node: Node, names: Labels) -> str:
    """Return `name = op(operands)`; inputs are `name = input()`, the model's `parameter()` or `buffer()`."""
    if node.op == "placeholder":
        kind = "input" if not is_owned(node) else "buffer" if is_buffer(node) else "parameter"
        return f"{names.get(node, node.name)} = {kind}()"
    if node.op == "get_attr":
        return f"{node.name} = constant({node.target})"
    operands = [_shown(a, names) for a in node.args]
    operands += [f"{k}={_shown(a, names)}" for k, a in node.kwargs.items()]
    return f"{node.name} = {_operation(node)}({', '.join(operands)})"


def form(result: Any) -> str:
    """Return `float32[2, 16, 64]` for a tensor, and "" for anything else."""
    if isinstance(result, torch.Tensor):
        return f"{str(result.dtype).removeprefix('torch.')}{list(result.shape)}"
    return ""


def _operation(node: Node) -> str:
    if isinstance(node.target, OpOverload):
        return f"{node.target.namespace}.{op_name(node)}"
    return f".{node.target}" if node.op == "call_method" else op_name(node)


def _shown(argument: Any, names: Labels) -> str:
    if isinstance(argument, Node):
        return names.get(argument, argument.name)
    if isinstance(argument, (tuple, list)):
        inside = ", ".join(_shown(a, names) for a in argument)
        if isinstance(argument, list):
            return f"[{inside}]"
        return f"({inside},)" if len(argument) == 1 else f"({inside})"
    if isinstance(argument, Mapping):
        return "{" + ", ".join(f"{k!r}: {_shown(a, names)}" for k, a in argument.items()) + "}"
    if isinstance(argument, slice):
        return f"slice({_shown(argument.start, names)}, {_shown(argument.stop, names)}, {_shown(argument.step, names)})"
    return repr(argument)


def input_name(node: Node) -> str:
    """Return what a placeholder is called outside: a parameter's or buffer's path, or an argument's name."""
    path = node.meta.get(OWNED)
    return path if isinstance(path, str) else node.meta.get(INPUT, node.name)


def is_buffer(node: Node) -> bool:
    """Return whether a placeholder is a module's buffer."""
    return is_owned(node) and not isinstance(value(node), torch.nn.Parameter)


class Sources:
    """The distinct source lines of some nodes, numbered as they are met."""

    def __init__(self) -> None:
        self.numbers: dict[Source, int] = {}
        self._known: dict[str, int | None] = {}
        """By a node's recorded stack, which many nodes share."""

    def of(self, node: Node) -> int | None:
        """Return the number of the source line of `node`, None where none was recorded; its callers get theirs."""
        stack = node.meta.get("stack_trace") or ""
        if stack not in self._known:
            number = None
            for file, line, function, text in _FRAME.findall(stack):
                number = self._number(file, int(line), function, text.strip(), number)
            self._known[stack] = number
        return self._known[stack]

    def _number(self, file: str, line: int, function: str, text: str, caller: int | None) -> int:
        # linecache reads the file as text: nothing of it is run.
        first = max(1, line - CONTEXT)
        around = [linecache.getline(file, i).rstrip() for i in range(first, line + CONTEXT + 1)]
        context = tuple(around) if any(around) else ()
        source = Source(short_path(file), line, function, text, file if context else "", first, context, caller)
        return self.numbers.setdefault(source, len(self.numbers))


def short_path(text: str) -> str:
    """Return `text` with paths relative to the packages or to the working directory."""
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path.cwd())):
        text = text.replace(f"{root}/", "")
    return text
