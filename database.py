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
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS, connection, cursor, parse_dsn
from psycopg2.extras import execute_values
from psycopg2.pool import ThreadedConnectionPool

from votes import LAW_REASONS, CutBody, Rejection, Vote, counts

logger = logging.getLogger(__name__)

SCHEMA_FILE = Path(__file__).with_name("init_db.sql")
SCHEMA_VERSION = 3  # the one that init_db.sql writes last
KEPT_BODY_BYTES = 64 * 1024
MAX_LOOKS_IN_VAIN = 2
SUSPECT_TRIES = 3  # of a vote that alone failed, before it is refused for a code that does not say whose fault it is
CAREFUL_BATCHES = 100  # from one that only seemed new on: so that hardly any is written in vain, and leaves dead rows
MAX_UNREPORTED = 100_000  # a bound on memory through a long fault; beyond it our own rows may pass for a redelivery's

# A batch in which every vote is new and taken by its law, as most are, in one call: identities and totals, as the
# statements below would write them. Answers the new totals. Else nothing is written, and no row comes back.
COUNT_NEW_VOTES = """
    SELECT law_id, oui_count, non_count, now()::text
    FROM count_new_votes(%s, %s::uuid[], %s::varchar[], %s::varchar[], %s::timestamptz[], %s::varchar[], %s,
                         %s::varchar[], %s::bigint[], %s::bigint[])
"""

# The identities of a batch, sorted by vote_id so that two replicas lock rows in one order. Answers the fresh ones.
# A vote outside the window of its law, or for a certified one, is left out; without a timestamp the beginning of its
# batch counts. Certifying a law and correcting totals exclude this statement by a lock on vote_audit.
INSERT_VOTES = """
    WITH fresh AS (
        INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, redelivered, instance, txid)
        SELECT vote_id, law_id, choice, voted_at, voter_hash, redelivered, %s,
               (SELECT pg_current_xact_id()::text::bigint)
        FROM unnest(%s::uuid[], %s::varchar[], %s::varchar[], %s::timestamptz[], %s::varchar[], %s::boolean[])
             AS vote (vote_id, law_id, choice, voted_at, voter_hash, redelivered)
        WHERE NOT EXISTS (
            SELECT FROM laws
            WHERE laws.law_id = vote.law_id
              AND (status = 'certified' OR coalesce(voted_at, now() - make_interval(secs => %s)) < opens_at
                   OR coalesce(voted_at, now() - make_interval(secs => %s)) >= closes_at))
        ORDER BY vote_id
        ON CONFLICT DO NOTHING
        RETURNING vote_id
    )
    SELECT count(*), CASE WHEN count(*) < %s THEN array_agg(vote_id)::text END, now()::text FROM fresh
"""

# Votes that were not inserted because of their law, with the reason (a key of votes.LAW_REASONS).
SELECT_REFUSED_BY_LAW = """
    SELECT vote_id::text, CASE WHEN status = 'certified' THEN 'certified' ELSE 'outside_window' END
    FROM unnest(%s::uuid[], %s::varchar[], %s::timestamptz[]) AS vote (vote_id, law_id, voted_at)
    JOIN laws USING (law_id)
    WHERE status = 'certified' OR coalesce(voted_at, now() - make_interval(secs => %s)) < opens_at
       OR coalesce(voted_at, now() - make_interval(secs => %s)) >= closes_at
"""

# What stands in the way of votes that were not inserted: a row with their vote_id, or with their law and voter; and
# whether its message may be the very one in hand: it was delivered again and recorded while this batch was held.
SELECT_IN_THE_WAY = """
    WITH in_the_way AS (
        SELECT * FROM vote_audit WHERE vote_id = ANY (%s::uuid[])
        UNION
        SELECT vote_audit.*
        FROM vote_audit
        JOIN unnest(%s::varchar[], %s::varchar[]) AS vote (law_id, voter_hash) USING (law_id, voter_hash)
        WHERE voter_hash IS NOT NULL
    )
    SELECT vote_id::text, law_id, choice, voter_hash, instance, recorded_at::text,
           redelivered AND recorded_at >= now() - make_interval(secs => %s)
    FROM in_the_way
"""

# Suspicious copies. Those that an earlier, interrupted attempt may have recorded already are not recorded again.
INSERT_DUPLICATES = """
    INSERT INTO duplicate_attempts
        (vote_id, law_id, choice, voter_hash, reason, counted_vote_id, counted_law_id, counted_choice, instance)
    SELECT vote_id::uuid, law_id, choice, voter_hash, reason, counted_vote_id::uuid, counted_law_id, counted_choice,
           instance
    FROM (VALUES %s) AS copy (vote_id, law_id, choice, voter_hash, reason, counted_vote_id, counted_law_id,
                              counted_choice, instance, may_be_recorded)
    WHERE NOT (may_be_recorded AND EXISTS (
        SELECT FROM duplicate_attempts AS earlier
        WHERE earlier.vote_id = copy.vote_id::uuid AND earlier.law_id = copy.law_id
          AND earlier.choice = copy.choice AND earlier.reason = copy.reason))
"""

# Messages that do not count, sorted by hash and message_id; the same message again is no second row.
UPSERT_REJECTED = """
    INSERT INTO rejected_messages AS kept
        (body_sha256, message_id, body, body_bytes, reason, detail, law_id, times_seen, instance)
    VALUES %s
    ON CONFLICT (body_sha256, message_id)
    DO UPDATE SET
        times_seen = kept.times_seen + EXCLUDED.times_seen,
        last_seen_at = EXCLUDED.last_seen_at
"""

# The totals, sorted by law_id and last before COMMIT, since these are the rows that every replica wants.
UPSERT_RESULTS = """
    INSERT INTO vote_results (law_id, oui_count, non_count)
    SELECT * FROM unnest(%s::varchar[], %s::bigint[], %s::bigint[])
    ON CONFLICT (law_id)
    DO UPDATE SET
        oui_count = vote_results.oui_count + EXCLUDED.oui_count,
        non_count = vote_results.non_count + EXCLUDED.non_count
    RETURNING law_id, oui_count, non_count
"""

# The totals of as many laws as were asked for, those that are named before those with most votes; and of all others.
SELECT_TOTALS = """
    WITH own AS (
        SELECT law_id, oui_count, non_count
        FROM vote_results
        ORDER BY law_id = ANY (%s) DESC, oui_count + non_count DESC, law_id
        LIMIT %s
    )
    SELECT law_id, oui_count, non_count FROM own
    UNION ALL
    SELECT NULL, (all_laws.oui - own_laws.oui)::bigint, (all_laws.non - own_laws.non)::bigint
    FROM (SELECT coalesce(sum(oui_count), 0) AS oui, coalesce(sum(non_count), 0) AS non FROM vote_results) AS all_laws,
         (SELECT coalesce(sum(oui_count), 0) AS oui, coalesce(sum(non_count), 0) AS non FROM own) AS own_laws
"""

# By how many votes the totals differ from the audit log. What is sealed is counted already; of the rest, the rows are.
SELECT_DIFFERENCE = """
    WITH counted AS (
        SELECT law_id, oui_count AS oui, non_count AS non FROM sealed_totals
        UNION ALL
        SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
        FROM vote_audit
        WHERE txid >= (SELECT coalesce(max(to_txid), 0) FROM audit_seals)
        GROUP BY law_id
    ),
    logged AS (SELECT law_id, sum(oui) AS oui, sum(non) AS non FROM counted GROUP BY law_id)
    SELECT coalesce(sum(abs(coalesce(oui_count, 0) - coalesce(oui, 0))
                        + abs(coalesce(non_count, 0) - coalesce(non, 0))), 0)::bigint
    FROM vote_results
    FULL JOIN logged USING (law_id)
"""

# All that the results page shows, of one moment: a row for each law, those that the operator has given a title first,
# then those with most votes, as many as were asked for; each with the sums over all laws. At least one row. Whoever may
# publish can make as many laws, duplicates and rejected messages as he likes, so that nothing here may grow with them.
SELECT_RESULTS = """
    SELECT extract(epoch FROM now())::float8,
           (SELECT count(*) FROM (SELECT FROM duplicate_attempts LIMIT %(most_counted)s + 1) AS counted),
           (SELECT count(*) FROM (SELECT FROM rejected_messages LIMIT %(most_counted)s + 1) AS counted),
           all_laws.laws,
           all_laws.oui,
           all_laws.non,
           shown.*
    FROM (SELECT count(*) AS laws,
                 coalesce(sum(oui_count), 0)::bigint AS oui,
                 coalesce(sum(non_count), 0)::bigint AS non
          FROM vote_statistics) AS all_laws
    LEFT JOIN (SELECT law_id,
                      left(title, %(title)s + 1),
                      oui_count,
                      non_count,
                      CASE status WHEN 'open' THEN 'interim' ELSE status END,
                      extract(epoch FROM updated_at)::float8
               FROM vote_statistics
               ORDER BY title IS NULL, total_count DESC, law_id
               LIMIT %(laws)s) AS shown ON true
    ORDER BY law_id
"""

# A record in the log, so that a COMMIT waits for the standby also where nothing else was written: it waits for all
# before it too, and so for the commits of the votes that this transaction has found. (An id alone makes no record.)
WRITE_RECORD = "SELECT pg_logical_emit_message(true, 'votes', '')"

# What a trial has written is checked as a COMMIT would, and taken back.
BEGIN_TRIAL = "SAVEPOINT trial"
END_TRIAL = "SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO SAVEPOINT trial"

# A minute of a replica's work.
UPSERT_STATS = """
    INSERT INTO aggregation_stats AS so_far (instance, minute, batches, votes, duplicates, rejected, busy_seconds)
    VALUES (%s, date_trunc('minute', to_timestamp(%s)), %s, %s, %s, %s, %s)
    ON CONFLICT (instance, minute)
    DO UPDATE SET
        batches = so_far.batches + EXCLUDED.batches,
        votes = so_far.votes + EXCLUDED.votes,
        duplicates = so_far.duplicates + EXCLUDED.duplicates,
        rejected = so_far.rejected + EXCLUDED.rejected,
        busy_seconds = so_far.busy_seconds + EXCLUDED.busy_seconds
"""

# Can a batch be written here? Fails where a table or the function is missing, or a table locked or not to be read.
PROBE = """
    SELECT current_setting('transaction_read_only') = 'on',
           EXISTS (SELECT FROM vote_audit), EXISTS (SELECT FROM duplicate_attempts),
           EXISTS (SELECT FROM rejected_messages), EXISTS (SELECT FROM vote_results), EXISTS (SELECT FROM laws),
           has_function_privilege(
               'count_new_votes(varchar, uuid[], varchar[], varchar[], timestamptz[], varchar[], double precision,'
               'varchar[], bigint[], bigint[])', 'EXECUTE'),
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
_TRANSIENT = ("08", "40", "53", "55P03", "57", "25006", "25P03", "25P04")
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
    its reason (redelivery, duplicate, conflict or second_vote). ``rejected``: messages kept as rejected, among them
    votes that the database refused. ``totals``: the new (oui, non) of each law that the batch touched.
    """

    counted: list[Vote] = field(default_factory=list)
    duplicates: list[tuple[Vote, str]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    totals: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: BatchOutcome) -> None:
        """Join the outcome of a later part of the same batch."""
        self.counted += other.counted
        self.duplicates += other.duplicates
        self.rejected += other.rejected
        self.totals |= other.totals


class _Row(NamedTuple):
    """A counted vote as it stands in vote_audit."""

    vote_id: str
    law_id: str
    choice: str
    voter_hash: str | None
    instance: str
    recorded_at: str
    may_be_same_message: bool


class Database:
    """The totals and the proof behind them. The constructor does no I/O; every method but ``close`` may wait and raise.

    Used by one thread at a time, except that a watchdog thread cuts the connection of a transaction that takes longer
    than ``timeout`` seconds: a server that hangs (stopped, black-holed) is noticed by no other limit.
    """

    def __init__(self, url: str, *, pool_min: int, pool_max: int, timeout: float, instance: str) -> None:
        self._connect_arguments = _connect_arguments(url, timeout, instance)
        self._begin = _begin(timeout, self._connect_arguments.get("options", ""))
        self._pool_min = pool_min
        self._pool_max = pool_max
        self._timeout = timeout
        self._instance = instance
        self._pool: ThreadedConnectionPool | None = None
        # vote_id -> recorded_at of what was inserted since the last batch was reported as done: a COMMIT whose reply
        # was lost may have happened, and then these rows are our own and not a duplicate's
        self._unreported: dict[str, str] = {}
        self._counted_already: set[str] = set()  # by an earlier part of the batch in hand, where it was halved
        self._careful_batches = 0  # to come, which are not taken for new, whatever they look like
        self._is_in_doubt = False  # whether a COMMIT was sent since the last batch was reported as done
        self._attempted_before = False  # the batch in hand, or one before it, may have been written unnoticed
        self._is_trial = False
        self._sound: list[Vote] = []  # a few votes that were written last
        self._on_part: Callable[[], None] = lambda: None
        self._held_since = 0.0
        self._began_at = 0.0
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
        with self._transaction() as cur:
            cur.execute(SELECT_UNSAFE_SETTINGS)
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
        with self._transaction() as cur:
            # the script's own BEGIN and COMMIT would end our transaction early
            script = SCHEMA_FILE.read_text(encoding="utf-8").replace("\nBEGIN;\n", "\n").replace("\nCOMMIT;\n", "\n")
            cur.execute(script)
        logger.info("schema created", extra={"fields": {"version": SCHEMA_VERSION}})

    def probe(self) -> None:
        """Ask whether a batch could be written. Raises DatabaseUnavailable, with the reason, where not."""
        with self._transaction() as cur:
            cur.execute(PROBE)
            is_read_only, *_, may_call, is_behind_the_seals = _one(cur)
            if is_read_only:
                raise DatabaseUnavailable("the server is read-only")
            if not may_call:
                raise DatabaseMisconfigured("permission denied for function count_new_votes")
            if is_behind_the_seals:
                raise DatabaseMisconfigured(
                    "transaction ids are lower than those sealed in the audit log, as after a restore from a dump; "
                    "docs/AUDIT.md says how to raise them"
                )

    def totals(self, first: Collection[str], laws: int) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
        """The (oui, non) counts of so many laws, those in ``first`` before others, and of all others together.

        Raises DatabaseUnavailable.
        """
        with self._transaction() as cur:
            cur.execute(SELECT_TOTALS, (list(first), laws))
            *own, (_, *others) = cur.fetchall()
            return {law_id: (oui, non) for law_id, oui, non in own}, (others[0], others[1])

    def reconciliation_difference(self) -> int:
        """By how many votes the totals differ from the audit log, over all laws. Raises DatabaseUnavailable."""
        with self._transaction() as cur:
            cur.execute(SELECT_DIFFERENCE)
            return int(_one(cur)[0])

    def results(self, laws: int, title: int, most_counted: int) -> list[tuple[Any, ...]]:
        """The rows of SELECT_RESULTS: so many laws at most, so many characters of a title and one more; duplicates and
        rejected messages are counted up to one more than ``most_counted``. Raises DatabaseUnavailable.
        """
        with self._transaction() as cur:
            cur.execute(SELECT_RESULTS, {"laws": laws, "title": title, "most_counted": most_counted})
            return cur.fetchall()

    def record_stats(
        self, minute: float, batches: int, votes: int, duplicates: int, rejected: int, busy_seconds: float
    ) -> None:
        """Add to the row of this instance for the minute of ``minute`` (Unix seconds). Raises DatabaseUnavailable."""
        with self._transaction() as cur:
            cur.execute(UPSERT_STATS, (self._instance, minute, batches, votes, duplicates, rejected, busy_seconds))

    def batch_update_results(
        self,
        votes: Sequence[Vote],
        rejections: Sequence[Rejection],
        held_since: float | None = None,
        on_part: Callable[[], None] = lambda: None,
    ) -> BatchOutcome:
        """Write one batch: identities, duplicates, rejected messages and totals, in one transaction; then commit.

        ``held_since`` is the time.monotonic() at which the first of them came, if not just now: the broker may have
        given them to another replica since. A vote that the database refuses is searched by halving the batch and kept
        as a rejected message; all others are counted. ``on_part`` is called before each transaction. On return
        everything is committed, and what was given may be settled with the broker.

        Raises DatabaseUnavailable: then call again with the same batch, now or after a redelivery.
        """
        if len(self._unreported) > MAX_UNREPORTED:
            self._unreported.clear()
        self._attempted_before = self._is_in_doubt
        self._counted_already.clear()
        self._held_since = time.monotonic() if held_since is None else held_since
        self._on_part = on_part
        outcome = self._write_all(votes, rejections)
        self._unreported.clear()
        self._is_in_doubt = False
        self._sound = outcome.counted[:3] or self._sound
        self._careful_batches = max(0, self._careful_batches - 1)
        return outcome

    def try_to_write(self, votes: Sequence[Vote], rejections: Sequence[Rejection]) -> None:
        """Write such a batch, take it back, and commit a record as durable as a vote. Raises DatabaseUnavailable.

        Reading tables and rights shows no trigger that refuses, no full disk, no lock and no standby that is away. The
        votes get identities of their own: others may have counted these meanwhile, and nothing would be written.
        """
        with self._trying():
            self._write_all(_strangers(votes), rejections)

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """What is written in the block is taken back."""
        before, self._is_trial = self._is_trial, True
        try:
            yield
        finally:
            self._is_trial = before

    def _write_all(self, votes: Sequence[Vote], rejections: Sequence[Rejection]) -> BatchOutcome:
        outcome, suspects = self._write_or_halve(votes, rejections)
        if suspects:
            self._check_suspects(suspects, len({vote.vote_id for vote in votes}))
            tried = [self._try_again(vote) or (vote, sqlstate) for vote, sqlstate in suspects]
            culprits = [each for each in tried if not isinstance(each, BatchOutcome)]
            for part in tried:
                if isinstance(part, BatchOutcome):
                    outcome.add(part)
            if culprits:
                # only now: what failed may have begun after the others were written
                self._check_company(outcome.counted[:3] or self._sound, [vote for vote, _ in culprits])
                outcome.add(self._write([], [_refused(vote, sqlstate) for vote, sqlstate in culprits]))
        return outcome

    def _write_or_halve(
        self, votes: Sequence[Vote], rejections: Sequence[Rejection]
    ) -> tuple[BatchOutcome, list[tuple[Vote, str]]]:
        """Answers what became of them, and the suspects, with SQLSTATE: of these, nothing has been written.

        A suspect is a vote that fails alone with a code that does not say whether the vote is to blame.
        """
        self._on_part()
        try:
            return (self._seem_new(votes, rejections) and self._count_new(votes)) or self._write(votes, rejections), []
        except BatchRejected as exc:
            if not votes:
                raise DatabaseMisconfigured(f"rejected messages cannot be kept: {exc}") from exc
            self._careful_batches = CAREFUL_BATCHES
            if rejections:  # each by itself, lest a vote be blamed for them
                outcome, suspects = self._write_or_halve(votes, [])
                outcome.add(self._write_or_halve([], rejections)[0])
                return outcome, suspects
            if len(votes) == 1:
                if not exc.is_poison:
                    return BatchOutcome(), [(votes[0], exc.sqlstate)]
                return self._write_or_halve([], [_refused(votes[0], exc.sqlstate)])
            middle = len(votes) // 2
            outcome, suspects = self._write_or_halve(votes[:middle], [])
            self._counted_already.update(vote.vote_id for vote in outcome.counted)
            others, more_suspects = self._write_or_halve(votes[middle:], [])
            outcome.add(others)
            return outcome, suspects + more_suspects

    def _check_suspects(self, suspects: list[tuple[Vote, str]], votes: int) -> None:
        """Raise DatabaseMisconfigured where the suspects of so many different votes need not be to blame themselves:
        several are of one law, or there is no other vote.
        """
        laws = {vote.vote_id: vote.law_id for vote, _ in suspects}  # copies of one vote are one suspect
        if max(Counter(laws.values()).values()) > 1 or (len(laws) == votes > 1):
            raise DatabaseMisconfigured(f"{len(laws)} votes of a batch fail, each alone: SQLSTATE {suspects[0][1]}")

    def _try_again(self, vote: Vote) -> BatchOutcome | None:
        """Now that the others are committed: it may have been their company. None where it fails all the same."""
        for _ in range(SUSPECT_TRIES):
            outcome, still = self._write_or_halve([vote], [])
            if not still:
                return outcome
        return None

    def _check_company(self, written: Sequence[Vote], suspects: Sequence[Vote]) -> None:
        """Raise DatabaseMisconfigured unless votes like those that were written can be written now.

        Where there are none of these, or their laws take no more, votes like the suspects have to do.
        """
        for votes in (written, suspects):
            with self._trying():
                outcome, failing = self._write_or_halve(_strangers(votes), []) if votes else (BatchOutcome(), [])
            if failing:
                raise DatabaseMisconfigured(f"a vote cannot be written: SQLSTATE {failing[0][1]}")
            if outcome.totals:
                return
        raise DatabaseMisconfigured("no vote is taken that could show whose fault it is")

    def _seem_new(self, votes: Sequence[Vote], rejections: Sequence[Rejection]) -> bool:
        """Whether there are only votes, and nothing here tells that one of them is counted already, or twice in it."""
        is_suspicious = rejections or self._careful_batches or any(vote.redelivered for vote in votes)
        return bool(votes) and not is_suspicious and not _first_of_each(votes)[1]

    def _count_new(self, votes: Sequence[Vote]) -> BatchOutcome | None:
        """One transaction, for a batch of new votes; None where they are not all new, and nothing was written.

        Raises DatabaseUnavailable or BatchRejected; then nothing was written, or it is unknown.
        """
        self._began_at = time.monotonic()
        with self._transaction() as cur:
            cur.execute(COUNT_NEW_VOTES, (*self._columns(votes), self._held_seconds(), *_totals(votes)))
            rows = cur.fetchall()
            if rows and not self._is_trial:
                self._unreported.update(dict.fromkeys((vote.vote_id for vote in votes), rows[0][3]))
                self._is_in_doubt = True
            if not rows:
                self._careful_batches = CAREFUL_BATCHES
        if not rows:
            return None
        return BatchOutcome(counted=list(votes), totals={law_id: (oui, non) for law_id, oui, non, _ in rows})

    def _write(self, votes: Sequence[Vote], rejections: Sequence[Rejection]) -> BatchOutcome:
        """One transaction, for whatever a batch may hold.

        Raises DatabaseUnavailable or BatchRejected; then nothing was written, or it is unknown.
        """
        outcome = BatchOutcome(rejected=list(rejections))
        self._began_at = time.monotonic()
        with self._transaction() as cur:
            fresh, copies, refused, recorded_at = self._insert_votes(cur, votes)
            outcome.rejected += refused
            suspicious = []
            for vote, row in copies:
                reason = self._reason(vote, row, outcome.counted, recorded_at)
                if reason == "counted":
                    outcome.counted.append(vote)
                    continue
                outcome.duplicates.append((vote, reason))
                if reason != "redelivery":
                    may_be_recorded = vote.redelivered or self._attempted_before
                    suspicious.append((*vote[:3], vote.voter_hash, reason, *row[:3], self._instance, may_be_recorded))
            if suspicious:
                execute_values(cur, INSERT_DUPLICATES, suspicious, page_size=len(suspicious))
            if outcome.rejected:
                rows = _rejected_rows(outcome.rejected, self._instance)
                execute_values(cur, UPSERT_REJECTED, rows, page_size=len(rows))
            if fresh:
                cur.execute(UPSERT_RESULTS, _totals(fresh))
                outcome.totals = {law_id: (oui, non) for law_id, oui, non in cur.fetchall()}
                if outcome.totals.keys() != {vote.law_id for vote in fresh}:
                    raise DatabaseMisconfigured("vote_results does not take every total: is there a trigger?")
            else:
                cur.execute(WRITE_RECORD)  # after the lock on vote_audit, lest a certificate wait for this transaction
            if not self._is_trial:
                self._unreported.update(dict.fromkeys((vote.vote_id for vote in fresh), recorded_at))
                self._is_in_doubt = True
        outcome.counted += fresh
        return outcome

    def _insert_votes(
        self, cur: cursor, votes: Sequence[Vote]
    ) -> tuple[list[Vote], list[tuple[Vote, _Row]], list[Rejection], str]:
        """Insert what can be inserted, first come first served. Answers the fresh votes, the others with what stands in
        their way, those that their law does not take, and the moment that is recorded with them.

        Copies of a vote inside the batch, and second votes of a voter, wait for a second look, since the first of them
        may itself be refused for an earlier row. The second look nearly always settles all of them.
        """
        fresh: list[Vote] = []
        copies: list[tuple[Vote, _Row]] = []
        refused: list[Rejection] = []
        recorded_at = ""
        looks_in_vain = 0  # a law may be opened between two of them
        while votes:
            first, others = _first_of_each(votes)
            redelivered = _array(["t" if vote.redelivered else "f" for vote in first])
            held_seconds = self._held_seconds()
            cur.execute(INSERT_VOTES, (*self._columns(first), redelivered, held_seconds, held_seconds, len(first)))
            inserted, fresh_ids, recorded_at = _one(cur)
            if inserted == len(first):
                fresh += first
                first = []
            elif inserted:
                is_fresh = set(fresh_ids[1:-1].split(",")).__contains__
                fresh += [vote for vote in first if is_fresh(vote.vote_id)]
                first = [vote for vote in first if not is_fresh(vote.vote_id)]
            stuck = first + others
            if not stuck:
                break
            by_id, by_voter = self._rows_in_the_way(cur, stuck)
            left = []
            for vote in stuck:
                row = by_id.get(vote.vote_id) or by_voter.get((vote.law_id, vote.voter_hash))
                if row is None:
                    left.append(vote)
                else:
                    copies.append((vote, row))
            if left:
                reasons = self._refused_by_law(cur, left)
                refused += [_not_counted(vote, reasons[vote.vote_id]) for vote in left if vote.vote_id in reasons]
                left = [vote for vote in left if vote.vote_id not in reasons]
            looks_in_vain = looks_in_vain + 1 if len(left) == len(votes) else 0
            if looks_in_vain > MAX_LOOKS_IN_VAIN:
                raise DatabaseMisconfigured("vote_audit takes no row and none stands in the way: is there a trigger?")
            votes = left
        return fresh, copies, refused, recorded_at

    def _held_seconds(self) -> float:
        """For how long the first vote of the batch had been here when its transaction began; now() is that moment."""
        return self._began_at - self._held_since

    def _columns(self, votes: Sequence[Vote]) -> tuple[str, ...]:
        """This instance, then one array literal a column; lists of Python values adapt far more slowly."""
        ids, law_ids, choices, voted_at, voter_hashes, *_ = zip(*votes, strict=True)
        return (
            self._instance,
            _array(ids),
            _array(law_ids),
            _array(choices),
            _array_or_null([moment and moment.isoformat() for moment in voted_at]),
            _array_or_null(voter_hashes),
        )

    def _rows_in_the_way(
        self, cur: cursor, votes: list[Vote]
    ) -> tuple[dict[str, _Row], dict[tuple[str, str | None], _Row]]:
        voters = [vote for vote in votes if vote.voter_hash is not None]
        ids = _array({vote.vote_id for vote in votes})
        law_ids = _array([vote.law_id for vote in voters])
        voter_hashes = _array_or_null(vote.voter_hash for vote in voters)
        cur.execute(SELECT_IN_THE_WAY, (ids, law_ids, voter_hashes, self._held_seconds()))
        rows = [_Row(*values) for values in cur.fetchall()]
        by_voter: dict[tuple[str, str | None], _Row] = {(row.law_id, row.voter_hash): row for row in rows}
        return {row.vote_id: row for row in rows}, by_voter

    def _refused_by_law(self, cur: cursor, votes: list[Vote]) -> dict[str, str]:
        """The reason of each vote that its law does not take, by vote_id."""
        ids, law_ids = _array([vote.vote_id for vote in votes]), _array([vote.law_id for vote in votes])
        voted_at = _array_or_null([None if vote.voted_at is None else vote.voted_at.isoformat() for vote in votes])
        held_seconds = self._held_seconds()
        cur.execute(SELECT_REFUSED_BY_LAW, (ids, law_ids, voted_at, held_seconds, held_seconds))
        return dict(cur.fetchall())

    def _reason(self, vote: Vote, row: _Row, counted: list[Vote], recorded_at: str) -> str:
        """Why ``vote`` is not counted now: a reason for the records, or "counted" where ``row`` is our own write, from
        an attempt whose COMMIT did happen although its reply was lost."""
        if row.vote_id != vote.vote_id:
            return "second_vote"
        if (row.law_id, row.choice, row.voter_hash) != (vote.law_id, vote.choice, vote.voter_hash):
            return "conflict"
        is_own = row.instance == self._instance and self._unreported.get(vote.vote_id) == row.recorded_at
        is_told = vote.vote_id in self._counted_already or any(other.vote_id == vote.vote_id for other in counted)
        if is_own and not is_told:
            return "counted"
        # of two deliveries of one message at least the later one is flagged; which of them is here does not matter. But
        # what this transaction has recorded came in this batch, and a batch holds no message twice.
        is_of_this_batch = row.instance == self._instance and row.recorded_at == recorded_at
        may_be_same_message = row.may_be_same_message and not is_of_this_batch
        return "redelivery" if vote.redelivered or may_be_same_message else "duplicate"

    @contextmanager
    def _transaction(self) -> Iterator[cursor]:
        """One transaction on a pooled connection: commits at the end, or rolls back and raises an error of ours.

        What a trial does in it is rolled back, and a record committed in its place. After a fault of the connection the
        whole pool goes: its other connections are as dead, but do not know yet.
        """
        conn = self._take_connection()
        sound = False
        try:
            with self._watching(conn), conn.cursor() as cur:
                try:
                    cur.execute(self._begin)
                    if self._is_trial:
                        cur.execute(BEGIN_TRIAL)
                    yield cur
                    if self._is_trial:
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

    def _take_connection(self) -> connection:
        if self._closing.is_set():
            raise DatabaseUnavailable("the service is stopping")
        try:
            if self._pool is None:
                self._pool = ThreadedConnectionPool(self._pool_min, self._pool_max, **self._connect_arguments)
            conn = self._pool.getconn()
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
    }
    return defaults | parse_dsn(url)


def _begin(timeout: float, options: str) -> str:
    """The statement that begins each transaction, with its limits; the values that ``options`` (of the URL) gives win.

    Set at connect they would be refused or forgotten by a pooler, which may give each transaction another backend.
    """
    milliseconds = int(timeout * 1000)
    settings = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds // 2,
        "idle_in_transaction_session_timeout": milliseconds * 2,
        "client_connection_check_interval": 5_000,
        "client_min_messages": "warning",  # that of a COMMIT that no longer waits for a standby
    }
    given = {name.replace("-", "_"): value for name, value in re.findall(r"(?:-c\s*|--)([\w-]+)=([\w.]+)", options)}
    limits = [f"; SET LOCAL {name} = '{given.get(name, value)}'" for name, value in settings.items()]
    # READ COMMITTED: ON CONFLICT must see what others have committed
    return "BEGIN ISOLATION LEVEL READ COMMITTED" + "".join(limits)


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


def _totals(votes: Iterable[Vote]) -> tuple[str, str, str]:
    """What these votes add to the totals, as array literals: laws, oui and non, sorted by law."""
    per_law = counts(votes)
    oui, non = zip(*per_law.values(), strict=True)
    return _array(per_law), _array([*map(str, oui)]), _array([*map(str, non)])


def _array(values: Collection[str]) -> str:
    """A PostgreSQL array literal. Only for values whose characters need no escape: the message contract sees to that.

    Quoted, because an unquoted NULL (a law may be called that) would be no text.
    """
    return '{"' + '","'.join(values) + '"}' if values else "{}"


def _array_or_null(values: Iterable[str | None]) -> str:
    return "{" + ",".join(["NULL" if value is None else f'"{value}"' for value in values]) + "}"


def _first_of_each(votes: Sequence[Vote]) -> tuple[list[Vote], list[Vote]]:
    """The first of each vote_id and of each voter in a law, and the others, both in the order they came."""
    if len({vote.vote_id for vote in votes}) == len(votes):
        voters = [(vote.law_id, vote.voter_hash) for vote in votes if vote.voter_hash is not None]
        if len(set(voters)) == len(voters):
            return list(votes), []
    first, others = [], []
    seen: set[object] = set()
    for vote in votes:
        voter = vote.vote_id if vote.voter_hash is None else (vote.law_id, vote.voter_hash)
        if vote.vote_id in seen or voter in seen:
            others.append(vote)
        else:
            first.append(vote)
            seen |= {vote.vote_id, voter}
    return first, others


def _strangers(votes: Sequence[Vote]) -> list[Vote]:
    """Such votes with other identities; copies of one vote stay copies of one."""
    ids: dict[str, str] = defaultdict(lambda: str(uuid.uuid4()))
    hashes: dict[str, str] = defaultdict(lambda: uuid.uuid4().hex)
    return [
        vote._replace(vote_id=ids[vote.vote_id], voter_hash=vote.voter_hash and hashes[vote.voter_hash])
        for vote in votes
    ]


def _refused(vote: Vote, sqlstate: str) -> Rejection:
    detail = f"SQLSTATE {sqlstate}"
    return Rejection(vote.body, "refused_by_database", detail, vote.message_id, vote.delivery_tag, vote.law_id)


def _not_counted(vote: Vote, reason: str) -> Rejection:
    return Rejection(vote.body, reason, LAW_REASONS[reason], vote.message_id, vote.delivery_tag, vote.law_id)


def _rejected_rows(rejections: Sequence[Rejection], instance: str) -> list[tuple[object, ...]]:
    """A row for each message, sorted by its key; a key may stand only once in an upsert, so copies are counted here."""
    by_key: dict[tuple[bytes, str], list[Rejection]] = {}
    for rejection in rejections:
        by_key.setdefault((rejection.body_sha256, _printable(rejection.message_id or "")), []).append(rejection)
    rows: list[tuple[object, ...]] = []
    for key in sorted(by_key):
        copies = by_key[key]
        body, reason, detail, _, _, law_id = copies[0]
        full_bytes = body.full_bytes if isinstance(body, CutBody) else len(body)
        rows.append((*key, body[:KEPT_BODY_BYTES], full_bytes, reason, detail, law_id, len(copies), instance))
    return rows


def _printable(text: str) -> str:
    """A property of a message in plain ASCII: it may hold NUL, which PostgreSQL does not take."""
    return text.encode("unicode_escape").decode("ascii")
