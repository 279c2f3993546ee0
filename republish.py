"""Messages that the service has refused, sent to the queue once more (docs/RUNBOOK.md, After an upgrade).

A later version may read what an earlier one could not. Nothing is counted here and no row is changed: whoever reads the
queue judges each message anew, and the identity of a vote makes it count once, however often it is sent.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import (
    ChannelClosedByBroker,
    NackError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    UnroutableError,
)
from psycopg2.extensions import connection, cursor

import seals
from config import BrokerSettings
from rabbitmq_client import ACCESS_REFUSED, CONNECTION_ERRORS, BrokerUnavailable, connection_parameters, describe
from votes import LAW_REASONS, REASONS, Rejection, UnreadableVote, Vote, read_message

AT_A_TIME = 100  # rows that are held in memory, of 64 KiB at most
BLOCKED_SECONDS = 60.0  # how long a broker short of memory or disk may hold this up
MOST_NAMED = 5  # messages by hash, of each kind that is left out

# All that a row may have, also where the table has none: what the database refused, and what versions before did.
KNOWN_REASONS = {*REASONS, *LAW_REASONS, "refused_by_database", "message_id_mismatch"}

NOT_WHOLE = "not_whole"
NOT_WHOLE_MEANS = "the body is not the one that came: it was cut at 64 KiB, or changed since"

SELECT_REASONS = "SELECT reason, count(*) FROM ONLY rejected_messages GROUP BY reason ORDER BY reason"

# In the order in which they came: of two that stand in each other's way the first is to count.
SELECT_KEPT = """
    SELECT reason, body, body_sha256, message_id,
           CASE WHEN first_seen_at >= '2020-01-01' AND first_seen_at < '9999-01-01'
                THEN floor(extract(epoch FROM first_seen_at))::bigint END
    FROM ONLY rejected_messages
    WHERE reason = ANY (%s)
    ORDER BY first_seen_at, body_sha256, message_id COLLATE "C"
"""
SELECT_COUNTED = """
    SELECT vote_id::text, law_id, choice, voter_hash FROM ONLY vote_audit WHERE vote_id = ANY (%s::uuid[])
"""
SELECT_CERTIFIED = "SELECT law_id FROM vote_statistics WHERE status = 'certified'"


class MayNotPublish(Exception):
    """The broker refuses the user, or lets it publish nothing."""


class NotTaken(Exception):
    """The broker did not take a message: no queue has its name, or the queue is full."""


class Kept(NamedTuple):
    """A row of rejected_messages; ``first_seen`` is in Unix seconds, None where no calendar has it."""

    reason: str
    body: bytes
    body_sha256: bytes
    message_id: str | None
    first_seen: int | None


@dataclass
class LeftOut:
    """Messages that are not sent, and the SHA-256 of the first of them."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, kept: Kept) -> None:
        """Take one more."""
        self.count += 1
        if len(self.named) < MOST_NAMED:
            self.named.append(kept.body_sha256.hex())


@dataclass
class Tally:
    """What became of the messages, in numbers by the reason under which they are kept.

    ``sent`` are those confirmed, or those that would be sent. ``counted`` are votes that count already, ``certified``
    those of a law whose result is final. ``unreadable`` are the others, by that reason and why they are no votes. An
    array is one message: it is sent if any of its votes would be.
    """

    sent: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)
    certified: Counter[str] = field(default_factory=Counter)
    unreadable: dict[tuple[str, str], LeftOut] = field(default_factory=dict)

    def of(self, reason: str) -> tuple[int, int, int, int]:
        """How many of that reason are each of these."""
        unreadable = sum(left.count for (kept_as, _), left in self.unreadable.items() if kept_as == reason)
        return self.sent[reason], self.counted[reason], self.certified[reason], unreadable


def reasons_kept(conn: connection) -> dict[str, int]:
    """How many messages are kept under each reason. Raises psycopg2.Error."""
    with seals.transaction(conn) as cur:
        cur.execute(SELECT_REASONS)
        return dict(cur.fetchall())


def republish(conn: connection, reasons: Sequence[str], sender: Sender | None, tally: Tally) -> None:
    """Send each message of these reasons that is a vote now, or an array with one, which does not count yet; none where
    there is no ``sender``.

    They go in the order in which they were first refused. ``tally`` is right at any time, also where this raises:
    psycopg2.Error, and what ``Sender.send`` does. All that is read is of one snapshot.
    """
    conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
    with seals.transaction(conn) as cur:
        cur.execute(SELECT_CERTIFIED)
        certified = {law_id for (law_id,) in cur.fetchall()}
        with conn.cursor("kept") as rows:  # on the server, so that many rows need no memory here
            rows.execute(SELECT_KEPT, (list(reasons),))
            while some := rows.fetchmany(AT_A_TIME):
                _send_votes(cur, [_kept(*row) for row in some], certified, sender, tally)
                if sender is not None:
                    sender.keep_alive()


def _send_votes(
    cur: cursor, messages: Iterable[Kept], certified: set[str], sender: Sender | None, tally: Tally
) -> None:
    readable: list[tuple[Kept, list[Vote]]] = []
    for kept in messages:
        try:
            readable.append((kept, _read(kept)))
        except UnreadableVote as exc:
            tally.unreadable.setdefault((kept.reason, exc.reason), LeftOut()).add(kept)
    cur.execute(SELECT_COUNTED, ([vote.vote_id for _, votes in readable for vote in votes],))
    counted = set(cur.fetchall())
    for kept, votes in readable:
        missing = [v for v in votes if (v.vote_id, v.law_id, v.choice, v.voter_hash) not in counted]
        if not missing:
            tally.counted[kept.reason] += 1
        elif all(vote.law_id in certified for vote in missing):
            tally.certified[kept.reason] += 1
        else:
            if sender is not None:
                sender.send(kept)
            tally.sent[kept.reason] += 1


def _kept(reason: str, body: memoryview, body_sha256: memoryview, message_id: str, first_seen: int | None) -> Kept:
    return Kept(reason, bytes(body), bytes(body_sha256), _as_it_came(message_id), first_seen)


def _as_it_came(message_id: str) -> str | None:
    """The property of the message, which is stored with escapes; None where there was none, or it is none."""
    try:
        text = message_id.encode("ascii").decode("unicode_escape")
        return text if 0 < len(text.encode()) <= 255 else None
    except UnicodeError:
        return None


def _read(kept: Kept) -> list[Vote]:
    """What the service will read in the message, one vote at least.

    Raises UnreadableVote, with the reason of the first where all are unreadable, and with NOT_WHOLE where it is not
    what came.
    """
    if hashlib.sha256(kept.body).digest() != kept.body_sha256:
        raise UnreadableVote(NOT_WHOLE)
    read = read_message(kept.body, kept.message_id)
    if isinstance(read[0], Rejection) and all(isinstance(each, Rejection) for each in read):
        raise UnreadableVote(read[0].reason)
    return [each for each in read if isinstance(each, Vote)]


class Sender:
    """Sends one message after the other, persistent, and waits for the confirm of each. Connects at the first."""

    def __init__(self, broker: BrokerSettings) -> None:
        self._queue = broker.queue
        self._parameters = [connection_parameters(url, broker.heartbeat, "vote-republish") for url in broker.urls]
        for parameters in self._parameters:
            parameters.blocked_connection_timeout = BLOCKED_SECONDS
        self._connection: pika.BlockingConnection | None = None
        self._channel: BlockingChannel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._connection is not None and self._connection.is_open:
            with contextlib.suppress(*CONNECTION_ERRORS):  # all that was sent is confirmed
                self._connection.close()

    def send(self, kept: Kept) -> None:
        """Send one, and return when it is confirmed.

        Its ``timestamp`` is when it was first refused, for a vote that does not say when it was cast. Raises
        MayNotPublish, NotTaken, and BrokerUnavailable: then it may be on the queue or not.
        """
        properties = pika.BasicProperties(
            content_type="application/json",
            delivery_mode=2,  # persistent
            message_id=kept.message_id,
            timestamp=kept.first_seen,
        )
        try:
            if self._channel is None:
                self._channel = self._connect()
            self._channel.basic_publish("", self._queue, kept.body, properties, mandatory=True)
        except UnroutableError:
            raise NotTaken(f"there is no queue {self._queue}: the service declares it when it starts") from None
        except NackError:
            raise NotTaken(f"the queue {self._queue} takes no more: is it full?") from None
        except CONNECTION_ERRORS as exc:
            raise _told(exc) from exc

    def keep_alive(self) -> None:
        """Answer the broker's heartbeats, for a time in which nothing is sent. Raises as ``send`` does."""
        if self._connection is not None:
            try:
                self._connection.process_data_events(time_limit=0)
            except CONNECTION_ERRORS as exc:
                raise _told(exc) from exc

    def _connect(self) -> BlockingChannel:
        self._connection = pika.BlockingConnection(self._parameters)
        channel = self._connection.channel()
        channel.confirm_delivery()
        return channel


def _told(exc: Exception) -> MayNotPublish | BrokerUnavailable:
    is_login = isinstance(exc, ProbableAuthenticationError | ProbableAccessDeniedError)
    if is_login or (isinstance(exc, ChannelClosedByBroker) and exc.reply_code == ACCESS_REFUSED):
        return MayNotPublish(describe(exc))
    return BrokerUnavailable(describe(exc))
