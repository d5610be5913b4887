"""Report pages of models of other kinds: deep, refused, full of markup; and pages in notebooks."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import Opened, opened
from matplotlib.image import imread
from playwright.sync_api import Browser, expect
from report_pages import NAMED, Data, browser, choose, data, json_of, written  # noqa: F401
from tiny_models import Chain, ids, llama
from torch import Tensor, nn

import mhc_compile
from mhc_compile import Report
from mhc_compile.diagnostics import TABLE
from mhc_compile.report.page import notebook
from mhc_compile.report.page.page import page

# --- models of other kinds -------------------------------------------------------------------------------------------


@contextmanager
def deep(browser: Browser, data: Data, folder: Path, site: str) -> Iterator[Opened]:
    """The report of 96 equal layers: small, folded, and one of its sites found."""
    file = written(data, folder)
    assert file.stat().st_size < 10e6
    with opened(browser, file) as report:
        timing = "performance.getEntriesByType('navigation')[0].duration"
        print(f"{file.stat().st_size / 1e6:.1f} MB, opened in {report.page.evaluate(timing):.0f} ms")
        assert report.page.evaluate("document.querySelectorAll('*').length") < 1000
        group = report.page.locator(".item.group")
        expect(group).to_have_count(1)
        expect(group).to_contain_text("× 96")
        choose(report, site)
        expect(report.page.locator(".item[aria-selected=true] > .row")).to_be_in_viewport()
        expect(report.page.locator(".item.layer")).to_have_count(96)
        assert report.page.locator(".line.came").count() > 3
        yield report
        report.check()


@pytest.mark.slow
def test_ninety_six_layers(browser: Browser, tmp_path: Path) -> None:
    data = json_of(mhc_compile.inspect(Chain(depth=96), ids(), inner="eager"))
    with deep(browser, data, tmp_path, "layers.57#0") as report:
        report.page.keyboard.press("Home")
        # So much code waits until it is asked for, and comes in parts.
        expect(report.page.locator(".line")).to_have_count(0)
        report.page.get_by_role("button", name=re.compile("^Show the ")).click()
        assert 100 < report.page.locator(".line").count() <= 400
        report.page.get_by_role("button", name=re.compile("more lines: show the next")).click()
        assert report.page.locator(".line").count() > 400


@pytest.mark.slow
def test_a_llama_of_ninety_six_layers(browser: Browser, tmp_path: Path) -> None:
    """With `-s` it prints the page's size and how long it took to open."""
    with torch.device("meta"):
        model = llama(num_hidden_layers=96)
    with deep(browser, json_of(mhc_compile.inspect(model)), tmp_path, "layers.57#1") as report:
        report.page.keyboard.press("Home")
        report.page.locator("summary", has_text=re.compile(r"^\d+ parts$")).click()
        expect(report.page.get_by_role("rowheader", name="layers.57#0", exact=True)).to_be_visible()
        report.page.get_by_role("treeitem", name=re.compile("residual stream")).locator(".row").first.click()
        expect(report.page.get_by_role("button", name=re.compile("^Show the "))).to_be_visible()


def test_a_refused_model(browser: Browser, tmp_path: Path) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    found = mhc_compile.inspect(Forked(), torch.randn(2, 4))
    assert found.refusal is not None
    assert found.reach is not None
    with opened(browser, written(json_of(found), tmp_path)) as report:
        text = report.page.locator("#detail").inner_text()
        way_out = TABLE[found.refusal.code].way_out
        for part in ("refused", found.refusal.code, way_out, found.reach.reason, "self.a(x) + self.b(x)"):
            assert part in text
        choose(report, "a")
        expect(report.page.locator("#detail")).to_contain_text("linear(")
        report.check()


def test_a_model_that_breaks(browser: Browser, tmp_path: Path) -> None:
    found = mhc_compile.inspect(Chain(breaks="inside"), ids())
    with opened(browser, written(json_of(found), tmp_path)) as report:
        expect(report.page.locator(".diagnostic")).to_contain_text("MHC104")
        expect(report.page.locator(".diagnostic")).to_contain_text("tiny_models.py")
        report.check()


EVIL = (
    "</script ><img src=x onerror='window.hit=1'></script><script>window.hit=1</script>\"\\ <!-- <script &lt;b&gt; ]]>"
)


def spoiled(value: Any) -> Any:
    """Every text of a report with markup and script in it; what the page computes with stays."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [spoiled(v) for v in value]
    if isinstance(value, dict):
        kept = ("kind", "state", "severity", "device", "format")
        return {k: v if k in kept or (k == "name" and "code" in value) else spoiled(v) for k, v in value.items()}
    return value


def test_texts_never_run(browser: Browser, data: Data, tmp_path: Path) -> None:
    row = {"code": "MHC103", "title": "t", "detail": "d", "node": "n", "module": "m", "source": "s", "way_out": "w"}
    reach = dict.fromkeys(("module", "source", "reason"), "b")
    reach |= {"layers": ["a"], "sites": [], "node": "b", "dismissed": [["a", "b"]]}
    evil = spoiled(data | {"diagnostics": [row | {"severity": "error"}], "reach": reach})
    with opened(browser, written(evil, tmp_path)) as report:
        items = report.page.get_by_role("treeitem")
        while (folded := report.page.locator(".item[aria-expanded=false] > .row")).count():
            folded.first.click()
        for i in range(items.count()):
            items.nth(i).locator(".row").first.click()
            while (folded := report.page.locator(".item[aria-expanded=false] > .row")).count():
                folded.first.click()
            if (line := report.page.locator(".line").first).count():
                line.click()
        choose(report, f"{NAMED}{EVIL}")
        expect(report.page.get_by_role("heading", level=2)).to_contain_text(f"{NAMED}{EVIL}")
        for summary in report.page.locator("summary").all():
            summary.click()
        assert report.page.evaluate("window.hit") is None
        assert report.page.locator("img").count() == 0
        assert report.page.locator("script").count() == 2
        report.check()


# --- notebooks and pictures ------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_page(browser: Browser, tmp_path: Path) -> None:
    found = mhc_compile.inspect(mhc_compile.convert(Chain(), ids(), inner="eager"), ids(), inner="eager")
    shown = found._repr_mimebundle_()
    assert shown["text/plain"] == str(found)
    file = tmp_path / "cell.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{shown['text/html']}", encoding="utf-8")
    with opened(browser, file) as cell:
        frame = cell.page.frame_locator("iframe")
        expect(frame.get_by_role("heading", level=1)).to_have_text("Chain")
        frame.locator(".item.layer .row").first.click()
        expect(frame.locator(".item.site").first).to_be_visible()
        expect(frame.locator(".line").first).to_be_attached()
        # The frame shares nothing with the notebook around it.
        inside = cell.page.frames[1]
        assert (
            inside.evaluate("(() => { try { return parent.document.title; } catch { return 'apart'; } })()") == "apart"
        )
        assert cell.errors == []


def test_a_large_report_comes_to_a_notebook_without_code(
    browser: Browser, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "LARGEST", 1000)
    report = Report.of(data)
    small, whole = notebook.frame(report), page(report)
    assert len(small) < 0.6 * len(whole)
    assert report.lines  # the report itself keeps its code
    file = tmp_path / "cell.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{small}", encoding="utf-8")
    with opened(browser, file) as cell:
        frame = cell.page.frame_locator("iframe")
        expect(frame.locator("#detail")).to_contain_text("Left out of this view")
        frame.locator(".item.layer .row").first.click()
        frame.locator(".item.site .row").first.click()
        expect(frame.locator(".kernel").first).to_contain_text("bytes per token")
        assert cell.errors == []


@pytest.mark.slow
def test_the_pictures_of_the_documentation_are_made(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "docs" / "screenshots.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    assert {p.name for p in tmp_path.iterdir()} == {"report-light.png", "report-dark.png", "report-code.png"}
    light, dark = (imread(tmp_path / f"report-{scheme}.png")[..., :3].mean() for scheme in ("light", "dark"))
    assert light > 0.8 > 0.3 > dark
