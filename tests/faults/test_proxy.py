"""The proxy of the fault suite is itself tested: first its watchers, then the proxy with two plain sockets as client
and server, then with the real servers and drivers."""

import gc
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pika
import psycopg2
import pytest
from pika.exceptions import AMQPConnectionError

from scripts.local_services import LocalServices
from tests.faults.proxy import (
    DOWN,
    QUERIES,
    UP,
    AmqpWatcher,
    Direction,
    Link,
    Message,
    PostgresWatcher,
    TcpProxy,
    Watcher,
    contains,
    starts_with,
)

# --- the two protocols, written by hand ---


def startup(code: int = 196608) -> bytes:
    return struct.pack("!II", 8, code)


def query(sql: bytes) -> bytes:
    return b"Q" + struct.pack("!I", len(sql) + 5) + sql + b"\0"


def reply(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


DONE = reply(b"C", b"DONE\0")
READY = reply(b"Z", b"I")


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack("!BHI", kind, channel, len(payload)) + payload + b"\xce"


def method(channel: int, class_id: int, method_id: int, arguments: bytes = b"") -> bytes:
    return frame(1, channel, struct.pack("!HH", class_id, method_id) + arguments)


def deliver(tag: int, redelivered: bool = False, channel: int = 1) -> bytes:
    return method(channel, 60, 60, b"\x04ctag" + struct.pack("!QB", tag, redelivered) + b"\x00\x01q")


def content(*bodies: bytes, channel: int = 1) -> bytes:
    header = struct.pack("!HHQH", 60, 0, sum(map(len, bodies)), 0)
    return frame(2, channel, header) + b"".join(frame(3, channel, body) for body in bodies)


def ack(tag: int, multiple: bool = False, channel: int = 1) -> bytes:
    return method(channel, 60, 80, struct.pack("!QB", tag, multiple))


def fed(watcher: Watcher, direction: Direction, *chunks: bytes) -> list[Message]:
    """Feed the chunks and let all that comes of it be forwarded."""
    messages = [message for chunk in chunks for message in watcher.feed(direction, chunk)]
    for message in messages:
        if message.forwarded:
            message.forwarded()
    return messages


def what_matters(messages: list[Message]) -> tuple[bytes, list[tuple[bytes, tuple[str, ...], tuple[str, ...]]]]:
    named = [(m.data, m.before, m.after) for m in messages if m.before or m.after]
    return b"".join(m.data for m in messages), named


# --- the watchers ---


def test_sql_is_matched_in_any_case_and_with_any_white_space() -> None:
    """What counts are the words; a longer table name or a word in the middle does not."""
    assert contains(b"INSERT INTO vote_audit")(b"WITH x AS (insert  into\n\tVote_Audit AS a (id) ...")
    assert not contains(b"INSERT INTO vote_audit")(b"INSERT INTO vote_audit_old VALUES (1)")
    assert starts_with(b"COMMIT")(b"\n commit;")
    assert not starts_with(b"COMMIT")(b"INSERT INTO rejected_messages VALUES ('x'); COMMIT")


def test_postgres_messages_are_the_same_wherever_the_stream_is_split() -> None:
    """Both streams of a batch, cut in two at every place and into single bytes."""
    up = startup() + query(b"BEGIN") + query(b"SELECT count_batch(...)") + query(b"commit") + reply(b"X")
    down = reply(b"R", b"\0\0\0\0") + READY + (reply(b"D", b"row") + DONE + READY) * 3
    expected_up = ["begin seen", "votes seen", "commit seen"]
    expected_down = ["begin answered", "votes answered", "commit answered"]
    splits = [[up[:i], up[i:]] for i in range(len(up) + 1)] + [[bytes([byte]) for byte in up]]
    for chunks in splits:
        messages = fed(PostgresWatcher(), UP, *chunks)
        assert b"".join(message.data for message in messages) == up
        assert [moment for message in messages for moment in message.before] == expected_up
    splits = [[down[:i], down[i:]] for i in range(len(down) + 1)] + [[bytes([byte]) for byte in down]]
    for chunks in splits:
        watcher = PostgresWatcher()
        fed(watcher, UP, up)
        messages = fed(watcher, DOWN, *chunks)
        assert b"".join(message.data for message in messages) == down
        assert [moment for message in messages for moment in message.before] == expected_down
        assert not watcher.lost()


def test_one_query_may_have_several_names() -> None:
    """A message that begins a transaction and writes a batch is both."""
    watcher = PostgresWatcher()
    sql = b"BEGIN; SET LOCAL lock_timeout = '5s'; SELECT * FROM count_batch('replica-1')"
    assert fed(watcher, UP, startup(), query(sql))[1].before == ("begin seen", "votes seen")
    assert fed(watcher, DOWN, DONE + READY)[0].after == ("begin delivered", "votes delivered")


def test_the_answer_to_a_named_query_is_kept_until_it_is_complete() -> None:
    """Nothing of it comes out before ReadyForQuery, or before the stream ends without one."""
    watcher = PostgresWatcher()
    fed(watcher, UP, startup(), query(b"COMMIT"))
    assert fed(watcher, DOWN, DONE) == []
    assert fed(watcher, DOWN, READY)[0].data == DONE + READY
    fed(watcher, UP, query(b"COMMIT"))
    assert fed(watcher, DOWN, reply(b"E", b"FATAL"), b"half") == []
    assert watcher.rest(DOWN) == reply(b"E", b"FATAL") + b"half"


def test_a_query_is_not_confused_by_the_answers_to_those_before_it() -> None:
    """Answers come in the order of the queries, unnamed ones and Sync included."""
    watcher = PostgresWatcher()
    fed(watcher, UP, startup(), query(b"SELECT 1"), reply(b"P", b"parse"), reply(b"S"), query(b"COMMIT"))
    messages = fed(watcher, DOWN, DONE + READY, READY, DONE + READY)
    assert [message.before for message in messages] == [(), (), (), ("commit answered",)]


def test_a_commit_is_open_from_its_forwarding_to_the_delivery_of_its_answer() -> None:
    """A connection that dies in between leaves an ambiguous commit; before and after, it does not."""
    watcher = PostgresWatcher()
    fed(watcher, UP, startup())
    (message,) = watcher.feed(UP, query(b"COMMIT"))
    assert watcher.lost() == ""
    assert message.forwarded
    message.forwarded()
    (message,) = watcher.feed(DOWN, DONE + READY)
    assert watcher.lost() == "ambiguous commit"
    assert message.forwarded
    message.forwarded()
    assert watcher.lost() == ""


def test_an_encryption_request_that_is_refused_is_followed_by_a_startup_packet() -> None:
    """The bare N of the server is no message, and the real startup packet has no type byte either."""
    watcher = PostgresWatcher()
    fed(watcher, UP, startup(80877104))
    assert fed(watcher, DOWN, b"N")[0].data == b"N"
    fed(watcher, UP, startup(80877103))
    assert fed(watcher, DOWN, b"N")[0].data == b"N"
    assert fed(watcher, UP, startup() + query(b"COMMIT"))[1].before == ("commit seen",)


def test_an_encrypted_connection_passes_unread() -> None:
    """After the server's S both streams are opaque."""
    watcher = PostgresWatcher()
    fed(watcher, UP, startup(80877103))
    fed(watcher, DOWN, b"S")
    assert what_matters(fed(watcher, UP, query(b"COMMIT"))) == (query(b"COMMIT"), [])
    assert what_matters(fed(watcher, DOWN, b"\x16\x03")) == (b"\x16\x03", [])


def test_amqp_messages_are_the_same_wherever_the_stream_is_split() -> None:
    """Both streams, cut in two at every place and into single bytes."""
    up = b"AMQP\0\0\x09\x01" + method(0, 10, 11, b"start-ok") + frame(8, 0, b"") + ack(2, multiple=True)
    up += method(1, 60, 90, struct.pack("!QB", 3, 1)) + method(1, 20, 40) + method(0, 10, 50)
    down = deliver(1) + content(b"one", b"two") + frame(8, 0, b"") + deliver(2, redelivered=True) + content()
    expected = {
        UP: ["ack seen", "reject seen", "channel close seen", "connection close seen"],
        DOWN: ["deliver seen", "deliver seen", "redelivery seen"],
    }
    streams: list[tuple[Direction, bytes]] = [(UP, up), (DOWN, down)]
    for direction, stream in streams:
        splits = [[stream[:i], stream[i:]] for i in range(len(stream) + 1)] + [[bytes([byte]) for byte in stream]]
        for chunks in splits:
            messages = fed(AmqpWatcher(), direction, *chunks)
            assert b"".join(message.data for message in messages) == stream
            assert [moment for message in messages for moment in message.before] == expected[direction]


def test_a_delivery_is_forwarded_when_the_last_frame_of_its_body_is() -> None:
    """Also when another channel's frames come in between, and when there is no body."""
    watcher = AmqpWatcher()
    head, *body = (content(b"one", b"two")[:22], content(b"one", b"two")[22:33], content(b"one", b"two")[33:])
    chunks = [deliver(1), head, deliver(1, channel=2), body[0], content(channel=2), body[1]]
    after = [message.after for message in fed(watcher, DOWN, *chunks)]
    forwarded = ("deliver forwarded",)
    assert after == [(), (), (), (), forwarded, forwarded]


@pytest.mark.parametrize(
    ("settle", "left"),
    [
        (ack(2), {(1, 1), (1, 3), (2, 1)}),
        (ack(2, multiple=True), {(1, 3), (2, 1)}),
        (ack(0, multiple=True), {(2, 1)}),
        (method(1, 60, 90, struct.pack("!QB", 2, 1)), {(1, 1), (1, 3), (2, 1)}),  # requeue is not multiple
        (method(1, 60, 120, struct.pack("!QB", 2, 1)), {(1, 3), (2, 1)}),
        (method(1, 20, 40), {(2, 1)}),
        (method(0, 10, 50), set()),
    ],
)
def test_deliveries_are_unacked_until_they_are_settled(settle: bytes, left: set[tuple[int, int]]) -> None:
    """By ack, nack, reject, the end of the channel or the good end of the connection, once that was forwarded."""
    watcher = AmqpWatcher()
    fed(watcher, DOWN, deliver(1), deliver(2), deliver(3), deliver(1, channel=2))
    watcher.feed(UP, settle)
    assert len(watcher.unacked) == 4
    fed(watcher, UP, settle)
    assert watcher.unacked == left
    assert watcher.lost() == ("unacked lost" if left else "")


def test_a_confirm_of_the_broker_settles_no_delivery() -> None:
    """Basic.Ack from the server speaks of what the client published."""
    watcher = AmqpWatcher()
    fed(watcher, DOWN, deliver(1))
    assert fed(watcher, DOWN, ack(1))[0].before == ("confirm seen",)
    assert watcher.unacked == {(1, 1)}


@pytest.mark.parametrize(
    ("watcher", "garbage"), [(PostgresWatcher(), b"\0\0\0\1"), (AmqpWatcher(), b"\1" * 7 + bytes(2**25))]
)
def test_a_foreign_protocol_is_an_error(watcher: Watcher, garbage: bytes) -> None:
    """A proxy that understood nothing would let a test pass that tested nothing."""
    with pytest.raises(ValueError, match="this is not"):
        watcher.feed(UP, garbage)


# --- the proxy between two plain sockets ---


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


@pytest.fixture
def proxy(server: socket.socket) -> Iterator[TcpProxy]:
    with TcpProxy(server.getsockname(), PostgresWatcher) as proxy:
        yield proxy


@contextmanager
def connected(proxy: TcpProxy, server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect through the proxy and yield both ends."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(10)
            yield client, accepted


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, f"the stream ended after {data!r}"
        data += chunk
    return data


def is_quiet(sock: socket.socket) -> bool:
    """Return whether nothing comes for a moment."""
    sock.settimeout(0.1)
    try:
        return sock.recv(1) is None
    except TimeoutError:
        return True
    finally:
        sock.settimeout(10)


BATCH = startup() + query(b"BEGIN"), query(b"COMMIT"), query(b"SELECT 1")


def test_a_cut_before_a_message_lets_all_before_it_pass_and_nothing_of_it(
    proxy: TcpProxy, server: socket.socket
) -> None:
    """All three messages came in one piece; both ends see a reset, not an orderly end."""
    rule = proxy.on("commit seen", Link.cut)
    with connected(proxy, server) as (client, upstream):
        client.sendall(b"".join(BATCH))
        assert rule.done.wait(10)
        assert receive(upstream, len(BATCH[0])) == BATCH[0]
        for sock in (client, upstream):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert proxy.ambiguous_commits == 0
    assert proxy.hits == {"commit seen": 1}


def test_a_cut_after_a_message_lets_it_pass_and_nothing_after_it(proxy: TcpProxy, server: socket.socket) -> None:
    """The commit arrived, whatever becomes of it: that is an ambiguous one."""
    proxy.on("commit forwarded", Link.cut)
    with connected(proxy, server) as (client, upstream):
        client.sendall(b"".join(BATCH))
        assert receive(upstream, len(BATCH[0] + BATCH[1])) == BATCH[0] + BATCH[1]
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
    assert proxy.ambiguous_commits == 1


def test_an_action_runs_before_its_message_is_forwarded(proxy: TcpProxy, server: socket.socket) -> None:
    """While it runs, the server has all before the message and not a byte of it."""
    inside, leave = threading.Event(), threading.Event()

    def wait(_: Link) -> None:
        inside.set()
        leave.wait(10)

    proxy.on("commit seen", wait)
    with connected(proxy, server) as (client, upstream):
        client.sendall(b"".join(BATCH))
        assert inside.wait(10)
        assert receive(upstream, len(BATCH[0])) == BATCH[0]
        assert is_quiet(upstream)
        leave.set()
        assert receive(upstream, len(BATCH[1])) == BATCH[1]


def test_an_answer_that_is_cut_was_complete_and_nothing_of_it_arrives(proxy: TcpProxy, server: socket.socket) -> None:
    """The rule waits for ReadyForQuery, then the client gets a reset instead of the answer."""
    rule = proxy.on("commit answered", Link.cut)
    with connected(proxy, server) as (client, upstream):
        client.sendall(BATCH[0] + BATCH[1])
        receive(upstream, len(BATCH[0] + BATCH[1]))
        upstream.sendall(DONE + READY)  # of BEGIN
        assert receive(client, len(DONE + READY)) == DONE + READY
        upstream.sendall(DONE)
        assert is_quiet(client)
        assert not rule.done.is_set()
        upstream.sendall(READY)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert proxy.ambiguous_commits == 1


def test_a_stalled_connection_goes_on_where_it_stood(proxy: TcpProxy, server: socket.socket) -> None:
    """The message that was held back arrives after the release, was reached once, and nothing behind it was."""
    proxy.on("commit seen", Link.stall)
    with connected(proxy, server) as (client, upstream):
        client.sendall(b"".join(BATCH) + query(b"ROLLBACK"))
        assert receive(upstream, len(BATCH[0])) == BATCH[0]
        proxy.wait_for("commit seen")
        upstream.sendall(READY)
        assert is_quiet(upstream)
        assert is_quiet(client)
        assert proxy.reached["rollback seen"] == 0
        proxy.release()
        assert receive(upstream, len(BATCH[1] + BATCH[2])) == BATCH[1] + BATCH[2]
        assert receive(client, len(READY)) == READY
    assert proxy.reached["commit seen"] == 1


def test_a_stalled_commit_that_is_cut_never_arrives(proxy: TcpProxy, server: socket.socket) -> None:
    """Not even a part of it, and the commit is not ambiguous."""
    proxy.on("commit seen", Link.stall)
    with connected(proxy, server) as (client, upstream):
        client.sendall(b"".join(BATCH))
        proxy.wait_for("commit seen")
        assert proxy.cut_all() == 1
        assert receive(upstream, len(BATCH[0])) == BATCH[0]
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
    assert proxy.ambiguous_commits == 0
    assert proxy.hits == {"commit seen": 1, "cut_all": 1}


def test_a_commit_is_ambiguous_when_its_answer_is_lost_in_a_black_hole(proxy: TcpProxy, server: socket.socket) -> None:
    """No rule was needed; the proxy knows what was open when the connection died."""
    with connected(proxy, server) as (client, upstream):
        client.sendall(BATCH[0] + BATCH[1])
        receive(upstream, len(BATCH[0] + BATCH[1]))
        proxy.black_hole(True)
        upstream.sendall((DONE + READY) * 2)
        assert is_quiet(client)
        proxy.cut_all()
    assert proxy.ambiguous_commits == 1


@pytest.mark.parametrize("lost", [UP, DOWN])
def test_a_one_way_loss_stops_one_direction_only(proxy: TcpProxy, server: socket.socket, lost: Direction) -> None:
    """What was kept back arrives when the loss ends."""
    with connected(proxy, server) as (client, upstream):
        proxy.black_hole(True, lost)
        client.sendall(BATCH[0])
        upstream.sendall(READY)
        flowing, silent = (client, upstream) if lost == UP else (upstream, client)
        receive(flowing, len(READY if lost == UP else BATCH[0]))
        assert is_quiet(silent)
        proxy.black_hole(False, lost)
        receive(silent, len(BATCH[0] if lost == UP else READY))


def test_a_rule_acts_from_the_nth_occurrence_on_and_so_many_times(proxy: TcpProxy, server: socket.socket) -> None:
    """The second and the third of five."""
    seen: list[int] = []
    rule = proxy.on("begin seen", lambda link: seen.append(proxy.reached["begin seen"] + 1), nth=2, times=2)
    with connected(proxy, server) as (client, upstream):
        client.sendall(startup() + query(b"BEGIN") * 5)
        proxy.wait_for("begin forwarded", count=5)
        receive(upstream, len(startup() + query(b"BEGIN") * 5))
    assert seen == [2, 3]
    assert rule.done.is_set()
    assert proxy.hits == {"begin seen": 2}


def test_a_rule_that_is_healed_away_does_not_act(proxy: TcpProxy, server: socket.socket) -> None:
    """And all modes end with it; the connection goes on."""
    with connected(proxy, server) as (client, upstream):
        proxy.on("commit seen", Link.cut)
        proxy.delay(60)
        client.sendall(BATCH[0])
        assert is_quiet(upstream)
        proxy.black_hole(True)
        proxy.refuse(True)
        proxy.heal()
        client.sendall(BATCH[1])
        assert receive(upstream, len(BATCH[0] + BATCH[1])) == BATCH[0] + BATCH[1]
    with connected(proxy, server):
        pass
    assert not proxy.hits


def test_each_chunk_is_delayed(proxy: TcpProxy, server: socket.socket) -> None:
    """By the mode for all, or by a rule for the next."""
    with connected(proxy, server) as (client, upstream):
        for arm in (lambda: proxy.delay(0.2), lambda: proxy.on("begin seen", lambda link: link.delay(0.2))):
            arm()
            started = time.monotonic()
            client.sendall(BATCH[0] if proxy.chunk_delay else query(b"BEGIN"))
            receive(upstream, len(BATCH[0] if proxy.chunk_delay else query(b"BEGIN")))
            assert time.monotonic() - started >= 0.2
            proxy.delay(0)


def test_bytes_trickle_one_at_a_time(proxy: TcpProxy, server: socket.socket) -> None:
    """So many as were asked for; with a delay between them the reader sees each alone."""
    with connected(proxy, server) as (client, upstream):
        proxy.delay(0.2)
        proxy.trickle(5)
        client.sendall(BATCH[0])
        pieces: list[bytes] = []
        while len(b"".join(pieces)) < len(BATCH[0]):
            pieces.append(upstream.recv(100))
    assert b"".join(pieces) == BATCH[0]
    assert [len(piece) for piece in pieces] == [1] * 5 + [len(BATCH[0]) - 5]


def test_a_big_answer_passes_unharmed_however_slowly_it_is_read(proxy: TcpProxy, server: socket.socket) -> None:
    """Eight megabytes, far more than the buffers on the way hold, and the end of the stream after them."""
    answer = reply(b"D", os.urandom(8_000_000)) + READY
    with connected(proxy, server) as (client, upstream):
        client.sendall(startup() + query(b"SELECT 1"))
        sender = threading.Thread(target=upstream.sendall, args=(answer,))
        sender.start()
        assert receive(client, len(answer)) == answer
        upstream.close()
        assert client.recv(1) == b""
        sender.join(10)


def test_the_end_of_a_stream_comes_after_all_its_bytes(proxy: TcpProxy, server: socket.socket) -> None:
    """Half a message included: what the client sent before it died is the server's to judge."""
    with connected(proxy, server) as (client, upstream):
        client.sendall(BATCH[0] + BATCH[1][:3])
        client.close()
        assert receive(upstream, len(BATCH[0]) + 3) == BATCH[0] + BATCH[1][:3]
        assert upstream.recv(1) == b""
    proxy.wait_for("disconnected")


def test_while_the_upstream_is_down_connections_are_reset_at_once(proxy: TcpProxy, server: socket.socket) -> None:
    """Until it comes back, here at another address."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            proxy.upstream = nobody.getsockname()
            # The reset may come before connect() returns.
            with (
                pytest.raises(ConnectionResetError),
                socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
            ):
                client.recv(1)
        assert (proxy.reached["refused"], proxy.connections) == (1, 0)
        proxy.upstream = other.getsockname()
        with connected(proxy, other):
            pass


def test_a_proxy_that_refuses_is_like_a_port_without_listener(proxy: TcpProxy, server: socket.socket) -> None:
    """Standing connections go on, and the port stays the proxy's own."""
    with connected(proxy, server) as (client, upstream):
        proxy.refuse(True)
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", proxy.port))
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", proxy.port))
        client.sendall(BATCH[0])
        receive(upstream, len(BATCH[0]))
        proxy.refuse(False)
        with connected(proxy, server):
            pass


def test_a_reconnect_after_unacked_deliveries_were_lost_is_counted(server: socket.socket) -> None:
    """Once for each lost connection, and not for one that had nothing open."""
    with TcpProxy(server.getsockname(), AmqpWatcher) as proxy:
        with connected(proxy, server) as (client, upstream):
            upstream.sendall(deliver(1) + content(b"vote"))
            receive(client, len(deliver(1) + content(b"vote")))
            proxy.on("ack seen", Link.cut)
            client.sendall(ack(1))
            proxy.wait_for("unacked lost")
        assert proxy.stale_tag_reconnects == 0
        for _ in range(2):
            with connected(proxy, server):
                assert proxy.cut_all() == 1
        assert proxy.stale_tag_reconnects == 1


def test_a_moment_that_does_not_exist_is_an_error(proxy: TcpProxy) -> None:
    """A rule for it would never act and its test would prove nothing."""
    with pytest.raises(ValueError, match="no such moment"):
        proxy.on("comit seen", Link.cut)
    with pytest.raises(ValueError, match="no such moment"):
        proxy.wait_for("ack seen")


def test_waiting_has_a_deadline(proxy: TcpProxy) -> None:
    """And the error says what did not come."""
    with pytest.raises(TimeoutError, match="'commit seen': 0 of 2"):
        proxy.wait_for("commit seen", count=2, timeout=0.01)


def test_stop_leaves_neither_threads_nor_sockets(server: socket.socket) -> None:
    """Nor a connection that hangs, stalled or not, nor a port that still accepts."""
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    proxy = TcpProxy(server.getsockname(), PostgresWatcher).start()
    with connected(proxy, server) as (client, upstream):
        proxy.black_hole(True)
        client.sendall(BATCH[0])
        proxy.stop()
        proxy.stop()
        assert upstream.recv(1) == b""
        with suppress(ConnectionResetError):  # what the client sent was never read
            assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("proxy")]


# --- the proxy between the real drivers and the real servers ---


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    with LocalServices(tmp_path_factory.mktemp("services")) as services:
        yield services


@pytest.fixture
def postgres(services: LocalServices) -> Iterator[TcpProxy]:
    with closing(psycopg2.connect(services.postgres.url())) as connection, connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS vote_audit; CREATE TABLE vote_audit (vote_id int)")
    queries = QUERIES | {"insert": contains(b"INSERT INTO vote_audit")}
    with TcpProxy(("127.0.0.1", services.postgres.port), partial(PostgresWatcher, queries)) as proxy:
        yield proxy


def through(proxy: TcpProxy, url: str) -> str:
    """Return the URL of a server with the proxy in its place."""
    before, _, after = url.rpartition("@")
    return f"{before}@127.0.0.1:{proxy.port}/{after.partition('/')[2]}"


def pg_url(proxy: TcpProxy, services: LocalServices) -> str:
    return through(proxy, services.postgres.url()) + "?sslmode=disable&gssencmode=disable"


def vote(url: str) -> None:
    with closing(psycopg2.connect(url)) as connection:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO vote_audit VALUES (1)")
        connection.commit()


def rows(services: LocalServices) -> int:
    """Count the votes, past the proxy, once no other session has a transaction open."""
    with closing(psycopg2.connect(services.postgres.url())) as connection, connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '10s'; LOCK TABLE vote_audit; SELECT count(*) FROM vote_audit")
        row = cursor.fetchone()
    assert row
    return int(row[0])


def test_a_commit_whose_reply_is_lost_has_happened(postgres: TcpProxy, services: LocalServices) -> None:
    """psycopg2 reports a lost connection, and the row is there."""
    postgres.on("commit answered", Link.cut)
    with pytest.raises(psycopg2.OperationalError):
        vote(pg_url(postgres, services))
    assert rows(services) == 1
    assert postgres.ambiguous_commits == 1


def test_a_commit_that_is_not_forwarded_has_not_happened(postgres: TcpProxy, services: LocalServices) -> None:
    """psycopg2 reports the same error, and the row is not there."""
    postgres.on("commit seen", Link.cut)
    with pytest.raises(psycopg2.OperationalError):
        vote(pg_url(postgres, services))
    assert rows(services) == 0
    assert postgres.ambiguous_commits == 0


def test_the_moments_of_a_batch_come_in_order(postgres: TcpProxy, services: LocalServices) -> None:
    """As psycopg2 really talks: BEGIN, the insert and COMMIT, each seen, forwarded, answered and delivered."""
    moments: list[str] = []
    for name in ("begin", "insert", "commit"):
        for phase in ("seen", "forwarded", "answered", "delivered"):
            moment = f"{name} {phase}"
            postgres.on(moment, lambda link, moment=moment: moments.append(moment))  # type: ignore[misc]
    vote(pg_url(postgres, services))
    postgres.wait_for("disconnected")
    phases = ("seen", "forwarded", "answered", "delivered")
    assert moments == [f"{name} {phase}" for name in ("begin", "insert", "commit") for phase in phases]
    assert (rows(services), postgres.ambiguous_commits) == (1, 0)


@pytest.mark.parametrize(("moment", "expected"), [("commit seen", 0), ("commit answered", 1)])
def test_a_client_can_be_killed_at_a_step_of_its_batch(
    postgres: TcpProxy, services: LocalServices, moment: str, expected: int
) -> None:
    """SIGKILL from the action: before COMMIT is forwarded nothing is stored, before its reply arrives all is."""
    code = f"from tests.faults.test_proxy import vote; vote({pg_url(postgres, services)!r})"
    client = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])

    def kill(link: Link) -> None:
        client.kill()
        client.wait()
        link.cut()

    rule = postgres.on(moment, kill)
    assert rule.done.wait(30)
    assert client.wait() == -signal.SIGKILL
    assert rows(services) == expected
    assert postgres.ambiguous_commits == expected


def test_the_ambiguous_commits_account_for_every_row(postgres: TcpProxy, services: LocalServices) -> None:
    """Cut at random steps: what psycopg2 reported as stored is stored, and beyond that only what was ambiguous."""
    chance = random.Random(7)
    moments = [f"commit {phase}" for phase in ("seen", "forwarded", "answered", "delivered")]
    stored = 0
    for _ in range(60):
        postgres.on(chance.choice([*moments, "begin seen", "insert forwarded", "insert answered"]), Link.cut)
        with suppress(psycopg2.OperationalError):
            vote(pg_url(postgres, services))
            stored += 1
        postgres.heal()
    assert stored == postgres.hits["commit delivered"]
    assert postgres.ambiguous_commits == postgres.hits["commit forwarded"] + postgres.hits["commit answered"]
    assert stored + postgres.hits["commit answered"] <= rows(services) <= stored + postgres.ambiguous_commits


def test_a_whole_session_can_trickle(postgres: TcpProxy, services: LocalServices) -> None:
    """Byte for byte, log-in included."""
    postgres.trickle(10_000)
    vote(pg_url(postgres, services))
    assert rows(services) == 1
    assert 0 < postgres.trickle_left < 9_500


def test_a_black_hole_stalls_a_query_and_a_new_connection(postgres: TcpProxy, services: LocalServices) -> None:
    """The connection attempt runs into connect_timeout; the query waits and comes back when the hole is closed."""
    with closing(psycopg2.connect(pg_url(postgres, services))) as connection, connection.cursor() as cursor:
        postgres.black_hole(True)
        worker = threading.Thread(target=cursor.execute, args=("SELECT 1",))
        worker.start()
        with pytest.raises(psycopg2.OperationalError, match="timeout"):
            psycopg2.connect(pg_url(postgres, services) + "&connect_timeout=2")
        assert worker.is_alive()
        postgres.black_hole(False)
        worker.join(10)
        assert not worker.is_alive()
        assert cursor.fetchone() == (1,)


@pytest.fixture
def broker(services: LocalServices) -> Iterator[TcpProxy]:
    with TcpProxy(("127.0.0.1", services.rabbitmq.port), AmqpWatcher) as proxy:
        yield proxy


Channel = pika.adapters.blocking_connection.BlockingChannel


@contextmanager
def channel(url: str) -> Iterator[Channel]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        yield connection.channel()
    finally:
        if connection.is_open:
            connection.close()


@pytest.fixture
def queue(services: LocalServices, request: pytest.FixtureRequest) -> str:
    name = str(request.node.name)
    with channel(services.rabbitmq.url()) as direct:
        direct.queue_declare(name)
        for number in range(3):
            direct.basic_publish("", name, b"vote %d" % number)
    return name


def consume(url: str, queue: str, settle: Callable[[Channel, int], None], count: int = 3) -> list[tuple[bytes, bool]]:
    """Consume so many messages, call `settle` with the last tag and return (body, redelivered) of each."""
    got: list[tuple[bytes, bool]] = []
    with channel(url) as consuming:
        for method_frame, _, body in consuming.consume(queue, inactivity_timeout=10):
            assert method_frame is not None and body is not None, f"only {got} came"
            got.append((body, method_frame.redelivered))
            if len(got) == count:
                settle(consuming, method_frame.delivery_tag or 0)
                break
        consuming.connection.process_data_events(0)
    return got


def ack_all(consuming: Channel, tag: int) -> None:
    consuming.basic_ack(tag, multiple=True)
    consuming.basic_qos()  # waits for an answer, and so until the ack was read or the connection is lost


def test_an_ack_that_is_cut_leads_to_redelivery(broker: TcpProxy, services: LocalServices, queue: str) -> None:
    """All three come again with the flag, the reconnect is counted, and the ack that passes settles them."""
    url = through(broker, services.rabbitmq.url())
    broker.on("ack seen", Link.cut)
    with pytest.raises(AMQPConnectionError):
        consume(url, queue, ack_all)
    bodies = [b"vote 0", b"vote 1", b"vote 2"]
    assert consume(url, queue, ack_all) == [(body, True) for body in bodies]
    assert (broker.reached["deliver forwarded"], broker.reached["redelivery seen"]) == (6, 3)
    assert broker.stale_tag_reconnects == 1
    broker.wait_for("disconnected", count=2)
    assert (broker.reached["connection close forwarded"], broker.reached["unacked lost"]) == (1, 1)
    with channel(services.rabbitmq.url()) as direct:
        assert direct.queue_declare(queue, passive=True).method.message_count == 0


def test_a_reject_is_reached(broker: TcpProxy, services: LocalServices, queue: str) -> None:
    """It settles its delivery; the others go back to the queue when the consumer ends."""
    consume(through(broker, services.rabbitmq.url()), queue, lambda consuming, tag: consuming.basic_reject(tag, False))
    broker.wait_for("reject forwarded")
    with channel(services.rabbitmq.url()) as direct:
        assert direct.queue_declare(queue, passive=True).method.message_count == 2


def test_a_published_message_and_its_confirm_are_reached(broker: TcpProxy, services: LocalServices, queue: str) -> None:
    """A confirm that is cut leaves the publisher in doubt and the message in the queue."""
    rule = broker.on("confirm seen", Link.cut)
    with pytest.raises(AMQPConnectionError), channel(through(broker, services.rabbitmq.url())) as publishing:
        publishing.confirm_delivery()
        publishing.basic_publish("", queue, b"in doubt")
    assert rule.done.wait(10)
    assert broker.reached["publish forwarded"] == 1
    with channel(services.rabbitmq.url()) as direct:
        assert direct.queue_declare(queue, passive=True).method.message_count == 4


def test_a_whole_consumer_can_trickle(broker: TcpProxy, services: LocalServices, queue: str) -> None:
    """Handshake, deliveries and ack, byte for byte."""
    broker.trickle(100_000)
    got = consume(through(broker, services.rabbitmq.url()), queue, ack_all)
    assert [body for body, _ in got] == [b"vote 0", b"vote 1", b"vote 2"]
    assert broker.trickle_left < 99_000
