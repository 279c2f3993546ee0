"""The parts of the orchestrator that need no server."""

from __future__ import annotations

import pytest

from aggregator import _MinuteStats, backoff


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
    """With the sums of its batches, under the minute they were written in."""
    stats = _MinuteStats()
    assert stats.finished(120.0, force=False) is None
    stats.add(votes=98, duplicates=1, rejected=1, busy_seconds=0.5)
    stats.add(votes=100, duplicates=0, rejected=0, busy_seconds=0.25)
    assert stats.finished(179.0, force=False) is None
    assert stats.finished(180.0, force=False) == (120.0, 2, 198, 1, 1, 0.75)
    assert stats.finished(240.0, force=False) is None


def test_the_open_minute_is_written_at_the_end() -> None:
    """What a short run did is not lost."""
    stats = _MinuteStats()
    stats.finished(60.0, force=False)
    stats.add(votes=1, duplicates=0, rejected=0, busy_seconds=0.1)
    assert stats.finished(61.0, force=True) == (60.0, 1, 1, 0, 0, 0.1)
