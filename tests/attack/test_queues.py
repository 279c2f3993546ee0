"""What a publisher, or who sets up the broker, could do to the votes of others: each attempt, and what holds it now."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.exceptions import NackError

from database import Database
from rabbitmq_client import broker_version
from reconcile import Losses, look_for_losses, ways_out
from scripts.local_services import LocalServices, RabbitMQServer
from tests.conftest import empty_queue
from tests.harness import ROOT, Queue, Results, Service, vote, wait_until
from tests.integration.test_few_rights import PASSWORD, SOME_USERS, import_definitions, set_up_database, with_login
from votes import Vote

Start = Callable[..., Service]
HOUR = 3600


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


@pytest.mark.parametrize(("version", "arguments", "stays"), [("v4", 12, False), ("v6", 13, True)])
def test_a_replica_of_before_counts_on_after_the_upgrade(
    results: Results, version: str, arguments: int, stays: bool
) -> None:
    """By the function that it knows; with the right that its role had, the role may call the new one too.

    That of the version before stays also after roles.sql: it may come back.
    """
    results.execute((ROOT / f"tests/integration/init_db_{version}.sql").read_text())
    name = f"role-{uuid.uuid4().hex[:8]}"
    results.query(
        f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}';"
        f'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{name}";'
        f'GRANT EXECUTE ON FUNCTION count_batch, record_minute TO "{name}"'
    )
    try:
        role = Results(with_login(results.url, name))
        batch = (
            "'r', 0, false, ARRAY[gen_random_uuid()], '{a}', '{oui}', '{NULL}', '{NULL}', '{f}'" + ", '{}'" * arguments
        )
        counted = f"SELECT inserted FROM count_batch({batch}"
        of_now = counted if arguments == 13 else f"{counted}, '{{}}'"
        assert role.value(f"{counted})") == 1
        for _ in range(2):
            results.execute((ROOT / "init_db.sql").read_text())
        assert role.value(f"{counted})") == 1
        assert role.value(f"{of_now}, false)") == 1
        rights = "SELECT has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc WHERE proname = 'count_batch'"
        assert results.query(rights) == [(False,), (False,)]
        set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD)
        assert results.value("SELECT count(*) FROM pg_proc WHERE proname = 'count_batch'") == 1 + stays
        if stays:
            assert role.value(f"{counted})") == 1
        assert role.value(f"{of_now}, false)") == 1
        assert results.totals() == results.audited() == {"a": (4 + stays, 0)}
    finally:
        results.execute(f'DROP OWNED BY "{name}"')
        results.execute(f'DROP ROLE "{name}"')


class StampingBroker(RabbitMQServer):
    """With the setting of deploy/rabbitmq/timestamps.conf."""

    def _configuration(self) -> str:
        return super()._configuration() + (ROOT / "deploy/rabbitmq/timestamps.conf").read_text()


def test_a_broker_says_when_it_received_a_vote_that_does_not_say_it(services: LocalServices, tmp_path: Path) -> None:
    """And leaves alone what a publisher says, so that a vote which is moved back keeps its own."""
    with pika.BlockingConnection(pika.URLParameters(services.rabbitmq.url())) as connection:
        if broker_version(connection) < (3, 12):
            pytest.skip("this broker knows no such setting")
    broker = StampingBroker(tmp_path / "broker")
    broker.start()
    try:
        before = int(time.time())
        queue = Queue(broker.url(), "votes")
        queue.publish(vote())
        queue.publish(vote(), timestamp=before - HOUR)
        with queue.channel() as channel:
            stamps = [channel.basic_get("votes", auto_ack=True)[1].timestamp for _ in range(2)]
        assert before <= stamps[0] <= time.time()
        assert stamps[1] == before - HOUR
    finally:
        broker.stop()


# --- votes that fall out of the queue --------------------------------------------------------------------------------


class Kept:
    """A queue with what deploy/rabbitmq/definitions.sh sets up around it."""

    def __init__(self, services: LocalServices, queue: Queue) -> None:
        self.queue = queue
        self.dead = Queue(queue.url, f"{queue.name}.dead", queue.queue_type)
        self.rejected = Queue(queue.url, f"{queue.name}.rejected")
        with queue.connect() as connection:
            self.version = broker_version(connection)
        self._services = services
        self._operator_policy: list[str] = []

    def holds(self) -> tuple[int, int, int]:
        """Messages that wait in the queue, the dead letters and the rejected ones."""
        with self.queue.connect() as connection:
            declared = [connection.channel().queue_declare(each.name, passive=True) for each in self._queues()]
        ready, dead, rejected = [each.method.message_count for each in declared]
        return ready, dead, rejected

    def limit(self, **definition: Any) -> None:
        """Give the queue an operator policy, which holds beside any other."""
        self._operator_policy = [self.queue.name]
        pattern = f"^{self.queue.name}$".replace(".", "\\.")
        self._services.rabbitmq.ctl(
            "set_operator_policy", "--apply-to", "queues", self.queue.name, pattern, json.dumps(definition)
        )

    def clear(self) -> None:
        """All but the queue itself."""
        for name in self._operator_policy:
            self._services.rabbitmq.ctl("clear_operator_policy", name)
        self._services.rabbitmq.ctl("clear_policy", f"{self.queue.name}.keep")
        with self.queue.connect() as connection:
            channel = connection.channel()
            for name in (self.dead.name, self.rejected.name):
                channel.queue_delete(name)
            for name in (f"{self.queue.name}.dead-letters", self.dead.name):
                channel.exchange_delete(name)

    def _queues(self) -> tuple[Queue, Queue, Queue]:
        return self.queue, self.dead, self.rejected


@contextlib.contextmanager
def kept_queue(services: LocalServices, queue_type: str, folder: Path) -> Iterator[Kept]:
    with empty_queue(services, queue_type) as queue:
        with queue.connect() as connection:
            version = ".".join(map(str, broker_version(connection)))
        variables = {"RABBITMQ_QUEUE": queue.name, "RABBITMQ_QUEUE_TYPE": queue_type, "RABBITMQ_VERSION": version}
        import_definitions(services, folder, SOME_USERS | variables)
        kept = Kept(services, queue)
        try:
            yield kept
        finally:
            kept.clear()


@pytest.fixture(params=["classic", "quorum"])
def kept(request: pytest.FixtureRequest, services: LocalServices, tmp_path: Path) -> Iterator[Kept]:
    with kept_queue(services, request.param, tmp_path) as kept:
        yield kept


def test_an_expired_vote_is_kept_and_counts_once_it_is_moved_back(
    services: LocalServices, kept: Kept, results: Results, database: Database, start_service: Start
) -> None:
    """By the documented command, and judged by when it was sent. What the service rejects goes elsewhere."""
    a_law(results, None, -HOUR)
    dead = [vote() for _ in range(3)]
    kept.queue.publish(*dead, expiration="1", timestamp=int(time.time()) - 2 * HOUR)
    kept.queue.publish(b"no vote", expiration="1", headers={"x-first-death-reason": "rejected"})
    wait_until(lambda: kept.holds() == (0, 4, 0), "what has expired is kept")
    settings = {"RABBITMQ_QUEUE": kept.queue.name, "RABBITMQ_QUEUE_TYPE": kept.queue.queue_type}
    start_service(**settings)
    kept.queue.publish(b"junk", vote(law_id="law-002"))
    wait_until(lambda: kept.holds() == (0, 4, 1), "what is rejected is kept elsewhere")
    services.rabbitmq._tool("rabbitmq-plugins", "enable", "rabbitmq_shovel", timeout=60)
    back = {
        **{"src-protocol": "amqp091", "src-uri": "amqp://", "src-queue": kept.dead.name},
        **{"dest-protocol": "amqp091", "dest-uri": "amqp://", "dest-queue": kept.queue.name},
        **{"src-delete-after": "queue-length", "ack-mode": "on-confirm"},
    }
    services.rabbitmq.ctl("set_parameter", "shovel", "back", json.dumps(back))
    wait_until(lambda: results.counted() == 4, "they count")
    back_again = (0, 1, 1) if kept.version < (4,) else (0, 0, 2)  # by the first or the last reason
    wait_until(lambda: kept.holds() == back_again, "what is no vote is rejected")
    assert results.totals() == results.audited() == {"law-001": (3, 0), "law-002": (1, 0)}


def test_what_a_limit_of_the_queue_drops_is_kept(kept: Kept) -> None:
    """A full classic queue drops the oldest; a full quorum queue of the definitions refuses what comes."""
    kept.limit(**{"message-ttl": 1})
    kept.queue.publish(*(vote() for _ in range(3)))
    wait_until(lambda: kept.holds() == (0, 3, 0), "what has expired is kept")
    kept.limit(**{"max-length": 2})
    if kept.queue.queue_type == "classic":
        kept.queue.publish(*(vote() for _ in range(5)))
        wait_until(lambda: kept.holds() == (2, 6, 0), "what was dropped is kept")
        return
    refused = 0
    with kept.queue.channel() as channel:
        for _ in range(20):  # it tells its publishers a little late that it is full
            try:
                channel.basic_publish("", kept.queue.name, b"x", pika.BasicProperties(delivery_mode=2))
            except NackError:
                refused += 1
    assert refused
    wait_until(lambda: kept.holds() == (20 - refused, 3, 0), "all that was confirmed is there")


def environment(services: LocalServices, queue: Queue, **settings: str) -> dict[str, str]:
    address = services.rabbitmq.management_url()
    return {"AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name, "RABBITMQ_MANAGEMENT_URL": address, **settings}


def losses(services: LocalServices, queue: Queue) -> Losses:
    """What is found, once the management API has figures of the queue."""

    def found() -> Losses | None:
        found = look_for_losses(environment(services, queue))
        return None if "so young a queue" in str(found.warnings) else found

    return wait_until(found, "the management API knows the queue")


def test_reconcile_tells_of_messages_that_fell_out(
    services: LocalServices, results: Results, database: Database, tmp_path: Path
) -> None:
    """With the queue of the definitions there is nothing to warn of, and dead letters are messages that are missing."""
    with kept_queue(services, "classic", tmp_path) as kept:
        assert losses(services, kept.queue) == Losses((), {kept.dead.name: 0, kept.rejected.name: 0}, 0)
        kept.rejected.publish(b"junk")
        kept.queue.publish(vote(), vote(), expiration="1")
        seen = Losses((), {kept.dead.name: 2, kept.rejected.name: 1}, 2)
        wait_until(lambda: losses(services, kept.queue) == seen, "the dead letters are seen")
        variables = environment(services, kept.queue, DATABASE_URL=results.url, PATH=os.environ["PATH"])
        command = [sys.executable, str(ROOT / "reconcile.py")]
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=60, cwd=ROOT / "tests", check=False
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"dead        {kept.dead.name} 2, {kept.rejected.name} 1\n" in done.stdout
        assert "2 messages fell out of the queue" in done.stdout


GONE = "no dead-letter exchange"
DEAD = {"dead-letter-exchange": "dead"}


@pytest.mark.parametrize(
    ("arguments", "policy", "words"),
    [
        ({}, {}, [GONE]),
        ({}, DEAD, []),
        ({"x-dead-letter-exchange": "dead"}, {}, []),
        ({"x-message-ttl": 6}, DEAD, ["message-ttl 6 (argument)"]),
        ({}, {"message-ttl": 7}, ["message-ttl 7 (policy short, operator policy shorter)", GONE]),
        ({"x-max-length": 8}, DEAD, ["max-length 8 (argument)"]),
        ({"x-max-length-bytes": 9}, {"overflow": "drop-head"}, ["max-length-bytes 9 (argument)", GONE]),
        ({"x-max-length": 8}, {"overflow": "reject-publish"} | DEAD, []),
        ({"x-overflow": "reject-publish-dlx"}, {"max-length-bytes": 9} | DEAD, []),
        ({"x-overflow": "drop-head"}, {"max-length": 8, "overflow": "reject-publish"} | DEAD, ["max-length 8 (policy"]),
        ({"x-expires": 10}, {"expires": 11} | DEAD, ["expires 11 (policy", "expires 10 (argument)"]),
        ({"x-delivery-limit": -1}, {"delivery-limit": 12} | DEAD, ["delivery-limit 12 (policy"]),
        ({"x-dead-letter-exchange": ""}, {}, [GONE]),  # back to the queue, which the broker does not do
        ({"x-dead-letter-exchange": ""}, {"dead-letter-routing-key": "dead"}, []),
    ],
)
def test_what_can_make_votes_vanish_is_named(
    arguments: dict[str, Any], policy: dict[str, Any], words: list[str]
) -> None:
    """By arguments, by policies and by operator policies, of which the API tells what holds of both."""
    queue = {"name": "q", "arguments": arguments, "effective_policy_definition": policy}
    warnings, exchange, _ = ways_out(queue | {"policy": "short", "operator_policy": "shorter"})
    assert len(warnings) == len(words)
    assert all(expected in warning for expected, warning in zip(words, warnings, strict=True))
    assert (exchange is None) is (GONE in words)


def test_reconcile_finds_it_in_the_broker(services: LocalServices, queue: Queue) -> None:
    """In arguments, in an operator policy, and where the dead-letter exchange leads nowhere or is not there."""
    ways = {
        "max-length 7 (argument)": {"x-max-length": 7},
        "leads to no queue": {"x-dead-letter-exchange": "amq.fanout"},
        "cannot be followed": {"x-dead-letter-exchange": "not-there"},
    }
    queues = [Queue(queue.url, f"{queue.name}-{number}") for number in range(len(ways))]
    pattern = f"^{queue.name}-".replace(".", "\\.")
    services.rabbitmq.ctl("set_operator_policy", "--apply-to", "queues", queue.name, pattern, '{"message-ttl": 60000}')
    try:
        with queue.connect() as connection:
            for each, arguments in zip(queues, ways.values(), strict=True):
                connection.channel().queue_declare(each.name, durable=True, arguments=arguments)
        for each, words in zip(queues, ways, strict=True):
            warnings = " ".join(losses(services, each).warnings)
            assert words in warnings
            assert f"message-ttl 60000 (operator policy {queue.name})" in warnings
    finally:
        services.rabbitmq.ctl("clear_operator_policy", queue.name)
        for each in queues:
            each.delete()


def test_without_the_management_api_reconcile_says_that_it_could_not_look(
    services: LocalServices, queue: Queue
) -> None:
    """Not set, not there, or not for this user."""
    queue.publish(vote())
    variables = environment(services, queue)
    for address in ("", "http://127.0.0.1:9", variables["RABBITMQ_MANAGEMENT_URL"]):
        wrong_queue = {"RABBITMQ_QUEUE": "not-there", "RABBITMQ_MANAGEMENT_URL": address}
        found = look_for_losses(variables | wrong_queue)
        assert "what can make votes vanish from the queue, and what has fallen out of it, is not known" in str(found)
        assert (found.dead_letters, found.fallen_out) == (None, 0)


def test_a_queue_without_priorities_serves_all_in_the_order_they_came(
    results: Results, queue: Queue, start_service: Start
) -> None:
    """By setting, where publishers are not trusted with them."""
    settings = {"RABBITMQ_MAX_PRIORITY": "0"}
    service = start_service(**settings)
    wait_until(lambda: service.get("/readyz")[0] == 200, "it consumes")
    service.stop()
    with queue.connect() as connection:
        channel = connection.channel()
        for number, priority in enumerate([0, 10, 5]):
            properties = pika.BasicProperties(delivery_mode=2, priority=priority, message_id=str(number))
            channel.basic_publish("", queue.name, b"x", properties)
        order = []
        while len(order) < 3:
            method, properties, _ = channel.basic_get(queue.name, auto_ack=True)
            if method is not None:
                order.append(properties.message_id)
        assert order == ["0", "1", "2"]
