"""The lab of tests/faults on a cluster of RabbitMQ nodes and a pair of PostgreSQL servers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType

import psycopg2

from scripts.local_cluster import PostgresPair, RabbitMQCluster
from tests.faults.lab import Lab
from tests.harness import ROOT

# Short waits, so that 25 periods of holding take seconds; what is tested is the order of things, not their length.
HOLD_SECONDS = 0.25
SETTINGS = {
    "HOLD_SECONDS": str(HOLD_SECONDS),
    "RETRY_BACKOFF_MAX_SECONDS": "0.2",
    "MAX_RETRIES": "2",
    "RABBITMQ_HEARTBEAT": "4",
}
DELIVERY_LIMIT = 20  # RabbitMQ 4's own, given explicitly so that the tests mean the same on an older broker
LIVENESS_SECONDS = 60.0


class HaLab(Lab):
    """A quorum queue on three nodes, a primary with a synchronous standby, and replicas that know all of them.

    Each replica reaches each server by a proxy of its own. Use it as a context manager.
    """

    queue_type = "quorum"

    def __init__(
        self,
        cluster: RabbitMQCluster,
        pair: PostgresPair,
        directory: Path,
        root: Path = ROOT,
        patience: float = LIVENESS_SECONDS,
        delivery_limit: int | None = DELIVERY_LIMIT,
    ) -> None:
        """``delivery_limit`` is the queue's x-delivery-limit; with None the service's own declaration is used."""
        super().__init__(SimpleNamespace(rabbitmq=cluster, postgres=pair), directory, root, patience)
        self.cluster = cluster
        self.pair = pair
        self.events: list[str] = []  # of faults, what really happened
        self._delivery_limit = delivery_limit

    def _prepare_queue(self) -> None:
        arguments: dict[str, object] = {"x-queue-type": "quorum"}
        if self._delivery_limit is not None:
            arguments["x-delivery-limit"] = self._delivery_limit
            connection = self.queue.connect()
            connection.channel().queue_declare(self.queue.name, durable=True, arguments=arguments)
            connection.close()
        else:
            self.queue.ready()  # declares it as the service does

    def replica(self, wait: bool = True, **settings: str):  # type: ignore[no-untyped-def]
        """Start one more replica, with short waits."""
        return super().replica(wait, **(SETTINGS | settings))

    def most_returns(self) -> int:
        """The highest x-delivery-count that any replica was sent, as its proxies have seen it."""
        seen = [int(moment.split()[1]) for moment in self.hits() if moment.startswith("returned ")]
        return max(seen, default=0)

    def waiting_commits(self) -> int:
        """How many commits of replicas wait for the standby."""
        with contextlib.suppress(psycopg2.Error):
            return int(
                self.results.value(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                    " AND datname = current_database() AND application_name LIKE 'vote-aggregator %'"
                )
            )
        return 0

    def promote(self) -> None:
        """The primary dies, and the standby takes its place; it is what the users have from now on."""
        with self.observer.failing_over():
            self.pair.primary.kill()  # before the standby can hear more of it
            if self.pair.standby.is_running():
                self.pair.thaw_standby()
            self.pair.standby.start()
            self.pair.promote()
        self.events.append("promotion")

    def heal(self) -> None:
        """End all faults of servers and links, and start what is dead."""
        if any("leader" in event or "follower" in event for event in self.events):
            self.cluster.heal()  # asks every node whom it sees, which takes seconds
        self.pair.heal()
        super().heal()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is not None:
                self.cluster.heal()
                self.pair.heal()  # else dropping the database would wait for a standby that is away
        finally:
            super().__exit__(kind, exc, tb)

    def without_standby(self, sql: str) -> None:
        """Run it as an operator would in such an hour: without waiting for the standby."""
        self.results.query(f"SET LOCAL synchronous_commit = local; {sql}")


def in_background(action: Callable[[], object]) -> threading.Thread:
    """Start it in a thread."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread
