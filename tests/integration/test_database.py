"""The batch transaction, on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import connection, cursor

import database as database_module
from database import (
    SCHEMA_FILE,
    SCHEMA_VERSION,
    Attempt,
    BatchRejected,
    Database,
    DatabaseMisconfigured,
    DatabaseUnavailable,
)
from results_page import SELECT_RESULTS
from scripts.local_services import LocalServices
from tests.harness import Results, vote, wait_until
from votes import Rejection, Vote, counts

EARLIER_SCHEMA = Path(__file__).with_name("init_db_v3.sql")
OUR_CONNECTIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name LIKE 'vote-aggregator%' AND datname = current_database()
"""


def open_database(results: Results, instance: str = "replica-1", timeout: float = 10.0) -> Database:
    database = Database(results.url, pool_min=2, pool_max=10, timeout=timeout, instance=instance)
    database.open()
    return database


@pytest.fixture
def database(results: Results) -> Iterator[Database]:
    database = open_database(results)
    database.initialise_schema()
    yield database
    database.close()


def a_vote(law_id: str = "law-001", choice: str = "oui", redelivered: bool = False, **changes: object) -> Vote:
    return Vote.from_message(json.dumps(vote(law_id, choice, **changes)).encode(), redelivered=redelivered)


def write(database: Database, *votes: Vote) -> list[str]:
    """Write one batch; the reasons of its duplicates."""
    return [reason for _, reason in database.batch_update_results(votes, []).duplicates]


def attempts(results: Results) -> list[tuple[str, str, str]]:
    return results.query("SELECT reason, choice, counted_choice FROM duplicate_attempts ORDER BY attempt_id")


def test_a_batch_is_counted_and_audited(database: Database, results: Results) -> None:
    """Totals and audit log say the same, and the new totals come back."""
    votes = [a_vote("law-002", "non"), a_vote("law-001", "oui"), a_vote("law-001", "non"), a_vote("law-001", "oui")]
    outcome = database.batch_update_results(votes, [])
    assert results.totals() == results.audited() == outcome.totals == {"law-001": (2, 1), "law-002": (0, 1)}
    assert database.totals([], 10) == (outcome.totals, (0, 0))
    assert sorted(outcome.counted) == sorted(votes)


@pytest.mark.parametrize("obstacle", ["a copy", "a second vote", "a closed law", "a certified law"])
def test_a_batch_that_only_seemed_new_is_counted_but_for_what_stands_in_its_way(
    database: Database, results: Results, services: LocalServices, obstacle: str
) -> None:
    """Of the attempt nothing remains, neither in the totals nor, with the votes of the batch, in the server's log."""
    voter = f"{random.randrange(1 << 256):064x}"
    first = a_vote(voter_hash=voter)
    write(database, first)
    results.query("INSERT INTO laws (law_id, title, closes_at) VALUES ('closed', '', now() - interval '1 hour')")
    results.query("INSERT INTO laws (law_id, title) VALUES ('final', '')")
    results.certify("final")
    others = [a_vote(f"law-{number:03}", "non") for number in range(100)]
    late = {"a copy": first, "a second vote": a_vote(voter_hash=voter), "a closed law": a_vote("closed")}
    outcome = database.batch_update_results([*others, late.get(obstacle, a_vote("final"))], [])
    assert sorted(outcome.counted) == sorted(others)
    assert len(outcome.duplicates) + len(outcome.rejected) == 1
    assert (
        results.totals()
        == results.audited()
        == {
            vote.law_id: (1, 1) if vote.law_id == "law-001" else (0, 1)
            for vote in sorted(others, key=lambda v: v.law_id)
        }
    )
    log = services.postgres.log.read_text()
    assert not any(vote.vote_id in log for vote in [first, *others])


class Model:
    """The rules of a batch, one vote after the other: what the function of the database has to come to."""

    def __init__(self, closed: str) -> None:
        self.closed = closed
        self.counted: dict[str, Vote] = {}
        self.records: list[tuple[str, ...]] = []  # vote_id, law, choice, voter_hash, reason
        self._known: set[tuple[str, ...]] = set()  # of earlier batches

    def write(self, votes: list[Vote]) -> list[str]:
        """The outcome of each vote of a batch."""
        self._known = set(self.records)
        return [self._judge(vote) for vote in votes]

    def _judge(self, vote: Vote) -> str:
        same = self.counted.get(vote.vote_id)
        voters = {(row.law_id, row.voter_hash) for row in self.counted.values() if row.voter_hash is not None}
        if same is not None:
            is_same = (same.law_id, same.choice, same.voter_hash) == (vote.law_id, vote.choice, vote.voter_hash)
            outcome = "conflict" if not is_same else "redelivery" if vote.redelivered else "duplicate"
        elif (vote.law_id, vote.voter_hash) in voters:
            outcome = "second_vote"
        elif vote.law_id == self.closed:
            return "outside_window"
        else:
            self.counted[vote.vote_id] = vote
            return "counted"
        record = (vote.vote_id, vote.law_id, vote.choice, vote.voter_hash or "", outcome)
        if outcome != "redelivery" and not (vote.redelivered and record in self._known):
            self.records.append(record)
        return outcome


@pytest.mark.parametrize("seed", range(8))
def test_the_function_comes_to_what_the_rules_say_vote_by_vote(database: Database, results: Results, seed: int) -> None:
    """Few identities, so that everything stands in the way of everything, in and between batches."""
    rng = random.Random(seed)
    ids = [vote()["vote_id"] for _ in range(8)]
    results.query("INSERT INTO laws (law_id, title, closes_at) VALUES ('closed', '', now() - interval '1 hour')")
    model = Model("closed")
    for _ in range(30):
        votes = [
            a_vote(
                rng.choice(["a", "a", "b", "closed"]),
                rng.choice(["oui", "oui", "non"]),
                rng.random() < 0.3,
                vote_id=rng.choice([*ids, *ids, vote()["vote_id"]]),
                voter_hash=rng.choice([None, None, "x" * 16, "y" * 16, f"{rng.getrandbits(128):032x}"]),
            )
            for _ in range(rng.randint(1, 9))
        ]
        outcome = database.batch_update_results(votes, [], expects_copies=rng.random() < 0.5)
        reasons = {id(vote): "counted" for vote in outcome.counted}
        reasons |= {id(vote): reason for vote, reason in outcome.duplicates}
        late = iter(outcome.rejected)
        found = [reasons.get(id(vote)) or next(late).reason for vote in votes]
        assert found == model.write(votes), f"seed {seed}"
    assert results.totals() == results.audited() == counts(model.counted.values())
    records = results.query(
        "SELECT vote_id::text, law_id, choice, coalesce(voter_hash, ''), reason FROM duplicate_attempts"
    )
    assert sorted(records) == sorted(model.records)


FIRST_INSERTS = "SELECT vote_id::text FROM vote_audit WHERE xmin::text <> txid::text"  # they have a subtransaction


def test_a_copy_undoes_the_first_insert_which_is_spared_where_copies_are_expected(
    database: Database, results: Results
) -> None:
    """A guess, of no consequence for what is counted."""
    new = [a_vote() for _ in range(5)]
    assert write(database, *new[:2]) == []
    assert write(database, new[0], new[2]) == ["duplicate"]
    assert len(database.batch_update_results([new[3]], [], expects_copies=True).counted) == 1
    assert write(database, new[4]._replace(redelivered=True)) == []
    assert {vote_id for (vote_id,) in results.query(FIRST_INSERTS)} == {vote.vote_id for vote in new[:2]}
    assert results.totals() == results.audited() == {"law-001": (5, 0)}


@pytest.mark.parametrize("pattern", ["one voter", "one late vote", "late votes of a voter", "a chain"])
def test_no_batch_of_copies_takes_long(database: Database, results: Results, pattern: str) -> None:
    """A publisher may compose it: each message would wait for the one before it, and the batch for its time limit."""
    results.query("INSERT INTO laws (law_id, title, closes_at) VALUES ('closed', '', now() - interval '1 hour')")
    late, voter = a_vote("closed"), "v" * 16
    votes = {
        "one voter": lambda number: a_vote(voter_hash=voter),
        "one late vote": lambda number: late,
        "late votes of a voter": lambda number: a_vote("closed", voter_hash=voter),
        "a chain": lambda number: a_vote(vote_id=chain[number // 2], voter_hash=f"{(number + 1) // 2:032x}"),
    }
    chain = [vote()["vote_id"] for _ in range(1_000)]
    batch = [votes[pattern](number) for number in range(500)]
    parts: list[int] = []
    outcome = database.batch_update_results(batch, [], on_part=lambda: parts.append(1))
    assert len(outcome.counted) + len(outcome.duplicates) + len(outcome.rejected) == 500
    parts_of_others = 1 + bool(outcome.rejected)  # late votes are kept in a transaction of their own
    assert len(parts) == parts_of_others
    model = Model("closed")
    reasons = sorted(model.write(batch))
    late_ones = [rejection.reason for rejection in outcome.rejected]
    found = ["counted"] * len(outcome.counted) + [reason for _, reason in outcome.duplicates] + late_ones
    assert sorted(found) == reasons


def test_a_copy_is_recorded_beside_many_others_of_its_vote_id(database: Database, results: Results) -> None:
    """Whether a redelivered copy is recorded already is found by index, whoever sends as many conflicts as he likes."""
    original = a_vote()
    write(database, original)
    results.query(
        "INSERT INTO duplicate_attempts (vote_id, law_id, choice, voter_hash, reason, counted_vote_id, counted_law_id,"
        " counted_choice, instance) SELECT %s, 'law-001', 'non', md5(n::text), 'conflict', %s, 'law-001', 'oui', 'x'"
        " FROM generate_series(1, 20000) AS n",
        original.vote_id,
        original.vote_id,
    )
    question = (
        "EXPLAIN SELECT FROM duplicate_attempts WHERE vote_id = %s AND law_id = 'a' AND choice = 'non'"
        " AND reason = 'conflict' AND coalesce(voter_hash, '') = 'x'"
    )
    plan = "\n".join(line for (line,) in results.query("SET LOCAL enable_seqscan = off; " + question, original.vote_id))
    assert "coalesce" in plan.lower().partition("index cond")[2]
    conflict = original._replace(choice="non", voter_hash="y" * 16, redelivered=True)
    assert write(database, *[conflict] * 100) == ["conflict"] * 100
    assert results.value("SELECT count(*) FROM duplicate_attempts WHERE voter_hash = %s", "y" * 16) == 100
    assert write(database, conflict) == ["conflict"]
    assert results.value("SELECT count(*) FROM duplicate_attempts WHERE voter_hash = %s", "y" * 16) == 100


def test_copies_that_are_tried_again_take_no_longer_for_many_records_of_the_same(
    database: Database, results: Results
) -> None:
    """A publisher can send as many copies of one vote as he likes, and then a COMMIT may go unanswered."""
    original = a_vote()
    write(database, original)
    results.query(
        "INSERT INTO duplicate_attempts (vote_id, law_id, choice, reason, counted_vote_id, counted_law_id,"
        " counted_choice, detected_at, instance) SELECT %s, 'law-001', 'oui', 'duplicate', %s, 'law-001', 'oui',"
        " now() - n * interval '1 microsecond', 'replica-1' FROM generate_series(1, 150000) AS n",
        original.vote_id,
        original.vote_id,
    )
    attempts = [Attempt(1, datetime(2026, 1, 1, tzinfo=UTC))]
    outcome = database.batch_update_results([original] * 500, [], attempts=attempts)  # within the time limit
    assert len(outcome.duplicates) == 500
    assert results.value("SELECT count(*) FROM duplicate_attempts") == 150_500
    database.batch_update_results([original] * 500, [], attempts=attempts)  # now the last one has recorded them
    assert results.value("SELECT count(*) FROM duplicate_attempts") == 150_500


def test_a_copy_is_recorded_though_an_attempt_was_rolled_back(database: Database, results: Results) -> None:
    """What an earlier batch has recorded says nothing about this one."""
    original = a_vote()
    write(database, original, original)
    rolled_back = [Attempt(1, datetime(2026, 1, 1, tzinfo=UTC))]
    database.batch_update_results([original], [], attempts=rolled_back)
    assert attempts(results) == [("duplicate", "oui", "oui")] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        "'r', 0, true, ARRAY[gen_random_uuid()], '{a}', '{oui}', '{}', '{NULL}', '{f}'",
        "'r', 0, true, NULL, '{}', '{}', '{}', '{}', '{}'",
        "'r', NULL, true, '{}', '{}', '{}', '{}', '{}', '{}'",
        "'r', 0, NULL, '{}', '{}', '{}', '{}', '{}', '{}'",
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(database: Database, results: Results, arguments: str) -> None:
    """A vote that is left out of one array would get no outcome."""
    with pytest.raises(psycopg2.errors.InvalidFunctionDefinition):
        results.query(f"SELECT * FROM count_batch({arguments}" + ", '{}'" * 13 + ", false)")


@pytest.mark.parametrize(
    ("digest", "body", "size", "seen"),
    [
        ("sha256('x')", "x", 1, 0),
        ("sha256('x')", "x", 1, -1),
        ("sha256('x')", "x", 0, 1),
        ("sha256('y')", "x", 1, 1),
    ],
)
def test_a_rejected_message_that_is_not_what_it_is_said_to_be_is_refused(
    database: Database, results: Results, digest: str, body: str, size: int, seen: int
) -> None:
    """Evidence under the hash of something else, or seen less than once."""
    none = ", ".join(["'{}'"] * 10)
    message = f"ARRAY[{digest}], '{{m}}', '{{{body}}}', '{{{size}}}', '{{r}}', '{{d}}', '{{NULL}}', '{{{seen}}}'"
    with pytest.raises(psycopg2.errors.InvalidFunctionDefinition):
        results.query(f"SELECT FROM count_batch('r', 0, false, {none}, {message}, '{{}}', false)")
    assert results.value("SELECT count(*) FROM rejected_messages") == 0


def test_a_rejected_message_that_was_seen_as_often_as_can_be_counted_is_kept_all_the_same(
    database: Database, results: Results
) -> None:
    """The number stands still, and no error stops the batch."""
    database.batch_update_results([], [Rejection(b"x", "r", "d", "m", 1)])
    results.query("UPDATE rejected_messages SET times_seen = 9223372036854775806")
    database.batch_update_results([], [Rejection(b"x", "r", "d", "m", 1)] * 3)
    assert results.value("SELECT times_seen FROM rejected_messages") == 9223372036854775807


@pytest.mark.parametrize(
    "work",
    [
        "-1, 0, 0, 0, 0",
        "0, 0, 0, -1, 0",
        "1, 1, 1, 1, -0.1",
        "1, 1, 1, 1, 'NaN'",
        "1, 1, 1, 1, 'Infinity'",
        "1, NULL, 1, 1, 1",
    ],
)
def test_a_minute_of_work_that_cannot_be_is_refused(database: Database, results: Results, work: str) -> None:
    """It would spoil all that is added to it later."""
    with pytest.raises(psycopg2.errors.InvalidParameterValue, match="neither negative nor infinite"):
        results.query(f"SELECT record_minute('r', now(), {work})")


def test_the_totals_are_written_once_and_in_order_however_many_passes_a_batch_takes(
    database: Database, results: Results
) -> None:
    """Every replica wants these rows: one that took them pass by pass would wait for one that has the next."""
    known = a_vote("law-z")
    write(database, known)
    results.query(
        "CREATE TABLE written (nth serial, law_id text);"
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        " 'BEGIN INSERT INTO public.written (law_id) VALUES (NEW.law_id); RETURN NEW; END';"
        "CREATE TRIGGER note BEFORE INSERT ON vote_results FOR EACH ROW EXECUTE FUNCTION note()"
    )
    conflict = known._replace(law_id="law-a", voter_hash="v" * 16)
    second_pass = a_vote("law-a", voter_hash="v" * 16)  # it may count once it is known that the conflict does not
    assert write(database, conflict, second_pass, a_vote("law-z"), a_vote("law-b")) == ["conflict"]
    assert results.query("SELECT law_id FROM written ORDER BY nth") == [("law-a",), ("law-b",), ("law-z",)]
    assert results.totals() == results.audited() == {"law-a": (1, 0), "law-b": (1, 0), "law-z": (2, 0)}


def test_plain_copies_take_one_pass_and_the_first_of_them_counts(database: Database, results: Results) -> None:
    """Their order among others does not matter, so that the function need not look for it."""
    original = a_vote(voter_hash="v" * 16)
    batch = [a_vote(), original, original._replace(redelivered=True), original, a_vote("law-002")]
    assert not database_module._has_rivals(batch)
    assert write(database, *batch) == ["redelivery", "duplicate"]
    assert results.query("SELECT redelivered FROM vote_audit WHERE vote_id = %s", original.vote_id) == [(False,)]
    for other in (
        original._replace(choice="non"),
        original._replace(voter_hash=None),
        original._replace(voted_at=datetime(2026, 1, 1, tzinfo=UTC)),
        original._replace(vote_id=a_vote().vote_id),
    ):
        assert database_module._has_rivals([*batch, other])


@pytest.mark.parametrize("kind", ["conflict", "duplicate"])
def test_copies_in_two_parts_of_a_halved_batch_are_recorded_as_in_one(
    database: Database, results: Results, kind: str
) -> None:
    """What an earlier part has written came in this batch, which holds no message twice."""
    results.query("ALTER TABLE vote_audit ADD CONSTRAINT poison CHECK (law_id <> 'poison')")
    original = a_vote(redelivered=True)
    if kind == "conflict":
        write(database, original)
        first = second = original._replace(choice="non")
    else:
        first, second = original, original._replace(redelivered=False)
    parts: list[int] = []
    batch = [first, a_vote(), second, a_vote("poison")]
    outcome = database.batch_update_results(batch, [], on_part=lambda: parts.append(1))
    assert len(parts) > 3
    assert [rejection.reason for rejection in outcome.rejected] == ["refused_by_database"]
    recorded = 2 if kind == "conflict" else 1
    assert [reason for _, reason in outcome.duplicates] == [kind] * recorded
    assert [reason for reason, _, _ in attempts(results)] == [kind] * recorded


def test_two_replicas_with_the_same_voters_in_opposite_order_do_not_wait_for_each_other(
    results: Results,
) -> None:
    """Rows are inserted in the order of law and voter, whatever their vote_ids. (VOTERS=20000 tries more.)"""
    hashes = [f"{number:032x}" for number in range(int(os.environ.get("VOTERS", "2000")))]
    lists = [[a_vote(voter_hash=voter) for voter in hashes] for _ in range(2)]
    lists[0].sort(key=lambda vote: vote.vote_id)
    lists[1].sort(key=lambda vote: vote.vote_id, reverse=True)
    order = [{vote.voter_hash: position for position, vote in enumerate(votes)} for votes in lists]
    # the same hundred voters at the same time, in opposite order
    lists[1].sort(key=lambda vote: (order[0][vote.voter_hash] // 100, -order[0][vote.voter_hash]))
    failures: list[str] = []
    both = threading.Barrier(2)

    def count(number: int) -> None:
        with contextlib.closing(open_database(results, f"replica-{number}")) as database:
            for first in range(0, len(hashes), 100):
                both.wait(30)
                try:
                    database.batch_update_results(lists[number][first : first + 100], [])
                except DatabaseUnavailable as exc:
                    failures.append(str(exc))
                    database.batch_update_results(lists[number][first : first + 100], [])

    with contextlib.closing(open_database(results)) as database:
        database.initialise_schema()
    threads = [threading.Thread(target=count, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert results.counted() == len(hashes)
    assert results.duplicates() == {"second_vote": len(hashes)}


def test_a_transaction_id_that_comes_again_after_a_promotion_is_no_attempt_of_ours(
    database: Database, results: Results
) -> None:
    """The moment and the instance have to be the same as well."""
    made: list[Attempt] = []
    original = a_vote()
    database.batch_update_results([original], [], attempts=made)
    (attempt,) = made
    other = [attempt._replace(began_at=attempt.began_at + timedelta(microseconds=1))]
    assert database.batch_update_results([original], [], attempts=other).counted == []
    with contextlib.closing(open_database(results, "replica-2")) as replica:
        assert replica.batch_update_results([original], [], attempts=[attempt]).counted == []
    assert database.batch_update_results([original], [], attempts=[attempt]).counted == [original]
    assert results.totals() == {"law-001": (1, 0)}


EARLIER_REPLICA = """
    SELECT law_id, oui_count, non_count
    FROM count_new_votes('earlier', ARRAY[%s]::uuid[], ARRAY[%s]::varchar[], ARRAY[%s]::varchar[], '{NULL}', '{NULL}',
                         0, ARRAY[%s]::varchar[], ARRAY[1]::bigint[], ARRAY[0]::bigint[])
"""


def test_replicas_of_the_version_before_count_on_during_an_upgrade(results: Results) -> None:
    """They call the function that they know; each recognises what the other has counted."""
    results.execute(EARLIER_SCHEMA.read_text())
    old, new, both = (vote()["vote_id"] for _ in range(3))
    results.query(EARLIER_REPLICA, both, "law-1", "oui", "law-1")
    with contextlib.closing(open_database(results)) as database:
        database.initialise_schema()
        assert results.value("SELECT max(version) FROM schema_version") == SCHEMA_VERSION
        outcome = database.batch_update_results([a_vote("law-1", vote_id=both), a_vote("law-1", vote_id=new)], [])
        assert [reason for _, reason in outcome.duplicates] == ["duplicate"]
        assert results.query(EARLIER_REPLICA, old, "law-1", "oui", "law-1") == [("law-1", 3, 0)]
        assert results.query(EARLIER_REPLICA, new, "law-1", "oui", "law-1") == []
        database.probe()
    assert results.totals() == results.audited() == {"law-1": (3, 0)}


def test_every_column_of_a_vote_is_kept(database: Database, results: Results) -> None:
    """Among them a law that is called NULL, and a moment to the microsecond."""
    counted = a_vote("NULL", "non", timestamp="2026-01-01T01:00:00.123456+01:00", voter_hash="h" * 16)
    write(database, counted)
    (row,) = results.query("SELECT vote_id::text, law_id, choice, voted_at, voter_hash, instance FROM vote_audit")
    assert row == (counted.vote_id, "NULL", "non", counted.voted_at, "h" * 16, "replica-1")


def test_a_copy_is_not_counted_and_leaves_a_row(database: Database, results: Results) -> None:
    """Same vote_id, same content, not flagged by the broker."""
    original = a_vote()
    assert write(database, original) == []
    assert write(database, original) == ["duplicate"]
    assert results.totals() == {"law-001": (1, 0)}
    assert attempts(results) == [("duplicate", "oui", "oui")]


def test_a_redelivery_is_not_counted_and_leaves_no_row(database: Database, results: Results) -> None:
    """The broker did it, not the publisher."""
    original = a_vote()
    write(database, original)
    assert write(database, original._replace(redelivered=True)) == ["redelivery"]
    assert (results.counted(), attempts(results)) == (1, [])


def test_a_vote_that_another_replica_got_again_while_it_was_held_is_no_copy(
    database: Database, results: Results
) -> None:
    """Its connection was lost unnoticed: the broker gave the same message to another replica, which counted it."""
    held_since = time.monotonic()
    original = a_vote()
    write(database, original._replace(redelivered=True))
    outcome = database.batch_update_results([original], [], held_since)
    assert [reason for _, reason in outcome.duplicates] == ["redelivery"]
    assert attempts(results) == []


def test_a_copy_that_comes_after_the_vote_was_counted_is_a_copy(database: Database, results: Results) -> None:
    """Also where the vote itself was counted at its second delivery."""
    original = a_vote()
    write(database, original._replace(redelivered=True))
    outcome = database.batch_update_results([original], [], time.monotonic())
    assert [reason for _, reason in outcome.duplicates] == ["duplicate"]


def test_a_redelivered_vote_that_was_never_counted_counts(database: Database, results: Results) -> None:
    """The flag never decides."""
    assert write(database, a_vote(redelivered=True)) == []
    assert results.counted() == 1


def test_a_vote_id_with_another_choice_is_a_conflict(database: Database, results: Results) -> None:
    """The first one counts, and both stand in the row."""
    original = a_vote()
    write(database, original)
    assert write(database, original._replace(choice="non")) == ["conflict"]
    assert write(database, original._replace(law_id="law-002")) == ["conflict"]
    assert results.totals() == {"law-001": (1, 0)}
    assert attempts(results) == [("conflict", "non", "oui"), ("conflict", "oui", "oui")]


def test_a_second_vote_of_a_voter_is_not_counted(database: Database, results: Results) -> None:
    """One vote per law and voter; in another law it counts."""
    write(database, a_vote(voter_hash="h" * 16))
    assert write(database, a_vote("law-001", "non", voter_hash="h" * 16)) == ["second_vote"]
    assert write(database, a_vote("law-002", "non", voter_hash="h" * 16)) == []
    assert results.totals() == {"law-001": (1, 0), "law-002": (0, 1)}
    assert attempts(results) == [("second_vote", "non", "oui")]


def test_copies_inside_one_batch_follow_the_same_rules(database: Database, results: Results) -> None:
    """The first to come counts."""
    original = a_vote(voter_hash="h" * 16)
    rival = a_vote("law-001", "non", voter_hash="h" * 16)
    batch = [original, original, original._replace(redelivered=True), original._replace(choice="non"), rival]
    assert sorted(write(database, *batch)) == ["conflict", "duplicate", "redelivery", "second_vote"]
    assert results.totals() == {"law-001": (1, 0)}


@pytest.mark.parametrize("rival_first", [True, False])
def test_of_two_votes_of_a_voter_in_one_batch_the_first_to_come_counts(
    database: Database, results: Results, rival_first: bool
) -> None:
    """Not the one with the lower vote_id."""
    low = a_vote("law-001", "oui", voter_hash="h" * 16, vote_id="00000000-0000-4000-8000-000000000000")
    high = a_vote("law-001", "non", voter_hash="h" * 16, vote_id="ffffffff-0000-4000-8000-000000000000")
    assert write(database, *([high, low] if rival_first else [low, high])) == ["second_vote"]
    assert results.totals() == {"law-001": (0, 1) if rival_first else (1, 0)}


def test_a_voter_whose_first_copy_is_refused_still_has_a_vote(database: Database, results: Results) -> None:
    """The first of two in the batch is a conflict with an earlier row, so the second is the voter's first."""
    earlier = a_vote("law-009")
    write(database, earlier)
    refused = earlier._replace(law_id="law-001", voter_hash="h" * 16)
    rival = a_vote("law-001", "non", voter_hash="h" * 16)
    assert write(database, refused, rival) == ["conflict"]
    assert results.totals() == {"law-001": (0, 1), "law-009": (1, 0)}


def test_a_batch_of_nothing_but_copies_of_one_vote_is_written(database: Database, results: Results) -> None:
    """Some thousand copies, one row, one count."""
    original = a_vote()
    assert write(database, *[original] * 3_000) == ["duplicate"] * 2_999
    assert results.totals() == {"law-001": (1, 0)}


def test_a_thousand_votes_for_a_thousand_laws_are_one_batch(database: Database, results: Results) -> None:
    """Each law has its row."""
    write(database, *[a_vote(f"law-{number:04}") for number in range(1_000)])
    assert results.totals() == {f"law-{number:04}": (1, 0) for number in range(1_000)}


def test_a_rejected_message_is_kept_once_by_its_hash(database: Database, results: Results) -> None:
    """With its reason, its size, and how often it was seen; a body over 64 KiB is kept in part."""
    large = b"x" * 100_000
    rejections = [Rejection(body, "not_json", "why", "id\x00\n", 0) for body in (b"", b"a", b"a", large)]
    database.batch_update_results([], rejections)
    database.batch_update_results([], rejections[1:2])
    rows = results.query(
        "SELECT body_sha256, length(body), body_bytes, reason, message_id, times_seen FROM rejected_messages ORDER BY 3"
    )
    assert [(bytes(digest), *rest) for digest, *rest in rows] == [
        (hashlib.sha256(body).digest(), min(len(body), 65_536), len(body), "not_json", r"id\x00\n", seen)
        for body, seen in ((b"", 1), (b"a", 3), (large, 1))
    ]


def refuse_poison(results: Results) -> None:
    """From now on the database refuses votes for the law poison, for their content."""
    results.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.law_id = 'poison' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22023'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON vote_audit FOR EACH ROW EXECUTE FUNCTION refuse()"
    )


def test_a_vote_that_the_database_refuses_is_found_and_kept(database: Database, results: Results) -> None:
    """Two culprits among a hundred; the others count, in whatever order."""
    refuse_poison(results)
    votes = [a_vote() for _ in range(98)] + [a_vote("poison"), a_vote("poison")]
    random.Random(1).shuffle(votes)
    outcome = database.batch_update_results(votes, [Rejection(b"{", "not_json", "", None, 0)])
    assert results.totals() == {"law-001": (98, 0)}
    assert results.rejected() == {"not_json": 1, "refused_by_database": 2}
    assert sorted(rejection.reason for rejection in outcome.rejected) == ["not_json"] + ["refused_by_database"] * 2
    assert len(outcome.counted) == 98


def test_a_copy_on_the_other_side_of_a_refused_vote_is_a_copy(database: Database, results: Results) -> None:
    """The halves of a batch are transactions of their own, and the first one's rows are no lost commit."""
    refuse_poison(results)
    original = a_vote()
    outcome = database.batch_update_results([original, a_vote("poison"), original], [])
    assert [reason for _, reason in outcome.duplicates] == ["duplicate"]
    assert (len(outcome.counted), results.counted()) == (1, 1)
    assert attempts(results) == [("duplicate", "oui", "oui")]


def test_new_copies_beside_a_refused_vote_are_all_recorded(database: Database, results: Results) -> None:
    """The halves of a batch are no second attempt."""
    refuse_poison(results)
    original = a_vote()
    write(database, original)
    write(database, original)
    batch = [*(a_vote() for _ in range(5)), original, original, original, a_vote("poison")]
    assert write(database, *batch) == ["duplicate"] * 3
    assert len(attempts(results)) == 4


def test_a_copy_in_the_batch_of_a_redelivered_vote_is_a_copy(database: Database, results: Results) -> None:
    """A batch holds no message twice."""
    original = a_vote()
    held_since = time.monotonic() - 1
    outcome = database.batch_update_results([original._replace(redelivered=True), original], [], held_since)
    assert [reason for _, reason in outcome.duplicates] == ["duplicate"]
    assert len(attempts(results)) == 1


def test_a_wrong_password_is_a_fault_of_the_setup(results: Results) -> None:
    """It does not pass by itself."""
    user_info, _, address = results.url.rpartition("@")
    database = Database(f"{user_info}x@{address}", pool_min=2, pool_max=10, timeout=5.0, instance="replica-1")
    with pytest.raises(DatabaseMisconfigured, match="authentication failed"):
        database.probe()


def test_an_unknown_error_blames_no_vote(database: Database, results: Results) -> None:
    """A trigger that fails for a reason of its own is a fault of the set-up: nothing is rejected."""
    results.query(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON vote_audit FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    with pytest.raises(DatabaseMisconfigured, match="P0001"):
        write(database, a_vote())
    assert results.rejected() == {}


def fail_for(results: Results, condition: str, sqlstate: str = "XX000") -> None:
    """Make the insert of the votes for which the condition holds fail."""
    results.query(
        "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF {condition} THEN RAISE EXCEPTION 'cache lookup failed' USING ERRCODE = '{sqlstate}'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE OR REPLACE TRIGGER fail BEFORE INSERT ON vote_audit FOR EACH ROW EXECUTE FUNCTION fail()"
    )


def test_a_fault_in_one_vote_stops_one_vote(database: Database, results: Results) -> None:
    """Whatever its SQLSTATE: the others of its batch count, and it is kept with that code."""
    votes = [a_vote(f"law-{number % 3}") for number in range(40)]
    fail_for(results, f"NEW.vote_id = '{votes[17].vote_id}'")
    outcome = database.batch_update_results(votes, [])
    assert len(outcome.counted) == results.counted() == 39
    assert results.query("SELECT reason, detail FROM rejected_messages") == [("refused_by_database", "SQLSTATE XX000")]


def test_a_vote_that_fails_alone_in_its_batch_is_refused_where_a_trial_works(
    database: Database, results: Results
) -> None:
    """The trial stands for the others that are not there; it leaves nothing."""
    culprit, copy = a_vote(), a_vote()
    database.batch_update_results([copy], [])
    fail_for(results, f"NEW.vote_id = '{culprit.vote_id}'")
    for batch in ([culprit], [copy, culprit]):
        assert [vote.reason for vote in database.batch_update_results(batch, []).rejected] == ["refused_by_database"]
    assert results.counted() == 1 == results.value("SELECT count(*) FROM vote_audit")


def test_a_vote_that_no_table_takes_stops_nothing_even_with_its_copy_or_alone(
    database: Database, results: Results
) -> None:
    """It fails for its content, so that a vote like it fails too: others like those that were written last stand in."""
    bad, good = a_vote("law-9"), a_vote("law-1")
    assert write(database, good) == []
    fail_for(results, "NEW.law_id = 'law-9'")
    redelivered = good._replace(redelivered=True)
    for batch in ([bad], [bad, bad], [redelivered, bad], [a_vote("law-1"), bad, bad]):
        database.try_to_write(batch, [])
        rejected = database.batch_update_results(batch, []).rejected
        assert {rejection.reason for rejection in rejected} == {"refused_by_database"}
    assert results.counted() == 2


def test_a_fault_that_begins_within_a_batch_blames_no_vote(database: Database, results: Results) -> None:
    """The first half is written, then nothing is any more: what was written before says nothing about now."""
    votes = [a_vote(f"law-{number}") for number in range(12)]
    fail_for(results, f"NEW.vote_id = '{votes[0].vote_id}'", "22000")
    parts = 0

    def break_later() -> None:
        nonlocal parts
        parts += 1
        if parts == 7:
            fail_for(results, "true")

    with pytest.raises(DatabaseMisconfigured):
        database.batch_update_results(votes, [], on_part=break_later)
    assert 0 < results.counted() < 11 and set(results.rejected()) <= {"refused_by_database"}
    assert sum(results.rejected().values()) <= 1
    fail_for(results, "false")
    database.batch_update_results(votes, [])
    assert results.counted() >= 11


@pytest.mark.parametrize(
    ("condition", "sqlstate"),
    [
        ("true", "XX000"),  # of all votes
        ("NEW.law_id = 'law-1'", "XX000"),  # of several of one law
        ("NEW.law_id = 'law-2'", "58030"),  # of one vote, with a code that says that the server is ill
        ("NEW.law_id = 'law-2'", "XX001"),
    ],
)
def test_what_may_be_a_fault_of_the_setup_refuses_nothing(
    database: Database, results: Results, condition: str, sqlstate: str
) -> None:
    """No vote is blamed for it, and all are counted once it is mended."""
    votes = [a_vote("law-1"), a_vote("law-1"), a_vote("law-2"), a_vote("law-3"), a_vote("law-3")]
    fail_for(results, condition, sqlstate)
    made: list[Attempt] = []
    with pytest.raises(DatabaseMisconfigured):
        database.batch_update_results(votes, [], attempts=made)
    assert results.rejected() == {}
    results.query("DROP TRIGGER fail ON vote_audit")
    assert len(database.batch_update_results(votes, [], attempts=made).counted) == results.counted() == 5
    assert attempts(results) == []


def test_rejected_messages_that_cannot_be_kept_are_blamed_on_no_vote(database: Database, results: Results) -> None:
    """Whatever the code that keeping them fails with."""
    results.query(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.reason = 'not_json' THEN RAISE EXCEPTION 'x' USING ERRCODE = 'XX000'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON rejected_messages FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    with pytest.raises(DatabaseMisconfigured, match="cannot be kept"):
        database.batch_update_results([a_vote(), a_vote()], [Rejection(b"x", "not_json", "", None, 1)])
    assert results.rejected() == {}


def test_each_part_of_a_halved_batch_is_told(database: Database, results: Results) -> None:
    """So that a loop that halves for long is not taken for dead."""
    votes = [a_vote() for _ in range(8)]
    fail_for(results, f"NEW.vote_id = '{votes[3].vote_id}'")
    parts: list[int] = []
    database.batch_update_results(votes, [], on_part=lambda: parts.append(1))
    assert len(parts) >= 7


def test_a_batch_of_nothing_but_copies_writes_a_record(database: Database, results: Results) -> None:
    """Which its commit waits for; so does a trial. A transaction that only reads writes none."""
    votes = [a_vote(), a_vote()]
    write(database, *votes)

    def written(action: Callable[[], object]) -> int:
        # records of standbys and checkpoints are no commits of ours
        before = results.value("SELECT pg_current_wal_insert_lsn()")
        action()
        return int(results.value("SELECT pg_current_wal_insert_lsn() - %s", before))

    redelivered = [vote._replace(redelivered=True) for vote in votes]
    assert written(lambda: write(database, *redelivered)) > 0
    assert written(lambda: database.try_to_write(votes, [])) > 0
    assert results.counted() == 2


def test_a_trial_writes_as_a_batch_does_and_leaves_nothing(database: Database, results: Results) -> None:
    """What would refuse the batch refuses the trial: also at its COMMIT. Votes that are counted do not help it."""
    votes, rejection = (
        [a_vote(), a_vote("law-002", voter_hash="0123456789abcdef")],
        Rejection(b"x", "not_json", "", None, 1),
    )
    database.batch_update_results(votes, [rejection])
    before = results.totals(), results.rejected(), results.value("SELECT count(*) FROM vote_audit")
    database.try_to_write(votes, [rejection])
    for kind in (
        "TRIGGER fail AFTER INSERT ON vote_audit",
        "CONSTRAINT TRIGGER fail AFTER INSERT ON vote_audit DEFERRABLE INITIALLY DEFERRED",
    ):
        results.query(
            "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END $$;"
            f"CREATE {kind} FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        with pytest.raises(DatabaseUnavailable, match="disk full"):
            database.try_to_write(votes, [rejection])
        results.query("DROP TRIGGER fail ON vote_audit")
    assert (results.totals(), results.rejected(), results.value("SELECT count(*) FROM vote_audit")) == before
    assert results.value("SELECT times_seen FROM rejected_messages") == 1


def test_a_trial_without_a_vote_makes_one_that_stands_for_all(database: Database, results: Results) -> None:
    """What may be refused for the content of the vote that it makes says nothing about others; it leaves nothing."""
    database.try_to_write([], [])
    for sqlstate in ("XX000", "P0001", "23514"):
        fail_for(results, "true", sqlstate)
        database.try_to_write([], [])
    for sqlstate in ("53100", "42501", "58030"):
        fail_for(results, "true", sqlstate)
        with pytest.raises(DatabaseUnavailable, match="cache lookup failed"):
            database.try_to_write([], [])
    assert (results.totals(), results.rejected(), results.value("SELECT count(*) FROM vote_audit")) == ({}, {}, 0)


def test_a_warning_at_the_commit_makes_it_ambiguous(database: Database, results: Results) -> None:
    """As of a commit that no longer waits for its standby; the batch is written again, and each vote counted once."""
    results.query(
        "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE WARNING 'not so sure'; RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON vote_audit DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION warn()"
    )
    votes = [a_vote(), a_vote()]
    made: list[Attempt] = []
    with pytest.raises(DatabaseUnavailable, match=r"ambiguous.*not so sure"):
        database.batch_update_results(votes, [], attempts=made)
    outcome = database.batch_update_results(votes, [], attempts=made)
    assert (len(outcome.counted), outcome.duplicates) == (2, [])
    assert results.counted() == 2


def test_the_limits_are_in_force_in_each_transaction_whatever_the_session_says(results: Results) -> None:
    """A pooler forgets what was set at connect. What the URL sets, wins."""
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "client_min_messages")

    def in_force(url: str) -> list[str]:
        settings = "SELECT " + ", ".join(f"current_setting('{name}')" for name in names)
        database = Database(url, pool_min=1, pool_max=1, timeout=8, instance="x")
        with database, database._transaction(settings) as cur:
            return list(cur.fetchall()[0])

    assert in_force(results.url) == ["8s", "4s", "16s", "warning"]
    assert in_force(results.url + "?options=-c%20lock_timeout%3D7s") == ["8s", "7s", "16s", "warning"]


def test_an_audit_table_that_swallows_votes_is_a_fault_of_the_setup(database: Database, results: Results) -> None:
    """A trigger that returns NULL: no row, and none in the way."""
    results.query(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
        "CREATE TRIGGER swallow BEFORE INSERT ON vote_audit FOR EACH ROW EXECUTE FUNCTION swallow()"
    )
    with pytest.raises(DatabaseMisconfigured, match="trigger"):
        write(database, a_vote())


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE vote_results CASCADE",
        "ALTER TABLE vote_audit RENAME TO gone",
        "DROP TABLE rejected_messages",
        "DROP FUNCTION count_batch",
    ],
)
def test_what_is_missing_is_found_by_the_probe(database: Database, results: Results, damage: str) -> None:
    """So that nothing is consumed before it is mended."""
    database.probe()
    results.query(damage)
    with pytest.raises(DatabaseMisconfigured, match=r"42P01|42883"):
        database.probe()


def test_the_probe_asks_for_the_right_to_call_the_function(database: Database, results: Results) -> None:
    """Of this very one: another function of that name does not matter."""
    role = f"role_{random.getrandbits(48):x}"
    results.query(f"CREATE ROLE {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        url = f"{results.url}{'&' if '?' in results.url else '?'}options=-c%20role%3D{role}"
        with contextlib.closing(open_database(Results(url))) as with_few_rights:
            results.query("CREATE FUNCTION count_batch(int) RETURNS int LANGUAGE sql AS 'SELECT 1'")
            with pytest.raises(DatabaseMisconfigured, match="permission denied for function"):
                with_few_rights.probe()
            results.query("DROP FUNCTION count_batch(int)")
            results.query(f"GRANT EXECUTE ON FUNCTION count_batch TO {role}")
            with_few_rights.probe()
    finally:
        results.query(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_read_only_server_is_unavailable(database: Database, results: Results) -> None:
    """After a failover to a standby: the probe finds it, and so does a batch."""
    name = results.value("SELECT current_database()")
    results.query(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database._discard_pool()
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        database.probe()
    with pytest.raises(DatabaseUnavailable, match="25006"):
        write(database, a_vote())


def test_a_killed_connection_costs_one_error_and_no_more(database: Database, results: Results) -> None:
    """The next attempt is on a new connection, however many of the old ones are dead."""
    write(database, a_vote())
    results.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'vote-agg%'")
    with pytest.raises(DatabaseUnavailable):
        write(database, a_vote())
    write(database, a_vote())
    assert results.counted() == 2


def test_no_connection_leaks_however_many_batches_fail(database: Database, results: Results) -> None:
    """The pool hands out its connections again and again, and the server sees no more than the smallest pool."""
    results.query("ALTER TABLE vote_results ADD CONSTRAINT never CHECK (oui_count < 2)")
    for _ in range(25):
        database.batch_update_results([a_vote("a"), a_vote("a"), a_vote("b", "non")], [])
    assert results.value(OUR_CONNECTIONS) == 2


def test_a_hanging_transaction_is_cut_by_the_watchdog(results: Results) -> None:
    """A lock that nobody releases, with the server's own limits switched off."""
    database = open_database(results, timeout=1.0)
    database.initialise_schema()
    database._connect_arguments["options"] = "-c lock_timeout=0 -c statement_timeout=0"
    database._discard_pool()
    blocker = psycopg2.connect(results.url)
    blocker.cursor().execute("LOCK TABLE vote_results")
    with pytest.raises(DatabaseUnavailable):
        write(database, a_vote())
    blocker.close()
    wait_until(lambda: results.value(OUR_CONNECTIONS) == 0, "the server lets go of the cut transaction")
    write(database, a_vote())
    database.close()


def lose_the_first_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next commit happens and is answered with an error, as a cut after COMMIT does."""
    commit, replies = database_module._commit, itertools.count(1)

    def commit_and_lose(conn: connection, cur: cursor) -> None:
        commit(conn, cur)
        if next(replies) == 1:
            conn.close()
            raise psycopg2.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(database_module, "_commit", commit_and_lose)


@pytest.mark.parametrize("copies", [0, 1])
def test_our_own_rows_of_an_unreported_commit_are_counted_and_no_duplicates(
    database: Database, results: Results, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    """COMMIT happened, its reply was lost: the same batch written again changes nothing and reports all as counted."""
    original = a_vote()
    batch = [original, *[original] * copies, a_vote("law-002")]
    lose_the_first_reply(monkeypatch)
    made: list[Attempt] = []
    with pytest.raises(DatabaseUnavailable):
        database.batch_update_results(batch, [], attempts=made)
    outcome = database.batch_update_results(batch, [], attempts=made)
    assert [reason for _, reason in outcome.duplicates] == ["duplicate"] * copies
    assert len(outcome.counted) == 2
    assert results.totals() == results.audited() == {"law-001": (1, 0), "law-002": (1, 0)}
    assert attempts(results) == [("duplicate", "oui", "oui")] * copies


def test_a_batch_of_nothing_but_copies_is_recorded_once_where_the_reply_to_its_commit_was_lost(
    database: Database, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as often as it comes where every reply arrives."""
    originals = [a_vote(), a_vote(choice="non")]
    write(database, *originals)
    write(database, *originals)
    assert len(attempts(results)) == 2
    lose_the_first_reply(monkeypatch)
    made: list[Attempt] = []
    with pytest.raises(DatabaseUnavailable):
        database.batch_update_results(originals, [], attempts=made)
    outcome = database.batch_update_results(originals, [], attempts=made)
    assert [reason for _, reason in outcome.duplicates] == ["duplicate", "duplicate"]
    assert len(attempts(results)) == 4
    write(database, *originals)
    assert len(attempts(results)) == 6


@pytest.mark.parametrize("copies", [0, 1])
def test_totals_that_are_swallowed_are_a_fault_of_the_setup(database: Database, results: Results, copies: int) -> None:
    """By a trigger, say: then nothing is committed, for the audit log would say more than the totals."""
    write(database, a_vote("law-002"))
    results.query(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER swallow BEFORE INSERT ON vote_results FOR EACH ROW WHEN (NEW.law_id = 'law-001')"
        " EXECUTE FUNCTION swallow()"
    )
    original = a_vote()
    with pytest.raises(DatabaseMisconfigured, match="vote_results does not take every row"):
        database.batch_update_results([original, *[original] * copies, a_vote("law-002")], [])
    assert results.totals() == results.audited() == {"law-002": (1, 0)}
    results.query("DROP TRIGGER swallow ON vote_results")
    assert write(database, original) == []
    assert attempts(results) == []


def test_a_swallowed_error_is_never_committed(database: Database, results: Results) -> None:
    """commit() on a failed transaction says nothing and stores nothing; ours says so."""
    insert = "INSERT INTO laws (law_id, title) VALUES ('a', 'b')"
    with (
        pytest.raises(DatabaseUnavailable, match="ended before its commit"),
        database._transaction(insert) as cur,
        contextlib.suppress(psycopg2.Error),
    ):
        cur.execute("SELECT 1/0")
    assert results.value("SELECT count(*) FROM laws") == 0


def test_a_refusal_outside_a_batch_is_a_fault_of_the_setup(database: Database, results: Results) -> None:
    """It is no reason to look for a culprit among votes."""
    with pytest.raises(BatchRejected) as caught, database._transaction("SELECT 1/0"):
        pass
    assert isinstance(caught.value, DatabaseMisconfigured)


def test_three_replicas_can_create_the_schema_at_once(results: Results) -> None:
    """An advisory lock lets them in one by one."""
    databases = [open_database(results, f"replica-{number}") for number in range(3)]
    errors: list[Exception] = []

    def initialise(database: Database) -> None:
        try:
            database.initialise_schema()
        except DatabaseUnavailable as exc:
            errors.append(exc)

    threads = [threading.Thread(target=initialise, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in databases:
        database.close()
    assert errors == []
    assert results.value("SELECT count(*) FROM schema_version") == SCHEMA_VERSION


def test_the_schema_script_can_be_run_again_beside_a_counting_service(database: Database, results: Results) -> None:
    """It changes nothing that is there."""
    write(database, a_vote())
    database.initialise_schema()
    results.query("DELETE FROM schema_version")
    database.initialise_schema()
    assert results.totals() == {"law-001": (1, 0)}


@pytest.mark.parametrize(
    "statement", ["UPDATE vote_audit SET choice = 'non'", "DELETE FROM vote_audit", "TRUNCATE vote_audit"]
)
@pytest.mark.parametrize("role", ["origin", "replica"])
def test_the_audit_log_can_only_grow(database: Database, results: Results, statement: str, role: str) -> None:
    """Even for a superuser, even where ordinary triggers are switched off."""
    write(database, a_vote())
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="append-only"):
        results.query(f"SET session_replication_role = {role}; {statement}")
    assert results.audited() == {"law-001": (1, 0)}


def test_the_views_show_percentages_and_duplicates(database: Database, results: Results) -> None:
    """As the check-db target prints them."""
    original = a_vote()
    write(database, original, original, a_vote(), a_vote("law-001", "non"))
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-001', 'On the first law')")
    statistics = results.query(
        "SELECT law_id, title, status, total_count, oui_percent, non_percent FROM vote_statistics"
    )
    assert [tuple(map(str, row)) for row in statistics] == [
        ("law-001", "On the first law", "open", "3", "66.67", "33.33")
    ]
    assert results.query("SELECT law_id, reason, attempts, votes FROM duplicate_summary") == [
        ("law-001", "duplicate", 1, 1)
    ]


def test_the_totals_of_more_laws_than_asked_for_are_summed_up(database: Database, results: Results) -> None:
    """Named laws come first, then those with most votes; all together have all votes."""
    database.initialise_schema()
    assert database.totals(["law-1"], 4) == ({}, (0, 0))
    results.query("INSERT INTO vote_results SELECT 'law-' || n, n, 1 FROM generate_series(1, 50) AS n")
    own, others = database.totals(["law-2", "law-1", "law-99"], 4)
    assert own == {"law-1": (1, 1), "law-2": (2, 1), "law-49": (49, 1), "law-50": (50, 1)}
    assert others == (sum(range(3, 49)), 46)
    assert database.totals([], 50)[1] == (0, 0)


def test_the_results_are_bounded_whatever_the_tables_hold(database: Database, results: Results) -> None:
    """Laws with a title come first, then those with most votes; one sum is over all, the others over those left out."""
    database.initialise_schema()
    results.query(
        "INSERT INTO vote_results SELECT 'law-' || n, n, 1 FROM generate_series(1, 50) AS n;"
        "INSERT INTO laws (law_id, title) VALUES ('law-1', repeat('é', 200)), ('law-77', 'no vote yet');"
        "INSERT INTO duplicate_attempts (vote_id, law_id, choice, reason, counted_vote_id, counted_law_id,"
        " counted_choice, instance) SELECT gen_random_uuid(), 'law-1', 'oui', 'duplicate', gen_random_uuid(), 'law-1',"
        " 'oui', 'test' FROM generate_series(1, 9)"
    )
    limits = {"laws": 4, "title": 100, "most_counted": 5, "hides_open": False}
    rows = database.read(SELECT_RESULTS, limits)
    left_out = (47, sum(range(2, 49)), 47, "96.15", "3.85")
    assert [row[1:9] for row in rows] == [(6, 0, sum(range(51)) + 50, *left_out)] * 4
    assert [row[9] for row in rows] == ["law-1", "law-49", "law-50", "law-77"]
    assert [row[10] for row in rows] == ["é" * 101, None, None, "no vote yet"]
    assert [row[1] for row in database.read(SELECT_RESULTS, limits | {"most_counted": 9})] == [9] * 4


def test_the_rows_in_the_way_are_found_by_index_however_small_the_tables_were(
    database: Database, results: Results
) -> None:
    """A scan of the audit log for each batch would stall the count on the night of a vote; plans last for a session."""
    for _ in range(10):
        write(database, a_vote(), a_vote(voter_hash=f"{random.getrandbits(128):032x}"))
    results.query(
        "INSERT INTO vote_audit (vote_id, law_id, choice, voter_hash, instance, redelivered)"
        " SELECT gen_random_uuid(), 'law-' || n % 7, 'oui', md5(n::text), 'test', false"
        " FROM generate_series(1, 20000) AS n"
    )

    def rows_scanned() -> int:
        return int(results.value("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'vote_audit'"))

    before = rows_scanned()
    original = a_vote(voter_hash="h" * 16)
    assert write(database, original, original, a_vote(voter_hash="h" * 16)) == ["duplicate", "second_vote"]
    database._discard_pool()  # a session that ends tells what it did
    wait_until(lambda: results.value(OUR_CONNECTIONS) == 0, "its session has ended")
    assert rows_scanned() - before < 20_000


def test_a_batch_is_prepared_once_a_connection_and_again_after_an_upgrade(database: Database, results: Results) -> None:
    """A function that was replaced is found; a connection that has lost what was prepared is replaced."""
    write(database, a_vote(), a_vote())
    write(database, a_vote())
    with database._transaction("SELECT name FROM pg_prepared_statements") as cur:
        assert cur.fetchall() == [("count_batch",)]
    results.query("DROP FUNCTION count_batch")
    with pytest.raises(DatabaseMisconfigured):
        write(database, a_vote())
    script = SCHEMA_FILE.read_text(encoding="utf-8")
    results.query(script)
    write(database, a_vote())
    with database._transaction("DEALLOCATE ALL"):
        pass
    with pytest.raises(DatabaseUnavailable, match="26000"):
        write(database, a_vote())
    write(database, a_vote())
    assert results.counted() == 5
