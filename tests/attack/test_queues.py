"""What a publisher, or who sets up the broker, could do to the votes of others: each attempt, and what holds it now."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from database import Database
from scripts.local_services import LocalServices
from tests.harness import ROOT, Queue, Results, Service, vote, wait_settled, wait_until
from tests.integration.test_few_rights import PASSWORD, set_up_database, with_login
from votes import Vote

Start = Callable[..., Service]
HOUR = 3600


@pytest.fixture
def database(results: Results) -> Iterator[Database]:
    with Database(results.url, pool_min=1, pool_max=2, timeout=10, instance="replica-1") as database:
        database.initialise_schema()
        yield database


# --- votes that wait while their law closes --------------------------------------------------------------------------


def a_law(results: Results, opens_at: float | None, closes_at: float | None, law_id: str = "law-001") -> None:
    """Open from one moment to the other, in seconds from now; None is no limit."""
    results.query(
        "INSERT INTO laws (law_id, title, opens_at, closes_at)"
        " VALUES (%s, 'a law', now() + make_interval(secs => %s), now() + make_interval(secs => %s))",
        *(law_id, opens_at, closes_at),
    )


@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_a_publisher_cannot_close_others_out_by_priorities(
    database: Database, queue: Queue, results: Results, start_service: Start, reader: str
) -> None:
    """Votes that were sent in time count, however long messages of a higher priority were served before them."""
    a_law(results, None, -HOUR)
    now = int(time.time())
    honest = [vote() for _ in range(120)]
    queue.publish(*honest, timestamp=now - 2 * HOUR)
    queue.publish(*(vote() for _ in range(3)), timestamp=now - HOUR // 2)
    queue.publish(*(vote() for _ in range(2)))
    queue.publish(*([b"junk"] * 300), priority=10)
    service = start_service(RABBITMQ_READER=reader)
    wait_until(lambda: service.metric("votes_rejected_total", reason="not_json") == 300, "the junk is read")
    wait_until(lambda: results.rejected().get("outside_window") == 5, "the late ones are kept")
    assert results.totals() == results.audited() == {"law-001": (120, 0)}
    assert results.query("SELECT DISTINCT voted_at FROM vote_audit") == [(None,)]


def read(sent_at: int | None, **fields: Any) -> Vote:
    """A vote on law-001, in a message with that timestamp property."""
    return Vote.from_message(json.dumps(vote(**fields)).encode(), sent_at=sent_at)


def outcomes(database: Database, *votes: Vote, held_since: float | None = None) -> list[str]:
    """What becomes of each vote, written in one batch."""
    outcome = database.batch_update_results(votes, [], held_since)
    reasons = {rejection.body: rejection.reason for rejection in outcome.rejected}
    reasons |= {duplicate.body: str(reason) for duplicate, reason in outcome.duplicates}
    return [reasons.get(vote.body, "counted") for vote in votes]


IMPLAUSIBLE = {
    "zero": lambda now: 0,
    "one": lambda now: 1,
    "uptime": lambda now: 86_400 * 30,
    "tenths": lambda now: now // 10,
    "milliseconds": lambda now: (now - 2 * HOUR) * 1000,
    "microseconds": lambda now: (now - 2 * HOUR) * 1_000_000,
    "tomorrow": lambda now: now + 24 * HOUR,
    "year 9999": lambda now: 253_402_300_799,
    "greatest": lambda now: 2**64 - 1,
    "greatest signed": lambda now: 2**63 - 1,
}


@pytest.mark.parametrize("sent_at", IMPLAUSIBLE.values(), ids=IMPLAUSIBLE.keys())
def test_a_timestamp_that_cannot_be_right_counts_as_absent(
    database: Database, results: Results, sent_at: Callable[[int], int]
) -> None:
    """It admits no vote, and refuses none."""
    now = int(time.time())
    a_law(results, None, -HOUR)
    a_law(results, HOUR, None, "law-002")
    a_law(results, -HOUR, HOUR, "law-003")
    votes = [read(sent_at(now)), read(sent_at(now), law_id="law-002"), read(sent_at(now), law_id="law-003")]
    assert outcomes(database, *votes) == ["outside_window", "outside_window", "counted"]


@pytest.mark.parametrize(
    ("sent", "opens", "closes", "becomes"),
    [
        (-2 * HOUR, None, -HOUR, "counted"),
        (-2 * HOUR, -3 * HOUR, -HOUR, "counted"),
        (-4 * HOUR, -3 * HOUR, -HOUR, "outside_window"),
        (-HOUR // 2, -3 * HOUR, -HOUR, "outside_window"),
        (-2 * HOUR, -HOUR, HOUR, "counted"),  # by its receipt
        (-2 * HOUR, -HOUR, None, "counted"),
        (HOUR, -HOUR, HOUR // 2, "counted"),
        (None, None, -HOUR, "outside_window"),
        (-2 * HOUR, HOUR, None, "outside_window"),
    ],
)
def test_a_timestamp_of_the_message_may_admit_a_vote_and_never_refuse_one(
    database: Database, results: Results, sent: int | None, opens: int | None, closes: int | None, becomes: str
) -> None:
    """A vote counts where its law was open when it was sent, or when it was received."""
    a_law(results, opens, closes)
    assert outcomes(database, read(None if sent is None else int(time.time()) + sent)) == [becomes]


def test_the_vote_s_own_timestamp_wins(database: Database, results: Results) -> None:
    """What the message says does not help a vote that says itself that it is late."""
    a_law(results, None, -HOUR)
    now = int(time.time())
    assert outcomes(database, read(now - 2 * HOUR, timestamp=now)) == ["outside_window"]
    assert outcomes(database, read(now, timestamp=now - 2 * HOUR)) == ["counted"]


def test_a_certified_law_takes_no_vote_whenever_it_was_sent(database: Database, results: Results) -> None:
    a_law(results, None, -HOUR)
    results.certify("law-001")
    assert outcomes(database, read(int(time.time()) - 2 * HOUR)) == ["certified"]


def test_halves_and_later_attempts_judge_alike(database: Database, results: Results) -> None:
    """Of a batch that is halved for one bad vote, that comes again, or whose COMMIT was not answered."""
    a_law(results, None, -HOUR)
    now = int(time.time())
    results.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE 'no' USING ERRCODE = '22000'; END$$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON vote_audit FOR EACH ROW WHEN (NEW.law_id = 'law-bad')"
        " EXECUTE FUNCTION refuse()"
    )
    votes = [read(now - 2 * HOUR) if n % 2 else read(now) for n in range(20)]
    votes[7:7] = [read(now - 2 * HOUR, law_id="law-bad")]
    expected = ["counted" if vote.sent_at and vote.sent_at < now else "outside_window" for vote in votes]
    expected[7] = "refused_by_database"
    assert outcomes(database, *votes) == expected
    again = [vote._replace(redelivered=True) for vote in votes]
    assert outcomes(database, *again) == [{"counted": "redelivery"}.get(became, became) for became in expected]
    assert results.totals() == results.audited() == {"law-001": (10, 0)}


def test_a_replica_of_before_counts_on_after_the_upgrade(results: Results) -> None:
    """By the function that it knows; with the right that its role had, the role may call the new one too."""
    results.execute((ROOT / "tests/integration/init_db_v4.sql").read_text())
    name = f"role-{uuid.uuid4().hex[:8]}"
    results.query(
        f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}';"
        f'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{name}";'
        f'GRANT EXECUTE ON FUNCTION count_batch, record_minute TO "{name}"'
    )
    try:
        role = Results(with_login(results.url, name))
        batch = "'r', 0, false, ARRAY[gen_random_uuid()], '{a}', '{oui}', '{NULL}', '{NULL}', '{f}'" + ", '{}'" * 12
        counted = f"SELECT inserted FROM count_batch({batch}"
        assert role.value(f"{counted})") == 1
        for _ in range(2):
            results.execute((ROOT / "init_db.sql").read_text())
        assert role.value(f"{counted})") == 1
        assert role.value(f"{counted}, '{{}}')") == 1
        rights = "SELECT has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc WHERE proname = 'count_batch'"
        assert results.query(rights) == [(False,), (False,)]
        set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD)
        assert results.value("SELECT count(*) FROM pg_proc WHERE proname = 'count_batch'") == 1
        assert role.value(f"{counted}, '{{}}')") == 1
        assert results.totals() == results.audited() == {"a": (4, 0)}
    finally:
        results.execute(f'DROP OWNED BY "{name}"')
        results.execute(f'DROP ROLE "{name}"')
