"""What somebody with rights of their own could do to the count or to its proof: each attempt, and what holds it now."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import secrets
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import reconcile
import seals
from database import Database
from scripts.local_services import LocalServices
from tests.harness import ROOT, Results, Service, wait_until
from tests.integration.test_few_rights import PASSWORD, set_up_database, with_login
from votes import Vote

EARLIER = Path(__file__).parent.parent / "integration"  # where the schemas of earlier versions are
INSERT_VOTE = """
    INSERT INTO vote_audit (vote_id, law_id, choice, voter_hash, instance, redelivered)
    VALUES (gen_random_uuid(), %s, %s, %s, 'insider', false)
"""
INSERT_TOTAL = "INSERT INTO vote_results (law_id, oui_count) VALUES (%s, 1)"
INSERT_ATTEMPT = """
    INSERT INTO duplicate_attempts
        (vote_id, law_id, choice, voter_hash, reason, counted_vote_id, counted_law_id, counted_choice, instance)
    VALUES (gen_random_uuid(), %s, %s, %s, 'conflict', gen_random_uuid(), %s, %s, 'insider')
"""
INSERT_REJECTED = """
    INSERT INTO rejected_messages (body_sha256, body, body_bytes, reason, law_id, instance)
    VALUES (%s, 'x', 1, 'certified', %s, 'insider')
"""
INSERT_LAW = "INSERT INTO laws (law_id, title) VALUES (%s, 'On bread')"
INSERT_RECOUNT = """
    INSERT INTO recounts (recounted_by, law_id, oui_before, non_before, oui_after, non_after)
    VALUES ('insider', %s, 0, 0, 0, 0)
"""


def connect(results: Results) -> Any:
    return contextlib.closing(psycopg2.connect(results.url))


def upgrade(results: Results) -> None:
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="replica-1") as database:
        database.initialise_schema()


def a_vote(law_id: str = "law-1", choice: str = "oui") -> Vote:
    return Vote.from_message(f'{{"vote_id":"{uuid.uuid4()}","law_id":"{law_id}","choice":"{choice}"}}'.encode())


def count(database: Database, *votes: Vote) -> None:
    assert len(database.batch_update_results(votes, []).counted) == len(votes)


def seal(results: Results) -> list[seals.Seal]:
    with seals.sealing_session(results.url) as (reader, writer):
        return seals.seal(reader, writer)


def verify(results: Results, *published: str) -> list[str]:
    """The problems that are found."""
    with connect(results) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        return [problem.text for problem in seals.verify(conn, published).problems]


# --- law ids that COPY escapes ---------------------------------------------------------------------------------------

HOSTILE_LAWS = ["law\r1", "a\\tb", "a\tb", "\b\f\n\v\\", "\\", "\\N", "\\x41", "\\101", "law é"]


@pytest.fixture(scope="session")
def copied(services: LocalServices) -> Iterator[Callable[[str], bytes]]:
    """A text as COPY writes it."""
    conn = psycopg2.connect(services.postgres.url())
    with contextlib.closing(conn), conn.cursor() as cur:

        def copied(text: str) -> bytes:
            out = io.BytesIO()
            cur.copy_expert(cur.mogrify("COPY (SELECT %s::text) TO STDOUT", (text,)), out)
            return out.getvalue()[:-1]

        yield copied


def test_the_text_of_copy_is_read_and_written_exactly(copied: Callable[[str], bytes]) -> None:
    """Any text of any length: what COPY makes of it is what we make of it, and the way back is the way back."""

    @given(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("\\\b\f\n\r\t\v"))
    )
    @example("a\\tb")
    @example("law\r1")
    @example("\\x41\\101\\N\\.")
    def agrees(text: str) -> None:
        assert seals._as_copy(text) == copied(text)
        assert seals._from_copy(copied(text)) == text

    agrees()


def test_every_escape_that_copy_reads_is_read_alike(services: LocalServices) -> None:
    """Octal and hexadecimal ones too, which COPY reads and does not write."""
    pieces = [
        *(f"\\{character}" for character in "bfnrtv\\q"),
        "\\x4",
        "\\x4a",
        "\\xZ",
        "\\61",
        "\\101",
        "\\1018",
        "a",
        "1",
    ]
    with contextlib.closing(psycopg2.connect(services.postgres.url())) as conn, conn.cursor() as cur:
        conn.autocommit = True
        cur.execute("CREATE TEMPORARY TABLE read (text text)")

        @given(st.lists(st.sampled_from(pieces), min_size=1).map("".join))
        @example("\\xc3\\251")
        @example("\\611")
        def agrees(line: str) -> None:
            cur.execute("TRUNCATE read")
            try:
                cur.copy_expert("COPY read FROM STDIN", io.BytesIO(line.encode() + b"\n"))
            except psycopg2.errors.CharacterNotInRepertoire:
                with pytest.raises(UnicodeDecodeError):
                    seals._from_copy(line.encode())
                return
            cur.execute("SELECT text FROM read")
            assert seals._from_copy(line.encode()) == cur.fetchone()[0]

        agrees()


@pytest.mark.parametrize("version", [1, 3, 4])
def test_laws_that_an_earlier_version_took_do_not_spoil_verification(results: Results, version: int) -> None:
    """An insider has put them there before the upgrade: it goes through, and seals and totals agree."""
    results.execute((EARLIER / f"init_db_v{version}.sql").read_text())
    for law_id in HOSTILE_LAWS:
        results.query(INSERT_VOTE, law_id, "oui", None)
        results.query(INSERT_TOTAL, law_id)
    results.query(INSERT_VOTE, "law-1", "non", "h")
    results.query("INSERT INTO vote_results VALUES ('law-1', 0, 1)")
    for _ in range(2):
        results.execute((ROOT / "init_db.sql").read_text())
    assert len(HOSTILE_LAWS) + 1 == sum(made.votes for made in seal(results))
    assert verify(results) == []
    stored = results.query('SELECT law_id FROM sealed_totals ORDER BY law_id COLLATE "C"')
    assert [law_id for (law_id,) in stored] == sorted([*HOSTILE_LAWS, "law-1"])


@pytest.mark.parametrize("law_id", [*HOSTILE_LAWS, "", "-law", "law 1", "law\n", "law-1;"])
def test_the_tables_take_no_law_that_the_contract_does_not(database: Database, results: Results, law_id: str) -> None:
    """Nor do those of the service's own function, whoever calls it."""
    for statement, values in [
        (INSERT_VOTE, (law_id, "oui", None)),
        (INSERT_TOTAL, (law_id,)),
        (INSERT_ATTEMPT, (law_id, "oui", None, "law-1", "oui")),
        (INSERT_ATTEMPT, ("law-1", "oui", None, law_id, "oui")),
        (INSERT_REJECTED, (b"1", law_id)),
        (INSERT_LAW, (law_id,)),
        (INSERT_RECOUNT, (law_id,)),
    ]:
        with pytest.raises(psycopg2.errors.CheckViolation):
            results.query(statement, *values)


@pytest.mark.parametrize("voter_hash", ["", "short", "h" * 15, "h" * 15 + "é", "h" * 16 + "\n", "h" * 15 + "\\"])
def test_the_tables_take_no_voter_or_choice_that_the_contract_does_not(
    database: Database, results: Results, voter_hash: str
) -> None:
    """A choice is oui or non in the evidence too."""
    for statement, values in [
        (INSERT_VOTE, ("law-1", "oui", voter_hash)),
        (INSERT_ATTEMPT, ("law-1", "oui", voter_hash, "law-1", "oui")),
        (INSERT_ATTEMPT, ("law-1", "Oui", None, "law-1", "oui")),
        (INSERT_ATTEMPT, ("law-1", "oui", None, "law-1", "\r")),
    ]:
        with pytest.raises(psycopg2.errors.CheckViolation):
            results.query(statement, *values)


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "9999-01-01Z", "0001-01-01 BC"])
def test_the_log_takes_no_moment_that_the_verifiers_refuse(database: Database, results: Results, moment: str) -> None:
    """By the service's function, whose caller says when a vote was cast: the log is never changed again."""
    with pytest.raises(psycopg2.errors.CheckViolation):
        results.query(
            "SELECT * FROM count_batch('r', 0, false, ARRAY[gen_random_uuid()], '{a}', '{oui}', ARRAY[%s::timestamptz],"
            " '{NULL}', '{f}'" + ", '{}'" * 13 + ", false)",
            moment,
        )


def test_the_tables_take_all_that_the_contract_takes(database: Database, results: Results) -> None:
    """To the last character and the greatest length."""
    law_id, voter_hash = "0" + "aZ9._:-" * 9, "aZ09_+/=-" * 14
    results.query(INSERT_VOTE, law_id, "oui", voter_hash)
    results.query(INSERT_ATTEMPT, law_id, "non", "h" * 16, "l", "oui")
    results.query(INSERT_TOTAL, law_id)
    results.query(INSERT_REJECTED, b"1", law_id)
    results.query(INSERT_REJECTED, b"2", None)
    results.query(INSERT_LAW, law_id)
    results.query(INSERT_RECOUNT, law_id)


@pytest.mark.parametrize("version", [1, 3, 4])
def test_an_upgrade_holds_old_rows_to_the_contract_where_they_allow_it(results: Results, version: int) -> None:
    """A row that does not stays, its table takes no other such row; the other tables are checked as a whole."""
    results.execute((EARLIER / f"init_db_v{version}.sql").read_text())
    results.query(INSERT_VOTE, "law\r1", "oui", None)
    results.query(INSERT_TOTAL, "law-1")
    results.query(INSERT_ATTEMPT, "law-1", "oui", "h" * 16, "law-1", "non")
    upgrade(results)
    results.execute((ROOT / "init_db.sql").read_text())
    checked = dict(
        results.query("SELECT conrelid::regclass::text, convalidated FROM pg_constraint WHERE conname LIKE '%contract'")
    )
    tables = {"vote_audit", "vote_results", "duplicate_attempts", "rejected_messages"}
    tables |= {"laws", "recounts", "certified_results"}
    assert checked == {table: table != "vote_audit" for table in tables}
    with pytest.raises(psycopg2.errors.CheckViolation):
        results.query(INSERT_VOTE, "law\r1", "oui", None)


# --- the sealer's role -----------------------------------------------------------------------------------------------


@pytest.fixture
def sealer(database: Database, results: Results) -> Iterator[Results]:
    """The database, as the sealer's role sees it; two votes are sealed, and one is not."""
    count(database, a_vote(), a_vote("law-2"))
    seal(results)
    count(database, a_vote())
    name = f"role-{uuid.uuid4().hex[:8]}"
    set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD, SEALER_PASSWORD=PASSWORD)
    yield Results(with_login(results.url, "votes_sealer"))
    results.execute(f'DROP OWNED BY "{name}", votes_sealer')
    results.execute(f'DROP ROLE "{name}", votes_sealer')


INSERT_SEAL = "INSERT INTO audit_seals SELECT (jsonb_populate_record(NULL::audit_seals, %s)).*"


def insert_seals(role: Results, *made: seals.Seal, **columns: str) -> None:
    """Without a vote in any; ``columns`` are written over those that belong to a seal."""
    with connect(role) as conn, conn, conn.cursor() as cur:
        for each in made:
            fields: dict[str, Any] = {**dataclasses.asdict(each), "seal_hash": each.hash(), "leaves": b""}
            texts = {name: f"\\x{value.hex()}" if type(value) is bytes else value for name, value in fields.items()}
            cur.execute(INSERT_SEAL, (json.dumps(texts | columns),))


def next_seal(results: Results, **changes: Any) -> seals.Seal:
    """The empty seal that may come next."""
    with connect(results) as conn, seals.transaction(conn) as cur:
        head = seals.head(cur)
        assert head is not None
        cur.execute(seals.SELECT_HORIZON)
        horizon = seals.one_row(cur)[0]
    made = seals.Seal(
        head.seal_id + 1, head.to_txid, horizon, 0, seals.merkle_root([]), hashlib.sha256(b"").digest(),
        "2026-01-01 00:00:00+00", head.hash(), hashlib.sha256(b"").digest(), secrets.token_bytes(32),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_the_sealer_can_seal(sealer: Results, results: Results) -> None:
    """By the function that it is for, and by hand too, where the seal is the one that may come next."""
    assert [made.votes for made in seal(sealer)] == [1]
    sealer.query("SET TimeZone = 'Pacific/Chatham'")
    insert_seals(sealer, next_seal(results))
    assert verify(results) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"to_txid": 2**62},
        {"to_txid": 2**63 - 1},
        {"seal_id": 4},
        {"seal_id": 0},
        {"seal_id": -1},
        {"from_txid": 0},
        {"from_txid": 2**40},
        {"to_txid": 0},
        {"to_txid": -(2**63)},
        {"previous_hash": seals.NO_HASH},
        {"previous_hash": b""},
        {"votes": -1},
        {"votes": 1},
        {"records_hash": None},
        {"records_hash": b""},
        {"salt": None},
        {"salt": b""},
        {"salt": b"of 31 bytes it is not long enou"},
        {"sealed_at": "2999-01-01 00:00:00+00"},
        {"sealed_at": "-infinity"},
        {"merkle_root": b"31 bytes are no hash of SHA-256"},
        {"merkle_root": b""},
    ],
    ids=str,
)
def test_the_sealer_cannot_stop_the_count_or_break_the_chain(
    sealer: Results, results: Results, database: Database, changes: dict[str, Any]
) -> None:
    """No seal but the one that follows the last, and none of what is not over: replicas go by its end."""
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="seal"):
        insert_seals(sealer, next_seal(results, **changes))
    database.probe()
    assert len(seal(sealer)) == 1
    assert verify(results) == []


@pytest.mark.parametrize("columns", [{"seal_hash": "\\x00"}, {"seal_hash": "\\x"}, {"leaves": "\\x00"}], ids=str)
def test_the_sealer_cannot_write_a_seal_that_is_not_what_it_says(
    sealer: Results, results: Results, columns: dict[str, str]
) -> None:
    """No other could follow it."""
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="seal"):
        insert_seals(sealer, next_seal(results), **columns)


def test_the_sealer_cannot_jump_in_two_steps(sealer: Results, results: Results) -> None:
    """Each seal of a transaction is looked at, with those before it; none may cover a transaction that still runs."""
    made = next_seal(results)
    after = dataclasses.replace(
        made, seal_id=made.seal_id + 1, from_txid=made.to_txid, to_txid=2**50, previous_hash=made.hash()
    )
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="seal"):
        insert_seals(sealer, made, after)
    with connect(results) as conn, conn.cursor() as cur:
        cur.execute("SELECT pg_current_xact_id()::text::bigint")
        running = cur.fetchone()[0]
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="seal"):
            insert_seals(sealer, dataclasses.replace(made, to_txid=running + 1))


# --- other tables of the same name -----------------------------------------------------------------------------------

TABLES = ("vote_audit", "vote_results", "audit_seals", "sealed_totals", "certified_results", "laws", "recounts")
FALSIFY = """
    ALTER TABLE public.vote_audit DISABLE TRIGGER ALL;
    UPDATE public.vote_audit SET choice = 'non' WHERE law_id = 'law-1'
"""


@pytest.fixture
def shadowed(database: Database, results: Results) -> Results:
    """A sealed log whose tables have honest copies in another schema, which each session's path names first."""
    count(database, a_vote(), a_vote("law-2"))
    seal(results)
    results.query(
        "CREATE SCHEMA shadow;"
        + "".join(f"CREATE TABLE shadow.{table} AS TABLE public.{table};" for table in TABLES)
        + "CREATE VIEW shadow.vote_statistics AS SELECT * FROM public.vote_statistics WHERE false;"
        "CREATE TABLE public.recounted (law_id text PRIMARY KEY, oui_count bigint, non_count bigint);"
        "CREATE FUNCTION shadow.pg_backend_pid() RETURNS integer LANGUAGE sql AS 'SELECT 1/0';"
        "CREATE FUNCTION shadow.now() RETURNS timestamptz LANGUAGE sql AS $$SELECT timestamptz '2000-01-01'$$"
    )
    path_of_all(results, "shadow, pg_catalog, public")
    return results


def path_of_all(results: Results, path: str) -> None:
    name = results.value("SELECT current_database()")
    results.execute(f"ALTER DATABASE {name} SET search_path = {path}")


def run(url: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """reconcile.py as a process of its own."""
    command = [sys.executable, str(ROOT / "reconcile.py"), *arguments]
    environment = {"DATABASE_URL": url, **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT / "tests")


def test_a_role_is_not_shown_another_log(shadowed: Results) -> None:
    """Whatever the path that its owner, or it itself, has set for it: what is compared is what is counted."""
    name = f"auditor-{uuid.uuid4().hex[:8]}"
    password = PASSWORD.replace("'", "''")
    shadowed.query(
        f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}';"
        f'GRANT USAGE ON SCHEMA shadow TO "{name}"; GRANT SELECT ON ALL TABLES IN SCHEMA public, shadow TO "{name}";'
        f'ALTER ROLE "{name}" SET search_path = shadow, public;' + FALSIFY
    )
    try:
        auditor = with_login(shadowed.url, name)
        done = run(auditor, "verify")
        assert (done.returncode, "was altered" in done.stdout) == (1, True), done.stdout + done.stderr
        assert run(auditor).returncode == 1
    finally:
        shadowed.execute(f'DROP OWNED BY "{name}"')
        shadowed.execute(f'DROP ROLE "{name}"')


def test_temporary_tables_are_not_taken_for_the_log(database: Database, results: Results) -> None:
    """They come first in every path that does not put them last."""
    count(database, a_vote())
    seal(results)
    with connect(results) as conn:
        with conn, conn.cursor() as cur:
            for table in TABLES:
                cur.execute(f"CREATE TEMPORARY TABLE {table} AS TABLE public.{table}")
            cur.execute(FALSIFY)
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        assert "row 1: vote" in seals.verify(conn).problems[0].text
        (law,) = reconcile.compare(conn)[0]
        assert not law.agrees


def test_what_is_sealed_recounted_and_shown_is_what_is_counted(shadowed: Results) -> None:
    """The commands that write do it in the tables of the service, and by the server's own functions."""
    with contextlib.closing(psycopg2.connect(shadowed.url)) as conn:
        with conn, conn.cursor() as cur:
            cur.execute("UPDATE public.vote_results SET oui_count = 7 WHERE law_id = 'law-1'")
        conn.set_session()
        assert [law.law_id for law in reconcile.recount(conn, None, "a test") if not law.agrees] == ["law-1"]
    assert shadowed.query("SELECT sum(oui_count) FROM public.vote_results") == [(2,)]
    assert shadowed.query("SELECT count(*) FROM public.recounted") == [(0,)]
    assert "law-1" in run(shadowed.url, "results").stdout
    shadowed.query(INSERT_VOTE.replace("vote_audit", "public.vote_audit"), "law-1", "oui", None)
    assert [made.seal_id for made in seal(shadowed)] == [2]
    assert shadowed.value("SELECT count(*) FROM public.audit_seals WHERE sealed_at > '2020-01-01'") == 2


def test_the_service_counts_in_its_own_tables(shadowed: Results) -> None:
    """With connections that were made under another path, and so does the script that brings up the schema."""
    shadowed.execute((ROOT / "init_db.sql").read_text())
    assert shadowed.value("SELECT to_regclass('shadow.aggregation_stats') IS NULL")
    with Database(shadowed.url, pool_min=1, pool_max=1, timeout=10, instance="replica-2") as database:
        database.initialise_schema()
        count(database, a_vote())
        database.probe()
        assert database.totals([], 10)[0] == {"law-1": (2, 0), "law-2": (1, 0)}
    assert shadowed.query("SELECT sum(oui_count) FROM public.vote_results") == [(3,)]


# --- what people see -------------------------------------------------------------------------------------------------

OTHER_VIEW = """
    CREATE OR REPLACE VIEW vote_statistics AS
    SELECT law_id::varchar(64), NULL::text AS title, 'open'::varchar AS status, 1000::bigint AS oui_count,
           0::bigint AS non_count, 1000::bigint AS total_count, 100.00 AS oui_percent, 0.00 AS non_percent, updated_at
    FROM vote_results
"""
OTHER_PERCENTAGE = """
    CREATE OR REPLACE FUNCTION vote_percent(votes bigint, others bigint) RETURNS numeric LANGUAGE sql AS 'SELECT %s'
"""
FALSE_PERCENTAGES = ("NULL::numeric", "''NaN''::numeric", "50.00", "round(100.0 * votes / (votes + others))", "100.00")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("CREATE TABLE more () INHERITS (vote_results); INSERT INTO more VALUES ('law-1', 5, 0)", "vote_results"),
        ("CREATE TABLE more () INHERITS (vote_results)", "vote_results"),
        ("CREATE TABLE more () INHERITS (vote_audit)", "vote_audit"),
        ("CREATE TABLE more () INHERITS (audit_seals)", "audit_seals"),
        (OTHER_VIEW, "vote_statistics, law law-1"),
        ("DROP VIEW vote_statistics", "vote_statistics"),
        *((OTHER_PERCENTAGE % text, "vote_statistics, law law-1") for text in FALSE_PERCENTAGES),
        ("ALTER TABLE vote_results RENAME TO other; CREATE VIEW vote_results AS SELECT * FROM other", "vote_results"),
        ("ALTER TABLE laws RENAME TO other; CREATE VIEW laws AS SELECT * FROM other", "laws"),
    ],
)
def test_what_people_are_shown_is_verified(database: Database, results: Results, change: str, problem: str) -> None:
    """Rows of a child table, another view and a view in a table's place: verify names what is not as it was made."""
    count(database, a_vote(), a_vote("law-2", "non"))
    seal(results)
    assert verify(results) == []
    results.query(change)
    assert any(found.startswith(problem) for found in verify(results)), verify(results)


def test_rows_of_a_child_table_are_not_sealed_or_counted(database: Database, results: Results) -> None:
    """Nor do they hide that the log's own row is gone."""
    count(database, a_vote(), a_vote("law-2", "non"))
    (made,) = seal(results)
    results.query(
        "CREATE TABLE more () INHERITS (vote_audit); ALTER TABLE vote_audit DISABLE TRIGGER ALL;"
        "INSERT INTO more SELECT * FROM ONLY vote_audit WHERE law_id = 'law-1';"
        "DELETE FROM ONLY vote_audit WHERE law_id = 'law-1'"
    )
    assert any("was removed" in found for found in verify(results, made.name()))


def test_no_total_of_an_insider_makes_a_vote_refused_or_a_sum_overflow(database: Database, results: Results) -> None:
    """The certifier may write totals: none beyond what a sum can hold, and the count goes on where it stands there."""
    count(database, a_vote())
    with pytest.raises(psycopg2.errors.CheckViolation):
        results.query("UPDATE vote_results SET oui_count = 9223372036854775807")
    results.query("UPDATE vote_results SET oui_count = 1000000000000000")
    count(database, a_vote())
    assert results.value("SELECT count(*) FROM vote_audit") == 2
    assert results.rejected() == {}
    with pytest.raises(psycopg2.errors.CheckViolation):
        results.query(INSERT_CERTIFICATE, 2**63 - 1, 2**63 - 1)


def test_a_certificate_alone_ends_the_count_of_its_law_and_of_no_other(database: Database, results: Results) -> None:
    """Also where the law is not called certified yet; its votes are refused with evidence, and others count."""
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-1', '', 'open'), ('law-2', '', 'open')")
    count(database, a_vote())
    seal(results)
    results.query("UPDATE laws SET status = 'closed' WHERE law_id = 'law-1'")
    results.query(certificate())
    database.batch_update_results([a_vote(), a_vote("law-2")], [])
    assert results.query("SELECT law_id, count(*) FROM vote_audit GROUP BY 1 ORDER BY 1") == [
        ("law-1", 1),
        ("law-2", 1),
    ]
    assert results.rejected() == {"certified": 1}


INSERT_CERTIFICATE = """
    INSERT INTO certified_results (law_id, oui_count, non_count, certified_by, seal_id, certificate)
    VALUES ('law-1', %s, %s, 'x', 1, '{}')
"""
TRUE_CERTIFICATE = {
    "law_id": "'law-1'",
    "oui": "1::bigint",
    "non": "0::bigint",
    "certified_at": "now()",
    "certified_by": "'x'",
    "seal_id": "1",
    "more": "'{}'::jsonb",
}


def certificate(**columns: str) -> str:
    """The statement that writes what `reconcile.py certify` does, but for these columns, and with ``more`` members."""
    row = ", ".join(f"{value} AS {name}" for name, value in (TRUE_CERTIFICATE | columns).items())
    return f"""
        INSERT INTO certified_results (law_id, oui_count, non_count, certified_at, certified_by, seal_id, certificate)
        SELECT law_id, oui, non, certified_at, certified_by, seal_id, jsonb_build_object(
            'law_id', law_id, 'oui', oui, 'non', non, 'total', oui + non, 'certified_by', certified_by,
            'seal', (SELECT concat(seal_id, ':', encode(seal_hash, 'hex')) FROM audit_seals WHERE seal_id = 1)) || more
        FROM (SELECT {row}) AS made
    """


# --- the certifier's role --------------------------------------------------------------------------------------------


@pytest.fixture
def certifier(database: Database, results: Results) -> Iterator[Results]:
    """The database, as the certifier's role sees it: a closed law and an open one, a vote for each, sealed."""
    count(database, a_vote(), a_vote("law-2"))
    seal(results)
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-1', '', 'closed'), ('law-2', '', 'open')")
    name = f"role-{uuid.uuid4().hex[:8]}"
    set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD, CERTIFIER_PASSWORD=PASSWORD)
    yield Results(with_login(results.url, "votes_certifier"))
    results.execute(f'DROP OWNED BY "{name}", votes_certifier')
    results.execute(f'DROP ROLE "{name}", votes_certifier')


FORGED = {
    "an open law": {"law_id": "'law-2'"},
    "no known law": {"law_id": "'law-9'"},
    "false numbers": {"oui": "999::bigint"},
    "other false numbers": {"non": "1::bigint"},
    "negative numbers": {"non": "(-1)::bigint"},
    "a law id with escape codes": {"law_id": "E'\\x1b[2J'"},
    "a certifier of any length": {"certified_by": "repeat('x', 1001)"},
    "no moment": {"certified_at": "'infinity'::timestamptz"},
    "no moment either": {"certified_at": "'-infinity'::timestamptz"},
    "a moment to come": {"certified_at": "now() + interval '1 minute'"},
    "a moment beyond the calendar": {"certified_at": "'290000-01-01Z'::timestamptz"},
    "a seal that is not there": {"seal_id": "2"},
    "false members": {"more": """'{"oui": 999}'::jsonb"""},
    "a false total": {"more": """'{"total": 999}'::jsonb"""},
    "another law in its members": {"more": """'{"law_id": "law-2"}'::jsonb"""},
    "another certifier in its members": {"more": """'{"certified_by": "the court"}'::jsonb"""},
    "another seal in its members": {"more": """'{"seal": "1:00"}'::jsonb"""},
    "no members": {"more": """'[]'::jsonb"""},
    "any size": {"more": "jsonb_build_object('remark', repeat('x', 65536))"},
}


@pytest.mark.parametrize("columns", FORGED.values(), ids=FORGED)
def test_the_certifier_cannot_forge_a_certificate(certifier: Results, columns: dict[str, str]) -> None:
    """One that says the truth of a closed law is taken, also beside the command."""
    refusals = (psycopg2.errors.CheckViolation, psycopg2.errors.ForeignKeyViolation)
    with pytest.raises(refusals):
        certifier.query(certificate(**columns))
    certifier.query(certificate())


def test_a_certificate_has_room_for_all_that_is_true(certifier: Results) -> None:
    """Of somebody with a long name, and of a law with a very long title."""
    certifier.query(
        certificate(certified_by="repeat('é', 1000)", more="jsonb_build_object('title', repeat('x', 60000))")
    )


def test_a_law_without_votes_can_be_certified(certifier: Results, results: Results) -> None:
    """Also where it has no row of totals."""
    results.query("INSERT INTO laws (law_id, title, closes_at) VALUES ('law-3', '', now() - interval '1 hour')")
    certifier.query(certificate(law_id="'law-3'", oui="0::bigint"))


def test_no_batch_comes_between_a_total_and_its_certificate(
    certifier: Results, database: Database, results: Results
) -> None:
    """A certificate waits for the batch that is being written, and then its numbers are not those of the law."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with connect(results) as batch, ThreadPoolExecutor(1) as pool:
        with batch.cursor() as cur:
            cur.execute(INSERT_VOTE, ("law-1", "oui", None))
            cur.execute("UPDATE vote_results SET oui_count = 2 WHERE law_id = 'law-1'")
        certifying = pool.submit(certifier.query, certificate())
        wait_until(lambda: certifying.done() or results.value(waiting) == 1, "it waits")
        batch.commit()
        with pytest.raises(psycopg2.errors.CheckViolation, match="law-1"):
            certifying.result()
    certifier.query(certificate(oui="2::bigint"))


def test_a_certificate_is_of_the_totals_of_now(certifier: Results, database: Database, results: Results) -> None:
    """Not of those that an old snapshot has."""
    with connect(certifier) as conn, conn.cursor() as cur:
        conn.set_session(isolation_level="REPEATABLE READ")
        cur.execute("SELECT 1")
        results.query("UPDATE vote_results SET oui_count = 5 WHERE law_id = 'law-1'")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="READ COMMITTED"):
            cur.execute(certificate())


def forced(results: Results, *statements: str) -> None:
    """As an owner can who takes away what stands in the way."""
    results.query(
        "ALTER TABLE certified_results DISABLE TRIGGER ALL;"
        "ALTER TABLE certified_results DROP CONSTRAINT IF EXISTS certified_results_contract;"
        "ALTER TABLE certified_results DROP CONSTRAINT IF EXISTS certified_results_moment;"
        "ALTER TABLE certified_results DROP CONSTRAINT IF EXISTS certified_results_size"
    )
    for statement in statements:
        results.query(statement)


def test_an_upgrade_goes_through_with_certificates_that_break_the_rules(certifier: Results, results: Results) -> None:
    """They stay, with a warning, and it takes no more of their kind."""
    forced(
        results,
        certificate(),
        certificate(law_id="'law 2'", certified_at="'infinity'::timestamptz"),
        certificate(law_id="'law-3'", more="jsonb_build_object('remark', repeat('x', 100000))"),
    )
    for _ in range(2):
        with connect(results) as conn, conn.cursor() as cur:
            conn.autocommit = True
            cur.execute((ROOT / "init_db.sql").read_text())
            warned = [notice.split()[1] for notice in conn.notices if notice.startswith("WARNING")]
            assert warned == ["certified_results"] * 3, conn.notices
    assert results.value("SELECT count(*) FROM certified_results") == 3
    results.query("ALTER TABLE certified_results DISABLE TRIGGER ALL")
    for columns in (
        {"law_id": "'law 4'"},
        {"law_id": "'law-4'", "certified_at": "'infinity'::timestamptz"},
        {"law_id": "'law-4'", "more": "jsonb_build_object('remark', repeat('x', 100000))"},
    ):
        with pytest.raises(psycopg2.errors.CheckViolation):
            results.query(certificate(**columns))


def test_a_forged_certificate_is_told_by_the_gauge_and_by_reconcile(
    certifier: Results, results: Results, start_service: Callable[..., Service]
) -> None:
    """Where an owner has put it there: the page shows its numbers in the place of the totals."""
    has_rights = "has_table_privilege(oid, 'laws', 'SELECT')"
    name = results.value(f"SELECT rolname FROM pg_roles WHERE rolname LIKE 'role-%' AND {has_rights}")
    service = start_service(DATABASE_URL=with_login(results.url, name), RECONCILE_SECONDS="0.1")
    certifier.query(certificate())
    wait_until(lambda: service.samples("law_certified_timestamp_seconds"), "it is seen")
    assert service.metric("reconciliation_difference") == 0
    forced(results, certificate(law_id="'law-2'", oui="1::bigint", non="999::bigint"))
    wait_until(lambda: service.metric("reconciliation_difference") == 999, "it differs")
    assert service.says("certificates differ from the totals")
    with connect(results) as conn:
        compared = reconcile.compare(conn)
    assert all(law.agrees for law in compared.laws)
    assert compared.problems == ["law-2: certified are oui 1, non 999, but the log has oui 1, non 0"]
    done = run(results.url)
    assert (done.returncode, compared.problems[0] in done.stdout) == (1, True), done
    results.query(f'REVOKE SELECT ON certified_results FROM "{name}"')
    wait_until(
        lambda: math.isnan(service.metric("reconciliation_difference")), "what cannot be compared is not called equal"
    )
    results.query(INSERT_TOTAL, "law-3")
    wait_until(
        lambda: service.metric("reconciliation_difference") == 1, "totals are compared with the rights of before"
    )


SCREEN = "\x1b[2J\x1b[Hverified; newest seal: 1:00\x1b[8m"


def test_no_text_of_the_database_reaches_the_terminal_raw(certifier: Results, results: Results) -> None:
    """Codes that clear the screen, or turn the direction of a line, in a law id, a title, or a name."""
    results.query("ALTER TABLE laws DROP CONSTRAINT IF EXISTS laws_contract")
    results.query("ALTER TABLE vote_results DROP CONSTRAINT vote_results_contract")
    title = f"Loi é \u202e\x7f قانون {SCREEN}"
    results.query("INSERT INTO laws (law_id, title) VALUES (%s, %s)", "law\x1b[2J\n\x9b1m", title)
    results.query("INSERT INTO vote_results VALUES (%s, 1, 0)", SCREEN)
    forced(results, certificate(law_id=f"E'{SCREEN}'".replace("\x1b", "\\x1b")))
    for command in (["verify"], [], ["results"], ["results", "--json"], ["results", "--csv"], ["--recount", "--all"]):
        done = run(results.url, *command)
        told = done.stdout + done.stderr
        raw = {character for character in told if character in "\x1b\x9b\x7f\u202e\r"}
        assert (raw, "verified; newest" in told.splitlines()) == (set(), False), (command, told)
        assert "law-1" in told or command == ["verify"], (command, told)
        if command[:1] == ["results"]:
            assert "Loi é " in told and " قانون " in told, told
    assert "\\u001b[2J" in run(results.url, "verify").stdout
    check_db = [sys.executable, "-m", "scripts.check_db"]
    told = subprocess.run(check_db, env={"DATABASE_URL": results.url}, capture_output=True, text=True, cwd=ROOT).stdout
    assert ("\\u001b[2J" in told, "\x1b" in told) == (True, False)


def test_no_record_is_out_of_the_reach_of_verify(database: Database, results: Results) -> None:
    """A certificate of the last transaction id that there can be would be in no seal's range."""
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', '')")
    count(database, a_vote())
    seal(results)
    results.execute("ALTER TABLE certified_results DISABLE TRIGGER ALL")
    results.query(INSERT_CERTIFICATE, 1, 0)
    results.query("UPDATE certified_results SET txid = 9223372036854775807")
    assert any("9223372036854775807" in problem or "transaction" in problem for problem in verify(results))


def test_the_transaction_of_a_record_is_told_whatever_path_the_session_has(results: Results, sealer: Results) -> None:
    """The trigger looks for nothing where its caller wants it to."""
    paths = results.query(
        "SELECT proname, proconfig FROM pg_proc"
        " WHERE proname IN ('refuse_other_txid', 'guard_seal', 'guard_certificate')"
    )
    assert len(paths) == 3 and all("search_path=public, pg_temp" in config for _, config in paths), paths
