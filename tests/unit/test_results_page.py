"""The results page without a server: what is rendered, when it is read, what the client need not get again."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from decimal import Decimal
from typing import Any

import pytest

from public_proof import COUNT_CERTIFICATES, SELECT_NEW_SEALS
from results_html import FOLDER, LANGUAGES, PageTemplate, _Words, language_of
from results_page import CSV_COLUMNS, OPENAPI_FILE, ResultsCache, ResultsPage, Snapshot, VoteRate

Row = tuple[Any, ...]


def row(
    law_id: str | None = "law-001", title: str | None = None, oui: int | None = 3, non: int | None = 1, **changes: Any
) -> Row:
    """One law, and no other beside it unless ``votes``, ``left_out`` and its two ``left_out_percents`` are given."""
    facts = {
        "read_at": 1_700_000_000.25,
        "votes": (oui or 0) + (non or 0),
        "left_out": (0, 0, 0),
        "left_out_percents": (None, None),
    }
    facts |= {"percents": ("75.00", "25.00"), "status": "open", "last": 1_699_999_999.0}
    facts |= {"opens": None, "closes": None, "eligible": None, "turnout": None} | changes
    read_at, votes, left_out, left_out_percents, percents, *of_law = facts.values()
    return (read_at, 5, 2, votes, *left_out, *left_out_percents, law_id, title, oui, non, *percents, *of_law)


def together(*rows: Row) -> list[Row]:
    """These laws, and no other."""
    return [(*row[:3], sum(row[3] for row in rows), *row[4:]) for row in rows]


class Unavailable(Exception):
    """As the database's edge raises it."""


class Source:
    """Stands for the database: answers ``rows``, or fails."""

    def __init__(self, *rows: Row) -> None:
        self.rows = list(rows)
        self.failing = False
        self.readings = 0

    def read(self, statement: str, limits: dict[str, int]) -> list[Row]:
        self.readings += 1
        if self.failing:
            raise Unavailable("away")
        return {SELECT_NEW_SEALS: [], COUNT_CERTIFICATES: [(0,)]}.get(statement, self.rows)


def cache_of(source: Source) -> ResultsCache:
    return ResultsCache(source.read, Unavailable)


def at(*moments: float) -> Any:
    """A clock that tells these moments, one after the other."""
    return iter(moments).__next__


def test_the_json_holds_each_law_and_the_whole() -> None:
    """Under the names that are documented."""
    without_votes = row("law-002", oui=0, non=0, percents=(None, None), last=None)
    data = json.loads(Snapshot(together(row(title="Loi é"), without_votes), 12.5).json)
    assert data["laws"][0] == {
        "law_id": "law-001",
        "title": "Loi é",
        "oui": 3,
        "non": 1,
        "total": 4,
        "oui_percent": 75.0,
        "non_percent": 25.0,
        "status": "open",
        "last_vote_at": "2023-11-14T22:13:19.000Z",
        "state": "open",
        "leader": "oui",
        "lead": 2,
        "opens_at": None,
        "closes_at": None,
        "eligible_voters": None,
        "turnout_percent": None,
    }
    assert (data["laws"][1]["oui_percent"], data["laws"][1]["last_vote_at"]) == (None, None)
    del data["laws"]
    assert data == {
        "read_at": "2023-11-14T22:13:20.250Z",
        "title": None,
        "date": None,
        "hides_open_laws": False,
        "votes_per_second": 12.5,
        "votes_counted": 4,
        "duplicates": 5,
        "rejected": 2,
        "laws_left_out": {"laws": 0, "oui": 0, "non": 0},
        "proof": None,
    }


def test_without_any_law_there_is_still_a_whole() -> None:
    """As before the first vote."""
    data = json.loads(Snapshot([row(None, oui=0, non=0, last=None)], None).json)
    assert (data["laws"], data["votes_counted"], data["votes_per_second"]) == ([], 0, None)


def test_what_is_left_out_is_told() -> None:
    """All votes are in the sum; the CSV has a line for the laws that it does not name."""
    left_out = (700_000, 1_000_000, 2_000)
    results = Snapshot([row(votes=1_002_004, left_out=left_out, left_out_percents=("99.80", "0.20"))], None)
    data = json.loads(results.json)
    assert data["votes_counted"] == 1_002_004
    assert data["laws_left_out"] == {"laws": 700_000, "oui": 1_000_000, "non": 2_000}
    *_, last = csv.DictReader(io.StringIO(results.csv.decode("utf-8-sig")))
    assert list(last.values())[:6] == ["__other__", "700000 other laws", "1000000", "2000", "1002000", "99.80"]
    assert "__other__" not in Snapshot([row()], None).csv.decode("utf-8-sig")


def test_a_title_is_cut_at_a_thousand_characters() -> None:
    """One title must not fill the memory; the database is asked for one character more, to know that there is more."""
    titles = ["a" * 1_000, "a" * 1_001]
    shown = [json.loads(Snapshot([row(title=title)], None).json)["laws"][0]["title"] for title in titles]
    assert shown == ["a" * 1_000, "a" * 999 + "…"]


def test_percentages_keep_their_digits() -> None:
    """As the database writes them, zeros and all: numbers in JSON, and a title that looks like one stays a text."""
    percents = ("50.00000000000003", "49.99999999999997")
    title = '"oui_percent":"1.50"'
    results = Snapshot(together(row(percents=percents), row("law-002", title, percents=("50.00", "50.00"))), None)
    laws = json.loads(results.json, parse_float=Decimal)["laws"]
    assert [(str(law["oui_percent"]), str(law["non_percent"])) for law in laws] == [percents, ("50.00", "50.00")]
    assert laws[1]["title"] == title
    first, second = csv.DictReader(io.StringIO(results.csv.decode("utf-8-sig")))
    assert (first["oui_percent"], first["non_percent"], second["oui_percent"]) == (*percents, "50.00")


def test_the_csv_reads_back_as_it_was() -> None:
    """Quotes, line breaks and all."""
    title = 'a "quoted", title\r\nin two lines <script>'
    rows = list(
        csv.DictReader(
            io.StringIO(Snapshot(together(row(title=title), row("law-002")), None).csv.decode("utf-8-sig"), newline="")
        )
    )
    assert [rows[0]["title"], rows[0]["oui"], rows[1]["title"]] == [title, "3", ""]


@pytest.mark.parametrize("title", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n=1"])
def test_no_title_is_a_formula_to_a_spreadsheet(title: str) -> None:
    """Which would run it at whoever opens the file."""
    rows = list(csv.DictReader(io.StringIO(Snapshot([row(title=title)], None).csv.decode("utf-8-sig"), newline="")))
    assert rows[0]["title"] == f"'{title}"


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    """From the readings that were made; the first ones tell nothing."""
    rate = VoteRate()
    assert [rate.add(second, 1_000 * second) for second in range(1, 5)] == [None] * 4
    assert rate.add(5, 5_000) == 1_000
    assert [rate.add(second, 5_000) for second in range(6, 16)][-1] == 0
    assert rate.add(1_000, 9_000) is None


def test_no_rate_is_below_zero() -> None:
    """A recount may lower the totals."""
    rate = VoteRate()
    assert [rate.add(second, votes) for second, votes in ((1, 50), (6, 20))] == [None, 0]


def test_it_is_read_only_when_asked_and_not_twice_in_a_second() -> None:
    """However many ask."""
    source = Source(row())
    cache = cache_of(source)
    assert not cache.wanted.is_set()
    assert not cache.is_current(100.0)
    assert cache.wanted.is_set()
    cache.refresh(at(100.0, 100.01))
    assert not cache.wanted.is_set()
    assert all(cache.is_current(now) for now in (100.02, 100.5, 100.99))
    assert not cache.wanted.is_set()
    assert not cache.is_current(101.01)


def test_a_slow_reading_is_made_seldom() -> None:
    """It may take a twentieth of the time, unless the page would pass for old."""
    cache = cache_of(Source(row()))
    cache.refresh(at(100.0, 100.25))
    assert cache.is_current(105.2)
    assert not cache.is_current(105.3)
    cache.refresh(at(200.0, 203.0))
    assert cache.is_current(210.9)
    assert not cache.is_current(211.1)


def test_a_failed_reading_leaves_the_old_results(caplog: pytest.LogCaptureFixture) -> None:
    """Which say how old they are; and it is logged once."""
    source = Source(row())
    cache = cache_of(source)
    cache.refresh(at(100.0, 100.0))
    source.failing = True
    cache.refresh(at(102.0, 105.0))
    cache.refresh(at(170.0, 170.0))
    assert cache.latest is not None
    assert cache.read_at == 100.0
    assert [record.message for record in caplog.records] == ["results cannot be read"]


def test_a_reading_that_fails_otherwise_is_logged_and_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    """With its stack; a bug, or a title in no encoding, must not end the thread that reads."""
    source = Source()  # no row at all
    cache = cache_of(source)
    cache.refresh(at(100.0, 100.0))
    source.rows = [row()]
    cache.refresh(at(110.0, 110.0))
    assert cache.latest is not None
    assert [record.message for record in caplog.records if record.exc_info] == ["results cannot be read"]


class Clock:
    """Stands for time.monotonic in the page."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("results_page.time.monotonic", clock)
    return clock


def answer(page: ResultsPage, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    answered = page.routes()[path]({name.replace("_", "-"): value for name, value in headers.items()})
    assert answered is not None
    return answered


def refresh(cache: ResultsCache, clock: Clock, seconds: float = 0.0) -> None:
    clock.now += seconds
    cache.refresh(clock)


def test_a_client_waits_for_the_first_reading(clock: Clock) -> None:
    """And gets what was read, not an empty page."""
    cache = cache_of(Source(row()))
    page = ResultsPage(cache)
    assert page.routes()["/results.json"]({}) is None
    refresh(cache, clock)
    assert answer(page, "/results.json")[0] == 200


def test_without_any_reading_the_answer_is_503(clock: Clock) -> None:
    """Try again later."""
    source = Source(row())
    source.failing = True
    cache = cache_of(source)
    refresh(cache, clock)
    status, headers, _ = answer(ResultsPage(cache), "/results.json")
    assert (status, headers["Retry-After"]) == (503, "2")


@pytest.mark.parametrize("path", ["/results.json", "/results.csv"])
def test_what_the_client_has_is_not_sent_again(clock: Clock, path: str) -> None:
    """While only the moment of the reading has changed; each way of asking, in the order of their rank."""
    source = Source(row(read_at=1_699_999_990.0))
    cache = cache_of(source)
    page = ResultsPage(cache)
    refresh(cache, clock)
    source.rows = [row()]
    refresh(cache, clock, 10)  # from here on the rate is 0
    _, headers, body = answer(page, path)
    etag, modified = headers["ETag"], headers["Last-Modified"]
    source.rows = [row(read_at=1_700_000_009.0)]
    refresh(cache, clock, 9)
    for asked in (
        {"if_none_match": etag},
        {"if_none_match": f'"x", {etag}'},
        {"if_none_match": "*"},
        {"if_modified_since": modified},
    ):
        status, headers, nothing = answer(page, path, **asked)
        assert (status, nothing, headers["ETag"], headers["Last-Modified"]) == (304, b"", etag, modified)
    assert answer(page, path, if_none_match='"x"', if_modified_since=modified)[0] == 200
    assert answer(page, path, if_modified_since="yesterday")[0] == 200
    source.rows = [row(oui=4, read_at=1_700_000_018.0)]
    refresh(cache, clock, 9)
    for asked in ({"if_none_match": etag}, {"if_modified_since": modified}):
        status, headers, new = answer(page, path, **asked)
        assert status == 200
        assert new != body
        assert headers["ETag"] != etag


def test_the_age_of_the_data_is_told_also_with_a_304(clock: Clock) -> None:
    """A page that polls a service without a database must not think its data fresh."""
    source = Source(row())
    cache = cache_of(source)
    page = ResultsPage(cache)
    refresh(cache, clock)
    _, headers, _ = answer(page, "/results.json")
    assert headers["Age"] == "0"
    source.failing = True
    refresh(cache, clock, 42)
    status, headers, _ = answer(page, "/results.json", if_none_match=headers["ETag"])
    assert (status, headers["Age"]) == (304, "42")


@pytest.fixture
def opened(clock: Clock) -> tuple[Source, ResultsPage, ResultsCache]:
    """A page that has read the results."""
    source = Source(row(title="Loi é"))
    cache = cache_of(source)
    page = ResultsPage(cache)
    page.open(lambda: None)
    page.close()
    refresh(cache, clock)
    return source, page, cache


def test_the_page_may_run_and_fetch_its_own_only(opened: tuple[Source, ResultsPage, ResultsCache]) -> None:
    """No inline handler, no style attribute, nothing from elsewhere."""
    _, page, _ = opened
    status, headers, body = answer(page, "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    script, style = (re.findall(rb"<%b>(.*?)</%b>" % (name, name), body, re.DOTALL) for name in (b"script", b"style"))
    for (text,) in (script, style):
        assert base64.b64encode(hashlib.sha256(text).digest()).decode() in policy
    text = body.decode()
    for forbidden in (
        "http://",
        "https://",
        "innerHTML",
        " onclick",
        " onerror",
        " style=",
        "<script src",
        "@import",
        "url(",
        "{{",
    ):
        assert forbidden not in text


def test_the_page_is_sent_again_only_where_it_shows_something_else(
    opened: tuple[Source, ResultsPage, ResultsCache], clock: Clock
) -> None:
    """Another number, language or law; another moment of the same numbers is none."""
    source, page, cache = opened
    etag = answer(page, "/")[1]["ETag"]
    assert answer(page, "/", if_none_match=etag)[0] == 304
    for asked in ({"accept_language": "fr"}, {":query": "lang=fr"}, {":query": "law=law-001"}, {":query": "lang=en"}):
        assert answer(page, "/", if_none_match=etag, **asked)[0] == 200
    refresh(cache, clock, 2)
    etag = answer(page, "/", if_none_match=etag)[1]["ETag"]
    source.rows = [row(oui=4, title="Loi é", read_at=1_700_000_010.0)]
    refresh(cache, clock, 2)
    assert answer(page, "/", if_none_match=etag)[0] == 200


@pytest.mark.parametrize(
    ("asked", "accepted", "language"),
    [
        (None, "", "en"),
        (None, "fr", "fr"),
        (None, "fr-CH, fr;q=0.9, en;q=0.8, de;q=0.7, *;q=0.5", "fr"),
        (None, "de, en;q=0.5, fr;q=0.9", "fr"),
        (None, "fr;q=0, en;q=0.1", "en"),
        (None, "fry, x" * 1_000, "en"),
        (None, "fr;q=1.2.3", "en"),
        ("fr", "en", "fr"),
        ("en", "fr", "en"),
        ("de", "fr", "fr"),
    ],
)
def test_the_language_is_that_of_the_address_or_of_the_browser(asked: str | None, accepted: str, language: str) -> None:
    """Whatever the header holds."""
    assert language_of(asked, accepted) == language


@pytest.mark.parametrize(
    "accepted", ["fr" + " " * 1_000_000 + "x;", "fr;" + " " * 1_000_000 + "x", "fr;q=" + "1" * 1_000_000]
)
def test_a_reader_cannot_make_the_choice_of_a_language_last(accepted: str) -> None:
    """It takes the interpreter from the count. With time that grows as the square this would not end."""
    assert language_of(None, accepted) in ("fr", "en")


MOMENT = 1_700_000_000.0  # 14 November 2023, 22:13:20 UTC


@pytest.mark.parametrize(
    ("changes", "outcome", "when"),
    [
        ({"oui": 16_013, "non": 16_011}, "Yes leads by 2 votes", "not final"),
        (
            {"oui": 1, "non": 2, "closes": MOMENT + 3_600},
            "No leads by 1 vote",
            "until 14 November 2023, 23:13 UTC, not final",
        ),
        ({"oui": 5, "non": 5}, "Tie", "not final"),
        ({"oui": 0, "non": 0}, "No votes yet", ""),
        ({"oui": 0, "non": 0, "opens": MOMENT + 3_600}, "Voting has not begun", "opens 14 November 2023, 23:13 UTC"),
        (
            {"oui": 3, "non": 1, "status": "closed", "closes": MOMENT - 60},
            "Yes leads by 2 votes, still counting",
            "on 14 November 2023, 22:12 UTC",
        ),
        ({"oui": 5, "non": 5, "status": "closed"}, "Tie, still counting", ""),
        ({"oui": 0, "non": 0, "status": "closed"}, "No votes, still counting", ""),
        ({"oui": 3, "non": 1, "status": "certified"}, "Yes has won by 2 votes", "final"),
        ({"oui": 5, "non": 5, "status": "certified"}, "Tie, final", "final"),
        ({"oui": 10**12 + 1, "non": 0, "status": "certified"}, "Yes has won by 1,000,000,000,001 votes", "final"),
    ],
)
def test_the_outcome_is_said_in_words(
    opened: tuple[Source, ResultsPage, ResultsCache], clock: Clock, changes: dict[str, Any], outcome: str, when: str
) -> None:
    """In the page as it is sent, for those who run no script; a side has won only where the law is certified."""
    source, page, cache = opened
    source.rows = [row(**({"read_at": MOMENT, "percents": ("50.00", "50.00")} | changes))]
    refresh(cache, clock, 2)
    body = answer(page, "/")[2].decode()
    assert f'<td role="cell" class="outcome">{outcome}</td>' in body
    assert f'<span class="when">{when}</span>' in body
    assert ("has won" in body[: body.index("<script")]) == ("has won" in outcome)


def test_numbers_are_written_as_in_french(opened: tuple[Source, ResultsPage, ResultsCache], clock: Clock) -> None:
    """With narrow spaces that do not break, and a comma."""
    source, page, cache = opened
    source.rows = [row(oui=16_013, non=16_011, percents=("50.003", "49.997"), eligible=40_000, turnout="80.06")]
    refresh(cache, clock, 2)
    body = answer(page, "/", accept_language="fr")[2].decode()
    for text in ("Le oui est en tête de 2 voix", "16\u202f013", "50,003\u00a0%", "participation 80,06\u00a0%"):
        assert text in body
    assert 'lang="fr"' in body


@pytest.mark.parametrize("moment", ["", "infinity", "290000-01-01T00:00:00.000000Z", "0000-01-01T00:00:00.000000Z"])
def test_a_moment_that_no_calendar_has_is_a_dash(moment: str) -> None:
    """Whatever stands in the tables, there is a page."""
    template = PageTemplate(None, None)
    for language in ("en", "fr"):
        words = _Words(language, template._texts[language])
        assert words.moment(moment) == "\N{EN DASH}"
        made = {"law_id": "law-1", "certified_by": "x", "certified_at": moment, "sha256": "0"}
        assert "law-1" in words.proof({"seal": "1:0", "sealed_at": moment, "certificates": [made]})["certificates"]


def test_a_law_has_a_page_of_its_own(opened: tuple[Source, ResultsPage, ResultsCache], clock: Clock) -> None:
    """With its title, and its outcome for those who are sent the link."""
    source, page, cache = opened
    source.rows = together(row(title='On <bread> & "games"'), row("law-002", "Other"))
    refresh(cache, clock, 2)
    body = answer(page, "/", **{":query": "law=law-001"})[2].decode()
    title = "On &lt;bread&gt; &amp; &quot;games&quot; \N{EN DASH} Vote results"
    for element in (
        f"<title>{title}</title>",
        f'<meta property="og:title" content="{title}">',
        '<meta property="og:description" content="Yes leads by 2 votes">',
        '<meta property="og:locale" content="en_GB">',
        'id="law-law-001"',
        'href="?law=law-001&amp;lang=fr"',
    ):
        assert element in body
    assert "Other" not in body
    status, headers, body_of_none = answer(page, "/", **{":query": "law=%3Cscript%3E"})
    assert (status, headers["Cache-Control"]) == (404, "no-store")
    assert b"There is no such law here." in body_of_none
    assert b'data-law="&lt;script&gt;"' in body_of_none


def test_without_any_reading_there_is_still_a_page(clock: Clock) -> None:
    """It says itself that it cannot read; nobody keeps it."""
    source = Source(row())
    source.failing = True
    cache = cache_of(source)
    page = ResultsPage(cache)
    page.open(lambda: None)
    page.close()
    refresh(cache, clock)
    status, headers, body = answer(page, "/")
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    assert b"Loading the results" in body


@pytest.mark.parametrize(
    ("shared_with", "origin", "allowed"),
    [
        (None, "https://paper.example", None),
        ("*", "https://paper.example", "*"),
        ("https://paper.example https://tv.example", "https://tv.example", "https://tv.example"),
        ("https://paper.example https://tv.example", "https://other.example", None),
        ("https://paper.example", "https://paper", None),
    ],
)
def test_other_sites_get_what_they_are_given(
    clock: Clock, shared_with: str | None, origin: str, allowed: str | None
) -> None:
    """The data for their scripts, and one law in a frame; nothing unless a setting says so."""
    cache = cache_of(Source(row()))
    page = ResultsPage(cache, shared_with)
    page.open(lambda: None)
    page.close()
    refresh(cache, clock)
    for path in ("/results.json", "/results.csv", "/timeline.json", "/openapi.json"):
        headers = answer(page, path, origin=origin)[1]
        assert headers.get("Access-Control-Allow-Origin") == allowed
        assert headers["Cross-Origin-Resource-Policy"] == ("cross-origin" if shared_with else "same-origin")
        assert ("Vary" in headers) == (shared_with not in (None, "*"))
    for query, frames in (
        ("law=law-001&embed=1", shared_with or "'none'"),
        ("law=law-001", "'none'"),
        ("embed=1", "'none'"),
    ):
        policy = answer(page, "/", **{":query": query})[1]["Content-Security-Policy"]
        assert f"frame-ancestors {frames};" in policy
        assert "Access-Control-Allow-Origin" not in answer(page, "/", origin=origin)[1]


def test_what_is_hidden_has_no_number(opened: tuple[Source, ResultsPage, ResultsCache], clock: Clock) -> None:
    """In words on the page, as null in JSON, empty in CSV."""
    source, page, cache = opened
    source.rows = [row(title="On bread", oui=None, non=None, percents=(None, None), last=None, votes=0)]
    refresh(cache, clock, 2)
    body = answer(page, "/")[2].decode()
    assert '<td role="cell" class="outcome">Results after voting has ended</td>' in body
    (law,) = json.loads(answer(page, "/results.json")[2])["laws"]
    assert {name for name, value in law.items() if value is None} >= {
        "oui",
        "non",
        "total",
        "lead",
        "leader",
        "oui_percent",
    }
    (line,) = csv.DictReader(io.StringIO(answer(page, "/results.csv")[2].decode("utf-8-sig")))
    assert (line["oui"], line["non"], line["total"], line["lead"]) == ("", "", "", "")


def test_the_description_has_each_path_and_each_column() -> None:
    """What is not described is not there, and the other way round."""
    described = json.loads(OPENAPI_FILE.read_bytes())
    assert {"/", "/verify.html", *described["paths"]} == ResultsPage(cache_of(Source(row()))).routes().keys()
    assert set(described["components"]["schemas"]["Law"]["properties"]) == set(CSV_COLUMNS)


def test_each_language_says_everything() -> None:
    """With the same values in it."""
    texts = json.loads((FOLDER / "texts.json").read_bytes())
    values = {
        language: {name: set(re.findall(r"\{(\w+)\}", text)) for name, text in texts[language].items()}
        for language in texts
    }
    assert values["en"] == values["fr"]
    assert set(texts) == set(LANGUAGES)
    assert not [text for text in texts["fr"].values() if re.search(r" [:;!?%»]|« ", text)]


def test_of_many_laws_the_first_are_in_the_html(opened: tuple[Source, ResultsPage, ResultsCache], clock: Clock) -> None:
    """Which says so, and where all are."""
    source, page, cache = opened
    source.rows = together(*[row(f"law-{number:04}", "One of many") for number in range(1, 1_001)])
    refresh(cache, clock, 2)
    body = answer(page, "/")[2].decode()
    assert body.count("One of many") == 100
    assert 'Of 1,000 laws it lists the first 100; all of them: <a href="results.csv">' in body
    assert "law-0999" in answer(page, "/", **{":query": "law=law-0999"})[2].decode()
