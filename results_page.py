"""The results page: what it shows, read at most once a second and only while somebody looks.

It is given a function that reads the rows, and knows nothing of the database. The page itself is web/index.html.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from http_server import Answer
from observability import OTHER_LAWS

logger = logging.getLogger(__name__)

PAGE_FILE = Path(__file__).with_name("web") / "index.html"
REFRESH_SECONDS = 1.0
BUSY_SHARE = 0.05  # of the time, at most, is spent in reading: a slow one is followed by a long pause
LONGEST_PAUSE_SECONDS = 8.0  # the page calls data old after ten
FAILED_PAUSE_SECONDS = 2.0
RATE_SECONDS = 10.0
LEAST_RATE_SECONDS = 4.0  # batches of a second each make a rate over less a matter of chance
KEPT_SECONDS = 60.0  # readings that a rate can be made from, where they are far apart
MAX_LAWS = 1_000  # in the data and on the page; whoever may vote can make any number of them
MAX_TITLE = 1_000  # characters
MAX_COUNTED = 1_000_000  # duplicates and rejected messages, one by one: beyond that it takes too long
CSV_COLUMNS = ("law_id", "title", "oui", "non", "total", "oui_percent", "non_percent", "status", "last_vote_at")

LIMITS = {"laws": MAX_LAWS, "title": MAX_TITLE, "most_counted": MAX_COUNTED}

# All that the results page shows, of one moment: a row for each law, those that the operator has given a title first,
# then those with most votes, as many as were asked for; each with the sums over the laws that are left out. At least
# one row. Whoever may publish can make as many laws, duplicates and rejected messages as he likes, so that nothing here
# may grow with them.
SELECT_RESULTS = """
    WITH shown AS (
        SELECT law_id,
               left(title, %(title)s + 1),
               oui_count,
               non_count,
               oui_percent::text,
               non_percent::text,
               status,
               extract(epoch FROM updated_at)::float8
        FROM vote_statistics
        ORDER BY title IS NULL, total_count DESC, law_id
        LIMIT %(laws)s
    ),
    all_laws AS (
        SELECT count(*) AS laws,
               coalesce(sum(oui_count), 0)::bigint AS oui,
               coalesce(sum(non_count), 0)::bigint AS non
        FROM vote_statistics
    ),
    left_out AS (
        SELECT all_laws.laws - count(law_id) AS laws,
               all_laws.oui - coalesce(sum(oui_count), 0)::bigint AS oui,
               all_laws.non - coalesce(sum(non_count), 0)::bigint AS non
        FROM all_laws LEFT JOIN shown ON true
        GROUP BY all_laws.laws, all_laws.oui, all_laws.non
    )
    SELECT extract(epoch FROM now())::float8,
           (SELECT count(*) FROM (SELECT FROM ONLY duplicate_attempts LIMIT %(most_counted)s + 1) AS counted),
           (SELECT count(*) FROM (SELECT FROM ONLY rejected_messages LIMIT %(most_counted)s + 1) AS counted),
           all_laws.oui + all_laws.non,
           left_out.laws,
           left_out.oui,
           left_out.non,
           vote_percent(left_out.oui, left_out.non)::text,
           vote_percent(left_out.non, left_out.oui)::text,
           shown.*
    FROM all_laws CROSS JOIN left_out LEFT JOIN shown ON true
    ORDER BY law_id
"""

# A percentage in JSON, made as a text; inside of another text a quotation mark would have a backslash before it.
PERCENT_AS_TEXT = re.compile(r'"(oui_percent|non_percent)":( ?)"([0-9.]+)"')


class Snapshot:
    """The results of one moment, ready to be sent.

    ``rows``: read at, duplicates, rejected, votes counted, and of the laws that are left out their number, oui, non and
    both percentages; then of one law its law_id, title, oui, non, both percentages, status and last vote at. Times are
    Unix seconds, percentages texts, None without votes. A single row without a law_id where there are no laws. ``rate``
    is in votes a second, None where it is not known.
    """

    def __init__(self, rows: Sequence[tuple[Any, ...]], rate: float | None) -> None:
        read_at, duplicates, rejected, votes, *self._left_out = rows[0][:9]
        self.laws = [_law(*row[9:]) for row in rows if row[9] is not None]
        overall = {
            "votes_per_second": rate,
            "votes_counted": votes,
            "duplicates": duplicates,
            "rejected": rejected,
            "laws_left_out": dict(zip(("laws", "oui", "non"), self._left_out[:3], strict=True)),
        }
        self.etag = _etag(json.dumps([overall, self.laws]).encode())
        self.json = _json_bytes({"read_at": _iso(read_at), **overall, "laws": self.laws})

    @cached_property
    def csv(self) -> bytes:
        """The laws as a table, one a line; those that are left out together in the last one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="raise")
        writer.writeheader()
        writer.writerows(law | {"title": no_formula(law["title"] or "")} for law in self.laws)
        number, oui, non, oui_percent, non_percent = self._left_out
        if number:
            writer.writerow(_law(OTHER_LAWS, f"{number} other laws", oui, non, oui_percent, non_percent, "", None))
        return text.getvalue().encode()


def _law(
    law_id: str,
    title: str | None,
    oui: int,
    non: int,
    oui_percent: str | None,
    non_percent: str | None,
    status: str,
    last_vote_at: float | None,
) -> dict[str, Any]:
    if title is not None and len(title) > MAX_TITLE:
        title = title[: MAX_TITLE - 1] + "…"
    return {
        "law_id": law_id,
        "title": title,
        "oui": oui,
        "non": non,
        "total": oui + non,
        "oui_percent": oui_percent,
        "non_percent": non_percent,
        "status": status,
        "last_vote_at": None if last_vote_at is None else _iso_or_none(last_vote_at),
    }


def json_with_percentages(value: Any, **form: Any) -> str:
    """JSON in which percentages, texts in ``value``, are numbers with the same digits, as a float would not keep them.

    ``form`` is what json.dumps takes.
    """
    return PERCENT_AS_TEXT.sub(r'"\1":\2\3', json.dumps(value, ensure_ascii=False, **form))


def no_formula(title: str) -> str:
    """A title that no spreadsheet takes for a formula."""
    return f"'{title}" if title.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else title


class VoteRate:
    """Votes a second over the last ten seconds, from the readings that were made."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque()

    def add(self, at: float, votes: int) -> float | None:
        """Tell the votes counted ``at`` that moment (Unix seconds). Returns the rate; None in the first seconds."""
        while self._readings and not at - KEPT_SECONDS <= self._readings[0][0] < at:
            self._readings.popleft()
        while len(self._readings) > 1 and self._readings[1][0] <= at - RATE_SECONDS:
            self._readings.popleft()
        self._readings.append((at, votes))
        before, votes_before = self._readings[0]
        if at - before < LEAST_RATE_SECONDS:
            return None
        return round(max(0, votes - votes_before) / (at - before), 1)  # a recount may have lowered the totals


class ResultsCache:
    """The latest results. ``is_current`` asks for a new reading where one is due, ``refresh`` makes it."""

    def __init__(self, read: Callable[[str, Any], list[tuple[Any, ...]]], unavailable: type[Exception]) -> None:
        """``read`` returns the rows of a statement with such values, or raises ``unavailable``."""
        self._read = read
        self._unavailable = unavailable
        self._rate = VoteRate()
        self._next_reading = 0.0
        self._failing = False
        self.wanted = threading.Event()
        self.latest: Snapshot | None = None
        self.read_at = 0.0  # time.monotonic() of ``latest``
        self.changed_at = 0  # Unix time of the first reading that was as ``latest`` is

    def is_current(self, now: float) -> bool:
        """Whether ``latest`` is all that can be had at ``now`` (time.monotonic()); else a reading is under way."""
        if now < self._next_reading:
            return True
        self.wanted.set()
        return False

    def refresh(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Read. Where that fails the latest results stay, and grow old."""
        started = clock()
        try:
            rows = self._read(SELECT_RESULTS, LIMITS)
            read_at, _, _, votes = rows[0][:4]
            results = Snapshot(rows, self._rate.add(read_at, votes))
        except Exception as exc:
            if not self._failing:
                unforeseen = None if isinstance(exc, self._unavailable) else exc  # a bug must not end the readings
                logger.warning("results cannot be read", extra={"fields": {"error": str(exc)}}, exc_info=unforeseen)
            self._failing = True
        else:
            if self._failing:
                logger.info("results can be read again")
            self._failing = False
            if self.latest is None or results.etag != self.latest.etag:
                self.changed_at = max(int(read_at), self.changed_at)
            self.latest, self.read_at = results, started
        now = clock()
        taken = now - started
        pause = FAILED_PAUSE_SECONDS if self._failing else min(taken / BUSY_SHARE, LONGEST_PAUSE_SECONDS)
        self._next_reading = max(started + REFRESH_SECONDS, now + pause)
        self.wanted.clear()


class ResultsPage:
    """``/``, ``/results.json`` and ``/results.csv``, and the thread that reads for them: ``results-reader``."""

    def __init__(self, cache: ResultsCache) -> None:
        self._cache = cache
        self._page = b""
        self._page_headers: dict[str, str] = {}
        self._page_changed_at = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="results-reader", daemon=True)
        self._refreshed: Callable[[], None] = lambda: None

    def open(self, refreshed: Callable[[], None]) -> None:
        """Load the page and start to read when asked; ``refreshed`` is called after each reading."""
        self._page = PAGE_FILE.read_bytes()
        self._page_headers = _page_headers(self._page)
        self._page_changed_at = int(PAGE_FILE.stat().st_mtime)
        self._refreshed = refreshed
        self._thread.start()

    def close(self) -> None:
        """Start no further reading. One that is under way is its reader's to cut."""
        self._stopping = True
        self._cache.wanted.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def routes(self) -> dict[str, Callable[[Mapping[str, str]], Answer | None]]:
        """What answers each path, from the headers of the request; None while the data is being read."""
        return {"/": self._answer_page, "/results.json": self._answer_json, "/results.csv": self._answer_csv}

    def _run(self) -> None:
        while True:
            self._cache.wanted.wait()
            if self._stopping:
                return
            if self._cache.is_current(time.monotonic()):  # asked for at the very end of the reading before
                self._cache.wanted.clear()
            else:
                self._cache.refresh()
            self._refreshed()

    def _answer_page(self, headers: Mapping[str, str]) -> Answer | None:
        if not self._page:
            return None
        return _answer(headers, self._page_headers, _etag(self._page), self._page_changed_at, lambda: self._page)

    def _answer_json(self, headers: Mapping[str, str]) -> Answer | None:
        return self._answer_data(headers, "application/json", lambda results: results.json)

    def _answer_csv(self, headers: Mapping[str, str]) -> Answer | None:
        return self._answer_data(headers, "text/csv; charset=utf-8", lambda results: results.csv)

    def _answer_data(
        self, headers: Mapping[str, str], content_type: str, body: Callable[[Snapshot], bytes]
    ) -> Answer | None:
        now = time.monotonic()
        if not self._cache.is_current(now):
            return None
        results = self._cache.latest
        if results is None:
            refusal = {"Content-Type": "application/json", "Cache-Control": "no-store", "Retry-After": "2"}
            return 503, refusal, _json_bytes({"error": "the results cannot be read now"})
        sent = {
            "Content-Type": content_type,
            "Cache-Control": "max-age=1",
            # seconds since the data was read; also with a 304, so that a page knows how old its data is
            "Age": str(int(now - self._cache.read_at)),
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        # weak, since the moment of the reading is left out of it
        return _answer(headers, sent, f"W/{results.etag}", self._cache.changed_at, lambda: body(results))


def _answer(
    asked: Mapping[str, str], sent: dict[str, str], etag: str, changed_at: int, body: Callable[[], bytes]
) -> Answer:
    """200, or 304 where the client has it already."""
    sent = sent | {"ETag": etag, "Last-Modified": formatdate(changed_at, usegmt=True)}
    if _has_it_already(asked, etag, changed_at):
        del sent["Content-Type"]
        return 304, sent, b""
    return 200, sent, body()


def _has_it_already(asked: Mapping[str, str], etag: str, changed_at: int) -> bool:
    known = asked.get("if-none-match")
    if known is not None:
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        return "*" in tags or etag.removeprefix("W/") in tags
    try:
        return changed_at <= parsedate_to_datetime(asked.get("if-modified-since", "")).timestamp()
    except (ValueError, OverflowError):
        return False


def _page_headers(page: bytes) -> dict[str, str]:
    """The page may run its own script and style, known by their hashes, and fetch from where it came: nothing else."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(page, b"script"),
        "style-src": _hashes(page, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, which keeps browsers from asking for /favicon.ico
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def _hashes(page: bytes, element: bytes) -> str:
    contents = re.findall(rb"<%b>(.*?)</%b>" % (element, element), page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in contents)


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _json_bytes(value: Any) -> bytes:
    return json_with_percentages(value, separators=(",", ":")).encode() + b"\n"


def _iso_or_none(seconds: float) -> str | None:
    """None for a moment that no calendar has."""
    try:
        return _iso(seconds)
    except (ValueError, OverflowError):
        return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
