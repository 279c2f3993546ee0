"""The service in the foreground on the local servers, until Ctrl-C: what `make run` runs.

The servers are those of scripts/local_services.py. Where this has started them it stops them at the end, and their data
is gone; where they ran already they stay. Exit code: that of the service, or that of a start that failed.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from lab.service import ROOT, command, launch
from scripts import local_services
from scripts.local_services import DEFAULT_DIRECTORY, SIGNALS, LocalServices, LocalServicesError, exit_on_signals


def main() -> int:
    """Run until the service ends and return the exit code."""
    exit_on_signals()
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
    service = launch(command(), environment, ROOT)  # where .env is

    def stop_service(_signum: int, _frame: FrameType | None) -> None:
        # Ctrl-C has reached the service too, which is then told twice: no harm. A plain kill has not.
        service.terminate()

    for signum in SIGNALS:
        signal.signal(signum, stop_service)
    return service.wait()


if __name__ == "__main__":
    sys.exit(main())
