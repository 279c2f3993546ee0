"""The results page: what it shows, read at most once a second and only while somebody looks.

It is given a function that reads the rows, and knows nothing of the database. The page itself is web/index.html, which
results_html.py fills in; the votes over time are timeline.py's.
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
import urllib.parse
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from http_server import QUERY, Answer
from observability import OTHER_LAWS
from public_proof import PublicProof
from results_html import FOLDER, PageTemplate, language_of
from timeline import Timeline

logger = logging.getLogger(__name__)

VERIFY_FILE = FOLDER / "verify.html"
OPENAPI_FILE = FOLDER / "openapi.json"
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
CSV_COLUMNS = (
    *("law_id", "title", "oui", "non", "total", "oui_percent", "non_percent", "status", "last_vote_at"),
    *("state", "leader", "lead", "opens_at", "closes_at", "eligible_voters", "turnout_percent"),
)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # by which spreadsheets know UTF-8

LIMITS = {"laws": MAX_LAWS, "title": MAX_TITLE, "most_counted": MAX_COUNTED, "hides_open": False}

# All that the results page shows, of one moment: a row for each law, those that the operator has given a title first,
# then those with most votes, as many as were asked for; each with the sums over the laws that are left out. At least
# one row. Whoever may publish can make as many laws, duplicates and rejected messages as he likes, so that nothing here
# may grow with them.
#
# Where open laws are hidden, nothing of what this answers may depend on their votes: no number, no sum, no order, and
# not whether there are any, by which a law without a row of the operator's would come to be listed. Such a law is open.
SELECT_RESULTS = """
    WITH shown AS (
        SELECT law_id,
               left(title, %(title)s + 1) AS title,
               CASE WHEN NOT is_hidden THEN oui_count END AS oui,
               CASE WHEN NOT is_hidden THEN non_count END AS non,
               CASE WHEN NOT is_hidden THEN oui_percent::text END AS oui_percent,
               CASE WHEN NOT is_hidden THEN non_percent::text END AS non_percent,
               status,
               CASE WHEN NOT is_hidden THEN extract(epoch FROM updated_at)::float8 END AS last_vote_at
        FROM vote_statistics
        CROSS JOIN LATERAL (SELECT %(hides_open)s AND status = 'open' AS is_hidden) AS embargo
        WHERE NOT is_hidden OR title IS NOT NULL
        ORDER BY title IS NULL, CASE WHEN is_hidden THEN 0 ELSE total_count END DESC, law_id
        LIMIT %(laws)s
    ),
    all_laws AS (
        SELECT count(*) AS laws,
               coalesce(sum(oui_count) FILTER (WHERE NOT is_hidden), 0)::bigint AS oui,
               coalesce(sum(non_count) FILTER (WHERE NOT is_hidden), 0)::bigint AS non
        FROM vote_statistics
        CROSS JOIN LATERAL (SELECT %(hides_open)s AND status = 'open' AS is_hidden) AS embargo
        WHERE NOT is_hidden OR title IS NOT NULL
    ),
    left_out AS (
        SELECT all_laws.laws - count(law_id) AS laws,
               all_laws.oui - coalesce(sum(shown.oui), 0)::bigint AS oui,
               all_laws.non - coalesce(sum(shown.non), 0)::bigint AS non
        FROM all_laws LEFT JOIN shown ON true
        GROUP BY all_laws.laws, all_laws.oui, all_laws.non
    )
    SELECT extract(epoch FROM now())::float8,
           CASE WHEN NOT %(hides_open)s THEN
               (SELECT count(*) FROM (SELECT FROM ONLY duplicate_attempts LIMIT %(most_counted)s + 1) AS counted) END,
           CASE WHEN NOT %(hides_open)s THEN
               (SELECT count(*) FROM (SELECT FROM ONLY rejected_messages LIMIT %(most_counted)s + 1) AS counted) END,
           all_laws.oui + all_laws.non,
           left_out.laws,
           left_out.oui,
           left_out.non,
           vote_percent(left_out.oui, left_out.non)::text,
           vote_percent(left_out.non, left_out.oui)::text,
           shown.*,
           extract(epoch FROM laws.opens_at)::float8,
           extract(epoch FROM laws.closes_at)::float8,
           laws.eligible_voters,
           CASE WHEN shown.oui + shown.non > laws.eligible_voters
                THEN round(100.0 * (shown.oui + shown.non) / laws.eligible_voters, 2)
                ELSE vote_percent(shown.oui + shown.non, laws.eligible_voters - shown.oui - shown.non) END::text
    FROM all_laws
    CROSS JOIN left_out
    LEFT JOIN shown ON true
    LEFT JOIN ONLY laws ON laws.law_id = shown.law_id
    ORDER BY shown.law_id
"""

# A percentage in JSON, made as a text; inside of another text a quotation mark would have a backslash before it.
PERCENT_AS_TEXT = re.compile(r'"(oui_percent|non_percent|turnout_percent)":( ?)"([0-9.]+)"')


class Snapshot:
    """The results of one moment, ready to be sent.

    ``rows``: read at, duplicates, rejected, votes counted, and of the laws that are left out their number, oui, non and
    both percentages; then of one law its law_id, title, oui, non, both percentages, status, last vote at, opens at,
    closes at, eligible voters and turnout. Times are Unix seconds, percentages texts, None without votes; hidden is
    None. A single row without a law_id where there are no laws. ``rate`` is in votes a second, None where it is not
    known.
    ``of_vote`` is what is known of the vote as a whole, by its name in the data; ``proof`` that of PublicProof.
    """

    def __init__(
        self,
        rows: Sequence[tuple[Any, ...]],
        rate: float | None,
        of_vote: Mapping[str, Any] | None = None,
        proof: Mapping[str, Any] | None = None,
    ) -> None:
        read_at, duplicates, rejected, votes, *self._left_out = rows[0][:9]
        self.laws = [_law(read_at, *row[9:]) for row in rows if row[9] is not None]
        overall = dict(of_vote or _of_vote()) | {
            "votes_per_second": rate,
            "votes_counted": votes,
            "duplicates": duplicates,
            "rejected": rejected,
            "laws_left_out": dict(zip(("laws", "oui", "non"), self._left_out[:3], strict=True)),
            "proof": proof,
        }
        shown = overall | {"laws": self.laws}
        self.data = {"read_at": _iso(read_at)} | shown
        without_moment = _json_bytes(shown)
        self.etag = _etag(without_moment)
        self.json = b'{"read_at":"%b",' % _iso(read_at).encode() + without_moment[1:]
        self.with_numbers = {law["law_id"] for law in self.laws if law["oui"] is not None}

    @cached_property
    def csv(self) -> bytes:
        """The laws as a table, one a line; those that are left out together in the last one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="raise")
        writer.writeheader()
        writer.writerows(law | {"title": no_formula(law["title"] or "")} for law in self.laws)
        number, oui, non, oui_percent, non_percent = self._left_out
        if number:
            others = _law(0, OTHER_LAWS, f"{number} other laws", oui, non, oui_percent, non_percent, "", *[None] * 5)
            writer.writerow(others | {"state": ""})
        return BYTE_ORDER_MARK + text.getvalue().encode()


def _of_vote(title: str | None = None, day: str | None = None, hides_open: bool = False) -> dict[str, Any]:
    return {"title": title, "date": day, "hides_open_laws": hides_open}


def _law(
    read_at: float,
    law_id: str,
    title: str | None,
    oui: int | None,
    non: int | None,
    oui_percent: str | None,
    non_percent: str | None,
    status: str,
    last_vote_at: float | None,
    opens_at: float | None,
    closes_at: float | None,
    eligible_voters: int | None,
    turnout_percent: str | None,
) -> dict[str, Any]:
    if title is not None and len(title) > MAX_TITLE:
        title = title[: MAX_TITLE - 1] + "…"
    return {
        "law_id": law_id,
        "title": title,
        "oui": oui,
        "non": non,
        "total": None if oui is None or non is None else oui + non,
        "oui_percent": oui_percent,
        "non_percent": non_percent,
        "status": status,
        "last_vote_at": _iso_or_none(last_vote_at),
        "state": _state(status, opens_at, read_at),
        "leader": _leader(oui, non),
        "lead": None if oui is None or non is None else abs(oui - non),
        "opens_at": _iso_or_none(opens_at),
        "closes_at": _iso_or_none(closes_at),
        "eligible_voters": eligible_voters,
        "turnout_percent": turnout_percent,
    }


def _state(status: str, opens_at: float | None, now: float) -> str:
    """What the status means to people."""
    if status == "open":
        return "open" if opens_at is None or opens_at <= now else "not_yet"
    return "ended" if status == "closed" else status


def _leader(oui: int | None, non: int | None) -> str | None:
    """``oui``, ``non`` or ``tie``; None without votes, and where they are hidden."""
    if not oui and not non:
        return None
    assert oui is not None
    assert non is not None
    return "tie" if oui == non else "oui" if oui > non else "non"


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

    def __init__(
        self,
        read: Callable[[str, Any], list[tuple[Any, ...]]],
        unavailable: type[Exception],
        title: str | None = None,
        day: str | None = None,
        hides_open: bool = False,
    ) -> None:
        """``read`` returns the rows of a statement with such values, or raises ``unavailable``.

        ``title`` and ``day`` of the vote are told with the results; ``hides_open``: none of a law that is open are.
        """
        self._read = read
        self.of_vote = _of_vote(title, day, hides_open)
        self._limits = LIMITS | {"hides_open": hides_open}
        self.timeline = Timeline(read)
        self.proof = PublicProof(read, unavailable, hides_open)
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
            rows = self._read(SELECT_RESULTS, self._limits)
            read_at, _, _, votes = rows[0][:4]
            # of the laws that are not hidden alone it would be no rate, and leap when one of them closes
            rate = None if self._limits["hides_open"] else self._rate.add(read_at, votes)
            self.proof.refresh()
            results = Snapshot(rows, rate, self.of_vote, self.proof.summary)
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

    def refresh_timeline(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Read what is due for the votes over time. Where that fails, what is known stays."""
        if self._failing:
            return
        try:
            self.timeline.read_on(clock)
        except self._unavailable as exc:
            logger.warning("votes over time cannot be read", extra={"fields": {"error": str(exc)}})
        except Exception:
            logger.exception("votes over time cannot be read")


class ResultsPage:
    """The page, its data, and the thread that reads for them: ``results-reader``."""

    def __init__(self, cache: ResultsCache, shared_with: str | None = None) -> None:
        """``shared_with``: sites that may show the results in their own, as origins with blanks between, or ``*``."""
        self._cache = cache
        self._shared_with = shared_with or ""
        self._template: PageTemplate | None = None
        self._template_changed_at = 0
        self._openapi = b""
        self._verify = b""
        self._page_headers: dict[str, str] = {}
        self._rendered: dict[str, tuple[Snapshot, bytes]] = {}  # by language, of all laws
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="results-reader", daemon=True)
        self._refreshed: Callable[[], None] = lambda: None

    def open(self, refreshed: Callable[[], None]) -> None:
        """Load the page and start to read when asked; ``refreshed`` is called after each reading."""
        self._template = PageTemplate(self._cache.of_vote["title"], self._cache.of_vote["date"])
        self._openapi = OPENAPI_FILE.read_bytes()
        self._verify = VERIFY_FILE.read_bytes()
        self._page_headers = _page_headers(self._template.page.encode())
        self._template_changed_at = int(max(path.stat().st_mtime for path in FOLDER.iterdir()))
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
        return {
            "/": self._answer_page,
            "/results.json": self._answer_json,
            "/results.csv": self._answer_csv,
            "/timeline.json": self._answer_timeline,
            "/seals.json": self._answer_seals,
            "/verify.html": self._answer_verify,
            "/openapi.json": self._answer_openapi,
        }

    def _run(self) -> None:
        while True:
            self._cache.wanted.wait()
            if self._stopping:
                return
            if self._cache.is_current(time.monotonic()):  # asked for at the very end of the reading before
                self._cache.wanted.clear()
                self._refreshed()
            else:
                self._cache.refresh()
                self._refreshed()
                self._cache.refresh_timeline()

    def _answer_page(self, headers: Mapping[str, str]) -> Answer | None:
        if self._template is None or not self._cache.is_current(time.monotonic()):
            return None
        asked = dict(urllib.parse.parse_qsl(headers.get(QUERY, ""), errors="replace")[:10])
        language = language_of(asked.get("lang"), headers.get("accept-language", ""))
        law_id = asked.get("law")
        is_embedded = law_id is not None and asked.get("embed") == "1"
        chosen = asked.get("lang") == language
        results = self._cache.latest
        sent = self._page_headers | {"Content-Language": language}
        if is_embedded and self._shared_with:
            policy = sent["Content-Security-Policy"].replace(
                "frame-ancestors 'none'", f"frame-ancestors {self._shared_with}"
            )
            sent |= {"Content-Security-Policy": policy, "Cross-Origin-Resource-Policy": "cross-origin"}
        if results is None:
            return 200, sent | {"Cache-Control": "no-store"}, self._render(None, language, law_id, chosen, is_embedded)
        if law_id is not None and law_id not in {law["law_id"] for law in results.laws}:
            return (
                404,
                sent | {"Cache-Control": "no-store"},
                self._render(results, language, law_id, chosen, is_embedded),
            )
        form = json.dumps([self._template.page, results.etag, language, law_id, chosen, is_embedded])
        changed_at = max(self._template_changed_at, self._cache.changed_at)
        return _answer(
            headers,
            sent,
            f"W/{_etag(form.encode())}",
            changed_at,
            lambda: self._render(results, language, law_id, chosen, is_embedded),
        )

    def _render(
        self, results: Snapshot | None, language: str, law_id: str | None, chosen: bool, is_embedded: bool
    ) -> bytes:
        assert self._template is not None
        if results is None:
            return self._template.render(language, None, law_id, chosen, is_embedded)
        if law_id is not None:
            return self._template.render(language, results.data, law_id, chosen, is_embedded)
        name = f"{language} {chosen}"
        rendered = self._rendered.get(name)
        if rendered is None or rendered[0] is not results:
            rendered = self._rendered[name] = (
                results,
                self._template.render(language, results.data, None, chosen, False),
            )
        return rendered[1]

    def _answer_openapi(self, headers: Mapping[str, str]) -> Answer | None:
        if not self._openapi:
            return None
        sent = {"Content-Type": "application/json", "Cache-Control": "no-cache", **self._sharing(headers)}
        return _answer(headers, sent, _etag(self._openapi), self._template_changed_at, lambda: self._openapi)

    def _answer_seals(self, headers: Mapping[str, str]) -> Answer | None:
        if not self._cache.is_current(time.monotonic()):
            return None
        chain = self._cache.proof.chain_json
        if chain is None:
            return _cannot_be_read()
        sent = {"Content-Type": "application/json", "Cache-Control": "max-age=10", **self._sharing(headers)}
        return _answer(headers, sent, _etag(chain), None, lambda: chain)

    def _answer_verify(self, headers: Mapping[str, str]) -> Answer | None:
        if not self._verify:
            return None
        sent = _page_headers(self._verify, connect="'none'")
        del sent["Vary"]
        return _answer(headers, sent, _etag(self._verify), self._template_changed_at, lambda: self._verify)

    def _answer_timeline(self, headers: Mapping[str, str]) -> Answer | None:
        if not self._cache.is_current(time.monotonic()):
            return None
        laws = self._cache.latest.with_numbers if self._cache.latest else set()
        body = _json_bytes({"laws": self._cache.timeline.data(laws)})
        sent = {"Content-Type": "application/json", "Cache-Control": "max-age=10", **self._sharing(headers)}
        return _answer(headers, sent, _etag(body), None, lambda: body)

    def _sharing(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What lets the scripts of other sites read an answer, where they may."""
        if not self._shared_with:
            return {"Cross-Origin-Resource-Policy": "same-origin"}
        origin = headers.get("origin", "").lower()
        if self._shared_with == "*":
            allowed = {"Access-Control-Allow-Origin": "*"}
        else:
            allowed = {"Vary": "Origin"}
            allowed |= {"Access-Control-Allow-Origin": origin} if origin in self._shared_with.split() else {}
        return allowed | {"Access-Control-Expose-Headers": "Age, ETag", "Cross-Origin-Resource-Policy": "cross-origin"}

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
            return _cannot_be_read()
        sent = {
            "Content-Type": content_type,
            "Cache-Control": "max-age=1",
            # seconds since the data was read; also with a 304, so that a page knows how old its data is
            "Age": str(int(now - self._cache.read_at)),
            **self._sharing(headers),
        }
        # weak, since the moment of the reading is left out of it
        return _answer(headers, sent, f"W/{results.etag}", self._cache.changed_at, lambda: body(results))


def _cannot_be_read() -> Answer:
    refusal = {"Content-Type": "application/json", "Cache-Control": "no-store", "Retry-After": "2"}
    return 503, refusal, _json_bytes({"error": "the results cannot be read now"})


def _answer(
    asked: Mapping[str, str], sent: dict[str, str], etag: str, changed_at: int | None, body: Callable[[], bytes]
) -> Answer:
    """200, or 304 where the client has it already."""
    sent = sent | {"ETag": etag}
    if changed_at is not None:
        sent["Last-Modified"] = formatdate(changed_at, usegmt=True)
    if _has_it_already(asked, etag, changed_at):
        del sent["Content-Type"]
        return 304, sent, b""
    return 200, sent, body()


def _has_it_already(asked: Mapping[str, str], etag: str, changed_at: int | None) -> bool:
    known = asked.get("if-none-match")
    if known is not None:
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        return "*" in tags or etag.removeprefix("W/") in tags
    if changed_at is None:
        return False
    try:
        return changed_at <= parsedate_to_datetime(asked.get("if-modified-since", "")).timestamp()
    except (ValueError, OverflowError):
        return False


def _page_headers(page: bytes, connect: str = "'self'") -> dict[str, str]:
    """A page may run its own script and style, known by their hashes, and fetch from ``connect``: nothing else."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(page, b"script"),
        "style-src": _hashes(page, b"style"),
        "connect-src": connect,
        "img-src": "data:",  # the empty icon, which keeps browsers from asking for /favicon.ico
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",  # but for one law alone, where it is shared
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Vary": "Accept-Language",
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


def _iso_or_none(seconds: float | None) -> str | None:
    """None for a moment that no calendar has."""
    try:
        return None if seconds is None else _iso(seconds)
    except (ValueError, OverflowError):
        return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
