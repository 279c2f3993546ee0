"""The pictures of the results page in docs/: what `make screenshots` runs.

Counts some votes on private servers and takes the page at the width of a phone and of a desktop, light and dark.
"""

from __future__ import annotations

import base64
import itertools
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from lab.service import ROOT
from scripts import browser, demo, demo_live
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages

FOLDER = ROOT / "docs"
VOTES = 4_000
WIDTHS = {"phone": 360, "desktop": 1_440}


def main() -> int:
    """Take the pictures and return the exit code."""
    if browser.missing():
        print(f"not installed: {', '.join(browser.missing())}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, LocalServices(Path(folder) / "services", management=True) as services:
        amqp_url, database_url = services.rabbitmq.url(), services.postgres.url()
        with demo.running_service(Path(folder), amqp_url, database_url) as service:
            demo_live.write_laws(database_url)
            messages = make_messages(VOTES, len(demo_live.LAWS), 7, 3, 1)
            published = Publisher([amqp_url], demo.QUEUE).publish(itertools.islice(messages, VOTES)).votes()
            demo_live.wait_for(published.keys(), database_url)
            demo_live.end_laws(services)
            with votes_coming_in(amqp_url), browser.chromium(Path(folder) / "profile") as chromium:
                for (name, width), theme in itertools.product(WIDTHS.items(), ("light", "dark")):
                    browser.show_as(chromium, width, 800, theme, "reduce")
                    take(chromium, f"{service.address}/", FOLDER / f"results-{name}-{theme}.png")
    return 0


@contextmanager
def votes_coming_in(amqp_url: str) -> Iterator[None]:
    """A few votes more during the block, so that the page has a rate to show."""
    publisher = Publisher([amqp_url], demo.QUEUE, rate=demo_live.RATE)
    messages = make_messages(100_000, len(demo_live.LAWS), 8)
    votes = (vote for vote in messages if vote.law_id not in (demo_live.CLOSED, demo_live.CERTIFIED))
    thread = threading.Thread(target=publisher.publish, args=(votes,))
    thread.start()
    try:
        yield
    finally:
        publisher.stop()
        thread.join()


def take(chromium: Chrome, address: str, path: Path) -> None:
    """Take the whole page, once it shows votes and their rate."""
    chromium.get(address)
    WebDriverWait(chromium, 20).until(lambda page: page.find_element(By.ID, "rate").text[0].isdigit())
    # rows out of sight are not drawn, and none may be yet
    chromium.execute_script(
        "for (const row of document.querySelectorAll('tbody tr')) row.style.contentVisibility = 'visible'"
    )
    size = chromium.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    picture = chromium.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(picture["data"]))
    print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
