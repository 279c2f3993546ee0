"""The broker's edge: consume from one queue, hand deliveries over in bursts, settle them when told to.

One thread, the consumer, owns the connection and calls every method but ``settle``, which any thread may call.
"""

from __future__ import annotations

import functools
import logging
import re
import struct
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError, ChannelClosedByBroker, ConnectionWrongStateError

logger = logging.getLogger(__name__)

PRECONDITION_FAILED = 406
ACCESS_REFUSED = 403

# A burst of five messages costs the process nearly as much as one of fifty, so what is on its way is waited for.
GATHER_SECONDS = 0.001
FASTEST_DELIVERY_SECONDS = 20e-6  # of one message after the other; the broker has not been seen faster
SHORTEST_PAUSE_SECONDS = 50e-6  # shorter ones end late

# pika's connector has errors of its own, and what a malformed frame does to its decoder gets out as it is
CONNECTION_ERRORS = (
    AMQPError, AMQPConnectorException, OSError, ValueError, LookupError, AssertionError, struct.error,
)  # fmt: skip


class BrokerUnavailable(Exception):
    """The connection or the channel is gone, or could not be had; the broker redelivers what was not acked."""


class Delivery(NamedTuple):
    """One message as the broker handed it over.

    ``generation`` names the channel that delivered it: a tag means nothing on any other channel.
    """

    generation: int
    tag: int
    redelivered: bool
    body: bytes
    message_id: str | None
    content_encoding: str | None
    traceparent: str | None


class _ReadProperties(pika.BasicProperties):
    """The properties of a message as far as they are asked for: content_encoding, message_id, the header traceparent.

    pika decodes all, and where a header holds what it cannot represent (a timestamp beyond the year 9999, say) it ends
    the connection. The message comes again, and ends the next one: a single message would stop the count for ever. So
    the headers are not decoded: they are searched for the bytes of the one that is wanted. The fields and their order:
    AMQP 0-9-1 specification, section 1.8.3 (class basic).
    """

    def decode(self, encoded: bytes, offset: int = 0) -> Self:
        (flags,) = _UINT16(encoded, offset)
        offset += 2
        if flags & self.FLAG_CONTENT_TYPE:
            offset += 1 + encoded[offset]
        if flags & self.FLAG_CONTENT_ENCODING:
            self.content_encoding, offset = _short_string(encoded, offset)
        if flags & self.FLAG_HEADERS:
            (length,) = _UINT32(encoded, offset)
            offset += 4
            found = _find_traceparent(encoded, offset, offset + length)
            if found:
                self.headers = {"traceparent": found[1].decode()}
            offset += length
        offset += bool(flags & self.FLAG_DELIVERY_MODE) + bool(flags & self.FLAG_PRIORITY)
        for flag in (self.FLAG_CORRELATION_ID, self.FLAG_REPLY_TO, self.FLAG_EXPIRATION):
            if flags & flag:
                offset += 1 + encoded[offset]
        if flags & self.FLAG_MESSAGE_ID:
            self.message_id, offset = _short_string(encoded, offset)
        return self


class _ReadDeliver(pika.spec.Basic.Deliver):
    """The method of a delivery as far as it is asked for: exchange and routing key, behind the rest, are not."""

    def decode(self, encoded: bytes, offset: int = 0) -> Self:
        self.consumer_tag, offset = _short_string(encoded, offset)
        self.delivery_tag, bits = _UINT64_AND_BITS(encoded, offset)
        self.redelivered = bool(bits & 1)
        return self


def _short_string(encoded: bytes, offset: int) -> tuple[str, int]:
    """A string of up to 255 bytes after its length, and the offset behind it; what is not UTF-8 is spelt out."""
    end = offset + 1 + encoded[offset]
    return encoded[offset + 1 : end].decode("utf-8", "backslashreplace"), end


_UINT16, _UINT32 = struct.Struct("!H").unpack_from, struct.Struct("!I").unpack_from
_UINT64_AND_BITS = struct.Struct("!QB").unpack_from

# A header is its name with a length of one byte before it, its type (S: text, x: bytes) and its value with a length of
# four. The value: W3C Trace Context, section 3.2 (version, trace-id, parent-id, trace-flags; no id is all zeros).
_find_traceparent = re.compile(
    rb"\x0btraceparent[Sx]\0\0\x007((?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})"
).search

# what pika makes of a content header and of Basic.Deliver
pika.spec.props[pika.BasicProperties.INDEX] = _ReadProperties
pika.spec.methods[pika.spec.Basic.Deliver.INDEX] = _ReadDeliver


class RabbitMQClient:
    """A consumer of one durable queue over one connection. The constructor does no I/O; ``connect`` does."""

    def __init__(
        self, url: str, queue: str, *, prefetch_count: int, max_priority: int, heartbeat: int, name: str
    ) -> None:
        """``heartbeat`` is in seconds (one in the URL wins); ``name`` is what the broker shows for the connection."""
        self._parameters = connection_parameters(url, heartbeat, name)
        self._queue = queue
        self._prefetch_count = prefetch_count
        self._max_priority = max_priority
        self._connection: pika.BlockingConnection | None = None
        self._channel: BlockingChannel | None = None
        self._generation = 0
        self._burst: list[Delivery] = []
        self._settled_through = 0  # the last delivery tag that was settled; all before it are, too
        self._settlements: deque[tuple[int, int | None, Sequence[int]]] = deque()
        self._cancelled = False
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def is_consuming(self) -> bool:
        """Whether there is a channel that delivers."""
        return self._channel is not None

    @property
    def generation(self) -> int:
        """The generation of the present channel; deliveries of an earlier one can no longer be settled."""
        return self._generation

    def connect(self) -> None:
        """Connect; nothing is consumed yet. Raises BrokerUnavailable, within about 15 seconds."""
        try:
            self._connection = pika.BlockingConnection(self._parameters)
        except CONNECTION_ERRORS as exc:
            raise BrokerUnavailable(describe(exc)) from exc

    def start_consuming(self) -> None:
        """Declare the queue on a channel of its own, the next generation, and consume. Raises BrokerUnavailable."""
        assert self._connection is not None
        try:
            channel, difference = declare_queue(self._connection, self._queue, self._max_priority)
            if difference and not self._warned:
                self._warned = True
                logger.warning("queue stands with other arguments", extra={"fields": {"difference": difference}})
            self._generation += 1
            self._cancelled = False
            self._burst = []
            self._settled_through = 0
            channel.basic_qos(prefetch_count=self._prefetch_count)
            channel.add_on_cancel_callback(self._on_cancelled_by_broker)
            channel.basic_consume(self._queue, functools.partial(self._on_delivery, self._generation))
            self._channel = channel
        except CONNECTION_ERRORS as exc:
            raise self._lost(exc) from exc

    def receive(self, timeout: float) -> list[Delivery]:
        """Serve the connection for up to ``timeout`` seconds, or until something came; return what was delivered.

        Where something came and the prefetch leaves room for more, that is waited for, GATHER_SECONDS at most.
        Heartbeats are answered and queued settlements are sent in here. Raises BrokerUnavailable when the
        connection, the channel or the consumer is gone; then the client is closed and ``connect`` is next.
        """
        assert self._connection is not None
        try:
            self._connection.process_data_events(time_limit=timeout)
            self._settle_all()
            if self._burst:
                held = self._burst[-1].tag - self._settled_through
                pause = gathering_seconds(self._prefetch_count - held)
                if pause:
                    time.sleep(pause)
                    self._connection.process_data_events(time_limit=0)
                    self._settle_all()
        except CONNECTION_ERRORS as exc:
            raise self._lost(exc) from exc
        if self._cancelled:
            raise self._lost(BrokerUnavailable("the broker cancelled the consumer: was the queue deleted?"))
        if self._channel is not None and not self._channel.is_open:
            # e.g. an unknown delivery tag: the broker closes the channel, and process_data_events does not say so
            raise self._lost(BrokerUnavailable("the broker closed the channel"))
        burst, self._burst = self._burst, []
        return burst

    def settle(self, generation: int, acked_through: int | None, rejected_tags: Sequence[int]) -> None:
        """Reject ``rejected_tags`` without requeue, then ack all others up to ``acked_through``. Any thread may call.

        Every delivery of that channel up to ``acked_through`` must be settled already or be part of this batch, and
        that tag must not be a rejected one (None where all are). Where the channel is gone this does nothing: the
        broker has taken its deliveries back and delivers them again.
        """
        self._settlements.append((generation, acked_through, rejected_tags))
        self.wake()

    def wake(self) -> None:
        """End a ``receive`` that waits. Any thread may call this."""
        connection = self._connection
        if connection is not None:
            try:
                connection.add_callback_threadsafe(lambda: None)
            except ConnectionWrongStateError:
                return  # closed: receive is about to find out

    def cancel(self) -> None:
        """Stop deliveries, keep the channel for settling what was delivered. Raises BrokerUnavailable."""
        if self._channel is None:
            return
        try:
            for consumer_tag in list(self._channel.consumer_tags):
                self._channel.basic_cancel(consumer_tag)
        except CONNECTION_ERRORS as exc:
            raise self._lost(exc) from exc
        self._burst = []

    def stop_consuming(self) -> None:
        """Close the channel: all that was not acked goes back to the queue. Raises BrokerUnavailable."""
        channel, self._channel = self._channel, None
        self._generation += 1
        self._burst = []
        if channel is None:
            return
        try:
            channel.close()
        except CONNECTION_ERRORS as exc:
            raise self._lost(exc) from exc

    def close(self) -> None:
        """Close the connection, if there is one. Raises nothing: the broker notices in any case."""
        connection, self._connection = self._connection, None
        self._channel = None
        self._generation += 1
        if connection is not None and connection.is_open:
            try:
                connection.close()
            except CONNECTION_ERRORS as exc:
                logger.info("connection closed with an error", extra={"fields": {"error": describe(exc)}})

    def _lost(self, cause: Exception) -> BrokerUnavailable:
        self.close()
        return cause if isinstance(cause, BrokerUnavailable) else BrokerUnavailable(describe(cause))

    def _on_delivery(
        self,
        generation: int,
        channel: BlockingChannel,
        method: pika.spec.Basic.Deliver,
        properties: pika.BasicProperties,
        body: bytes,
    ) -> None:
        self._burst.append(
            Delivery(
                generation,
                method.delivery_tag or 0,
                method.redelivered,
                body,
                properties.message_id,
                properties.content_encoding,
                str(properties.headers["traceparent"]) if properties.headers else None,
            )
        )

    def _on_cancelled_by_broker(self, method: object) -> None:
        self._cancelled = True

    def _settle_all(self) -> None:
        while self._settlements:
            generation, acked_through, rejected_tags = self._settlements.popleft()
            if generation != self._generation or self._channel is None:
                # on this channel the same tag is another vote, which would be lost
                logger.info("settlement dropped, channel replaced", extra={"fields": {"generation": generation}})
                continue
            for tag in rejected_tags:
                self._channel.basic_reject(tag, requeue=False)
            if acked_through is not None:
                self._channel.basic_ack(acked_through, multiple=True)
            self._settled_through = max(self._settled_through, acked_through or 0, *rejected_tags)


def gathering_seconds(room: int) -> float:
    """How long to wait for more messages where the prefetch has room for so many: not for longer than the broker needs
    to send them at its fastest, since after that it sends nothing until a batch is settled.
    """
    seconds = min(GATHER_SECONDS, room * FASTEST_DELIVERY_SECONDS)
    return seconds if seconds >= SHORTEST_PAUSE_SECONDS else 0.0


def connection_parameters(url: str, heartbeat: int, name: str) -> pika.URLParameters:
    """pika's parameters for ``url``, with limits in seconds on all that could wait for ever."""
    parameters = pika.URLParameters(url)
    if "heartbeat=" not in url:
        parameters.heartbeat = heartbeat
    parameters.socket_timeout = 5
    parameters.stack_timeout = 10
    parameters.connection_attempts = 1
    parameters.client_properties = {"connection_name": name}
    return parameters


def declare_queue(connection: pika.BlockingConnection, queue: str, max_priority: int) -> tuple[BlockingChannel, str]:
    """Declare the vote queue and return an open channel, with how a queue that stands already differs ("" if not).

    Version 2 of the classic queue drains a priority queue 2.5 to 3 times as fast as version 1. A queue that stands
    with other arguments, or that this user may not configure, is taken as it is. Raises pika's AMQPError.
    """
    arguments = {"x-max-priority": max_priority, "x-queue-version": 2}
    channel = connection.channel()
    try:
        channel.queue_declare(queue, durable=True, arguments=arguments)
    except ChannelClosedByBroker as exc:
        if exc.reply_code not in (PRECONDITION_FAILED, ACCESS_REFUSED):
            raise
        channel = connection.channel()
        channel.queue_declare(queue, passive=True)
        return channel, exc.reply_text
    return channel, ""


def describe(exc: BaseException) -> str:
    """What went wrong, in one line; pika's errors often say more by their type, or their cause, than by their text."""
    causes = [str(arg) or repr(arg) for arg in exc.args] or [repr(exc.__cause__ or "")]
    return f"{type(exc).__name__}: {', '.join(causes)}"[:300]
