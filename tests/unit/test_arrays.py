"""The contract on arrays of votes, rule by rule."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from typing import Any

import pytest

from tests.harness import vote
from votes import (
    MAX_BODY_BYTES,
    MAX_DEPTH,
    MAX_PARTS,
    MAX_VOTES,
    REASONS,
    CutBody,
    Rejection,
    Vote,
    VoteBatch,
    are_strangers,
    read_message,
    whole,
)

A_UUID = "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59"


def array(*elements: bytes | dict[str, Any], separator: bytes = b",") -> bytes:
    made = [element if isinstance(element, bytes) else json.dumps(element).encode() for element in elements]
    return b"[" + separator.join(made) + b"]"


def outcomes(body: bytes, *properties: Any) -> list[str]:
    """Of each vote "vote" or the reason; of a message that is refused whole "refused" and the reason."""
    read = read_message(body, *properties)
    if len(read) == 1 and isinstance(read[0], Rejection) and not read[0].place:
        assert (read[0].body, read[0].detail) == (body, REASONS[read[0].reason])
        return ["refused", read[0].reason]
    assert [message.place for message in read] == list(range(1, len(read) + 1))
    return ["vote" if isinstance(message, Vote) else message.reason for message in read]


def test_each_vote_of_an_array_is_read_as_if_it_came_alone() -> None:
    """With its place, and the delivery that all of them came in."""
    votes = [
        vote("law-7", "non", timestamp="2026-01-01T01:00:00.25+01:00", voter_hash="h" * 16),
        {"law_id": "law-8", "choice": "oui", "voter_hash": "g" * 16},
        vote("law-9", vote_id=A_UUID.upper(), other={"a": [1, {}]}),
    ]
    body = array(*votes, separator=b" ,\r\n\t")
    read = read_message(body, "no-identity", "UTF-8", 7, True, 1_800_000_000)
    for place, (message, alone) in enumerate(zip(read, votes, strict=True), start=1):
        expected = Vote.from_message(json.dumps(alone).encode(), None, None, 7, True, 1_800_000_000)
        assert message == expected._replace(body=body, message_id="no-identity", place=place)


@pytest.mark.parametrize("number", [1, 2, MAX_VOTES])
def test_an_array_holds_one_to_500_votes(number: int) -> None:
    """As many as its bytes allow."""
    body = array(*[{"vote_id": str(uuid.uuid4()), "law_id": "a", "choice": "oui"} for _ in range(number)])
    assert outcomes(b" \r\n\t" + body + b"\n ") == ["vote"] * number


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[]", "empty_array"),
        (b" [ \n ] ", "empty_array"),
        (b"[[]]", "nested_array"),
        (array(vote(), b"[1]"), "nested_array"),
        (array(array(vote())), "nested_array"),
        (array(*[b"{}"] * (MAX_VOTES + 1)), "too_many_votes"),
        (b"[" + b"0," * 30_000 + b"0]", "too_many_votes"),
        (array(vote())[:-1], "not_json"),
        (array(vote()) + b"]", "not_json"),
        (array(vote()) + b"[]", "not_json"),
        (array(vote())[:-1] + b"}", "not_json"),
        (b"[}", "not_json"),
        (array(vote(), b""), "not_json"),
        (array(b"", vote()), "not_json"),
        (array(vote(), b"{'a': 1}"), "not_json"),
        (array(vote(), b"NaN"), "not_json"),
        (array(vote(), b'{"x": Infinity}'), "not_json"),
        (array(vote(), b'{"x": [}]'), "not_json"),
        (array(vote(), b'"'), "not_json"),
        (array(vote(), b'"\\'), "not_json"),
        (array(vote(), b"{}}"), "not_json"),
        (array(vote(), b"{} {}"), "not_json"),
        (array(vote(), b'{"a": 1,}'), "not_json"),
        (b"[" * 65_000, "not_json"),
        (b"[", "not_json"),
        (b"[\xff]", "not_utf8"),
        (b"\xef\xbb\xbf" + array(vote()), "not_json"),
        (array(vote(x="x" * MAX_BODY_BYTES)), "too_large"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",  # each worker has other votes
)
def test_what_breaks_a_rule_of_the_whole_is_refused_whole(body: bytes, reason: str) -> None:
    """None of its votes counts."""
    assert outcomes(body) == ["refused", reason]


def test_an_array_with_a_content_encoding_is_refused_whole() -> None:
    """As a vote is."""
    assert outcomes(array(vote()), None, "gzip") == ["refused", "content_encoding"]


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (b"7", "not_an_object"),
        (b'"],["', "not_an_object"),
        (b"null", "not_an_object"),
        (b"{}", "missing_vote_id"),
        (json.dumps(vote())[:-1].encode() + b', "choice": "non"}', "duplicate_key"),
        (json.dumps(vote())[:-1].encode() + b', "x": {"a": 1, "\\u0061": 2}}', "duplicate_key"),
        (json.dumps(vote() | {"x": [0] * MAX_PARTS}).encode(), "too_many_members"),
        (json.dumps(vote() | {str(n): 0 for n in range(MAX_PARTS)}).encode(), "too_many_members"),
        (b'{"x":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "too_deep"),
        (b'{"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}", "too_deep"),
        (b'{"x":' + b'{"y":' * 4_000 + b"1" + b"}" * 4_000 + b"}", "too_deep"),
        (b'{"x":[' + b"[]," * 8_000 + b"nonsense]}", "too_many_members"),
        (b'{"x":["' + b'\\"[{' * 5_000 + b'"]}', "missing_vote_id"),
        (json.dumps(vote(choice="OUI")).encode(), "bad_choice"),
        (json.dumps({"law_id": "a", "choice": "oui"}).encode(), "missing_vote_id"),
        (json.dumps(vote(timestamp="2999-01-01T00:00:00Z")).encode(), "future_timestamp"),
        ('{"vote_id": "é\\u00e9", "x": "€"}'.encode(), "bad_vote_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",  # each worker has other votes
)
@pytest.mark.parametrize("accent", [b"", '{"x":"é€\U0001f600"}'.encode()])
def test_an_unreadable_vote_costs_no_other(element: bytes, reason: str, accent: bytes) -> None:
    """It is kept with its own bytes and its place."""
    elements = [element for element in [accent, json.dumps(vote()).encode(), element, element, b"{ }"] if element]
    body = array(*elements, separator=b" , ") + b"\n"
    first = len(elements) - 3
    read = read_message(body, A_UUID, "utf-8", 3)
    expected = ["missing_vote_id"] * (first - 1) + ["vote", reason, reason, "missing_vote_id"]
    assert outcomes(body, A_UUID) == expected
    for place, kept in enumerate(elements, start=1):
        message = read[place - 1]
        if isinstance(message, Rejection):
            assert (message.body, message.message_id, message.place, message.delivery_tag) == (kept, None, place, 3)
            assert message.detail == f"vote {place} of an array: {REASONS[message.reason]}"
            assert message.body_sha256 == hashlib.sha256(kept).digest()


def test_message_id_is_no_identity_in_an_array() -> None:
    """Not even of its only vote."""
    element = {"law_id": "law-001", "choice": "oui"}
    assert isinstance(read_message(json.dumps(element).encode(), A_UUID)[0], Vote)
    assert outcomes(array(element), A_UUID) == ["missing_vote_id"]


def test_a_vote_that_the_database_refuses_is_kept_by_its_own_text() -> None:
    """Also where what stands before it has more bytes than characters."""
    second = json.dumps(vote()).encode()
    read = read_message(array(vote(x="é€"), second, separator=b" ,\n"), "the array's", None, 5)
    assert isinstance(read[1], Vote)
    rejected = read[1].rejected("outside_window", "why")
    assert rejected == Rejection(second, "outside_window", "vote 2 of an array: why", None, 5, "law-001", 2)


def test_an_array_that_was_cut_is_kept_as_one_that_is_too_large() -> None:
    """By the hash of the whole."""
    whole_body = array(*[vote() for _ in range(900)])
    cut = CutBody.of(whole_body[: MAX_BODY_BYTES + 1], hashlib.sha256(whole_body).digest(), len(whole_body))
    (read,) = read_message(cut)
    assert isinstance(read, Rejection)
    assert (read.reason, read.place, read.body_sha256) == ("too_large", 0, hashlib.sha256(whole_body).digest())


def test_all_of_one_delivery_are_taken_together() -> None:
    """More than asked for, where it takes that."""
    deliveries = [(1, 1), (2, 3), (3, 1), (4, 2)]
    messages = [
        message for tag, votes in deliveries for message in read_message(array(*[vote()] * votes), None, None, tag)
    ]
    assert [whole(messages, number) for number in range(1, 8)] == [1, 4, 4, 4, 5, 7, 7]


def test_a_batch_counts_votes() -> None:
    """Whatever number of messages they came in."""
    batch = VoteBatch(size=3, timeout=1.0)
    batch.extend(read_message(array(vote(), b"7")), 1, now=0.0)
    assert (batch.room, batch.is_ready(0.0)) == (1, False)
    batch.extend(read_message(array(vote(), vote(), vote())), 1, now=0.0)
    assert (len(batch), batch.is_ready(0.0)) == (5, True)


def test_batches_are_strangers_unless_a_vote_or_a_voter_is_in_two() -> None:
    """A voter of two laws is two."""
    seed = random.randrange(10**9)
    print("seed", seed)
    chance = random.Random(seed)

    def read(*law: str, **changes: Any) -> Vote:
        return Vote.from_message(json.dumps(vote(*law, **changes)).encode())

    def batch(*votes: Vote) -> VoteBatch:
        made = VoteBatch(10, 1.0)
        made.extend(votes, 1, now=0.0)
        return made

    hashes = [f"{chance.getrandbits(64):016x}" for _ in range(3)]
    votes = [read(), read(voter_hash=hashes[0]), read()]
    one = batch(*votes)
    assert are_strangers(one, batch())
    assert are_strangers(one, batch(read(), read(voter_hash=hashes[1]), read("law-002", voter_hash=hashes[0])))
    assert not are_strangers(one, batch(read(), read(vote_id=votes[2].vote_id, choice="non")))
    assert not are_strangers(one, batch(read(), read(voter_hash=hashes[0])))
