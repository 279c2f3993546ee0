"""The verdict on many bodies: a name, a tab, and the reason code, or the fields as they are stored.

What a vote is must not depend on who reads it: the table is the same to the letter on every interpreter. It stands in
verdicts.tsv; `python -m tests.unit.verdict_table > tests/unit/verdicts.tsv` makes it anew where the contract changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.messages import bad_messages, odd_votes
from votes import UnreadableVote, Vote

VOTE = {"vote_id": "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59", "law_id": "law-001", "choice": "oui"}

# Texts that stand for a value as they are: what a parser of JSON, of numbers or of dates may read in its own way.
NUMBERS = [
    *("0", "-0", "-0.0", "0e0", "1E0", "1e+0", "1.5e-7", "1e-400", "1e308", "1e309", "-1e999", "00", "01", "+1", ".5"),
    *("1.", "1.e0", "0x10", "1_000", "1e", "1e1.5", "--1", "1 2", "\uff11", "\u0661", "9" * 15, "9" * 16, "9" * 19),
    *("9" * 309, "9" * 4_300, "9" * 4_301, "-" + "9" * 5_000, "0." + "9" * 5_000, "1" + "0" * 5_000 + "e-5000"),
    *("1700000000", "1700000000.5", "1700000000.1234567", "1700000000.9999999", "17000000000e-1", "1.7e9", "0.0000005"),
    *(
        "0.0000015",
        "253402300799",
        "1e20",
        "NaN",
        "nan",
        "Infinity",
        "-Infinity",
        "-NaN",
        "inf",
        "True",
        "true",
        "null",
    ),
]
DATES = [
    *("2026-01-01T00:00:00Z", "2026-01-01 00:00Z", "2026-01-01T00:00:00+00", "2026-01-01T00:00:00-00:00"),
    *("2026-01-01T00:00:00,5Z", "2026-01-01T00:00:00.5+0530", "2026-01-01T00:00:00.1234567Z", "2024-02-29T12:00:00Z"),
    *("2026-01-01T00:00:00.000000999Z", "2026-01-01T00:00:00.999999999Z", "1970-01-01T00:00:00Z", "0001-01-01T00:00Z"),
    *("1970-01-01T00:00:00+00:01", "1969-12-31T23:59:59.9-00:01", "2026-01-01T24:00:00Z", "2026-01-01T24:00Z"),
    *("2026-12-31T24:00:00.000Z", "2026-01-01T23:60Z", "2026-01-01T23:59:60Z", "2026-01-01T00:00:00+23:59"),
    *("2026-01-01T00:00:00+24:00", "2026-01-01T00:00:00+00:60", "2026-01-01T00:00:00+0099", "2026-01-01T00:00:00+1"),
    *("2026-01-01T00:00:00+01:00:00", "2026-01-01T00:00:00+01:00:00.5", "2026-01-01T000000Z", "20260101T00:00:00Z"),
    *("2026-W01-1T00:00:00Z", "2026-W011T00:00:00Z", "2026-001T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01", "2026"),
    *("2026-01-01T00Z", "2026-01-01T00:00:00.Z", "2026-01-01T00:00:00.5", "2026-01-01\u00a000:00:00Z", "2026-1-1T0:0Z"),
    *("2026-01-01T00:00:00 Z", " 2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z\\n", "2026-01-01t00:00:00z", "now", ""),
    *("\u0662026-01-01T00:00:00Z", "2026-01-01T00:00:00\u22125:00", "9999-12-31T23:59:59-23:59", "10000-01-01T00:00Z"),
    *("2026-02-30T00:00:00Z", "2026-00-10T00:00:00Z", "2026-13-01T00:00:00Z", "0000-01-01T00:00:00Z", "Jan 1 2026 Z"),
]
TEXTS = [
    *(
        r"\u006fui",
        r"\u006Fui",
        r"o\u0075i",
        r"\x6fui",
        r"\oui",
        r"\u6fui",
        r"\u00006fui",
        r"oui\u0000",
        r"\ud800",
        "ou\u0131",
    ),
    *(r"\ud83d\ude00", r"\ude00\ud83d", "ou\u0456", "OUI", "\uff4f\uff55\uff49", "oui\u200b", "o\u0301ui", "\ufeffoui"),
    *("oui\u2028", "oui\u00a0", "\ufb01", "oui\x7f", "oui\x1f", "oui\t", "\U0001f600", "\u1e9e", "\u0130", "\u212a"),
]
BODIES = [
    *("", " ", "\t\n\r ", "\x0b{}", "\x0c{}", "\u00a0{}", "\u2003{}", "\ufeff{}", "\x85{}", "\x00", "{}\x00", "{}{}"),
    *("{} {}", "[]", "[{}]", "null", "nul", "true", "True", "7", '"x"', "'x'", "{'a':1}", "{a:1}", "{,}", '{"a"}'),
    *(
        '{"a":}',
        '{"a":1,}',
        '{"a":1,,"b":2}',
        "[1,]",
        "[,1]",
        '{"a" 1}',
        '{"a":1 "b":2}',
        "{",
        "}",
        "[",
        "]",
        '{"a":[}',
    ),
    *('{"a":1/*x*/}', '{"a":1}//', "#", '{"":0}', '{"":0,"":0}', '{"a":1,"\\u0061":2}', '{"a":{"b":1,"b":1}}', '"\\'),
    *('"' + "\\" * 9, "\\", '{"a":"\\u12"}', '{"a":"\\u123g"}', '{"a":"\\ud800\\u0041"}', '{"\\ud800":1}', "\ufffe"),
    *("[" * depth + "]" * depth for depth in (63, 64, 65, 100, 990, 1_000, 1_496, 2_000, 9_997, 30_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (63, 64, 65, 994, 1_496, 9_900)),
    *("[" * depth for depth in (64, 65, 995, 65_536, 65_537)),
    *('{"x":' * depth + '"' + "[" * 100 + '"' + "}" * depth for depth in (1, 64, 65)),
    *("[" + "0," * more + "0]" for more in (99, 100, 20_000)),
    *(
        '"' + "[" * 1_000 + '"',
        '["\\"' + "[" * 70 + '"]',
        '["\\\\",' + "[" * 70,
        '"' * 30_000,
        "9" * 65_536,
        "-" * 65_536,
    ),
]
RAW = [
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
]


def bodies() -> Iterator[tuple[str, bytes]]:
    """Every body that does not depend on the moment, by a name of its own."""
    for field, texts in ({"timestamp": NUMBERS, "x": NUMBERS, "voter_hash": NUMBERS}).items():
        for text in texts:
            yield f"{field} {text}", (json.dumps(VOTE)[:-1] + f', "{field}": {text}}}').encode()
    for text in DATES:
        yield f"date {text}", json.dumps(VOTE | {"timestamp": "@"}).replace("@", text).encode()
    for field in VOTE:
        for text in TEXTS:
            yield f"{field} {text}", json.dumps(VOTE | {field: "@"}).replace("@", text).encode()
    for text in BODIES:
        yield f"body {text}", text.encode()
    for raw in RAW:
        yield f"bytes {raw!r}", raw
        yield f"bytes in a vote {raw!r}", json.dumps(VOTE | {"x": "@"}).encode().replace(b"@", raw)


def verdict(body: bytes, message_id: str | None = None, content_encoding: str | None = None) -> str:
    """The reason code, or the vote as it is stored."""
    try:
        vote = Vote.from_message(body, message_id, content_encoding)
    except UnreadableVote as exc:
        return exc.reason
    moment = vote.voted_at and vote.voted_at.isoformat()
    return f"vote {vote.vote_id} {vote.law_id} {vote.choice} {moment} {vote.voter_hash}"


def table() -> Iterator[str]:
    """The lines."""
    for case in [*bad_messages(), *odd_votes()]:  # these have new identities, and some a moment of today
        reason = verdict(case.body, case.properties.get("message_id"), case.properties.get("content_encoding"))
        yield f"message {case.name}\t{reason.split()[0]}"
    for name, body in bodies():
        shown = name if len(name) <= 60 else f"{name[:40]}... ({len(name)} characters)"
        yield f"{json.dumps(shown)[1:-1]}\t{verdict(body)}"


if __name__ == "__main__":
    print(*table(), sep="\n")
