"""What an over-encoding is made of, as a user chooses it, and what follows for one owner's embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.overencoding import overencoding_spec
from mhc_compile.kernels.memory.spec import OverEncodingSpec

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
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise MHCError("MHC220", f"over-encoding: {name}={value!r}; an integer from {least} to {most}")


@dataclass(frozen=True, kw_only=True)
class OverEncoding:
    """The over-encoding of one owner's embedding. Raises MHC220 where C is too small for the tables."""

    hash: OverEncodingSpec
    hidden: int
    """C, the channels of the embedding."""

    def __post_init__(self) -> None:
        if self.width < 1:
            wanted = self.hash.order * self.hash.heads
            raise MHCError("MHC220", f"over-encoding: {self.hidden} channels cannot be divided by n k = {wanted}")

    @property
    def width(self) -> int:
        """C / (n k), the channels of a row."""
        return self.hidden // (self.hash.order * self.hash.heads)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"hash": str(self.hash), "hidden": self.hidden}

    @classmethod
    def parse(cls, held: Mapping[str, Any]) -> OverEncoding:
        """The inverse of `plain`. Raises MHC220, KeyError, TypeError or ValueError for what is none."""
        return cls(hash=OverEncodingSpec.parse(str(held["hash"])), hidden=int(held["hidden"]))


def over_encoding_of(settings: OverEncodingSettings, *, vocab: int, hidden: int) -> OverEncoding:
    """The over-encoding that `settings` ask for of an embedding [V, C]. Raises MHC220 where it cannot be."""
    spec = overencoding_spec(vocab, settings.rows, order=settings.order, heads=settings.heads)
    return OverEncoding(hash=spec, hidden=hidden)
