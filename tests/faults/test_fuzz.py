"""The reader of messages under fuzz. FUZZ_BODIES=1000000 tries a million."""

from __future__ import annotations

import json
import os
import random
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import votes
from tests.harness import vote
from votes import REASONS, Rejection, UnreadableVote, Vote, read_message

BODIES = int(os.environ.get("FUZZ_BODIES", "100000"))
ARRAYS = BODIES // 10
BODIES_PER_EXAMPLE = 50

values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["oui", "non", "NaN"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["vote_id", "law_id", "choice", "timestamp", "voter_hash", "other"])
SPICE = [
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b",",
    b":",
    b"NaN",
    b"1e999",
    b"\xff",
    b"\xed\xa0\x80",
    b"\x00",
    b"9" * 5000,
]
TEXTS = ["]", "[", "},{", '"', "\\", '\\"', "\u2028", "é,", "\U0001f5f3", "[" * 70, "," * 120]


def mutated(body: bytes, rng: random.Random) -> bytes:
    """``body`` with a few bytes changed, dropped, doubled or spiced."""
    data = bytearray(body)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at:at] = rng.choice(SPICE)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case 3 if at < len(data):
                data[at] = rng.randrange(256)
            case _:
                del data[at:]
    return bytes(data)


read = {"votes": 0, "bodies": 0}


@settings(max_examples=-(-BODIES // BODIES_PER_EXAMPLE), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(fields, values, max_size=4), st.integers(0, 2**32))
def test_no_body_raises_anything_but_unreadable_vote(changes: dict[str, object], seed: int) -> None:
    """Each example is one object with odd values, and fifty mutations of its text."""
    rng = random.Random(seed)
    base = json.dumps(vote() | changes, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(BODIES_PER_EXAMPLE):
        body = mutated(base, rng)
        read["bodies"] += 1
        try:
            found = Vote.from_message(body, rng.choice([None, "", "x\x00"]), rng.choice([None, None, None, "gzip"]))
        except UnreadableVote as exc:
            assert exc.reason in REASONS
        else:
            read["votes"] += 1
            assert found.choice in ("oui", "non")


def array_text(rng: random.Random) -> str:
    """An array of votes and of what is nearly one: odd texts, keys that stand twice, depth, width and white space."""
    elements = []
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        members = [
            f'"{name}":{json.dumps(value)}'
            for name, value in vote(vote_id=str(uuid.UUID(int=rng.getrandbits(128)))).items()
        ]
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            text = json.dumps(rng.choice(TEXTS) + rng.choice(TEXTS), ensure_ascii=rng.random() < 0.5)
            depth, width = rng.choice([1, 62, 63, 64]), rng.choice([1, 95, 96, 97, 98, 99])
            member = rng.choice(
                [
                    '"choice":"oui"',
                    f"{text}:0",
                    f'"note":{text}',
                    f'"note":{"[" * depth}{"]" * depth}',
                    f'"note":[{",".join("0" * width)}]',
                    '"note":{"a":1,"a":2}',
                    '"timestamp":1e999',
                    f'"timestamp":{"9" * rng.choice([15, 16, 5_000])}',
                ]
            )
            members.insert(rng.randrange(len(members) + 1), member)
        elements.append(rng.choice(["{" + ",".join(members) + "}"] * 9 + ["{}", "7", "null", '"],["', "[]"]))
    blank = rng.choice(["", " ", "\r\n\t"])
    return blank + "[" + f"{blank},{blank}".join(elements) + blank + "]" + blank


def with_care(body: bytes, *properties: str | None) -> list[Vote | Rejection]:
    """What is read of it where no array is read in one go, and each element is looked at by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(votes, "MOST_BRACKETS", -1)
        return read_message(body, *properties)


arrays = {"bodies": 0, "votes": 0, "unreadable votes": 0, "unreadable arrays": 0}


@settings(max_examples=-(-ARRAYS // BODIES_PER_EXAMPLE), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_no_array_raises_anything_and_both_ways_to_read_it_agree(seed: int) -> None:
    """Each example is an array and mutations of its text; hypothesis prints the seed of one that fails."""
    rng = random.Random(seed)
    base = array_text(rng).encode()
    for number in range(BODIES_PER_EXAMPLE):
        body = mutated(base, rng) if number else base
        properties = rng.choice([None, "", str(uuid.UUID(int=1))]), rng.choice([None, None, None, "gzip"])
        readings = read_message(body, *properties)
        assert readings == with_care(body, *properties)
        arrays["bodies"] += 1
        if not votes.begins_array(body):
            continue
        at = 0
        for place, reading in enumerate(readings, start=1):
            if isinstance(reading, Vote):
                arrays["votes"] += 1
                assert (reading.place, reading.body) == (place, body)
                continue
            assert reading.reason in REASONS
            if reading.place == 0:
                arrays["unreadable arrays"] += 1
                assert (readings, reading.body) == ([reading], body)
                continue
            arrays["unreadable votes"] += 1
            assert (reading.place, reading.message_id) == (place, None)
            at = body.index(reading.body, at) + len(reading.body)  # its own text, in the order in which they stand


def test_the_fuzz_has_tried_as_many_bodies_as_it_says() -> None:
    """And some of them were votes, else it would only try the first rule."""
    if not read["bodies"]:  # the other test was not selected
        test_no_body_raises_anything_but_unreadable_vote()
    assert read["bodies"] >= BODIES
    assert read["votes"] > BODIES / 1_000
    if not arrays["bodies"]:
        test_no_array_raises_anything_and_both_ways_to_read_it_agree()
    print(arrays)
    assert arrays["bodies"] >= ARRAYS
    assert min(arrays.values()) > ARRAYS / 1_000
