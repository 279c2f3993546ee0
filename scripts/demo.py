"""The whole way of a vote, for a newcomer: what `make demo` runs.

It always uses a RabbitMQ and a PostgreSQL of its own, in a temporary folder and whatever the environment or .env says:
a demonstration counts nothing into anybody's totals. Everything is stopped and removed at the end.

Exit codes: 0 the totals are exactly what was published, 1 they are not, or a server or the service failed,
128 + n ended by signal n.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pika
import psycopg2

from lab.service import ServiceFailed, ServiceProcess
from rabbitmq_client import BrokerUnavailable
from scripts import local_services
from scripts.local_services import LocalServices, LocalServicesError, exit_on_signals
from test_publisher import Message, Publisher, Result, in_arrays, make_messages

QUEUE = "votes.aggregation"
RESULTS_ADDRESS = "http://127.0.0.1:8001/"  # of scripts/demo_live.py, where its port is free
VOTES, LAWS, SEED, DUPLICATE_PERCENT, INVALID_PERCENT = 1_000, 3, 2025, 20, 5
BOX = 20  # votes in an array
COUNTED_SECONDS = 30.0

STARTED = time.monotonic()


class DemoFailed(Exception):
    """A step did not come to its end; the message says which, and why."""


@dataclass
class Outcome:
    """What the service has left in the database."""

    totals: dict[str, tuple[int, int]]
    audited: set[str]
    duplicates: int
    rejected: int

    @property
    def counted(self) -> int:
        """Votes in the totals."""
        return sum(map(sum, self.totals.values()))

    @classmethod
    def read(cls, url: str) -> Outcome:
        """Read it all in one snapshot. Raises psycopg2.Error."""
        connection = psycopg2.connect(url)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # all of one moment
                cursor.execute("SELECT law_id, oui_count, non_count FROM vote_results ORDER BY law_id")
                totals = {law_id: (oui, non) for law_id, oui, non in cursor.fetchall()}
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
    exit_on_signals("interrupted: stopping everything")
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
        say(f"the results page: {service.address}/ (until the service is stopped)")
        say(f"publishing {VOTES:,} votes, {copies} copies of some and {unreadable} unreadable ones (seed {SEED})")
        published = Publisher([amqp_url], QUEUE).publish(some_in_arrays(SEED))
        summary, arrays = published.summary(), sum(len(message.array) > 0 for message in published.messages)
        messages = f"{summary['messages']:,} messages ({arrays} arrays of up to {BOX})"
        say(f"{summary['confirmed']:,} confirmed by the broker, in {messages}; waiting until all are accounted for")
        accounted = wait_until(lambda: _is_accounted_for(Outcome.read(database_url), published), COUNTED_SECONDS)
        say("all are accounted for" if accounted else f"not all are accounted for after {COUNTED_SECONDS:.0f} s")
        say("stopping the service")
        exit_code = service.stop()
    left = messages_left(amqp_url)
    say(f"queue: {left} messages left; service: exit code {exit_code}")
    outcome = Outcome.read(database_url)
    print_totals(published, outcome)
    return print_verdict(published, outcome) and left == 0 and exit_code == 0


def some_in_arrays(seed: int) -> Iterator[Message]:
    """Votes, copies and unreadable ones, the second half of them in arrays."""
    messages = make_messages(VOTES, LAWS, seed, DUPLICATE_PERCENT, INVALID_PERCENT)
    yield from islice(messages, VOTES // 2)
    yield from in_arrays(messages, BOX)


def print_totals(published: Result, outcome: Outcome) -> None:
    """Print the totals of each law beside those that the publisher's confirmed votes make."""
    expected = published.totals()
    print(f"\n  {'':<12} {'counted in PostgreSQL':>22}   {'confirmed to publisher':>22}")
    print(f"  {'law':<12} {'oui':>11}{'non':>11}   {'oui':>11}{'non':>11}")
    for law_id in sorted(expected | outcome.totals):
        counted, wanted = (totals.get(law_id, (0, 0)) for totals in (outcome.totals, expected))
        sign = "ok" if counted == wanted else "DIFFERENT"
        columns = [f"{oui:>11,}{non:>11,}" for oui, non in (counted, wanted)]
        print(f"  {law_id:<12} {columns[0]}   {columns[1]}   {sign}")


def print_verdict(published: Result, outcome: Outcome) -> bool:
    """Print the one line that says whether it worked, and return it."""
    summary, expected = published.summary(), published.totals()
    difference = [
        outcome.totals.get(law_id, (0, 0))[choice] - expected.get(law_id, (0, 0))[choice]
        for law_id in expected | outcome.totals
        for choice in (0, 1)
    ]
    missing = len(published.votes().keys() - outcome.audited)
    lost = max(missing, -sum(number for number in difference if number < 0))
    twice = sum(number for number in difference if number > 0)
    print(
        f"\npublished {summary['confirmed']}  counted {outcome.counted}  duplicates {outcome.duplicates}  "
        f"rejected {outcome.rejected}  lost {lost}  counted twice {twice}\n",
        flush=True,
    )
    return lost == twice == 0 and published.all_confirmed and _is_accounted_for(outcome, published)


def _is_accounted_for(outcome: Outcome, published: Result) -> bool:
    summary = published.summary()
    return (len(outcome.audited), outcome.duplicates, outcome.rejected) == (
        summary["votes"],
        summary["duplicates"],
        summary["invalid"],
    )


@contextmanager
def running_service(folder: Path, amqp_url: str, database_url: str, port: int = 0) -> Iterator[ServiceProcess]:
    """Run aggregator.py, ready, for the block; with port 0 it takes a free one.

    Raises DemoFailed, with the end of its log, also for what fails in the block.
    """
    settings = {
        "AMQP_URL": amqp_url,
        "DATABASE_URL": database_url,
        "RABBITMQ_QUEUE": QUEUE,
        "METRICS_PORT": str(port),
    }
    service = ServiceProcess(folder / "demo.log", settings)
    try:
        with service:
            yield service
    except ServiceFailed as exc:
        raise DemoFailed(str(exc)) from exc
    except (DemoFailed, BrokerUnavailable, psycopg2.Error) as exc:
        raise DemoFailed(f"{str(exc).strip()}; {service.log_tail()}") from exc


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


if __name__ == "__main__":
    sys.exit(main())
