"""Write passes as text and read them back: `normalize,residual,widen,fuse{kinds=boundary,read},lower`.

Options are the fields of the pass's dataclass, separated by spaces; those at their default are left out. Items of a
tuple are separated by commas; text that would be read otherwise is written as a JSON string.
"""

from __future__ import annotations

import inspect
import json
import re
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.installed import installed_names, load_installed
from mhc_compile.passes.base import Pass

GROUP = "mhc_compile.passes"
"""The group of entry points in which installed packages name their passes."""

_QUOTED = r'"(?:\\.|[^"\\])*"'
_PASS = re.compile(rf"\s*([\w.-]+)\s*(?:\{{((?:{_QUOTED}|[^\"{{}}])*)\}})?\s*(,|$)")
_ITEM = rf'(?:{_QUOTED}|[^\s"{{}},]*)'
_OPTION = re.compile(rf"\s*(\w+)=({_ITEM}(?:,{_ITEM})*)(?=\s|$)\s*")
_BARE = re.compile(r"(?!(?:true|false|none|nan|inf|[+-]?[\d.]+(?:e[+-]?\d+)?)$)[\w./+-]+")


def describe(step: Pass) -> str:
    """Return the pass with the options that are not at their default: `fuse{kinds=boundary}`."""
    values = {f: getattr(step, f.name) for f in fields(step)}  # type: ignore[arg-type]
    options = [f"{f.name}={_write(value)}" for f, value in values.items() if value != _default(f)]
    return f"{step.name}{{{' '.join(options)}}}" if options else step.name


def parse(text: str, built_in: dict[str, type[Any]]) -> tuple[Pass, ...]:
    """Return the passes that `text` names: those `built_in`, or those of installed packages.

    Raises MHC240 for text of another form, a pass that is unknown, and options that it does not have.
    """
    steps: list[Pass] = []
    position, separator = 0, ","
    while separator:
        match = _PASS.match(text, position)
        if match is None:
            raise MHCError("MHC240", f"{text[position:]!r} is no pass, written NAME or NAME{{OPTION=VALUE ...}}")
        name, options, separator = match.groups()
        steps.append(_made(_class_of(name, built_in), options or ""))
        position = match.end()
    return tuple(steps)


def _class_of(name: str, built_in: dict[str, type[Any]]) -> type[Any]:
    """Return the class of the pass `name`; a package is imported only if its pass is named."""
    if name in built_in:
        return built_in[name]
    installed = installed_names(GROUP)
    if name not in installed:
        raise MHCError("MHC240", f"there is no pass {name!r}; known: {', '.join([*built_in, *installed])}")
    cls, place = load_installed(GROUP, name, "MHC240")
    is_pass = isinstance(cls, type) and is_dataclass(cls) and callable(getattr(cls, "apply", None))
    if not is_pass or getattr(cls, "name", None) != name:
        raise MHCError("MHC240", f"{place} is no frozen dataclass with a method `apply` and the name {name!r}")
    return cls


def _made(cls: type[Any], text: str) -> Pass:
    kinds = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    values: dict[str, Any] = {}
    position = 0
    while text[position:].strip():
        match = _OPTION.match(text, position)
        if match is None:
            raise MHCError("MHC240", f"{cls.name}: {text[position:].strip()!r} is no OPTION=VALUE")
        name, value = match.groups()
        if name not in known:
            raise MHCError("MHC240", f"{cls.name} has no option {name!r}; known: {', '.join(sorted(known)) or 'none'}")
        try:
            values[name] = _read(value, kinds[name])
        except ValueError:
            kind = inspect.formatannotation(kinds[name])
            raise MHCError("MHC240", f"{cls.name}: {name}={value} is none of {kind}") from None
        position = match.end()
    missing = [f.name for f in fields(cls) if f.name not in values and _default(f) is MISSING]
    if missing:
        raise MHCError("MHC240", f"{cls.name} needs the option {missing[0]!r}")
    step: Pass = cls(**values)
    return step


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_write, value))
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _read(text: str, kind: Any) -> Any:
    """Return the value of type `kind` that `text` stands for. Raises ValueError where it stands for none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return tuple(_read(part, arguments[0]) for part in re.findall(_ITEM, text) if part)
    if origin in (Union, UnionType):
        for one in sorted(arguments, key=lambda k: k is str):  # every text is a str
            with suppress(ValueError):
                return _read(text, one)
    for value in _VALUES.get(kind, arguments if origin is Literal else ()):
        if _write(value) == text:
            return value
    if kind in (int, float):
        return kind(text)
    if kind is str:
        return json.loads(text) if text.startswith('"') else text
    raise ValueError(text)


_VALUES: dict[Any, tuple[Any, ...]] = {bool: (True, False), NoneType: (None,)}
