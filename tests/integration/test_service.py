"""The whole service as a process, between a real RabbitMQ and a real PostgreSQL."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import psycopg2
import pytest

from database import Database
from scripts.local_services import LocalServices
from test_publisher import Message, Publisher, make_messages
from tests.conftest import empty_database, empty_queue
from tests.harness import Queue, Results, Service, check_exact, vote, wait_settled, wait_until
from tests.messages import Case, bad_messages, odd_votes

Start = Callable[..., Service]


def publish(queue: Queue, messages: list[Message]) -> None:
    assert Publisher([queue.url], queue.name).publish(messages).all_confirmed


@pytest.fixture(scope="module")
def contract(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], None]]:
    """Sends one message, with a valid vote behind it, through a service, and checks what became of both."""
    with empty_queue(services) as queue, empty_database(services) as results:
        service = Service(
            tmp_path_factory.mktemp("contract"), "replica-1", queue, results, {"BATCH_TIMEOUT_SECONDS": "0.02"}
        )
        with contextlib.closing(service):
            service.start_and_wait()

            def check(case: Case) -> None:
                rejected, valid = results.rejected(), vote("witness")
                counted = results.counted()
                queue.publish(case.body, **case.properties)
                queue.publish(valid)
                wait_until(
                    lambda: results.query("SELECT 1 FROM vote_audit WHERE vote_id = %s", valid["vote_id"]),
                    "the valid vote is counted",
                )
                expected = Counter(rejected) + Counter([case.reason] if case.reason else [])
                wait_until(lambda: results.rejected() == dict(expected), f"rejected as {case.reason}")
                assert results.counted() == counted + (1 if case.reason else 2)

            yield check
        assert queue.ready() == 0


@pytest.mark.parametrize("number", range(len(bad_messages())), ids=[case.name for case in bad_messages()])
def test_a_bad_message_is_kept_with_its_reason_and_stops_nothing(contract: Callable[[Case], None], number: int) -> None:
    """The valid vote behind it counts."""
    contract(bad_messages()[number])


@pytest.mark.parametrize("number", range(len(odd_votes())), ids=[case.name for case in odd_votes()])
def test_an_odd_vote_goes_all_the_way_into_the_totals(contract: Callable[[Case], None], number: int) -> None:
    """What the contract does not forbid counts."""
    contract(odd_votes()[number])


def test_after_all_bad_messages_together_the_next_vote_counts(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """In batches of nothing else; each leaves its own row; and none comes back."""
    cases = bad_messages()
    for case in cases:
        queue.publish(case.body, **case.properties)
    service = start_service()
    queue.publish(vote())
    wait_until(lambda: results.counted() == 1, "the vote counts")
    wait_settled(services, queue)
    assert results.rejected() == dict(sorted(Counter(case.reason for case in cases).items()))
    assert service.is_running()


def test_a_lone_vote_is_counted_without_waiting_for_others(
    queue: Queue, results: Results, start_service: Start
) -> None:
    """The batch's timer flushes it, and the metrics tell."""
    service = start_service()
    queue.publish(vote("law-001", "non", timestamp="2026-01-01T00:00:00Z"))
    wait_until(lambda: results.totals() == {"law-001": (0, 1)}, "the vote is counted")
    wait_until(lambda: service.metric("votes_in_flight") == 0, "it is settled")
    assert service.metric("votes_aggregated_total", law_id="law-001", choice="non") == 1
    assert service.metric("current_vote_totals", law_id="law-001", choice="non") == 1
    assert service.metric("vote_latency_seconds_count") == 1
    assert service.metric("last_commit_timestamp_seconds") > 1.7e9


class OddProperties(pika.BasicProperties):
    """Properties whose header table holds a timestamp that no calendar has."""

    def encode(self) -> list[bytes]:
        table = b"\x01aT" + b"\xff" * 8
        flags = self.FLAG_HEADERS | self.FLAG_DELIVERY_MODE | self.FLAG_MESSAGE_ID
        message_id = str(self.message_id).encode()
        return [struct.pack("!HI", flags, len(table)), table, b"\x02", bytes([len(message_id)]), message_id]


def test_headers_that_pika_cannot_read_do_not_stop_the_count(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Such a message would come again and again, and end the connection each time."""
    service = start_service()
    odd = vote()
    with queue.channel() as channel:
        properties = OddProperties(message_id=odd["vote_id"])
        channel.basic_publish("", queue.name, json.dumps(odd).encode(), properties)
    queue.publish(vote(), headers={"x": 1}, message_id=None, content_type="application/json", priority=3)
    wait_until(lambda: results.counted() == 2, "both count")
    wait_settled(services, queue)
    assert not service.says("broker lost")


def test_three_replicas_count_20_000_votes_exactly(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """With 20 % duplicates and 2 % unreadable ones, published while they count."""
    messages = list(make_messages(20_000, laws=20, seed=11, duplicates=20, invalid=2))
    replicas = [start_service(wait=False) for _ in range(3)]
    publish(queue, messages)
    wait_settled(services, queue, timeout=120)
    check_exact(results, messages)
    assert all(replica.is_running() for replica in replicas)
    assert len(results.query("SELECT DISTINCT instance FROM vote_audit")) == 3


def test_replicas_that_lock_the_same_laws_do_not_deadlock_for_good(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Rival votes of the same voters in batches of three replicas: a batch that loses a deadlock is written again."""
    rng = random.Random(5)
    votes = [vote(f"law-{rng.randrange(5)}", rng.choice(["oui", "non"]), voter_hash=f"{v:016}") for v in range(600)] * 2
    votes = [dict(v, vote_id=vote()["vote_id"]) for v in votes]
    rng.shuffle(votes)
    replicas = [start_service() for _ in range(3)]
    queue.publish(*votes)
    wait_settled(services, queue)
    assert results.totals() == results.audited()
    assert results.counted() == len({(v["law_id"], v["voter_hash"]) for v in votes})
    assert results.duplicates() == {"second_vote": len(votes) - results.counted()}
    assert all(replica.is_running() for replica in replicas)


def test_sigterm_in_the_middle_of_a_stream_loses_nothing(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """What was held is committed and acked, exit code 0; a second start counts the rest."""
    messages = list(make_messages(6_000, seed=12, invalid=2))
    service = start_service()
    publisher = threading.Thread(target=publish, args=(queue, messages))
    publisher.start()
    wait_until(lambda: results.counted() > 500, "it counts")
    assert service.stop(timeout=20) == 0
    assert service.says("stopped")
    publisher.join()
    assert results.totals() == results.audited()
    counted = results.counted()
    assert counted < 6_000
    service.start_and_wait()
    wait_settled(services, queue)
    check_exact(results, messages)
    # all that the first process committed was acked: none of it came again
    assert service.metric("votes_duplicate_total", reason="redelivery") == 0


def test_a_held_batch_is_flushed_at_sigterm(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Votes that wait for a timer of a minute do not wait for it."""
    service = start_service(BATCH_TIMEOUT_SECONDS="60")
    queue.publish(*[vote() for _ in range(7)])
    wait_until(lambda: service.metric("votes_in_flight") == 7, "the service holds them")
    assert service.stop(timeout=10) == 0
    assert results.totals() == {"law-001": (7, 0)}
    assert queue.ready() == 0
    assert results.query("SELECT batches, votes FROM aggregation_stats") == [(1, 7)]


def test_sigkill_three_times_in_the_middle_of_a_stream_loses_nothing(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Nor counts anything twice."""
    messages = list(make_messages(8_000, seed=13, duplicates=5, invalid=2))
    publish(queue, messages)
    service = start_service(wait=False)
    for killed in range(3):
        goal = 500 + 1_500 * killed
        wait_until(lambda goal=goal: service.says("database usable") and results.counted() > goal, "it counts")
        service.kill()
        service.start()
    wait_settled(services, queue)
    check_exact(results, messages)


def test_a_poison_row_costs_one_vote_and_not_the_99_beside_it(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """It is kept as rejected, and rejected at the broker too."""
    service = start_service()
    results.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.law_id = 'poison' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22023'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON vote_results FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    votes = [vote() for _ in range(99)]
    votes.insert(37, vote("poison"))
    queue.publish(*votes)
    wait_settled(services, queue)
    assert results.totals() == results.audited() == {"law-001": (99, 0)}
    assert results.rejected() == {"refused_by_database": 1}
    (body,) = results.query("SELECT body FROM rejected_messages")[0]
    assert json.loads(bytes(body)) == votes[37]
    assert service.metric("votes_rejected_total", reason="refused_by_database") == 1


def test_rejected_messages_reach_a_dead_letter_queue_where_there_is_one(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """An operator's policy also applies; votes do not go there."""
    dead = f"{queue.name}.dead"
    with queue.channel() as channel:
        channel.queue_declare(dead, durable=True)
    policy = json.dumps({"dead-letter-exchange": "", "dead-letter-routing-key": dead})
    services.rabbitmq.ctl("set_policy", dead, f"^{queue.name}$", policy)
    start_service()
    queue.publish(b"{", vote(), b"}", vote())
    wait_settled(services, queue)
    with queue.channel() as channel:
        bodies = [channel.basic_get(dead, auto_ack=True)[2] for _ in range(3)]
        channel.queue_delete(dead)
    services.rabbitmq.ctl("clear_policy", dead)
    assert bodies == [b"{", b"}", None]
    assert results.counted() == 2


def test_a_queue_that_stands_with_other_arguments_is_used_as_it_is(
    queue: Queue, results: Results, start_service: Start
) -> None:
    """One warning names the difference."""
    connection = pika.BlockingConnection(pika.URLParameters(queue.url))
    connection.channel().queue_declare(queue.name, durable=True)
    connection.close()
    service = start_service()
    queue.publish(vote())
    wait_until(lambda: results.counted() == 1, "the vote counts")
    warnings = [line for line in service.lines() if line["message"] == "queue stands with other arguments"]
    assert len(warnings) == 1
    assert "x-max-priority" in warnings[0]["fields"]["difference"]


def test_a_queue_that_is_deleted_is_declared_again(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """The broker cancels the consumer; the service comes back by itself."""
    service = start_service()
    queue.publish(vote())
    wait_until(lambda: results.counted() == 1, "the vote counts")
    queue.delete()
    wait_until(lambda: [line["message"] for line in service.lines()].count("consuming") == 2, "it consumes again")
    queue.publish(vote())
    wait_until(lambda: results.counted() == 2, "the next vote counts")


def test_the_service_starts_before_its_database_and_counts_when_it_comes(
    services: LocalServices, queue: Queue, tmp_path: Path
) -> None:
    """It waits, not ready and alive, and consumes nothing meanwhile."""
    with empty_database(services) as results:
        later = Results(results.url + "_later")
        service = Service(tmp_path, "replica-1", queue, later)
        with contextlib.closing(service):
            service.start()
            queue.publish(vote())
            wait_until(lambda: service.says("database not usable"), "it says that the database is not there")
            assert (service.get("/readyz")[0], service.get("/healthz")[0]) == (503, 200)
            assert queue.ready() == 1
            Results(services.postgres.url()).execute(f"CREATE DATABASE {later.url.rpartition('/')[2]}")
            wait_until(lambda: service.is_ready() and later.counted() == 1, "it counts")
            service.stop()
        Results(services.postgres.url()).execute(f"DROP DATABASE {later.url.rpartition('/')[2]} WITH (FORCE)")


def test_a_missing_table_stops_the_count_until_it_is_mended(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Nothing is acked, nothing rejected, /readyz is red, and it goes on without a hand."""
    service = start_service()
    results.query("ALTER TABLE vote_audit RENAME TO gone")
    queue.publish(*[vote() for _ in range(5)])
    wait_until(lambda: service.get("/readyz")[0] == 503, "it is not ready")
    wait_until(lambda: service.says("not consuming, what was delivered is held"), "it fetches nothing more")
    assert (queue.ready(), service.metric("votes_in_flight")) == (0, 5)
    assert service.metric("aggregation_errors_total", error_type="database_misconfigured") >= 1
    results.query("ALTER TABLE gone RENAME TO vote_audit")
    wait_until(lambda: results.counted() == 5, "it counts")
    wait_settled(services, queue)
    assert results.rejected() == {}


@pytest.mark.parametrize("trigger", ["TRIGGER", "CONSTRAINT TRIGGER"])
def test_a_database_that_can_be_read_and_takes_no_vote_is_not_usable(
    queue: Queue, results: Results, database: Database, start_service: Start, trigger: str
) -> None:
    """Neither at the first start nor after it was lost, also where it refuses at the COMMIT only."""
    deferred = " DEFERRABLE INITIALLY DEFERRED" if trigger == "CONSTRAINT TRIGGER" else ""
    full_disk = (
        "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END $$;"
        f"CREATE {trigger} fail AFTER INSERT ON vote_audit{deferred} FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    results.query(full_disk)
    queue.publish(vote())
    service = start_service(wait=False)

    def times(message: str) -> int:
        return [line["message"] for line in service.lines()].count(message)

    wait_until(lambda: times("database not usable") + times("database usable"), "it has tried")
    assert (times("database usable"), times("consuming"), queue.ready()) == (0, 0, 1)
    assert service.get("/readyz")[0] == 503
    results.query("DROP TRIGGER fail ON vote_audit")
    wait_until(lambda: service.is_ready() and results.counted() == 1, "it counts")

    results.query("ALTER TABLE vote_audit RENAME TO gone")
    wait_until(lambda: times("database lost"), "it finds that out while idle")
    results.query("ALTER TABLE gone RENAME TO vote_audit;" + full_disk)
    tries = times("database not usable")
    wait_until(lambda: times("database not usable") > tries + 1 or times("database usable") > 1, "it has tried again")
    assert times("database usable") == 1
    results.query("DROP TRIGGER fail ON vote_audit")
    wait_until(service.is_ready, "it is ready again")
    assert results.totals() == results.audited() == {"law-001": (1, 0)}


def test_a_batch_that_was_given_up_is_never_acked_by_a_later_one(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """Its retries are used up while the server answers: it goes back to the queue, and counts once."""
    start_service(MAX_RETRIES="1", RETRY_BACKOFF_SECONDS="0.01", BATCH_SIZE="10", BATCH_TIMEOUT_SECONDS="0.1")
    results.query(
        "CREATE TABLE fault (failures integer); INSERT INTO fault VALUES (9);"
        "CREATE SEQUENCE fault_calls;"
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('fault_calls') <= (SELECT failures FROM fault) THEN"
        " RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END IF; RETURN NULL; END $$;"
        "CREATE TRIGGER fail AFTER INSERT ON vote_audit FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    )
    votes = [vote() for _ in range(57)]
    queue.publish(*votes)
    wait_until(lambda: results.counted() == 57, "all are counted", timeout=60)
    wait_settled(services, queue)
    assert results.totals() == results.audited() == {"law-001": (57, 0)}


def test_metrics_stay_bounded_however_many_laws_there_are(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """A law per vote; the totals are exact all the same."""
    service = start_service(RABBITMQ_PREFETCH_COUNT="2000", BATCH_SIZE="500")
    messages = list(make_messages(3_000, laws=1, seed=14))
    for number, message in enumerate(messages):
        body = message.body.replace(b"law-001", f"law-{number}".encode())
        messages[number] = message._replace(body=body, law_id=f"law-{number}")
    publish(queue, messages)
    wait_settled(services, queue)
    assert results.value("SELECT count(*) FROM vote_results") == 3_000
    text = service.get("/metrics")[1]
    assert text.count('votes_aggregated_total{choice="oui"') == 1_001
    total = sum(service.metric("votes_aggregated_total", law_id="__other__", choice=c) for c in ("oui", "non"))
    assert total == 2_000


def test_no_password_is_ever_logged(queue: Queue, results: Results, start_service: Start) -> None:
    """At DEBUG, through lost connections and a refused password."""
    passwords = [url.partition("//")[2].partition("@")[0].partition(":")[2] for url in (queue.url, results.url)]
    service = start_service(LOG_LEVEL="DEBUG")
    queue.publish(vote(), b"{")
    wait_until(lambda: results.counted() == 1, "the vote counts")
    results.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'vote-aggregator%'"
    )
    queue.publish(vote())
    wait_until(lambda: results.counted() == 2, "the next vote counts")
    service.stop()
    refused = start_service(
        wait=False,
        LOG_LEVEL="DEBUG",
        AMQP_URL=queue.url.replace(passwords[0], "wr0ng-broker"),
        DATABASE_URL=results.url.replace(passwords[1], "wr0ng-database"),
    )
    wait_until(lambda: refused.says("broker lost") and refused.says("database not usable"), "both refuse")
    refused.stop()
    text = service.log.read_text() + refused.log.read_text()
    assert len(text) > 1_000
    for secret in (*passwords, "wr0ng"):
        assert secret not in text


def test_sigterm_while_the_database_hangs_ends_in_time(
    services: LocalServices, queue: Queue, results: Results, start_service: Start
) -> None:
    """The batch stays with the broker, and the next process counts it."""
    service = start_service(SHUTDOWN_TIMEOUT_SECONDS="3", DB_TIMEOUT_SECONDS="60")
    blocker = psycopg2.connect(results.url)
    blocker.cursor().execute("LOCK TABLE vote_audit")
    queue.publish(*[vote() for _ in range(3)])
    wait_until(lambda: service.metric("votes_in_flight") == 3, "the service holds them")
    assert service.stop(timeout=10) == 0
    blocker.close()
    wait_until(lambda: queue.ready() == 3, "they are back in the queue")
    service.start_and_wait()
    wait_settled(services, queue)
    assert results.totals() == results.audited() == {"law-001": (3, 0)}


def test_sigint_stops_it_too(start_service: Start) -> None:
    """As Ctrl-C does."""
    service = start_service()
    service.signal(signal.SIGINT)
    assert service.process is not None
    assert service.process.wait(20) == 0


def test_a_taken_metrics_port_is_an_error_that_names_the_setting(start_service: Start) -> None:
    """And the process ends with exit code 2."""
    with socket.create_server(("", 0)) as taken:
        service = start_service(wait=False, METRICS_PORT=str(taken.getsockname()[1]))
        assert service.process is not None
        assert service.process.wait(20) == 2
    assert "METRICS_PORT" in service.log.read_text()


def test_many_large_messages_do_not_fill_the_memory(start_service: Start, queue: Queue, results: Results) -> None:
    """Thirty of 5 MB, which one batch may hold; of each the hash and the length are those of the whole."""
    service = start_service(BATCH_SIZE="1000", RABBITMQ_PREFETCH_COUNT="1000", BATCH_TIMEOUT_SECONDS="20")
    bodies = [number.to_bytes(4, "big") * 1_250_000 for number in range(30)]
    queue.publish(*bodies, vote())
    wait_until(lambda: service.metric("votes_in_flight") == 31, "all are held")
    peak = int(Path(f"/proc/{service.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    assert peak < 128, f"{peak:.0f} MB"
    assert service.stop() == 0
    assert results.counted() == 1
    kept = results.query("SELECT body_sha256, body, body_bytes, reason FROM rejected_messages")
    assert {(bytes(digest), bytes(body), length, reason) for digest, body, length, reason in kept} == {
        (hashlib.sha256(body).digest(), body[: 64 * 1024], 5_000_000, "too_large") for body in bodies
    }
