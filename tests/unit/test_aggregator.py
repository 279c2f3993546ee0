"""The parts of the orchestrator that need no server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pika
import pytest

from aggregator import _MinuteStats, backoff, main, serve
from config import Settings


@pytest.fixture
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting is set, neither in the environment nor in a .env."""
    monkeypatch.chdir(tmp_path)
    for name in ("RABBITMQ_PASSWORD", "POSTGRES_PASSWORD", "AMQP_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    return monkeypatch


@pytest.mark.parametrize("arguments", [[], ["--check-config"]])
def test_without_passwords_it_ends_with_2_and_names_both(
    bare_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """Before it connects to anything."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "RABBITMQ_PASSWORD is not set" in error and "POSTGRES_PASSWORD is not set" in error


def test_check_config_shows_the_settings_and_no_password(
    bare_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends with 0."""
    bare_environment.setenv("RABBITMQ_PASSWORD", "hunter2")
    bare_environment.setenv("POSTGRES_PASSWORD", "hunter3")
    assert main(["--check-config"]) == 0
    output = capsys.readouterr()
    assert "BATCH_SIZE=100" in output.out
    assert "hunter" not in output.out + output.err


def test_with_another_pika_it_ends_with_2_and_names_the_setting(
    bare_environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it connects to anything, in one line."""
    bare_environment.setattr(pika, "__version__", "1.4.0")
    assert serve(Settings.from_env({"RABBITMQ_PASSWORD": "p", "POSTGRES_PASSWORD": "p"})) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "RABBITMQ_READER=pika" in caplog.text


def test_the_waits_are_one_two_and_four_seconds() -> None:
    """In the middle of the jitter."""
    assert [backoff(attempt, 1.0, 60.0, 0.5) for attempt in range(3)] == [1.0, 2.0, 4.0]


def test_jitter_spreads_a_wait_by_a_quarter_either_way() -> None:
    """So that replicas do not come back in step."""
    assert (backoff(2, 1.0, 60.0, 0.0), backoff(2, 1.0, 60.0, 1.0)) == (3.0, 5.0)


@pytest.mark.parametrize("attempt", [10, 1_000, 10**6])
def test_a_wait_never_exceeds_its_cap(attempt: int) -> None:
    """And a long outage overflows nothing."""
    assert backoff(attempt, 1.0, 30.0, 0.5) == 30.0


def test_a_minute_is_written_once_when_it_is_over() -> None:
    """With the sums of its batches, under the minute they were written in, and why messages were rejected."""
    stats = _MinuteStats()
    nothing = (None, Counter())
    assert stats.finished(120.0, force=False) == nothing
    stats.add(121.0, 98, 1, Counter(bad_choice=1), busy_seconds=0.5)
    stats.add(178.0, 100, 0, Counter(bad_choice=1, not_json=2), busy_seconds=0.25)
    assert stats.finished(179.0, force=False) == nothing
    assert stats.finished(180.0, force=False) == ((120.0, 2, 198, 1, 4, 0.75), {"bad_choice": 2, "not_json": 2})
    assert stats.finished(240.0, force=False) == nothing


def test_the_open_minute_is_written_at_the_end() -> None:
    """What a short run did is not lost."""
    stats = _MinuteStats()
    stats.add(60.0, 1, 0, Counter(), busy_seconds=0.1)
    assert stats.finished(61.0, force=True)[0] == (60.0, 1, 1, 0, 0, 0.1)
