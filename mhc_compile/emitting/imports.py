"""Collect and write the imports of an emitted file."""

from __future__ import annotations

import builtins
import sys
import types

import libcst as cst

from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.naming import refuse_local
from mhc_compile.emitting.syntax import all_nodes

STREAMS = (
    "from contextlib import nullcontext",
    "import torch",
    "from torch import nn",
    "from torch.nn import functional as F",
)
"""What the stream modules need."""
OWN = ("torch", "nn", "F", "expand", "reduce")
"""Names that the file has already."""
WIDTH = 120


class Imports:
    """The imports of one file."""

    def __init__(self) -> None:
        self.lines = set(STREAMS)
        self.names: dict[str, set[str]] = {}
        """By module what is imported from it."""

    def base(self, cls: type) -> str:
        """Import a class of the model and return how the file says it. Raises MHC707."""
        refuse_local(cls)
        outer, *inner = cls.__qualname__.split(".")
        self.names.setdefault(cls.__module__, set()).add(f"{outer} as _{outer}")
        return ".".join([f"_{outer}", *inner])

    def read_by(self, function: Function, tree: cst.FunctionDef) -> None:
        """Import what the code of a function finds in its own module."""
        space = function.objects[0].__globals__
        home = str(space.get("__name__"))
        for name in sorted(_names(tree)):
            if name not in space or hasattr(builtins, name) or name in OWN:
                continue
            value = space[name]
            if isinstance(value, types.ModuleType):
                self.lines.add(f"import {value.__name__}" + (f" as {name}" if value.__name__ != name else ""))
            else:
                self.names.setdefault(home, set()).add(name)

    def text(self, own: list[str]) -> str:
        """Return the statements; `own` are the names of the file's classes, which hide those of the same name."""
        lines = sorted(
            self.lines, key=lambda line: (line.split()[1].split(".")[0] not in sys.stdlib_module_names, line)
        )
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

    for node in all_nodes(tree):
        if isinstance(node, cst.Name):
            names.add(node.value)
        elif isinstance(node, cst.SimpleString) and isinstance(value := node.evaluated_value, str):
            names.update([value] if value.isidentifier() else [])
    return names
