"""The yardstick: the least that a consumer with pika can do. It takes messages, acks them in batches, and nothing else.

    python bench/bare_consumer.py URL QUEUE MESSAGES PREFETCH BATCH

Prints one JSON object: seconds from the moment its consumer was accepted to the last ack, CPU seconds of the process
meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pika


def main(url: str, queue: str, messages: int, prefetch: int, batch: int) -> None:
    """Take so many messages and ack every ``batch`` of them."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=prefetch)
    taken, ended, cpu_after = 0, 0.0, 0.0

    def on_message(channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        nonlocal taken, ended, cpu_after
        taken += 1
        if taken % batch == 0 or taken == messages:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if taken == messages:
            ended, cpu_after = time.monotonic(), time.process_time()
            channel.stop_consuming()

    channel.basic_consume(queue, on_message)
    started, cpu_before = time.monotonic(), time.process_time()
    channel.start_consuming()
    print(json.dumps({"seconds": ended - started, "cpu_seconds": cpu_after - cpu_before}))
    connection.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
