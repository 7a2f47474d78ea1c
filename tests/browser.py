"""A headless Chromium, where one is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


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
