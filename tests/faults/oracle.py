"""Says whether a vote was lost or counted twice, from the publisher's ledger and what stands in the database.

It asks the servers directly, never through a proxy, and trusts nothing that the service says of itself.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2

from tests.harness import Results

# One statement is one snapshot: totals beside the fold of the audit log, where they differ.
DIFFERENCES = """
    SELECT law_id, coalesce(oui_count, 0), coalesce(non_count, 0), coalesce(oui, 0), coalesce(non, 0)
    FROM vote_results
    FULL JOIN (SELECT law_id, count(*) FILTER (WHERE choice = 'oui') AS oui,
                      count(*) FILTER (WHERE choice = 'non') AS non
               FROM vote_audit GROUP BY law_id) AS fold USING (law_id)
    WHERE (coalesce(oui_count, 0), coalesce(non_count, 0)) <> (coalesce(oui, 0), coalesce(non, 0))
"""


class Violation(AssertionError):
    """The promise is broken, or the service does not come back: what was found, and where."""


@dataclass
class Ledger:
    """What the publisher meant to publish, and what the broker confirmed, by the id of the message.

    The id is the vote_id, or the SHA-256 of the body of a message that is no vote. It may be published several times.
    """

    intended: dict[str, dict[str, str]] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)
    confirmed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        ledger = cls()
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if line["state"] == "confirmed":
                ledger.confirmed.add(line["id"])
            else:
                ledger.intended.setdefault(line["id"], line)
                ledger.copies[line["id"]] += 1
        return ledger


def check_safety(results: Results, totals_before: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """What must hold at any moment: totals are the fold of the audit log, and only grow.

    Returns the totals, for the next call. Raises Violation, or psycopg2.Error where the server is away.
    """
    differing = results.query(DIFFERENCES)
    if differing:
        raise Violation(f"totals differ from the audit log (law, totals, fold): {differing}")
    totals = results.totals()
    for law_id, (oui, non) in totals_before.items():
        now_oui, now_non = totals.get(law_id, (0, 0))
        if now_oui < oui or now_non < non:
            raise Violation(f"totals of {law_id} fell from {(oui, non)} to {(now_oui, now_non)}")
    return totals


def check_ledger(results: Results, ledger: Ledger) -> None:
    """What must hold after healing: every confirmed vote counted once, nothing else counted, nobody accused wrongly."""
    audit = {
        vote_id: (law_id, choice)
        for vote_id, law_id, choice in results.query("SELECT vote_id::text, law_id, choice FROM vote_audit")
    }
    kept = {
        bytes(digest).hex(): reason
        for digest, reason in results.query("SELECT body_sha256, reason FROM rejected_messages")
    }
    votes = {vote_id: line for vote_id, line in ledger.intended.items() if line["kind"] != "invalid"}
    invalid = ledger.intended.keys() - votes.keys()

    lost = [vote_id for vote_id in votes.keys() & ledger.confirmed if vote_id not in audit]
    if lost:
        raise Violation(f"{len(lost)} confirmed votes lost, among them {lost[:5]}")
    unkept = invalid & ledger.confirmed - kept.keys()
    if unkept:
        raise Violation(f"{len(unkept)} confirmed unreadable messages were not kept, among them {sorted(unkept)[:5]}")
    invented = (audit.keys() - votes.keys()) | (kept.keys() - invalid)
    if invented:
        raise Violation(f"{len(invented)} counted or rejected that nobody sent as such: {sorted(invented)[:5]}")
    altered = [
        vote_id for vote_id, found in audit.items() if found != (votes[vote_id]["law_id"], votes[vote_id]["choice"])
    ]
    if altered:
        raise Violation(f"{len(altered)} votes counted otherwise than sent: {altered[:5]}")

    fold = Counter(audit.values())
    expected = {law_id: (fold[law_id, "oui"], fold[law_id, "non"]) for law_id, _ in fold}
    if results.totals() != expected:
        raise Violation(f"totals are {results.totals()}, the votes in the ledger make {expected}")

    accused = {vote_id for (vote_id,) in results.query("SELECT DISTINCT vote_id::text FROM duplicate_attempts")}
    wrongly = {vote_id for vote_id in accused if ledger.copies[vote_id] < 2}
    if wrongly:
        raise Violation(f"{len(wrongly)} votes published once stand in duplicate_attempts: {sorted(wrongly)[:5]}")


class Observer:
    """Checks safety again and again in a thread, also while faults last. ``violation`` is what it found, or None."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._checking = threading.Lock()
        self._totals: dict[str, tuple[int, int]] = {}
        self.violation: Violation | None = None
        self.checks = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    @contextlib.contextmanager
    def failing_over(self) -> Iterator[None]:
        """While another server takes the database's place: what was never confirmed may be gone with the old one."""
        with self._checking:
            yield
            self._totals = {}

    def _run(self) -> None:
        while not self._stopping.wait(0.1):
            try:
                with self._checking:
                    self._totals = check_safety(self._results, self._totals)
                self.checks += 1
            except psycopg2.Error:
                continue  # the server is away, or has no tables yet
            except Violation as exc:
                self.violation = exc
                return
