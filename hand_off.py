"""What the consumer's and the batcher's thread tell each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deliveries import Delivery
from rabbitmq_client import RabbitMQClient

MAX_WAITING_BYTES = 8 * 1024 * 1024  # for the batcher; the prefetch counts messages, of whatever size
BYTES_BESIDE_BODY = 1024  # of a message, roughly
MAX_BURST_BYTES = 512 * 1024


class Burst(NamedTuple):
    """Deliveries of one channel, its ``generation``, in the order they came; ``arrived_at`` is in monotonic seconds."""

    generation: int
    arrived_at: float
    deliveries: list[Delivery]
    size: int  # bytes of their bodies


def split(deliveries: list[Delivery], now: float) -> Iterator[Burst]:
    """The bursts in which these deliveries are handed over: one, unless they hold more than MAX_BURST_BYTES."""
    size = sum([len(delivery.body) for delivery in deliveries])
    if size > MAX_BURST_BYTES and len(deliveries) > 1:
        middle = len(deliveries) // 2
        yield from split(deliveries[:middle], now)
        yield from split(deliveries[middle:], now)
    else:
        yield Burst(deliveries[0].generation, now, deliveries, size)


class HandOff:
    """The consumer has deliveries, the batcher says what becomes of them."""

    def __init__(self, client: RabbitMQClient) -> None:
        self._client = client  # the batcher calls of it what any thread may
        self._bursts: queue.SimpleQueue[Burst | None] = queue.SimpleQueue()
        self._bytes_put = self._bytes_taken = 0  # each written by one thread
        self._was_taken = threading.Event()
        self._given_up = 0  # the last generation whose deliveries are to go back to the queue
        self.is_wanted = False  # deliveries are; written by the batcher
        self.stopping = threading.Event()  # set by the consumer, so that no wait of the batcher is sat out

    def put(self, burst: Burst) -> None:
        """Hand deliveries over. This and the next three are for the consumer, the others for the batcher."""
        self._bytes_put += burst.size + BYTES_BESIDE_BODY * len(burst.deliveries)
        self._bursts.put(burst)

    def has_room(self, seconds: float) -> bool:
        """Whether more may be handed over; where it may not, so long is waited for the batcher to take some."""
        self._was_taken.clear()
        if self._bytes_put - self._bytes_taken > MAX_WAITING_BYTES:
            self._was_taken.wait(seconds)
        return self._bytes_put - self._bytes_taken <= MAX_WAITING_BYTES

    def end(self) -> None:
        """Say that no more will come."""
        self._bursts.put(None)
        self.stopping.set()

    @property
    def is_given_up(self) -> bool:
        """Whether what the present channel delivered is to go back to the queue."""
        return self._client.generation <= self._given_up

    def take(self, seconds: float) -> Burst | None:
        """The next burst, within so many seconds, or None after the last. Raises queue.Empty."""
        burst = self._bursts.get(timeout=max(0.0, seconds))
        if burst is not None:
            self._bytes_taken += burst.size + BYTES_BESIDE_BODY * len(burst.deliveries)
            self._was_taken.set()
        return burst

    def want(self, is_wanted: bool) -> None:
        """Ask for deliveries, or for no more."""
        if is_wanted != self.is_wanted:
            self.is_wanted = is_wanted
            self._client.wake()

    def give_up(self, generation: int | None = None) -> None:
        """Let the deliveries of that channel and of those before it go back to the queue; None: of the present one."""
        self._given_up = self._client.generation if generation is None else generation
        self._client.wake()

    def can_settle(self, generation: int) -> bool:
        """Whether deliveries of that channel can be settled; else the broker has taken them back, or is to."""
        return generation == self._client.generation and generation > self._given_up

    def settle(self, generation: int, acked_through: int | None, rejected_tags: Sequence[int]) -> None:
        """As RabbitMQClient.settle."""
        assert generation > self._given_up, "an ack would cover votes that go back to the queue"
        self._client.settle(generation, acked_through, rejected_tags)
