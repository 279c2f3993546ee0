"""The vote aggregation service: from the queue to the totals, each vote counted once.

The way of one vote: the ``Consumer`` receives a ``Delivery`` from ``RabbitMQClient``, reads its votes with
``read_message`` and hands them over; the ``Batcher`` adds them to the ``VoteBatch``; a full or old batch goes to
``Database.batch_update_results``, and only when that is committed ``RabbitMQClient.settle`` acks it and the metrics are
told. So votes are read while those before them are written.
"""

from __future__ import annotations

import argparse
import logging
import operator
import os
import queue
import random
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial

from config import InvalidSettings, Settings, environment
from database import REFUSED, Attempt, BatchOutcome, Database, DatabaseMisconfigured, DatabaseUnavailable, Minute
from deliveries import Delivery, UnknownPika
from hand_off import Burst, HandOff, Signal, read
from http_server import MAX_CONNECTIONS, HttpServer, Route
from observability import (
    MAX_LAW_LABELS,
    VERSION,
    Health,
    Metrics,
    Reconciler,
    Watchdog,
    configure_logging,
    monitoring_routes,
)
from rabbitmq_client import BrokerMisconfigured, BrokerUnavailable, RabbitMQClient
from results_page import ResultsCache, ResultsPage
from votes import MAX_BODY_BYTES, VoteBatch, are_strangers, counts, whole

logger = logging.getLogger("aggregator")

TICK_SECONDS = 0.5
IDLE_PROBE_SECONDS = 5.0
READING_SHARE = 0.02  # of the time, at most, is spent in reading totals
RECONNECT_CAP_SECONDS = 8.0  # a server that is back is found within ten seconds
LONGEST_RETRYING_SECONDS = 60.0  # before a batch is held, whatever MAX_RETRIES says: so long more is fetched
MANY_RETURNS = 10  # of one message: half of what RabbitMQ 4 allows before it drops it
HARD_EXIT_GRACE_SECONDS = 5.0
PAGE_TIMEOUT_SECONDS = 8.0  # of one reading for the results page: of as many laws as votes have made
RETURNS_LINE_SECONDS = 60.0  # between two lines on messages that come again and again
MAX_LOGGED_TRACES = 10  # of a batch that could not be written

LONGEST_DEAF_SECONDS = 1.0  # the broker ends a connection that takes less than some 40 KB a second (seen on 3.10)


def backoff(attempt: int, base: float, cap: float, jitter: float) -> float:
    """Seconds to wait after failure number ``attempt`` (from 0): base, doubled each time up to the cap.

    ``jitter`` from 0 to 1 spreads this by a quarter either way, so that replicas do not come back in step.
    """
    return min(cap, base * 2.0 ** min(attempt, 30)) * (0.75 + jitter / 2)


class State(Enum):
    """Of the batcher; docs/ARCHITECTURE.md draws how they follow each other. Deliveries are wanted in two of them."""

    WAITING = "waiting for the database"  # its schema and totals; what was delivered before is kept
    CONSUMING = "consuming"
    RETRYING = "retrying"  # the batch in hand could not be written, and is tried again soon
    HOLDING = "holding"  # the same, for so long that nothing more is fetched
    TRYING_TO_WRITE = "trying to write"  # that batch went back; nothing is fetched before a vote can be written
    STOPPED = "stopped"


class Consumer:
    """The consumer's thread: it fetches messages and reads them, and never touches the database.

    So the broker's heartbeats are answered whatever the database does.
    """

    def __init__(
        self, settings: Settings, client: RabbitMQClient, hand_off: HandOff, metrics: Metrics, health: Health
    ) -> None:
        self._settings = settings
        self._client = client
        self._hand_off = hand_off
        self._metrics = metrics
        self._health = health
        self._stop_requested = False
        self._failures = 0  # in a row, to use the broker
        self._unread: deque[tuple[int, Iterator[Burst]]] = deque()  # by generation; received, and waits for room
        self._next_returns_line = 0.0
        self._next_turn = 0.0  # of the broker's, while too much waits for the batcher
        self._longest_deaf = min(LONGEST_DEAF_SECONDS, settings.rabbitmq_heartbeat / 4)
        metrics.in_flight.set_function(lambda: hand_off.in_flight)

    def stop(self) -> None:
        """Have ``run`` end. Any thread, and a signal handler, may call this: it sets a flag and nothing else."""
        self._stop_requested = True

    def run(self, batcher: threading.Thread) -> bool:
        """Consume until ``stop``; then serve the broker until the batcher has ended, for so long as it may take.

        Returns False where the batcher died first.
        """
        while not self._stop_requested and batcher.is_alive():
            self._tick()
        died = not batcher.is_alive()
        self._shut_down(batcher)
        return not died

    def _tick(self) -> None:
        self._health.tick("consumer")
        has_room = self._hand_off.has_room(min(TICK_SECONDS, self._longest_deaf)) and self._read_on()
        self._hand_off.flush()
        if not has_room and time.monotonic() < self._next_turn:
            return
        self._next_turn = time.monotonic() + self._longest_deaf
        try:
            if not self._client.is_connected:
                server = self._client.connect()
                logger.info("broker connected", extra={"fields": {"server": server}})
            self._follow_the_batcher()
            for deliveries in self._client.receive(TICK_SECONDS if has_room else 0.0):  # a little, as a sign of life
                if not self._receive(deliveries):
                    break
            self._hand_off.flush()
        except BrokerUnavailable as exc:
            self._broker_lost(exc)
            return
        self._health.broker_connected = True
        self._failures = 0

    def _receive(self, deliveries: Sequence[Delivery]) -> bool:
        """Read them, while the broker sends more. Returns whether there is room for that."""
        returns = max([delivery.delivery_count for delivery in deliveries if delivery.redelivered], default=0)
        if returns:
            self._note_returns(returns)
        self._unread.append((deliveries[0].generation, read(deliveries, time.monotonic())))
        return self._read_on()

    def _read_on(self) -> bool:
        """Read what was received, to be handed over, while there is room: of a kilobyte a hundred may be made.

        Returns whether there is room for more.
        """
        while self._hand_off.has_room(0.0):
            if not self._unread:
                return True
            generation, bursts = self._unread[0]
            burst = next(bursts, None) if generation == self._client.generation else None
            if burst is None:
                self._unread.popleft()
            else:
                self._hand_off.put(burst)
        return False

    def _note_returns(self, returns: int) -> None:
        """Say how often a quorum queue has got a message back, in time before a delivery limit would drop it."""
        self._metrics.delivery_count_seen(returns)
        if returns >= MANY_RETURNS and time.monotonic() > self._next_returns_line:
            self._next_returns_line = time.monotonic() + RETURNS_LINE_SECONDS
            facts = {"returns": returns, "limit": "20 in RabbitMQ 4, unless the queue or a policy says otherwise"}
            logger.error(
                "a message was returned to the queue many times: beyond its delivery limit the broker drops it, "
                "a confirmed vote too",
                extra={"fields": facts},
            )

    def _follow_the_batcher(self) -> None:
        """Consume while the batcher wants deliveries; give back what it let go of after it was held for too long.

        A channel that was given up must go, even where the database is back already: an ack of a later vote on it
        would ack the given-up ones too.
        """
        if self._client.has_channel and self._hand_off.is_given_up:
            self._client.give_back()
            logger.warning("unsettled messages given back to the broker")
        if self._hand_off.is_wanted and not self._client.is_consuming:
            self._client.start_consuming()
            logger.info("consuming", extra={"fields": {"queue": self._settings.rabbitmq_queue}})
        elif self._client.is_consuming and not self._hand_off.is_wanted:
            self._client.cancel()
            logger.warning("not consuming, what was delivered is held")

    def _broker_lost(self, exc: BrokerUnavailable) -> None:
        self._health.broker_connected = False
        self._metrics.error("broker_unavailable")
        pause = backoff(self._failures, 0.5, RECONNECT_CAP_SECONDS, random.random())
        self._failures += 1
        level = logging.ERROR if isinstance(exc, BrokerMisconfigured) else logging.WARNING
        logger.log(level, "broker lost", extra={"fields": {"error": str(exc), "retry_in_seconds": round(pause, 2)}})
        until = time.monotonic() + pause
        while not self._stop_requested and time.monotonic() < until:
            self._health.tick("consumer")
            time.sleep(0.1)

    def _shut_down(self, batcher: threading.Thread) -> None:
        logger.info("stopping")
        deadline = time.monotonic() + self._settings.shutdown_timeout_seconds
        _exit_hard_after(self._settings.shutdown_timeout_seconds + HARD_EXIT_GRACE_SECONDS)
        try:
            self._client.cancel()
        except BrokerUnavailable as exc:
            logger.warning("broker lost while stopping", extra={"fields": {"error": str(exc)}})
        self._hand_off.end()
        while batcher.is_alive() and time.monotonic() < deadline:
            self._health.tick("consumer")
            self._serve_broker(0.1)
            batcher.join(0 if self._client.is_connected else 0.1)
        self._serve_broker(0.0)  # sends the last settlement
        if batcher.is_alive():
            logger.warning("stopping with a batch unwritten, the broker keeps it")
        self._client.close()
        logger.info("stopped")

    def _serve_broker(self, seconds: float) -> None:
        if self._client.is_connected:
            try:
                for _ in self._client.receive(seconds):
                    pass  # it goes back to the queue
            except BrokerUnavailable as exc:
                logger.warning("broker lost while stopping", extra={"fields": {"error": str(exc)}})


@dataclass(frozen=True, eq=False)
class Writing:
    """A batch that a writer's thread writes, by a database that is its own meanwhile; ``began_at`` is monotonic.

    ``attempts`` are its own too: what stands in the table by an attempt passes for counted by this batch, and a copy of
    what another batch has counted must not.
    """

    batch: VoteBatch
    database: Database
    attempts: list[Attempt]
    began_at: float
    outcome: Future[BatchOutcome]


class Batcher:
    """The batcher's thread: it gathers batches, has them written and then settled. It never touches the broker."""

    def __init__(
        self, settings: Settings, databases: Sequence[Database], hand_off: HandOff, metrics: Metrics, health: Health
    ) -> None:
        self._settings = settings
        self._database = databases[0]  # of all that is not a batch's first try, while no batch is being written
        self._idle = list(reversed(databases))  # none of them writes a batch; the last is used first
        self._writers = ThreadPoolExecutor(len(databases), "writer")
        self._hand_off = hand_off
        self._metrics = metrics
        self._health = health
        self._state = State.WAITING
        self._new_batch = partial(VoteBatch, settings.batch_size, settings.batch_timeout_seconds)
        self._writing: tuple[Writing, ...] = ()  # before the open one, in the order that they came
        self._batch = self._new_batch(0)
        self._busy_until = 0.0  # the last of them that was settled was written then
        self._copies_came = False  # in the last of them: more are likely
        self._attempts: list[Attempt] = []  # to write what is not settled, and was not answered
        self._unusable_since = time.monotonic()  # the database; of interest while it is
        self._failed_tries = 0  # in a row, to use it again
        self._trial: VoteBatch | None = None  # the batch that it did not take
        self._next_probe = self._next_reading = 0.0
        self._stats = _MinuteStats()
        metrics.oldest_age.set_function(self._oldest_age)

    def run(self) -> None:
        """Write what the consumer hands over, until it has ended and all is written, or cannot be."""
        try:
            while self._state is not State.STOPPED:
                self._tick()
        except Exception:
            logger.exception("batcher failed")  # a bug; the process ends, since it must not look alive
            raise

    def _tick(self) -> None:
        self._health.tick("batcher")
        if self._state is not State.CONSUMING:
            self._await_database()
            return
        self._gather()
        while self._writing and self._writing[0].outcome.done():
            self._finish()
        if self._batch.is_ready(time.monotonic()):
            self._begin()
        if self._metrics.is_crowded and time.monotonic() > self._next_reading:
            self._finish_all()
            if self._state is State.CONSUMING:
                self._probe()  # a listed law may be among those without a label
        self._write_stats()

    def _enter(self, state: State) -> None:
        """The consumer fetches, and /readyz answers, as the state wants it."""
        self._state = state
        self._health.database_connected = state is State.CONSUMING
        self._hand_off.want(state in (State.CONSUMING, State.RETRYING))

    def _gather(self) -> None:
        """Take what is handed over; or wait for that or for a written batch, for as long as the open one may wait."""
        try:
            bursts = self._hand_off.take(min(TICK_SECONDS, self._batch.seconds_left(time.monotonic())))
        except queue.Empty:
            if self._batch.is_empty and not self._writing and time.monotonic() > self._next_probe:
                self._probe()
            return
        if bursts is Signal.WRITTEN:
            return
        if bursts is not Signal.END:
            for burst in bursts:
                self._take(burst)
            return
        self._begin()
        self._finish_all()
        self._write_stats(force=True)
        self._enter(State.STOPPED)

    def _take(self, burst: Burst) -> None:
        """Add the votes of one burst to the batch, and begin to write each batch that fills."""
        if burst.generation != self._batch.generation:
            self._batch = self._new_batch(burst.generation)  # the broker delivers what was in the open one again
        messages = burst.messages
        while messages and self._hand_off.can_settle(burst.generation):
            end = whole(messages, self._batch.room)
            taken, messages = messages[:end], messages[end:]
            self._batch.extend(taken, burst.size * len(taken) // len(burst.messages), burst.arrived_at)
            if burst.traceparents:
                tags = {message.delivery_tag for message in taken}
                self._batch.traceparents |= {tag: burst.traceparents[tag] for tag in tags & burst.traceparents.keys()}
            if self._batch.is_ready(burst.arrived_at):
                self._begin()

    def _begin(self) -> None:
        """Have the open batch written, beside those before it; but only once none of theirs can stand in the way of a
        vote of it, since the first that came is to count. After attempts that went unanswered one has to be settled
        first: of two that know them, the second could report what the first has reported, should it be let go.
        """
        batch, self._batch = self._batch, self._new_batch(self._batch.generation)
        while self._writing and not (
            self._idle and not self._attempts and all(are_strangers(batch, each.batch) for each in self._writing)
        ):
            self._finish()
        if batch.is_empty or not self._hand_off.can_settle(batch.generation):
            return
        database, attempts = self._idle.pop(), [*self._attempts]
        outcome = self._submit(database, batch, attempts, self._copies_came)
        outcome.add_done_callback(lambda _: self._hand_off.wake_batcher())
        self._writing = (*self._writing, Writing(batch, database, attempts, time.monotonic(), outcome))

    def _submit(
        self, database: Database, batch: VoteBatch, attempts: list[Attempt], expects_copies: bool
    ) -> Future[BatchOutcome]:
        """Have a writer write the batch; the batcher's own thread would keep as much memory as theirs."""
        return self._writers.submit(self._write, database, batch, attempts, expects_copies)

    def _write(
        self, database: Database, batch: VoteBatch, attempts: list[Attempt], expects_copies: bool
    ) -> BatchOutcome:
        """In the thread of a writer. Raises DatabaseUnavailable."""
        tick = partial(self._health.tick, "batcher")
        try:
            return database.batch_update_results(
                batch.votes, batch.rejections, batch.started_at, attempts, tick, expects_copies
            )
        except DatabaseUnavailable as exc:
            # it is kept for as long as the batch is tried: without the frames below, which hold the statement
            exc.__context__ = None
            raise exc.with_traceback(None) from None

    def _finish_all(self) -> None:
        while self._writing:
            self._finish()

    def _finish(self) -> None:
        """Wait until the first of the batches that were begun is written, and have it settled.

        Where it could not be written, all that were begun are tried again, and settled or let go.
        """
        try:
            outcomes = [self._writing[0].outcome.result()]
        except DatabaseUnavailable as exc:
            wait([each.outcome for each in self._writing])
            outcomes = self._write_again(self._writing, exc)
        done, self._writing = self._writing[: len(outcomes)], self._writing[len(outcomes) :]
        self._idle.extend([each.database for each in done])
        now = time.monotonic()
        self._next_probe = now + IDLE_PROBE_SECONDS
        for each, outcome in zip(done, outcomes, strict=True):
            self._attempts = []  # what they wrote is reported with this batch, or was rolled back
            self._copies_came = bool(outcome.duplicates)
            self._settle(each.batch, outcome)
            self._report(each.batch, outcome, now - each.began_at, now - max(each.began_at, self._busy_until))
            self._busy_until = now
        self._health.tick("batcher")

    def _write_again(self, writing: Sequence[Writing], exc: DatabaseUnavailable) -> list[BatchOutcome]:
        """Write what could not be, one batch after the other, with retries; then hold it: nothing more is fetched, and
        it is tried again at a slow pace. Returns the outcomes of all.

        A batch that is given back counts as a failed delivery, and quorum queues drop what failed too often. So they
        are let go once, after HOLD_SECONDS, lest a replica whose own link is broken keep votes from the others; or
        where their channel is gone, or the service stops and the retries are used up. Then there are no outcomes.
        """
        outcomes = {each: each.outcome.result() for each in writing if each.outcome.exception() is None}
        failures = 0
        while missing := [each for each in writing if each not in outcomes]:
            self._attempts = list({attempt for each in writing for attempt in each.attempts})
            try:
                self._bide(missing[0].batch, exc, writing[0].began_at, failures)
            except DatabaseUnavailable:
                self._let_go(missing[0].batch)
                return []
            failures += 1
            try:
                for each in missing:
                    outcomes[each] = self._submit(self._database, each.batch, each.attempts, True).result()
            except DatabaseUnavailable as again:
                exc = again
        fields = {"attempts": failures + 1, "seconds": round(time.monotonic() - writing[0].began_at, 2)}
        logger.warning("batch written after all", extra={"fields": fields})
        self._enter(State.CONSUMING)
        return [outcomes[each] for each in writing]

    def _let_go(self, trial: VoteBatch) -> None:
        """Let the broker deliver again what is not settled; fetch nothing before such a batch can be written."""
        self._idle.extend([each.database for each in self._writing])
        self._hand_off.give_up(self._batch.generation)  # what is open too: an ack of it would cover these
        self._writing = ()
        self._trial = trial
        self._enter(State.TRYING_TO_WRITE)

    def _bide(self, batch: VoteBatch, exc: DatabaseUnavailable, failing_since: float, failures: int) -> None:
        """Wait before the batch is tried again. Raises DatabaseUnavailable where it is not to be."""
        if failures == 0:
            self._unusable_since = failing_since
        failing_for = time.monotonic() - failing_since
        is_held = (
            failures >= self._settings.max_retries
            or failing_for >= LONGEST_RETRYING_SECONDS
            or isinstance(exc, DatabaseMisconfigured)
        )
        is_over = is_held and failing_for >= self._settings.hold_seconds
        cap = self._longest_pause(exc) if is_held else 60.0
        pause = backoff(failures, self._settings.retry_backoff_seconds, cap, random.random())
        traces = sorted(set(batch.traceparents.values()))[:MAX_LOGGED_TRACES]
        self._log_database_error("batch not written", exc, None if is_over else pause, traces)
        if is_over or (is_held and self._hand_off.stopping.is_set()):
            raise exc
        self._enter(State.HOLDING if is_held else State.RETRYING)
        self._pause(pause)
        if not self._hand_off.can_settle(batch.generation):
            raise DatabaseUnavailable("the channel of the batch is gone") from exc

    def _longest_pause(self, exc: DatabaseUnavailable) -> float:
        """In seconds: a server that was away is found soon; one that answers and refuses is left alone for longer."""
        longest = self._settings.retry_backoff_max_seconds
        return longest if isinstance(exc, DatabaseMisconfigured) else min(longest, RECONNECT_CAP_SECONDS)

    def _settle(self, batch: VoteBatch, outcome: BatchOutcome) -> None:
        """Have it acked; but a message that does not count is rejected, unless it is an array, with votes beside it."""
        rejected = {rejection.delivery_tag for rejection in outcome.rejected if not rejection.place}
        tags = {vote.delivery_tag for vote in batch.votes} | {other.delivery_tag for other in batch.rejections}
        self._hand_off.settle(batch.generation, max(tags - rejected, default=None), sorted(rejected), len(batch))

    def _report(self, batch: VoteBatch, outcome: BatchOutcome, seconds: float, busy_seconds: float) -> None:
        self._metrics.batch_written(
            counted=counts(outcome.counted),
            duplicates=[reason for _, reason in outcome.duplicates],
            rejected=[rejection.reason for rejection in outcome.rejected],
            messages=len(batch),
            seconds=seconds,
            voted_at=[vote.voted_at for vote in outcome.counted if vote.voted_at is not None],
            totals=outcome.totals,
        )
        reasons = Counter([rejection.reason for rejection in outcome.rejected])
        self._stats.add(time.time(), len(outcome.counted), len(outcome.duplicates), reasons, busy_seconds)
        if reasons[REFUSED]:
            logger.error("votes refused by the database", extra={"fields": {"votes": reasons[REFUSED]}})
        logger.debug("batch committed", extra={"fields": {"messages": len(batch), "counted": len(outcome.counted)}})
        if batch.traceparents and logger.isEnabledFor(logging.DEBUG):
            _log_traced(batch.traceparents, outcome)

    def _await_database(self) -> None:
        """Try once whether a batch can be written, and let the consumer start; or wait, longer each time."""
        assert (self._state is State.TRYING_TO_WRITE) == (self._trial is not None) and not self._writing
        if self._hand_off.stopping.is_set():
            self._enter(State.STOPPED)
            return
        try:
            self._database.initialise_schema()
            self._read_totals()
            trial = self._trial or self._new_batch(0)  # it may answer all this and still refuse every batch
            self._database.try_to_write(trial.votes, trial.rejections)
        except DatabaseUnavailable as exc:
            if time.monotonic() - self._unusable_since >= self._settings.hold_seconds:
                self._hand_off.give_up()
            pause = backoff(self._failed_tries, 0.5, self._longest_pause(exc), random.random())
            self._failed_tries += 1
            self._log_database_error("database not usable", exc, pause)
            self._pause(pause)
            return
        self._failed_tries = 0
        self._trial = None
        self._enter(State.CONSUMING)
        logger.info("database usable")

    def _probe(self) -> None:
        """Find out about a lost database, about votes that other replicas counted, and about laws that were listed."""
        try:
            self._read_totals()
        except DatabaseUnavailable as exc:
            self._log_database_error("database lost", exc, 0.0)
            self._unusable_since = time.monotonic()
            self._enter(State.WAITING)

    def _read_totals(self) -> None:
        """Ask whether the database can be used, and tell the totals where that is due. Raises DatabaseUnavailable.

        Not where the totals alone cannot be read: of very many laws, which anybody's votes make, it takes longer than a
        statement may, and that must not stop the count.
        """
        self._database.probe()
        started = time.monotonic()
        if started >= self._next_reading:
            try:
                self._metrics.totals_read(*self._database.totals(self._metrics.labelled, MAX_LAW_LABELS))
            except DatabaseUnavailable as exc:
                self._log_database_error("totals cannot be read, votes are counted all the same", exc, None)
            taken = time.monotonic() - started
            self._next_reading = started + taken + max(IDLE_PROBE_SECONDS, taken / READING_SHARE)
        self._next_probe = time.monotonic() + IDLE_PROBE_SECONDS

    def _pause(self, seconds: float) -> None:
        """Wait, alive, and no longer than until the service stops."""
        until = time.monotonic() + seconds
        while not self._hand_off.stopping.wait(min(TICK_SECONDS, max(0.0, until - time.monotonic()))):
            self._health.tick("batcher")
            if time.monotonic() >= until:
                return

    def _log_database_error(
        self, what: str, exc: DatabaseUnavailable, pause: float | None, traceparents: Sequence[str] = ()
    ) -> None:
        misconfigured = isinstance(exc, DatabaseMisconfigured)
        self._metrics.error("database_misconfigured" if misconfigured else "database_unavailable")
        fields: dict[str, object] = {"error": str(exc)}
        if pause is not None:
            fields["retry_in_seconds"] = round(pause, 2)
        if traceparents:
            fields["traceparents"] = traceparents
        logger.log(logging.ERROR if misconfigured else logging.WARNING, what, extra={"fields": fields})

    def _write_stats(self, force: bool = False) -> None:
        """Write the row of a minute that is over; it is for watching, so a failure costs that row and no more."""
        minute, reasons = self._stats.finished(time.time(), force)
        if minute is None:
            return
        if minute.rejected:
            began = datetime.fromtimestamp(minute.began, UTC).isoformat()
            fields = {"minute": began, "messages": minute.rejected, "reasons": dict(reasons.most_common())}
            logger.warning("messages rejected", extra={"fields": fields})
        self._finish_all()
        try:
            self._database.record_minute(minute)
        except DatabaseUnavailable as exc:
            logger.warning("statistics of a minute not written", extra={"fields": {"error": str(exc)}})

    def _oldest_age(self) -> float:
        started = next((each.batch for each in self._writing), self._batch).started_at
        return 0.0 if started is None else time.monotonic() - started


class VoteAggregator:
    """The service: a consumer in the thread that calls ``run``, a batcher in one of its own, and what joins them."""

    def __init__(
        self,
        settings: Settings,
        databases: Sequence[Database],
        client: RabbitMQClient,
        metrics: Metrics,
        health: Health,
    ) -> None:
        """So many batches are written at the same time as there are ``databases``: connections of their own to one."""
        hand_off = HandOff(client)
        self._consumer = Consumer(settings, client, hand_off, metrics, health)
        self._batcher = Batcher(settings, databases, hand_off, metrics, health)

    def stop(self, signum: int = 0, frame: object = None) -> None:
        """Ask ``run`` to flush what is held and return. A signal handler: it sets a flag and nothing else."""
        self._consumer.stop()

    def run(self) -> int:
        """Consume until ``stop``; then flush, settle and disconnect, within SHUTDOWN_TIMEOUT_SECONDS.

        Returns the exit code: 0, or 1 where the batcher died of a bug.
        """
        batcher = threading.Thread(target=self._batcher.run, name="batcher", daemon=True)
        batcher.start()
        return 0 if self._consumer.run(batcher) else 1


class _MinuteStats:
    """What this replica did in the minute of its first batch since the last one that was finished."""

    def __init__(self) -> None:
        self._minute = Minute(0.0)
        self._reasons: Counter[str] = Counter()

    def add(self, now: float, votes: int, duplicates: int, reasons: Counter[str], busy_seconds: float) -> None:
        """Add one batch, written at ``now`` (Unix seconds); ``reasons`` are those of its rejected messages."""
        began, *sums = self._minute if self._minute.batches else Minute(now // 60 * 60)
        numbers = (1, votes, duplicates, reasons.total(), busy_seconds)
        self._minute = Minute(began, *map(operator.add, sums, numbers))
        self._reasons += reasons

    def finished(self, now: float, force: bool) -> tuple[Minute | None, Counter[str]]:
        """The minute's numbers, once, when ``now`` (Unix seconds) is in a later one or ``force`` is given.

        And the reasons of its rejected messages.
        """
        minute, reasons = self._minute, self._reasons
        if not minute.batches or (now < minute.began + 60 and not force):
            return None, Counter()
        self._minute, self._reasons = Minute(0.0), Counter()
        return minute, reasons


def _log_traced(traceparents: Mapping[int, str], outcome: BatchOutcome) -> None:
    """Say of each message that carries a traceparent what became of it, with the key of its row in the database."""
    settled = [(vote.delivery_tag, "counted", "vote_id", vote.vote_id) for vote in outcome.counted]
    settled += [(vote.delivery_tag, reason, "vote_id", vote.vote_id) for vote, reason in outcome.duplicates]
    for rejection in outcome.rejected:  # what its message_id contains is anybody's guess
        settled.append((rejection.delivery_tag, rejection.reason, "body_sha256", rejection.body_sha256.hex()))
    for tag, what, key, value in settled:
        if tag in traceparents:
            _, trace_id, span_id, _ = traceparents[tag].split("-")
            fields = {"trace_id": trace_id, "span_id": span_id, "outcome": what, key: value}
            logger.debug("message settled", extra={"fields": fields})


def _exit_hard_after(seconds: float) -> None:
    """A last resort for a shutdown that hangs in a library: nothing is lost, the broker has what was not acked."""

    def leave() -> None:
        logger.error("shutdown hangs, leaving at once")
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.name, timer.daemon = "hard-exit", True
    timer.start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM or SIGINT. Exit codes: 0 stopped, 1 failed, 2 wrong settings."""
    parser = argparse.ArgumentParser(description="Counts the votes of a RabbitMQ queue in PostgreSQL, each once.")
    parser.add_argument("--version", action="version", version=f"vote-aggregator {VERSION}")
    parser.add_argument("--check-config", action="store_true", help="print the settings, passwords hidden, and exit")
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.from_env(environment(needs_both=True))
    except InvalidSettings as exc:
        print("wrong settings:", *exc.faults, sep="\n  ", file=sys.stderr)
        return 2
    if arguments.check_config:
        print(*(f"{name}={value}" for name, value in settings.redacted().items()), sep="\n")
        for warning in settings.warnings():
            print(f"warning: {warning}", file=sys.stderr)
        return 0
    configure_logging(settings.log_level, settings.secrets())
    return serve(settings)


def serve(settings: Settings) -> int:
    """Wire the parts together and run them. Returns the exit code."""
    # longer than a loop may wait for a server that hangs: by then the watchdog or the heartbeat has ended that
    servers_to_try = 15.0 * len(settings.amqp_urls)
    broker_waits = 60.0  # for a classic queue whose node is down, before it answers a declaration
    stale_after = max(
        broker_waits + 30.0, 3 * settings.db_timeout_seconds, 4.0 * settings.rabbitmq_heartbeat, 2 * servers_to_try
    )
    metrics, health = Metrics(), Health(stale_after)
    # the first takes all connections but one: that is for the batch that is written at the same time
    database = _database(settings, max(1, settings.db_pool_min - 1), max(1, settings.db_pool_max - 1))
    second_database = _database(settings, 1, 1)
    databases = [database, second_database] if settings.db_pool_max > 1 else [database]
    audit_database = _database(settings, 1, 1)
    reconciler = Reconciler(audit_database.read, DatabaseUnavailable, metrics, settings.reconcile_seconds)
    try:
        client = RabbitMQClient(
            settings.amqp_urls,
            settings.rabbitmq_queue,
            queue_type=settings.rabbitmq_queue_type,
            prefetch_count=settings.rabbitmq_prefetch_count,
            max_priority=settings.rabbitmq_max_priority,
            heartbeat=settings.rabbitmq_heartbeat,
            name=f"vote-aggregator {settings.instance_name}",
            max_body=MAX_BODY_BYTES,
            reader=settings.rabbitmq_reader,
            management_url=settings.rabbitmq_management_url,
        )
    except UnknownPika as exc:
        logger.error(str(exc))
        return 2
    # the page, as the reconciler, reads on a connection of its own: the count never waits for it
    page_database = _database(settings, 1, 1, "results of ", PAGE_TIMEOUT_SECONDS)
    of_vote = settings.results_title, settings.results_date, settings.hides_open_laws
    page = ResultsPage(ResultsCache(page_database.read, DatabaseUnavailable, *of_vote), settings.results_shared_with)
    routes: dict[str, Route] = {**monitoring_routes(metrics, health)}
    if settings.shows_results and not settings.results_on_own_port:
        routes |= page.routes()
    # beside a port that the public may reach, this one needs few connections
    few = MAX_CONNECTIONS // 8 if settings.results_on_own_port else MAX_CONNECTIONS
    server = HttpServer(settings.metrics_port, routes, "metrics-http", few)
    page_server = HttpServer(settings.results_port or 0, page.routes(), "results-http")
    with (
        server, page_server, page_database, page, database, second_database, client, reconciler, audit_database,
        Watchdog(health),
    ):  # fmt: skip
        servers = {"METRICS_PORT": server} | ({"RESULTS_PORT": page_server} if settings.results_on_own_port else {})
        for setting, opened in servers.items():
            try:
                opened.open()
            except OSError as exc:
                port = settings.redacted()[setting]
                logger.error(f"{setting} {port} cannot be used", extra={"fields": {"error": exc.strerror}})
                return 2
        if settings.shows_results:
            page.open(opened.wake)
        ports = {setting: opened.port for setting, opened in servers.items()}
        logger.info("starting", extra={"fields": settings.redacted() | ports})
        for warning in settings.warnings():
            logger.warning(warning)
        aggregator = VoteAggregator(settings, databases, client, metrics, health)
        signal.signal(signal.SIGTERM, aggregator.stop)
        signal.signal(signal.SIGINT, aggregator.stop)
        return aggregator.run()


def _database(
    settings: Settings, pool_min: int, pool_max: int, role: str = "", timeout: float | None = None
) -> Database:
    return Database(
        settings.database_url,
        pool_min=pool_min,
        pool_max=pool_max,
        timeout=timeout or settings.db_timeout_seconds,
        instance=role + settings.instance_name,
    )


if __name__ == "__main__":
    sys.exit(main())
