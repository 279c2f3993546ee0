"""What tests of the whole service share: a replica on their queue and database, raw publishing, and waiting."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import psycopg2
from prometheus_client.parser import text_string_to_metric_families

import seals
from lab.service import ROOT, ServiceProcess
from rabbitmq_client import connection_parameters, declare_queue
from scripts.local_services import LocalServices
from test_publisher import Message, parts_of, totals_of

POLL_SECONDS = 0.05


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 30) -> Any:
    """The first truthy answer of ``condition``. Raises AssertionError naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what} (last answer {answer!r})")
        time.sleep(POLL_SECONDS)


def vote(law_id: str = "law-001", choice: str = "oui", **changes: Any) -> dict[str, Any]:
    """A valid vote, as the object that a message holds."""
    return {"vote_id": str(uuid.uuid4()), "law_id": law_id, "choice": choice, **changes}


class Queue:
    """The queue of one test: raw publishing with confirms, and how much it holds."""

    def __init__(self, url: str, name: str, queue_type: str = "classic") -> None:
        self.url = url  # or several, with commas between them
        self.name = name
        self.queue_type = queue_type

    @property
    def urls(self) -> list[str]:
        return self.url.split(",")

    def connect(self) -> pika.BlockingConnection:
        """To one of the servers: the first that answers."""
        return pika.BlockingConnection([connection_parameters(url, 30, "tests") for url in self.urls])

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        connection = self.connect()
        try:
            channel, _ = declare_queue(connection, self.name, self.queue_type, 10)
            channel.confirm_delivery()
            yield channel
        finally:
            connection.close()

    def publish(self, *bodies: bytes | dict[str, Any], **properties: Any) -> None:
        """Publish each body (an object is made JSON), persistent, and wait for the confirm of each."""
        with self.channel() as channel:
            for body in bodies:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                channel.basic_publish(
                    "", self.name, raw, pika.BasicProperties(delivery_mode=2, **properties), mandatory=True
                )

    def ready(self) -> int:
        """Messages that wait; those that are delivered and not acked are not among them."""
        with self.channel() as channel:
            return int(channel.queue_declare(self.name, passive=True).method.message_count)

    def delete(self) -> None:
        connection = self.connect()
        connection.channel().queue_delete(self.name)
        connection.close()


class Results:
    """What stands in the database of one test."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """All rows. Waits a few seconds at most for a server that hangs or a table that is locked."""
        connection = psycopg2.connect(self.url, connect_timeout=3, options="-c lock_timeout=3s")
        try:
            with connection, connection.cursor() as cur:
                cur.execute(sql, arguments or None)
                return cur.fetchall() if cur.description else []
        finally:
            connection.close()

    def execute(self, sql: str) -> None:
        """Run one statement that may not stand in a transaction."""
        connection = psycopg2.connect(self.url)
        try:
            connection.autocommit = True
            connection.cursor().execute(sql)
        finally:
            connection.close()

    def is_there(self) -> bool:
        """Whether the database can be connected to."""
        try:
            self.value("SELECT 1")
        except psycopg2.OperationalError:
            return False
        return True

    def value(self, sql: str, *arguments: Any) -> Any:
        return self.query(sql, *arguments)[0][0]

    def certify(self, *law_ids: str) -> None:
        """Close laws and certify their present totals, without the proof that reconcile.py asks for."""
        of_nothing = hashlib.sha256(b"").digest()
        fields = of_nothing, of_nothing, "2026-01-01 00:00:00+00", seals.NO_HASH, of_nothing, bytes(32)
        made = seals.Seal(1, 0, 1, 0, *fields)
        self.query(
            """
            INSERT INTO audit_seals
            SELECT 1, 0, 1, 0, %s, %s, %s, %s, %s, '', %s, %s WHERE NOT EXISTS (SELECT FROM audit_seals);
            UPDATE laws SET status = 'closed' WHERE law_id = ANY (%s);
            INSERT INTO certified_results
            SELECT law_id, oui, non, '2026-01-01Z', 'a test', 1, jsonb_build_object(
                'law_id', law_id, 'oui', oui, 'non', non, 'total', oui + non, 'certified_by', 'a test',
                'seal', (SELECT concat(seal_id, ':', encode(seal_hash, 'hex')) FROM audit_seals WHERE seal_id = 1))
            FROM (SELECT law_id, coalesce(oui_count, 0) AS oui, coalesce(non_count, 0) AS non
                  FROM laws LEFT JOIN vote_results USING (law_id) WHERE law_id = ANY (%s)) AS law;
            UPDATE laws SET status = 'certified' WHERE law_id = ANY (%s)
            """,
            *(made.merkle_root, made.leaves_hash, made.sealed_at, made.previous_hash, made.hash()),
            *(made.records_hash, made.salt),
            *[list(law_ids)] * 3,
        )

    def totals(self) -> dict[str, tuple[int, int]]:
        rows = self.query("SELECT law_id, oui_count, non_count FROM vote_results ORDER BY law_id")
        return {law_id: (oui, non) for law_id, oui, non in rows}

    def audited(self) -> dict[str, tuple[int, int]]:
        """The totals as they follow from the audit log."""
        rows = self.query(
            "SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')"
            " FROM vote_audit GROUP BY law_id ORDER BY law_id"
        )
        return {law_id: (oui, non) for law_id, oui, non in rows}

    def counted(self) -> int:
        return sum(oui + non for oui, non in self.totals().values())

    def rejected(self) -> dict[str, int]:
        return dict(self.query("SELECT reason, count(*) FROM rejected_messages GROUP BY reason ORDER BY reason"))

    def duplicates(self) -> dict[str, int]:
        return dict(self.query("SELECT reason, count(*) FROM duplicate_attempts GROUP BY reason ORDER BY reason"))


class Service(ServiceProcess):
    """A replica on a test's queue and database."""

    def __init__(
        self,
        directory: Path,
        name: str,
        queue: Queue,
        results: Results,
        settings: dict[str, str] | None = None,
        root: Path = ROOT,
    ) -> None:
        """``settings`` are environment variables that win over the others; ``root`` is the folder of aggregator.py."""
        addresses = {"AMQP_URL": queue.url, "DATABASE_URL": results.url, "RABBITMQ_QUEUE": queue.name}
        if queue.queue_type != "classic":
            addresses["RABBITMQ_QUEUE_TYPE"] = queue.queue_type
        super().__init__(directory / f"{name}.log", addresses | (settings or {}), root)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics; 0 where it is not there."""
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """All samples of that name that are not 0, by the values of their labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {tuple(sample.labels.values()): sample.value for sample in samples if sample.value}

    def close(self) -> None:
        self.kill()


def wait_settled(services: LocalServices, queue: Queue, timeout: float = 60) -> None:
    """Until the broker has nothing left of the queue's messages, neither waiting nor delivered and unacked."""

    def is_settled() -> bool:
        listing = services.rabbitmq.ctl("list_queues", "name", "messages", "--formatter", "json")
        return all(row["messages"] == 0 for row in json.loads(listing) if row["name"] == queue.name)

    wait_until(lambda: queue.ready() == 0 and is_settled(), "the queue is empty and all is acked", timeout)


def check_exact(results: Results, messages: list[Message]) -> None:
    """Totals, audit log and what was published agree to the vote."""
    assert results.totals() == results.audited() == totals_of(messages)
    invalid = {part.id for part in parts_of(messages) if part.kind == "invalid"}
    kept = {bytes(digest).hex() for (digest,) in results.query("SELECT body_sha256 FROM rejected_messages")}
    assert kept == invalid
