"""The reader of messages under fuzz. FUZZ_BODIES=1000000 tries a million."""

from __future__ import annotations

import json
import os
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import vote
from votes import REASONS, UnreadableVote, Vote

BODIES = int(os.environ.get("FUZZ_BODIES", "100000"))
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


def test_the_fuzz_has_tried_as_many_bodies_as_it_says() -> None:
    """And some of them were votes, else it would only try the first rule."""
    if not read["bodies"]:  # the other test was not selected
        test_no_body_raises_anything_but_unreadable_vote()
    assert read["bodies"] >= BODIES
    assert read["votes"] > BODIES / 1_000
