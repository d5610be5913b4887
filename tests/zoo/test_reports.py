"""The report of every architecture opens, and everything in it, without a script error: one of each kind in CI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from chromium import launched, opened
from playwright.sync_api import Browser

import mhc_compile

CHOSEN = {
    "llama": "not converted",
    "gemma4_text": "not converted",  # sandwich norms, carries scaled in place, readers of other layers
    "masked/bert": "not converted",
    "gptj": "not converted",
    "zamba2": "not converted",
    "seq2seq/t5": "not converted",  # two streams
    "vision/swin": "not converted",  # a stream for each stage
    "home/nanogpt": "not converted",
    "deepseek_v4": "native",
    "masked/squeezebert": "refused",
    "qwen4_exp_text": "refused",  # Dynamo does not capture it: there is no graph to show
}
# Unfolds everything there is, and looks at each part of it.
VISIT = """() => {
  const folded = '.item[aria-expanded="false"] > .row';
  for (let row; (row = document.querySelector(folded)); ) row.click();
  const rows = [...document.querySelectorAll(".item > .row")];
  let code = 0;
  for (const row of rows) {
    row.click();
    if (row.isConnected && row.parentElement.getAttribute("aria-expanded") === "false") row.click();
    code += document.querySelectorAll(".line").length;
  }
  return { parts: rows.length, sites: document.querySelectorAll(".item.site").length, code };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


def check(browser: Browser, name: str, folder: Path) -> str:
    """Open the report, unfold all of it; the state that it shows."""
    torch._dynamo.reset()
    model, inputs = models.named(name)
    found = mhc_compile.inspect(model, example_kwargs=inputs, inner="eager")
    file = folder / "report.html"
    file.write_text(found.html(), encoding="utf-8")
    with opened(browser, file) as report:
        seen = report.page.evaluate(VISIT)
        kinds = [element.kind for element in found.elements]
        assert seen["parts"] > len(kinds)  # each of them, and the model
        assert seen["sites"] == kinds.count("site")
        assert bool(seen["code"]) == bool(found.lines)
        shown = report.page.locator("#model-state").inner_text()
        report.check()
    assert shown == found.state
    return shown


@pytest.mark.parametrize(("name", "state"), CHOSEN.items())
def test_reports_open(browser: Browser, name: str, state: str, tmp_path: Path) -> None:
    assert check(browser, name, tmp_path) == state


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in models.all_names() if name not in CHOSEN])
def test_the_other_reports_open(browser: Browser, name: str, tmp_path: Path) -> None:
    try:
        models.named(name)
    except Exception as error:  # transformers raises what it likes for the few that cannot be built here
        pytest.skip(f"does not build: {error}")
    check(browser, name, tmp_path)
