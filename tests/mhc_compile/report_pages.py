"""Reports opened in a browser: what the tests of the page share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import Opened, launched, opened
from playwright.sync_api import Browser
from tiny_models import ids, llama

import mhc_compile
from mhc_compile import Report
from mhc_compile.report.page.page import page

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
    return json_of(mhc_compile.inspect(model, ids(), recompute="auto", stages=2))


def json_of(report: Report) -> Data:
    return json.loads(report.json())  # type: ignore[no-any-return]


@pytest.fixture
def report(browser: Browser, data: Data, tmp_path: Path) -> Iterator[Opened]:
    with opened(browser, written(data, tmp_path)) as found:
        yield found
        found.check()


def written(data: Data, folder: Path) -> Path:
    file = folder / "report.html"
    file.write_text(page(Report.of(data)), encoding="utf-8")
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


def color_of(locator: Any) -> str:
    return locator.evaluate("node => getComputedStyle(node).backgroundColor")
