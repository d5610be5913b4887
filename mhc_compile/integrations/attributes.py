"""Replace attributes of instances so that they can be put back, in a deep copy or an unpickled model as well."""

from __future__ import annotations

from typing import Any

_BEFORE = "_mhc_before"
"""An attribute of the instance: by name the value before as a tuple of one, or an empty tuple where there was none."""


def replace_attribute(instance: Any, name: str, value: Any) -> None:
    """Set an attribute in the dictionary of `instance`; `restore_attributes` undoes it."""
    attributes = vars(instance)
    attributes.setdefault(_BEFORE, {}).setdefault(name, (attributes[name],) if name in attributes else ())
    attributes[name] = value


def restore_attributes(instance: Any) -> None:
    """Undo every `replace_attribute` of `instance`."""
    attributes = vars(instance)
    for name, before in attributes.pop(_BEFORE, {}).items():
        if before:
            attributes[name] = before[0]
        else:
            attributes.pop(name, None)
