"""Says whether a vote was lost or counted twice, from the publisher's ledger and what stands in the database.

It asks the servers directly, never through a proxy, and trusts nothing that the service says of itself.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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


class Entry(NamedTuple):
    """A vote, or what is none, as it was sent; ``place`` is that in its array, 0 by itself."""

    id: str
    law_id: str
    choice: str
    kind: str
    voter: str | None = None
    place: int = 0


@dataclass
class Ledger:
    """What the publisher meant to publish, and what the broker confirmed; of arrays, all that they hold.

    An id is the vote_id, or the SHA-256 of the body of what is no vote. It may be published several times.
    """

    intended: list[Entry] = field(default_factory=list)  # in the order of sending
    confirmed: set[str] = field(default_factory=set)  # ids

    @classmethod
    def read(cls, path: Path) -> Ledger:
        ledger = cls()
        held: dict[str, list[Entry]] = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if line["state"] == "holds":
                held[line["id"]] = [Entry(*entry) for entry in line["entries"]]
            elif line["state"] == "confirmed":
                ledger.confirmed.update(entry.id for entry in held.get(line["id"], ()))
                ledger.confirmed.add(line["id"])
            else:
                own = Entry(line["id"], line["law_id"], line["choice"], line["kind"])
                ledger.intended += held.get(line["id"], [own])
        voters = {
            entry.id: entry.voter for entry in ledger.intended if entry.voter is not None
        }  # known of arrays alone
        ledger.intended = [entry._replace(voter=voters.get(entry.id)) for entry in ledger.intended]
        return ledger

    @property
    def votes(self) -> list[Entry]:
        return [entry for entry in self.intended if entry.kind != "invalid"]


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
        bytes(digest).hex(): int(place or 0)
        for digest, place in results.query(
            "SELECT body_sha256, substring(detail FROM '^vote (\\d+) of an array: ') FROM rejected_messages"
        )
    }
    sent: dict[str, set[tuple[str, str]]] = defaultdict(set)
    rivals: dict[tuple[str, str | None], set[str]] = defaultdict(set)  # votes of one voter on one law
    for vote in ledger.votes:
        sent[vote.id].add((vote.law_id, vote.choice))
        rivals[vote.law_id, vote.voter or vote.id].add(vote.id)
    places: dict[str, set[int]] = defaultdict(set)
    for entry in ledger.intended:
        if entry.kind == "invalid":
            places[entry.id].add(entry.place)

    missing = [ids for ids in rivals.values() if ids & ledger.confirmed and not ids & audit.keys()]
    if missing:
        raise Violation(f"{len(missing)} confirmed votes lost, among them {[min(ids) for ids in missing[:5]]}")
    doubled = [ids for ids in rivals.values() if len(ids & audit.keys()) > 1]
    if doubled:
        raise Violation(f"{len(doubled)} voters counted twice, among them {[min(ids) for ids in doubled[:5]]}")
    unkept = places.keys() & ledger.confirmed - kept.keys()
    if unkept:
        raise Violation(f"{len(unkept)} confirmed unreadable messages were not kept, among them {sorted(unkept)[:5]}")
    invented = (audit.keys() - sent.keys()) | (kept.keys() - places.keys())
    if invented:
        raise Violation(f"{len(invented)} counted or rejected that nobody sent as such: {sorted(invented)[:5]}")
    altered = [vote_id for vote_id, found in audit.items() if found not in sent[vote_id]]
    if altered:
        raise Violation(f"{len(altered)} votes counted otherwise than sent: {altered[:5]}")
    misplaced = [digest for digest, place in kept.items() if place not in places[digest]]
    if misplaced:
        raise Violation(f"{len(misplaced)} rejected with another place than theirs: {misplaced[:5]}")

    fold = Counter(audit.values())
    expected = {law_id: (fold[law_id, "oui"], fold[law_id, "non"]) for law_id, _ in fold}
    if results.totals() != expected:
        raise Violation(f"totals are {results.totals()}, the votes in the ledger make {expected}")

    copies = Counter(vote.id for vote in ledger.votes)
    alone = {vote_id for ids in rivals.values() if len(ids) == 1 for vote_id in ids if copies[vote_id] == 1}
    wrongly = {vote_id for (vote_id,) in results.query("SELECT vote_id::text FROM duplicate_attempts")} & alone
    if wrongly:
        raise Violation(f"{len(wrongly)} votes published once stand in duplicate_attempts: {sorted(wrongly)[:5]}")


def check_order(results: Results, ledger: Ledger) -> Counter[str]:
    """What must hold where one replica had all once and in order: the first of rivals counts, each copy is recorded.

    Returns how many votes had each outcome. Raises Violation.
    """
    counted: dict[str, Entry] = {}
    voters: set[tuple[str, str]] = set()
    expected: list[tuple[str, str, str]] = []  # vote_id, choice, reason
    for vote in ledger.votes:
        if vote.id in counted:
            same = vote.choice == counted[vote.id].choice
            expected.append((vote.id, vote.choice, "duplicate" if same else "conflict"))
        elif vote.voter is not None and (vote.law_id, vote.voter) in voters:
            expected.append((vote.id, vote.choice, "second_vote"))
        else:
            counted[vote.id] = vote
            if vote.voter is not None:
                voters.add((vote.law_id, vote.voter))
    audit = dict(results.query("SELECT vote_id::text, choice FROM vote_audit"))
    wrong = {vote.id for vote in counted.values() if audit.get(vote.id) != vote.choice} | (
        audit.keys() - counted.keys()
    )
    if wrong:
        raise Violation(f"{len(wrong)} votes are not the first of their rivals: {sorted(wrong)[:5]}")
    recorded = Counter(results.query("SELECT vote_id::text, choice, reason FROM duplicate_attempts"))
    if recorded != Counter(expected):
        lacking, surplus = Counter(expected) - recorded, recorded - Counter(expected)
        raise Violation(
            f"{lacking.total()} copies not recorded, {surplus.total()} recorded otherwise:"
            f" {sorted(lacking)[:3]}, {sorted(surplus)[:3]}"
        )
    return Counter(["counted"] * len(counted) + [reason for *_, reason in expected])


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
