"""Services broken in ways that only brokers and databases that are several, or a limit of returns, can show."""

# ruff: noqa: E501 - what is replaced stands on lines as the source has them

from __future__ import annotations

from tests.faults.mutants import Mutant

MUTANTS = [
    Mutant(
        "give back in a loop",
        [
            (
                "aggregator.py",
                "is_over = is_held and failing_for >= self._settings.hold_seconds\n",
                "is_over = is_held\n",
            ),
            ("aggregator.py", "            self._database.try_to_write(trial.votes, trial.rejections)\n", ""),
        ],
        ["a full disk for 25 periods of holding"],
    ),
    Mutant(
        "ack of copies without a durable record",
        [
            (
                "init_db.sql",
                "        PERFORM pg_logical_emit_message(true, 'votes', '');\n",
                "        NULL;\n",
            )
        ],
        ["the primary restarted without its standby, then lost"],
    ),
    Mutant(
        "every 406 taken for a difference",
        [
            (
                "rabbitmq_client.py",
                '            if missing.reply_code != NOT_FOUND or "down or inaccessible" in missing.reply_text:\n',
                "            if True:\n",
            )
        ],
        ["a queue that is refused and absent"],
    ),
    Mutant(
        "a trial write that does not write",
        [
            (
                "database.py",
                "            self._write_all(trial, _strangers(votes), rejections)\n",
                "",
            )
        ],
        ["a full disk for 25 periods of holding"],
    ),
    Mutant(
        "a trial write that leaves votes",
        [("database.py", "; ROLLBACK TO SAVEPOINT trial", "")],
        ["a full disk for 25 periods of holding"],
    ),
    Mutant(
        "a cancel that drops a burst",
        [
            (
                "rabbitmq_client.py",
                "        if deliveries[0].generation == self._generation:\n",
                "        if deliveries[0].generation == self._generation and self._consumer_tag is not None:\n",
            )
        ],
        ["a burst on its way when a batch begins to be held"],
    ),
]

# tried by `make test-ha-mutants`
MORE_MUTANTS = [
    Mutant(
        "an id in place of a durable record",
        [
            (
                "init_db.sql",
                "        PERFORM pg_logical_emit_message(true, 'votes', '');\n",
                "        PERFORM pg_current_xact_id();\n",
            )
        ],
        ["the primary restarted without its standby, then lost"],
    ),
    Mutant(
        "a warning at the commit taken for none",
        [("database.py", " or conn.notices:\n", ":\n")],
        ["a waiting commit cancelled, then the primary lost"],
    ),
    Mutant(
        "a trial write that commits without its deferred checks",
        [("database.py", "SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO", "ROLLBACK TO")],
        ["a refused COMMIT for 25 periods of holding"],
    ),
    Mutant(
        "a vote blamed for a fault of the set-up",
        [
            ("database.py", "            _check_suspects(suspects, len({vote.vote_id for vote in votes}))\n", ""),
            (
                "database.py",
                "                self._check_company(this, outcome.counted[:3] or self._sound, [vote for vote, _ in culprits])\n",
                "",
            ),
        ],
        ["a fault that no list knows for 25 periods of holding"],
    ),
]
