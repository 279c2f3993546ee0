"""What the running service shows to Prometheus: what `make metrics` runs.

Asked is the service at METRICS_PORT of this machine. Where none answers there it is the first replica of the Compose
stack, at the port that Docker has given it.

Exit codes: 0 printed, 1 no service answers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import config

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 5
COMPOSE = (["docker", "compose"], ["docker-compose"])
PORT_IN_THE_CONTAINER = "8001"


def main() -> int:
    """Print the metrics and return the exit code."""
    port = config.environment().get("METRICS_PORT") or PORT_IN_THE_CONTAINER
    text = fetch(port) or fetch(port_of_the_stack() or port)
    if text is None:
        print(f"no service answers on METRICS_PORT ({port}); start one with: make run", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


def fetch(port: str) -> str | None:
    """What /metrics shows at this port; None where nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError):
        return None


def port_of_the_stack() -> str | None:
    """The port of this machine that leads to the stack's first aggregator; None where there is no such stack."""
    for compose in COMPOSE:
        command = [*compose, "port", "aggregator", PORT_IN_THE_CONTAINER]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found = re.search(r":(\d+)$", done.stdout.strip())
        if done.returncode == 0 and found:
            return found[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
