"""A loop that hangs ends the process, and nothing else does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import ROOT, Queue, Results, Service, vote, wait_until

PATCHED = """
import sys
sys.path[0] = {root!r}
import threading
import aggregator, observability

class ImpatientHealth(observability.Health):
    def __init__(self, stale_after):
        super().__init__(2.0)

aggregator.Health = ImpatientHealth
observability.WATCH_SECONDS, observability.STOPPED_SECONDS = 0.1, 1.0
{patch}
sys.exit(aggregator.main([]))
"""
HANGS = "threading.Event().wait()"
PLACES = {
    "batcher": f"aggregator.whole = lambda messages, number: {HANGS}",
    "consumer": f"aggregator.read = lambda deliveries, now: {HANGS}",
    "a log that takes no line": "aggregator.whole = lambda messages, number: hang()\n"
    "import logging\n"
    "def hang():\n    for handler in logging.getLogger().handlers: handler.acquire()\n    threading.Event().wait()",
}


def patched(folder: Path, patch: str) -> Path:
    folder.mkdir()
    (folder / "aggregator.py").write_text(PATCHED.format(root=str(ROOT), patch=patch))
    return folder


@pytest.mark.parametrize("where", PLACES)
def test_a_replica_whose_loop_hangs_ends_and_loses_nothing(
    where: str, queue: Queue, results: Results, tmp_path: Path, start_service: Callable[..., Service]
) -> None:
    """It says which loop and where it stands, if the log takes it; another replica counts what it held."""
    with queue.channel():
        pass  # declares it
    queue.publish(vote(), vote(choice="non"))
    hung = Service(tmp_path, "hung", queue, results, root=patched(tmp_path / "patched", PLACES[where]))
    try:
        hung.start()
        wait_until(lambda: not hung.is_running(), "it ends", 30)
        assert hung.process is not None and hung.process.returncode == 1
        line = hung.says("a loop hangs, leaving at once")
        if where in ("batcher", "consumer"):
            assert line is not None and line["fields"]["loops"] == [where]
            assert "aggregator.py" in str(line["fields"]["stacks"])
        assert results.counted() == 0
    finally:
        hung.close()
    start_service()
    wait_until(lambda: results.counted() == 2, "both are counted")


def test_a_replica_that_was_stopped_goes_on(queue: Queue, results: Results, tmp_path: Path) -> None:
    """By SIGSTOP, for longer than a loop may hang: its loops could not tick meanwhile."""
    with Service(tmp_path, "replica", queue, results, root=patched(tmp_path / "patched", "")) as replica:
        for counted in (1, 2):
            replica.signal(signal.SIGSTOP)
            until = time.monotonic() + 3.0
            wait_until(lambda until=until: time.monotonic() > until, "it was stopped for long")
            replica.signal(signal.SIGCONT)
            queue.publish(vote())
            wait_until(lambda counted=counted: results.counted() == counted, "it counts again")
        assert replica.is_running()
        assert replica.stop() == 0
