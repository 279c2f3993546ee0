"""What those who watch the count rely on: certificates, seals over them, what is shown, and that sealing goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import reconcile
import seals
from database import Database
from observability import SELECT_DIFFERENCE
from results_page import LIMITS, SELECT_RESULTS
from scripts import local_services
from scripts.local_services import LocalServices
from tests.attack.test_insiders import a_vote, connect, count, run, seal, verify
from tests.harness import ROOT, Queue, Results, Service, wait_until
from tests.integration.test_few_rights import PASSWORD, set_up_database, with_login


@pytest.fixture(scope="module")
def broker(services: LocalServices, idle_queue: Queue) -> dict[str, str]:
    """Settings that name an empty queue, of which the management API has figures."""
    return {
        "AMQP_URL": idle_queue.url,
        "RABBITMQ_QUEUE": idle_queue.name,
        "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
    }


def certify(results: Results, broker: dict[str, str], law_id: str) -> dict[str, Any]:
    with connect(results) as conn:
        return reconcile.certify(conn, law_id, broker, "a test", settle_seconds=0)


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(database: Database, results: Results, broker: dict[str, str]) -> Results:
    """Two laws that are closed, one of them certified; the certificate is not sealed yet, and a recount is."""
    copy = a_vote()
    count(database, copy, a_vote("law-1", "non"), a_vote("law-2"))
    assert len(database.batch_update_results([copy], []).duplicates) == 1
    results.query(
        "INSERT INTO laws (law_id, title, status)"
        " VALUES ('law-1', 'On bread', 'closed'), ('law-2', 'On games', 'closed');"
        "UPDATE vote_results SET oui_count = 7 WHERE law_id = 'law-2'"
    )
    with connect(results) as conn:
        reconcile.recount(conn, None, "a test")
    seal(results)
    certify(results, broker, "law-1")
    return results


def altered(**members: Any) -> str:
    merged = " || ".join(f"jsonb_build_object('{name}', {value})" for name, value in members.items())
    return f"UPDATE certified_results SET certificate = certificate || {merged}"


ALTERATIONS = {
    **{
        f"{name} changed": altered(**{name: value})
        for name, value in {
            "law_id": "'law-2'",
            "title": "'On wine'",
            "oui": "9",
            "non": "9",
            "total": "999999999",
            "opens_at": "'2026-01-01T00:00:00.000000+00:00'",
            "closes_at": "NULL",
            "last_vote_recorded_at": "'2026-01-01T00:00:00.000000+00:00'",
            "duplicates": "'{\"duplicate\": 2}'::jsonb",
            "rejected": "'{\"certified\": 1}'::jsonb",
            "unreadable_messages_of_all_laws": "5",
            "seal": "'1:' || repeat('0', 64)",
            "certified_at": "'2026-01-01T00:00:00.000000+00:00'",
            "certified_by": "'somebody else'",
        }.items()
    },
    "a number as text": altered(oui="'1'"),
    "nothing of its form left": "UPDATE certified_results SET certificate = '[]'",
    "duplicates of no form": altered(duplicates="7"),
    "a member added": altered(remark="'approved'"),
    "a salt of another form": altered(salt="repeat('A', 64)"),
    "a shorter salt": altered(salt="'00'"),
    "a salt that is a number": altered(salt="repeat('1', 64)::numeric"),
    "a salt that is nothing": altered(salt="NULL"),
    "a member taken away": "UPDATE certified_results SET certificate = certificate - 'rejected'",
    "who certified changed": "UPDATE certified_results SET certified_by = 'somebody else'",
    "when changed": "UPDATE certified_results SET certified_at = now()",
    "a title swapped": "UPDATE laws SET title = 'On games' WHERE law_id = 'law-1'",
    "its law opened": "UPDATE laws SET status = 'open', closes_at = NULL WHERE law_id = 'law-1'",
    "its law removed": "DELETE FROM laws WHERE law_id = 'law-1'",
    "a law called certified": "UPDATE laws SET status = 'certified' WHERE law_id = 'law-2'",
    "a false one": "INSERT INTO certified_results SELECT 'law-2', 9, 9, now(), 'x', 1, certificate"
    " FROM certified_results",
}


TABLES = ("certified_results", "laws", "recounts")


def each_alone(results: Results, changes: dict[str, str], *published: str) -> Iterator[tuple[str, list[str]]]:
    """What verify finds after each of the changes, made with the triggers off; the next begins anew."""
    assert verify(results, *published) == []
    results.query("CREATE SCHEMA kept")
    for table in TABLES:
        results.query(f"ALTER TABLE {table} DISABLE TRIGGER ALL; CREATE TABLE kept.{table} AS TABLE {table}")
    for name, change in changes.items():
        results.query(change)
        yield name, verify(results, *published)
        for table in TABLES:
            results.query(f"DELETE FROM {table}; INSERT INTO {table} OVERRIDING SYSTEM VALUE TABLE kept.{table}")
    assert verify(results, *published) == []


def test_every_field_of_a_certificate_is_verified(certified: Results) -> None:
    """Against the log and the laws, also before it is sealed. One of an earlier version has no salt."""
    results = certified
    salt = results.value("SELECT certificate->>'salt' FROM certified_results")
    assert re.fullmatch("[0-9a-f]{64}", salt)
    results.query(
        "ALTER TABLE certified_results DISABLE TRIGGER ALL;"
        "UPDATE certified_results SET certificate = certificate - 'salt'"
    )
    assert verify(results) == []
    results.query("UPDATE certified_results SET certificate = certificate || jsonb_build_object('salt', %s)", salt)
    for name, problems in each_alone(certified, ALTERATIONS):
        assert [problem[:27] for problem in problems] == ["certified_results, law law-"], (name, problems)


# Each with numbers that agree with each other and with the log: nothing but the chain can tell.
FORGERIES = {
    "deleted, and its law opened": "DELETE FROM certified_results;"
    " UPDATE laws SET status = 'open' WHERE law_id = 'law-1'",
    "deleted, and its law removed": "DELETE FROM certified_results; DELETE FROM laws WHERE law_id = 'law-1'",
    "of another moment": altered(certified_at="'2026-01-01T00:00:00.000000+00:00'")
    + ", certified_at = '2026-01-01 00:00:00+00'",
    "by somebody else": altered(certified_by="'x'") + ", certified_by = 'x'",
    "with other copies": altered(duplicates="'{}'::jsonb"),
    "with a new title": altered(title="'On wine'") + "; UPDATE laws SET title = 'On wine' WHERE law_id = 'law-1'",
    "a recount altered": "UPDATE recounts SET recounted_by = 'x'",
    "a recount removed": "DELETE FROM recounts",
    "a recount added": "INSERT INTO recounts (recounted_by, law_id, oui_before, non_before, oui_after, non_after, txid)"
    " SELECT recounted_by, law_id, oui_before, non_before, oui_after, non_after, txid FROM recounts",
}


def test_a_certificate_or_recount_cannot_be_forged_once_it_is_sealed(certified: Results) -> None:
    """Nor be removed without a trace; the seal that covers it is named, and it is one that was published."""
    (made,) = seal(certified)
    for name, problems in each_alone(certified, FORGERIES, made.name()):
        (problem,) = problems
        assert problem.startswith(f"seal {1 if 'recount' in name else 2}: the certificates and recounts"), (
            name,
            problem,
        )


def test_a_certificate_is_sealed_by_the_next_seal(certified: Results) -> None:
    """Also where no vote is new; until then verify says that it is not, and no problem."""
    with connect(certified) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        found = seals.verify(conn)
        assert (found.problems, found.records_not_sealed) == ([], 1)
    assert [made.votes for made in seal(certified)] == [0]
    with connect(certified) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        assert seals.verify(conn).records_not_sealed == 0
    assert seal(certified) == [], "and once only"


def test_a_seal_of_the_first_format_does_not_take_the_place_of_one_that_covers_certificates(
    certified: Results,
) -> None:
    """It would be sound in itself, and its certificates could go."""
    (made,) = seal(certified)
    false = dataclasses.replace(made, records_hash=None, salt=None)
    certified.query(
        "ALTER TABLE audit_seals DISABLE TRIGGER ALL; ALTER TABLE certified_results DISABLE TRIGGER ALL;"
        "UPDATE audit_seals SET records_hash = NULL, salt = NULL, seal_hash = %s WHERE seal_id = %s;"
        "DELETE FROM certified_results",
        false.hash(),
        false.seal_id,
    )
    problems = verify(certified)
    assert problems[0] == "seal 2 is of an earlier format than the one before"
    assert problems[-1].startswith("certified_results, law law-1: it is called certified and has no certificate")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"salt": None}, "seal 2 is of an earlier format than the one before"),
        ({"records_hash": None}, "seal 2 has a salt that no format has"),
        ({"salt": b""}, "seal 2 has a salt that no format has"),
    ],
    ids=str,
)
def test_a_seal_without_a_salt_of_its_own_does_not_take_the_place_of_one_that_has_it(
    certified: Results, changes: dict[str, bytes | None], problem: str
) -> None:
    """Its hash fits, and verify refuses it as every other check does."""
    (made,) = seal(certified)
    false = dataclasses.replace(made, **changes)
    certified.query(
        "ALTER TABLE audit_seals DISABLE TRIGGER ALL, DROP CONSTRAINT audit_seals_salt_check;"
        "UPDATE audit_seals SET records_hash = %s, salt = %s, seal_hash = %s WHERE seal_id = %s",
        false.records_hash,
        false.salt,
        false.hash(),
        false.seal_id,
    )
    assert verify(certified)[0] == problem


def test_a_certificate_bears_the_transaction_that_made_it(certified: Results) -> None:
    """Another would slip it into a range that is sealed, or keep it from ever being so."""
    recount = (
        "INSERT INTO recounts (recounted_by, law_id, oui_before, non_before, oui_after, non_after, txid)"
        " VALUES ('x', 'law-1', 0, 0, 0, 0, {})"
    )
    certificate = (
        "INSERT INTO certified_results SELECT 'law-2', 1, 0, now(), certified_by, 1,"
        ' certificate || \'{{"law_id": "law-2", "oui": 1, "non": 0, "total": 1}}\', {} FROM certified_results'
    )
    txids = ("-1", "1", "1::bigint << 60")
    for txid in txids:
        for insert in (recount, certificate):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                certified.query(insert.format(txid))
    for name, problems in each_alone(certified, {txid: recount.format(txid) for txid in txids}):
        assert len(problems) == 1, (name, problems)


def test_the_records_of_a_seal_can_be_checked_by_hand(certified: Results, services: LocalServices) -> None:
    """As docs/AUDIT.md tells a stranger, with psql and sha256sum."""
    (made,) = seal(certified)
    assert made.records_hash is not None
    manual = (ROOT / "docs" / "AUDIT.md").read_text()
    script = manual.partition("```sh\n# certificates and recounts")[2].partition("```")[0]
    script = script.replace("FROM=812", f"FROM={made.from_txid}").replace("TO=815", f"TO={made.to_txid}")
    psql = Path(local_services._find_program("psql", local_services._find_postgres()))
    environment = {"PATH": f"{psql.parent}:{os.environ['PATH']}", "DATABASE_URL": certified.url}
    done = subprocess.run(["bash", "-euc", f"#{script}"], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[:1] == [made.records_hash.hex()], done


# --- what people see -------------------------------------------------------------------------------------------------


def test_rows_of_a_child_table_do_not_pass_for_totals(database: Database, results: Results) -> None:
    """By nobody who reads them: not by reconcile, the gauge, the page, the view, or a replica at its start."""
    count(database, a_vote(), a_vote())
    results.query(
        "CREATE TABLE more () INHERITS (vote_results);"
        "INSERT INTO more SELECT * FROM ONLY vote_results; DELETE FROM ONLY vote_results"
    )
    with connect(results) as conn:
        (law,) = reconcile.compare(conn).laws
        assert (law.agrees, law.oui) == (False, 0)
    with connect(results) as conn:
        (law,) = reconcile.recount(conn, None, None)
        assert (law.agrees, law.oui) == (False, 0)
    assert database.read(SELECT_DIFFERENCE) == [(2,)]
    assert [row[3:10] for row in database.read(SELECT_RESULTS, LIMITS)] == [(0, 0, 0, 0, None, None, None)]
    assert results.query("SELECT * FROM vote_statistics") == []
    assert database.totals([], 10) == ({}, (0, 0))


def test_a_function_with_the_name_of_one_of_postgresql_hides_no_child_table(
    database: Database, results: Results
) -> None:
    """In the schema of the tables it goes before a polymorphic one."""
    count(database, a_vote())
    seal(results)
    results.query("CREATE TABLE vote_audit_child () INHERITS (vote_audit)")
    named = verify(results)
    assert any("vote_audit_child" in problem for problem in named)
    for arguments in ("text[]", "text[], text[]"):
        results.query(
            f"CREATE FUNCTION public.unnest({arguments}) RETURNS SETOF text LANGUAGE sql AS 'SELECT NULL WHERE false'"
        )
        assert verify(results) == named


def test_rows_of_a_child_table_do_not_pass_for_the_log(database: Database, results: Results) -> None:
    """They do not make a total right that has no votes."""
    count(database, a_vote(), a_vote())
    results.query(
        "CREATE TABLE more () INHERITS (vote_audit); UPDATE vote_results SET oui_count = 3;"
        "INSERT INTO more (vote_id, law_id, choice, instance, redelivered)"
        " VALUES (gen_random_uuid(), 'law-1', 'oui', 'x', false)"
    )
    with connect(results) as conn:
        assert [law.oui_in_log for law in reconcile.compare(conn).laws] == [2]
    with connect(results) as conn:
        assert [law.oui_in_log for law in reconcile.recount(conn, None, None)] == [2]
    assert database.read(SELECT_DIFFERENCE) == [(1,)]
    results.query("DROP TABLE more; CREATE TABLE more () INHERITS (duplicate_attempts)")
    results.query("CREATE TABLE most () INHERITS (rejected_messages)")
    results.query("INSERT INTO most (body_sha256, body, body_bytes, reason, instance) VALUES ('a', 'a', 1, 'x', 'y')")
    assert [row[2] for row in database.read(SELECT_RESULTS, LIMITS)] == [0]


TWICE = {
    "a vote_id": ("vote_audit DROP CONSTRAINT vote_audit_pkey", "", "vote_audit", "vote_id"),
    "a voter": ("", "DROP INDEX vote_audit_law_voter", "vote_audit", "law_id, voter_hash"),
    "a total": ("vote_results DROP CONSTRAINT vote_results_pkey", "", "vote_results", "law_id"),
    "a law": ("laws DROP CONSTRAINT laws_pkey", "", "laws", "law_id"),
    "a certificate": ("certified_results DROP CONSTRAINT certified_results_pkey", "", "certified_results", "law_id"),
}


@pytest.mark.parametrize(("constraint", "index", "table", "key"), TWICE.values(), ids=TWICE.keys())
def test_rows_that_are_there_twice_are_an_alarm(
    certified: Results, database: Database, constraint: str, index: str, table: str, key: str
) -> None:
    """Of verify and reconcile, even where all sums agree; and so is the lost index that would have kept them out."""
    count(database, a_vote("law-3")._replace(voter_hash="h" * 16))
    certified.query(index or f"ALTER TABLE {constraint}")
    assert verify(certified) == [f"{table} has no unique index on {key}: rows may be there twice"]
    certified.query(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    vote_id, voter = ("gen_random_uuid()", "voter_hash") if index else ("vote_id", "NULL")
    columns = {
        "vote_audit": f"{vote_id}, law_id, choice, voted_at, recorded_at, {voter}, instance, redelivered",
        "vote_results": "law_id, 0, 0",
        "laws": "law_id, title, opens_at, closes_at, status, created_at, updated_at",
        "certified_results": "law_id, oui_count, non_count, certified_at, certified_by, seal_id, certificate, txid",
    }[table]
    certified.query(
        f"INSERT INTO {table} SELECT {columns} FROM {table} WHERE law_id = (SELECT max(law_id) FROM {table})"
    )
    if table == "vote_audit":
        certified.query("UPDATE vote_results SET oui_count = 2 WHERE law_id = 'law-3'")
    twice = f"{table}, rows of one {key}: law-1 2" if table == "certified_results" else f"{table}, rows of one {key}: "
    assert any(problem.startswith(twice) for problem in verify(certified)), verify(certified)
    with connect(certified) as conn:
        compared = reconcile.compare(conn)
        assert all(law.agrees for law in compared.laws)
        assert [problem for problem in compared.problems if problem.startswith(twice)] != []
    if key == "vote_id":
        done = run(certified.url)
        assert (done.returncode, twice in done.stdout, "no difference" in done.stdout) == (1, True, False)


# --- that sealing goes on --------------------------------------------------------------------------------------------


@pytest.fixture
def roles(database: Database, results: Results) -> Iterator[tuple[Results, Results]]:
    """The database as the sealer's role and as the service's role see it."""
    name = f"role-{uuid.uuid4().hex[:8]}"
    set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD, SEALER_PASSWORD=PASSWORD)
    yield Results(with_login(results.url, "votes_sealer")), Results(with_login(results.url, name))
    results.execute(f'DROP OWNED BY "{name}", votes_sealer')
    results.execute(f'DROP ROLE "{name}", votes_sealer')


@contextlib.contextmanager
def sealing(role: Results) -> Iterator[Callable[[str], dict[str, Any]]]:
    """`seal --every`; gives a function that waits for a line of its log and returns the line's fields."""
    command = [sys.executable, str(ROOT / "reconcile.py"), "seal", "--every", "0.1"]
    environment = {"DATABASE_URL": role.url}
    process = subprocess.Popen(command, env=environment, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None

    def says(message: str) -> dict[str, Any]:
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text)
            if line["message"] == message:
                return dict(line["fields"])
        raise AssertionError(f"it ended and never said {message!r}")

    deadline = threading.Timer(120, process.kill)
    deadline.start()
    try:
        yield says
        process.terminate()
        assert process.wait(30) == 0
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def test_no_stranger_can_take_the_sealers_lock(database: Database, roles: tuple[Results, Results]) -> None:
    """Neither an advisory lock, which any role may take, nor one of those that a reader may have."""
    sealer, service = roles
    count(database, a_vote())
    with connect(service) as conn, conn.cursor() as cur:
        cur.execute("SELECT pg_advisory_lock(hashtext('vote-audit-sealer'))")
        cur.execute("LOCK TABLE sealed_totals, vote_audit, vote_results IN ACCESS SHARE MODE")
        assert [made.votes for made in seal(sealer)] == [1]
        for mode in ("SHARE UPDATE EXCLUSIVE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE", "ACCESS EXCLUSIVE"):
            conn.rollback()
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cur.execute(f"LOCK TABLE sealed_totals IN {mode} MODE")


def test_the_sealers_lock_holds_no_reader_up(database: Database, results: Results) -> None:
    """Replicas count, compare and show results meanwhile; another sealer is told who has it, and since when."""
    count(database, a_vote())
    with connect(results) as holder, holder.cursor() as cur:
        cur.execute(f"SET application_name = 'a sealer'; {seals.BECOME_THE_SEALER}")
        count(database, a_vote())
        database.probe()
        assert database.read(SELECT_DIFFERENCE) == [(0,)]
        with pytest.raises(seals.AnotherSealer) as told:
            seal(results)
        holding = told.value.holder
        assert (holding["pid"], holding["application"]) == (holder.get_backend_pid(), "a sealer")
        assert holding["since"].startswith("20")
    assert [made.votes for made in seal(results)] == [2]


def test_the_sealer_says_which_transaction_holds_it_up(
    database: Database, roles: tuple[Results, Results], results: Results
) -> None:
    """Its process, role and application; what this role may not see of it is named. Then it seals what waited."""
    with connect(results) as holder, holder.cursor() as cur:
        cur.execute("SET application_name = 'forgotten'; SELECT pg_current_xact_id()::text")
        (transaction,) = cur.fetchone()
        count(database, a_vote())
        with sealing(roles[0]) as says:
            told = says("sealing is held up by a transaction that is not over")
            assert told["transaction"] == int(transaction)
            assert (told["pid"], told["application"]) == (holder.get_backend_pid(), "forgotten")
            assert told["since"] == "not shown to this role (it lacks pg_read_all_stats)"
            holder.rollback()
            told = says("sealed")
            assert (told["votes"], told["seal"][:2]) == (1, "1:")
        assert verify(results, told["seal"]) == []


def test_of_several_transactions_the_oldest_is_named(database: Database, results: Results) -> None:
    """And none once it is over, though a later one is not: nothing waits for that."""
    with connect(results) as conn, seals.transaction(conn) as cur:
        cur.execute("SELECT pg_current_xact_id()::text::bigint")
        (transaction,) = seals.one_row(cur)
        count(database, a_vote())
        with connect(results) as later, later.cursor() as later_cur:
            later_cur.execute("SELECT pg_current_xact_id()")
            with connect(results) as other:
                told = seals.held_up(other)
                assert told is not None
                assert (told["transaction"], told["pid"]) == (transaction, conn.get_backend_pid())
                assert told["since"].startswith("20")
                conn.rollback()
                assert seals.held_up(other) is None


def test_a_certificate_shows_in_the_metrics(
    certified: Results, start_service: Callable[..., Service], roles: tuple[Results, Results], broker: dict[str, str]
) -> None:
    """With the moment of it, for the mark on the dashboard; another one is seen while the service runs."""
    service = start_service(DATABASE_URL=roles[1].url, RECONCILE_SECONDS="0.1")

    def shown() -> dict[tuple[str, ...], float]:
        return service.samples("law_certified_timestamp_seconds")

    def told() -> dict[tuple[str, ...], float]:
        rows = certified.query("SELECT law_id, extract(epoch FROM certified_at)::float8 FROM certified_results")
        return {(law_id,): moment for law_id, moment in rows}

    wait_until(lambda: shown() == told(), "the certificate is shown")
    certify(certified, broker, "law-2")
    wait_until(lambda: shown() == told() and len(shown()) == 2, "the second one is shown")


def test_sealing_that_stops_shows_in_the_metrics(
    database: Database, results: Results, start_service: Callable[..., Service], roles: tuple[Results, Results]
) -> None:
    """Not before anything was ever sealed; then the age of what waits, until it is sealed. The service may see it."""
    service = start_service(DATABASE_URL=roles[1].url, RECONCILE_SECONDS="0.1")
    count(database, a_vote())

    def shown() -> tuple[float, float]:
        return service.metric("oldest_unsealed_vote_age_seconds"), service.metric("newest_seal_age_seconds")

    wait_until(lambda: service.metric("reconciliation_difference") == 0, "it has looked")
    assert all(map(math.isnan, shown()))
    seal(roles[0])
    wait_until(lambda: shown()[0] == 0 and shown()[1] > 0, "nothing waits")
    count(database, a_vote())
    wait_until(lambda: shown()[0] > 0, "a vote waits")
    seal(roles[0])
    wait_until(lambda: shown()[0] == 0, "nothing waits")
    results.query(f'REVOKE SELECT ON audit_seals FROM "{roles[1].value("SELECT current_user")}"')
    wait_until(lambda: all(map(math.isnan, shown())), "it is not known any more")


def test_sealing_asks_for_nothing_that_is_refused(
    database: Database, roles: tuple[Results, Results], results: Results, services: LocalServices
) -> None:
    """Its role owns no index: autovacuum summarises that of the transactions, also in a database of long ago."""
    written = services.postgres.log.stat().st_size
    count(database, a_vote())
    assert len(seal(roles[0])) == 1
    with services.postgres.log.open("rb") as log:
        log.seek(written)
        assert b"vote_audit_txid" not in log.read()
    options = "SELECT reloptions FROM pg_class WHERE relname = 'vote_audit_txid'"
    assert "autosummarize=on" in results.value(options)
    results.execute("ALTER INDEX vote_audit_txid RESET (autosummarize)")
    results.execute((ROOT / "init_db.sql").read_text())
    assert "autosummarize=on" in results.value(options)
