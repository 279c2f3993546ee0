"""What every measurement stands on: private servers, the service as a process, full queues, and the gate.

The service is the one of this folder, unmodified: ``aggregator.py`` with settings in its environment. Each run has a
queue and a database of its own, unless it is given a database that has grown.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pika
import psycopg2

from bench.cpu import cpu_seconds, machine_seconds, peak_megabytes
from bench.node_peer import NodePeer
from database import Database
from lab.service import ROOT, ServiceFailed, ServiceProcess
from rabbitmq_client import declare_queue
from scripts.local_services import LocalServices
from test_publisher import DUPLICATE, INVALID, Message, Publisher, parts_of, totals_of
from votes import Vote

MAX_PRIORITY = 10
VOTES_A_QUERY = 50_000
SLOWEST_RATE = 1_000  # votes a second; a drain that is slower is given up
SLOWEST_BYTES = 4_000_000  # a second, of bodies that are no vote's
Totals = dict[str, tuple[int, int]]

# The commit of the last batch: the counters are updated by every batch that counts anything.
LAST_COMMIT = "SELECT extract(epoch FROM max(pg_xact_commit_timestamp(xmin)))::float FROM vote_results"
# The last batch of each of several replicas is not full and waits for its timeout, so they are measured up to here.
MOST = 0.95
MOST_COMMITTED = """
    SELECT extract(epoch FROM percentile_disc(%s) WITHIN GROUP (ORDER BY pg_xact_commit_timestamp(xmin)))::float
    FROM vote_audit
"""
# The begin of the first batch of those since a moment (Unix time); the database knows nothing earlier of a drain.
FIRST_BATCH = "SELECT extract(epoch FROM min(recorded_at))::float FROM vote_audit WHERE recorded_at >= to_timestamp(%s)"
TOTALS = "SELECT law_id, oui_count, non_count FROM vote_results"
AUDITED = """
    SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
    FROM vote_audit GROUP BY law_id
"""
# How many of these votes stand in the audit log as they were published.
AS_PUBLISHED = """
    SELECT count(*)
    FROM jsonb_to_recordset(%s)
         AS vote (vote_id uuid, law_id text, choice text, voter_hash text, "timestamp" timestamptz)
    JOIN vote_audit AS row USING (vote_id)
    WHERE (row.law_id, row.choice, row.voter_hash, row.voted_at)
          IS NOT DISTINCT FROM (vote.law_id, vote.choice, vote.voter_hash, vote."timestamp")
"""
# Whether a commit waits for the log; what is set for the database or the role is in force here too.
NOT_SAFE = """
    SELECT count(*) FROM pg_settings
    WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit') AND setting <> 'on'
"""
# A table that is not persistent is not in the write-ahead log, and costs a good deal less.
NOT_DURABLE = "SELECT count(*) FROM pg_class WHERE relname IN ('vote_audit', 'vote_results') AND relpersistence <> 'p'"


class Void(Exception):
    """The run did not come to its end, or its totals are wrong: its figures mean nothing."""


class Profile(NamedTuple):
    """The settings that are compared."""

    name: str
    batch: int
    prefetch: int


SPEC = Profile("spec", 100, 100)
TUNED = Profile("tuned", 500, 2000)


@dataclass
class Drain:
    """How a full queue was emptied. CPU is in microseconds a message, in an array a vote; ``others`` is the share of
    the machine's CPU time that went to strangers meanwhile."""

    messages: int
    seconds: float
    consumer_us: float
    broker_us: float
    postgres_us: float = 0.0
    peak_mb: float = 0.0
    others: float = 0.0
    rate: float = field(init=False)

    def __post_init__(self) -> None:
        self.rate = self.messages / self.seconds


class Lab:
    """Private servers with commit timestamps, in a folder that goes. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._numbers = itertools.count(1)
        self.services = LocalServices(folder / "services")

    def __enter__(self) -> Lab:
        self._stack.enter_context(self.services)
        # when a row was committed is not in the row (recorded_at is the start of its transaction), the server knows it
        for setting in ("track_commit_timestamp", "track_wal_io_timing"):
            self.query(self.services.postgres.url(), f"ALTER SYSTEM SET {setting} = on")
        self.services.postgres.stop()
        self.services.postgres.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def amqp_url(self) -> str:
        return self.services.rabbitmq.url()

    def query(self, url: str, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(url)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, arguments or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def value(self, url: str, sql: str, *arguments: object) -> Any:
        return self.query(url, sql, *arguments)[0][0]

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new, empty database, which is dropped at the end."""
        name = f"bench_{next(self._numbers)}"
        self.query(self.services.postgres.url(), f"CREATE DATABASE {name}")
        try:
            yield self.services.postgres.url(name)
        finally:
            self.query(self.services.postgres.url(), f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def queue(self, messages: Sequence[Message] = ()) -> Iterator[str]:
        """A new queue with all of ``messages``, confirmed; deleted at the end. One at a time: the later of two full
        queues is drained more slowly (docs/PERFORMANCE.md)."""
        name = f"bench.{next(self._numbers)}"
        with self._connection() as connection:
            declare_queue(connection, name, "classic", MAX_PRIORITY)
        try:
            if messages:
                published = Publisher([self.amqp_url], name).publish(messages)
                if not published.all_confirmed:
                    raise Void(f"the queue was not filled: {published.failure}")
            yield name
        finally:
            with self._connection() as connection:
                connection.channel().queue_delete(name)

    @contextmanager
    def _connection(self) -> Iterator[pika.BlockingConnection]:
        connection = pika.BlockingConnection(pika.URLParameters(self.amqp_url))
        try:
            yield connection
        finally:
            if connection.is_open:
                connection.close()

    def left(self, queue: str) -> int:
        with self._connection() as connection:
            return int(connection.channel().queue_declare(queue, passive=True).method.message_count)

    @contextmanager
    def replica(self, queue: str, url: str, profile: Profile, peer: bool = False) -> Iterator[ServiceProcess]:
        """One replica, or the node peer, that starts; gone at the end. Raises Void where it fails."""
        log = self._folder / f"service-{next(self._numbers)}.log"
        settings = {"AMQP_URL": self.amqp_url, "DATABASE_URL": url, "RABBITMQ_QUEUE": queue}
        replica: ServiceProcess
        if peer:
            replica = NodePeer(log, settings, profile.prefetch, profile.batch)
        else:
            settings |= {"RABBITMQ_PREFETCH_COUNT": str(profile.prefetch), "BATCH_SIZE": str(profile.batch)}
            replica = ServiceProcess(log, settings, ROOT)
        try:
            yield replica.start()
        except ServiceFailed as exc:
            raise Void(str(exc)) from exc
        finally:
            replica.kill()

    def cpu(self, replicas: Sequence[ServiceProcess]) -> tuple[float, float, float]:
        """CPU seconds of the replicas, the broker and PostgreSQL so far."""
        services = cpu_seconds([replica.pid for replica in replicas])
        return services, cpu_seconds([self.services.rabbitmq.pid]), cpu_seconds([self.services.postgres.pid])

    def wait_counted(self, url: str, goal: int, seconds: float) -> None:
        connection = psycopg2.connect(url)  # one for all: a new one each time would be a load of its own
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                deadline, counted = time.monotonic() + seconds, -1
                while counted < goal:
                    if time.monotonic() > deadline:
                        raise Void(f"{counted} of {goal} votes counted in time")
                    time.sleep(0.05)
                    cursor.execute("SELECT coalesce(sum(oui_count + non_count), 0) FROM vote_results")
                    ((counted,),) = cursor.fetchall()
        finally:
            connection.close()

    def drain(
        self,
        queue: str,
        url: str,
        messages: Sequence[Message],
        profile: Profile,
        replicas: int = 1,
        peer: bool = False,
    ) -> Drain:
        """Let the service, or the node peer, empty a full queue: from the moment it consumes to its last commit.

        With several replicas, to the commit of most votes. Raises Void.
        """
        if peer:  # which finds the tables as the service makes them
            self.query(url, (ROOT / "init_db.sql").read_text())
        expected = totals_of(messages)
        before = self.totals(url)
        goal = _votes(before) + _votes(expected)
        self.query(url, "CHECKPOINT")  # every run begins alike
        begun = time.time()
        with ExitStack() as stack:
            running = [stack.enter_context(self.replica(queue, url, profile, peer)) for _ in range(replicas)]
            started = min(map(consuming_since, running))
            # the first of several replicas counts while the last one starts, which is not to be in the figures
            cpu, meter, counted = self.cpu(running), Meter(self), _votes(self.totals(url))
            parts = sum(len(message.parts) for message in messages)
            junk = sum(len(message.body) for message in messages if message.kind == INVALID)
            self.wait_counted(url, goal, parts / SLOWEST_RATE + junk / SLOWEST_BYTES + 30)
            service, broker, postgres = (now - then for now, then in zip(self.cpu(running), cpu, strict=True))
            peak, others = max(peak_megabytes(replica.pid) for replica in running), meter.others()
            stop(*running)
        self.check(queue, url, before, messages)
        if self.value(url, FIRST_BATCH, begun) < started:
            raise Void("a batch was begun before the clock was")
        share, end = (
            (1.0, self.value(url, LAST_COMMIT)) if replicas == 1 else (MOST, self.value(url, MOST_COMMITTED, MOST))
        )
        per = 1e6 / parts * _votes(expected) / max(goal - counted, 1)
        return Drain(round(share * parts), end - started, service * per, broker * per, postgres * per, peak, others)

    def drain_bare(self, queue: str, messages: int, profile: Profile) -> Drain:
        """Let the bare pika consumer empty a full queue."""
        arguments = [self.amqp_url, queue, str(messages), str(profile.prefetch), str(profile.batch)]
        command = [sys.executable, str(ROOT / "bench" / "bare_consumer.py"), *arguments]
        (_, broker, _), meter = self.cpu([]), Meter(self)
        process = subprocess.Popen(
            command, cwd=self._folder, env={"PATH": os.environ["PATH"]}, stdout=subprocess.PIPE, text=True
        )
        try:
            output, _ = process.communicate(timeout=messages / SLOWEST_RATE + 30)
        except subprocess.TimeoutExpired:
            raise Void("the bare consumer took too long") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0 or self.left(queue):
            raise Void("the bare consumer did not empty its queue")
        result, per = json.loads(output.splitlines()[-1]), 1e6 / messages
        broker = self.cpu([])[1] - broker
        return Drain(messages, result["seconds"], result["cpu_seconds"] * per, broker * per, others=meter.others())

    def write_alone(self, queue: str, url: str, messages: Sequence[Message], profile: Profile) -> Drain:
        """Have PostgreSQL write these votes, in batches as the service's and by its call, from memory. Raises Void."""
        votes = [Vote.from_message(message.body) for message in messages]
        with Database(url, pool_min=1, pool_max=1, timeout=30.0, instance="alone") as database:
            database.initialise_schema()
            self.query(url, "CHECKPOINT")
            (_, _, postgres), meter, own = self.cpu([]), Meter(self), time.process_time()
            started = time.monotonic()
            for first in range(0, len(votes), profile.batch):
                database.batch_update_results(votes[first : first + profile.batch], [])
            seconds = time.monotonic() - started
            own, postgres = time.process_time() - own, self.cpu([])[2] - postgres
            others = meter.others()
        self.check(queue, url, {}, messages)
        per = 1e6 / len(votes)
        return Drain(len(votes), seconds, own * per, 0.0, postgres * per, others=others)

    def totals(self, url: str) -> Totals:
        if self.value(url, "SELECT to_regclass('vote_results') IS NULL"):
            return {}
        return {law_id: (oui, non) for law_id, oui, non in self.query(url, TOTALS)}

    def check(self, queue: str, url: str, before: Totals, messages: Sequence[Message]) -> None:
        """The gate: totals, audit log and what was published agree to the vote, copies are recorded, and the queue is
        empty. Raises Void.

        It sees what became of the votes, not in which order: that an ack comes after its commit is for the fault suite.
        """
        messages = list(parts_of(messages))
        expected, totals = totals_of(messages), self.totals(url)
        audited = {law_id: (oui, non) for law_id, oui, non in self.query(url, AUDITED)}
        if totals != audited:
            raise Void("the totals are not those of the audit log")
        for law_id in totals.keys() | expected:
            was, is_now, wanted = (counts.get(law_id, (0, 0)) for counts in (before, totals, expected))
            if is_now != (was[0] + wanted[0], was[1] + wanted[1]):
                raise Void(f"{law_id}: {was} and {wanted} published make {is_now}")
        votes = {message.id: message.body.decode() for message in messages if message.kind != INVALID}
        bodies = iter(votes.values())
        while part := list(itertools.islice(bodies, VOTES_A_QUERY)):
            logged = self.value(url, AS_PUBLISHED, f"[{','.join(part)}]")
            if logged != len(part):
                raise Void(f"{len(part) - logged} votes are not in the audit log as they were published")
        copies = sum(message.kind == DUPLICATE for message in messages)
        if (recorded := self.value(url, "SELECT count(*) FROM duplicate_attempts")) != copies:
            raise Void(f"{recorded} of {copies} copies are recorded")
        if self.value(url, NOT_DURABLE):
            raise Void("a table of votes is not durable")
        if self.value(url, NOT_SAFE):
            raise Void("the database does not keep what it has committed")
        refused = {message.id for message in messages if message.kind == INVALID}
        if (rejected := self.value(url, "SELECT count(*) FROM rejected_messages")) != len(refused):
            raise Void(f"{rejected} messages were rejected, not {len(refused)}")
        if left := self.left(queue):
            raise Void(f"{left} messages are still on the queue")


def consuming_since(replica: ServiceProcess) -> float:
    """Unix time at which the broker had accepted its consumer, by its own log. Raises ServiceFailed."""
    return datetime.fromisoformat(replica.wait_says("consuming")["time"]).timestamp()


def stop(*replicas: ServiceProcess) -> None:
    """They must end by themselves, with exit code 0. Raises Void, ServiceFailed."""
    for replica in replicas:
        if replica.stop() != 0:
            raise Void(f"the service failed; {replica.log_tail()}")


class Meter:
    """How much of the machine's CPU time others take from now on."""

    def __init__(self, lab: Lab) -> None:
        self._ours = [os.getpid(), lab.services.rabbitmq.pid, lab.services.postgres.pid]
        self._before = time.monotonic(), machine_seconds() - cpu_seconds(self._ours)

    def others(self) -> float:
        started, before = self._before
        foreign = machine_seconds() - cpu_seconds(self._ours) - before
        return max(0.0, foreign / (time.monotonic() - started) / (os.cpu_count() or 1))


def _votes(totals: Totals) -> int:
    return sum(oui + non for oui, non in totals.values())
