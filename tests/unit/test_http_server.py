"""The HTTP server on a loopback port: what it answers, and what a hostile client cannot do to it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest

import http_server
from http_server import QUERY, Answer, HttpServer
from tests.harness import wait_until

BIG = b"x" * 30_000_000


class Later:
    """A route whose data is not there before ``ready``."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.ready = False

    def __call__(self, headers: Mapping[str, str]) -> Answer | None:
        self.asked.set()
        return (200, {}, b"at last") if self.ready else None


def fail(headers: Mapping[str, str]) -> Answer:
    raise ZeroDivisionError


@pytest.fixture
def server() -> Iterator[HttpServer]:
    """With a page that tells the header X-Test, a big one, one that fails, and one that waits."""
    routes = {
        "/": lambda headers: (200, {"Content-Type": "text/plain"}, headers.get("x-test", "hello").encode()),
        "/big": lambda headers: (200, {}, BIG),
        "/same": lambda headers: (304, {"ETag": '"1"'}, b""),
        "/fails": fail,
        "/later": Later(),
    }
    with HttpServer(0, routes, "test-http") as server:
        server.open()
        yield server


@contextlib.contextmanager
def connected(server: HttpServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65_536), b""))


def send(server: HttpServer, raw: bytes) -> bytes:
    """All that comes back, until the server closes."""
    with connected(server) as client:
        client.sendall(raw)
        return read_all(client)


def get(server: HttpServer, path: str = "/", headers: str = "") -> bytes:
    return send(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed it; it may have sent something before that."""
    client.setblocking(False)
    try:
        return any(client.recv(65_536) == b"" for _ in range(2))
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_a_path_answers_with_its_body() -> None:
    """And sees the request's headers."""
    routes = {
        "/": lambda headers: (200, {"X-Own": "1"}, headers["x-test"].encode()),
        "/asked": lambda headers: (200, {}, headers[QUERY].encode()),
    }
    with HttpServer(0, routes, "test-http") as server:
        server.open()
        for target, query in (
            ("/asked", b""),
            ("/asked?", b""),
            ("/asked?a=b&c?d", b"a=b&c?d"),
            ("http://h/asked?x", b"x"),
        ):
            assert get(server, target, "").partition(b"\r\n\r\n")[2] == query
        assert get(server, "/asked?a", ":query: y\r\n").startswith(b"HTTP/1.1 400 ")
        head, _, body = get(server, "/?query", "X-Test: a\r\nx-TEST:  b \r\n").partition(b"\r\n\r\n")
    assert body == b"a, b"
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    for line in (b"X-Own: 1", b"Content-Length: 4", b"X-Content-Type-Options: nosniff", b"Connection: close"):
        assert line in head.split(b"\r\n")


def test_head_gets_the_headers_of_get_and_no_body(server: HttpServer) -> None:
    """With the length that the body would have."""
    answer = send(server, b"HEAD /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: 30000000" in head
    assert body == b""


def test_a_304_has_no_body_and_no_length(server: HttpServer) -> None:
    """A length of 0 would be a lie about the body that the client has."""
    answer = get(server, "/same")
    assert answer.startswith(b"HTTP/1.1 304 ")
    assert b"Content-Length" not in answer


@pytest.mark.parametrize(
    "method",
    ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "BREW", "get", "Head", "M-SEARCH", "GETGET"],
)
@pytest.mark.parametrize("path", ["/", "/nowhere", "*"])
def test_any_other_method_is_405(server: HttpServer, method: str, path: str) -> None:
    """Which names those that are allowed."""
    answer = send(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc".encode())
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in answer


@pytest.mark.parametrize(
    "path",
    [
        *("/x", "//", "/../etc/passwd", "/results", "/%2e%2e/", "/INDEX", "/#/", "/;a=b", "/big/", "/%62ig", "/./big"),
        *("*", "big", "?", "x:80", "http:///../big", "http://x/nowhere", "ftp://x/", "http:/", "//x/big"),
    ],
)
def test_any_other_path_is_404(server: HttpServer, path: str) -> None:
    """There are no files behind this."""
    assert get(server, path).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n",
        b"GET / / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n: empty\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rSet-Cookie: b\r\n\r\n",
        b"GE\x00T / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded: line\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b" " * 7_000 + b"\x01\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_a_bad_request_is_400(server: HttpServer, raw: bytes) -> None:
    """And the next client is served."""
    assert send(server, raw).startswith(b"HTTP/1.1 400 ")
    assert get(server).endswith(b"hello")


@pytest.mark.parametrize("target", ["/?x=/big", "http://x", "HTTP://x:80/", "https://x?a=/big", "http://u@x/?"])
def test_the_target_may_have_a_query_and_name_its_origin(server: HttpServer, target: str) -> None:
    """As a proxy may send it."""
    assert get(server, target).endswith(b"hello")


def test_endless_headers_are_refused(server: HttpServer) -> None:
    """By their size, though no head ever ends, and by their number."""
    endless = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 12_000
    assert send(server, endless).startswith(b"HTTP/1.1 431 ")
    many = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 64 + b"\r\n"
    assert send(server, many).startswith(b"HTTP/1.1 431 ")
    assert get(server).endswith(b"hello")


def test_a_connection_serves_one_request_after_the_other(server: HttpServer) -> None:
    """As browsers and Prometheus use it."""
    with connected(server) as client:
        for text in (b"one", b"two", b"three"):
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Test: %b\r\n\r\n" % text)
            answer = b""
            while not answer.endswith(text):
                received = client.recv(4_096)
                assert received
                answer += received
            assert b"Connection: close" not in answer


def test_a_body_is_not_taken_for_the_next_request(server: HttpServer) -> None:
    """A request smuggled in it would be answered to somebody else behind a proxy."""
    smuggled = b"GET / HTTP/1.1\r\nHost: x\r\nX-Test: smuggled\r\n\r\n"
    for header in (b"Content-Length: %d" % len(smuggled), b"Transfer-Encoding: chunked"):
        head = b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % header
        answer = send(server, head + smuggled)
        assert answer.endswith(b"hello")
        assert answer.count(b"HTTP/1.1 200") == 1
        with connected(server) as client:  # the body comes later
            client.sendall(head)
            answer = client.recv(4_096)
            with contextlib.suppress(ConnectionError):
                client.sendall(smuggled)
                answer += read_all(client)
            assert answer.endswith(b"hello")


def test_a_request_sent_too_early_is_not_answered(server: HttpServer) -> None:
    """Of a pipeline the first request is answered, and the connection closed: the client sends the rest again."""
    answer = send(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"Connection: close" in answer
    assert answer.endswith(b"hello")


def test_a_head_may_come_byte_by_byte(server: HttpServer) -> None:
    """As long as it comes in time."""
    with connected(server) as client:
        for byte in b"GET / HTTP/1.0\r\n\r\n":
            client.sendall(bytes([byte]))
        assert read_all(client).endswith(b"hello")


def test_a_bug_in_one_answer_leaves_the_others(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    """The connection is cut, the bug logged."""
    assert get(server, "/fails") == b""
    assert get(server).endswith(b"hello")
    assert "http request failed" in caplog.text


def test_a_silent_or_slow_client_is_cut_after_its_time(monkeypatch: pytest.MonkeyPatch, server: HttpServer) -> None:
    """Also one that keeps sending a byte: the time is for the whole head."""
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.5)
    with connected(server) as silent, connected(server) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nX")

        def slow_is_cut() -> bool:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                slow.sendall(b"-")
            return is_closed(slow)

        wait_until(slow_is_cut, "the slow client is cut")
        wait_until(lambda: is_closed(silent), "the silent client is cut")
    assert get(server).endswith(b"hello")


def test_a_client_that_does_not_read_is_cut_after_its_time(monkeypatch: pytest.MonkeyPatch, server: HttpServer) -> None:
    """What it has not read is let go of; the others do not wait for it."""
    monkeypatch.setattr(http_server, "ANSWER_SECONDS", 0.5)
    with connected(server) as client:
        client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        assert get(server).endswith(b"hello")
        wait_until(lambda: not server._connections, "the client is cut")
        assert len(read_all_of(client)) < len(BIG)


def test_clients_that_do_not_read_hold_little_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each answer is made for one client alone, those who have not read for longest make room."""
    monkeypatch.setattr(http_server, "MAX_UNSENT_BYTES", 3 * len(BIG))
    routes = {"/own": lambda headers: (200, {}, bytes(len(BIG))), "/": lambda headers: (200, {}, b"hello")}
    with HttpServer(0, routes, "test-http") as server, contextlib.ExitStack() as stack:
        server.open()
        clients = [stack.enter_context(connected(server)) for _ in range(6)]
        for client in clients:
            client.sendall(b"GET /own HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1) == b"H"
        wait_until(lambda: len(server._connections) == 3, "the other three are cut")
        assert not is_closed(clients[-1])
        assert get(server).endswith(b"hello")
        assert len(read_all_of(clients[0])) < len(BIG)


def test_many_who_do_not_read_share_one_answer(monkeypatch: pytest.MonkeyPatch, server: HttpServer) -> None:
    """It is held once, so that none need go."""
    monkeypatch.setattr(http_server, "MAX_UNSENT_BYTES", 2 * len(BIG))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(6)]
        for client in clients:
            client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1) == b"H"
        assert len(server._connections) == 6


def read_all_of(client: socket.socket) -> bytes:
    """What is left to read of a connection that was cut."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1_000_000):
            received += part
    return received


def test_a_big_answer_comes_whole_to_one_who_reads(server: HttpServer) -> None:
    """Though no socket takes it at once."""
    assert get(server, "/big").endswith(b"\r\n\r\n" + BIG)


def test_more_connections_than_the_limit_cost_the_oldest(server: HttpServer) -> None:
    """A newcomer is served whatever the silent ones hold, and they hold no thread."""
    threads = threading.active_count()
    server._limit = 50
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(200)]
        assert get(server).endswith(b"hello")
        assert threading.active_count() == threads
        assert len(server._connections) <= 50
        wait_until(lambda: is_closed(clients[0]), "the oldest is cut")
        clients[-1].setblocking(True)
        clients[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert read_all(clients[-1]).endswith(b"hello")


def test_an_answer_that_is_not_there_yet_is_sent_when_it_is(server: HttpServer) -> None:
    """Others are served meanwhile."""
    later = server._routes["/later"]
    assert isinstance(later, Later)
    with connected(server) as client:
        client.sendall(b"GET /later HTTP/1.0\r\n\r\n")
        assert later.asked.wait(20)
        assert get(server).endswith(b"hello")
        later.ready = True
        server.wake()
        assert read_all(client).endswith(b"at last")


@pytest.mark.parametrize(("descriptors", "limit"), [(-1, 512), (1_048_576, 512), (1_024, 512), (256, 128)])
def test_the_limit_leaves_descriptors_for_the_servers(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, limit: int
) -> None:
    """-1 stands for as many as you like."""
    monkeypatch.setattr("http_server.resource.getrlimit", lambda _: (descriptors, descriptors))
    assert HttpServer(0, {}, "test-http")._limit == limit


def test_a_taken_port_is_an_error() -> None:
    """Not a second listener that nobody asks."""
    with socket.create_server(("", 0)) as taken:
        server = HttpServer(taken.getsockname()[1], {}, "test-http")
        with server, pytest.raises(OSError, match="in use"):
            server.open()


def test_an_idle_server_does_nothing(monkeypatch: pytest.MonkeyPatch, server: HttpServer) -> None:
    """No event that stays, and turns the loop round and round."""
    turns = 0
    select: Callable[..., object] = selectors.DefaultSelector.select
    enough = threading.Event()

    def counted(*arguments: object) -> object:
        nonlocal turns
        turns += 1
        if turns > 200:
            enough.set()
        return select(*arguments)

    later = server._routes["/later"]
    assert isinstance(later, Later)
    with connected(server) as waiting, connected(server):
        waiting.sendall(b"GET /later HTTP/1.0\r\n\r\n")
        assert later.asked.wait(20)
        monkeypatch.setattr(selectors.DefaultSelector, "select", counted)
        assert not enough.wait(1.0)
