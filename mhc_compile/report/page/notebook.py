"""The page inside a notebook: a frame that holds it, without what would make the notebook's file large."""

from __future__ import annotations

import html
from typing import Any

from mhc_compile.report.page.page import page

LARGEST = 2_000_000
"""Characters of a page that a notebook keeps whole."""


def frame(data: dict[str, Any]) -> str:
    """`data` (of `Inspection.data()`) as an HTML fragment: the page in a frame of its own.

    The frame runs the page's script and shares nothing with the notebook. Pages above `LARGEST` characters come
    without code (the drawing, figures, passes and diagnostics stay) and say so.
    """
    text = page(data)
    if len(text) > LARGEST:
        text = page(without_code(data))
    # In single quotes: the double ones of JSON, one character in ten, stay as they are.
    held = text.replace("&", "&amp;").replace("'", "&#39;")
    title = html.escape(f"Report of {data['model']['name']}")
    style = "width: 100%; height: 44rem; border: 1px solid #8884; border-radius: 8px"
    return f'<iframe title="{title}" sandbox="allow-scripts" style="{style}" srcdoc=\'{held}\'></iframe>'


def without_code(data: dict[str, Any]) -> dict[str, Any]:
    """A copy without the graphs' lines and the kernels' sources."""
    passes = [step | {"code": []} for step in data["passes"]]
    kernels = [kernel | {"forward": "", "backward": ""} for kernel in data["kernels"]]
    return data | {"lines": [], "captured": [], "passes": passes, "kernels": kernels}
