"""Private servers for the session, and a database and a queue of its own for each test."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from database import Database
from reconcile import ask_broker
from scripts import local_services
from scripts.local_services import LocalServices
from tests.compose import ComposeServers
from tests.harness import ROOT, Queue, Results, Service, wait_until

# tests that stop the broker would fill their reports with pika's own stack traces
logging.getLogger("pika").setLevel(logging.CRITICAL)

# no timed assertions: the machine may be busy, and the first draw of text builds tables of Unicode
hypothesis.settings.register_profile("here", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real RabbitMQ and a real PostgreSQL, for this session only; with TEST_SERVERS=compose those of the stack."""
    if os.environ.get("TEST_SERVERS") == "compose":
        with ComposeServers() as running:
            yield running
        return
    missing = local_services.missing_packages()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with LocalServices(tmp_path_factory.mktemp("services"), management=True) as running:
        yield running


@contextlib.contextmanager
def empty_database(services: Any, template: Results | None = None) -> Iterator[Results]:
    """A database that lasts for the block; a copy of ``template``, if given, to which nobody is connected."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = Results(services.postgres.url())
    admin.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template.url.rpartition('/')[2]}" if template else ""))
    try:
        results = Results(services.postgres.url(name))
        # of several servers a standby may be asked first, and it has the database a moment later
        wait_until(results.is_there, "the database is there", 30)
        yield results
    finally:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def empty_queue(services: Any, queue_type: str = "classic") -> Iterator[Queue]:
    """A queue that lasts for the block."""
    queue = Queue(services.rabbitmq.url(), f"votes.test-{uuid.uuid4().hex[:12]}", queue_type)
    try:
        yield queue
    finally:
        queue.delete()


@pytest.fixture
def results(services: LocalServices) -> Iterator[Results]:
    """An empty database of the test's own."""
    with empty_database(services) as results:
        yield results


@pytest.fixture
def database(results: Results) -> Iterator[Database]:
    """The test's database as a replica writes to it, with its tables."""
    with Database(results.url, pool_min=1, pool_max=2, timeout=10, instance="replica-1") as database:
        database.initialise_schema()
        yield database


@pytest.fixture
def queue(services: LocalServices) -> Iterator[Queue]:
    """An empty queue of the test's own."""
    with empty_queue(services) as queue:
        yield queue


@pytest.fixture
def start_service(queue: Queue, results: Results, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts a replica on the test's queue and database, and waits until it is ready; all are ended with the test."""
    started: list[Service] = []

    def start(wait: bool = True, **settings: str) -> Service:
        service = Service(tmp_path, f"replica-{len(started) + 1}", queue, results, settings)
        started.append(service)
        service.start()
        if wait:
            service.wait_ready()
        return service

    yield start
    for service in started:
        service.kill()


@pytest.fixture(scope="module")
def idle_queue(services: LocalServices) -> Iterator[Queue]:
    """An empty queue that the management API has figures of, so that not every test has to wait for them."""
    with empty_queue(services) as queue:
        with queue.channel():
            pass  # declares it
        settings = {"AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name}
        settings["RABBITMQ_MANAGEMENT_URL"] = services.rabbitmq.management_url()
        wait_until(lambda: ask_broker(settings).unacked == 0, "the management API has figures")
        yield queue


@pytest.fixture
def run(services: LocalServices, queue: Queue, results: Results) -> Callable[..., subprocess.CompletedProcess[str]]:
    """reconcile.py as a process of its own, on the test's queue and database."""

    def run(*arguments: str, code: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ["PATH"],
            "AMQP_URL": queue.url,
            "RABBITMQ_QUEUE": queue.name,
            "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
            "DATABASE_URL": results.url,
        }
        return subprocess.run(
            [sys.executable, *(["-c", code] if code else [str(ROOT / "reconcile.py")]), *arguments],
            env=environment | settings,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT / "tests",  # where no .env is
        )

    return run
