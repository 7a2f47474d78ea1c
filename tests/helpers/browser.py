"""A headless Chromium, where one is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60_000
"""Milliseconds that a page may take for anything, however busy the machine is."""


def missing() -> str | None:
    """Why no browser can be started; None if one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ModuleNotFoundError:
        return "playwright is not installed (pip install playwright)"
    if not any(map(shutil.which, NAMES)):
        return f"no Chromium is installed ({', '.join(NAMES)})"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, as playwright knows it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, NAMES))),
            args=["--no-sandbox"],  # it shows nothing but our own page, perhaps as root
        )
        yield browser
        browser.close()


def expect(what: Any) -> Any:
    """What is to become true of a page or of a part of it: playwright waits until it has."""
    from playwright.sync_api import expect as playwright_expect

    playwright_expect.set_options(timeout=WAIT)
    return playwright_expect(what)


def become(page: Any, condition: str, argument: Any = None) -> None:
    """Wait until a condition, a JavaScript expression that may name ``it``, holds in a page."""
    page.wait_for_function(f"it => {condition}", arg=argument)
