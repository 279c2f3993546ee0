#!/usr/bin/env python3
"""The proof behind the totals: compare, recount, seal, verify, certify (docs/AUDIT.md); and refused votes, sent again.

    python reconcile.py                       totals against the audit log; --json; --recount LAW|--all [--apply]
    python reconcile.py seal [--every 60]     seal what was counted; print the newest seal, which is to be published
    python reconcile.py verify [--since SEAL] compute the whole log anew; SEAL is one that was published (number:hash)
    python reconcile.py prove VOTE_ID         a proof that a vote is in the sealed log
    python reconcile.py check-proof FILE      check such a proof, without a database
    python reconcile.py close LAW             close a law now; votes that were cast before still count
    python reconcile.py certify LAW           make the result of a closed law final
    python reconcile.py results               the results, as a table, --json or --csv
    python reconcile.py export-audit          the audit log as JSON Lines, for test_publisher.py --replay; --seals FILE:
                                              and what else another verifier needs (docs/VERIFY.md)
    python reconcile.py republish --reason R  send again what an earlier version refused (docs/RUNBOOK.md); --dry-run

The servers are read from the environment and .env, as the service does it. Exit codes: 0 all is well, 1 it is not (a
difference, messages that fell out of the queue, a broken seal, a refused certificate, a queue that takes no message),
2 wrong usage or settings, 3 the database cannot be reached or read, or the broker not be published to, or a right is
missing in either.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import getpass
import http.client
import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
import urllib.error
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import pika
import psycopg2
from psycopg2.extensions import connection, parse_dsn
from psycopg2.extras import execute_values

import republish
import seals
from config import (
    BrokerSettings,
    InvalidSettings,
    amqp_settings,
    database_url,
    environment,
    hides_open_laws,
    management_url,
    publisher_login,
    redact_url,
    with_login,
)
from observability import configure_logging
from rabbitmq_client import (
    CONNECTION_ERRORS,
    BrokerUnavailable,
    connection_parameters,
    describe,
    managed,
    managed_queue,
)
from results_page import json_with_percentages, no_formula
from votes import REASONS

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
MOST_SECONDS = 86_400
HTTP_SECONDS = 10
MANAGEMENT_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, http.client.HTTPException)
NO_FIGURE = "the management API has no figure of unacked messages yet"
SETTLE_SECONDS = 12.0  # a queue tells its figures every 5 s, and the management API collects them every 5 s

# Totals beside the fold of the audit log, each law that is in either.
SELECT_COMPARED = """
    WITH folded AS (
        SELECT law_id, count(*) FILTER (WHERE choice = 'oui') AS oui, count(*) FILTER (WHERE choice = 'non') AS non
        FROM ONLY vote_audit
        GROUP BY law_id
    )
    SELECT law_id, coalesce(oui_count, 0), coalesce(non_count, 0), coalesce(oui, 0), coalesce(non, 0)
    FROM (SELECT law_id, sum(oui_count)::bigint AS oui_count, sum(non_count)::bigint AS non_count
          FROM ONLY vote_results GROUP BY law_id) AS totals
    FULL JOIN folded USING (law_id)
    ORDER BY law_id
"""
SELECT_CERTIFIED = "SELECT law_id, oui_count, non_count FROM ONLY certified_results ORDER BY law_id"
SELECT_DUPLICATES = "SELECT reason, count(*) FROM ONLY duplicate_attempts GROUP BY reason ORDER BY reason"
# Voters of a law with a voter_hash in two cases; they are other voters to the service, which takes it as it is.
SELECT_VOTERS_BY_CASE = """
    SELECT law_id, count(*)
    FROM (SELECT law_id FROM ONLY vote_audit WHERE voter_hash IS NOT NULL
          GROUP BY law_id, lower(voter_hash) HAVING count(*) > 1) AS voters
    GROUP BY law_id
    ORDER BY law_id
"""
SELECT_REJECTED = "SELECT reason, count(*) FROM ONLY rejected_messages GROUP BY reason ORDER BY reason"

# While this is held no batch is being written, and none is begun: it is the first lock of every batch, so that whoever
# takes it first cannot deadlock with one. Held for moments only; the counting of rows is done before.
LOCK_OUT_BATCHES = "SELECT lock_out_batches()"

# The totals anew, in two steps: all transactions that are over, without a lock, and then, under it, the rest.
CREATE_RECOUNTED = """
    CREATE TEMPORARY TABLE recounted (law_id varchar(64) PRIMARY KEY, oui_count bigint, non_count bigint) ON COMMIT DROP
"""
FOLD_INTO_RECOUNTED = """
    INSERT INTO pg_temp.recounted AS so_far
    SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
    FROM ONLY vote_audit
    WHERE txid >= %(from)s AND txid < %(to)s AND (%(law)s IS NULL OR law_id = %(law)s)
    GROUP BY law_id
    ON CONFLICT (law_id) DO UPDATE SET
        oui_count = so_far.oui_count + EXCLUDED.oui_count,
        non_count = so_far.non_count + EXCLUDED.non_count
"""
SELECT_RECOUNTED = """
    SELECT law_id, coalesce(results.oui_count, 0), coalesce(results.non_count, 0),
           coalesce(recounted.oui_count, 0), coalesce(recounted.non_count, 0)
    FROM ONLY vote_results AS results
    FULL JOIN pg_temp.recounted USING (law_id)
    WHERE %(law)s IS NULL OR law_id = %(law)s
    ORDER BY law_id
"""
UPSERT_CORRECTED = """
    INSERT INTO vote_results (law_id, oui_count, non_count)
    VALUES %s
    ON CONFLICT (law_id) DO UPDATE SET oui_count = EXCLUDED.oui_count, non_count = EXCLUDED.non_count
"""
INSERT_RECOUNTS = """
    INSERT INTO recounts (recounted_by, law_id, oui_before, non_before, oui_after, non_after) VALUES %s
"""
MOST_CERTIFIED_BY = 1_000  # characters, as init_db.sql has it
MIN_TXID, MAX_TXID = -(2**63), 2**63 - 1

# A moment that no calendar has (infinity, the year 30000) is shown as none.
SELECT_RESULTS = """
    SELECT law_id, title, oui_count, non_count, total_count, oui_percent::text, non_percent::text,
           status, CASE WHEN updated_at >= '0002-01-01' AND updated_at < '9999-01-01' THEN updated_at END
    FROM vote_statistics
    ORDER BY law_id
"""

RESULT_COLUMNS = ("law_id", "title", "oui", "non", "total", "oui_percent", "non_percent", "status", "last_vote")

SELECT_AUDIT = """
    SELECT json_build_object(
        'vote_id', vote_id, 'law_id', law_id, 'choice', choice, 'timestamp', voted_at, 'voter_hash', voter_hash,
        'recorded_at', recorded_at, 'instance', instance, 'redelivered', redelivered, 'txid', txid)::text
    FROM ONLY vote_audit
    ORDER BY txid, vote_id
"""

SELECT_LAW = """
    SELECT title,
           CASE WHEN opens_at BETWEEN '0002-01-01' AND '9999-01-01' THEN opens_at END,
           CASE WHEN closes_at BETWEEN '0002-01-01' AND '9999-01-01' THEN closes_at END,
           status, status = 'closed' OR closes_at <= now(), now()
    FROM ONLY laws WHERE law_id = %s
"""
SELECT_MAY_CERTIFY = "SELECT has_table_privilege('certified_results', 'INSERT')"
SELECT_CERTIFICATE = "SELECT certificate FROM ONLY certified_results WHERE law_id = %s"
SELECT_FOLD_OF_LAW = """
    SELECT count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non'), max(recorded_at)
    FROM ONLY vote_audit WHERE law_id = %s
"""
SELECT_NEW_VOTES_OF_LAW = "SELECT count(*) FROM ONLY vote_audit WHERE law_id = %s AND txid >= %s"
# so that there is a row to lock, and nobody's uncommitted one comes after the certificate
INSERT_TOTAL_OF_LAW = "INSERT INTO vote_results (law_id) VALUES (%s) ON CONFLICT DO NOTHING"
SELECT_TOTAL_OF_LAW = "SELECT oui_count, non_count FROM ONLY vote_results WHERE law_id = %s FOR UPDATE"
SELECT_DUPLICATES_OF_LAW = """
    SELECT reason, count(*) FROM ONLY duplicate_attempts WHERE law_id = %s GROUP BY reason ORDER BY reason
"""
SELECT_REJECTED_OF_LAW = """
    SELECT reason, count(*) FROM ONLY rejected_messages WHERE law_id = %s GROUP BY reason ORDER BY reason
"""
SELECT_UNREADABLE = "SELECT count(*) FROM ONLY rejected_messages WHERE law_id IS NULL"
INSERT_CERTIFICATE = """
    INSERT INTO certified_results (law_id, oui_count, non_count, certified_at, certified_by, seal_id, certificate)
    VALUES (%s, %s, %s, %s, %s, %s, %s)
"""
CLOSE = "UPDATE ONLY laws SET status = 'closed' WHERE law_id = %s AND status = 'open' RETURNING law_id"
CLOSE_FOR_GOOD = "UPDATE ONLY laws SET status = 'certified' WHERE law_id = %s"


# What would move the cursor, end a line or turn its direction: an insider's law id could make the screen say anything.
NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """The text without such characters: each is written as in JSON, so that JSON still says the same."""
    return NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines. All that may hold a text of the database is printed by it."""
    print(*map(printable, lines), sep="\n", file=file)


class RightMissing(Exception):
    """The broker or the database refuses what is asked for: the user has no right to it."""


class Refused(Exception):
    """What was asked for is not done; ``reasons`` holds a sentence for each thing that stands against it."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Compared:
    """A law's total as it stands, and as it follows from the audit log."""

    law_id: str
    oui: int
    non: int
    oui_in_log: int
    non_in_log: int

    @property
    def agrees(self) -> bool:
        """Whether both are the same."""
        return (self.oui, self.non) == (self.oui_in_log, self.non_in_log)

    def as_json(self) -> dict[str, Any]:
        """The law for --json."""
        return {
            "law_id": self.law_id,
            "totals": {"oui": self.oui, "non": self.non},
            "audit_log": {"oui": self.oui_in_log, "non": self.non_in_log},
            "difference": {"oui": self.oui - self.oui_in_log, "non": self.non - self.non_in_log},
        }


class Comparison(NamedTuple):
    """Each law, duplicates and rejected messages by reason, and ``problems``.

    Those are a sentence for what is there twice or may be, and for each certificate with other numbers than the log.

    ``voters_by_case`` is, for each law that has some, the number of voters whose voter_hash stands there in several
    cases, each of them counted.
    """

    laws: list[Compared]
    duplicates: dict[str, int]
    rejected: dict[str, int]
    problems: list[str]
    voters_by_case: dict[str, int]


# --- the broker ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InQueue:
    """What the queue still holds. None: it could not be asked, and ``problem`` says why.

    ``is_refused``: the management API does not know the user, or has nothing to tell it.
    """

    ready: int | None
    unacked: int | None
    problem: str = ""
    is_refused: bool = False


def ask_broker(environ: Mapping[str, str]) -> InQueue:
    """Ask RabbitMQ what the queue holds: ready by AMQP, unacked by the management API, which lags by up to 10 s."""
    try:
        broker = amqp_settings(environ)
        management = management_url(environ)
    except InvalidSettings as exc:
        return InQueue(None, None, "; ".join(exc.faults))
    ready, problem = _ready(broker)
    if management is None:
        return InQueue(ready, None, problem or "RABBITMQ_MANAGEMENT_URL is not set, so unacked messages are not known")
    try:
        unacked = _unacked(management, broker)
    except urllib.error.HTTPError as exc:
        with exc:  # which holds the connection
            is_refused = exc.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
        if is_refused:
            return InQueue(ready, None, f"the management API at {management} refuses the user: {exc}", is_refused=True)
        return InQueue(ready, None, problem or f"the management API at {management} does not tell: {exc}")
    except (OSError, ValueError, TypeError, http.client.HTTPException) as exc:
        return InQueue(ready, None, problem or f"the management API at {management} does not tell: {exc}")
    return InQueue(ready, unacked, problem or (NO_FIGURE if unacked is None else ""))


def _ready(broker: BrokerSettings) -> tuple[int | None, str]:
    try:
        parameters = [connection_parameters(url, broker.heartbeat, "vote-reconcile") for url in broker.urls]
        connection = pika.BlockingConnection(parameters)
        try:
            declared = connection.channel().queue_declare(broker.queue, passive=True)
            return int(declared.method.message_count), ""
        finally:
            if connection.is_open:
                connection.close()
    except CONNECTION_ERRORS as exc:
        return None, f"RabbitMQ at {', '.join(map(redact_url, broker.urls))} cannot be asked: {describe(exc)}"


def _unacked(management: str, broker: BrokerSettings) -> int | None:
    parameters = connection_parameters(broker.urls[0], broker.heartbeat, "vote-reconcile")
    unacked = managed_queue(management, parameters, broker.queue, HTTP_SECONDS).get("messages_unacknowledged")
    return None if unacked is None else int(unacked)


def queue_reasons(environ: Mapping[str, str], settle_seconds: float) -> list[str]:
    """Why it is not sure that the queue is empty and all is acked, for as long as the broker's figures may lag.

    Raises RightMissing.
    """
    since = time.monotonic()
    while True:
        held = ask_broker(environ)
        is_late = time.monotonic() >= since + settle_seconds
        if held.is_refused:
            raise RightMissing(held.problem)
        if held.ready or held.unacked:
            return [f"the queue holds {held.ready} messages, and {held.unacked} are delivered and not acked"]
        if held.problem and (is_late or held.problem != NO_FIGURE):
            return [held.problem]
        if is_late:
            return []
        if held.problem:  # of a queue that was just made; what it held till now is not known
            settle_seconds, since = settle_seconds - (time.monotonic() - since), time.monotonic()
        time.sleep(min(0.5, settle_seconds))


# --- what falls out of the queue -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """How votes can get lost between their confirm and the service.

    ``warnings`` name what can make them vanish, or why that is not known. ``dead_letters`` are the messages in each
    queue that takes what falls out; ``fallen_out`` are those of them that the service has not rejected, as far as is
    known.
    """

    warnings: tuple[str, ...] = ()
    dead_letters: Mapping[str, int] | None = None
    fallen_out: int = 0


def look_for_losses(environ: Mapping[str, str]) -> Losses:
    """Ask the management API how the queue may lose votes, and what has fallen out of it already."""
    try:
        broker = amqp_settings(environ)
        management = management_url(environ)
    except InvalidSettings as exc:
        return Losses(tuple(exc.faults))
    not_known = "what can make votes vanish from the queue, and what has fallen out of it, is not known"
    if management is None:
        return Losses((f"RABBITMQ_MANAGEMENT_URL is not set, so {not_known}",))
    parameters = connection_parameters(broker.urls[0], broker.heartbeat, "vote-reconcile")
    try:
        found = managed_queue(management, parameters, broker.queue, HTTP_SECONDS)
        if "effective_policy_definition" not in found:
            return Losses((f"the management API has no policies of so young a queue yet, so {not_known}",))
        warnings, exchange, routing_key = ways_out(found)
    except MANAGEMENT_ERRORS as exc:
        return Losses((f"the management API at {management} does not tell ({exc}), so {not_known}",))
    if exchange is None:
        return Losses(warnings)
    try:
        ask = functools.partial(managed, management, parameters, HTTP_SECONDS)
        dead_letters, fallen_out = _follow(ask, exchange, routing_key)
    except MANAGEMENT_ERRORS as exc:
        lost = f"dead letters cannot be followed to the exchange {exchange!r} ({exc}): is it there, and its queue?"
        return Losses((*warnings, lost))
    if not dead_letters:
        warnings = (*warnings, f"the dead-letter exchange {exchange!r} leads to no queue: what falls out is gone")
    return Losses(warnings, dead_letters, fallen_out)


def ways_out(queue: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None, str]:
    """What can make votes vanish from a queue that the management API describes so, a sentence each.

    And where its dead letters go: exchange, None where they are lost, and routing key.
    """
    arguments, policy = queue["arguments"] or {}, queue["effective_policy_definition"] or {}
    kinds = [kind for kind in ("policy", "operator_policy") if queue.get(kind)]
    policies = ", ".join([f"{kind.replace('_', ' ')} {queue[kind]}" for kind in kinds])  # which of them is not told
    exchange = arguments.get("x-dead-letter-exchange", policy.get("dead-letter-exchange"))
    routing_key = arguments.get("x-dead-letter-routing-key", policy.get("dead-letter-routing-key", queue["name"]))
    if (exchange, routing_key) == ("", queue["name"]):
        exchange = None  # back to the queue itself, which the broker does not do
    becomes = "gone" if exchange is None else f"sent to the exchange {exchange!r}"
    # a full queue that refuses what comes gives its publisher no confirm
    overflow = {policy.get("overflow", "reject-publish"), arguments.get("x-overflow", "reject-publish")}
    is_told = "overflow" in policy or "x-overflow" in arguments
    refuses = is_told and overflow <= {"reject-publish", "reject-publish-dlx"}
    told = [(key, value, f"{key} {value} ({policies})") for key, value in policy.items()]
    told += [(key.removeprefix("x-"), value, f"{key} {value} (argument)") for key, value in arguments.items()]
    warnings = []
    for key, value, text in told:
        if key == "message-ttl":
            warnings.append(f"{text}: a vote that waits for so many milliseconds is {becomes}")
        elif key in ("max-length", "max-length-bytes") and not refuses:
            warnings.append(f"{text}: what is above that is {becomes}")
        elif key == "delivery-limit" and value >= 0:
            warnings.append(f"{text}: a vote that is returned more often is {becomes}")
        elif key == "expires":
            warnings.append(
                f"{text}: after so many milliseconds without a consumer the queue is deleted, votes and all"
            )
    if exchange is None:
        warnings.append("no dead-letter exchange: a vote that is published with an expiration may be gone uncounted")
    return tuple(warnings), exchange, routing_key


def _follow(ask: Callable[..., Any], exchange: str, routing_key: str) -> tuple[dict[str, int], int]:
    """The messages in each queue that dead letters go to, and how many of them the service has not rejected.

    The latter is 0 where nothing sorts out what it rejects, as a binding of deploy/rabbitmq/definitions.sh does.
    ``ask`` is the rest of ``managed``, and raises as that.
    """
    if not exchange:  # the default one
        return {routing_key: _messages(ask("queues", routing_key))}, 0
    alternate = ask("exchanges", exchange)["arguments"].get("alternate-exchange")
    exchanges = [exchange] if alternate is None else [exchange, alternate]
    bindings = [binding for name in exchanges for binding in ask("exchanges", name, "bindings", "source")]
    queues = sorted({binding["destination"] for binding in bindings})
    held = {name: _messages(ask("queues", name)) for name in queues}
    reasons = ("x-first-death-reason", "x-last-death-reason")
    rejected = {each["destination"] for each in bindings if "rejected" in map(each["arguments"].get, reasons)}
    return held, sum(count for name, count in held.items() if name not in rejected) if rejected else 0


def _messages(queue: Mapping[str, Any]) -> int:
    """How many messages the management API says are in a queue. Raises LookupError where it does not say."""
    if "messages" not in queue:
        raise LookupError(f"the management API has no figures of so young a queue as {queue['name']!r} yet")
    return int(queue["messages"])


# --- compare and recount ---------------------------------------------------------------------------------------------


def compare(conn: connection) -> Comparison:
    """Each law's total beside the audit log, and what is beside it; all of one snapshot. Raises psycopg2.Error."""
    conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
    with seals.transaction(conn) as cur:
        cur.execute(SELECT_COMPARED)
        laws = [Compared(*row) for row in cur.fetchall()]
        cur.execute(SELECT_DUPLICATES)
        duplicates = dict(cur.fetchall())
        cur.execute(SELECT_REJECTED)
        rejected = dict(cur.fetchall())
        cur.execute(SELECT_VOTERS_BY_CASE)
        voters_by_case = dict(cur.fetchall())
        problems = seals.rows_there_twice(cur)
        cur.execute(SELECT_CERTIFIED)
        in_log = {law.law_id: (law.oui_in_log, law.non_in_log) for law in laws}
        for law_id, *certified in cur.fetchall():
            logged = in_log.get(law_id, (0, 0))
            if tuple(certified) != logged:
                problems.append(
                    "{}: certified are oui {}, non {}, but the log has oui {}, non {}".format(
                        law_id, *certified, *logged
                    )
                )
        return Comparison(laws, duplicates, rejected, problems, voters_by_case)


def recount(conn: connection, law_id: str | None, apply_as: str | None) -> list[Compared]:
    """Count the totals of one law, or of all, anew from the audit log; correct them where ``apply_as`` names who.

    Replicas may go on counting. Answers all laws looked at, as they were before. Raises psycopg2.Error.
    """
    # corrections must see what was committed while they waited for the lock; a mere look is of one snapshot
    conn.set_session(isolation_level="REPEATABLE READ" if apply_as is None else "READ COMMITTED")
    with seals.transaction(conn) as cur:
        cur.execute(CREATE_RECOUNTED)
        cur.execute(seals.SELECT_HORIZON)
        horizon = seals.one_row(cur)[0]
        cur.execute(FOLD_INTO_RECOUNTED, {"law": law_id, "from": MIN_TXID, "to": horizon})
        if apply_as is not None:
            cur.execute(LOCK_OUT_BATCHES)
        cur.execute(FOLD_INTO_RECOUNTED, {"law": law_id, "from": horizon, "to": MAX_TXID})
        cur.execute(SELECT_RECOUNTED, {"law": law_id})
        laws = [Compared(*row) for row in cur.fetchall()]
        wrong = [law for law in laws if not law.agrees]
        if wrong and apply_as is not None:
            execute_values(cur, UPSERT_CORRECTED, [(law.law_id, law.oui_in_log, law.non_in_log) for law in wrong])
            rows = [(apply_as, law.law_id, law.oui, law.non, law.oui_in_log, law.non_in_log) for law in wrong]
            execute_values(cur, INSERT_RECOUNTS, rows)
    return laws


# --- certify ---------------------------------------------------------------------------------------------------------


def certify(
    conn: connection, law_id: str, environ: Mapping[str, str], certified_by: str, settle_seconds: float = SETTLE_SECONDS
) -> dict[str, Any]:
    """Make the result of a law final and return its certificate.

    Raises Refused unless the law is closed, the queue is empty and all of it acked, the log verifies and is sealed up
    to the law's last vote, and the law's total is that of the log; RightMissing; psycopg2.Error.
    """
    if len(certified_by) > MOST_CERTIFIED_BY:
        raise Refused(f"who certifies has {len(certified_by):,} characters, and may have {MOST_CERTIFIED_BY:,}")
    with seals.transaction(conn) as cur:
        cur.execute(SELECT_MAY_CERTIFY)
        if not seals.one_row(cur)[0]:  # whatever stands against it beside
            raise RightMissing("permission denied for table certified_results")
        cur.execute(SELECT_CERTIFICATE, (law_id,))
        if cur.fetchone() is not None:
            raise Refused(f"{law_id} is certified already")
        cur.execute(SELECT_LAW, (law_id,))
        if _is_open(cur.fetchone()):
            raise Refused(f"{law_id} is not closed: set its closes_at, or its status to closed, in the table laws")
    reasons = queue_reasons(environ, settle_seconds)
    conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
    found = seals.verify(conn)
    if found.problems:
        reasons.append(f"the log and the totals do not verify: {found.problems[0].text}")
    conn.set_session(isolation_level="READ COMMITTED", readonly=False)
    with seals.transaction(conn) as cur:
        cur.execute(SELECT_FOLD_OF_LAW, (law_id,))
        oui, non, last_recorded_at = seals.one_row(cur)
        cur.execute(LOCK_OUT_BATCHES)
        # from here on nothing of the law can change; what did since it was looked at is a reason to refuse
        head = found.head
        cur.execute(SELECT_NEW_VOTES_OF_LAW, (law_id, head.to_txid if head else 0))
        not_sealed = seals.one_row(cur)[0]
        cur.execute(INSERT_TOTAL_OF_LAW, (law_id,))
        cur.execute(SELECT_TOTAL_OF_LAW, (law_id,))
        total = seals.one_row(cur)
        if head is None and not not_sealed:
            reasons.append("there is no seal yet, and no vote to seal")
        elif not_sealed:
            reasons.append(f"{not_sealed} votes of {law_id} are not sealed yet: run `reconcile.py seal`")
        elif total != (oui, non):
            reasons.append(f"the total of {law_id} is oui {total[0]}, non {total[1]}, the log has oui {oui}, non {non}")
        cur.execute(SELECT_LAW, (law_id,))
        law = cur.fetchone()
        if _is_open(law):
            reasons.append(f"{law_id} was opened again meanwhile")
        if reasons or law is None or head is None:
            raise Refused(*reasons)
        title, opens_at, closes_at, _, _, certified_at = law
        cur.execute(SELECT_DUPLICATES_OF_LAW, (law_id,))
        duplicates = dict(cur.fetchall())
        cur.execute(SELECT_REJECTED_OF_LAW, (law_id,))
        rejected = dict(cur.fetchall())
        cur.execute(SELECT_UNREADABLE)
        certificate = {
            "law_id": law_id,
            "title": title,
            "oui": oui,
            "non": non,
            "total": oui + non,
            "opens_at": _iso(opens_at),
            "closes_at": _iso(closes_at),
            "last_vote_recorded_at": _iso(last_recorded_at),
            "duplicates": duplicates,
            "rejected": rejected,
            "unreadable_messages_of_all_laws": seals.one_row(cur)[0],
            "seal": head.name(),
            "certified_at": _iso(certified_at),
            "certified_by": certified_by,
            "salt": secrets.token_hex(32),  # its hash is public, and would else let one guess what it holds
        }
        row = (law_id, oui, non, certified_at, certified_by, head.seal_id, json.dumps(certificate))
        cur.execute(INSERT_CERTIFICATE, row)
        cur.execute(CLOSE_FOR_GOOD, (law_id,))
    return certificate


def _is_open(law: tuple[Any, ...] | None) -> bool:
    return law is None or not law[4]


# --- the commands ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is not _reconcile and (arguments.recount is not None or arguments.all or arguments.apply):
        parser.error("--recount, --all and --apply go with no other command")
    try:
        return int(arguments.command(arguments))
    except InvalidSettings as exc:
        say("wrong settings:", *(f"  {fault}" for fault in exc.faults), file=sys.stderr)
        return 2
    except Refused as exc:
        say("refused:", *(f"  {reason}" for reason in exc.reasons), file=sys.stderr)
        return 1
    except RightMissing as exc:
        say(f"a right is missing: {exc}", file=sys.stderr)
        return 3
    except BrokerUnavailable as exc:
        say(f"the broker cannot be reached, or no more: {exc}", file=sys.stderr)
        return 3
    except psycopg2.errors.InsufficientPrivilege as exc:
        by_trigger = exc.diag.source_function == "exec_stmt_raise"  # of ours, which says so by the same code
        say(f"{'refused' if by_trigger else 'a right is missing'}: {_first_line(exc)}", file=sys.stderr)
        return 1 if by_trigger else 3
    except psycopg2.errors.CheckViolation as exc:
        say(f"refused: {_first_line(exc)}", file=sys.stderr)
        return 1
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedColumn, psycopg2.errors.UndefinedFunction):
        say("the database lacks what this version needs: the service makes it when it starts", file=sys.stderr)
        return 3
    except psycopg2.Error as exc:
        say(f"the database cannot be read: {_first_line(exc)}", file=sys.stderr)
        return 3
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=_reconcile)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--recount", nargs="?", const="", metavar="LAW", help="count totals anew from the audit log")
    parser.add_argument("--all", action="store_true", help="with --recount: every law")
    parser.add_argument("--apply", action="store_true", help="with --recount: correct the totals that differ")
    commands = parser.add_subparsers(title="commands", metavar="")

    command = commands.add_parser("seal", help="seal what was counted")
    command.set_defaults(command=_seal)
    command.add_argument("--every", type=float, metavar="SECONDS", help="go on until SIGTERM or SIGINT")
    command.add_argument(
        "--also-without-votes",
        action=argparse.BooleanOptionalAction,
        help="a seal also of none, so that no seal tells that there were some (where RESULTS_VISIBLE=after_close)",
    )

    command = commands.add_parser("verify", help="compute the sealed log anew")
    command.set_defaults(command=_verify)
    command.add_argument("--since", action="append", default=[], metavar="SEAL", help="a published seal, number:hash")
    command.add_argument("--from-seal", type=int, default=1, metavar="N", help="leave the rows of earlier seals unread")
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes, each with a connection (one for each core)"
    )
    command.add_argument("--json", action="store_true", help="machine-readable")

    command = commands.add_parser("prove", help="print a proof that a vote is in the sealed log")
    command.set_defaults(command=_prove)
    command.add_argument("vote_id", metavar="VOTE_ID")

    command = commands.add_parser("check-proof", help="check a proof, without a database")
    command.set_defaults(command=_check_proof)
    command.add_argument("file", metavar="FILE", help="- for standard input")
    command.add_argument("--seal", metavar="SEAL", help="the published seal that it must lead to, number:hash")

    command = commands.add_parser("close", help="close a law now; votes that were cast before still count")
    command.set_defaults(command=_close)
    command.add_argument("law_id", metavar="LAW")

    command = commands.add_parser("certify", help="make the result of a closed law final")
    command.set_defaults(command=_certify)
    command.add_argument("law_id", metavar="LAW")
    command.add_argument("--by", default="", metavar="NAME", help="who certifies, beside the database's user")

    command = commands.add_parser("results", help="the results")
    command.set_defaults(command=_results)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--csv", action="store_true")

    command = commands.add_parser("export-audit", help="the audit log as JSON Lines")
    command.set_defaults(command=_export_audit)
    command.add_argument("--output", metavar="FILE", help="instead of standard output")
    command.add_argument("--seals", metavar="FILE", help="and, of the same moment, the seals and totals into that file")

    command = commands.add_parser("republish", help="send again what the service refused, where it is a vote now")
    command.set_defaults(command=_republish)
    command.add_argument(
        "--reason", action="append", required=True, metavar="REASON", help="of rejected_messages; any number of them"
    )
    command.add_argument("--dry-run", action="store_true", help="send nothing, say what would be sent")
    command.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def _reconcile(arguments: argparse.Namespace) -> int:
    if arguments.recount is not None or arguments.all or arguments.apply:
        return _recount(arguments)
    environ = _environment("AUDITOR")
    with _connected(environ) as conn:
        laws, duplicates, rejected, problems, voters_by_case = compare(conn)
    held = ask_broker(environ)
    losses = look_for_losses(environ)
    wrong = [law for law in laws if not law.agrees]
    if arguments.json:
        report = {
            "agrees": not wrong and not problems,
            "laws": [law.as_json() for law in laws],
            "differing": [law.law_id for law in wrong],
            "votes": {
                "totals": sum(x.oui + x.non for x in laws),
                "audit_log": sum(x.oui_in_log + x.non_in_log for x in laws),
            },
            "duplicates": duplicates,
            "rejected": rejected,
            "problems": problems,
            "voters_by_case": voters_by_case,
            "queue": {"ready": held.ready, "unacked": held.unacked, "problem": held.problem or None},
            "losses": asdict(losses),
        }
        _print_json(json.dumps(report, indent=2))
        return _exit_code(bool(wrong or problems or losses.fallen_out), held)
    _print_compared(laws)
    say(f"duplicates  {_counts(duplicates)}", f"rejected    {_counts(rejected)}")
    say(
        f"queue       ready {_known(held.ready)}, unacked {_known(held.unacked)}"
        + f" ({held.problem})" * bool(held.problem)
    )
    if losses.dead_letters:
        say(f"dead        {_counts(losses.dead_letters)}")
    for warning in losses.warnings:
        say(f"warning     {warning}")
    for law_id, voters in voters_by_case.items():
        say(f"warning     {law_id}: voters counted more than once, by a voter_hash in upper and lower case: {voters:,}")
    if losses.fallen_out:
        say(f"{losses.fallen_out:,} messages fell out of the queue uncounted: docs/RUNBOOK.md, Votes that fell out")
    for problem in problems:
        say(problem)
    if wrong or not problems:
        say(f"{len(wrong)} of {_many(laws, 'law')} differ" if wrong else f"{_many(laws, 'law')}, no difference")
    return _exit_code(bool(wrong or problems or losses.fallen_out), held)


def _exit_code(is_wrong: bool, held: InQueue) -> int:
    """What was found comes first; else it is told where a right was missing to look for it. Raises RightMissing."""
    if held.is_refused and not is_wrong:
        raise RightMissing(held.problem)
    return 1 if is_wrong else 0


def _recount(arguments: argparse.Namespace) -> int:
    law_id = arguments.recount or None
    if (law_id is None) != arguments.all:
        say("say which: --recount LAW, or --recount --all", file=sys.stderr)
        return 2
    with _connected(_environment("CERTIFIER")) as conn:
        laws = recount(conn, law_id, _who(conn) if arguments.apply else None)
    wrong = [law for law in laws if not law.agrees]
    if arguments.json:
        report = {"laws": [law.as_json() for law in laws], "applied": bool(arguments.apply and wrong)}
        _print_json(json.dumps(report, indent=2))
    elif not laws:
        say(f"there is no vote for {law_id}")
    else:
        _print_compared(laws)
        if not wrong:
            say("nothing to correct")
        elif arguments.apply:
            say(f"corrected {_many(wrong, 'law')}; before and after stand in the table recounts")
        else:
            say(f"{_many(wrong, 'law')} to be corrected with --apply")
    return 1 if wrong and not arguments.apply else 0


def _print_compared(laws: list[Compared]) -> None:
    rows = [("law", "choice", "total", "audit log", "difference")]
    for law in laws:
        for choice, total, logged in (("oui", law.oui, law.oui_in_log), ("non", law.non, law.non_in_log)):
            rows.append(
                (law.law_id, choice, f"{total:,}", f"{logged:,}", f"{total - logged:+,}" if total != logged else "0")
            )
    _print_table(rows)


def _seal(arguments: argparse.Namespace) -> int:
    """Seal once, or at intervals."""
    stop = threading.Event()
    if arguments.every is not None:
        if not 0 < arguments.every <= MOST_SECONDS:
            say(f"--every takes a number of seconds above 0, at most {MOST_SECONDS}", file=sys.stderr)
            return 2
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: stop.set())
    environ = _environment("SEALER")
    url, also_without_votes = database_url(environ), arguments.also_without_votes
    if also_without_votes is None:
        also_without_votes = hides_open_laws(environ)
    if arguments.every is not None:
        return _keep_sealing(url, arguments.every, stop, also_without_votes)
    with seals.sealing_session(url, **_connect_arguments("vote-sealer")) as (reader, writer):
        try:
            for made in seals.seal(reader, writer, also_without_votes=also_without_votes):
                say(f"sealed {made.votes:,} votes: {made.name()}")
        except seals.AnotherSealer as exc:
            raise Refused(f"{exc}: {_holding(exc.holder)}") from None
        holder = seals.held_up(writer)
    if holder:
        say(f"not all is sealed: a transaction is not over: {_holding(holder)}", file=sys.stderr)
    return _print_head()


def _keep_sealing(url: str, seconds: float, stop: threading.Event, also_without_votes: bool) -> int:
    """Seal every so many seconds until told to stop; what keeps it from that is logged when it begins or changes.

    However long a round takes: the times of seals would else tell how much there was to seal.
    """
    configure_logging("INFO", {parse_dsn(url).get("password", "")} - {""})
    told = before = None
    next_round = time.monotonic()
    while not stop.is_set():
        try:
            with seals.sealing_session(url, **_connect_arguments("vote-sealer")) as (reader, writer):
                while not stop.is_set():
                    for made in seals.seal(reader, writer, also_without_votes=also_without_votes):
                        logger.info("sealed", extra={"fields": {"seal": made.name(), "votes": made.votes}})
                    holder = seals.held_up(writer)
                    # a batch that is being written is no news; what was there a round ago is
                    if holder is None:
                        told = None
                    elif before and holder["transaction"] == before["transaction"] and told != holder:
                        logger.warning("sealing is held up by a transaction that is not over", extra={"fields": holder})
                        told = holder
                    before = holder
                    while next_round <= time.monotonic():
                        next_round += seconds
                    stop.wait(next_round - time.monotonic())
        except (seals.AnotherSealer, psycopg2.Error) as exc:  # this one takes over when the other ends
            fields = exc.holder if isinstance(exc, seals.AnotherSealer) else {}
            reason = {"error": _first_line(exc), **fields}
            if told != reason:
                logger.warning("not sealed", extra={"fields": reason})
            told = reason
            stop.wait(seconds)
    return 0


def _holding(holder: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in holder.items() if value is not None) or "it has just ended"


def _print_head() -> int:
    with _connected(_environment("AUDITOR")) as conn, seals.transaction(conn) as cur:
        head = seals.head(cur)
    if head is None:
        say("nothing to seal yet")
    else:
        say("newest seal, to be published:", head.name())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    try:
        for name in arguments.since:
            seals.parse_name(name)
    except ValueError as exc:
        say(exc, file=sys.stderr)
        return 2
    with _connected(_environment("AUDITOR")) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        found = seals.verify(conn, arguments.since, arguments.from_seal, arguments.workers)
    seconds = time.monotonic() - started
    head = found.head.name() if found.head else None
    if arguments.json:
        report = {
            "verified": not found.problems,
            "problems": [problem._asdict() for problem in found.problems],
            "seals": found.seals,
            "sealed_votes": found.sealed_votes,
            "votes_not_sealed": found.votes_not_sealed,
            "records_not_sealed": found.records_not_sealed,
            "head": head,
            "seconds": round(seconds, 3),
        }
        _print_json(json.dumps(report, indent=2))
        return 1 if found.problems else 0
    skipped = "" if arguments.from_seal <= 1 else f" (rows before seal {arguments.from_seal} unread)"
    say(
        f"{found.sealed_votes:,} votes in {_many(range(found.seals), 'seal')} computed anew in {seconds:.1f} s{skipped}"
    )
    say(f"{found.votes_not_sealed:,} votes are not sealed yet")
    if found.records_not_sealed:
        say(f"{found.records_not_sealed:,} certificates and recounts are not sealed yet")
    if not arguments.since:
        say("no published seal was given (--since), so a chain that was forged as a whole would not be noticed")
    if found.problems:
        say(f"NOT VERIFIED. The first wrong place: {found.problems[0].text}")
        for problem in found.problems[1:20]:
            say(f"  also: {problem.text}")
        if len(found.problems) > 20:
            say(f"  and {len(found.problems) - 20} more")
        return 1
    say(f"verified; newest seal: {head}")
    return 0


def _prove(arguments: argparse.Namespace) -> int:
    try:
        vote_id = str(uuid.UUID(arguments.vote_id))
    except ValueError:
        say(f"{arguments.vote_id!r} is no vote_id: a UUID is", file=sys.stderr)
        return 2
    with _connected(_environment("AUDITOR")) as conn:
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        try:
            proof = seals.prove(conn, vote_id)
        except LookupError as exc:
            raise Refused(str(exc.args[0])) from None
    _print_json(json.dumps(proof, indent=2))
    return 0


def _check_proof(arguments: argparse.Namespace) -> int:
    try:
        text = sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        say(f"{arguments.file} cannot be read: {exc}", file=sys.stderr)
        return 2
    try:
        proof = json.loads(text, parse_constant=_no_json)
        name = seals.check_proof(proof, arguments.seal)
    except (ValueError, OverflowError, RecursionError) as exc:
        raise Refused(f"the proof does not hold: {exc}") from None
    fields = proof["row"].split("\t")
    fields = [field if field.isprintable() else ascii(field) for field in fields]
    say(f"vote {fields[0]} ({fields[1]}, {fields[2]}) is in the log that seal {name} names")
    if arguments.seal is None:
        say("compare that seal with the published one, or give it with --seal")
    return 0


def _no_json(constant: str) -> NoReturn:
    """NaN and the like, which Python reads and others do not."""
    raise ValueError(f"{constant} is no JSON")


def _close(arguments: argparse.Namespace) -> int:
    with _connected(_environment("CERTIFIER")) as conn, seals.transaction(conn) as cur:
        cur.execute(SELECT_LAW, (arguments.law_id,))
        law = cur.fetchone()
        if law is None:
            raise Refused(f"{arguments.law_id} is not in the table laws: put it there first, with its title")
        cur.execute(CLOSE, (arguments.law_id,))
        closed = cur.fetchone() is not None
    say(f"{arguments.law_id} is closed" if closed else f"{arguments.law_id} was {law[3]} already")
    return 0


def _certify(arguments: argparse.Namespace) -> int:
    environ = _environment("CERTIFIER", needs_both=True)
    with _connected(environ) as conn:
        who = _who(conn) + f" for {arguments.by}" * bool(arguments.by)
        certificate = certify(conn, arguments.law_id, environ, who)
    _print_json(json.dumps(certificate, indent=2, ensure_ascii=False))
    return 0


def _results(arguments: argparse.Namespace) -> int:
    with _connected(_environment("AUDITOR")) as conn, seals.transaction(conn) as cur:
        cur.execute(SELECT_RESULTS)
        laws = [dict(zip(RESULT_COLUMNS, (*row[:-1], _iso(row[-1])), strict=True)) for row in cur.fetchall()]
    if arguments.json:
        _print_json(json_with_percentages({"laws": laws, "read_at": _iso(datetime.now(UTC))}, indent=2))
    elif arguments.csv:
        writer = csv.DictWriter(sys.stdout, RESULT_COLUMNS)
        writer.writeheader()
        for law in laws:
            texts = {"law_id": printable(law["law_id"]), "title": printable(no_formula(law["title"] or ""))}
            writer.writerow(law | texts)
    elif not laws:
        say("no law and no vote yet")
    else:
        shown = ("law", "title", "oui", "non", "total", "oui %", "non %", "status", "last vote")
        _print_table(
            [
                shown,
                *(
                    tuple(
                        "" if value is None else f"{value:,}" if type(value) is int else str(value)
                        for value in law.values()
                    )
                    for law in laws
                ),
            ]
        )
    return 0


def _export_audit(arguments: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        conn = stack.enter_context(_connected(_environment("AUDITOR")))
        outs: list[TextIO | None] = []
        for option, name in (("--output", arguments.output), ("--seals", arguments.seals)):
            try:
                outs.append(stack.enter_context(Path(name).open("w", encoding="utf-8")) if name else None)
            except OSError as exc:
                say(f"{option} {name}: {exc.strerror}", file=sys.stderr)
                return 2
        conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
        export_audit(conn, outs[0] or sys.stdout, outs[1])
    return 0


def export_audit(conn: connection, out: TextIO, seals_out: TextIO | None = None) -> None:
    """Write the audit log, a vote a line, and its seals, all of one snapshot. Raises psycopg2.Error, OSError."""
    with seals.transaction(conn) as cur:
        if seals_out is not None:
            json.dump(seals.export(cur), seals_out, indent=1)
            seals_out.write("\n")
        with conn.cursor("export") as rows:  # on the server, so that a large log needs no memory here
            rows.itersize = 10_000
            rows.execute(SELECT_AUDIT)
            for (line,) in rows:
                out.write(printable(line) + "\n")


def _republish(arguments: argparse.Namespace) -> int:
    environ = with_login(environment(needs_both=not arguments.dry_run), "POSTGRES", "AUDITOR", "votes_auditor")
    reasons = sorted({*arguments.reason})
    with _connected(environ) as conn:
        kept = republish.reasons_kept(conn)
        unknown = {*reasons} - republish.KNOWN_REASONS - kept.keys()
        if unknown:
            say(f"no message has the reason {', '.join(sorted(unknown))}; kept are: {_counts(kept)}", file=sys.stderr)
            return 2
        tally = republish.Tally()
        with contextlib.ExitStack() as stack:
            sender = None
            if not arguments.dry_run:
                sender = stack.enter_context(republish.Sender(amqp_settings(publisher_login(environ))))
            try:
                republish.republish(conn, reasons, sender, tally)
            except republish.NotTaken as exc:
                raise Refused(str(exc)) from None
            except republish.MayNotPublish as exc:
                raise RightMissing(str(exc)) from None
            finally:  # also where it ends early: what was confirmed until then
                _print_republished({reason: kept.get(reason, 0) for reason in reasons}, tally, arguments)
    return 0


def _print_republished(kept: Mapping[str, int], tally: republish.Tally, arguments: argparse.Namespace) -> None:
    columns = ("kept", "to send" if arguments.dry_run else "sent", "counted", "certified", "unreadable")
    names = [column.replace(" ", "_") for column in columns]
    rows = {reason: (count, *tally.of(reason)) for reason, count in kept.items()}
    unreadable = sorted(tally.unreadable.items())
    if arguments.json:
        report = {
            "reasons": {reason: dict(zip(names, row, strict=True)) for reason, row in rows.items()},
            "unreadable": [
                {"reason": reason, "now": now, "count": left.count, "sha256": left.named}
                for (reason, now), left in unreadable
            ],
        }
        _print_json(json.dumps(report, indent=2))
        return
    _print_table([("reason", *columns), *((reason, *(f"{n:,}" for n in row)) for reason, row in rows.items())])
    for (reason, now), left in unreadable:
        say(f"not sent, {left.count:,} of {reason}: {now}, {REASONS.get(now, republish.NOT_WHOLE_MEANS)}")
        for digest in left.named:
            say(f"  sha256 {digest}")
        if left.count > len(left.named):
            say(f"  and {left.count - len(left.named):,} more")
    sent = f"{tally.sent.total():,}"
    say(f"{sent} would be sent" if arguments.dry_run else f"{sent} sent, each confirmed by the broker")


def _environment(role: str, needs_both: bool = False) -> dict[str, str]:
    """The settings with the logins of SEALER, AUDITOR or CERTIFIER (docs/SECURITY.md) where they have one.

    The broker has one for auditor and certifier together, and that one may ask its management API. Raises
    InvalidSettings; with ``needs_both`` also where only one of the two servers is named.
    """
    environ = with_login(environment(needs_both=needs_both), "POSTGRES", role, f"votes_{role.lower()}")
    with_broker = with_login(environ, "RABBITMQ", "AUDITOR", "votes-auditor")
    if with_broker != environ and "RABBITMQ_MANAGEMENT_URL" not in environ and "AMQP_URL" not in environ:
        host = environ.get("RABBITMQ_HOST", "localhost").partition(",")[0]
        with_broker["RABBITMQ_MANAGEMENT_URL"] = f"http://{host}:{environ.get('RABBITMQ_MANAGEMENT_PORT', '15672')}"
    return with_broker


@contextlib.contextmanager
def _connected(environ: Mapping[str, str]) -> Iterator[connection]:
    conn = psycopg2.connect(database_url(environ), **_connect_arguments())
    try:
        yield conn
    finally:
        conn.close()


def _connect_arguments(name: str = "vote-reconcile") -> dict[str, Any]:
    return {"connect_timeout": CONNECT_SECONDS, "application_name": name, "client_encoding": "UTF8"}


def _who(conn: connection) -> str:
    with seals.transaction(conn) as cur:
        cur.execute("SELECT session_user")
        database_user = seals.one_row(cur)[0]
    try:
        return f"{database_user} ({getpass.getuser()})"
    except (KeyError, OSError):  # of a uid without a name
        return f"{database_user} (uid {os.getuid()})"


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="microseconds")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items()) or "none"


def _many(things: Sized, name: str) -> str:
    return f"{len(things):,} {name}" + "s" * (len(things) != 1)


def _known(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"


def _print_json(text: str) -> None:
    say(*text.split("\n"))


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    is_number = [all(row[column][:1] in "-+0123456789" for row in rows[1:]) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        say("  ".join(cells).rstrip())


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
