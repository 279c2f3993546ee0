"""PgBouncer between the service and its database: exact counts, and limits that hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

import seals
from database import Database
from scripts.local_cluster import PgBouncerServer
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages
from tests.harness import ROOT, Queue, Results, Service, check_exact, vote, wait_settled, wait_until
from votes import Vote

VOTES = int(os.environ.get("POOLER_VOTES", "20000"))
LOCK_SECONDS = float(os.environ.get("POOLER_LOCK_SECONDS", "8"))
BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture
def start_pooler(
    _servers_are_installed: None, services: LocalServices, tmp_path: Path
) -> Iterator[Callable[[str], PgBouncerServer]]:
    """Starts a PgBouncer in the given mode, as its package configures it otherwise; it is gone with the test."""
    started: list[PgBouncerServer] = []

    def start(mode: str, **settings: int) -> PgBouncerServer:
        pooler = PgBouncerServer(tmp_path / "pgbouncer", services.postgres, mode, **settings)
        started.append(pooler)
        pooler.start()
        return pooler

    yield start
    for pooler in started:
        pooler.kill()
        pooler.remove_data()


def through(pooler: PgBouncerServer, results: Results) -> str:
    """The test's database by way of the pooler."""
    return pooler.url(results.url.rpartition("/")[2])


def test_the_count_is_exact_through_a_pooler_that_is_killed(
    services: LocalServices,
    queue: Queue,
    results: Results,
    start_pooler: Callable[[str], PgBouncerServer],
    start_service: Callable[..., Service],
) -> None:
    """Transaction mode, 20 % copies, killed three times in the stream."""
    pooler = start_pooler("transaction")
    for _ in range(2):
        start_service(DATABASE_URL=through(pooler, results))
    messages = list(make_messages(VOTES, 5, seed=1, duplicates=20, invalid=0.1))
    thread = threading.Thread(target=lambda: Publisher(queue.urls, queue.name).publish(messages))
    thread.start()
    for part in (1, 2, 3):
        wait_until(lambda: results.counted() > part * VOTES / 5, "it counts", 120)  # noqa: B023
        pooler.kill()
        pooler.start()
    thread.join()
    wait_settled(services, queue, 180)
    check_exact(results, messages)


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_a_lock_adds_no_backends(
    services: LocalServices,
    queue: Queue,
    results: Results,
    start_pooler: Callable[[str], PgBouncerServer],
    start_service: Callable[..., Service],
    mode: str,
) -> None:
    """The limits hold, so that a statement that waits ends, and its backend is used again."""
    pooler = start_pooler(mode)
    service = start_service(DATABASE_URL=through(pooler, results), DB_TIMEOUT_SECONDS="2", HOLD_SECONDS="60")
    queue.publish(*[vote() for _ in range(100)])
    wait_settled(services, queue)
    before = results.value(BACKENDS)
    most = 0
    with closing(psycopg2.connect(results.url)) as lock:
        lock.cursor().execute("LOCK TABLE vote_audit")
        queue.publish(*[vote() for _ in range(100)])
        until = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < until:  # the lock is the waiting
            most = max(most, results.value(BACKENDS) - 1)  # that of the lock is the test's
            time.sleep(0.2)
        waits = results.query(
            "SELECT extract(epoch FROM now() - xact_start) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    assert all(seconds < 3 for (seconds,) in waits)
    wait_settled(services, queue)
    assert results.counted() == 200 and service.is_running()
    assert most <= before + 1, f"{before} backends before, {most} while the table was locked"


def test_a_startup_parameter_that_is_refused_is_an_error_that_names_the_remedy(
    results: Results, start_pooler: Callable[[str], PgBouncerServer], start_service: Callable[..., Service]
) -> None:
    """What the user has put into DATABASE_URL is still sent."""
    pooler = start_pooler("transaction")
    service = start_service(wait=False, DATABASE_URL=through(pooler, results) + "?options=-c%20work_mem%3D8MB")
    wait_until(lambda: service.says("database not usable"), "it says so")
    (line, *_) = [line for line in service.lines() if line["message"] == "database not usable"]
    assert line["level"] == "ERROR" and "ignore_startup_parameters" in line["fields"]["error"]


def test_seals_and_certificates_are_made_through_a_pooler(
    services: LocalServices,
    queue: Queue,
    results: Results,
    start_pooler: Callable[[str], PgBouncerServer],
    start_service: Callable[..., Service],
) -> None:
    """In transaction mode, where nothing of a session lasts."""
    pooler = start_pooler("transaction")
    service = start_service(DATABASE_URL=through(pooler, results))
    queue.publish(*[vote("law-001") for _ in range(30)])
    wait_settled(services, queue)
    service.stop()
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-001', 'x', 'closed')")
    for command in (
        ["seal"],
        ["verify"],
        ["verify", "--workers", "2"],
        ["results"],
        ["certify", "law-001"],
        ["export-audit"],
        [],
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "reconcile.py"), *command],
            env={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": through(pooler, results),
                "AMQP_URL": queue.url,
                "RABBITMQ_QUEUE": queue.name,
                "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_the_log_verifies_through_a_pooler_that_has_one_connection(
    results: Results, database: Database, start_pooler: Callable[..., PgBouncerServer], mode: str
) -> None:
    """The other process gets none for as long as ours is held, and is not waited for."""
    database.batch_update_results([Vote.from_message(json.dumps(vote()).encode()) for _ in range(30)], [])
    with seals.sealing_session(results.url) as (reader, writer):
        (made,) = seals.seal(reader, writer)
    pooler = start_pooler(mode, default_pool_size=1)
    with closing(psycopg2.connect(through(pooler, results))) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        found = seals.verify(conn, [made.name()], workers=2)
    assert (found.problems, found.sealed_votes) == ([], 30)
