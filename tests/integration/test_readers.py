"""Both readers of deliveries against a real RabbitMQ: what they hand over, and how a connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pika
import pytest

from deliveries import Delivery, WholeBody
from rabbitmq_client import GATHER_SECONDS, SHORTEST_PAUSE_SECONDS, BrokerUnavailable, RabbitMQClient
from scripts.local_services import LocalServices
from tests.conftest import empty_queue
from tests.harness import Queue, wait_until

MAX_BODY = 65_536
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

Connect = Callable[..., RabbitMQClient]


@pytest.fixture
def connect(queue: Queue) -> Iterator[Connect]:
    """Makes clients that consume from the test's queue; each is closed with the test."""
    made: list[RabbitMQClient] = []

    def start(reader: str = "one-pass", prefetch: int = 1_000, heartbeat: int = 30, url: str = "") -> RabbitMQClient:
        client = RabbitMQClient(
            [url or queue.url],
            queue.name,
            queue_type="classic",
            prefetch_count=prefetch,
            max_priority=10,
            heartbeat=heartbeat,
            name=reader,
            max_body=MAX_BODY,
            reader=reader,
        )
        made.append(client)
        client.connect()
        client.start_consuming()
        return client

    yield start
    for client in made:
        client.close()


def come(client: RabbitMQClient, seconds: float) -> list[Delivery]:
    """What one call of receive yields."""
    return [delivery for deliveries in client.receive(seconds) for delivery in deliveries]


def receive(client: RabbitMQClient, messages: int) -> list[Delivery]:
    """So many deliveries, and the burst that the last of them came in."""
    received: list[Delivery] = []

    def is_enough() -> bool:
        received.extend(come(client, 0.2))
        return len(received) >= messages

    wait_until(is_enough, f"{messages} deliveries come")
    return received


def test_both_readers_hand_the_same_over(queue: Queue, connect: Connect) -> None:
    """Bodies of no frame, one and many, and every property that is read."""
    chance = random.Random(1)
    sizes = [0, 1, 200, MAX_BODY, MAX_BODY + 1, 131_064, 131_065, 3_000_000, 0, 17]
    bodies = [chance.randbytes(size) for size in sizes]
    kinds: list[dict[str, Any]] = [
        {},
        {"message_id": "m", "content_type": "application/json", "priority": 1, "correlation_id": "c", "reply_to": "r"},
        {"headers": {"traceparent": TRACEPARENT, "x": [1, {"y": "z"}]}, "message_id": "é", "timestamp": 1},
        {"headers": {"traceparent": "none"}, "content_encoding": "gzip", "expiration": "600000"},
    ]
    for number, body in enumerate(bodies):
        queue.publish(body, **{"priority": 1} | kinds[number % len(kinds)])
    read = {}
    for reader in ("one-pass", "pika"):
        client = connect(reader)
        read[reader] = receive(client, len(bodies))
        client.close()
        wait_until(lambda: queue.ready() == len(bodies), "the broker has them back")
    assert read["one-pass"] == [delivery._replace(redelivered=False) for delivery in read["pika"]]
    assert all(delivery.redelivered for delivery in read["pika"])
    assert [delivery.body for delivery in read["one-pass"]] == [body[: MAX_BODY + 1] for body in bodies]
    assert read["one-pass"][7].whole == WholeBody(hashlib.sha256(bodies[7]).digest(), 3_000_000)
    assert read["one-pass"][2].traceparent == TRACEPARENT


class OddProperties(pika.BasicProperties):
    """A header with a timestamp that no calendar has."""

    def encode(self) -> Any:
        return [struct.pack("!HI", self.FLAG_HEADERS, 11), b"\x01aT" + b"\xff" * 8]


def test_a_header_that_pika_cannot_represent_ends_the_connection_of_its_own_reader_only(
    queue: Queue, connect: Connect
) -> None:
    """Which is why it is not the default."""
    with queue.channel() as channel:
        channel.basic_publish("", queue.name, b"odd", OddProperties())
    with pytest.raises(BrokerUnavailable):
        receive(connect("pika"), 1)
    (delivery,) = receive(connect("one-pass"), 1)
    assert (delivery.body, delivery.redelivered) == (b"odd", True)


def test_a_header_frame_that_is_larger_than_agreed_is_read(queue: Queue, connect: Connect) -> None:
    """The broker sends it in one piece whatever was agreed; refused, it would come again on each connection."""
    queue.publish(b"body", headers={"h": "x" * 50_000}, message_id="m")
    joint = "&" if "?" in queue.url else "?"
    (delivery,) = receive(connect(url=f"{queue.url}{joint}frame_max=4096"), 1)
    assert (delivery.body, delivery.message_id) == (b"body", "m")


@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_the_end_of_a_queue_or_a_channel_is_told(queue: Queue, connect: Connect, reader: str) -> None:
    """With deliveries of it on their way or not; the next connection has all back."""
    queue.publish(*[b"body"] * 50)
    client = connect(reader)
    receive(client, 1)
    client.settle(client.generation, 4_711, [])
    with pytest.raises(BrokerUnavailable, match=r"closed the channel|unknown delivery tag"):
        receive(client, 51)
    client.connect()
    assert come(client, 0.2) == []
    client.start_consuming()
    assert len(receive(client, 50)) == 50
    queue.delete()
    with pytest.raises(BrokerUnavailable, match="was the queue deleted"):
        receive(client, 1)


@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_deliveries_on_their_way_when_a_channel_is_given_back_come_on_the_next_one_only(
    queue: Queue, connect: Connect, reader: str
) -> None:
    """Its number is used again, and a tag of the old one would be another vote."""
    bodies = [str(number).encode() for number in range(800)]
    queue.publish(*bodies)
    client = connect(reader)
    for generation in range(client.generation + 2, client.generation + 12, 2):
        come(client, 1)
        client.give_back()
        assert come(client, 0.1) == []
        client.start_consuming()
        assert client.generation == generation
    read = receive(client, 800)
    assert {delivery.generation for delivery in read} == {client.generation}
    assert [delivery.tag for delivery in read] == list(range(1, 801))
    assert [delivery.body for delivery in read] == bodies


@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_what_is_on_its_way_when_the_consumer_is_cancelled_comes_out(
    queue: Queue, connect: Connect, reader: str
) -> None:
    """A later ack on the channel would cover it; once all are out, none comes."""
    queue.publish(*[b"body"] * 300)
    client = connect(reader, prefetch=200)
    read = receive(client, 1)
    client.cancel()

    def have_all_come() -> bool:
        read.extend(come(client, 0.1))
        return len(read) == 300 - queue.ready()

    wait_until(have_all_come, "what was delivered comes out")
    assert [delivery.tag for delivery in read] == list(range(1, len(read) + 1))
    client.settle(client.generation, read[-1].tag, [])
    assert come(client, 0.2) == []
    wait_until(lambda: come(client, 0.1) == [] and client.unsettled == 0, "all are settled")
    assert queue.ready() == 300 - len(read)
    client.start_consuming()
    assert len(receive(client, 300 - len(read))) == 300 - len(read)


def test_bytes_that_break_the_protocol_are_one_error_and_no_trace(
    queue: Queue, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is gone, the message comes on the next one."""
    queue.publish(b"body")
    client = connect()
    receive(client, 1)
    assert client._connection is not None
    caplog.set_level(logging.INFO, logger="pika")
    impl: Any = client._connection._impl
    impl._on_data_available(b"\x08\0\0\0\0\0\0\xcd")
    with pytest.raises(BrokerUnavailable, match="MalformedFrame: a frame that does not end where it says"):
        come(client, 5)
    assert not client.is_connected
    assert [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()] == []
    client.connect()
    client.start_consuming()
    assert receive(client, 1)[0].redelivered


@contextlib.contextmanager
def tls_before(address: tuple[str, int], directory: Path) -> Iterator[tuple[int, Path]]:
    """A port that speaks TLS for the broker at ``address``, and the certificate to be trusted."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    new += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*new, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection(*address)
        await asyncio.gather(pump(reader, broker_writer), pump(broker_reader, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, name="tls-proxy")
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1], certificate
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()


def test_deliveries_are_read_through_tls(queue: Queue, tmp_path: Path, connect: Connect) -> None:
    """Records are no frames: small ones, large ones, and what the TLS layer holds back."""
    chance = random.Random(2)
    bodies = [chance.randbytes(size) for size in [200] * 500 + [70_000, 0, 400_000] + [200] * 100]
    queue.publish(*bodies)
    there = pika.URLParameters(queue.url)
    with tls_before((there.host, there.port), tmp_path) as (port, certificate):
        credentials: Any = there.credentials
        options = quote(str({"cafile": str(certificate), "server_hostname": "localhost"}))
        host = f"{credentials.username}:{credentials.password}@127.0.0.1:{port}"
        client = connect(url=f"amqps://{host}/{quote(there.virtual_host, safe='')}?ssl_options={options}")
        read = receive(client, len(bodies))
        assert [delivery.body for delivery in read] == [body[: MAX_BODY + 1] for body in bodies]
        client.close()


def test_a_burst_ends_however_much_comes_and_however_long_it_is_read(queue: Queue, connect: Connect) -> None:
    """Or the consumer would do nothing else; and the first part is there while the rest is on its way."""
    queue.publish(*[bytes(1_000)] * 6_000)
    client = connect(prefetch=500)
    parts = 0
    for deliveries in client.receive(5):
        assert len(deliveries) < 100, "a reading has 64 KiB"
        time.sleep(0.005)  # by then there is more
        client.settle(client.generation, deliveries[-1].tag, [])
        parts += 1
    assert 1 < parts <= 2 + GATHER_SECONDS / SHORTEST_PAUSE_SECONDS
    for _ in client.receive(5):
        break  # who leaves it early gets the rest later
    assert len(receive(client, 1)) > 0


def test_heartbeats_are_answered_while_nothing_comes(queue: Queue, connect: Connect) -> None:
    """For longer than either side would wait for one."""
    client = connect(heartbeat=1)
    until = time.monotonic() + 8
    while time.monotonic() < until:
        assert come(client, 0.5) == []
    queue.publish(b"body")
    started = time.monotonic()
    assert [delivery.body for delivery in come(client, 60)] == [b"body"]
    assert time.monotonic() - started < 30, "receive returns when something has come"


@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_a_connection_that_the_broker_ends_is_told_in_its_words_and_leaves_no_file_open(
    services: LocalServices, queue: Queue, connect: Connect, reader: str
) -> None:
    """A replica may see thousands of them."""
    client = connect(reader)
    files = None
    for _ in range(5):
        services.rabbitmq.ctl("close_all_connections", "for the test")
        with pytest.raises(BrokerUnavailable, match="CONNECTION_FORCED"):
            for _ in range(100):
                come(client, 0.2)
        opened = len(list(Path("/proc/self/fd").iterdir()))
        files = opened if files is None else files
        assert opened <= files
        client.connect()
        client.start_consuming()


@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_a_settlement_is_sent_while_nothing_else_happens(queue: Queue, connect: Connect, reader: str) -> None:
    """By another thread, while receive waits."""
    queue.publish(b"one")
    client = connect(reader)
    (delivery,) = receive(client, 1)
    settler = threading.Timer(0.2, client.settle, (delivery.generation, delivery.tag, []))
    settler.start()
    come(client, 1.0)
    settler.join()
    assert client.unsettled == 0
    client.close()
    assert queue.ready() == 0


@pytest.mark.parametrize("kind", ["classic", "quorum"])
@pytest.mark.parametrize("reader", ["one-pass", "pika"])
def test_a_consumer_that_is_cancelled_and_comes_again_has_the_same_prefetch(
    services: LocalServices, kind: str, reader: str
) -> None:
    """On the same channel, whose deliveries of before it settles then; and the channel lives."""
    with empty_queue(services, kind) as queue:
        client = RabbitMQClient(
            queue.urls,
            queue.name,
            queue_type=kind,
            prefetch_count=50,
            max_priority=10,
            heartbeat=30,
            name=reader,
            max_body=MAX_BODY,
            reader=reader,
        )
        with client:
            client.connect()
            client.start_consuming()
            generation = client.generation
            queue.publish(*[b"body"] * 1_000)
            read = receive(client, 50)
            for _ in range(3):
                client.cancel()
                client.start_consuming()
                client.settle(generation, read[-1].tag - 30, [])
                read += receive(client, 20)

            def have_all_come() -> bool:
                read.extend(come(client, 0.1))
                return client.unsettled >= 50 and len(read) == 1_000 - queue.ready()

            for _ in range(2):  # what was still on its way to the consumers of before is settled by the second
                client.settle(generation, read[-1].tag, [])
                wait_until(have_all_come, "what was delivered comes out")
            assert (client.generation, client.unsettled) == (generation, 50)
            assert [delivery.tag for delivery in read] == list(range(1, len(read) + 1))
            client.give_back()
            client.start_consuming()
            client.cancel()
            client.start_consuming()
            queue.delete()
            with pytest.raises(BrokerUnavailable, match=r"was the queue deleted|closed the channel"):
                receive(client, 1_001)
