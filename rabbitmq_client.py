"""The broker's edge: consume from one queue, hand deliveries over in bursts, settle them when told to.

One thread, the consumer, owns the connection and calls every method but ``settle``, which any thread may call.
"""

from __future__ import annotations

import base64
import copy
import functools
import http.client
import json
import logging
import random
import re
import struct
import time
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError, ChannelClosedByBroker

from deliveries import Delivery, OnePassConnection, check_pika, cut, is_traceparent

logger = logging.getLogger(__name__)

ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED = 403, 404, 406
MANAGEMENT_SECONDS = 3.0  # for one answer of the management API
DEFAULT_DELIVERY_LIMIT = 20  # of a quorum queue, from RabbitMQ 4 on
ONE_PASS = "one-pass"

# A burst of five messages costs the process nearly as much as one of fifty, so what is on its way is waited for.
GATHER_SECONDS = 0.002
FASTEST_DELIVERY_SECONDS = 4e-6  # of one message after the other; the broker has not been seen faster
SHORTEST_PAUSE_SECONDS = 50e-6  # shorter ones end late

# pika's connector has errors of its own, and what a malformed frame does to its decoder gets out as it is
CONNECTION_ERRORS = (
    AMQPError, AMQPConnectorException, OSError, ValueError, LookupError, AssertionError, struct.error,
)  # fmt: skip


Settling = pika.spec.Basic.Ack | pika.spec.Basic.Nack | pika.spec.Basic.Reject


class BrokerUnavailable(Exception):
    """The connection or the channel is gone, or could not be had; the broker redelivers what was not acked."""


class BrokerMisconfigured(BrokerUnavailable):
    """As BrokerUnavailable, but it will not pass by itself: the queue is refused, or would lose votes."""


class RabbitMQClient:
    """A consumer of one durable queue over one connection. The constructor does no I/O; ``connect`` does."""

    def __init__(
        self,
        urls: Sequence[str],
        queue: str,
        *,
        queue_type: str,
        prefetch_count: int,
        max_priority: int,
        heartbeat: int,
        name: str,
        max_body: int,
        reader: str = ONE_PASS,
        management_url: str | None = None,
    ) -> None:
        """``urls`` are the servers of one broker. ``queue_type`` is classic or quorum, ``heartbeat`` is in seconds (one
        in a URL wins), ``name`` is what the broker shows for the connection; ``management_url`` is asked for policies.
        A body above ``max_body`` bytes is cut. ``reader`` of deliveries is one-pass or pika; raises UnknownPika where
        the former does not work with the pika that is installed.
        """
        if reader == ONE_PASS:
            check_pika()
        self._parameters = [connection_parameters(url, heartbeat, name) for url in urls]
        self._queue = queue
        self._queue_type = queue_type
        self._prefetch_count = prefetch_count
        self._max_priority = max_priority
        self._max_body = max_body
        self._reader = reader
        self._management_url = management_url
        self._connection: pika.BlockingConnection | None = None
        self._channel: BlockingChannel | None = None
        self._consumer_tag: str | None = None
        self._cancelled_tag = ""  # of the consumer that the present channel had
        self._generation = 0
        self._burst: list[Delivery] = []
        self._last_tag = 0  # that was delivered
        self._settled_through = 0  # the last delivery tag that was settled; all before it are, too
        self._settlements: deque[tuple[int, int | None, Sequence[int]]] = deque()
        self._awake = False  # receive is to return
        self._ended: Exception | None = None  # why there is no connection any more
        self._cancelled = False
        self._told: set[str] = set()  # what is said once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def has_channel(self) -> bool:
        """Whether there is a channel, on which what it delivered can be settled."""
        return self._channel is not None

    @property
    def is_consuming(self) -> bool:
        """Whether deliveries are asked for."""
        return self._consumer_tag is not None

    @property
    def unsettled(self) -> int:
        """How many deliveries of the present channel are not settled. Any thread may ask."""
        return 0 if self._channel is None else max(0, self._last_tag - self._settled_through)

    @property
    def generation(self) -> int:
        """The generation of the present channel; deliveries of an earlier one can no longer be settled."""
        return self._generation

    def connect(self) -> str:
        """Connect to one of the servers, tried from a random one on, and return which (host:port).

        Nothing is consumed yet. Raises BrokerUnavailable, within about 15 seconds a server.
        """
        first = random.randrange(len(self._parameters))
        try:
            self._connection = pika.BlockingConnection(
                self._parameters[first:] + self._parameters[:first],
                OnePassConnection if self._reader == ONE_PASS else None,  # type: ignore[arg-type] # the class is meant
            )
        except CONNECTION_ERRORS as exc:
            raise BrokerUnavailable(describe(exc)) from exc
        self._ended = None
        _impl(self._connection).add_on_close_callback(self._on_ended)
        connected = _impl(self._connection).params
        return f"{connected.host}:{connected.port}"

    def start_consuming(self) -> None:
        """Consume: on the channel that is there, or on a new one, the next generation, once the queue is declared.

        Raises BrokerUnavailable, and BrokerMisconfigured where the queue cannot be had or would lose votes.
        """
        assert self._connection is not None and self._consumer_tag is None
        try:
            if self._channel is None:
                self._channel = self._open_channel(self._connection)
                on_delivery = functools.partial(self._on_delivery, self._generation)
                self._consumer_tag = self._channel.basic_consume(self._queue, on_delivery)
            else:
                self._consume_again(self._channel)
        except CONNECTION_ERRORS as exc:
            raise self._lost(exc) from exc
        except BrokerMisconfigured as exc:
            raise self._lost(exc) from exc

    def _consume_again(self, channel: BlockingChannel) -> None:
        """Consume on a channel whose consumer was cancelled, and do not wait for the answer: all that is on its way
        since before the cancel would be read at once.

        By a tag of its own, which pika takes for one more consumer. Of one that comes again while deliveries are
        unacked a classic queue widens the prefetch for good, and for a quorum queue the channel dies at the next ack.
        """
        tag = f"votes-{uuid.uuid4()}"
        consumers: Any = channel._consumer_infos  # type: ignore[attr-defined]
        consumers[tag] = copy.copy(consumers[self._cancelled_tag])
        _impl(channel)._consumers[tag] = _impl(channel)._consumers[self._cancelled_tag]
        _impl(channel)._send_method(pika.spec.Basic.Consume(queue=self._queue, consumer_tag=tag, nowait=True))
        self._consumer_tag = tag

    def _open_channel(self, connection: pika.BlockingConnection) -> BlockingChannel:
        channel, refusal = declare_queue(connection, self._queue, self._queue_type, self._max_priority)
        if "ACCESS_REFUSED" in refusal:
            self._say_once(logging.WARNING, "queue is used as it stands, this user may not declare it", refusal=refusal)
        elif refusal:
            self._say_once(logging.WARNING, "queue stands with other arguments", difference=refusal)
        if self._queue_type == "quorum" or "'quorum'" in refusal:
            self._look_at_limit(connection, refusal)
        self._generation += 1
        self._cancelled = False
        self._burst = []
        self._last_tag = self._settled_through = 0
        if self._reader == ONE_PASS:
            _impl(connection).read_channel(channel.channel_number, self._generation, self._max_body, self._on_burst)
        channel.basic_qos(prefetch_count=self._prefetch_count)
        channel.add_on_cancel_callback(self._on_cancelled_by_broker)
        return channel

    def _look_at_limit(self, connection: pika.BlockingConnection, refusal: str) -> None:
        """Say after how many returns the quorum queue drops a message. Raises BrokerMisconfigured where that is one."""
        version = broker_version(connection)
        by_argument = limit_by_argument(connection, self._queue, refusal)
        by_policy = limit_by_policy(self._management_url, connection, self._queue)
        limit = effective_limit(version, by_argument, by_policy)
        told = ".".join(map(str, version))
        facts = {"limit": limit, "by_argument": by_argument, "by_policy": by_policy, "broker": told}
        if limit == "first return":
            raise BrokerMisconfigured(
                "the queue has a delivery limit of -1, and RabbitMQ before 4 drops its messages at their first return "
                f"(this one is {told}): let another queue take its place, or take the limit out of its policy"
            )
        if limit == "none":
            known = "" if by_policy != "unknown" else ", as far as its arguments say: its policies are not known"
            self._say_once(logging.INFO, f"no message is dropped for its returns{known}", **facts)
        elif limit == "unknown":
            self._say_once(logging.WARNING, "not known after how many returns the queue drops a message", **facts)
        else:
            # a policy does not lift the limit of an argument (measured on 4.0.5)
            helps = version >= (4,) and by_argument in (None, -1)
            remedy = "a policy with delivery-limit -1" if helps else "another queue, declared without such a limit"
            what = "the queue drops messages that were returned too often, confirmed votes too"
            self._say_once(logging.ERROR, what, **facts, remedy=remedy)

    def _say_once(self, level: int, message: str, **facts: object) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.log(level, message, extra={"fields": facts})

    def receive(self, timeout: float) -> Iterator[list[Delivery]]:
        """Serve the connection for ``timeout`` seconds, until something comes or ``wake`` is called; yield what comes.

        Where the prefetch leaves room for more, that is waited for, GATHER_SECONDS at most beside what the caller does
        with what has come; who wants no more leaves the loop. Heartbeats are answered and queued settlements are sent
        in here. Raises BrokerUnavailable when the connection, the channel or the consumer is gone; then the client is
        closed and ``connect`` is next.
        """
        assert self._connection is not None
        last_tag = self._last_tag
        try:
            yield from self._serve(self._connection, timeout)
            if self._last_tag == last_tag:
                # sends what is to be sent, and tells of what is neither a delivery nor the end of the connection
                self._connection.process_data_events(time_limit=0)
        except CONNECTION_ERRORS as exc:
            raise self._lost(self._ended or exc) from exc
        if self._cancelled:
            raise self._lost(BrokerUnavailable("the broker cancelled the consumer: was the queue deleted?"))
        if self._channel is not None and not self._channel.is_open:
            # e.g. an unknown delivery tag: the broker closes the channel, and process_data_events does not say so
            raise self._lost(BrokerUnavailable("the broker closed the channel"))
        if self._burst:
            yield self._take_burst()

    def _take_burst(self) -> list[Delivery]:
        burst, self._burst = self._burst, []
        self._last_tag = burst[-1].tag
        return burst

    def _serve(self, connection: pika.BlockingConnection, seconds: float) -> Iterator[list[Delivery]]:
        """Turn the connection's loop until something is there, ``wake`` is called or the seconds are over.

        As process_data_events does, which takes a timer and some more for each burst. What is on its way is waited for
        while the prefetch has room for it, GATHER_SECONDS in all.
        """
        loop = _impl(connection).ioloop
        timer = loop.call_later(seconds, self._wake_up)
        waited, has_begun, is_read = 0.0, False, False
        try:
            while not self._awake:
                if not is_read:
                    loop.poll()
                loop.process_timeouts()
                if self._ended is not None:
                    raise self._ended
                if self._reader != ONE_PASS:
                    connection.process_data_events(time_limit=0)
                looked_at, came = time.monotonic(), bool(self._burst)
                if came:
                    yield self._take_burst()
                    has_begun = True
                if has_begun:
                    room = self._prefetch_count - (self._last_tag - self._settled_through)
                    if room <= 0 or waited >= GATHER_SECONDS:
                        break
                    pause = gathering_seconds(room, time.monotonic() - looked_at if came else None, waited)
                    if pause:
                        time.sleep(pause)
                    waited += max(pause, SHORTEST_PAUSE_SECONDS)  # a look is counted as one, so that they have an end
                    is_read = self._reader == ONE_PASS and _impl(connection).read_now()
                    if not is_read:
                        loop.call_later(0, _nothing)  # so that poll does not wait
        finally:
            loop.remove_timeout(timer)
            self._awake = False

    def settle(self, generation: int, acked_through: int | None, rejected_tags: Sequence[int]) -> None:
        """Reject ``rejected_tags`` without requeue, and ack all others up to ``acked_through``. Any thread may call.

        The tags are in ascending order. Every delivery of that channel up to the last of all these must be settled
        already or be part of this batch, and ``acked_through`` must not be a rejected one (None where all are). Where
        the channel is gone this does nothing: the broker has taken its deliveries back and delivers them again.
        """
        self._settlements.append((generation, acked_through, rejected_tags))
        self._call_soon(self._settle_all)

    def wake(self) -> None:
        """End a ``receive`` that waits. Any thread may call this."""
        self._call_soon(self._wake_up)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        """Have the consumer's thread call it; nothing where there is no connection. Any thread may call this."""
        connection = self._connection
        if connection is not None:
            _impl(connection).ioloop.add_callback_threadsafe(callback)

    def _wake_up(self) -> None:
        self._awake = True

    def cancel(self) -> None:
        """Ask for no more deliveries; the channel stays, so that what was delivered can be settled.

        What is still on its way comes out of ``receive``: none that was delivered may be dropped while a later ack on
        this channel could cover it. (pika's own basic_cancel sends such messages back, which a quorum queue counts as a
        failed delivery.) Raises BrokerUnavailable.
        """
        consumer_tag, self._consumer_tag = self._consumer_tag, None
        self._cancelled_tag = consumer_tag or self._cancelled_tag
        if self._channel is None or consumer_tag is None:
            return
        try:
            _impl(self._channel)._send_method(pika.spec.Basic.Cancel(consumer_tag=consumer_tag, nowait=True))
        except CONNECTION_ERRORS as exc:
            raise self._lost(exc) from exc

    def give_back(self) -> None:
        """Close the channel: all that was not settled goes back to the queue. Raises BrokerUnavailable."""
        channel, self._channel = self._channel, None
        self._consumer_tag = None
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
        self._channel = self._consumer_tag = None
        self._generation += 1
        self._burst = []
        if connection is not None and connection.is_open:
            try:
                connection.close()
            except CONNECTION_ERRORS as exc:
                logger.info("connection closed with an error", extra={"fields": {"error": describe(exc)}})
        elif connection is not None:
            _impl(connection).ioloop.close()

    def _lost(self, cause: Exception) -> BrokerUnavailable:
        self.close()
        return cause if isinstance(cause, BrokerUnavailable) else BrokerUnavailable(describe(cause))

    def _on_burst(self, deliveries: list[Delivery]) -> None:
        # what comes while its channel is being closed goes back to the queue
        if deliveries[0].generation == self._generation:
            self._burst += deliveries

    def _on_delivery(
        self,
        generation: int,
        channel: BlockingChannel,
        method: pika.spec.Basic.Deliver,
        properties: pika.BasicProperties,
        body: bytes,
    ) -> None:
        """Take one message as pika read it, where that is the reader."""
        kept, whole = cut(body, self._max_body)
        traceparent, count = _read_headers(properties.headers)
        delivery = Delivery(
            generation,
            method.delivery_tag or 0,
            method.redelivered,
            kept,
            _text(properties.message_id),
            _text(properties.content_encoding),
            traceparent,
            count,
            properties.timestamp,
            whole,
        )
        self._on_burst([delivery])

    def _on_ended(self, connection: object, reason: Exception) -> None:
        self._ended = reason

    def _on_cancelled_by_broker(self, method: object) -> None:
        self._cancelled = True

    def _settle_all(self) -> None:
        while self._settlements:
            generation, acked_through, rejected_tags = self._settlements.popleft()
            if generation != self._generation or self._channel is None:
                # on this channel the same tag is another vote, which would be lost
                logger.info("settlement dropped, channel replaced", extra={"fields": {"generation": generation}})
                continue
            # not by the blocking channel, which would turn the loop until they are sent; and all in one piece
            channel = _impl(self._channel)
            if channel.is_open:
                frames = [
                    pika.frame.Method(channel.channel_number, method).marshal()
                    for method in settlement(self._settled_through, acked_through, rejected_tags)
                ]
                channel.connection._output_marshaled_frames([b"".join(frames)])
            self._settled_through = max(self._settled_through, acked_through or 0, *rejected_tags)


def settlement(settled_through: int, acked_through: int | None, rejected_tags: Sequence[int]) -> Sequence[Settling]:
    """Acks and rejections of a batch that begins behind ``settled_through``, as few as can be.

    Each costs the broker more than a message. So there is one for each run of deliveries with one fate, in the order of
    the tags, or one for each rejected delivery and one ack behind them.
    """
    runs: list[Settling] = []
    through = settled_through
    for tag in rejected_tags:
        if tag > through + 1:
            assert acked_through is not None and acked_through >= tag - 1, "a delivery that is not part of the batch"
            runs.append(pika.spec.Basic.Ack(tag - 1, multiple=True))
        elif runs and isinstance(runs[-1], pika.spec.Basic.Nack):
            runs.pop()
        runs.append(pika.spec.Basic.Nack(tag, multiple=True, requeue=False))
        through = tag
    last = [pika.spec.Basic.Ack(acked_through, multiple=True)] if acked_through is not None else []
    if len(runs) > len(rejected_tags):
        return [pika.spec.Basic.Reject(tag, requeue=False) for tag in rejected_tags] + last
    return runs + (last if (acked_through or 0) > through else [])


def gathering_seconds(room: int, since: float | None, waited: float) -> float:
    """How long to wait for more of a burst; ``waited`` seconds were waited for it so far, of GATHER_SECONDS.

    Until the broker can have sent as many messages as there is ``room`` for, where some came ``since`` so many seconds;
    as long again as was waited, where nothing came (None).
    """
    seconds = max(waited, SHORTEST_PAUSE_SECONDS) if since is None else room * FASTEST_DELIVERY_SECONDS - since
    seconds = min(seconds, GATHER_SECONDS - waited)
    return seconds if seconds >= SHORTEST_PAUSE_SECONDS or since is None else 0.0


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


def declare_queue(
    connection: pika.BlockingConnection, queue: str, queue_type: str, max_priority: int
) -> tuple[BlockingChannel, str]:
    """Declare the vote queue and return an open channel, with the broker's refusal where the queue stands otherwise.

    That refusal ("" if there was none) names how the queue differs. One that stands with other arguments, or that this
    user may not configure, is used as it is; one that does not stand and is refused raises BrokerMisconfigured. Raises
    pika's AMQPError besides, among them that of a queue whose node is down.
    """
    arguments = queue_arguments(queue_type, max_priority, broker_version(connection))
    channel = connection.channel()
    try:
        channel.queue_declare(queue, durable=True, arguments=arguments)
    except ChannelClosedByBroker as exc:
        if exc.reply_code not in (PRECONDITION_FAILED, ACCESS_REFUSED):
            raise
        channel = connection.channel()
        try:
            channel.queue_declare(queue, passive=True)
        except ChannelClosedByBroker as missing:
            if missing.reply_code != NOT_FOUND or "down or inaccessible" in missing.reply_text:
                raise
            raise BrokerMisconfigured(f"the broker refuses to declare the queue: {exc.reply_text}") from exc
        return channel, exc.reply_text
    return channel, ""


def queue_arguments(queue_type: str, max_priority: int, version: tuple[int, ...]) -> dict[str, Any]:
    """The arguments that the vote queue is declared with on a broker of that version.

    The type is named, since a virtual host may have another default. Version 2 of the classic queue drains a priority
    queue 2.5 to 3 times as fast as version 1; ``max_priority`` 0 is a queue without priorities. RabbitMQ 4 drops a
    message of a quorum queue after 20 returns unless the limit is -1; before 4 there is none by default, and -1 drops
    it at the first.
    """
    if queue_type == "classic":
        priorities = {"x-max-priority": max_priority} if max_priority else {}
        return {"x-queue-type": "classic", **priorities, "x-queue-version": 2}
    return {"x-queue-type": "quorum"} | ({"x-delivery-limit": -1} if version >= (4,) else {})


def broker_version(connection: pika.BlockingConnection) -> tuple[int, ...]:
    """The version that the broker told when the connection was opened, (4, 0, 5) say; (0,) where it told none."""
    told = str((_impl(connection).server_properties or {}).get("version", ""))
    found = re.match(r"\d+(\.\d+)*", told)
    return tuple(map(int, found[0].split("."))) if found else (0,)


_find_limit = re.compile(r"'x-delivery-limit' .*current is (?:(?:the value )?'(-?\d+)'|none)").search


def limit_by_argument(connection: pika.BlockingConnection, queue: str, refusal: str) -> int | str | None:
    """The x-delivery-limit that the quorum queue was declared with, None where it has none, "unknown" where not told.

    It is read from the refusal of a declaration that differs in it, so the queue is declared once more where the
    refusal was of something else. Raises pika's AMQPError.
    """
    arguments = queue_arguments("quorum", 0, broker_version(connection))
    if "x-delivery-limit" not in refusal:
        channel = connection.channel()
        try:
            channel.queue_declare(queue, durable=True, arguments=arguments)
            channel.close()
        except ChannelClosedByBroker as exc:
            refusal = exc.reply_text
        else:
            return arguments.get("x-delivery-limit")
    found = _find_limit(refusal)
    if found is None:
        return "unknown"
    return None if found[1] is None else int(found[1])


def limit_by_policy(management_url: str | None, connection: pika.BlockingConnection, queue: str) -> int | str | None:
    """The delivery-limit that policies give the queue, None where they give none, "unknown" where it cannot be read.

    AMQP does not tell it, so the management API is asked, with the user of the connection, where there is one.
    """
    if management_url is None:
        return "unknown"
    try:
        found = managed_queue(management_url, _impl(connection).params, queue, MANAGEMENT_SECONDS)
        if "effective_policy_definition" not in found:
            return "unknown"  # of a queue so young that the API has no figures of it yet
        limit = (found["effective_policy_definition"] or {}).get("delivery-limit")
        return None if limit is None else int(limit)
    except (OSError, ValueError, AttributeError, TypeError, http.client.HTTPException) as exc:
        logger.info("policies of the queue not read", extra={"fields": {"error": describe(exc)}})
        return "unknown"


def managed_queue(management_url: str, parameters: Any, queue: str, timeout: float) -> Any:
    """What the management API says of the queue, as ``managed`` asks it."""
    return managed(management_url, parameters, timeout, "queues", queue)


def managed(management_url: str, parameters: Any, timeout: float, kind: str, *name: str) -> Any:
    """What the management API says of a thing of that kind, asked with user and virtual host of pika's parameters.

    Raises OSError (among them that of a refusal), ValueError, http.client.HTTPException.
    """
    vhost, user = quote(parameters.virtual_host, safe=""), parameters.credentials
    login = base64.b64encode(f"{user.username}:{user.password}".encode()).decode()
    path = "/".join([kind, vhost, *(quote(part, safe="") for part in name)])
    address = f"{management_url.rstrip('/')}/api/{path}"
    request = urllib.request.Request(address, headers={"Authorization": f"Basic {login}"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def effective_limit(version: tuple[int, ...], by_argument: int | str | None, by_policy: int | str | None) -> int | str:
    """After how many returns the broker drops a message: a number, "none", "first return", or "unknown".

    An unknown policy is taken for none. Of two limits the lower one holds; from RabbitMQ 4 on a negative one is no
    limit, and the other one holds (rabbit_quorum_queue, resolve_delivery_limit).
    """
    limits = [limit for limit in (by_argument, by_policy) if isinstance(limit, int)]
    if version < (4,) and limits and min(limits) < 0:
        return "first return"
    if by_argument == "unknown":
        return "unknown"
    if version < (4,):
        return min(limits) if limits else "none"
    if not limits:
        return DEFAULT_DELIVERY_LIMIT
    limit = max(limits) if min(limits) < 0 else min(limits)
    return "none" if limit < 0 else limit


def _impl(blocking: Any) -> Any:
    """pika's connection or channel inside a blocking one, for what the blocking one does not offer."""
    return blocking._impl


def _nothing() -> None:
    """A timer's: pika returns once one has gone off."""


def _text(value: Any) -> str | None:
    """A text that pika has read, which stays bytes where it is not UTF-8."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _read_headers(headers: Any) -> tuple[str | None, int]:
    """The values of traceparent and x-delivery-count in headers that pika has read."""
    if not headers:
        return None, 0
    traceparent, count = _text(headers.get("traceparent")), headers.get("x-delivery-count")
    is_sound = isinstance(traceparent, str) and is_traceparent(traceparent.encode("utf-8", "replace"))
    return traceparent if is_sound else None, count if isinstance(count, int) else 0


def describe(exc: BaseException) -> str:
    """What went wrong, in one line; pika's errors often say more by their type, or their cause, than by their text."""
    causes = [str(arg) or repr(arg) for arg in exc.args] or [repr(exc.__cause__ or "")]
    return f"{type(exc).__name__}: {', '.join(causes)}"[:300]
