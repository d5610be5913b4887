"""The report page by keys alone, in light and dark, narrow and printed: what a reader sees."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Opened, opened
from matplotlib.image import imread
from playwright.sync_api import Browser, expect
from report_pages import Data, browser, choose, color_of, data, report, written  # noqa: F401


def test_by_keys_alone(report: Opened) -> None:
    key, focused = report.page.keyboard.press, report.page.locator(":focus")
    for _ in range(5):  # search, SVG, colours, help, the tree
        key("Tab")
    expect(focused).to_have_attribute("role", "treeitem")
    expect(focused).to_have_class(re.compile("model"))
    assert focused.locator(".row").first.evaluate("row => getComputedStyle(row).outlineStyle") == "solid"
    while "layer" not in (focused.get_attribute("class") or "").split():
        key("ArrowDown")
    key("ArrowRight")
    key("ArrowRight")
    expect(focused).to_have_class(re.compile(r"\bsite\b"))
    expect(focused).to_have_attribute("aria-selected", "true")
    key("Enter")
    expect(focused).to_have_attribute("aria-expanded", "true")
    for step in ("residual", "widen", "recompute"):
        report.page.get_by_role("button", name=step, exact=False).first.wait_for()
    pressed = report.page.locator(".pass[aria-pressed=true]")
    expect(pressed).to_contain_text("widen")
    key("]")
    expect(pressed).not_to_contain_text("widen")
    key("[")
    expect(pressed).to_contain_text("widen")
    while "line" not in (focused.get_attribute("class") or "").split():
        if "gap" in (focused.get_attribute("class") or "").split():
            key("ArrowDown")
        else:
            key("Tab")
    key("Enter")
    expect(focused).to_have_attribute("aria-expanded", "true")
    expect(report.page.locator(".line-facts")).to_be_visible()
    key("Escape")
    expect(focused).to_have_class(re.compile(r"\bsite\b"))
    key("?")
    expect(report.page.get_by_role("dialog")).to_be_visible()
    key("Escape")
    expect(report.page.get_by_role("dialog")).to_be_hidden()
    key("ArrowLeft")
    key("ArrowLeft")
    key("ArrowLeft")
    expect(focused).to_have_attribute("aria-expanded", "false")
    key("Home")
    expect(focused).to_have_class(re.compile("model"))
    key("End")
    expect(focused).to_have_attribute("aria-label", re.compile("output"))
    key("/")
    expect(report.page.get_by_role("combobox", name="Search")).to_be_focused()
    report.page.keyboard.type("layers")
    key("ArrowDown")
    key("ArrowDown")
    third = report.page.get_by_role("option").nth(2)
    expect(third).to_have_attribute("aria-selected", "true")
    key("Escape")
    expect(report.page.get_by_role("listbox")).to_be_hidden()


CONTRAST = """() => {
  // The colour of a text, and the first background behind it that is not transparent.
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return /, 0\\)$/.test(color) ? behind(node.parentElement) : color;
  };
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const texts = [...document.querySelectorAll("body *")].filter((node) =>
    node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return texts.map((node) => [node.textContent.slice(0, 40), rgb(getComputedStyle(node).color), rgb(behind(node))]);
}"""


def luminance(color: list[float]) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser: Browser, data: Data, tmp_path: Path, scheme: Any) -> None:
    with opened(browser, written(data, tmp_path), color_scheme=scheme) as report:
        choose(report, "layers.0#0")
        report.page.locator(".line").first.click()
        report.page.locator("summary").first.click()
        texts = report.page.evaluate(CONTRAST)
        assert len(texts) > 100
        for text, color, behind in texts:
            dark, light = sorted((luminance(color), luminance(behind)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, color, behind)
        report.check()


def test_light_and_dark(browser: Browser, data: Data, tmp_path: Path) -> None:
    file = written(data, tmp_path)
    for scheme in ("light", "dark"):
        with opened(browser, file, color_scheme=scheme) as report:
            rgb = [int(v) for v in re.findall(r"\d+", color_of(report.page.locator("body")))[:3]]
            assert (luminance(rgb) > 0.5) == (scheme == "light")
            if scheme == "light":
                system = color_of(report.page.locator("body"))
                report.page.keyboard.press("t")
                assert color_of(report.page.locator("body")) != system
                report.page.get_by_role("button", name="Colours").click()
                assert color_of(report.page.locator("body")) == system


@pytest.mark.parametrize("width", [400, 1280])
def test_what_is_drawn_is_where_the_document_says(browser: Browser, data: Data, tmp_path: Path, width: int) -> None:
    with opened(browser, written(data, tmp_path), viewport={"width": width, "height": 900}) as report:
        choose(report, "layers.0#0")
        report.page.keyboard.press("Enter")
        assert report.page.evaluate("document.documentElement.scrollWidth") <= width
        report.page.locator("#tree").evaluate("tree => tree.parentElement.scrollTop = 0")
        boxes = [row.bounding_box() for row in report.page.locator(".row, .closing, .stage").all()]
        boxes = sorted((b for b in boxes if b), key=lambda b: b["y"])
        assert len(boxes) > 8
        for one, other in pairwise(boxes):
            # The pieces of the drawing join: neither a gap nor an overlap.
            assert abs(one["y"] + one["height"] - other["y"]) < 1
        assert all(b["x"] >= 0 and b["x"] + b["width"] <= width for b in boxes)
        shot = imread(io.BytesIO(report.page.screenshot()), format="png")[..., :3]
        paper = shot[int(boxes[0]["y"]) + 2, 2]
        seen = [b for b in boxes if b["y"] + b["height"] < report.page.locator("nav").bounding_box()["height"]]
        assert len(seen) > 5
        for b in seen[1:]:
            left = int(report.page.locator("svg.piece").first.bounding_box()["x"])
            strip = shot[int(b["y"]) : int(b["y"] + b["height"]), left : left + 100]
            inked = np.abs(strip - paper).max(-1) > 0.15
            assert inked.any(1).mean() > 0.4, b  # a line runs down every piece
            assert inked.mean() < 0.9
        report.check()


def test_lanes_are_the_streams(report: Opened, data: Data) -> None:
    report.page.locator(".item.layer .row").first.click()
    site = report.page.locator(".item.site > .row svg").first
    assert site.locator(".lane").count() == 4
    assert report.page.locator(".item.outside > .row svg").first.locator(".lane").count() == 1
    assert report.page.locator(".item.exit > .row svg .lane").count() == 5  # four join to one


def test_prints_without_its_tools(report: Opened) -> None:
    report.page.emulate_media(media="print")
    expect(report.page.locator(".tools")).to_be_hidden()
    expect(report.page.locator("#tree")).to_be_visible()
    assert report.page.locator("#detail").evaluate("node => node.scrollHeight <= node.clientHeight + 1")
    assert len(report.page.pdf()) > 10_000
