"""What a vote is: the message contract (docs/MESSAGE_FORMAT.md) and the batch that votes are gathered in.

Nothing here does I/O or knows another module of the service.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import accumulate, compress, islice
from typing import Any, NamedTuple, Self, cast

MAX_BODY_BYTES = 64 * 1024
MAX_BATCH_BYTES = 2 * 1024 * 1024  # 200 a vote at the largest BATCH_SIZE
MAX_DEPTH = 64  # of lists and objects in each other; the limits of interpreters differ, and so would their verdicts
MAX_PARTS = 100  # of a vote: it holds so much work, and no more, whoever wrote it
MAX_VOTES = 500  # of an array
MOST_BRACKETS, MOST_COMMAS = 4 * MAX_VOTES, 20 * MAX_VOTES  # of an array that is read in one go, which is work
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

    The first five fields are the vote. ``body`` is that of its message, the evidence, should the database refuse it;
    ``delivery_tag`` and ``redelivered`` are the broker's. ``sent_at`` is when the message says that it was sent, in
    Unix seconds, of a vote that does not say itself when it was cast. ``place`` is 1 for the first vote of an array,
    and 0 for one that is a message by itself.
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
    place: int = 0

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
        """Read one message that is a vote, strictly.

        ``body`` is the payload as it came; ``message_id`` and ``content_encoding`` are the AMQP properties of that
        name, ``sent_at`` is its ``timestamp``, which counts as absent where it cannot be right. Raises UnreadableVote,
        and nothing else, with the reason code of the first rule that was broken.
        """
        message = _read_object(_decoded(body, content_encoding))
        return cls.of(message, message_id or None, body, message_id, delivery_tag, redelivered, sent_at, 0)

    @classmethod
    def of(
        cls,
        message: dict[str, Any],
        fallback_id: str | None,
        body: bytes,
        message_id: str | None,
        delivery_tag: int,
        redelivered: bool,
        sent_at: int | None,
        place: int,
    ) -> Vote:
        """The vote of a JSON object; ``fallback_id`` is its identity where it has none of its own.

        Raises UnreadableVote.
        """
        voter_hash = message.get("voter_hash")
        is_named_by_voter = "vote_id" not in message and voter_hash is not None
        if not is_named_by_voter:
            vote_id = message.get("vote_id", fallback_id)
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
        fields = (
            vote_id, law_id, choice, voted_at, voter_hash, body, message_id, delivery_tag, redelivered, sent_at, place,
        )  # fmt: skip
        return tuple.__new__(cls, fields)  # half the time of cls(...)

    def rejected(self, reason: str, detail: str) -> Rejection:
        """This vote as one that does not count."""
        return Rejection.of(self.body, self.place, reason, detail, self.message_id, self.delivery_tag, self.law_id)


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
    """A message, or one vote of an array, that does not count and is kept, with why.

    ``body`` is its own text. ``reason`` is a short code, ``detail`` is for people; ``law_id`` is that of a vote that
    can be read. A vote of an array has its ``place``, and no ``message_id``: whoever sends its text again as a message
    by itself must not have that taken for its identity.
    """

    body: bytes
    reason: str
    detail: str
    message_id: str | None
    delivery_tag: int
    law_id: str | None = None
    place: int = 0

    @classmethod
    def of(
        cls,
        body: bytes,
        place: int,
        reason: str,
        detail: str,
        message_id: str | None,
        delivery_tag: int,
        law_id: str | None = None,
    ) -> Rejection:
        """``body`` is that of the message, of which the vote at ``place`` is rejected, or all of it where that is 0."""
        if not place:
            return cls(body, reason, detail, message_id, delivery_tag, law_id)
        detail = f"vote {place} of an array: {detail}"
        return cls(_elements(body)[place - 1], reason, detail, None, delivery_tag, law_id, place)

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
    "not_an_object": "the JSON is neither an object nor an array of objects",
    "empty_array": "an array without a vote",
    "nested_array": "an array within the array of votes",
    "too_many_votes": "an array of more than 500 votes",
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
    """Votes of one channel, and what cannot be read as one, in the order they came. Pure: time is handed in.

    ``size`` counts both (an unreadable message holds a place of the prefetch as well, so a batch that waited for
    ``size`` readable ones could never fill); ``timeout`` is in seconds since the first; ``generation`` names the
    channel. A batch is full at MAX_BATCH_BYTES of bodies too. All votes of a message are in one batch, lest it be acked
    before each is written: an array may fill a batch beyond its size.
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
        """How many votes it takes until it is full."""
        return self._size - len(self)

    @cached_property
    def keys(self) -> set[str]:
        """The identities of its votes, and of their voters."""
        voters = {f"{vote.law_id} {vote.voter_hash}" for vote in self.votes if vote.voter_hash is not None}
        return {vote.vote_id for vote in self.votes} | voters

    def extend(self, messages: Sequence[Vote | Rejection], size: int, now: float) -> None:
        """Take what whole messages hold, whose bodies have ``size`` bytes.

        ``now`` is in seconds of the monotonic clock that ``is_ready`` is asked with too.
        """
        if self.started_at is None:
            self.started_at = now
        self.bytes += size
        for message in messages:
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


def whole(messages: Sequence[Vote | Rejection], number: int) -> int:
    """How many of them to take, ``number`` or more, so that none that came in one delivery is left behind."""
    while number < len(messages) and messages[number].delivery_tag == messages[number - 1].delivery_tag:
        number += 1
    return number


def are_strangers(one: VoteBatch, other: VoteBatch) -> bool:
    """Whether no vote is in both of them, and no voter of a law either. Nothing may be added to either any more."""
    return one.keys.isdisjoint(other.keys)


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


_decode_unchecked = json.JSONDecoder(  # type: ignore[attr-defined] # a key may stand twice; that needs no call for each object
    parse_int=_number, parse_constant=_no_constant
).scan_once

# by how much a character changes how many brackets are open, as a signed byte
_STEPS = bytes([{"[": 1, "{": 1, "]": 255, "}": 255}.get(chr(code), 0) for code in range(256)])
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


def _decoded(body: bytes, content_encoding: str | None) -> str:
    """The text of a body, without white space around it. Raises UnreadableVote."""
    if content_encoding and content_encoding.lower() not in PLAIN_ENCODINGS:
        raise UnreadableVote("content_encoding")
    if len(body) > MAX_BODY_BYTES:
        raise UnreadableVote("too_large")
    try:
        # decoded here, since json.loads would guess UTF-16 and UTF-32 from bytes
        return body.decode("utf-8").strip(" \t\n\r")
    except UnicodeDecodeError:
        raise UnreadableVote("not_utf8") from None


def _read_object(text: str) -> dict[str, Any]:
    try:
        if text.count("[") + text.count("{") + text.count(",") > MAX_DEPTH:
            _check_shape(text)
        value, end = _decode(text, 0)
    except _DuplicateKey:
        raise UnreadableVote("duplicate_key") from None
    except (ValueError, StopIteration):  # the latter where no value begins
        raise UnreadableVote("not_json") from None
    if end != len(text):
        raise UnreadableVote("not_json")
    if type(value) is not dict:
        raise UnreadableVote("not_an_object")
    return value


def read_message(
    body: bytes,
    message_id: str | None = None,
    content_encoding: str | None = None,
    delivery_tag: int = 0,
    redelivered: bool = False,
    sent_at: int | None = None,
) -> list[Vote | Rejection]:
    """All that a message holds: one vote, or those of an array, each of them read, or rejected, by itself.

    The arguments are those of ``Vote.from_message``; in an array ``message_id`` is no identity. A message that cannot
    be read is one rejection, with place 0.
    """
    try:
        if not begins_array(body):
            return [Vote.from_message(body, message_id, content_encoding, delivery_tag, redelivered, sent_at)]
        elements = _read_array(_decoded(body, content_encoding))
    except UnreadableVote as exc:
        return [Rejection.of(body, 0, exc.reason, REASONS[exc.reason], message_id, delivery_tag)]
    messages: list[Vote | Rejection] = []
    for place, element in enumerate(elements, start=1):
        try:
            if isinstance(element, UnreadableVote):
                raise element
            messages.append(Vote.of(element, None, body, message_id, delivery_tag, redelivered, sent_at, place))
        except UnreadableVote as exc:
            messages.append(Rejection.of(body, place, exc.reason, REASONS[exc.reason], message_id, delivery_tag))
    return messages


def begins_array(body: bytes) -> bool:
    """Whether it can only be read as an array of votes."""
    return body[:1] != b"{" and body.lstrip(b" \t\n\r")[:1] == b"["


def _read_array(text: str) -> Sequence[dict[str, Any] | UnreadableVote]:
    """The objects of an array; in the place of one that cannot be read, why. Raises UnreadableVote."""
    brackets, commas = text.count("[") + text.count("{"), text.count(",")
    if brackets <= MOST_BRACKETS and commas <= MOST_COMMAS:
        # Nearly all arrays are read in one go; where that fails, each element is looked at by itself.
        try:
            values, end = _decode_unchecked(text, 0)
            if end == len(text) and 0 < len(values) <= MAX_VOTES:
                if brackets == len(values) + 1 and commas == sum(map(_members, values)) - 1:
                    return cast(list[dict[str, Any]], values)  # as many members as commas say: no key stands twice
                values, _ = _decode(text, 0)
                if all(map(_is_sound, values)):
                    return cast(list[dict[str, Any]], values)
        except (ValueError, StopIteration, RecursionError):
            pass
    elements: list[dict[str, Any] | UnreadableVote] = []
    for start, end in _spans(text):
        try:
            elements.append(_read_object(text[start:end]))
        except UnreadableVote as exc:
            if exc.reason == "not_json":
                raise
            elements.append(exc)
    return elements


def _members(value: Any) -> int:
    """How many an object has, which holds no other; far too many where it is none, or has more than it may."""
    return len(value) if type(value) is dict and len(value) <= MAX_PARTS else MAX_BODY_BYTES


def _is_sound(value: Any) -> bool:
    """Whether it is an object that ``_read_object`` would take."""
    return type(value) is dict and _parts(value, 1) <= MAX_PARTS


def _parts(value: Any, depth: int) -> int:
    """How many opening brackets and commas it is written with; more than MAX_PARTS where it is too deep."""
    if type(value) is dict:
        inner = [item for item in value.values() if type(item) is dict or type(item) is list]
    else:
        inner = [item for item in value if type(item) is dict or type(item) is list]
    if inner and depth == MAX_DEPTH:
        return MAX_PARTS + 1
    return max(1, len(value)) + sum([_parts(item, depth + 1) for item in inner])


@lru_cache(maxsize=4)
def _spans(text: str) -> list[tuple[int, int]]:
    """Where the elements of an array begin and end: at commas that stand in no text and in no brackets but its own.

    Raises UnreadableVote where it is no array of one to MAX_VOTES elements that are no arrays.
    """
    # By what takes a text as a whole: a loop over its characters would take many times as long, if a sender likes.
    pieces = text.replace("\\\\", "__").replace('\\"', "__").split('"')
    if len(pieces) % 2 == 0:
        raise UnreadableVote("not_json")  # a text that does not end
    pieces[1::2] = map(" ".__mul__, map(len, pieces[1::2]))
    outside = " ".join(pieces)  # what stood in texts is blank, all else where it was
    depths = list(accumulate(array("b", outside.encode("latin-1", "replace").translate(_STEPS))))
    if depths[-1] != 0 or depths.index(0) != len(text) - 1 or not text.endswith("]"):
        raise UnreadableVote("not_json")
    own = list(compress(range(len(text)), map((1).__eq__, depths)))  # what stands in the array's brackets alone
    commas = [at for at in own if outside[at] == ","]
    if len(commas) >= MAX_VOTES:
        raise UnreadableVote("too_many_votes")
    ends = [*commas, len(text) - 1]
    spans = [_stripped(text, start + 1, end) for start, end in zip([0, *commas], ends, strict=True)]
    if len(spans) == 1 and spans[0][0] == spans[0][1]:
        raise UnreadableVote("empty_array")
    if any(text.startswith("[", start) for start, _ in spans):
        raise UnreadableVote("nested_array")
    return spans


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    element = text[start:end].lstrip(" \t\n\r")
    return end - len(element), end - len(element) + len(element.rstrip(" \t\n\r"))


@lru_cache(maxsize=4)  # it is asked for each vote of an array that is rejected
def _elements(body: bytes) -> list[bytes]:
    """The bytes of each element of an array that was read."""
    text = body.decode("utf-8").strip(" \t\n\r")
    return [text[start:end].encode() for start, end in _spans(text)]


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
