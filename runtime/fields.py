"""Dataclasses as tables of a TOML file: values checked by their types, and every field described by its docstring."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mhc_compile.diagnostics import MHCError

T = TypeVar("T")


@dataclass(frozen=True)
class Described:
    """One field as a user sees it."""

    section: str
    name: str
    values: str
    """What may be written, in words or as the words themselves."""
    default: str
    """As TOML spells it; empty where the field must be given, `-` where it may be left out and has no value then."""
    text: str
    """The field's docstring."""


def build(cls: type[T], section: str, given: Mapping[str, Any], *, aside: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls` from the table `given` of the section so named.

    Lists become tuples, whole numbers floats where the field is a float. `aside`: names of other sections' fields,
    `section.field`, which a misspelt name is compared with, too. Raises MHC601 for an unknown field and MHC602 for a
    missing one or one of another type.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise unknown(f"{section}.{name}", [*(f"{section}.{k}" for k in known), *aside])
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given:
            raise MHCError("MHC602", f"{section}.{f.name} is missing", way_out=f"write it under [{section}]")
    return cls(**{name: typed(f"{section}.{name}", value, hints[name]) for name, value in given.items()})


def unknown(name: str, known: Sequence[str]) -> MHCError:
    """MHC601 for `name`, with the nearest name known: that field elsewhere, one that begins so, or one alike."""
    section, _, last = name.rpartition(".")
    by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
    own = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    found = by_last.get(last) or next((k for short, k in own.items() if short.startswith(last)), None)
    for names in (own, by_last):
        found = found or next((names[short] for short in difflib.get_close_matches(last, list(names), n=1)), None)
    hint = f"; did you mean {found}?" if found else f"; known: {', '.join(own.values())}"
    return MHCError("MHC601", f"{name}{hint}")


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Raises MHC602, naming the field, where it is none of that type."""
    for option in _options(hint):
        converted = _as(value, option)
        if converted is not None:
            return converted[0]
    raise MHCError("MHC602", f"{name} = {_spell(value)}; wanted: {_words(hint)}")


def describe(cls: type[Any], section: str, *, leave_out: Iterable[str] = ()) -> list[Described]:
    """Every field of the dataclass `cls` but those in `leave_out`, in order."""
    hints, texts = get_type_hints(cls), docstrings(cls)
    found = []
    for f in fields(cls):
        if f.name not in leave_out:
            default = "" if f.default is MISSING else "-" if f.default is None else _spell(f.default)
            found.append(Described(section, f.name, _words(hints[f.name]), default, texts.get(f.name, "")))
    return found


def docstrings(cls: type[Any]) -> dict[str, str]:
    """The text under each field of a class, its lines joined."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[statement.target.id] = " ".join(text.value.split())
    return found


def _options(hint: Any) -> list[Any]:
    """The members of a union, those of nested ones too, without None; a plain type alone."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) if part is not type(None) for option in _options(part)]
    return [hint]


def _as(value: Any, hint: Any) -> tuple[Any] | None:
    """`value` as the plain type `hint`, in a tuple of one; None where it is not of that type."""
    origin = get_origin(hint)
    if origin is Literal:
        # True == 1: the type counts.
        return (value,) if any(value == w and type(value) is type(w) for w in get_args(hint)) else None
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return None
        parts = get_args(hint)
        parts = (parts[0],) * len(value) if len(parts) == 2 and parts[1] is ... else parts
        if len(parts) != len(value):
            return None
        converted = [
            next(filter(None, (_as(v, o) for o in _options(p))), None) for v, p in zip(value, parts, strict=True)
        ]
        return None if None in converted else (tuple(c[0] for c in converted if c is not None),)
    if isinstance(value, bool):
        return (value,) if hint is bool else None
    if hint is float and isinstance(value, int | float):
        return (float(value),)
    return (value,) if isinstance(hint, type) and isinstance(value, hint) else None


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _words(hint: Any) -> str:
    """What may be written for a type."""
    found = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            found += [_spell(w) for w in get_args(option)]
        elif get_origin(option) is tuple:
            parts = get_args(option)
            many = len(parts) == 2 and parts[1] is ...
            inner = " or ".join(_WORDS[p].removeprefix("a ") for p in _options(parts[0]))
            found.append(f"a list of {inner}s" if many else f"{len(parts)} {inner}s in a list")
        else:
            found.append(_WORDS[option])
    return " | ".join(found)


def _spell(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spell, value))}]"
    return str(value)
