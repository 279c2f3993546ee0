"""What 200 open pages cost the count: `make bench-page`.

Pairs of drains of the same backlog, by a new service each: one without clients, one with CLIENTS clients that poll
/results.json as the page does (a connection each, kept open, every two seconds, If-None-Match), in random order within
a pair. The rate is from the first to the last commit, by the database's clock. The service's own processor time is told
too: other work on the machine disturbs it less. The clients live in a process of their own, and end with the drain; 503
is what they are told before the service has made its tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import selectors
import socket
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg2

from bench.cpu import cpu_seconds
from scripts import demo
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages

POLL_SECONDS = 2.0  # as web/index.html
DRAIN_SECONDS = 600.0


def main() -> int:
    """Measure and print a table and, as the last line, the numbers in JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--votes", type=int, default=100_000)
    parser.add_argument("--laws", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    ratios: list[float] = []
    polls: list[float] = []
    print("pair    alone /s  with pages /s   ratio  polls /s    200   304   503   cut  cpu alone  cpu with")
    with tempfile.TemporaryDirectory(prefix="votes-bench-") as folder:
        for pair in range(options.pairs):
            rates: dict[int, float] = {}
            told: dict[str, float] = {}
            cpu: dict[int, float] = {}
            for clients in random.sample((0, options.clients), 2):
                with LocalServices(Path(folder) / uuid.uuid4().hex[:8]) as services:
                    rates[clients], counts = drain(services, Path(folder), options.votes, options.laws, clients)
                cpu[clients] = counts["service_cpu_seconds"]
                told |= counts if clients else {}
            ratios.append(rates[options.clients] / rates[0])
            polls.append(told["polls_a_second"])
            print(
                f"{pair + 1:>4} {rates[0]:>10,.0f} {rates[options.clients]:>14,.0f} {ratios[-1]:>7.3f}"
                f" {polls[-1]:>9.0f} {told['200']:>6.0f} {told['304']:>5.0f} {told['503']:>5.0f} {told['cut']:>5.0f}"
                f" {cpu[0]:>8.1f} s {cpu[options.clients]:>7.1f} s",
                flush=True,
            )
    median = statistics.median(ratios)
    print(f"median ratio {median:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; {options.clients} clients")
    print(json.dumps({"clients": options.clients, "ratios": [round(r, 4) for r in ratios], "median": round(median, 4)}))
    return 0


def drain(services: LocalServices, folder: Path, votes: int, laws: int, clients: int) -> tuple[float, dict[str, float]]:
    """Votes a second of one drain, and what the clients saw."""
    amqp_url, database_url = services.rabbitmq.url(), services.postgres.url()
    if not Publisher([amqp_url], demo.QUEUE).publish(make_messages(votes, laws, 1)).all_confirmed:
        raise demo.DemoFailed("not all votes are confirmed")
    port = free_port()
    stop = multiprocessing.Event()
    seen: multiprocessing.Queue[dict[str, float]] = multiprocessing.Queue()
    pages = multiprocessing.Process(target=poll, args=(port, clients, stop, seen), daemon=True)
    pages.start()
    with demo.running_service(folder, amqp_url, database_url, port) as service:
        connection = psycopg2.connect(database_url)
        connection.autocommit = True
        with connection.cursor() as cursor:

            def counted() -> int:
                cursor.execute("SELECT coalesce(sum(oui_count + non_count), 0)::bigint FROM vote_results")
                return int((cursor.fetchone() or (0,))[0])

            if not demo.wait_until(lambda: counted() >= votes, DRAIN_SECONDS):
                raise demo.DemoFailed("not drained in time")
            cursor.execute("SELECT extract(epoch FROM max(recorded_at) - min(recorded_at))::float8 FROM vote_audit")
            seconds = float((cursor.fetchone() or (0.0,))[0])
        connection.close()
        stop.set()
        told = seen.get(timeout=30) | {"service_cpu_seconds": cpu_seconds([service.pid])}
        pages.join()
        service.stop()
    return votes / seconds, told


def poll(port: int, clients: int, stop: Any, seen: Any) -> None:
    """Body of the clients' process: each polls in its own rhythm, and comes again when it is cut."""
    selector = selectors.DefaultSelector()
    due = [time.monotonic() + POLL_SECONDS * number / max(clients, 1) for number in range(clients)]
    socks: list[socket.socket | None] = [None] * clients
    etags, answers = [b""] * clients, [b""] * clients
    polls = 0
    seen_answers: Counter[str] = Counter()
    started = time.monotonic()
    while not stop.is_set() and time.monotonic() - started < DRAIN_SECONDS:
        now = time.monotonic()
        for number in itertools.compress(range(clients), (moment <= now for moment in due)):
            due[number] = now + POLL_SECONDS
            sock = socks[number]
            try:
                if sock is None:
                    sock = socks[number] = socket.create_connection(("127.0.0.1", port), timeout=10)
                    selector.register(sock, selectors.EVENT_READ, number)
                known = b"If-None-Match: %b\r\n" % etags[number] if etags[number] else b""
                sock.sendall(b"GET /results.json HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % known)
                answers[number] = b""
                polls += 1
            except OSError:
                seen_answers["cut"] += sock is not None  # before the service listens there is none
                _forget(selector, socks, number)
        for key, _ in selector.select(0.02):
            number = key.data
            received = key.fileobj.recv(262_144)  # type: ignore[union-attr]
            if not received:
                seen_answers["cut"] += 1
                _forget(selector, socks, number)
                continue
            had_its_head = b"\r\n\r\n" in answers[number]
            answers[number] += received
            head, end, _ = answers[number].partition(b"\r\n\r\n")
            if end and not had_its_head:
                seen_answers[head[9:12].decode()] += 1
                for line in head.split(b"\r\n"):
                    if line.startswith(b"ETag: "):
                        etags[number] = line.removeprefix(b"ETag: ")
    seconds = time.monotonic() - started
    seen.put({"polls_a_second": polls / seconds, **{kind: seen_answers[kind] for kind in ("200", "304", "503", "cut")}})


def _forget(selector: selectors.BaseSelector, socks: list[socket.socket | None], number: int) -> None:
    sock, socks[number] = socks[number], None
    if sock is not None:
        selector.unregister(sock)
        sock.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
