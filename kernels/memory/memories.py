"""Everything that one stream owner looks up, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhc_compile.kernels.memory.engram import Memory
from mhc_compile.kernels.memory.overencoding_settings import OverEncoding
from mhc_compile.kernels.memory.spec import TableSpec
from mhc_compile.kernels.memory.ultramem_settings import UltraMem


@dataclass(frozen=True, kw_only=True)
class Memories:
    """The memories of one owner, of every kind one at most."""

    engram: Memory | None = None
    """N-grams of ids, at chosen layers."""
    over_encoding: OverEncoding | None = None
    """N-grams of ids, at the embedding."""
    ultramem: UltraMem | None = None
    """Values looked up by content."""

    @property
    def kinds(self) -> dict[str, Memory | OverEncoding | UltraMem]:
        """Those that are there, by field."""
        every = {"engram": self.engram, "over_encoding": self.over_encoding, "ultramem": self.ultramem}
        return {name: one for name, one in every.items() if one is not None}

    @property
    def tables(self) -> dict[str, TableSpec]:
        """All tables, by the name that marks and files have for them."""
        return {name: table for one in self.kinds.values() for name, table in one.tables.items()}

    def plain(self) -> dict[str, Any]:
        """Return those that are there as JSON has them; an Engram is called `memory` there."""
        return {"memory" if name == "engram" else name: one.plain() for name, one in self.kinds.items()}

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Memories:
        """Return the inverse of `plain`, of a mapping that may hold other fields, too.

        Raises MHC220, KeyError, TypeError or ValueError for invalid content.
        """
        return cls(
            engram=Memory.parse(fields["memory"]) if "memory" in fields else None,
            over_encoding=OverEncoding.parse(fields["over_encoding"]) if "over_encoding" in fields else None,
            ultramem=UltraMem.parse(fields["ultramem"]) if "ultramem" in fields else None,
        )


NONE = Memories()
"""Nothing is looked up."""
