"""Votes over time without a server: how they are joined to periods, and in what parts the log is read."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeline import (
    FIRST_STEP,
    MAX_LAWS,
    MAX_POINTS,
    REST_SECONDS,
    SELECT_BLOCKS,
    SELECT_EXTENT,
    SELECT_TRANSACTIONS,
    Series,
    Timeline,
)

FROM_1970_TO_9998 = st.integers(-100, 4_222_000_000)


@given(st.lists(st.tuples(FROM_1970_TO_9998, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=300))
def test_no_vote_is_lost_in_a_series_and_it_stays_small(votes: list[tuple[int, int, int]]) -> None:
    """In whatever order they come; a period is as long as need be, and no longer."""
    series = Series()
    for vote in votes:
        series.add(*vote)
    data = series.data()
    assert data is not None
    assert (sum(data["oui"]), sum(data["non"])) == tuple(sum(vote[choice] for vote in votes) for choice in (1, 2))
    minutes = [minute for minute, _, _ in votes]
    assert len(data["oui"]) == len(data["non"]) <= MAX_POINTS
    half = data["minutes"] // 2
    assert half == 0 or max(minutes) // half - min(minutes) // half >= MAX_POINTS


def test_a_series_is_by_minutes_from_its_first_vote() -> None:
    """And has a place for those in which nobody voted."""
    series = Series()
    for minute, oui, non in ((28_333_333, 1, 0), (28_333_335, 0, 2)):
        series.add(minute, oui, non)
    assert series.data() == {"from": "2023-11-14T22:13:00Z", "minutes": 1, "oui": [1, 0, 0], "non": [0, 0, 2]}


def test_a_moment_of_no_calendar_has_no_series() -> None:
    """An insider may have written one; it stops no other."""
    series = Series()
    series.add(10**12, 1, 0)
    assert series.data() is None


class Log:
    """Stands for the database: transactions of a vote each, a block each, that take some time to read."""

    def __init__(self, votes: int, laws: list[str]) -> None:
        self.votes = {1_000 + number: laws[number % len(laws)] for number in range(votes)}
        self.blocks = list(self.votes)
        self.laws = laws
        self.seconds = 0.0
        self.now = 0.0
        self.parts: list[tuple[str, int, int]] = []
        self.file = 1
        self.failing = False

    def read(self, statement: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
        if statement == SELECT_EXTENT:
            assert values == {"laws": MAX_LAWS}
            return [(max(self.votes, default=0) + 1, len(self.blocks), self.file, list(self.laws))]
        self.now += self.seconds
        if self.failing:
            raise TimeoutError
        start, end = values["start"], values["end"]
        if statement == SELECT_BLOCKS:
            self.parts.append(("blocks", start, end))
            read = [txid for txid in self.blocks[start:end] if txid in self.votes and txid < values["horizon"]]
        else:
            assert statement == SELECT_TRANSACTIONS
            self.parts.append(("transactions", start, end))
            read = [txid for txid in self.votes if start <= txid < end]
        return [(self.votes[txid], 5, 1, 0) for txid in read if self.votes[txid] in values["laws"]]

    def add(self, txid: int, law: str) -> None:
        self.votes[txid] = law
        self.blocks.append(txid)

    def clock(self) -> float:
        return self.now


def counted(timeline: Timeline, log: Log) -> dict[str, int]:
    return {law: sum(series["oui"]) for law, series in timeline.data(log.laws).items()}


def read_to_the_end(timeline: Timeline, log: Log) -> None:
    while not timeline.data(log.laws):
        timeline.read_on(log.clock)
        log.now += 100


def test_the_log_is_read_in_parts_and_each_vote_once() -> None:
    """Nothing is shown before its end; then only what came since is read."""
    log = Log(20_000, ["law-1", "law-2"])
    timeline = Timeline(log.read)
    timeline.read_on(log.clock)
    assert timeline.data(log.laws) == {}
    read_to_the_end(timeline, log)
    assert counted(timeline, log) == {"law-1": 10_000, "law-2": 10_000}
    log.add(30_000, "law-1")
    read_before = len(log.parts)
    timeline.read_on(log.clock)
    assert log.parts[read_before:] == [("transactions", 21_000, 30_001)]
    assert counted(timeline, log) == {"law-1": 10_001, "law-2": 10_000}
    blocks = [part for part in log.parts if part[0] == "blocks"]
    assert (blocks[0][1], blocks[-1][2]) == (0, 20_000)
    assert all(before[2] == after[1] for before, after in itertools.pairwise(blocks))


def test_what_comes_during_the_first_reading_is_read_once() -> None:
    """Wherever it comes to stand: also in a block that is still to be read, in the place of a row that is no more."""
    log = Log(20_000, ["law-1"])
    del log.votes[16_000]
    timeline = Timeline(log.read)
    timeline.read_on(log.clock)
    log.blocks[15_000] = 30_000
    log.votes[30_000] = "law-1"
    log.add(30_001, "law-1")
    read_to_the_end(timeline, log)
    assert counted(timeline, log) == {"law-1": 20_001}


def test_a_log_in_a_new_file_is_read_again() -> None:
    """VACUUM FULL moves every row to another block."""
    log = Log(20_000, ["law-1", "law-2"])
    log.votes = dict.fromkeys(log.blocks[:5_000], "law-1") | dict.fromkeys(log.blocks[5_000:], "law-2")
    timeline = Timeline(log.read)
    timeline.read_on(log.clock)
    log.blocks, log.file = log.blocks[::-1], 2
    read_to_the_end(timeline, log)
    assert counted(timeline, log) == {"law-1": 5_000, "law-2": 15_000}


def test_only_laws_that_are_asked_for_are_told() -> None:
    """Those that may be shown."""
    log = Log(10, ["law-1", "law-2"])
    timeline = Timeline(log.read)
    read_to_the_end(timeline, log)
    assert timeline.data({"law-2", "law-9"}).keys() == {"law-2"}


def test_slow_parts_become_smaller_and_quick_ones_larger() -> None:
    """Within bounds: a part has to be worth its beginning."""
    log = Log(1_000_000, ["law-1"])
    timeline = Timeline(log.read)
    sizes = []
    for seconds in (0.0, 0.0, 0.0, 0.15, 0.5, 0.5, 0.5, 0.5):
        log.seconds = seconds
        timeline.read_on(log.clock)
        log.now += 100
        _, start, end = log.parts[-1]
        sizes.append(end - start)
    assert [size // FIRST_STEP for size in sizes] == [1, 2, 4, 8, 8, 4, 2, 1]


def test_a_part_that_fails_is_read_again_and_smaller() -> None:
    """As one that takes longer than the database allows."""
    log = Log(20_000, ["law-1"])
    timeline = Timeline(log.read)
    log.failing = True
    for _ in range(3):
        with pytest.raises(TimeoutError):
            timeline.read_on(log.clock)
        log.now += 100
    log.failing = False
    read_to_the_end(timeline, log)
    assert log.parts[0] == ("blocks", 0, FIRST_STEP // 8**3)
    assert counted(timeline, log) == {"law-1": 20_000}


def test_reading_takes_a_twentieth_of_the_time_at_most() -> None:
    """And rests once all is read."""
    log = Log(5_000, ["law-1"])
    log.seconds = 1.0
    timeline = Timeline(log.read)
    timeline.read_on(log.clock)
    assert len(log.parts) == 1
    log.now = 20.9
    timeline.read_on(log.clock)
    assert len(log.parts) == 1
    log.now, log.seconds = 21.0, 0.0
    read_to_the_end(timeline, log)
    read_before, log.now = len(log.parts), log.now - 100 + REST_SECONDS - 0.1
    timeline.read_on(log.clock)
    assert len(log.parts) == read_before


def test_a_law_that_is_new_is_read_from_the_beginning() -> None:
    """It may have had votes before the operator listed it."""
    log = Log(2_000, ["law-1", "law-2"])
    log.laws = ["law-1"]
    timeline = Timeline(log.read)
    read_to_the_end(timeline, log)
    assert counted(timeline, log) == {"law-1": 1_000}
    log.laws = ["law-1", "law-2"]
    timeline.read_on(log.clock)
    read_to_the_end(timeline, log)
    assert counted(timeline, log) == {"law-1": 1_000, "law-2": 1_000}


def test_random_logs_are_read_whole() -> None:
    """Whatever the parts; the seed is printed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(20):
        log = Log(rng.randrange(1, 30_000), [f"law-{n}" for n in range(rng.randrange(1, 5))])
        timeline = Timeline(log.read)
        while not timeline.data(log.laws):
            log.seconds = rng.choice((0.0, 0.15, 0.3))
            timeline.read_on(log.clock)
            log.now += 100
        assert sum(counted(timeline, log).values()) == len(log.votes)
