"""Messages to try on a reader of votes: every way to be unreadable, and the odd ones that are votes all the same."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, NamedTuple

from tests.harness import vote


class Case(NamedTuple):
    """A message, and the reason code it must be rejected with."""

    name: str
    body: bytes
    reason: str
    properties: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _raw(field: str, literal: str) -> bytes:
    """A vote in which the value of ``field`` is written as ``literal``, which need not be JSON."""
    fields = {name: json.dumps(value) for name, value in vote().items()} | {field: literal}
    return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()


def _with(**changes: Any) -> bytes:
    return json.dumps(vote(**changes)).encode()


def _without(field: str) -> bytes:
    fields = vote(note=vote()["vote_id"])  # so that no two bodies are alike
    return json.dumps({name: value for name, value in fields.items() if name != field}).encode()


def _named_by_voter(voter_hash: Any, **changes: Any) -> bytes:
    fields = vote(voter_hash=voter_hash, note=vote()["vote_id"]) | changes
    return json.dumps({name: value for name, value in fields.items() if name != "vote_id"}).encode()


PLAIN = {"content_encoding": "binary"}
A_MESSAGE_ID = {"message_id": "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59"}
ENCODINGS = (
    "gzip",
    "GZip",
    "deflate",
    "br",
    "utf-8, gzip",
    "utf8",
    "utf-16",
    "base64",
    " utf-8",
    "\u0131dentity",
    "none",
)
NO_TIMES = (
    *("2026-01-01T24:00:00Z", "2026-01-01T23:60:00Z", "2026-01-01T23:59:60Z", "2026-01-01T00:00:00+24:00"),
    *("2026-01-01T00:00:00+01:60", "2026-01-01T00:00:00+0160", "2026-01-01T00:00:00.Z", "20260101T000000Z"),
    *(
        "2026-01-01T00:00:00.1234567890Z",
        "2026-01-01T00Z",
        "2026-01-01Z",
        "2026-001T00:00:00Z",
        "2026-01-01T00:00:00 Z",
    ),
    *("2026-01-01T00:00:00z", "2026-01-01t00:00:00Z", "2026-01-01T00:00:00+00:00:00", "0000-01-01T00:00:00Z"),
    *(
        "2026-13-01T00:00:00Z",
        "2026-00-01T00:00:00Z",
        "2026-02-29T00:00:00Z",
        "+2026-01-01T00:00:00Z",
        "2026-01-01_00:00Z",
    ),
)
TEXT_FIELDS = {"vote_id": "bad_vote_id", "law_id": "bad_law_id", "choice": "bad_choice", "voter_hash": "bad_voter_hash"}
FIELDS = TEXT_FIELDS | {"timestamp": "bad_timestamp"}
VALID = _with()


def bad_messages() -> list[Case]:
    """All cases; each body is unlike every other."""
    cases = [
        Case("empty", b"", "not_json"),
        Case("white space", b" \t\r\n", "not_json"),
        Case("null", b"null", "not_an_object"),
        Case("string", b'"x"', "not_an_object"),
        Case("number", b"7", "not_an_object"),
        Case("infinite number", b"1e999", "not_an_object"),
        Case("truncated", VALID[:-9], "not_json"),
        Case("trailing garbage", VALID + b"x", "not_json"),
        Case("two objects", VALID + VALID, "not_json"),
        Case("single quotes", VALID.replace(b'"', b"'"), "not_json"),
        Case("byte order mark", b"\xef\xbb\xbf" + VALID, "not_json"),
        Case("UTF-16", VALID.decode().encode("utf-16"), "not_utf8"),
        Case("UTF-16 without mark", VALID.decode().encode("utf-16-le"), "not_json"),
        Case("UTF-32", VALID.decode().encode("utf-32"), "not_utf8"),
        Case("byte FF", VALID[:-1] + b"\xff}", "not_utf8"),
        Case("overlong NUL", b'{"law_id":"\xc0\x80"}', "not_utf8"),
        Case("surrogate bytes", b'{"law_id":"\xed\xa0\x80"}', "not_utf8"),
        Case("raw control character", _raw("law_id", '"law\x01"'), "not_json"),
        Case("raw newline in a string", _raw("law_id", '"law\n"'), "not_json"),
        Case("deep lists in 64 KiB", b"[" * 65_000, "not_json"),
        Case("100,000 lists", b"[" * 100_000, "too_large"),
        Case("deep objects in 64 KiB", b'{"a":' * 13_000, "too_deep"),
        Case("100,000 objects", b'{"a":' * 100_000, "too_large"),
        Case("deep value of an unknown field", _raw("x", "[" * 9_000 + "]" * 9_000), "too_deep"),
        Case("value one level too deep", _raw("x", "[" * 64 + "]" * 64), "too_deep"),
        Case("101 commas and brackets", _with(x=[0] * 97), "too_many_members"),
        Case("members of no name", b'{"x":[' + b'{"":0},' * 9_000 + b"0]}", "too_many_members"),
        Case("deep lists in an object", b'{"x":' + b"[" * 65_000, "too_deep"),
        Case("closing brackets", b"[0" + b",0" * 70 + b"]" * 60_000, "not_json"),
        Case("pairs of brackets", b"[]" * 32_000, "not_json"),
        Case("pairs of brackets in an object", b'{"x":' + b"[]" * 32_000, "too_many_members"),
        Case("texts of nothing", b'{"x":[' + b'"",' * 20_000 + b'""]}', "too_many_members"),
        Case("brackets in a text behind 205 texts", _with(x=["a"] * 205 + ["[" * 70]), "too_many_members"),
        Case("commas behind a text that does not end", b'"' + b'\\",' * 20_000, "not_json"),
        Case("one byte too large", VALID + b" " * (65_537 - len(VALID)), "too_large"),
        Case("10 MB in one key", b'{"' + b"a" * 10_000_000 + b'":1}', "too_large"),
        Case("duplicate key", VALID[:-1] + b',"choice":"non"}', "duplicate_key"),
        Case("duplicate key, same value", VALID[:-1] + b',"choice":"oui"}', "duplicate_key"),
        Case("duplicate key inside an unknown field", VALID[:-1] + b',"x":{"a":1,"a":2}}', "duplicate_key"),
        Case("NaN", _raw("timestamp", "NaN"), "not_json"),
        Case("-Infinity", _raw("timestamp", "-Infinity"), "not_json"),
        Case("NaN in an unknown field", _raw("x", "NaN"), "not_json"),
        *[
            Case(f"content_encoding {name!r}", _with(), "content_encoding", {"content_encoding": name})
            for name in ENCODINGS
        ],
        Case("UTF-16 that is called binary", VALID.decode().encode("utf-16-be"), "not_json", PLAIN),
        Case("message_id alone, no UUID", _without("vote_id"), "bad_vote_id", {"message_id": "vote-7\x00"}),
        Case("message_id of JMS alone", _without("vote_id"), "bad_vote_id", {"message_id": "ID:" + vote()["vote_id"]}),
        Case("no vote_id", _without("vote_id"), "missing_vote_id"),
        Case("no vote_id, and an empty message_id", _without("vote_id"), "missing_vote_id", {"message_id": ""}),
        Case("no vote_id, and no voter", _without("vote_id")[:-1] + b',"voter_hash":null}', "missing_vote_id"),
        Case("no vote_id, and no voter_hash that can be", _named_by_voter("a" * 15), "bad_voter_hash"),
        Case("no vote_id, and a voter_hash that is a number", _named_by_voter(7), "bad_voter_hash"),
        Case("no vote_id and no law_id", _named_by_voter("a" * 16, law_id=None), "bad_law_id"),
        Case("vote_id null beside a voter_hash", _with(vote_id=None, voter_hash="a" * 16), "bad_vote_id"),
        Case("vote_id as a URN", _with(vote_id="urn:uuid:" + vote()["vote_id"]), "bad_vote_id"),
        Case("no law_id", _without("law_id"), "missing_law_id"),
        Case("no choice", _without("choice"), "missing_choice"),
        Case("vote_id null beside a message_id", _with(vote_id=None), "bad_vote_id", {"message_id": vote()["vote_id"]}),
        Case("vote_id in braces", _with(vote_id="{" + vote()["vote_id"] + "}"), "bad_vote_id"),
        Case("vote_id without hyphens", _with(vote_id=vote()["vote_id"].replace("-", "")), "bad_vote_id"),
        Case("vote_id with a newline", _with(vote_id=vote()["vote_id"] + "\n"), "bad_vote_id"),
        Case("vote_id in Arabic digits", _with(vote_id="\u0660" * 8 + vote()["vote_id"][8:]), "bad_vote_id"),
        Case("9,000-character law_id", _with(law_id="a" * 9_000), "bad_law_id"),
        Case("65-character law_id", _with(law_id="a" * 65), "bad_law_id"),
        Case("law_id of an own label", _with(law_id="__other__"), "bad_law_id"),
        Case("CR LF in law_id", _with(law_id="law\r\nINFO all is well"), "bad_law_id"),
        Case("trailing newline in law_id", _with(law_id="law-001\n"), "bad_law_id"),
        Case("ANSI escape in law_id", _with(law_id="\x1b[31mlaw"), "bad_law_id"),
        Case("SQL in law_id", _with(law_id="law'; DROP TABLE vote_results; --"), "bad_law_id"),
        Case("quote and braces in law_id", _with(law_id='law","x"}'), "bad_law_id"),
        Case("Kelvin sign in law_id", _with(law_id="\u212aelvin"), "bad_law_id"),
        Case("law_id and a space", _with(law_id="law-001 "), "bad_law_id"),
        Case("OUI", _with(choice="OUI"), "bad_choice"),
        Case("Oui", _with(choice="Oui"), "bad_choice"),
        Case("oui and a space", _with(choice="oui "), "bad_choice"),
        Case("dotless i", _with(choice="ou\u0131"), "bad_choice"),
        Case("short voter_hash", _with(voter_hash="a" * 15), "bad_voter_hash"),
        Case("long voter_hash", _with(voter_hash="a" * 129), "bad_voter_hash"),
        Case("timestamp without offset", _with(timestamp="2026-01-01T00:00:00"), "bad_timestamp"),
        Case("timestamp of no day", _with(timestamp="2026-02-30T00:00:00Z"), "bad_timestamp"),
        Case(
            "timestamp in Arabic digits", _with(timestamp="\u0662\u0660\u0662\u0666-01-01T00:00:00Z"), "bad_timestamp"
        ),
        Case("timestamp as text of a number", _with(timestamp="1700000000"), "bad_timestamp"),
        *[Case(f"timestamp {text}", _with(timestamp=text), "bad_timestamp") for text in NO_TIMES],
        Case("timestamp of a week", _with(timestamp="2026-W01-1T00:00:00Z"), "bad_timestamp"),
        Case("timestamp -1", _with(timestamp=-1), "bad_timestamp"),
        Case("timestamp before 1970", _with(timestamp="1969-12-31T23:59:59Z"), "bad_timestamp"),
        Case("timestamp 1_000", _raw("timestamp", "1_000"), "not_json"),
        Case("timestamp year 9999999", _with(timestamp="9999999-01-01T00:00:00Z"), "bad_timestamp"),
        Case("timestamp year 9999", _with(timestamp="9999-12-31T23:59:59Z"), "future_timestamp"),
        Case("timestamp in milliseconds", _with(timestamp=int(time.time() * 1000)), "future_timestamp"),
        Case("timestamp 2^63", _with(timestamp=2**63), "future_timestamp"),
        Case("timestamp 1e999", _raw("timestamp", "1e999"), "future_timestamp"),
        Case("timestamp of 4,301 digits", _raw("timestamp", "9" * 4_301), "future_timestamp"),
        Case("timestamp 25 h ahead", _with(timestamp=time.time() + 25 * 3600), "future_timestamp"),
        *_bad_arrays(),
    ]
    for field, reason in FIELDS.items():
        cases += [
            Case(f"{field} is an object", _with(**{field: {"a": 1}}), reason),
            Case(f"{field} is a list", _with(**{field: ["oui"]}), reason),
            Case(f"{field} is true", _with(**{field: True}), reason),
            Case(f"{field} is empty", _with(**{field: ""}), reason),
        ]
    for field, reason in TEXT_FIELDS.items():
        cases += [
            Case(f"{field} is 1.0", _with(**{field: 1.0}), reason),
            Case(f"{field} has a NUL", _with(**{field: "oui\u0000"}), reason),
            Case(f"{field} is a lone surrogate", _raw(field, r'"\ud800"'), reason),
            Case(f"{field} is 4,301 digits", _raw(field, "9" * 4_301), reason),
        ]
    cases += [Case(f"{field} is null", _with(**{field: None}), f"bad_{field}") for field in ("law_id", "choice")]
    return cases


def _bad_arrays() -> list[Case]:
    """Arrays that break a rule of the whole, though there are votes in them."""
    good, another = _with(), _with()
    deep = b"[" * 65 + b"]" * 65
    return [
        Case("array of nothing", b"[]", "empty_array"),
        Case("array of white space", b" [\r\n\t ]\n", "empty_array"),
        Case("array of an array", b"[[%b]]" % good, "nested_array"),
        Case("array with an array behind a vote", b"[%b, [%b]]" % (good, another), "nested_array"),
        Case("array with a deep array behind a vote", b"[%b, %b]" % (good, deep), "nested_array"),
        Case("array of 501 votes", b"[%b]" % b",".join([good] * 200 + [b"{}"] * 301), "too_many_votes"),
        Case("array of 20,000 numbers", b"[" + b"0," * 20_000 + b"0]", "too_many_votes"),
        Case("array without end", b"[%b,%b" % (good, another), "not_json"),
        Case("array without begin", b"%b,%b]" % (good, another), "not_json"),
        Case("array that ends twice", b"[%b]]" % good, "not_json"),
        Case("array with a comma before its end", b"[%b,]" % good, "not_json"),
        Case("array with a comma before its votes", b"[,%b]" % good, "not_json"),
        Case("array with two commas", b"[%b,,%b]" % (good, another), "not_json"),
        Case("array without commas", b"[%b %b]" % (good, another), "not_json"),
        Case("two arrays", b"[%b][%b]" % (good, another), "not_json"),
        Case("vote behind an array", b"[%b]%b" % (good, another), "not_json"),
        Case("array in braces", b"{[%b]}" % good, "not_json"),
        Case("array with crossed brackets", b'[%b,{"x":[}]]' % good, "not_json"),
        Case("array with a vote cut short", b"[%b,%b]" % (good, another[:-1]), "not_json"),
        Case("array with a text that does not end", b"[%b,%b]" % (good, another[:-2]), "not_json"),
        Case("array with NaN in a vote", b"[%b,%b]" % (good, _raw("timestamp", "NaN")), "not_json"),
        Case("array with NaN among its votes", b"[%b,NaN]" % good, "not_json"),
        Case("array with a raw newline in a text", b"[%b,%b]" % (good, _raw("law_id", '"law\n"')), "not_json"),
        Case("array with a no-break space", b"[%b,\xc2\xa0%b]" % (good, another), "not_json"),
        Case("array with a byte order mark", b"\xef\xbb\xbf[%b]" % good, "not_json"),
        Case("array with a byte order mark within", b"[\xef\xbb\xbf%b]" % good, "not_json"),
        Case("array in UTF-16 without mark", (b"[%b]" % good).decode().encode("utf-16-le"), "not_json"),
        Case("array with byte FF in a vote", b"[%b,%b]" % (good, another[:-1] + b"\xff}"), "not_utf8"),
        Case("array one byte too large", (b"[%b]" % good).ljust(65_537), "too_large"),
        Case("array that is compressed", b"[%b]" % good, "content_encoding", {"content_encoding": "gzip"}),
        Case("array of one vote without identity", b"[%b]" % _without("vote_id"), "missing_vote_id", PLAIN),
        Case("array whose message has an identity", b"[%b]" % _without("vote_id"), "missing_vote_id", A_MESSAGE_ID),
        Case("array of a text", b'["%b"]' % vote()["vote_id"].encode(), "not_an_object"),
    ]


def odd_votes() -> list[Case]:
    """Votes that look odd and count; ``reason`` is empty."""
    by_message_id = vote()["vote_id"]
    votes = {
        "unknown field": _with(comment={"a": [1, None]}),
        "4,301-digit integer in an unknown field": _raw("x", "9" * 4_301),
        "1e999 in an unknown field": _raw("x", "1e999"),
        "64 levels": _raw("x", "[" * 63 + "]" * 63),
        "100 commas and brackets": _with(x=[0] * 96),
        "commas, quotes and brackets in a text": _with(x=',"\\[{' * 5_000),
        "brackets in a text": _raw("x", json.dumps("[" * 99 + '"' + "{" * 99)),
        "NUL and lone surrogate in an unknown field": _raw("x", r'"\u0000\ud800"'),
        "white space around": b" \r\n\t" + _with() + b"\n",
        "64 KiB exactly": VALID + b" " * (65_536 - len(VALID)),
        "escaped letters": _raw("choice", r'"\u006fui"'),
        "law called NULL": _with(law_id="NULL"),
        "law of 64 characters": _with(law_id="A" + "._:-" * 15 + "zzz"),
        "no optional field": _with(timestamp=None, voter_hash=None),
        "timestamp in Unix seconds": _with(timestamp=int(time.time())),
        "timestamp with a fraction": _with(timestamp=time.time() - 0.5),
        "timestamp zero": _with(timestamp=0),
        "timestamp with Z": _with(timestamp="2026-01-01T00:00:00Z"),
        "timestamp with an offset": _with(timestamp="2026-01-01T00:00:00.123456789+05:30"),
        "timestamp with a comma": _with(timestamp="2026-01-01 00:00:00,5-0800"),
        "timestamp 23 h ahead": _with(timestamp=time.time() + 23 * 3600),
        "voter_hash of 16": _with(voter_hash="0123456789abcdef"),
        "voter_hash of 128": _with(voter_hash="A+/=_-zz" * 16),
        "voter_hash and no vote_id": _named_by_voter("fedcba9876543210"),
        "upper-case vote_id": _with(vote_id=vote()["vote_id"].upper().replace("0", "A")),
        "timestamp without seconds": _with(timestamp="2026-01-01T23:59+23"),
        "array of one vote": b"[%b]" % _with(),
        "array with white space of every kind": b" \t\r\n[\n\r\t %b \t\r\n]\n\r\t " % _with(),
        "array of 64 KiB exactly": (b"[%b]" % _with()).ljust(65_536),
        "array with brackets, quotes and commas in a text": b"[%b]" % _with(x='",[{\\' * 5_000),
        "nil UUID": _with(vote_id="00000000-0000-0000-0000-000000000000"),
    }
    cases = [Case(name, body, "") for name, body in votes.items()]
    cases.append(Case("message_id instead of vote_id", _without("vote_id"), "", {"message_id": by_message_id}))
    for encoding in ("utf-8", "UTF-8", "Utf-8", "binary", "BINARY", "identity", ""):
        cases.append(Case(f"content_encoding {encoding!r}", _with(), "", {"content_encoding": encoding}))
    identity = vote()["vote_id"]
    for name, message_id in {"other": identity, "JMS": f"ID:{identity}", "no UUID": "vote-7", "empty": ""}.items():
        cases.append(Case(f"message_id beside a vote_id, {name}", _with(), "", {"message_id": message_id}))
        by_voter = _named_by_voter(str(uuid.uuid4()))
        cases.append(Case(f"message_id beside a voter_hash, {name}", by_voter, "", {"message_id": message_id}))
    upper = {"message_id": vote()["vote_id"].upper()}
    cases.append(Case("message_id in upper case", _without("vote_id"), "", upper))
    same = vote()
    cases.append(Case("message_id beside vote_id", json.dumps(same).encode(), "", {"message_id": same["vote_id"]}))
    cases.append(Case("message_id beside an array", b"[%b]" % _with(), "", A_MESSAGE_ID))
    cases += [Case(f"priority {p}", _with(), "", {"priority": p}) for p in (0, 1, 10, 255)]
    return cases
