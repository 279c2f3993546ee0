"""What sealing costs the count, and how long a million votes take to verify: `make bench-seal`.

Pairs of drains of one backlog by the unmodified service (tuned profile), in random order within a pair: one alone, one
beside `reconcile.py seal --every 5`; the log is sealed whole by the end of each such drain. The rate is from the first
delivery to the last commit. Then `--million` votes go through three replicas beside a sealer, and `reconcile.py verify`
computes them anew. Every run ends with the totals compared, or its figures are void.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.cpu import cpu_seconds
from bench.lab import TUNED, Drain, Lab, Void, stop
from lab.service import ROOT
from test_publisher import Message, Publisher, make_messages

RECONCILE = [sys.executable, str(ROOT / "reconcile.py")]
EVERY_SECONDS = 5.0


def main() -> int:
    """Measure and print a table and, as the last line, the numbers in JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--votes", type=int, default=200_000, help="in each drain")
    parser.add_argument("--million", type=int, default=1_000_000, help="votes to verify; 0 leaves that out")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="votes-bench-") as folder, Lab(Path(folder)) as lab:
        if options.pairs:
            report["sealing"] = pairs(lab, options.pairs, options.votes)
        if options.million:
            report["verify"] = million(lab, options.million)
    print(json.dumps(report))
    return 0


def pairs(lab: Lab, count: int, votes: int) -> dict[str, Any]:
    """The same drain with and without a sealer."""
    messages = list(make_messages(votes, 20, 1))
    ratios: list[float] = []
    sealer_us: list[float] = []
    print("pair    alone /s   sealed /s   ratio   service us a vote, alone and sealed   sealer us a vote", flush=True)
    for pair in range(count):
        drains: dict[bool, Drain] = {}
        for with_sealer in random.sample((False, True), 2):
            with lab.database() as url, lab.queue(messages) as queue, ExitStack() as stack:
                if with_sealer:
                    subprocess.run(["psql", "-qXo", os.devnull, "-f", ROOT / "init_db.sql", url], check=True)
                    sealer = stack.enter_context(running_sealer(url))
                drains[with_sealer] = lab.drain(queue, url, messages, TUNED)
                if with_sealer:
                    wait_sealed(lab, url, votes)
                    sealer_us.append(cpu_seconds([sealer.pid]) / votes * 1e6)
        ratios.append(drains[True].rate / drains[False].rate)
        print(
            f"{pair + 1:>4} {drains[False].rate:>10,.0f} {drains[True].rate:>11,.0f} {ratios[-1]:>7.3f}"
            f" {drains[False].consumer_us:>20.1f} {drains[True].consumer_us:>16.1f} {sealer_us[-1]:>18.1f}",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"median ratio {median:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}", flush=True)
    return {"median": round(median, 4), "ratios": [round(ratio, 4) for ratio in ratios], "sealer_us": sealer_us}


def million(lab: Lab, votes: int) -> dict[str, Any]:
    """Count so many by three replicas while a sealer runs, then verify."""
    with lab.database() as url, lab.queue() as queue:
        subprocess.run(["psql", "-qXo", os.devnull, "-f", ROOT / "init_db.sql", url], check=True)
        messages = list(make_messages(votes, 20, 2))
        started = time.monotonic()
        with running_sealer(url), ExitStack() as stack:
            replicas = [stack.enter_context(lab.replica(queue, url, TUNED)) for _ in range(3)]
            publish(lab, queue, messages)
            lab.wait_counted(url, votes, votes / 1_000 + 60)
            stop(*replicas)
            seconds = time.monotonic() - started
            wait_sealed(lab, url, votes)
        lab.check(queue, url, {}, messages)
        counted_by = lab.value(url, "SELECT count(DISTINCT instance) FROM vote_audit")
        verified = subprocess.run(
            [*RECONCILE, "verify", "--json"], env={"PATH": os.environ["PATH"], "DATABASE_URL": url}, capture_output=True
        )
        report = json.loads(verified.stdout)
        if verified.returncode or not report["verified"] or report["sealed_votes"] != votes:
            raise Void(f"the log does not verify: {report['problems'][:3]}")
    print(
        f"{votes:,} votes counted by {counted_by} replicas beside a sealer in {seconds:.0f} s (publishing included);"
        f" {report['seals']} seals verified in {report['seconds']:.1f} s, no false alarm",
        flush=True,
    )
    return {"votes": votes, "replicas": counted_by, "seals": report["seals"], "seconds": report["seconds"]}


def publish(lab: Lab, queue: str, messages: Sequence[Message]) -> None:
    if not Publisher([lab.amqp_url], queue).publish(messages).all_confirmed:
        raise Void("not all votes are confirmed")


@contextmanager
def running_sealer(url: str) -> Iterator[subprocess.Popen[bytes]]:
    sealer = subprocess.Popen(
        [*RECONCILE, "seal", "--every", str(EVERY_SECONDS)],
        env={"PATH": os.environ["PATH"], "DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield sealer
    finally:
        sealer.kill()
        sealer.wait()


def wait_sealed(lab: Lab, url: str, votes: int) -> None:
    deadline = time.monotonic() + 60
    while lab.value(url, "SELECT coalesce(sum(votes), 0) FROM audit_seals") < votes:
        if time.monotonic() > deadline:
            raise Void("not all is sealed in time")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
