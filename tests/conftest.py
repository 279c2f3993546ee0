"""Private servers for the session, and a database and a queue of its own for each test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psycopg2
import pytest

from scripts import local_services
from scripts.local_services import LocalServices
from tests.harness import Queue, Results, Service

# no timed assertions: the machine may be busy, and the first draw of text builds tables of Unicode
hypothesis.settings.register_profile("here", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    """A real RabbitMQ and a real PostgreSQL, for this session only."""
    missing = local_services.missing_packages()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with LocalServices(tmp_path_factory.mktemp("services")) as running:
        yield running


@pytest.fixture
def results(services: LocalServices) -> Iterator[Results]:
    """An empty database of the test's own."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = psycopg2.connect(services.postgres.url())
    admin.autocommit = True
    with admin.cursor() as cur:
        cur.execute(f"CREATE DATABASE {name}")
    yield Results(services.postgres.url(name))
    with admin.cursor() as cur:
        cur.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


@pytest.fixture
def queue(services: LocalServices) -> Iterator[Queue]:
    """An empty queue of the test's own."""
    queue = Queue(services.rabbitmq.url(), f"votes.test-{uuid.uuid4().hex[:12]}")
    yield queue
    queue.delete()


@pytest.fixture
def start_service(queue: Queue, results: Results, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts a replica on the test's queue and database, and waits until it is ready; all are ended with the test."""
    started: list[Service] = []

    def start(wait: bool = True, **settings: str) -> Service:
        name = f"replica-{len(started) + 1}"
        addresses = {"AMQP_URL": queue.url, "DATABASE_URL": results.url, "RABBITMQ_QUEUE": queue.name}
        service = Service(tmp_path, name, addresses | settings)
        started.append(service)
        service.start()
        if wait:
            service.wait_ready()
        return service

    yield start
    for service in started:
        service.kill()
