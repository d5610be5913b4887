"""Settings of over-encodings, and what follows from them for one owner's embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.overencoding import overencoding_spec
from mhc_compile.kernels.memory.spec import OverEncodingSpec, TableSpec, check_ranges

ROOT = "over_encoding"
"""The module among the owner's parameters that holds `projection` [C, H * D], all W_ij side by side, and the table."""
TABLE = "over-encoding"
"""The table's name among the owner's tensors. No layer of a model, whose memory might be meant, has a hyphen."""

# At least, and at most.
_RANGES = {"order": (2, 16), "heads": (1, 256), "rows": (2, 1 << 48)}


@dataclass(frozen=True, kw_only=True)
class OverEncodingSettings:
    """Embeddings of n-grams beside those of tokens (arXiv 2501.16975). Raises `MHCError` MHC220 for other values."""

    order: int = 3
    """n: n-grams of 2 to n tokens."""
    heads: int = 4
    """k: tables an order. Each has rows of C / (n k) channels, rounded down."""
    rows: int = 12_800_000
    """m: the smallest table has the first number of rows from here on that is coprime with the vocabulary's size; the
    others take those that follow."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, "over-encoding: ")


@dataclass(frozen=True, kw_only=True)
class OverEncoding:
    """The over-encoding of one owner's embedding. Raises MHC220 where C is too small for the tables."""

    hash: OverEncodingSpec
    hidden: int
    """C, the channels of the embedding."""

    def __post_init__(self) -> None:
        if self.width < 1:
            parts = self.hash.order * self.hash.heads
            raise MHCError("MHC220", f"over-encoding: {self.hidden} channels cannot be divided by n k = {parts}")

    @property
    def width(self) -> int:
        """C / (n k), the channels of a row."""
        return self.hidden // (self.hash.order * self.hash.heads)

    @property
    def tables(self) -> dict[str, TableSpec]:
        """The one table, by its name."""
        h = self.hash
        reads, shown = len(h.moduli), f"2..{h.order} x {h.heads}"
        table = TableSpec(place=ROOT, rows=h.rows, width=self.width, found_by=str(h), reads=reads, shown=shown)
        return {TABLE: table}

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {"hash": str(self.hash), "hidden": self.hidden}

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> OverEncoding:
        """Return the inverse of `plain`. Raises MHC220, KeyError, TypeError or ValueError for invalid content."""
        return cls(hash=OverEncodingSpec.parse(str(content["hash"])), hidden=int(content["hidden"]))


def over_encoding_of(settings: OverEncodingSettings, *, vocab: int, hidden: int) -> OverEncoding:
    """Return the over-encoding of an embedding [V, C]. Raises MHC220 where it is not possible."""
    spec = overencoding_spec(vocab, settings.rows, order=settings.order, heads=settings.heads)
    return OverEncoding(hash=spec, hidden=hidden)
