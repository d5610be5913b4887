"""A real browser for the tests of pages, and what it noticed while a page was open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def launched() -> Iterator[Browser]:
    """The system's Chromium without a window. Without one the test is skipped, in CI it fails."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no browser: install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@dataclass
class Opened:
    """An open page."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """What the console reported as a warning or an error, and exceptions that nobody caught."""
    requests: list[str] = field(default_factory=list)
    """Everything that was asked for, the page's own file first."""

    def check(self) -> None:
        """Nothing went wrong and nothing but the file was read."""
        assert self.errors == []
        others = [url for url in self.requests[1:] if not url.startswith("data:")]
        assert others == []


@contextmanager
def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Opened]:
    """`path` opened in a window of its own: 1280 x 800 unless `context` (of `Browser.new_context`) says otherwise."""
    window = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
    page = window.new_page()
    found = Opened(page)
    page.on("console", lambda m: found.errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.as_uri())
    yield found
    window.close()
