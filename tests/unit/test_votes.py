"""The message contract and the batch."""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import vote
from tests.messages import Case, bad_messages, odd_votes
from tests.unit.verdict_table import table
from votes import REASONS, VOTER_NAMESPACE, Rejection, UnreadableVote, Vote, VoteBatch, counts, read_message

LAW_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", fullmatch=True)
VOTER_HASHES = st.from_regex(r"[A-Za-z0-9_+/=-]{16,128}", fullmatch=True)


def read(case: Case) -> Vote | Rejection:
    """What such a message, or its only vote, is."""
    properties = case.properties.get("message_id"), case.properties.get("content_encoding")
    (only,) = read_message(case.body, *properties)
    return only


@pytest.mark.parametrize("case", bad_messages(), ids=lambda case: case.name)
def test_an_unreadable_message_has_a_reason(case: Case) -> None:
    """The code of the first rule that it breaks."""
    rejection = read(case)
    assert isinstance(rejection, Rejection)
    assert rejection.reason == case.reason
    assert case.reason in REASONS


@pytest.mark.parametrize("case", odd_votes(), ids=lambda case: case.name)
def test_an_odd_vote_is_a_vote(case: Case) -> None:
    """What the contract does not forbid counts."""
    odd = read(case)
    assert isinstance(odd, Vote)
    assert odd.choice == "oui"


def test_the_verdict_on_every_body_is_the_recorded_one() -> None:
    """Whatever the interpreter: replicas of two versions must not disagree about a vote."""
    recorded = Path(__file__).with_name("verdicts.tsv").read_text(encoding="utf-8").splitlines()
    assert list(table()) == recorded
    assert len(recorded) == len({line.split("\t")[0] for line in recorded}) > 500


def test_a_vote_is_read_whole() -> None:
    """All five fields, and what came with the delivery."""
    fields = vote("law-7", "non", timestamp="2026-01-01T01:00:00.25+01:00", voter_hash="h" * 16)
    body = json.dumps(fields).encode()
    read_vote = Vote.from_message(body, None, None, 7, True)
    moment = datetime(2026, 1, 1, 0, 0, 0, 250_000, UTC)
    assert read_vote == Vote(fields["vote_id"], "law-7", "non", moment, "h" * 16, body, None, 7, True)


def test_message_id_stands_in_for_a_missing_vote_id() -> None:
    """The identity may be in the properties alone."""
    fields = vote()
    identity = fields.pop("vote_id")
    assert Vote.from_message(json.dumps(fields).encode(), identity).vote_id == identity


def without_vote_id(**fields: object) -> bytes:
    return json.dumps({name: value for name, value in vote(**fields).items() if name != "vote_id"}).encode()


def test_a_vote_without_vote_id_is_named_by_its_voter() -> None:
    """By a version 5 UUID of law, line feed and voter: the example of docs/MESSAGE_FORMAT.md."""
    body = without_vote_id(law_id="law-001", voter_hash="c2FsdGVkLWhhc2gtMDE=")
    assert Vote.from_message(body).vote_id == "e0c3ab46-cce8-50aa-8c4f-a7c69d72992f"
    name = b"law-001\nc2FsdGVkLWhhc2gtMDE="
    digest = bytearray(hashlib.sha1(VOTER_NAMESPACE.bytes + name, usedforsecurity=False).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x50, digest[8] & 0x3F | 0x80  # RFC 9562, 5.5
    assert Vote.from_message(body).vote_id == str(uuid.UUID(bytes=bytes(digest)))
    assert str(uuid.uuid5(uuid.NAMESPACE_URL, "urn:vote-aggregator:voter")) == str(VOTER_NAMESPACE)


def test_the_voter_comes_before_the_message_id() -> None:
    """A client that invents a message_id at each sending would else count twice."""
    body = without_vote_id(law_id="law-001", voter_hash="c2FsdGVkLWhhc2gtMDE=")
    ids = {Vote.from_message(body, message_id).vote_id for message_id in (None, "", "ID:7", vote()["vote_id"])}
    assert len(ids) == 1


@given(st.tuples(LAW_IDS, VOTER_HASHES), st.tuples(LAW_IDS, VOTER_HASHES))
def test_two_voters_never_share_an_identity(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Nor one voter on two laws; the choice is no part of it."""
    first, second = (
        Vote.from_message(without_vote_id(law_id=law, voter_hash=voter, choice=choice)).vote_id
        for (law, voter), choice in ((one, "oui"), (other, "non"))
    )
    assert (first == second) == (one == other)


def test_two_voters_whose_law_and_hash_run_together_do_not_share_an_identity() -> None:
    """The line feed between them is what neither can contain."""
    pairs = [("law-1", "2" * 17), ("law-12", "2" * 16)]
    bodies = [without_vote_id(law_id=law_id, voter_hash=voter) for law_id, voter in pairs]
    assert len({Vote.from_message(body).vote_id for body in bodies}) == 2


@pytest.mark.parametrize("where", ["vote_id", "message_id"])
def test_one_identity_has_one_spelling(where: str) -> None:
    """Upper case, lower case and both: the same vote."""
    spellings = ["3F2B8C1E-5D4A-4F6B-9A7C-0E1D2C3B4A59", "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59"]
    spellings.append(spellings[0][:18] + spellings[1][18:])
    if where == "vote_id":
        read_votes = [Vote.from_message(json.dumps(vote(vote_id=spelling)).encode()) for spelling in spellings]
    else:
        read_votes = [Vote.from_message(without_vote_id(), spelling) for spelling in spellings]
    assert {each.vote_id for each in read_votes} == {spellings[1]}


def test_a_voter_hash_is_opaque() -> None:
    """Its case is kept: in base64 it matters."""
    hashes = ["ABCDEF0123456789", "abcdef0123456789"]
    assert [Vote.from_message(json.dumps(vote(voter_hash=each)).encode()).voter_hash for each in hashes] == hashes


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_unreadable_vote(body: bytes) -> None:
    """Whatever comes, there is a vote or a reason."""
    try:
        Vote.from_message(body)
    except UnreadableVote as exc:
        assert exc.reason in REASONS


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from(["vote_id", "law_id", "choice", "timestamp", "voter_hash", "x"]), json_values))
def test_no_object_raises_anything_but_unreadable_vote(changes: dict[str, object]) -> None:
    """Any value in any field."""
    try:
        Vote.from_message(json.dumps(vote() | changes).encode())
    except UnreadableVote as exc:
        assert exc.reason in REASONS


@given(st.datetimes(datetime(1970, 1, 2), datetime(2026, 1, 1)), st.integers(-23 * 60, 23 * 60))
def test_a_timestamp_means_the_same_moment_in_every_spelling(moment: datetime, offset: int) -> None:
    """ISO 8601 in any offset, and Unix seconds."""
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=offset)))
    iso = Vote.from_message(json.dumps(vote(timestamp=aware.isoformat())).encode()).voted_at
    unix = Vote.from_message(json.dumps(vote(timestamp=aware.timestamp())).encode()).voted_at
    assert iso is not None and unix is not None
    assert abs(iso - aware) <= timedelta(microseconds=1)
    assert abs(unix - aware) <= timedelta(microseconds=1)


def a_vote(law_id: str = "law-001", choice: str = "oui") -> Vote:
    return Vote.from_message(json.dumps(vote(law_id, choice)).encode())


def test_a_batch_is_ready_when_it_is_full() -> None:
    """And not one message earlier."""
    batch = VoteBatch(size=3, timeout=1.0)
    for number in range(3):
        assert not batch.is_ready(now=0.0), number
        batch.extend([a_vote()], 1, now=0.0)
    assert batch.is_ready(now=0.0)


def test_a_batch_says_how_many_more_it_takes() -> None:
    """So that a burst is cut where the batch fills."""
    batch = VoteBatch(size=3, timeout=1.0)
    assert batch.room == 3
    batch.extend([a_vote()], 1, now=0.0)
    batch.extend([Rejection(b"", "not_json", "", None, 1)], 1, now=0.0)
    assert batch.room == 1


def test_unreadable_messages_fill_a_batch_too() -> None:
    """They hold a place of the prefetch, so a batch that waited for votes alone would never fill."""
    batch = VoteBatch(size=2, timeout=1.0)
    batch.extend([Rejection(b"", "not_json", "", None, 1)], 1, now=0.0)
    batch.extend([a_vote()], 1, now=0.0)
    assert batch.is_ready(now=0.0)


def test_a_batch_is_ready_one_second_after_its_first_vote() -> None:
    """However late the others came."""
    batch = VoteBatch(size=100, timeout=1.0)
    batch.extend([a_vote()], 1, now=10.0)
    batch.extend([a_vote()], 1, now=10.9)
    assert not batch.is_ready(now=10.99)
    assert batch.is_ready(now=11.0)
    assert batch.seconds_left(now=10.25) == 0.75


def test_an_empty_batch_is_never_ready() -> None:
    """Its clock has not started."""
    batch = VoteBatch(size=1, timeout=1.0)
    assert batch.is_empty
    assert not batch.is_ready(now=1e9)


def test_votes_are_counted_per_law_in_the_order_of_the_laws() -> None:
    """Rows are locked in that order by every replica."""
    votes = [a_vote("b", "oui"), a_vote("a", "non"), a_vote("b", "non"), a_vote("b", "oui")]
    assert list(counts(votes).items()) == [("a", (0, 1)), ("b", (2, 1))]
