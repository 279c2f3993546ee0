"""Sends each line of standard input as kombu, which is Celery's client, sends it without being told anything.

python send_kombu.py URL QUEUE object|text|bytes [gzip]
"""

from __future__ import annotations

import json
import sys

from kombu import Connection

AS = {"object": json.loads, "text": str, "bytes": str.encode}


def main(url: str, queue: str, form: str, compression: str | None = None) -> None:
    with Connection(url) as connection, connection.Producer() as producer:
        for line in sys.stdin:
            producer.publish(AS[form](line.strip()), routing_key=queue, compression=compression)


if __name__ == "__main__":
    main(*sys.argv[1:])
