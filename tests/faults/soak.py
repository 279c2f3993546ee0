"""Runs many random schedules and reports what was really hit: `make soak SCHEDULES=1000 SEED=1`.

A schedule that fails is printed with the command that replays it, and its logs and ledger are kept. Exit codes: 0 none
failed, 1 some did, 130 interrupted (the report still tells what was done until then).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.local_cluster import PostgresPair, RabbitMQCluster
from scripts.local_services import LocalServices
from tests.faults.lab import Lab
from tests.faults.proxy import AT_ONCE
from tests.faults.schedules import Schedule, make_schedule, run_schedule
from tests.ha import schedules as ha_schedules
from tests.ha.lab import HaLab
from tests.harness import ROOT

KEPT = ROOT / ".local" / "soak"
REPORTED_MOMENTS = (
    "ambiguous commit",
    "stale tag reconnect",
    AT_ONCE,
    "unacked lost",
    "redelivery seen",
    "disconnected",
)


class Report:
    """Sums over schedules."""

    def __init__(self, first_seed: int, target: str) -> None:
        self.first_seed = first_seed
        self.target = target  # of the Makefile
        self.events: Counter[str] = Counter()
        self.most_returns = 0
        self.started = time.monotonic()
        self.schedules = 0
        self.failed: list[int] = []
        self.faults: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.votes = 0
        self.safety_checks = 0

    def line(self) -> str:
        minutes = (time.monotonic() - self.started) / 60
        moments = ", ".join(f"{self.moments[name]} {name}" for name in REPORTED_MOMENTS[:3])
        return (
            f"{self.schedules} schedules in {minutes:.1f} min, {len(self.failed)} failed, {self.votes} votes checked, "
            f"{sum(self.faults.values())} faults, {moments}"
        )

    def as_json(self) -> str:
        report = {
            "first_seed": self.first_seed,
            "schedules": self.schedules,
            "failed_seeds": self.failed,
            "minutes": round((time.monotonic() - self.started) / 60, 1),
            "votes_checked": self.votes,
            "safety_checks_while_faults_lasted": self.safety_checks,
            "moments_hit": {name: self.moments[name] for name in REPORTED_MOMENTS},
            "events": dict(self.events.most_common()),
            "most_returns_of_a_message": self.most_returns,
            "faults": dict(self.faults.most_common()),
        }
        return json.dumps(report, indent=2)


class Kind(NamedTuple):
    """What is soaked: schedules on single servers, or on a cluster and a pair (`--ha`)."""

    make_lab: Callable[[Path], Any]
    make_schedule: Callable[[int], Schedule]
    run_schedule: Callable[[Any, Schedule], None]
    heal: Callable[[], None] = lambda: None


@contextlib.contextmanager
def servers(directory: Path, ha: bool) -> Iterator[Kind]:
    """Start them for the block."""
    if not ha:
        with LocalServices(directory) as services:
            yield Kind(lambda path: Lab(services, path), make_schedule, run_schedule)
        return
    with RabbitMQCluster(directory / "rabbitmq") as cluster, PostgresPair(directory / "postgres") as pair:

        def heal() -> None:
            cluster.heal()
            pair.heal()

        yield Kind(lambda path: HaLab(cluster, pair, path), ha_schedules.make_schedule, ha_schedules.run_schedule, heal)


def run_one(kind: Kind, seed: int, report: Report) -> None:
    """One schedule, in a folder that stays only if it fails."""
    directory = KEPT / f"seed-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    schedule = kind.make_schedule(seed)
    with kind.make_lab(directory) as lab:
        try:
            kind.run_schedule(lab, schedule)
        except Exception:  # noqa: BLE001 - whatever it is, it is this seed's, and the next one runs
            report.failed.append(seed)
            print(traceback.format_exc(), file=sys.stderr)
            print(
                f"seed {seed} failed; logs in {directory}; replay: make {report.target} SCHEDULES=1 SEED={seed}",
                flush=True,
            )
            kind.heal()
        report.schedules += 1
        report.faults += Counter(event.fault.__name__ for event in schedule.events)
        hits = lab.hits()
        report.moments += hits
        report.events += Counter(getattr(lab, "events", []))
        returned = (int(moment.split()[1]) for moment in hits if moment.startswith("returned "))
        report.most_returns = max([report.most_returns, *returned])
        report.safety_checks += lab.observer.checks
        report.votes += lab.results.value("SELECT count(*) FROM vote_audit")
    if seed not in report.failed:
        shutil.rmtree(directory)


def share_out(arguments: argparse.Namespace) -> int:
    """Have the schedules done by several processes, and add their reports up. Returns the worst of their exit codes."""
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        reports = [Path(directory) / f"{number}.json" for number in range(arguments.workers)]
        workers = []
        for number, path in enumerate(reports):
            schedules = len(range(number, arguments.schedules, arguments.workers))
            options = ["--schedules", schedules, "--seed", arguments.seed + number, "--step", arguments.workers]
            options += ["--ha"] * arguments.ha
            command = [sys.executable, "-m", "tests.faults.soak", *map(str, options), "--report", str(path)]
            workers.append(subprocess.Popen(command, cwd=ROOT))
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the workers too, and they end in order
        signal.signal(signal.SIGTERM, lambda *_: [worker.terminate() for worker in workers] and None)
        codes = [worker.wait() for worker in workers]
        total = add_up([json.loads(path.read_text()) for path in reports])
    text = json.dumps(total, indent=2)
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(text + "\n")
    print(text)
    return max(codes)


def add_up(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several: numbers and lists are added, the first seed is the lowest, minutes are the longest."""
    total = reports[0]
    for report in reports[1:]:
        for key, value in report.items():
            match key:
                case "first_seed":
                    total[key] = min(total[key], value)
                case "minutes" | "most_returns_of_a_message":
                    total[key] = max(total[key], value)
                case "moments_hit" | "faults" | "events":
                    total[key] = dict((Counter(total[key]) + Counter(value)).most_common())
                case _:
                    total[key] += value
    return total


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the schedules of SEED, SEED + 1, ... and write the report. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Random faults on real servers, checked to the vote.")
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--report", type=Path, default=KEPT / "report.json")
    parser.add_argument("--workers", type=int, default=1, help="so many at a time, each with servers of its own")
    parser.add_argument("--step", type=int, default=1, help="from one seed to the next; what a worker is told")
    parser.add_argument("--ha", action="store_true", help="on a cluster of brokers and a pair of databases")
    arguments = parser.parse_args()
    if arguments.workers > 1:
        return share_out(arguments)
    report, interrupted = Report(arguments.seed, "soak-ha" if arguments.ha else "soak"), False
    with tempfile.TemporaryDirectory(prefix="soak-") as directory, servers(Path(directory), arguments.ha) as kind:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            for seed in range(arguments.seed, arguments.seed + arguments.schedules * arguments.step, arguments.step):
                run_one(kind, seed, report)
                print(f"seed {seed}: {report.line()}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(report.as_json() + "\n")
    print(report.as_json())
    return 130 if interrupted else 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
