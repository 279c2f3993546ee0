"""Runs many random schedules and reports what was really hit: `make soak SCHEDULES=1000 SEED=1`.

A schedule that fails is printed with the command that replays it, and its logs and ledger are kept. Exit codes: 0 none
failed, 1 some did, 130 interrupted (the report still tells what was done until then).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from scripts.local_services import LocalServices
from tests.faults.lab import Lab
from tests.faults.schedules import make_schedule, run_schedule
from tests.harness import ROOT

KEPT = ROOT / ".local" / "soak"
REPORTED_MOMENTS = ("ambiguous commit", "stale tag reconnect", "unacked lost", "redelivery seen", "disconnected")


class Report:
    """Sums over schedules."""

    def __init__(self, first_seed: int) -> None:
        self.first_seed = first_seed
        self.started = time.monotonic()
        self.schedules = 0
        self.failed: list[int] = []
        self.faults: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.votes = 0
        self.safety_checks = 0

    def line(self) -> str:
        minutes = (time.monotonic() - self.started) / 60
        moments = ", ".join(f"{self.moments[name]} {name}" for name in REPORTED_MOMENTS[:2])
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
            "faults": dict(self.faults.most_common()),
        }
        return json.dumps(report, indent=2)


def run_one(services: LocalServices, seed: int, report: Report) -> None:
    """One schedule, in a folder that stays only if it fails."""
    directory = KEPT / f"seed-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    schedule = make_schedule(seed)
    with Lab(services, directory) as lab:
        try:
            run_schedule(lab, schedule)
        except Exception:  # noqa: BLE001 - whatever it is, it is this seed's, and the next one runs
            report.failed.append(seed)
            print(traceback.format_exc(), file=sys.stderr)
            print(f"seed {seed} failed; logs in {directory}; replay: make soak SCHEDULES=1 SEED={seed}", flush=True)
        report.schedules += 1
        report.faults += Counter(event.fault.__name__ for event in schedule.events)
        report.moments += lab.hits()
        report.safety_checks += lab.observer.checks
        report.votes += lab.results.value("SELECT count(*) FROM vote_audit")
    if seed not in report.failed:
        shutil.rmtree(directory)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the schedules of SEED, SEED + 1, ... and write the report. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Random faults on real servers, checked to the vote.")
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--report", type=Path, default=KEPT / "report.json")
    arguments = parser.parse_args()
    report, interrupted = Report(arguments.seed), False
    with tempfile.TemporaryDirectory(prefix="soak-") as directory, LocalServices(Path(directory)) as services:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            for seed in range(arguments.seed, arguments.seed + arguments.schedules):
                run_one(services, seed, report)
                print(f"seed {seed}: {report.line()}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(report.as_json() + "\n")
    print(report.as_json())
    return 130 if interrupted else 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
