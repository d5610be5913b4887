"""Tables by number, which ops carry instead of the tables. The registry keeps no table alive."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from mhc_compile.memory.tables import MemoryTable

_TABLES: WeakValueDictionary[int, MemoryTable] = WeakValueDictionary()
_NUMBERS = itertools.count(1)


def enroll(table: MemoryTable) -> int:
    """Return a number for `table` that no other table of this process has had."""
    number = next(_NUMBERS)
    _TABLES[number] = table
    return number


def table_of(handle: int) -> MemoryTable:
    """Return the table of a number; raise LookupError if it was deleted."""
    table = _TABLES.get(handle)
    if table is None:
        raise LookupError(f"no table has the handle {handle}: the model that a compiled graph reads from is gone")
    return table


def tables() -> Iterator[MemoryTable]:
    """Return all tables of this process."""
    return iter(list(_TABLES.values()))
