"""Random schedules: a seed says what is published, what breaks, when, and for how long."""

from __future__ import annotations

import functools
import heapq
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from test_publisher import Message, make_messages
from tests.faults.arrays import in_arrays
from tests.faults.faults import WEIGHTS, Undo, cut_after_the_commit, restore_servers, shut_down_replica
from tests.faults.lab import Lab

VOTES = 500
TIMES_IN_ARRAYS = 4  # as many in the other half of the schedules
DUPLICATES_PERCENT = (0, 2, 20)  # without them most batches are written in one statement
INVALID_PERCENT = 2
STREAM_SECONDS = 2.5


class Event(NamedTuple):
    """A fault, the second in which it begins, and how many seconds it lasts."""

    at: float
    lasts: float
    fault: Callable[[Any, random.Random], Undo]


class Schedule(NamedTuple):
    """All that follows from a seed."""

    seed: int
    replicas: int
    events: list[Event]


def make_schedule(seed: int) -> Schedule:
    """Three or four replicas; four to seven faults, a shutdown and a lost reply to a COMMIT among them."""
    rng = random.Random(seed)
    drawn = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=rng.randint(2, 5))
    faults = [*drawn, shut_down_replica, cut_after_the_commit]
    events = [Event(rng.uniform(0.1, STREAM_SECONDS), rng.uniform(0.1, 2.5), fault) for fault in faults]
    return Schedule(seed, rng.choice([3, 3, 4]), sorted(events, key=lambda event: event.at))


def run_schedule(lab: Lab, schedule: Schedule) -> None:
    """Do it, heal, and ask the oracle. Raises Violation."""
    rng = random.Random(schedule.seed)
    duplicates = rng.choice(DUPLICATES_PERCENT)
    messages = make_stream(rng, VOTES, schedule.seed, duplicates, INVALID_PERCENT if duplicates else 0)
    try:
        play(lab, schedule, rng, messages, STREAM_SECONDS)
    except BaseException:
        restore_servers(lab)
        raise
    lab.heal()
    lab.check()


def make_stream(rng: random.Random, votes: int, seed: int, duplicates: float, invalid: float) -> list[Message]:
    """So many votes by themselves, or several times as many in arrays."""
    if rng.random() < 0.5:
        return list(make_messages(votes, 5, seed, duplicates, invalid))
    made = make_messages(votes * TIMES_IN_ARRAYS, 20, seed, duplicates, invalid)
    return list(in_arrays(made, seed, rivals=duplicates / 500))


def play(lab: Any, schedule: Schedule, rng: random.Random, messages: Sequence[Message], seconds: float) -> None:
    """Start the replicas and a stream of the messages, and let each event begin and end at its time."""
    for _ in range(schedule.replicas):
        lab.replica(wait=False)
    for replica in lab.replicas:
        replica.wait_ready()
    lab.publish_behind(messages, rate=len(messages) / seconds)

    started = time.monotonic()
    timeline: list[tuple[float, int, Callable[[], Callable[[], None] | None]]] = []
    for number, event in enumerate(schedule.events):
        heapq.heappush(timeline, (event.at, number, functools.partial(event.fault, lab, rng)))
    while timeline:
        at, number, act = heapq.heappop(timeline)
        time.sleep(max(0.0, started + at - time.monotonic()))  # the schedule's time, not a wait for a condition
        undo = act()
        if undo is not None:
            until = time.monotonic() - started + schedule.events[number].lasts
            heapq.heappush(timeline, (until, number, undo))
