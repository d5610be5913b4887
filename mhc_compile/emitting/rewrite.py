"""Write the edits of a function into its source; everything else, comments and layout included, stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import libcst as cst
import torch

from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.changes import ADDS, Changes
from mhc_compile.emitting.edits import Edit
from mhc_compile.emitting.instrument import Function
from mhc_compile.emitting.naming import Names
from mhc_compile.emitting.syntax import within

AROUND = {"reduce": "reduce", "first": "first_stream"}


def rewritten(function: Function, edits: Changes, names: Names, base: str) -> cst.FunctionDef:
    """Return the function with its edits.

    `base` is how the file says the class that has the method; empty for a function that is no method.
    """
    tree = function.tree.visit(_Rewrite(function, edits, names, base))
    assert isinstance(tree, cst.FunctionDef)
    return tree


class _Rewrite(cst.CSTTransformer):
    def __init__(self, function: Function, edits: Changes, names: Names, base: str) -> None:
        super().__init__()
        self.function, self.edits, self.names, self.base = function, edits, names, base
        self.carries: dict[cst.CSTNode, cst.CSTNode] = {}
        """The operand that is the stream, by add."""
        for node, of_node in edits.items():
            for edit in of_node:
                if edit.kind == "carry" and edit.other is not None:
                    if edit.other in self.carries:
                        raise self._refuse("two operands of the add are the stream", edit.other)
                    self.carries[edit.other] = node

    def _refuse(self, detail: str, node: cst.CSTNode) -> Exception:
        return MHCError("MHC706", detail, source=self.function.line(node))

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        updated: Any = updated_node
        if original_node is self.function.tree:
            return self._function(original_node, updated)
        if isinstance(original_node, cst.Call) and _is_bare_super(original_node):
            updated = self._super(updated)
        edits: dict[str, Edit] = {e.kind: e for e in self.edits.get(original_node, ())}
        if isinstance(original_node, cst.AugAssign) and edits.keys() - {"add", "carry"}:
            return self._in_place(original_node, updated, edits)
        for kind in ADDS:
            if kind in edits:
                updated = getattr(self, f"_{kind}")(original_node, updated, edits[kind])
        for edit in self.edits.get(original_node, ()):
            if edit.kind == "pass_site":
                assert edit.keyword is not None
                site = cst.parse_expression(self._site(edit, original_node))
                updated = updated.with_changes(args=[*updated.args, _keyword(self.names.argument(*edit.keyword), site)])
        return self._around(original_node, updated, edits)

    def _around(self, original: cst.CSTNode, updated: Any, edits: Mapping[str, Edit]) -> Any:
        """Return what stands in place of an expression that is the stream, or what is put before a statement."""
        if "expand" in edits:
            updated = _call("expand", updated, cst.Name("STREAMS"))
        if "state" in edits:
            updated = cst.NamedExpr(cst.Name("mhc_streams"), updated, lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        if "read" in edits:
            updated = _call(f"{self._site(edits['read'], original)}.aggregate", updated)
        for kind, function in AROUND.items():
            if kind in edits:
                updated = _call(function, updated)
        if "leave" in edits:
            updated = _call("leave", cst.parse_expression(self._site(edits["leave"], original)), updated)
        if "expand_before" in edits:
            name = edits["expand_before"].other
            assert isinstance(name, cst.Name)
            statement = cst.parse_statement(f"{name.value} = expand({name.value}, STREAMS)\n")
            lines = getattr(updated, "leading_lines", ())
            statement = statement.with_changes(leading_lines=lines)
            updated = cst.FlattenSentinel([statement, updated.with_changes(leading_lines=())])
        return updated

    def _in_place(self, original: cst.AugAssign, updated: Any, edits: Mapping[str, Edit]) -> cst.Assign:
        """Return `x = x * y` with its edits for `x *= y`."""
        operator = getattr(cst, type(original.operator).__name__.removesuffix("Assign"))()
        x = updated.target
        value = _parenthesised(updated.value)
        if each := next((edits[kind] for kind in ("each", "leave_each") if kind in edits), None):
            of_one = cst.Lambda(
                cst.Parameters([cst.Param(cst.Name("x"))]), cst.BinaryOperation(cst.Name("x"), operator, value)
            )
            first = [cst.parse_expression(self._site(each, original))] if each.kind == "leave_each" else []
            result: Any = _call(each.kind if first else "each_stream", *first, of_one, x)
        else:
            result = cst.BinaryOperation(self._around(original, x, edits), operator, value)
        return cst.Assign([cst.AssignTarget(original.target)], result)

    def _site(self, edit: Edit, original: cst.CSTNode) -> str:
        if edit.place is None:
            assert edit.argument is not None
            return self.names.argument(self.function, edit.argument)
        return self.names.expression(edit.place, edit.site_module, original)

    def _add(self, original: Any, updated: Any, edit: Edit) -> Any:
        carry = self.carries.get(original)
        if carry is None:
            raise self._refuse("no operand of the add is the stream", original)
        carried, branch = self._operands(original, updated, carry)
        arguments = [carried, branch] if edit.mixes_carry else [carried, branch, cst.Name("mhc_streams")]
        call = _call(f"{self._site(edit, original)}.distribute", *arguments)
        if isinstance(original, cst.AugAssign):
            return cst.Assign([cst.AssignTarget(original.target)], call)
        return call

    def _operands(self, original: Any, updated: Any, carry: cst.CSTNode) -> tuple[Any, Any]:
        """Return the operand that is the stream, and the other one."""
        if isinstance(original, cst.AugAssign) and isinstance(original.operator, cst.AddAssign):
            pair = (updated.target, updated.value)
            return pair if carry is original else pair[::-1]
        if isinstance(original, cst.BinaryOperation) and isinstance(original.operator, cst.Add):
            pair = (updated.left, updated.right)
            return pair if within(carry, original.left) else pair[::-1]
        if isinstance(original, cst.Call) and (operands := self._call_operands(original, updated, carry)) is not None:
            return operands
        raise self._refuse("an add in another spelling", original)

    def _call_operands(self, original: cst.Call, updated: Any, carry: cst.CSTNode) -> tuple[Any, Any] | None:
        """Return the operands of `torch.add(x, y, alpha=a)`, `torch.addcmul(x, y, z, value=a)` and of their methods."""
        if not isinstance(original.func, cst.Attribute) or any(a.star for a in original.args):
            return None
        values = [
            (a.keyword.value if a.keyword else "", a.value, new.value)
            for a, new in zip(original.args, updated.args, strict=True)
        ]
        space = self.function.objects[0].__globals__
        if not (isinstance(original.func.value, cst.Name) and space.get(original.func.value.value) is torch):
            values.insert(0, ("", original.func.value, updated.func.value))
        factor = next((new for keyword, _, new in values if keyword in ("alpha", "value")), None)
        first, *others = [(old, new) for keyword, old, new in values if keyword not in ("alpha", "value")]
        name = original.func.attr.value
        if (name, len(others)) not in (("add", 1), ("addcmul", 2)):
            return None
        other = others[0][1] if name == "add" else _times(others[0][1], others[1][1])
        other = other if factor is None else _times(other, factor)
        if within(carry, first[0]):
            return first[1], other
        return (other, first[1]) if name == "add" and within(carry, others[0][0]) else None

    def _inner(self, original: Any, updated: Any, edit: Edit) -> Any:  # noqa: ARG002
        return self._operands(original, updated, self.carries[original])[1]

    def _tree(self, original: Any, updated: Any, edit: Edit) -> Any:
        assert isinstance(edit.other, cst.Name)
        rest = self._operands(original, updated, self.carries[original])[1] if original in self.carries else updated
        return _call(f"{self._site(edit, original)}.distribute", cst.Name(edit.other.value), rest)

    def _each(self, original: Any, updated: Any, edit: Edit) -> Any:
        return _call("each_stream", *self._apart(original, updated, edit))

    def _leave_each(self, original: Any, updated: Any, edit: Edit) -> Any:
        site = cst.parse_expression(self._site(edit, original))
        return _call("leave_each", site, *self._apart(original, updated, edit))

    def _apart(self, original: Any, updated: Any, edit: Edit) -> tuple[Any, Any]:
        """Return an expression as a function of one operand, and the operand."""
        operand = _same(original, updated, edit.other)
        inside = updated.deep_replace(operand, cst.Name("x"))
        return cst.Lambda(cst.Parameters([cst.Param(cst.Name("x"))]), inside), operand

    def _instance(self) -> str:
        parameters = self.function.tree.params
        return str([*parameters.posonly_params, *parameters.params][0].name.value)

    def _super(self, updated: cst.Call) -> cst.Call:
        """Return `super(Base, self)` for `super()`, which would find the method that is rewritten."""
        return updated.with_changes(
            args=[cst.Arg(cst.parse_expression(self.base)), cst.Arg(cst.Name(self._instance()))]
        )

    def _function(self, original: cst.FunctionDef, updated: cst.FunctionDef) -> cst.FunctionDef:
        if not self.base:
            updated = updated.with_changes(decorators=[])
        if arguments := self.names.arguments(self.function):
            parameters = updated.params
            star = parameters.star_arg if isinstance(parameters.star_arg, cst.Param) else cst.ParamStar()
            own = [*parameters.kwonly_params, *(cst.Param(cst.Name(name)) for name in arguments)]
            updated = updated.with_changes(params=parameters.with_changes(star_arg=star, kwonly_params=own))
        looped = [e.place for edits in self.edits.values() for e in edits if e.place is not None and e.place.count > 1]
        starts = dict.fromkeys(self.names.loop(place) for place in looped)
        statements = list(updated.body.body)
        at = int(original.get_docstring() is not None)
        statements[at:at] = [cst.parse_statement(line) for line in starts]
        return updated.with_changes(body=updated.body.with_changes(body=statements)) if starts else updated


def _is_bare_super(call: cst.Call) -> bool:
    return isinstance(call.func, cst.Name) and call.func.value == "super" and not call.args


def _call(function: str, *arguments: Any) -> cst.Call:
    args = [cst.Arg(_bare(a)) for a in arguments]
    return cst.Call(cst.parse_expression(function), args)


def _times(left: Any, right: Any) -> cst.BinaryOperation:
    return cst.BinaryOperation(_parenthesised(left), cst.Multiply(), _parenthesised(right))


def _parenthesised(node: Any) -> Any:
    if isinstance(node, (cst.Name, cst.Call, cst.Attribute, cst.Subscript, cst.Integer, cst.Float)) or node.lpar:
        return node
    return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def _bare(node: Any) -> Any:
    """Return an expression without the parentheses around it, if it is on one line."""
    bare = getattr(node, "lpar", None) and "\n" not in cst.Module([]).code_for_node(node)
    if bare and not isinstance(node, (cst.Tuple, cst.GeneratorExp, cst.NamedExpr)):
        return node.with_changes(lpar=node.lpar[1:], rpar=node.rpar[1:])
    return node


def _keyword(name: str, value: Any) -> cst.Arg:
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    return cst.Arg(value, keyword=cst.Name(name), equal=equal)


def _same(original: cst.CSTNode, updated: cst.CSTNode, node: Any) -> cst.CSTNode:
    """Return what stands in `updated` where `node` stands in `original`."""
    if original is node:
        return updated
    for a, b in zip(original.children, updated.children, strict=False):
        if within(node, a):
            return _same(a, b, node)
    raise AssertionError
