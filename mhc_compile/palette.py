"""How figures look: one colour, line and marker per form in all of them, legends with values beside the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NEUTRAL = "#6b7680"
"""The colour of lines that stand for no form: zero, a conversion, a published range."""
HEAT = "viridis"
"""The colour map: brightness grows with the value, in grey too."""
HEAT_COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
"""Five colours of it at equal distances, for pages."""
_ORDER = ("#1d5c9c", "#d98200", "#2a8c66", "#7a3e9d", "#a1260d", "#4fa3c7", "#8a6d3b", "#c2558a")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "oxs^Dv+*"
_LOOKS: dict[str, tuple[str, Any, str]] = {
    "residual": (NEUTRAL, _DASHES[1], "s"),
    "mhc": (_ORDER[0], "-", "o"),
    "mhc from its published start": (_ORDER[5], _DASHES[1], "D"),
    "free": (_ORDER[4], _DASHES[2], "x"),
    "hc": (_ORDER[1], _DASHES[3], "^"),
    "engram": (_ORDER[3], _DASHES[1], "v"),
    "ultramem": (_ORDER[2], _DASHES[3], "+"),
    "both": (_ORDER[7], _DASHES[4], "*"),
    "hc_static": (_ORDER[6], _DASHES[4], "*"),
    "attnres": (_ORDER[7], _DASHES[1], "v"),
    "attnres_block": (_ORDER[3], _DASHES[2], "D"),
    "denseformer": (_ORDER[2], _DASHES[3], "+"),
    "mudd": (_ORDER[4], _DASHES[4], "x"),
    "value_residual": (_ORDER[5], _DASHES[2], "s"),
}
_OURS = "mhc"


def look(form: str, *, points: bool = False, nth: int = 0) -> dict[str, Any]:
    """Return what matplotlib's `plot` takes for a form: `residual`, `mhc`, `hc`, `free` (mHC whose H is free), ...

    mHC is drawn thicker and above the others. `points` adds markers; `nth` counts variants of one form, which share its
    colour and differ in their dashes. A form without a look of its own has one that follows from its name.
    """
    color, dashes, marker = _LOOKS.get(form) or _of_place(sum(form.encode()))
    ours = form == _OURS
    found = {
        "color": color,
        "linestyle": _DASHES[(_DASHES.index(dashes) + nth) % len(_DASHES)],
        "linewidth": 2.4 if ours else 1.5,
        "zorder": 3 if ours else 2,
    }
    return found | ({"marker": marker, "markersize": 5} if points else {})


def looks(forms: Sequence[str]) -> list[dict[str, Any]]:
    """Return the looks of forms with options after a colon (`mhc:streams=2`), which may name a form several times."""
    bases = [form.partition(":")[0] for form in forms]
    return [look(base, nth=bases[:i].count(base)) for i, base in enumerate(bases)]


def series(i: int, *, points: bool = False) -> dict[str, Any]:
    """Return the look of the `i`-th of several lines that are no forms: seeds, directions, tables."""
    color, dashes, marker = _of_place(i)
    return {"color": color, "linestyle": dashes, "linewidth": 1.5} | ({"marker": marker} if points else {})


def _of_place(i: int) -> tuple[str, Any, str]:
    return _ORDER[i % len(_ORDER)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)]


def finish(figure: Any, *, values: bool = True) -> None:
    """Give every axes of a figure with a constrained layout its legend beside it, and plain numbers.

    A legend has the lines from top to bottom as they end, with their last values (not without `values`); zero and
    other lines without a label have no entry.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if hasattr(axis.get_major_formatter(), "set_useOffset"):
                axis.get_major_formatter().set_useOffset(False)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        if not handles:
            continue
        ends = [_end(handle) if values else math.nan for handle in handles]
        order = sorted(range(len(ends)), key=lambda i: math.inf if math.isnan(ends[i]) else -ends[i])
        texts = [labels[i] if math.isnan(ends[i]) else f"{labels[i]}:  {ends[i]:.4g}" for i in order]
        axes.legend(
            [handles[i] for i in order], texts, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small",
            frameon=False, borderaxespad=0, handlelength=2.8,
        )  # fmt: skip


def _end(handle: Any) -> float:
    """Return the last value of a line, NaN for what is no line."""
    values = list(handle.get_ydata()) if hasattr(handle, "get_ydata") else []
    return float(values[-1]) if values else math.nan
