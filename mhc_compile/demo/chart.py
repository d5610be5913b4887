"""A chart of points over steps on a logarithmic axis, as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.text import Text

ROWS = 9
COLUMNS = 60


@dataclass(frozen=True)
class Series:
    """Values by step, with the sign and the style that mark them."""

    name: str
    sign: str
    style: str
    values: Mapping[int, float]


def chart(series: list[Series], steps: int) -> Text:
    """Return the series over `steps` steps; the axis reaches from 1 to the power of ten above every finite value."""
    finite = [v for s in series for v in s.values.values() if math.isfinite(v)]
    top = max(1, math.ceil(math.log10(max(finite, default=1.0)) - 1e-9))
    cells = [[Text(" ") for _ in range(COLUMNS)] for _ in range(ROWS)]
    for one in series:
        for step, value in one.values.items():
            height = math.log10(max(value, 1.0)) / top if math.isfinite(value) else 1.0
            column = round(step / max(1, steps) * (COLUMNS - 1))
            cells[_row(height)][column] = Text(one.sign, one.style)
    powers = {_row(power / top): power for power in range(0, top + 1, math.ceil(top / 4))}
    out = Text()
    for row, line in enumerate(cells):
        label = "" if row not in powers else f"{10 ** powers[row]:,}" if powers[row] < 5 else f"1e{powers[row]}"
        out.append(f"{label:>8} │", "dim").append_text(Text().join(line)).append("\n")
    out.append(f"{'':>8} └{'─' * COLUMNS}\n", "dim")
    out.append(f"{'':>10}{'step 0':<{COLUMNS - 10}}{f'step {steps}':>10}\n", "dim")
    out.append(" " * 10)
    for one in series:
        last = list(one.values.values())[-1:]
        out.append(f"{one.sign} {one.name}{f': {last[0]:,.4g}' if last else ''}   ", one.style)
    return out


def _row(height: float) -> int:
    """Return the row of a height between 0 and 1; the first is at the top."""
    return ROWS - 1 - round(height * (ROWS - 1))
