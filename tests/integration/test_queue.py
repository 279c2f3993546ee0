"""How the queue is declared, and what is said of one that stands otherwise, on a real RabbitMQ."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from rabbitmq_client import broker_version, connection_parameters, effective_limit, managed_queue
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages
from tests.harness import Queue, Results, Service, vote, wait_until

Start = Callable[..., Service]


@pytest.fixture
def version(services: LocalServices) -> tuple[int, ...]:
    connection = pika.BlockingConnection(pika.URLParameters(services.rabbitmq.url()))
    version = broker_version(connection)
    connection.close()
    return version


@pytest.fixture
def quorum_by_default(services: LocalServices) -> Iterator[str]:
    """A virtual host in which a queue without a type is a quorum queue, as some hosted brokers have it."""
    name = f"v-{uuid.uuid4().hex[:8]}"
    services.rabbitmq.ctl("add_vhost", name, "--default-queue-type", "quorum")
    services.rabbitmq.ctl("set_permissions", "-p", name, "votes", ".*", ".*", ".*")
    yield name
    services.rabbitmq.ctl("delete_vhost", name)


def declare(queue: Queue, arguments: dict[str, object]) -> None:
    with contextlib.closing(queue.connect()) as connection:
        connection.channel().queue_declare(queue.name, durable=True, arguments=arguments)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_service_and_publisher_work_at_first_start_where_queues_are_quorum_by_default(
    services: LocalServices,
    results: Results,
    start_service: Start,
    queue: Queue,
    quorum_by_default: str,
    queue_type: str,
) -> None:
    """The type is declared by name, whichever it is."""
    there = Queue(services.rabbitmq.url(quorum_by_default), queue.name, queue_type)
    published = Publisher(there.urls, there.name, queue_type=queue_type).publish(make_messages(20, seed=1))
    assert published.all_confirmed
    start_service(AMQP_URL=there.url, RABBITMQ_QUEUE_TYPE=queue_type)
    wait_until(lambda: results.counted() == 20, "it counts")
    listing = json.loads(
        services.rabbitmq.ctl("list_queues", "-p", quorum_by_default, "name", "type", "--formatter", "json")
    )
    assert [row["type"].rpartition("_queue")[0].removeprefix("rabbit_") or row["type"] for row in listing] == [
        queue_type
    ]


def test_a_queue_that_is_absent_and_refused_is_an_error_with_the_first_refusal(
    services: LocalServices, queue: Queue, start_service: Start
) -> None:
    """And not a queue that is missing, which nobody could explain."""
    services.rabbitmq.ctl("add_user", "few", "few")
    services.rabbitmq.ctl("set_permissions", "few", "^$", ".*", ".*")
    user = queue.url.partition("@")[2]
    service = start_service(wait=False, AMQP_URL=f"amqp://few:few@{user}")
    wait_until(lambda: service.says("broker lost"), "it is refused")
    (line, *_) = [line for line in service.lines() if line["message"] == "broker lost"]
    assert line["level"] == "ERROR"
    assert "refuses to declare the queue" in line["fields"]["error"] and "ACCESS_REFUSED" in line["fields"]["error"]
    queue.ready()  # somebody else declares it
    wait_until(service.is_ready, "it is used as it is")


def test_a_queue_that_stands_otherwise_is_used_and_the_difference_told(
    results: Results, queue: Queue, start_service: Start
) -> None:
    """A quorum queue where a classic one was asked for, with a limit that drops votes."""
    declare(queue, {"x-queue-type": "quorum", "x-delivery-limit": 7})
    queue.publish(vote())
    service = start_service()
    wait_until(lambda: results.counted() == 1, "it counts")
    (line,) = [line for line in service.lines() if line["message"] == "queue stands with other arguments"]
    assert "x-queue-type" in line["fields"]["difference"]
    (line,) = [line for line in service.lines() if line["message"].startswith("the queue drops messages")]
    assert (line["level"], line["fields"]["limit"], line["fields"]["by_argument"]) == ("ERROR", 7, 7)
    assert line["fields"]["by_policy"] == "unknown"


def test_the_limit_of_a_policy_is_read_from_the_management_api(
    services: LocalServices, queue: Queue, results: Results, start_service: Start, version: tuple[int, ...]
) -> None:
    """AMQP does not tell it."""
    policy = uuid.uuid4().hex
    services.rabbitmq.ctl("set_policy", policy, f"^{queue.name}$", '{"delivery-limit": 5}', "--apply-to", "queues")
    try:
        quorum = Queue(queue.url, queue.name, "quorum")
        quorum.publish(vote())
        management = services.rabbitmq.management_url()
        parameters = connection_parameters(queue.url, 30, "tests")
        wait_until(
            lambda: "effective_policy_definition" in managed_queue(management, parameters, queue.name, 10),
            "the API has figures of the queue",
        )
        service = start_service(RABBITMQ_QUEUE_TYPE="quorum", RABBITMQ_MANAGEMENT_URL=management)
        wait_until(lambda: results.counted() == 1, "it counts")
        (line,) = [line for line in service.lines() if line["message"].startswith("the queue drops messages")]
        assert (line["fields"]["limit"], line["fields"]["by_policy"]) == (5, 5)
        assert line["fields"]["by_argument"] == (-1 if version >= (4,) else None)
    finally:
        services.rabbitmq.ctl("clear_policy", policy)


def test_a_limit_of_minus_one_is_none_from_version_4_on_and_stops_consuming_before(
    queue: Queue, results: Results, start_service: Start, version: tuple[int, ...]
) -> None:
    """Before 4 it drops a message at its first return."""
    declare(queue, {"x-queue-type": "quorum", "x-delivery-limit": -1})
    quorum = Queue(queue.url, queue.name, "quorum")
    quorum.publish(vote())
    service = start_service(wait=version >= (4,), RABBITMQ_QUEUE_TYPE="quorum")
    if version >= (4,):
        wait_until(lambda: results.counted() == 1, "it counts")
        assert any(line["message"].startswith("no message is dropped") for line in service.lines())
    else:
        wait_until(lambda: service.says("broker lost"), "it does not consume")
        (line, *_) = [line for line in service.lines() if line["message"] == "broker lost"]
        assert line["level"] == "ERROR" and "first return" in line["fields"]["error"]
        assert (quorum.ready(), results.query("SELECT to_regclass('vote_audit')::text")) != (0, [])


def test_an_undeclared_limit_is_none_before_version_4_and_20_from_there_on(
    queue: Queue, results: Results, start_service: Start, version: tuple[int, ...]
) -> None:
    """So that an upgrade of the broker does not begin to drop votes unseen."""
    declare(queue, {"x-queue-type": "quorum"})
    Queue(queue.url, queue.name, "quorum").publish(vote())
    service = start_service(RABBITMQ_QUEUE_TYPE="quorum")
    wait_until(lambda: results.counted() == 1, "it counts")
    if version >= (4,):
        (line,) = [line for line in service.lines() if line["message"].startswith("the queue drops messages")]
        assert (line["fields"]["limit"], line["fields"]["by_argument"]) == (20, None)
    else:
        assert any(line["message"].startswith("no message is dropped") for line in service.lines())


def test_a_quorum_queue_is_declared_with_the_limit_that_its_broker_needs(
    queue: Queue, version: tuple[int, ...]
) -> None:
    """Seen in the refusal of another declaration."""
    quorum = Queue(queue.url, queue.name, "quorum")
    quorum.ready()
    with pytest.raises(ChannelClosedByBroker) as refusal:
        declare(queue, {"x-queue-type": "quorum", "x-delivery-limit": 5})
    assert ("'-1'" if version >= (4,) else "current is none") in str(refusal.value)


@pytest.mark.parametrize(
    ("version", "by_argument", "by_policy", "limit"),
    [
        ((3, 10, 8), None, None, "none"),
        ((3, 13, 7), None, "unknown", "none"),
        ((3, 10, 8), -1, None, "first return"),
        ((3, 10, 8), 20, 5, 5),
        ((4, 0, 5), None, None, 20),
        ((4, 0, 5), None, -1, "none"),
        ((4, 0, 5), -1, None, "none"),
        ((4, 0, 5), -1, 20, 20),
        ((4, 0, 5), 50, -1, 50),
        ((4, 0, 5), 50, 30, 30),
        ((4, 2), "unknown", 30, "unknown"),
        ((3, 10, 8), "unknown", -1, "first return"),
    ],
)
def test_the_limit_in_force_follows_from_argument_policy_and_version(
    version: tuple[int, ...], by_argument: int | str | None, by_policy: int | str | None, limit: int | str
) -> None:
    """As RabbitMQ resolves them."""
    assert effective_limit(version, by_argument, by_policy) == limit
