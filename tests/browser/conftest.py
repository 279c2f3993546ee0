"""Debian's chromium for the session, and the page of a service in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from scripts import browser
from tests.harness import Service, wait_until


class Page:
    """The results page in a browser, as somebody sees it."""

    def __init__(self, chromium: Chrome) -> None:
        self.chromium = chromium

    def open(self, service: Service, path: str = "/", port: int | None = None) -> Page:
        self.logs()  # of what was there before
        self.requested()
        self.chromium.get("about:blank")  # else, of an address that is open already, it may be the page of before
        self.chromium.get(f"http://127.0.0.1:{port or service.port}{path}")
        return self

    def is_live(self) -> Page:
        """Wait until it shows what the script has asked for, in place of what the service has written into it."""
        wait_until(lambda: self.run("return document.body.className") == "live", "the page is live")
        return self

    def text(self, selector: str) -> str:
        """What can be read there; empty where it is not, or not to be seen."""
        try:
            found = self.chromium.find_elements(By.CSS_SELECTOR, selector)
            return found[0].text if found else ""
        except StaleElementReferenceException:
            return ""

    def run(self, script: str, *arguments: Any) -> Any:
        return self.chromium.execute_script(script, *arguments)

    def ask_no_more(self) -> None:
        """From here on the page shows what a test puts into it."""
        wait_until(lambda: self.run("return !asking && (asking = true)"), "the page waits")

    def laws(self) -> dict[str, tuple[int, int]]:
        """(oui, non) of each law in the table, as the page writes them in English."""
        cells: list[list[str]] = self.run(
            "return [...document.querySelectorAll('#laws tr')].map(row => ['.id', '.title', 'td.oui b', 'td.non b']"
            ".map(selector => row.querySelector(selector).textContent))"
        )
        return {lid or title: (int(oui.replace(",", "")), int(non.replace(",", ""))) for lid, title, oui, non in cells}

    def shows(self, laws: dict[str, tuple[int, int]]) -> None:
        wait_until(lambda: self.laws() == laws, f"the page shows {laws}")

    def logs(self) -> list[dict[str, Any]]:
        """What the browser has written to its console since the last call."""
        return list(self.chromium.get_log("browser"))

    def requested(self) -> set[str]:
        """The hosts that the page has sent a request to since the last call; also those that were blocked.

        What the browser's own first page asks for, before any other was opened, is not the page's.
        """
        events = [json.loads(entry["message"])["message"] for entry in self.chromium.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "chrome:", "chrome-untrusted:"))}


@pytest.fixture(scope="session")
def installed() -> None:
    """The browser; where it is missing the tests fail in CI, and are skipped elsewhere."""
    missing = browser.missing()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="session")
def chromium(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.fixture
def page(chromium: Chrome) -> Iterator[Page]:
    """A page on a wide, light screen."""
    browser.show_as(chromium, 1_280, 900)
    yield Page(chromium)
    chromium.get("about:blank")


@pytest.fixture
def french_page(installed: None, tmp_path: Path) -> Iterator[Page]:
    """A page in a browser that asks for French."""
    with browser.chromium(tmp_path / "chromium", "fr-FR") as chromium:
        yield Page(chromium)


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, that `make test-browser` has installed."""
    script = Path(__file__).parents[2] / ".venv/axe/node_modules/axe-core/axe.min.js"
    if not script.exists() and "CI" not in os.environ:
        pytest.skip("not installed: axe-core; run `make test-browser`, with npm on the PATH")
    return script.read_text(encoding="utf-8")


@pytest.fixture
def violations(page: Page, axe: str) -> Callable[[], list[str]]:
    """What axe-core finds wrong with the page as it is."""

    def find() -> list[str]:
        page.run(axe)
        found = page.chromium.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']})"
            ".then(({violations}) => done(violations.map(v => `${v.id}: ${v.nodes.map(n => n.html).join(' ')}`)),"
            " error => done([String(error)]))"
        )
        return list(found)

    return find
