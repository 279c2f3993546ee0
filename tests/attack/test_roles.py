"""What each role may do and may not, and what of ballots and passwords can be read where they do not belong."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import json
import logging
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pika
import psycopg2
import pytest
from pika.exceptions import AMQPError
from psycopg2.extensions import parse_dsn

import reconcile
from config import InvalidSettings, Settings
from database import Database, DatabaseUnavailable, Minute
from observability import JsonFormatter, configure_logging
from results_page import ResultsCache
from scripts.local_services import LocalServices, PostgresServer
from tests.attack.test_insiders import a_vote, connect, count, run, seal, verify
from tests.harness import ROOT, Queue, Results, Service, vote, wait_until
from tests.integration.test_few_rights import PASSWORD, import_definitions, run_setup, set_up_database, with_login
from votes import Rejection

ROLES = ("votes_sealer", "votes_monitor", "votes_auditor", "votes_certifier")


@contextlib.contextmanager
def all_roles(results: Results) -> Iterator[dict[str, Results]]:
    """The database as each role of roles.sql sees it; the service's has a name of its own."""
    service = f"role-{uuid.uuid4().hex[:8]}"
    set_up_database(results.url, SERVICE_ROLE=service, **EVERYBODY)
    try:
        named = dict(zip(ROLES, ROLES, strict=True)) | {"service": service}
        yield {name: Results(with_login(results.url, role)) for name, role in named.items()}
    finally:
        for role in (service, *ROLES):
            results.execute(f'DROP OWNED BY "{role}"')
            results.execute(f'DROP ROLE "{role}"')


@pytest.fixture
def roles(database: Database, results: Results) -> Iterator[dict[str, Results]]:
    """A closed law with three votes, all sealed, and the roles."""
    count(database, a_vote(), a_vote(), a_vote(choice="non"), a_vote("law-2"))
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', 'One'), ('law-2', 'Two')")
    results.query("UPDATE laws SET status = 'closed' WHERE law_id = 'law-1'")
    seal(results)
    with all_roles(results) as roles:
        yield roles


# --- the auditor and the certifier -----------------------------------------------------------------------------------


def test_the_auditor_runs_all_that_reads(roles: dict[str, Results], results: Results) -> None:
    """Compare, verify, prove, results and the export."""
    auditor = roles["votes_auditor"]
    vote_id = results.value("SELECT vote_id::text FROM vote_audit LIMIT 1")
    dry = ["republish", "--reason", "not_json", "--dry-run"]
    for command in ([], ["verify"], ["prove", vote_id], ["results", "--csv"], ["export-audit"], dry):
        done = run(auditor.url, *command)
        assert (done.returncode, done.stderr) == (0, ""), (command, done)
    assert auditor.query("SELECT count(*) FROM recounts") == [(0,)]


def test_the_certifier_closes_certifies_and_recounts(
    roles: dict[str, Results], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And verifies what it certifies. (The queue is another test's.)"""
    certifier = roles["votes_certifier"]
    monkeypatch.setattr(reconcile, "queue_reasons", lambda *_: [])
    certifier.query("UPDATE laws SET status = 'closed' WHERE law_id = 'law-2'")
    results.query("UPDATE vote_results SET oui_count = 7 WHERE law_id = 'law-2'")
    assert run(certifier.url, "--recount", "law-2", "--apply").returncode == 0
    with connect(certifier) as conn:
        certificates = [reconcile.certify(conn, law_id, {}, "a test") for law_id in ("law-1", "law-2")]
    assert [certificate["total"] for certificate in certificates] == [3, 1]
    assert run(certifier.url, "verify").returncode == 0
    assert verify(results) == []


def test_no_role_but_the_service_can_take_all_connections(roles: dict[str, Results], results: Results) -> None:
    """So many are never needed by people and their tools; the replicas need theirs."""
    limits = dict(results.query("SELECT rolname, rolconnlimit FROM pg_roles WHERE rolname LIKE 'votes\\_%'"))
    service = roles["service"].value("SELECT current_user")
    unlimited = results.value("SELECT rolconnlimit FROM pg_roles WHERE rolname = %s", service)
    assert (unlimited, limits) == (
        -1,
        {"votes_sealer": 5, "votes_auditor": 10, "votes_certifier": 10, "votes_monitor": 5},
    )


READ_ONLY = [
    "INSERT INTO vote_results (law_id) VALUES ('law-9')",
    "UPDATE laws SET status = 'closed'",
    "INSERT INTO laws (law_id, title) VALUES ('law-9', 'Nine')",
    "DELETE FROM recounts",
    "LOCK TABLE vote_audit IN SHARE ROW EXCLUSIVE MODE",
    "SELECT lock_out_batches()",
    "CREATE TEMPORARY TABLE vote_audit (vote_id uuid)",
]
NOT_THE_LOG = [
    "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered)"
    " VALUES (gen_random_uuid(), 'law-1', 'oui', 'x', false)",
    "UPDATE vote_audit SET choice = 'non'",
    "DELETE FROM vote_audit",
    "LOCK TABLE vote_audit IN ACCESS EXCLUSIVE MODE",
    "UPDATE sealed_totals SET oui_count = 9",
    "INSERT INTO audit_seals SELECT * FROM audit_seals",
    "UPDATE certified_results SET oui_count = 9",
    "UPDATE recounts SET recounted_by = 'x'",
    "DELETE FROM laws",
    "DELETE FROM vote_results",
    "SELECT record_minute('x', now(), 1, 1, 1, 1, 1)",
    "ALTER TABLE vote_audit DISABLE TRIGGER ALL",
    "SET session_replication_role = replica",
    "CREATE TABLE mine (id integer)",
    "CREATE ROLE other",
]


def test_the_auditor_and_the_certifier_have_no_other_right(roles: dict[str, Results]) -> None:
    """Neither can touch the log; the auditor can write nothing at all."""
    attempts = [("votes_auditor", text) for text in READ_ONLY + NOT_THE_LOG]
    for name, attempt in [*attempts, *(("votes_certifier", text) for text in NOT_THE_LOG)]:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            print(name, attempt)  # which one it is, where it is not refused
            roles[name].query(attempt)


LACKING = [
    ("service", "verify"),
    ("service", "seal"),
    ("votes_monitor", "prove VOTE"),
    ("service", "certify law-1"),
    ("service", "--recount --all --apply"),
    ("votes_sealer", ""),
    ("votes_sealer", "--recount --all"),
    ("votes_sealer", "results"),
    ("votes_sealer", "republish --reason not_json"),
    ("votes_monitor", "export-audit"),
    ("votes_monitor", "republish --reason not_json"),
    ("votes_auditor", "seal"),
    ("votes_auditor", "certify law-1"),
    ("votes_auditor", "--recount law-1 --apply"),
    ("votes_certifier", "seal"),
]


def test_a_missing_right_is_no_broken_seal(
    roles: dict[str, Results],
    database: Database,
    results: Results,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 3 and what is missing, in every command: 1 would say that something is wrong with the count."""
    monkeypatch.setattr(reconcile, "queue_reasons", lambda *_: [])
    count(database, a_vote("law-2"))  # so that there is something to seal
    vote_id = results.value("SELECT vote_id::text FROM vote_audit LIMIT 1")
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-9', 'certified', 'closed')")
    results.certify("law-9")
    for role, command in [*LACKING, ("service", "certify law-9")]:
        monkeypatch.setattr(reconcile, "environment", lambda role=role, **_: {"DATABASE_URL": roles[role].url})
        code = reconcile.main(command.replace("VOTE", vote_id).split())
        told = capsys.readouterr().err
        assert (code, "permission denied" in told) == (3, True), (role, command, told)


def test_what_a_trigger_refuses_is_no_missing_right(roles: dict[str, Results], results: Results) -> None:
    """It says so by the same code; the command was refused, and that is its result."""
    results.certify("law-1")
    results.query("ALTER TABLE vote_audit DISABLE TRIGGER ALL; DELETE FROM vote_audit WHERE law_id = 'law-1'")
    done = run(roles["votes_certifier"].url, "--recount", "law-1", "--apply")
    assert (done.returncode, "the law is certified" in done.stderr) == (1, True), done


# --- an owner who is no superuser ------------------------------------------------------------------------------------

EVERYBODY = {f"{kind}_PASSWORD": PASSWORD for kind in ("SERVICE", "SEALER", "MONITOR", "AUDITOR", "CERTIFIER")}


@pytest.fixture
def owned(results: Results) -> Iterator[Results]:
    """A database as its owner sees it, who may create roles."""
    name, database = f"owner-{uuid.uuid4().hex[:8]}", results.value("SELECT current_database()")
    password = PASSWORD.replace("'", "''")
    results.execute(f"CREATE ROLE \"{name}\" LOGIN CREATEROLE PASSWORD '{password}'")
    results.execute(f'ALTER DATABASE {database} OWNER TO "{name}"')
    try:
        yield Results(with_login(results.url, name))
    finally:
        results.execute(f'ALTER DATABASE {database} OWNER TO CURRENT_USER; DROP OWNED BY "{name}" CASCADE')
        for role in (*ROLES, name):
            results.execute(f'DROP OWNED BY "{role}"')
            results.execute(f'DROP ROLE "{role}"')


def test_an_owner_who_is_no_superuser_is_told_what_is_left_for_one(owned: Results, results: Results) -> None:
    """All that he may do is done at once; when the rest is done as well, nothing is told any more."""
    name = f"role-{uuid.uuid4().hex[:8]}"
    variables = EVERYBODY | {"SERVICE_ROLE": name}
    told = run_setup(owned.url, **variables)
    service = Results(with_login(owned.url, name))
    try:
        with Database(service.url, pool_min=1, pool_max=1, timeout=10, instance="few") as database:
            count(database, a_vote())
        assert run(with_login(owned.url, "votes_certifier"), "verify").returncode == 0
        commands = told.partition("in this database:\n")[2]
        assert f'ALTER ROLE "{name}" SET track_activities = off;' in commands
        results.query(commands)
        assert service.value("SHOW track_activities") == "off"
        assert run_setup(owned.url, **variables) == ""
    finally:
        results.execute(f'DROP OWNED BY "{name}"')
        results.execute(f'DROP ROLE "{name}"')


def test_a_role_loses_what_it_must_not_have(results: Results) -> None:
    """Rights and attributes that somebody has given it since."""
    with all_roles(results) as roles:
        service = roles["service"].value("SELECT current_user")
        for role in (service, "votes_auditor"):
            results.query(f'ALTER ROLE "{role}" SUPERUSER CREATEDB CREATEROLE REPLICATION BYPASSRLS')
            results.query(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"')
        set_up_database(results.url, SERVICE_ROLE=service, **EVERYBODY)
        has = "SELECT rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls FROM pg_roles"
        for role in (service, "votes_auditor"):
            assert results.value(f"{has} WHERE rolname = %s", role) is False
            rights = "SELECT DISTINCT privilege_type FROM information_schema.table_privileges WHERE grantee = %s"
            assert results.query(rights, role) == [("SELECT",)]


# --- where ballots can be read ---------------------------------------------------------------------------------------

TALKATIVE = """
    shared_preload_libraries = 'pg_stat_statements,auto_explain'
    pg_stat_statements.track = all
    auto_explain.log_min_duration = 0
    auto_explain.log_nested_statements = on
    track_activity_query_size = 64kB
    log_statement = all
    log_min_duration_statement = 0
    log_transaction_sample_rate = 1
    log_min_error_statement = debug5
    log_error_verbosity = verbose
    log_lock_waits = on
    deadlock_timeout = 50ms
    log_parameter_max_length_on_error = -1
    debug_print_parse = on
    debug_print_plan = on
"""
BALLOT = "ballot-of-some-voter-0123456789"
HIDDEN_VOTE = f"'{BALLOT}'"
# each holds a ballot: one that is written, one that the tables refuse (which shows the row), one that is malformed
STATEMENTS = [
    f"PREPARE p AS SELECT $1::text, {HIDDEN_VOTE}; EXECUTE p ({HIDDEN_VOTE})",
    f"DECLARE c CURSOR FOR SELECT {HIDDEN_VOTE}; FETCH ALL FROM c",
    f"SELECT 1/0, {HIDDEN_VOTE}",
    f"SELECT pg_sleep(0.1), {HIDDEN_VOTE}",
    "SELECT count_batch('x', 0, false, ARRAY[gen_random_uuid()], '{no law}', '{oui}', '{NULL}',"
    f" '{{{BALLOT}}}', '{{f}}'" + ", '{}'" * 13 + ", false)",
]


class TalkativeServer(PostgresServer):
    """PostgreSQL with everything in its log and its statistics that can be had there."""

    def _make_data(self) -> None:
        super()._make_data()
        with (self._data() / "postgresql.conf").open("a") as configuration:
            configuration.write(TALKATIVE)


@pytest.fixture
def talkative(tmp_path: Path) -> Iterator[TalkativeServer]:
    server = TalkativeServer(tmp_path / "talkative")
    server.start()
    yield server
    server.stop()


def deadlock(one: Results, other: Results, texts: tuple[str, str]) -> None:
    """Two sessions that wait for each other; each one's statement has its text."""
    with connect(one) as first, connect(other) as second, concurrent.futures.ThreadPoolExecutor() as threads:
        for number, conn in enumerate((first, second)):
            conn.cursor().execute("SELECT pg_advisory_xact_lock(%s)", (number,))
        waiting = [
            threads.submit(conn.cursor().execute, f"SELECT pg_advisory_xact_lock({1 - number}), '{texts[number]}'")
            for number, conn in enumerate((first, second))
        ]
        errors = [each.exception() for each in waiting]  # the one that is refused lets the other go on
        assert [type(error) for error in errors if error] == [psycopg2.errors.DeadlockDetected]


def test_no_ballot_is_in_the_log_or_the_statistics_of_the_database(talkative: TalkativeServer) -> None:
    """Whatever the server is set to write down, what the service sends is not: neither by itself nor in an error (the
    function catches that of a copy) or a deadlock, in which each session tells the other's statement.
    """
    owner = Results(talkative.url())
    owner.query("CREATE EXTENSION pg_stat_statements")
    with all_roles(owner) as roles:
        service, monitor = roles["service"], roles["votes_monitor"]
        with Database(service.url, pool_min=1, pool_max=1, timeout=10, instance="few") as database:
            ballot = a_vote()._replace(voter_hash=BALLOT)
            count(database, ballot)
            for copy in (ballot, a_vote()._replace(voter_hash=BALLOT)):  # which a unique index refuses
                assert len(database.batch_update_results([copy], []).duplicates) == 1
            with database._transaction(f"SELECT {HIDDEN_VOTE}"):
                seen = [*owner.query(ACTIVITY), *monitor.query(ACTIVITY)]
        assert not [text for (text,) in seen if BALLOT in text]
        for statement in STATEMENTS:
            with contextlib.suppress(psycopg2.Error):
                service.query(statement)
        deadlock(service, service, (BALLOT, BALLOT))
        deadlock(service, owner, (BALLOT, "text of the owner"))
        deadlock(owner, service, ("text of the owner", BALLOT))
        for role in (owner, *roles.values()):
            seen = role.query("SELECT query FROM pg_stat_statements")
            assert not [text for (text,) in seen if text and BALLOT in text]
    log = talkative.log.read_text(errors="replace")
    assert "text of the owner" in log and "deadlock detected" in log  # it is as talkative as it can be
    assert BALLOT not in log


ACTIVITY = "SELECT coalesce(query, '') FROM pg_stat_activity WHERE pid <> pg_backend_pid()"


def test_the_monitor_has_what_the_exporter_reads_and_sees_no_statement(
    roles: dict[str, Results], results: Results
) -> None:
    """Neither what others do now nor what they did; a role of an earlier version loses what it had."""
    monitor = roles["votes_monitor"]
    for relation in (
        "pg_stat_database", "pg_stat_user_tables", "pg_statio_user_tables", "pg_stat_bgwriter", "pg_locks",
        "pg_replication_slots", "pg_stat_archiver", "pg_settings", "pg_ls_waldir()",
    ):  # fmt: skip
        monitor.query(f"SELECT count(*) FROM {relation}")
    assert monitor.value("SELECT pg_database_size(current_database())") > 0
    with connect(results) as conn:
        conn.cursor().execute("SELECT 'a ballot, where the service runs as the owner'")
        assert not [text for (text,) in monitor.query(ACTIVITY) if "a ballot" in text]
    results.execute("GRANT pg_monitor TO votes_monitor")
    service = roles["service"].value("SELECT current_user")
    set_up_database(results.url, SERVICE_ROLE=service, SERVICE_PASSWORD=PASSWORD, MONITOR_PASSWORD=PASSWORD)
    assert not monitor.value("SELECT pg_has_role('pg_read_all_stats', 'USAGE')")
    for relation in ("vote_audit", "vote_results", "vote_statistics"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            monitor.query(f"SELECT * FROM {relation}")


# --- what a database or a role may set -----------------------------------------------------------------------------

SETTINGS = {
    "client_encoding": "LATIN1",
    "array_nulls": "off",
    "DateStyle": "'SQL, DMY'",
    "TimeZone": "'Pacific/Chatham'",
    "IntervalStyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "transform_null_equals": "on",
    "row_security": "off",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "session_replication_role": "replica",
    "search_path": "pg_catalog",
}


@pytest.fixture
def strange(database: Database, results: Results) -> Results:
    """A database in which all is set that can be, and which has a law with a title that needs Unicode."""
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', 'Loi n\u00ba 1 \u2014 \u20ac')")
    name = results.value("SELECT current_database()")
    for setting, value in SETTINGS.items():
        results.execute(f"ALTER DATABASE {name} SET {setting} = {value}")
    return results


def test_the_service_counts_and_shows_whatever_the_database_has_set(strange: Results) -> None:
    """Votes with and without a moment and a voter, copies, what is no vote, and what the page shows of them."""
    with Database(strange.url, pool_min=1, pool_max=1, timeout=10, instance="x") as database:
        database.initialise_schema()
        one = a_vote()._replace(voter_hash="h" * 16, voted_at=datetime(2026, 3, 4, 5, 6, 7, 8, UTC))
        count(database, one, a_vote("law-2"), a_vote("law-3", "non"))
        outcome = database.batch_update_results([one, a_vote()], [Rejection(b"\\'\0", "not_json", "\\é", None, 1)])
        assert (len(outcome.counted), len(outcome.duplicates)) == (1, 1)
        database.probe()
        database.record_minute(Minute(time.time(), 1, 1))
        cache = ResultsCache(database.read, DatabaseUnavailable)
        cache.refresh()
    shown = json.loads(cache.latest.json)
    assert abs(datetime.fromisoformat(shown["read_at"]).timestamp() - time.time()) < 3_600
    assert shown["laws"][0]["title"] == "Loi n\u00ba 1 \u2014 \u20ac"
    assert [law["total"] for law in shown["laws"]] == [2, 1, 1]
    strange.query("SET client_encoding = 'UTF8'; SELECT 1")
    assert strange.query("SELECT body, detail FROM public.rejected_messages")[0][1] == "\\é"
    assert strange.query("SELECT voted_at FROM public.vote_audit WHERE voted_at IS NOT NULL") == [(one.voted_at,)]
    assert strange.value("SELECT updated_at >= recorded_at FROM public.vote_results, public.vote_audit LIMIT 1")


def test_the_proof_is_the_same_whatever_the_database_has_set(strange: Results, database: Database) -> None:
    """Sealed before and after; a law of other letters, of an earlier version, is read as it is."""
    strange.query(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
        "ALTER TABLE public.vote_audit DROP CONSTRAINT vote_audit_contract;"
        "ALTER TABLE public.vote_results DROP CONSTRAINT vote_results_contract; SET search_path = public;"
        "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered)"
        " VALUES (gen_random_uuid(), 'law \u00e9', 'oui', 'x', false);"
        "INSERT INTO vote_results (law_id, oui_count) VALUES ('law \u00e9', 1)"
    )
    (made,) = seal(strange)
    assert verify(strange, made.name()) == []
    for command in (["verify", "--since", made.name()], [], ["--recount", "--all"], ["results", "--json"]):
        done = run(strange.url, *command, PYTHONIOENCODING="utf-8")
        assert (done.returncode, done.stderr) == (0, ""), (command, done)
    (titled,) = [law for law in json.loads(done.stdout)["laws"] if law["law_id"] == "law-1"]
    assert titled["title"] == "Loi n\u00ba 1 \u2014 \u20ac"


def test_totals_that_cannot_be_read_stop_no_count(
    roles: dict[str, Results], results: Results, queue: Queue, start_service: Callable[..., Service]
) -> None:
    """Of very many laws, which anybody's votes make, it takes longer than a statement may; here a right is missing."""
    role = parse_dsn(roles["service"].url)["user"]
    results.query(f'REVOKE SELECT ON vote_results FROM "{role}"; GRANT SELECT (updated_at) ON vote_results TO "{role}"')
    service = start_service(DATABASE_URL=roles["service"].url)
    before = results.totals()["law-2"]
    queue.publish(vote(law_id="law-2"))
    wait_until(lambda: results.totals()["law-2"] == (before[0] + 1, before[1]), "the vote is counted")
    (said,) = [line for line in service.lines() if line["message"].startswith("totals cannot be read")]
    assert "permission denied" in said["fields"]["error"]


def test_a_session_that_was_reset_still_counts_in_its_own_tables(database: Database, results: Results) -> None:
    """Each transaction says itself what it relies on."""
    name = results.value("SELECT current_database()")
    results.execute("CREATE SCHEMA shadow; CREATE TABLE shadow.vote_results (LIKE vote_results)")
    results.execute(f"ALTER DATABASE {name} SET search_path = shadow")
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="x") as replica:
        count(replica, a_vote())
        replica.read("RESET ALL; SELECT 1")
        count(replica, a_vote())
        assert replica.totals([], 10)[0] == {"law-1": (2, 0)}


def test_a_view_cannot_show_verify_another_log(database: Database, results: Results) -> None:
    """What it runs is its owner's, in the session of who reads it: the path that it sets there does not last."""
    count(database, a_vote(), a_vote())
    seal(results)
    results.query("CREATE SCHEMA shadow; CREATE TABLE shadow.vote_results AS TABLE vote_results")
    results.query("UPDATE vote_results SET oui_count = 7")
    results.query(
        "CREATE FUNCTION sets() RETURNS text LANGUAGE sql"
        " AS $$SELECT nullif(set_config('search_path', 'shadow, public', false), 'shadow, public')$$;"
        "CREATE OR REPLACE VIEW vote_statistics AS SELECT law_id::varchar(64), sets() AS title,"
        " 'open'::varchar AS status, oui_count, non_count, oui_count + non_count AS total_count,"
        " round(100.0, 2) AS oui_percent, round(0.0, 2) AS non_percent, updated_at FROM public.vote_results"
    )
    assert any(problem.startswith("vote_results, law law-1") for problem in verify(results)), verify(results)


# --- moments that no calendar has ------------------------------------------------------------------------------------


def test_a_moment_without_end_blanks_no_page(database: Database, results: Results) -> None:
    """An earlier version took it: the results are shown, and the table takes no more of the kind."""
    count(database, a_vote(), a_vote("law-2"), a_vote("law-3"))
    results.query("ALTER TABLE vote_results DROP CONSTRAINT IF EXISTS vote_results_moment")
    results.query("ALTER TABLE vote_results DISABLE TRIGGER USER")
    for law, moment in (("law-1", "infinity"), ("law-2", "-infinity"), ("law-3", "30000-01-01")):
        results.query("UPDATE vote_results SET updated_at = %s WHERE law_id = %s", moment, law)
    results.query("ALTER TABLE vote_results ENABLE TRIGGER USER")
    results.execute((ROOT / "init_db.sql").read_text())
    cache = ResultsCache(database.read, DatabaseUnavailable)
    cache.refresh()
    assert [law["last_vote_at"] for law in json.loads(cache.latest.json)["laws"]] == [None] * 3
    for form in ("--json", "--csv", ""):
        done = run(results.url, "results", *([form] if form else []))
        assert (done.returncode, "law-3" in done.stdout) == (0, True), done
    with pytest.raises(psycopg2.errors.CheckViolation):
        results.query("INSERT INTO vote_results (law_id, updated_at) VALUES ('law-9', 'infinity')")
    count(database, a_vote())


def test_a_law_may_be_open_since_ever_and_for_ever(roles: dict[str, Results], results: Results) -> None:
    """Moments without end are an operator's to set; certify reads them."""
    results.query("UPDATE laws SET opens_at = '-infinity', closes_at = '30000-01-01' WHERE law_id = 'law-2'")
    nowhere = "amqp://votes:x@127.0.0.1:1/"
    done = run(roles["votes_certifier"].url, "certify", "law-2", AMQP_URL=nowhere)
    assert (done.returncode, "law-2 is not closed" in done.stderr) == (1, True), done


def test_a_title_is_no_formula_in_either_table(database: Database, results: Results) -> None:
    """Of the page and of the command."""
    title = '=HYPERLINK("http://example.org")'
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', %s)", title)
    cache = ResultsCache(database.read, DatabaseUnavailable)
    cache.refresh()
    for table in (run(results.url, "results", "--csv").stdout, cache.latest.csv.decode("utf-8-sig")):
        assert next(csv.DictReader(io.StringIO(table)))["title"] == f"'{title}"


# --- passwords, and links in the clear -------------------------------------------------------------------------------

MINIMAL = {"RABBITMQ_PASSWORD": "broker-secret", "POSTGRES_PASSWORD": "database-secret"}


def settings(**environ: str) -> Settings:
    return Settings.from_env(MINIMAL | environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RABBITMQ_MANAGEMENT_URL", "http://h:15672/?password=s3cret"),
        ("RABBITMQ_MANAGEMENT_URL", "http://u:s3cret@h:15672"),
        ("RABBITMQ_HOST", "amqps://h/?ssl_options={'password':'s3cret'}"),
        ("RABBITMQ_HOST", "h?password=s3cret"),
        ("RABBITMQ_PORT", "5672/?password=s3cret"),
        ("POSTGRES_HOST", "host=db password=s3cret"),
        ("POSTGRES_HOST", "db user=u sslpassword = 's3cret'"),
        ("POSTGRES_PORT", "5432/votes?password=s3cret"),
        ("INSTANCE_NAME", "postgresql://u:p@s3cret@h/"),
        ("DATABASE_URL", "postgresql://u:p@s3cret@h/"),
        ("AMQP_URL", "amqp://u:p@s3cret@h/"),
    ],
)
def test_a_password_in_a_wrong_place_is_not_told(name: str, value: str) -> None:
    """A value is refused in words that do not repeat what it may hold."""
    with pytest.raises(InvalidSettings) as caught:
        settings(**{name: value})
    assert caught.value.faults[0].startswith(f"{name} is ***") and "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    ["{'password': \"it's-s3cret\"}", "{'password':b'it%5C%27s-s3cret'}", "{'password': 'it%5C%27s' '-s3cret'}"],
)
def test_the_password_of_a_key_file_is_known_in_any_form(options: str) -> None:
    """As pika reads it: whatever Python takes for a text."""
    url = f"amqps://u:broker-secret@h/?ssl_options={options.replace(' ', '+')}"
    found = dataclasses.replace(settings(), amqp_urls=(url,))  # a key file would have to be there
    assert "it's-s3cret" in found.secrets()
    assert "s3cret" not in str(found.redacted())


def logged(secrets: list[str], message: str, **fields: object) -> dict[str, Any]:
    """A line of our own log."""
    made = logging.makeLogRecord({"name": "aggregator", "msg": message, "pathname": str(ROOT / "aggregator.py")})
    made.fields = fields
    line: dict[str, Any] = json.loads(JsonFormatter(secrets).format(made))
    return line


@pytest.mark.parametrize("password", ["votes", "2026", "aggregation", "consuming", "1"])
def test_a_password_that_is_a_word_of_the_log_spoils_no_line(password: str) -> None:
    """It would tell what the password is, too."""
    line = logged([password], "consuming", queue="votes.aggregation", server="h:5671", at="2026-11-24")
    assert line["fields"] == {"queue": "votes.aggregation", "server": "h:5671", "at": "2026-11-24"}
    assert (line["message"], "*" in line["time"]) == ("consuming", False)


def test_what_drivers_say_is_kept_clean_of_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    """In the field that has their text, in exceptions, and in what they log themselves."""
    assert logged(["s3cret"], "x", error='invalid port "s3cret"')["fields"] == {"error": 'invalid port "***"'}
    password = "".join(["s3", "cret"])  # a stack trace shows lines of this file
    configure_logging("INFO", [password])
    try:
        made = logging.LogRecord("some.driver", logging.ERROR, "/lib/driver.py", 1, f"given {password}", None, None)
        logging.getLogger("some.driver").handle(made)
        try:
            raise ValueError(f"refused {password}")
        except ValueError:
            logging.getLogger("aggregator").exception("failed")
    finally:
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
    said = capsys.readouterr().out
    assert "given ***" in said and "refused ***" in said and password not in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqp://u:s3cret@h:1/v,amqp://u:s3cret@h2/v", "amqp://u:***@h:1/v,amqp://u:***@h2/v"),
        ("postgresql://u:p@s3cret@h1,h2/d", "postgresql://u:***@h1,h2/d"),
        ("no postgresql://h/d?password=s3cret&sslmode=require", "no postgresql://h/d?password=***&sslmode=require"),
        ("host=h password = 's3 cret' user=u", "host=h password = *** user=u"),
        ("amqps://h/?ssl_options=s3cret", "amqps://h/?ssl_options=***"),
        ("at 10:00 mail me@example.org", "at 10:00 mail me@example.org"),
    ],
)
def test_passwords_are_taken_out_of_addresses_by_their_structure(text: str, shown: str) -> None:
    """Wherever they stand, also one that is not ours."""
    line = logged([], text, server=text, nested={"of": [text]})
    assert (line["message"], line["fields"]) == (shown, {"server": shown, "nested": {"of": [shown]}})


@pytest.mark.parametrize("password", ["short", "localhost", "Password", "aggregation", "postgresql", "some-replica"])
def test_a_weak_password_is_warned_of(password: str) -> None:
    """One that is short, or a word of the log, cannot be told apart from other texts."""
    (warning,) = settings(RABBITMQ_PASSWORD=password, INSTANCE_NAME="some-replica-1").warnings()
    assert warning.startswith("AMQP_URL: ") and "some-replica" not in warning
    (warning,) = settings(POSTGRES_PASSWORD=password[:7]).warnings()
    assert warning.startswith("DATABASE_URL: ")
    assert settings().warnings() == []


@pytest.mark.parametrize(
    ("environ", "warned_of"),
    [
        ({"RABBITMQ_HOST": "broker.example.org"}, ["AMQP_URL"]),
        ({"RABBITMQ_HOST": "localhost,192.0.2.1"}, ["AMQP_URL"]),
        ({"POSTGRES_HOST": "db"}, ["DATABASE_URL"]),
        ({"DATABASE_URL": "host=127.0.0.1,2001:db8::1 password=database-secret"}, ["DATABASE_URL"]),
        ({"DATABASE_URL": "host=db password=database-secret sslmode=prefer"}, ["DATABASE_URL"]),
        ({"RABBITMQ_MANAGEMENT_URL": "http://broker:15672"}, ["RABBITMQ_MANAGEMENT_URL"]),
        ({"RABBITMQ_MANAGEMENT_URL": "https://broker:15671"}, []),
        ({"RABBITMQ_MANAGEMENT_URL": "http://localhost:15672"}, []),
        ({"DATABASE_URL": "host=db password=database-secret sslmode=require"}, []),
        ({"DATABASE_URL": "postgresql://u:database-secret@db/x?sslmode=verify-full"}, []),
        ({"DATABASE_URL": "host=/run/postgresql password=database-secret"}, []),
        ({"AMQP_URL": "amqps://u:broker-secret@broker/"}, []),
        ({"RABBITMQ_HOST": "127.0.0.2,::1", "POSTGRES_HOST": "localhost"}, []),
    ],
)
def test_a_link_in_the_clear_that_leaves_the_machine_is_warned_of(
    environ: dict[str, str], warned_of: list[str]
) -> None:
    """Not one to a loopback address or a Unix socket."""
    assert [warning.partition(":")[0] for warning in settings(**environ).warnings()] == warned_of


# --- the broker's user of these --------------------------------------------------------------------------------------


@pytest.fixture
def broker_users(services: LocalServices, queue: Queue, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The queue's URL for each user of definitions.sh; the management API has figures of the queue."""
    names = {kind: f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("service", "publisher", "auditor")}
    variables = {f"{kind.upper()}_USER": name for kind, name in names.items()}
    variables |= {f"{kind.upper()}_PASSWORD": PASSWORD for kind in names} | {"RABBITMQ_QUEUE": queue.name}
    with queue.channel():
        pass  # declares it
    import_definitions(services, tmp_path, variables)
    yield {kind: with_login(queue.url, name) for kind, name in names.items()}
    for name in names.values():
        services.rabbitmq.ctl("delete_user", name)


def on_queue(services: LocalServices, queue: Queue, url: str) -> dict[str, str]:
    return {
        "AMQP_URL": url,
        "RABBITMQ_QUEUE": queue.name,
        "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
    }


def test_the_auditors_broker_user_sees_figures_and_nothing_else(
    services: LocalServices, queue: Queue, broker_users: dict[str, str], roles: dict[str, Results]
) -> None:
    """What is ready and what is unacked, for `reconcile` and `certify`; it can read, publish and declare nothing."""
    settings = on_queue(services, queue, broker_users["auditor"])
    wait_until(lambda: reconcile.ask_broker(settings) == reconcile.InQueue(0, 0), "the management API has figures")
    done = run(roles["votes_auditor"].url, "--json", **settings)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["queue"] == {"ready": 0, "unacked": 0, "problem": None}
    as_auditor = Queue(broker_users["auditor"], queue.name)
    for attempt in (
        lambda channel: channel.basic_get(queue.name),
        lambda channel: channel.basic_publish("", queue.name, b"{}"),
        lambda channel: channel.queue_purge(queue.name),
        lambda channel: channel.queue_delete(queue.name),
        lambda channel: channel.queue_declare(queue.name + "-other"),
    ):
        connection = as_auditor.connect()
        channel = connection.channel()
        with pytest.raises(AMQPError, match="ACCESS_REFUSED"):
            attempt(channel)
            channel.queue_declare(queue.name, passive=True)  # which is answered after the publish is refused
        connection.close()
    parameters = pika.URLParameters(broker_users["auditor"])
    login = base64.b64encode(f"{parameters.credentials.username}:{PASSWORD}".encode()).decode()
    address = f"{settings['RABBITMQ_MANAGEMENT_URL']}/api/queues/%2F/{queue.name}/get"
    body = json.dumps({"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto"}).encode()
    request = urllib.request.Request(address, body, {"Authorization": f"Basic {login}"})
    queue.publish(vote())
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    with refused.value as answer:
        assert b"ACCESS_REFUSED" in answer.read() or answer.code in (401, 403)
    assert queue.ready() == 1


@pytest.mark.parametrize("user", ["service", "stranger"])
def test_a_user_whom_the_management_api_refuses_has_no_right(
    services: LocalServices, queue: Queue, broker_users: dict[str, str], roles: dict[str, Results], user: str
) -> None:
    """Without the tag, or with a wrong password: the comparison is printed, and no difference is claimed."""
    url = broker_users.get(user) or with_login(queue.url, "stranger")
    settings = on_queue(services, queue, url)
    done = run(roles["votes_auditor"].url, **settings)
    assert (done.returncode, "2 laws, no difference" in done.stdout) == (3, True), done
    assert "refuses" in done.stderr
    done = run(roles["votes_certifier"].url, "certify", "law-1", **settings)
    assert (done.returncode, done.stdout) == (3, ""), done


def test_a_difference_is_told_also_where_the_broker_refuses(
    services: LocalServices, queue: Queue, broker_users: dict[str, str], roles: dict[str, Results], results: Results
) -> None:
    """That is what the command is for."""
    results.query("UPDATE vote_results SET oui_count = 7 WHERE law_id = 'law-2'")
    done = run(roles["votes_auditor"].url, **on_queue(services, queue, broker_users["service"]))
    assert done.returncode == 1, done
