"""The test publisher as a process, and as a library, against a real broker."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from scripts.local_services import LocalServices
from test_publisher import CONFIRMED, RETURNED, UNKNOWN, Message, Publisher, make_messages
from tests.faults.proxy import DOWN, AmqpWatcher, TcpProxy
from tests.harness import ROOT, Queue, Results, vote, wait_settled, wait_until
from verdicts import verdicts


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "test_publisher.py"), *arguments]


def run(folder: Path, queue: Queue, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the publisher to its end, in a folder without .env."""
    environment = {"AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name} | settings
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def read_ledger(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the ledger by their state; a last line that was cut off is left out."""
    lines: dict[str, list[dict[str, Any]]] = {"intended": [], "confirmed": []}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            entry = json.loads(line)
            lines[entry["state"]].append(entry)
    return lines


def test_everything_is_confirmed_on_a_queue_that_did_not_exist(queue: Queue, tmp_path: Path) -> None:
    """Exit code 0, and the numbers are those asked for and those on the queue."""
    done = run(tmp_path, queue, "-n", "300", "--seed", "1", "--duplicates", "20", "--invalid", "10", "--json")

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["published"], summary["confirmed"], summary["unconfirmed"]) == (390, 390, 0)
    assert (summary["votes"], summary["duplicates"], summary["invalid"]) == (300, 60, 30)
    assert sum(law["oui"] + law["non"] for law in summary["totals"].values()) == 300
    assert queue.ready() == 390


def test_messages_are_persistent_and_carry_their_vote_id(queue: Queue, tmp_path: Path) -> None:
    """They outlive a restart of the broker."""
    assert run(tmp_path, queue, "-n", "1", "--quiet").returncode == 0

    with queue.channel() as channel:
        _, properties, body = channel.basic_get(queue.name, auto_ack=True)
    assert properties.delivery_mode == pika.DeliveryMode.Persistent.value
    assert properties.message_id == json.loads(body)["vote_id"]


def test_the_ledger_has_a_line_for_each_intent_and_each_confirm(queue: Queue, tmp_path: Path) -> None:
    """Intents come first; a second run is appended."""
    ledger = tmp_path / "ledger"
    for seed in ("1", "2"):
        assert run(tmp_path, queue, "-n", "50", "--invalid", "10", "--seed", seed, "--ledger", "ledger").returncode == 0

    lines = read_ledger(ledger)
    assert [line["id"] for line in lines["intended"]] == [line["id"] for line in lines["confirmed"]]
    assert len({line["id"] for line in lines["intended"]}) == 110
    assert {line["kind"] for line in lines["intended"]} == {"vote", "invalid"}


def test_the_ledger_of_a_killed_publisher_brackets_what_is_on_the_queue(queue: Queue, tmp_path: Path) -> None:
    """Confirmed is surely there, not intended is surely not; what is between is unknown."""
    environment = {"AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name}
    arguments = command("-n", "1000000", "--rate", "2000", "--quiet", "--ledger", "ledger")
    with subprocess.Popen(arguments, cwd=tmp_path, env=environment) as publisher:
        try:
            wait_until(lambda: len(read_ledger(tmp_path / "ledger")["confirmed"]) > 500, "500 confirms")
        finally:
            publisher.kill()

    lines = read_ledger(tmp_path / "ledger")
    wait_until(lambda: queue.ready() >= len(lines["confirmed"]), "all that was confirmed is on the queue")
    assert queue.ready() <= len(lines["intended"])


def test_arrays_are_told_and_kept_in_the_ledger_vote_by_vote(queue: Queue, tmp_path: Path) -> None:
    """What is on the queue are fewer messages, and each vote is in the one that the ledger says."""
    options = ["--box", "20", "-n", "300", "--seed", "1", "--duplicates", "20", "--invalid", "10"]
    done = run(tmp_path, queue, *options, "--json", "--ledger", "ledger")

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["published"], summary["confirmed"], summary["unconfirmed"]) == (390, 390, 0)
    assert (summary["votes"], summary["duplicates"], summary["invalid"]) == (300, 60, 30)
    assert sum(law["oui"] + law["non"] for law in summary["totals"].values()) == 300
    assert queue.ready() == summary["messages"] < 100

    lines = read_ledger(tmp_path / "ledger")
    named = [[(line["seq"], line.get("place"), line["id"]) for line in lines[state]] for state in lines]
    assert sorted(named[0], key=str) == sorted(named[1], key=str)
    assert Counter(line["kind"] for line in lines["intended"]) == {"vote": 300, "duplicate": 60, "invalid": 30}
    with queue.channel() as channel:
        for number in range(1, summary["messages"] + 1):
            body = channel.basic_get(queue.name, auto_ack=True)[2]
            told = [line for line in lines["intended"] if line["seq"] == number]
            if "place" in told[0]:
                assert [line["place"] for line in told] == list(range(1, len(told) + 1))
                assert [line["id"] in str(vote) for line, vote in zip(told, json.loads(body), strict=True)] == [
                    line["kind"] != "invalid" for line in told
                ]
            else:
                assert len(told) == 1


def test_a_refused_array_is_refused_with_each_of_its_votes(queue: Queue, tmp_path: Path) -> None:
    """The queue takes ten messages, or a few more on the way."""
    with queue.connect() as connection:
        limits = {"x-max-priority": 10, "x-max-length": 10, "x-overflow": "reject-publish"}
        connection.channel().queue_declare(queue.name, durable=True, arguments=limits)

    done = run(tmp_path, queue, "-n", "1000", "--box", "10", "--json")

    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["published"], summary["messages"]) == (1_000, 100)
    assert summary["nacked"] == 1_000 - summary["confirmed"] > 0
    assert summary["confirmed"] == summary["votes"] == 10 * queue.ready()


def test_a_full_queue_that_refuses_gives_exit_code_1(queue: Queue, tmp_path: Path) -> None:
    """The queue takes ten, or a few more on the way; each other message is nacked."""
    connection = pika.BlockingConnection(pika.URLParameters(queue.url))
    limits = {"x-max-priority": 10, "x-max-length": 10, "x-overflow": "reject-publish"}
    connection.channel().queue_declare(queue.name, durable=True, arguments=limits)
    connection.close()

    done = run(tmp_path, queue, "-n", "200", "--json")

    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert summary["confirmed"] + summary["nacked"] == 200
    assert summary["nacked"] > 0
    assert summary["confirmed"] == summary["votes"] == queue.ready()


def test_messages_that_no_queue_takes_are_returned_and_not_confirmed(queue: Queue) -> None:
    """The broker acks them all the same."""

    def messages() -> Iterator[Message]:
        for number, message in enumerate(make_messages(100)):
            if number == 50:
                queue.delete()
            yield message

    result = Publisher([queue.url], queue.name, window=10).publish(messages())

    assert result.finished
    assert not result.all_confirmed
    assert len(result.in_state(RETURNED)) >= 50
    assert len(result.in_state(CONFIRMED)) + len(result.in_state(RETURNED)) == 100


def test_a_lost_connection_ends_it_with_the_unanswered_messages_unknown(queue: Queue, services: LocalServices) -> None:
    """What was confirmed before stays confirmed."""

    def messages() -> Iterator[Message]:
        for number, message in enumerate(make_messages(100)):
            if number == 50:
                services.rabbitmq.ctl("close_all_connections", "test")
            yield message

    result = Publisher([queue.url], queue.name, window=10).publish(messages())

    assert "CONNECTION_FORCED" in result.failure
    assert not result.all_confirmed
    assert len(result.in_state(UNKNOWN)) >= 1
    assert len(result.in_state(CONFIRMED)) >= 40
    assert queue.ready() >= len(result.in_state(CONFIRMED))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_confirms_no_more_ends_it(queue: Queue, services: LocalServices) -> None:
    """As a quorum queue without a majority does, on a connection that is well: what was sent is unknown."""
    with TcpProxy(("127.0.0.1", services.rabbitmq.port), AmqpWatcher) as proxy:
        url = queue.url.replace(f":{services.rabbitmq.port}/", f":{proxy.port}/")
        proxy.on("confirm seen", lambda link: link.stall(DOWN), nth=5)
        publisher = Publisher([url], queue.name, heartbeat=3_600, window=10, silence_seconds=1)
        result = publisher.publish(make_messages(100))
        del publisher
        gc.collect()  # pika leaves the socket as it is, where the broker does not answer its close

    assert result.failure == "TimeoutError: no confirm for 1 s"
    assert len(result.in_state(CONFIRMED)) >= 4
    assert len(result.in_state(UNKNOWN)) >= 1


def test_a_rate_spreads_the_messages_over_time(queue: Queue) -> None:
    """Message i is never sent before its time, i / rate."""
    result = Publisher([queue.url], queue.name, rate=200).publish(make_messages(100))

    assert result.all_confirmed
    assert result.seconds >= 99 / 200


def test_an_interrupted_publisher_prints_what_was_confirmed(queue: Queue, tmp_path: Path) -> None:
    """Exit code 130, and every confirmed message is on the queue."""
    environment = {"AMQP_URL": queue.url, "RABBITMQ_QUEUE": queue.name}
    publisher = subprocess.Popen(
        command("-n", "1000000", "--rate", "500", "--quiet", "--json"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: queue.ready() > 100, "the queue fills")
        publisher.send_signal(signal.SIGINT)
        output, _ = publisher.communicate(timeout=30)
    finally:
        publisher.kill()
        publisher.wait()

    assert publisher.returncode == 130
    summary = json.loads(output)
    assert 100 < summary["confirmed"] < 1_000_000
    assert summary["confirmed"] == queue.ready()


@pytest.mark.parametrize("url", ["amqp://votes:secret@127.0.0.1:1/", "amqp://votes:secret@host.invalid/"])
def test_an_unreachable_broker_gives_exit_code_3(queue: Queue, tmp_path: Path, url: str) -> None:
    """In one line that names the address and not the password."""
    done = run(tmp_path, queue, AMQP_URL=url)

    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert url.replace("secret", "***") in done.stderr


def test_a_refused_login_gives_exit_code_3(queue: Queue, tmp_path: Path) -> None:
    """The broker is there, but not for this user."""
    done = run(tmp_path, queue, AMQP_URL=re.sub(r"//[^:]+:", "//nobody:", queue.url))

    assert done.returncode == 3
    assert "ACCESS_REFUSED" in done.stderr


def test_missing_settings_give_exit_code_2(queue: Queue, tmp_path: Path) -> None:
    """The variable is named, and no database setting is asked for."""
    done = run(tmp_path, queue, AMQP_URL="")

    assert done.returncode == 2
    assert "RABBITMQ_PASSWORD" in done.stderr
    assert "POSTGRES" not in done.stderr


def test_quiet_leaves_stderr_empty(queue: Queue, tmp_path: Path) -> None:
    """The summary is all that is printed."""
    done = run(tmp_path, queue, "-n", "10", "--quiet")

    assert done.returncode == 0
    assert done.stderr == ""
    assert "confirmed    10 in" in done.stdout


def test_the_service_makes_of_bodies_what_check_says(
    services: LocalServices, queue: Queue, results: Results, start_service: Callable[..., Any]
) -> None:
    """Votes, copies of each kind in one batch and in several, and junk; by themselves, and once more in arrays."""
    voter, late = "a" * 16, "b" * 16
    one, other = vote(), vote(voter_hash=voter)
    named = {"law_id": "law-001", "choice": "oui", "voter_hash": late}
    sent = [
        *(one, one, one | {"choice": "non"}, one | {"voter_hash": late}, other, other | {"voter_hash": None}),
        *(vote(voter_hash=voter), vote("law-002", voter_hash=voter), named, named, named | {"choice": "non"}),
        *(vote(choice="OUI"), named | {"vote_id": None}, {}, vote(voter_hash=late), one | {"vote_id": "x"}),
    ]
    once_more = [body | {"vote_id": vote()["vote_id"]} if n % 3 == 0 else body for n, body in enumerate(sent)]
    arrays: list[Any] = [once_more[start : start + 4] for start in range(0, len(once_more), 4)]
    bodies = [json.dumps(body).encode() for body in [*sent, *arrays, [], [[one]], [one, 7]]]
    expected = list(verdicts(bodies))
    queue.publish(*bodies)
    start_service(BATCH_SIZE="7")
    wait_settled(services, queue)

    counted = {
        (verdict.vote.vote_id, verdict.vote.choice)
        for verdict in expected
        if verdict.vote and verdict.outcome == "vote"
    }
    assert set(results.query("SELECT vote_id::text, choice FROM vote_audit")) == counted
    rejected = dict(results.query("SELECT reason, sum(times_seen)::int FROM rejected_messages GROUP BY reason"))
    found = Counter(results.duplicates()) + Counter(rejected) + Counter(vote=results.counted())
    assert found == Counter(verdict.outcome for verdict in expected)
    assert {
        "vote",
        "duplicate",
        "conflict",
        "second_vote",
        "bad_choice",
        "bad_vote_id",
        "not_an_object",
    } <= found.keys()
    assert max(verdict.place for verdict in expected if verdict.outcome == "vote") > 1
