"""The hand-off between the threads, without them."""

from __future__ import annotations

import queue
from typing import cast

import pytest

from deliveries import Delivery
from hand_off import (
    BYTES_BESIDE_BODY,
    FLUSH_BYTES,
    MAX_BURST_BYTES,
    MAX_WAITING_BYTES,
    Burst,
    HandOff,
    Signal,
    read,
)
from rabbitmq_client import RabbitMQClient


def test_what_waits_for_the_batcher_is_bounded_in_bytes() -> None:
    """They are handed over in parts that a batch can take, until so many bytes wait, and again once some are taken."""
    body = bytes(64 * 1024)
    deliveries = [Delivery(1, tag, False, body, None, None, None) for tag in range(1, 101)]
    bursts = list(read(deliveries, 0.0))
    assert [message.delivery_tag for burst in bursts for message in burst.messages] == list(range(1, 101))
    assert max(burst.size for burst in bursts) <= MAX_BURST_BYTES
    hand_off = HandOff(cast(RabbitMQClient, None))
    put = 0
    while hand_off.has_room(0):
        hand_off.put(bursts[0])
        put += bursts[0].size
    assert MAX_WAITING_BYTES - 2 * MAX_BURST_BYTES < put <= MAX_WAITING_BYTES + MAX_BURST_BYTES
    hand_off.take(0)
    assert hand_off.has_room(0)


def test_the_batcher_is_woken_once_for_what_is_flushed() -> None:
    """Or once there is much of it; and all of it is there before the end is."""
    deliveries = [Delivery(1, tag, False, b"x" * 100, None, None, None) for tag in range(1, 251)]
    hand_off = HandOff(cast(RabbitMQClient, None))
    for delivery in deliveries[:3]:
        hand_off.put(*read([delivery], 0.0))
    with pytest.raises(queue.Empty):
        hand_off.take(0)
    hand_off.flush()
    hand_off.flush()
    assert tags(hand_off.take(0)) == [1, 2, 3]
    for delivery in deliveries[3:]:
        hand_off.put(*read([delivery], 0.0))
    hand_off.end()
    taken: list[int] = []
    while (bursts := hand_off.take(0)) is not Signal.END:
        assert len(bursts) * (100 + BYTES_BESIDE_BODY) <= FLUSH_BYTES + 100 + BYTES_BESIDE_BODY
        taken += tags(bursts)
    assert taken == list(range(4, 251))


def tags(bursts: list[Burst] | Signal) -> list[int]:
    assert isinstance(bursts, list)
    return [message.delivery_tag for burst in bursts for message in burst.messages]
