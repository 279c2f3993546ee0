"""Sends each line of standard input as aio-pika sends it without being told anything.

python send_aio_pika.py URL QUEUE [gzip]
"""

from __future__ import annotations

import asyncio
import sys

import aio_pika


async def main(url: str, queue: str, encoding: str | None = None) -> None:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        for line in sys.stdin:
            body = line.strip().encode()
            message = aio_pika.Message(body, content_encoding=encoding) if encoding else aio_pika.Message(body)
            await channel.default_exchange.publish(message, routing_key=queue)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
