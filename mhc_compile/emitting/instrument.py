"""Trace which expression of the user's source makes and reads which value of the captured graph.

The functions around the sites are compiled anew with every expression `e` as `probe(key, e)`, and put in place for one
capture. What Dynamo traces then is the same computation, with a marker node behind every expression: which expression
had which value, in which call, needs no guess from names or positions.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import libcst as cst
import torch
from libcst import metadata
from torch import nn
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.syntax import all_nodes

PROBE, ENTER, LEAVE = "__mhc_probe__", "__mhc_enter__", "__mhc_leave__"


EXPRESSIONS = (cst.Name, cst.Attribute, cst.Call, cst.BinaryOperation, cst.Subscript, cst.IfExp)
"""The kinds of expressions that are probed: others never have a stream as their value."""
NO_VALUES = (
    cst.Lambda, cst.Decorator, cst.Parameters, cst.Annotation, cst.AssignTarget, cst.AsName, cst.Del, cst.Global,
    cst.Nonlocal, cst.Import, cst.ImportFrom, cst.Match, cst.FormattedString, cst.ClassDef,
)  # fmt: skip
"""The kinds of syntax that are not probed: they are evaluated elsewhere, or have no value."""


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def seen(value: torch.Tensor, key: int) -> torch.Tensor:  # noqa: ARG001 (read from the graph)
    """Return `value`: the marker of an expression whose value is a tensor."""
    return value


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def passed(key: int, kind: str) -> torch.Tensor:  # noqa: ARG001
    """Return nothing of use: the marker of another expression, or of the beginning or end of a call."""
    return torch.empty(0)


def _probe(key: int, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return seen(value, key)
    passed(key, "value")
    return value


def _enter(key: int) -> None:
    passed(key, "enter")


def _leave(key: int, value: Any) -> Any:
    passed(key, "leave")
    return value


@dataclass(eq=False)
class Function:
    """One function of the user's code and its syntax tree."""

    code: CodeType
    objects: list[FunctionType]
    """Every function object that runs this code."""
    tree: cst.FunctionDef
    first_line: int
    key: int = 0
    parents: dict[cst.CSTNode, cst.CSTNode] = field(default_factory=dict)
    lines: dict[cst.CSTNode, int] = field(default_factory=dict)

    def line(self, node: cst.CSTNode) -> str:
        """Return `file:line, in function` of a node of the tree."""
        while node not in self.lines and node in self.parents:
            node = self.parents[node]
        number = self.first_line + self.lines.get(node, 1) - 1
        return f"{self.code.co_filename}:{number}, in {self.code.co_qualname}"


def functions_around(model: nn.Module, nodes: Sequence[Node], outside: Sequence[Node] = ()) -> list[Function]:
    """Return the functions whose calls were running when `nodes` were made.

    They begin with the innermost that was running at `outside`, too. Functions without readable source (lambdas,
    built-ins, generated code) and those that decorators made are left out.
    """
    traces = [t for node in nodes if (t := _frames(node))]
    shared = 0
    every = traces + [t for node in outside if (t := _frames(node))]
    while all(len(t) > shared + 1 and t[shared] == every[0][shared] for t in every):
        shared += 1
    places = dict.fromkeys(place for trace in traces for place in trace[shared:])
    files = {file for file, _, _ in places}
    by_file: dict[str, dict[CodeType, list[FunctionType]]] = {}
    for thing in reachable(model, files):
        if thing.__code__.co_filename in files:
            by_file.setdefault(thing.__code__.co_filename, {}).setdefault(thing.__code__, []).append(thing)
    chosen: dict[CodeType, list[FunctionType]] = {}
    for file, line, _ in places:
        around = [code for code in by_file.get(file, {}) if any(at == line for _, _, at in code.co_lines())]
        if around:
            innermost = max(around, key=lambda code: code.co_firstlineno)
            chosen[innermost] = by_file[file][innermost]
    functions = [parsed for code, objects in chosen.items() if (parsed := parse(code, objects)) is not None]
    for key, function in enumerate(functions):
        function.key = key
    return functions


def reachable(model: nn.Module, files: Collection[str]) -> list[FunctionType]:
    """Return the functions that a model's classes and the Python modules in `files` hold, under whatever decorators."""
    queue: list[object] = []
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        queue += vars(cls).values()
    queue += [value for module in model.modules() for value in vars(module).values() if callable(value)]
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) in files:
            queue += vars(module).values()
    return unwrapped(queue, files)


def unwrapped(things: Iterable[object], files: Collection[str] = ()) -> list[FunctionType]:
    """Return the functions among `things` and those that they wrap, in closures too; those of classes in `files`."""
    queue = list(things)
    seen: dict[int, object] = {}
    while queue:
        thing = queue.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        match thing:
            case FunctionType():
                queue += [_content(cell) for cell in thing.__closure__ or ()]
                queue.append(getattr(thing, "__wrapped__", None))
            case staticmethod() | classmethod() | MethodType():
                queue.append(thing.__func__)
            case property():
                queue.append(thing.fget)
            case functools.partial():
                queue.append(thing.func)
            case type() if _file(thing) in files:
                queue += vars(thing).values()
    return [thing for thing in seen.values() if isinstance(thing, FunctionType)]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _file(cls: type) -> str | None:
    return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _frames(node: Node) -> list[tuple[str, int, str]]:
    """Return the file, line and function of every call that was running when `node` was made, outermost first."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'^\s*File "(.*)", line (\d+), in (.*)$', trace, re.MULTILINE)
    return [(file, int(line), name) for file, line, name in found]


def parse(code: CodeType, objects: list[FunctionType]) -> Function | None:
    """Return a function with its syntax tree; None where its source cannot be read or is no plain `def`."""
    try:
        lines, first = inspect.getsourcelines(code)
        module = cst.parse_module(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, cst.ParserSyntaxError, IndentationError):
        return None
    tree = module.body[0] if len(module.body) == 1 else None
    if not isinstance(tree, cst.FunctionDef) or tree.asynchronous or code.co_flags & inspect.CO_GENERATOR:
        return None
    # A wrapper that a decorator made: its code cannot stand elsewhere.
    if set(code.co_freevars) - {"__class__"}:
        return None
    wrapper = metadata.MetadataWrapper(module, unsafe_skip_copy=True)
    positions = wrapper.resolve(metadata.PositionProvider)
    function = Function(code, objects, tree, first)
    function.lines = {node: span.start.line for node, span in positions.items()}
    function.parents = dict(wrapper.resolve(metadata.ParentNodeProvider))
    return function


class Keys:
    """Numbers the expressions of all functions."""

    def __init__(self) -> None:
        self.places: list[tuple[Function, cst.CSTNode, str]] = []

    def of(self, function: Function, node: cst.CSTNode, what: str = "") -> int:
        """Return a new number for `node`; `what` tells several of one node apart."""
        self.places.append((function, node, what))
        return len(self.places) - 1


class _Instrument(cst.CSTTransformer):
    """Wraps every expression that a call evaluates."""

    def __init__(self, function: Function, keys: Keys) -> None:
        super().__init__()
        self.function, self.keys = function, keys
        names = function.code.co_varnames
        self.instance = names[0] if "." in function.code.co_qualname.split("<locals>.")[-1] and names else None
        self.globals = {*function.objects[0].__globals__, *dir(builtins)} - {*names, *function.code.co_cellvars}
        self.left: set[cst.CSTNode] = set()
        """Names and attributes that are not read."""

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Return whether there is anything below `node` to wrap; note the parts of it that are no values."""
        if isinstance(node, NO_VALUES) or (isinstance(node, cst.FunctionDef) and node is not self.function.tree):
            return False
        match node:
            case cst.FunctionDef():
                self.left.add(node.name)
            case cst.AugAssign() | cst.AnnAssign() | cst.NamedExpr():
                self.left.add(node.target)
            case cst.For() | cst.CompFor():
                self.left.update(all_nodes(node.target))
            case cst.Arg() if node.keyword is not None:
                self.left.add(node.keyword)
            case cst.Attribute():
                self.left.add(node.attr)
            case cst.Call():
                self.left.add(node.func)
                # Arguments of these are classes and modules.
                return not (isinstance(node.func, cst.Name) and node.func.value in ("super", "isinstance", "hasattr"))
        return True

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        """Return what stands in place of `original_node`, whose parts are replaced already."""
        match original_node:
            case cst.Return():
                return self._returned(updated_node)
            case cst.SimpleStatementLine():
                return self._assigned(original_node, updated_node)
            case cst.FunctionDef() if original_node is self.function.tree:
                return self._function(updated_node)
        return self._wrap(original_node, updated_node) if isinstance(original_node, EXPRESSIONS) else updated_node

    def _wrap(self, original: Any, updated: Any) -> Any:
        if original in self.left or self._is_constant(original):
            return updated
        key = self.keys.of(self.function, original)
        return cst.Call(cst.Name(PROBE), [cst.Arg(cst.Integer(str(key))), cst.Arg(updated)])

    def _is_constant(self, node: cst.CSTNode) -> bool:
        """Return whether `node` is a name of the module, or an attribute of it or of the instance."""
        dotted = isinstance(node, cst.Attribute)
        while isinstance(node, cst.Attribute):
            node = node.value
        if isinstance(node, cst.Call):
            return isinstance(node.func, cst.Name) and node.func.value == "super"
        if not isinstance(node, cst.Name):
            return False
        return node.value in self.globals or node.value == self.instance or (dotted and node.value == self.instance)

    def _returned(self, updated: cst.Return) -> cst.Return:
        value = updated.value or cst.Name("None")
        if isinstance(value, cst.Tuple) and not value.lpar:
            value = value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        arguments = [cst.Arg(cst.Integer(str(self.function.key))), cst.Arg(value)]
        return updated.with_changes(
            value=cst.Call(cst.Name(LEAVE), arguments), whitespace_after_return=cst.SimpleWhitespace(" ")
        )

    def _assigned(self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine) -> cst.SimpleStatementLine:
        """Put a probe of `x` before and behind `x += y`."""
        before: list[cst.BaseSmallStatement] = []
        after: list[cst.BaseSmallStatement] = []
        for statement in original.body:
            if isinstance(statement, cst.AugAssign) and isinstance(statement.target, cst.Name):
                name = cst.Name(statement.target.value)
                for what, where in (("target", before), ("result", after)):
                    key = cst.Arg(cst.Integer(str(self.keys.of(self.function, statement, what))))
                    where.append(cst.Expr(cst.Call(cst.Name(PROBE), [key, cst.Arg(name)])))
        if not before:
            return updated
        return updated.with_changes(body=[*before, *updated.body, *after])

    def _function(self, updated: cst.FunctionDef) -> cst.FunctionDef:
        number = cst.Arg(cst.Integer(str(self.function.key)))
        enter = cst.SimpleStatementLine([cst.Expr(cst.Call(cst.Name(ENTER), [number]))])
        leave = cst.SimpleStatementLine([cst.Expr(cst.Call(cst.Name(LEAVE), [number, cst.Arg(cst.Name("None"))]))])
        statements = updated.body.body
        body: Any = updated.body
        if isinstance(body, cst.SimpleStatementSuite):
            statements = [cst.SimpleStatementLine(body.body)]
            body = cst.IndentedBlock(statements)
        return updated.with_changes(body=body.with_changes(body=[enter, *statements, leave]), decorators=[])


def instrumented(function: Function, keys: Keys) -> CodeType | None:
    """Return the function's code with probes; None where it cannot have the same free variables."""
    tree = function.tree.visit(_Instrument(function, keys))
    assert isinstance(tree, cst.FunctionDef)
    free = function.code.co_freevars
    scope = function.code.co_qualname.split("<locals>.")[-1].split(".")
    inner = textwrap.indent(cst.Module([tree]).code, "        ")
    around = f"def around({', '.join(v for v in free if v != '__class__')}):\n    class {(scope[-2:-1] or ['_'])[0]}:\n"
    try:
        compiled = compile(around + inner, function.code.co_filename, "exec", dont_inherit=True)
    except SyntaxError as error:  # ours: the source was parsed
        raise MHCError("MHC701", f"{function.code.co_qualname}: {error}") from error
    for code in _nested(compiled):
        if code.co_name == function.code.co_name and code.co_freevars == free:
            return code.replace(co_qualname=function.code.co_qualname)
    return None


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


@contextmanager
def probes(functions: Sequence[Function], keys: Keys, probe: Callable[[int, Any], Any] = _probe) -> Iterator[None]:
    """Put the functions' codes with probes in place meanwhile, which call `probe(key, value)`."""
    helpers = {PROBE: probe, ENTER: _enter, LEAVE: _leave}
    codes = {f.code: code for f in functions if (code := instrumented(f, keys)) is not None}
    objects = [(thing, f.code) for f in functions for thing in f.objects if f.code in codes]
    try:
        for thing, code in objects:
            thing.__globals__.update(helpers)
            thing.__code__ = codes[code]
        yield
    finally:
        for thing, code in objects:
            thing.__code__ = code
            for name in helpers:
                thing.__globals__.pop(name, None)
