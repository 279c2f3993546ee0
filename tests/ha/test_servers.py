"""The servers that the other tests of this folder stand on do what such servers do on machines of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pika.exceptions
import psycopg2
import pytest

from scripts.local_cluster import HAProxyServer, PgBouncerServer, PostgresPair, RabbitMQCluster
from scripts.local_services import LocalServicesError, _processes
from tests.harness import ROOT, wait_until

PROXY_FOR_PUBLISHERS = ROOT / "deploy/haproxy/amqp-0-9-1.cfg"
PERSISTENT = pika.BasicProperties(delivery_mode=2)


@contextmanager
def confirmed_channel(url: str) -> Iterator[Any]:
    """A channel on which basic_publish returns when the broker has confirmed."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        if connection.is_open:
            connection.close()


def wait_for_members(cluster: RabbitMQCluster, queue: str) -> None:
    """Until each node has a member of the queue that takes part."""
    states: dict[str, str] = {}

    def all_take_part() -> bool:
        states.update(cluster.raft_states(queue))
        return sorted(states.values()) == ["follower", "follower", "leader"]

    try:
        wait_until(all_take_part, "all members take part", 60)
    except AssertionError as exc:
        raise AssertionError(f"the members of {queue}: {states}") from exc


@pytest.fixture
def quorum_queue(cluster: RabbitMQCluster) -> Iterator[str]:
    """An empty quorum queue with a member on each node."""
    name = f"votes.ha-{uuid.uuid4().hex[:12]}"
    with confirmed_channel(cluster.urls()[0]) as channel:
        channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    wait_for_members(cluster, name)
    yield name
    cluster.heal()
    with confirmed_channel(cluster.urls()[0]) as channel:
        channel.queue_delete(name)


def query(url: str, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """All rows of one statement in a transaction of its own, on a connection of its own."""
    with closing(psycopg2.connect(url, connect_timeout=5)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(sql, arguments or None)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def table(pair: PostgresPair) -> Iterator[str]:
    """An empty table on the pair."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    query(pair.url(), f"CREATE TABLE {name} (n int PRIMARY KEY)")
    yield name
    pair.heal()
    query(pair.url(), f"DROP TABLE {name}")


# --- RabbitMQ --------------------------------------------------------------------------------------------------------


def test_a_killed_leader_loses_no_confirmed_message_and_comes_back(cluster: RabbitMQCluster, quorum_queue: str) -> None:
    leader = cluster.leader(quorum_queue)
    with confirmed_channel(leader.url()) as channel:
        channel.basic_publish("", quorum_queue, b"confirmed", PERSISTENT, mandatory=True)
    followers = cluster.followers(quorum_queue)
    assert len(followers) == 2
    leader.kill()

    assert cluster.leader(quorum_queue) in followers
    with confirmed_channel(followers[0].url()) as channel:
        method, _, body = wait_until(lambda: _get(channel, quorum_queue), "the message is there")
        assert body == b"confirmed"
        channel.basic_ack(method.delivery_tag)
    assert cluster.epmd.is_running()

    leader.start()
    cluster.wait_until_complete()
    wait_for_members(cluster, quorum_queue)
    with confirmed_channel(leader.url()) as channel:
        channel.basic_publish("", quorum_queue, b"after", PERSISTENT, mandatory=True)


def test_haproxy_moves_a_connection_to_another_node(cluster: RabbitMQCluster, tmp_path: Path) -> None:
    with HAProxyServer(tmp_path / "haproxy", cluster.nodes, balance="first") as proxy:
        wait_until(lambda: proxy.states() == ["UP"] * 3, "all nodes are up")
        with confirmed_channel(proxy.url()) as channel:
            assert proxy.connections() == [1, 0, 0]
            cluster.nodes[0].kill()
            with pytest.raises(pika.exceptions.AMQPError):
                channel.basic_publish("", "nowhere", b"")
        # until then a connection may be sent to the dead node, and ended
        wait_until(lambda: proxy.states() == ["DOWN", "UP", "UP"], "the dead node is known")
        with confirmed_channel(proxy.url()):
            assert proxy.connections() == [0, 1, 0]
        cluster.nodes[0].start()
        wait_until(lambda: proxy.states() == ["UP"] * 3, "all nodes are up again")
        proxy.kill()
        with pytest.raises(pika.exceptions.AMQPError):
            pika.BlockingConnection(pika.URLParameters(proxy.url()))
        proxy.start()
        pika.BlockingConnection(pika.URLParameters(proxy.url())).close()
        pid = proxy.pid
    wait_until(lambda: not any(process.pid == pid for process, _ in _processes(pid)), "it is gone")


def test_a_proxy_for_publishers_passes_amqp_0_9_1_alone(cluster: RabbitMQCluster) -> None:
    """By AMQP 1.0 a message can be published to RabbitMQ 4 that it can hand to no consumer."""
    broker = urlsplit(cluster.nodes[0].url())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {"AMQP_BIND": f"127.0.0.1:{port}", "AMQP_BROKER": f"127.0.0.1:{broker.port}"}
    command = [shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "-db", "-f", str(PROXY_FOR_PUBLISHERS)]
    process = subprocess.Popen([*filter(None, command)], env=environment)
    try:
        url = broker._replace(netloc=broker.netloc.replace(f":{broker.port}", f":{port}")).geturl()
        wait_until(lambda: is_open(port), "the proxy listens")
        with confirmed_channel(url) as channel:
            channel.queue_declare("", exclusive=True)
        for begins in (b"AMQP\0\1\0\0", b"AMQP\3\1\0\0", b"AMQP\0\0\x09\0", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(begins)
                assert received(client) == b"", begins
    finally:
        process.terminate()
        process.wait(10)


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def received(client: socket.socket) -> bytes:
    """What comes until the connection is ended."""
    with contextlib.suppress(ConnectionResetError):
        return client.recv(100)
    return b""


def _get(channel: Any, queue: str) -> Any:
    method, properties, body = channel.basic_get(queue)
    return method and (method, properties, body)


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def test_a_commit_waits_while_the_standby_is_frozen(pair: PostgresPair, table: str) -> None:
    pair.freeze_standby()
    insert = _in_thread(lambda: query(pair.url(), f"INSERT INTO {table} VALUES (1)"))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    wait_until(lambda: pair.primary.query(waiting) == "1", "the commit waits")
    assert query(pair.url(), f"SELECT count(*) FROM {table}") == [(0,)]

    pair.thaw_standby()
    insert.join(30)
    assert not insert.is_alive()
    assert query(pair.url(), f"SELECT count(*) FROM {table}") == [(1,)]


def test_a_stopped_standby_catches_up(pair: PostgresPair, table: str) -> None:
    pair.stop_standby()
    insert = _in_thread(lambda: query(pair.url(), f"INSERT INTO {table} VALUES (1)"))
    pair.start_standby()
    insert.join(30)
    assert not insert.is_alive()
    assert pair.is_in_sync()
    assert query(pair.standby.url(), f"SELECT n FROM {table}") == [(1,)]


def test_a_promoted_standby_has_all_that_was_confirmed(pair: PostgresPair, table: str) -> None:
    """The URL with both hosts leads to it, and it commits alone; after a rebuild it has a standby again."""
    url = pair.url()
    for number in range(100):
        query(url, f"INSERT INTO {table} VALUES (%s)", number)
    old, new = pair.primary, pair.standby
    old.kill()
    with pytest.raises(psycopg2.OperationalError):
        query(url, "SELECT 1")
    pair.promote()
    assert pair.primary is new
    assert pair.url() == url
    assert query(url, "SELECT inet_server_port()") == [(new.port,)]
    assert query(url, f"SELECT count(*) FROM {table}") == [(100,)]
    query(url, f"INSERT INTO {table} VALUES (100)")

    with pytest.raises(LocalServicesError, match="no primary any more"):
        old.start()
    pair.rebuild()
    assert pair.standby is old
    assert pair.is_in_sync()
    query(url, f"INSERT INTO {table} VALUES (101)")
    assert query(old.url(), "SELECT pg_is_in_recovery()") == [(True,)]
    assert query(old.url(), f"SELECT count(*) FROM {table}") == [(102,)]


def test_a_frozen_primary_is_no_primary_after_a_promotion(pair: PostgresPair, table: str) -> None:
    pair.primary.freeze()
    pair.promote()
    assert not pair.standby.is_running()
    query(pair.url(), f"INSERT INTO {table} VALUES (1)")


def test_pgbouncer_shares_connections_and_takes_no_options(pair: PostgresPair, tmp_path: Path) -> None:
    with PgBouncerServer(tmp_path / "pgbouncer", pair.primary, default_pool_size=1) as bouncer:
        url = bouncer.url()
        with closing(psycopg2.connect(url)) as one, closing(psycopg2.connect(url)) as other:
            pids = set()
            for connection in (one, other, one):
                with connection, connection.cursor() as cursor:
                    cursor.execute("SELECT pg_backend_pid()")
                    pids.add(cursor.fetchone())
            assert len(pids) == 1
        with pytest.raises(psycopg2.OperationalError, match="unsupported startup parameter"):
            psycopg2.connect(url, options="-c lock_timeout=3s")

        bouncer.kill()
        with pytest.raises(psycopg2.OperationalError):
            query(url, "SELECT 1")
        bouncer.start()
        assert query(url, "SELECT 1") == [(1,)]

        pair.promote()
        bouncer.point_at(pair.primary)
        assert query(url, "SELECT inet_server_port()") == [(pair.primary.port,)]
        pid = bouncer.pid
    wait_until(lambda: not any(process.pid == pid for process, _ in _processes(pid)), "it is gone")


def _in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
