"""The API reference, rendered by the command in docs/api.md."""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mhc_compile

PAGE = Path(__file__).parent.parent / "docs" / "api.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rendered reference; nothing in it made pdoc warn."""
    command = re.search(r"^pdoc (.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert command is not None
    folder = tmp_path_factory.mktemp("reference")
    words = command[1].replace("\\\n", "").split()
    done = subprocess.run([sys.executable, "-m", "pdoc", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    return folder / "site"


def plain(markup: str) -> str:
    """Markup as the text that one reads."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def test_every_public_name_is_there_with_its_docstring(site: Path) -> None:
    page = (site / "mhc_compile.html").read_text(encoding="utf-8")
    for name in mhc_compile.__all__:
        begin = page.index(f'<section id="{name}">')
        shown = plain(page[begin : page.index("</section>", begin)])
        sentence = " ".join((inspect.getdoc(getattr(mhc_compile, name)) or "").split("\n\n")[0].split())
        assert sentence
        assert sentence.replace("`", "") in shown, name


def test_every_module_of_the_table_has_a_page(site: Path) -> None:
    modules = set(re.findall(r"`(mhc_compile[\w.]*)`", PAGE.read_text(encoding="utf-8")))
    assert len(modules) > 10
    for module in modules:
        assert (site / f"{module.replace('.', '/')}.html").exists(), module


def test_formulas_are_no_emphasis(site: Path) -> None:
    for page in site.rglob("*.html"):
        for emphasised in re.findall(r"<em>(.*?)</em>", page.read_text(encoding="utf-8"), re.DOTALL):
            assert re.fullmatch(r"[\w ]+", emphasised), f"{page.stem}: {emphasised!r} stood between two asterisks"
