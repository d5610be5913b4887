"""The page inside a notebook: a frame that holds it, without what would make the notebook's file large."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import TYPE_CHECKING

from mhc_compile.report.page.page import page

if TYPE_CHECKING:
    from mhc_compile.report.report import Report

LARGEST = 2_000_000
"""Characters of a page that a notebook keeps whole."""


def frame(report: Report) -> str:
    """Return the page as an HTML fragment in a frame of its own, which shares nothing with the notebook.

    Pages above `LARGEST` characters come without code (the drawing, figures, passes and diagnostics stay) and say so.
    """
    text = page(report)
    if len(text) > LARGEST:
        passes = tuple(replace(step, code=()) for step in report.passes)
        kernels = tuple(replace(kernel, forward="", backward="") for kernel in report.kernels)
        text = page(replace(report, lines=(), captured=(), passes=passes, kernels=kernels))
    # In single quotes: the double ones of JSON, one character in ten, stay as they are.
    document = text.replace("&", "&amp;").replace("'", "&#39;")
    title = html.escape(f"Report of {report.model}")
    style = "width: 100%; height: 44rem; border: 1px solid #8884; border-radius: 8px"
    return f'<iframe title="{title}" sandbox="allow-scripts" style="{style}" srcdoc=\'{document}\'></iframe>'
