"""What can be seen from outside: metrics, health, and JSON logs.

Knows no other module of the service; it is told plain values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import sys
import threading
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

VERSION = "1.0.0"
MAX_LAW_LABELS = 1_000
OTHER_LAWS = "__other__"
TOTALS_HELP = "Totals in the database, of all replicas together (take max over replicas, not sum)"
RETURNS_SHOWN_SECONDS = 300.0  # long enough for the alert, which waits for two scrapes
RECONCILING_SHARE = 0.02  # of the time, at most, is spent in comparing totals with the audit log
OUR_FOLDER = Path(__file__).parent
WATCH_SECONDS = 1.0
STOPPED_SECONDS = 5.0  # so late the watchdog comes only where the whole process was stopped
WRITING_SHARE = 0.05  # of the time, at most, is spent in writing /metrics, however many ask for it at once

# of an address: to the last @ before its path, since a password may hold one
_PASSWORD_OF_USER = re.compile(r"(://[^\s/:@]*):[^\s/]*@")
_PASSWORD_AS_PARAMETER = re.compile(
    r"\b((?:password|sslpassword|ssl_options)\s*=\s*)(?:'(?:\\.|[^'\\])*'|[^\s&]+)", re.IGNORECASE
)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All metrics of the service, in a registry of their own. Safe to call from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        r = self.registry
        self._laws = _LawSeries(r)
        self._duration = Gauge("batch_processing_duration_seconds", "Time to write the last batch", registry=r)
        self._batch_size = Counter(
            "batch_size_processed", "Votes, and messages that are none, in all batches written", registry=r
        )
        self._errors = Counter("aggregation_errors", "Errors by type", ["error_type"], registry=r)
        self._flush = Histogram("batch_flush_seconds", "Time to write a batch, retries included", registry=r)
        self._latency = _BatchHistogram(
            "vote_latency_seconds",
            "From the timestamp of a vote to its commit (votes without one are left out)",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
            registry=r,
        )
        self._duplicates = Counter("votes_duplicate", "Votes not counted again", ["reason"], registry=r)
        self._rejected = Counter("votes_rejected", "Votes and messages kept as rejected", ["reason"], registry=r)
        self.in_flight = Gauge(
            "votes_in_flight", "Votes read and not yet settled, and messages that are none", registry=r
        )
        self.oldest_age = Gauge(
            "oldest_unflushed_vote_age_seconds", "Age of the first vote of the open batch", registry=r
        )
        self._broker = Gauge("broker_connected", "1 while messages can be consumed", registry=r)
        self._database = Gauge("database_connected", "1 while batches can be written", registry=r)
        self.difference = Gauge(
            "reconciliation_difference",
            "Votes by which totals differ from the audit log or certificates from totals, NaN while not known",
            registry=r,
        )
        self.oldest_unsealed_age = Gauge(
            "oldest_unsealed_vote_age_seconds",
            "Age of the oldest vote without a seal, 0 where none waits, NaN while not known or nothing was ever sealed",
            registry=r,
        )
        self.newest_seal_age = Gauge(
            "newest_seal_age_seconds",
            "Age of the newest seal, NaN while not known or nothing was ever sealed",
            registry=r,
        )
        for gauge in (self.difference, self.oldest_unsealed_age, self.newest_seal_age):
            gauge.set(math.nan)
        self._certified = Gauge(
            "law_certified_timestamp_seconds",
            "Unix time at which the result of the law was certified",
            ["law_id"],
            registry=r,
        )
        self._last_commit = Gauge(
            "last_commit_timestamp_seconds", "Unix time of the last commit of a batch", registry=r
        )
        self._returns = Gauge(
            "delivery_count_max",
            "Returns of the message that came most often, as quorum queues count them, in the last five minutes",
            registry=r,
        )
        self._returns.set_function(self._recent_returns)
        self._most_returns = (0, -math.inf)  # and when that was seen
        build = Info("vote_aggregator_build", "Version of the service", registry=r)
        build.info({"version": VERSION, "python": platform.python_version()})
        for error_type in ("broker_unavailable", "database_unavailable", "database_misconfigured"):
            self._errors.labels(error_type)
        for reason in ("redelivery", "duplicate", "conflict", "second_vote"):
            self._duplicates.labels(reason)

    def batch_written(
        self,
        *,
        counted: Mapping[str, tuple[int, int]],
        duplicates: Iterable[str],
        rejected: Iterable[str],
        messages: int,
        seconds: float,
        voted_at: Iterable[datetime],
        totals: Mapping[str, tuple[int, int]],
    ) -> None:
        """Tell of one committed batch.

        ``counted`` is (oui, non) per law, ``duplicates`` and ``rejected`` are a reason each, ``seconds`` is the time to
        write it, ``voted_at`` are the timestamps of the counted votes that have one, ``totals`` the laws' new totals.
        """
        now = time.time()
        self._laws.add(counted, totals)
        for reason in duplicates:
            self._duplicates.labels(reason).inc()
        for reason in rejected:
            self._rejected.labels(reason).inc()
        self._latency.observe([max(0.0, now - moment.timestamp()) for moment in voted_at])
        self._batch_size.inc(messages)
        self._duration.set(seconds)
        self._flush.observe(seconds)
        self._last_commit.set(now)

    @property
    def labelled(self) -> Collection[str]:
        """The laws that have a label of their own."""
        return self._laws.labelled

    @property
    def is_crowded(self) -> bool:
        """Whether a law that has no label was counted since the totals were read."""
        return self._laws.is_crowded

    def totals_read(self, totals: Mapping[str, tuple[int, int]], others: tuple[int, int]) -> None:
        """Tell the totals as the database has them: those of laws, and that of all others.

        Those of the former get a label, the first ones first, where need be in place of a law that is not among them.
        """
        self._laws.set_totals(totals, others)

    def certificates_read(self, certified: Iterable[tuple[str, float]]) -> None:
        """Tell which laws are certified, and since when (Unix time); no more than have a label each."""
        for law_id, moment in certified:
            self._certified.labels(law_id).set(moment)

    def delivery_count_seen(self, returns: int) -> None:
        """Tell how often a message that was received had been returned to its queue."""
        if returns >= self._recent_returns():
            self._most_returns = (returns, time.time())

    def _recent_returns(self) -> int:
        returns, seen_at = self._most_returns
        return returns if time.time() - seen_at < RETURNS_SHOWN_SECONDS else 0

    def error(self, error_type: str) -> None:
        """Tell of one error; ``error_type`` is a short code."""
        self._errors.labels(error_type).inc()

    def connected(self, *, broker: bool, database: bool) -> None:
        """Tell whether each server can be used."""
        self._broker.set(broker)
        self._database.set(database)


class _LawSeries(Collector):
    """The two metrics that have a series for each law and choice.

    A batch may touch hundreds of laws, so the numbers are kept as they come, and become series when somebody asks. The
    first 1,000 laws have a label each, all others share one: more would let anybody who can vote fill our memory. Where
    others are to have labels ``set_totals`` takes theirs away. A series begins with its first value: a total of 0 that
    nobody has read would be a false one.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counted: dict[str, tuple[int, int]] = {}
        self._totals: dict[str, tuple[int, int]] = {}
        self._labelled: set[str] = set()
        self.is_crowded = False  # a law that has no label was counted since the totals were set
        self._lock = threading.Lock()
        registry.register(self)

    @property
    def labelled(self) -> Collection[str]:
        """The laws that have a label of their own."""
        return self._labelled

    def add(self, counted: Mapping[str, tuple[int, int]], totals: Mapping[str, tuple[int, int]]) -> None:
        """Take what a batch has counted, and the new totals of its laws."""
        with self._lock:
            for law_id, votes in counted.items():
                if self._has_label(law_id):
                    self._counted[law_id] = _sum(self._counted.get(law_id), votes)
                    if law_id in totals:
                        self._totals[law_id] = totals[law_id]
                else:
                    self.is_crowded = True
                    for numbers in (self._counted, self._totals):
                        numbers[OTHER_LAWS] = _sum(numbers.get(OTHER_LAWS), votes)

    def set_totals(self, totals: Mapping[str, tuple[int, int]], others: tuple[int, int]) -> None:
        """Take totals in place of those so far: of laws, those that come first, and of all laws beside them."""
        with self._lock:
            self.is_crowded = False
            giving_way = self._labelled - totals.keys()
            for law_id, votes in totals.items():
                if giving_way and law_id not in self._labelled and len(self._labelled) >= MAX_LAW_LABELS:
                    self._take_label(giving_way.pop())
                if self._has_label(law_id):
                    self._totals[law_id] = votes
                else:
                    others = _sum(others, votes)
            if any(others) or OTHER_LAWS in self._totals:
                self._totals[OTHER_LAWS] = others

    def _has_label(self, law_id: str) -> bool:
        if law_id not in self._labelled:
            if len(self._labelled) >= MAX_LAW_LABELS:
                return False
            self._labelled.add(law_id)
        return True

    def _take_label(self, law_id: str) -> None:
        """From now on it is one of the others, with all that was counted of it; their total is read with the rest."""
        self._labelled.remove(law_id)
        self._totals.pop(law_id, None)
        if law_id in self._counted:
            self._counted[OTHER_LAWS] = _sum(self._counted.get(OTHER_LAWS), self._counted.pop(law_id))

    def collect(self) -> Iterable[Metric]:
        """What prometheus_client asks a collector for."""
        labels = "law_id", "choice"
        families: list[tuple[CounterMetricFamily | GaugeMetricFamily, dict[str, tuple[int, int]]]]
        with self._lock:  # and let go of before anybody reads a series
            families = [
                (CounterMetricFamily("votes_aggregated", "Votes counted", labels=labels), self._counted.copy()),
                (GaugeMetricFamily("current_vote_totals", TOTALS_HELP, labels=labels), self._totals.copy()),
            ]
        for family, numbers in families:
            for law_id, (oui, non) in numbers.items():
                family.add_metric((law_id, "oui"), oui)
                family.add_metric((law_id, "non"), non)
            yield family


def _sum(so_far: tuple[int, int] | None, more: tuple[int, int]) -> tuple[int, int]:
    oui, non = so_far or (0, 0)
    return oui + more[0], non + more[1]


class _BatchHistogram(Collector):
    """A histogram that takes a whole batch of values at once: prometheus_client's own needs 2 us for each of them."""

    def __init__(self, name: str, documentation: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = [*buckets, math.inf]
        self._counts = [0] * len(self._bounds)  # of the values up to each bound
        self._sum = 0.0
        self._lock = threading.Lock()
        registry.register(self)

    def observe(self, values: list[float]) -> None:
        """Take the values, in seconds; sorts them in place."""
        values.sort()
        with self._lock:
            self._sum += sum(values)
            self._counts = [
                count + bisect_right(values, bound) for count, bound in zip(self._counts, self._bounds, strict=True)
            ]

    def collect(self) -> Iterable[Metric]:
        """What prometheus_client asks a collector for."""
        with self._lock:
            buckets = [
                ("+Inf" if bound == math.inf else str(float(bound)), count)
                for bound, count in zip(self._bounds, self._counts, strict=True)
            ]
            yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class Health:
    """What /healthz and /readyz answer from. Each flag and tick is written by one thread and read by any."""

    def __init__(self, stale_after: float) -> None:
        """A loop that has not ticked for ``stale_after`` seconds counts as hung."""
        self._stale_after = stale_after
        self._ticks: dict[str, float] = {}
        self.broker_connected = False
        self.database_connected = False

    def tick(self, loop: str) -> None:
        """Tell that this loop (its name) goes round."""
        self._ticks[loop] = time.monotonic()

    def tick_all(self) -> None:
        """Take every loop for one that has just gone round, since none could while the process was stopped."""
        for loop in tuple(self._ticks):
            self.tick(loop)

    def stuck(self) -> list[str]:
        """The loops that count as hung."""
        now = time.monotonic()
        return [loop for loop, ticked in self._ticks.items() if now - ticked >= self._stale_after]

    def report(self) -> dict[str, Any]:
        """``live`` and ``ready``, with what they follow from."""
        now = time.monotonic()
        ages = {loop: round(now - ticked, 1) for loop, ticked in self._ticks.items()}
        live = not self.stuck()
        return {
            "live": live,
            "ready": live and self.broker_connected and self.database_connected,
            "broker_connected": self.broker_connected,
            "database_connected": self.database_connected,
            "seconds_since_tick": ages,
        }


class Watchdog:
    """Ends the process where one of its loops hangs, so that whoever supervises it starts another one.

    Docker and systemd act on exits, and not on what /healthz says. Nothing is lost: the broker has what was not acked.
    A loop that waits for a server ticks all the while. A process that was stopped (SIGSTOP, a suspended machine) starts
    anew to count when it goes on.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()

    def _run(self) -> None:
        looked_at = time.monotonic()
        while not self._stopping.wait(WATCH_SECONDS):
            now = time.monotonic()
            if now - looked_at > STOPPED_SECONDS:
                self._health.tick_all()
            elif stuck := self._health.stuck():
                # in a thread, since a log that takes no line may be what hangs
                said = threading.Thread(target=_say_what_hangs, args=(stuck,), name="watchdog-log", daemon=True)
                said.start()
                said.join(STOPPED_SECONDS)
                os._exit(1)
            looked_at = now


def _say_what_hangs(loops: list[str]) -> None:
    frames = sys._current_frames()
    stacks = {
        thread.name: [
            f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in traceback.extract_stack(frames[ident])
        ]
        for thread in threading.enumerate()
        if (ident := thread.ident) in frames and ident is not None
    }
    fields = {"loops": loops, "stacks": stacks}
    logger.critical("a loop hangs, leaving at once", extra={"fields": fields})


def monitoring_routes(
    metrics: Metrics, health: Health
) -> dict[str, Callable[[Mapping[str, str]], tuple[int, dict[str, str], bytes]]]:
    """What answers /metrics, /healthz and /readyz: status, headers and body, from the headers of the request."""
    written: dict[str, tuple[float, bytes]] = {}  # until when it is new enough, by content type

    def answer_metrics(headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        encode, content_type = choose_encoder(_format_for(headers.get("accept", "")))
        started = time.monotonic()
        until, body = written.get(content_type, (0.0, b""))
        if started >= until:
            metrics.connected(broker=health.broker_connected, database=health.database_connected)
            body = encode(metrics.registry)
            finished = time.monotonic()
            written[content_type] = finished + (finished - started) / WRITING_SHARE, body
        return 200, {"Content-Type": content_type}, body

    def answer_report(key: str) -> tuple[int, dict[str, str], bytes]:
        report = health.report()
        body = json.dumps(report).encode() + b"\n"
        return 200 if report[key] else 503, {"Content-Type": "application/json", "Cache-Control": "no-store"}, body

    return {
        "/metrics": answer_metrics,
        "/healthz": lambda _headers: answer_report("live"),
        "/readyz": lambda _headers: answer_report("ready"),
    }


def _format_for(accept: str) -> str:
    # prometheus_client would answer in any version of OpenMetrics that is asked for, and fail where it is no number.
    for accepted in accept.split(","):
        name, *parameters = accepted.replace(" ", "").split(";")
        if name == "application/openmetrics-text" and "version=0.0.1" not in parameters:
            return f"{name};version=1.0.0"
    return ""


# By how many votes the totals differ from the audit log. What is sealed is counted already; of the rest, the rows are.
SELECT_DIFFERENCE = """
    WITH counted AS (
        SELECT law_id, oui_count AS oui, non_count AS non FROM ONLY sealed_totals
        UNION ALL
        SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
        FROM ONLY vote_audit
        WHERE txid >= (SELECT coalesce(max(to_txid), 0) FROM ONLY audit_seals)
        GROUP BY law_id
    ),
    logged AS (SELECT law_id, sum(oui) AS oui, sum(non) AS non FROM counted GROUP BY law_id)
    SELECT coalesce(sum(abs(coalesce(oui_count, 0) - coalesce(oui, 0))
                        + abs(coalesce(non_count, 0) - coalesce(non, 0))), 0)::bigint
    FROM (SELECT law_id, sum(oui_count) AS oui_count, sum(non_count) AS non_count
          FROM ONLY vote_results GROUP BY law_id) AS totals
    FULL JOIN logged USING (law_id)
"""

# By how many votes certificates differ from the totals, in whose place they are shown. By itself, since the service's
# role of an earlier version may not read certificates.
SELECT_CERTIFIED_DIFFERENCE = """
    SELECT coalesce(sum(abs(final.oui_count - coalesce(totals.oui_count, 0))
                        + abs(final.non_count - coalesce(totals.non_count, 0))), 0)::bigint
    FROM ONLY certified_results AS final
    LEFT JOIN (SELECT law_id, sum(oui_count) AS oui_count, sum(non_count) AS non_count
               FROM ONLY vote_results GROUP BY law_id) AS totals USING (law_id)
"""

# How long the oldest vote waits that is not sealed, and how old the newest seal is; NULL where nothing was ever sealed.
SELECT_SEALING = """
    SELECT CASE WHEN newest.sealed_at IS NOT NULL THEN (
               SELECT greatest(coalesce(extract(epoch FROM now() - min(recorded_at)), 0), 0)::float8
               FROM ONLY vote_audit WHERE txid >= newest.to_txid) END,
           extract(epoch FROM now() - newest.sealed_at)::float8
    FROM (SELECT max(to_txid) AS to_txid, max(sealed_at) AS sealed_at FROM ONLY audit_seals) AS newest
"""

# When each law was certified; in this order, so that those without a label stay the same ones.
SELECT_CERTIFIED = """
    SELECT law_id, extract(epoch FROM certified_at)::float8 FROM ONLY certified_results ORDER BY certified_at, law_id
"""


class Reconciler:
    """Compares the totals with the audit log at intervals, and looks what is sealed and certified, for their gauges.

    In a thread of its own, so that no batch waits for it.
    """

    def __init__(
        self,
        read: Callable[[str], list[tuple[Any, ...]]],
        unavailable: type[Exception],
        metrics: Metrics,
        seconds: float,
    ) -> None:
        """``read`` returns the rows of a statement, or raises ``unavailable``; it is called every so many seconds, and
        seldomer where it takes long. Whoever leaves the context has it return before.
        """
        self._read = read
        self._unavailable = unavailable
        self._metrics = metrics
        self._seconds = seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        pause = self._seconds
        while not self._stopping.wait(pause):
            started = time.monotonic()
            ((difference,),) = self._rows(SELECT_DIFFERENCE, "totals not compared with the audit log") or [(math.nan,)]
            ((of_certificates,),) = self._rows(
                SELECT_CERTIFIED_DIFFERENCE, "certificates not compared with totals"
            ) or [(math.nan,)]
            known = [votes for votes in (difference, of_certificates) if votes > 0]  # NaN is not
            self._metrics.difference.set(sum(known) if known else difference + of_certificates)
            if difference > 0:
                logger.error("totals differ from the audit log", extra={"fields": {"votes": difference}})
            if of_certificates > 0:
                logger.error("certificates differ from the totals", extra={"fields": {"votes": of_certificates}})
            (ages,) = self._rows(SELECT_SEALING, "not known how old the newest seal is") or [(None, None)]
            for gauge, age in zip(
                (self._metrics.oldest_unsealed_age, self._metrics.newest_seal_age), ages, strict=True
            ):
                gauge.set(math.nan if age is None else age)
            certified = self._rows(SELECT_CERTIFIED, "not known which laws are certified")
            self._metrics.certificates_read(certified[:MAX_LAW_LABELS])
            # where nobody seals, the whole log is read each time: then seldom
            pause = max(self._seconds, (time.monotonic() - started) / RECONCILING_SHARE)

    def _rows(self, statement: str, problem: str) -> list[tuple[Any, ...]]:
        """Those of the statement; none where it cannot be read, and the log says which ``problem`` that is."""
        try:
            return self._read(statement)
        except self._unavailable as exc:
            logger.info(problem, extra={"fields": {"error": str(exc)}})
            return []


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the facts given as ``extra={"fields": {...}}``.

    Every string is JSON-escaped, so no control character gets through. Passwords are taken out of addresses by their
    structure, wherever those stand. ``secrets`` are blotted out of the texts of drivers: in the field ``error``, in
    exceptions and in what other people's modules log. Not elsewhere: one that is a word of ours would be told by that.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._secrets = sorted(secrets, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """The line for ``record``, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._clean(record.getMessage(), is_drivers=not _is_ours(record)),
            "fields": self._clean(getattr(record, "fields", {})),
        }
        if record.exc_info:
            line["exception"] = self._clean(self.formatException(record.exc_info), is_drivers=True)
        return json.dumps(line, default=str)

    def _clean(self, value: Any, is_drivers: bool = False) -> Any:
        """``value`` without a password in its texts; the line stays JSON whatever the password is."""
        if isinstance(value, dict):
            return {key: self._clean(item, is_drivers or key == "error") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(item, is_drivers) for item in value]
        if isinstance(value, str):
            value = _PASSWORD_OF_USER.sub(r"\1:***@", value)
            value = _PASSWORD_AS_PARAMETER.sub(r"\1***", value)
            for secret in self._secrets if is_drivers else []:
                value = value.replace(secret, "***")
        return value


def _is_ours(record: logging.LogRecord) -> bool:
    return Path(record.pathname).parent == OUR_FOLDER


def configure_logging(level: str, secrets: Iterable[str]) -> None:
    """Log to stdout, one JSON object a line, from ``level`` up."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # pika logs each failure several times, with stack traces; rabbitmq_client reports it once
    logging.getLogger("pika").setLevel(logging.CRITICAL)
