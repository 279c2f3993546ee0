"""A database of schema version 4 with all kinds of data in it, brought up to the present version while it is in use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import reconcile
import seals
from database import SCHEMA_FILE, SCHEMA_VERSION, Database
from tests.harness import Results, wait_until
from votes import Vote

EARLIER_SCHEMA = Path(__file__).with_name("init_db_v4.sql")
SCHEMA_OF_VERSION_6 = Path(__file__).with_name("init_db_v6.sql")

# as a replica of version 4 counts a vote, and what it reads to see whether it could
EARLIER_REPLICA = f"""
    SELECT inserted, outcomes, laws, oui, non
    FROM count_batch('earlier', 0, true, ARRAY[%s]::uuid[], ARRAY[%s]::varchar[], ARRAY[%s]::varchar[], '{{NULL}}',
                     '{{NULL}}', '{{f}}'{", '{}'" * 12})
"""
# as one of versions 5 to 7 does
REPLICA_OF_VERSION_7 = EARLIER_REPLICA.rstrip()[:-1] + ", '{}')"
EARLIER_PROBE = "SELECT (SELECT max(to_txid) FROM audit_seals) > pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
EARLIER_INSERT_SEAL = """
    INSERT INTO audit_seals
        (seal_id, from_txid, to_txid, votes, merkle_root, leaves_hash, sealed_at, previous_hash, seal_hash, leaves)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
INSERT_SEAL_OF_VERSION_7 = """
    INSERT INTO audit_seals
        (seal_id, from_txid, to_txid, votes, merkle_root, leaves_hash, sealed_at, previous_hash, seal_hash, leaves,
         records_hash)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
VIEW_OF_VERSION_5 = """
    CREATE OR REPLACE VIEW vote_statistics AS
    WITH shown AS (
        SELECT law_id, laws.title, 'open'::varchar AS status, coalesce(oui_count, 0) AS oui_count,
               coalesce(non_count, 0) AS non_count, vote_results.updated_at
        FROM ONLY vote_results FULL JOIN ONLY laws USING (law_id)
    )
    SELECT law_id, title, status, oui_count, non_count, oui_count + non_count AS total_count,
           round(100.0 * oui_count / nullif(oui_count + non_count, 0), 2) AS oui_percent,
           round(100.0 * non_count / nullif(oui_count + non_count, 0), 2) AS non_percent, updated_at
    FROM shown;
    DROP FUNCTION vote_percent;
    DELETE FROM schema_version WHERE version > 5
"""


def count_as_before(results: Results, law_id: str, choice: str, vote_id: str = "") -> tuple[Any, ...]:
    return results.query(EARLIER_REPLICA, vote_id or str(uuid.uuid4()), law_id, choice)[0]


def seal_as_before(results: Results, with_records: bool = False) -> seals.Seal:
    """A seal of the first format over all that is there; ``with_records``: of the second, as by versions 5 to 7."""
    with contextlib.closing(psycopg2.connect(results.url)) as conn, seals.transaction(conn) as cur:
        cur.execute("SELECT coalesce(max(seal_id), 0), coalesce(max(to_txid), 0) FROM audit_seals")
        seal_id, from_txid = seals.one_row(cur)
        cur.execute("SELECT seal_hash FROM audit_seals WHERE seal_id = %s", (seal_id,))
        previous_hash = bytes((cur.fetchone() or (seals.NO_HASH,))[0])
        cur.execute(seals.SELECT_HORIZON)
        horizon, _ = seals.one_row(cur)
        copied = seals._Lines()
        seals._copy_rows(cur, from_txid, horizon, copied)
        rows = seals._Range(copied.lines)
        leaves_hash = hashlib.sha256(rows.leaves()).digest()
        cur.execute("SELECT now()::text")
        (now,) = seals.one_row(cur)
        records = b"".join(seals._copy_records(cur, from_txid, horizon)) if with_records else None
        made = seals.Seal(
            *(seal_id + 1, from_txid, horizon, len(rows.hashes), seals.merkle_root(rows.hashes), leaves_hash),
            *(now, previous_hash),
            records_hash=None if records is None else hashlib.sha256(records).digest(),
        )
        fields = list(vars(made).values())[:8]
        if records is None:
            cur.execute(EARLIER_INSERT_SEAL, (*fields, made.hash(), rows.leaves()))
        else:
            cur.execute(INSERT_SEAL_OF_VERSION_7, (*fields, made.hash(), rows.leaves(), made.records_hash))
        totals = [(law_id, *counts) for law_id, counts in rows.totals().items()]
        seals.execute_values(cur, seals.UPSERT_SEALED_TOTALS, totals)
    return made


def certify_as_before(results: Results, law_id: str, made: seals.Seal) -> None:
    results.query(
        """
        UPDATE laws SET status = 'closed' WHERE law_id = %(law)s;
        INSERT INTO certified_results
        SELECT law_id, oui_count, non_count, now(), 'the committee', %(seal_id)s, jsonb_build_object(
            'law_id', law_id, 'title', title, 'oui', oui_count, 'non', non_count, 'total', oui_count + non_count,
            'opens_at', NULL, 'closes_at', to_char(closes_at AT TIME ZONE 'UTC', %(form)s),
            'last_vote_recorded_at', (SELECT to_char(max(recorded_at) AT TIME ZONE 'UTC', %(form)s)
                                      FROM vote_audit WHERE vote_audit.law_id = laws.law_id),
            'duplicates', '{"duplicate": 1}'::jsonb, 'rejected', '{}'::jsonb, 'unreadable_messages_of_all_laws', 1,
            'seal', %(seal)s, 'certified_at', to_char(now() AT TIME ZONE 'UTC', %(form)s),
            'certified_by', 'the committee')
        FROM laws JOIN vote_results USING (law_id) WHERE law_id = %(law)s;
        UPDATE laws SET status = 'certified' WHERE law_id = %(law)s
        """.replace("%(law)s", f"'{law_id}'")
        .replace("%(seal_id)s", str(made.seal_id))
        .replace("%(seal)s", f"'{made.name()}'")
        .replace("%(form)s", f"'{seals.ISO_FORM}'")
    )


@pytest.fixture
def before(results: Results) -> list[seals.Seal]:
    """The two seals of a database of version 4, which has votes, a copy, a message, a recount, and a certificate."""
    results.execute(EARLIER_SCHEMA.read_text())
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', 'On bread'), ('law-2', 'On games')")
    copied = str(uuid.uuid4())
    count_as_before(results, "law-1", "oui", copied)
    assert count_as_before(results, "law-1", "oui", copied)[1] == ["duplicate"]
    results.query(
        "INSERT INTO rejected_messages (body_sha256, body, body_bytes, reason, instance)"
        " VALUES ('a', 'a', 1, 'not_json', 'earlier');"
        "INSERT INTO recounts (recounted_by, law_id, oui_before, non_before, oui_after, non_after)"
        " VALUES ('somebody', 'law-2', 1, 0, 0, 0)"
    )
    first = seal_as_before(results)
    for law_id, choice in (("law-1", "non"), ("law-2", "oui")):
        count_as_before(results, law_id, choice)
    second = seal_as_before(results)
    certify_as_before(results, "law-1", second)
    count_as_before(results, "law-2", "non")
    return [first, second]


@pytest.fixture
def upgraded(before: list[seals.Seal], results: Results) -> Iterator[Database]:
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="new") as database:
        database.initialise_schema()
        yield database


def verify(results: Results, *published: seals.Seal) -> seals.Verification:
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        return seals.verify(conn, [made.name() for made in published])


def seal(results: Results) -> list[seals.Seal]:
    with seals.sealing_session(results.url) as (reader, writer):
        return seals.seal(reader, writer)


def a_vote(law_id: str) -> Vote:
    return Vote.from_message(json.dumps({"vote_id": str(uuid.uuid4()), "law_id": law_id, "choice": "oui"}).encode())


def test_what_was_sealed_before_an_upgrade_still_verifies(
    before: list[seals.Seal], upgraded: Database, results: Results
) -> None:
    """And the next seal covers the certificate and the recount that stood then, for good."""
    assert results.value("SELECT max(version) FROM schema_version") == SCHEMA_VERSION
    found = verify(results, *before)
    assert (found.problems, found.head, found.seals) == ([], before[-1], 2)
    assert (found.sealed_votes, found.votes_not_sealed, found.records_not_sealed) == (3, 1, 2)
    (made,) = seal(results)
    assert (made.seal_id, made.votes, made.previous_hash) == (3, 1, before[-1].hash())
    assert made.records_hash is not None
    assert made.salt is not None
    found = verify(results, *before, made)
    assert (found.problems, found.votes_not_sealed, found.records_not_sealed) == ([], 0, 0)
    (vote_id,) = results.query("SELECT vote_id::text FROM vote_audit ORDER BY txid LIMIT 1")[0]
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        proof = seals.prove(conn, vote_id)
    assert [seals.check_proof(proof, seal.name()) for seal in (*before, made)]
    results.query("ALTER TABLE recounts DISABLE TRIGGER ALL; UPDATE recounts SET recounted_by = 'x'")
    (problem,) = verify(results, made).problems
    assert problem.seal_id == 3


def test_the_upgrade_takes_its_time_whatever_limit_the_role_has(results: Results) -> None:
    """A large log takes minutes; a limit for statements would have it begun again and again."""
    results.execute(SCHEMA_FILE.read_text())
    limited = Results(f"{results.url}?options=-c%20statement_timeout%3D1000%20-c%20application_name%3Dupgrade")
    waiting = "SELECT now() - query_start > '1.5 s' FROM pg_stat_activity WHERE application_name = 'upgrade'"
    with (
        ThreadPoolExecutor(1) as pool,
        contextlib.closing(psycopg2.connect(results.url)) as holder,
        holder.cursor() as cur,
    ):
        cur.execute("LOCK TABLE laws IN SHARE MODE")
        upgrade = pool.submit(limited.execute, SCHEMA_FILE.read_text())
        wait_until(
            lambda: upgrade.done() or results.query(waiting) == [(True,)], "it has waited for more than its limit"
        )
        holder.rollback()
        upgrade.result()


def test_the_upgrade_does_not_stand_in_the_way_of_batches(results: Results) -> None:
    """While somebody holds a lock for long it gives up its place in the row, and is run again."""
    with Database(results.url, pool_min=1, pool_max=2, timeout=30, instance="replica") as database:
        database.initialise_schema()
        with contextlib.closing(psycopg2.connect(results.url)) as reader, reader.cursor() as cur:
            cur.execute("LOCK TABLE laws IN SHARE MODE")
            with pytest.raises(psycopg2.errors.LockNotAvailable):
                results.execute(SCHEMA_FILE.read_text())
            assert len(database.batch_update_results([a_vote("law-1")], []).counted) == 1
        results.execute(SCHEMA_FILE.read_text())
    assert results.totals() == results.audited() == {"law-1": (1, 0)}


def test_all_data_of_the_version_before_stays(before: list[seals.Seal], upgraded: Database, results: Results) -> None:
    """It is counted on, and the certified law takes no vote."""
    assert (results.totals(), results.rejected()) == ({"law-1": (1, 1), "law-2": (1, 1)}, {"not_json": 1})
    assert results.value("SELECT count(*) FROM duplicate_attempts") == 1
    outcome = upgraded.batch_update_results([a_vote("law-1"), a_vote("law-2")], [])
    assert [rejection.reason for rejection in outcome.rejected] == ["certified"]
    upgraded.probe()
    assert results.totals() == results.audited() == {"law-1": (1, 1), "law-2": (2, 1)}
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        assert all(law.agrees for law in reconcile.compare(conn)[0])


def test_replicas_of_the_version_before_count_on(
    before: list[seals.Seal], upgraded: Database, results: Results
) -> None:
    """Each recognises what the other has counted, also after a seal of the new format."""
    old, new = str(uuid.uuid4()), a_vote("law-2")
    assert count_as_before(results, "law-2", "oui", old)[2:] == (["law-2"], [2], [1])
    upgraded.batch_update_results([new], [])
    assert count_as_before(results, "law-2", "oui", new.vote_id)[1] == ["duplicate"]
    assert [reason for _, reason in upgraded.batch_update_results([new._replace(vote_id=old)], []).duplicates] == [
        "duplicate"
    ]
    assert count_as_before(results, "law-1", "oui")[1] == ["certified"]
    assert [made.votes for made in seal(results)] == [3]
    assert results.value(EARLIER_PROBE) is False
    assert count_as_before(results, "law-2", "oui")[2:] == (["law-2"], [4], [1])
    assert verify(results, *before).problems == []


def test_a_sealer_of_the_version_before_makes_no_more_seals(
    before: list[seals.Seal], upgraded: Database, results: Results
) -> None:
    """It would leave certificates out: it is refused until it is replaced, and holds nothing up."""
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="earlier versions"):
        seal_as_before(results)
    assert len(seal(results)) == 1
    assert verify(results, *before).problems == []


def test_a_chain_of_all_formats_verifies(before: list[seals.Seal], results: Results) -> None:
    """Two seals of version 4, one of version 6 and two of now: as a whole, by its proofs and its export."""
    results.execute(SCHEMA_OF_VERSION_6.read_text())
    older = [*before, seal_as_before(results, with_records=True)]
    assert (older[2].votes, older[2].salt) == (1, None)
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="new") as database:
        database.initialise_schema()
        assert verify(results, *older).problems == []
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="no salt, as those of earlier versions"):
            seal_as_before(results, with_records=True)
        newer = []
        for _ in range(2):
            database.batch_update_results([a_vote("law-2")], [])
            newer += seal(results)
    assert [made.format for made in (*older, *newer)] == [1, 1, 2, 3, 3]
    assert len({made.salt for made in newer}) == 2
    found = verify(results, *older, *newer)
    assert (found.problems, found.seals, found.votes_not_sealed, found.records_not_sealed) == ([], 5, 0, 0)
    with contextlib.closing(psycopg2.connect(results.url)) as conn:
        for (vote_id,) in results.query("SELECT vote_id::text FROM vote_audit"):
            assert seals.check_proof(seals.prove(conn, vote_id)) == newer[-1].name()
        with seals.transaction(conn) as cur:
            exported = seals.export(cur)["seals"]
    assert [seals.Seal.from_texts(texts) for texts in exported] == [*older, *newer]


def test_rows_that_break_the_contract_stay_with_a_warning(before: list[seals.Seal], results: Results) -> None:
    """The upgrade goes through, twice; new rows of their kind are refused, and votes are counted."""
    count_as_before(results, "law\r1", "oui")
    for _ in range(2):
        with contextlib.closing(psycopg2.connect(results.url)) as conn:
            conn.autocommit = True
            conn.cursor().execute((EARLIER_SCHEMA.parents[2] / "init_db.sql").read_text())
            warned = {notice.split()[1] for notice in conn.notices if notice.startswith("WARNING")}
            assert warned == {"vote_audit", "vote_results"}, conn.notices
    with pytest.raises(psycopg2.errors.CheckViolation):
        count_as_before(results, "law\r1", "oui")
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="new") as database:
        database.initialise_schema()
        assert len(database.batch_update_results([a_vote("law-2")], []).counted) == 1
    seal(results)
    assert verify(results, *before).problems == []


def test_percentages_of_version_5_are_mended(results: Results) -> None:
    """Its view rounded each by itself, and 3.125 and 96.875 made 100.01."""
    percentages = "SELECT oui_percent::text, non_percent::text FROM vote_statistics"
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="new") as database:
        database.initialise_schema()
        results.query("INSERT INTO vote_results VALUES ('law-1', 1, 31)")
        results.query(VIEW_OF_VERSION_5)
        assert results.query(percentages) == [("3.13", "96.88")]
        database.initialise_schema()
    assert results.query(percentages) == [("3.13", "96.87")]
    assert results.query(seals.SELECT_SHOWN_OTHERWISE) == []


def test_laws_of_version_6_can_say_how_many_may_vote(results: Results) -> None:
    """They stay as they are; a replica of that version counts on beside one of this."""
    results.execute(SCHEMA_OF_VERSION_6.read_text())
    results.query(
        "INSERT INTO laws (law_id, title, status) VALUES ('law-1', 'On bread', 'closed'), ('law-2', 'On games', 'open')"
    )
    before = results.query(
        "SELECT law_id, title, opens_at, closes_at, status, created_at, updated_at FROM laws ORDER BY 1"
    )
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="new") as new:
        counted = str(uuid.uuid4())
        assert results.query(REPLICA_OF_VERSION_7, counted, "law-2", "oui")[0][0] == 1
        new.initialise_schema()
        assert results.value("SELECT max(version) FROM schema_version") == SCHEMA_VERSION
        assert results.query(REPLICA_OF_VERSION_7, str(uuid.uuid4()), "law-2", "oui")[0][0] == 1
        outcome = new.batch_update_results([a_vote("law-2"), a_vote("law-2")._replace(vote_id=counted)], [])
        assert ([reason for _, reason in outcome.duplicates], outcome.totals) == (["duplicate"], {"law-2": (3, 0)})
    after = results.query(
        "SELECT law_id, title, opens_at, closes_at, status, created_at, updated_at FROM laws ORDER BY 1"
    )
    assert after == before
    results.query("UPDATE laws SET eligible_voters = 48000 WHERE law_id = 'law-2'")
    with pytest.raises(psycopg2.errors.CheckViolation):
        results.query("UPDATE laws SET eligible_voters = 0 WHERE law_id = 'law-2'")
