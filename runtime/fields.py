"""Dataclasses as tables of a TOML file: values checked by their types, and every field described by its docstring."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from docstring_parser import parse_from_object
from pydantic import TypeAdapter, ValidationError

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
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown(f"{section}.{name}", [*(f"{section}.{k}" for k in known), *aside])
    return checked(cls, section, values)


def checked(kind: Any, name: str, value: Any) -> Any:
    """Return `value`, as TOML gives it, as the type `kind`. Raises MHC602, naming the field, where it is of another."""
    try:
        # In JSON a list may become a tuple, and nothing else changes its type.
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] == "missing" and len(first["loc"]) == 1:
        raise MHCError("MHC602", f"{name}.{first['loc'][0]} is missing", way_out=f"write it under [{name}]")
    if isinstance(value, Mapping):
        field = str(first["loc"][0])
        name, value, kind = f"{name}.{field}", value[field], get_type_hints(kind, include_extras=True)[field]
    raise MHCError("MHC602", f"{name} = {_spell(value)}; wanted: {_wanted(TypeAdapter(kind).json_schema())}")


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


def describe(cls: type[Any], section: str, *, leave_out: Iterable[str] = ()) -> list[Described]:
    """Return every field of the dataclass `cls` but those in `leave_out`, in order."""
    described = []
    for name, field in schema(cls, leave_out=leave_out)["properties"].items():
        default = "" if "default" not in field else "-" if field["default"] is None else _spell(field["default"])
        described.append(Described(section, name, _wanted(field), default, field["description"]))
    return described


def schema(cls: type[Any], *, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of the dataclass `cls` without the fields in `leave_out`, docstrings as descriptions."""
    made = TypeAdapter(cls).json_schema()
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(cls).params}
    kept = {name: field for name, field in made["properties"].items() if name not in leave_out}
    properties = {
        name: {k: v for k, v in field.items() if k != "title"} | {"description": texts.get(name, "")}
        for name, field in kept.items()
    }
    required = {"required": made["required"]} if "required" in made else {}
    text = " ".join(made["description"].split("\n\n")[0].split())
    return {"type": "object", "description": text, "properties": properties, "additionalProperties": False} | required


_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
_KINDS = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false"}


def _wanted(field: Mapping[str, Any]) -> str:
    """Return what may be written for a field of a JSON schema, in words, with its bounds."""
    return ", ".join([_words(field), *(f"{words} {field[key]:g}" for key, words in _BOUNDS.items() if key in field)])


def _words(field: Mapping[str, Any]) -> str:
    """Return what may be written for a field of a JSON schema, in words, without bounds."""
    if "anyOf" in field:
        return " | ".join(_words(option) for option in field["anyOf"] if option != {"type": "null"})
    if "enum" in field or "const" in field:
        return " | ".join(map(_spell, field.get("enum", [field.get("const")])))
    if field["type"] == "array":
        items = field.get("prefixItems") or [field["items"]]
        inner = _words(items[0]).replace("a ", "", 1).replace(" | a ", " or ")
        return f"{len(items)} {inner}s in a list" if "prefixItems" in field else f"a list of {inner}s"
    return _KINDS[field["type"]]


def _spell(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spell, value))}]"
    return str(value)
