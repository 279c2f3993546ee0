"""Random schedules on a cluster and a pair: a seed says what is published, what breaks, when, and for how long."""

from __future__ import annotations

import random

from tests.faults.schedules import Event, Schedule, make_stream, play
from tests.ha.faults import WEIGHTS, cut_after_the_commit, kill_leader, promote_the_standby
from tests.ha.lab import HaLab

VOTES = 400
STREAM_SECONDS = 4.0
DUPLICATES_PERCENT = (0, 2, 20)


def make_schedule(seed: int) -> Schedule:
    """Two or three replicas; three to five faults, the loss of a leader or a primary and a lost reply among them."""
    rng = random.Random(seed)
    drawn = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=rng.randint(1, 3))
    faults = [*drawn, rng.choice([kill_leader, promote_the_standby]), cut_after_the_commit]
    events = [Event(rng.uniform(0.2, STREAM_SECONDS), rng.uniform(0.5, 3), fault) for fault in faults]
    return Schedule(seed, rng.choice([2, 2, 3]), sorted(events, key=lambda event: event.at))


def run_schedule(lab: HaLab, schedule: Schedule) -> None:
    """Do it, heal, and ask the oracle. Raises Violation."""
    rng = random.Random(schedule.seed)
    duplicates = rng.choice(DUPLICATES_PERCENT)
    messages = make_stream(rng, VOTES, schedule.seed, duplicates, 1 if duplicates else 0)
    play(lab, schedule, rng, messages, STREAM_SECONDS)
    lab.heal()
    lab.check()
