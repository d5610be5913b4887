"""Write the pictures of the report that the README and docs/report.md show: `python docs/screenshots.py [FOLDER]`.

Needs `pip install -e ".[dev]"` and a Chromium on the path; takes about half a minute.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, sync_playwright
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile

LARGEST = 250_000
NAMES = ("chromium", "chromium-browser", "google-chrome")


def small_model() -> LlamaForCausalLM:
    """Return a Llama of eight layers with four streams and a memory at its second layer."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    memory = mhc_compile.MemorySettings.preset("paper", layers=(1,), rows_per_head=97, row_width=16)
    return mhc_compile.convert(LlamaForCausalLM(config).eval(), streams=4, engram=memory)


def opened(browser: Browser, file: Path, scheme: str) -> Page:
    """Open the report with a site after the memory selected."""
    window = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme=scheme)
    page = window.new_page()
    page.goto(file.as_uri())
    search = page.get_by_role("combobox", name="Search")
    search.fill("layers.1#0")
    search.press("Enter")
    page.locator(":focus").press("Enter")
    search.fill("")
    search.blur()
    return page


def kept(page: Page, file: Path) -> None:
    """Save what the window shows."""
    page.screenshot(path=file)
    size = file.stat().st_size
    assert size < LARGEST, f"{file} has {size} bytes"
    assert imread(file).std() > 0.01, f"{file} is one colour"
    print(f"{file}: {size / 1000:.0f} kB")


def main(folder: Path) -> None:
    """Write all pictures."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        sys.exit("no browser: install the package chromium")
    folder.mkdir(parents=True, exist_ok=True)
    report = mhc_compile.inspect(small_model(), recompute="auto", stages=2)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        file = Path(scratch) / "report.html"
        file.write_text(report.html(), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=path)
        for scheme in ("light", "dark"):
            kept(opened(browser, file, scheme), folder / f"report-{scheme}.png")
        page = opened(browser, file, "light")
        page.get_by_role("button", name="Side by side").click()
        page.locator(".comparison").evaluate("node => node.scrollIntoView()")
        kept(page, folder / "report-code.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
