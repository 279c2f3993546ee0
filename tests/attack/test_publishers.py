"""What somebody who may publish could do to the count: each attempt, and what holds it now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pika
import pytest

from bench.cpu import peak_megabytes
from scripts.local_services import LocalServices
from tests.harness import Queue, Results, Service, vote, wait_settled, wait_until

Start = Callable[..., Service]
LARGEST = 65_536  # bytes of a body that is read
TUNED = {"BATCH_SIZE": "500", "RABBITMQ_PREFETCH_COUNT": "2000"}
LIMIT_MB = 128


def flood(queue: Queue, bodies: Iterable[bytes]) -> None:
    """Publish them as quickly as can be; when this returns the broker has them all."""
    with queue.channel():
        connection = queue.connect()
        channel = connection.channel()
        for body in bodies:
            channel.basic_publish("", queue.name, body, pika.BasicProperties(delivery_mode=2))
        channel.queue_declare(queue.name, passive=True)  # is answered after all that was sent before
        connection.close()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", ["2000", "65535"])
def test_large_bodies_do_not_fill_the_memory(
    start_service: Start, services: LocalServices, queue: Queue, results: Results, prefetch: str
) -> None:
    """As many of the largest as a replica may have in flight: it reads on when it has written what it holds."""
    bodies = [os.urandom(LARGEST) for _ in range(1_200)]
    flood(queue, bodies)
    queue.publish(vote())
    service = start_service(**TUNED | {"RABBITMQ_PREFETCH_COUNT": prefetch})
    wait_settled(services, queue)
    print(f"{peak_megabytes(service.pid)=}")
    assert (peak := peak_megabytes(service.pid)) < LIMIT_MB, f"{peak:.0f} MB"
    assert service.stop() == 0
    assert results.counted() == 1
    assert sum(results.rejected().values()) == len(bodies)
