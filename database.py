"""The database's edge: one batch is one transaction; a vote's identity and its count stand or fall together."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS, connection, cursor, parse_dsn
from psycopg2.pool import ThreadedConnectionPool

from votes import LAW_REASONS, OUTCOMES, CutBody, Outcome, Rejection, Vote

logger = logging.getLogger(__name__)

SCHEMA_FILE = Path(__file__).with_name("init_db.sql")
SCHEMA_VERSION = 8  # the one that init_db.sql writes last
KEPT_BODY_BYTES = 64 * 1024
REFUSED = "refused_by_database"  # the reason of a vote that it does not take
# What a transaction relies on, whatever the role, the database or somebody in the session has set: where the tables are
# (all of their rows: a policy that would hide some is an error), and how values are written and read.
FORM = """
    SET LOCAL search_path = public, pg_temp; SET LOCAL row_security = off; SET LOCAL array_nulls = on;
    SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL extra_float_digits = 1
"""
SUSPECT_TRIES = 3  # of a vote that alone failed, before it is refused for a code that does not say whose fault it is

# One batch, all of it: what became of each vote, and the new totals (init_db.sql says how). Prepared once a connection
# where there is no pooler in between, which spares PostgreSQL a twentieth.
_TYPES = [
    *("varchar", "double precision", "boolean"),
    *("uuid[]", "varchar[]", "varchar[]", "timestamptz[]", "varchar[]", "boolean[]"),  # the votes
    *("bigint[]", "timestamptz[]", "uuid[]", "timestamptz[]"),  # the attempts
    *("bytea[]", "text[]", "bytea[]", "integer[]", "varchar[]", "text[]", "varchar[]", "bigint[]"),  # the rejected
    "bigint[]",  # when votes were sent
    "boolean",  # whether copies are expected
]
_CALL = "SELECT batch_txid, began_at, inserted, judged, outcomes, laws, oui, non FROM count_batch({})"
COUNT_BATCH = _CALL.format(", ".join([f"%s::{name}" for name in _TYPES]))
_NUMBERED = _CALL.format(", ".join([f"${number}" for number in range(1, len(_TYPES) + 1)]))
PREPARE_COUNT_BATCH = f"PREPARE count_batch ({', '.join(_TYPES)}) AS {_NUMBERED}"
EXECUTE_COUNT_BATCH = f"EXECUTE count_batch ({', '.join(['%s'] * len(_TYPES))})"

# The totals of as many laws as were asked for, and of all others. First come those that the operator has listed, then
# those that are named, then those with most votes.
SELECT_TOTALS = """
    WITH own AS (
        SELECT law_id, coalesce(oui_count, 0) AS oui_count, coalesce(non_count, 0) AS non_count
        FROM ONLY vote_results
        FULL JOIN ONLY laws USING (law_id)
        ORDER BY laws.law_id IS NOT NULL DESC, law_id = ANY (%s) DESC, oui_count + non_count DESC NULLS LAST, law_id
        LIMIT %s
    )
    SELECT law_id, oui_count, non_count FROM own
    UNION ALL
    SELECT NULL, (all_laws.oui - own_laws.oui)::bigint, (all_laws.non - own_laws.non)::bigint
    FROM (SELECT coalesce(sum(oui_count), 0) AS oui, coalesce(sum(non_count), 0) AS non
          FROM ONLY vote_results) AS all_laws,
         (SELECT coalesce(sum(oui_count), 0) AS oui, coalesce(sum(non_count), 0) AS non FROM own) AS own_laws
"""

# What a trial has written is checked as a COMMIT would, and taken back; a record as durable as a vote takes its place.
BEGIN_TRIAL = "SAVEPOINT trial"
END_TRIAL = "SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO SAVEPOINT trial"
WRITE_RECORD = "SELECT pg_logical_emit_message(true, 'votes', '')"
MADE_UP_VOTE = Vote("", "made-up", "oui", None, None, b"", None, 0, False)  # for a trial that has no other

RECORD_MINUTE = "SELECT record_minute(%s, to_timestamp(%s), %s, %s, %s, %s, %s)"

# Can a batch be written here? Fails where a table or the function is missing, or a table locked or not to be read.
PROBE = """
    SELECT current_setting('transaction_read_only') = 'on',
           EXISTS (SELECT FROM vote_audit), EXISTS (SELECT FROM duplicate_attempts),
           EXISTS (SELECT FROM rejected_messages), EXISTS (SELECT FROM vote_results), EXISTS (SELECT FROM laws),
           has_function_privilege(%s, 'EXECUTE'),
           (SELECT max(to_txid) FROM audit_seals) > pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""

SELECT_SCHEMA_EXISTS = "SELECT to_regclass('schema_version') IS NOT NULL"
SELECT_SCHEMA_VERSION = "SELECT coalesce(max(version), 0) FROM schema_version"

# Settings of the server without which a commit that was confirmed can be gone after a power cut; and whether there are
# standbys that a commit does not wait for.
SELECT_UNSAFE_SETTINGS = """
    SELECT array(SELECT name FROM pg_settings
                 WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit') AND setting = 'off' ORDER BY name),
           current_setting('synchronous_standby_names') <> ''
           AND current_setting('synchronous_commit') IN ('off', 'local')
"""

# SQLSTATE classes and codes (PostgreSQL manual, appendix A). Transient: it passes. Poison: the vote is to blame.
# Set-up: an operator has to look. Any other is the fault of one vote if others of its batch can be written.
# 0A000, 26: what was prepared is for another version of the function, or not there; a new connection prepares it anew.
_TRANSIENT = ("08", "40", "53", "55P03", "57", "25006", "25P03", "25P04", "0A000", "26")
_POISON = ("22", "23", "54")
_SET_UP = ("28", "3D", "3F", "42", "58", "F0", "XX001", "XX002")

# libpq gives no SQLSTATE for a connection that the server refuses, only its words. A server that speaks another
# language passes for one that is away, and is tried again all the same.
_REFUSALS = ("authentication failed", "no pg_hba.conf entry", "does not exist", "permission denied")


class DatabaseUnavailable(Exception):
    """The batch was not written, or it is unknown whether it was. Write it again: nothing is lost or doubled."""


class DatabaseMisconfigured(DatabaseUnavailable):
    """As DatabaseUnavailable, but it will not pass by itself: rights, schema or set-up are wrong."""


class BatchRejected(DatabaseMisconfigured):
    """The database refuses something in the transaction; it was rolled back.

    For the votes of a batch this ends in halving it; of anything else it is a fault of the set-up. ``is_poison`` where
    the code says that the content is to blame; else that has still to be found out.
    """

    def __init__(self, sqlstate: str, text: str, is_poison: bool) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate
        self.is_poison = is_poison


@dataclass
class BatchOutcome:
    """What became of a batch, once it is committed.

    ``counted``: votes that are in the totals through this batch. ``duplicates``: votes that were not counted, each with
    its outcome (redelivery, duplicate, conflict or second_vote). ``rejected``: messages kept as rejected, among them
    votes that the database refused. ``totals``: the new (oui, non) of each law that the batch touched.
    """

    counted: list[Vote] = field(default_factory=list)
    duplicates: list[tuple[Vote, Outcome]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    totals: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: BatchOutcome) -> None:
        """Join the outcome of a later part of the same batch."""
        self.counted += other.counted
        self.duplicates += other.duplicates
        self.rejected += other.rejected
        self.totals |= other.totals


class Attempt(NamedTuple):
    """A transaction that wrote a part of a batch, by its id and its beginning; its COMMIT may have gone unanswered."""

    txid: int
    began_at: datetime


class Minute(NamedTuple):
    """What a replica did in a minute; ``began`` is in Unix seconds, ``busy_seconds`` is the time it took to write."""

    began: float
    batches: int = 0
    votes: int = 0
    duplicates: int = 0
    rejected: int = 0
    busy_seconds: float = 0.0


@dataclass(frozen=True)
class _Try:
    """What all parts of one try to write a batch have in common.

    ``earlier`` are the attempts of tries before this one, ``made`` begins with them and takes those of this one. What a
    trial writes is taken back. ``on_part`` is called before each transaction. ``expects_copies`` is a guess.
    """

    held_since: float
    earlier: Sequence[Attempt] = ()
    made: list[Attempt] = field(default_factory=list)
    is_trial: bool = False
    on_part: Callable[[], None] = lambda: None
    expects_copies: bool = False


class _Connection(connection):
    """A connection, with the statement that begins its transactions, once that is known, and what is prepared in it."""

    begin = ""
    is_direct = has_prepared = False


class Database:
    """The totals and the proof behind them. The constructor does no I/O; every method but ``close`` may wait and raise.

    Used by one thread at a time, except that a watchdog thread cuts the connection of a transaction that takes longer
    than ``timeout`` seconds: a server that hangs (stopped, black-holed) is noticed by no other limit.
    """

    def __init__(self, url: str, *, pool_min: int, pool_max: int, timeout: float, instance: str) -> None:
        self._connect_arguments = _connect_arguments(url, timeout, instance)
        self._limits = _limits(timeout, self._connect_arguments.get("options", ""))
        self._pool_min = pool_min
        self._pool_max = pool_max
        self._timeout = timeout
        self._instance = instance
        self._pool: ThreadedConnectionPool | None = None
        self._sound: list[Vote] = []  # a few votes that were written last
        self._watch_lock = threading.Lock()
        self._watched: tuple[connection, float] | None = None
        self._closing = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="db-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Start the watchdog. Connections are made when they are needed, so that a database that is away can come."""
        self._watchdog.start()

    def close(self) -> None:
        """Close all connections, also under a transaction that still runs, and stop the watchdog. Raises nothing."""
        self._closing.set()
        self._cut_if_due(math.inf)  # else closing would wait for its query to end
        self._discard_pool()
        if self._watchdog.is_alive():
            self._watchdog.join()

    def initialise_schema(self) -> None:
        """Bring the schema up to SCHEMA_VERSION by init_db.sql, unless it is there. Raises DatabaseUnavailable.

        Where it is there nothing is touched, so that a role without the right to create tables is enough.
        """
        with self._transaction(SELECT_UNSAFE_SETTINGS) as cur:
            switched_off, skips_standbys = _one(cur)
            for name in switched_off:
                logger.warning("a confirmed commit may not survive a power cut", extra={"fields": {name: "off"}})
            if skips_standbys:
                logger.error(
                    "there are synchronous standbys and commits do not wait for them: votes may be lost at a failover",
                    extra={"fields": {"remedy": "synchronous_commit = on for this role and database"}},
                )
            cur.execute(SELECT_SCHEMA_EXISTS)
            if _one(cur)[0]:
                cur.execute(SELECT_SCHEMA_VERSION)
                if _one(cur)[0] >= SCHEMA_VERSION:
                    return
        # the script's own BEGIN and COMMIT would end our transaction early
        script = SCHEMA_FILE.read_text(encoding="utf-8").replace("\nBEGIN;\n", "\n").replace("\nCOMMIT;\n", "\n")
        with self._transaction(script):
            pass
        logger.info("schema created", extra={"fields": {"version": SCHEMA_VERSION}})

    def probe(self) -> None:
        """Ask whether a batch could be written. Raises DatabaseUnavailable, with the reason, where not."""
        with self._transaction(PROBE, [f"count_batch({', '.join(_TYPES)})"]) as cur:
            is_read_only, *_, may_call, is_behind_the_seals = _one(cur)
            if is_read_only:
                raise DatabaseUnavailable("the server is read-only")
            if not may_call:
                raise DatabaseMisconfigured("permission denied for function count_batch")
            if is_behind_the_seals:
                raise DatabaseMisconfigured(
                    "transaction ids are lower than those sealed in the audit log, as after a restore from a dump; "
                    "docs/AUDIT.md says how to raise them"
                )

    def totals(self, first: Collection[str], laws: int) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
        """The (oui, non) counts of so many laws, and of all others together. Those with a row in ``laws`` come first,
        votes or none, and then those in ``first``.

        Raises DatabaseUnavailable.
        """
        with self._transaction(SELECT_TOTALS, (list(first), laws)) as cur:
            *own, (_, *others) = cur.fetchall()
            return {law_id: (oui, non) for law_id, oui, non in own}, (others[0], others[1])

    def read(self, statement: str, values: Any = None) -> list[tuple[Any, ...]]:
        """The rows of a statement that only reads. Raises DatabaseUnavailable."""
        with self._transaction(statement, values) as cur:
            return cur.fetchall()

    def record_minute(self, minute: Minute) -> None:
        """Add to the row of this instance for that minute. Raises DatabaseUnavailable."""
        with self._transaction(RECORD_MINUTE, (self._instance, *minute)):
            pass

    def batch_update_results(
        self,
        votes: Sequence[Vote],
        rejections: Sequence[Rejection],
        held_since: float | None = None,
        attempts: list[Attempt] | None = None,
        on_part: Callable[[], None] = lambda: None,
        expects_copies: bool = False,
    ) -> BatchOutcome:
        """Write one batch: identities, duplicates, rejected messages and totals, in one transaction; then commit.

        ``held_since`` is the time.monotonic() at which the first of them came, if not just now: the broker may have
        given them to another replica since. ``attempts`` are the transactions that may have written a part of them
        already; those of this call are added. A vote that the database refuses is searched by halving the batch and
        kept as a rejected message; all others are counted. ``on_part`` is called before each transaction. To expect
        copies of counted votes spares time where they come, and costs some where none do. On return everything is
        committed, and what was given may be settled with the broker.

        Raises DatabaseUnavailable: then call again with the same batch and attempts, now or after a redelivery.
        """
        made = [] if attempts is None else attempts
        since = time.monotonic() if held_since is None else held_since
        outcome = self._write_all(_Try(since, tuple(made), made, False, on_part, expects_copies), votes, rejections)
        self._sound = outcome.counted[:3] or self._sound
        return outcome

    def try_to_write(self, votes: Sequence[Vote], rejections: Sequence[Rejection]) -> None:
        """Write such a batch, take it back, and commit a record as durable as a vote. Raises DatabaseUnavailable.

        Reading tables and rights shows no trigger that refuses, no full disk, no lock and no standby that is away. The
        votes get identities of their own: others may have counted these meanwhile, and nothing would be written. Where
        neither is given, a vote is made up; what may be refused for its content then says nothing about others.
        """
        trial = _Try(time.monotonic(), is_trial=True)
        if votes or rejections:
            self._write_all(trial, _strangers(votes), rejections)
            return
        try:
            self._write(trial, _strangers([MADE_UP_VOTE]), [])
        except BatchRejected:
            self._write(trial, [], [])

    def _write_all(self, this: _Try, votes: Sequence[Vote], rejections: Sequence[Rejection]) -> BatchOutcome:
        outcome, suspects = self._write_or_halve(this, votes, rejections)
        if suspects:
            _check_suspects(suspects, len({vote.vote_id for vote in votes}))
            tried = [self._try_again(this, vote) or (vote, sqlstate) for vote, sqlstate in suspects]
            culprits = [each for each in tried if not isinstance(each, BatchOutcome)]
            for part in tried:
                if isinstance(part, BatchOutcome):
                    outcome.add(part)
            if culprits:
                # only now: what failed may have begun after the others were written
                self._check_company(this, outcome.counted[:3] or self._sound, [vote for vote, _ in culprits])
                outcome.add(
                    self._write(
                        this, [], [vote.rejected(REFUSED, f"SQLSTATE {sqlstate}") for vote, sqlstate in culprits]
                    )
                )
        return outcome

    def _write_or_halve(
        self, this: _Try, votes: Sequence[Vote], rejections: Sequence[Rejection], told: Sequence[str] = ()
    ) -> tuple[BatchOutcome, list[tuple[Vote, str]]]:
        """Answers what became of them, and the suspects, with SQLSTATE: of these, nothing has been written.

        A suspect is a vote that fails alone with a code that does not say whether the vote is to blame. ``told`` are
        the votes that earlier parts were answered to have counted.
        """
        try:
            return self._write(this, votes, rejections, told), []
        except BatchRejected as exc:
            if not votes:
                raise DatabaseMisconfigured(f"rejected messages cannot be kept: {exc}") from exc
            if rejections:  # each by itself, lest a vote be blamed for them
                outcome, suspects = self._write_or_halve(this, votes, [], told)
                outcome.add(self._write_or_halve(this, [], rejections)[0])
                return outcome, suspects
            if len(votes) == 1:
                if not exc.is_poison:
                    return BatchOutcome(), [(votes[0], exc.sqlstate)]
                return self._write_or_halve(this, [], [votes[0].rejected(REFUSED, f"SQLSTATE {exc.sqlstate}")])
            middle = len(votes) // 2
            outcome, suspects = self._write_or_halve(this, votes[:middle], [], told)
            told = [*told, *(vote.vote_id for vote in outcome.counted)]
            others, more_suspects = self._write_or_halve(this, votes[middle:], [], told)
            outcome.add(others)
            return outcome, suspects + more_suspects

    def _try_again(self, this: _Try, vote: Vote) -> BatchOutcome | None:
        """Now that the others are committed: it may have been their company. None where it fails all the same."""
        for _ in range(SUSPECT_TRIES):
            outcome, still = self._write_or_halve(this, [vote], [])
            if not still:
                return outcome
        return None

    def _check_company(self, this: _Try, written: Sequence[Vote], suspects: Sequence[Vote]) -> None:
        """Raise DatabaseMisconfigured unless votes like those that were written can be written now.

        Where there are none of these, or their laws take no more, votes like the suspects have to do.
        """
        trial = _Try(this.held_since, is_trial=True, on_part=this.on_part)
        for votes in (written, suspects):
            if not votes:
                continue
            outcome, failing = self._write_or_halve(trial, _strangers(votes), [])
            if failing:
                raise DatabaseMisconfigured(f"a vote cannot be written: SQLSTATE {failing[0][1]}")
            if outcome.totals:
                return
        raise DatabaseMisconfigured("no vote is taken that could show whose fault it is")

    def _write(
        self, this: _Try, votes: Sequence[Vote], rejections: Sequence[Rejection], told: Sequence[str] = ()
    ) -> BatchOutcome:
        """One transaction. Raises DatabaseUnavailable or BatchRejected; then nothing was written, or it is unknown."""
        this.on_part()
        attempts = (*_attempt_columns(this.earlier), _array(told), _attempt_columns(this.made[len(this.earlier) :])[1])
        *columns, sent = _vote_columns(votes)
        expects_copies = this.expects_copies or any(vote.redelivered for vote in votes)
        batch = (_has_rivals(votes), *columns, *attempts, *_rejected_columns(rejections), sent, expects_copies)

        def values() -> tuple[Any, ...]:  # when they are sent: to get a connection may take its time
            return self._instance, time.monotonic() - this.held_since, *batch

        with self._transaction(COUNT_BATCH, values, this.is_trial) as cur:
            txid, began_at, inserted, judged, outcomes, laws, oui, non = _one(cur)
            others = dict(zip(judged, map(OUTCOMES.get, outcomes), strict=False))
            if inserted + len(others) != len(votes) or len(others) != len(outcomes) or None in others.values():
                raise DatabaseMisconfigured(
                    f"{len(votes)} votes have {inserted} + {len(outcomes)} outcomes: {set(outcomes)}"
                )
            outcome = BatchOutcome(counted=[] if others else list(votes), rejected=list(rejections))
            for position, vote in enumerate(votes if others else [], start=1):
                became = others.get(position, Outcome.COUNTED)
                if became is Outcome.COUNTED:
                    outcome.counted.append(vote)
                elif became in LAW_REASONS:
                    outcome.rejected.append(vote.rejected(became, LAW_REASONS[became]))
                else:
                    outcome.duplicates.append((vote, became))
            if laws:
                outcome.totals = dict(zip(laws, zip(oui, non, strict=True), strict=True))
            if not this.is_trial:
                this.made.append(Attempt(txid, began_at))
        late = outcome.rejected[len(rejections) :]
        if late:
            # Their bodies are sent only where they are wanted; and in a transaction that locks no totals, since another
            # one may have the same body among its rejections, which it locks before the totals.
            self._write_or_halve(this, [], late)
        return outcome

    @contextmanager
    def _transaction(self, statement: str, values: Any = None, is_trial: bool = False) -> Iterator[cursor]:
        """One transaction on a pooled connection, begun with this statement, whose rows the block may fetch.

        Commits at the end, or rolls back and raises an error of ours. What a trial does in it is rolled back, and a
        record committed in its place. After a fault of the connection the whole pool goes: its other connections are as
        dead, but do not know yet.
        """
        conn = self._take_connection()
        sound = False
        try:
            with self._watching(conn), conn.cursor() as cur:
                try:
                    if not conn.begin:
                        _set_up(conn, cur, self._limits)
                    if statement is COUNT_BATCH and conn.is_direct:
                        if not conn.has_prepared:
                            cur.execute(f"{conn.begin}; {PREPARE_COUNT_BATCH}; COMMIT")
                            conn.has_prepared = True
                        statement = EXECUTE_COUNT_BATCH
                    begin = f"{conn.begin}; {BEGIN_TRIAL}" if is_trial else conn.begin  # one message, one answer
                    cur.execute(f"{begin}; {statement}", values() if callable(values) else values)
                    yield cur
                    if is_trial:
                        cur.execute(END_TRIAL)
                        cur.execute(WRITE_RECORD)
                    _commit(conn, cur)
                    sound = True
                except (psycopg2.Error, ValueError) as exc:
                    error = _translated(exc)
                    if isinstance(error, BatchRejected) and not conn.closed:
                        cur.execute("ROLLBACK")
                        sound = True
                    raise error from exc
        except psycopg2.Error as exc:  # of the rollback
            raise DatabaseUnavailable(_describe(exc)) from exc
        finally:
            if sound:
                self._give_back(conn)
            else:
                self._discard_pool(conn)

    def _take_connection(self) -> _Connection:
        if self._closing.is_set():
            raise DatabaseUnavailable("the service is stopping")
        try:
            if self._pool is None:
                self._pool = ThreadedConnectionPool(self._pool_min, self._pool_max, **self._connect_arguments)
            conn = cast(_Connection, self._pool.getconn())
        except psycopg2.Error as exc:
            self._discard_pool()
            if "startup parameter" in str(exc):  # a pooler's words
                remedy = "take it out of DATABASE_URL, or name it in PgBouncer's ignore_startup_parameters"
                raise DatabaseMisconfigured(f"{_describe(exc)}: {remedy}") from exc
            refused = any(words in str(exc) for words in _REFUSALS)
            raise (DatabaseMisconfigured if refused else DatabaseUnavailable)(_describe(exc)) from exc
        conn.autocommit = True  # BEGIN and COMMIT are our own
        return conn

    def _give_back(self, conn: connection) -> None:
        if self._pool is not None:
            self._pool.putconn(conn)

    def _discard_pool(self, conn: connection | None = None) -> None:
        pool, self._pool = self._pool, None
        if conn is not None:
            conn.close()
        if pool is not None and not pool.closed:
            pool.closeall()

    @contextmanager
    def _watching(self, conn: connection) -> Iterator[None]:
        with self._watch_lock:
            self._watched = (conn, time.monotonic() + self._timeout)
        try:
            yield
        finally:
            with self._watch_lock:
                self._watched = None

    def _watch(self) -> None:
        """Body of the watchdog: shut the socket down under a transaction that has run for too long."""
        while not self._closing.wait(min(0.5, self._timeout / 4)):
            if self._cut_if_due(time.monotonic()):
                logger.error("database hangs, connection cut", extra={"fields": {"timeout_seconds": self._timeout}})

    def _cut_if_due(self, now: float) -> bool:
        # the lock is held throughout: once the transaction has ended its descriptor may be another socket's
        with self._watch_lock:
            if self._watched is None or now < self._watched[1]:
                return False
            _shut_down(self._watched[0])
            self._watched = None
            return True


def _shut_down(conn: connection) -> None:
    try:
        with socket.socket(fileno=os.dup(conn.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg2.Error) as exc:
        logger.info("connection was gone before it was cut", extra={"fields": {"error": type(exc).__name__}})


def _connect_arguments(url: str, timeout: float, instance: str) -> dict[str, Any]:
    """libpq's parameters: what the URL says wins."""
    defaults: dict[str, Any] = {
        "connect_timeout": max(2, int(timeout / 2)),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": int(timeout * 1000),
        "application_name": f"vote-aggregator {instance}"[:63],
        "connection_factory": _Connection,
    }
    return defaults | parse_dsn(url) | {"client_encoding": "UTF8"}


def _limits(timeout: float, options: str) -> dict[str, object]:
    """Settings of each transaction, by name; the values that ``options`` (of the URL) gives win."""
    milliseconds = int(timeout * 1000)
    settings = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds // 2,
        "idle_in_transaction_session_timeout": milliseconds * 2,
        "client_connection_check_interval": 5_000,
        "client_min_messages": "warning",  # that of a COMMIT that no longer waits for a standby
    }
    given = {name.replace("-", "_"): value for name, value in re.findall(r"(?:-c\s*|--)([\w-]+)=([\w.]+)", options)}
    return {name: given.get(name, value) for name, value in settings.items()}


def _set_up(conn: _Connection, cur: cursor, limits: dict[str, object]) -> None:
    """Have each transaction of a new connection run under these limits.

    They are set once where there is no pooler in between: that refuses or forgets them, may give each transaction
    another backend, and tells the client a process id of its own. FORM is set in each: a session may be reset.
    """
    cur.execute("SELECT pg_catalog.pg_backend_pid()")
    conn.is_direct = _one(cur)[0] == conn.get_backend_pid()
    conn.begin = f"BEGIN ISOLATION LEVEL READ COMMITTED; {FORM}"  # ON CONFLICT must see what others have committed
    if conn.is_direct:
        cur.execute("; ".join([f"SET {name} = '{value}'" for name, value in limits.items()]))
    else:
        conn.begin += "".join([f"; SET LOCAL {name} = '{value}'" for name, value in limits.items()])


def _commit(conn: connection, cur: cursor) -> None:
    """Commit. Raises DatabaseUnavailable where the server does not say that it did, and nothing else."""
    if conn.get_transaction_status() != TRANSACTION_STATUS_INTRANS:
        # of a failed transaction COMMIT makes a rollback, and says so by no error
        raise DatabaseUnavailable("the transaction had ended before its commit")
    del conn.notices[:]
    cur.execute("COMMIT")
    if cur.statusmessage != "COMMIT" or conn.notices:
        # such as the warning that somebody has cancelled the wait for the standby, which may not have it
        told = " ".join([str(cur.statusmessage), *conn.notices]).strip()
        raise DatabaseUnavailable(f"the commit is ambiguous: {told}")


def _translated(exc: Exception) -> DatabaseUnavailable:
    """The error of ours for one of the driver's, by its SQLSTATE; ValueError comes from adapting a value."""
    if isinstance(exc, ValueError):
        return BatchRejected("22000", "SQLSTATE 22000", is_poison=True)
    sqlstate = getattr(exc, "pgcode", None)
    if sqlstate is None or sqlstate.startswith(_TRANSIENT):
        return DatabaseUnavailable(_describe(exc))
    if sqlstate.startswith(_SET_UP):
        return DatabaseMisconfigured(_describe(exc))
    if sqlstate.startswith(_POISON):
        return BatchRejected(sqlstate, f"SQLSTATE {sqlstate}", is_poison=True)  # the text may repeat the content
    return BatchRejected(sqlstate, _describe(exc), is_poison=False)


def _describe(exc: Exception) -> str:
    """The server's or libpq's own words, in one line, without the details that could hold what a message said."""
    sqlstate = getattr(exc, "pgcode", None)
    diag = getattr(exc, "diag", None)
    text = (diag.message_primary if diag is not None else None) or str(exc).strip().partition("\n")[0]
    return f"{text} (SQLSTATE {sqlstate})" if sqlstate else text or type(exc).__name__


def _one(cur: cursor) -> tuple[Any, ...]:
    row = cur.fetchone()
    assert row is not None
    return row


def _check_suspects(suspects: list[tuple[Vote, str]], votes: int) -> None:
    """Raise DatabaseMisconfigured where the suspects of so many different votes need not be to blame themselves:
    several are of one law, or there is no other vote.
    """
    laws = {vote.vote_id: vote.law_id for vote, _ in suspects}  # copies of one vote are one suspect
    if max(Counter(laws.values()).values()) > 1 or (len(laws) == votes > 1):
        raise DatabaseMisconfigured(f"{len(laws)} votes of a batch fail, each alone: SQLSTATE {suspects[0][1]}")


def _vote_columns(votes: Sequence[Vote]) -> tuple[str, ...]:
    """An array literal a column; lists of Python values adapt far more slowly."""
    ids, laws, choices, moments, hashes, _, _, _, redelivered, sent, _ = (
        zip(*votes, strict=True) if votes else [()] * 11
    )
    return (
        _array(ids),
        _array(laws),
        _array(choices),
        _array_or_null([moment and moment.isoformat() for moment in moments]),
        _array_or_null(hashes),
        _array(["t" if is_redelivered else "f" for is_redelivered in redelivered]),
        _array_or_null([moment and str(moment) for moment in sent]) if any(sent) else "{}",
    )


def _attempt_columns(attempts: Sequence[Attempt]) -> tuple[str, str]:
    return _array([str(txid) for txid, _ in attempts]), _array([began_at.isoformat() for _, began_at in attempts])


def _has_rivals(votes: Sequence[Vote]) -> bool:
    """Whether two of them differ and have one vote_id, or one voter and law: then it matters which of them is first."""
    by_id = {vote.vote_id: vote for vote in votes}
    if len(by_id) < len(votes) and any(_content(vote) != _content(by_id[vote.vote_id]) for vote in votes):
        return True
    voters = [(vote.law_id, vote.voter_hash) for vote in by_id.values() if vote.voter_hash is not None]
    return len(set(voters)) < len(voters)


def _content(vote: Vote) -> tuple[object, ...]:
    return vote.law_id, vote.choice, vote.voter_hash, vote.voted_at


def _array(values: Collection[str]) -> str:
    """A PostgreSQL array literal. Only for values whose characters need no escape: the message contract sees to that.

    Quoted, because an unquoted NULL (a law may be called that) would be no text.
    """
    return '{"' + '","'.join(values) + '"}' if values else "{}"


def _array_or_null(values: Iterable[str | None]) -> str:
    return "{" + ",".join(["NULL" if value is None else f'"{value}"' for value in values]) + "}"


def _strangers(votes: Sequence[Vote]) -> list[Vote]:
    """Such votes with other identities; copies of one vote stay copies of one."""
    ids: dict[str, str] = defaultdict(lambda: str(uuid.uuid4()))
    hashes: dict[str, str] = defaultdict(lambda: uuid.uuid4().hex)
    return [
        vote._replace(vote_id=ids[vote.vote_id], voter_hash=vote.voter_hash and hashes[vote.voter_hash])
        for vote in votes
    ]


def _rejected_columns(rejections: Sequence[Rejection]) -> tuple[list[Any], ...]:
    """A list a column, of one row for each message; a key may stand only once in an upsert, so copies are counted."""
    by_key: dict[tuple[bytes, str], list[Rejection]] = {}
    for rejection in rejections:
        # in plain ASCII: it may hold NUL, which PostgreSQL does not take
        message_id = (rejection.message_id or "").encode("unicode_escape").decode("ascii")
        by_key.setdefault((rejection.body_sha256, message_id), []).append(rejection)
    rows = []
    for (digest, message_id), (first, *others) in by_key.items():
        body, reason, detail, _, _, law_id, _ = first
        full_bytes = body.full_bytes if isinstance(body, CutBody) else len(body)
        kept = psycopg2.Binary(body[:KEPT_BODY_BYTES])
        rows.append((psycopg2.Binary(digest), message_id, kept, full_bytes, reason, detail, law_id, 1 + len(others)))
    return tuple(map(list, zip(*rows, strict=True))) or ([],) * 8
