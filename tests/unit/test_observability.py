"""Metrics, health and JSON logs, each told plain values."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import generate_latest

import observability
from observability import Health, JsonFormatter, Metrics, monitoring_routes


def told(metrics: Metrics, **changes: object) -> None:
    facts: dict[str, object] = {
        "counted": {"law-001": (2, 1)},
        "duplicates": ["redelivery"],
        "rejected": ["not_json"],
        "messages": 5,
        "seconds": 0.25,
        "voted_at": [],
        "totals": {"law-001": (20, 10)},
    }
    metrics.batch_written(**facts | changes)  # type: ignore[arg-type]


def test_a_batch_shows_in_the_metrics_of_the_spec() -> None:
    """Under their names and types."""
    metrics = Metrics()
    told(metrics)
    told(metrics)
    value = metrics.registry.get_sample_value
    assert value("votes_aggregated_total", {"law_id": "law-001", "choice": "oui"}) == 4
    assert value("current_vote_totals", {"law_id": "law-001", "choice": "non"}) == 10
    assert value("batch_size_processed_total") == 10
    assert value("batch_processing_duration_seconds") == 0.25
    assert value("votes_duplicate_total", {"reason": "redelivery"}) == 2
    assert value("votes_rejected_total", {"reason": "not_json"}) == 2
    text = generate_latest(metrics.registry).decode()
    assert "# TYPE batch_processing_duration_seconds gauge" in text
    assert "# TYPE aggregation_errors_total counter" in text
    assert "_created" not in text


def test_a_series_begins_with_its_first_value() -> None:
    """Votes whose total is not known have none, not 0; a law whose total was read was not counted by this replica."""
    metrics = Metrics()
    told(metrics, counted={"law-001": (2, 1)}, totals={})
    metrics.totals_read({"law-002": (20, 10)}, (0, 0))
    value = metrics.registry.get_sample_value
    assert value("votes_aggregated_total", {"law_id": "law-001", "choice": "oui"}) == 2
    assert value("current_vote_totals", {"law_id": "law-001", "choice": "oui"}) is None
    assert value("current_vote_totals", {"law_id": "law-002", "choice": "oui"}) == 20
    assert value("votes_aggregated_total", {"law_id": "law-002", "choice": "oui"}) is None


def test_laws_beyond_the_first_thousand_share_one_label() -> None:
    """A law per vote must not fill the memory."""
    metrics = Metrics()
    for number in range(3_000):
        told(metrics, counted={f"law-{number}": (1, 0)}, totals={f"law-{number}": (1, 0)})
    text = generate_latest(metrics.registry).decode()
    assert text.count('votes_aggregated_total{choice="oui"') == observability.MAX_LAW_LABELS + 1
    labels = {"law_id": "__other__", "choice": "oui"}
    assert metrics.registry.get_sample_value("votes_aggregated_total", labels) == 2_000
    assert metrics.registry.get_sample_value("current_vote_totals", labels) == 2_000


def test_totals_read_from_the_database_replace_what_was_summed() -> None:
    """Other replicas count too."""
    metrics = Metrics()
    told(metrics)
    metrics.totals_read({"law-001": (70, 30), "law-002": (1, 2)}, (0, 0))
    assert metrics.registry.get_sample_value("current_vote_totals", {"law_id": "law-001", "choice": "oui"}) == 70
    assert metrics.registry.get_sample_value("current_vote_totals", {"law_id": "law-002", "choice": "non"}) == 2


def test_the_totals_of_all_laws_together_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have no label of their own are summed up, whether the database does it or we."""
    monkeypatch.setattr(observability, "MAX_LAW_LABELS", 2)
    metrics = Metrics()
    told(metrics, counted={"law-001": (1, 0)}, totals={"law-001": (1, 0)})
    metrics.totals_read({"law-001": (5, 0), "law-002": (3, 0), "law-003": (1, 1)}, (100, 10))
    assert set(metrics.labelled) == {"law-001", "law-002"}
    totals = {
        law_id: metrics.registry.get_sample_value("current_vote_totals", {"law_id": law_id, "choice": "oui"})
        for law_id in ("law-001", "law-002", "law-003", "__other__")
    }
    assert totals == {"law-001": 5, "law-002": 3, "law-003": None, "__other__": 101}
    metrics.totals_read({"law-001": (5, 0)}, (0, 0))
    labels = {"law_id": "__other__", "choice": "oui"}
    assert metrics.registry.get_sample_value("current_vote_totals", labels) == 0


def test_ready_needs_live_loops_and_both_servers() -> None:
    """And live needs no server at all."""
    health = Health(stale_after=30.0)
    health.tick("batcher")
    assert (health.report()["live"], health.report()["ready"]) == (True, False)
    health.broker_connected = health.database_connected = True
    assert health.report()["ready"]
    health.database_connected = False
    assert not health.report()["ready"]


def test_a_loop_that_no_longer_ticks_is_not_live() -> None:
    """Nor ready."""
    health = Health(stale_after=0.0)
    health.broker_connected = health.database_connected = True
    health.tick("consumer")
    assert (health.report()["live"], health.report()["ready"]) == (False, False)


def test_the_most_returns_are_shown_for_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that came meanwhile the highest; an alert on it ends by itself."""
    now = 1_000.0
    monkeypatch.setattr("observability.time.time", lambda: now)
    metrics = Metrics()

    def shown() -> float | None:
        return metrics.registry.get_sample_value("delivery_count_max")

    assert shown() == 0
    metrics.delivery_count_seen(12)
    metrics.delivery_count_seen(3)
    now += 299
    assert shown() == 12
    now += 2
    assert shown() == 0
    metrics.delivery_count_seen(3)
    assert shown() == 3


def test_metrics_that_many_ask_for_are_not_written_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousand laws that takes a while, in which no vote is counted."""
    moments = iter([100.0, 100.01, 100.19, 100.22, 100.23])
    monkeypatch.setattr("observability.time.monotonic", lambda: next(moments))
    metrics = Metrics()
    answer = monitoring_routes(metrics, Health(stale_after=30.0))["/metrics"]
    bodies = []
    for _ in range(3):
        metrics.error("broker_unavailable")
        bodies.append(answer({})[2])
    assert bodies[0] is bodies[1]
    assert b'aggregation_errors_total{error_type="broker_unavailable"} 3.0' in bodies[2]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text; version=0.0.1,text/plain;q=0.5", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;q=0.1, application/openmetrics-text;version=1.0.0;q=0.5", "application/openmetrics-text"),
        *((f"application/openmetrics-text;version={version}", "application/openmetrics-text") for version in "x79"),
        ("text/plain;version=x", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_metrics_come_in_one_of_two_formats_whatever_is_accepted(accept: str, content_type: str) -> None:
    """Never in a format that the scraper makes up: each would be kept, and one that is no version was an error."""
    answer = monitoring_routes(Metrics(), Health(stale_after=30.0))["/metrics"]
    status, headers, _ = answer({"accept": accept})
    if content_type == "application/openmetrics-text":
        content_type += "; version=1.0.0; charset=utf-8; escaping=underscores"
    assert (status, headers) == (200, {"Content-Type": content_type})


def test_the_monitoring_paths_answer() -> None:
    """Live without any server, ready only with both."""
    health = Health(stale_after=30.0)
    routes = monitoring_routes(Metrics(), health)
    assert sorted(routes) == ["/healthz", "/metrics", "/readyz"]
    assert (routes["/healthz"]({})[0], routes["/readyz"]({})[0]) == (200, 503)
    status, headers, body = routes["/metrics"]({})
    assert (status, b"broker_connected 0.0" in body) == (200, True)
    assert headers["Content-Type"].startswith("text/plain")
    health.broker_connected = health.database_connected = True
    assert routes["/readyz"]({})[0] == 200


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "aggregator", "levelname": "INFO", "msg": message})
    made.fields = fields
    return made


def test_a_log_line_is_one_json_object() -> None:
    """Whatever stands in it."""
    line = JsonFormatter().format(record("batch\r\n\x1b[31mcommitted", law_id='law"\n', number=7))
    assert "\n" not in line and "\x1b" not in line
    parsed = json.loads(line)
    assert list(parsed) == ["time", "level", "logger", "message", "fields"]
    assert parsed["fields"] == {"law_id": 'law"\n', "number": 7}


def test_a_log_line_never_holds_a_password() -> None:
    """Also where it would be escaped, or is part of an exception."""
    formatter = JsonFormatter(['s3"cret', "p@ss"])
    try:
        raise ValueError("cannot use amqp://u:p@ss@h/")
    except ValueError:
        made = logging.LogRecord("x", logging.ERROR, "f", 1, 'given s3"cret', None, __import__("sys").exc_info())
    line = formatter.format(made)
    assert "cret" not in line and "p@ss" not in line
    json.loads(line)


@pytest.mark.parametrize("secret", ["100", "time", '"', "p", ":"])
def test_a_log_line_stays_json_whatever_the_password_is(secret: str) -> None:
    """Keys and numbers are not ours to blot."""
    parsed = json.loads(JsonFormatter([secret]).format(record(f"a {secret} b", number=100, time=1)))
    assert list(parsed) == ["time", "level", "logger", "message", "fields"]
    assert parsed["fields"] == {"number": 100, "time": 1}


def test_the_latencies_of_a_batch_are_counted_up_to_each_bound() -> None:
    """As prometheus_client's own histogram does it, over all batches; a vote from the future has waited for nothing."""
    metrics = Metrics()
    now = datetime.now(UTC)
    told(metrics, voted_at=[now - timedelta(seconds=20), now + timedelta(seconds=5)])
    told(metrics, voted_at=[now - timedelta(hours=2)])
    value = metrics.registry.get_sample_value
    buckets = [value("vote_latency_seconds_bucket", {"le": bound}) for bound in ("0.01", "10.0", "30.0", "3600.0")]
    assert buckets == [1, 1, 2, 2]
    assert value("vote_latency_seconds_bucket", {"le": "+Inf"}) == value("vote_latency_seconds_count") == 3
    assert value("vote_latency_seconds_sum") == pytest.approx(7220, abs=5)
