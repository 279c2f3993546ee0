"""Random faults by the seed. FAULT_SEED=N starts elsewhere; `make soak` runs many more."""

from __future__ import annotations

import os

import pytest

from tests.faults.lab import Lab
from tests.faults.schedules import make_schedule, run_schedule

FIRST_SEED = int(os.environ.get("FAULT_SEED", "1000"))


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 20))
def test_nothing_is_lost_or_counted_twice_by_the_schedule_of_seed(lab: Lab, seed: int) -> None:
    """... this one: at least three replicas, 500 votes, four faults or more, a shutdown among them."""
    print(f"replay: make soak SCHEDULES=1 SEED={seed}")
    run_schedule(lab, make_schedule(seed))


def test_a_seed_always_gives_the_same_schedule() -> None:
    """Else a failure could not be replayed."""
    assert make_schedule(7) == make_schedule(7) != make_schedule(8)
