"""Deliveries, read from the broker's bytes in one pass; everything else on the connection stays pika's.

pika makes three frames, a method, properties and an event of each message, and copies what is left of its buffer after
each frame. ``read_deliveries`` walks over the bytes instead and makes a ``Delivery``; ``OnePassConnection`` puts it in
front of pika, on the one channel that is consumed from. Knows none of our modules.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pika
from pika.adapters.base_connection import BaseConnection
from pika.adapters.blocking_connection import BlockingConnection
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils import io_services_utils
from pika.connection import Connection
from pika.exceptions import AMQPError
from pika.frame import decode_frame

PIKA = "1.4.4"  # that this was written for: it goes where pika promises nothing

RECEIVE_BYTES = 65_536  # at once; pika's 4,096 are a dozen votes

# RabbitMQ splits a body into frames, but sends a header that is larger than frame_max in one (seen on 3.10): to refuse
# it would end each connection that it comes on, and the count with them.
MAX_HEADER_FRAME = 16 * 1024 * 1024


class MalformedFrame(AMQPError):
    """The broker's bytes break the protocol, or the broker is none: the connection cannot be read any further."""


class UnknownPika(RuntimeError):
    """The pika that is installed is not the one that this was written for."""


class WholeBody(NamedTuple):
    """What is kept of a body that was cut."""

    sha256: bytes
    length: int


class Delivery(NamedTuple):
    """One message as the broker handed it over.

    ``generation`` names the channel that delivered it: a tag means nothing on any other channel. ``delivery_count`` is
    how often a quorum queue says that the message was returned to it, 0 where it says nothing. ``timestamp`` is the
    property of that name, in Unix seconds where its sender keeps to the protocol. ``whole`` is None unless the body was
    too large: then ``body`` is one byte more than it may have.
    """

    generation: int
    tag: int
    redelivered: bool
    body: bytes
    message_id: str | None
    content_encoding: str | None
    traceparent: str | None
    delivery_count: int = 0
    timestamp: int | None = None
    whole: WholeBody | None = None


class Begun(NamedTuple):
    """A delivery of which more frames are to come. ``length``, of the whole body, is -1 before its header."""

    tag: int
    redelivered: bool
    length: int = -1
    missing: int = 0  # bytes of the body
    message_id: str | None = None
    content_encoding: str | None = None
    traceparent: str | None = None
    delivery_count: int = 0
    timestamp: int | None = None
    kept: bytes | None = None  # of the body; None before its first frame
    sha256: Any = None  # of the body so far, where it is too large


class Read(NamedTuple):
    """What came of some bytes: whole deliveries, how far it was read, and what was begun there."""

    deliveries: list[Delivery]
    end: int
    begun: Begun | None
    frames: int


def read_deliveries(
    data: bytes, start: int, begun: Begun | None, channel: int, generation: int, max_body: int, frame_max: int
) -> Read:
    """Read the deliveries of ``channel`` from ``start`` on, up to the first frame that is no part of one or not whole.

    ``begun`` is what the last reading ended with. A body above ``max_body`` bytes is cut behind one byte more, so that
    it is never in memory whole. Raises MalformedFrame. Frames: AMQP 0-9-1 specification, sections 2.3.5 and 4.2.
    """
    # One loop, and the frames of a message follow each other in it: this runs for every vote, and a call or an object
    # for each frame would double what it costs. A frame is looked at once it is whole.
    deliveries: list[Delivery] = []
    at, available, frames = start, len(data), 0
    largest = frame_max - _AROUND
    if begun is None:
        tag = length = -1
    else:
        (
            tag, redelivered, length, missing,
            message_id, content_encoding, traceparent, count, timestamp, kept, sha256,
        ) = begun  # fmt: skip
        if sha256 is not None:
            sha256 = sha256.copy()  # so that begun stays as it was
    while True:
        if tag < 0:
            if available - at < _SMALLEST_DELIVER:
                break
            kind, number, size, method, short = _DELIVER(data, at)
            if method != DELIVER or number != channel or kind != METHOD:
                break
            end = at + 7 + size
            if size > largest or end >= available:
                break
            if data[end] != FRAME_END:
                raise MalformedFrame(_BAD_END)
            offset = at + 12 + short
            if offset + 9 > end:
                raise MalformedFrame("a delivery's consumer tag is longer than its frame")
            tag, bits = _TAG_AND_BITS(data, offset)
            redelivered = bits & 1 == 1
            length = -1
            at = end + 1
            frames += 1

        if length < 0:
            if available - at < _SMALLEST_HEADER:
                break
            kind, number, size, class_id, length_told, flags = _HEADER(data, at)
            if number != channel or kind != HEADER or size < 14:
                break
            end = at + 7 + size
            if size > MAX_HEADER_FRAME or end >= available:
                break
            if data[end] != FRAME_END:
                raise MalformedFrame(_BAD_END)
            if class_id != BASIC:
                raise MalformedFrame("a content header that is not of class basic")
            offset = at + 21
            message_id = content_encoding = traceparent = timestamp = None
            count = 0
            try:
                if flags & _CONTENT_TYPE:
                    offset += 1 + data[offset]
                if flags & _ENCODING_OR_HEADERS:
                    if flags & _CONTENT_ENCODING:
                        text = offset + 1
                        offset = text + data[offset]
                        content_encoding = data[text:offset].decode("utf-8", "backslashreplace")
                    if flags & _HEADERS:
                        table = offset + 4
                        offset = table + _UINT32(data, offset)[0]
                        if found := _find_traceparent(data, table, offset):
                            traceparent = found[1].decode()
                        if found := _find_delivery_count(data, table, offset):
                            count = int.from_bytes(found[1], signed=True)
                offset += _DELIVERY_MODE_AND_PRIORITY[flags >> 11 & 3]
                if flags & _CORRELATION_TO_EXPIRATION:
                    for flag in _CORRELATION_REPLY_EXPIRATION:
                        if flags & flag:
                            offset += 1 + data[offset]
                if flags & _MESSAGE_ID:
                    text = offset + 1
                    offset = text + data[offset]
                    message_id = data[text:offset].decode("utf-8", "backslashreplace")
                if flags & _TIMESTAMP:
                    timestamp = _UINT64(data, offset)[0]
                    offset += 8
                if offset > end:
                    raise IndexError
            except (IndexError, struct.error):
                # longer than their frame: as if there were none, since else the message would come again and again
                message_id = content_encoding = traceparent = timestamp = None
                count = 0
            missing = length = length_told
            kept = sha256 = None
            at = end + 1
            frames += 1

        whole = None
        if not length:
            body = b""
        else:
            if available - at < _AROUND:
                break
            kind, number, size = _FRAME(data, at)
            if number != channel or kind != BODY:
                break
            end = at + 7 + size
            if size > largest or end >= available:
                break
            if data[end] != FRAME_END:
                raise MalformedFrame(_BAD_END)
            if size > missing:
                raise MalformedFrame("a body that is longer than announced")
            if kept is None and size == missing and size <= max_body:
                body = data[at + 7 : end]
            else:
                if kept is None:
                    kept = b""
                    sha256 = hashlib.sha256() if length > max_body else None
                if sha256 is not None:
                    sha256.update(memoryview(data)[at + 7 : end])
                kept += data[at + 7 : min(end, at + 8 + max_body - len(kept))]
                missing -= size
                if missing:
                    at = end + 1
                    frames += 1
                    continue
                body = kept
                if sha256 is not None:
                    whole = WholeBody(sha256.digest(), length)
            at = end + 1
            frames += 1

        fields = (
            generation, tag, redelivered, body, message_id, content_encoding, traceparent, count, timestamp, whole,
        )  # fmt: skip
        deliveries.append(_new(Delivery, fields))  # half the time of Delivery(...)
        tag = -1

    if tag < 0:
        begun = None
    else:
        if is_whole(data, at, frame_max) and _FRAME(data, at)[1] == channel:
            raise MalformedFrame("a frame that does not belong into the delivery that it stands in")
        begun = (
            Begun(tag, redelivered)
            if length < 0
            else Begun(
                tag, redelivered, length, missing,
                message_id, content_encoding, traceparent, count, timestamp, kept, sha256,
            )
        )  # fmt: skip
    return Read(deliveries, at, begun, frames)


def is_whole(data: bytes, at: int, frame_max: int) -> bool:
    """Whether the frame that begins there, whosever it is, has come whole. Raises MalformedFrame."""
    if len(data) - at < 7:
        return False
    kind, _, size = _FRAME(data, at)
    if size > (MAX_HEADER_FRAME if kind == HEADER else frame_max - _AROUND):
        raise MalformedFrame(f"a frame of {size:,} bytes, larger than agreed")
    end = at + 7 + size
    if end >= len(data):
        return False
    if data[end] != FRAME_END:
        raise MalformedFrame(_BAD_END)
    return True


METHOD, HEADER, BODY, FRAME_END = 1, 2, 3, 0xCE
BASIC, DELIVER = 60, 60 << 16 | 60
_AROUND = 8  # bytes of a frame that are not its payload: seven before it, one behind
_SMALLEST_DELIVER, _SMALLEST_HEADER = 24, 22  # bytes

# type, channel, size of the payload; the same with what the payload of a delivery begins with (method, length of the
# consumer tag), and with that of a content header (class, weight, size of the body, property flags)
_FRAME = struct.Struct("!BHI").unpack_from
_DELIVER = struct.Struct("!BHIIB").unpack_from
_HEADER = struct.Struct("!BHIHxxQH").unpack_from
_TAG_AND_BITS, _UINT32 = struct.Struct("!QB").unpack_from, struct.Struct("!I").unpack_from
_UINT64 = struct.Struct("!Q").unpack_from

# section 1.8.3: a flag for each property, in the order in which they stand. Bit 0 would announce more flags: RabbitMQ
# ignores it, and 3.x passes it on as it came.
_CONTENT_TYPE, _CONTENT_ENCODING, _HEADERS, _MESSAGE_ID, _TIMESTAMP = 1 << 15, 1 << 14, 1 << 13, 1 << 7, 1 << 6
_CORRELATION_REPLY_EXPIRATION = (1 << 10, 1 << 9, 1 << 8)
_ENCODING_OR_HEADERS = _CONTENT_ENCODING | _HEADERS
_CORRELATION_TO_EXPIRATION = sum(_CORRELATION_REPLY_EXPIRATION)
_DELIVERY_MODE_AND_PRIORITY = (0, 1, 1, 2)  # bytes, by both flags

_BAD_END = "a frame that does not end where it says"
_new = tuple.__new__

# A header is its name with a length of one byte before it, its type (S: text, x: bytes) and its value with a length of
# four. The value: W3C Trace Context, section 3.2 (version, trace-id, parent-id, trace-flags; no id is all zeros).
_TRACEPARENT = rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_find_traceparent = re.compile(rb"\x0btraceparent[Sx]\0\0\x007(" + _TRACEPARENT + rb")").search
is_traceparent = re.compile(_TRACEPARENT).fullmatch

# A quorum queue writes it as a signed integer of eight bytes (rabbit_quorum_queue, deliver).
_find_delivery_count = re.compile(rb"\x10x-delivery-countl(.{8})", re.DOTALL).search


def cut(body: bytes, max_body: int) -> tuple[bytes, WholeBody | None]:
    """A body that is there whole, as ``read_deliveries`` hands it over."""
    if len(body) <= max_body:
        return body, None
    return body[: max_body + 1], WholeBody(hashlib.sha256(body).digest(), len(body))


_Connection: Any = SelectConnection  # its types know nothing of what is private


class OnePassConnection(_Connection):  # type: ignore[misc]
    """pika's connection, with the deliveries of one channel read beside it.

    What it overrides and uses is private to pika: ``check_pika`` first.
    """

    _take: Callable[[list[Delivery]], None] | None = None  # before read_channel all is pika's
    _reading: tuple[int, int, int]
    _begun: Begun | None
    _frame_buffer: bytes  # pika's: what was received and not read

    def read_channel(
        self, channel: int, generation: int, max_body: int, take: Callable[[list[Delivery]], None]
    ) -> None:
        """From now on hand the deliveries of ``channel`` to ``take``, those of one reading at once.

        pika sees none of them. A channel that is being closed is read to its end; what comes of it then carries the
        ``generation`` that it had.
        """
        self._reading, self._begun = (channel, generation, max_body), None
        self._take = take

    def _proto_connection_made(self, transport: Any) -> None:
        transport._MAX_RECV_BYTES = RECEIVE_BYTES
        super()._proto_connection_made(transport)
        if self._is_plaintext():
            transport._MAX_CONSUME_BYTES = 1  # one reading: a second would mostly find nothing, which is an exception

    def _adapter_emit_data(self, data: bytes) -> None:
        super()._adapter_emit_data(data)
        if self._is_plaintext():
            self._transport._on_socket_writable()  # at once, and not after another turn of the loop

    def read_now(self) -> bool:
        """Read what has come, without a turn of the loop; False where that takes one."""
        if self._is_plaintext():
            self._transport._on_socket_readable()
            return True
        return False

    def _is_plaintext(self) -> bool:
        # TLS may hold what the socket does not show
        return isinstance(self._transport, io_services_utils._AsyncPlaintextTransport)

    def _on_data_available(self, data_in: bytes) -> None:
        if self._take is None:
            super()._on_data_available(data_in)
            return
        self.bytes_received += len(data_in)  # when they come: a large frame on a slow link is a sign of life as well
        data = self._frame_buffer + data_in if self._frame_buffer else data_in
        frame_max = self.params.frame_max
        deliveries: list[Delivery] = []
        at = 0
        try:
            while True:
                read, at, self._begun, frames = read_deliveries(data, at, self._begun, *self._reading, frame_max)
                deliveries += read
                self.frames_received += frames
                if not is_whole(data, at, frame_max):
                    break
                at += self._hand_to_pika(data[at : at + _AROUND + _FRAME(data, at)[2]])
        except MalformedFrame as exc:
            # as pika ends a connection whose heartbeat failed; an error that got out of here it would log with traces
            self._frame_buffer = b""
            self._terminate_stream(exc)
            return
        self._frame_buffer = data[at:]
        if deliveries:
            self._take(deliveries)

    def _hand_to_pika(self, raw: bytes) -> int:
        try:
            consumed, frame = decode_frame(raw)
        except (AMQPError, ValueError, LookupError, ArithmeticError, OSError, struct.error) as exc:  # OSError: a moment
            raise MalformedFrame(f"a frame that pika cannot read: {type(exc).__name__}") from exc
        self._process_frame(frame)
        return int(consumed)


def check_pika() -> None:
    """Raise UnknownPika where OnePassConnection may not work with the pika that is installed."""
    if pika.__version__ != PIKA:
        raise UnknownPika(
            f"pika {pika.__version__} is installed, and deliveries are read in one pass with {PIKA} only: "
            "install that one, or set RABBITMQ_READER=pika"
        )
    there = {*dir(_Connection), *BlockingConnection.__init__.__code__.co_varnames}
    there.update(dir(io_services_utils), dir(getattr(io_services_utils, "_AsyncPlaintextTransport", None)))
    for function in [*vars(Connection).values(), *vars(BaseConnection).values()]:
        # the variables of an instance stand in its methods only
        there.update(function.__code__.co_names if hasattr(function, "__code__") else ())
    missing = sorted(_USED_OF_PIKA - there)
    if missing:
        raise UnknownPika(f"this pika {PIKA} was changed, it has no {', '.join(missing)}: set RABBITMQ_READER=pika")


_USED_OF_PIKA = {
    *("_impl_class", "_MAX_RECV_BYTES", "_proto_connection_made", "_on_data_available", "_frame_buffer"),
    *("bytes_received", "frames_received", "_process_frame", "_terminate_stream"),
    "_output_marshaled_frames",  # by rabbitmq_client.py
    # for a plain socket alone
    *("_AsyncPlaintextTransport", "_MAX_CONSUME_BYTES", "_transport", "_adapter_emit_data"),
    *("_on_socket_readable", "_on_socket_writable"),
}
