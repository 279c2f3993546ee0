"""The benchmark: what `make bench` runs. It counts nothing into anybody's totals: its servers are its own, and go.

Every run ends with a reconciliation of totals, audit log and what was published. Where that fails, the run's figures
are void and so is the exit code. What each figure means: docs/PERFORMANCE.md.

Exit codes: 0 measured, 1 a figure is void or a server failed, 2 wrong usage, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg2
from pika.exceptions import AMQPError

from bench import node_peer, sections
from bench.cpu import memory_megabytes
from bench.lab import SPEC, TUNED, Lab, Void
from lab.service import ROOT
from scripts.local_services import LocalServicesError, exit_on_signals

REPORT = ROOT / ".local" / "bench" / "report.json"


def main() -> int:
    """Measure the sections that were asked for, print each, write the report and return the exit code."""
    options = _parse()
    exit_on_signals("interrupted: stopping everything")
    size = sections.QUICK if options.quick else sections.FULL
    names = options.only or [name for name in sections.SECTIONS if name not in sections.ON_REQUEST]
    started, failed = time.monotonic(), 0
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("")  # an old report must not pass for this one's, should this one fail
    except OSError as exc:
        print(f"bench: the report cannot be written: {exc}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"taken_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "load_before": os.getloadavg()}
    try:
        with tempfile.TemporaryDirectory(prefix="votes-bench-") as folder, Lab(Path(folder)) as lab:
            report |= _circumstances(lab) | {"size": asdict(size), "sections": {}}
            print(_heading(report), flush=True)
            for name in names:
                try:
                    report["sections"][name] = sections.SECTIONS[name](lab, size)
                except (Void, psycopg2.Error, AMQPError) as exc:
                    failed = 1
                    report["sections"][name] = {"void": str(exc)}
                    print(f"\n{name}: VOID, {exc}", file=sys.stderr, flush=True)
                report["seconds"] = round(time.monotonic() - started)
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    except LocalServicesError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    print(f"\n{report['seconds']} s, every figure reconciled; report: {options.json}" if not failed else "\nVOID")
    return failed


def _circumstances(lab: Lab) -> dict[str, Any]:
    """What the figures depend on: versions, machine, settings, the queue's arguments."""
    settings = "SELECT name, setting FROM pg_settings WHERE name = ANY (%s) ORDER BY name"
    names = ["synchronous_commit", "fsync", "full_page_writes", "shared_buffers", "max_wal_size", "wal_compression"]
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "rabbitmq": lab.services.rabbitmq.ctl("version").strip(),
            "postgresql": lab.value(lab.services.postgres.url(), "SHOW server_version").split()[0],
            **{package: version(package) for package in ("pika", "psycopg2-binary")},
            **node_peer.versions(),
        },
        "machine": {"cpus": os.cpu_count(), "memory_mb": memory_megabytes(), "system": platform.platform()},
        "profiles": {profile.name: profile._asdict() for profile in (SPEC, TUNED)},
        "postgresql_settings": dict(lab.query(lab.services.postgres.url(), settings, names)),
        "queue": _queue_as_declared(lab) | {"delivery_mode": 2},
    }


def _commit() -> str:
    """The commit of this folder, with -dirty where something was changed; "unknown" where it is no checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        is_ours = git("rev-parse", "--show-toplevel") == str(ROOT)
        return git("describe", "--always", "--dirty") if is_ours else "unknown"
    except FileNotFoundError:
        return "unknown"


def _queue_as_declared(lab: Lab) -> dict[str, Any]:
    """What a queue of the benchmark is, in the broker's own words."""
    with lab.queue():
        columns = ["durable", "arguments", "--formatter", "json"]
        (queue,) = json.loads(lab.services.rabbitmq.ctl("list_queues", *columns))
    return {"durable": queue["durable"]} | {name: value for name, _type, value in queue["arguments"]}


def _heading(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    load = report["load_before"][0]
    busy = "  OTHERS ARE AT WORK HERE: compare ratios and CPU only" if load > 0.5 else ""
    memory = f"{report['machine']['memory_mb'] / 1024:.0f} GB of memory"
    machine = f"{report['machine']['cpus']} CPUs, {memory}, load {load:.1f} before the start{busy}"
    return f"commit {report['commit']}, {versions}\n{machine}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look in about two minutes, too short to quote")
    parser.add_argument("--only", nargs="+", choices=list(sections.SECTIONS), help="these sections")
    parser.add_argument("--json", type=Path, default=REPORT, metavar="FILE", help="where the report goes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
