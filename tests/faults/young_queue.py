"""How RabbitMQ treats a durable queue that is killed young: `python -m tests.faults.young_queue --age 0 --trials 20`.

No service takes part: a publisher with confirms, three consumers that ack in batches, kill -9, start. Counts the trials
in which the queue is gone, and with it what was confirmed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import threading
import time
from pathlib import Path

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

from rabbitmq_client import declare_queue
from scripts.local_services import RabbitMQServer
from test_publisher import Publisher, make_messages


def consume(url: str, queue: str, acked: set[str]) -> None:
    """Ack by twenties until the broker dies."""
    with contextlib.suppress(AMQPError):
        channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
        channel.basic_qos(prefetch_count=100)
        held: list[str] = []
        for method, properties, _ in channel.consume(queue):
            held.append(properties.message_id)
            if len(held) == 20:
                channel.basic_ack(method.delivery_tag, multiple=True)
                acked.update(held)
                held.clear()


def trial(broker: RabbitMQServer, queue: str, age: float, rng: random.Random) -> bool:
    """Whether the queue survives a kill under load when it is ``age`` seconds old, and one or two more."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.url()))
    declare_queue(connection, queue, "classic", 10)
    connection.close()
    time.sleep(age)
    acked: set[str] = set()
    publisher = Publisher([broker.url()], queue, rate=250)
    threads = [threading.Thread(target=consume, args=(broker.url(), queue, acked)) for _ in range(3)]
    threads.append(threading.Thread(target=publisher.publish, args=(make_messages(2_000, seed=rng.randrange(2**32)),)))
    for thread in threads:
        thread.start()
    time.sleep(rng.uniform(1, 2))
    broker.kill()
    for thread in threads:
        thread.join()
    broker.start()
    connection = pika.BlockingConnection(pika.URLParameters(broker.url()))
    channel = connection.channel()
    try:
        ready = channel.queue_declare(queue, passive=True).method.message_count
    except ChannelClosedByBroker:
        ready = None
    connection.close()
    confirmed = len(publisher.result.in_state("confirmed"))
    print(
        f"{queue}: {confirmed} confirmed, {len(acked)} acked, left {'- the queue is gone' if ready is None else ready}"
    )
    return ready is not None


def main() -> None:
    """Print each trial and the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--age", type=float, default=0.0, help="seconds between the declaration and the load")
    parser.add_argument("--trials", type=int, default=20)
    arguments = parser.parse_args()
    rng = random.Random(arguments.trials)
    with (
        tempfile.TemporaryDirectory(prefix="young-queue-") as directory,
        RabbitMQServer(Path(directory) / "rabbitmq") as broker,
    ):
        kept = [trial(broker, f"votes.young-{number}", arguments.age, rng) for number in range(arguments.trials)]
    print(f"{kept.count(False)} of {len(kept)} queues gone")


if __name__ == "__main__":
    main()
