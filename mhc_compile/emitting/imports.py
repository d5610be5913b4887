"""Collect and write the imports of an emitted file."""

from __future__ import annotations

import builtins
import sys
import types

import libcst as cst
import torch
from torch import nn
from torch.nn import functional

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.naming import refuse_local
from mhc_compile.emitting.syntax import all_nodes

STREAMS = (
    "from contextlib import nullcontext",
    "import torch",
    "from torch import nn",
    "from torch.nn import functional as F",
)
"""The imports of the stream modules."""
OWN = {
    "torch": torch, "nn": nn, "F": functional,
    **dict.fromkeys([
        "expand", "reduce", "first_stream", "each_stream", "leave", "leave_each", "reduce_recorded", "read_converted",
        "add_streams", "HyperConnection", "Initialise", "STREAMS", "CLASSES", "WIDTHS",
    ]),
}  # fmt: skip
"""Names that the file has already, with what they are; None for what it defines itself."""
WIDTH = 120


class Imports:
    """The imports of one file."""

    def __init__(self) -> None:
        self.lines = set(STREAMS)
        self.names: dict[str, set[str]] = {}
        """By module what is imported from it."""
        self.values: dict[str, object] = {}
        """What the names are that rewritten code finds in its own module."""

    def base(self, cls: type) -> str:
        """Import a class of the model and return how the file says it. Raises MHC707."""
        refuse_local(cls)
        outer, *inner = cls.__qualname__.split(".")
        self.names.setdefault(cls.__module__, set()).add(f"{outer} as _{outer}")
        return ".".join([f"_{outer}", *inner])

    def read_by(self, function: Function) -> None:
        """Import what the code of a function finds in its own module.

        Raises MHC707 for a name that is something else in this file, or in the module of another function.
        """
        space = function.objects[0].__globals__
        home = str(space.get("__name__"))
        for name in sorted(_names(function.tree)):
            if name not in space or hasattr(builtins, name):
                continue
            value = space[name]
            if OWN.get(name, value) is not value or self.values.get(name, value) is not value:
                raise MHCError("MHC707", f"two things have the name {name}", source=function.line(function.tree))
            if name in OWN or name in self.values:
                continue
            self.values[name] = value
            if isinstance(value, types.ModuleType):
                self.lines.add(f"import {value.__name__}" + (f" as {name}" if value.__name__ != name else ""))
            else:
                self.names.setdefault(home, set()).add(name)

    def text(self, own: list[str]) -> str:
        """Return the statements; `own` are the names of the file's classes, which hide those of the same name."""
        lines = sorted(self.lines, key=_order)
        for module, names in sorted(self.names.items()):
            wanted = sorted(n for n in names if n not in own)
            one = f"from {module} import {', '.join(wanted)}"
            if wanted and len(one) <= WIDTH:
                lines.append(one)
            elif wanted:
                lines.append(f"from {module} import (\n{_packed(wanted)})")
        return "\n".join(lines) + "\n"


def _order(line: str) -> tuple[bool, str, str]:
    """Sort imports of Python's own modules before others, `import` before `from`."""
    keyword, module, *_ = line.split()
    return module.split(".")[0] not in sys.stdlib_module_names, module, {"import": "", "from": line}[keyword]


def _packed(names: list[str]) -> str:
    """Return indented lines with as many of the names as they hold."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) + 2 > WIDTH:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '    '}{name},"
    return "\n".join(lines) + "\n"


def _names(tree: cst.FunctionDef) -> set[str]:
    """Return all names in the source of a function, those in annotations written as text included."""
    names: set[str] = set()

    nodes = all_nodes(tree)
    attributes = {node.attr for node in nodes if isinstance(node, cst.Attribute)}
    for node in nodes:
        if isinstance(node, cst.Name) and node not in attributes:
            names.add(node.value)
        elif isinstance(node, cst.SimpleString) and isinstance(value := node.evaluated_value, str):
            names.update([value] if value.isidentifier() else [])
    return names
