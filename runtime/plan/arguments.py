"""The flags of `mhc-compile plan --budget`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_GROUP = Group("A budget of parameters, without a recipe")


def _count(_: Any, tokens: Sequence[Any]) -> int:
    text = tokens[0].value
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text, re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except ValueError:
        count = 0
    if count <= 0:
        raise ValueError(f"{text!r} is no number of parameters (26B, 1.5e9, 300M)")
    return count


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget of sparse parameters, and what it is spent on."""

    budget: Annotated[int | None, Parameter(converter=_count)] = None
    """Sparse parameters: experts and memory (26B, 1.5e9)."""
    engram: str = "paper"
    """Orders, heads and widths of a row: paper, v41."""
    ultramem: str | None = None
    """Add UltraMem, which shares the memory's part: v1, v2."""
    hidden: int = 2560
    """Hidden size."""
    streams: int = 4
    """Residual streams."""
    layers: int | None = None
    """Layers with an Engram; default the preset's."""
    row_width: int | None = None
    """Values per row of Engram; default the preset's."""
    share: float | None = None
    """The fraction of the budget for the memory; default both ends of the published range."""
    ultramem_layers: int | None = None
    """Layers that read UltraMem; default the version's."""
    ultramem_share: float | None = None
    """The fraction of the budget for UltraMem; default half."""
