"""The part of the broker's edge that needs no broker: what an error says, how long to gather, which pika is used."""

from __future__ import annotations

import itertools

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliveries import Delivery, UnknownPika
from rabbitmq_client import (
    FASTEST_DELIVERY_SECONDS,
    GATHER_SECONDS,
    SHORTEST_PAUSE_SECONDS,
    RabbitMQClient,
    describe,
    gathering_seconds,
    settlement,
)


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


@given(st.integers(1, 70_000), st.none() | st.floats(0, 1e-2), st.floats(0, GATHER_SECONDS))
def test_a_burst_is_gathered_no_longer_than_the_broker_may_need_to_fill_the_prefetch(
    room: int, since: float | None, waited: float
) -> None:
    """Whoever waits for messages that the broker may not send yet waits in vain."""
    seconds = gathering_seconds(room, since, waited)
    assert 0 <= seconds <= GATHER_SECONDS - waited
    if since is not None:
        assert seconds <= max(0.0, room * FASTEST_DELIVERY_SECONDS - since)


def test_a_burst_is_gathered_while_there_is_room_and_not_at_its_end() -> None:
    """With most of a prefetch of 2,000 free, of 100 half free, and full; longer each time that nothing came."""
    assert gathering_seconds(1_500, 0.0, 0.0) == GATHER_SECONDS
    assert gathering_seconds(1_500, 0.001, 0.0) == GATHER_SECONDS
    assert gathering_seconds(50, 50e-6, 0.0) == 50 * FASTEST_DELIVERY_SECONDS - 50e-6
    assert gathering_seconds(1, 0.0, 0.0) == gathering_seconds(50, 0.001, 0.0) == 0
    assert gathering_seconds(50, None, 0.0) == SHORTEST_PAUSE_SECONDS
    assert gathering_seconds(50, None, 0.0005) == 0.0005
    assert gathering_seconds(50, None, GATHER_SECONDS - 0.0001) == pytest.approx(0.0001)


def client(reader: str = "one-pass") -> RabbitMQClient:
    return RabbitMQClient(
        ["amqp://u:p@h"],
        "q",
        queue_type="classic",
        prefetch_count=1,
        max_priority=1,
        heartbeat=1,
        name="n",
        max_body=10,
        reader=reader,
    )


def test_another_pika_is_refused_unless_it_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is connected to; the error says which setting helps."""
    monkeypatch.setattr(pika, "__version__", "1.4.0")
    with pytest.raises(UnknownPika, match=r"1\.4\.0.*RABBITMQ_READER=pika"):
        client()
    client("pika")


def test_what_comes_while_its_channel_is_being_closed_is_dropped() -> None:
    """The broker has it back; on the next channel its tag would be another vote."""
    closing = client()
    stale, present = Delivery(0, 7, False, b"", None, None, None), Delivery(1, 1, False, b"", None, None, None)
    closing.give_back()
    closing._on_burst([stale])
    closing._on_burst([present])
    assert closing._burst == [present]


@given(st.lists(st.booleans(), min_size=1), st.integers(0, 1_000))
def test_a_settlement_settles_each_delivery_once_and_as_it_is_to_be(are_rejected: list[bool], before: int) -> None:
    """Whatever was rejected: what the broker does, which settles all up to a tag, comes to the same."""
    tags = range(before + 1, before + 1 + len(are_rejected))
    rejected = [tag for tag, is_rejected in zip(tags, are_rejected, strict=True) if is_rejected]
    acked = [tag for tag in tags if tag not in rejected]
    settled: dict[int, bool] = {}
    methods = settlement(before, max(acked, default=None), rejected)
    for method in methods:
        is_rejected = hasattr(method, "requeue")
        assert not (is_rejected and method.requeue)
        covered = tags if getattr(method, "multiple", False) else [method.delivery_tag]
        fate = {tag: is_rejected for tag in covered if tag <= method.delivery_tag and tag not in settled}
        assert fate
        settled |= fate
    assert settled == dict(zip(tags, are_rejected, strict=True))
    assert len(methods) <= min(len(list(itertools.groupby(are_rejected))), len(rejected) + 1)
