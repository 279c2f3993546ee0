"""The message contract and the batch."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import vote
from tests.messages import Case, bad_messages, odd_votes
from votes import REASONS, Rejection, UnreadableVote, Vote, VoteBatch, counts


def read(case: Case) -> Vote:
    return Vote.from_message(case.body, case.properties.get("message_id"), case.properties.get("content_encoding"))


@pytest.mark.parametrize("case", bad_messages(), ids=lambda case: case.name)
def test_an_unreadable_message_has_a_reason(case: Case) -> None:
    """The code of the first rule that it breaks."""
    with pytest.raises(UnreadableVote) as caught:
        read(case)
    assert caught.value.reason == case.reason
    assert case.reason in REASONS


@pytest.mark.parametrize("case", odd_votes(), ids=lambda case: case.name)
def test_an_odd_vote_is_a_vote(case: Case) -> None:
    """What the contract does not forbid counts."""
    assert read(case).choice == "oui"


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
        batch.add(a_vote(), now=0.0)
    assert batch.is_ready(now=0.0)


def test_a_batch_says_how_many_more_it_takes() -> None:
    """So that a burst is cut where the batch fills."""
    batch = VoteBatch(size=3, timeout=1.0)
    assert batch.room == 3
    batch.add(a_vote(), now=0.0)
    batch.add(Rejection(b"", "not_json", "", None, 1), now=0.0)
    assert batch.room == 1


def test_unreadable_messages_fill_a_batch_too() -> None:
    """They hold a place of the prefetch, so a batch that waited for votes alone would never fill."""
    batch = VoteBatch(size=2, timeout=1.0)
    batch.add(Rejection(b"", "not_json", "", None, 1), now=0.0)
    batch.add(a_vote(), now=0.0)
    assert batch.is_ready(now=0.0)


def test_a_batch_is_ready_one_second_after_its_first_vote() -> None:
    """However late the others came."""
    batch = VoteBatch(size=100, timeout=1.0)
    batch.add(a_vote(), now=10.0)
    batch.add(a_vote(), now=10.9)
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
