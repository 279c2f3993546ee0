"""Random faults by the seed. FAULT_SEED=N starts elsewhere; `make soak-ha` runs many more."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.ha.lab import HaLab
from tests.ha.schedules import make_schedule, run_schedule

FIRST_SEED = int(os.environ.get("FAULT_SEED", "2000"))


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 2))
def test_nothing_is_lost_or_counted_twice_by_the_schedule_of_seed(open_lab: Callable[..., HaLab], seed: int) -> None:
    """... this one: a leader or a primary lost, and the reply to a COMMIT."""
    print(f"replay: make soak-ha SCHEDULES=1 SEED={seed}")
    run_schedule(open_lab(), make_schedule(seed))
