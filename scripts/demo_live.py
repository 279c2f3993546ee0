"""The results page with something to watch: what `make demo-live` runs.

As scripts/demo.py it uses a RabbitMQ and a PostgreSQL of its own, and removes everything at the end.
The first votes come in arrays. Then votes keep coming in, 50 a second, on laws of every status, until Ctrl-C; then the
page's totals are the proof. It ends with 0 where all that was confirmed is counted, with 1 where it is not, or where a
server or the service failed.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Set
from pathlib import Path

import psycopg2

from lab.service import ROOT
from rabbitmq_client import BrokerUnavailable
from scripts import demo
from scripts.local_services import SIGNALS, LocalServices, LocalServicesError, exit_on_signals
from test_publisher import Publisher, in_arrays, make_messages

RATE = 50.0
PORT = 8001  # demo.RESULTS_ADDRESS; or, where that is taken, a free one
FIRST_VOTES = 2_000  # so that the page is not empty at first
LAWS = {
    "law-001": "Loi de finances pour 2026",
    "law-002": "Loi sur la protection des sources et des zones humides",
    "law-003": "Loi relative à l'enseignement des langues régionales",
    "law-004": "Public Transport Act",
    "law-005": "Loi d'orientation agricole",
    "law-006": "Freedom of Information Act",
}
CLOSED, CERTIFIED = "law-005", "law-006"  # once the first votes are counted


def main() -> int:
    """Run until Ctrl-C and return the exit code."""
    exit_on_signals("interrupted: stopping everything")
    try:
        with tempfile.TemporaryDirectory(prefix="votes-demo-") as folder:
            demo.install_servers()
            demo.say("starting a private RabbitMQ and a private PostgreSQL")
            with LocalServices(Path(folder) / "services", management=True) as services:
                return show(services, Path(folder))
    except (demo.DemoFailed, LocalServicesError, BrokerUnavailable) as exc:
        print(f"demo-live: {exc}", file=sys.stderr)
        return 1


def show(services: LocalServices, folder: Path) -> int:
    """Keep votes coming in until a signal; then wait for the count, compare, and return the exit code."""
    amqp_url, database_url = services.rabbitmq.url(), services.postgres.url()
    demo.say("starting the service (aggregator.py)")
    with demo.running_service(folder, amqp_url, database_url, _port()) as service:
        write_laws(database_url)
        parts = (make_messages(200_000, len(LAWS), seed, 2, 1) for seed in itertools.count())
        votes = itertools.chain.from_iterable(parts)
        first = Publisher([amqp_url], demo.QUEUE).publish(in_arrays(itertools.islice(votes, FIRST_VOTES), demo.BOX))
        if not wait_for(first.votes().keys(), database_url):
            raise demo.DemoFailed("the first votes are not counted")
        demo.say(f"closing {CLOSED} and {CERTIFIED}, sealing the audit log, certifying {CERTIFIED}")
        end_laws(services)
        live = Publisher([amqp_url], demo.QUEUE, rate=RATE)
        for signum in SIGNALS:
            signal.signal(signum, lambda _signum, _frame: live.stop())
        demo.say(f"{RATE:.0f} votes a second are coming in, until Ctrl-C; watch them at")
        print(f"\n  {service.address}/\n", flush=True)
        result = live.publish(message for message in votes if message.law_id not in (CLOSED, CERTIFIED))
        demo.say("stopping")
        confirmed = first.votes().keys() | result.votes().keys()
        counted = wait_for(confirmed, database_url)
        service.stop()
    demo.say(f"{len(confirmed):,} votes confirmed, {'all' if counted else 'NOT all'} of them counted")
    return 0 if counted and not result.failure else 1


def write_laws(database_url: str) -> None:
    """Give the laws their titles, as an operator does."""
    connection = psycopg2.connect(database_url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.executemany("INSERT INTO laws (law_id, title) VALUES (%s, %s)", LAWS.items())
    finally:
        connection.close()


def wait_for(votes: Set[str], database_url: str) -> bool:
    """Wait until all these votes are counted; whether they are."""
    return demo.wait_until(lambda: votes <= demo.Outcome.read(database_url).audited, demo.COUNTED_SECONDS)


def end_laws(services: LocalServices) -> None:
    """Close two laws and certify one of them, as officials do. Raises DemoFailed."""
    connection = psycopg2.connect(services.postgres.url())
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("UPDATE laws SET status = 'closed' WHERE law_id IN (%s, %s)", (CLOSED, CERTIFIED))
    finally:
        connection.close()
    addresses = {
        "AMQP_URL": services.rabbitmq.url(),
        "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
        "DATABASE_URL": services.postgres.url(),
        "RABBITMQ_QUEUE": demo.QUEUE,
    }
    for command in (["seal"], ["certify", CERTIFIED]):
        done = subprocess.run(
            [sys.executable, "reconcile.py", *command],
            cwd=ROOT,
            env=dict(os.environ) | addresses,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise demo.DemoFailed(f"reconcile.py {command[0]}: {done.stderr}")


def _port() -> int:
    try:
        socket.create_server(("", PORT)).close()
    except OSError:
        return 0
    return PORT


if __name__ == "__main__":
    sys.exit(main())
