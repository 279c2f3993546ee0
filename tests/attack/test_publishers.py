"""What somebody who may publish could do to the count: each attempt, and what holds it now."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pika
import psycopg2
import pytest

from bench.cpu import peak_megabytes
from database import Database
from observability import MAX_LAW_LABELS
from scripts import local_services
from scripts.local_services import LocalServices
from tests.harness import Queue, Results, Service, vote, wait_settled, wait_until
from tests.integration.test_few_rights import BrokerOfTheStack, with_login
from votes import Rejection, Vote

Start = Callable[..., Service]
LARGEST = 65_536  # bytes of a body that is read
TUNED = {"BATCH_SIZE": "500", "RABBITMQ_PREFETCH_COUNT": "2000"}
LIMIT_MB = 128


def flood(queue: Queue, bodies: Iterable[bytes]) -> None:
    """Publish them as quickly as can be; when this returns the broker has them all."""
    with queue.channel():
        connection = queue.connect()
        channel = connection.channel()
        for body in bodies:
            channel.basic_publish("", queue.name, body, pika.BasicProperties(delivery_mode=2))
        channel.queue_declare(queue.name, passive=True)  # is answered after all that was sent before
        connection.close()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefetch", "reader"), [("65535", "one-pass"), ("2000", "pika")])
def test_large_bodies_do_not_fill_the_memory(
    start_service: Start, services: LocalServices, queue: Queue, results: Results, prefetch: str, reader: str
) -> None:
    """However many a replica may have in flight: it reads on when it has written what it holds."""
    bodies = [os.urandom(LARGEST) for _ in range(800)]
    flood(queue, bodies)
    queue.publish(vote())
    service = start_service(**TUNED | {"RABBITMQ_PREFETCH_COUNT": prefetch, "RABBITMQ_READER": reader})
    wait_settled(services, queue)
    assert (peak := peak_megabytes(service.pid)) < LIMIT_MB, f"{peak:.0f} MB"
    assert service.stop() == 0
    assert results.counted() == 1
    assert sum(results.rejected().values()) == len(bodies)


def test_arrays_of_the_smallest_elements_do_not_fill_the_memory(
    start_service: Start, services: LocalServices, queue: Queue, results: Results
) -> None:
    """While the database hangs, and afterwards: a kilobyte of them is read to five hundred rejected messages."""
    arrays = 2500  # more than a replica is sent without acks
    service = start_service(**TUNED)
    with contextlib.closing(psycopg2.connect(results.url)) as holder:
        holder.cursor().execute("LOCK TABLE vote_audit IN ACCESS EXCLUSIVE MODE")
        flood(queue, [b"[" + b",".join([b"1"] * 500) + b"]"] * arrays)
        queue.publish(vote())
        wait_until(lambda: service.says("batch not written"), "it has waited for as long as it does", 60)
        wait_until(lambda: queue.ready() < arrays - 700, "as much as can be is on its way")
        holder.rollback()
    wait_settled(services, queue)
    assert (peak := peak_megabytes(service.pid)) < LIMIT_MB, f"{peak:.0f} MB"
    assert service.stop() == 0
    assert results.counted() == 1
    assert results.value("SELECT sum(times_seen) FROM rejected_messages") >= 500 * arrays


def test_the_broker_of_the_stack_refuses_what_is_far_too_large(tmp_path: Path) -> None:
    """When it is published; what is a little too large is taken, and kept as rejected."""
    if local_services.missing_packages() and "CI" not in os.environ:
        pytest.skip("RabbitMQ is not installed")
    broker = BrokerOfTheStack(tmp_path / "broker")
    broker.start()
    try:
        queue = Queue(with_login(broker.url(), "publisher"), "votes.aggregation")
        queue.publish(bytes(LARGEST + 1))
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="larger than configured max size"):
            queue.publish(bytes(1024 * 1024 + 1))
    finally:
        broker.stop()


def test_a_replica_that_can_write_nothing_reads_little_and_stays_connected(
    start_service: Start, services: LocalServices, queue: Queue, results: Results
) -> None:
    """What is not read waits at the broker, which would take a replica that reads nothing for dead."""
    service = start_service(**TUNED, RABBITMQ_HEARTBEAT="2", DB_TIMEOUT_SECONDS="2")
    with contextlib.closing(psycopg2.connect(results.url)) as conn, conn.cursor() as cur:
        cur.execute("LOCK TABLE vote_results, rejected_messages")
        flood(queue, [os.urandom(LARGEST) for _ in range(600)])
        queue.publish(vote())
        failures = {"error_type": "database_unavailable"}
        wait_until(lambda: service.metric("aggregation_errors_total", **failures) >= 3, "it has tried for a while")
        assert service.metric("votes_in_flight") < 400
        conn.rollback()
    wait_settled(services, queue)
    assert peak_megabytes(service.pid) < LIMIT_MB
    assert not service.says("broker lost")
    assert (results.counted(), sum(results.rejected().values())) == (1, 600)


# --- work ------------------------------------------------------------------------------------------------------------

COSTLY = {
    b'{"a":[' + b'{"":0},' * 9_000 + b"0]}": "too_many_members",
    b"[" + b'{"":0},' * 9_000 + b"0]": "too_many_votes",
    b'[{"a":[' + b"0," * 32_000 + b"0]}]": "too_many_members",
    b'[{"a":[' + b"[]," * 21_000 + b"0]}]": "too_many_members",
    b'[{"a":["' + b'\\","' * 15_000 + b'"]}]': "too_many_members",
    b'[{"a":' + b"[" * 32_000 + b"]" * 32_000 + b"}]": "too_deep",
    b"[" * 65_536: "not_json",
    b'[{"a":"' + b"[" * 65_000: "not_json",
}


def test_a_message_of_many_members_is_not_read_to_its_end(
    start_service: Start, services: LocalServices, queue: Queue, results: Results
) -> None:
    """It has a reason of its own, alone or in an array; a vote with as many members as anybody needs still counts."""
    service = start_service()
    queue.publish(*COSTLY, vote(extra=dict.fromkeys(map(str, range(90)), 1)), vote(extra=[0] * 200))
    wait_settled(services, queue)
    assert results.rejected() == Counter([*COSTLY.values(), "too_many_members"])
    assert results.counted() == 1
    assert service.metric("votes_rejected_total", reason="too_many_members") == 5


# --- labels ----------------------------------------------------------------------------------------------------------


class Raw(pika.BasicProperties):
    """Properties with these flags and values, whether or not they go together."""

    def __init__(self, flags: int, values: bytes) -> None:
        super().__init__()
        self._raw = flags.to_bytes(2) + values

    def encode(self) -> Any:
        return [self._raw]


def test_flags_that_announce_more_flags_stop_no_count(start_service: Start, queue: Queue, results: Results) -> None:
    """The broker confirms such a message, and 3.x passes its flags on."""
    service = start_service()
    with queue.channel() as channel:
        for properties in (Raw(0x0001, b""), Raw(0x1001, b"\x02"), Raw(0x1003, b"\x02")):
            channel.basic_publish("", queue.name, json.dumps(vote()).encode(), properties)
    queue.publish(*[vote() for _ in range(20)])
    wait_until(lambda: results.counted() == 23, "all are counted")
    assert [line for line in service.lines() if line["message"] == "broker lost"] == []


def test_laws_that_nobody_has_listed_do_not_take_the_labels_of_those_that_are(
    start_service: Start, services: LocalServices, queue: Queue, results: Results
) -> None:
    """Whether those are listed before the junk comes, with no vote yet, or after it."""
    service = start_service(**TUNED)
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', 'listed before')")
    junk = [json.dumps(vote(f"junk-{number}")).encode() for number in range(MAX_LAW_LABELS + 200)]
    flood(queue, junk)
    wait_settled(services, queue)
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-2', 'listed after')")
    queue.publish(vote("law-1"), vote("law-2", "non"), vote("law-2"))

    def series(choice: str, *law_ids: str) -> list[float]:
        return [service.metric("current_vote_totals", law_id=law_id, choice=choice) for law_id in law_ids]

    wait_until(lambda: series("oui", "law-1", "law-2") == [1, 1] and series("non", "law-2") == [1], "they are labelled")
    text = service.get("/metrics")[1]
    assert text.count('current_vote_totals{choice="oui"') <= MAX_LAW_LABELS + 1
    totals = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("votes_aggregated_total{")]
    assert sum(map(float, totals)) == len(junk) + 3


# --- two batches at once -------------------------------------------------------------------------------------------


def test_a_body_that_is_late_in_one_batch_and_unreadable_in_another_makes_no_deadlock(results: Results) -> None:
    """Each such pair would cost a second: the body locked before the totals here, after them there."""
    late = json.dumps({"vote_id": str(uuid.uuid4()), "law_id": "law-closed", "choice": "oui"}).encode()
    rounds, deadlocks = 20, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    with contextlib.ExitStack() as stack:
        one, other = [
            stack.enter_context(Database(results.url, pool_min=1, pool_max=1, timeout=20, instance=name))
            for name in "ab"
        ]
        one.initialise_schema()
        results.query(
            "INSERT INTO laws (law_id, title, status) VALUES ('law-closed', '', 'closed');"
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(0.02 * random()); RETURN NULL; END $$;"
            "CREATE TRIGGER dawdle AFTER INSERT ON vote_audit FOR EACH STATEMENT EXECUTE FUNCTION dawdle()"
        )
        threads = stack.enter_context(ThreadPoolExecutor(2))
        for _ in range(rounds):
            votes = [Vote.from_message(json.dumps(vote()).encode()) for _ in range(2)]
            refused = Rejection(late, "content_encoding", "gzip", None, 1)
            pair = [
                threads.submit(one.batch_update_results, [votes[0], Vote.from_message(late)], []),
                threads.submit(other.batch_update_results, [votes[1]], [refused]),
            ]
            assert [len(each.result().rejected) for each in pair] == [1, 1]
    wait_until(lambda: results.counted() == 2 * rounds, "all are counted")
    assert results.value(deadlocks) == 0
    assert results.value("SELECT sum(times_seen) FROM rejected_messages") == 2 * rounds
