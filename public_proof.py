"""What the results page publishes of the proof: the chain of seals, the newest of them, and the certificates' hashes.

It is given a function that reads rows. Of a vote, and of a law that is open and hidden, nothing is told (docs/AUDIT.md,
"What is published").
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from seals import Seal

logger = logging.getLogger(__name__)

MOST_SEALS = 10_000  # the newest: a week of one a minute
MOST_CERTIFICATES = 1_000
MOST_BYTES = 65_536  # of a certificate, as init_db.sql has it; rows of before may have more
SEALS_AT_ONCE, CERTIFICATES_AT_ONCE = 500, 20  # so many are in memory together, as more than what is published of them

# Seals are only added, so that those that are known are not read again; nor are their leaves, which hold every vote_id.
# The time in the form that a seal's hash has it in, whatever this session's settings are.
SELECT_NEW_SEALS = r"""
    SELECT seal_id, from_txid, to_txid, votes, merkle_root, leaves_hash,
           regexp_replace(to_char(sealed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), '\.?0+$', '') || '+00',
           previous_hash, records_hash, salt, seal_hash
    FROM ONLY audit_seals
    WHERE seal_id > greatest(%(known)s, (SELECT max(seal_id) FROM ONLY audit_seals) - %(most)s)
    ORDER BY seal_id LIMIT %(at_once)s
"""
# A law without a row of the operator's is open. Where no law has one, there may be votes at any moment.
SELECT_HAS_OPEN_LAW = """
    SELECT EXISTS (SELECT FROM vote_statistics WHERE status = 'open') OR NOT EXISTS (SELECT FROM ONLY laws)
"""
# They are only added, too. One that is too large, or of a moment that no calendar has, is none that `certify` has made.
# (What is large as it is stored is not even unpacked.)
COUNT_CERTIFICATES = "SELECT count(*) FROM ONLY certified_results"
SELECT_CERTIFICATES = """
    SELECT law_id, left(certified_by, 1000),
           to_char(certified_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), certificate::text
    FROM ONLY certified_results
    WHERE law_id > %(after)s AND certified_at >= '0002-01-01' AND certified_at < '9999-01-01'
      AND CASE WHEN pg_column_size(certificate) <= 4 * %(most_bytes)s
          THEN octet_length(certificate::text) <= %(most_bytes)s END
    ORDER BY law_id LIMIT %(most)s
"""
# A seal's number of votes, and its range of transactions, which tells about how many batches there were, are numbers of
# the laws that were open then. The salt would let both be found from the hash by trying, of a seal without votes.
WITHOUT_NUMBERS = ("seal_id", "sealed_at", "previous_hash", "seal_hash")


class PublicProof:
    """The latest of it. ``refresh`` reads what is new; what was read stays where that fails."""

    def __init__(
        self, read: Callable[[str, Any], list[tuple[Any, ...]]], unavailable: type[Exception], hides_open: bool = False
    ) -> None:
        """``read`` returns the rows of a statement with such values, or raises ``unavailable``.

        ``hides_open``: of the seals nothing but hashes and times is told while any law is open.
        """
        self._read = read
        self._unavailable = unavailable
        self._hides_open = hides_open
        self._chain: deque[bytes] = deque(maxlen=MOST_SEALS)  # each as JSON, which takes a third of the memory
        self._certificates: list[dict[str, str]] = []
        self._certificates_made = 0
        self._shows_numbers: bool | None = None
        self._is_failing = False
        self.summary: dict[str, Any] | None = None
        self.chain_json: bytes | None = None

    def refresh(self) -> None:
        """Read what is new. Raises nothing."""
        try:
            self._refresh()
        except Exception as exc:
            if not self._is_failing:
                unforeseen = None if isinstance(exc, self._unavailable) else exc  # a bug must not end the readings
                fields = {"error": str(exc)}
                logger.warning("seals cannot be read for the page", extra={"fields": fields}, exc_info=unforeseen)
            self._is_failing = True
        else:
            self._is_failing = False

    def _refresh(self) -> None:
        has_more = self._read_seals()
        shows_numbers = not (self._hides_open and self._read(SELECT_HAS_OPEN_LAW, None)[0][0])
        made = self._read(COUNT_CERTIFICATES, None)[0][0]
        if made != self._certificates_made:
            self._certificates, self._certificates_made = self._read_certificates(), made
        if has_more or shows_numbers != self._shows_numbers:
            self._shows_numbers = shows_numbers
            shown = self._chain if shows_numbers else map(_without_numbers, self._chain)
            self.chain_json = b'{"shows_numbers":%b,"seals":[%b]}\n' % (_json(shows_numbers), b",".join(shown))
        newest = json.loads(self._chain[-1]) if self._chain else None
        self.summary = newest and {
            "seal": f"{newest['seal_id']}:{newest['seal_hash']}",
            "sealed_at": newest["sealed_at"].replace(" ", "T").replace("+00", "Z"),
            "certificates": self._certificates,
        }

    def _read_seals(self) -> bool:
        """Those that are new, some at a time. Returns whether there are any."""
        has_more = False
        while True:
            known = int(json.loads(self._chain[-1])["seal_id"]) if self._chain else 0
            values = {"known": known, "most": MOST_SEALS, "at_once": SEALS_AT_ONCE}
            rows = self._read(SELECT_NEW_SEALS, values)
            self._chain.extend([_json(_published(*row)) for row in rows])
            has_more = has_more or bool(rows)
            if len(rows) < SEALS_AT_ONCE:
                return has_more

    def _read_certificates(self) -> list[dict[str, str]]:
        """Those of the first laws, a few at a time: of each nothing but its hash is kept."""
        found: list[dict[str, str]] = []
        after = ""
        while len(found) < MOST_CERTIFICATES:
            values = {"after": after, "most": CERTIFICATES_AT_ONCE, "most_bytes": MOST_BYTES}
            rows = self._read(SELECT_CERTIFICATES, values)
            found += filter(None, (_certificate(*row) for row in rows))
            if len(rows) < CERTIFICATES_AT_ONCE:
                break
            after = rows[-1][0]
        return found


def _published(*row: Any) -> dict[str, str]:
    """A seal in the form of a proof's, and its hash as it stands in the table."""
    values: list[Any] = [bytes(value) if isinstance(value, memoryview) else value for value in row]
    return {**Seal(*values[:-1]).as_texts(), "seal_hash": values[-1].hex()}


def _without_numbers(seal: bytes) -> bytes:
    fields = json.loads(seal)
    return _json({name: fields[name] for name in WITHOUT_NUMBERS})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _certificate(law_id: str, certified_by: str, certified_at: str, certificate: str) -> dict[str, str] | None:
    """None where the certificate is none that Python reads: one that is nested deep, or has numbers of any length."""
    try:
        sha256 = certificate_hash(json.loads(certificate))
    except (ValueError, RecursionError):
        return None
    return {"law_id": law_id, "certified_by": certified_by, "certified_at": certified_at, "sha256": sha256}


def certificate_hash(certificate: dict[str, Any]) -> str:
    """SHA-256 of a certificate as JSON without blanks, its members sorted by name, in UTF-8."""
    text = json.dumps(certificate, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
