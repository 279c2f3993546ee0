"""Votes over time, law by law, for the charts of the results page: read from the audit log a part at a time.

It is given a function that reads rows, and knows nothing of the database. No vote is read twice: what is over when the
reading begins is walked along the blocks of the log, which needs no index; what came since is read along its
transactions, as far as all of them are over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

MAX_LAWS = 100  # those of the operator; whoever may vote can make any number of others
MAX_POINTS = 120  # a law; a longer vote has coarser ones
REST_SECONDS = 10.0  # once all is read
BUSY_SHARE = 0.05  # of the time, at most, is spent in reading
FIRST_STEP = 1_000  # blocks or transactions; a batch is one transaction, and two blocks
LONG_SECONDS = 0.2  # a part that takes longer is followed by a smaller one, down to FIRST_STEP
SHORT_SECONDS = 0.1

# Where all transactions before are over; how many blocks the log has, and in which file; which laws.
SELECT_EXTENT = """
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
           pg_relation_size('vote_audit') / current_setting('block_size')::bigint,
           pg_relation_filenode('vote_audit'),
           array(SELECT law_id FROM ONLY laws ORDER BY law_id LIMIT %(laws)s)
"""

# The votes of a part of the log, by law and minute. It takes no other processor from the count.
_SELECT_PART = """
    SET LOCAL max_parallel_workers_per_gather = 0;
    SELECT law_id,
           (extract(epoch FROM date_trunc('minute', recorded_at)) / 60)::bigint AS minute,
           count(*) FILTER (WHERE choice = 'oui'),
           count(*) FILTER (WHERE choice = 'non')
    FROM ONLY vote_audit
    WHERE {} AND law_id = ANY (%(laws)s) AND isfinite(recorded_at)
    GROUP BY law_id, minute
"""
# No row leaves its block: rows of the log are never updated, and what moves them all, as VACUUM FULL, makes a new file.
SELECT_BLOCKS = _SELECT_PART.format(
    "ctid >= format('(%%s,0)', %(start)s)::tid AND ctid < format('(%%s,0)', %(end)s)::tid AND txid < %(horizon)s"
)
SELECT_TRANSACTIONS = _SELECT_PART.format("txid >= %(start)s AND txid < %(end)s")


class Series:
    """The votes of one law, by periods of 1, 2, 4 ... minutes: as short as MAX_POINTS of them allow."""

    def __init__(self) -> None:
        self.minutes = 1  # of a period
        self._periods: dict[int, tuple[int, int]] = {}  # by number, counted from the year 1970

    def add(self, minute: int, oui: int, non: int) -> None:
        """Count votes of that minute (since 1970)."""
        self._count(minute // self.minutes, oui, non)
        while max(self._periods) - min(self._periods) >= MAX_POINTS:
            periods, self._periods = self._periods, {}
            self.minutes *= 2
            for period, counts in periods.items():
                self._count(period // 2, *counts)

    def _count(self, period: int, oui: int, non: int) -> None:
        before = self._periods.get(period, (0, 0))
        self._periods[period] = (before[0] + oui, before[1] + non)

    def data(self) -> dict[str, Any] | None:
        """``from``, ``minutes`` of a period, and oui and non of each; None where the moment is in no calendar."""
        first, last = min(self._periods), max(self._periods)
        try:
            begin = datetime.fromtimestamp(first * self.minutes * 60, UTC)
        except (ValueError, OverflowError, OSError):
            return None
        counts = [self._periods.get(period, (0, 0)) for period in range(first, last + 1)]
        return {
            "from": begin.isoformat().replace("+00:00", "Z"),
            "minutes": self.minutes,
            "oui": [oui for oui, _ in counts],
            "non": [non for _, non in counts],
        }


class Timeline:
    """The series of the operator's laws. ``read_on`` reads one part of the log more, where that is due.

    Used by one thread, except for ``data``. Until the log has been read to its end there is nothing to show.
    """

    def __init__(self, read: Callable[[str, Any], list[tuple[Any, ...]]]) -> None:
        """``read`` returns the rows of a statement with such values, or raises."""
        self._read = read
        self._of: tuple[int, list[str]] | None = None  # the file and the laws that all below is of
        self._series: dict[str, Series] = {}
        self._blocks = self._blocks_read = 0  # of those that the log had when the reading began
        self._read_to = 0  # a transaction: those before are in the series, once all blocks are read
        self._step = FIRST_STEP
        self._next_reading = 0.0
        self._shown: dict[str, dict[str, Any]] = {}

    def data(self, laws: Collection[str]) -> dict[str, dict[str, Any]]:
        """What each of these laws has, as far as it is known: of the moment when the log was last read to its end."""
        shown = self._shown
        return {law_id: shown[law_id] for law_id in sorted(laws) if law_id in shown}

    def read_on(self, clock: Callable[[], float]) -> None:
        """Read a part, if it is time. Raises what ``read`` raises; the part is then read again, smaller, next time."""
        started = clock()
        if started < self._next_reading:
            return
        is_at_end = False
        try:
            is_at_end = self._read_part()
        except Exception:
            self._step = max(self._step // 8, 1)
            raise
        finally:
            now = clock()
            taken = now - started
            self._next_reading = now + max(taken / BUSY_SHARE, REST_SECONDS if is_at_end else 0)
        if taken > LONG_SECONDS:
            self._step = min(self._step, max(self._step // 2, FIRST_STEP))
        elif taken < SHORT_SECONDS:
            self._step *= 2

    def _read_part(self) -> bool:
        """Whether the log is now read to its end."""
        ((horizon, blocks, file, laws),) = self._read(SELECT_EXTENT, {"laws": MAX_LAWS})
        if self._of != (file, laws):
            self._of, self._series, self._shown = (file, laws), {}, {}
            self._blocks, self._blocks_read, self._read_to = blocks, 0, horizon
        if self._blocks_read < self._blocks:
            end = min(self._blocks, self._blocks_read + self._step)
            self._count(SELECT_BLOCKS, start=self._blocks_read, end=end, horizon=self._read_to)
            self._blocks_read = end
            return False
        end = min(horizon, self._read_to + self._step)
        self._count(SELECT_TRANSACTIONS, start=self._read_to, end=end)
        self._read_to = end
        if end < horizon:
            return False
        made = {law_id: series.data() for law_id, series in self._series.items()}
        self._shown = {law_id: data for law_id, data in made.items() if data is not None}
        return True

    def _count(self, statement: str, **part: int) -> None:
        assert self._of is not None
        _, laws = self._of
        for law_id, minute, oui, non in self._read(statement, {**part, "laws": laws}):
            self._series.setdefault(law_id, Series()).add(minute, oui, non)
