"""The report page in a real browser: opened, unfolded, searched, compared."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from chromium import Opened, opened
from playwright.sync_api import Browser, expect
from report_pages import (  # noqa: F401
    NAMED,
    Data,
    below,
    browser,
    choose,
    color_of,
    data,
    json_of,
    number_of,
    report,
    written,
)
from test_report import Joined
from tiny_models import HIDDEN, ids, llama

import mhc_compile
from mhc_compile import Report
from mhc_compile.report.page.page import FOLDER, page

# --- opening and unfolding -------------------------------------------------------------------------------------------


def test_opens_without_a_network(report: Opened, data: Data) -> None:
    tree = report.page.get_by_role("tree")
    expect(tree).to_be_visible()
    expect(report.page.get_by_role("heading", level=1)).to_have_text("LlamaForCausalLM")
    for step in data["passes"]:
        if step["notes"]:
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


def test_the_address_names_the_chosen_part(report: Opened) -> None:
    chosen = report.page.locator(".item[aria-selected=true]")
    choose(report, NAMED)
    address = report.page.evaluate("location.hash")
    assert address == "#site%2Flayers.1%231"
    first = report.requests.pop()
    report.page.reload()
    assert [url.partition("#")[0] for url in report.requests] == [first]
    expect(chosen).to_have_attribute("aria-label", re.compile("^site"))
    expect(report.page.get_by_role("heading", level=2)).to_contain_text(NAMED)
    for other in ("#exit%2Fexit of model", "#no such part", "#%"):  # the last two change nothing
        report.page.evaluate("hash => { location.hash = hash }", other)
        expect(chosen).to_have_class(re.compile("exit"))
    report.page.locator(".item.model > .row").first.click()
    assert report.page.evaluate("location.hash") == ""


def test_the_drawing_is_saved_as_it_is_unfolded(report: Opened, tmp_path: Path) -> None:
    choose(report, NAMED)
    with report.page.expect_download() as download:
        report.page.get_by_role("button", name="SVG").click()
    assert download.value.suggested_filename == "LlamaForCausalLM.svg"
    download.value.save_as(tmp_path / "drawing.svg")
    drawing = ElementTree.parse(tmp_path / "drawing.svg").getroot()
    names = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"model", "layers.0", "#1", "4 streams"} <= set(names)
    shapes = report.page.locator("svg.piece path").count()
    paths = list(drawing.iter("{http://www.w3.org/2000/svg}path"))
    assert len(paths) == shapes
    assert all(path.get("stroke", "none") != "none" or path.get("fill", "none") != "none" for path in paths)


def test_passes_without_work_are_one_line_and_sites_have_bars(report: Opened, data: Data) -> None:
    graphs = [data["captured"], *(step["code"] for step in data["passes"])]
    steps = zip(data["passes"], graphs, strict=False)
    idle = [step["name"] for step, before in steps if not step["notes"] and step["code"] == before]
    assert "engram" in idle
    expect(report.page.get_by_text(f"Nothing to do: {', '.join(idle)}", exact=True)).to_be_visible()
    expect(report.page.get_by_role("rowheader", name="engram", exact=True)).to_have_count(0)
    rows = report.page.locator("section", has=report.page.get_by_role("heading", name="Traffic of")).locator("tbody tr")
    moved = [e["bytes_token"] + e["bytes_token_backward"] for e in data["elements"] if e["bytes_token"]]
    assert [int(row.replace(",", "")) for row in rows.locator("td:nth-child(2)").all_inner_texts()] == moved
    shares = report.page.eval_on_selector_all(
        "section tbody .gauge > span", "bars => bars.map(b => Number(b.style.getPropertyValue('--share')))"
    )
    assert max(shares) == 1
    assert shares == pytest.approx([m / max(moved) for m in moved])


def test_what_was_skipped_says_so_and_adds_that_are_no_sites_say_why(browser: Browser, tmp_path: Path) -> None:
    model = mhc_compile.convert(llama(num_hidden_layers=3), sites="model.layers.0,model.layers.1#1", inner="eager")
    with opened(browser, written(json_of(mhc_compile.inspect(model, ids())), tmp_path)) as page:
        choose(page, "layers.1#0")
        skipped = page.page.locator(".item.skipped")
        assert skipped.locator("> .row .name").all_inner_texts() == ["#0", "layers.2"]
        assert [text.split(" · ")[0] for text in skipped.locator("> .row .mark").all_inner_texts()] == ["skipped"] * 2
        expect(page.page.locator("#detail")).to_contain_text("not chosen as a site")
        chosen = page.page.locator(".item[aria-selected=true] > .row")
        expect(chosen.locator(".mixer")).to_have_count(0)
        page.check()
    report = mhc_compile.inspect(Joined(), torch.randn(2, 5, HIDDEN))
    assert report.coverage is not None
    with opened(browser, written(json_of(report), tmp_path)) as page:
        rows = page.page.locator("section", has=page.page.get_by_role("heading", name="Adds that are no sites"))
        assert rows.locator("tbody th").all_inner_texts() == list(report.coverage.left)
        assert rows.locator("tbody td").all_inner_texts() == list(report.coverage.why)
        page.check()


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
    assert f"{site['block']} of {len(data['blocks'])}: keeps {block['kept'] / 1024:.1f} KiB" in text
    assert f"{site['stage']} of 2" in text
    assert source["text"] in text
    assert f"{source['file']}:{source['line']}, in {source['function']}" in text


def test_the_stack_of_a_site_and_its_traffic(report: Opened, data: Data) -> None:
    choose(report, NAMED)
    site = data["elements"][number_of(data, NAMED)]
    source = data["sources"][site["source"]]
    detail = report.page.locator("#detail")
    assert source["text"] in source["context"][source["line"] - source["start"]]
    assert source["caller"] is not None
    link = detail.get_by_role("link", name="Open in the editor").first
    expect(link).to_have_attribute("href", f"vscode://file{source['path']}:{source['line']}")
    moved = site["bytes_token"] + site["bytes_token_backward"]
    whole = sum(e["bytes_token"] + e["bytes_token_backward"] for e in data["elements"])
    calls = sum(k["calls"] * (k["bytes_token"] + k["bytes_token_backward"]) for k in data["kernels"])
    assert whole == calls
    expect(detail).to_contain_text(f"{moved:,} bytes per token, forward and backward, {100 * moved / whole:.1f} %")


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


def test_side_by_side_and_any_two_graphs(report: Opened, data: Data) -> None:
    choose(report, "layers.0#0")
    report.page.get_by_label("from", exact=True).select_option("as captured")
    report.page.get_by_label("to", exact=True).select_option("after fuse")
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
    times = f"{kernel['bytes_token'] / kernel['limit_token']:.2f} x minimum traffic"
    expect(card).to_contain_text(f"{kernel['bytes_token']:,} bytes per token, {times}")
    expect(card.locator("pre")).to_have_count(0)  # nothing is written before it is asked for
    for direction in ("forward", "backward"):
        card.locator("summary", has_text=direction).click()
        got = card.get_by_role("region", name=re.compile(direction)).inner_text()
        assert got.split() == kernel[direction].split()


# --- the parts of the page -------------------------------------------------------------------------------------------


def test_the_embedded_data_is_the_data(data: Data) -> None:
    (embedded,) = re.findall(
        r'<script id="report" type="application/json">(.*?)</script>', page(Report.of(data)), re.DOTALL
    )
    assert json.loads(embedded) == data
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
