#!/usr/bin/env python3
"""Publish test votes to the queue and say what the totals must be.

    python test_publisher.py -n 1000 --laws 3 --duplicates 10 --invalid 2

-n counts distinct votes; duplicates (copies of a vote, to be counted once) and invalid messages (never to be counted)
come on top, as percentages of -n. The same seed makes the same votes: published twice, they still count once.
--box N publishes arrays of N votes. All numbers are of votes (copies and invalid ones too), unless they say messages.
--replay publishes the votes of a file that `reconcile.py export-audit` wrote, each as it was, in place of made ones.
--check publishes nothing: it says of each line of a file what the service would say of a message with this body.
The broker is read from the environment and .env, as the service does it (AMQP_URL or RABBITMQ_*); --check needs none.

Exit codes: 0 every message confirmed (--check: every body would count), 1 some not, 2 wrong usage or settings (--check:
or a file that cannot be read, or has no body), 3 broker unreachable, 130 interrupted (what was confirmed until then is
still printed).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import random
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, islice, takewhile
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

import pika
from pika.channel import Channel

from config import InvalidSettings, amqp_settings, environment, publisher_login, redact_url
from rabbitmq_client import CONNECTION_ERRORS, BrokerUnavailable, connection_parameters, declare_queue, describe
from verdicts import check
from votes import MAX_BODY_BYTES, MAX_VOTES, REASONS, UnreadableVote, Vote, read_message

VOTE, DUPLICATE, INVALID, ARRAY = "vote", "duplicate", "invalid", "array"
CONFIRMED, NACKED, RETURNED, UNKNOWN = "confirmed", "nacked", "returned", "unknown"

# Messages sent and not yet confirmed. A durable queue confirms in bursts, about five a second: 2,000 would be a brake.
WINDOW = 10_000

TICK_SECONDS = 0.1
GRACE_SECONDS = 5.0  # how long an interrupted publisher still waits for confirms
BLOCKED_SECONDS = 60.0  # how long a broker short of memory or disk may hold publishers up
SILENCE_SECONDS = 120.0  # how long it may leave what was sent without any confirm, as a queue without a majority does


# --- what is published -----------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """One message to publish. ``id`` is the vote_id, or the SHA-256 of the body where the message is no vote.

    An array has what stands in it in ``array``: each as a message by itself, of which it has the body.
    """

    kind: str
    id: str
    law_id: str
    choice: str
    body: bytes
    message_id: str | None
    content_encoding: str | None = None
    array: tuple[Message, ...] = ()

    @property
    def parts(self) -> tuple[Message, ...]:
        """What is judged by itself: what stands in an array, or the message."""
        return self.array or (self,)


def parts_of(messages: Iterable[Message]) -> Iterator[Message]:
    """The parts of all of them."""
    return chain.from_iterable(message.parts for message in messages)


def totals_of(messages: Iterable[Message]) -> dict[str, tuple[int, int]]:
    """What the votes among these come to, oui and non by law, each vote once: what the totals must be."""
    votes = {part.id: part for part in parts_of(messages) if part.kind != INVALID}
    counted = Counter((vote.law_id, vote.choice) for vote in votes.values())
    return {law_id: (counted[law_id, "oui"], counted[law_id, "non"]) for law_id in sorted({law for law, _ in counted})}


def message_count(count: int, duplicates: float = 0, invalid: float = 0) -> int:
    """How many messages ``make_messages`` makes of these."""
    return len(_kinds(count, duplicates, invalid))


def make_messages(
    count: int, laws: int = 3, seed: int = 0, duplicates: float = 0, invalid: float = 0
) -> Iterator[Message]:
    """Yield ``count`` votes for ``laws`` laws, with copies and invalid messages strewn in (percentages of ``count``).

    All but the timestamps follows from ``seed``; a timestamp is the moment in which its message is taken.
    """
    rng = random.Random(seed)
    kinds = _kinds(count, duplicates, invalid)
    rng.shuffle(kinds)
    if DUPLICATE in kinds:  # the first copy needs a vote before it
        first_vote, first_copy = kinds.index(VOTE), kinds.index(DUPLICATE)
        if first_copy < first_vote:
            kinds[first_copy], kinds[first_vote] = VOTE, DUPLICATE
    oui_share = {f"law-{number:03}": rng.uniform(0.3, 0.7) for number in range(1, laws + 1)}
    law_ids = list(oui_share)
    votes: list[Message] = []
    invalid_made = 0
    for kind in kinds:
        if kind == DUPLICATE:
            # some into the batch of the original, some long after it
            candidates = votes if rng.random() < 0.5 else votes[-20:]
            yield rng.choice(candidates)._replace(kind=DUPLICATE)
            continue
        law_id = rng.choice(law_ids)
        vote = {
            "vote_id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            "law_id": law_id,
            "choice": "oui" if rng.random() < oui_share[law_id] else "non",
            "timestamp": datetime.now(UTC).isoformat(),
        }
        voter_hash = f"{rng.getrandbits(256):064x}"
        if kind == INVALID:
            yield _spoiled(vote | {"voter_hash": voter_hash}, invalid_made)
            invalid_made += 1
            continue
        if rng.random() < 0.5:
            vote["voter_hash"] = voter_hash
        body = json.dumps(vote).encode()
        votes.append(Message(VOTE, vote["vote_id"], law_id, vote["choice"], body, vote["vote_id"]))
        yield votes[-1]


def in_arrays(messages: Iterable[Message], size: int) -> Iterator[Message]:
    """Put messages into arrays of ``size``, and of fewer where 64 KiB are full; where it is 1, leave them as they are.

    By itself goes what would make an array unreadable, and every other one of the copies and of the invalid ones.
    """
    if size == 1:
        yield from messages
        return
    parts: list[Message] = []
    others, length = 0, 0
    for message in messages:
        if message.kind != VOTE:
            others += 1
            if others % 2 == 0 or _spoils_arrays(message):
                yield message
                continue
        if parts and length + len(BETWEEN) + len(message.body) + 2 > MAX_BODY_BYTES:
            yield _array(parts)
            parts, length = [], 0
        length += len(message.body) + (len(BETWEEN) if parts else 0)
        parts.append(message)
        if len(parts) == size:
            yield _array(parts)
            parts, length = [], 0
    if parts:
        yield _array(parts)


BETWEEN = b", "  # the votes of an array


def _array(parts: Sequence[Message]) -> Message:
    body = b"[" + BETWEEN.join(part.body for part in parts) + b"]"
    message_id = parts[0].message_id  # which must not stand for that of any vote in it
    return Message(ARRAY, hashlib.sha256(body).hexdigest(), "", "", body, message_id, array=tuple(parts))


def _spoils_arrays(message: Message) -> bool:
    return message.content_encoding is not None or read_message(b"[" + message.body + b"]")[0].place == 0


def _kinds(count: int, duplicates: float, invalid: float) -> list[str]:
    copies, spoiled = round(count * duplicates / 100), round(count * invalid / 100)
    return [VOTE] * count + [DUPLICATE] * copies + [INVALID] * spoiled


def _json(**changes: object) -> Callable[[dict[str, str]], bytes]:
    return lambda vote: json.dumps(vote | changes).encode()


def _without(name: str) -> Callable[[dict[str, str]], bytes]:
    return lambda vote: json.dumps({key: value for key, value in vote.items() if key != name}).encode()


def _text(edit: Callable[[str], str], encoding: str = "utf-8") -> Callable[[dict[str, str]], bytes]:
    return lambda vote: edit(json.dumps(vote)).encode(encoding)


def _timestamp(literal: str) -> Callable[[dict[str, str]], bytes]:
    return lambda vote: _without("timestamp")(vote)[:-1] + f', "timestamp": {literal}}}'.encode()


NO_IDENTITY, GZIP = "no identity", "gzip"
BLANK = str.maketrans("01", " \t")

# How a good vote can be spoiled. Every result still holds what is unique in the vote, so that no two bodies are equal.
SPOILERS: dict[str, Callable[[dict[str, str]], bytes]] = {
    "truncated": _text(lambda text: text[:-1]),
    "trailing garbage": _text(lambda text: text + "x"),
    "single quotes": _text(lambda text: text.replace('"', "'")),
    "byte order mark": _text(lambda text: text, "utf-8-sig"),
    "UTF-16": _text(lambda text: text, "utf-16"),
    "UTF-32": _text(lambda text: text, "utf-32"),
    "byte FF": lambda vote: json.dumps(vote).encode() + b"\xff",
    "overlong NUL": lambda vote: json.dumps(vote).encode().replace(b"law-", b"law\xc0\x80"),
    "encoded surrogate": lambda vote: json.dumps(vote).encode().replace(b"law-", b"law\xed\xa0\x80"),
    "a list in a list": lambda vote: json.dumps([[vote]]).encode(),
    "a string": lambda vote: json.dumps(vote["vote_id"]).encode(),
    "a number": lambda vote: str(uuid.UUID(vote["vote_id"]).int).encode(),
    "brackets without end": lambda vote: b"[" * 50_000 + vote["vote_id"].encode(),
    "deep nesting": _text(lambda text: text[:-1] + ', "padding": ' + "[" * 64 + "]" * 64 + "}"),
    "many members": _json(padding=[0] * 100),
    "too large": _json(padding="x" * 65_537),
    "duplicate key": _text(lambda text: text[:-1] + ', "choice": "oui"}'),
    "NaN": _json(timestamp=float("nan")),
    "Infinity": _json(timestamp=float("-inf")),
    "1e999": _timestamp("1e999"),
    "4,301 digits": _timestamp("9" * 4_301),
    NO_IDENTITY: lambda vote: json.dumps({"note": vote["vote_id"], "law_id": "law-001", "choice": "oui"}).encode(),
    "no law_id": _without("law_id"),
    "no choice": _without("choice"),
    "a vote_id that is no UUID": lambda vote: json.dumps(vote | {"vote_id": vote["vote_id"][:-1] + "g"}).encode(),
    "vote_id as a URN": lambda vote: json.dumps(vote | {"vote_id": "urn:uuid:" + vote["vote_id"]}).encode(),
    "vote_id is an object": _json(vote_id={}),
    "law_id is a list": _json(law_id=["law-001"]),
    "law_id is a number": _json(law_id=1),
    "law_id is too long": _json(law_id="l" * 9_000),
    "law_id is empty": _json(law_id=""),
    "law_id with NUL": _json(law_id="law-001\0"),
    "law_id with line breaks": _json(law_id="law-001\r\n\x1b[31mERROR"),
    "law_id with SQL": _json(law_id="'; DROP TABLE vote_results; --"),
    "law_id with a Kelvin sign": _json(law_id="\u212a-001"),
    "choice in upper case": _json(choice="OUI"),
    "choice with a space": _json(choice="oui "),
    "choice with a dotless i": _json(choice="ou\u0131"),
    "choice with a lone surrogate": _json(choice="\ud800"),
    "choice is true": _json(choice=True),
    "choice is null": _json(choice=None),
    "voter_hash is too short": lambda vote: json.dumps(vote | {"voter_hash": vote["voter_hash"][:8]}).encode(),
    "timestamp without offset": _json(timestamp="2025-01-01T12:00:00"),
    "timestamp far ahead": _json(timestamp="2999-01-01T00:00:00Z"),
    "timestamp in year 9999999": _json(timestamp="9999999-01-01T00:00:00Z"),
    GZIP: _json(),
    # arrays of which no vote may count
    "empty array": lambda vote: b"[" + f"{uuid.UUID(vote['vote_id']).int:b}".translate(BLANK).encode() + b"]",
    "nested array": lambda vote: json.dumps([vote, [vote]]).encode(),
    "array of 501 votes": lambda vote: json.dumps([vote, *[{}] * MAX_VOTES]).encode(),
    "array too large": lambda vote: json.dumps([vote, vote | {"padding": "x" * 65_537}]).encode(),
    "array without end": lambda vote: json.dumps([vote, vote]).encode()[:-1],
    "array with a comma behind its votes": lambda vote: json.dumps([vote]).encode()[:-1] + b",]",
    "array with NaN in its second vote": lambda vote: json.dumps([vote, vote | {"timestamp": float("nan")}]).encode(),
    "array with byte FF in its second vote": lambda vote: json.dumps([vote, vote]).encode()[:-3] + b'\xff"}]',
    "array behind a byte order mark": lambda vote: json.dumps([vote]).encode("utf-8-sig"),
}


def _spoiled(vote: dict[str, str], number: int) -> Message:
    """Spoil a vote, each in another way than the one before it."""
    name = list(SPOILERS)[number % len(SPOILERS)]
    body = SPOILERS[name](vote)
    message_id = None if name == NO_IDENTITY else vote["vote_id"]
    encoding = "gzip" if name == GZIP else None
    return Message(INVALID, hashlib.sha256(body).hexdigest(), "", "", body, message_id, encoding)


class NotReplayable(Exception):
    """A line of the file to replay is no vote of an audit log; the text says which and why."""


def replayed(path: Path) -> Iterator[Message]:
    """Yield the votes of an exported audit log, in its order. Raises NotReplayable, OSError."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                names = ("vote_id", "law_id", "choice", "timestamp", "voter_hash")
                body = json.dumps({name: row[name] for name in names if row[name] is not None}).encode()
                vote = Vote.from_message(body)
            except (ValueError, KeyError, TypeError, RecursionError) as exc:
                reason = f"no {exc}" if isinstance(exc, KeyError) else "not a line of an exported audit log"
                raise NotReplayable(f"{path}, line {number}: {reason}") from exc
            except UnreadableVote as exc:
                raise NotReplayable(f"{path}, line {number}: {REASONS[exc.reason]}") from exc
            yield Message(VOTE, vote.vote_id, vote.law_id, vote.choice, body, vote.vote_id)


# --- how it is published ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of the messages that were sent, in the order of sending: ``states[i]`` is that of ``messages[i]``,
    and of all that stands in it where it is an array.

    confirmed: the broker has it on the queue. nacked: the broker refused it. returned: no queue took it. unknown: sent,
    but neither came back; it may be on the queue or not.
    """

    messages: list[Message] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    finished: bool = False  # all messages were sent, and answered
    failure: str = ""  # why it ended early; empty also where it was stopped
    started_at: float = 0.0  # Unix time of the first message; with a rate, message i was due at started_at + i / rate
    seconds: float = 0.0  # from the first message to the last answer
    late_seconds: float = 0.0  # how far the sending fell behind the rate, at worst

    @property
    def all_confirmed(self) -> bool:
        """Whether every message was sent and confirmed."""
        return self.finished and all(state == CONFIRMED for state in self.states)

    def in_state(self, *states: str) -> list[Message]:
        """The messages that are in one of these states."""
        return [message for message, state in zip(self.messages, self.states, strict=True) if state in states]

    def votes(self) -> dict[str, Message]:
        """The votes of which at least one copy is confirmed, by vote_id: each must be counted once."""
        return {part.id: part for part in parts_of(self.in_state(CONFIRMED)) if part.kind != INVALID}

    def totals(self) -> dict[str, tuple[int, int]]:
        """The totals that the confirmed votes make."""
        return totals_of(self.votes().values())

    def summary(self) -> dict[str, object]:
        """All of it in numbers, of votes, but for ``messages``; ``votes``, ``duplicates`` and ``invalid`` are those
        confirmed.
        """
        states: Counter[str] = Counter()
        for message, state in zip(self.messages, self.states, strict=True):
            states[state] += len(message.parts)
        invalid = sum(part.kind == INVALID for part in parts_of(self.in_state(CONFIRMED)))
        votes = len(self.votes())
        return {
            "messages": len(self.messages),
            "published": states.total(),
            "confirmed": states[CONFIRMED],
            "unconfirmed": states.total() - states[CONFIRMED],
            NACKED: states[NACKED],
            RETURNED: states[RETURNED],
            UNKNOWN: states[UNKNOWN],
            "votes": votes,
            "duplicates": states[CONFIRMED] - invalid - votes,
            "invalid": invalid,
            "seconds": round(self.seconds, 3),
            "rate": round(states[CONFIRMED] / self.seconds) if self.seconds else 0,
            "late_seconds": round(self.late_seconds, 3),
            "failure": self.failure,
            "totals": {law_id: {"oui": oui, "non": non} for law_id, (oui, non) in self.totals().items()},
        }


class Publisher:
    """Publishes messages with pipelined confirms, ``mandatory`` and persistent. For one call of ``publish``.

    ``urls`` are the servers of one broker, ``queue_type`` is classic or quorum; ``rate`` is in messages a second
    (None: as fast as the broker confirms); it ends after ``silence_seconds`` without any confirm of what was sent;
    ``ledger`` gets a JSON line for each vote, copy and the like before its message is sent, and one when it is
    confirmed; ``on_tick`` is called ten times a second.
    """

    def __init__(
        self,
        urls: Sequence[str],
        queue: str,
        *,
        queue_type: str = "classic",
        max_priority: int = 10,
        heartbeat: int = 30,
        rate: float | None = None,
        window: int = WINDOW,
        silence_seconds: float = SILENCE_SECONDS,
        ledger: TextIO | None = None,
        on_tick: Callable[[Publisher], None] | None = None,
    ) -> None:
        self._parameters = [connection_parameters(url, heartbeat, "test-publisher") for url in urls]
        for parameters in self._parameters:
            parameters.blocked_connection_timeout = BLOCKED_SECONDS
        self._queue = queue
        self._queue_type = queue_type
        self._max_priority = max_priority
        self._rate = rate
        self._window = window
        self._silence_seconds = silence_seconds
        self._heard_at = 0.0  # when an answer came, or something was sent while none was due
        self._ledger = ledger
        self._on_tick = on_tick
        self._messages: Iterator[Message] = iter(())
        self._exhausted = False
        self._waiting: dict[int, Message] = {}  # by delivery tag, which is the place in result.messages plus one
        self._sent_parts = self._waiting_parts = 0
        self._started = 0.0
        self._stopping = False
        self._stop_at: float | None = None
        self._connection: pika.SelectConnection | None = None
        self._channel: Channel | None = None
        self.result = Result()

    @property
    def answered(self) -> int:
        """How many votes, copies and the like the broker has confirmed, refused or returned."""
        return self._sent_parts - self._waiting_parts

    @property
    def seconds(self) -> float:
        """Seconds since the first message."""
        return time.monotonic() - self._started if self._started else 0.0

    def stop(self) -> None:
        """Send nothing more and wait briefly for the confirms of what was sent. Any thread may call this."""
        self._stopping = True

    def publish(self, messages: Iterable[Message]) -> Result:
        """Declare the queue, send all messages and return when they are answered, or when that has failed.

        Raises BrokerUnavailable only while nothing was sent. A connection that is lost later ends it, with
        ``result.failure``; whether to send the unknown ones again (under the same vote_id) is the caller's decision.
        """
        self._messages = iter(messages)
        self._connection = pika.SelectConnection(
            self._declare(),
            on_open_callback=self._on_open,
            on_open_error_callback=lambda _connection, exc: self._fail(exc),
            on_close_callback=lambda _connection, exc: self._fail(exc),
        )
        try:
            self._connection.ioloop.start()
        finally:
            self._connection.ioloop.close()
        if self.result.failure and not self.result.messages:
            raise BrokerUnavailable(self.result.failure)
        return self.result

    def _declare(self) -> pika.URLParameters:
        """Declare the queue by way of the first server that answers, from a random one on; return which that was."""
        servers = random.SystemRandom().sample(self._parameters, k=len(self._parameters))
        for parameters in servers:
            try:
                connection = pika.BlockingConnection(parameters)
                try:
                    declare_queue(connection, self._queue, self._queue_type, self._max_priority)
                    return parameters
                finally:
                    if connection.is_open:
                        connection.close()
            except CONNECTION_ERRORS as exc:
                failure = exc
        raise BrokerUnavailable(describe(failure)) from failure

    def _on_open(self, connection: pika.SelectConnection) -> None:
        connection.channel(on_open_callback=self._on_channel_open)

    def _on_channel_open(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(lambda _channel, exc: self._fail(exc))
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=self._on_confirms_selected)

    def _on_confirms_selected(self, _frame: object) -> None:
        self._started = time.monotonic()
        self.result.started_at = time.time()
        self._tick()
        self._pace()

    def _pace(self) -> None:
        """Send, and again when the next message is due; without a rate the confirms alone keep it going."""
        self._send()
        if (
            self._rate is not None
            and self._connection is not None
            and not self._exhausted
            and not self._connection.is_closed
        ):
            due = len(self.result.messages) / self._rate
            self._connection.ioloop.call_later(max(due - self.seconds, 0.001), self._pace)

    def _send(self) -> None:
        """Send what is due and fits into the window; without a rate, everything is due."""
        if self._channel is None or self._stopping:
            return
        sent = len(self.result.messages)
        room = self._window - len(self._waiting)
        if self._rate is not None:
            room = min(room, int(self.seconds * self._rate) + 1 - sent)
        if room > 0 and not self._exhausted:
            burst = list(islice(self._messages, room))
            self._exhausted = len(burst) < room
            if burst and self._rate is not None:
                self.result.late_seconds = max(self.result.late_seconds, self.seconds - sent / self._rate)
            self._write_ledger("intended", enumerate(burst, sent + 1))  # before a byte of it is sent
            if not self._waiting:
                self._heard_at = time.monotonic()
            for message in burst:
                self._send_one(self._channel, message)
        if self._exhausted and not self._waiting:
            self.result.finished = True
            self._close()

    def _send_one(self, channel: Channel, message: Message) -> None:
        self.result.messages.append(message)
        self.result.states.append(UNKNOWN)
        self._waiting[len(self.result.messages)] = message
        self._sent_parts += len(message.parts)
        self._waiting_parts += len(message.parts)
        properties = pika.BasicProperties(
            content_type="application/json",
            content_encoding=message.content_encoding,
            delivery_mode=2,  # persistent
            message_id=message.message_id,
        )
        channel.basic_publish("", self._queue, message.body, properties, mandatory=True)

    def _on_confirm(self, frame: pika.frame.Method[pika.spec.Basic.Ack | pika.spec.Basic.Nack]) -> None:
        self._heard_at = time.monotonic()
        tag, answer = frame.method.delivery_tag, frame.method
        tags = [tag]
        if answer.multiple:  # tags stand in the order of sending; 0 means all of them
            tags = list(takewhile(lambda waiting: tag == 0 or waiting <= tag, self._waiting))
        state = CONFIRMED if isinstance(answer, pika.spec.Basic.Ack) else NACKED
        settled = [(tag, message) for tag in tags if (message := self._waiting.pop(tag, None)) is not None]
        for tag, message in settled:
            self._waiting_parts -= len(message.parts)
            if self.result.states[tag - 1] == UNKNOWN:  # the broker also acks what it has returned
                self.result.states[tag - 1] = state
        self._write_ledger(CONFIRMED, (item for item in settled if self.result.states[item[0] - 1] == CONFIRMED))
        self.result.seconds = self.seconds
        self._send()

    def _on_return(self, _channel: Channel, _method: object, _properties: object, body: bytes) -> None:
        """Note a message that no queue took. A return has no tag: it is the first one waiting that has this body."""
        for tag, message in self._waiting.items():
            if message.body == body and self.result.states[tag - 1] == UNKNOWN:
                self.result.states[tag - 1] = RETURNED
                return

    def _tick(self) -> None:
        if self._connection is None or self._connection.is_closed:
            return
        if self._on_tick is not None:
            self._on_tick(self)
        if self._stopping:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + GRACE_SECONDS
            if not self._waiting or time.monotonic() > self._stop_at:
                self._close()
                return
        if self._waiting and time.monotonic() - self._heard_at > self._silence_seconds:
            self._fail(TimeoutError(f"no confirm for {self._silence_seconds:g} s"))
            return
        self._connection.ioloop.call_later(TICK_SECONDS, self._tick)

    def _write_ledger(self, state: str, messages: Iterable[tuple[int, Message]]) -> None:
        if self._ledger is None:
            return
        for number, message in messages:
            for place, part in enumerate(message.parts, 1):
                line: dict[str, object] = {"seq": number, "id": part.id}
                if message.array:
                    line["place"] = place
                if state != CONFIRMED:
                    line |= {"law_id": part.law_id, "choice": part.choice, "kind": part.kind}
                self._ledger.write(json.dumps(line | {"state": state}) + "\n")
        self._ledger.flush()

    def _fail(self, exc: BaseException) -> None:
        """Note the first failure, unless the end was our own, and end."""
        ours = self.result.finished or self._stop_at is not None
        if not ours and not self.result.failure:
            self.result.failure = describe(exc)
        self._close()

    def _close(self) -> None:
        assert self._connection is not None
        self._channel = None
        if self._connection.is_open:
            self._connection.close()
            self._connection.ioloop.call_later(2, self._connection.ioloop.stop)  # should the broker not answer
        elif self._connection.is_closed:
            self._connection.ioloop.stop()


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Publish as the command line says and return the exit code."""
    options = _parse(arguments)
    if options.check is not None:
        end = b"\0" if options.null else b"\n"
        return check(options.check, end, options.message_id, options.content_encoding, options.json)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # what it reports, we report
    try:
        broker = amqp_settings(publisher_login(environment()))
        ledger = options.ledger and options.ledger.open("a", encoding="utf-8")
    except InvalidSettings as exc:
        print(*exc.faults, sep="\n", file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"--ledger {options.ledger}: {exc.strerror}", file=sys.stderr)
        return 2
    try:
        # read once before anything is sent: a file that is damaged at its end is not published by half
        total = (
            sum(1 for _ in replayed(options.replay))
            if options.replay
            else message_count(options.n, options.duplicates, options.invalid)
        )
    except (NotReplayable, OSError) as exc:
        print(f"--replay: {exc}", file=sys.stderr)
        return 2
    progress = None if options.quiet else Progress(total, "messages" if options.box == 1 else "votes", sys.stderr)
    publisher = Publisher(
        broker.urls,
        broker.queue,
        queue_type=broker.queue_type,
        max_priority=broker.max_priority,
        heartbeat=broker.heartbeat,
        rate=options.rate,
        window=max(100, WINDOW // options.box),
        ledger=ledger,
        on_tick=progress,
    )
    interrupted: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, functools.partial(_on_signal, publisher, interrupted))
    try:
        publisher.publish(_messages(options))
    except BrokerUnavailable as exc:
        print(f"broker unreachable at {', '.join(map(redact_url, broker.urls))}: {exc}", file=sys.stderr)
        return 128 + interrupted[0] if interrupted else 3
    except KeyboardInterrupt:  # the second Ctrl-C
        interrupted.append(signal.SIGINT)
    finally:
        if ledger:
            ledger.close()
    if progress:
        progress.end(publisher)
    summary = {"seed": options.seed, "queue": broker.queue, "requested": total, **publisher.result.summary()}
    print(json.dumps(summary) if options.json else as_text(summary))
    if publisher.result.failure:
        print(f"connection lost: {publisher.result.failure}", file=sys.stderr)
    if interrupted:
        return 128 + interrupted[0]
    return 0 if publisher.result.all_confirmed else 1


def _messages(options: argparse.Namespace) -> Iterator[Message]:
    if options.replay:
        return in_arrays(replayed(options.replay), options.box)
    made = make_messages(options.n, options.laws, options.seed, options.duplicates, options.invalid)
    return in_arrays(made, options.box)


def _on_signal(publisher: Publisher, interrupted: list[int], signum: int, _frame: FrameType | None) -> None:
    if interrupted:
        raise KeyboardInterrupt
    interrupted.append(signum)
    publisher.stop()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole, share = _number(int, 0, 100_000_000), _number(float, 0, 1_000)
    parser.add_argument("-n", type=whole, default=1000, metavar="VOTES", help="distinct votes (default 1000)")
    parser.add_argument("--laws", type=_number(int, 1, 1_000_000), default=3, help="number of laws (default 3)")
    parser.add_argument("--rate", type=_number(float, 0.001, 1e6), help="messages a second (default: unlimited)")
    box = _number(int, 1, MAX_VOTES)
    parser.add_argument("--box", type=box, default=1, metavar="N", help="put votes into arrays of N (default 1: none)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="default: random")
    parser.add_argument("--duplicates", type=share, default=0, metavar="PCT", help="copies, in percent of VOTES")
    parser.add_argument("--invalid", type=share, default=0, metavar="PCT", help="invalid, in percent of VOTES")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--replay", type=Path, metavar="FILE", help="publish the votes of an exported audit log")
    source.add_argument(
        "--check", nargs="?", const="-", metavar="FILE", help="judge the lines of FILE, or standard input"
    )
    parser.add_argument("--null", action="store_true", help="of --check: bodies end with NUL, not with a line")
    parser.add_argument("--message-id", metavar="TEXT", help="of --check: the property of all bodies")
    parser.add_argument("--content-encoding", metavar="TEXT", help="of --check: likewise")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object; --check: each verdict too")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="append what was intended and what was confirmed")
    options = parser.parse_args(arguments)
    if options.check is None and (options.null or options.message_id or options.content_encoding):
        parser.error("--null, --message-id and --content-encoding are of --check")
    return options


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: accepted is {low:,} to {high:,}")
        return value

    return parse


class Progress:
    """Writes a bar where ``stream`` is a terminal, else a line a second."""

    def __init__(self, total: int, unit: str, stream: TextIO) -> None:
        self._total = total
        self._unit = unit
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._next = 0.0 if self._is_terminal else 1.0  # in seconds since the first message

    def __call__(self, publisher: Publisher) -> None:
        """Print the progress of ``publisher``, if a line is due."""
        if publisher.seconds < self._next:
            return
        done, seconds = publisher.answered, publisher.seconds
        text = f"{done:,} of {self._total:,} {self._unit}, {done / max(seconds, 0.001):,.0f} a second"
        if self._is_terminal:
            bar = "#" * (30 * done // max(self._total, 1))
            self._stream.write(f"\r[{bar:<30}] {text}\x1b[K")
        else:
            self._next += 1.0
            self._stream.write(f"{seconds:4.0f} s  {text}\n")
        self._stream.flush()

    def end(self, publisher: Publisher) -> None:
        """Show the last state of the bar and leave its line."""
        if self._is_terminal:
            self(publisher)
            self._stream.write("\n")
            self._stream.flush()


def as_text(summary: dict[str, Any], most_laws: int = 30) -> str:
    """The summary for people, with the totals of at most so many laws."""
    unconfirmed = f"{summary['nacked']:,} refused, {summary['returned']:,} returned, {summary['unknown']:,} unanswered"
    totals: dict[str, dict[str, int]] = summary["totals"]
    is_single = summary["messages"] == summary["published"]
    unit = "messages" if is_single else f"votes in {summary['messages']:,} messages"
    lines = [
        f"published    {summary['published']:,} of {summary['requested']:,} {unit} to {summary['queue']} "
        f"(seed {summary['seed']})",
        f"confirmed    {summary['confirmed']:,} in {summary['seconds']:.2f} s, {summary['rate']:,} a second: "
        f"{summary['votes']:,} votes, {summary['duplicates']:,} duplicates, {summary['invalid']:,} invalid",
        f"unconfirmed  {summary['unconfirmed']:,}: {unconfirmed}",
        "",
        f"{'expected of the confirmed':<40} {'oui':>10} {'non':>10}",
        *(f"{law_id:<40} {law['oui']:>10,} {law['non']:>10,}" for law_id, law in islice(totals.items(), most_laws)),
    ]
    if len(totals) > most_laws:
        lines.append(f"... and {len(totals) - most_laws:,} more laws (--json has them all)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
