"""Dataclasses as tables of a TOML file: values checked by their types, and every field described by its docstring."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import json
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


def build(cls: type[T], section: str, values: Mapping[str, Any], *, aside: Sequence[str] = ()) -> T:
    """Return an instance of the dataclass `cls` with the values of a section's table.

    Lists become tuples, whole numbers floats where the field is a float. `aside`: names of other sections' fields,
    `section.field`, which a misspelt name is compared with, too. Raises MHC601 for an unknown field and MHC602 for a
    missing one or one of another type.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown(f"{section}.{name}", [*(f"{section}.{k}" for k in known), *aside])
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise MHCError("MHC602", f"{section}.{f.name} is missing", way_out=f"write it under [{section}]")
    return cls(**{name: typed(f"{section}.{name}", value, hints[name]) for name, value in values.items()})


def unknown(name: str, known: Sequence[str]) -> MHCError:
    """Return MHC601 for `name`, with the nearest known name: that field elsewhere, a longer or a similar one."""
    section, _, field = name.rpartition(".")
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    here = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    nearest = anywhere.get(field) or next((k for short, k in here.items() if short.startswith(field)), None)
    for names, alike in ((here, 0.6), (anywhere, 0.8)):  # a field of another section must be very much alike
        close = difflib.get_close_matches(field, list(names), n=1, cutoff=alike)
        nearest = nearest or next((names[short] for short in close), None)
    hint = f"; did you mean {nearest}?" if nearest else f"; known: {', '.join(here.values())}"
    return MHCError("MHC601", f"{name}{hint}")


def typed(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`. Raises MHC602, naming the field, where it is of another type."""
    for option in _options(hint):
        converted = _as(value, option)
        if converted is not None:
            return converted[0]
    raise MHCError("MHC602", f"{name} = {_spell(value)}; wanted: {_words(hint)}")


def describe(cls: type[Any], section: str, *, leave_out: Iterable[str] = ()) -> list[Described]:
    """Return every field of the dataclass `cls` but those in `leave_out`, in order."""
    hints, texts = get_type_hints(cls), docstrings(cls)
    described = []
    for f in fields(cls):
        if f.name not in leave_out:
            default = "" if f.default is MISSING else "-" if f.default is None else _spell(f.default)
            described.append(Described(section, f.name, _words(hints[f.name]), default, texts.get(f.name, "")))
    return described


def docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the text under each field of a class, its lines joined."""
    texts: dict[str, str] = {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    for pair in itertools.pairwise(definition.body):  # type: ignore[attr-defined]
        match pair:
            case (ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text)))):
                texts[name] = " ".join(text.split())
    return texts


def _options(hint: Any) -> list[Any]:
    """Return the members of a union, nested ones flattened, without None; a plain type alone."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) if part is not type(None) for option in _options(part)]
    return [hint]


def _as(value: Any, hint: Any) -> tuple[Any] | None:
    """Return `value` as the plain type `hint`, in a tuple of one; None where it is not of that type."""
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
    """Return what may be written for a type, in words."""
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words += [_spell(w) for w in get_args(option)]
        elif get_origin(option) is tuple:
            parts = get_args(option)
            many = len(parts) == 2 and parts[1] is ...
            inner = " or ".join(_WORDS[p].removeprefix("a ") for p in _options(parts[0]))
            words.append(f"a list of {inner}s" if many else f"{len(parts)} {inner}s in a list")
        else:
            words.append(_WORDS[option])
    return " | ".join(words)


def _spell(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spell, value))}]"
    return str(value)
