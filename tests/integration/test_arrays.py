"""Arrays of votes, through the whole service."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest

from scripts.local_services import LocalServices
from tests.harness import Queue, Results, Service, vote, wait_settled, wait_until
from votes import LAW_REASONS, Outcome

Start = Callable[..., Service]
A_UUID = "3f2b8c1e-5d4a-4f6b-9a7c-0e1d2c3b4a59"
POISON = (
    "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF NEW.law_id = 'poison' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22023'; END IF; RETURN NEW; END $$;"
    "CREATE TRIGGER refuse BEFORE INSERT ON vote_results FOR EACH ROW EXECUTE FUNCTION refuse()"
)


def array(*elements: bytes | dict[str, object]) -> bytes:
    return b"[%b]" % b" ,\n".join(
        element if isinstance(element, bytes) else json.dumps(element).encode() for element in elements
    )


def kept(results: Results) -> dict[bytes, tuple[str, str, int]]:
    """What is rejected, by its text: reason, detail, how often it was seen; all without a message_id."""
    rows = results.query("SELECT body, reason, detail, times_seen FROM rejected_messages WHERE message_id = ''")
    return {bytes(body): (reason, detail, seen) for body, reason, detail, seen in rows}


def dead_letters(services: LocalServices, queue: Queue) -> Queue:
    """The queue that gets what is rejected."""
    dead = Queue(queue.url, f"{queue.name}.dead")
    with dead.channel():
        pass
    policy = json.dumps({"dead-letter-exchange": "", "dead-letter-routing-key": dead.name})
    services.rabbitmq.ctl("set_policy", dead.name, f"^{queue.name}$", policy)
    return dead


def test_each_vote_of_an_array_has_the_outcome_that_it_would_have_alone(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """The array is acked, whatever was rejected of it, and nothing of it becomes a dead letter."""
    dead = dead_letters(services, queue)
    service = start_service()
    results.query("INSERT INTO laws (law_id, title, closes_at) VALUES ('closed', '', '2020-01-01')")
    one, two, late = vote(), vote("law-002", "non", voter_hash="h" * 16), vote("closed", x="é")
    spoiled = json.dumps(vote(choice="OUI"))[:-1].encode() + b', "note": "\xc3\xa9"  }'
    queue.publish(
        array(one, spoiled, two, late, one, one | {"choice": "non"}, vote("law-002", voter_hash="h" * 16), b"7"),
        message_id=A_UUID,
    )
    queue.publish(array(spoiled), array({"law_id": "law-001", "choice": "oui"}), array(one), one, message_id=A_UUID)
    wait_settled(services, queue)
    assert results.totals() == results.audited() == {"law-001": (1, 0), "law-002": (0, 1)}
    assert results.duplicates() == {"conflict": 1, "duplicate": 3, "second_vote": 1}
    without_id = json.dumps({"law_id": "law-001", "choice": "oui"}).encode()
    assert kept(results) == {
        spoiled: ("bad_choice", "vote 2 of an array: choice is neither oui nor non", 2),
        json.dumps(late).encode(): (
            "outside_window",
            f"vote 4 of an array: {LAW_REASONS[Outcome.OUTSIDE_WINDOW]}",
            1,
        ),
        b"7": ("not_an_object", "vote 8 of an array: the JSON is neither an object nor an array of objects", 1),
        without_id: (
            "missing_vote_id",
            "vote 1 of an array: there is neither a vote_id nor a voter_hash nor a message_id",
            1,
        ),
    }
    assert dead.ready() == 0
    assert service.metric("votes_rejected_total", reason="bad_choice") == 2
    assert service.metric("batch_size_processed_total") == 12


def test_an_array_that_cannot_be_read_is_rejected_whole(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """With its votes, as a message; the next one counts."""
    dead = dead_letters(services, queue)
    start_service()
    good = json.dumps(vote()).encode()
    bodies = {
        "empty_array": b"[]",
        "nested_array": b"[[" + good + b"]]",
        "too_many_votes": array(*[{"a": n} for n in range(501)]),
        "not_json": array(good, b"{]"),
    }
    queue.publish(*bodies.values(), message_id=A_UUID)
    queue.publish(array(vote()))
    wait_settled(services, queue)
    rows = results.query("SELECT reason, body FROM rejected_messages WHERE message_id = %s", A_UUID)
    assert {reason: bytes(body) for reason, body in rows} == bodies
    assert results.counted() == 1
    wait_until(lambda: dead.ready() == len(bodies), "they are dead letters")


def test_an_array_larger_than_a_batch_is_written_in_one_transaction(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """And the votes around it in others."""
    start_service(BATCH_SIZE="10", RABBITMQ_PREFETCH_COUNT="50")
    queue.publish(*[vote("law-001") for _ in range(15)], array(*[vote("law-002") for _ in range(200)]))
    queue.publish(*[vote("law-003") for _ in range(15)])
    wait_settled(services, queue)
    assert results.totals() == {"law-001": (15, 0), "law-002": (200, 0), "law-003": (15, 0)}
    assert results.query("SELECT count(DISTINCT txid) FROM vote_audit WHERE law_id = 'law-002'") == [(1,)]


def test_one_vote_that_the_database_refuses_costs_no_other_of_its_array(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """It is kept by its own text."""
    start_service()
    results.query(POISON)
    votes = [vote() for _ in range(99)]
    votes.insert(37, vote("poison"))
    queue.publish(array(*votes), vote())
    wait_settled(services, queue)
    assert results.totals() == results.audited() == {"law-001": (100, 0)}
    assert kept(results) == {
        json.dumps(votes[37]).encode(): ("refused_by_database", "vote 38 of an array: SQLSTATE 22023", 1)
    }


def writers(results: Results) -> int:
    """How many batches are being written."""
    return int(
        results.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
            " AND application_name LIKE 'vote-aggregator%%'"
        )
    )


@pytest.mark.parametrize(("connections", "at_once"), [("10", 2), ("1", 1)])
def test_two_full_batches_are_written_at_the_same_time(
    services: LocalServices, queue: Queue, results: Results, start_service: Start, connections: str, at_once: int
) -> None:
    """Where there is a connection for each; the gauge counts the votes of both, and of what waits behind them."""
    service = start_service(BATCH_SIZE="40", RABBITMQ_PREFETCH_COUNT="40", DB_POOL_MIN="1", DB_POOL_MAX=connections)
    results.query(
        "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;"
        "CREATE TRIGGER linger BEFORE INSERT ON vote_audit FOR EACH STATEMENT EXECUTE FUNCTION linger()"
    )
    queue.publish(*[array(*[vote(f"law-{number}") for _ in range(20)]) for number in range(25)])
    seen, in_flight = [0], [0.0]

    def is_done() -> bool:
        seen.append(writers(results))
        in_flight.append(service.metric("votes_in_flight"))
        return results.counted() == 500

    wait_until(is_done, "all are counted")
    assert max(seen) == at_once
    assert 200 < max(in_flight) <= 500
    wait_settled(services, queue)
    wait_until(lambda: service.metric("votes_in_flight") == 0, "all are settled")


def test_a_copy_in_the_next_batch_is_a_copy(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Both may be full at the same time; then they are written one after the other, and the first vote counts."""
    start_service().stop()
    arrays, seen = [], []
    for number in range(40):
        votes = [vote(f"law-{number}") for _ in range(20)]
        if number % 2:
            votes[7:9] = [seen[-3], seen[-4] | {"choice": "non"}]
        arrays.append(array(*votes))
        seen += votes
    queue.publish(*arrays)
    service = start_service(BATCH_SIZE="20", RABBITMQ_PREFETCH_COUNT="40")
    wait_settled(services, queue)
    assert results.counted() == 760
    assert results.duplicates() == {"conflict": 20, "duplicate": 20}
    assert all(non == 0 for _, non in results.totals().values())
    assert service.metric("votes_duplicate_total", reason="duplicate") == 20
    counted = [service.metric("votes_aggregated_total", law_id=f"law-{n}", choice="oui") for n in range(40)]
    assert sum(counted) == 760


def test_full_arrays_do_not_fill_the_memory(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Two thousand may be unacked, with 500 votes in each, and the database takes none."""
    service = start_service(RABBITMQ_PREFETCH_COUNT="2000", BATCH_SIZE="500", BATCH_TIMEOUT_SECONDS="0.1")
    bodies = []
    for _ in range(300):
        votes = [{"vote_id": str(uuid.uuid4()), "law_id": "a", "choice": "oui"} for _ in range(500)]
        bodies.append(json.dumps(votes).encode())
    with contextlib.closing(psycopg2.connect(results.url)) as conn, conn.cursor() as cur:
        cur.execute("LOCK TABLE vote_results IN SHARE MODE")
        queue.publish(*bodies)
        wait_until(lambda: queue.ready() == 0 or service.metric("votes_in_flight") > 7_000, "it holds what it may")
        conn.rollback()
    wait_settled(services, queue, 120)
    assert results.counted() == 150_000
    peak = int(Path(f"/proc/{service.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    print(f"peak {peak:.0f} MB")
    assert peak < 100, f"{peak:.0f} MB"
