"""Compare, recount, law windows, certificates, results and replay, on real servers."""

from __future__ import annotations

import concurrent.futures
import csv
import io
import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pika
import psycopg2
import pytest

from database import Database
from observability import SELECT_DIFFERENCE
from scripts.local_services import LocalServices
from test_publisher import Publisher, in_arrays, make_messages, totals_of
from tests.conftest import empty_database, empty_queue
from tests.harness import ROOT, Queue, Results, Service, check_exact, vote, wait_settled, wait_until
from tests.integration.test_few_rights import PASSWORD, set_up_database, with_login
from votes import Vote

Start = Callable[..., Service]
Run = Callable[..., subprocess.CompletedProcess[str]]
NOW = datetime.now(UTC)
NOWHERE = {"AMQP_URL": "amqp://votes:x@127.0.0.1:1/", "RABBITMQ_MANAGEMENT_URL": "http://127.0.0.1:1"}
MIGRATED = Path(__file__).with_name("init_db_v1.sql")


def count(database: Database, *bodies: dict[str, Any], held_since: float | None = None) -> list[tuple[str, str | None]]:
    """Write one batch; reason and law of what was rejected."""
    votes = [Vote.from_message(json.dumps(body).encode()) for body in bodies]
    return [(kept.reason, kept.law_id) for kept in database.batch_update_results(votes, [], held_since).rejected]


def put_law(results: Results, law_id: str, **columns: Any) -> None:
    columns = {"law_id": law_id, "title": f"Title of {law_id}"} | columns
    names, marks = ", ".join(columns), ", ".join(["%s"] * len(columns))
    results.query(f"INSERT INTO laws ({names}) VALUES ({marks})", *columns.values())


# --- compare and recount ---


def test_reconcile_shows_each_law_and_what_is_beside_it(database: Database, run: Run, queue: Queue) -> None:
    """Exit code 0 where all agree; in words and in JSON."""
    copy = vote("law-1", "non")
    count(database, vote("law-1"), copy, vote("law-2"), copy)
    with queue.channel():
        pass  # declares it
    queue.publish(vote("law-3"))
    report = json.loads(wait_until(lambda: known(run("--json")), "the management API has figures"))
    assert [(law["law_id"], law["totals"], law["difference"]) for law in report["laws"]] == [
        ("law-1", {"oui": 1, "non": 1}, {"oui": 0, "non": 0}),
        ("law-2", {"oui": 1, "non": 0}, {"oui": 0, "non": 0}),
    ]
    assert (report["agrees"], report["duplicates"], report["rejected"]) == (True, {"duplicate": 1}, {})
    assert report["queue"] == {"ready": 1, "unacked": 0, "problem": None}
    done = run()
    assert done.returncode == 0
    assert "2 laws, no difference" in done.stdout
    assert "ready 1, unacked 0" in done.stdout


def known(done: subprocess.CompletedProcess[str]) -> str | None:
    return done.stdout if json.loads(done.stdout)["queue"]["unacked"] is not None else None


def test_reconcile_counts_voter_hashes_that_differ_only_by_case(database: Database, run: Run) -> None:
    """Each counts, since a hash is opaque; that a voter may have voted twice is said."""
    hashes = ["deadbeef00000000", "DEADBEEF00000000", "DeadBeef00000000", "cafe000000000000", "CAFE000000000000"]
    votes = [("law-001", voter) for voter in hashes] + [("law-002", "deadbeef00000000"), ("law-003", "c" * 16)]
    count(database, *(vote(law_id, voter_hash=voter) for law_id, voter in votes))
    done = run()
    assert "law-001: voters counted more than once, by a voter_hash in upper and lower case: 2" in done.stdout
    assert "law-002:" not in done.stdout
    assert json.loads(run("--json").stdout)["voters_by_case"] == {"law-001": 2}


def test_reconcile_says_where_it_cannot_ask_the_broker(database: Database, run: Run, queue: Queue) -> None:
    """The totals are compared all the same."""
    count(database, vote())
    with queue.channel():
        pass  # declares it
    for settings, reason in (
        (NOWHERE, "cannot be asked"),
        ({"RABBITMQ_MANAGEMENT_URL": ""}, "RABBITMQ_MANAGEMENT_URL is not set"),
        ({"RABBITMQ_MANAGEMENT_URL": "http://127.0.0.1:1"}, "does not tell"),
        ({"AMQP_URL": ""}, "RABBITMQ_PASSWORD is not set"),
    ):
        done = run(**settings)
        assert (done.returncode, reason in done.stdout, "not known" in done.stdout) == (0, True, True), done


def test_reconcile_names_laws_that_differ_and_by_how_much(database: Database, run: Run, results: Results) -> None:
    """Also a law without a total, and a total without votes."""
    count(database, vote("law-1"), vote("law-2"), vote("law-3"))
    results.query("UPDATE vote_results SET oui_count = 5 WHERE law_id = 'law-1'")
    results.query("DELETE FROM vote_results WHERE law_id = 'law-2'")
    results.query("INSERT INTO vote_results VALUES ('law-4', 0, 2)")
    done = run("--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["differing"]) == (1, ["law-1", "law-2", "law-4"])
    assert [law["difference"] for law in report["laws"] if law["law_id"] in report["differing"]] == [
        {"oui": 4, "non": 0},
        {"oui": -1, "non": 0},
        {"oui": 0, "non": 2},
    ]
    shown = run().stdout
    assert "3 of 4 laws differ" in shown
    assert "+4" in shown


def test_a_recount_corrects_only_with_apply_and_is_recorded(database: Database, run: Run, results: Results) -> None:
    """One law, or all."""
    count(database, vote("law-1"), vote("law-2"), vote("law-3"))
    results.query("UPDATE vote_results SET oui_count = 5 WHERE law_id IN ('law-1', 'law-2')")
    results.query("DELETE FROM vote_results WHERE law_id = 'law-3'")
    results.query("INSERT INTO vote_results VALUES ('law-4', 0, 2)")
    before = results.totals()
    assert run("--recount", "law-1").returncode == 1
    assert run("--recount", "--all").returncode == 1
    assert results.totals() == before
    assert run("--recount", "law-1", "--apply").returncode == 0
    assert results.totals() == before | {"law-1": (1, 0)}
    assert run("--recount", "--all", "--apply").returncode == 0
    assert results.totals() == {"law-1": (1, 0), "law-2": (1, 0), "law-3": (1, 0), "law-4": (0, 0)}
    rows = results.query(
        "SELECT law_id, oui_before, non_before, oui_after, non_after FROM recounts ORDER BY recount_id"
    )
    assert rows == [("law-1", 5, 0, 1, 0), ("law-2", 5, 0, 1, 0), ("law-3", 0, 0, 1, 0), ("law-4", 0, 2, 0, 0)]
    assert results.value("SELECT bool_and(recounted_by LIKE session_user || ' (%%') FROM recounts")
    assert run("--recount", "--all", "--apply").returncode == 0
    assert results.value("SELECT count(*) FROM recounts") == 4, "nothing differed"
    assert "there is no vote for law-9" in run("--recount", "law-9").stdout


def test_totals_are_put_right_while_three_replicas_count(
    queue: Queue, results: Results, start_service: Start, services: LocalServices, run: Run
) -> None:
    """Again and again spoiled and recounted: exact in the end, no deadlock, and no batch given up."""
    replicas = [start_service(BATCH_SIZE="50", BATCH_TIMEOUT_SECONDS="0.05") for _ in range(3)]
    messages = list(make_messages(30_000, 4, 5, 5, 1))
    publisher = Publisher([queue.url], queue.name, rate=4_000)
    applied = 0

    def spoil_and_recount(_publisher: Publisher) -> None:
        nonlocal applied
        results.query("UPDATE vote_results SET oui_count = oui_count + 1000 WHERE law_id = 'law-001'")
        done = run("--recount", "--all", "--apply", "--json")
        assert done.returncode == 0, done.stderr
        applied += json.loads(done.stdout)["applied"]

    publisher._on_tick = spoil_and_recount
    assert publisher.publish(messages).all_confirmed
    wait_settled(services, queue, 120)
    assert applied > 5, "the test is about recounts under load"
    check_exact(results, messages)
    assert run().returncode == 0
    name = results.value("SELECT current_database()")
    assert results.value("SELECT deadlocks FROM pg_stat_database WHERE datname = %s", name) == 0
    assert not any(replica.says("batch not written") for replica in replicas)


# --- law windows ---


def test_a_vote_outside_the_window_of_its_law_is_kept_and_not_counted(database: Database, results: Results) -> None:
    """The first moment is inside, the last one is not; no bound, and no law, is no limit."""
    opens, closes = NOW - timedelta(hours=2), NOW - timedelta(hours=1)
    put_law(results, "both", opens_at=opens, closes_at=closes)
    put_law(results, "from", opens_at=opens)
    put_law(results, "until", closes_at=closes)
    put_law(results, "free")
    tick = timedelta(microseconds=1)
    moments = (opens - tick, opens, closes - tick, closes)
    laws = ("both", "from", "until", "free", "unknown")
    bodies = {(law, moment): vote(law, timestamp=moment.isoformat()) for law in laws for moment in moments}
    refused = {("both", moments[0]), ("both", moments[3]), ("from", moments[0]), ("until", moments[3])}
    assert count(database, *bodies.values()) == [
        ("outside_window", law) for law, moment in bodies if (law, moment) in refused
    ]
    assert {law: oui for law, (oui, _) in results.totals().items()} == {
        "both": 2, "from": 3, "until": 3, "free": 4, "unknown": 4
    }  # fmt: skip
    kept = {
        json.loads(bytes(body))["vote_id"]: law
        for body, law in results.query("SELECT body, law_id FROM rejected_messages WHERE reason = 'outside_window'")
    }
    assert kept == {bodies[key]["vote_id"]: key[0] for key in refused}


def test_without_a_timestamp_the_time_of_receipt_counts(database: Database, results: Results) -> None:
    """That is when the first vote of the batch came, so that a slow flush closes nobody out."""
    put_law(results, "closed", closes_at=datetime.now(UTC) - timedelta(seconds=5))
    assert count(database, vote("closed")) == [("outside_window", "closed")]
    assert count(database, vote("closed"), held_since=time.monotonic() - 60) == []
    put_law(results, "opens", opens_at=datetime.now(UTC) + timedelta(hours=1))
    assert count(database, vote("opens")) == [("outside_window", "opens")]
    assert results.totals() == {"closed": (1, 0)}


def test_closing_a_law_without_a_moment_closes_it_now(database: Database, results: Results) -> None:
    """So that there is one rule, by the window."""
    put_law(results, "law-1")
    assert count(database, vote("law-1")) == []
    results.query("UPDATE laws SET status = 'closed' WHERE law_id = 'law-1'")
    assert results.value("SELECT closes_at <= now() FROM laws")
    assert count(database, vote("law-1")) == [("outside_window", "law-1")]
    assert count(database, vote("law-1", timestamp=(NOW - timedelta(days=1)).isoformat())) == [], "cast in time"
    put_law(results, "early", status="closed", opens_at=datetime.now(UTC) + timedelta(days=1))
    assert count(database, vote("early")) == [("outside_window", "early")]


def test_what_was_counted_stays_a_copy_when_its_law_closes(database: Database, results: Results) -> None:
    """A redelivery of it is not filed as late; and a vote that was late counts when it comes again in time."""
    early = vote("law-1")
    count(database, early)
    put_law(results, "law-1", status="closed")
    assert count(database, early) == []
    assert results.duplicates() == {"duplicate": 1}
    late = vote("law-1")
    assert count(database, late, late, vote("law-2")) == [("outside_window", "law-1")] * 2
    assert results.query("SELECT times_seen FROM rejected_messages") == [(2,)]
    results.query("UPDATE laws SET status = 'open', closes_at = NULL")
    assert count(database, late) == []
    assert results.totals() == {"law-1": (2, 0), "law-2": (1, 0)}


def test_a_voters_late_vote_does_not_stand_in_the_way_of_the_timely_one(database: Database, results: Results) -> None:
    """Both in one batch, the late one first."""
    put_law(results, "law-1", closes_at=NOW)
    voter = {"voter_hash": "v" * 16}
    late = vote("law-1", timestamp=(NOW + timedelta(seconds=1)).isoformat(), **voter)
    timely = vote("law-1", "non", timestamp=(NOW - timedelta(seconds=1)).isoformat(), **voter)
    assert count(database, late, timely) == [("outside_window", "law-1")]
    assert results.totals() == {"law-1": (0, 1)}
    assert results.duplicates() == {}


def test_late_votes_of_one_body_are_kept_one_by_one(queue: Queue, results: Results, start_service: Start) -> None:
    """Told apart by message_id alone, and counted in the metric; they leave the queue."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    put_law(results, "law-1", closes_at=NOW)
    ids = [str(uuid.uuid4()) for _ in range(3)]
    for message_id in ids:
        queue.publish({"law_id": "law-1", "choice": "oui"}, message_id=message_id)
    wait_until(lambda: results.rejected() == {"outside_window": 3}, "all are kept")
    wait_until(lambda: service.metric("votes_rejected_total", reason="outside_window") == 3, "the metric tells")
    assert {row[0] for row in results.query("SELECT message_id FROM rejected_messages")} == {*ids}
    wait_until(lambda: queue.ready() == 0, "the queue is empty")
    assert results.totals() == {}


# --- certify ---


CERTIFY_WITHOUT_PATIENCE = """
import functools, sys
import reconcile
reconcile.certify = functools.partial(reconcile.certify, settle_seconds=0)
sys.exit(reconcile.main(sys.argv[1:]))
"""


@pytest.fixture
def certify(run: Run, idle_queue: Queue) -> Run:
    """`reconcile.py certify` on the idle queue; or on one that is named, then with all the patience that users have."""

    def certify(law_id: str = "law-1", **settings: str) -> subprocess.CompletedProcess[str]:
        code = "" if "RABBITMQ_QUEUE" in settings else CERTIFY_WITHOUT_PATIENCE
        settings = {"RABBITMQ_QUEUE": idle_queue.name} | settings
        return run("certify", law_id, "--by", "the committee", code=code, **settings)

    return certify


@pytest.fixture
def closed(database: Database, results: Results) -> str:
    """A closed law with three votes, not sealed yet."""
    count(database, vote("law-1"), vote("law-1", "non"), vote("law-1"), vote("law-2"))
    put_law(results, "law-1", status="closed")
    return "law-1"


def refuses(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert reason in done.stderr


def test_a_certificate_says_all_of_it(
    closed: str, database: Database, run: Run, certify: Run, results: Results
) -> None:
    """It is printed, kept, and final; certifying again is refused."""
    copy = vote(closed)
    late = vote(closed, timestamp=(NOW + timedelta(hours=1)).isoformat())
    count(database, copy | {"timestamp": (NOW - timedelta(hours=1)).isoformat()}, late)
    count(database, copy | {"timestamp": (NOW - timedelta(hours=1)).isoformat()})
    sealed = run("seal").stdout.split()[-1]
    done = certify()
    assert done.returncode == 0, done
    certificate = json.loads(done.stdout)
    assert {name: certificate[name] for name in ("law_id", "title", "oui", "non", "total", "seal")} == {
        "law_id": closed, "title": "Title of law-1", "oui": 3, "non": 1, "total": 4, "seal": sealed,
    }  # fmt: skip
    assert certificate["duplicates"] == {"duplicate": 1}
    assert certificate["rejected"] == {"outside_window": 1}
    assert certificate["certified_by"].endswith("for the committee")
    assert len(bytes.fromhex(certificate["salt"])) == 32
    assert results.query("SELECT certificate FROM certified_results") == [(certificate,)]
    assert results.value("SELECT status FROM laws WHERE law_id = 'law-1'") == "certified"
    refuses(certify(), "certified already")
    shown = json.loads(run("results", "--json").stdout)["laws"]
    assert [(law["law_id"], law["total"], law["status"]) for law in shown] == [
        (closed, 4, "certified"),
        ("law-2", 1, "open"),
    ]


def test_certify_refuses_a_law_that_is_not_closed(closed: str, run: Run, certify: Run, results: Results) -> None:
    """Open, open until tomorrow, or not known."""
    run("seal")
    put_law(results, "law-2")
    refuses(certify("law-2"), "law-2 is not closed")
    results.query("UPDATE laws SET closes_at = now() + interval '1 day' WHERE law_id = 'law-2'")
    refuses(certify("law-2"), "law-2 is not closed")
    refuses(certify("law-9"), "law-9 is not closed")


def test_certify_refuses_while_the_queue_holds_messages(closed: str, run: Run, certify: Run, queue: Queue) -> None:
    """Any: nobody knows for which law they are."""
    run("seal")
    queue.publish(vote("law-2"))
    refuses(certify(RABBITMQ_QUEUE=queue.name), "the queue holds 1 messages")


def test_certify_refuses_while_a_message_is_unacked(
    closed: str, run: Run, certify: Run, queue: Queue, results: Results
) -> None:
    """Held by a consumer that does not ack."""
    run("seal")
    queue.publish(vote("law-1"))
    holder = pika.BlockingConnection(pika.URLParameters(queue.url))
    try:
        assert holder.channel().basic_get(queue.name)[0] is not None
        assert queue.ready() == 0
        refuses(certify(RABBITMQ_QUEUE=queue.name), "1 are delivered and not acked")
    finally:
        holder.close()
    assert results.query("SELECT * FROM certified_results") == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"RABBITMQ_MANAGEMENT_URL": ""}, "RABBITMQ_MANAGEMENT_URL is not set"),
        ({"RABBITMQ_MANAGEMENT_URL": "http://127.0.0.1:1"}, "does not tell"),
        (NOWHERE, "cannot be asked"),
        ({"RABBITMQ_QUEUE": "no-such-queue"}, "no-such-queue"),
    ],
)
def test_certify_refuses_where_the_broker_cannot_be_asked(
    settings: dict[str, str], reason: str, closed: str, run: Run, certify: Run
) -> None:
    """What is not known may not be assumed."""
    run("seal")
    refuses(certify(**settings), reason)


def test_certify_refuses_what_is_not_sealed(closed: str, run: Run, certify: Run, database: Database) -> None:
    """No seal at all, and one that does not cover the last vote."""
    refuses(certify(), "3 votes of law-1 are not sealed yet")
    run("seal")
    count(database, vote("law-1", timestamp=(NOW - timedelta(hours=1)).isoformat()))
    refuses(certify(), "1 votes of law-1 are not sealed yet")


def test_certify_refuses_a_total_that_is_not_the_logs(closed: str, run: Run, certify: Run, results: Results) -> None:
    """Its own, or that of another law."""
    run("seal")
    results.query("UPDATE vote_results SET oui_count = 3 WHERE law_id = 'law-1'")
    refuses(certify(), "the log has oui 2")
    results.query("UPDATE vote_results SET oui_count = 2 WHERE law_id = 'law-1'")
    results.query("UPDATE vote_results SET oui_count = 2 WHERE law_id = 'law-2'")
    refuses(certify(), "do not verify: vote_results, law law-2")


def test_certify_refuses_a_log_that_was_tampered_with(closed: str, run: Run, certify: Run, results: Results) -> None:
    """The place is named."""
    run("seal")
    results.query("ALTER TABLE vote_audit DISABLE TRIGGER ALL; UPDATE vote_audit SET instance = 'x'")
    refuses(certify(), "do not verify: seal 1, row 1")


def test_a_vote_after_the_certificate_changes_nothing(
    closed: str, run: Run, certify: Run, results: Results, queue: Queue, start_service: Start, services: LocalServices
) -> None:
    """Even one that was cast in time: it is kept, with the reason."""
    run("seal")
    assert certify().returncode == 0
    start_service(BATCH_TIMEOUT_SECONDS="0.05")
    queue.publish(vote("law-1", timestamp=(NOW - timedelta(hours=1)).isoformat()), vote("law-1"), vote("law-3"))
    wait_settled(services, queue)
    assert results.rejected() == {"certified": 2}
    assert results.totals() == results.audited() == {"law-1": (2, 1), "law-2": (1, 0), "law-3": (1, 0)}
    assert run().returncode == 0


def test_certifying_while_votes_come_in_leaves_no_vote_between(
    database: Database, run: Run, results: Results, queue: Queue, start_service: Start, services: LocalServices
) -> None:
    """Each vote is in the certificate or kept aside as too late, none in neither or both."""
    put_law(results, "law-001", status="closed", closes_at=NOW - timedelta(minutes=1))
    for _ in range(3):
        start_service(BATCH_SIZE="20", BATCH_TIMEOUT_SECONDS="0.02")
    with queue.channel():
        pass
    in_time = (NOW - timedelta(hours=1)).isoformat()
    thirty = [vote("law-001", timestamp=in_time) for _ in range(30)]
    queue.publish(*thirty)
    wait_settled(services, queue)
    certifying = subprocess.Popen(
        [sys.executable, "-c", CERTIFY_WITHOUT_WAITING, results.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    published = 30
    try:
        # between two of these it succeeds, at the latest after the last
        while certifying.poll() is None and published < 1_000:
            queue.publish(*({**body, "vote_id": str(uuid.uuid4())} for body in thirty[:5]))
            published += 5
        wait_settled(services, queue, 180)
        certificate = json.loads(certifying.communicate(timeout=180)[0])
    finally:
        certifying.kill()
        certifying.wait()
    assert sum(results.totals()["law-001"]) == certificate["total"]
    assert certificate["total"] + results.rejected().get("certified", 0) == published
    assert run().returncode == 0


# the check of the queue left out, since here the votes are to come in between
CERTIFY_WITHOUT_WAITING = """
import json, sys
import psycopg2
import reconcile, seals
reconcile.queue_reasons = lambda *_: []
while True:
    with seals.sealing_session(sys.argv[1]) as (reader, writer):
        seals.seal(reader, writer)
    conn = psycopg2.connect(sys.argv[1])
    try:
        print(json.dumps(reconcile.certify(conn, "law-001", {}, "a test")))
        break
    except reconcile.Refused as exc:
        print(exc, file=sys.stderr)
    finally:
        conn.close()
"""

ATTEMPTS = [
    "UPDATE vote_results SET oui_count = oui_count + 1 WHERE law_id = 'law-1'",
    "UPDATE vote_results SET oui_count = 0, non_count = 0",
    "UPDATE vote_results SET law_id = 'law-x' WHERE law_id = 'law-1'",
    "DELETE FROM vote_results WHERE law_id = 'law-1'",
    "TRUNCATE vote_results",
    "INSERT INTO vote_results VALUES ('law-1', 1, 0) ON CONFLICT (law_id) DO UPDATE SET oui_count = 9",
    "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered)"
    " VALUES (gen_random_uuid(), 'law-1', 'oui', 'x', false)",
    "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered, txid)"
    " VALUES (gen_random_uuid(), 'law-1', 'oui', 'x', false, 3)",
    "UPDATE vote_audit SET choice = 'oui' WHERE law_id = 'law-1'",
    "DELETE FROM vote_audit WHERE law_id = 'law-1'",
    "UPDATE laws SET status = 'open' WHERE law_id = 'law-1'",
    "DELETE FROM laws WHERE law_id = 'law-1'",
    "UPDATE certified_results SET oui_count = 9",
    "DELETE FROM certified_results",
    "TRUNCATE certified_results",
    "INSERT INTO certified_results SELECT 'law-2', 9, 9, now(), 'x', 1, '{}'",
    "INSERT INTO audit_seals SELECT 99, 0, 1, 0, '', '', now(), '', '', ''",
    "UPDATE sealed_totals SET oui_count = 9",
    "INSERT INTO recounts (recounted_by, law_id, oui_before, non_before, oui_after, non_after)"
    " VALUES ('x', 'law-1', 0, 0, 0, 0)",
    "ALTER TABLE vote_results DISABLE TRIGGER ALL",
    "ALTER TABLE vote_audit DISABLE TRIGGER vote_audit_certified",
    "DROP TRIGGER vote_results_certified_update ON vote_results",
    "CREATE OR REPLACE FUNCTION refuse_change_of_certified_total() RETURNS trigger LANGUAGE plpgsql"
    " AS 'BEGIN RETURN NULL; END'",
    "SET session_replication_role = replica",
    "CREATE TEMP TABLE certified_results (law_id text, oui_count bigint, non_count bigint);"
    " UPDATE vote_results SET oui_count = 0 WHERE law_id = 'law-1'",
    "SET search_path = pg_temp; UPDATE public.vote_results SET oui_count = 0 WHERE law_id = 'law-1'",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "MERGE INTO vote_results USING (VALUES ('law-1')) AS v (law_id) ON vote_results.law_id = v.law_id"
    " WHEN MATCHED THEN UPDATE SET oui_count = 9",
    "COPY vote_results FROM PROGRAM 'echo law-1'",
    "WITH x AS (UPDATE vote_results SET non_count = 7 WHERE law_id = 'law-1' RETURNING 1) SELECT * FROM x",
    "CREATE RULE r AS ON UPDATE TO certified_results DO INSTEAD NOTHING",
    "SELECT lo_import('/etc/passwd')",
]


def test_the_services_role_cannot_change_a_certified_law_in_any_way(
    closed: str, run: Run, certify: Run, results: Results
) -> None:
    """Each attempt is refused, and all numbers stay; the role can still count for other laws."""
    run("seal")
    assert certify().returncode == 0
    name = f"role-{uuid.uuid4().hex[:8]}"
    set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD)
    role = Results(with_login(results.url, name))
    before = certified_numbers(results)
    try:
        for attempt in ATTEMPTS:
            with pytest.raises(psycopg2.Error) as refused:
                role.query(attempt)
            assert refused.value.pgcode in ("42501", "40001"), (attempt, refused.value)
            assert certified_numbers(results) == before, attempt
        with Database(role.url, pool_min=1, pool_max=1, timeout=10, instance="x") as database:
            database.probe()
            assert database.read(SELECT_DIFFERENCE) == [(0,)]
            assert count(database, vote("law-1"), vote("law-2")) == [("certified", "law-1")]
        assert certified_numbers(results) == before
        assert results.totals()["law-2"] == (2, 0)
    finally:
        results.execute(f'DROP OWNED BY "{name}"')
        results.execute(f'DROP ROLE "{name}"')


def certified_numbers(results: Results) -> list[tuple[Any, ...]]:
    return results.query(
        "SELECT oui_count, non_count, (SELECT count(*) FROM vote_audit WHERE law_id = 'law-1'),"
        " (SELECT jsonb_agg(c) FROM certified_results AS c), (SELECT jsonb_agg(l) FROM laws AS l)"
        " FROM vote_results WHERE law_id = 'law-1'"
    )


@pytest.mark.parametrize("attempt", ATTEMPTS[:5] + ATTEMPTS[10:15])
def test_the_owner_is_stopped_by_the_triggers_too(
    attempt: str, closed: str, run: Run, certify: Run, results: Results
) -> None:
    """Unless they are switched off, which verify and the certificate then show."""
    run("seal")
    assert certify().returncode == 0
    before = certified_numbers(results)
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        results.query(attempt)
    assert certified_numbers(results) == before


def test_a_spoiled_total_of_a_certified_law_can_be_put_back_to_the_certificate(
    closed: str, run: Run, certify: Run, results: Results
) -> None:
    """And is shown as certified all the while."""
    run("seal")
    assert certify().returncode == 0
    results.query("ALTER TABLE vote_results DISABLE TRIGGER ALL; UPDATE vote_results SET oui_count = 9;"
                  " ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_update")  # fmt: skip
    assert run().returncode == 1
    assert json.loads(run("results", "--json").stdout)["laws"][0]["oui"] == 2
    assert run("--recount", "--all", "--apply").returncode == 0
    assert run().returncode == 0


def test_an_old_snapshot_does_not_get_around_the_certificate(
    closed: str, run: Run, certify: Run, results: Results
) -> None:
    """A transaction that was begun before it, and would not see it."""
    run("seal")
    for isolation in ("REPEATABLE READ", "SERIALIZABLE"):
        early = psycopg2.connect(results.url)
        try:
            early.set_session(isolation_level=isolation)
            with early.cursor() as cur:
                cur.execute("SELECT count(*) FROM vote_results")
                assert isolation == "SERIALIZABLE" or certify().returncode == 0
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    cur.execute(ATTEMPTS[6])
                early.rollback()
                cur.execute("SELECT count(*) FROM vote_results")
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    cur.execute("UPDATE vote_results SET oui_count = 9")
        finally:
            early.close()
    assert results.totals()["law-1"] == (2, 1)


def test_a_total_on_its_way_is_waited_for(run: Run, certify: Run, database: Database, results: Results) -> None:
    """Of a law without votes, inserted by somebody and not committed: it must not come after the certificate."""
    count(database, vote("law-2"))
    run("seal")
    put_law(results, "empty", status="closed")
    writer = psycopg2.connect(results.url)
    try:
        writer.cursor().execute("INSERT INTO vote_results VALUES ('empty', 9, 0)")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            certifying = pool.submit(certify, "empty")
            wait_until(lambda: results.value(WAITING), "it waits")
            writer.commit()
            refuses(certifying.result(), "the total of empty is oui 9, non 0")
    finally:
        writer.close()


def test_a_recount_waits_for_the_batch_that_is_being_written(database: Database, run: Run, results: Results) -> None:
    """Else it would take the batch's votes out of the totals again."""
    count(database, vote("law-1"), vote("law-1"))
    results.query("UPDATE vote_results SET oui_count = 7")
    batch = psycopg2.connect(results.url)
    try:
        with batch.cursor() as cur:
            cur.execute(ATTEMPTS[6])
            cur.execute("UPDATE vote_results SET oui_count = oui_count + 1")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            recounting = pool.submit(run, "--recount", "--all", "--apply")
            wait_until(lambda: results.value(WAITING), "it waits")
            batch.commit()
            assert recounting.result().returncode == 0
    finally:
        batch.close()
    assert results.totals() == results.audited() == {"law-1": (3, 0)}


WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE certified_results SET oui_count = 900",
        "UPDATE certified_results SET certificate = certificate || '{\"oui\": 900}'",
        "UPDATE certified_results SET oui_count = 900, certificate = certificate || '{\"oui\": 900}'",
        'UPDATE certified_results SET certificate = certificate || \'{"seal": "1:0"}\'',
        "INSERT INTO certified_results SELECT 'law-2', 900, 5, now(), 'x', 1, certificate FROM certified_results",
    ],
)
def test_a_certificate_that_was_altered_is_named(
    change: str, closed: str, run: Run, certify: Run, results: Results
) -> None:
    """By verify, against the log and the seals."""
    run("seal")
    assert certify().returncode == 0
    assert run("verify").returncode == 0
    results.query(f"ALTER TABLE certified_results DISABLE TRIGGER ALL; {change}")
    done = run("verify")
    assert done.returncode == 1
    assert "certified_results, law law-" in done.stdout


def test_the_triggers_stand_for_replication_too(closed: str, run: Run, certify: Run, results: Results) -> None:
    """session_replication_role = replica switches ordinary triggers off."""
    run("seal")
    assert certify().returncode == 0
    for attempt in (ATTEMPTS[0], ATTEMPTS[3], ATTEMPTS[4], ATTEMPTS[6], *ATTEMPTS[8:15], "DELETE FROM audit_seals"):
        with pytest.raises(psycopg2.Error) as refused:
            results.query(f"SET session_replication_role = replica; {attempt}")
        assert refused.value.pgcode in ("42501", "40001"), attempt


def test_a_vote_around_the_close_of_its_law_holds_nothing_up(database: Database, results: Results) -> None:
    """Judged by one moment in both looks at it, and again where the law is opened between them."""
    closes = datetime.now(UTC) - timedelta(seconds=10)
    put_law(results, "law-1", closes_at=closes)
    for _ in range(100):
        late_by = random.uniform(0, 0.003)  # the second look is a millisecond or so after the first
        held_since = time.monotonic() - (datetime.now(UTC) - closes).total_seconds() + late_by
        count(database, vote("law-1"), held_since=held_since)
    assert results.totals() == results.audited()
    assert results.counted() + results.value("SELECT count(*) FROM rejected_messages") == 100


def test_a_law_cannot_be_called_certified_without_a_certificate(database: Database, results: Results) -> None:
    """Nor its identity be changed."""
    for statement in (
        "INSERT INTO laws (law_id, title, status) VALUES ('law-9', '', 'certified')",
        "INSERT INTO laws (law_id, title) VALUES ('law-8', ''); UPDATE laws SET status = 'certified'",
        "INSERT INTO laws (law_id, title) VALUES ('law-8', ''); UPDATE laws SET law_id = 'law-7'",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            results.query(statement)


# --- results, replay, gauge, upgrade ---


def test_results_as_table_json_and_csv(closed: str, run: Run, results: Results) -> None:
    """Laws without votes and votes without a law are among them."""
    put_law(results, "law-0", title='Loi "zéro", <b>')
    rows = list(csv.DictReader(io.StringIO(run("results", "--csv").stdout)))
    laws = json.loads(run("results", "--json").stdout)["laws"]
    assert [row["law_id"] for row in rows] == [law["law_id"] for law in laws] == ["law-0", "law-1", "law-2"]
    assert [law["status"] for law in laws] == ["open", "closed", "open"]
    assert rows[0]["title"] == laws[0]["title"] == 'Loi "zéro", <b>'
    assert (laws[0]["total"], laws[0]["oui_percent"], laws[0]["last_vote"]) == (0, None, None)
    assert (laws[1]["oui"], laws[1]["non"], laws[1]["oui_percent"], laws[1]["non_percent"]) == (2, 1, 66.67, 33.33)
    assert laws[2]["title"] is None
    assert datetime.fromisoformat(laws[1]["last_vote"]) > NOW - timedelta(minutes=10)
    table = run("results").stdout
    assert "law-1" in table
    assert "66.67" in table


def test_a_replay_gives_the_same_totals_and_a_second_one_changes_nothing(
    services: LocalServices, queue: Queue, results: Results, start_service: Start, run: Run, tmp_path: Path
) -> None:
    """5,000 votes here; `make test-replay` does it with 100,000. What was counted from arrays is replayed in others."""
    replay_round_trip(5_000, services, queue, results, start_service, run, tmp_path)


@pytest.mark.skipif("REPLAY_VOTES" not in os.environ, reason="make test-replay sets REPLAY_VOTES")
def test_a_replay_of_many_votes_is_exact(
    services: LocalServices, queue: Queue, results: Results, start_service: Start, run: Run, tmp_path: Path
) -> None:
    """As many as REPLAY_VOTES says."""
    replay_round_trip(int(os.environ["REPLAY_VOTES"]), services, queue, results, start_service, run, tmp_path)


def replay_round_trip(
    votes: int, services: LocalServices, queue: Queue, results: Results, start_service: Start, run: Run, folder: Path
) -> None:
    made = make_messages(votes, 7, 13, 3, 1)
    messages = [*islice(made, votes // 2), *in_arrays(made, 50)]
    start_service(BATCH_SIZE="500", RABBITMQ_PREFETCH_COUNT="2000")
    assert Publisher([queue.url], queue.name).publish(messages).all_confirmed
    wait_settled(services, queue, 300)
    file = folder / "audit.jsonl"
    assert run("export-audit", "--output", str(file)).returncode == 0
    assert file.read_text() == run("export-audit").stdout
    assert len(file.read_text().splitlines()) == votes
    before = (results.totals(), results.rejected(), fold(results))
    with empty_database(services) as other, empty_queue(services) as other_queue:
        replica = Service(folder, "other", other_queue, other, {"BATCH_SIZE": "500", "RABBITMQ_PREFETCH_COUNT": "2000"})
        replica.start_and_wait()
        try:
            assert replay(file, other_queue, "--box", "70").returncode == 0
            wait_settled(services, other_queue, 300)
        finally:
            replica.kill()
        assert other.totals() == other.audited() == results.totals() == totals_of(messages)
        assert fold(other) == fold(results), "vote for vote, with choice, time and voter"
        assert (other.rejected(), other.duplicates()) == ({}, {})
    assert replay(file, queue).returncode == 0
    wait_settled(services, queue, 300)
    assert (results.totals(), results.rejected(), fold(results)) == before
    check_exact(results, messages)


def test_all_that_follows_the_count_is_the_same_for_arrays_and_for_single_votes(
    services: LocalServices, run: Run, certify: Run, tmp_path: Path
) -> None:
    """Seals, certificate, export and what is kept beside the votes: of a database of each, from the same votes."""
    made = list(make_messages(600, 3, 17, 20, 20))
    found = []
    for name, messages in (("single", made), ("arrays", [*made[:300], *in_arrays(made[300:], 40)])):
        with empty_database(services) as results, empty_queue(services) as queue:
            with Service(tmp_path, name, queue, results, {"BATCH_SIZE": "70"}):
                put_law(results, "law-002", closes_at=NOW - timedelta(hours=1))
                assert Publisher([queue.url], queue.name).publish(messages).all_confirmed
                wait_until(lambda results=results: judged(results) == len(made), "all are judged")
            where = {"DATABASE_URL": results.url, "AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name}
            put_law(results, "law-001", status="closed")
            done = [run("seal", **where), certify("law-001", DATABASE_URL=results.url)]
            done += [run("verify", **where), run(**where)]
            assert [each.returncode for each in done] == [0] * 4, done
            exported = [json.loads(line) for line in run("export-audit", **where).stdout.splitlines()]
            certificate = results.value("SELECT certificate FROM certified_results")
            # a text that came in an array and by itself has two rows: the latter with its message_id
            kept = results.query(
                "SELECT body_sha256::text, reason, law_id, sum(times_seen) FROM rejected_messages GROUP BY 1, 2, 3"
            )
            copies = results.query(
                "SELECT vote_id::text, law_id, choice, reason, counted_vote_id FROM duplicate_attempts"
            )
            own = ("seal", "certified_at", "closes_at", "last_vote_recorded_at", "salt")
            found.append(
                (
                    results.totals(),
                    sorted((row["vote_id"], row["law_id"], row["choice"], str(row["voter_hash"])) for row in exported),
                    {name: value for name, value in certificate.items() if name not in own},
                    sorted(kept, key=str),
                    sorted(copies, key=str),
                    results.value("SELECT sum(votes) FROM audit_seals"),
                )
            )
            assert {"outside_window", "bad_choice", "missing_vote_id"} <= results.rejected().keys()
            assert results.totals() == results.audited()
    assert found[0] == found[1]
    assert len(found[0][4]) > 80


def judged(results: Results) -> int:
    """Votes that are counted, recorded as copies, or kept as rejected."""
    seen = results.value("SELECT coalesce(sum(times_seen), 0) FROM rejected_messages")
    return int(results.counted() + sum(results.duplicates().values()) + seen)


def fold(results: Results) -> str:
    return str(
        results.value(
            "SELECT md5(string_agg(concat_ws('|', vote_id, law_id, choice, voted_at, voter_hash), ',' ORDER BY"
            " vote_id)) FROM vote_audit"
        )
    )


def replay(file: Path, queue: Queue, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "test_publisher.py"), "--replay", str(file), "--quiet", *options],
        env={"AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT / "tests",
    )


def test_a_file_that_is_no_export_is_refused_before_anything_is_sent(queue: Queue, tmp_path: Path) -> None:
    """With the line, exit code 2, and no traceback."""
    good = json.dumps({**vote(), "timestamp": None, "voter_hash": None})
    file = tmp_path / "audit.jsonl"
    with queue.channel():
        pass
    for bad in ("", "{", "[]", '{"vote_id": "x"}', good.replace("oui", "peut-être"), "\xff"):
        file.write_text(f"{good}\n{bad}\n", encoding="latin-1")
        done = replay(file, queue)
        assert (done.returncode, "line 2" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done
    assert replay(tmp_path / "nothing", queue).returncode == 2
    assert queue.ready() == 0


def test_the_gauge_tells_by_how_much_the_totals_differ(
    queue: Queue, results: Results, start_service: Start, run: Run
) -> None:
    """Over what is sealed and what is not, and again 0 when it is put right."""
    service = start_service(RECONCILE_SECONDS="0.1", BATCH_TIMEOUT_SECONDS="0.05")
    queue.publish(*(vote(f"law-{i % 3}") for i in range(30)))
    wait_until(lambda: results.counted() == 30, "all are counted")
    wait_until(lambda: service.metric("reconciliation_difference") == 0, "it agrees")
    results.query("UPDATE vote_results SET oui_count = oui_count + 3 WHERE law_id = 'law-0'")
    wait_until(lambda: service.metric("reconciliation_difference") == 3, "it differs")
    run("seal")
    wait_until(lambda: service.metric("reconciliation_difference") == 3, "it differs")
    assert service.says("totals differ from the audit log")
    queue.publish(*(vote(f"law-{i % 3}") for i in range(30)))
    wait_until(lambda: results.counted() == 63, "all are counted")
    run("--recount", "--all", "--apply")
    wait_until(lambda: service.metric("reconciliation_difference") == 0, "it agrees")
    assert service.stop() == 0


def test_a_database_of_the_first_version_is_brought_up(results: Results, run: Run) -> None:
    """Its votes, rejected messages and laws stay, it can be sealed, and an old replica beside us still counts."""
    results.execute(MIGRATED.read_text())
    results.query(
        "INSERT INTO vote_audit SELECT gen_random_uuid(), 'law-1', 'oui', NULL, now(), NULL, 'old', false"
        " FROM generate_series(1, 100);"
        " INSERT INTO vote_results VALUES ('law-1', 100, 0);"
        " INSERT INTO rejected_messages (body_sha256, body, body_bytes, reason, instance)"
        " VALUES ('a', 'a', 1, 'x', 'y');"
        " INSERT INTO laws (law_id, title, status) VALUES ('law-2', 'Two', 'open')"
    )
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="new") as database:
        database.initialise_schema()
        count(database, vote("law-1"))
        database.probe()
    results.query("INSERT INTO vote_audit VALUES (gen_random_uuid(), 'law-1', 'non', NULL, now(), NULL, 'old', false)")
    results.query("UPDATE vote_results SET non_count = 1")
    assert run("seal").returncode == run("verify").returncode == run().returncode == 0
    assert results.value("SELECT sum(votes) FROM audit_seals") == 102
    assert results.rejected() == {"x": 1}
