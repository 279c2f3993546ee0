"""The traceparent of a message, from its header to the log."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from scripts.local_services import LocalServices
from tests.harness import Queue, Results, Service, vote, wait_settled, wait_until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def traced(number: int) -> dict[str, Any]:
    """The headers of a message in our trace, with a span of its own."""
    return {"retries": number, "traceparent": f"00-{TRACE_ID}-{number:016x}-01"}


def settled(service: Service) -> list[dict[str, Any]]:
    """What the log says of messages that carry a traceparent, in the order of their spans."""
    fields = [line["fields"] for line in service.lines() if line["message"] == "message settled"]
    return sorted(fields, key=lambda found: str(found["span_id"]))


def test_the_log_says_what_became_of_each_message_of_a_trace(
    services: LocalServices, queue: Queue, results: Results, start_service: Callable[..., Service]
) -> None:
    """With the key of its row: vote_id in vote_audit and duplicate_attempts, body_sha256 in rejected_messages."""
    service = start_service(LOG_LEVEL="DEBUG")
    counted, unreadable = vote(), b"not a vote"
    queue.publish(counted, headers=traced(1))
    queue.publish(vote())
    wait_until(lambda: results.counted() == 2, "both votes are counted")
    queue.publish(counted, headers=traced(2))
    queue.publish(unreadable, headers=traced(3))
    wait_settled(services, queue)
    wait_until(lambda: len(settled(service)) == 3, "the three are logged")
    trace = {"trace_id": TRACE_ID}
    assert settled(service) == [
        trace | {"span_id": f"{1:016x}", "outcome": "counted", "vote_id": counted["vote_id"]},
        trace | {"span_id": f"{2:016x}", "outcome": "duplicate", "vote_id": counted["vote_id"]},
        trace | {"span_id": f"{3:016x}", "outcome": "not_json", "body_sha256": hashlib.sha256(unreadable).hexdigest()},
    ]
    digest = settled(service)[2]["body_sha256"]
    assert results.value("SELECT count(*) FROM rejected_messages WHERE encode(body_sha256, 'hex') = %s", digest) == 1


def test_a_batch_that_is_not_written_names_its_traces_and_no_vote_is_logged_above_debug(
    services: LocalServices, queue: Queue, results: Results, start_service: Callable[..., Service]
) -> None:
    """The first ten, on the warning that is there anyway."""
    service = start_service(RETRY_BACKOFF_SECONDS="0.01", DB_POOL_MIN="1")
    results.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE SQLSTATE ''53100''; END'"
    )
    results.execute("CREATE TRIGGER refuse BEFORE INSERT ON vote_audit FOR EACH ROW EXECUTE FUNCTION refuse()")
    queue.publish(vote(), headers=traced(7))
    wait_until(lambda: service.says("batch not written"), "the database refuses the batch")
    line = next(line for line in service.lines() if line["message"] == "batch not written")
    assert line["fields"]["traceparents"] == [traced(7)["traceparent"]]
    results.execute("DROP TRIGGER refuse ON vote_audit")
    wait_settled(services, queue)
    assert results.counted() == 1
    assert settled(service) == []
