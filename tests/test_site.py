"""The site, built as docs/api.md says: every link and anchor leads somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mhc_compile
from mhc_compile.diagnostics import TABLE

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; mkdocs warned of nothing, and the notebook ran."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    known = {name: value for name, value in os.environ.items() if not name.startswith("MHC_COMPILE_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    return folder


def plain(markup: str) -> str:
    """Markup as the text that one reads."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def test_every_public_name_is_there_with_its_docstring(site: Path) -> None:
    shown = plain((site / "reference/mhc_compile.html").read_text(encoding="utf-8"))
    for name in mhc_compile.__all__:
        sentence = " ".join((inspect.getdoc(getattr(mhc_compile, name)) or "").split("\n\n")[0].split())
        assert sentence
        assert sentence.replace("`", "") in shown, name


def test_every_module_of_the_table_has_a_page(site: Path) -> None:
    modules = set(re.findall(r"`(mhc_compile[\w.]*)`", (ROOT / "docs/api.md").read_text(encoding="utf-8")))
    assert len(modules) > 10
    for module in modules:
        assert (site / "reference" / f"{module}.html").exists(), module


def test_formulas_are_no_emphasis(site: Path) -> None:
    for page in (site / "reference").glob("*.html"):
        for emphasised in re.findall(r"<em>(.*?)</em>", page.read_text(encoding="utf-8"), re.DOTALL):
            assert re.fullmatch(r"[\w ]+", emphasised), f"{page.stem}: {emphasised!r} stood between two asterisks"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?(https?:[^\"' >]*)", text)
        loaded += re.findall(r"<link[^>]* rel=[\"']?(?:stylesheet|preconnect)[^>]*href=[\"']?(https?:[^\"' >]*)", text)
        assert not loaded, page
        assert 'class="mermaid"' not in text, "Mermaid's script would be loaded"


def test_search_finds_codes_and_the_front_page_is_the_readme(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    titles = {entry["title"] for entry in index["docs"]}
    assert {f"{code} {row.title}".replace("`", "") for code, row in TABLE.items()} <= {plain(title) for title in titles}
    assert "Give a Transformer several residual streams" in plain((site / "index.html").read_text(encoding="utf-8"))
    for figure in ("demo-light.svg", "demo-dark.svg"):
        assert f'"images/{figure}"' in (site / "index.html").read_text(encoding="utf-8")
        assert (site / "images" / figure).is_file()


def test_the_tour_shows_what_its_cells_print(site: Path) -> None:
    text = plain((site / "tour.html").read_text(encoding="utf-8"))
    assert re.search(r"largest difference: \de-0[678]", text)
    losses = [float(loss) for loss in re.findall(r" \d+ (\d\.\d{3})", text)]
    assert len(losses) >= 4
    assert losses[-1] < 0.5 * losses[0]
