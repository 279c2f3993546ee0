"""How fast the page paints 1,000 laws in headless chromium: `make bench-paint`.

For each run: from the start of the navigation to the first paint, from there to the rows on the screen, and from the
arrival of new data to the next frame painted, where every tenth law and where all laws have changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import psycopg2
from selenium.webdriver import Chrome

from scripts import browser, demo
from scripts.local_services import LocalServices

# Tells when data has arrived, and when what follows from it is painted: a message sent in a frame is handled after it.
WATCH = """
    window.seen = [];
    const parse = Response.prototype.json;
    Response.prototype.json = async function () {
        const data = await parse.call(this), arrived = performance.now();
        if (this.url.endsWith("/results.json")) requestAnimationFrame(() => {
            const channel = new MessageChannel();
            channel.port1.onmessage = () => seen.push({arrived, painted: performance.now()});
            channel.port2.postMessage(0);
        });
        return data;
    };
"""
FILL = """
    INSERT INTO vote_results (law_id, oui_count, non_count)
    SELECT 'law-' || to_char(n, 'FM0000'), n * 7 % 1000, n * 13 % 1000 FROM generate_series(1, {laws}) AS n
"""
TITLES = """
    INSERT INTO laws (law_id, title) SELECT law_id, 'Loi relative à la chose numéro ' || law_id FROM vote_results
"""
CHANGE = "UPDATE vote_results SET oui_count = oui_count + 1 WHERE right(law_id, 4)::int % {every} = 0"


def main() -> int:
    """Measure and print the medians and the slowest of each, and as the last line the numbers in JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--laws", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="votes-bench-") as folder, LocalServices(Path(folder) / "s") as services:
        database_url = services.postgres.url()
        with demo.running_service(Path(folder), services.rabbitmq.url(), database_url) as service:
            address = f"{service.address}/"
            execute(database_url, FILL.format(laws=options.laws))
            execute(database_url, TITLES)
            with browser.chromium(Path(folder) / "profile") as chromium:
                browser.show_as(chromium, 1_440, 900)
                chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
                for _ in range(options.runs):
                    for name, value in measure(chromium, address, database_url, options.laws).items():
                        figures.setdefault(name, []).append(value)
    for name, values in figures.items():
        print(f"{name:<48} median {statistics.median(values):>6.0f} ms   slowest {max(values):>6.0f} ms")
    print(json.dumps({"laws": options.laws, "runs": options.runs, "ms": figures}))
    return 0


def measure(chromium: Chrome, address: str, database_url: str, laws: int) -> dict[str, float]:
    """One visit and two updates, in milliseconds."""
    chromium.get(address)
    wait_for(chromium, 1)
    if chromium.execute_script("return document.querySelectorAll('#laws tr').length") != laws:
        raise demo.DemoFailed("not all laws are shown")
    paints = "return performance.getEntriesByName('first-contentful-paint').map(paint => paint.startTime)"
    if not demo.wait_until(lambda: bool(chromium.execute_script(paints)), 10):  # told a moment after it happens
        raise demo.DemoFailed("the browser tells no first paint")
    figures: dict[str, float] = {"first paint, from navigation": chromium.execute_script(paints)[0]}
    for name, every in (("update of every tenth law, data to paint", 10), ("update of all laws, data to paint", 1)):
        before = chromium.execute_script("return seen.length")
        if not figures.get("all rows, data to paint"):
            figures["all rows, from navigation"], figures["all rows, data to paint"] = (
                chromium.execute_script("return seen[0].painted"),
                chromium.execute_script("return seen[0].painted - seen[0].arrived"),
            )
        execute(database_url, CHANGE.format(every=every))
        wait_for(chromium, before + 1)
        figures[name] = chromium.execute_script("return seen.at(-1).painted - seen.at(-1).arrived")
    return figures


def wait_for(chromium: Chrome, painted: int) -> None:
    """Until so many answers with data were painted."""
    if not demo.wait_until(lambda: chromium.execute_script("return seen.length") >= painted, 30):
        raise demo.DemoFailed("the page does not update")


def execute(database_url: str, sql: str) -> None:
    """Run one statement."""
    connection = psycopg2.connect(database_url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
