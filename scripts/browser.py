"""Debian's chromium without a window, for the browser tests, the pictures and the measurements of the results page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",  # root, as in a container, has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def missing() -> list[str]:
    """The Debian packages that are not installed."""
    return [name for name, path in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)) if not shutil.which(str(path))]


@contextmanager
def chromium(profile: Path, language: str = "en-GB") -> Iterator[Chrome]:
    """A browser with an empty profile in that folder; it ends with the block."""
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--lang={language}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=Service(str(DRIVER)))  # named, so that nothing is looked for or fetched
    try:
        yield browser
    finally:
        browser.quit()


def show_as(browser: Chrome, width: int, height: int, theme: str = "light", motion: str = "no-preference") -> None:
    """Give the page this size in CSS pixels, and this taste."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": theme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
