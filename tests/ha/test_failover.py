"""The forms in which several servers are named: each fails over by itself when the server in use is killed.

FAILOVER_TRIALS=5 tries each so often and prints the medians (`make test-failover`); the seconds are told, not asserted.
"""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from database import Database
from scripts.local_cluster import PostgresPair, RabbitMQCluster
from test_publisher import Publisher, make_messages
from tests.conftest import empty_database, empty_queue
from tests.harness import Queue, Results, Service, vote, wait_until

TRIALS = int(os.environ.get("FAILOVER_TRIALS", "1"))


@contextmanager
def a_service(
    cluster: RabbitMQCluster, pair: PostgresPair, directory: Path, **settings: str
) -> Iterator[tuple[Service, Queue, Results]]:
    """A replica on a quorum queue of the cluster and a database of the pair, told of them by ``settings``."""
    services = SimpleNamespace(rabbitmq=cluster, postgres=pair)
    with ExitStack() as stack:
        queue = stack.enter_context(empty_queue(services, "quorum"))
        queue.ready()  # declares it
        results = stack.enter_context(empty_database(services))
        settings = {name: value.replace("{database}", database_of(results)) for name, value in settings.items()}
        service = Service(directory, f"replica-{uuid.uuid4().hex[:6]}", queue, results, settings)
        stack.callback(service.close)
        service.start_and_wait()
        yield service, queue, results


def database_of(results: Results) -> str:
    return urlsplit(results.url).path.removeprefix("/") if "@" in results.url else ""


def parts(urls: list[str]) -> tuple[str, str, str, str]:
    """Hosts and ports, each with commas between them, user and password of several AMQP URLs."""
    split = [urlsplit(url) for url in urls]
    hosts, ports = ",".join(str(url.hostname) for url in split), ",".join(str(url.port) for url in split)
    return hosts, ports, str(split[0].username), str(split[0].password)


def broker_forms(cluster: RabbitMQCluster) -> dict[str, dict[str, str]]:
    hosts, ports, user, password = parts(cluster.urls())
    return {
        "AMQP_URL": {"AMQP_URL": cluster.url()},
        "RABBITMQ_HOST": {
            "AMQP_URL": "",
            "RABBITMQ_HOST": hosts,
            "RABBITMQ_PORT": ports,
            "RABBITMQ_USER": user,
            "RABBITMQ_PASSWORD": password,
        },
    }


def database_forms(pair: PostgresPair) -> dict[str, dict[str, str]]:
    servers = (pair.primary, pair.standby)
    ports = ",".join(str(server.port) for server in servers)
    one = urlsplit(servers[0].url())
    login = {"POSTGRES_USER": str(one.username), "POSTGRES_PASSWORD": str(one.password), "POSTGRES_DB": "{database}"}
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return {
        "DATABASE_URL": {"DATABASE_URL": f"postgresql://{one.username}:{one.password}@{hosts}/{{database}}"},
        "POSTGRES_HOST": {"DATABASE_URL": "", "POSTGRES_HOST": "127.0.0.1,127.0.0.1", "POSTGRES_PORT": ports, **login},
    }


def tell(capsys: pytest.CaptureFixture[str], form: str, seconds: list[float]) -> None:
    with capsys.disabled():
        print(f"\n{form}: counting again {statistics.median(seconds):.1f} s after the kill (median of {len(seconds)})")


@pytest.mark.parametrize("form", ["AMQP_URL", "RABBITMQ_HOST"])
def test_the_service_goes_to_another_node_when_its_own_is_killed(
    cluster: RabbitMQCluster, pair: PostgresPair, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And counts what is published to the others."""
    seconds = []
    with a_service(cluster, pair, tmp_path, **broker_forms(cluster)[form]) as (service, queue, results):
        for trial in range(TRIALS):
            connected = [line for line in service.lines() if line["message"] == "broker connected"][-1]
            port = int(connected["fields"]["server"].rpartition(":")[2])
            (node,) = [node for node in cluster.nodes if node.port == port]
            node.kill()
            killed = time.monotonic()
            publish_to_others(cluster, queue, number=trial)
            wait_until(lambda: results.counted() == trial + 1, "the vote is counted", 60)  # noqa: B023
            seconds.append(time.monotonic() - killed)
            cluster.heal()
    tell(capsys, form, seconds)


def publish_to_others(cluster: RabbitMQCluster, queue: Queue, number: int) -> None:
    """One vote, as soon as the queue has a leader again."""
    messages = list(make_messages(1, seed=1_000 + number))

    def is_confirmed() -> bool:
        try:
            publisher = Publisher(queue.urls, queue.name, queue_type="quorum")
            return publisher.publish(messages).all_confirmed
        except Exception:  # noqa: BLE001 - whatever keeps it from being confirmed, it is tried again
            return False

    wait_until(is_confirmed, "the vote is confirmed", 60)


@pytest.mark.parametrize("form", ["DATABASE_URL", "POSTGRES_HOST"])
def test_the_service_goes_to_the_promoted_standby_when_the_primary_is_killed(
    cluster: RabbitMQCluster, pair: PostgresPair, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ``target_session_attrs`` in the settings: with more than one host it is read-write."""
    seconds = []
    with a_service(cluster, pair, tmp_path, **database_forms(pair)[form]) as (service, queue, results):
        for trial in range(TRIALS):
            pair.promote()
            promoted = time.monotonic()
            queue.publish(vote())
            wait_until(lambda: results.counted() == trial + 1, "the vote is counted", 60)  # noqa: B023
            seconds.append(time.monotonic() - promoted)
            pair.rebuild()
        assert service.is_running()
    tell(capsys, form, seconds)


def test_commits_that_skip_the_standby_are_an_error(pair: PostgresPair, caplog: pytest.LogCaptureFixture) -> None:
    """A vote that is acked and not on the standby is lost at a failover; where commits wait, nothing is said."""
    with empty_database(SimpleNamespace(postgres=pair)) as results, closing_database(results) as database:
        database.initialise_schema()
        assert "standbys" not in caplog.text
        for value in ("local", "off"):
            caplog.clear()
            results.execute(f"ALTER DATABASE {database_of(results)} SET synchronous_commit = {value}")
            database._discard_pool()
            database.initialise_schema()
            assert "commits do not wait for them" in caplog.text
            assert any(record.levelname == "ERROR" for record in caplog.records)


@contextmanager
def closing_database(results: Results) -> Iterator[Database]:
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="test") as database:
        yield database


def test_a_classic_queue_on_a_node_that_is_down_is_waited_for(
    cluster: RabbitMQCluster, pair: PostgresPair, tmp_path: Path
) -> None:
    """The broker answers 404, as for a queue that is not there; it is no fault of the set-up, and passes."""
    services = SimpleNamespace(rabbitmq=cluster, postgres=pair)
    home = cluster.nodes[0]
    only_there = SimpleNamespace(rabbitmq=home)
    with empty_queue(only_there) as queue, empty_database(services) as results:
        queue.publish(vote())
        home.kill()
        others = Queue(",".join(url for url in cluster.urls() if url != queue.url), queue.name)
        service = Service(tmp_path, "replica-1", others, results)
        try:
            service.start()
            wait_until(lambda: service.says("broker lost"), "it is refused", 90)  # RabbitMQ 4 thinks it over for 60 s
            lost = [line for line in service.lines() if line["message"] == "broker lost"]
            assert {line["level"] for line in lost} == {"WARNING"}
            # RabbitMQ 4 may also say that it has timed out
            assert "down or inaccessible" in str(lost) or "due to timeout" in str(lost)
            cluster.heal()
            wait_until(lambda: results.counted() == 1, "it counts once the node is back", 120)
        finally:
            service.close()
            cluster.heal()
