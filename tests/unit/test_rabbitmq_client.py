"""The part of the broker's edge that needs no broker: reading the properties of a message."""

from __future__ import annotations

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rabbitmq_client import describe

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
