"""Find what installed packages add: the objects that they name in groups of entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from mhc_compile.diagnostics import MHCError


def installed_names(group: str) -> list[str]:
    """Return the names that installed packages give in a group."""
    return sorted(entry_points(group=group).names)


def load_installed(group: str, name: str, code: str) -> tuple[Any, str]:
    """Import what a package names `name`, which `installed_names` has; return it and where it is written.

    Raises `code` where it cannot be imported.
    """
    point = entry_points(group=group)[name]
    try:
        return point.load(), point.value
    except (ImportError, AttributeError) as error:
        raise MHCError(code, f"{name} is {point.value}, which cannot be imported: {error}") from error
