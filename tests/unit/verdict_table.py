"""The verdict on many bodies: a name, a tab, and the reason code, or the fields as they are stored.

Of an array that can be read it is told of each vote, with the text of one that is rejected; 3 * stands for three alike.

What a vote is must not depend on who reads it: the table is the same to the letter on every interpreter. It stands in
verdicts.tsv; `python -m tests.unit.verdict_table > tests/unit/verdicts.tsv` makes it anew where the contract changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby

from tests.messages import bad_messages, odd_votes
from votes import Rejection, Vote, read_message

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


# Between two votes of an array, the first of which has more bytes than characters.
ELEMENTS = [
    *("{}", " {} ", "\t\r\n{ }\n\r\t", "null", "true", "7", '"x"', '""', '"]"', '"["', '"},{"', r'"\""', r'"\"],["'),
    *(r'"\\"', r'"\\\"]"', r'"\\\\"', r'"\u005d"', r'"\ud800"', r'"\u0000"', '"é"', '"\U0001f600]"', "-0", "1e999"),
    *("9" * 15, "9" * 5_000, "0." + "9" * 5_000, "1e-999", "00", "01", "+1", ".5", "1.", "0x1", "1_0", "NaN"),
    *("Infinity", "-Infinity", "nan", "nul", "", " ", ",", ",,", "{},", ",{}", "{},{}", "{} {}", "{}{}", "{}x", "x{}"),
    *("{}]", "]{}", "{}],[{}", "}{", "{", "}", "[", "]", '"', r'"\"', '"\\', "'", "'x'", "//", "/**/", "#", "\x00"),
    *("\x0b{}", "\x0c{}", "\x85{}", "\xa0{}", "\u2003{}", "\u2028{}", "\ufeff{}", "{}\ufeff", "\x7f", "\x1f", '"\n"'),
    *('"\t"', '"\x00"', '"\x7f"', '"\u2028"', r'"\x41"', r'"\u12"', r'"\ud800\u0041"', "[]", "[{}]", "[[]]", "[7]"),
    *('["x"]', "[" * 65 + "]" * 65, "[" * 5_000 + "]" * 5_000, "[" * 5_000, "]" * 5_000),
    *('{"x":' + "[" * depth + "]" * depth + "}" for depth in (1, 63, 64, 5_000, 20_000)),
    *('{"x":' * depth + "1" + "}" * depth for depth in (64, 65, 994, 9_000)),
    *('{"x":[' + "0," * more + "0]}" for more in (97, 98, 20_000)),
    *('{"x":["' + "[{]}," * many + '"]}' for many in (1, 10_000)),
    *('{"x":' + "[" * 64 + "]" * 64 + ',"x":NaN}', '{"x":[' + "0," * 200 + "NaN]}"),
    *('{"x":' + "[" * 70 + "}" * 70 + "}", '{"x":{"y":1,"y":2}}', '{"x":1,"\\u0078":2}', '{"x":1,"x":NaN}'),
    *('{"":0,"":0}', '{"x":[1,]}', '{"x":1,}', '{"x":}', '{"x":[}', '{"x":]}', '{"x":[}]}', '{"[":1}', '{"]":[]}'),
    *(r'{"\"[":1}', r'{"\\":1}', r'{"\\":[]}', r'{"\\\"":[]}', "\ud800", "\udfff{}"),
]
ARRAYS = [
    *("[" + ",".join(["{}"] * number) + "]" for number in (1, 2, 499, 500, 501, 5_000)),
    *("[" + ",".join(['{"x":[0,1]}'] * number) + "]" for number in (499, 500, 501)),
    *("[" + ",".join(['{"x":' + "[" * 64 + "]" * 64 + "}"] * number) + "]" for number in (3, 400)),
    *("[" + ",".join(["{}"] * 500 + ["NaN"]) + "]", "[" + ",".join(["{}"] * 498 + ["[7]"]) + "]"),
    *("[" + ",".join(["[]"] * 501) + "]", "[ ]", "[\t]", "[\x0b]", "[\xa0]", " [{}]", "\n[{}]\r", "\x0b[{}]"),
    *("\xa0[{}]", "\ufeff[{}]", "[{}]\x00", "\x00[{}]", "[{}]7", "[{}][]", "[{}],[{}]", "[{}],", ",[{}]", "[{},]"),
    *("[,{}]", "[{}}", "{[{}]}", '["]', '["\\"]', '[""]', '["\\\\"]', "[]]", "[[]"),
    *("[" + '{"x":"' + "é" * 30_000 + '"},7]', "[" + "{}," * 20_000 + "{}]", "[" + '"' * 60_000 + "]"),
    *("[" + '\\"' * 30_000 + "]", "[" + "\\" * 60_000 + "]", '["' + "\\" * 60_000 + '"]', "[" + "9" * 60_000 + "]"),
    *("[" + "-" * 60_000 + "]", "[" * 32_000 + "]" * 32_000, "[" + "{}" * 30_000 + "]", "[" + " " * 65_000 + "]"),
    *("[" + " " * 65_532 + "{}]", "[" + " " * 65_533 + "{}]"),
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
    accented = json.dumps(VOTE | {"x": "é€\U0001f600"}, ensure_ascii=False)
    for text in ELEMENTS:
        yield f"in an array {text}", f"[{accented},{text},{json.dumps(VOTE)}]".encode("utf-8", "surrogatepass")
    for text in ARRAYS:
        yield f"array {text}", text.encode()
    for raw in RAW:
        yield f"bytes in an array {raw!r}", b"[%b,%b]" % (json.dumps(VOTE).encode(), raw)
        yield f"bytes {raw!r}", raw
        yield f"bytes in a vote {raw!r}", json.dumps(VOTE | {"x": "@"}).encode().replace(b"@", raw)


def verdict(body: bytes, message_id: str | None = None, content_encoding: str | None = None) -> str:
    """The reason code, or the vote as it is stored; of an array that of each."""
    told = map(_told, read_message(body, message_id, content_encoding))
    return " | ".join(f"{number} * {each}" if number > 1 else each for each, number in _runs(told))


def _runs(items: Iterator[str]) -> Iterator[tuple[str, int]]:
    for item, group in groupby(items):
        yield item, len(list(group))


def _told(read: Vote | Rejection) -> str:
    if isinstance(read, Vote):
        moment = read.voted_at and read.voted_at.isoformat()
        return f"vote {read.vote_id} {read.law_id} {read.choice} {moment} {read.voter_hash}"
    if not read.place:
        return read.reason
    text = ascii(read.body.decode())
    if len(text) > 60:
        text = f"{len(read.body)} bytes, {hashlib.sha256(read.body).hexdigest()}"
    return f"{read.reason} {text}"


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
