"""A TCP proxy that knows which step of a batch the service is in, and breaks things exactly there.

It stands between a real service process and a real PostgreSQL or RabbitMQ. The service has no hook for tests; where
it stands is read off the wire. A watcher cuts each byte stream into whole messages and names the *moments* a test
may care about; the proxy forwards message by message, so it can act exactly between two of them:

    with TcpProxy(("127.0.0.1", 5432), PostgresWatcher) as proxy:
        rule = proxy.on("commit answered", Link.cut)  # COMMIT has happened, its reply never arrives
        ...
        assert rule.done.wait(30)

A moment is a name and a phase:

| phase     | stream           | the proxy is about to, or has just                                              |
|-----------|------------------|---------------------------------------------------------------------------------|
| seen      | AMQP, SQL query  | about to forward this message; everything before it was forwarded               |
| forwarded | AMQP, SQL query  | the whole message was handed to the kernel; the peer need not have read it      |
| answered  | SQL query        | the server has answered completely; nothing of its answer was forwarded         |
| delivered | SQL query        | the whole answer was handed to the client's kernel                              |

SQL names: begin, votes, commit, rollback (see QUERIES). AMQP names: see METHODS, and
"redelivery" for a delivery with its redelivered flag set, "returned N" for one that a quorum queue has got back N
times. Every connection also has the moments "connected" and "disconnected". Moments that only the proxy can know of:
"refused" (the upstream was down), "ambiguous commit" (a connection died between its COMMIT and the reply), "unacked
lost" (a connection died with deliveries unacked), "stale tag reconnect" (a new connection was made after that) and
"second batch seen" (about to forward votes while another connection writes a batch).

TCP never loses bytes in the middle of a stream, so loss is a stall here: bytes are kept back, and arrive late if the
stall is lifted before the connection is cut.
"""

import re
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Direction = Literal["up", "down"]
UP: Direction = "up"  # from the client, our service, to the server
DOWN: Direction = "down"
BOTH: tuple[Direction, ...] = (UP, DOWN)

AT_ONCE = "second batch seen"
CONNECTION_MOMENTS = {
    "connected", "disconnected", "refused", "ambiguous commit", "unacked lost", "stale tag reconnect", AT_ONCE,
}  # fmt: skip


@dataclass(slots=True)
class Message:
    """Bytes that are forwarded as one, the moments around them, and what their watcher notes once they are out."""

    data: bytes
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    forwarded: Callable[[], None] | None = None


class Watcher(Protocol):
    """What the proxy asks of a protocol; one instance per connection."""

    moments: set[str]

    def feed(self, direction: Direction, data: bytes) -> list[Message]:
        """Take bytes as they came and return the messages they complete, in order."""

    def rest(self, direction: Direction) -> bytes:
        """Return, once a stream has ended, what was kept for a message that will never be complete."""

    def lost(self) -> str:
        """Return the moment to note if the connection died now, or "" if nothing was pending."""


def contains(words: bytes) -> Callable[[bytes], bool]:
    """Return a predicate: does the SQL contain these words, in any case and with any white space between them?"""
    pattern = re.compile(rb"\b" + rb"\s+".join(map(re.escape, words.split())) + rb"\b", re.IGNORECASE)
    return lambda sql: pattern.search(sql) is not None


def starts_with(words: bytes) -> Callable[[bytes], bool]:
    """Return a predicate like that of `contains`, for the beginning of the SQL."""
    pattern = re.compile(rb"\s*" + rb"\s+".join(map(re.escape, words.split())) + rb"\b", re.IGNORECASE)
    return lambda sql: pattern.match(sql) is not None


# BEGIN, COMMIT and ROLLBACK only at the start: elsewhere the word may be part of a rejected message's body.
QUERIES: dict[str, Callable[[bytes], bool]] = {
    # not of what prepares the call of a batch: that is no batch
    "begin": lambda sql: starts_with(b"BEGIN")(sql) and not contains(b"PREPARE count_batch")(sql),
    "votes": lambda sql: contains(b"count_batch")(sql) and not contains(b"PREPARE count_batch")(sql),
    "commit": starts_with(b"COMMIT"),
    "rollback": starts_with(b"ROLLBACK"),
}


class PostgresWatcher:
    """Names the simple queries of a PostgreSQL connection and their answers; all else passes unnamed.

    psycopg2 sends everything as simple queries. One query may have several names, e.g. that which begins a
    transaction and writes a batch at once. `queries` maps names to predicates on the SQL text; "commit" has a meaning
    of its own here.
    """

    ENCRYPTION_REQUESTS = (struct.pack("!I", 80877103), struct.pack("!I", 80877104))  # SSLRequest, GSSENCRequest

    def __init__(self, queries: dict[str, Callable[[bytes], bool]] = QUERIES) -> None:
        self.moments = {
            f"{name} {phase}" for name in queries for phase in ("seen", "forwarded", "answered", "delivered")
        }
        self._queries = queries
        self._buffers = {UP: bytearray(), DOWN: bytearray()}
        self._starting = True  # the startup packets are the only ones without a type byte
        self._asked_encryption = False
        self._encrypted = False
        self._asked: deque[tuple[str, ...]] = deque()  # the names of each query that is still to be answered
        self._answer = bytearray()  # what has come so far of the answer to a named query
        self._commits_open = 0  # forwarded, and the answer not yet delivered

    def feed(self, direction: Direction, data: bytes) -> list[Message]:
        """See Watcher."""
        buffer = self._buffers[direction]
        buffer += data
        messages = []
        if direction == DOWN and self._asked_encryption and buffer:
            # The answer to SSLRequest is one bare byte; N(o) means that a plain startup packet follows.
            self._asked_encryption = False
            self._encrypted = buffer[:1] != b"N"
            messages.append(Message(bytes(buffer[:1])))
            del buffer[:1]
        if self._encrypted:
            return [*messages, Message(self.rest(direction))]
        while packet := self._take(buffer, typed=direction == DOWN or not self._starting):
            messages += self._from_client(packet) if direction == UP else self._from_server(packet)
        return messages

    def rest(self, direction: Direction) -> bytes:
        """See Watcher."""
        buffer = self._buffers[direction]
        kept = bytes(self._answer + buffer) if direction == DOWN else bytes(buffer)
        buffer.clear()
        if direction == DOWN:
            self._answer.clear()
        return kept

    def lost(self) -> str:
        """See Watcher."""
        return "ambiguous commit" if self._commits_open else ""

    @staticmethod
    def _take(buffer: bytearray, typed: bool) -> bytes:
        length_at = 1 if typed else 0
        if len(buffer) < length_at + 4:
            return b""
        length = int.from_bytes(buffer[length_at : length_at + 4])
        if length < 4:
            raise ValueError(f"this is not the PostgreSQL protocol: {bytes(buffer[:20])!r}")
        if len(buffer) < length_at + length:
            return b""
        packet = bytes(buffer[: length_at + length])
        del buffer[: length_at + length]
        return packet

    def _from_client(self, packet: bytes) -> list[Message]:
        if self._starting:
            self._asked_encryption = packet[4:8] in self.ENCRYPTION_REQUESTS
            self._starting = self._asked_encryption
        elif packet[:1] == b"Q":
            names = tuple(name for name, matches in self._queries.items() if matches(packet[5:-1]))
            self._asked.append(names)
            note = self._commit_forwarded if "commit" in names else None
            return [Message(packet, _moments(names, "seen"), _moments(names, "forwarded"), note)]
        elif packet[:1] in b"SF":  # Sync and FunctionCall: these too are answered with a ReadyForQuery
            self._asked.append(())
        return [Message(packet)]

    def _from_server(self, packet: bytes) -> list[Message]:
        names = self._asked[0] if self._asked else ()
        is_complete = packet[:1] == b"Z"
        if is_complete and self._asked:
            self._asked.popleft()
        if not names:
            return [Message(packet)]
        # Kept together until it is complete, so that "answered" can mean that the client has seen none of it.
        self._answer += packet
        if not is_complete:
            return []
        note = self._commit_delivered if "commit" in names else None
        answer = bytes(self._answer)
        self._answer.clear()
        return [Message(answer, _moments(names, "answered"), _moments(names, "delivered"), note)]

    def _commit_forwarded(self) -> None:
        self._commits_open += 1

    def _commit_delivered(self) -> None:
        self._commits_open -= 1


# x-delivery-count in the header of a delivery: how often a quorum queue has got the message back
RETURNS = re.compile(rb"\x10x-delivery-countl(.{8})", re.DOTALL)
MOST_RETURNS = 99

METHODS: dict[tuple[Direction, int, int], str] = {
    (UP, 10, 50): "connection close",
    (DOWN, 10, 50): "connection close",
    (UP, 20, 40): "channel close",
    (DOWN, 20, 40): "channel close",
    (UP, 60, 20): "consume",
    (UP, 60, 30): "cancel",
    (UP, 60, 40): "publish",
    (DOWN, 60, 60): "deliver",
    (UP, 60, 80): "ack",
    (DOWN, 60, 80): "confirm",
    (UP, 60, 90): "reject",
    (UP, 60, 120): "nack",
}


class AmqpWatcher:
    """Names the methods of an AMQP 0-9-1 connection that concern deliveries, and keeps the tags that are unacked.

    "deliver" and "publish" are seen before their method frame and forwarded after the last frame of their body.
    """

    METHOD, HEADER, BODY = 1, 2, 3
    FRAME_OVERHEAD = 8  # type, channel and size before the payload, the end mark after it

    def __init__(self) -> None:
        names = {*METHODS.values(), "redelivery"}
        self.moments = {f"{name} {phase}" for name in names for phase in ("seen", "forwarded")}
        self.moments |= {f"returned {returns}" for returns in range(1, MOST_RETURNS + 1)}
        self.unacked: set[tuple[int, int]] = set()  # (channel, delivery tag), as far as they were forwarded
        self._buffers = {UP: bytearray(), DOWN: bytearray()}
        self._bodies: dict[tuple[Direction, int], tuple[tuple[str, ...], int]] = {}  # names, bytes still to come

    def feed(self, direction: Direction, data: bytes) -> list[Message]:
        """See Watcher."""
        buffer = self._buffers[direction]
        buffer += data
        messages = []
        while len(buffer) >= self.FRAME_OVERHEAD:
            if buffer.startswith(b"AMQP"):  # the protocol header, the only thing that is no frame
                messages.append(Message(bytes(buffer[:8])))
                del buffer[:8]
                continue
            kind, channel, size = struct.unpack_from("!BHI", buffer)
            end = size + self.FRAME_OVERHEAD
            if len(buffer) < end:
                break
            if buffer[end - 1] != 0xCE:
                raise ValueError(f"this is not AMQP 0-9-1: {bytes(buffer[:20])!r}")
            frame = bytes(buffer[:end])
            del buffer[:end]
            if kind == self.METHOD:
                messages.append(self._method(direction, channel, frame))
            else:
                messages.append(Message(frame, after=self._content(direction, kind, channel, frame)))
        return messages

    def rest(self, direction: Direction) -> bytes:
        """See Watcher."""
        kept = bytes(self._buffers[direction])
        self._buffers[direction].clear()
        return kept

    def lost(self) -> str:
        """See Watcher."""
        return "unacked lost" if self.unacked else ""

    def _method(self, direction: Direction, channel: int, frame: bytes) -> Message:
        arguments = memoryview(frame)[11:-1]
        name = METHODS.get((direction, *struct.unpack_from("!HH", frame, 7)), "")
        names: tuple[str, ...] = (name,) if name else ()
        note: Callable[[], None] | None = None
        if name == "deliver":
            tag, redelivered = struct.unpack_from("!QB", arguments, 1 + arguments[0])  # after the consumer tag
            names = ("deliver", "redelivery") if redelivered else names
            note = partial(self.unacked.add, (channel, tag))
        elif name in ("ack", "nack", "reject"):
            tag, flags = struct.unpack_from("!QB", arguments)
            multiple = bool(flags & 1) and name != "reject"  # a reject's only flag is requeue
            note = partial(self._settle, channel, tag, multiple)
        elif name == "channel close":
            note = partial(self._settle, channel, 0, True)
        elif name == "connection close":
            note = self.unacked.clear  # closed in good order: that is no lost connection
        if name in ("deliver", "publish"):
            self._bodies[direction, channel] = (names, 0)
            return Message(frame, _moments(names, "seen"), (), note)
        return Message(frame, _moments(names, "seen"), _moments(names, "forwarded"), note)

    def _settle(self, channel: int, tag: int, multiple: bool) -> None:
        if multiple:  # tag 0 stands for all of the channel
            self.unacked -= {(c, t) for c, t in self.unacked if c == channel and (tag == 0 or t <= tag)}
        else:
            self.unacked.discard((channel, tag))

    def _content(self, direction: Direction, kind: int, channel: int, frame: bytes) -> tuple[str, ...]:
        names, missing = self._bodies.get((direction, channel), ((), 0))
        if kind == self.HEADER:
            missing = int.from_bytes(frame[11:19])
            if found := RETURNS.search(frame):
                names += (f"returned {min(int.from_bytes(found[1]), MOST_RETURNS)}",)
        elif kind == self.BODY:
            missing -= len(frame) - self.FRAME_OVERHEAD
        else:  # a heartbeat
            return ()
        if missing > 0:
            self._bodies[direction, channel] = (names, missing)
            return ()
        self._bodies.pop((direction, channel), None)
        return tuple(name if name.startswith("returned ") else f"{name} forwarded" for name in names)


def _moments(names: tuple[str, ...], phase: str) -> tuple[str, ...]:
    return tuple(f"{name} {phase}" for name in names)


def _reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Link:
    """One client's connection through the proxy. A rule's action gets the link and runs in the proxy's thread."""

    def __init__(self, proxy: "TcpProxy", client: socket.socket, server: socket.socket, watcher: Watcher) -> None:
        self.proxy = proxy
        self.watcher = watcher
        self.stalled: set[Direction] = set()
        self.is_closed = False
        self.is_writing = False  # a batch: its votes were seen, and the answer to its end is not out
        self.sockets = (client, server)
        self.pipes = (_Pipe(self, UP, client, server), _Pipe(self, DOWN, server, client))

    def cut(self) -> None:
        """Reset both connections, now: nothing that was not yet forwarded ever will be."""
        for sock in self.sockets if not self.is_closed else ():
            _reset_on_close(sock)
        self.close()

    def stall(self, *directions: Direction) -> None:
        """Keep all bytes back from here on, of both directions or the given one, until `TcpProxy.release` or a cut.

        The end of the stream is kept back too: a peer does not learn that the other has died.
        """
        self.stalled.update(directions or BOTH)

    def delay(self, seconds: float) -> None:
        """Let the next bytes of each direction wait."""
        for pipe in self.pipes:
            pipe.not_before = time.monotonic() + seconds

    def others_writing(self) -> list["Link"]:
        """The other connections on which a batch is being written."""
        return [link for link in self.proxy.links if link.is_writing and link is not self]

    def close(self) -> None:
        """Close both connections in good order and note what was lost by it."""
        if self.is_closed:
            return
        self.is_closed = True
        if moment := self.watcher.lost():
            self.proxy.note(moment)  # before a peer can know, so that a test which hears of it there finds it counted
        for sock in self.sockets:
            self.proxy.watch(sock, 0, self)
            sock.close()
        self.proxy.links.remove(self)
        self.proxy.note("disconnected")

    def read(self, sock: socket.socket) -> None:
        """Take in what one of the sockets has to offer."""
        if not self.is_closed:
            self.pipes[self.sockets.index(sock)].read()

    def pump(self) -> None:
        """Forward what may be forwarded, and tell the selector what the link waits for."""
        for pipe in self.pipes:
            pipe.pump()
        up, down = self.pipes
        for source, sink in ((up, down), (down, up)) if not self.is_closed else ():
            read = selectors.EVENT_READ if source.wants_bytes() else 0
            write = selectors.EVENT_WRITE if sink.is_choked else 0
            self.proxy.watch(source.source, read | write, self)


class _Pipe:
    """One direction of a link. It reads only when all it has read before is forwarded; TCP holds up the sender."""

    CHUNK = 65536

    def __init__(self, link: Link, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self.link = link
        self.proxy = link.proxy
        self.direction = direction
        self.source = source
        self.sink = sink
        self.queue: deque[Message] = deque()
        self.out = bytearray()  # what may go out, up to the next moment that a rule waits for
        self.out_messages: list[Message] = []
        self.not_before = 0.0
        self.is_choked = False  # the sink's buffer is full
        self.has_ended = False

    def is_stalled(self) -> bool:
        return self.direction in self.link.stalled or self.direction in self.proxy.stalled

    def wants_bytes(self) -> bool:
        return not (self.queue or self.out or self.has_ended)

    def read(self) -> None:
        try:
            data = self.source.recv(self.CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a reset; what came before it is still forwarded
        if data:
            self.queue.extend(self.link.watcher.feed(self.direction, data))
            return
        self.has_ended = True
        self.queue.append(Message(self.link.watcher.rest(self.direction)))

    def pump(self) -> None:
        while not self.link.is_closed and not self.is_stalled():
            if not self.out and self.queue:
                self._fill()
                self.not_before = max(self.not_before, time.monotonic() + self.proxy.chunk_delay)
            elif not self.out:
                if self.has_ended:
                    self.link.close()
                return
            elif self.not_before > time.monotonic() or not self._send():
                return

    def _fill(self) -> None:
        """Move messages from the queue to `out`: all, or up to the first moment that a rule waits for."""
        while self.queue:
            message = self.queue[0]
            if self.out and self.proxy.has_rule(message.before):
                return  # what came before it has to be gone first
            before, message.before = message.before, ()  # a stall brings us back here; it is the same occurrence
            for moment in before:
                self.proxy.reach(moment, self.link)
            if self.link.is_closed or self.is_stalled():
                return
            self.out += self.queue.popleft().data
            self.out_messages.append(message)
            if self.proxy.has_rule(message.after):
                return

    def _send(self) -> bool:
        """Send once and return whether it is worth to go on at once."""
        trickles = self.proxy.trickle_left > 0
        self.is_choked = False
        try:
            sent = self.sink.send(self.out[:1] if trickles else self.out)
        except BlockingIOError:
            self.is_choked = True
            return False
        except OSError:
            self.link.close()
            return False
        del self.out[:sent]
        if trickles:
            self.proxy.trickle_left -= 1
            self.not_before = time.monotonic() + self.proxy.chunk_delay
        if not self.out:
            self._forwarded()
        return not trickles  # the reader gets a chance to see each byte alone

    def _forwarded(self) -> None:
        messages, self.out_messages = self.out_messages, []
        for message in messages:  # first of all: an action may cut, and what is lost by that depends on them
            if message.forwarded:
                message.forwarded()
        for message in messages:
            for moment in message.after:
                self.proxy.reach(moment, self.link)


@dataclass
class Rule:
    """An action armed for a moment. `done` is set when its last turn is over."""

    moment: str
    action: Callable[[Link], object]
    nth: int
    times: int
    done: threading.Event = field(default_factory=threading.Event)


def _in_its_thread(method: Callable[Concatenate["TcpProxy", P], T]) -> Callable[Concatenate["TcpProxy", P], T]:
    """Let the proxy's thread run the method, between two turns, and wait for what it returns."""

    @wraps(method)
    def call(proxy: "TcpProxy", /, *args: P.args, **kwargs: P.kwargs) -> T:
        if proxy.thread in (None, threading.current_thread()):
            return method(proxy, *args, **kwargs)
        future: Future[T] = Future()
        proxy.work.append(lambda: future.set_result(method(proxy, *args, **kwargs)))
        proxy.alarm.send(b"!")
        return future.result(30)

    return call


class TcpProxy:
    """The proxy in front of one server; everything happens in its one thread, at the request of any other.

    `upstream` is (host, port) of the server and may be changed at any time; it holds for new connections.
    `watcher_factory` makes the watcher of a connection: PostgresWatcher or AmqpWatcher.
    Use one proxy for each service process and server: then what is counted belongs to that process.

    `reached` counts every moment that came, `hits` only those upon which a rule acted, plus "cut_all", once for each
    connection that it cut. An exception in an action ends the proxy and is reported by pytest.
    """

    def __init__(self, upstream: tuple[str, int], watcher_factory: Callable[[], Watcher]) -> None:
        self.upstream = upstream
        self.port = 0
        self.reached: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        # The rest is the thread's own, and its links'.
        self.links: list[Link] = []
        self.stalled: set[Direction] = set()
        self.chunk_delay = 0.0
        self.trickle_left = 0
        self._moments = watcher_factory().moments | CONNECTION_MOMENTS
        self._watcher_factory = watcher_factory
        self._rules: list[Rule] = []
        self._changed = threading.Condition()
        self.work: deque[Callable[[], None]] = deque()
        self._is_stopping = False
        self._is_refusing = False
        self.thread: threading.Thread | None = None

    # Life

    def start(self) -> "TcpProxy":
        """Listen on 127.0.0.1 at a free `port`, which stays the same until stop()."""
        with socket.socket() as picker:
            picker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            picker.bind(("127.0.0.1", 0))
            self.port = picker.getsockname()[1]
            # Bound to a port by name, a Linux socket keeps it while it is shut down: see refuse().
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self._listener.listen()
        self.alarm, self._alarm_end = socket.socketpair()
        self._alarm_end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self.watch(self._listener, selectors.EVENT_READ, None)
        self.watch(self._alarm_end, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        """Close all connections and wait for the thread to end. May be called again."""
        if self.thread is not None:
            self._is_stopping = True
            with suppress(OSError):  # an exception has ended the thread already
                self.alarm.send(b"!")
            self.thread.join(10)
            self.thread = None

    def __enter__(self) -> "TcpProxy":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Control, from any thread

    def on(self, moment: str, action: Callable[[Link], object], nth: int = 1, times: int = 1) -> Rule:
        """Arm an action for the nth occurrence from now of a moment, and for `times` - 1 occurrences after that one.

        The action is called with the link before anything else is forwarded, and the proxy waits for it. It may be
        Link.cut, Link.stall or any function; one that kills the client should also cut, or the proxy goes on to
        forward the message, and takes what the dead client's kernel accepts as delivered.
        """
        self._require(moment)
        rule = Rule(moment, action, nth, times)
        self._rules.append(rule)
        return rule

    @_in_its_thread
    def cut_all(self) -> int:
        """Reset all connections and return how many there were."""
        links = self.links[:]
        for link in links:
            link.cut()
        self.hits["cut_all"] += len(links)
        return len(links)

    @_in_its_thread
    def stall_all(self) -> None:
        """Stall all connections that stand; new ones are not touched."""
        for link in self.links:
            link.stall()

    @_in_its_thread
    def black_hole(self, on: bool, *directions: Direction) -> None:
        """Keep all bytes of all connections back, or stop to; of both directions, or (one-way loss) the given one."""
        change = self.stalled.update if on else self.stalled.difference_update
        change(directions or BOTH)

    @_in_its_thread
    def release(self) -> None:
        """Lift all stalls, those of the rules and those of black_hole()."""
        self.stalled.clear()
        for link in self.links:
            link.stalled.clear()

    @_in_its_thread
    def delay(self, seconds: float) -> None:
        """Let each chunk of each direction wait this long (to the next millisecond); 0 ends it."""
        self.chunk_delay = seconds

    @_in_its_thread
    def trickle(self, count: int) -> None:
        """Send the next `count` bytes, of whatever connection and direction, one at a time."""
        self.trickle_left = count

    @_in_its_thread
    def refuse(self, on: bool) -> None:
        """Refuse new connections (ECONNREFUSED), or accept them again; those that stand are not touched."""
        if on and not self._is_refusing:
            self.watch(self._listener, 0, None)
            self._listener.shutdown(socket.SHUT_RDWR)
        elif self._is_refusing and not on:
            self._listener.listen()
            self.watch(self._listener, selectors.EVENT_READ, None)
        self._is_refusing = on

    @_in_its_thread
    def heal(self) -> None:
        """End all modes, stalls and rules; connections stay. A rule that is ended has not become `done`."""
        self._rules.clear()
        self.release()
        self.chunk_delay = 0.0
        self.trickle_left = 0
        for link in self.links:
            link.delay(0)
        self.refuse(False)

    def wait_for(self, moment: str, count: int = 1, timeout: float = 30) -> None:
        """Wait until a moment was reached `count` times since the start, or raise TimeoutError after `timeout` s.

        When it returns, the actions of the rules for that occurrence are done.
        """
        self._require(moment)
        with self._changed:
            if not self._changed.wait_for(lambda: self.reached[moment] >= count, timeout):
                raise TimeoutError(f"{moment!r}: {self.reached[moment]} of {count} within {timeout} s")

    @property
    def connections(self) -> int:
        """How many connections there were in all."""
        return self.reached["connected"]

    @property
    def ambiguous_commits(self) -> int:
        """How many connections died with a COMMIT forwarded and its reply not delivered."""
        return self.reached["ambiguous commit"]

    @property
    def stale_tag_reconnects(self) -> int:
        """How often a new connection came after one that had died with deliveries unacked."""
        return self.reached["stale tag reconnect"]

    # For the links, in the proxy's thread

    def watch(self, sock: socket.socket, events: int, link: Link | None) -> None:
        """Wait for these events of the socket from now on; 0 for none."""
        known = self._selector.get_map().get(sock)
        if known is None and events:
            self._selector.register(sock, events, link)
        elif known is not None and not events:
            self._selector.unregister(sock)
        elif known is not None and known.events != events:
            self._selector.modify(sock, events, link)

    def has_rule(self, moments: tuple[str, ...]) -> bool:
        """Return whether any rule waits for one of the moments."""
        return any(rule.moment in moments for rule in self._rules)

    def reach(self, moment: str, link: Link) -> None:
        """Act upon a moment as the rules say, and count it."""
        if link.is_closed:
            return
        if moment == "votes seen":
            link.is_writing = True
            if link.others_writing():
                self.reach(AT_ONCE, link)
        elif moment in ("commit delivered", "rollback delivered"):
            link.is_writing = False
        for rule in [rule for rule in self._rules if rule.moment == moment]:
            rule.nth -= 1
            if rule.nth > 0:
                continue
            rule.times -= 1
            if rule.times == 0:
                self._rules.remove(rule)
            self.hits[moment] += 1
            rule.action(link)
            if rule.times == 0:
                rule.done.set()
        self.note(moment)

    def note(self, moment: str) -> None:
        """Count a moment and wake those who wait for it."""
        with self._changed:
            self.reached[moment] += 1
            self._changed.notify_all()

    # The thread

    def _require(self, moment: str) -> None:
        if moment not in self._moments:
            raise ValueError(f"no such moment: {moment!r}; there are {', '.join(sorted(self._moments))}")

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
        finally:
            for link in self.links[:]:
                link.close()
            self._selector.close()
            for sock in (self._listener, self.alarm, self._alarm_end):
                sock.close()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._pause()):
            if isinstance(key.fileobj, socket.socket) and key.data is not None:
                if events & selectors.EVENT_READ:
                    key.data.read(key.fileobj)
            elif key.fileobj is self._listener:
                self._accept()
            else:
                self._alarm_end.recv(4096)
        while self.work:
            self.work.popleft()()
        for link in self.links[:]:
            link.pump()

    def _pause(self) -> float | None:
        """Return the seconds until a pipe that is held up by nothing but the clock may send."""
        pipes = (pipe for link in self.links for pipe in link.pipes)
        times = [pipe.not_before for pipe in pipes if pipe.out and not pipe.is_choked and not pipe.is_stalled()]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        try:
            server = socket.create_connection(self.upstream, timeout=2)
        except OSError:
            self.note("refused")
            _reset_on_close(client)
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(self, client, server, self._watcher_factory())
        self.links.append(link)
        if self.reached["unacked lost"] > self.reached["stale tag reconnect"]:
            self.note("stale tag reconnect")
        self.reach("connected", link)
