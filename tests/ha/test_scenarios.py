"""Faults of servers that are several: nothing is lost, nothing is counted twice, hardly anything is returned."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ha.lab import HaLab
from tests.ha.scenarios import SCENARIOS, die_again_and_again


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_lost_or_counted_twice_through(open_lab: Callable[..., HaLab], scenario: str) -> None:
    """... this, on a queue that drops a message after 20 returns."""
    SCENARIOS[scenario](open_lab())


def test_thirty_deaths_lose_nothing_and_are_told_in_time(open_lab: Callable[..., HaLab]) -> None:
    """On the queue as the service declares it, which has no limit."""
    die_again_and_again(open_lab(delivery_limit=None))
