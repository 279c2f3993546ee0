"""The part of the broker's edge that needs no broker: reading the properties of a message, how long to gather."""

from __future__ import annotations

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rabbitmq_client import FASTEST_DELIVERY_SECONDS, GATHER_SECONDS, describe, gathering_seconds

short = st.none() | st.text(max_size=60)


@given(
    st.fixed_dictionaries(
        {
            "content_type": short,
            "content_encoding": short,
            "headers": st.none()
            | st.dictionaries(st.text(max_size=9), st.integers(0, 9) | st.text(max_size=9), max_size=3),
            "delivery_mode": st.none() | st.sampled_from([1, 2]),
            "priority": st.none() | st.integers(0, 255),
            "correlation_id": short,
            "reply_to": short,
            "expiration": short,
            "message_id": short,
            "timestamp": st.none() | st.integers(0, 2**63),
            "type": short,
            "user_id": short,
            "app_id": short,
        }
    )
)
def test_the_two_properties_are_read_among_any_others(properties: dict[str, object]) -> None:
    """As pika encodes them; what is not asked for is stepped over."""
    encoded = b"".join(pika.BasicProperties(**properties).encode())  # type: ignore[arg-type]
    read = pika.spec.props[pika.BasicProperties.INDEX]().decode(encoded)
    assert (read.message_id, read.content_encoding) == (properties["message_id"], properties["content_encoding"])


TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def headers_read(headers: object) -> object:
    """What is read of headers as pika encodes them."""
    encoded = b"".join(pika.BasicProperties(headers=headers, message_id="m").encode())  # type: ignore[arg-type]
    read = pika.spec.props[pika.BasicProperties.INDEX]().decode(encoded)
    assert read.message_id == "m"
    return read.headers


@given(st.dictionaries(st.text(max_size=9), st.integers(0, 9) | st.text(max_size=9), max_size=3), st.booleans())
def test_the_traceparent_is_read_among_any_other_headers(others: dict[str, object], as_bytes: bool) -> None:
    """As text, or as bytes; of the others nothing is."""
    value = TRACEPARENT.encode() if as_bytes else TRACEPARENT
    assert headers_read({**others, "traceparent": value, "z": "y"}) == {"traceparent": TRACEPARENT}
    assert headers_read(others) is None


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
    assert headers_read({"traceparent": value}) is None


@given(st.integers(0, 2**62), st.dictionaries(st.text(max_size=9), st.integers(0, 9), max_size=3))
def test_the_delivery_count_of_a_quorum_queue_is_read(count: int, others: dict[str, object]) -> None:
    """As RabbitMQ writes it, a signed integer of eight bytes, whatever stands around it."""
    headers = {**others, "x-delivery-count": pika.compat.long(count), "z": "y"}
    assert headers_read(headers) == {"x-delivery-count": count}
    assert headers_read(headers | {"traceparent": TRACEPARENT}) == {
        "traceparent": TRACEPARENT,
        "x-delivery-count": count,
    }
    assert headers_read({"x-delivery-count": str(count)}) is None


def test_a_traceparent_behind_the_headers_is_none() -> None:
    """Only the headers are searched, not what follows them."""
    hidden = b"\x0btraceparentS\0\0\x007" + TRACEPARENT.encode()
    encoded = b"".join(pika.BasicProperties(headers={"a": 1}, message_id="m", user_id=hidden.decode()).encode())
    assert pika.spec.props[pika.BasicProperties.INDEX]().decode(encoded).headers is None


@given(st.text(max_size=60), st.integers(0, 2**64 - 1), st.booleans(), st.text(max_size=60))
def test_what_is_used_of_a_delivery_is_read_as_pika_reads_it(consumer: str, tag: int, again: bool, key: str) -> None:
    """The consumer, the tag and the redelivered flag; exchange and routing key are not."""
    encoded = b"".join(pika.spec.Basic.Deliver(consumer, tag, again, "", key).encode())
    read = pika.spec.methods[pika.spec.Basic.Deliver.INDEX]().decode(encoded)
    assert (read.consumer_tag, read.delivery_tag, read.redelivered) == (consumer, tag, again)


def test_a_message_id_that_is_not_utf8_is_spelt_out() -> None:
    """So that it is text like any other, and no UUID."""
    encoded = pika.BasicProperties.FLAG_MESSAGE_ID.to_bytes(2) + b"\x02\xff\xfe"
    assert pika.spec.props[pika.BasicProperties.INDEX]().decode(encoded).message_id == r"\xff\xfe"


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (OSError(111, "Connection refused"), "ConnectionRefusedError: 111, Connection refused"),
        (pika.exceptions.AMQPConnectionError(OSError("gone")), "AMQPConnectionError: gone"),
        (
            pika.exceptions.AMQPConnectionError(ConnectionRefusedError()),
            "AMQPConnectionError: ConnectionRefusedError()",
        ),
    ],
)
def test_an_error_is_told_in_one_line(exc: Exception, text: str) -> None:
    """Also where its own text is empty."""
    assert describe(exc) == text


@given(st.integers(-10, 70_000))
def test_a_burst_is_gathered_no_longer_than_the_broker_may_need_to_fill_the_prefetch(room: int) -> None:
    """Whoever waits for messages that the broker may not send yet waits in vain."""
    assert 0 <= gathering_seconds(room) <= max(0.0, min(GATHER_SECONDS, room * FASTEST_DELIVERY_SECONDS))


def test_a_burst_is_gathered_while_there_is_room_and_not_at_its_end() -> None:
    """With most of a prefetch of 2,000 free, of 100 half free, and full."""
    assert gathering_seconds(1_500) == GATHER_SECONDS
    assert 0 < gathering_seconds(40) < GATHER_SECONDS
    assert gathering_seconds(1) == gathering_seconds(0) == 0
