"""docs/vote.schema.json says of votes and arrays what the service says, but for rules that a schema cannot state."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from datetime import date, datetime
from itertools import chain
from typing import Any

import jsonschema
import pytest
from check_jsonschema.regex_variants import RegexImplementation, RegexVariantName
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import ROOT
from tests.messages import bad_messages, odd_votes
from tests.unit.verdict_table import bodies
from votes import MAX_DEPTH, MAX_PARTS, MAX_SECONDS_AHEAD, MAX_VOTES, REASONS, Rejection, read_message

SCHEMA = json.loads((ROOT / "docs/vote.schema.json").read_text(encoding="utf-8"))

# What is not of the JSON value, but of how it is written and sent.
NOT_OF_THE_VALUE = {"content_encoding", "too_large", "not_utf8", "not_json", "duplicate_key"}


def layers(value: Any) -> Iterator[list[Any]]:
    """The objects and lists of each depth. In a loop: from Python 3.13 on json reads deeper than calls may go."""
    layer = [value]
    while layer := [one for one in layer if isinstance(one, dict | list)]:
        yield layer
        layer = [inner for one in layer for inner in (one.values() if isinstance(one, dict) else one)]


def depth(value: Any) -> int:
    return sum(1 for _ in layers(value))


def parts(value: Any) -> int:
    return sum(max(len(one), 1) for layer in layers(value) for one in layer)


def is_no_day_or_before_1970(value: Any) -> bool:
    text = value["timestamp"]
    try:
        date(int(text[:4]), int(text[5:7]), int(text[8:10]))
    except ValueError:
        return True
    return datetime.fromisoformat(text).timestamp() < 0


def is_ahead(value: Any) -> bool:
    moment = value["timestamp"]
    seconds = datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else moment
    return bool(seconds > time.time() + MAX_SECONDS_AHEAD)


# What a schema cannot say of a value, by the reason code: whether that is so.
BEYOND_A_SCHEMA: dict[str, Callable[[Any], bool]] = {
    "too_deep": lambda value: depth(value) > MAX_DEPTH,
    "too_many_members": lambda value: parts(value) > MAX_PARTS,
    "bad_timestamp": is_no_day_or_before_1970,
    "future_timestamp": is_ahead,
}


def with_engine(variant: RegexVariantName, schema: Any = SCHEMA) -> Any:
    """A validator that reads patterns as check-jsonschema does with this --regex-variant."""
    pattern = {"pattern": RegexImplementation(variant).pattern_keyword}
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, pattern)(schema)


PYTHON, *OTHERS = (
    with_engine(variant) for variant in (RegexVariantName.python, RegexVariantName.default, RegexVariantName.nonunicode)
)


def accepts(value: Any) -> bool:
    """What the schema says, which each engine must say alike; the one of JavaScript takes no lone surrogates."""
    verdict = bool(PYTHON.is_valid(value))
    if not has_surrogates(value):
        assert [engine.is_valid(value) for engine in OTHERS] == [verdict] * len(OTHERS)
    return verdict


def has_surrogates(value: Any) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False))


def reasons_of(body: bytes) -> list[str | None]:
    """What the service says of a message without properties, or of each vote of an array: None of a vote."""
    return [each.reason if isinstance(each, Rejection) else None for each in read_message(body)]


def check_agreement(value: Any, body: bytes) -> None:
    """Of whatever the schema refuses something is refused, and what it accepts is accepted but for rules beyond a
    schema.
    """
    reasons = reasons_of(body)
    if not accepts(value):
        assert any(reasons)
        return
    for each, reason in zip(value if isinstance(value, list) else [value], reasons, strict=True):
        if reason is not None:
            assert reason in BEYOND_A_SCHEMA, reason
            assert BEYOND_A_SCHEMA[reason](each), reason


VALID = {
    "vote_id": [
        "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59",
        "00000000-0000-0000-0000-000000000000",
        "ABCDEFab" + "-0aF9" * 3 + "-" + "0aF9" * 3,
    ],
    "law_id": ["law-001", "0", "A" + "._:-" * 15 + "zZ9"],
    "choice": ["oui", "non"],
    "timestamp": [
        *(None, 0, 1748800800.25, "2025-06-01T20:00:00Z", "2025-06-01 20:00:00.123456789+02"),
        *("2024-02-29T23:59:59,5-2359", "1970-01-01T00:00+00:01", "1969-12-31T23:59-00:01", "9999-12-31T23:59:59Z"),
    ],
    "voter_hash": [None, "a" * 16, "A9_+/=-z" * 16],
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[]))  # with lone surrogates
    | st.sampled_from(["", "oui", "OUI", "non\n", "1970-01-01T00:00:00Z", "a" * 16])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
CHARACTERS = st.sampled_from(["", *"\n\r\x00 -_.:+=/@[`{aAzZfFgG09TtZz,\u0131\u212a\u0660\uff11\u2028\ud800\U0001f600"])


def spoiled(value: Any, place: int, left_out: int, put_in: str, times: int) -> Any:
    """The value with a character put in, replaced or left out; -1 is the end of it."""
    if not isinstance(value, str):
        return -1 if value is None else -value
    place = len(value) if place < 0 else place % (len(value) + 1)
    return (value[:place] + put_in + value[place + left_out :]) * times


PLACES = st.integers(-1, 40)
TIMES = st.sampled_from([1, 1, 1, 10])
ABSENT = "absent"
CHANGES = {
    field: st.builds(spoiled, st.sampled_from(valid), PLACES, st.integers(0, 1), CHARACTERS, TIMES)
    | st.builds(spoiled, st.sampled_from(valid), st.just(-1), st.just(0), st.just("\n"), st.just(1))
    | st.sampled_from([ABSENT, *chain(*VALID.values())])
    | VALUES
    for field, valid in VALID.items()
}
HEAVY = st.integers(50, 110).map(lambda size: [0] * size) | st.integers(55, 75).map(
    lambda levels: json.loads("[" * levels + "]" * levels)
)
MESSAGES = st.builds(
    lambda vote, left_out, *changes: {
        name: value for name, value in chain(vote.items(), *changes) if name != left_out and value != ABSENT
    },
    st.fixed_dictionaries({field: st.sampled_from(valid) for field, valid in VALID.items()}),
    st.sampled_from(["", "", "vote_id", *VALID]),
    st.one_of(*(st.tuples(st.tuples(st.just(field), change)) for field, change in CHANGES.items())),
    st.just(()) | st.tuples(st.tuples(st.text(), VALUES | HEAVY)),
)


@settings(max_examples=500)
@given(MESSAGES, st.booleans())
def test_schema_and_service_agree_on_votes_and_near_misses(value: Any, escaped: bool) -> None:
    """However the value is written."""
    text = json.dumps(value, ensure_ascii=escaped or has_surrogates(value))
    check_agreement(value, text.encode())


@settings(max_examples=200)
@given(st.lists(MESSAGES | MESSAGES | VALUES, max_size=4), st.booleans())
def test_schema_and_service_agree_on_arrays(values: list[Any], escaped: bool) -> None:
    """However they are written, and whatever stands among the votes."""
    text = json.dumps(values, ensure_ascii=escaped or has_surrogates(values))
    check_agreement(values, text.encode())


@pytest.mark.parametrize("number", [0, 1, MAX_VOTES - 1, MAX_VOTES, MAX_VOTES + 1])
def test_schema_and_service_agree_on_the_length_of_arrays(number: int) -> None:
    """From 1 on to 500."""
    votes = [{"law_id": "a", "choice": "oui", "voter_hash": "a" * 16}] * number
    check_agreement(votes, json.dumps(votes).encode())
    assert accepts(votes) == (0 < number <= MAX_VOTES)


@given(VALUES)
def test_schema_and_service_agree_on_any_json(value: Any) -> None:
    """Also where it is no object."""
    check_agreement(value, json.dumps(value).encode())


def known_bodies() -> Iterator[tuple[Any, bytes]]:
    """Each body of the service's own tests that json.loads can read, with its value."""
    without_properties = [case.body for case in [*bad_messages(), *odd_votes()] if not case.properties]
    for body in [*without_properties, *(body for _, body in bodies())]:
        try:
            yield json.loads(body), body
        except (ValueError, RecursionError):
            continue


def test_schema_and_service_agree_on_all_known_bodies() -> None:
    """But for what is not of the value, which json.loads does not mind."""
    known = [(value, body) for value, body in known_bodies() if NOT_OF_THE_VALUE.isdisjoint(reasons_of(body))]
    assert len(known) > 200
    for value, body in known:
        check_agreement(value, body)


def test_each_other_reason_is_one_that_the_schema_has() -> None:
    """No rule is left out of the schema that it could state; bad_timestamp is among both."""
    refused = {reason for value, body in known_bodies() if not accepts(value) for reason in reasons_of(body)}
    assert refused >= REASONS.keys() - NOT_OF_THE_VALUE - BEYOND_A_SCHEMA.keys() | {"bad_timestamp"}


VOTE = {
    "vote_id": "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59",
    "law_id": "law-001",
    "choice": "oui",
    "timestamp": "2025-06-01T20:00:00Z",
    "voter_hash": "a" * 16,
}


@pytest.mark.parametrize("ending", ["\n", "\r", "\r\n", "\u2028", "\u0085", "\x00", " ", "\nx"])
@pytest.mark.parametrize("field", VOTE)
def test_nothing_may_follow_a_value(field: str, ending: str) -> None:
    """In many engines $ also matches before a line feed at the end."""
    assert accepts(VOTE)
    assert not accepts(VOTE | {field: VOTE[field] + ending})


def places(part: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to each rule of the schema, and to each that a rule is made of."""
    for key, inner in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key not in ("$schema", "$id", "title", "description", "examples"):
            yield (*path, key)
            yield from places(inner, *path, key)


# What is no text has no such pattern, so these follow from "not"; they stand for the reader.
A_VOTE = ("$defs", "vote")
FOR_THE_READER = {
    (*A_VOTE, "properties", "law_id", "type"),
    (*A_VOTE, "properties", "timestamp", "anyOf", 2, "type"),
}
RULES = [
    path for path in places(SCHEMA) if isinstance(path[-1], str) and path not in FOR_THE_READER | {A_VOTE, A_VOTE[:1]}
]


@pytest.mark.parametrize("path", RULES, ids=str)
def test_each_rule_of_the_schema_is_needed(path: tuple[Any, ...]) -> None:
    """Without it, a body is known of which schema and service disagree."""
    changed = copy.deepcopy(SCHEMA)
    part = changed
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    validator = with_engine(RegexVariantName.python, changed)
    spoiled = [[VOTE] * (MAX_VOTES + 1), *(VOTE | {field: VOTE[field] + "\n"} for field in VOTE)]
    known = chain(spoiled, (value for value, body in known_bodies() if NOT_OF_THE_VALUE.isdisjoint(reasons_of(body))))
    assert any(validator.is_valid(value) != PYTHON.is_valid(value) for value in known)


def test_the_examples_are_votes() -> None:
    """By the schema and by the service."""
    assert len(SCHEMA["examples"]) == 4
    for example in SCHEMA["examples"]:
        assert accepts(example)
        assert not any(reasons_of(json.dumps(example).encode()))


def test_the_document_names_what_a_schema_cannot_say() -> None:
    """Each by its reason code."""
    text = (ROOT / "docs/MESSAGE_FORMAT.md").read_text(encoding="utf-8")
    section = text.partition("## A schema of the message\n")[2].partition("\n## ")[0]
    for reason in BEYOND_A_SCHEMA.keys() | NOT_OF_THE_VALUE:
        assert f"`{reason}`" in section
