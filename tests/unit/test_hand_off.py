"""The hand-off between the threads, without them."""

from __future__ import annotations

from typing import cast

from deliveries import Delivery
from hand_off import MAX_BURST_BYTES, MAX_WAITING_BYTES, HandOff, read
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
