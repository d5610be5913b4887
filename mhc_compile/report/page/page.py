"""Write a report as one HTML file that needs nothing else: no network, no storage, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from mhc_compile.palette import HEAT_COLOURS

if TYPE_CHECKING:
    from mhc_compile.report.report import Report

FOLDER = Path(__file__).parent
# Every file declares what the later ones use: they are one script in the page.
SCRIPTS = (
    "dom", "report", "items", "probes", "diff", "drawing", "tree", "link", "export", "code", "comparison", "kernels",
    "detail", "overview", "search", "main",
)  # fmt: skip


def page(report: Report) -> str:
    """Return the report as a page.

    Its JSON is embedded to be parsed, never run, and every text of it is shown as text. A content security policy names
    the page's one script and one style by their hashes, and forbids everything else, including the network.
    """
    script = "\n".join(["(() => {", '"use strict";', *(_read(f"{name}.js") for name in SCRIPTS), "})();"])
    style = _read("page.css")
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; {_hashes(script, style)}"
    return Template(_read("page.html")).substitute(
        policy=policy,
        heat=" ".join(HEAT_COLOURS),
        title=html.escape(f"{report.model} - mhc-compile"),
        style=style,
        data=_embedded(replace(report, outputs=None).json()),
        script=script,
    )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hashes(script: str, style: str) -> str:
    named = (("script-src", script), ("style-src", style))
    return "; ".join(f"{rule} 'sha256-{_sha256(text)}'" for rule, text in named)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(text: str) -> str:
    """Escape the characters of JSON with which markup could begin: `</script>` in a source line ends nothing."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
