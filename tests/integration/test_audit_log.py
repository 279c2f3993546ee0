"""The sealed audit log: every way to change it that an insider has, and what a seal may and may not cover."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import reconcile
import seals
from database import Database, DatabaseMisconfigured
from observability import SELECT_DIFFERENCE
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages
from tests.harness import ROOT, Queue, Results, Service, check_exact, vote, wait_until
from tests.integration.test_few_rights import PASSWORD, with_login
from votes import Vote

SIZE = 8  # votes of each seal of the log below


def run(results: Results, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """reconcile.py as a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "reconcile.py"), *arguments],
        env={"DATABASE_URL": results.url, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT / "tests",  # where no .env is
    )


def seal(results: Results, votes_a_seal: int = 100_000) -> list[seals.Seal]:
    with seals.sealing_session(results.url) as (reader, writer):
        return seals.seal(reader, writer, votes_a_seal)


def verify(results: Results, *published: str, from_seal_id: int = 1) -> seals.Verification:
    conn = psycopg2.connect(results.url)
    try:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        with conn, conn.cursor() as cur:
            cur.execute(seals.SET_FORM)
        return seals.verify(conn, published, from_seal_id)
    finally:
        conn.close()


def prove(results: Results, vote_id: str) -> dict[str, Any]:
    done = run(results, "prove", vote_id)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def count(database: Database, *bodies: dict[str, Any]) -> None:
    database.batch_update_results([Vote.from_message(json.dumps(body).encode()) for body in bodies], [])


def some_votes(number: int, of: int = SIZE) -> list[dict[str, Any]]:
    return [
        vote(f"law-{i % 2}", "non" if i % 3 else "oui", vote_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{number}-{i}")))
        for i in range(of)
    ]


@pytest.fixture
def log(database: Database, results: Results) -> list[seals.Seal]:
    """Four seals of eight votes each, and three votes that are not sealed yet."""
    made: list[seals.Seal] = []
    for number in range(4):
        count(database, *some_votes(number))
        made += seal(results)
    count(database, *some_votes(9, 3))
    return made


def tamper(results: Results, sql: str) -> None:
    """As somebody does who owns the tables: with every trigger off."""
    results.query(
        "".join(f"ALTER TABLE {table} DISABLE TRIGGER ALL;" for table in ("vote_audit", "audit_seals", "vote_results"))
        + sql
    )


def row_of(results: Results, seal_id: int, number: int) -> str:
    """The vote_id of a row, counted from 1 in the order of the leaves."""
    return str(
        results.value(
            "SELECT vote_id::text FROM vote_audit JOIN audit_seals ON txid >= from_txid AND txid < to_txid"
            " WHERE seal_id = %s ORDER BY txid, vote_id OFFSET %s LIMIT 1",
            seal_id,
            number - 1,
        )
    )


def test_an_untouched_log_verifies(log: list[seals.Seal], results: Results) -> None:
    """With each of its seals as the published one, and from the middle on."""
    assert [made.votes for made in log] == [SIZE] * 4
    found = verify(results, *(made.name() for made in log))
    assert (found.problems, found.seals, found.sealed_votes, found.votes_not_sealed) == ([], 4, 4 * SIZE, 3)
    assert found.head == log[-1]
    assert verify(results, from_seal_id=3).sealed_votes == 2 * SIZE
    done = run(results, "verify", "--since", log[1].name())
    assert (done.returncode, log[-1].name() in done.stdout) == (0, True)


CHANGES = {
    "vote_id": "gen_random_uuid()",
    "law_id": "'law-9'",
    "choice": "CASE choice WHEN 'oui' THEN 'non' ELSE 'oui' END",
    "voted_at": "coalesce(voted_at, now()) + interval '1 microsecond'",
    "recorded_at": "recorded_at - interval '1 microsecond'",
    "voter_hash": "repeat('f', 16)",
    "instance": "instance || ' '",
    "redelivered": "NOT redelivered",
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_changed_row_is_named(column: str, log: list[seals.Seal], results: Results) -> None:
    """Whichever of its columns it is, and also where the totals were made to fit."""
    victim = row_of(results, 3, 5)
    tamper(results, f"UPDATE vote_audit SET {column} = {CHANGES[column]} WHERE vote_id = '{victim}'")
    first, *_ = verify(results).problems
    assert first.seal_id == 3
    assert victim in first.text
    done = run(results, "verify")
    assert done.returncode == 1
    assert f"The first wrong place: {first.text}" in done.stdout


def test_every_column_of_the_log_is_sealed(log: list[seals.Seal], results: Results) -> None:
    """A column that is added to the table later must be added to the canonical form, too."""
    columns = {
        name
        for (name,) in results.query(
            "SELECT column_name FROM information_schema.columns WHERE table_name = 'vote_audit'"
        )
    }
    assert columns == {*CHANGES, "txid"}
    assert all(column in seals.COPY_ROWS for column in columns)


def test_a_removed_row_is_named(log: list[seals.Seal], results: Results) -> None:
    """First, middle and last row of a seal."""
    for number in (SIZE, 4, 1):
        victim = row_of(results, 2, number)
        tamper(results, f"DELETE FROM vote_audit WHERE vote_id = '{victim}'")
        first, *_ = verify(results).problems
        assert (first.seal_id, first.text) == (2, f"seal 2, row {number}: vote {victim} was removed")


def test_all_rows_of_a_seal_removed_are_noticed(log: list[seals.Seal], results: Results) -> None:
    """Named is the first of them."""
    victim = row_of(results, 1, 1)
    tamper(results, "DELETE FROM vote_audit WHERE txid < (SELECT to_txid FROM audit_seals WHERE seal_id = 1)")
    first, *_ = verify(results).problems
    assert (first.seal_id, first.text) == (1, f"seal 1, row 1: vote {victim} was removed")


def test_a_row_slipped_in_is_named(log: list[seals.Seal], results: Results) -> None:
    """Into a sealed range; the totals made to fit do not hide it."""
    intruder = str(uuid.uuid4())
    tamper(
        results,
        "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered, txid)"
        f" SELECT '{intruder}', 'law-1', 'oui', 'replica-1', false, from_txid FROM audit_seals WHERE seal_id = 2;"
        " UPDATE vote_results SET oui_count = oui_count + 1 WHERE law_id = 'law-1'",
    )
    first, *_ = verify(results).problems
    assert first.seal_id == 2
    assert f"vote {intruder} was slipped in" in first.text


def test_two_rows_swapped_are_named(log: list[seals.Seal], results: Results) -> None:
    """Their choices, so that no total changes; their transactions; and their identities."""
    one, other = next(
        pair
        for pair in results.query(
            "SELECT a.vote_id::text, b.vote_id::text FROM vote_audit a, vote_audit b, audit_seals"
            " WHERE seal_id = 2 AND a.txid >= from_txid AND a.txid < to_txid AND b.txid = a.txid"
            " AND a.vote_id < b.vote_id AND a.law_id = b.law_id AND a.choice < b.choice ORDER BY 1, 2 DESC"
        )
    )
    swap = (
        "UPDATE vote_audit SET choice = CASE choice WHEN 'oui' THEN 'non' ELSE 'oui' END WHERE vote_id IN ('{}', '{}')"
    )
    tamper(results, swap.format(one, other))
    problems = verify(results).problems
    assert [problem.seal_id for problem in problems] == [2]
    assert min(one, other) in problems[0].text
    tamper(results, swap.format(one, other))
    assert verify(results).problems == []
    early, late = row_of(results, 2, 2), row_of(results, 4, 2)
    tamper(
        results,
        "UPDATE vote_audit AS a SET txid = b.txid FROM vote_audit AS b"
        f" WHERE (a.vote_id, b.vote_id) IN (('{early}', '{late}'), ('{late}', '{early}'))",
    )
    problems = verify(results).problems
    assert [problem.seal_id for problem in problems] == [2, 4]
    assert early in problems[0].text


def test_a_changed_total_is_named(log: list[seals.Seal], results: Results) -> None:
    """By verify, by reconcile and by the gauge's query."""
    tamper(
        results, "UPDATE vote_results SET non_count = non_count - 2, oui_count = oui_count + 2 WHERE law_id = 'law-1'"
    )
    (problem,) = verify(results).problems
    assert problem.text.startswith("vote_results, law law-1: oui ")
    done = run(results, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["agrees"], report["differing"]) == (1, False, ["law-1"])
    assert report["laws"][1]["difference"] == {"oui": 2, "non": -2}
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="x") as database:
        assert database.read(SELECT_DIFFERENCE) == [(4,)]


@pytest.mark.parametrize(
    "change",
    [
        "merkle_root = sha256('x')",
        "votes = votes + 1",
        "sealed_at = sealed_at + interval '1 s'",
        "previous_hash = sha256('x')",
        "from_txid = from_txid - 1",
        "seal_hash = sha256('x')",
        "records_hash = sha256('x')",
        "salt = sha256('x')",
        "salt = NULL",
        "leaves = leaves || leaves",
    ],
)
def test_a_changed_seal_is_named(change: str, log: list[seals.Seal], results: Results) -> None:
    """Whichever of its fields it is."""
    tamper(results, f"UPDATE audit_seals SET {change} WHERE seal_id = 3")
    first, *_ = verify(results).problems
    assert first.seal_id == 3
    assert "seal 3" in first.text


def rebuild_from(results: Results, seal_id: int) -> None:
    """What somebody does who knows how it works: a new chain from that seal on, over the log as it is now."""
    tamper(results, f"DELETE FROM audit_seals WHERE seal_id >= {seal_id}; DELETE FROM sealed_totals")
    results.query(
        "INSERT INTO sealed_totals SELECT law_id, count(*) FILTER (WHERE choice = 'oui'),"
        " count(*) FILTER (WHERE choice = 'non') FROM vote_audit"
        " WHERE txid < (SELECT max(to_txid) FROM audit_seals) GROUP BY law_id"
    )
    seal(results)


def test_a_chain_rebuilt_from_the_middle_is_found_by_what_was_published(
    log: list[seals.Seal], results: Results
) -> None:
    """It is sound in itself: only a seal from before can tell, and it tells."""
    tamper(results, f"DELETE FROM vote_audit WHERE vote_id = '{row_of(results, 2, 1)}'")
    results.query(
        "UPDATE vote_results AS r SET oui_count = oui, non_count = non FROM (SELECT law_id,"
        " count(*) FILTER (WHERE choice = 'oui') AS oui, count(*) FILTER (WHERE choice = 'non') AS non"
        " FROM vote_audit GROUP BY law_id) AS a WHERE a.law_id = r.law_id"
    )
    rebuild_from(results, 2)
    assert verify(results, log[0].name()).problems == [], "nothing published was touched"
    (problem,) = verify(results, log[1].name()).problems
    assert problem.seal_id == 2
    first, *_ = verify(results, log[0].name(), log[2].name(), log[3].name()).problems
    assert first.seal_id == 3, "the first published one that is gone"
    assert run(results, "verify", "--since", log[3].name()).returncode == 1


def test_a_chain_cut_at_its_end_is_found_by_what_was_published(log: list[seals.Seal], results: Results) -> None:
    """The newest seals removed with their rows leave a sound log, but the published one is missing."""
    tamper(
        results,
        "DELETE FROM vote_audit WHERE txid >= (SELECT from_txid FROM audit_seals WHERE seal_id = 3);"
        " DELETE FROM audit_seals WHERE seal_id >= 3",
    )
    problems = verify(results, log[3].name()).problems
    assert problems[0].text == "seal 4, which was published, is missing"


def test_a_chain_cut_in_its_middle_is_named(log: list[seals.Seal], results: Results) -> None:
    """A seal removed, with its rows."""
    tamper(
        results,
        "DELETE FROM vote_audit USING audit_seals WHERE seal_id = 2 AND txid >= from_txid AND txid < to_txid;"
        " DELETE FROM audit_seals WHERE seal_id = 2",
    )
    first, *_ = verify(results).problems
    assert (first.seal_id, first.text) == (2, "seal 2 is missing")


# --- by several processes --------------------------------------------------------------------------------------------


class Helped:
    """`verify` with a helper; ``meanwhile`` is called when that has begun, and this process has not yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Helped], object]) -> None:
        self.computing: seals._Computing | None = None
        begin, twice = seals._Computing.begin, seals.rows_there_twice

        def noted(computing: seals._Computing, chain: Sequence[seals.Seal]) -> None:
            self.computing = computing
            begin(computing, chain)

        def in_between(cur: Any) -> list[str]:
            meanwhile(self)
            return twice(cur)

        monkeypatch.setattr(seals._Computing, "begin", noted)
        monkeypatch.setattr(seals, "rows_there_twice", in_between)

    @property
    def helper(self) -> seals._Helper:
        assert self.computing is not None
        (helper,) = self.computing._helpers
        return helper

    def wait_computed(self) -> None:
        assert self.computing is not None
        wait_until(lambda: len(self.computing.problems) == 4, "the helper has computed all seals")

    def is_over(self, results: Results) -> bool:
        """Whether nothing is left of the helper, here or in the database."""
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        is_alone = wait_until(lambda: results.value(sessions) == 1, "its session is over")
        return self.helper._process.poll() is not None and is_alone


def verify_helped(results: Results, *published: str) -> seals.Verification:
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        return seals.verify(conn, published, workers=2)


def test_a_helper_finds_what_one_process_finds(
    log: list[seals.Seal], results: Results, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, in the same order and words; of the same moment, whatever is counted meanwhile."""
    for seal_id in (1, 3):
        tamper(results, f"UPDATE vote_audit SET instance = 'x' WHERE vote_id = '{row_of(results, seal_id, 5)}'")
    tamper(results, f"DELETE FROM vote_audit WHERE vote_id = '{row_of(results, 4, 2)}'")
    alone = verify(results, log[3].name())
    assert [problem.seal_id for problem in alone.problems[:3]] == [1, 3, 4]

    def meanwhile(helped: Helped) -> None:
        helped.wait_computed()
        count(database, *some_votes(11))

    helped = Helped(monkeypatch, meanwhile)
    assert verify_helped(results, log[3].name()) == alone
    database.close()
    assert helped.is_over(results)


def test_a_helper_that_dies_is_replaced(
    log: list[seals.Seal], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process that started it, which computes what is missing."""
    Helped(monkeypatch, lambda helped: helped.helper._process.kill())
    found = verify_helped(results, log[3].name())
    assert (found.problems, found.sealed_votes) == ([], 4 * SIZE)


@pytest.mark.parametrize(
    "obstacle", ["ALTER ROLE {} CONNECTION LIMIT 1", "REVOKE EXECUTE ON FUNCTION pg_export_snapshot FROM PUBLIC"]
)
def test_a_role_that_may_not_be_helped_verifies_alone(obstacle: str, log: list[seals.Seal], results: Results) -> None:
    """Where it has one connection, or may not export its snapshot."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    results.query(f"CREATE ROLE {role} LOGIN PASSWORD %s", PASSWORD)
    try:
        results.query(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role};" + obstacle.format(role))
        found = verify_helped(Results(with_login(results.url, role)), log[3].name())
        assert (found.problems, found.sealed_votes) == ([], 4 * SIZE)
    finally:
        results.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_no_helper_is_left_where_verify_is_interrupted(
    log: list[seals.Seal], results: Results, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, while the helper waits in a statement."""
    database.close()

    def interrupted(_helped: Helped) -> None:
        raise KeyboardInterrupt

    helped = Helped(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify_helped(results)
    assert helped.is_over(results)


def test_no_helper_is_left_where_verify_is_killed(log: list[seals.Seal], results: Results, database: Database) -> None:
    """It ends by itself, as soon as nobody wants its answer."""
    database.close()
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    command = [sys.executable, str(ROOT / "reconcile.py"), "verify", "--workers", "2"]
    with contextlib.closing(psycopg2.connect(results.url)) as lock, lock.cursor() as cur:
        cur.execute("LOCK TABLE vote_audit")
        process = subprocess.Popen(command, env={"DATABASE_URL": results.url}, cwd=ROOT / "tests")
        try:
            wait_until(lambda: results.value(f"{sessions} AND wait_event_type = 'Lock'") == 2, "both wait")
        finally:
            process.kill()
            process.wait()
    wait_until(lambda: results.value(sessions) == 1, "both are gone")


@pytest.mark.parametrize("txid", ["1::bigint << 60", "0", "-1"])
def test_a_row_with_a_transaction_that_cannot_be_is_refused_and_noticed(
    txid: str, log: list[seals.Seal], results: Results
) -> None:
    """It would never be sealed: refused while the triggers stand, found by verify when they do not."""
    insert = (
        "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered, txid)"
        f" VALUES ('{uuid.uuid4()}', 'law-1', 'oui', 'x', false, {txid})"
    )
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        results.query(insert)
    tamper(results, insert)
    assert "a transaction that cannot be" in " ".join(problem.text for problem in verify(results).problems)


def test_a_seal_spoiled_beyond_reading_is_named(log: list[seals.Seal], results: Results) -> None:
    """With exit code 1: it is tampering, and no wrong usage."""
    victim = row_of(results, 2, 3)
    for change in (
        "leaves = substr(leaves, 1, 25)",
        "leaves = ''",
        "sealed_at = '20000-01-01'",
        "sealed_at = '2026-01-01 BC'",
        "merkle_root = ''",
    ):
        with psycopg2.connect(results.url) as conn, conn.cursor() as cur:
            cur.execute("ALTER TABLE audit_seals DISABLE TRIGGER ALL; ALTER TABLE vote_audit DISABLE TRIGGER ALL")
            cur.execute(f"UPDATE audit_seals SET {change} WHERE seal_id = 2")
            cur.execute("DELETE FROM vote_audit WHERE vote_id = %s", (victim,))
            conn.commit()
            done = run(results, "verify", "--since", log[3].name())
            assert (done.returncode, "first wrong place: " in done.stdout, done.stderr) == (1, True, ""), change
            assert "seal 2" in done.stdout
        conn.close()


def test_a_spoiled_leaf_does_not_point_at_an_innocent_vote(log: list[seals.Seal], results: Results) -> None:
    """The leaves are bound by the seal, too."""
    tamper(
        results,
        f"UPDATE vote_audit SET instance = 'x' WHERE vote_id = '{row_of(results, 2, 7)}';"
        " UPDATE audit_seals SET leaves = overlay(leaves PLACING '\\x00'::bytea FROM 20) WHERE seal_id = 2",
    )
    (problem,) = verify(results).problems
    assert row_of(results, 2, 1) not in problem.text
    assert "rows of seal 2 were altered, and so were its leaves" in problem.text


def test_each_published_seal_is_looked_at(log: list[seals.Seal], results: Results) -> None:
    """Also two of one number, in either order."""
    false = f"2:{'0' * 64}"
    for published in ((false, log[1].name()), (log[1].name(), false)):
        assert [problem.seal_id for problem in verify(results, *published).problems] == [2]


def test_a_gap_between_two_seals_is_named(log: list[seals.Seal], results: Results) -> None:
    """As a sealer would leave that wants some rows to stay unsealed; the chain is sound."""
    gap = dataclasses.replace(log[3], from_txid=log[3].to_txid - 1, votes=0, merkle_root=seals.merkle_root([]))
    gap = dataclasses.replace(gap, leaves_hash=hashlib.sha256(b"").digest())
    tamper(
        results,
        f"UPDATE audit_seals SET from_txid = {gap.from_txid}, votes = 0, merkle_root = '\\x{gap.merkle_root.hex()}',"
        f" leaves = '', leaves_hash = '\\x{gap.leaves_hash.hex()}', seal_hash = '\\x{gap.hash().hex()}'"
        " WHERE seal_id = 4",
    )
    assert "does not begin where the one before ends" in verify(results).problems[0].text


def test_sealed_totals_and_low_transaction_ids_are_named(log: list[seals.Seal], results: Results) -> None:
    """What the gauge stands on, and what a restore into a new cluster brings."""
    tamper(results, "UPDATE sealed_totals SET oui_count = oui_count + 1 WHERE law_id = 'law-1'")
    (problem,) = verify(results).problems
    assert problem.text.startswith("sealed_totals, law law-1")
    tamper(results, "UPDATE audit_seals SET to_txid = to_txid + 1000000 WHERE seal_id = 4")
    assert any("lower than the sealed ones" in problem.text for problem in verify(results).problems)


def test_the_owner_is_refused_while_the_triggers_stand(log: list[seals.Seal], results: Results) -> None:
    """Seals, certificates and recounts can only be added, as the audit log."""
    for table in ("vote_audit", "audit_seals", "recounts", "certified_results"):
        for statement in (f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                results.query(statement)
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        results.query("UPDATE audit_seals SET votes = 0")


def test_a_transaction_that_commits_late_gets_into_a_later_seal(database: Database, results: Results) -> None:
    """Its id is older than those of votes that are committed: nothing at or beyond it may be sealed yet."""
    count(database, *some_votes(1))
    late = psycopg2.connect(results.url)
    try:
        with late.cursor() as cur:
            cur.execute(
                "INSERT INTO vote_audit VALUES (gen_random_uuid(), 'law-0', 'oui', NULL, now(), NULL, 'x', false)"
            )
            cur.execute("INSERT INTO vote_results VALUES ('law-late', 0, 0)")
        count(database, *some_votes(2))
        assert [made.votes for made in seal(results)] == [SIZE], "that of the first batch"
        assert seal(results) == []
        late.commit()
    finally:
        late.close()
    assert [made.votes for made in seal(results)] == [SIZE + 1]
    results.query("UPDATE vote_results SET oui_count = oui_count + 1 WHERE law_id = 'law-0'")  # it is no batch of ours
    assert verify(results).problems == []


def test_a_long_log_is_sealed_in_parts(database: Database, results: Results) -> None:
    """Between transactions, never within one."""
    for number in range(7):
        count(database, *some_votes(number))
    made = seal(results, votes_a_seal=2 * SIZE - 1)
    assert [part.votes for part in made] == [2 * SIZE, 2 * SIZE, 2 * SIZE, SIZE]
    assert verify(results, *(part.name() for part in made)).problems == []


def test_only_one_seals_at_a_time(log: list[seals.Seal], results: Results) -> None:
    """The other is told, and nothing is sealed twice."""
    with seals.sealing_session(results.url) as (reader, writer):
        with seals.transaction(reader) as cur:
            cur.execute(seals.BECOME_THE_SEALER)
            with pytest.raises(seals.AnotherSealer):
                seal(results)
            done = run(results, "seal")
            assert (done.returncode, "another process is sealing" in done.stderr) == (1, True)
        seals.seal(reader, writer)
    assert verify(results).problems == []


def test_sealers_that_race_leave_one_sound_chain(database: Database, results: Results) -> None:
    """Three at it, while votes are counted."""
    stop = threading.Event()
    errors: list[psycopg2.Error] = []

    def keep_sealing() -> None:
        while not stop.is_set():
            try:
                seal(results, votes_a_seal=20)
            except seals.AnotherSealer:
                continue
            except psycopg2.Error as exc:
                errors.append(exc)
                return

    threads = [threading.Thread(target=keep_sealing) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(40):
            count(database, *some_votes(number))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    seal(results)
    found = verify(results)
    assert (found.problems, found.sealed_votes, found.votes_not_sealed) == ([], 40 * SIZE, 0)


def test_three_replicas_count_while_the_log_is_sealed(
    queue: Queue, results: Results, start_service: Callable[..., Service], services: LocalServices
) -> None:
    """A sealer beside them, as in production; then everything verifies, and every vote can be proved."""
    for _ in range(3):
        start_service(BATCH_SIZE="50")
    sealer = subprocess.Popen(
        [sys.executable, str(ROOT / "reconcile.py"), "seal", "--every", "0.1"],
        env={"DATABASE_URL": results.url},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        messages = list(make_messages(20_000, 5, 11, 5, 1))
        assert Publisher([queue.url], queue.name).publish(messages).all_confirmed
        wait_until(lambda: results.counted() == 20_000, "all are counted", 120)
        sealed = "SELECT coalesce(sum(votes), 0) FROM audit_seals"
        wait_until(lambda: results.value(sealed) == 20_000, "all are sealed")
        sealer.terminate()
        said, _ = sealer.communicate(timeout=30)
        assert sealer.returncode == 0
    finally:
        sealer.kill()
        sealer.wait()
    published = [line["fields"]["seal"] for line in map(json.loads, said.splitlines()) if line["message"] == "sealed"]
    assert len(published) > 2
    found = verify(results, *published)
    assert (found.problems, found.sealed_votes, found.votes_not_sealed) == ([], 20_000, 0)
    check_exact(results, messages)
    for (vote_id,) in results.query("SELECT vote_id::text FROM vote_audit ORDER BY random() LIMIT 3"):
        assert seals.check_proof(prove(results, vote_id), published[-1]) == published[-1]


def test_the_number_of_seals_can_be_kept_from_telling_whether_there_were_votes(
    database: Database, results: Results
) -> None:
    """With votes and without, each round makes one; they verify, and a vote between two empty ones can be proved."""
    ours = vote("law-1")
    for number, votes in enumerate(([], [ours, vote("law-2")], [], []), 1):
        count(database, *votes)
        done = run(results, "seal", "--also-without-votes")
        assert (done.returncode, done.stdout.count(f"{number}:")) == (0, 2), done.stderr
    chain = results.query("SELECT votes, to_txid > from_txid FROM audit_seals ORDER BY seal_id")
    assert chain == [(0, True), (2, True), (0, True), (0, True)]
    newest = run(results, "seal").stdout.split()[-1]
    assert newest.startswith("4:"), "without being told so, no seal is made where there is nothing to seal"
    assert verify(results, newest).problems == []
    assert seals.check_proof(prove(results, ours["vote_id"]), newest) == newest


def test_where_no_number_of_an_open_law_may_get_out_a_seal_is_made_without_votes(
    database: Database, results: Results
) -> None:
    """By the setting alone, which the page has too; a word that it does not have must not pass for another."""
    count(database)
    tries = [("always", [], 0), ("after_close", [], 1), ("after_close", ["--no-also-without-votes"], 1)]
    for visible, option, made in [*tries, ("After_Close", [], 2)]:
        done = run(results, "seal", *option, RESULTS_VISIBLE=visible)
        assert done.returncode == 0, done.stderr
        assert results.value("SELECT count(*) FROM audit_seals") == made, (visible, option)
    done = run(results, "seal", RESULTS_VISIBLE="after-close")
    assert (done.returncode, "accepted is one of always, after_close" in done.stderr) == (2, True), done.stderr


def test_a_transaction_that_is_not_over_keeps_an_empty_seal_from_being_made(
    database: Database, results: Results
) -> None:
    """There is no transaction that it could cover; the next round makes it."""
    assert run(results, "seal", "--also-without-votes").returncode == 0
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        with conn.cursor() as cur:
            cur.execute("SELECT pg_current_xact_id()")
            for _ in range(3):
                assert run(results, "seal", "--also-without-votes").returncode == 0
        conn.rollback()
    assert results.value("SELECT count(*) FROM audit_seals") == 2, "up to it, once"
    assert run(results, "seal", "--also-without-votes").returncode == 0
    assert results.value("SELECT count(*) FROM audit_seals") == 3


def test_a_proof_is_that_of_its_vote(log: list[seals.Seal], results: Results, tmp_path: Path) -> None:
    """It holds without the database, leads to the newest seal, and is refused for what is not sealed or not counted."""
    for seal_id in (1, 4):
        for number in range(1, SIZE + 1):
            vote_id = row_of(results, seal_id, number)
            assert seals.check_proof(prove(results, vote_id), log[-1].name()) == log[-1].name()
    unsealed = results.value(
        "SELECT vote_id::text FROM vote_audit WHERE txid >= (SELECT max(to_txid) FROM audit_seals) LIMIT 1"
    )
    for vote_id, reason in ((unsealed, "not sealed yet"), (str(uuid.uuid4()), "not in the audit log")):
        done = run(results, "prove", vote_id)
        assert (done.returncode, reason in done.stderr) == (1, True)
    assert run(results, "prove", "nonsense").returncode == 2
    victim = row_of(results, 2, 2)
    tamper(results, f"DELETE FROM vote_audit WHERE vote_id = '{row_of(results, 2, 1)}'")
    done = run(results, "prove", victim)
    assert (done.returncode, "does not match seal 2" in done.stderr) == (1, True)


def test_the_form_does_not_hang_on_the_servers_settings(log: list[seals.Seal], results: Results) -> None:
    """Time zone, date style, and what the session's user has set."""
    name = results.value("SELECT current_database()")
    for setting in ("TimeZone = 'Pacific/Chatham'", "DateStyle = 'SQL, DMY'", "client_encoding = 'LATIN1'"):
        results.execute(f"ALTER DATABASE {name} SET {setting}")
    assert results.value("SHOW TimeZone") == "Pacific/Chatham"
    assert verify(results, log[-1].name()).problems == []


def test_text_that_an_insider_writes_cannot_break_the_form(log: list[seals.Seal], results: Results) -> None:
    """Tabs, line breaks and backslashes stay one field of one row."""
    victim = row_of(results, 2, 3)
    tamper(results, f"UPDATE vote_audit SET instance = E'a\\tb\\nc\\\\d\\\\N' WHERE vote_id = '{victim}'")
    (problem,) = verify(results).problems
    assert problem.text == f"seal 2, row 3: vote {victim} was altered"


def test_nothing_is_counted_where_transaction_ids_are_behind_the_seals(
    log: list[seals.Seal], database: Database, results: Results
) -> None:
    """As after a restore from a dump into a new cluster: new votes would seem to be slipped in."""
    tamper(results, "UPDATE audit_seals SET to_txid = to_txid + 1000000 WHERE seal_id = 4")
    with pytest.raises(DatabaseMisconfigured, match="transaction ids are lower"):
        database.probe()


@pytest.mark.parametrize("command", [(), ("verify",), ("seal",), ("results",), ("export-audit",), ("certify", "law-1")])
def test_a_database_that_is_away_is_exit_code_3(command: tuple[str, ...]) -> None:
    """And one line that says so."""
    nowhere = "127.0.0.1:1"
    away = Results(f"postgresql://votes:secret@{nowhere}/votes")
    done = run(away, *command, AMQP_URL=f"amqp://votes:secret@{nowhere}/")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("the database cannot be read: ")
    assert "secret" not in done.stderr


def test_wrong_usage_is_exit_code_2(results: Results) -> None:
    """Said in words."""
    for wrong in (
        ("verify", "--since", "1:xyz"),
        ("--recount",),
        ("--apply",),
        ("seal", "--every", "0"),
        ("nonsense",),
    ):
        assert run(results, *wrong).returncode == 2, wrong
    done = subprocess.run([sys.executable, ROOT / "reconcile.py"], env={}, cwd=ROOT / "tests", capture_output=True)
    assert done.returncode == 2
    assert reconcile.main(["check-proof", "/nonexistent"]) == 2
