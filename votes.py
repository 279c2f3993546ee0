"""What a vote is: the message contract (docs/MESSAGE_FORMAT.md) and the batch that votes are gathered in.

Nothing here does I/O or knows another module of the service.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Any, NamedTuple, Self

MAX_BODY_BYTES = 64 * 1024
MAX_BATCH_BYTES = 2 * 1024 * 1024  # 200 a vote at the largest BATCH_SIZE
MAX_DEPTH = 64  # of lists and objects in each other; the limits of interpreters differ, and so would their verdicts
MAX_PARTS = 100  # of a message: it holds so much work, and no more, whoever wrote it
MAX_SECONDS_AHEAD = 24 * 3600
EARLIEST_SENT, LATEST_SENT = (
    1_577_836_800,
    253_402_300_799,
)  # 2020 to 9999; what is outside is in other units, or no time

CHOICES = ("oui", "non")

# What is no encoding at all, and common clients set on every message. In lower case.
PLAIN_ENCODINGS = frozenset(["utf-8", "binary", "identity"])

# Of the identities of votes that have none but their voter: uuid5(NAMESPACE_URL, "urn:vote-aggregator:voter").
VOTER_NAMESPACE = uuid.UUID("d4a83368-d6c8-5b72-b602-f825586930ef")


class Vote(NamedTuple):
    """One readable vote, with the delivery it came in.

    The first five fields are the vote. ``body`` is the evidence, should the database refuse it; ``delivery_tag`` and
    ``redelivered`` are the broker's. ``sent_at`` is when the message says that it was sent, in Unix seconds, of a vote
    that does not say itself when it was cast.
    """

    vote_id: str
    law_id: str
    choice: str
    voted_at: datetime | None
    voter_hash: str | None
    body: bytes
    message_id: str | None
    delivery_tag: int
    redelivered: bool
    sent_at: int | None = None

    @classmethod
    def from_message(
        cls,
        body: bytes,
        message_id: str | None = None,
        content_encoding: str | None = None,
        delivery_tag: int = 0,
        redelivered: bool = False,
        sent_at: int | None = None,
    ) -> Vote:
        """Read one message strictly.

        ``body`` is the payload as it came; ``message_id`` and ``content_encoding`` are the AMQP properties of that
        name, ``sent_at`` is its ``timestamp``, which counts as absent where it cannot be right. Raises UnreadableVote,
        and nothing else, with the reason code of the first rule that was broken.
        """
        if content_encoding and content_encoding.lower() not in PLAIN_ENCODINGS:
            raise UnreadableVote("content_encoding")
        message = _read_object(body)

        voter_hash = message.get("voter_hash")
        is_named_by_voter = "vote_id" not in message and voter_hash is not None
        if not is_named_by_voter:
            vote_id = message.get("vote_id", message_id or None)
            if vote_id is None and "vote_id" not in message:
                raise UnreadableVote("missing_vote_id")
            if type(vote_id) is not str or not _is_uuid(vote_id):
                raise UnreadableVote("bad_vote_id")
            vote_id = vote_id.lower()

        law_id = message.get("law_id")
        if type(law_id) is not str or not _is_law_id(law_id):
            raise UnreadableVote("bad_law_id" if "law_id" in message else "missing_law_id")

        choice = message.get("choice")
        if type(choice) is not str or choice not in CHOICES:
            raise UnreadableVote("bad_choice" if "choice" in message else "missing_choice")

        if voter_hash is not None and (type(voter_hash) is not str or not _is_voter_hash(voter_hash)):
            raise UnreadableVote("bad_voter_hash")
        if is_named_by_voter:
            vote_id = str(uuid.uuid5(VOTER_NAMESPACE, f"{law_id}\n{voter_hash}"))

        timestamp = message.get("timestamp")
        voted_at = None if timestamp is None else _read_timestamp(timestamp)
        if sent_at is not None and (voted_at is not None or not EARLIEST_SENT <= sent_at <= LATEST_SENT):
            sent_at = None
        fields = (vote_id, law_id, choice, voted_at, voter_hash, body, message_id, delivery_tag, redelivered, sent_at)
        return tuple.__new__(cls, fields)  # half the time of cls(...)

    def rejected(self, reason: str, detail: str) -> Rejection:
        """This vote as a message that does not count."""
        return Rejection(self.body, reason, detail, self.message_id, self.delivery_tag, self.law_id)


class CutBody(bytes):
    """The beginning of a body that is too large for a vote, with what is to be kept of the whole.

    A replica holds as many bodies as its prefetch allows, whatever their size: whole ones could fill its memory.
    """

    sha256: bytes
    full_bytes: int

    @classmethod
    def of(cls, beginning: bytes, sha256: bytes, full_bytes: int) -> Self:
        """``beginning`` is one byte longer than a vote may be; the others are those of the whole body."""
        cut = cls(beginning)
        cut.sha256, cut.full_bytes = sha256, full_bytes
        return cut


class Rejection(NamedTuple):
    """A message that does not count and is kept, with why: ``reason`` is a short code, ``detail`` is for people."""

    body: bytes
    reason: str
    detail: str
    message_id: str | None
    delivery_tag: int
    law_id: str | None = None  # where the message is a vote

    @property
    def body_sha256(self) -> bytes:
        """Of the whole body, also where it was cut."""
        return self.body.sha256 if isinstance(self.body, CutBody) else hashlib.sha256(self.body).digest()


class UnreadableVote(Exception):
    """The message breaks a rule of the contract; ``reason`` is the rule's code, one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


REASONS = {
    "too_large": "the body is larger than 64 KiB",
    "content_encoding": "the content-encoding is neither utf-8 nor binary nor identity",
    "not_utf8": "the body is not UTF-8",
    "not_json": "the body is not one JSON value, or has a byte order mark, NaN or Infinity",
    "too_deep": "the JSON is nested deeper than 64",
    "too_many_members": "the JSON has more than 100 commas and opening brackets outside of texts",
    "not_an_object": "the JSON is not an object",
    "duplicate_key": "a key stands twice in one object",
    "missing_vote_id": "there is neither a vote_id nor a voter_hash nor a message_id",
    "bad_vote_id": "vote_id, or the message_id in its place, is not a UUID with hyphens",
    "missing_law_id": "there is no law_id",
    "bad_law_id": "law_id is not 1 to 64 characters of A-Z a-z 0-9 . _ : -",
    "missing_choice": "there is no choice",
    "bad_choice": "choice is neither oui nor non",
    "bad_voter_hash": "voter_hash is not 16 to 128 characters of A-Z a-z 0-9 _ + / = -",
    "bad_timestamp": "timestamp is neither ISO 8601 with an offset nor Unix seconds, or before 1970",
    "future_timestamp": "timestamp is more than 24 hours ahead",
}


class Outcome(StrEnum):
    """What became of a vote that can be read."""

    COUNTED = "counted"
    REDELIVERY = "redelivery"  # it was counted before, and the broker has delivered its message again
    DUPLICATE = "duplicate"  # it was counted before, and somebody has sent it again
    CONFLICT = "conflict"  # another vote with its vote_id was counted
    SECOND_VOTE = "second_vote"  # another vote of its voter on this law was counted
    OUTSIDE_WINDOW = "outside_window"  # kept as a rejected message, as the next
    CERTIFIED = "certified"


OUTCOMES = {outcome.value: outcome for outcome in Outcome}
LAW_REASONS = {
    Outcome.OUTSIDE_WINDOW: "the law was not open at the vote's timestamp, or, without one, at its sending or receipt",
    Outcome.CERTIFIED: "the result of the law is certified",
}


class VoteBatch:
    """Votes and unreadable messages of one channel, in the order they came. Pure: time is handed in.

    ``size`` counts messages, unreadable ones too (they hold a place of the prefetch as well, so a batch that waited
    for ``size`` readable ones could never fill); ``timeout`` is in seconds since the first message; ``generation``
    names the channel. A batch is full at MAX_BATCH_BYTES too: whoever adds messages counts ``bytes``, those of bodies.
    """

    def __init__(self, size: int, timeout: float, generation: int = 0) -> None:
        self.generation = generation
        self._size = size
        self._timeout = timeout
        self.votes: list[Vote] = []
        self.rejections: list[Rejection] = []
        self.bytes = 0
        self.traceparents: dict[int, str] = {}  # by delivery tag, of the messages that carry one
        self.started_at: float | None = None

    def __len__(self) -> int:
        return len(self.votes) + len(self.rejections)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added yet."""
        return self.started_at is None

    @property
    def room(self) -> int:
        """How many messages it takes until it is full."""
        return self._size - len(self)

    def add(self, message: Vote | Rejection, now: float) -> None:
        """Take one message; ``now`` is in seconds of the monotonic clock that ``is_ready`` is asked with too."""
        if self.started_at is None:
            self.started_at = now
        if isinstance(message, Vote):
            self.votes.append(message)
        else:
            self.rejections.append(message)

    def is_ready(self, now: float) -> bool:
        """Whether the batch is full, or its first message has waited for the timeout."""
        return len(self) >= self._size or self.bytes >= MAX_BATCH_BYTES or self.seconds_left(now) <= 0

    def seconds_left(self, now: float) -> float:
        """Seconds until the first message has waited for the timeout; the whole timeout while the batch is empty."""
        return self._timeout if self.started_at is None else self.started_at + self._timeout - now


def counts(votes: Iterable[Vote]) -> dict[str, tuple[int, int]]:
    """Number of oui and of non per law, in the order of the law ids (the order in which rows are locked)."""
    number = Counter([(vote.law_id, vote.choice) for vote in votes])
    return {law: (number[law, "oui"], number[law, "non"]) for law in sorted({law for law, _ in number})}


# RFC 9562 section 4: hyphens, and letters in any case. Votes hold it in lower case: one identity has one spelling.
_is_uuid = re.compile(r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}").fullmatch
_is_law_id = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}").fullmatch
_is_voter_hash = re.compile(r"[A-Za-z0-9_+/=-]{16,128}").fullmatch
# All but the days of a month is decided here: what fromisoformat takes differs between versions (24:00, offsets of 60
# minutes).
_is_timestamp = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]{1,9})?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)"
).fullmatch


class _DuplicateKey(ValueError):
    """Raised out of the JSON parser, which knows only ValueError of its own."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DuplicateKey
    return fields


def _number(text: str) -> int | float:
    # int() refuses 4,301 digits and takes long for fewer; no field that is read needs more than 15.
    return int(text) if len(text) <= 15 else float(text)


def _no_constant(text: str) -> float:
    raise ValueError(text)  # NaN and Infinity are not JSON (RFC 8259 section 6)


# decode does the same, looks for white space by two regular expressions, and calls this by way of raw_decode
_decode = json.JSONDecoder(  # type: ignore[attr-defined] # its types leave it out
    object_pairs_hook=_unique_keys, parse_int=_number, parse_constant=_no_constant
).scan_once


_find_brackets = re.compile(r"[][{}]").finditer


def _check_shape(text: str) -> None:
    """Raise UnreadableVote where more than MAX_DEPTH brackets are open at once, or commas and opening brackets are more
    than MAX_PARTS, those in texts not counted; ``text`` may be no JSON.
    """
    # without escapes every other piece between quotes is a text; JSON of so many parts has two texts each at most
    most = 4 * MAX_PARTS + 4
    pieces = text.replace("\\\\", "").replace('\\"', "").split('"', most)
    outside = "".join(pieces[:most:2])  # where there are more, the last has texts in it
    opening = outside.count("[") + outside.count("{")
    if opening > MAX_DEPTH:
        depth = 0
        for bracket in islice(_find_brackets(outside), 2 * MAX_PARTS):
            depth += 1 if bracket[0] in "[{" else -1
            if depth > MAX_DEPTH:
                raise UnreadableVote("too_deep")
    if len(pieces) > most or opening + outside.count(",") > MAX_PARTS:
        raise UnreadableVote("too_many_members")


def _read_object(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_BODY_BYTES:
        raise UnreadableVote("too_large")
    try:
        # decoded here, since json.loads would guess UTF-16 and UTF-32 from bytes
        text = body.decode("utf-8").strip(" \t\n\r")
        if text.count("[") + text.count("{") + text.count(",") > MAX_DEPTH:
            _check_shape(text)
        value, end = _decode(text, 0)
    except UnicodeDecodeError:
        raise UnreadableVote("not_utf8") from None
    except _DuplicateKey:
        raise UnreadableVote("duplicate_key") from None
    except (ValueError, StopIteration):  # the latter where no value begins
        raise UnreadableVote("not_json") from None
    if end != len(text):
        raise UnreadableVote("not_json")
    if type(value) is not dict:
        raise UnreadableVote("not_an_object")
    return value


def _read_timestamp(value: object) -> datetime:
    moment = None
    if type(value) is str and _is_timestamp(value):
        try:
            moment = datetime.fromisoformat(value)
            seconds = moment.timestamp()
        except (ValueError, OverflowError):
            raise UnreadableVote("bad_timestamp") from None
    elif type(value) is int or type(value) is float:
        seconds = value
    else:
        raise UnreadableVote("bad_timestamp")
    if not seconds >= 0:
        raise UnreadableVote("bad_timestamp")
    if seconds > time.time() + MAX_SECONDS_AHEAD:
        raise UnreadableVote("future_timestamp")
    # PostgreSQL takes no offset beyond 16 hours, so all go in UTC
    return moment if moment is not None and moment.tzinfo is UTC else datetime.fromtimestamp(seconds, UTC)
