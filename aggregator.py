"""The vote aggregation service: from the queue to the totals, each vote counted once.

The way of one vote: ``RabbitMQClient`` hands a ``Delivery`` over, ``VoteAggregator`` reads it with
``Vote.from_message`` and adds it to the ``VoteBatch``, a full or old batch goes to ``Database.batch_update_results``,
and only when that is committed ``RabbitMQClient.settle`` acks it and the metrics are told.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from config import InvalidSettings, Settings, environment
from database import Attempt, BatchOutcome, Database, DatabaseMisconfigured, DatabaseUnavailable
from deliveries import Delivery, UnknownPika
from http_server import MAX_CONNECTIONS, HttpServer, Route
from observability import MAX_LAW_LABELS, Health, Metrics, configure_logging, monitoring_routes
from rabbitmq_client import BrokerMisconfigured, BrokerUnavailable, RabbitMQClient
from results_page import ResultsCache, ResultsPage
from votes import MAX_BODY_BYTES, REASONS, CutBody, Rejection, UnreadableVote, Vote, VoteBatch, counts

logger = logging.getLogger("aggregator")

TICK_SECONDS = 0.5
IDLE_PROBE_SECONDS = 5.0
RECONNECT_CAP_SECONDS = 8.0  # a server that is back is found within ten seconds
LONGEST_RETRYING_SECONDS = 60.0  # before a batch is held, whatever MAX_RETRIES says: so long more is fetched
MANY_RETURNS = 10  # of one message: half of what RabbitMQ 4 allows before it drops it
HARD_EXIT_GRACE_SECONDS = 5.0
RECONCILING_SHARE = 50  # of the time at most one part is spent in comparing totals with the audit log
PAGE_TIMEOUT_SECONDS = 3.0  # of one reading for the results page
RETURNS_LINE_SECONDS = 60.0  # between two lines on messages that come again and again
MAX_LOGGED_TRACES = 10  # of a batch that could not be written


def backoff(attempt: int, base: float, cap: float, jitter: float) -> float:
    """Seconds to wait after failure number ``attempt`` (from 0): base, doubled each time up to the cap.

    ``jitter`` from 0 to 1 spreads this by a quarter either way, so that replicas do not come back in step.
    """
    return min(cap, base * 2.0 ** min(attempt, 30)) * (0.75 + jitter / 2)


class VoteAggregator:
    """Two loops: the consumer (the thread that calls ``run``) moves bytes, the batcher reads, writes and settles.

    The consumer never touches the database, so that the broker's heartbeats are answered whatever the database does.
    """

    def __init__(
        self, settings: Settings, database: Database, client: RabbitMQClient, metrics: Metrics, health: Health
    ) -> None:
        self._settings = settings
        self._database = database
        self._client = client
        self._metrics = metrics
        self._health = health
        self._stop_requested = False
        self._stopping = threading.Event()  # set by the consumer, so that no wait of the batcher is sat out
        self._accepting = threading.Event()  # set by the batcher while it wants deliveries
        self._given_up = 0  # the last generation whose deliveries are to go back to the queue
        # bursts with the time of their arrival; None: no more will come
        self._handoff: queue.SimpleQueue[tuple[float, list[Delivery]] | None] = queue.SimpleQueue()
        self._broker_failures = 0
        self._next_returns_line = 0.0
        # from here on the batcher's own
        self._batch = self._new_batch()
        self._writing: VoteBatch | None = None
        self._attempts: list[Attempt] = []  # to write what is not settled
        self._generation = 0  # the channel of the open batch
        self._finished = False
        self._unusable_since = time.monotonic()  # the database; of interest while it is
        self._failed_tries = 0  # in a row, to use it again
        self._trial: VoteBatch | None = None  # the batch that it did not take
        self._next_probe = 0.0
        self._stats = _MinuteStats()
        metrics.oldest_age.set_function(self._oldest_age)
        metrics.in_flight.set_function(lambda: client.unsettled)

    def stop(self, signum: int = 0, frame: object = None) -> None:
        """Ask ``run`` to flush what is held and return. A signal handler: it sets a flag and nothing else."""
        self._stop_requested = True

    def run(self) -> int:
        """Consume until ``stop``; then flush, settle and disconnect, within SHUTDOWN_TIMEOUT_SECONDS.

        Returns the exit code: 0, or 1 where the batcher died of a bug.
        """
        batcher = threading.Thread(target=self._run_batcher, name="batcher", daemon=True)
        batcher.start()
        while not self._stop_requested and batcher.is_alive():
            self._consumer_tick()
        died = not batcher.is_alive()
        self._shut_down(batcher)
        return 1 if died else 0

    # --- the consumer's thread ---

    def _consumer_tick(self) -> None:
        self._health.tick("consumer")
        try:
            if not self._client.is_connected:
                server = self._client.connect()
                logger.info("broker connected", extra={"fields": {"server": server}})
            self._follow_the_batcher()
            burst = self._client.receive(TICK_SECONDS)
        except BrokerUnavailable as exc:
            self._broker_lost(exc)
            return
        self._health.broker_connected = True
        self._broker_failures = 0
        if burst:
            returns = max([delivery.delivery_count for delivery in burst if delivery.redelivered], default=0)
            if returns:
                self._note_returns(returns)
            self._handoff.put((time.monotonic(), burst))

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
        if self._client.has_channel and self._client.generation <= self._given_up:
            self._client.give_back()
            logger.warning("unsettled messages given back to the broker")
        if self._accepting.is_set() and not self._client.is_consuming:
            self._client.start_consuming()
            logger.info("consuming", extra={"fields": {"queue": self._settings.rabbitmq_queue}})
        elif self._client.is_consuming and not self._accepting.is_set():
            self._client.cancel()
            logger.warning("not consuming, what was delivered is held")

    def _broker_lost(self, exc: BrokerUnavailable) -> None:
        self._health.broker_connected = False
        self._metrics.error("broker_unavailable")
        pause = backoff(self._broker_failures, 0.5, RECONNECT_CAP_SECONDS, random.random())
        self._broker_failures += 1
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
        self._handoff.put(None)
        self._stopping.set()
        while batcher.is_alive() and time.monotonic() < deadline:
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
                self._client.receive(seconds)
            except BrokerUnavailable as exc:
                logger.warning("broker lost while stopping", extra={"fields": {"error": str(exc)}})

    # --- the batcher's thread ---

    def _run_batcher(self) -> None:
        try:
            while not self._finished:
                self._batcher_tick()
        except Exception:
            logger.exception("batcher failed")  # a bug; the process ends, since it must not look alive
            raise

    def _batcher_tick(self) -> None:
        self._health.tick("batcher")
        if not self._health.database_connected:
            self._await_database()
            return
        self._gather()
        if self._batch.is_ready(time.monotonic()):
            self._flush()
        self._write_stats()

    def _gather(self) -> None:
        """Take one burst, or wait for one for as long as the open batch may wait."""
        patience = min(TICK_SECONDS, self._batch.seconds_left(time.monotonic()))
        try:
            arrived = self._handoff.get(timeout=max(0.0, patience))
        except queue.Empty:
            if self._batch.is_empty and time.monotonic() > self._next_probe:
                self._probe()
            return
        if arrived is None:
            self._flush()
            self._write_stats(force=True)
            self._finished = True
        else:
            self._take(*arrived)

    def _take(self, arrived_at: float, burst: list[Delivery]) -> None:
        """Add the deliveries of one burst, all of one channel, to the batch; write each batch that fills."""
        generation = burst[0].generation
        if generation != self._generation:
            self._batch = self._new_batch()
            self._generation = generation
        while burst:
            if generation != self._client.generation or generation <= self._given_up:
                # the broker has taken these back, and delivers them again on another channel
                return
            taken, burst = burst[: self._batch.room], burst[self._batch.room :]
            for delivery in taken:
                self._batch.add(_read(delivery), arrived_at)
                if delivery.traceparent is not None:
                    self._batch.traceparents[delivery.tag] = delivery.traceparent
            if self._batch.is_ready(arrived_at):
                self._flush()

    def _flush(self) -> None:
        """Write the open batch and have it settled; or let it go, where that takes too long or its channel is gone."""
        batch, self._batch = self._batch, self._new_batch()
        if batch.is_empty:
            return
        if self._is_channel_gone():
            return  # all of it is delivered again
        started = time.monotonic()
        self._writing = batch
        try:
            outcome = self._write(batch)
        except DatabaseUnavailable:
            self._trial = batch
            self._given_up = self._generation
            self._stop_accepting()
            return
        finally:
            self._writing = None
        self._next_probe = time.monotonic() + IDLE_PROBE_SECONDS
        self._settle(batch, outcome)
        self._report(batch, outcome, time.monotonic() - started)

    def _write(self, batch: VoteBatch) -> BatchOutcome:
        """Write the batch, with retries; then hold it: nothing more is fetched, and it is tried again at a slow pace.

        A batch that is given back counts as a failed delivery, and quorum queues drop what failed too often. So that is
        done once, after HOLD_SECONDS, lest a replica whose own link is broken keep votes from the others. Raises
        DatabaseUnavailable then, and where its channel is gone, or the service stops and the retries are used up.
        """
        failing_since = time.monotonic()
        for attempt in itertools.count():
            self._health.tick("batcher")
            try:
                outcome = self._database.batch_update_results(
                    batch.votes,
                    batch.rejections,
                    batch.started_at,
                    self._attempts,
                    lambda: self._health.tick("batcher"),
                )
            except DatabaseUnavailable as exc:
                if attempt == 0:
                    self._unusable_since = failing_since
                self._health.database_connected = False
                failing_for = time.monotonic() - failing_since
                is_held = (
                    attempt >= self._settings.max_retries
                    or failing_for >= LONGEST_RETRYING_SECONDS
                    or isinstance(exc, DatabaseMisconfigured)
                )
                is_over = is_held and failing_for >= self._settings.hold_seconds
                cap = self._longest_pause(exc) if is_held else 60.0
                pause = backoff(attempt, self._settings.retry_backoff_seconds, cap, random.random())
                traces = sorted(set(batch.traceparents.values()))[:MAX_LOGGED_TRACES]
                self._log_database_error("batch not written", exc, None if is_over else pause, traces)
                if is_over or (is_held and self._stopping.is_set()):
                    raise
                if is_held:
                    self._stop_accepting()
                self._pause(pause)
                if self._is_channel_gone():
                    raise DatabaseUnavailable("the channel of the batch is gone") from exc
            else:
                if attempt:
                    seconds = round(time.monotonic() - failing_since, 2)
                    fields = {"attempts": attempt + 1, "seconds": seconds}
                    logger.warning("batch written after all", extra={"fields": fields})
                self._attempts.clear()
                self._health.database_connected = True
                self._accept()
                return outcome
        raise AssertionError("unreachable")

    def _longest_pause(self, exc: DatabaseUnavailable) -> float:
        """In seconds: a server that was away is found soon; one that answers and refuses is left alone for longer."""
        longest = self._settings.retry_backoff_max_seconds
        return longest if isinstance(exc, DatabaseMisconfigured) else min(longest, RECONNECT_CAP_SECONDS)

    def _is_channel_gone(self) -> bool:
        """Whether the broker has taken the open batch back."""
        return self._generation != self._client.generation

    def _accept(self) -> None:
        if not self._accepting.is_set():
            self._accepting.set()
            self._client.wake()

    def _stop_accepting(self) -> None:
        """Fetch nothing more. What was delivered stays here, in order, as long as its channel lasts."""
        self._health.database_connected = False
        self._accepting.clear()
        self._client.wake()

    def _settle(self, batch: VoteBatch, outcome: BatchOutcome) -> None:
        rejected = {rejection.delivery_tag for rejection in outcome.rejected}
        acked = [vote.delivery_tag for vote in batch.votes if vote.delivery_tag not in rejected]
        self._client.settle(self._generation, max(acked, default=None), sorted(rejected))

    def _report(self, batch: VoteBatch, outcome: BatchOutcome, seconds: float) -> None:
        self._metrics.batch_written(
            counted=counts(outcome.counted),
            duplicates=[reason for _, reason in outcome.duplicates],
            rejected=[rejection.reason for rejection in outcome.rejected],
            messages=len(batch),
            seconds=seconds,
            voted_at=[vote.voted_at for vote in outcome.counted if vote.voted_at is not None],
            totals=outcome.totals,
        )
        self._stats.add(len(outcome.counted), len(outcome.duplicates), len(outcome.rejected), seconds)
        refused = sum(rejection.reason == "refused_by_database" for rejection in outcome.rejected)
        if refused:
            logger.error("votes refused by the database", extra={"fields": {"votes": refused}})
        logger.debug("batch committed", extra={"fields": {"messages": len(batch), "counted": len(outcome.counted)}})
        if batch.traceparents and logger.isEnabledFor(logging.DEBUG):
            _log_traced(batch.traceparents, outcome)

    def _await_database(self) -> None:
        """Try once whether a batch can be written, and let the consumer start; or wait, longer each time."""
        if self._stopping.is_set():
            self._finished = True
            return
        try:
            self._database.initialise_schema()
            self._read_totals()
            if self._trial is not None:  # it may answer all this and still refuse every batch
                self._database.try_to_write(self._trial.votes, self._trial.rejections)
        except DatabaseUnavailable as exc:
            if time.monotonic() - self._unusable_since >= self._settings.hold_seconds:
                self._given_up = self._client.generation
                self._client.wake()
            pause = backoff(self._failed_tries, 0.5, self._longest_pause(exc), random.random())
            self._failed_tries += 1
            self._log_database_error("database not usable", exc, pause)
            self._pause(pause)
            return
        self._failed_tries = 0
        self._trial = None
        self._health.database_connected = True
        self._accept()
        logger.info("database usable")

    def _probe(self) -> None:
        """Find out about a lost database, and about the votes that other replicas counted, while nothing comes in."""
        try:
            self._read_totals()
        except DatabaseUnavailable as exc:
            self._log_database_error("database lost", exc, 0.0)
            self._unusable_since = time.monotonic()
            self._stop_accepting()

    def _read_totals(self) -> None:
        self._database.probe()
        self._metrics.totals_read(*self._database.totals(self._metrics.labelled, MAX_LAW_LABELS))
        self._next_probe = time.monotonic() + IDLE_PROBE_SECONDS

    def _pause(self, seconds: float) -> None:
        """Wait, alive, and no longer than until the service stops."""
        until = time.monotonic() + seconds
        while not self._stopping.wait(min(TICK_SECONDS, max(0.0, until - time.monotonic()))):
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
        finished = self._stats.finished(time.time(), force)
        if finished is None:
            return
        minute, *_, rejected, _ = finished
        if rejected:
            logger.warning("messages rejected", extra={"fields": {"minute": minute, "messages": rejected}})
        try:
            self._database.record_stats(*finished)
        except DatabaseUnavailable as exc:
            logger.warning("statistics of a minute not written", extra={"fields": {"error": str(exc)}})

    def _new_batch(self) -> VoteBatch:
        return VoteBatch(self._settings.batch_size, self._settings.batch_timeout_seconds)

    def _oldest_age(self) -> float:
        started = (self._writing or self._batch).started_at
        return 0.0 if started is None else time.monotonic() - started


class Reconciler:
    """Compares the totals with the audit log at intervals, for the gauge ``reconciliation_difference``.

    In a thread and on a connection of its own, so that no batch waits for it.
    """

    def __init__(self, database: Database, metrics: Metrics, seconds: float) -> None:
        self._database = database
        self._metrics = metrics
        self._seconds = seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def __enter__(self) -> Self:
        self._database.open()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()
        self._database.close()  # cuts its query
        self._thread.join()

    def _run(self) -> None:
        pause = self._seconds
        while not self._stopping.wait(pause):
            started = time.monotonic()
            try:
                difference: float = self._database.reconciliation_difference()
            except DatabaseUnavailable as exc:
                difference = math.nan
                logger.info("totals not compared with the audit log", extra={"fields": {"error": str(exc)}})
            self._metrics.difference.set(difference)
            if difference > 0:
                logger.error("totals differ from the audit log", extra={"fields": {"votes": difference}})
            # where nobody seals, the whole log is read each time: then seldom
            pause = max(self._seconds, RECONCILING_SHARE * (time.monotonic() - started))


class _MinuteStats:
    """What this replica did in the present minute."""

    def __init__(self) -> None:
        self._minute = 0
        self._clear()

    def _clear(self) -> None:
        self._batches = self._votes = self._duplicates = self._rejected = 0
        self._busy_seconds = 0.0

    def add(self, votes: int, duplicates: int, rejected: int, busy_seconds: float) -> None:
        self._batches += 1
        self._votes += votes
        self._duplicates += duplicates
        self._rejected += rejected
        self._busy_seconds += busy_seconds

    def finished(self, now: float, force: bool) -> tuple[float, int, int, int, int, float] | None:
        """The minute's numbers, once, when ``now`` (Unix seconds) is in a later one or ``force`` is given."""
        minute, self._minute = self._minute, int(now // 60)
        if not self._batches or (minute == self._minute and not force):
            return None
        row = (minute * 60.0, self._batches, self._votes, self._duplicates, self._rejected, self._busy_seconds)
        self._clear()
        return row


def _read(delivery: Delivery) -> Vote | Rejection:
    _, tag, redelivered, body, message_id, content_encoding, *_, whole = delivery
    if whole is not None:
        body = CutBody.of(body, whole.sha256, whole.length)
    try:
        return Vote.from_message(body, message_id, content_encoding, tag, redelivered)
    except UnreadableVote as exc:
        return Rejection(body, exc.reason, REASONS[exc.reason], message_id, tag)


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
    parser.add_argument("--check-config", action="store_true", help="print the settings, passwords hidden, and exit")
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.from_env(environment())
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
    database = _database(settings, settings.db_pool_min, settings.db_pool_max)
    reconciler = Reconciler(_database(settings, 1, 1), metrics, settings.reconcile_seconds)
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
    # the page reads on a connection of its own: the count never waits for it
    page_database = _database(settings, 1, 1, "results of ", PAGE_TIMEOUT_SECONDS)
    page = ResultsPage(ResultsCache(page_database.results, DatabaseUnavailable))
    routes: dict[str, Route] = {**monitoring_routes(metrics, health)}
    if settings.shows_results and not settings.results_on_own_port:
        routes |= page.routes()
    # beside a port that the public may reach, this one needs few connections
    few = MAX_CONNECTIONS // 8 if settings.results_on_own_port else MAX_CONNECTIONS
    server = HttpServer(settings.metrics_port, routes, "metrics-http", few)
    page_server = HttpServer(settings.results_port or 0, page.routes(), "results-http")
    with server, page_server, page_database, page, database, client, reconciler:
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
        aggregator = VoteAggregator(settings, database, client, metrics, health)
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
