"""Servers that go away under a running service and come back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_services import LocalServices
from test_publisher import Message, Publisher, make_messages
from tests.conftest import empty_database, empty_queue
from tests.harness import Queue, Service, check_exact, wait_settled, wait_until


@pytest.fixture(scope="module")
def own_services(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    """Servers that may be stopped; ``services`` is asked for only because it knows when to skip."""
    with LocalServices(tmp_path_factory.mktemp("outages")) as running:
        yield running


def test_the_service_outlives_its_database_and_its_broker(own_services: LocalServices, tmp_path: Path) -> None:
    """Both are restarted in the middle of a stream: the same process goes on by itself, and the totals are exact."""
    with contextlib.ExitStack() as stack:
        queue = stack.enter_context(empty_queue(own_services))
        results = stack.enter_context(empty_database(own_services))
        service = Service(tmp_path, "replica-1", queue, results)
        stack.callback(service.close)
        service.start_and_wait()
        pid = service.pid

        messages = list(make_messages(9_000, seed=21, duplicates=5, invalid=2))
        first, second, third = messages[:3_000], messages[3_000:6_000], messages[6_000:]

        # the database, with a publisher that goes on
        publisher = publish_at(queue, first, rate=1_000)
        wait_until(lambda: results.counted() > 300, "it counts")
        own_services.postgres.stop("immediate")
        wait_until(lambda: service.get("/readyz")[0] == 503, "it is not ready")
        wait_until(lambda: service.says("not consuming, what was delivered is held"), "it holds")
        assert service.get("/healthz")[0] == 200
        publisher.join()
        own_services.postgres.start()
        wait_until(service.is_ready, "it is ready again")
        publish_at(queue, second).join()
        wait_settled(own_services, queue)
        check_exact(results, first + second)

        # the broker, with messages in it: once stopped in order, once killed
        for outage, part in ((own_services.rabbitmq.stop, third[:1_500]), (own_services.rabbitmq.kill, third[1_500:])):
            publish_at(queue, part).join()
            outage()
            wait_until(lambda: service.get("/readyz")[0] == 503, "it is not ready")
            own_services.rabbitmq.start()
            wait_until(service.is_ready, "it is ready again")
        wait_settled(own_services, queue)
        check_exact(results, messages)
        assert service.is_running() and service.pid == pid
        assert service.stop() == 0


def publish_at(queue: Queue, messages: list[Message], rate: float | None = None) -> threading.Thread:
    """Publishes in a thread of its own and expects every confirm."""

    def run() -> None:
        assert Publisher([queue.url], queue.name, rate=rate).publish(messages).all_confirmed

    thread = threading.Thread(target=run)
    thread.start()
    return thread
