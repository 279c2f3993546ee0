"""Services that are broken on purpose, each in one of the ways that such services are broken in real life.

The suite is worth what it finds: it must find each of them. `make test-mutants` prints which scenario did.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from tests.faults.scenarios import MOMENTS, SCENARIOS, Scenario
from tests.harness import ROOT


class Mutant(NamedTuple):
    """A fault of the service: the replacements that make it, and the scenarios that may find it, likely ones first."""

    name: str
    replacements: list[tuple[str, str, str]]  # file, text that stands there once, text instead
    found_by: list[str]

    def build(self, directory: Path) -> Path:
        """Write the broken service into ``directory``. Raises AssertionError where the service has moved on."""
        directory.mkdir()
        for file in [*ROOT.glob("*.py"), ROOT / "init_db.sql"]:
            shutil.copy(file, directory)
        shutil.copytree(ROOT / "web", directory / "web")
        for name, old, new in self.replacements:
            source = (directory / name).read_text()
            assert source.count(old) == 1, f"mutant {self.name!r}: {name} has {source.count(old)} times: {old}"
            (directory / name).write_text(source.replace(old, new))
        return directory

    def scenarios(self) -> dict[str, Scenario]:
        known = SCENARIOS | MOMENTS
        return {name: known[name] for name in self.found_by}


MUTANTS = [
    Mutant(
        "ack before commit",
        [
            (
                "aggregator.py",
                "            outcome = self._write(batch)\n",
                "            tags = [m.delivery_tag for m in batch.votes + batch.rejections]\n"
                "            self._client.settle(self._generation, max(tags), [])\n"
                "            time.sleep(0.05)\n"
                "            outcome = self._write(batch)\n"
                "            self._client.settle = lambda *_: None\n",
            ),
            ("aggregator.py", "        self._settle(batch, outcome)\n", "        del self._client.settle\n"),
        ],
        ["a replica is about to commit and is killed", "the database is away for longer than the retries"],
    ),
    Mutant(
        "audit insert in a transaction of its own",
        [
            (
                "database.py",
                "            fresh, copies, refused, recorded_at = self._insert_votes(cur, votes)\n",
                "            fresh, copies, refused, recorded_at = self._insert_votes(cur, votes)\n"
                "            cur.execute('COMMIT')\n"
                "            cur.execute('BEGIN')\n",
            )
        ],
        ["the totals fail after the audit", "a replica has counted the votes and is killed"],
    ),
    Mutant(
        "no audit",
        [
            (
                "database.py",
                "            fresh, copies, refused, recorded_at = self._insert_votes(cur, votes)\n",
                "            fresh, copies, refused, recorded_at = list(votes), [], [], ''\n",
            )
        ],
        ["copies in a quiet stream"],
    ),
    Mutant(
        "all votes of the batch counted instead of the fresh ones",
        [("database.py", "UPSERT_RESULTS, _totals(fresh))", "UPSERT_RESULTS, _totals(votes))")],
        ["copies in a quiet stream"],
    ),
    Mutant(
        "a stale tag acked after a reconnect",
        [
            (
                "rabbitmq_client.py",
                "            if generation != self._generation or self._channel is None:\n",
                "            if self._channel is None:\n",
            )
        ],
        ["a reconnect while a commit is out"],
    ),
    Mutant(
        "an error swallowed and then committed",
        [
            (
                "database.py",
                "                cur.execute(UPSERT_RESULTS, ",
                "                with contextlib.suppress(psycopg2.Error):\n"
                "                    cur.execute(UPSERT_RESULTS, ",
            ),
            (
                "database.py",
                "                outcome.totals = {law_id: (oui, non) for law_id, oui, non in cur.fetchall()}\n",
                "",
            ),
            ("database.py", "import logging\n", "import contextlib\nimport logging\n"),
            (
                "database.py",
                "    if conn.get_transaction_status() != TRANSACTION_STATUS_INTRANS:\n",
                "    if False:\n",
            ),
            ("database.py", '    if cur.statusmessage != "COMMIT" or conn.notices:\n', "    if False:\n"),
        ],
        ["the totals fail after the audit"],
    ),
    Mutant(
        "the redelivered flag used as the dedup",
        [
            (
                "database.py",
                "            fresh, copies, refused, recorded_at = self._insert_votes(cur, votes)\n",
                "            first_time = [vote for vote in votes if not vote.redelivered]\n"
                "            fresh, copies, refused, recorded_at = self._insert_votes(cur, first_time)\n"
                "            cur.execute('SELECT 1')\n",
            )
        ],
        ["a replica is about to commit and is killed", "a replica has received a batch and gets an error"],
    ),
    Mutant(
        "execute_values without fetch",
        [
            (
                "database.py",
                "            cur.execute(INSERT_VOTES, (*self._columns(first), redelivered, held_seconds, held_seconds,"
                " len(first)))\n"
                "            inserted, fresh_ids, recorded_at = _one(cur)\n",
                "            execute_values(\n"
                "                cur,\n"
                "                'INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, instance,'\n"
                "                ' redelivered) VALUES %s'\n"
                "                ' ON CONFLICT DO NOTHING RETURNING vote_id::text',\n"
                "                [(*v[:5], self._instance, v.redelivered) for v in sorted(first)],\n"
                "                page_size=10,\n"
                "            )\n"
                "            ids = [row[0] for row in cur.fetchall()]\n"
                "            inserted, fresh_ids, recorded_at = len(ids), '{' + ','.join(ids) + '}', ''\n",
            )
        ],
        ["copies in a quiet stream"],
    ),
    Mutant(
        "the batch rejected after the third retry",
        [
            (
                "aggregator.py",
                "                if is_held:\n                    self._stop_accepting()\n",
                "                if is_held:\n"
                "                    tags = [m.delivery_tag for m in batch.votes + batch.rejections]\n"
                "                    self._client.settle(self._generation, None, tags)\n"
                "                    time.sleep(0.1)\n"
                "                    raise\n",
            )
        ],
        ["the database is away for longer than the retries"],
    ),
    # and these, of the kind that only this design can have
    Mutant(
        "a given-up batch left on its channel",
        [
            (
                "aggregator.py",
                "        if self._client.has_channel and self._client.generation <= self._given_up:\n",
                "        if False:\n",
            )
        ],
        ["a batch is given up and the next is not"],
    ),
    Mutant(
        "no watchdog",
        [("database.py", "            if self._cut_if_due(time.monotonic()):\n", "            if False:\n")],
        ["a replica is about to commit and is stalled"],
    ),
    Mutant(
        "a batch that is not all new counted as if it were",
        [
            ("init_db.sql", "    ORDER BY vote_id;\n", "    ORDER BY vote_id ON CONFLICT DO NOTHING;\n"),
            ("init_db.sql", "    IF inserted < cardinality(vote_ids) THEN\n", "    IF false THEN\n"),
        ],
        ["copies of old votes in a quiet stream"],
    ),
    Mutant(
        "new votes of an own commit taken for copies",
        [
            (
                "database.py",
                "self._unreported.update(dict.fromkeys((vote.vote_id for vote in votes), rows[0][3]))\n",
                "pass\n",
            )
        ],
        ["a replica has sent its commit of new votes and gets an error"],
    ),
    Mutant(
        "unreadable messages acked and not kept",
        [("database.py", "            if outcome.rejected:\n", "            if False:\n")],
        ["a replica has sent its ack and gets an error"],
    ),
    Mutant(
        "an own commit taken for a copy",
        [("database.py", "        is_own = row.instance", "        is_own = False and row.instance")],
        ["a replica has sent its commit and gets an error"],
    ),
]
