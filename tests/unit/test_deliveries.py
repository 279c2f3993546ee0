"""Deliveries read in one pass, against what pika makes of the same bytes; no broker is needed."""

from __future__ import annotations

import hashlib
import itertools
import struct
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika.adapters.select_connection import SelectConnection
from pika.channel import ContentFrameAssembler
from pika.exceptions import AMQPError
from pika.frame import Body, Header, Heartbeat, Method, decode_frame
from pika.spec import Basic, Channel
from pika.spec import Connection as ConnectionMethods

import deliveries
from deliveries import (
    Begun,
    Delivery,
    MalformedFrame,
    OnePassConnection,
    Read,
    UnknownPika,
    WholeBody,
    check_pika,
    cut,
    is_traceparent,
    read_deliveries,
)

OURS, GENERATION, MAX_BODY, FRAME_MAX = 1, 7, 20, 4_096
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Connection(OnePassConnection):
    """Without a socket: what goes to pika, and how it would end, is written down."""

    def __init__(self, max_body: int = MAX_BODY, frame_max: int = FRAME_MAX) -> None:
        self.bytes_received = self.frames_received = 0
        self._frame_buffer = b""
        self.params = SimpleNamespace(frame_max=frame_max)
        self.deliveries: list[Delivery] = []
        self.left_to_pika: list[Any] = []
        self.ended: Exception | None = None
        self.readings = 0
        self.read_channel(OURS, GENERATION, max_body, self._keep)

    def _keep(self, read: list[Delivery]) -> None:
        self.deliveries += read
        self.readings += 1

    def _process_frame(self, frame: Any) -> None:
        self.frames_received += 1
        self.left_to_pika.append(frame)

    def _terminate_stream(self, error: Exception) -> None:
        self.ended = error

    def feed(self, *pieces: bytes) -> Connection:
        for piece in pieces:
            if piece and not self.ended:
                self._on_data_available(piece)
        return self


def deliver(tag: int = 1, again: bool = False, consumer: str = "ctag", key: str = "votes", channel: int = OURS) -> Any:
    return Method(channel, Basic.Deliver(consumer, tag, again, "", key))


def content(properties: Any, body: bytes, cuts: list[int] | None = None, channel: int = OURS) -> list[Any]:
    """Header and body, the body in a frame for each stretch between two cuts."""
    edges = [0, *sorted(cuts or []), len(body)]
    frames = [Body(channel, body[start:end]) for start, end in itertools.pairwise(edges)]
    return [Header(channel, len(body), properties), *(frames if body else [])]


def marshal(*frames: Any) -> bytes:
    return b"".join(frame if isinstance(frame, bytes) else frame.marshal() for frame in frames)


def by_pika(data: bytes, max_body: int = MAX_BODY) -> tuple[list[Delivery], list[Any]]:
    """The deliveries of our channel, and all frames that are no part of one, as pika decodes and puts them together."""
    read, others, assembler, is_ours = [], [], ContentFrameAssembler(), False
    while data:
        size, frame = decode_frame(data)
        data = data[size:]
        if frame.channel_number == OURS and isinstance(frame, Method):
            is_ours = isinstance(frame.method, Basic.Deliver)
        if frame.channel_number != OURS or not is_ours or isinstance(frame, Heartbeat):
            others.append(frame)
        elif whole := assembler.process(frame):
            method, header, body = whole
            properties = header.properties
            headers = properties.headers or {}
            trace, count = headers.get("traceparent"), headers.get("x-delivery-count")
            trace = trace.encode("utf-8", "replace") if isinstance(trace, str) else trace
            kept, of_whole = cut(body, max_body)
            read.append(
                Delivery(
                    GENERATION,
                    method.method.delivery_tag,
                    method.method.redelivered,
                    kept,
                    properties.message_id,
                    properties.content_encoding,
                    trace.decode() if isinstance(trace, bytes) and is_traceparent(trace) else None,
                    count if type(count) is pika.compat.long else 0,
                    properties.timestamp,
                    of_whole,
                )
            )
            is_ours = False
    return read, others


# --- any stream, cut anywhere ----------------------------------------------------------------------------------------

short = st.none() | st.text(max_size=60)
plain = st.integers(-(2**31), 2**31 - 1) | st.text(max_size=9) | st.binary(max_size=9) | st.booleans() | st.none()
plain |= st.just(Decimal("1.5")) | st.just(datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None))
value = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=9), plain, max_size=2)
wanted = st.fixed_dictionaries(
    {},
    optional={
        "traceparent": st.sampled_from([TRACEPARENT, TRACEPARENT.encode(), TRACEPARENT.upper(), "", 7]),
        "x-delivery-count": st.integers(0, 2**63 - 1).map(pika.compat.long) | st.text(max_size=8),
    },
)
headers = st.builds(
    lambda before, named, behind: before | named | behind,
    *(st.dictionaries(st.text(max_size=9), value, max_size=2), wanted),
    st.dictionaries(st.text(max_size=9), value, max_size=2),
)
properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": short,
        "content_encoding": short,
        "headers": headers,
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "correlation_id": short,
        "reply_to": short,
        "expiration": short,
        "message_id": short,
        "timestamp": st.integers(0, 2**63),
        "type": short,
        "user_id": short,
        "app_id": short,
        "cluster_id": short,
    },
).map(lambda chosen: pika.BasicProperties(**chosen))
bodies = st.binary(max_size=3 * MAX_BODY)
cuts = st.lists(st.integers(0, MAX_BODY), max_size=3)
between = st.just([Heartbeat()]) | st.just([Method(0, ConnectionMethods.Blocked("memory"))])
between |= st.builds(lambda what, body: [deliver(channel=2), *content(what, body, channel=2)], properties, bodies)
ours = st.builds(
    lambda tag, again, consumer, key, what, body, where: [
        deliver(tag, again, consumer, key),
        *content(what, body, [at for at in where if at < len(body)]),
    ],
    *(st.integers(0, 2**64 - 1), st.booleans(), st.text(max_size=60), st.text(max_size=60), properties, bodies, cuts),
)
not_deliveries = st.sampled_from([[Method(OURS, Basic.Cancel("ctag"))], [Method(OURS, Channel.FlowOk(True))]])
not_deliveries |= st.builds(
    lambda what, body: [Method(OURS, Basic.Return(312, "NO_ROUTE", "", "votes")), *content(what, body)],
    *(properties, bodies),
)


@st.composite
def streams(draw: Any) -> bytes:
    """What a broker may send; between two frames of a message only what belongs to no message of our channel."""
    frames: list[Any] = []
    for group in draw(st.lists(ours | ours | not_deliveries, max_size=6)):
        for frame in group:
            if draw(st.integers(0, 4)) == 0:
                frames += draw(between)
            frames.append(frame)
    return marshal(*frames)


@given(streams(), st.data())
def test_a_stream_gives_what_pika_makes_of_it_however_it_is_cut(stream: bytes, data: st.DataObject) -> None:
    """Whole, byte by byte, and in pieces of any size: the same deliveries, and the same frames for pika."""
    read, others = by_pika(stream)
    at = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[start:end] for start, end in zip([0, *at], [*at, len(stream)], strict=True)]
    for connection in (
        Connection().feed(stream),
        Connection().feed(*(stream[at : at + 1] for at in range(len(stream)))),
        Connection().feed(*pieces),
    ):
        assert connection.ended is None
        assert connection.deliveries == read
        assert connection.left_to_pika == others
        assert (connection._frame_buffer, connection._begun) == (b"", None)
        assert connection.bytes_received == len(stream)


def comparable(read: Read) -> Read:
    begun = read.begun
    if begun is not None and begun.sha256 is not None:
        begun = begun._replace(sha256=begun.sha256.digest())
    return read._replace(begun=begun)


@given(ours, st.data())
def test_what_was_begun_is_a_value(group: list[Any], data: st.DataObject) -> None:
    """Read on from twice, it gives the same twice; nothing of it is changed."""
    stream = marshal(*group)
    at = data.draw(st.integers(0, len(stream)))
    first = read_deliveries(stream[:at], 0, None, OURS, GENERATION, MAX_BODY, FRAME_MAX)
    before, rest = comparable(first), stream[first.end :]
    twice = [read_deliveries(rest, 0, first.begun, OURS, GENERATION, MAX_BODY, FRAME_MAX) for _ in range(2)]
    assert comparable(twice[0]) == comparable(twice[1])
    assert comparable(first) == before
    assert first.deliveries + twice[0].deliveries == by_pika(stream)[0]
    assert first.frames + twice[0].frames == len(group)


def test_one_reading_hands_all_it_read_over_at_once() -> None:
    """And none where nothing came."""
    stream = marshal(*(frame for tag in (1, 2, 3) for frame in (deliver(tag), *content(pika.BasicProperties(), b"b"))))
    connection = Connection().feed(stream + stream, Heartbeat().marshal(), deliver().marshal())
    assert (len(connection.deliveries), connection.readings, connection.frames_received) == (6, 1, 6 * 3 + 1 + 1)


def test_before_a_channel_is_told_all_is_pikas() -> None:
    """Among it what is left over from then."""
    seen = []

    class Closed(Connection):
        def __init__(self) -> None:
            super().__init__()
            self._take = None

        def _process_frame(self, frame: Any) -> None:
            seen.append(frame)

    frames = [Method(OURS, Basic.ConsumeOk("ctag")), deliver(), *content(pika.BasicProperties(), b"b")]
    connection = Closed()
    connection.feed(marshal(*frames)[:-1])
    assert seen == frames[:-1]
    connection.read_channel(2, GENERATION, MAX_BODY, connection._keep)
    connection.feed(marshal(*frames)[-1:])
    assert (seen, connection.deliveries) == (frames, [])


# --- what is read of a message ---------------------------------------------------------------------------------------


FLAGS = pika.BasicProperties
TRACED = b"\x0btraceparentS\0\0\x007" + TRACEPARENT.encode()


def read_one(what: Any, body: bytes = b"body") -> Delivery:
    connection = Connection().feed(marshal(deliver(), *content(what, body)))
    assert connection.ended is None, connection.ended
    (delivery,) = connection.deliveries
    return delivery


class Encoded(pika.BasicProperties):
    """Properties that pika would not write."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self.raw = raw

    def encode(self) -> Any:
        return [self.raw]


@pytest.mark.parametrize(
    "value",
    [
        "",
        1,
        None,
        TRACEPARENT + "-00",
        TRACEPARENT[:-1],
        TRACEPARENT.upper(),
        "ff" + TRACEPARENT[2:],
        "00-" + 32 * "0" + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + 16 * "0" + "-01",
        TRACEPARENT[:-1] + "\n",
        {"traceparent": 7},
    ],
)
def test_a_traceparent_that_is_none_is_left_out(value: object) -> None:
    """What gets into the logs is hexadecimal digits and hyphens, whoever publishes."""
    assert read_one(pika.BasicProperties(headers=cast(Any, {"traceparent": value}))).traceparent is None
    assert not is_traceparent(str(value).encode())


def test_a_traceparent_behind_the_headers_is_none() -> None:
    """Only the headers are searched, not what follows them."""
    hidden = "\x0btraceparentS\0\0\x007" + TRACEPARENT
    delivery = read_one(pika.BasicProperties(headers={"a": 1}, message_id="m", user_id=hidden))
    assert (delivery.message_id, delivery.traceparent) == ("m", None)


@given(st.integers(0, 2**62))
def test_the_delivery_count_of_a_quorum_queue_is_read(count: int) -> None:
    """As RabbitMQ writes it, a signed integer of eight bytes; as a text it is none."""
    found = read_one(pika.BasicProperties(headers={"x-delivery-count": pika.compat.long(count), "z": "y"}))
    assert found.delivery_count == count
    assert read_one(pika.BasicProperties(headers={"x-delivery-count": str(count)})).delivery_count == 0


@pytest.mark.parametrize("flag", ["FLAG_MESSAGE_ID", "FLAG_CONTENT_ENCODING"])
def test_a_text_that_is_not_utf8_is_spelt_out(flag: str) -> None:
    """So that it is text like any other, and no UUID."""
    delivery = read_one(Encoded(getattr(pika.BasicProperties, flag).to_bytes(2) + b"\x02\xff\xfe"))
    assert r"\xff\xfe" in (delivery.message_id, delivery.content_encoding)


def test_a_header_that_no_calendar_has_is_stepped_over() -> None:
    """Where pika decodes, it ends the connection, and the next one, for ever."""
    flags = pika.BasicProperties.FLAG_HEADERS | pika.BasicProperties.FLAG_MESSAGE_ID
    odd = Encoded(struct.pack("!HI", flags, 11) + b"\x01aT" + b"\xff" * 8 + b"\x01m")
    with pytest.raises((OverflowError, ValueError)):
        decode_frame(marshal(Header(OURS, 1, odd)))
    assert read_one(odd).message_id == "m"


@pytest.mark.parametrize(("flags", "values"), [(1, b""), (0x1001, b"\x02"), (0x1003, b"\x02"), (0x81, b"\x01m")])
def test_flags_that_would_announce_more_flags_are_read_as_the_broker_reads_them(flags: int, values: bytes) -> None:
    """RabbitMQ takes such a message and confirms it, and 3.x passes its bytes on. No more flags are defined."""
    delivery = read_one(Encoded(struct.pack("!H", flags) + values))
    assert (delivery.body, delivery.message_id) == (b"body", "m" if flags & FLAGS.FLAG_MESSAGE_ID else None)


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (FLAGS.FLAG_CONTENT_TYPE, b"\xffjson"),
        (FLAGS.FLAG_CONTENT_ENCODING, b"\x05gzip"),
        (FLAGS.FLAG_CONTENT_ENCODING | FLAGS.FLAG_MESSAGE_ID, b"\x04gzip\x05four"),
        (FLAGS.FLAG_REPLY_TO, b"\x05four"),
        (FLAGS.FLAG_MESSAGE_ID, b"\x05four"),
        (FLAGS.FLAG_HEADERS, b"\xff\xff\xff\xff\x01a"),
        (FLAGS.FLAG_HEADERS, b"\0\0"),
        (FLAGS.FLAG_HEADERS, b"\0\0\0\xa0" + TRACED),
        (FLAGS.FLAG_MESSAGE_ID, b""),
        (FLAGS.FLAG_TIMESTAMP, b"1234567"),
        (FLAGS.FLAG_PRIORITY | FLAGS.FLAG_DELIVERY_MODE, b"\x01"),
    ],
)
def test_properties_that_are_longer_than_their_frame_are_as_none(flags: int, values: bytes) -> None:
    """To end the connection for them would end the next one too, on which the broker brings the message again."""
    odd = Encoded(struct.pack("!H", flags) + values)
    assert read_one(odd) == read_one(Encoded(struct.pack("!H", 0)))


def test_a_header_frame_may_be_larger_than_agreed() -> None:
    """RabbitMQ does not split it, and to refuse it would end each connection that the message comes on."""
    huge = "x" * (3 * FRAME_MAX)
    assert read_one(pika.BasicProperties(headers={"h": huge}, message_id="m")).message_id == "m"


def test_a_large_body_is_cut_and_hashed_as_it_comes() -> None:
    """Of three megabytes no more than one byte above the limit is held at any time, beside the frame in hand."""
    body, max_body = bytes(range(256)) * 12_288, 65_536
    frame_max = 131_072
    cuts = list(range(frame_max - 8, len(body), frame_max - 8))
    stream = marshal(
        deliver(),
        *content(pika.BasicProperties(), body, cuts),
        deliver(2),
        *content(None or pika.BasicProperties(), b""),
    )
    connection = Connection(max_body, frame_max)
    held = set()
    for at in range(0, len(stream), 65_536):
        connection.feed(stream[at : at + 65_536])
        begun = connection._begun
        held.add(len((begun and begun.kept) or b""))
        assert len(connection._frame_buffer) < frame_max
    assert held == {0, max_body + 1}
    large, empty = connection.deliveries
    assert large.body == body[: max_body + 1]
    assert large.whole == WholeBody(hashlib.sha256(body).digest(), len(body))
    assert (empty.tag, empty.body, empty.whole) == (2, b"", None)


@pytest.mark.parametrize("size", [MAX_BODY, MAX_BODY + 1])
def test_a_body_is_cut_from_one_byte_above_the_limit_on(size: int) -> None:
    """In one frame, in several, or there whole already: all the same."""
    body = bytes(range(size))
    expected = (body, WholeBody(hashlib.sha256(body).digest(), size) if size > MAX_BODY else None)
    for where in ([], [1], [MAX_BODY], [MAX_BODY, MAX_BODY]):
        (delivery,) = Connection().feed(marshal(deliver(), *content(pika.BasicProperties(), body, where))).deliveries
        assert (delivery.body, delivery.whole) == expected
    assert cut(body, MAX_BODY) == expected


# --- bytes that no broker sends --------------------------------------------------------------------------------------

HEAD, TAIL = marshal(deliver(1), *content(pika.BasicProperties(), b"one")), marshal(Heartbeat())
HEADER = Header(OURS, 4, pika.BasicProperties()).marshal()


def bad_end(frame: Any) -> bytes:
    return marshal(frame)[:-1] + b"\xcd"


def frame(kind: int, payload: bytes, channel: int = OURS) -> bytes:
    return struct.pack("!BHI", kind, channel, len(payload)) + payload + b"\xce"


def header(flags: int, values: bytes, class_id: int = 60) -> bytes:
    return frame(2, struct.pack("!HHQH", class_id, 0, 4, flags) + values)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([bad_end(deliver())], "end where it says"),
        ([deliver(), bad_end(HEADER)], "end where it says"),
        ([deliver(), HEADER, bad_end(Body(OURS, b"four"))], "end where it says"),
        ([bad_end(Heartbeat())], "end where it says"),
        ([deliver(), bad_end(Heartbeat())], "end where it says"),
        ([struct.pack("!BHI", 1, OURS, 30), deliver().marshal()[7:]], "end where it says"),
        ([frame(1, struct.pack("!IB", 0x3C003C, 200) + b"tag" * 20)], "consumer tag"),
        ([deliver(), header(0, b"", class_id=50)], "class basic"),
        ([deliver(), frame(2, struct.pack("!HHQ", 60, 0, 4)), bytes(9)], "does not belong"),
        ([deliver(), frame(2, b"")], "does not belong"),
        ([deliver(), HEADER, Body(OURS, b"fives")], "longer than announced"),
        ([deliver(), HEADER, Body(OURS, b"thr"), Body(OURS, b"ee")], "longer than announced"),
        ([deliver(), HEADER, HEADER], "does not belong"),
        ([deliver(), HEADER, deliver(2)], "does not belong"),
        ([deliver(), HEADER, Method(OURS, Channel.CloseOk())], "does not belong"),
        ([deliver(), Body(OURS, b"")], "does not belong"),
        ([deliver(), deliver(2)], "does not belong"),
        ([frame(1, struct.pack("!I", 0x3C003C) + bytes(FRAME_MAX))], "larger than agreed"),
        ([deliver(), HEADER, Body(OURS, bytes(FRAME_MAX))], "larger than agreed"),
        ([deliver(), struct.pack("!BHI", 2, OURS, 2**32 - 1)], "larger than agreed"),
        ([struct.pack("!BHI", 8, 0, 2**31)], "larger than agreed"),
        ([frame(9, b"", channel=0)], "pika cannot read"),
        ([frame(1, struct.pack("!I", 7), channel=0)], "pika cannot read"),
    ],
)
def test_bytes_that_break_the_protocol_end_the_connection_and_nothing_else(bad: list[Any], says: str) -> None:
    """Whole or byte by byte, with a clear error, and what stands behind them is not read."""
    stream = HEAD + marshal(*bad) + TAIL
    for pieces in ([stream], [stream[at : at + 1] for at in range(len(stream))]):
        connection = Connection().feed(*pieces)
        assert isinstance(connection.ended, MalformedFrame) and isinstance(connection.ended, AMQPError)
        assert says in str(connection.ended)
        assert (connection.left_to_pika, connection._frame_buffer) == ([], b"")


@pytest.mark.parametrize("moment", [2**55, 2**62, 2**63 - 1, 2**64 - 1])
def test_a_moment_that_pika_cannot_read_ends_the_connection_too(moment: int) -> None:
    """By whatever error the platform's calendar raises: here of another channel, whose frames are left to pika."""
    table = b"\x01hT" + struct.pack("!Q", moment)
    payload = struct.pack("!HHQHI", 60, 0, 1, 1 << 13, len(table)) + table
    connection = Connection().feed(struct.pack("!BHI", 2, OURS + 1, len(payload)) + payload + b"\xce")
    assert isinstance(connection.ended, MalformedFrame)
    assert connection.left_to_pika == []


@given(streams(), st.data())
def test_no_damage_to_a_stream_does_more_than_end_the_connection(stream: bytes, data: st.DataObject) -> None:
    """One byte is another one; the reader raises nothing else, and never reads past what there is."""
    if stream:
        at = data.draw(st.integers(0, len(stream) - 1))
        damaged = stream[:at] + bytes([data.draw(st.integers(0, 255))]) + stream[at + 1 :]
        begun: Begun | None = None
        try:
            read = read_deliveries(damaged, 0, begun, OURS, GENERATION, MAX_BODY, FRAME_MAX)
        except MalformedFrame:
            return
        assert 0 <= read.end <= len(damaged)
        Connection().feed(damaged)


# --- the pika that it was written for --------------------------------------------------------------------------------


def test_the_pinned_pika_is_the_one_that_this_was_written_for() -> None:
    """Whoever pins another one reads deliveries.py first."""
    check_pika()
    assert f"pika=={deliveries.PIKA}" in Path(deliveries.__file__).with_name("requirements.txt").read_text()


@pytest.mark.parametrize("version", ["1.3.1", "1.4.0", "2.0"])
def test_another_version_is_refused_with_the_setting_that_helps(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used of pika it promises to nobody."""
    monkeypatch.setattr(pika, "__version__", version)
    with pytest.raises(UnknownPika, match=rf"{version}.*RABBITMQ_READER=pika"):
        check_pika()


@pytest.mark.parametrize("name", sorted(deliveries._USED_OF_PIKA))
def test_a_pika_without_a_name_that_is_used_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a patched one of the same version might be."""
    monkeypatch.setattr(deliveries, "_USED_OF_PIKA", {name})
    check_pika()
    monkeypatch.setattr(deliveries, "_USED_OF_PIKA", {name + "_renamed"})
    with pytest.raises(UnknownPika, match=name + "_renamed"):
        check_pika()


def test_nothing_of_pika_is_patched() -> None:
    """The publisher, and whoever else uses it in this process, has it as it is."""
    assert pika.spec.props[pika.BasicProperties.INDEX] is pika.BasicProperties
    assert pika.spec.methods[Basic.Deliver.INDEX] is Basic.Deliver
    assert SelectConnection._on_data_available is not OnePassConnection._on_data_available
