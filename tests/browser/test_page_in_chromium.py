"""The results page in a real browser, on the page of a real service."""

from __future__ import annotations

import base64
import http.server
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from scripts import browser
from test_publisher import Publisher, make_messages
from tests.browser.conftest import Page
from tests.harness import ROOT, Queue, Results, Service, vote, wait_until

Start = Callable[..., Service]

HOSTILE_TITLES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></template><svg onload=alert(1)>",
    "&lt;b&gt; &amp; %3Cscript%3E ${alert(1)} {{7*7}}",
    "\u202egnirts desrever and never ended",
    "\u2067\u2066\u202d isolates without an end",
    "ZWJ \U0001f468\u200d\U0001f469\u200d\U0001f467 flags \U0001f1eb\U0001f1f7 " + "a" + "\u0301" * 60,
    "\u0645\u0634\u0631\u0648\u0639 \u0642\u0627\u0646\u0648\u0646",
    "\x1b[31m\x07 two\r\nlines\tand a tab \u2028 and \ufeff more",
    '=HYPERLINK("http://127.0.0.1:9/")',
]


@pytest.fixture
def service(start_service: Start) -> Service:
    return start_service(BATCH_TIMEOUT_SECONDS="0.05")


SOME_AUDITED = """
    INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered)
    SELECT gen_random_uuid(), 'law-0003', 'oui', 'test', false FROM generate_series(1, 9) AS n
"""


def count(results: Results, laws: int) -> None:
    """Put so many laws with votes into the database, as other replicas may have counted them."""
    results.query(
        "INSERT INTO vote_results (law_id, oui_count, non_count)"
        " SELECT 'law-' || to_char(n, 'FM0000'), n * 7 %% 1000, n * 13 %% 1000 FROM generate_series(1, %s) AS n",
        laws,
    )
    results.query(
        "INSERT INTO laws (law_id, title, status)"
        " SELECT law_id, 'Loi numéro ' || right(law_id, 4) || ' relative à l''enseignement',"
        " (ARRAY['open', 'closed', 'closed'])[1 + right(law_id, 4)::int % 3] FROM vote_results"
    )
    results.certify(*(f"law-{n:04}" for n in range(2, laws + 1, 3)))


def test_the_numbers_equal_the_database_and_change_by_themselves(
    page: Page, service: Service, queue: Queue, results: Results
) -> None:
    """Without a reload, without an error, and without a request to anywhere else."""
    Publisher([queue.url], queue.name).publish(make_messages(3_000, 4, 5, 10, 3))
    wait_until(lambda: results.counted() == 3_000, "all are counted")
    page.open(service).shows(results.totals())
    page.run("window.stillHere = true; document.querySelector('#laws tr').dataset.mark = 'same'")
    Publisher([queue.url], queue.name).publish(make_messages(500, 5, 6))
    wait_until(lambda: results.counted() == 3_500, "all are counted")
    page.shows(results.totals())
    assert len(results.totals()) == 5
    assert page.text("#rejected") == ""  # what only those who run the service ask for is in a fold
    page.chromium.find_element(By.CSS_SELECTOR, "#about summary").click()
    shown = {name: page.text(f"#{name}") for name in ("counted", "duplicates", "rejected")}
    assert shown == {"counted": "3,500", "duplicates": f"{sum(results.duplicates().values())}", "rejected": "90"}
    assert page.run("return window.stillHere === true && document.querySelector('#laws tr').dataset.mark === 'same'")
    assert page.requested() == {f"127.0.0.1:{service.port}"}
    assert page.logs() == []


def test_rows_that_did_not_change_are_not_touched(page: Page, service: Service, queue: Queue, results: Results) -> None:
    """Nothing flickers: a new vote changes the row of its law and no other."""
    count(results, 30)
    page.open(service)
    wait_until(lambda: len(page.laws()) == 30, "all laws are there")
    page.run(
        "window.changed = new Set(); new MutationObserver(changes => changes.forEach(change => {"
        " const at = change.target.parentElement.closest('#laws tr');"
        " changed.add(at ? at.querySelector('.id').textContent : change.target.id) }))"
        ".observe(document.getElementById('laws'),"
        " {subtree: true, childList: true, characterData: true, attributes: true})"
    )
    queue.publish(vote("law-0006"))
    wait_until(lambda: page.laws()["law-0006"] == (43, 78), "the vote shows")
    assert page.run("return [...changed]") == ["law-0006"]


def test_of_many_rows_that_change_those_out_of_sight_are_drawn_afterwards(
    page: Page, service: Service, results: Results
) -> None:
    """So that a thousand take no longer than those in sight; all of them are drawn when there is time."""
    count(results, 200)
    page.open(service)
    drawn = "return document.querySelectorAll('#laws tr:not(.later)').length"
    wait_until(lambda: page.run(drawn) == 200, "all rows are drawn")
    put_off = page.chromium.execute_async_script(
        "const [done] = arguments; fetch('results.json').then(answer => answer.json()).then(data => {"
        " for (const law of data.laws) law.oui += 1;"
        " show(data); done(document.querySelectorAll('#laws .later').length) })"
    )
    assert put_off == 150
    wait_until(lambda: page.run(drawn) == 200, "all rows are drawn again")


def test_a_hostile_title_is_text(page: Page, service: Service, results: Results) -> None:
    """Nothing of it runs, is loaded, or changes what is around it."""
    for number, title in enumerate(HOSTILE_TITLES):
        results.query("INSERT INTO laws (law_id, title) VALUES (%s, %s)", f"law-{number}", title)
    page.open(service)
    wait_until(lambda: len(page.laws()) == len(HOSTILE_TITLES), "all laws are there")
    titles = page.run("return [...document.querySelectorAll('#laws .title')].map(title => title.textContent)")
    assert titles == [re.sub("[\u202a-\u202e\u2066-\u2069]", "", title).strip() for title in HOSTILE_TITLES]
    assert page.text("#laws .title") == HOSTILE_TITLES[0]
    # what comes after a title that turns the direction of writing is written as ever, on the screen and on paper
    for media in ("screen", "print"):
        page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
        edges = page.run(
            "return [...document.querySelectorAll('#laws .id')].map(id => { const range = document.createRange();"
            "const edge = n => { range.setStart(id.firstChild, n); range.setEnd(id.firstChild, n + 1);"
            " return range.getBoundingClientRect().left }; const title = id.previousSibling.getBoundingClientRect();"
            " return edge(0) < edge(4) && edge(0) >= title.left })"
        )
        assert all(edges)
    page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert page.run("return document.querySelectorAll('#laws script, #laws img, #laws svg:not(.bar)').length") == 0
    assert page.run("return document.scripts.length") == 2  # one of them is data
    assert page.requested() == {f"127.0.0.1:{service.port}"}
    assert page.logs() == []


def test_a_law_may_have_no_title_and_no_vote(page: Page, service: Service, results: Results) -> None:
    """Then its number stands for the title, and no percentage is made up."""
    law_id = "L" + "-x" * 31 + "."
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-001', ''), (%s, '\u2003 ')", law_id)
    page.open(service).shows({law_id: (0, 0), "law-001": (0, 0)})
    titles = page.run("return [...document.querySelectorAll('#laws .title')].map(title => title.textContent)")
    assert titles == [law_id, "law-001"]
    rows = page.run("return [...document.querySelectorAll('#laws tr')].map(row => row.innerText)")
    words = ["No", "votes", "yet", "0", "0", "0", "Open"]
    assert [row.split() for row in rows] == [[name, *words] for name in (law_id, "law-001")]
    assert page.run("return document.querySelector('.bar').getAttribute('aria-label')") == "no votes"


CLOSE_CALLS = [(1, 20_000), (20_000, 1), (0, 7), (1, 31), (10_001, 10_000), (2, 1), (10**15, 10**15 - 1)]


def percents(page: Page) -> list[list[str]]:
    return list(
        page.run(
            "return [...document.querySelectorAll('#laws tr')].map(row =>"
            " [...row.querySelectorAll('.percent')].map(percent => percent.textContent.trim()))"
        )
    )


@pytest.fixture
def close_calls(results: Results, service: Service) -> Service:
    """A service whose laws are decided by little."""
    for number, (oui, non) in enumerate(CLOSE_CALLS):
        results.query("INSERT INTO vote_results VALUES (%s, %s, %s)", f"law-{number}", oui, non)
    return service


def test_no_percentage_hides_a_vote(page: Page, close_calls: Service, results: Results) -> None:
    """The page shows what the database says, to the digit, and none runs over its cell."""
    page.open(close_calls)
    wait_until(lambda: len(page.laws()) == len(CLOSE_CALLS), "all laws are there")
    said = results.query("SELECT oui_percent || '%', non_percent || '%' FROM vote_statistics ORDER BY law_id")
    assert percents(page) == [list(row) for row in said]
    assert percents(page)[-1] == ["50.00000000000003%", "49.99999999999997%"]
    fits = (
        "return [...document.querySelectorAll('#laws .percent')].every(percent => {"
        " const [inner, outer] = [percent, percent.closest('td')].map(node => node.getBoundingClientRect());"
        " return inner.left > outer.left - 1 && inner.right < outer.right + 1 })"
    )
    assert page.run(fits)
    browser.show_as(page.chromium, 320, 700)
    assert page.run(fits)


def test_percentages_are_written_as_in_french(french_page: Page, close_calls: Service) -> None:
    """With a comma, and a space before the sign."""
    french_page.open(close_calls)
    wait_until(lambda: len(percents(french_page)) == len(CLOSE_CALLS), "all laws are there")
    shown = [[" ".join(text.split()) for text in row] for row in percents(french_page)]
    assert shown[:3] == [["0,005 %", "99,995 %"], ["99,995 %", "0,005 %"], ["0,00 %", "100,00 %"]]


def test_ten_thousand_percentages_keep_their_digits(page: Page, service: Service) -> None:
    """What the page makes of a number in its data has the digits that stand there; the seed is printed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    page.open(service)
    written = []
    for _ in range(10_000):
        decimals = rng.choice((2, 2, 3, 6, 10, 13, 14))
        # beyond 13 decimals only numbers near 50 occur, beyond 2 none that ends in 0
        whole = rng.randrange(101) if decimals < 14 else rng.choice((49, 50))
        end = rng.randrange(100) if decimals == 2 else 10 * rng.randrange(10 ** (decimals - 1)) + rng.randint(1, 9)
        written.append(f"{whole}.{end:0{decimals}}" if whole < 100 else "100.00")
    shown = page.run("return JSON.parse(arguments[0]).map(value => percent.format(value))", f"[{','.join(written)}]")
    assert [(text, f"{number}%") for text, number in zip(shown, written, strict=True) if text != f"{number}%"] == []


def test_the_laws_that_are_left_out_are_told(page: Page, service: Service, results: Results) -> None:
    """A thousand are listed; the sum above is over all."""
    count(results, 1_000)
    page.open(service)
    wait_until(lambda: len(page.laws()) == 1_000, "a thousand laws are there")
    assert not page.text("#left-out")
    results.query("INSERT INTO vote_results SELECT 'x-' || n, 10, 5 FROM generate_series(1, 2000) AS n")
    wait_until(lambda: "2,000 more, with 30,000 votes" in page.text("#left-out"), "what is left out is told")
    assert len(page.laws()) == 1_000
    assert page.text("#counted") == f"{results.counted():,}"


def test_more_than_a_million_duplicates_are_not_counted_one_by_one(page: Page, service: Service) -> None:
    """The service tells one above a million, and the page says what that means."""
    page.open(service).is_live().ask_no_more()
    page.run(
        "$('about').open = true; show({laws: [], laws_left_out: {laws: 0, oui: 0, non: 0}, votes_counted: 1,"
        " votes_per_second: null, duplicates: 1000001, rejected: 1000000, proof: null})"
    )
    assert (page.text("#duplicates"), page.text("#rejected")) == ("> 1,000,000", "1,000,000")


def test_the_policy_stops_what_is_not_the_pages_own(page: Page, service: Service) -> None:
    """Should a text ever become markup: no script, no handler, no request to elsewhere."""
    page.open(service)
    wait_until(lambda: page.text("#none"), "the page is there")
    page.run(
        "const script = document.createElement('script'); try { script.textContent = 'window.ran = 1' } catch {}"
        "document.body.append(script); const button = document.createElement('button');"
        "try { button.setAttribute('onclick', 'window.ran = 2') } catch {} document.body.append(button);"
        "button.click();"
        "try { document.body.innerHTML = '<img src=x onerror=\"window.ran = 3\">' } catch {}"
    )
    assert page.run("return window.ran ?? null") is None
    elsewhere = "return fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.name)"
    assert page.run(elsewhere) == "TypeError"
    assert any("Content Security Policy" in entry["message"] for entry in page.logs())


def test_a_lost_connection_is_said_until_it_is_back(
    page: Page, start_service: Start, queue: Queue, results: Results
) -> None:
    """The numbers stay, marked as no longer current."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    queue.publish(vote())
    page.open(service).shows({"law-001": (1, 0)})
    assert page.text("#sign") == ""
    port = str(service.port)
    assert service.stop() == 0
    wait_until(lambda: "Connection lost" in page.text("#sign"), "the sign is there")
    assert page.laws() == {"law-001": (1, 0)}
    queue.publish(vote())
    start_service(BATCH_TIMEOUT_SECONDS="0.05", METRICS_PORT=port)
    wait_until(lambda: page.text("#sign") == "", "the sign is gone")
    page.shows({"law-001": (2, 0)})


def test_old_data_is_said_to_be_old(page: Page, service: Service, queue: Queue, results: Results) -> None:
    """Where the service answers and cannot read the database."""
    queue.publish(vote())
    page.open(service).shows({"law-001": (1, 0)})
    results.execute("ALTER TABLE rejected_messages RENAME TO away")
    wait_until(lambda: "data is old" in page.text("#sign"), "the sign is there")
    results.execute("ALTER TABLE away RENAME TO rejected_messages")
    wait_until(lambda: page.text("#sign") == "", "the sign is gone")


def test_results_that_were_never_read_are_not_called_a_lost_connection(
    page: Page, service: Service, results: Results
) -> None:
    """A service without its tables answers 503."""
    results.execute("ALTER TABLE rejected_messages RENAME TO away")
    page.open(service)
    wait_until(lambda: "cannot be read" in page.text("#sign"), "the sign is there")
    results.execute("ALTER TABLE away RENAME TO rejected_messages")
    wait_until(lambda: page.text("#sign") == "" and page.text("#counted") == "0", "the sign is gone")


def test_a_page_that_comes_back_into_sight_does_not_call_its_data_old(page: Page, service: Service) -> None:
    """It has asked for none meanwhile; the sign is for faults."""
    page.open(service)
    wait_until(lambda: page.text("#counted") == "0", "the page is there")
    page.ask_no_more()
    page.run("dataFrom -= 60000; document.dispatchEvent(new Event('visibilitychange')); showState()")
    assert page.text("#sign") == ""


def test_the_moment_names_its_time_zone(page: Page, service: Service) -> None:
    """A page that is printed or sent to somebody tells its time anywhere."""
    for zone, name in (("Pacific/Chatham", r"GMT\+1[23]:45"), ("Europe/Paris", r"(CET|CEST|GMT\+[12])")):
        page.chromium.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": zone})
        page.open(service)
        page.is_live()
        assert re.search(rf" \d\d:\d\d:\d\d {name}$", page.text("#moment"))
    page.chromium.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})


def test_each_status_is_said(page: Page, service: Service, results: Results) -> None:
    """Open, closed or certified, in words."""
    count(results, 3)
    page.open(service)
    wait_until(lambda: len(page.laws()) == 3, "all laws are there")
    shown = page.run("return [...document.querySelectorAll('#laws .status')].map(status => status.textContent)")
    assert shown == ["Voting has ended", "Certified", "Open"]
    assert page.text("#moment").startswith("Data of ")


def test_it_speaks_french_to_a_french_browser(french_page: Page, service: Service, results: Results) -> None:
    """Words, numbers and the language that it tells a screen reader."""
    count(results, 3)
    results.query("UPDATE vote_results SET oui_count = 1234567 WHERE law_id = 'law-0001'")
    french_page.open(service)
    wait_until(lambda: french_page.text("#laws tr"), "the laws are there")
    assert french_page.text("h1") == "Résultats des votes"
    assert french_page.run("return document.documentElement.lang") == "fr"
    assert re.sub(r"\s", " ", french_page.text("#laws td.oui b")) == "1 234 567"
    assert french_page.text("#laws .status") == "Scrutin clos"


def test_it_can_be_sorted_and_filtered_once_there_are_many_laws(page: Page, service: Service, results: Results) -> None:
    """By keyboard alone: nothing here needs a mouse."""
    count(results, 20)
    page.open(service)
    wait_until(lambda: len(page.laws()) == 20, "all laws are there")
    assert not page.text("#tools")
    results.query("INSERT INTO vote_results VALUES ('law-0021', 90000, 5)")
    wait_until(lambda: page.text("#tools"), "the tools are there")
    focused = lambda: page.run("return document.activeElement.id || document.activeElement.getAttribute('href')")  # noqa: E731
    order = []
    for _ in range(4):
        page.chromium.switch_to.active_element.send_keys(Keys.TAB)
        order.append(focused())
    assert order == ["switch", "filter", "sort", "?law=law-0001"]
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.chromium.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    assert focused() == "sort"
    page.chromium.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    wait_until(lambda: next(iter(page.laws())) == "law-0021", "most votes come first")
    page.chromium.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    assert focused() == "filter"
    page.chromium.switch_to.active_element.send_keys("NUMERO 0007")
    wait_until(lambda: list(page.laws()) == ["law-0007"], "only that law is left")
    assert page.text("#shown") == "1 of 21 laws"
    page.chromium.switch_to.active_element.send_keys(Keys.CONTROL, "a")
    page.chromium.switch_to.active_element.send_keys(Keys.DELETE)
    wait_until(lambda: len(page.laws()) == 21, "all are back")
    page.chromium.switch_to.active_element.send_keys("0007")
    wait_until(lambda: len(page.laws()) == 1, "only that law is left")
    results.query("ALTER TABLE vote_results DISABLE TRIGGER ALL; DELETE FROM vote_results WHERE law_id = 'law-0021'")
    wait_until(lambda: len(page.laws()) == 20, "a filter that cannot be seen hides nothing")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1_440])
@pytest.mark.parametrize("state", ["live", "empty", "lost", "old", "embargo"])
def test_axe_finds_no_violation(
    page: Page,
    start_service: Start,
    results: Results,
    violations: Callable[[], list[str]],
    theme: str,
    width: int,
    state: str,
) -> None:
    """Contrast, names and roles: on every screen, in both themes, also without data and without a connection."""
    hides = {"RESULTS_PORT": "0", "RESULTS_VISIBLE": "after_close"} if state == "embargo" else {}
    service = start_service(**hides)
    browser.show_as(page.chromium, width, 900, theme, "reduce")
    if state != "empty":
        count(results, 25)
        results.query(SOME_AUDITED)
    page.open(service, port=results_port(service) if hides else None).is_live()
    if state == "live":
        wait_until(lambda: page.run("return document.querySelectorAll('.chart').length"), "a chart is there")
        page.run("$('about').open = true")
    if state == "lost":
        service.kill()
        wait_until(lambda: page.text("#sign"), "the sign is there")
    if state == "old":  # with laws left out
        page.ask_no_more()
        page.run("dataFrom -= 60000; showState(); $('left-out').textContent = 'x'; $('left-out').hidden = false")
        assert page.run("return document.body.className") == "old"
    assert violations() == []


ROLES_OF_TWO_LAWS = Counter(table=1, row=3, columnheader=7, rowheader=2, cell=12, image=2)


def accessibility_tree(page: Page) -> list[dict[str, Any]]:
    """The nodes that a screen reader is told of."""
    nodes: list[dict[str, Any]] = page.chromium.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [node for node in nodes if not node["ignored"]]


def test_a_screen_reader_meets_a_table(page: Page, service: Service, results: Results) -> None:
    """Whatever it looks like: rows with a header each, and bars that say what they show."""
    count(results, 2)
    for width in (360, 1_280):
        browser.show_as(page.chromium, width, 900)
        page.open(service)
        wait_until(lambda: len(page.laws()) == 2, "all laws are there")
        # the browser brings its accessibility tree up to date some time after the page itself
        wait_until(
            lambda: Counter(node["role"]["value"] for node in accessibility_tree(page)) >= ROLES_OF_TWO_LAWS,
            "the whole table is in the accessibility tree",
        )
        tree = accessibility_tree(page)
        roles = Counter(node["role"]["value"] for node in tree)
        assert {role: roles[role] for role in ROLES_OF_TWO_LAWS} == ROLES_OF_TWO_LAWS
        assert [node["name"]["value"] for node in tree if node["role"]["value"] == "image"] == [
            "35.00% yes, 65.00% no"
        ] * 2


@pytest.mark.parametrize("width", [320, 360, 768, 1_160, 1_180, 1_440, 2_560])
def test_nothing_sticks_out_of_the_screen(page: Page, service: Service, results: Results, width: int) -> None:
    """From the smallest phone to the widest screen, with numbers and words as long as they come."""
    count(results, 25)
    results.query("UPDATE vote_results SET oui_count = 1e12, non_count = 1e12 + 1 WHERE law_id = 'law-0001'")
    results.query("UPDATE laws SET title = repeat('مشروع قانون المالية ', 30) WHERE law_id = 'law-0007'")
    results.query("UPDATE laws SET title = repeat('Loi portant diverses dispositions ', 18) WHERE law_id = 'law-0004'")
    results.query("UPDATE laws SET title = repeat('Verfassungsbeschwerde', 8) WHERE law_id = 'law-0003'")
    results.query("UPDATE laws SET title = repeat('x', 10000) WHERE law_id = 'law-0006'")
    results.query("INSERT INTO vote_results VALUES (repeat('a', 64), 1, 1)")
    browser.show_as(page.chromium, width, 900)
    page.open(service)
    wait_until(lambda: len(page.laws()) == 26, "all laws are there")
    assert page.run("return document.documentElement.scrollWidth") <= width
    sticking_out = page.run(
        "const right = document.documentElement.clientWidth; return [...document.querySelectorAll('body *')]"
        ".filter(e => e.getClientRects().length && !e.closest('.unseen, thead, template'))"
        ".filter(e => e.getBoundingClientRect().right > right + 1"
        " || e.scrollWidth > e.clientWidth + 1 && e.matches('td, th, dd'))"
        ".map(e => `${e.tagName} ${e.className} ${e.textContent}`)"
    )
    assert sticking_out == []


def test_who_wants_no_motion_gets_none(page: Page, service: Service, results: Results) -> None:
    """And who has nothing against it sees the bars grow."""
    count(results, 1)
    seen = {}
    for motion in ("no-preference", "reduce"):
        browser.show_as(page.chromium, 1_280, 900, motion=motion)
        page.open(service)
        wait_until(lambda: len(page.laws()) == 1, "the law is there")
        seen[motion] = page.run("return getComputedStyle(document.querySelector('.bar .for')).transitionDuration")
    assert seen == {"no-preference": "0.5s, 0.5s", "reduce": "0s"}


def test_it_prints_on_one_page(page: Page, service: Service, results: Results) -> None:
    """Thirty laws with a title each on a sheet of A4, also from a phone."""
    count(results, 30)
    for width in (360, 1_280):
        browser.show_as(page.chromium, width, 900)
        page.open(service)
        wait_until(lambda: len(page.laws()) == 30, "all laws are there")
        printed = page.chromium.execute_cdp_cmd(
            "Page.printToPDF",
            {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False, "preferCSSPageSize": True},
        )
        assert len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed["data"]))) == 1


def test_a_page_out_of_sight_asks_for_nothing(page: Page, service: Service) -> None:
    """And asks at once when it is seen again."""
    page.open(service).is_live()
    page.run(
        "window.asked = 0; const before = window.fetch; window.fetch = (...a) => { asked++; return before(...a) };"
        "Object.defineProperty(document, 'hidden', {configurable: true, get: () => window.isAway});"
        "window.isAway = true; const wait = window.setTimeout; window.waits = [];"
        "window.setTimeout = (call, ms) => { waits.push(ms); return wait(call, 0) }"
    )
    page.run("clearTimeout(timer); return ask()")
    assert page.run("return asked") == 0
    page.run("window.isAway = false; document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: page.run("return asked") >= 1, "it asks")


# --- the outcome ---

STATES = """
    INSERT INTO laws (law_id, title, status, opens_at, closes_at, eligible_voters) VALUES
        ('law-1', 'A near tie', 'open', NULL, '2099-01-01 20:00Z', 40000), ('law-2', 'A tie', 'open', NULL, NULL, NULL),
        ('law-3', 'No votes', 'open', NULL, NULL, 10), ('law-4', 'Soon', 'open', '2099-01-01Z', '2099-01-02Z', NULL),
        ('law-5', 'Ended', 'closed', NULL, NULL, 100), ('law-6', 'Certified', 'closed', NULL, NULL, NULL),
        ('law-7', 'Huge', 'open', NULL, NULL, NULL), ('law-8', 'Certified tie', 'closed', NULL, NULL, NULL);
    UPDATE laws SET closes_at = '2026-01-01 20:00Z' WHERE status = 'closed';
    INSERT INTO vote_results (law_id, oui_count, non_count) VALUES
        ('law-1', 16013, 16011), ('law-2', 5000, 5000), ('law-5', 100, 201), ('law-6', 1, 20000),
        ('law-7', 1000000000000, 1000000000001), ('law-8', 7, 7)
"""
OUTCOMES = [
    ("Yes leads by 2 votes", "Open", "turnout 80.06%"),
    ("Tie", "Open", ""),
    ("No votes yet", "Open", "turnout 0.00%"),
    ("Voting has not begun", "Not open yet", ""),
    ("No leads by 101 votes, still counting", "Voting has ended", "more votes than the 100 voters entitled"),
    ("No has won by 19,999 votes", "Certified", ""),
    ("No leads by 1 vote", "Open", ""),
    ("Tie, final", "Certified", ""),
]


@pytest.fixture
def states(service: Service, results: Results) -> Service:
    """A service with a law in each state."""
    results.query(STATES)
    results.certify("law-6", "law-8")
    return service


WORDS = """
    return [...document.querySelectorAll('#laws tr')].map(
        row => ['.outcome', '.status', '.turnout', '.when', '.percent', 'b'].map(
            name => [...row.querySelectorAll(name)].map(cell => cell.textContent.trim()).join(' ').trim()))
"""


def test_it_says_who_leads_by_how_much_and_whether_that_is_final(page: Page, states: Service) -> None:
    """In words, with the side that is ahead emphasised."""
    words = page.open(states).is_live().run(WORDS)
    assert [(outcome, status, turnout) for outcome, status, turnout, *_ in words] == OUTCOMES
    assert [when for *_, when, _, _ in words] == [
        *("until 1 Jan 2099, 20:00 UTC, not final", "not final", ""),
        *("opens 1 Jan 2099, 00:00 UTC", "on 1 Jan 2026, 20:00 UTC", "final", "not final", "final"),
    ]
    ahead = page.run("return [...document.querySelectorAll('#laws .ahead')].map(cell => cell.className)")
    assert ahead == ["oui ahead", "non ahead", "non ahead", "non ahead"]
    weights = (
        "return ['td.oui.ahead b', 'td.non:not(.ahead) b']"
        ".map(name => getComputedStyle(document.querySelector(name)).fontWeight)"
    )
    assert page.run(weights) == ["800", "500"]


@pytest.mark.parametrize("language", ["en", "fr"])
def test_without_scripts_it_says_the_same(page: Page, states: Service, language: str) -> None:
    """The service has written into it what the script would: outcome, numbers, states and turnout."""
    with_script = page.open(states, f"/?lang={language}").is_live().run(WORDS)
    page.chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.open(states, f"/?lang={language}")
        page.chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        without = page.run(WORDS)
        assert page.run("return typeof ask") == "undefined"
        widths = (
            "return [...document.querySelectorAll('#laws rect')].map(rect => rect.getBoundingClientRect().width > 0)"
        )
        assert len(page.run(widths)) == 2 * 6 + 6
        assert all(page.run(widths))
        assert page.text("noscript") or page.run("return document.querySelector('noscript').innerHTML")
    finally:
        page.chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    when = 3  # the moments: months in words, in UTC
    spaces = re.compile(r"\s")
    plain = [[spaces.sub(" ", text) for text in [*row[:when], *row[when + 1 :]]] for row in with_script]
    assert [[spaces.sub(" ", text) for text in [*row[:when], *row[when + 1 :]]] for row in without] == plain
    assert [bool(row[when]) for row in without] == [bool(row[when]) for row in with_script]


@pytest.mark.parametrize("runs_scripts", [True, False])
def test_on_a_phone_each_number_has_its_name_beside_it(page: Page, states: Service, runs_scripts: bool) -> None:
    """There is no head of the table there; and the percentage stands below or beside its number, at its edge."""
    browser.show_as(page.chromium, 360, 900)
    page.chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not runs_scripts})
    try:
        page.open(states)
    finally:
        page.chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    if runs_scripts:
        page.is_live()
    names = (
        "return [...document.querySelector('#laws tr').querySelectorAll('td.oui, td.non, td.total')]"
        ".map(cell => getComputedStyle(cell, '::before').content.split('\"')[1]?.trim())"
    )
    assert page.run(names) == ["Yes", "No", "Votes"]
    edges = (
        "const row = document.querySelector('#laws tr'); const edge = (name, side) =>"
        " Math.round(row.querySelector(name).getBoundingClientRect()[side]); return [edge('td.oui b', 'left'),"
        " edge('td.oui .percent', 'left'), edge('td.oui b', 'right')]"
    )
    left, percentage, right = page.run(edges)
    assert percentage == left or percentage > right


# --- bars that can be told apart without colours ---


def luminances(page: Page, at: list[tuple[float, float]]) -> list[float]:
    """How light the screen is there (WCAG's relative luminance), as somebody sees it who sees no colours."""
    page.chromium.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": "achromatopsia"})
    try:
        picture = page.chromium.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
    finally:
        page.chromium.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": "none"})
    pixels = page.chromium.execute_async_script(
        "const [data, at, done] = arguments; const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));"
        "createImageBitmap(new Blob([bytes], {type: 'image/png'})).then(bitmap => {"
        " const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext('2d');"
        " canvas.drawImage(bitmap, 0, 0);"
        " done(at.map(([x, y]) => [...canvas.getImageData(x, y, 1, 1).data])) })",
        picture,
        at,
    )
    assert all(red == green == blue for red, green, blue, _ in pixels)
    shares = [red / 255 for red, *_ in pixels]
    return [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("look", ["light", "dark", "print", "forced colours"])
def test_the_split_can_be_seen_in_grey(page: Page, states: Service, look: str) -> None:
    """Both sides by their lightness, the gap between them from either; and the 50 % mark is not inside of the bar."""
    browser.show_as(page.chromium, 1_280, 900, "dark" if look == "dark" else "light", "reduce")
    if look == "print":
        page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    if look == "forced colours":
        forced = [{"name": "forced-colors", "value": "active"}, {"name": "prefers-reduced-motion", "value": "reduce"}]
        page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": forced})
    try:
        page.open(states).is_live()
        x, y, width, height = page.run(
            "const box = document.querySelector('#law-law-1 .bar').getBoundingClientRect();"
            "return [box.x, box.y, box.width, box.height]"
        )
        middle = y + height / 2
        places = [(x + width * 0.25, middle), (x + width * 0.75, middle), (x + width * 0.50003, middle)]
        yes, no, gap, mark, beside = luminances(page, [*places, (x + width / 2, y - 2), (x + width / 4, y - 2)])
    finally:
        page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert contrast(yes, no) >= 3, look
    assert contrast(mark, beside) >= 3, look
    if look != "forced colours":  # there the sides are black and white, as is all else
        assert min(contrast(gap, yes), contrast(gap, no)) > 1.3, look


# --- whatever is in it ---


def test_no_number_is_broken(french_page: Page, states: Service) -> None:
    """On any screen, in English and French, on the page and in its sentences."""
    for language, width in ((language, width) for language in ("en", "fr") for width in (320, 360, 768, 1_210, 1_440)):
        browser.show_as(french_page.chromium, width, 900)
        french_page.open(states, f"/?lang={language}").is_live()
        broken = french_page.run(
            "const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), broken = [];"
            "for (let node; node = walker.nextNode();) {"
            " if (node.parentElement.closest('script, template, .unseen, thead, noscript, code')) continue;"
            " for (const found of node.data.matchAll(/\\d[\\d.,\\u202f\\u00a0]*[\\d%]/g)) {"
            "  const range = document.createRange(); range.setStart(node, found.index);"
            "  range.setEnd(node, found.index + found[0].length);"
            "  if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) broken.push(found[0]) } }"
            "return broken"
        )
        assert broken == [], (language, width)
        touching = french_page.run(
            "return [...document.querySelectorAll('#laws .percent')].filter(percent => percent.textContent)"
            ".map(percent => [percent, percent.previousSibling].map(node => node.getBoundingClientRect()))"
            ".filter(([percent, before]) => percent.top < before.bottom && percent.left < before.right + 2).length"
        )
        assert touching == 0, (language, width)


def test_no_row_is_blank_in_a_picture_of_the_whole_page(page: Page, service: Service, results: Results) -> None:
    """Also far below what is on the screen."""
    count(results, 60)
    browser.show_as(page.chromium, 1_280, 600, motion="reduce")
    page.open(service).is_live()
    size = page.chromium.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    picture = page.chromium.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    dark = page.chromium.execute_async_script(
        "const [data, done] = arguments; const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));"
        "createImageBitmap(new Blob([bytes], {type: 'image/png'})).then(bitmap => {"
        " const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext('2d');"
        " canvas.drawImage(bitmap, 0, 0);"
        " done([...document.querySelectorAll('#laws tr')].map(row => { const box = row.getBoundingClientRect();"
        "  const {data} = canvas.getImageData(box.x, box.y + scrollY, box.width / 4, box.height);"
        "  return data.filter((value, n) => n % 4 === 0 && value < 60).length })) })",
        picture["data"],
    )
    assert len(dark) == 60
    assert min(dark) > 50


def test_a_law_that_is_open_shows_no_number_where_they_are_hidden(
    page: Page, start_service: Start, results: Results
) -> None:
    """It says that it is open, until when, and why there is no more to see."""
    service = start_service(RESULTS_PORT="0", RESULTS_VISIBLE="after_close")
    results.query(STATES)
    page.open(service, port=results_port(service)).is_live()
    words = page.run(WORDS)
    assert words[0][:2] == ["Results after voting has ended", "Open"]
    assert words[0][4:] == ["", "\u2013 \u2013 \u2013"]
    assert words[4][0] == "No leads by 101 votes, still counting"
    assert "no number is shown" in page.text("#embargo")
    assert [number for number in ("16,013", "16,011", "32,024", "80.06") if number in page.text("main")] == []
    assert page.logs() == []


def results_port(service: Service) -> int:
    return int(service.wait_says("starting")["fields"]["RESULTS_PORT"])


def test_votes_over_time_are_drawn_from_the_audit_log(page: Page, service: Service, results: Results) -> None:
    """For each law that the operator has listed, with words for those who do not see it."""
    results.query(STATES)
    results.query(
        "INSERT INTO vote_audit (vote_id, law_id, choice, recorded_at, instance, redelivered)"
        " SELECT gen_random_uuid(), 'law-1', CASE WHEN n % 3 = 0 THEN 'oui' ELSE 'non' END,"
        " '2026-01-01 08:00Z'::timestamptz + make_interval(mins => n), 'test', false FROM generate_series(0, 599) AS n"
    )
    page.open(service)
    label = "return document.querySelector('#law-law-1 .chart')?.getAttribute('aria-label')"
    wait_until(lambda: page.run(label), "the chart is there")
    assert page.run(label) == (
        "Votes over time, from 1 Jan 2026, 08:00 UTC to 1 Jan 2026, 18:00 UTC; at most 8 votes within 8 minutes"
    )
    assert page.run("return document.querySelectorAll('.chart').length") == 1
    assert page.logs() == []


# --- language, one law, and other sites ---


def test_the_language_can_be_switched(page: Page, states: Service) -> None:
    """And what one looks at stays."""
    page.open(states, "/?law=law-1").is_live()
    page.chromium.find_element(By.ID, "switch").click()
    wait_until(lambda: page.run("return document.documentElement.lang") == "fr", "the page is French")
    page.is_live()
    assert page.text("#laws .outcome") == "Le oui est en tête de 2\u00a0voix".replace("\u00a0", " ")
    assert list(page.run("return [...document.querySelectorAll('#laws tr')].map(row => row.id)")) == ["law-law-1"]
    page.chromium.find_element(By.CSS_SELECTOR, ".one a").click()
    wait_until(lambda: page.run("return document.querySelectorAll('#laws tr').length") == 8, "all laws are there")
    assert page.run("return document.documentElement.lang") == "fr"


def test_a_law_can_be_linked_to(page: Page, states: Service) -> None:
    """By a page of its own with its title, and by an anchor on the page of all."""
    page.open(states, "/?law=law-5").is_live()
    assert page.chromium.title == "Ended \N{EN DASH} Vote results"
    assert page.laws() == {"law-5": (100, 201)}
    assert page.text(".sum") == "", "the sum over all laws is none of this one"
    browser.show_as(page.chromium, 360, 600)
    page.open(states, "/#law-law-7").is_live()
    assert page.run("return document.querySelector(':target .title').textContent") == "Huge"
    page.open(states, "/?law=law-0")
    wait_until(lambda: page.text("#none") == "There is no such law here.", "it says so")


@pytest.fixture
def other_site() -> Iterator[Callable[[str], str]]:
    """A page elsewhere with such a body; answers its address."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,>" + bodies[-1])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def show(body: str) -> str:
            bodies.append(body.encode())
            return f"http://127.0.0.1:{server.server_port}/"

        yield show
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("shared_with", ["", "*"])
def test_one_law_can_be_shown_within_another_site_where_a_setting_says_so(
    page: Page, start_service: Start, results: Results, other_site: Callable[[str], str], shared_with: str
) -> None:
    """In a frame, and by the data that its script may read; else neither."""
    service = start_service(RESULTS_SHARED_WITH=shared_with)
    results.query(STATES)
    results.query(
        "UPDATE laws SET title = 'Loi sur la protection des sources et des zones humides' WHERE law_id = 'law-1'"
    )
    results.query(SOME_AUDITED.replace("law-0003", "law-1"))
    framed = f"http://127.0.0.1:{service.port}/?law=law-1&embed=1"
    (documented,) = re.findall("<iframe .*</iframe>", (ROOT / "docs/RESULTS_PAGE.md").read_text())
    page.chromium.get(other_site(documented.replace("https://votes.example/?law=law-001&embed=1", framed)))
    page.chromium.switch_to.frame(page.chromium.find_element(By.TAG_NAME, "iframe"))
    if shared_with:
        wait_until(lambda: page.text("#laws .outcome") == "Yes leads by 2 votes", "the law is there")
        assert page.text("header") == page.text("footer") == ""
        wait_until(lambda: page.run("return document.querySelectorAll('.chart').length"), "its chart is there")
        assert page.run("return document.querySelector('td.state').getBoundingClientRect().bottom <= innerHeight")
    else:
        assert page.text("#laws") == ""
    page.chromium.switch_to.default_content()
    read = page.chromium.execute_async_script(
        "const [url, done] = arguments; fetch(url).then(answer => answer.json())"
        ".then(data => done(data.laws[0].oui), error => done(error.name))",
        f"http://127.0.0.1:{service.port}/results.json",
    )
    assert read == (16_013 if shared_with else "TypeError")
