"""A real browser: the system's Chromium, driven by playwright, kept from every other host."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # its helpers make tiny models

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

PICTURES = os.environ.get("PICTURES")
"""A folder to write screenshots to; without it none is written."""

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, which is who runs tests in a container.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Open a page; at the end: no error on the console, nothing asked of another host."""
    mistakes: list[str] = []
    pages: list[Any] = []

    def guard(route: Route) -> None:
        url = urlsplit(route.request.url)
        if url.scheme in ("file", "data", "blob") or url.hostname == "127.0.0.1":
            route.continue_()
        else:
            mistakes.append(f"asked for {route.request.url}")
            route.abort()

    def open_(url: str, *, width: int = 1280, height: int = 860, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        context.route("**/*", guard)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on(
            "console",
            lambda message: mistakes.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.goto(url)
        pages.append(context)
        return page

    yield open_
    for context in pages:
        context.close()
    assert not mistakes


@pytest.fixture
def picture() -> Callable[[Page, str], None]:
    """Write a screenshot, if pictures are wanted."""

    def write(page: Page, name: str, *, full: bool = False) -> None:
        if PICTURES is not None:
            page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=full)

    return write
