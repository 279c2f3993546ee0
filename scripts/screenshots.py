"""Pictures of the results page: what `make screenshots` runs.

Fills private databases with laws of every kind and takes the page at the widths of a phone, a tablet and a desktop,
light and dark, in English and French. All pictures go to .local/screenshots, and the few that docs/ shows go there too.
"""

from __future__ import annotations

import base64
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psycopg2
from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from lab.service import ROOT, ServiceProcess
from scripts import browser
from scripts.local_services import LocalServices

FOLDER = ROOT / ".local" / "screenshots"
WIDTHS = (360, 768, 1_440)
THEMES = ("light", "dark")
LANGUAGES = {"en": "en-GB", "fr": "fr-FR"}
OF_VOTE = {"RESULTS_TITLE": "Votations populaires", "RESULTS_DATE": "2026-11-29", "RESULTS_PORT": "0"}

# A law whose log and totals agree, as certifying it wants.
CERTIFIED_LAW = "law-004"
CERTIFIED = """
    INSERT INTO laws (law_id, title, closes_at) VALUES ('law-004', 'Public Transport Act', now() - interval '2 hours');
    INSERT INTO vote_audit (vote_id, law_id, choice, recorded_at, instance, redelivered)
    SELECT gen_random_uuid(), 'law-004', CASE WHEN n % 7 < 3 THEN 'oui' ELSE 'non' END,
           now() - make_interval(secs => 7300 + 10800 * (n * 7919 % 9000 / 9000.0 + n * 10007 % 8999 / 8999.0)),
           'picture', false
    FROM generate_series(1, 9000) AS n;
    INSERT INTO vote_results (law_id, oui_count, non_count)
    SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
    FROM vote_audit GROUP BY law_id
"""
# A near tie, a tie, a clear result, no votes, not yet open, as large as it gets.
STATES = """
    INSERT INTO laws (law_id, title, opens_at, closes_at, eligible_voters) VALUES
        ('law-001', 'Loi de finances pour 2026', NULL, now() + interval '3 hours', 48000),
        ('law-002', 'Loi sur la protection des sources et des zones humides', NULL, now() + interval '3 hours', 48000),
        ('law-003', 'Loi relative à l''enseignement des langues régionales', NULL, now() - interval '20 min', 48000),
        ('law-005', 'Loi d''orientation agricole', now() + interval '1 day', now() + interval '2 days', NULL),
        ('law-006', 'Freedom of Information Act', NULL, NULL, NULL),
        ('law-007', 'مشروع قانون المالية لسنة 2026', NULL, NULL, NULL),
        ('law-008', 'Loi que tout le monde a votée', NULL, NULL, NULL);
    INSERT INTO vote_results (law_id, oui_count, non_count) VALUES
        ('law-001', 16013, 16011), ('law-002', 5000, 5000), ('law-003', 20001, 8123), ('law-007', 20000, 1),
        ('law-008', 1000000000000, 1000000000001);
    INSERT INTO vote_audit (vote_id, law_id, choice, recorded_at, instance, redelivered)
    SELECT gen_random_uuid(), 'law-00' || 1 + n % 3, CASE WHEN n * 7 % 100 < 52 THEN 'oui' ELSE 'non' END,
           now() - make_interval(secs => 1300 + 10800 * (n * 7919 % 30000 / 30000.0 + n * 10007 % 29989 / 29989.0)),
           'picture', false
    FROM generate_series(1, 30000) AS n
"""
FORTY = """
    INSERT INTO laws (law_id, title, closes_at)
    SELECT 'law-' || to_char(n, 'FM000'), 'Loi numéro ' || n || ' relative à l''enseignement',
           now() + make_interval(hours => CASE WHEN n % 3 = 0 THEN -1 ELSE 3 END)
    FROM generate_series(1, 41) AS n WHERE n <> 4;
    INSERT INTO vote_results (law_id, oui_count, non_count)
    SELECT law_id, right(law_id, 3)::int * 1237 % 9973, right(law_id, 3)::int * 2741 % 9949 FROM laws
    WHERE law_id <> 'law-004'
"""


class Scene(NamedTuple):
    """What stands in the database beside the certified law, how the service is set, and how many charts to wait for."""

    sql: str
    settings: Mapping[str, str]
    charts: int


SCENES = {
    "states": Scene(STATES, OF_VOTE, 4),
    "forty": Scene(FORTY, OF_VOTE, 1),
    "embargo": Scene(STATES, OF_VOTE | {"RESULTS_VISIBLE": "after_close"}, 2),
}
IN_THE_DOCS = {
    "results-desktop-light.png": "states-1440-en-light.png",
    "results-desktop-dark.png": "states-1440-fr-dark.png",
    "results-phone-light.png": "states-360-fr-light.png",
    "results-phone-dark.png": "embargo-360-en-dark.png",
}


def main() -> int:
    """Take the pictures and return the exit code."""
    if browser.missing():
        print(f"not installed: {', '.join(browser.missing())}", file=sys.stderr)
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, LocalServices(Path(folder) / "services", management=True) as services:
        for name, scene in SCENES.items():
            execute(services.postgres.url(), f"CREATE DATABASE {name}")
            database_url = services.postgres.url(name)
            addresses = {"AMQP_URL": services.rabbitmq.url(), "DATABASE_URL": database_url, "RABBITMQ_QUEUE": name}
            settings = {"METRICS_PORT": "0", **addresses, **scene.settings}
            with ServiceProcess(Path(folder) / f"{name}.log", settings) as service:
                execute(database_url, CERTIFIED)
                certify(CERTIFIED_LAW, addresses | {"RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url()})
                execute(database_url, scene.sql)
                port = service.wait_says("starting")["fields"]["RESULTS_PORT"]
                take_all(name, scene, f"http://127.0.0.1:{port}/", Path(folder))
    for target, source in IN_THE_DOCS.items():
        (ROOT / "docs" / target).write_bytes((FOLDER / source).read_bytes())
    return 0


def execute(database_url: str, sql: str) -> None:
    """Run statements, each as its own transaction where there is one alone."""
    connection = psycopg2.connect(database_url)
    try:
        connection.autocommit = True
        connection.cursor().execute(sql)
    finally:
        connection.close()


def certify(law_id: str, addresses: Mapping[str, str]) -> None:
    """Seal the log and certify a law, as officials do. Raises CalledProcessError."""
    for command in (["seal"], ["certify", law_id]):
        subprocess.run(
            [sys.executable, "reconcile.py", *command],
            cwd=ROOT,
            env={**os.environ, **addresses},
            check=True,
            stdout=subprocess.DEVNULL,
        )


def take_all(name: str, scene: Scene, address: str, folder: Path) -> None:
    """Take a scene in every language, width and theme."""
    for language, locale in LANGUAGES.items():
        with browser.chromium(folder / f"{name}-{language}", locale) as chromium:
            for width, theme in itertools.product(WIDTHS, THEMES):
                browser.show_as(chromium, width, 800, theme, "reduce")
                take(chromium, address, scene.charts, FOLDER / f"{name}-{width}-{language}-{theme}.png")


def take(chromium: Chrome, address: str, charts: int, path: Path) -> None:
    """Take the whole page, once it shows its data and that many charts."""
    chromium.get(address)
    is_drawn = "return document.body.className === 'live' && document.querySelectorAll('.chart').length >= arguments[0]"
    WebDriverWait(chromium, 60).until(lambda page: page.execute_script(is_drawn, charts))
    size = chromium.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    picture = chromium.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(picture["data"]))
    print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
