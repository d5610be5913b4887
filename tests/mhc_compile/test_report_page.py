"""The report page in a real browser: opened, unfolded, searched, compared, and walked through by keys alone."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Opened, launched, opened
from matplotlib.image import imread
from playwright.sync_api import Browser, expect
from tiny_models import Chain, ids, llama
from torch import Tensor, nn

import mhc_compile
from mhc_compile.diagnostics import TABLE
from mhc_compile.inspect.page import notebook
from mhc_compile.inspect.page.page import FOLDER, page

Data = dict[str, Any]
NAMED = "layers.1#1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def data() -> Data:
    """A converted Llama of three layers in two blocks and two stages, as it compiles for this machine."""
    torch._dynamo.reset()
    model = mhc_compile.convert(llama(num_hidden_layers=3), streams=4)
    return mhc_compile.inspect(model, ids(), recompute="auto", stages=2).data()


@pytest.fixture
def report(browser: Browser, data: Data, tmp_path: Path) -> Iterator[Opened]:
    with opened(browser, written(data, tmp_path)) as found:
        yield found
        found.check()


def written(data: Data, folder: Path) -> Path:
    file = folder / "report.html"
    file.write_text(page(data), encoding="utf-8")
    return file


def choose(report: Opened, name: str) -> None:
    """Find an element by its whole name and go there."""
    box = report.page.get_by_role("combobox", name="Search")
    box.fill(name)
    report.page.get_by_role("option").filter(has=report.page.get_by_text(name, exact=True)).first.click()


def below(data: Data, number: int) -> set[int]:
    found = {number}
    for child in data["elements"][number]["children"]:
        found |= below(data, child)
    return found


def number_of(data: Data, name: str) -> int:
    (number,) = [i for i, e in enumerate(data["elements"]) if e["name"] == name]
    return number


# --- opening and unfolding -------------------------------------------------------------------------------------------


def test_opens_without_a_network(report: Opened, data: Data) -> None:
    tree = report.page.get_by_role("tree")
    expect(tree).to_be_visible()
    expect(report.page.get_by_role("heading", level=1)).to_have_text("LlamaForCausalLM")
    for step in data["passes"]:
        expect(report.page.get_by_role("rowheader", name=step["name"], exact=True)).to_be_visible()
    report.check()
    # Its policy forbids the network, and scripts other than its own.
    blocked = "fetch('https://example.com').then(() => 'sent', (error) => error.name)"
    assert report.page.evaluate(blocked) == "TypeError"
    report.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'ran = 1'}))")
    assert report.page.evaluate("typeof ran") == "undefined"
    assert any("Content Security Policy" in text for text in report.errors)
    report.errors.clear()
    assert len(report.requests) == 1


def test_only_what_is_unfolded_is_in_the_document(report: Opened) -> None:
    items = report.page.get_by_role("treeitem")
    site = report.page.locator(".item.site")
    expect(report.page.locator(".item.stream")).to_have_attribute("aria-expanded", "true")
    expect(site).to_have_count(0)
    before = items.count()
    layers = report.page.locator(".item.layer")
    expect(layers).to_have_count(3)
    layers.first.locator(".row").first.click()
    expect(layers.first).to_have_attribute("aria-expanded", "true")
    expect(site).to_have_count(2)
    site.first.locator(".row").first.click()
    assert items.count() == before + 3
    expect(site.first).to_have_attribute("aria-level", "4")
    expect(report.page.locator(".item.branch")).to_have_attribute("aria-label", re.compile("branch, .*self_attn"))
    layers.first.locator(".row").first.click()  # chooses it; another click folds it
    layers.first.locator(".row").first.click()
    assert items.count() == before


def test_what_was_chosen_may_be_folded_away(report: Opened) -> None:
    choose(report, NAMED)
    report.page.locator(".item.stream > .row").click()
    report.page.locator(".item.stream > .row").click()
    expect(report.page.locator(".item[aria-selected=true]")).to_have_class(re.compile("stream"))
    expect(report.page.locator(".item[tabindex='0']")).to_have_count(1)


# --- the chosen part -------------------------------------------------------------------------------------------------


def test_search_unfolds_and_chooses(report: Opened) -> None:
    report.page.keyboard.press("/")
    report.page.keyboard.type(NAMED)
    report.page.keyboard.press("Enter")
    chosen = report.page.locator(".item[aria-selected=true]")
    expect(chosen).to_have_class(re.compile(r"\bsite\b"))
    expect(chosen).to_be_focused()
    expect(report.page.get_by_role("heading", level=2)).to_contain_text(NAMED)
    report.page.keyboard.press("/")
    report.page.keyboard.type("nothing is called so")
    expect(report.page.get_by_role("listbox")).to_contain_text("nothing found")


@pytest.mark.parametrize(
    ("words", "kind", "shown"),
    [
        ("mhc.distribute layers.1#0", "code", ".line.wanted"),
        ("residual + hidden_states", "source", ".line.wanted"),
        ('extern "C" backward', "kernel source", "pre .wanted"),
        ("boundary_rms", "kernel", ".kernel"),
        ("fuse", "pass", ".comparison"),
    ],
)
def test_search_finds_code_sources_and_kernels(report: Opened, words: str, kind: str, shown: str) -> None:
    report.page.get_by_role("combobox", name="Search").fill(words)
    report.page.locator(".result").filter(has=report.page.get_by_text(kind, exact=True)).first.click()
    expect(report.page.locator(shown).first).to_be_in_viewport()


def test_facts_of_a_site(report: Opened, data: Data) -> None:
    choose(report, NAMED)
    site = data["elements"][number_of(data, NAMED)]
    block, source = data["blocks"][site["block"]], data["sources"][site["source"]]
    text = report.page.locator("#detail").inner_text()
    for part in (site["topology"], site["dtype"] + site["shape"], f"{site['parameters']:,}", site["module"]):
        assert part in text
    assert f"{site['block'] + 1} of {len(data['blocks'])}: keeps {block['kept'] / 1024:.1f} KiB" in text
    assert f"{site['stage']} of 2" in text
    assert source["text"] in text
    assert f"{source['file']}:{source['line']}, in {source['function']}" in text


@pytest.mark.parametrize("name", [NAMED, "layers.0#0", "model.layers.1"])
def test_differences_of_every_pass(report: Opened, data: Data, name: str) -> None:
    choose(report, name)
    mine = below(data, number_of(data, name))
    graphs = [data["captured"], *(step["code"] for step in data["passes"])]
    graphs = [[i for i in graph if data["lines"][i][1] in mine] for graph in graphs]
    changed = 0
    for i, step in enumerate(data["passes"]):
        report.page.get_by_role("group", name="What a pass did").get_by_role("button", name=step["name"]).click()
        for kind, lines in (
            ("went", set(graphs[i]) - set(graphs[i + 1])),
            ("came", set(graphs[i + 1]) - set(graphs[i])),
        ):
            rows = report.page.locator(f".line.{kind}")
            got = rows.evaluate_all("rows => rows.map((r) => [Number(r.dataset.line), r.children[1].textContent])")
            assert {line for line, _ in got} == lines, (step["name"], kind)
            assert all(text == data["lines"][line][0] for line, text in got)
            changed += len(lines)
    assert changed > 10


def test_the_part_of_a_line_that_changed_is_marked(report: Opened, data: Data) -> None:
    choose(report, "layers.0#0")
    report.page.get_by_role("button", name="widen").click()
    went = report.page.locator(".line.went", has_text="hidden_states = ").first
    came = report.page.locator(".line.came", has_text="hidden_states = ").first
    assert went.locator("mark").inner_text() == "inputs_embeds"
    assert came.locator("mark").inner_text().startswith("aggregate")
    assert color_of(went) != color_of(came)


def color_of(locator: Any) -> str:
    return locator.evaluate("node => getComputedStyle(node).backgroundColor")


def test_side_by_side_and_any_two_graphs(report: Opened, data: Data) -> None:
    choose(report, "layers.0#0")
    report.page.get_by_label("from", exact=True).select_option("as captured")
    report.page.get_by_label("to", exact=True).select_option("behind fuse")
    one = report.page.locator(".line.came").count()
    report.page.get_by_role("button", name="Side by side").click()
    expect(report.page.locator(".pair").first).to_be_visible()
    assert report.page.locator(".pair > :nth-child(2) .line.came").count() == one
    assert report.page.locator(".pair > :first-child .line.came").count() == 0
    # The same value's two forms stand beside each other.
    for pair in report.page.locator(".pair:has(.went):has(.came)").all():
        left, right = pair.locator("code").all_inner_texts()
        assert left.split(" = ")[0] == right.split(" = ")[0]
    report.page.set_viewport_size({"width": 700, "height": 800})
    expect(report.page.locator(".pair")).to_have_count(0)  # too narrow for two


def test_unchanged_lines_unfold_and_lines_show_their_facts(report: Opened, data: Data) -> None:
    choose(report, "layers.0#0")
    report.page.get_by_role("button", name="widen").click()
    gap = report.page.locator(".gap").first
    hidden = int(gap.inner_text().split()[0])
    before = report.page.locator(".line").count()
    gap.click()
    assert report.page.locator(".line").count() == before + hidden
    while (gap := report.page.locator(".gap").first).count():
        gap.click()
    line = report.page.locator(".line", has_text=re.compile(r"linear\(.*q_proj")).first
    line.click()
    facts = report.page.locator(".line-facts")
    expect(facts).to_contain_text("self.q_proj(hidden_states)")
    expect(facts).to_contain_text(re.compile(r"modeling_llama\.py:\d+, in forward"))
    # `fuse` gives the norm's result another name, and the line becomes another one.
    expect(facts).to_contain_text("from captured to recompute")
    facts.get_by_role("button").click()
    expect(report.page.get_by_role("heading", level=2)).to_contain_text("self_attn")


def test_kernels_show_their_source_and_traffic(report: Opened, data: Data) -> None:
    choose(report, NAMED)
    number = data["elements"][number_of(data, NAMED)]["kernels"][0]
    kernel = data["kernels"][number]
    card = report.page.locator(f"[data-kernel='{number}']")
    share = round(100 * kernel["limit_token"] / kernel["bytes_token"])
    expect(card).to_contain_text(f"{kernel['bytes_token']:,} bytes a token, {share} % of the limit")
    expect(card.locator("pre")).to_have_count(0)  # nothing is written before it is asked for
    for direction in ("forward", "backward"):
        card.locator("summary", has_text=direction).click()
        got = card.get_by_role("region", name=re.compile(direction)).inner_text()
        assert got.split() == kernel[direction].split()


# --- keys, colours, sizes --------------------------------------------------------------------------------------------


def test_by_keys_alone(report: Opened) -> None:
    key, focused = report.page.keyboard.press, report.page.locator(":focus")
    for _ in range(4):  # search, colours, help, the tree
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


def test_ninety_six_layers(browser: Browser, tmp_path: Path) -> None:
    data = mhc_compile.inspect(Chain(depth=96), ids(), inner="eager").data()
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
    with deep(browser, mhc_compile.inspect(model).data(), tmp_path, "layers.57#1") as report:
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
    with opened(browser, written(found.data(), tmp_path)) as report:
        text = report.page.locator("#detail").inner_text()
        way_out = TABLE[found.refusal.code].way_out
        for part in ("refused", found.refusal.code, way_out, found.reach.reason, "self.a(x) + self.b(x)"):
            assert part in text
        choose(report, "a")
        expect(report.page.locator("#detail")).to_contain_text("linear(")
        report.check()


def test_a_model_that_breaks(browser: Browser, tmp_path: Path) -> None:
    found = mhc_compile.inspect(Chain(breaks="inside"), ids())
    with opened(browser, written(found.data(), tmp_path)) as report:
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
        kept = ("kind", "state", "severity", "device")
        return {k: v if k in kept or (k == "name" and "code" in value) else spoiled(v) for k, v in value.items()}
    return value


def test_texts_never_run(browser: Browser, data: Data, tmp_path: Path) -> None:
    row = {"code": "MHC103", "title": "t", "detail": "d", "node": "n", "module": "m", "source": "s", "way_out": "w"}
    evil = spoiled(data | {"diagnostics": [row | {"severity": "error"}], "reach": {"layers": ["a"], "node": "b"}})
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
    assert shown["text/html"] == found._repr_html_()
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
    small, whole = notebook.frame(data), page(data)
    assert len(small) < len(whole) / 2
    assert data["lines"]  # the report itself keeps its code
    file = tmp_path / "cell.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{small}", encoding="utf-8")
    with opened(browser, file) as cell:
        frame = cell.page.frame_locator("iframe")
        expect(frame.locator("#detail")).to_contain_text("Left out of this view")
        frame.locator(".item.layer .row").first.click()
        frame.locator(".item.site .row").first.click()
        expect(frame.locator(".kernel").first).to_contain_text("bytes a token")
        assert cell.errors == []


@pytest.mark.slow
def test_the_pictures_of_the_documentation_are_made(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "docs" / "screenshots.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    assert {p.name for p in tmp_path.iterdir()} == {"report-light.png", "report-dark.png", "report-code.png"}
    light, dark = (imread(tmp_path / f"report-{scheme}.png")[..., :3].mean() for scheme in ("light", "dark"))
    assert light > 0.8 > 0.3 > dark


# --- the parts of the page -------------------------------------------------------------------------------------------


def test_the_embedded_data_is_the_data(data: Data) -> None:
    (embedded,) = re.findall(r'<script id="report" type="application/json">(.*?)</script>', page(data), re.DOTALL)
    assert json.loads(embedded) == json.loads(json.dumps(data))
    assert "</script" not in "".join(p.read_text() for p in FOLDER.glob("*.js"))


def test_differences_give_both_sides(browser: Browser) -> None:
    rng = random.Random(0)
    cases = []
    for _ in range(300):
        a = [rng.randrange(12) for _ in range(rng.randrange(14))]
        b = [v for v in a if rng.random() < 0.7]
        for _ in range(rng.randrange(5)):
            b.insert(rng.randint(0, len(b)), rng.randrange(20))
        cases.append([a, b])
    cases += [[list(range(600)), list(range(599, -1, -1))], [[1] * 700, [2] * 700], [[], []]]
    window = browser.new_page()
    source = (FOLDER / "diff.js").read_text(encoding="utf-8")
    results = window.evaluate(f"(cases) => {{ {source}; return cases.map(([a, b]) => difference(a, b)); }}", cases)
    window.close()
    for (a, b), rows in zip(cases, results, strict=True):
        assert [line for sign, line in rows if sign != "+"] == a
        assert [line for sign, line in rows if sign != "-"] == b
        same = sum(sign == "=" for sign, _ in rows)
        assert same > 0 or not set(a) & set(b)


def test_scripts_are_short_and_say_what_they_are_for() -> None:
    for file in FOLDER.glob("*.js"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 300
        assert lines[0].startswith("// ")
        assert max(map(len, lines)) <= 120, file.name
