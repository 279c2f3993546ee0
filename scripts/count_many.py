"""A million votes by three replicas: counted, compared with what was published, reconciled, sealed and verified.

    .venv/bin/python -m scripts.count_many [--votes 1000000] [--replicas 3] [--seed 1]

On servers of its own. One vote in a hundred is published twice. Exit code 1 where anything does not agree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg2

from lab.service import ROOT, ServiceProcess
from scripts.local_services import LocalServices, exit_on_signals
from test_publisher import Publisher, make_messages, totals_of

SELECT_TOTALS = "SELECT law_id, oui_count::int, non_count::int FROM vote_results"
LAWS, DUPLICATES = 20, 1.0
MOST_SECONDS_WITHOUT_A_VOTE = 60.0


def main() -> int:
    """Run it all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--votes", type=int, default=1_000_000, help="to publish (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=3, help="that count them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the votes (default: %(default)s)")
    options = parser.parse_args()
    exit_on_signals()
    with (
        tempfile.TemporaryDirectory(prefix="votes-many-") as folder,
        LocalServices(Path(folder) / "servers") as servers,
    ):
        environment = {
            "AMQP_URL": servers.rabbitmq.url(),
            "DATABASE_URL": servers.postgres.url(),
            "BATCH_SIZE": "500",
            "RABBITMQ_PREFETCH_COUNT": "2000",
        }
        with ExitStack() as stack:
            replicas = [
                stack.enter_context(ServiceProcess(Path(folder) / f"replica-{number}.log", environment))
                for number in range(options.replicas)
            ]
            started = time.monotonic()
            publisher = Publisher([servers.rabbitmq.url()], "votes.aggregation")
            published = publisher.publish(make_messages(options.votes, LAWS, options.seed, DUPLICATES))
            if not published.all_confirmed:
                return _failed(f"not all votes were confirmed: {published.failure}")
            print(f"published: {options.votes:,} votes and {DUPLICATES:.0f} % copies, all confirmed", flush=True)
            counted = _wait_counted(servers.postgres.url(), options.votes)
            seconds = time.monotonic() - started
            print(f"counted: {counted:,} by {len(replicas)} replicas, {seconds:.0f} s after the first was published")
            for replica in replicas:
                replica.stop()
        with psycopg2.connect(servers.postgres.url()) as connection, connection.cursor() as cursor:
            cursor.execute(SELECT_TOTALS)
            totals = {law_id: (oui, non) for law_id, oui, non in cursor.fetchall()}
            cursor.execute("SELECT instance, count(*) FROM vote_audit GROUP BY 1 ORDER BY 1")
            print("by replica:", ", ".join(f"{votes:,}" for _, votes in cursor.fetchall()))
        connection.close()
        if totals != totals_of(make_messages(options.votes, LAWS, options.seed, DUPLICATES)):
            return _failed(f"the totals are not those of what was published: {totals}")
        print("totals: those of what was published, in each law")
        for command in ([], ["seal"], ["verify"]):
            if _reconcile(command, environment):
                return _failed(f"reconcile.py {' '.join(command)} says so")
    return 0


def _wait_counted(url: str, votes: int) -> int:
    """Wait for so many, or until no more come; how many are counted then."""
    counted, since = -1, time.monotonic()
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        while counted < votes and time.monotonic() < since + MOST_SECONDS_WITHOUT_A_VOTE:
            before = counted
            cursor.execute("SELECT coalesce(sum(oui_count + non_count), 0)::bigint FROM vote_results")
            ((counted,),) = cursor.fetchall()
            since = time.monotonic() if counted != before else since
            time.sleep(0.2)
    connection.close()
    return counted


def _reconcile(arguments: Sequence[str], environment: dict[str, str]) -> int:
    print(f"$ reconcile.py {' '.join(arguments)}".rstrip(), flush=True)
    command = [sys.executable, str(ROOT / "reconcile.py"), *arguments]
    return subprocess.run(command, env={"PATH": os.environ["PATH"], **environment}, check=False).returncode


def _failed(why: str) -> int:
    print(f"FAILED: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
