"""Summarise what repeats from layer to layer: `layers.0-95#1` for 96 names."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?![A-Za-z_\d])")


def fold(items: Sequence[T], name: Callable[[T], str], alike: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    """Groups of items that differ in one number of their names alone, in order of first appearance.

    Each group comes with its common name, the number replaced by its ranges. Which number that is, the layer's or one
    inside the layer, is chosen so that there are fewest groups.
    """
    most = max((len(_NUMBER.findall(name(i))) for i in items), default=0)
    candidates = [_grouped(items, name, alike, position) for position in range(most)] or [
        [(name(i), [i]) for i in items]
    ]
    return min(candidates, key=len)


def _grouped(
    items: Sequence[T], name: Callable[[T], str], alike: Callable[[T], Hashable], position: int
) -> list[tuple[str, list[T]]]:
    groups: dict[Hashable, tuple[list[int], list[T]]] = {}
    for item in items:
        template, number = _split(name(item), position)
        numbers, members = groups.setdefault((template, alike(item)), ([], []))
        members.append(item)
        if number is not None:
            numbers.append(number)
    return [(_joined(name(members[0]), position, numbers), members) for numbers, members in groups.values()]


def _split(text: str, position: int) -> tuple[str, int | None]:
    matches = list(_NUMBER.finditer(text))
    if position >= len(matches):
        return text, None
    match = matches[position]
    return f"{text[: match.start()]}\0{text[match.end() :]}", int(match[0])


def _joined(text: str, position: int, numbers: Sequence[int]) -> str:
    template, number = _split(text, position)
    return text if number is None else template.replace("\0", ranges(numbers))


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
