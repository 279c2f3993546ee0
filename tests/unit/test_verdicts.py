"""What `test_publisher.py --check` says of bodies: the service's own verdict, without any server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import test_publisher
from tests.harness import ROOT, vote
from tests.messages import bad_messages, odd_votes
from verdicts import Verdict, bodies, verdicts
from votes import MAX_BODY_BYTES, REASONS

ONE = {"vote_id": "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59", "law_id": "law-001", "choice": "oui"}
OTHER = ONE | {"vote_id": "9d0c3a52-6a0e-4d0a-8f0b-1d2e3f405162"}
VOTER = "c2FsdGVkLWhhc2gtMDE="


def lines(*votes: dict[str, Any]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in votes).encode()


def without_vote_id(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in vote(**fields).items() if name != "vote_id"}


def said_of(raw: bytes, **properties: str | None) -> list[str]:
    """The verdicts on the lines of a file."""
    return [verdict.outcome for verdict in verdicts(bodies(io.BytesIO(raw)), **properties)]


def check(folder: Path, raw: bytes, *options: str) -> int:
    """Run --check in this process on a file of these bytes."""
    file = folder / "bodies"
    file.write_bytes(raw)
    return test_publisher.main(["--check", str(file), *options])


def run(folder: Path, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run --check as a program without any setting, where no .env is."""
    command = [sys.executable, str(ROOT / "test_publisher.py"), *options]
    return subprocess.run(command, cwd=folder, env={}, input=stdin, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\r\nb", [b"a", b"b"]),
        (b"a\n\nb\n", [b"a", b"", b"b"]),
        (b"a\n\n", [b"a", b""]),
        (b"\n", [b""]),
        (b"\r\n", [b""]),
        (b"a\rb\r\r\n", [b"a\rb\r"]),
        (b"a\r", [b"a\r"]),
        (b"\x00a\n", [b"\x00a"]),
    ],
)
def test_a_body_is_a_line_without_its_end(raw: bytes, expected: list[bytes]) -> None:
    """An empty line is an empty body; what follows the end of the last line is none."""
    assert list(bodies(io.BytesIO(raw))) == expected


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"\0", b"a", b"bc"])), st.integers(1, 9))
def test_bodies_do_not_depend_on_how_their_file_is_read(parts: list[bytes], size: int) -> None:
    """A pipe hands it over in pieces of any size."""

    class Pipe(io.RawIOBase):
        left = b"".join(parts)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            piece, self.left = self.left[:size], self.left[size:]
            buffer[: len(piece)] = piece
            return len(piece)

    for end in (b"\n", b"\0"):
        assert list(bodies(io.BufferedReader(Pipe()), end)) == list(bodies(io.BytesIO(Pipe.left), end))


def test_bodies_that_end_with_nul_may_have_line_breaks() -> None:
    """As with xargs -0; the last one may go without."""
    assert list(bodies(io.BytesIO(b"{\r\n}\r\n\0\0x\n"), b"\0")) == [b"{\r\n}\r\n", b"", b"x\n"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("size", range(MAX_BODY_BYTES - 2, MAX_BODY_BYTES + 4))
def test_a_body_is_too_large_by_its_own_bytes(size: int, end: bytes) -> None:
    """Its line's end is not among them."""
    largest = json.dumps(ONE).encode().ljust(size) + end
    assert said_of(largest) == ["vote" if size <= MAX_BODY_BYTES else "too_large"]


def test_a_line_without_end_is_not_held_whole() -> None:
    """A file of 10 GB in one line takes no more memory than its beginning."""

    class Endless(io.RawIOBase):
        left = 40 * MAX_BODY_BYTES

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            size = min(self.left, len(buffer))
            buffer[:size] = b"x" * size
            self.left -= size
            return size

    (body,) = bodies(io.BufferedReader(Endless()))
    assert MAX_BODY_BYTES < len(body) < 2 * MAX_BODY_BYTES


def test_a_byte_order_mark_is_part_of_the_first_body() -> None:
    """The service would get it too."""
    assert said_of(b"\xef\xbb\xbf" + lines(ONE, OTHER)) == ["not_json", "vote"]


@pytest.mark.parametrize("case", [*bad_messages(), *odd_votes()], ids=lambda case: case.name)
def test_the_verdict_is_that_of_the_service(case: Any) -> None:
    """Of each message that the service's own tests have."""
    properties = {name: value for name, value in case.properties.items() if name != "priority"}
    (verdict,) = verdicts([case.body], **properties)
    assert verdict.outcome == (case.reason or "vote")


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (ONE, "duplicate"),
        (ONE | {"vote_id": ONE["vote_id"].upper(), "timestamp": 0, "note": ""}, "duplicate"),
        (ONE | {"choice": "non"}, "conflict"),
        (ONE | {"law_id": "law-002"}, "conflict"),
        (ONE | {"voter_hash": VOTER}, "conflict"),
        (OTHER, "vote"),
        (ONE | {"choice": "OUI"}, "bad_choice"),
    ],
)
def test_a_copy_is_named(second: dict[str, Any], expected: str) -> None:
    """As the service would file it, and by the body that counts in its place."""
    _, verdict = verdicts([json.dumps(ONE).encode(), json.dumps(second).encode()])
    assert verdict.outcome == expected
    assert verdict.counted_body == (1 if expected in ("duplicate", "conflict") else None)


def test_a_voter_votes_once_on_a_law() -> None:
    """A second vote does not count, nor use its vote_id up."""
    votes = [
        *(vote("law-001", voter_hash=VOTER), ONE | {"voter_hash": VOTER}, ONE | {"voter_hash": VOTER}),
        *(ONE | {"law_id": "law-002", "voter_hash": VOTER}, without_vote_id(law_id="law-003", voter_hash=VOTER)),
        *(without_vote_id(law_id="law-003", voter_hash=VOTER), without_vote_id(law_id="law-001", voter_hash=VOTER)),
        without_vote_id(law_id="law-003", choice="non", voter_hash=VOTER),
    ]
    found = list(verdicts(bodies(io.BytesIO(lines(*votes)))))
    assert [(verdict.outcome, verdict.counted_body) for verdict in found] == [
        *(("vote", None), ("second_vote", 1), ("second_vote", 1), ("vote", None), ("vote", None)),
        *(("duplicate", 5), ("second_vote", 1), ("conflict", 5)),
    ]


def test_a_vote_that_its_voter_names_is_shown_with_its_identity() -> None:
    """By the example of docs/MESSAGE_FORMAT.md."""
    body = json.dumps({"law_id": "law-001", "choice": "oui", "voter_hash": VOTER}).encode()
    (verdict,) = verdicts([body])
    assert verdict.as_text() == "1  vote  e0c3ab46-cce8-50aa-8c4f-a7c69d72992f law-001 oui"


def test_properties_are_given_for_all_bodies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message_id of a vote without another identity, and the content-encoding."""
    raw = lines(without_vote_id())
    assert check(tmp_path, raw) == 1
    assert "missing_vote_id" in capsys.readouterr().out
    assert check(tmp_path, raw, "--message-id", ONE["vote_id"].upper(), "--content-encoding", "UTF-8") == 0
    assert f"1  vote  {ONE['vote_id']} law-001 oui" in capsys.readouterr().out
    assert check(tmp_path, lines(ONE), "--content-encoding", "gzip") == 1
    assert "1  content_encoding  " in capsys.readouterr().out


def test_a_line_a_body_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For people: the number, the verdict, and what goes with it."""
    assert check(tmp_path, lines(ONE, ONE, OTHER | {"choice": "oui "}) + b"\n") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"1  vote  {ONE['vote_id']} law-001 oui",
        f"2  duplicate  {ONE['vote_id']} law-001 oui, body 1 counts",
        f"3  bad_choice  {REASONS['bad_choice']}",
        f"4  not_json  {REASONS['not_json']}",
        "",
        "4 bodies: vote 1, duplicate 1, bad_choice 1, not_json 1",
    ]


def test_json_is_a_line_a_body_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs."""
    assert check(tmp_path, lines(ONE, ONE, OTHER | {"choice": 1}), "--json") == 1
    *each, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert each == [
        {"body": 1, "verdict": "vote", **ONE},
        {"body": 2, "verdict": "duplicate", **ONE, "counted_body": 1},
        {"body": 3, "verdict": "bad_choice", "detail": REASONS["bad_choice"]},
    ]
    assert summary == {"bodies": 3, "verdicts": {"vote": 1, "duplicate": 1, "bad_choice": 1}}


def test_an_array_is_judged_vote_by_vote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the number of its body and the place in it; a copy is named by what counts, in whatever body it is."""
    third = vote()
    votes = [[ONE, 7, OTHER, ONE], OTHER, [], [third, ONE | {"choice": "non"}], third]
    raw = "".join(json.dumps(each) + "\n" for each in votes).encode()
    assert check(tmp_path, raw, "--message-id", third["vote_id"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"1.1  vote  {ONE['vote_id']} law-001 oui",
        f"1.2  not_an_object  {REASONS['not_an_object']}",
        f"1.3  vote  {OTHER['vote_id']} law-001 oui",
        f"1.4  duplicate  {ONE['vote_id']} law-001 oui, 1.1 counts",
        f"2  duplicate  {OTHER['vote_id']} law-001 oui, 1.3 counts",
        f"3  empty_array  {REASONS['empty_array']}",
        f"4.1  vote  {third['vote_id']} law-001 oui",
        f"4.2  conflict  {ONE['vote_id']} law-001 non, 1.1 counts",
        f"5  duplicate  {third['vote_id']} law-001 oui, 4.1 counts",
        "",
        "5 bodies with arrays, 9 verdicts: vote 3, not_an_object 1, duplicate 3, empty_array 1, conflict 1",
    ]
    assert check(tmp_path, json.dumps([ONE, OTHER]).encode()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 body with arrays, 2 verdicts: vote 2"


def test_json_has_the_place_in_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And that of the one that counts; none of a vote by itself."""
    raw = b"".join(json.dumps(each).encode() + b"\n" for each in ([OTHER, ONE], ONE, [[]], [ONE | {"choice": 1}]))
    assert check(tmp_path, raw, "--json") == 1
    *each, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert each == [
        {"body": 1, "place": 1, "verdict": "vote", **OTHER},
        {"body": 1, "place": 2, "verdict": "vote", **ONE},
        {"body": 2, "verdict": "duplicate", **ONE, "counted_body": 1, "counted_place": 2},
        {"body": 3, "verdict": "nested_array", "detail": REASONS["nested_array"]},
        {"body": 4, "place": 1, "verdict": "bad_choice", "detail": REASONS["bad_choice"]},
    ]
    assert summary == {"bodies": 4, "verdicts": {"vote": 2, "duplicate": 1, "nested_array": 1, "bad_choice": 1}}


def test_nothing_of_a_body_reaches_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in it."""
    evil = "\x1b[31m\r\x07\u202e"
    raw = lines(*(ONE | {field: evil} for field in (*ONE, "voter_hash", "timestamp", evil))) + evil.encode() + b"\xff\n"
    assert check(tmp_path, raw, "--content-encoding", "UTF-8", "--message-id", evil) == 1
    printed = capsys.readouterr()
    assert all(character == "\n" or " " <= character <= "~" for character in printed.out + printed.err)
    assert printed.out.splitlines()[-1].startswith("7 bodies: ")


@pytest.mark.parametrize("options", [["--check"], ["--check", "-"]])
def test_standard_input_is_read_without_a_broker_and_without_settings(options: list[str], tmp_path: Path) -> None:
    """As a program, where no .env is."""
    done = run(tmp_path, *options, stdin=lines(ONE))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines()[-1] == "1 body: vote 1"


def test_a_body_of_several_lines_is_given_with_nul(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that holds one vote needs no NUL at all."""
    assert check(tmp_path, json.dumps(ONE, indent=2).encode() + b"\n", "--null") == 0
    assert check(tmp_path, b"\0".join(json.dumps(one, indent=2).encode() for one in (ONE, OTHER)), "--null") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 bodies: vote 2"


def test_a_file_without_a_body_is_not_taken_for_one_that_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that wrote nothing into a pipe has a fault."""
    assert check(tmp_path, b"") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("bodies: there is no body in it\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2."""
    missing = "No such file or directory"
    for file, reason in {tmp_path / "nothing": missing, tmp_path: "Is a directory", "": missing}.items():
        assert test_publisher.main(["--check", str(file)]) == 2
        assert capsys.readouterr().err == f"--check {file}: {reason}\n"


def test_standard_input_that_is_closed_cannot_be_read(tmp_path: Path) -> None:
    """Exit code 2, without a stack trace."""
    shell = ["sh", "-c", '"$0" "$1" --check <&-', sys.executable, str(ROOT / "test_publisher.py")]
    done = subprocess.run(shell, cwd=tmp_path, env={}, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, b"--check -: Bad file descriptor\n")


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    """As with `| head -1`."""
    shell = ["sh", "-c", '"$0" "$1" --check | head -1', sys.executable, str(ROOT / "test_publisher.py")]
    raw = lines(*[ONE] * 20_000)
    done = subprocess.run(shell, cwd=tmp_path, env={}, input=raw, capture_output=True, timeout=60, check=False)
    assert (done.stdout.count(b"\n"), done.stderr) == (1, b"")


@pytest.mark.parametrize(
    "options",
    [["--null"], ["--message-id", "x"], ["--content-encoding", "gzip"], ["--check", "f", "--replay", "f"]],
)
def test_options_that_do_not_go_together_are_a_usage_error(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, with the option named."""
    with pytest.raises(SystemExit) as raised:
        test_publisher.main(options)
    assert raised.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_verdict_on_a_body_that_is_no_vote_has_the_sentence_of_its_reason() -> None:
    """Each reason has one."""
    for reason, sentence in REASONS.items():
        assert Verdict(7, reason).as_text() == f"7  {reason}  {sentence}"


@pytest.mark.parametrize("name", ["votes.jsonl", "arrays.jsonl"])
def test_the_example_of_the_document_is_real(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/MESSAGE_FORMAT.md shows a file and what is said of it."""
    text = (ROOT / "docs/MESSAGE_FORMAT.md").read_text(encoding="utf-8")
    example = text.partition(f"$ cat {name}\n")[2].partition("```")[0]
    file, command, output = example.partition(f"$ .venv/bin/python test_publisher.py --check {name}\n")
    assert command
    assert check(tmp_path, file.encode()) == 1
    assert capsys.readouterr().out == output
