"""The seals of the audit log: whoever holds an old seal can tell whether the log was altered since (docs/AUDIT.md).

A seal covers the rows of a range of transactions that are all over, so that no row can still come into it. Its rows are
the leaves of a Merkle tree as RFC 9162 (section 2.1) has it, its certificates and recounts have a hash beside it, and
each seal holds the hash of the one before. The upper half of this module is arithmetic alone and needs no database: it
is all that ``check_proof`` uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import re
import secrets
import subprocess
import sys
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import connection, cursor
from psycopg2.extras import execute_values

VOTES_A_SEAL = 100_000  # about; a transaction is never split
NO_HASH = bytes(32)  # what the first seal has as the hash of its predecessor
MOST_WORKERS = 4  # each is a connection, and a process of the server's that is busy
WORTH_A_HELPER = 100_000  # votes: fewer are computed before another process has started
LEAF_BYTES = 24  # of a row in audit_seals.leaves: 16 of its vote_id, and the first 8 of its leaf's hash

Counts = Counter[tuple[bytes, bytes]]  # votes by (law_id, choice)

# The forms of a proof's texts, as docs/VERIFY.md has them: every verifier refuses all others, so that all say the same.
_NUMBER, _HASH = re.compile(r"0|[1-9][0-9]{0,18}"), re.compile(r"[0-9a-f]{64}")
_TEXT = r"[^\t\n\r\b\f\v\ud800-\udfff]*"
_TIME = r"[0-9]{4,6}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{0,5}[1-9])?\+00"
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ROW = re.compile(
    "\t".join(
        [_UUID, _TEXT, "(?:oui|non)", rf"(?:{_TIME}|\\N)", _TIME, _TEXT, _TEXT, "[tf]", f"(?P<txid>{_NUMBER.pattern})"]
    )
)
_FORMS = {
    **dict.fromkeys(("seal_id", "from_txid", "to_txid", "votes"), _NUMBER),
    **dict.fromkeys(("merkle_root", "leaves_hash", "previous_hash", "records_hash", "salt"), _HASH),
    "sealed_at": re.compile(_TIME),
}
_LATER_FIELDS = ("records_hash", "salt")  # of the second format and the third
_NO_NUMBER = 2**63  # nor any above


# --- arithmetic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seal:
    """One seal as it is published. Its hash is over all fields, the hash of the seal before it among them."""

    seal_id: int
    from_txid: int
    to_txid: int
    votes: int
    merkle_root: bytes
    leaves_hash: bytes
    sealed_at: str
    previous_hash: bytes
    records_hash: bytes | None = None  # None: a seal of format 1, which covers votes alone
    salt: bytes | None = None  # at random, so that the hash cannot be guessed; None: a seal of format 1 or 2

    @property
    def format(self) -> int:
        """1, 2 or 3: a later seal is of no earlier one."""
        return 1 if self.records_hash is None else 2 if self.salt is None else 3

    def hash(self) -> bytes:
        """SHA-256 of the fields in this order, as text, joined by tabs: hashes in hex, the time as in COPY_ROWS."""
        name = f"vote-audit-seal-{self.format}"
        return hashlib.sha256("\t".join([name, *self.as_texts().values()]).encode()).digest()

    def name(self) -> str:
        """What is published: the number and the hash, which names the log up to here and nothing else."""
        return f"{self.seal_id}:{self.hash().hex()}"

    def as_texts(self) -> dict[str, str]:
        """The fields as the hash and a proof have them."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: _text(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_texts(cls, texts: dict[str, str]) -> Seal:
        """The inverse of ``as_texts``. Raises ValueError where a field is missing or in any other form."""
        try:
            values: dict[str, Any] = {
                name: texts[name] for name in _FORMS if name not in _LATER_FIELDS or name in texts
            }
            if not all(_FORMS[name].fullmatch(text) for name, text in values.items()):
                raise ValueError("a seal has a field in another form than the one that is hashed")
        except (KeyError, TypeError) as exc:
            raise ValueError(f"a seal lacks a field or has one that is no text: {exc}") from exc
        if "salt" in values and "records_hash" not in values:
            raise ValueError("a seal has a salt and no records_hash, as no format has it")
        for name, text in values.items():
            if name != "sealed_at":
                values[name] = _number(text) if _FORMS[name] is _NUMBER else bytes.fromhex(text)
        made = cls(**values)
        if texts.get("seal_hash", made.hash().hex()) != made.hash().hex():
            raise ValueError(f"seal {made.seal_id} has a seal_hash that is not the hash of its fields")
        return made


def _number(text: str) -> int:
    if (number := int(text)) >= _NO_NUMBER:
        raise ValueError(f"{text} is above 2^63 - 1")
    return number


def _text(value: int | bytes | str) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def leaf_hash(row: bytes) -> bytes:
    """Hash of one row, in the form that COPY_ROWS gives it, without the line break."""
    return hashlib.sha256(b"\0" + row).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root of the tree over these leaf hashes. Of no leaves it is the hash of nothing (RFC 9162, section 2.1.1)."""
    level = list(leaves)
    while len(level) > 1:
        level = _parents(level)
    return level[0] if level else hashlib.sha256().digest()


def _parents(level: list[bytes]) -> list[bytes]:
    # pairs from the left, an odd one goes up as it is: the same tree as the recursive definition of the RFC
    sha256, pairs = hashlib.sha256, b"".join(level)
    parents = [sha256(b"\1" + pairs[at : at + 64]).digest() for at in range(0, len(pairs) - 63, 64)]
    return parents + level[-1:] if len(level) % 2 else parents


def merkle_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from leaf ``index`` to the root, from below (RFC 9162, section 2.1.3.1)."""
    path, level = [], list(leaves)
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        level, index = _parents(level), index // 2
    return path


def root_from_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that ``path`` leads to from leaf ``index`` of ``size``; None where the path is too short or too long."""
    if not 0 <= index < size:
        return None
    steps = iter(path)
    node, last = leaf, size - 1
    while last > 0:
        if index ^ 1 <= last:
            sibling = next(steps, None)
            if sibling is None or len(sibling) != 32:
                return None
            node = hashlib.sha256(b"\1" + (sibling + node if index % 2 else node + sibling)).digest()
        index, last = index // 2, last // 2
    return node if next(steps, None) is None else None


def check_proof(proof: dict[str, Any], published: str | None = None) -> str:
    """Check an inclusion proof as ``prove`` makes it, with nothing but the proof itself.

    ``published`` is a seal as it was published (number:hash). Returns the seal at the end of the proof's chain, or the
    published one where given. Raises ValueError with what is wrong.
    """
    try:
        vote_id, row, index, steps = proof["vote_id"], proof["row"], proof["index"], proof["path"]
        chain = [Seal.from_texts(texts) for texts in proof["seals"]]
    except (KeyError, TypeError) as exc:
        raise ValueError(f"this is no proof: {type(exc).__name__} {exc}") from exc
    if isinstance(index, float) and index.is_integer():  # other languages do not tell 5.0 from 5
        index = int(index)
    if not isinstance(row, str) or type(index) is not int or not chain:
        raise ValueError("this is no proof: the row, its index or the seals are missing")
    fields = _ROW.fullmatch(row)
    if fields is None:
        raise ValueError("this is no proof: the row is not one of the log's")
    _number(fields["txid"])
    if row.split("\t")[0] != vote_id:
        raise ValueError("the row is that of another vote")
    if not isinstance(steps, list) or not all(isinstance(step, str) and _HASH.fullmatch(step) for step in steps):
        raise ValueError("this is no proof: its path is no list of hashes")
    path = [bytes.fromhex(step) for step in steps]
    if root_from_path(leaf_hash(row.encode()), index, chain[0].votes, path) != chain[0].merkle_root:
        raise ValueError(f"the row is not in seal {chain[0].seal_id}: the path does not lead to its root")
    first = chain[0]
    if first.seal_id < 1 or (first.seal_id == 1 and (first.previous_hash != NO_HASH or first.from_txid != 0)):
        raise ValueError(f"seal {first.seal_id} is not the first of a chain")
    for before, after in itertools.pairwise(chain):
        is_next = after.previous_hash == before.hash() and after.seal_id == before.seal_id + 1
        if not is_next or after.from_txid != before.to_txid or after.format < before.format:
            raise ValueError(f"seal {after.seal_id} does not follow from seal {before.seal_id}")
    names = [seal.name() for seal in chain]
    if published is not None and published not in names:
        raise ValueError(
            f"the published seal {published} is not in the chain of this proof ({names[0]} to {names[-1]})"
        )
    return published or names[-1]


# --- the log in the database -----------------------------------------------------------------------------------------

# The rows of a range in their canonical form: text as COPY gives it (fields in this order, joined by tabs, \N for NULL,
# backslash, tab and line break escaped), times in UTC. Their order is that of the tree's leaves.
COPY_ROWS = """
    COPY (
        SELECT vote_id, law_id, choice, voted_at, recorded_at, voter_hash, instance, redelivered, txid
        FROM ONLY vote_audit
        WHERE txid >= {from_txid} AND txid < {to_txid}
        ORDER BY txid, vote_id
    ) TO STDOUT
"""

# The certificates and recounts of a range, in the same form. Their hash is that of these lines, one after the other,
# with their line breaks.
COPY_RECORDS = [
    """
    COPY (
        SELECT 'certificate', law_id, oui_count, non_count, certified_at, certified_by, seal_id, certificate, txid
        FROM ONLY certified_results
        WHERE txid >= {from_txid} AND txid < {to_txid}
        ORDER BY txid, law_id COLLATE "C"
    ) TO STDOUT
    """,
    """
    COPY (
        SELECT 'recount', recount_id, recounted_at, recounted_by, law_id, oui_before, non_before, oui_after, non_after,
               txid
        FROM ONLY recounts
        WHERE txid >= {from_txid} AND txid < {to_txid}
        ORDER BY txid, recount_id
    ) TO STDOUT
    """,
]
ALL_TXIDS = (-(2**63), 2**63)

# What the canonical form depends on, whatever the server's own settings are; and how long a statement may take
# (counting a large log takes its time) and wait for a lock (not for ever). In each transaction: a pooler may give each
# another backend, and keep none of what was set at connect. The tables are those of the service, whatever path the role
# has, and all of their rows (a policy that would hide some is an error).
SET_FORM = """
    SET LOCAL search_path = public, pg_temp; SET LOCAL row_security = off;
    SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL client_encoding = 'UTF8';
    SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '10s'
"""

# of a server's process, for the rows of one seal to be sorted in memory
SORT_IN_MEMORY = "SET LOCAL work_mem = '32MB'"

# Every transaction below the horizon is over, and no later one can get an id below it. The next id is the lowest that
# none has yet.
SELECT_HORIZON = """
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint, pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""

# Who holds this lock, till the end of the transaction, seals. It needs the right to change sealed totals, so that no
# stranger can take it; it is in nobody's way who reads or adds to them. (Autovacuum of the table yields after 1 s.)
BECOME_THE_SEALER = """
    SET LOCAL lock_timeout = '2s';
    LOCK TABLE sealed_totals IN SHARE UPDATE EXCLUSIVE MODE;
    SET LOCAL lock_timeout = '10s'
"""

# Whose lock, and which transaction, stands in the sealer's way. Of sessions of others some of it is shown to members of
# pg_read_all_stats alone; the sealer's role is none, since that shows statements, and so ballots, too.
SELECT_LOCK_HOLDER = """
    SELECT pid, usename, application_name, datname, xact_start::text
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'relation' AND relation = 'sealed_totals'::regclass AND granted AND pid <> pg_backend_pid()
      AND datname = current_database() AND mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')
    LIMIT 1
"""
SELECT_XID_HOLDER = """
    SELECT pid, usename, application_name, datname, xact_start::text
    FROM pg_stat_activity WHERE backend_xid::text::bigint = %(txid)s & 4294967295
    UNION ALL
    SELECT NULL, owner, 'PREPARE TRANSACTION ' || quote_literal(gid), database, prepared::text
    FROM pg_prepared_xacts WHERE transaction::text::bigint = %(txid)s & 4294967295
"""
SELECT_IS_WAITING = """
    SELECT EXISTS (SELECT FROM ONLY vote_audit WHERE txid >= %(txid)s)
           OR EXISTS (SELECT FROM ONLY certified_results WHERE txid >= %(txid)s)
           OR EXISTS (SELECT FROM ONLY recounts WHERE txid >= %(txid)s)
"""

SELECT_SEALS = """
    SELECT seal_id, from_txid, to_txid, votes, merkle_root, leaves_hash, sealed_at::text, previous_hash, records_hash,
           salt, seal_hash
    FROM ONLY audit_seals WHERE seal_id >= %s ORDER BY seal_id
"""
SELECT_LAST_SEAL_ID = "SELECT coalesce(max(seal_id), 0) FROM ONLY audit_seals"
SELECT_LEAVES = "SELECT leaves FROM ONLY audit_seals WHERE seal_id = %s"

INSERT_SEAL = """
    INSERT INTO audit_seals
        (seal_id, from_txid, to_txid, votes, merkle_root, leaves_hash, sealed_at, previous_hash, records_hash,
         salt, seal_hash, leaves)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""

UPSERT_SEALED_TOTALS = """
    INSERT INTO sealed_totals AS so_far (law_id, oui_count, non_count)
    VALUES %s
    ON CONFLICT (law_id)
    DO UPDATE SET
        oui_count = so_far.oui_count + EXCLUDED.oui_count,
        non_count = so_far.non_count + EXCLUDED.non_count
"""

SELECT_TOTALS = "SELECT law_id, oui_count, non_count FROM ONLY vote_results"
SELECT_SEALED_TOTALS = "SELECT law_id, oui_count, non_count FROM ONLY sealed_totals"
SELECT_VOTES_NOT_SEALED = """
    SELECT law_id, choice, count(*), count(*) FILTER (WHERE txid >= %s OR txid < 1)
    FROM ONLY vote_audit WHERE txid >= %s OR txid < 1 GROUP BY 1, 2
"""

# Each certificate, whether its law is called certified, and the names of its members that do not say what the tables do
# (reconcile.certify writes them); and laws that are called certified and have none. Copies, rejected and unreadable
# messages may have become more since, and not fewer. The salt may be any, and earlier versions wrote none.
SELECT_CERTIFICATES = """
    WITH logged AS (
        SELECT law_id, max(recorded_at) AS last_recorded_at
        FROM ONLY vote_audit
        WHERE law_id IN (SELECT law_id FROM ONLY certified_results)
        GROUP BY law_id
    ),
    kept AS (
        SELECT 'duplicates' AS kind, law_id, reason, count(*) AS number
        FROM ONLY duplicate_attempts GROUP BY law_id, reason
        UNION ALL
        SELECT 'rejected', law_id, reason, count(*) FROM ONLY rejected_messages GROUP BY law_id, reason
    ),
    stated AS (
        SELECT *, CASE jsonb_typeof(certificate) WHEN 'object' THEN certificate ELSE '{}' END AS members
        FROM ONLY certified_results
    ),
    possible AS (
        SELECT law_id, kind,
               (SELECT coalesce(jsonb_object_agg(reason, least(stated_number, to_jsonb(number))), '{}')
                FROM jsonb_each(CASE jsonb_typeof(members->kind) WHEN 'object' THEN members->kind ELSE '{}' END)
                     AS counted (reason, stated_number)
                JOIN kept USING (reason)
                WHERE kept.law_id = stated.law_id AND kept.kind = kinds.kind AND stated_number >= '1') AS counts
        FROM stated
        CROSS JOIN (VALUES ('duplicates'), ('rejected')) AS kinds (kind)
    ),
    compared AS (
        SELECT law_id, final.oui_count, final.non_count, laws.status, members,
               jsonb_build_object(
                   'law_id', law_id, 'title', laws.title,
                   'oui', final.oui_count, 'non', final.non_count, 'total', final.oui_count + final.non_count,
                   'opens_at', to_char(CASE WHEN laws.opens_at BETWEEN '0002-01-01' AND '9999-01-01'
                                            THEN laws.opens_at END, %(form)s),
                   'closes_at', to_char(CASE WHEN laws.closes_at BETWEEN '0002-01-01' AND '9999-01-01'
                                             THEN laws.closes_at END, %(form)s),
                   'last_vote_recorded_at', to_char(logged.last_recorded_at, %(form)s),
                   'duplicates', copies.counts, 'rejected', refused.counts,
                   'unreadable_messages_of_all_laws', least(
                       greatest(members->'unreadable_messages_of_all_laws', '0'),
                       to_jsonb((SELECT coalesce(sum(number), 0) FROM kept WHERE kept.law_id IS NULL))),
                   'seal', concat(seal_id, ':', encode(seal_hash, 'hex')),
                   'certified_at', to_char(certified_at, %(form)s), 'certified_by', certified_by)
               || CASE WHEN members->>'salt' ~ '^[0-9a-f]{64}$' AND jsonb_typeof(members->'salt') = 'string'
                       THEN jsonb_build_object('salt', members->'salt') ELSE '{}' END AS expected
        FROM stated AS final
        JOIN possible AS copies USING (law_id)
        JOIN possible AS refused USING (law_id)
        LEFT JOIN ONLY laws USING (law_id)
        LEFT JOIN logged USING (law_id)
        LEFT JOIN ONLY audit_seals USING (seal_id)
        WHERE copies.kind = 'duplicates' AND refused.kind = 'rejected'
    )
    SELECT law_id, oui_count, non_count, coalesce(status = 'certified', false),
           array(SELECT key
                 FROM jsonb_each(members) AS said
                 FULL JOIN jsonb_each(expected) AS known USING (key)
                 WHERE said.value::text IS DISTINCT FROM known.value::text
                 ORDER BY key)
    FROM compared
    UNION ALL
    SELECT law_id, NULL, NULL, true, '{}'
    FROM ONLY laws
    WHERE status = 'certified' AND law_id NOT IN (SELECT law_id FROM ONLY certified_results)
    ORDER BY law_id
"""
ISO_FORM = 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'  # of SET_FORM's time zone

# Tables that are not as they were made: a view in the place of one, or child tables, whose rows a plain FROM reads too.
# (A function of the owner's with the name of a polymorphic one of PostgreSQL would go before it, and so hide them.)
SELECT_REPLACED = """
    SELECT name, coalesce(relkind = 'r', false),
           array(SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = pg_class.oid ORDER BY 1)
    FROM pg_catalog.unnest(%s) WITH ORDINALITY AS made (name, n)
    LEFT JOIN pg_class ON pg_class.oid = to_regclass(name)
    ORDER BY n
"""
TABLES = ["vote_audit", "vote_results", "audit_seals", "sealed_totals", "certified_results", "laws", "recounts"]
TABLES += ["duplicate_attempts", "rejected_messages"]

# What identifies a row, by table. Of two rows of one vote_id both are counted, and both agree with the totals.
KEYS = [
    ("vote_audit", "vote_id"),
    ("vote_audit", "law_id, voter_hash"),
    *((table, "law_id") for table in ("vote_results", "sealed_totals", "certified_results", "laws")),
    ("audit_seals", "seal_id"),
]
SELECT_KEYS_NOT_HELD = """
    SELECT of_table, key
    FROM ROWS FROM (pg_catalog.unnest(%s::text[]), pg_catalog.unnest(%s::text[]))
         WITH ORDINALITY AS made (of_table, key, n)
    WHERE NOT EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = to_regclass(of_table) AND indisunique AND indisvalid AND indexprs IS NULL
          AND (SELECT string_agg(attname, ', ' ORDER BY attname) FROM pg_attribute
               WHERE attrelid = indrelid AND attnum = ANY (indkey)) = key
          AND coalesce(pg_get_expr(indpred, indrelid), '')
              = CASE key WHEN 'law_id, voter_hash' THEN '(voter_hash IS NOT NULL)' ELSE '' END)
    ORDER BY n
"""
SELECT_TWICE = """
    SELECT *
    FROM (SELECT {key}, count(*) FROM ONLY {table}
          WHERE ({key}) IS NOT NULL GROUP BY {key} HAVING count(*) > 1) AS twice
    ORDER BY {key}
"""

# What people read, where it is not what the view of that name in init_db.sql makes of the tables. Percentages are not
# computed a second time: they are wrong where they say something false of these votes, by which function ever.
SELECT_SHOWN_OTHERWISE = """
    WITH shown AS (
        SELECT law_id,
               laws.title,
               CASE WHEN final.law_id IS NOT NULL THEN 'certified'
                    WHEN laws.status = 'closed' OR laws.closes_at <= now() THEN 'closed'
                    ELSE 'open' END AS status,
               coalesce(final.oui_count, vote_results.oui_count, 0) AS oui,
               coalesce(final.non_count, vote_results.non_count, 0) AS non,
               vote_results.updated_at
        FROM ONLY vote_results
        FULL JOIN ONLY laws USING (law_id)
        LEFT JOIN ONLY certified_results AS final USING (law_id)
    ),
    expected AS (
        SELECT law_id, title, status, oui, non, oui + non, updated_at, true
        FROM shown
    ),
    found AS (
        SELECT law_id, title, status, oui_count, non_count, total_count, updated_at,
               CASE total_count WHEN 0 THEN num_nonnulls(oui_percent, non_percent) = 0
               ELSE oui_percent + non_percent = 100
                    AND 2 * abs(100 * oui_count::numeric - oui_percent * total_count)
                        <= total_count * ('1e-' || scale(oui_percent))::numeric
                    AND scale(oui_percent) >= 2
                    AND (oui_percent = 0, non_percent = 0) = (oui_count = 0, non_count = 0)
                    AND sign(oui_percent - non_percent) = sign(oui_count - non_count)
               END AS has_true_percentages
        FROM vote_statistics
    )
    SELECT DISTINCT law_id
    FROM ((TABLE expected EXCEPT ALL TABLE found) UNION ALL (TABLE found EXCEPT ALL TABLE expected)) AS differing
    ORDER BY law_id
"""
SELECT_TXID_OF_VOTE = "SELECT txid FROM ONLY vote_audit WHERE vote_id = %s"
SELECT_SEAL_OF_TXID = "SELECT min(seal_id) FROM ONLY audit_seals WHERE to_txid > %s"  # none: NULL, and so no seal


class Problem(NamedTuple):
    """Something in the log that is not as it was sealed; ``seal_id`` is None where it is outside of all seals."""

    seal_id: int | None
    text: str


@dataclass
class Verification:
    """What a look at the whole log found. ``problems`` are in the order of the log, the first wrong place first."""

    problems: list[Problem] = field(default_factory=list)
    seals: int = 0
    sealed_votes: int = 0
    votes_not_sealed: int = 0
    records_not_sealed: int = 0  # certificates and recounts
    head: Seal | None = None


class _Lines:
    """Takes the rows of a COPY, one a call of ``write``."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.write = self.lines.append  # for speed: no call of Python's for a row


class _Rows:
    """Takes the rows of a COPY; what a seal needs of them is made in one pass over all.

    ``on_full`` is called, with the transaction id that the next row has, when there are ``limit`` rows or more and a
    transaction ends.
    """

    def __init__(self, limit: int, on_full: Callable[[int], None]) -> None:
        self._limit = limit
        self._on_full = on_full
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        if len(self.lines) >= self._limit:
            txid = _txid(line)
            if txid != _txid(self.lines[-1]):
                self._on_full(txid)
        self.lines.append(line)

    def take(self) -> _Range:
        """What was written, and begin anew."""
        lines, self.lines = self.lines, []
        return _Range(lines)


def _txid(line: bytes) -> int:
    return int(line[line.rindex(b"\t") + 1 :])


class _Range:
    """The rows of a seal, computed: the hash of each, its vote_id, and how many there are by law and choice."""

    def __init__(self, lines: list[bytes]) -> None:
        sha256 = hashlib.sha256
        self.hashes = [sha256(b"\0" + line[:-1]).digest() for line in lines]
        self.votes = [line[:36] for line in lines]  # as text
        choices = Counter([line[37 : line.index(b"\t", line.index(b"\t", 37) + 1)] for line in lines])
        self.counts: Counts = Counter()
        for key, votes in choices.items():
            law_id, choice = key.split(b"\t")
            self.counts[law_id, choice] = votes

    def totals(self) -> dict[str, tuple[int, int]]:
        """The (oui, non) of each law, sorted."""
        return dict(sorted(_by_law(self.counts).items()))

    def leaves(self) -> bytes:
        """What is kept of each row in its seal, to find the row that differs."""
        ids = bytes.fromhex(b"".join(self.votes).decode().replace("-", ""))
        return b"".join([ids[16 * at : 16 * at + 16] + leaf[:8] for at, leaf in enumerate(self.hashes)])


@contextmanager
def transaction(conn: connection) -> Iterator[cursor]:
    """A transaction in the form of SET_FORM: commits at the end of the block, rolls back where it raises."""
    if conn.encoding != "UTF8":  # of the client, which does not hear what SET_FORM sets
        conn.set_client_encoding("UTF8")
    with conn, conn.cursor() as cur:
        cur.execute(SET_FORM)
        yield cur


def one_row(cur: cursor) -> tuple[Any, ...]:
    """The row of a statement that always has one."""
    row = cur.fetchone()
    assert row is not None
    return row


@contextmanager
def sealing_session(url: str, **arguments: Any) -> Iterator[tuple[connection, connection]]:
    """Two connections for ``seal``: one reads the log in one snapshot, the other writes a seal at a time."""
    reader = psycopg2.connect(url, **arguments)
    try:
        writer = psycopg2.connect(url, **arguments)
        try:
            reader.set_session(isolation_level="REPEATABLE READ", readonly=True)
            yield reader, writer
        finally:
            writer.close()
    finally:
        reader.close()


class AnotherSealer(Exception):
    """Another process holds the sealer's lock; ``holder`` says which, as ``held_up`` does."""

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__("another process is sealing, or holds the lock of sealed_totals")
        self.holder = holder


def seal(
    reader: connection, writer: connection, votes_a_seal: int = VOTES_A_SEAL, also_without_votes: bool = False
) -> list[Seal]:
    """Seal all rows of transactions that are over; no seal is made where there are none.

    ``also_without_votes``: then one is made all the same, unless no transaction at all is over since the one before;
    and their time, which is public while numbers are not, is the second in which this began, not when all was read.

    Any number may try at once: who does not get its turn within 2 s gets AnotherSealer. Replicas that count are not
    held up. Raises psycopg2.Error; what is sealed by then stays, and the next call goes on from there.
    """
    made: list[Seal] = []

    def finish(to_txid: int) -> None:
        before = made[-1] if made else newest
        with transaction(writer) as cur:
            made.append(_write_seal(cur, before, to_txid, rows.take(), began_at))

    rows = _Rows(votes_a_seal, finish)
    with transaction(reader) as cur:
        try:
            cur.execute(BECOME_THE_SEALER)
        except psycopg2.errors.LockNotAvailable:
            with transaction(writer) as writer_cur:
                writer_cur.execute(SELECT_LOCK_HOLDER)
                raise AnotherSealer(_holder(writer_cur)) from None
        with transaction(writer) as writer_cur:
            newest = head(writer_cur)  # of now: the reader's snapshot may be older than the last sealer's end
        cur.execute("SELECT date_trunc('second', now())::text")
        began_at = one_row(cur)[0] if also_without_votes else None
        cur.execute(SELECT_HORIZON)
        horizon, _ = one_row(cur)
        from_txid = newest.to_txid if newest else 0
        _copy_rows(cur, from_txid, horizon, rows)
        from_txid = made[-1].to_txid if made else from_txid
        is_wanted = also_without_votes and not made and horizon > from_txid
        if rows.lines or is_wanted or _copy_records(cur, from_txid, horizon):
            finish(horizon)
    return made


def held_up(conn: connection) -> dict[str, Any] | None:
    """Which transaction keeps what is committed from being sealed, if one does: its id, and whose it is.

    That is ``pid``, ``role``, ``application``, ``database`` and ``since``; None where it has none (a prepared
    transaction has no pid) or has just ended. Raises psycopg2.Error.
    """
    with transaction(conn) as cur:
        cur.execute(SELECT_HORIZON)
        horizon, next_txid = one_row(cur)
        cur.execute(SELECT_IS_WAITING, {"txid": horizon})
        if horizon == next_txid or not one_row(cur)[0]:
            return None
        cur.execute(SELECT_XID_HOLDER, {"txid": horizon})
        return {"transaction": horizon, **_holder(cur)}


def _holder(cur: cursor) -> dict[str, Any]:
    pid, role, application, database, since = cur.fetchone() or (None, None, None, None, None)
    if pid is not None and since is None:
        since = "not shown to this role (it lacks pg_read_all_stats)"
    return {"pid": pid, "role": role, "application": application, "database": database, "since": since}


def _write_seal(cur: cursor, before: Seal | None, to_txid: int, rows: _Range, at: str | None = None) -> Seal:
    leaves = rows.leaves()
    from_txid = before.to_txid if before else 0
    records = _copy_records(cur, from_txid, to_txid)
    cur.execute("SELECT now()::text")
    made = Seal(
        seal_id=before.seal_id + 1 if before else 1,
        from_txid=from_txid,
        to_txid=to_txid,
        votes=len(rows.hashes),
        merkle_root=merkle_root(rows.hashes),
        leaves_hash=hashlib.sha256(leaves).digest(),
        sealed_at=at or one_row(cur)[0],
        previous_hash=before.hash() if before else NO_HASH,
        records_hash=hashlib.sha256(b"".join(records)).digest(),
        salt=secrets.token_bytes(32),
    )
    cur.execute(INSERT_SEAL, (*(getattr(made, item.name) for item in fields(made)), made.hash(), leaves))
    execute_values(cur, UPSERT_SEALED_TOTALS, [(law, *counts) for law, counts in rows.totals().items()])
    return made


def _copy_rows(cur: cursor, from_txid: int, to_txid: int, rows: _Rows | _Lines) -> None:
    cur.copy_expert(COPY_ROWS.format(from_txid=int(from_txid), to_txid=int(to_txid)), rows)


def _copy_records(cur: cursor, from_txid: int, to_txid: int) -> list[bytes]:
    copied = _Lines()
    for statement in COPY_RECORDS:
        cur.copy_expert(statement.format(from_txid=int(from_txid), to_txid=int(to_txid)), copied)
    return copied.lines


def head(cur: cursor) -> Seal | None:
    """The newest seal, None where there is none."""
    cur.execute(SELECT_LAST_SEAL_ID)
    last = _seals(cur, one_row(cur)[0])
    return last[0][0] if last else None


def _seals(cur: cursor, from_seal_id: int) -> list[tuple[Seal, bytes]]:
    """Each seal from that number on, with the hash that stands with it."""
    cur.execute(SELECT_SEALS, (from_seal_id,))
    return [
        (
            Seal(
                *(seal_id, start, end, votes, bytes(root), bytes(leaves_hash), sealed_at, bytes(before)),
                *(None if value is None else bytes(value) for value in (records, salt)),
            ),
            bytes(stored_hash),
        )
        for seal_id, start, end, votes, root, leaves_hash, sealed_at, before, records, salt, stored_hash in cur
    ]


def verify(
    conn: connection, published: Sequence[str] = (), from_seal_id: int = 1, workers: int | None = None
) -> Verification:
    """Compute the whole log anew, in one snapshot: each seal, the chain, each row, the totals, and the certificates.

    ``published`` are seals (number:hash) as they were published: each must be in the chain. ``from_seal_id`` leaves the
    rows of earlier seals unread, which is faster and finds nothing there. ``conn`` is in REPEATABLE READ. ``workers``
    is how many processes share the rows, this one among them, each with a connection; unset: one for each core of this
    machine, 4 at most, where there are rows enough. Raises psycopg2.Error, and ValueError where a published seal is
    malformed.
    """
    anchors = {parse_name(name) for name in published}
    found = Verification()
    with transaction(conn) as cur, _Computing(cur, workers) as computing:
        before: Seal | None = None
        cur.execute(SORT_IN_MEMORY)
        chain = _seals(cur, 1)
        computing.begin([made for made, _ in chain if made.seal_id >= from_seal_id])
        twice = rows_there_twice(cur)  # meanwhile: of all that the database computes alone it takes longest
        records = [(_txid(line), line) for line in _copy_records(cur, *ALL_TXIDS)]
        computing.finish()
        for made, stored_hash in chain:
            expected_id = before.seal_id + 1 if before else 1
            if made.seal_id != expected_id:
                found.problems.append(Problem(expected_id, f"seal {expected_id} is missing"))
            else:
                found.problems += _check_chain(made, stored_hash, before)
            of_this_number = {anchor for anchor in anchors if anchor[0] == made.seal_id}
            anchors -= of_this_number
            if of_this_number - {(made.seal_id, made.hash().hex())}:
                found.problems.append(Problem(made.seal_id, f"seal {made.seal_id} is not the one that was published"))
            found.problems += computing.problems.get(made, [])
            if made.records_hash is not None:
                of_this_seal = [line for txid, line in records if made.from_txid <= txid < made.to_txid]
                records = [(txid, line) for txid, line in records if not made.from_txid <= txid < made.to_txid]
                if hashlib.sha256(b"".join(of_this_seal)).digest() != made.records_hash:
                    found.problems.append(_changed_records(made, of_this_seal))
            found.seals += 1
            before = made
        found.head = before
        found.sealed_votes = computing.counts.total()
        for seal_id, _ in sorted(anchors):
            found.problems.append(Problem(seal_id, f"seal {seal_id}, which was published, is missing"))
        found.problems += _check_end(cur, found, computing.counts, records, twice, whole=from_seal_id <= 1)
    return found


class _Computing:
    """The rows of seals, computed by this process and helpers that take their turns; ``with`` ends the helpers.

    Whatever keeps a helper from helping (a server that gives no second connection, a pooler that has none, a role that
    may not export its snapshot) costs time alone: this process takes every seal that nobody else has.
    """

    def __init__(self, cur: cursor, workers: int | None) -> None:
        """``cur`` is in a transaction that has read nothing yet."""
        self._cur = cur
        self._workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS) if workers is None else workers
        self._is_asked_for = workers is not None
        self._snapshot: str | None = None
        self._todo: deque[Seal] = deque()
        self._lock = threading.Lock()
        self._helpers: list[_Helper] = []
        self._threads: list[threading.Thread] = []
        self.problems: dict[Seal, list[Problem]] = {}
        self.counts: Counts = Counter()

    def __enter__(self) -> _Computing:
        if self._workers > 1:
            try:
                self._cur.execute("SELECT pg_export_snapshot()")
                self._snapshot = one_row(self._cur)[0]
            except psycopg2.DatabaseError:
                self._cur.connection.rollback()  # nothing was read yet, so that another snapshot is as good
                self._cur.execute(SET_FORM)
        return self

    def __exit__(self, *_: object) -> None:
        self._todo.clear()
        for helper in self._helpers:
            helper.end()
        for thread in self._threads:
            thread.join()
        for helper in self._helpers:
            helper.close()

    def begin(self, chain: Sequence[Seal]) -> None:
        """Have helpers begin with the rows of these seals."""
        self._todo.extend(chain)
        is_worth_it = self._is_asked_for or sum(made.votes for made in chain) > WORTH_A_HELPER
        for _ in range(self._workers - 1 if self._snapshot and is_worth_it else 0):
            helper = _Helper(self._cur.connection, self._snapshot)
            self._helpers.append(helper)
            self._threads.append(threading.Thread(target=self._be_helped, args=(helper,), name="verify-helper"))
            self._threads[-1].start()

    def finish(self) -> None:
        """Compute what nobody has taken, until all is computed."""
        while True:
            self._compute(lambda made: _compute(self._cur, made))
            for helper in self._helpers:
                if not helper.is_ready:  # it may be waiting for a connection that we hold
                    helper.end()
            for thread in self._threads:
                thread.join()
            if not self._todo:
                return

    def _be_helped(self, helper: _Helper) -> None:
        if helper.wait_ready():
            self._compute(helper.compute)

    def _compute(self, compute: Callable[[Seal], _Computed | None]) -> None:
        while True:
            try:
                made = self._todo.popleft()
            except IndexError:
                return
            computed = compute(made)
            if computed is None:
                self._todo.append(made)
                return
            with self._lock:
                self.problems[made] = computed.problems
                self.counts.update(computed.counts)


class _Computed(NamedTuple):
    """What came of the rows of one seal."""

    problems: list[Problem]
    counts: Counts


def _compute(cur: cursor, made: Seal) -> _Computed:
    copied = _Lines()
    _copy_rows(cur, made.from_txid, made.to_txid, copied)
    rows = _Range(copied.lines)
    cur.execute(SELECT_LEAVES, (made.seal_id,))
    return _Computed(_check_rows(made, rows, bytes(one_row(cur)[0])), rows.counts)


class _Helper:
    """A process that computes seals in our snapshot, on a connection of its own. It ends when we do, however we end."""

    def __init__(self, conn: connection, snapshot: str | None) -> None:
        self.is_ready = False
        # in a session of its own, so that Ctrl-C is ours to handle
        command = [sys.executable, "-c", "import seals; seals.help_to_verify()"]
        self._process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # the server that we are connected to: of several, another may not know the snapshot
        server = {"host": conn.info.host, "port": conn.info.port, "password": conn.info.password}
        self._ask((conn.info.dsn_parameters | server, snapshot))

    def wait_ready(self) -> bool:
        """Whether it has the snapshot; False where it never will."""
        self.is_ready = self._answer() is True
        return self.is_ready

    def compute(self, made: Seal) -> _Computed | None:
        """What came of the seal's rows; None where it is gone."""
        self._ask(made)
        computed: _Computed | None = self._answer()
        return computed

    def end(self) -> None:
        """End it, whatever it does. May be called more than once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close what is left of one that was ended, when nobody reads from it any more."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was to be sent has nowhere to go
                pipe.close()

    def _ask(self, question: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: there will be no answer
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            return None


def help_to_verify() -> None:
    """What a helper does: read on standard input how to connect and what to compute, answer on standard output."""
    parameters, snapshot = pickle.load(sys.stdin.buffer)
    conn = psycopg2.connect(**parameters)
    conn.set_session(isolation_level="REPEATABLE READ", readonly=True)
    with transaction(conn) as cur:
        cur.execute("SET TRANSACTION SNAPSHOT %s", (snapshot,))
        cur.execute(SORT_IN_MEMORY)
        answer: object = True
        while True:
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            answer = _compute(cur, pickle.load(sys.stdin.buffer))


def parse_name(name: str) -> tuple[int, str]:
    """Number and hash of a published seal. Raises ValueError where it is none."""
    seal_id, _, digest = name.strip().partition(":")
    if not seal_id.isdecimal() or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{name!r} is no seal: a number, a colon and 64 hexadecimal digits are")
    return int(seal_id), digest


def _check_chain(made: Seal, stored_hash: bytes, before: Seal | None) -> list[Problem]:
    if made.hash() != stored_hash:
        return [Problem(made.seal_id, f"seal {made.seal_id} was altered: its hash is not that of its fields")]
    if made.previous_hash != (before.hash() if before else NO_HASH):
        return [
            Problem(made.seal_id, f"the chain is cut: seal {made.seal_id} does not hold the hash of the one before")
        ]
    if made.salt is not None and (made.records_hash is None or len(made.salt) != 32):
        return [Problem(made.seal_id, f"seal {made.seal_id} has a salt that no format has")]
    if before and made.format < before.format:
        return [Problem(made.seal_id, f"seal {made.seal_id} is of an earlier format than the one before")]
    if made.from_txid != (before.to_txid if before else 0):
        return [Problem(made.seal_id, f"the range of seal {made.seal_id} does not begin where the one before ends")]
    return []


def _check_rows(made: Seal, rows: _Range, kept: bytes) -> list[Problem]:
    """Compare the rows of a range with its seal, and name the first that differs."""
    is_kept = hashlib.sha256(kept).digest() == made.leaves_hash
    if merkle_root(rows.hashes) == made.merkle_root and len(rows.hashes) == made.votes:
        return [] if is_kept else [Problem(made.seal_id, f"the leaves kept with seal {made.seal_id} were altered")]
    if not is_kept:
        text = f"rows of seal {made.seal_id} were altered, and so were its leaves, which would tell which row it is"
        return [Problem(made.seal_id, text)]
    sealed = [kept[at : at + LEAF_BYTES] for at in range(0, len(kept) - LEAF_BYTES + 1, LEAF_BYTES)]
    here = rows.leaves()
    found = [here[at : at + LEAF_BYTES] for at in range(0, len(here), LEAF_BYTES)]
    index = next((i for i, pair in enumerate(zip(sealed, found, strict=False)) if pair[0] != pair[1]), None)
    if index is None and len(sealed) == len(found):
        return [
            Problem(made.seal_id, f"seal {made.seal_id} was altered: its root is not that of the rows it was made of")
        ]
    if index is None:
        index = min(len(sealed), len(found))
    where = f"seal {made.seal_id}, row {index + 1}"
    was = _vote_id(sealed[index]) if index < len(sealed) else None
    now = _vote_id(found[index]) if index < len(found) else None
    ids_sealed, ids_found = [*map(_vote_id, sealed)], [*map(_vote_id, found)]
    removed = sorted({*ids_sealed} - {*ids_found}, key=ids_sealed.index)
    added = {*ids_found} - {*ids_sealed}
    if was in removed:
        text = f"vote {was} was removed" + f", vote {now} was slipped in" * (now in added)
    elif now in added:
        text = f"vote {now} was slipped in" + (f", vote {removed[0]} was removed" if removed else "")
    else:
        text = f"vote {was} was altered"
    return [Problem(made.seal_id, f"{where}: {text}")]


def _changed_records(made: Seal, found: list[bytes]) -> Problem:
    what = ", ".join(map(_record, found)) or "none"
    text = f"seal {made.seal_id}: the certificates and recounts are not those that were sealed; now there are: {what}"
    return Problem(made.seal_id, text)


def _record(line: bytes) -> str:
    """What names a certificate or a recount: its kind, and its law or its number."""
    kind, key, *_ = line.split(b"\t", 2)
    return f"{kind.decode()} {ascii(_from_copy(key))[1:-1]}"


def _vote_id(leaf: bytes) -> str:
    return str(uuid.UUID(bytes=leaf[:16]))


def _check_end(
    cur: cursor,
    found: Verification,
    totals: Counts,
    records: list[tuple[int, bytes]],
    twice: Iterable[str],
    whole: bool,
) -> list[Problem]:
    """What is not sealed yet, ``records`` among it, what is there ``twice``, and whether the totals are the log's."""
    problems = []
    cur.execute(SELECT_HORIZON)
    _, next_txid = one_row(cur)
    sealed_to = found.head.to_txid if found.head else 0
    for txid, line in records:
        if sealed_to <= txid < next_txid:
            found.records_not_sealed += 1
        else:
            problems.append(Problem(None, f"{_record(line)} bears the id of a transaction that cannot be"))
    if sealed_to > next_txid:
        problems.append(Problem(None, "transaction ids are lower than the sealed ones, as after a restore from a dump"))
    problems += _check_what_is_read(cur)
    problems += [Problem(None, text) for text in twice]
    cur.execute(SELECT_VOTES_NOT_SEALED, (next_txid, sealed_to))
    of_the_future = 0
    tail: Counts = Counter()
    for law_id, choice, votes, ahead in cur.fetchall():
        tail[_as_copy(law_id), choice.encode()] += votes
        of_the_future += ahead
    found.votes_not_sealed = tail.total()
    if of_the_future:
        problems.append(Problem(None, f"{of_the_future} rows bear the id of a transaction that cannot be"))
    if whole:
        cur.execute(SELECT_SEALED_TOTALS)
        problems += _differences("sealed_totals", cur.fetchall(), totals)
        cur.execute(SELECT_TOTALS)
        problems += _differences("vote_results", cur.fetchall(), totals + tail)
        problems += _check_certificates(cur, totals + tail)
    return problems


def rows_there_twice(cur: cursor) -> list[str]:
    """A sentence for each unique index that is gone, and for what identifies one row and has several."""
    cur.execute(SELECT_KEYS_NOT_HELD, tuple(map(list, zip(*KEYS, strict=True))))
    problems = [f"{table} has no unique index on {key}: rows may be there twice" for table, key in cur.fetchall()]
    for table, key in KEYS:
        cur.execute(SELECT_TWICE.format(table=table, key=key))
        for first, *_, rows in cur.fetchmany(20):
            problems.append(f"{table}, rows of one {key}: {first} {rows}")
    return problems


def _check_what_is_read(cur: cursor) -> list[Problem]:
    """Whether tables are tables of their own, and whether the view shows what they hold."""
    problems = []
    cur.execute(SELECT_REPLACED, (TABLES,))
    for table, is_table, children in cur.fetchall():
        if not is_table:
            problems.append(Problem(None, f"{table} is no table"))
        elif children:
            problems.append(Problem(None, f"{table} has child tables, whose rows pass for its own: {children}"))
    cur.execute("SAVEPOINT view")
    try:
        cur.execute(SELECT_SHOWN_OTHERWISE)
    except psycopg2.errors.InsufficientPrivilege:
        raise
    except (psycopg2.ProgrammingError, psycopg2.DataError, psycopg2.InternalError) as exc:
        problems.append(Problem(None, f"vote_statistics is not the view that it was: SQLSTATE {exc.pgcode}"))
    else:
        for (law_id,) in cur.fetchall():
            problems.append(Problem(None, f"vote_statistics, law {law_id}: it does not show what the tables hold"))
    cur.execute("ROLLBACK TO SAVEPOINT view")  # also of what it may have set in this session
    return problems


def _check_certificates(cur: cursor, counted: Counts) -> list[Problem]:
    """Each certificate against the log, its law, and the seal it names; and that each certified law has one."""
    cur.execute(SELECT_CERTIFICATES, {"form": ISO_FORM})
    log = _by_law(counted)
    problems = []
    for law_id, oui, non, is_called_certified, differing in cur.fetchall():
        faults = []
        if oui is None:
            faults.append("it is called certified and has no certificate")
        elif (oui, non) != log.get(law_id, (0, 0)):
            faults.append("oui {}, non {}, but the log has oui {}, non {}".format(oui, non, *log.get(law_id, (0, 0))))
        if differing:
            faults.append(f"the certificate does not say what the tables do: {', '.join(map(ascii, differing))}")
        if not is_called_certified:
            faults.append("the law is not called certified")
        if faults:
            problems.append(Problem(None, f"certified_results, law {law_id}: {'; '.join(faults)}"))
    return problems


def _by_law(counted: Counts) -> dict[str, tuple[int, int]]:
    laws = {law for law, _ in counted}
    return {_from_copy(law): (counted[law, b"oui"], counted[law, b"non"]) for law in laws}


# What stands for a byte in COPY's text: x and hexadecimal digits, octal digits, or one character. COPY writes only the
# last kind, of those in _ESCAPED; any other character stands for itself.
_escapes = re.compile(rb"\\(?:x([0-9A-Fa-f]{1,2})|([0-7]{1,3})|(.))", re.DOTALL)
_ESCAPED = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v", "\\": "\\\\"}
_UNESCAPED = {escape[1:].encode(): character.encode() for character, escape in _ESCAPED.items()}
_AS_COPY = str.maketrans(_ESCAPED)


def _from_copy(text: bytes) -> str:
    """A law_id as it is in the table; only an insider's can hold what COPY escapes."""
    return _escapes.sub(_unescaped, text).decode()


def _unescaped(escape: re.Match[bytes]) -> bytes:
    hexadecimal, octal, character = escape.groups()
    if character is not None:
        return _UNESCAPED.get(character, character)
    return bytes([int(hexadecimal, 16) if hexadecimal else int(octal, 8) & 0xFF])


def _as_copy(text: str) -> bytes:
    """The inverse of ``_from_copy``, as COPY writes it."""
    return text.translate(_AS_COPY).encode()


def _differences(table: str, stored: list[tuple[str, int, int]], counted: Counts) -> list[Problem]:
    in_table = {law_id: (oui, non) for law_id, oui, non in stored}
    in_log = _by_law(counted)
    return [
        Problem(
            None, f"{table}, law {law}: oui {here[0]}, non {here[1]}, but the log has oui {logged[0]}, non {logged[1]}"
        )
        for law in sorted(in_table.keys() | in_log.keys())
        for here, logged in [(in_table.get(law, (0, 0)), in_log.get(law, (0, 0)))]
        if here != logged
    ]


def export(cur: cursor) -> dict[str, Any]:
    """What another verifier needs beside the rows of the log: ``seals``, ``records``, totals, and the next id.

    Of ``totals`` and ``sealed_totals`` each is (oui, non) by law. A transaction of ``next_txid`` or above cannot be.
    Raises psycopg2.Error.
    """
    cur.execute(SELECT_HORIZON)
    _, next_txid = one_row(cur)
    chain = [{**made.as_texts(), "seal_hash": stored_hash.hex()} for made, stored_hash in _seals(cur, 1)]
    records = [line[:-1].decode() for line in _copy_records(cur, *ALL_TXIDS)]
    exported: dict[str, Any] = {"next_txid": str(next_txid), "seals": chain, "records": records}
    for name, statement in (("totals", SELECT_TOTALS), ("sealed_totals", SELECT_SEALED_TOTALS)):
        cur.execute(statement)
        exported[name] = {law_id: counts for law_id, *counts in sorted(cur.fetchall())}
    return exported


def prove(conn: connection, vote_id: str) -> dict[str, Any]:
    """An inclusion proof for a counted vote, for ``check_proof``: its row, the path to the root, the seals to the head.

    Raises LookupError, with the reason, where the vote is not in the log, not sealed yet, or the log does not match its
    seal any more; psycopg2.Error.
    """
    with transaction(conn) as cur:
        cur.execute(SELECT_TXID_OF_VOTE, (vote_id,))
        row = cur.fetchone()
        if row is None:
            raise LookupError(f"vote {vote_id} is not in the audit log: it was not counted")
        cur.execute(SELECT_SEAL_OF_TXID, row)
        chain = [made for made, _ in _seals(cur, one_row(cur)[0])]
        if not chain:
            raise LookupError(f"vote {vote_id} is counted, but not sealed yet")
        copied = _Lines()
        _copy_rows(cur, chain[0].from_txid, chain[0].to_txid, copied)
        lines = copied.lines
        rows = _Range(lines)
    index = next((at for at, found in enumerate(rows.votes) if found == vote_id.encode()), None)
    if index is not None:  # else it bears a txid that is in no range
        path = merkle_path(rows.hashes, index)
    if index is None or root_from_path(rows.hashes[index], index, chain[0].votes, path) != chain[0].merkle_root:
        raise LookupError(f"the log does not match seal {chain[0].seal_id} any more: see verify")
    return {
        "vote_id": vote_id,
        "row": lines[index][:-1].decode(),
        "index": index,
        "path": [step.hex() for step in path],
        "seals": [made.as_texts() for made in chain],
    }
