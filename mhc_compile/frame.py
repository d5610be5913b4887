"""What Dynamo is compiling at this moment, read while a backend runs: the frame, its modules, how its graph ends."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

_NESTING = 3
"""How deep containers and bound arguments are searched for modules and tensors."""


def _frame() -> InstructionTranslatorBase:
    return InstructionTranslator.current_tx().output.root_tx


def own_module() -> nn.Module | None:
    """Return the module whose method the frame is: the first one among its arguments, or bound in its closure."""
    if resumed():
        # The variables of a resumed frame come in any order: take the outermost.
        local_modules = list(_modules_in(_frame().f_locals))
        inner = {id(part) for module in local_modules for part in module.modules() if part is not module}
        return next((m for m in local_modules if id(m) not in inner), None)
    passed, others, _ = arguments()
    # A decorator's closure holds the forward that it calls.
    wrapped = [v for v in others.values() if isinstance(v, (MethodType, functools.partial))]
    return next(_modules_in(passed), None) or next(_modules_in(wrapped), None)


def arguments() -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the frame's arguments, starred ones last, its other variables, and how many arguments are not starred."""
    code, variables = _frame().f_code, dict(_frame().f_locals)
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    plain = code.co_argcount + code.co_kwonlyargcount
    names = code.co_varnames[: plain + starred]
    return {name: variables.pop(name) for name in names if name in variables}, variables, plain


def _modules_in(value: Any, depth: int = _NESTING) -> Iterator[nn.Module]:
    """Yield the modules in containers, bound methods and partial functions."""
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        for part in parts_of(value):
            yield from _modules_in(part, depth - 1)


def parts_of(value: Any) -> tuple[Any, ...]:
    """Return what a container, a bound method or a partial function holds."""
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, dict):
        return tuple(value.values())
    return tuple(value) if isinstance(value, (tuple, list)) else ()


def modules() -> list[nn.Module]:
    """Return every module that the frame holds in a variable, and the module that the user compiled."""
    whole = compiled()
    return [*_modules_in(_frame().f_locals), *([whole] if isinstance(whole, nn.Module) else ())]


def traced_modules() -> dict[int, nn.Module]:
    """Return the modules that the trace has met so far, by id."""
    tracked = InstructionTranslator.current_tx().output.side_effects.id_to_variable
    values = {n: v.value for n, v in tracked.items() if isinstance(v, UnspecializedNNModuleVariable)}
    return {number: value for number, value in values.items() if isinstance(value, nn.Module)}


def guard_identity(module: nn.Module) -> None:
    """Have Dynamo trace anew for another module of the same class: this graph is to hold the streams of `module`."""
    variable = InstructionTranslator.current_tx().output.side_effects.id_to_variable.get(id(module))
    if variable is not None and variable.source is not None:
        install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))


def broke() -> str | None:
    """Return why and where Dynamo ended the current graph before the frame's end; None if it did not."""
    reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return None
    where = [f"\nFile {f.filename}, line {f.lineno}, in {f.name}" for f in reason.user_stack]
    return f"{reason.reason}{''.join(where)}"


def resumed() -> bool:
    """Return whether the frame is the rest of one whose graph broke before."""
    return str(_frame().f_code.co_name).startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


def compiled() -> nn.Module | Callable[..., Any] | None:
    """Return the module or function that the user compiled, found on the stack of callers."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"] == "torch._dynamo.eval_frame":
            fn = frame.f_locals["fn"]
            owner = fn.__self__ if isinstance(fn, MethodType) else None
            return owner if isinstance(owner, nn.Module) else fn
        frame = frame.f_back
    return None


def is_whole() -> bool:
    """Return whether the frame is all that the user compiled, not one of its parts."""
    if broke() or resumed():
        return False
    whole = compiled()
    if isinstance(whole, nn.Module):
        return own_module() is whole
    return getattr(whole, "__code__", None) is _frame().f_code
