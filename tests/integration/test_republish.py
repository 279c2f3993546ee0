"""Messages that were refused, sent again by reconcile.py republish, on real servers."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest

import republish
from database import Database
from scripts.local_services import LocalServices
from tests.faults.mutants import Mutant
from tests.faults.proxy import AmqpWatcher, Link, TcpProxy
from tests.harness import Queue, Results, Service, vote, wait_until
from votes import MAX_BODY_BYTES, REASONS, CutBody, Rejection, Vote

Start = Callable[..., Service]
Run = Callable[..., subprocess.CompletedProcess[str]]
NOWHERE = {"AMQP_URL": "amqp://votes:x@127.0.0.1:1/"}
MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)
EARLIER = ("content_encoding", "message_id_mismatch", "bad_vote_id", "missing_vote_id")  # what was refused once
ASKED = [word for reason in EARLIER for word in ("--reason", reason)]
OF_ARRAYS = ("not_an_object", "too_many_members", "too_deep", "duplicate_key")  # under which version 1 kept them
ASKED_FOR_ARRAYS = [word for reason in OF_ARRAYS for word in ("--reason", reason)]
VERSION_1 = Mutant("a service that reads no arrays", [("votes.py", "if not begins_array(body):", "if True:")], [])


@pytest.fixture
def declared(queue: Queue) -> Queue:
    """The queue, that a service of before has left."""
    with queue.channel():
        return queue


def keep(database: Database, reason: str, *bodies: bytes | dict[str, Any], message_id: str | None = None) -> None:
    """Have each kept as one that was refused for this reason, as a service of before would."""
    raw = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    database.batch_update_results([], [Rejection(body, reason, "", message_id, 0) for body in raw])


def without_id(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in vote(**changes).items() if name != "vote_id"}


def voter() -> str:
    return uuid.uuid4().hex


def numbers(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, int]]:
    """By reason, from --json."""
    reasons: dict[str, dict[str, int]] = json.loads(done.stdout)["reasons"]
    return reasons


def take_all(queue: Queue) -> list[tuple[pika.BasicProperties, bytes]]:
    """Every message of the queue, in its order."""
    taken = []
    with queue.channel() as channel:
        while (got := channel.basic_get(queue.name, auto_ack=True))[0] is not None:
            taken.append(got[1:])
    return taken


def test_what_an_earlier_version_refused_counts_after_it_was_sent_again(
    database: Database, results: Results, start_service: Start, run: Run
) -> None:
    """Each reason and identity; what is no vote for this version either stays. A second run sends nothing."""
    for choice, count in (("oui", 150), ("non", 40)):
        for _ in range(count):
            keep(database, "message_id_mismatch", vote(choice=choice), message_id=str(uuid.uuid4()))
    keep(database, "content_encoding", *(vote(choice="non") for _ in range(5)))
    keep(database, "content_encoding", without_id(), message_id=vote()["vote_id"])  # named by its message
    keep(database, "bad_vote_id", *(vote(vote_id=vote()["vote_id"].upper()) for _ in range(3)))
    keep(database, "missing_vote_id", *(without_id(voter_hash=voter()) for _ in range(4)))
    keep(database, "bad_vote_id", vote(vote_id="7"))
    keep(database, "not_json", b"not asked for")
    start_service()

    done = run("republish", *ASKED)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.splitlines()[-1] == "203 sent, each confirmed by the broker"
    wait_until(lambda: results.counted() >= 203, "all are counted")
    assert results.totals() == results.audited() == {"law-001": (158, 45)}

    again = run("republish", *ASKED, "--json")
    assert again.returncode == 0
    assert numbers(again) == {
        "content_encoding": {"kept": 6, "sent": 0, "counted": 6, "certified": 0, "unreadable": 0},
        "message_id_mismatch": {"kept": 190, "sent": 0, "counted": 190, "certified": 0, "unreadable": 0},
        "bad_vote_id": {"kept": 4, "sent": 0, "counted": 3, "certified": 0, "unreadable": 1},
        "missing_vote_id": {"kept": 4, "sent": 0, "counted": 4, "certified": 0, "unreadable": 0},
    }
    assert results.rejected() == {name: row["kept"] for name, row in numbers(again).items()} | {"not_json": 1}
    assert results.duplicates() == {}


def test_a_copy_that_is_on_the_queue_already_counts_once(
    database: Database, results: Results, declared: Queue, start_service: Start, run: Run
) -> None:
    """Two runs before the service has counted, and a body that is kept under two message_ids."""
    cast = vote()
    keep(database, "message_id_mismatch", cast, vote(), message_id="1")
    keep(database, "message_id_mismatch", cast, message_id="2")
    for _ in range(2):
        assert run("republish", "--reason", "message_id_mismatch").returncode == 0
    assert declared.ready() == 6
    start_service()
    wait_until(lambda: sum(results.duplicates().values()) == 4, "the copies are recorded")
    assert (results.totals(), results.duplicates()) == ({"law-001": (2, 0)}, {"duplicate": 4})


def test_a_message_goes_out_as_it_came(database: Database, results: Results, declared: Queue, run: Run) -> None:
    """Body and message_id to the byte, persistent, without encoding, dated when it was refused, oldest first."""
    strange = 'a "\u00e9"\\\r\n\x1b\0'
    bodies = [b" " + json.dumps(vote(note="\u00fc")).encode() + b"\n", json.dumps(vote(), ensure_ascii=False).encode()]
    keep(database, "message_id_mismatch", bodies[0], message_id=strange)
    keep(database, "content_encoding", bodies[1])
    digests = [hashlib.sha256(body).digest() for body in bodies]
    for digest, moment in zip(digests, (MOMENT, MOMENT - timedelta(days=1)), strict=True):
        results.query("UPDATE rejected_messages SET first_seen_at = %s WHERE body_sha256 = %s", moment, digest)

    assert run("republish", *ASKED).returncode == 0
    (first, first_body), (second, second_body) = take_all(declared)
    assert [first_body, second_body] == bodies[::-1]
    assert [first.message_id, second.message_id] == [None, strange]
    assert [first.timestamp, second.timestamp] == [int(MOMENT.timestamp()) - 86_400, int(MOMENT.timestamp())]
    for properties in (first, second):
        assert (properties.delivery_mode, properties.content_encoding, properties.headers) == (2, None, None)


def array(*elements: dict[str, Any] | bytes) -> bytes:
    texts = [element if isinstance(element, bytes) else json.dumps(element).encode() for element in elements]
    return b" [%b]\n" % b" , ".join(texts)


def test_arrays_are_sent_as_they_came_if_a_vote_of_them_may_count(
    database: Database, results: Results, declared: Queue, start_service: Start, run: Run
) -> None:
    """Those of which each vote is counted, of a certified law, or unreadable, stay; a vote of an array goes alone."""
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-9', 'Nine', 'closed')")
    results.certify("law-9")
    counted, deep = vote(), b'{"x":' + b"[" * 65 + b"]" * 65 + b"}"
    database.batch_update_results([Vote.from_message(json.dumps(counted).encode())], [])
    sent = [
        array(vote(), vote(choice="non")),
        array(b"7", counted, vote("law-9"), vote("l\u00e9"), vote()),
        array(*(vote() for _ in range(90))),
        array(deep, vote()),
        array(b'{"x": 1, "x": 2}', vote()),
    ]
    keep(database, "not_an_object", sent[0], message_id="anything")
    keep(database, "not_an_object", sent[1])
    keep(database, "too_many_members", sent[2])
    keep(database, "too_deep", sent[3], array(deep, {}), b"[" * 65_000)
    keep(database, "duplicate_key", sent[4])
    keep(database, "not_an_object", array(counted), array(counted, b"7"), array(vote("law-9"), b"7"))
    keep(database, "not_an_object", array(vote("law-9"), counted), array(b"7", vote(choice="OUI")), b"[]", b"7")
    whole = array(*(vote() for _ in range(900)))
    keep(
        database,
        "too_many_members",
        CutBody.of(whole[: MAX_BODY_BYTES + 1], hashlib.sha256(whole).digest(), len(whole)),
    )

    done = run("republish", *ASKED_FOR_ARRAYS)
    assert (done.returncode, done.stderr) == (0, ""), done
    told = done.stdout.splitlines()
    assert [line.split() for line in told[1:5]] == [
        ["duplicate_key", "1", "1", "0", "0", "0"],
        ["not_an_object", "9", "2", "2", "2", "3"],
        ["too_deep", "3", "1", "0", "0", "2"],
        ["too_many_members", "2", "1", "0", "0", "1"],
    ]
    assert [line for line in told if line.startswith("not sent")] == [
        f"not sent, 1 of not_an_object: empty_array, {REASONS['empty_array']}",
        f"not sent, 2 of not_an_object: not_an_object, {REASONS['not_an_object']}",
        f"not sent, 1 of too_deep: not_json, {REASONS['not_json']}",
        f"not sent, 1 of too_deep: too_deep, {REASONS['too_deep']}",
        f"not sent, 1 of too_many_members: not_whole, {republish.NOT_WHOLE_MEANS}",
    ]
    taken = take_all(declared)
    assert [body for _, body in taken] == sent
    assert [properties.message_id for properties, _ in taken] == ["anything", None, None, None, None]

    declared.publish(*sent)
    start_service()
    wait_until(lambda: results.counted() == 96, "what may count is counted")
    one_of_an_array = vote()
    keep(database, "refused_by_database", one_of_an_array)
    assert numbers(run("republish", "--reason", "refused_by_database", "--json"))["refused_by_database"]["sent"] == 1
    wait_until(lambda: results.counted() == 97, "so is the vote by itself")
    again = numbers(run("republish", *ASKED_FOR_ARRAYS, "--json"))
    assert [row["sent"] for row in again.values()] == [0, 0, 0, 0]


def test_arrays_that_a_replica_of_version_1_refused_count_after_it_is_gone(
    queue: Queue, results: Results, start_service: Start, run: Run, tmp_path: Path
) -> None:
    """Beside one that reads them, on one queue: each array is counted or kept whole, none of it is lost or counted
    twice.
    """
    before = Service(tmp_path, "version-1", queue, results, {}, VERSION_1.build(tmp_path / "version-1"))
    with before:
        start_service()
        votes = [[vote(f"law-{size}") for _ in range(size)] for size in (2, 7, 40, 120) * 10]
        queue.publish(*[array(*each) for each in votes], *[vote("law-1") for _ in range(20)])
        number = 20 + sum(map(len, votes))
        kept = "SELECT coalesce(sum(jsonb_array_length(convert_from(body, 'UTF8')::jsonb)), 0) FROM rejected_messages"
        wait_until(lambda: results.counted() + results.value(kept) == number, "all are counted or kept")
        refused = results.rejected()
        assert refused.keys() == {"not_an_object", "too_many_members"}
        assert 0 < results.counted() < number
        assert before.stop() == 0
    assert run("republish", *ASKED_FOR_ARRAYS).returncode == 0
    wait_until(lambda: results.counted() >= number, "all are counted")
    expected = {f"law-{size}": (10 * size, 0) for size in (120, 2, 40, 7)} | {"law-1": (20, 0)}
    assert results.totals() == results.audited() == expected
    assert (results.duplicates(), results.rejected()) == ({}, refused)


def test_of_two_votes_of_one_voter_the_one_that_came_first_counts(
    database: Database, results: Results, start_service: Start, run: Run
) -> None:
    """As it would have, had the version before read them."""
    choices = ["oui", "non"] * 5
    for number, choice in enumerate(choices):
        of_voter = {"voter_hash": f"{number:032}"}
        for later, each in enumerate((choice, "non" if choice == "oui" else "oui")):
            body = json.dumps(vote(choice=each, **of_voter)).encode()
            keep(database, "content_encoding", body)
            moment = MOMENT + timedelta(hours=later)
            digest = hashlib.sha256(body).digest()
            results.query("UPDATE rejected_messages SET first_seen_at = %s WHERE body_sha256 = %s", moment, digest)
    start_service()
    assert run("republish", *ASKED).returncode == 0
    wait_until(lambda: results.duplicates() == {"second_vote": 10}, "the second ones are recorded")
    audited = results.query("SELECT voter_hash, choice FROM vote_audit ORDER BY voter_hash")
    assert audited == [(f"{number:032}", choice) for number, choice in enumerate(choices)]


def test_bodies_that_are_no_votes_are_named_and_not_sent(
    database: Database, results: Results, declared: Queue, run: Run
) -> None:
    """Compressed ones, one that was cut, one that somebody has changed."""
    packed = [gzip.compress(json.dumps(vote()).encode()) for _ in range(7)]
    whole = b"x" * (2 * MAX_BODY_BYTES)
    cut = CutBody.of(whole[: MAX_BODY_BYTES + 1], hashlib.sha256(whole).digest(), len(whole))
    keep(database, "content_encoding", *packed, cut)
    changed = json.dumps(vote(choice="oui")).encode()
    keep(database, "bad_vote_id", changed)
    results.query(
        "UPDATE rejected_messages SET body = replace(body::text, '6f7569', '6e6f6e')::bytea WHERE body = %s", changed
    )

    done = run("republish", *ASKED)
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.splitlines()
    assert told[-1] == "0 sent, each confirmed by the broker"
    assert "not sent, 7 of content_encoding: not_utf8, the body is not UTF-8" in told
    assert "  and 2 more" in told
    for reason, digest in (
        ("content_encoding", cut.sha256.hex()),
        ("bad_vote_id", hashlib.sha256(changed).hexdigest()),
    ):
        line = told.index(f"not sent, 1 of {reason}: not_whole, {republish.NOT_WHOLE_MEANS}")
        assert told[line + 1] == f"  sha256 {digest}"
    named = {line.removeprefix("  sha256 ") for line in told if line.startswith("  sha256 ")}
    assert len(named & {hashlib.sha256(body).hexdigest() for body in packed}) == 5
    assert declared.ready() == 0


def test_a_vote_counts_in_a_law_that_closed_after_it_was_refused(
    database: Database, results: Results, start_service: Start, run: Run
) -> None:
    """Though it says no moment itself; one that was refused after the close stays outside, under its first reason."""
    in_time, late = vote("law-1"), vote("law-1", "non")
    keep(database, "content_encoding", in_time, late)
    results.query(
        "UPDATE rejected_messages SET first_seen_at = now() - interval '3 hours'"
        " WHERE convert_from(body, 'UTF8') ~ 'oui'"
    )
    results.query(
        "INSERT INTO laws (law_id, title, opens_at, closes_at)"
        " VALUES ('law-1', 'One', now() - interval '4 hours', now() - interval '2 hours')"
    )
    start_service()
    assert numbers(run("republish", *ASKED, "--json"))["content_encoding"]["sent"] == 2
    seen = "SELECT times_seen FROM rejected_messages WHERE convert_from(body, 'UTF8') ~ 'non'"
    wait_until(lambda: results.counted() == 1 and results.value(seen) == 2, "both are judged")
    assert (results.totals(), results.rejected()) == ({"law-1": (1, 0)}, {"content_encoding": 2})


def test_votes_of_a_certified_law_are_left_out(database: Database, results: Results, declared: Queue, run: Run) -> None:
    """They would only be refused; the others go."""
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-1', 'One', 'closed')")
    results.certify("law-1")
    keep(database, "content_encoding", vote("law-1"), vote("law-1"), vote("law-2"))
    keep(database, "certified", vote("law-1"))
    done = run("republish", "--reason", "content_encoding", "--reason", "certified", "--json")
    assert numbers(done) == {
        "certified": {"kept": 1, "sent": 0, "counted": 0, "certified": 1, "unreadable": 0},
        "content_encoding": {"kept": 3, "sent": 1, "counted": 0, "certified": 2, "unreadable": 0},
    }
    assert declared.ready() == 1


def test_a_vote_that_counts_with_another_content_is_sent(
    database: Database, results: Results, start_service: Start, run: Run
) -> None:
    """So that the service records the conflict."""
    start_service()
    cast = vote()
    keep(database, "message_id_mismatch", cast)
    assert run("republish", *ASKED).returncode == 0
    wait_until(results.counted, "it is counted")
    keep(database, "message_id_mismatch", cast | {"choice": "non"})
    assert numbers(run("republish", *ASKED, "--json"))["message_id_mismatch"]["sent"] == 1
    wait_until(lambda: results.duplicates() == {"conflict": 1}, "the conflict is recorded")


def test_a_dry_run_sends_nothing_and_needs_no_broker(
    database: Database, results: Results, declared: Queue, run: Run
) -> None:
    """It says what would be sent."""
    keep(database, "content_encoding", vote(), vote(), b"\x1f\x8b")
    done = run("republish", *ASKED, "--dry-run", **NOWHERE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "2 would be sent"
    assert declared.ready() == 0
    planned = numbers(run("republish", *ASKED, "--dry-run", "--json", **NOWHERE))
    assert planned["content_encoding"] == {"kept": 3, "to_send": 2, "counted": 0, "certified": 0, "unreadable": 1}


def test_a_lost_connection_is_no_loss(
    database: Database, results: Results, declared: Queue, services: LocalServices, start_service: Start, run: Run
) -> None:
    """It says what was confirmed, and may be run again; the one whose confirm was lost counts once."""
    keep(database, "message_id_mismatch", *(vote() for _ in range(20)))
    with TcpProxy(("127.0.0.1", services.rabbitmq.port), AmqpWatcher) as proxy:
        login = urlsplit(declared.url).netloc.rpartition("@")[0]
        url = f"amqp://{login}@127.0.0.1:{proxy.port}{urlsplit(declared.url).path}"
        cut = proxy.on("confirm seen", Link.cut, nth=8)
        broken = run("republish", *ASKED, "--json", AMQP_URL=url)
        assert cut.done.wait(30)
    assert (broken.returncode, numbers(broken)["message_id_mismatch"]["sent"]) == (3, 7), broken
    assert "the broker cannot be reached, or no more" in broken.stderr
    start_service()
    assert run("republish", *ASKED).returncode == 0
    wait_until(lambda: results.counted() >= 20, "all are counted")
    assert results.totals() == results.audited() == {"law-001": (20, 0)}


def test_a_broker_that_cannot_be_reached_or_refuses_the_user_exits_with_3(
    database: Database, queue: Queue, run: Run
) -> None:
    """Nothing is said to be sent."""
    keep(database, "content_encoding", vote())
    parts = urlsplit(queue.url)
    wrong = f"amqp://{parts.username}:wrong@{parts.hostname}:{parts.port}{parts.path}"
    for url, told in ((NOWHERE["AMQP_URL"], "the broker cannot be reached"), (wrong, "a right is missing")):
        done = run("republish", *ASKED, AMQP_URL=url)
        assert (done.returncode, told in done.stderr) == (3, True), done
        assert done.stdout.splitlines()[-1] == "0 sent, each confirmed by the broker"


def test_a_queue_that_takes_no_message_exits_with_1(database: Database, queue: Queue, run: Run) -> None:
    """None of the name, or a full one: the broker's confirm alone makes a message sent."""
    keep(database, "content_encoding", vote(), vote())
    done = run("republish", *ASKED)
    assert (done.returncode, f"there is no queue {queue.name}" in done.stderr) == (1, True), done
    with queue.connect() as connection:
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        connection.channel().queue_declare(queue.name, durable=True, arguments=arguments)
        done = run("republish", *ASKED, "--json")
        assert (done.returncode, "takes no more" in done.stderr) == (1, True), done
        assert numbers(done)["content_encoding"]["sent"] == 1
        assert connection.channel().queue_declare(queue.name, passive=True).method.message_count == 1


def test_a_reason_that_nobody_knows_exits_with_2_and_names_those_that_are_kept(database: Database, run: Run) -> None:
    """One that is known and of which there is no message is no mistake."""
    keep(database, "not_json", b"1", b"2")
    keep(database, "of_a_later_version", b"3")
    done = run("republish", "--reason", "gzip", "--reason", "not_json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no message has the reason gzip; kept are: not_json 2, of_a_later_version 1\n"
    known = ("message_id_mismatch", "refused_by_database", "outside_window", "of_a_later_version")
    assert run("republish", *(f"--reason={reason}" for reason in known), **NOWHERE).returncode == 0
