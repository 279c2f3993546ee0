"""What the test publisher makes, and how it reckons the totals that must come out."""

from __future__ import annotations

import pytest

import test_publisher
from test_publisher import CONFIRMED, DUPLICATE, INVALID, NACKED, SPOILERS, UNKNOWN, VOTE, Message, Result, in_arrays
from test_publisher import make_messages as make
from votes import MAX_BODY_BYTES, REASONS, Rejection, Vote, read_message


def read_each(message: Message) -> list[Vote | Rejection]:
    """Read a message as the service does."""
    return read_message(message.body, message.message_id, message.content_encoding)


def read(message: Message) -> Vote:
    """Read a message that is a vote by itself."""
    (vote,) = read_each(message)
    assert isinstance(vote, Vote)
    return vote


def refused(message: Message) -> Rejection:
    """Read a message of which nothing may count."""
    (rejection,) = read_each(message)
    assert isinstance(rejection, Rejection)
    assert (rejection.place, rejection.body) == (0, message.body)
    return rejection


def without_body(messages: list[Message]) -> list[Message]:
    """Leave out the timestamps, and what is hashed with them."""
    return [message._replace(body=b"", id="" if message.kind == INVALID else message.id) for message in messages]


def result(*outcomes: tuple[Message, str]) -> Result:
    """A result with these messages in these states."""
    return Result([message for message, _ in outcomes], [state for _, state in outcomes], finished=True)


def test_the_same_seed_makes_the_same_messages() -> None:
    """All but the timestamps follows from the seed."""
    first, second = (list(make(200, seed=7, duplicates=20, invalid=20)) for _ in range(2))

    assert without_body(first) == without_body(second)


def test_another_seed_makes_other_votes() -> None:
    """Two random runs never share a vote_id."""
    first, second = ({message.id for message in make(200, seed=seed)} for seed in (1, 2))

    assert not first & second


def test_copies_and_invalid_messages_come_on_top_of_the_votes() -> None:
    """-n counts distinct votes; the percentages are of that."""
    kinds = [message.kind for message in make(200, seed=1, duplicates=20, invalid=5)]

    assert [kinds.count(kind) for kind in (VOTE, DUPLICATE, INVALID)] == [200, 40, 10]
    assert len(kinds) == test_publisher.message_count(200, 20, 5)


@pytest.mark.parametrize("seed", range(20))
def test_a_copy_is_the_body_of_an_earlier_vote(seed: int) -> None:
    """Also where the shuffle would put a copy first."""
    bodies = set()
    for message in make(3, seed=seed, duplicates=500):
        assert message.kind == VOTE or message.body in bodies
        bodies.add(message.body)


def test_no_votes_make_no_copies() -> None:
    """There is nothing to copy."""
    assert list(make(0, duplicates=100, invalid=100)) == []


def test_every_vote_is_readable_and_is_for_one_of_the_laws() -> None:
    """The service counts what the publisher expects it to count."""
    messages = list(make(300, laws=4, seed=3))

    assert [read(message)[:3] for message in messages] == [(m.id, m.law_id, m.choice) for m in messages]
    assert {message.law_id for message in messages} == {"law-001", "law-002", "law-003", "law-004"}


def test_some_votes_have_a_voter_and_no_voter_votes_twice() -> None:
    """A second vote of one voter would not count."""
    voters = [voter for message in make(300, seed=3) if (voter := read(message).voter_hash)]

    assert 50 < len(voters) < 250
    assert len(set(voters)) == len(voters)


@pytest.mark.parametrize(("number", "name"), list(enumerate(SPOILERS)))
def test_every_invalid_message_is_unreadable(number: int, name: str) -> None:
    """Whatever spoils it, the service must not be able to count it."""
    spoiled = [message for message in make(len(SPOILERS), seed=5, invalid=100) if message.kind == INVALID]

    refused(spoiled[number])


def test_invalid_messages_break_every_rule_and_no_two_are_equal() -> None:
    """Each is kept under the hash of its body, so equal ones would pass for one."""
    spoiled = [message for message in make(500, seed=5, invalid=100) if message.kind == INVALID]

    assert {refused(message).reason for message in spoiled} == set(REASONS)
    assert len({message.id for message in spoiled}) == len(spoiled)


def test_a_vote_and_its_copy_are_expected_once() -> None:
    """Whichever of the two was confirmed."""
    vote, other = make(2, laws=1, seed=1)
    copy = vote._replace(kind=DUPLICATE)

    for states in ((CONFIRMED, CONFIRMED), (CONFIRMED, NACKED), (UNKNOWN, CONFIRMED)):
        published = result((vote, states[0]), (copy, states[1]), (other, UNKNOWN))
        assert published.totals() == {"law-001": (1, 0) if vote.choice == "oui" else (0, 1)}
        assert published.summary()["votes"] == 1
        assert published.summary()["duplicates"] == states.count(CONFIRMED) - 1


def test_invalid_and_unconfirmed_messages_are_never_expected() -> None:
    """The totals follow from what is surely on the queue."""
    messages = list(make(10, seed=1, invalid=100))
    published = result(*((m, CONFIRMED if m.kind == INVALID else UNKNOWN) for m in messages))

    assert published.totals() == {}
    assert published.summary()["invalid"] == 10
    assert published.summary()["unconfirmed"] == 10
    assert not published.all_confirmed


def mixed(seed: int, size: int, votes: int = 300) -> list[Message]:
    """Arrays of votes with copies and invalid ones."""
    return list(in_arrays(make(votes, seed=seed, duplicates=40, invalid=40), size))


@pytest.mark.parametrize("size", [2, 7, 50, 500])
def test_arrays_hold_what_is_made_and_the_service_reads_it_so(size: int) -> None:
    """Each part once, in its place, as a vote or with its own text as the evidence; none is too large."""
    made = list(make(300, seed=size, duplicates=40, invalid=40))
    packed = mixed(size, size)
    assert sorted(part.kind for message in packed for part in message.parts) == sorted(one.kind for one in made)
    for message in packed:
        if not message.array:
            assert refused(message) if message.kind == INVALID else read(message).vote_id == message.id
            continue
        assert len(message.array) <= size
        assert len(message.body) <= MAX_BODY_BYTES
        for place, (part, judged) in enumerate(zip(message.array, read_each(message), strict=True), 1):
            assert judged.place == place
            if part.kind == INVALID:
                assert isinstance(judged, Rejection)
                assert (judged.body, judged.body_sha256.hex()) == (part.body, part.id)
            else:
                assert isinstance(judged, Vote)
                assert judged[:3] == (part.id, part.law_id, part.choice)


def test_copies_and_invalid_ones_come_in_arrays_and_by_themselves() -> None:
    """A copy in the array of its vote, in a later one, and alone; alone is what spoils an array, and what is one."""
    packed = mixed(3, 50, 2_000)
    alone = {message.kind for message in packed if not message.array}
    assert alone == {DUPLICATE, INVALID}
    arrays = [message for message in packed if message.array]
    assert {part.kind for message in arrays for part in message.array} == {VOTE, DUPLICATE, INVALID}
    repeated = [len({part.id for part in message.array}) < len(message.array) for message in arrays]
    assert any(repeated)
    seen: set[str] = set()
    is_across = False
    for message in arrays:
        ids = {part.id for part in message.array}
        is_across |= bool(ids & seen)
        seen |= ids
    assert is_across
    inside = {each.reason for message in arrays for each in read_each(message) if isinstance(each, Rejection)}
    whole = {refused(message).reason for message in packed if not message.array and message.kind == INVALID}
    of_the_whole = {"content_encoding", "too_large", "not_utf8", "not_json"}
    assert inside == REASONS.keys() - of_the_whole - {"empty_array", "nested_array", "too_many_votes"}
    assert whole >= of_the_whole | {"empty_array", "nested_array", "too_many_votes"}


def test_arrays_are_full_at_64_kib() -> None:
    """Of votes as they are made 500 do not fit."""
    packed = list(in_arrays(make(2_000, seed=1), 500))
    assert 4 < len(packed) < 12
    assert all(MAX_BODY_BYTES - 300 < len(message.body) <= MAX_BODY_BYTES for message in packed[:-1])


def test_arrays_of_one_are_the_messages_themselves() -> None:
    """As without --box."""
    made = list(make(50, seed=1, duplicates=20, invalid=20))
    assert list(in_arrays(made, 1)) == made


def test_an_array_is_reckoned_by_its_votes() -> None:
    """Each copy and each invalid one too, in the state of the array."""
    made = list(make(100, laws=1, seed=4, duplicates=10, invalid=10))
    packed = list(in_arrays(made, 20))
    everything = result(*((message, CONFIRMED) for message in packed))
    summary, expected = everything.summary(), result(*((message, CONFIRMED) for message in made)).summary()
    assert summary.pop("messages") == len(packed) < 30
    assert expected.pop("messages") == 120
    assert summary == expected
    lost = next(message for message in packed if message.array)
    published = result(*((message, UNKNOWN if message is lost else CONFIRMED) for message in packed))
    assert published.summary()["unknown"] == published.summary()["unconfirmed"] == len(lost.array)
    assert published.votes().keys() | {part.id for part in lost.array} >= everything.votes().keys()
    assert len(published.votes()) < 100


def test_the_summary_for_people_says_what_is_votes_and_what_is_messages() -> None:
    """A message for each of them is said as ever."""
    messages = list(make(40, seed=1))
    for packed, unit in ((messages, "messages"), (list(in_arrays(messages, 20)), "votes in 2 messages")):
        published = result(*((message, CONFIRMED) for message in packed))
        text = test_publisher.as_text({"seed": 1, "queue": "q", "requested": 40, **published.summary()})
        assert text.startswith(f"published    40 of 40 {unit} to q (seed 1)\nconfirmed    40 in ")


def test_the_summary_for_people_stays_short_with_many_laws() -> None:
    """A thousand laws are for --json."""
    published = result(*((message, CONFIRMED) for message in make(500, laws=100, seed=1)))
    laws = len(published.totals())
    text = test_publisher.as_text({"seed": 1, "queue": "q", "requested": 500, **published.summary()}, most_laws=5)

    assert text.count("law-") == 5
    assert f"and {laws - 5} more laws" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nope"],
        ["-n", "x"],
        ["-n", "-1"],
        ["--laws", "0"],
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--invalid", "-1"],
        ["--box", "0"],
        ["--box", "501"],
        ["--box", "x"],
        ["--box", "2.5"],
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, with the option named."""
    with pytest.raises(SystemExit) as raised:
        test_publisher.main(arguments)

    assert raised.value.code == 2
    assert arguments[0] in capsys.readouterr().err
