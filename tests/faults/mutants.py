"""Services that are broken on purpose, each in one of the ways that such services are broken in real life.

The suite is worth what it finds: it must find each of them. `make test-mutants` prints which scenario did.
"""

# ruff: noqa: E501 - what is replaced stands on lines as the source has them

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
                "        outcome = self._submit(database, batch, attempts, self._copies_came)\n",
                "        tags = [m.delivery_tag for m in batch.votes + batch.rejections]\n"
                "        self._hand_off.settle(batch.generation, max(tags), [], len(batch))\n"
                "        time.sleep(0.05)\n"
                "        outcome = self._submit(database, batch, attempts, self._copies_came)\n",
            ),
            ("aggregator.py", "            self._settle(each.batch, outcome)\n", ""),
        ],
        ["a replica is about to commit and is killed", "the database is away for longer than the retries"],
    ),
    Mutant(
        "totals in a transaction of their own",
        [
            (
                "init_db.sql",
                "            INSERT INTO vote_results AS so_far (law_id, oui_count, non_count)\n"
                '            SELECT law_id, added.oui, added.non FROM added ORDER BY law_id COLLATE "C"\n'
                "            ON CONFLICT (law_id)\n"
                "            DO UPDATE SET\n"
                "                -- an insider's total must not be able to make it refuse a vote\n"
                "                oui_count = least(so_far.oui_count + EXCLUDED.oui_count, 1000000000000000),\n"
                "                non_count = least(so_far.non_count + EXCLUDED.non_count, 1000000000000000)\n"
                "            RETURNING law_id, oui_count, non_count\n",
                "            SELECT law_id, added.oui AS oui_count, added.non AS non_count FROM added\n",
            ),
            (
                "database.py",
                "                this.made.append(Attempt(txid, began_at))\n",
                "                this.made.append(Attempt(txid, began_at))\n"
                "        for law_id, (oui, non) in outcome.totals.items():\n"
                "            upsert = (\n"
                "                'INSERT INTO vote_results AS r VALUES (%s, %s, %s) ON CONFLICT (law_id) DO UPDATE SET'\n"
                "                ' oui_count = r.oui_count + EXCLUDED.oui_count,'\n"
                "                ' non_count = r.non_count + EXCLUDED.non_count'\n"
                "            )\n"
                "            with self._transaction(upsert, (law_id, oui, non)):\n"
                "                pass\n",
            ),
        ],
        ["the totals fail after the audit"],
    ),
    Mutant(
        "no audit",
        [
            (
                "init_db.sql",
                "            INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, redelivered, instance, txid)\n"
                "            SELECT vote_ids[n], law_ids[n], choices[n], moments[n], voter_hashes[n], redeliveries[n], replica,"
                " batch_txid\n",
                "            SELECT vote_ids[n] AS vote_id, law_ids[n] AS law_id, choices[n] AS choice\n",
            ),
            ("init_db.sql", "            ON CONFLICT DO NOTHING\n            RETURNING vote_id, law_id, choice\n", ""),
            ("init_db.sql", "AND NOT (has_rivals OR expects_copies) AND", "AND false AND"),
        ],
        ["copies in a quiet stream"],
    ),
    Mutant(
        "all votes of the batch counted instead of the fresh ones",
        [
            (
                "init_db.sql",
                "            FROM unnest(added_laws, added_oui, added_non) AS added (law_id, oui, non)\n",
                "            FROM (SELECT law_id, (choice = 'oui')::integer AS oui, (choice = 'non')::integer AS non\n"
                "                  FROM unnest(law_ids, choices) AS given (law_id, choice)) AS added\n",
            )
        ],
        ["copies in a quiet stream"],
    ),
    Mutant(
        "the first insert passes over copies",
        [
            (
                "init_db.sql",
                "                RETURNING law_id, choice\n",
                "                ON CONFLICT DO NOTHING RETURNING law_id, choice\n",
            ),
            (
                "init_db.sql",
                "            left_over := '{}';\n",
                "            left_over := '{}';\n            inserted := cardinality(vote_ids);\n",
            ),
        ],
        ["arrays in a quiet stream"],
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
                '                    cur.execute(f"{begin}; {statement}", values() if callable(values) else values)\n',
                "                    with contextlib.suppress(psycopg2.Error):\n"
                "                        cur.execute(f'{begin}; {statement}', values() if callable(values) else values)\n",
            ),
            (
                "database.py",
                " = _one(cur)\n            others",
                " = (\n"
                "                _one(cur) if cur.description else (1, datetime.now(), len(votes), [], [], None, None, None)\n"
                "            )\n"
                "            others",
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
                "        this.on_part()\n        attempts = ",
                "        this.on_part()\n"
                "        votes = [vote for vote in votes if not vote.redelivered]\n"
                "        attempts = ",
            )
        ],
        ["a replica is about to commit and is killed", "a replica has received a batch and gets an error"],
    ),
    Mutant(
        "the batch rejected after the third retry",
        [
            (
                "aggregator.py",
                "        self._enter(State.HOLDING if is_held else State.RETRYING)\n",
                "        if is_held:\n"
                "            tags = [m.delivery_tag for m in batch.votes + batch.rejections]\n"
                "            self._hand_off.settle(batch.generation, None, tags, len(batch))\n"
                "            time.sleep(0.1)\n"
                "            raise exc\n",
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
                "        if self._client.has_channel and self._hand_off.is_given_up:\n",
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
        "unreadable messages acked and not kept",
        [("init_db.sql", "    IF body_hashes <> '{}' THEN\n", "    IF false THEN\n")],
        ["a replica has sent its ack and gets an error"],
    ),
    Mutant(
        "an own commit taken for a copy",
        [
            (
                "init_db.sql",
                "                   same.instance = replica AND EXISTS (\n",
                "                   false AND EXISTS (\n",
            )
        ],
        ["a replica has sent its commit and gets an error"],
    ),
    Mutant(
        "the attempts at a batch forgotten",
        [
            (
                "aggregator.py",
                "batch.started_at, attempts, tick, expects_copies\n",
                "batch.started_at, [], tick, expects_copies\n",
            )
        ],
        ["a replica has sent its commit and gets an error"],
    ),
    # of arrays, and of two batches that are written at the same time
    Mutant(
        "an array acked with the first of its batches",
        [
            (
                "votes.py",
                "    while number < len(messages) and messages[number].delivery_tag == messages[number - 1].delivery_tag:\n"
                "        number += 1\n",
                "",
            )
        ],
        ["a replica has sent its ack and is killed", "a replica is sending its ack and is killed"],
    ),
    Mutant(
        "the neighbours of an unreadable vote dropped",
        [
            (
                "votes.py",
                "            messages.append(Rejection.of(body, place, ",
                "            messages.clear()\n            messages.append(Rejection.of(body, place, ",
            )
        ],
        ["arrays in a quiet stream"],
    ),
    Mutant(
        "an array unreadable for one of its votes",
        [
            (
                "votes.py",
                "            messages.append(Rejection.of(body, place, ",
                "            return [Rejection.of(body, 0, exc.reason, '', message_id, delivery_tag)]\n"
                "            messages.append(Rejection.of(body, place, ",
            )
        ],
        ["arrays in a quiet stream"],
    ),
    Mutant(
        "an array rejected for one of its votes",
        [
            (
                "aggregator.py",
                " for rejection in outcome.rejected if not rejection.place}\n",
                " for rejection in outcome.rejected}\n",
            )
        ],
        ["each of two batches has a vote that is refused"],
    ),
    Mutant(
        "evidence of a vote that is the whole array",
        [("votes.py", "        return cls(_elements(body)[place - 1], reason", "        return cls(body, reason")],
        ["arrays in a quiet stream"],
    ),
    Mutant(
        "copies within an array taken for votes of their own",
        [
            (
                "votes.py",
                "            messages.append(Vote.of(element, None, body, message_id, delivery_tag, redelivered, sent_at, place))\n",
                "            vote = Vote.of(element, None, body, message_id, delivery_tag, redelivered, sent_at, place)\n"
                "            if any(isinstance(m, Vote) and m.vote_id == vote.vote_id for m in messages):\n"
                "                vote = vote._replace(vote_id=str(uuid.uuid4()))\n"
                "            messages.append(vote)\n",
            )
        ],
        ["arrays in a quiet stream"],
    ),
    Mutant(
        "the message_id of an array taken for an identity",
        [("votes.py", "Vote.of(element, None, body, ", "Vote.of(element, message_id, body, ")],
        ["arrays in a quiet stream"],
    ),
    Mutant(
        "batches that share a vote written at once",
        [
            (
                "aggregator.py",
                "self._idle and not self._attempts and all(are_strangers(batch, each.batch) for each in self._writing)\n",
                "self._idle and not self._attempts\n",
            )
        ],
        ["the second of two batches disputes the first"],
    ),
    Mutant(
        "the attempts of two batches not kept apart",
        [
            (
                "aggregator.py",
                "database, attempts = self._idle.pop(), [*self._attempts]\n",
                "database, attempts = self._idle.pop(), self._attempts\n",
            ),
            ("aggregator.py", "self._idle and not self._attempts and all(", "self._idle and all("),
            (
                "aggregator.py",
                "            self._attempts = []  # what they wrote is reported with this batch, or was rolled back\n",
                "",
            ),
            (
                "aggregator.py",
                "            self._attempts = list({attempt for each in writing for attempt in each.attempts})\n",
                "",
            ),
        ],
        ["arrays in a quiet stream"],
    ),
    Mutant(
        "the second batch settled before the first is written",
        [
            (
                "aggregator.py",
                "            return database.batch_update_results(\n"
                "                batch.votes, batch.rejections, batch.started_at, attempts, tick, expects_copies\n"
                "            )\n",
                "            outcome = database.batch_update_results(\n"
                "                batch.votes, batch.rejections, batch.started_at, attempts, tick, expects_copies\n"
                "            )\n"
                "            if self._writing and self._writing[0].batch is not batch:\n"
                "                self._settle(batch, outcome)\n"
                "            return outcome\n",
            )
        ],
        ["of two batches the first is about to commit, the other is committed, and the replica dies at its next ack"],
    ),
    Mutant(
        "the failure of the second batch ignored",
        [
            (
                "aggregator.py",
                "            outcomes = self._write_again(self._writing, exc)\n",
                "            if self._busy_until > self._writing[0].began_at:  # it was begun beside one that is settled\n"
                "                outcomes = [BatchOutcome(counted=list(self._writing[0].batch.votes))]\n"
                "            else:\n"
                "                outcomes = self._write_again(self._writing, exc)\n",
            )
        ],
        ["of two batches the second is about to commit, the other is committed, and it gets an error"],
    ),
]
