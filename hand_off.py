"""What the consumer's and the batcher's thread tell each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from deliveries import Delivery
from rabbitmq_client import RabbitMQClient
from votes import CutBody, Rejection, Vote, read_message

MAX_WAITING_BYTES = 8 * 1024 * 1024  # for the batcher; the prefetch counts messages, of whatever size
BYTES_BESIDE_BODY = 1024  # of a vote, roughly
FLUSH_BYTES = 128 * 1024  # of votes, with BYTES_BESIDE_BODY: a hundred
MAX_BURST_BYTES = 64 * 1024  # so that the batcher can begin with the first votes while the next are read
MAX_BURST_MESSAGES = 1_000  # and one array more: of the smallest elements that many bytes hold thirty times as many


class Burst(NamedTuple):
    """What was read of deliveries of one channel, in the order they came; votes of one delivery stand together.

    ``generation`` is the channel's; ``arrived_at`` is in monotonic seconds; ``size`` is that of their bodies, in bytes.
    """

    generation: int
    arrived_at: float
    messages: list[Vote | Rejection]
    traceparents: dict[int, str]  # by delivery tag, of those that carry one
    size: int


class Signal(Enum):
    """What the batcher is told beside bursts."""

    WRITTEN = "a batch"
    END = "no more will come"


def read(deliveries: Sequence[Delivery], now: float) -> Iterator[Burst]:
    """Read deliveries that came at ``now``, each burst when it is asked for: full at MAX_BURST_BYTES or _MESSAGES."""
    messages: list[Vote | Rejection] = []
    traceparents: dict[int, str] = {}
    size = 0
    for (
        generation,
        tag,
        redelivered,
        body,
        message_id,
        content_encoding,
        traceparent,
        _,
        timestamp,
        whole,
    ) in deliveries:
        if whole is not None:
            body = CutBody.of(body, whole.sha256, whole.length)
        messages += read_message(body, message_id, content_encoding, tag, redelivered, timestamp)
        if traceparent is not None:
            traceparents[tag] = traceparent
        size += len(body)
        if size >= MAX_BURST_BYTES or len(messages) >= MAX_BURST_MESSAGES:
            yield Burst(generation, now, messages, traceparents, size)
            messages, traceparents, size = [], {}, 0
    if messages:
        yield Burst(generation, now, messages, traceparents, size)


class _Count(NamedTuple):
    """Of votes and what else was read on a channel."""

    generation: int
    number: int

    def plus(self, generation: int, more: int) -> _Count:
        return _Count(generation, more + (self.number if generation == self.generation else 0))


class HandOff:
    """The consumer has votes, the batcher says what becomes of their messages."""

    def __init__(self, client: RabbitMQClient) -> None:
        self._client = client  # the batcher calls of it what any thread may
        self._bursts: queue.SimpleQueue[list[Burst] | Signal] = queue.SimpleQueue()
        self._unsent: list[Burst] = []  # put, and not flushed
        self._bytes_put = self._bytes_flushed = self._bytes_taken = 0  # each written by one thread
        self._votes_put = self._votes_settled = _Count(0, 0)  # as these
        self._was_taken = threading.Event()
        self._given_up = 0  # the last generation whose deliveries are to go back to the queue
        self.is_wanted = False  # deliveries are; written by the batcher
        self.stopping = threading.Event()  # set by the consumer, so that no wait of the batcher is sat out

    def put(self, burst: Burst) -> None:
        """Hand votes over, with the next ``flush`` or once there are many.

        This and the next four are for the consumer, the others for the batcher.
        """
        self._votes_put = self._votes_put.plus(burst.generation, len(burst.messages))
        self._bytes_put += burst.size + BYTES_BESIDE_BODY * len(burst.messages)
        self._unsent.append(burst)
        if self._bytes_put - self._bytes_flushed >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Let the batcher have what was put; it is woken once for all of it."""
        if self._unsent:
            self._bursts.put(self._unsent)
            self._unsent = []
            self._bytes_flushed = self._bytes_put

    def has_room(self, seconds: float) -> bool:
        """Whether more may be handed over; where it may not, so long is waited for the batcher to take some."""
        self._was_taken.clear()
        if self._bytes_put - self._bytes_taken > MAX_WAITING_BYTES:
            self._was_taken.wait(seconds)
        return self._bytes_put - self._bytes_taken <= MAX_WAITING_BYTES

    def end(self) -> None:
        """Say that no more will come."""
        self.flush()
        self._bursts.put(Signal.END)
        self.stopping.set()

    @property
    def is_given_up(self) -> bool:
        """Whether what the present channel delivered is to go back to the queue."""
        return self._client.generation <= self._given_up

    def wake_batcher(self) -> None:
        """Say that a batch was written, or could not be. Any thread may call this."""
        self._bursts.put(Signal.WRITTEN)

    def take(self, seconds: float) -> list[Burst] | Signal:
        """The next bursts, or what is told in between, within so many seconds. Raises queue.Empty."""
        bursts = self._bursts.get(timeout=max(0.0, seconds))
        if not isinstance(bursts, Signal):
            self._bytes_taken += sum([burst.size + BYTES_BESIDE_BODY * len(burst.messages) for burst in bursts])
            self._was_taken.set()
        return bursts

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

    def settle(self, generation: int, acked_through: int | None, rejected_tags: Sequence[int], messages: int) -> None:
        """As RabbitMQClient.settle; the deliveries held so many votes, and what cannot be read as one."""
        assert generation > self._given_up, "an ack would cover votes that go back to the queue"
        self._client.settle(generation, acked_through, rejected_tags)
        self._votes_settled = self._votes_settled.plus(generation, messages)

    @property
    def in_flight(self) -> int:
        """How many votes of the present channel, and what was not readable as one, are not settled. For any thread."""
        put, settled = self._votes_put, self._votes_settled
        if not self._client.has_channel or put.generation != self._client.generation:
            return 0
        return put.number - (settled.number if settled.generation == put.generation else 0)
