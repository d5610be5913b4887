"""The specifications of memories that ops carry as text: how ids are hashed, and how rows enter the streams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

from mhc_compile.diagnostics import MHCError

_BEYOND = 1 << 63


def is_int(value: Any) -> bool:
    """Return whether `value` is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_ranges(settings: Any, ranges: Mapping[str, tuple[int, int]], prefix: str = "") -> None:
    """Raise MHC220 for a field that is not an integer from the least to the most in `ranges`."""
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if not is_int(value) or not least <= value <= most:
            raise MHCError("MHC220", f"{prefix}{name}={value!r}; an integer from {least} to {most}")


class _Text:
    """A dataclass whose text is `field=value ...`; made once, because Dynamo can read the text and not trace this."""

    _text: ClassVar[str]

    def __post_init__(self) -> None:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        object.__setattr__(self, "_text", " ".join(f"{name}={_plain(v)}" for name, v in values))

    def __str__(self) -> str:
        return self._text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the inverse of `str`. Raises MHC220 for text that is not `field=value ...` of all fields."""
        parsed: Any = _parsed
        return parsed(cls, text)


class _Hashed(_Text):
    """Hashes into one table with the rows of every order and head, one after the other."""

    moduli: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first row of every order and head."""
        return (0, *itertools.accumulate(self.moduli[:-1]))

    @property
    def rows(self) -> int:
        """Rows of the table that can be hit."""
        return sum(self.moduli)


@dataclass(frozen=True, kw_only=True)
class HashSpec(_Hashed):
    """How one layer hashes n-grams of ids (arXiv 2601.07372, section 2): int64 with wraparound.

    For order k and head j: `mix_k = XOR_{i<k} x[t-i] * multipliers[i]`, `row = mix_k mod moduli[k, j] + offset`, where
    the offsets are the exclusive cumulative sums of `moduli`, order-major, then head.
    """

    multipliers: tuple[int, ...]
    """m, one a position of the n-gram: N of them, for the orders 2..N."""
    moduli: tuple[int, ...]
    """p, of all orders and heads, order-major: (N - 1) * K of them."""
    fill: int
    """The id that stands where an n-gram reaches back too far."""

    def __post_init__(self) -> None:
        if len(self.multipliers) < 2 or not self.moduli or len(self.moduli) % (len(self.multipliers) - 1):
            detail = f"{len(self.moduli)} moduli for {len(self.multipliers)} multipliers"
            raise MHCError("MHC220", detail)
        if min(self.moduli) < 1:
            raise MHCError("MHC220", f"modulus {min(self.moduli)}")
        if sum(self.moduli) >= _BEYOND or any(not -_BEYOND <= x < _BEYOND for x in (*self.multipliers, self.fill)):
            raise MHCError("MHC220", "rows, multipliers and fill must fit in 64 bits")
        super().__post_init__()

    @property
    def order(self) -> int:
        """N, the longest n-gram."""
        return len(self.multipliers)

    @property
    def heads(self) -> int:
        """K, heads an order."""
        return len(self.moduli) // (self.order - 1)


@dataclass(frozen=True, kw_only=True)
class OverEncodingSpec(_Hashed):
    """How Over-Encoding hashes n-grams of ids (arXiv 2501.16975): as numbers to the base V, modulo the tables' sizes.

    Raises `MHCError` MHC220 for sizes that cannot hash n-grams of the vocabulary.
    """

    vocab: int
    """V, the base."""
    order: int = 3
    """n, the longest n-gram."""
    moduli: tuple[int, ...]
    """m_ij, order-major: distinct, and coprime with V, or the earlier tokens of an n-gram would not tell rows apart."""

    def __post_init__(self) -> None:
        if self.vocab < 1 or self.order < 2 or not self.moduli or len(self.moduli) % (self.order - 1):
            raise MHCError("MHC220", f"{len(self.moduli)} tables for orders 2 to {self.order} of {self.vocab} ids")
        if min(self.moduli) < 1 or len(set(self.moduli)) < len(self.moduli):
            raise MHCError("MHC220", f"moduli {self.moduli} are not positive and distinct")
        if common := [m for m in self.moduli if math.gcd(m, self.vocab) != 1]:
            raise MHCError("MHC220", f"modulus {common[0]} has a divisor in common with {self.vocab}")
        if max(self.moduli) * self.vocab >= _BEYOND:  # (m - 1) * V + V - 1 is the largest number on the way
            raise MHCError("MHC220", f"modulus {max(self.moduli)} is too large for {self.vocab} ids in 64 bits")
        super().__post_init__()

    @property
    def heads(self) -> int:
        """k, tables an order."""
        return len(self.moduli) // (self.order - 1)


@dataclass(frozen=True, kw_only=True)
class FusionSpec(_Text):
    """How a memory enters the streams (arXiv 2601.07372, section 3; `math` of the gate and of the convolution)."""

    dilation: int = 0
    """Of the causal depthwise convolution: N, the longest n-gram. 0: no convolution."""
    taps: int = 4
    """Of the convolution's kernel."""
    signed_root: bool = True
    """`sign(s) * sqrt(max(|s|, 1e-6))` under the sigmoid, as released systems do; False: `s`, as in the paper."""
    eps: float = 1e-6
    """Added to the mean square in the three RMS norms."""

    @property
    def history(self) -> int:
        """Earlier tokens that the convolution reads: (taps - 1) * dilation."""
        return (self.taps - 1) * self.dilation


@dataclass(frozen=True, kw_only=True)
class ContentSpec(_Text):
    """How one layer looks values up by content (arXiv 2411.12364): of n^2 virtual values, by n rows and n columns.

    The virtual value of row i and column j has the number v = `(i * n + j) * multiplier mod n^2`. It is the row `(v mod
    reach + offset) mod rows` of the table, in the group `v div reach`.
    """

    top: int
    """k, rows and columns that a head keeps, and values that it reads."""
    multiplier: int
    """Coprime with n."""
    reach: int
    """Rows of the table that the layer reaches: n^2 / `groups`."""
    offset: int
    """The first row of the table that the layer reaches."""
    rows: int
    """The number of rows of the table."""
    groups: int
    """E, virtual values a row."""
    input: int
    """The first channels of a row, by which its scores are multiplied; 0: none."""
    eps: float
    """Added to the variance in the norms of queries and keys."""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table of an owner."""

    place: str
    """The module below the owner's parameters that holds it."""
    rows: int
    width: int
    """Channels of a row."""
    found_by: str
    """The text of the specification by which rows are found, which files are compared with."""
    reads: int
    """Rows that a token reads."""
    shown: str
    """How rows are found, for reports: `2..3 x 8` n-grams and hashes, or `16 of 256^2 x 1` pairs and heads."""


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else repr(value)


@lru_cache(maxsize=256)
def _parsed(cls: Any, text: str) -> Any:
    parts = dict(part.split("=", 1) for part in text.split() if "=" in part)
    known = {f.name: f.type for f in fields(cls)}
    if set(parts) != set(known):
        raise MHCError("MHC220", f"{text!r} does not name {', '.join(known)}")
    read: dict[str, Any] = {
        "tuple[int, ...]": lambda v: tuple(int(x) for x in v.split(",")),
        "int": int,
        "float": float,
        "bool": lambda v: bool(int(v)),
    }
    try:
        return cls(**{name: read[str(kind)](parts[name]) for name, kind in known.items()})
    except ValueError as error:
        raise MHCError("MHC220", f"{text!r}: {error}") from None
