"""A place to break things in: replicas of the service behind proxies, a publisher with a ledger, and the oracle."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from psycopg2.extensions import make_dsn, parse_dsn

from rabbitmq_client import BrokerUnavailable
from test_publisher import Message, Publisher
from tests.conftest import empty_database, empty_queue
from tests.faults.arrays import Array
from tests.faults.oracle import Ledger, Observer, Violation, check_ledger, check_safety
from tests.faults.proxy import AmqpWatcher, PostgresWatcher, TcpProxy
from tests.harness import ROOT, Queue, Results, Service, wait_until

# Short waits, so that a fault and its recovery take seconds; what is tested is the order of things, not their length.
SETTINGS = {
    "BATCH_SIZE": "20",
    "BATCH_TIMEOUT_SECONDS": "0.1",
    "RETRY_BACKOFF_SECONDS": "0.05",
    "DB_TIMEOUT_SECONDS": "2",
    "RABBITMQ_HEARTBEAT": "2",
    "SHUTDOWN_TIMEOUT_SECONDS": "5",
    "RECONCILE_SECONDS": "3600",  # its connection, after a minute on a busy machine, would pass for a leaked one
}
LIVENESS_SECONDS = 30.0


class Replica(Service):
    """A replica that reaches both servers only through proxies of its own, which see and break what it does."""

    def __init__(
        self, directory: Path, name: str, queue: Queue, results: Results, settings: dict[str, str], root: Path
    ) -> None:
        self.brokers = [TcpProxy(_address(url), AmqpWatcher).start() for url in queue.urls]
        self.databases = [TcpProxy(address, PostgresWatcher).start() for address in _servers(results.url)]
        ports = ",".join(str(proxy.port) for proxy in self.databases)
        through = {
            "AMQP_URL": ",".join(map(_through, queue.urls, [proxy.port for proxy in self.brokers])),
            "DATABASE_URL": make_dsn(results.url, port=ports, sslmode="disable", gssencmode="disable"),
        }
        super().__init__(directory, name, queue, results, SETTINGS | settings | through, root)

    @property
    def broker(self) -> TcpProxy:
        """The link to the broker, where that is one server."""
        (proxy,) = self.brokers
        return proxy

    @property
    def database(self) -> TcpProxy:
        """The link to the database, where that is one server."""
        (proxy,) = self.databases
        return proxy

    @property
    def proxies(self) -> list[TcpProxy]:
        return self.brokers + self.databases

    def heal(self) -> None:
        """End all faults of all links, and start the process again if it is dead."""
        for proxy in self.proxies:
            proxy.heal()
        if not self.is_running():
            self.start()

    def close(self) -> None:
        super().close()
        for proxy in self.proxies:
            proxy.stop()


class Lab:
    """One queue, one database, and all that works on them. Use it as a context manager."""

    queue_type = "classic"

    def __init__(self, services: Any, directory: Path, root: Path = ROOT, patience: float = LIVENESS_SECONDS) -> None:
        """``services`` has a ``rabbitmq`` and a ``postgres``, as LocalServices has.

        ``directory`` takes logs and the ledger; ``root`` is the folder of the service to try.

        ``patience`` is how many seconds the service may take to come to rest after healing.
        """
        self.services = services
        self.directory = directory
        self.replicas: list[Replica] = []
        self._root = root
        self._patience = patience
        self._ledger_path = directory / "ledger.jsonl"
        self._publishers: list[threading.Thread] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self.queue = stack.enter_context(empty_queue(self.services, self.queue_type))
            self._prepare_queue()
            self.queue.ready()  # declares it
            self.declared_at = time.monotonic()
            self.results = stack.enter_context(empty_database(self.services))
            self._ledger = stack.enter_context(self._ledger_path.open("a"))
            self.observer = Observer(self.results)
            self.observer.start()
            stack.callback(self.observer.stop)
            stack.callback(self._close_replicas)
            stack.callback(self.join_publishers)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _prepare_queue(self) -> None:
        """Declare the queue as the service would not, where a test wants that."""

    def _close_replicas(self) -> None:
        for replica in self.replicas:
            replica.close()

    def replica(self, wait: bool = True, **settings: str) -> Replica:
        """Start one more replica."""
        name = f"replica-{len(self.replicas) + 1}"
        replica = Replica(self.directory, name, self.queue, self.results, settings, self._root)
        self.replicas.append(replica)
        replica.start()
        if wait:
            replica.wait_ready()
        return replica

    def publish(self, messages: Iterable[Message], rate: float | None = None) -> None:
        """Publish everything, through whatever happens to the broker; what is unknown is not sent again."""
        left = list(messages)
        self._note_arrays(left)
        deadline = time.monotonic() + 120 + (len(left) / rate if rate else 0)
        while left:
            try:
                publisher = Publisher(
                    self.queue.urls,
                    self.queue.name,
                    queue_type=self.queue.queue_type,
                    rate=rate,
                    silence_seconds=30,
                    ledger=self._ledger,
                )
                result = publisher.publish(left)
                left = left[len(result.messages) :]
                if left and time.monotonic() > deadline:
                    raise Violation(f"{len(left)} messages cannot be published: {result.failure}")
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)  # not a wait for anything in particular: the broker is away for a while

    def _note_arrays(self, messages: Iterable[Message]) -> None:
        """Write what they hold into the ledger, before any of it can count."""
        for message in messages:
            if isinstance(message, Array):
                line = {"id": message.id, "entries": message.entries(), "state": "holds"}
                self._ledger.write(json.dumps(line) + "\n")
        self._ledger.flush()

    def publish_behind(self, messages: Iterable[Message], rate: float) -> None:
        """Publish in the background, ``rate`` messages a second."""
        thread = threading.Thread(target=self.publish, args=(messages, rate), name="publisher", daemon=True)
        thread.start()
        self._publishers.append(thread)

    def join_publishers(self) -> None:
        for thread in self._publishers:
            thread.join()

    def heal(self) -> None:
        """End all faults and start what is dead."""
        for replica in self.replicas:
            replica.heal()

    def check(self) -> None:
        """Wait until the service has come to rest, and ask the oracle. Raises Violation."""
        self.wait_at_rest()
        try:
            wait_until(lambda: all(r.is_ready() for r in self.replicas), "every replica is ready", self._patience)
            wait_until(self._no_connection_leaked, "no connection is leaked", self._patience)
        except AssertionError as exc:
            raise Violation(f"the service does not come back: {exc}") from exc
        self.observer.stop()
        if self.observer.violation:
            raise self.observer.violation
        try:
            check_safety(self.results, {})
            check_ledger(self.results, self.ledger())
        except Violation:
            self._keep_tables()
            raise

    def ledger(self) -> Ledger:
        """What was published until now."""
        return Ledger.read(self._ledger_path)

    def _keep_tables(self) -> None:
        """Write what the database holds beside the logs: it is dropped with the lab."""
        for table in ("vote_results", "vote_audit", "duplicate_attempts"):
            rows = self.results.query(f"SELECT to_jsonb({table})::text FROM {table}")
            (self.directory / f"{table}.jsonl").write_text("".join(f"{row}\n" for (row,) in rows))

    def finish_batches(self) -> None:
        """Restart every replica in order once it holds all that is left, so that no batch waits for its timer."""
        try:
            wait_until(lambda: self.queue.ready() == 0, "the queue is empty", self._patience)
        except AssertionError as exc:
            raise Violation(str(exc)) from exc
        for replica in self.replicas:
            replica.stop()
            replica.start_and_wait()

    def hits(self) -> Counter[str]:
        """How often each moment was really reached, over all replicas: ambiguous commits and so on."""
        total: Counter[str] = Counter()
        for replica in self.replicas:
            for proxy in replica.proxies:
                total += proxy.reached
        return total

    def wait_at_rest(self) -> None:
        """Wait until all is published and the broker has nothing left of it. Raises Violation where that takes long."""
        self.join_publishers()
        try:
            wait_until(lambda: self.queue.ready() == 0, "the queue is empty", self._patience)
            wait_until(self.all_acked, "nothing is unacked", self._patience)
        except AssertionError as exc:
            raise Violation(f"the service does not come to rest: {exc}") from exc

    def all_acked(self) -> bool:
        """Whether the broker has nothing left, neither waiting nor delivered."""
        if any(r.is_running() and r.metric("votes_in_flight") for r in self.replicas):
            return False  # so it says itself, and asking rabbitmqctl costs a second of CPU
        return self.unsettled() == 0

    def unsettled(self) -> int:
        """How many messages the broker has: those that wait, and those that are delivered and not acked."""
        listing = self.services.rabbitmq.ctl("list_queues", "name", "messages", "--formatter", "json")
        return sum(row["messages"] for row in json.loads(listing) if row["name"] == self.queue.name)

    def _no_connection_leaked(self) -> bool:
        """The server sees of each replica no more than the smallest pool."""
        rows = self.results.query(
            "SELECT application_name, count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'vote-aggregator %' GROUP BY 1"
        )
        return all(count <= 2 for _, count in rows)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def _servers(url: str) -> list[tuple[str, int]]:
    """Host and port of each server that libpq would try."""
    parts = parse_dsn(url)
    hosts, ports = parts["host"].split(","), parts["port"].split(",")
    return [(host, int(port)) for host, port in zip(hosts, ports, strict=True)]


def _through(url: str, port: int) -> str:
    """``url`` with the port of a proxy in place of the server's."""
    return url.replace(f":{_address(url)[1]}/", f":{port}/")
