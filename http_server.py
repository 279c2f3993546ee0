"""A small HTTP server for GET and HEAD that a hostile client cannot exhaust: one thread, bounded in all it holds.

Knows no other module of the service; it is told for each path which function answers. A thread for each connection
would let a thousand silent clients hold a thousand threads: here a silent client holds a socket, for five seconds.
"""

from __future__ import annotations

import contextlib
import logging
import re
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from types import TracebackType
from typing import NamedTuple, Self

logger = logging.getLogger(__name__)

# Status, headers, body. None: there is no answer yet, ask again after ``wake``.
Answer = tuple[int, dict[str, str], bytes]
# Is given the request's headers, their names in lower case, and under QUERY what follows the ? of its target.
Route = Callable[[Mapping[str, str]], Answer | None]
QUERY = ":query"  # no header has such a name

MAX_CONNECTIONS = 512  # and at most half of the file descriptors, since the broker and the database need some
MAX_UNSENT_BYTES = 32 * 1024 * 1024  # in answers whose clients do not read them
MAX_HEAD_BYTES = 8 * 1024
MAX_HEADERS = 64
HEAD_SECONDS = 5.0  # from the connection, or from the answer before, to the end of a request's head
ANSWER_SECONDS = 10.0  # from there to the last byte of the answer
LINGER_SECONDS = 1.0  # for a client to read why it is dropped
TICK_SECONDS = 0.5
TEXT = "text/plain; charset=utf-8"
BURST = 64  # connections that are accepted in one go

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/1\.([01])")
_HEADER_NAME = re.compile(_TOKEN)
_ORIGIN = re.compile(r"https?://[^/?]*", re.IGNORECASE)  # as proxies send it before the path
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class HttpServer:
    """Serves ``routes`` (a function for each path) on all addresses. ``open`` binds the port and starts the thread.

    The functions run in the server's thread and must not wait. Where the data is not there yet they answer None; the
    request is then put again to the same function whenever ``wake`` is called, until it is answered or too old.
    """

    def __init__(
        self, port: int, routes: Mapping[str, Route], name: str, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        self._asked_port = port
        self._routes = routes
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._wake_receiver: socket.socket | None = None
        self._wake_sender: socket.socket | None = None
        # by age of the last sign of life, the oldest first
        self._connections: dict[_Connection, None] = {}
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = max_connections if descriptors < 0 else min(max_connections, descriptors // 2)  # -1: no limit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port that is listened on (another than was asked for only where that was 0)."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    def open(self) -> None:
        """Listen on all addresses. Raises OSError where the port is taken."""
        self._listener = socket.create_server(("", self._asked_port), backlog=self._limit)
        self._listener.setblocking(False)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; connections are cut. May be called more than once, and where ``open`` failed."""
        self._stopping.set()
        if self._thread.is_alive():
            self.wake()
            self._thread.join()
        for opened in (self._listener, self._wake_receiver, self._wake_sender):
            if opened is not None:
                opened.close()

    def wake(self) -> None:
        """Ask again for the answers that were not there yet. Any thread may call this."""
        if self._wake_sender is not None:
            with contextlib.suppress(OSError):  # full: it will wake all the same; closed: nobody waits
                self._wake_sender.send(b"\0")

    def _run(self) -> None:
        next_sweep = 0.0
        while not self._stopping.is_set():
            for key, _ in self._selector.select(TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_receiver:
                    self._on_wake()
                elif key.data in self._connections:  # not dropped a moment ago for another one
                    self._attend(key.data)
            if (now := time.monotonic()) >= next_sweep:
                next_sweep = now + TICK_SECONDS
                self._drop_overdue(now)
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(BURST):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:  # the client is gone again, or the process is out of descriptors
                logger.debug("connection not accepted", extra={"fields": {"error": exc.strerror}})
                self._stopping.wait(0.05)  # else the same error comes back at once, and again
                return
            if len(self._connections) >= self._limit:
                self._drop(next(iter(self._connections)))
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock, time.monotonic() + HEAD_SECONDS)
            self._connections[connection] = None
            self._selector.register(sock, selectors.EVENT_READ, connection)

    def _on_wake(self) -> None:
        assert self._wake_receiver is not None
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        for connection in [connection for connection in self._connections if connection.request is not None]:
            if connection in self._connections:  # not dropped a moment ago for another one
                self._attend(connection)

    def _attend(self, connection: _Connection) -> None:
        """Do what can be done for this connection without waiting."""
        try:
            goes_on = self._serve(connection)
        except BlockingIOError:
            goes_on = True
        except OSError:
            goes_on = False
        except Exception:
            logger.exception("http request failed")  # a bug in one answer must not silence the others
            goes_on = False
        if not goes_on:
            self._drop(connection)
            return
        events = connection.events()
        if events != connection.registered:
            if connection.registered:
                self._selector.unregister(connection.sock)
            if events:
                self._selector.register(connection.sock, events, connection)
            connection.registered = events

    def _serve(self, connection: _Connection) -> bool:
        """Read, answer, write, as far as it goes. Returns whether the connection goes on."""
        if not connection.unsent:
            if connection.request is None:
                received = connection.sock.recv(MAX_HEAD_BYTES)
                if not received:
                    return False
                connection.received += received
                self._read_head(connection)
            if connection.request is not None:
                self._answer(connection, connection.request)
            if not connection.unsent:
                return True  # the rest of the head, or the data, has to come first
        if not connection.send():
            self._make_room(connection)
            return True
        if connection.closes:
            return self._linger(connection)
        connection.due = time.monotonic() + HEAD_SECONDS
        return True

    def _read_head(self, connection: _Connection) -> None:
        """Make a request of what was received, once it is a whole head; or put an answer that refuses it."""
        head, end, rest = bytes(connection.received).partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            connection.put(_refusal(431), closes=True)
        elif end:
            connection.received.clear()
            connection.due = time.monotonic() + ANSWER_SECONDS
            self._connections[connection] = self._connections.pop(connection)  # a sign of life
            parsed = self._parse(head.decode("latin-1"), followed_by_more=bool(rest))
            if isinstance(parsed, _Request):
                connection.request = parsed
            else:
                connection.put(parsed, closes=True)

    def _parse(self, head: str, followed_by_more: bool) -> _Request | Answer:
        """The request that ``head`` is, or the answer that refuses it."""
        first, *lines = head.split("\r\n")
        if len(lines) > MAX_HEADERS:
            return _refusal(431)
        request, headers = _REQUEST_LINE.fullmatch(first), _headers(lines)
        hosts = sum(line[:5].lower() == "host:" for line in lines)
        if request is None or headers is None or hosts > 1 or (request[3] == "1" and not hosts):
            return _refusal(400)
        if request[1] not in ("GET", "HEAD"):
            return _refusal(405, Allow="GET, HEAD")
        target, origin = request[2], _ORIGIN.match(request[2])
        path, _, query = (target if origin is None else target[origin.end() :]).partition("?")
        if origin is not None:
            path = path or "/"
        headers[QUERY] = query
        route = self._routes.get(path, self._not_found)
        # whatever follows a head is a body, or a request sent too early: neither is read
        has_body = followed_by_more or "content-length" in headers or "transfer-encoding" in headers
        closes = has_body or request[3] == "0" or "close" in headers.get("connection", "").lower()
        return _Request(route, headers, request[1] == "HEAD", closes)

    def _answer(self, connection: _Connection, request: _Request) -> None:
        answer = request.route(request.headers)
        if answer is not None:
            connection.request = None
            connection.put(answer, closes=request.closes, sends_body=not request.is_head)

    def _not_found(self, _headers: Mapping[str, str]) -> Answer:
        return 404, {"Content-Type": TEXT}, f"paths: {' '.join(self._routes)}\n".encode()

    def _linger(self, connection: _Connection) -> bool:
        """Say that no more is coming, and leave the client a moment to read it.

        Closed at once with something of the client's unread, the connection would be reset, and the answer lost.
        """
        if connection.lingers:
            return False
        connection.sock.shutdown(socket.SHUT_WR)
        connection.lingers = True
        connection.due = time.monotonic() + LINGER_SECONDS
        return True

    def _make_room(self, latest: _Connection) -> None:
        """Drop those who have not read their answer for longest, while all together hold too much of our memory."""
        waiting = [connection for connection in self._connections if connection.unsent and connection is not latest]
        while waiting and _held_bytes([*waiting, latest]) > MAX_UNSENT_BYTES:
            self._drop(waiting.pop(0))

    def _drop_overdue(self, now: float) -> None:
        for connection in [connection for connection in self._connections if connection.due <= now]:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
        if connection.registered:
            self._selector.unregister(connection.sock)
        connection.sock.close()


class _Request(NamedTuple):
    """A request that is not answered yet."""

    route: Route
    headers: Mapping[str, str]
    is_head: bool
    closes: bool  # the connection, after the answer


class _Connection:
    """One client: what came of its request, what is to be sent, and until when."""

    def __init__(self, sock: socket.socket, due: float) -> None:
        self.sock = sock
        self.due = due
        self.received = bytearray()
        self.request: _Request | None = None
        self.unsent: list[memoryview] = []
        self.closes = False  # after what is unsent
        self.lingers = False
        self.registered = selectors.EVENT_READ

    def events(self) -> int:
        """What to wait for. While an answer is under way nothing more is read, so that the client cannot fill us."""
        if self.unsent:
            return selectors.EVENT_WRITE
        return 0 if self.request is not None or self.lingers else selectors.EVENT_READ

    def put(self, answer: Answer, *, closes: bool, sends_body: bool = True) -> None:
        status, headers, body = answer
        self.closes = closes
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Date: {formatdate(usegmt=True)}",
            "X-Content-Type-Options: nosniff",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if status != HTTPStatus.NOT_MODIFIED:
            lines.append(f"Content-Length: {len(body)}")
        if closes:
            lines.append("Connection: close")
        self.unsent = [memoryview("\r\n".join([*lines, "", ""]).encode("latin-1"))]
        if body and sends_body and status != HTTPStatus.NOT_MODIFIED:
            self.unsent.append(memoryview(body))  # not copied: a thousand slow readers share it

    def send(self) -> bool:
        """Send what the socket takes; whether that was all."""
        sent = self.sock.sendmsg(self.unsent)
        while self.unsent and sent >= len(self.unsent[0]):
            sent -= len(self.unsent.pop(0))
        if self.unsent:
            self.unsent[0] = self.unsent[0][sent:]
        return not self.unsent


def _held_bytes(connections: list[_Connection]) -> int:
    """The memory of all that is to be sent; what is sent to many is one object."""
    held = {id(part.obj): memoryview(part.obj).nbytes for connection in connections for part in connection.unsent}
    return sum(held.values())


def _headers(lines: list[str]) -> dict[str, str] | None:
    """The headers by their names in lower case, or None where one is no header."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _HEADER_NAME.fullmatch(name) or _CONTROL.search(value):
            return None
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _refusal(status: int, **headers: str) -> Answer:
    return status, {"Content-Type": TEXT, **headers}, f"{HTTPStatus(status).phrase}\n".encode()
