"""Faults of servers that are several: nothing is lost, nothing is counted twice, hardly anything is returned."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts.local_cluster import PostgresPair, RabbitMQCluster
from tests.ha.lab import HaLab
from tests.ha.scenarios import SCENARIOS, die_again_and_again
from tests.harness import ROOT

# the folder of the service to try: that of an earlier version shows which of these were red on it
SERVICE = Path(os.environ.get("SERVICE_ROOT", ROOT))


@pytest.fixture
def open_lab(cluster: RabbitMQCluster, pair: PostgresPair, tmp_path: Path) -> Iterator[Callable[..., HaLab]]:
    """Opens a lab with a queue of its own; the servers are whole again afterwards."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(HaLab(cluster, pair, tmp_path, SERVICE, **options))
        cluster.heal()
        pair.heal()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_lost_or_counted_twice_through(open_lab: Callable[..., HaLab], scenario: str) -> None:
    """... this, on a queue that drops a message after 20 returns."""
    SCENARIOS[scenario](open_lab())


def test_thirty_deaths_lose_nothing_and_are_told_in_time(open_lab: Callable[..., HaLab]) -> None:
    """On the queue as the service declares it, which has no limit."""
    die_again_and_again(open_lab(delivery_limit=None))
