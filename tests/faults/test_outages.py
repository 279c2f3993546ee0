"""Servers that are away for long: OUTAGE_SECONDS, 10 unless set; `make test-outages` takes 60."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from test_publisher import make_messages
from tests.faults.lab import Lab
from tests.faults.scenarios import must

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "10"))
BACK_WITHIN_SECONDS = 15
MEMORY_MARGIN_BYTES = 16 * 1024 * 1024

OUTAGES: dict[str, tuple[str, ...]] = {
    "database": ("postgres",),
    "broker": ("rabbitmq",),
    "both": ("rabbitmq", "postgres"),
}


@pytest.mark.parametrize("away", OUTAGES)
def test_the_service_goes_on_by_itself_after_the_outage_of_its(
    lab: Lab, away: str, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """... database, broker, or both: within 15 s of their return, as the same process, with its memory flat."""
    # the waits that are the default ones
    replica = lab.replica(RETRY_BACKOFF_SECONDS="1", DB_TIMEOUT_SECONDS="10", RABBITMQ_HEARTBEAT="15")
    lab.publish(make_messages(2_000, seed=31, duplicates=10))
    lab.wait_at_rest()
    pid, memory = replica.pid, replica.metric("process_resident_memory_bytes")

    lab.publish_behind(make_messages(2_000, seed=32, duplicates=10, invalid=1), rate=1_000)
    must(lambda: lab.results.counted() > 2_200, "it counts")
    servers = [getattr(lab.services, name) for name in OUTAGES[away]]
    for server in servers:
        server.stop()
    must(lambda: replica.get("/readyz")[0] == 503, "it is not ready")
    peak = memory
    until = time.monotonic() + OUTAGE_SECONDS
    while time.monotonic() < until:
        assert replica.get("/healthz")[0] == 200
        peak = max(peak, replica.metric("process_resident_memory_bytes"))
        time.sleep(0.5)  # the outage is the waiting
    for server in servers:
        server.start()
    back = time.monotonic()
    must(replica.is_ready, f"it is ready within {BACK_WITHIN_SECONDS} s", BACK_WITHIN_SECONDS)
    seconds = time.monotonic() - back
    lab.check()
    after = replica.metric("process_resident_memory_bytes")
    assert replica.pid == pid and replica.is_running()
    with capsys.disabled():
        print(
            f"\n{away} away for {OUTAGE_SECONDS:.0f} s: ready {seconds:.1f} s after its return; resident memory"
            f" {memory / 2**20:.1f} MiB before, {peak / 2**20:.1f} at most meanwhile, {after / 2**20:.1f} after"
        )
    assert max(peak, after) < memory + MEMORY_MARGIN_BYTES
