"""Summarise what repeats from layer to layer: `layers.0-95#1` for 96 names."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?![A-Za-z_\d])")


def fold(items: Sequence[T], name: Callable[[T], str], alike: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    """Group items whose names differ in one number only, in order of first appearance.

    Each group comes with its common name, the number replaced by its ranges. Which number that is, the layer's or one
    inside the layer, is chosen so that there are fewest groups.
    """
    most = max((len(_NUMBER.findall(name(item))) for item in items), default=0)
    return min((_grouped(items, name, alike, position) for position in range(max(most, 1))), key=len)


def _grouped(
    items: Sequence[T], name: Callable[[T], str], alike: Callable[[T], Hashable], position: int
) -> list[tuple[str, list[T]]]:
    groups: dict[tuple[str, str, Hashable], tuple[list[int], list[T]]] = {}
    for item in items:
        before, number, after = _split(name(item), position)
        numbers, members = groups.setdefault((before, after, alike(item)), ([], []))
        members.append(item)
        numbers += [int(number)] if number else []
    return [(f"{before}{ranges(numbers)}{after}", members) for (before, after, _), (numbers, members) in groups.items()]


def _split(text: str, position: int) -> tuple[str, str, str]:
    """Return what stands before a number, the number, and what stands after it; all is before where there is none."""
    match = next(islice(_NUMBER.finditer(text), position, None), None)
    return (text, "", "") if match is None else (text[: match.start()], match[0], text[match.end() :])


def ranges(numbers: Sequence[int]) -> str:
    """Return `0-3,7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
