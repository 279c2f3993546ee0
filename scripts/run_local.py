"""The service in the foreground on the local servers, until Ctrl-C: what `make run` runs.

The servers are those of scripts/local_services.py. Where this has started them it stops them at the end, and their data
is gone; where they ran already they stay. Exit code: that of the service, or that of a start that failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from scripts import local_services
from scripts.local_services import DEFAULT_DIRECTORY, LocalServices, LocalServicesError

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run until the service ends and return the exit code."""
    for signum in SIGNALS:
        signal.signal(signum, _exit_on_signal)
    services = LocalServices(DEFAULT_DIRECTORY, management=True)
    ours = not services.exists()
    try:
        failed = local_services.up(services)
        return failed or _run_service(services)
    except LocalServicesError as exc:
        print(f"run: {exc}", file=sys.stderr)
        return 1
    finally:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C must not leave a server behind
        if ours and services.exists():
            local_services.down(services)


def _run_service(services: LocalServices) -> int:
    environment = dict(os.environ)
    if not (environment.get("AMQP_URL") and environment.get("DATABASE_URL")):  # else nothing was started
        environment |= {"AMQP_URL": services.rabbitmq.url(), "DATABASE_URL": services.postgres.url()}
    print("starting the service; in another terminal: make publish-test-votes, make check-db, make metrics", flush=True)
    service = subprocess.Popen([sys.executable, "aggregator.py"], cwd=ROOT, env=environment)

    def stop_service(_signum: int, _frame: FrameType | None) -> None:
        # Ctrl-C has reached the service too, which is then told twice: no harm. A plain kill has not.
        service.terminate()

    for signum in SIGNALS:
        signal.signal(signum, stop_service)
    return service.wait()


def _exit_on_signal(signum: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
