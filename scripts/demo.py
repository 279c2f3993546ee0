"""The whole way of a vote, for a newcomer: what `make demo` runs.

It always uses a RabbitMQ and a PostgreSQL of its own, in a temporary folder and whatever the environment or .env says:
a demonstration counts nothing into anybody's totals. Everything is stopped and removed at the end.

Exit codes: 0 the totals are exactly what was published, 1 they are not, or a server or the service failed,
128 + n ended by signal n.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pika
import psycopg2

from rabbitmq_client import BrokerUnavailable
from scripts import local_services
from scripts.local_services import LocalServices, LocalServicesError
from test_publisher import Publisher, Result, make_messages

ROOT = Path(__file__).resolve().parent.parent
QUEUE = "votes.aggregation"
LOG = "aggregator.log"
RESULTS_ADDRESS = "http://127.0.0.1:8001/"  # of scripts/demo_live.py, where its port is free
VOTES, LAWS, SEED, DUPLICATE_PERCENT, INVALID_PERCENT = 1_000, 3, 2025, 20, 5
READY_SECONDS = 30.0
COUNTED_SECONDS = 30.0
STOP_SECONDS = 30.0

STARTED = time.monotonic()


class DemoFailed(Exception):
    """A step did not come to its end; the message says which, and why."""


@dataclass
class Results:
    """What the service has left in the database."""

    totals: dict[str, dict[str, int]]
    audited: set[str]
    duplicates: int
    rejected: int

    @property
    def counted(self) -> int:
        """Votes in the totals."""
        return sum(law["oui"] + law["non"] for law in self.totals.values())

    @classmethod
    def read(cls, url: str) -> Results:
        """Read it all in one snapshot. Raises psycopg2.Error."""
        connection = psycopg2.connect(url)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # all of one moment
                cursor.execute("SELECT law_id, oui_count, non_count FROM vote_results ORDER BY law_id")
                totals = {law_id: {"oui": oui, "non": non} for law_id, oui, non in cursor.fetchall()}
                cursor.execute("SELECT vote_id::text FROM vote_audit")
                audited = {vote_id for (vote_id,) in cursor.fetchall()}
                cursor.execute(
                    "SELECT (SELECT count(*) FROM duplicate_attempts), (SELECT count(*) FROM rejected_messages)"
                )
                duplicates, rejected = cursor.fetchone() or (0, 0)
                return cls(totals, audited, duplicates, rejected)
        finally:
            connection.close()


def main() -> int:
    """Run the demonstration and return the exit code."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _exit_on_signal)
    try:
        with tempfile.TemporaryDirectory(prefix="votes-demo-") as folder:
            install_servers()
            say("starting a private RabbitMQ and a private PostgreSQL")
            with LocalServices(Path(folder) / "services") as services:
                passed = demonstrate(services, Path(folder))
                say("stopping both servers and removing their data")
            say(f"done; to watch votes come in: make demo-live, and {RESULTS_ADDRESS} in a browser")
            return 0 if passed else 1
    except (DemoFailed, LocalServicesError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1


def demonstrate(services: LocalServices, folder: Path) -> bool:
    """Publish, let the service count, compare. Returns whether everything is as published."""
    amqp_url, database_url = services.rabbitmq.url(), services.postgres.url()
    say("starting the service (aggregator.py)")
    with running_service(folder, amqp_url, database_url) as service:
        copies, unreadable = VOTES * DUPLICATE_PERCENT // 100, VOTES * INVALID_PERCENT // 100
        page = f"http://127.0.0.1:{port_of(folder / LOG)}/"
        say(f"the results page: {page} (until the service is stopped)")
        say(f"publishing {VOTES:,} votes, {copies} copies of some and {unreadable} unreadable messages (seed {SEED})")
        messages = make_messages(VOTES, LAWS, SEED, DUPLICATE_PERCENT, INVALID_PERCENT)
        published = Publisher([amqp_url], QUEUE).publish(messages)
        summary = published.summary()
        say(f"{summary['confirmed']:,} messages confirmed by the broker; waiting until all are accounted for")
        accounted = wait_until(lambda: _is_accounted_for(Results.read(database_url), published), COUNTED_SECONDS)
        say("all are accounted for" if accounted else f"not all are accounted for after {COUNTED_SECONDS:.0f} s")
        say("stopping the service")
        service.terminate()
        exit_code = service.wait(STOP_SECONDS)
    left = messages_left(amqp_url)
    say(f"queue: {left} messages left; service: exit code {exit_code}")
    results = Results.read(database_url)
    print_totals(published, results)
    return print_verdict(published, results) and left == 0 and exit_code == 0


def print_totals(published: Result, results: Results) -> None:
    """Print the totals of each law beside those that the publisher's confirmed votes make."""
    expected = published.totals()
    none = {"oui": 0, "non": 0}
    print(f"\n  {'':<12} {'counted in PostgreSQL':>22}   {'confirmed to publisher':>22}")
    print(f"  {'law':<12} {'oui':>11}{'non':>11}   {'oui':>11}{'non':>11}")
    for law_id in sorted(expected | results.totals):
        counted, wanted = results.totals.get(law_id, none), expected.get(law_id, none)
        sign = "ok" if counted == wanted else "DIFFERENT"
        columns = f"{counted['oui']:>11,}{counted['non']:>11,}   {wanted['oui']:>11,}{wanted['non']:>11,}"
        print(f"  {law_id:<12} {columns}   {sign}")


def print_verdict(published: Result, results: Results) -> bool:
    """Print the one line that says whether it worked, and return it."""
    summary, expected = published.summary(), published.totals()
    difference = [
        results.totals.get(law_id, {}).get(choice, 0) - expected.get(law_id, {}).get(choice, 0)
        for law_id in expected | results.totals
        for choice in ("oui", "non")
    ]
    missing = len(published.votes().keys() - results.audited)
    lost = max(missing, -sum(number for number in difference if number < 0))
    twice = sum(number for number in difference if number > 0)
    print(
        f"\npublished {summary['confirmed']}  counted {results.counted}  duplicates {results.duplicates}  "
        f"rejected {results.rejected}  lost {lost}  counted twice {twice}\n",
        flush=True,
    )
    return lost == twice == 0 and published.all_confirmed and _is_accounted_for(results, published)


def _is_accounted_for(results: Results, published: Result) -> bool:
    summary = published.summary()
    return (len(results.audited), results.duplicates, results.rejected) == (
        summary["votes"],
        summary["duplicates"],
        summary["invalid"],
    )


@contextmanager
def running_service(folder: Path, amqp_url: str, database_url: str, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Run aggregator.py and wait until it is ready; killed at the end should it still run. Raises DemoFailed.

    With port 0 it takes a free one: ``port_of`` its log tells which.
    """
    log = folder / LOG
    environment = {
        "PATH": os.environ["PATH"],
        "AMQP_URL": amqp_url,
        "DATABASE_URL": database_url,
        "RABBITMQ_QUEUE": QUEUE,
        "METRICS_PORT": str(port),
        "INSTANCE_NAME": "demo",
    }
    with log.open("wb") as output:  # in the folder, where no .env stands
        service = subprocess.Popen(
            [sys.executable, str(ROOT / "aggregator.py")], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        if not wait_until(lambda: service.poll() is not None or _is_ready(log), READY_SECONDS):
            raise DemoFailed(f"the service is not ready after {READY_SECONDS:.0f} s")
        if service.poll() is not None:
            raise DemoFailed(f"the service ended with exit code {service.returncode} while it started")
        yield service
    except (DemoFailed, BrokerUnavailable, subprocess.TimeoutExpired, psycopg2.Error) as exc:
        tail = "\n  ".join(log.read_text(errors="replace").splitlines()[-10:])
        raise DemoFailed(f"{str(exc).strip()}; the end of the service's log:\n  {tail}") from exc
    finally:
        service.kill()
        service.wait()


def port_of(log: Path) -> int | None:
    """The port that the service has taken and logged; None where it has not yet."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return next((line["fields"]["METRICS_PORT"] for line in lines if line["message"] == "starting"), None)


def _is_ready(log: Path) -> bool:
    port = port_of(log)
    if port is None:
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # 503 is one too
        return False


def messages_left(amqp_url: str) -> int:
    """How many messages are on the queue, now that nobody consumes."""
    connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
    try:
        return int(connection.channel().queue_declare(QUEUE, passive=True).method.message_count)
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def say(step: str) -> None:
    """Print what happens now, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {step}", flush=True)


def install_servers() -> None:
    """Install what is missing of RabbitMQ and PostgreSQL, where we may."""
    missing = local_services.missing_packages()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        local_services.install(missing)  # elsewhere the start says what to do


def _exit_on_signal(signum: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not break the clean-up off
    say("interrupted: stopping everything")
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
