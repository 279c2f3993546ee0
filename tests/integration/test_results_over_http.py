"""The results page of a real service: its data, where it is served, and hostile clients beside a running count."""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openapi_spec_validator
import psycopg2
import pytest

from database import SCHEMA_FILE
from results_page import SELECT_RESULTS, ResultsCache, ResultsPage
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages
from tests.conftest import empty_database
from tests.harness import Queue, Results, Service, check_exact, vote, wait_until

Start = Callable[..., Service]


def ask(
    service: Service, path: str, method: str = "GET", port: int | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port or service.port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def data(service: Service) -> dict[str, Any]:
    status, _, body = ask(service, "/results.json")
    assert status == 200
    return dict(json.loads(body))


def test_the_page_shows_what_the_database_holds(start_service: Start, queue: Queue, results: Results) -> None:
    """Every law with votes and every law that is known, copies and rejected messages, in JSON and in CSV."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    messages = list(make_messages(500, 4, 3, 10, 4))
    assert Publisher([queue.url], queue.name).publish(messages).all_confirmed
    wait_until(lambda: results.counted() == 500, "all are counted")
    wait_until(lambda: sum(results.rejected().values()) == 20, "all are rejected")
    results.query(
        "INSERT INTO laws (law_id, title, status, closes_at) VALUES ('law-001', 'One', 'open', NULL),"
        " ('law-002', 'Two', 'closed', NULL), ('law-009', 'Nine', 'open', '2020-01-01Z'),"
        " ('law-010', 'Ten', 'closed', NULL)"
    )
    results.certify("law-002")
    shown = wait_until(lambda: (read := data(service))["votes_counted"] == 500 and read, "the page has them all")
    assert {law["law_id"]: (law["oui"], law["non"]) for law in shown["laws"] if law["total"]} == results.totals()
    assert {law["law_id"]: law["status"] for law in shown["laws"]} == {
        "law-001": "open",
        "law-002": "certified",
        "law-003": "open",
        "law-004": "open",
        "law-009": "closed",
        "law-010": "closed",
    }
    assert [law["title"] for law in shown["laws"][:3]] == ["One", "Two", None]
    assert shown["duplicates"] == sum(results.duplicates().values())
    assert shown["rejected"] == 20
    rows = list(csv.DictReader(io.StringIO(ask(service, "/results.csv")[2].removeprefix("\ufeff"))))
    assert {
        row["law_id"]: (int(row["oui"]), int(row["non"])) for row in rows if row["total"] != "0"
    } == results.totals()
    check_exact(results, messages)


def test_http_is_spoken_as_documented(start_service: Start, results: Results) -> None:
    """HEAD, 304, 404 and 405, with headers that keep a browser from guessing."""
    service = start_service()
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-001', 'One')")
    for path in ("/", "/results.json", "/results.csv", "/?law=law-001&lang=fr"):
        status, headers, body = ask(service, path)
        assert (status, bool(body), headers["X-Content-Type-Options"]) == (200, True, "nosniff")
        head_status, head_headers, nothing = ask(service, path, "HEAD")
        assert (head_status, nothing, head_headers["Content-Length"]) == (200, "", headers["Content-Length"])
        assert ask(service, path, If_None_Match=headers["ETag"])[0] == 304
        assert ask(service, path, If_Modified_Since=headers["Last-Modified"])[0] == 304
        assert ask(service, path, "HEAD", If_None_Match=headers["ETag"])[0] == 304
        assert ask(service, path, If_None_Match='"other"', If_Modified_Since=headers["Last-Modified"])[0] == 200
        assert (
            ask(service, path + ("&" if "?" in path else "?") + "x=y", If_None_Match="garbage", If_Modified_Since="0")[
                0
            ]
            == 200
        )
    for path in ("/", "/results.json", "/results.csv", "/metrics", "/healthz", "/readyz"):
        status, headers, body = ask(service, path)
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
        head_status, head_headers, nothing = ask(service, path, "HEAD")
        assert (head_status, nothing, head_headers.keys()) == (200, "", headers.keys())
        assert ask(service, path, "POST")[0] == ask(service, path, "OPTIONS", Content_Length="0")[0] == 405
    assert "default-src 'none'" in ask(service, "/")[1]["Content-Security-Policy"]
    for path in ("/index.html", "/web/index.html", "/results", "/favicon.ico", "/metrics/", "/../config.py"):
        assert ask(service, path)[0] == 404


# --- no number of an open law ---

COUNTED_LAWS = """
    INSERT INTO laws (law_id, title, status, opens_at, closes_at, eligible_voters) VALUES
        ('law-closed', 'Closed', 'closed', NULL, NULL, 20000),
        ('law-certified', 'Certified', 'closed', NULL, NULL, NULL),
        ('law-open', 'Open', 'open', NULL, NULL, 11111), ('law-until', 'Until', 'open', NULL, '2099-01-01Z', 22222),
        ('law-soon', 'Soon', 'open', '2098-01-01Z', '2099-01-01Z', NULL);
    UPDATE laws SET closes_at = '2026-01-01Z' WHERE status = 'closed';
    INSERT INTO vote_results (law_id, oui_count, non_count, updated_at) VALUES
        ('law-closed', 16013, 16011, '2026-01-01Z'), ('law-certified', 5, 5, '2026-01-01Z');
    INSERT INTO vote_audit (vote_id, law_id, choice, recorded_at, instance, redelivered)
    SELECT gen_random_uuid(), 'law-closed', 'oui', '2026-01-01Z'::timestamptz - make_interval(mins => n), 'test', false
    FROM generate_series(1, 50) AS n
"""
OPEN_VOTES = """
    INSERT INTO vote_results (law_id, oui_count, non_count) VALUES
        ('law-open', 7919, 6007), ('law-until', 104729, 3), ('law-soon', 1, 0), ('law-unknown', 1299709, 15485863);
    INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered)
    SELECT gen_random_uuid(), 'law-open', 'oui', 'test', false FROM generate_series(1, 7919);
    INSERT INTO duplicate_attempts
        (vote_id, law_id, choice, reason, counted_vote_id, counted_law_id, counted_choice, instance)
    SELECT gen_random_uuid(), 'law-open', 'oui', 'duplicate', gen_random_uuid(), 'law-open', 'oui', 'test'
    FROM generate_series(1, 613);
    INSERT INTO rejected_messages (body_sha256, body, body_bytes, reason, law_id, instance)
    SELECT int4send(n), '', 0, 'certified', 'law-open', 'test' FROM generate_series(1, 811) AS n
"""
QUERIES = [
    "",
    "lang=fr",
    *(f"law=law-{law}{form}" for law in ("open", "until", "closed", "unknown") for form in ("", "&embed=1")),
]
ANSWERS = [*((f"/?{query}") for query in QUERIES), "/results.json", "/results.csv", "/timeline.json", "/openapi.json"]
ANSWERS += ["/seals.json", "/verify.html"]


def all_answers(results: Results, hides_open: bool) -> dict[str, Any]:
    """What the page of that database answers to everything, at a moment that is always the same."""
    moment = 1_800_000_000.0
    with contextlib.closing(psycopg2.connect(results.url)) as connection, connection.cursor() as cursor:

        def read(statement: str, values: Any) -> list[tuple[Any, ...]]:
            cursor.execute(statement, values)
            rows = cursor.fetchall()
            return [(moment, *row[1:]) for row in rows] if statement == SELECT_RESULTS else rows

        cache = ResultsCache(read, psycopg2.Error, "The vote", "2026-11-29", hides_open)
        page = ResultsPage(cache, "*")
        page.open(lambda: None)
        page.close()
        for moment in range(0, 2_000, 100):  # time enough between the parts of the log, none of which takes any
            cache.refresh_timeline(lambda moment=moment: float(moment))
        cache.refresh()
        routes = page.routes()
        told = {}
        for asked in ANSWERS:
            path, _, query = asked.partition("?")
            status, headers, body = routes[path]({":query": query}) or (0, {}, b"")
            assert status in (200, 404), asked
            told[asked] = (status, {**headers, "Age": ""}, body, len(body))
        return told


def test_no_answer_depends_on_the_votes_of_an_open_law(services: LocalServices) -> None:
    """Two databases that differ in nothing else give the same answers to the byte: sums, order, sizes and ETags too."""
    told = {}
    with empty_database(services) as without, empty_database(services) as with_votes:
        for results in (without, with_votes):
            results.execute(SCHEMA_FILE.read_text())
            results.query(COUNTED_LAWS)
            results.certify("law-certified")
        with_votes.query(OPEN_VOTES)
        for hides_open in (True, False):
            told[hides_open] = all_answers(without, hides_open), all_answers(with_votes, hides_open)
    hidden_without, hidden_with = told[True]
    assert hidden_without == hidden_with
    # it is the setting that hides them: without it every answer but the description differs
    shown_without, shown_with = told[False]
    differing = {asked for asked in ANSWERS if shown_without[asked] != shown_with[asked]}
    assert differing >= {
        "/?",
        "/?lang=fr",
        "/?law=law-open",
        "/?law=law-unknown",
        "/results.json",
        "/results.csv",
        "/timeline.json",
    }
    listed = {law["law_id"]: law["oui"] for law in json.loads(hidden_with["/results.json"][2])["laws"]}
    assert listed == {"law-closed": 16_013, "law-certified": 5, "law-open": None, "law-until": None, "law-soon": None}
    assert list(json.loads(hidden_with["/timeline.json"][2])["laws"]) == ["law-closed"]


def test_a_service_that_hides_open_laws_tells_none_of_their_numbers(
    start_service: Start, queue: Queue, results: Results
) -> None:
    """Until they close; then it does."""
    service = start_service(RESULTS_PORT="0", RESULTS_VISIBLE="after_close", BATCH_TIMEOUT_SECONDS="0.05")
    port = service.wait_says("starting")["fields"]["RESULTS_PORT"]
    results.query(COUNTED_LAWS)
    results.query(OPEN_VOTES)
    queue.publish(vote("law-until"))
    wait_until(lambda: results.totals()["law-until"] == (104_730, 3), "a vote is counted")
    hidden = re.compile(
        "|".join(rf"\b{number}\b" for number in (7919, 6007, 13926, 104730, 104733, 1299709, 15485863, 613, 811))
    )
    for asked in ANSWERS:
        _, headers, body = ask(service, asked, port=port)
        told = re.sub(r"(?<=\d)[,\u202f](?=\d{3})", "", f"{headers} {body}")
        assert hidden.findall(told) == [], asked
    assert "law-unknown" not in ask(service, "/results.json", port=port)[2]
    results.query("UPDATE laws SET status = 'closed' WHERE law_id = 'law-open'")
    wait_until(lambda: "7919" in ask(service, "/results.json", port=port)[2], "it is shown once it has closed")


def test_open_laws_are_hidden_only_where_metrics_are_elsewhere(start_service: Start) -> None:
    """/metrics has all numbers: exit code 2, and a line that names both settings."""
    service = start_service(wait=False, RESULTS_VISIBLE="after_close")
    assert service.process is not None
    assert service.process.wait(20) == 2
    assert "RESULTS_PORT" in service.log_tail()


# --- votes over time ---


def test_votes_over_time_come_from_the_audit_log(start_service: Start, queue: Queue, results: Results) -> None:
    """Of the laws that the operator has listed: what was there at the start, and what comes after it."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    results.query(COUNTED_LAWS)
    queue.publish(vote("law-open", "oui"), vote("law-open", "non"), vote("law-unknown"))

    def series() -> dict[str, Any]:
        data(service)  # the log is read while somebody looks
        return dict(json.loads(ask(service, "/timeline.json")[2])["laws"])

    shown = wait_until(lambda: (read := series()).keys() == {"law-closed", "law-open"} and read, "both laws are there")
    assert shown["law-closed"] == {"from": "2025-12-31T23:10:00Z", "minutes": 1, "oui": [1] * 50, "non": [0] * 50}
    assert (sum(shown["law-open"]["oui"]), sum(shown["law-open"]["non"])) == (1, 1)
    queue.publish(vote("law-open"))
    wait_until(lambda: sum(series()["law-open"]["oui"]) == 2, "a later vote is there", 60)


# --- the description of the data ---


def test_the_description_is_valid_and_the_answers_are_as_described(
    start_service: Start, queue: Queue, results: Results
) -> None:
    """By a validator of OpenAPI, and each answer by its schema."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    description = json.loads(ask(service, "/openapi.json")[2])
    openapi_spec_validator.validate(description)
    results.query(COUNTED_LAWS)
    results.certify("law-certified")
    queue.publish(vote("law-open"), vote("law-unknown"), b"{")
    wait_until(
        lambda: "law-open" in json.loads(ask(service, "/timeline.json")[2])["laws"] or not data(service), "all is read"
    )
    for path in ("/results.json", "/timeline.json"):
        answer = description["paths"][path]["get"]["responses"]["200"]
        schema = answer["content"]["application/json"]["schema"] | {"components": description["components"]}
        _, headers, body = ask(service, path)
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(body))
        assert set(answer["headers"]) <= set(headers)


def test_the_page_can_be_switched_off(start_service: Start) -> None:
    """Then nothing of it is there, and nothing is read."""
    service = start_service(RESULTS_PAGE="off")
    assert [ask(service, path)[0] for path in ("/", "/results.json", "/results.csv")] == [404, 404, 404]
    assert ask(service, "/metrics")[0] == ask(service, "/readyz")[0] == 200


def test_the_page_can_have_a_port_of_its_own(start_service: Start) -> None:
    """So that /metrics need not be public."""
    service = start_service(RESULTS_PORT="0")
    starting = next(line for line in service.lines() if line["message"] == "starting")
    port = starting["fields"]["RESULTS_PORT"]
    assert port != service.port
    assert [ask(service, path, port=port)[0] for path in ("/", "/results.json", "/results.csv")] == [200, 200, 200]
    assert [ask(service, path, port=port)[0] for path in ("/metrics", "/healthz", "/readyz")] == [404, 404, 404]
    assert [ask(service, path)[0] for path in ("/", "/results.json", "/metrics")] == [404, 404, 200]


def test_a_taken_results_port_ends_the_start(start_service: Start) -> None:
    """Exit code 2, and a line that names the setting."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        service = start_service(wait=False, RESULTS_PORT=str(port))
        assert service.process is not None
        assert service.process.wait(20) == 2
    assert service.says(f"RESULTS_PORT {port} cannot be used")


def test_nothing_is_read_while_nobody_looks(start_service: Start, queue: Queue, results: Results) -> None:
    """And one reading serves all who look within its second."""
    service = start_service(BATCH_TIMEOUT_SECONDS="1.5")
    last_reading = (
        "SELECT query_start FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'vote-aggregator results of %'"
    )
    assert ask(service, "/metrics")[0] == 200
    assert results.query(last_reading) == []
    started = time.monotonic()
    moments = {data(service)["read_at"] for _ in range(100)}
    assert len(moments) <= time.monotonic() - started + 1
    assert len(results.query(last_reading)) == 1
    queue.publish(vote())
    wait_until(lambda: results.counted() == 1, "a batch is written, later than the next reading were due")
    ((waited,),) = results.query(f"SELECT recorded_at - ({last_reading}) > '1 second' FROM vote_audit")
    assert waited, "a part of the last reading may begin after its answer, and the next one were due after a second"


def test_a_locked_table_stops_the_page_and_not_the_count(start_service: Start, queue: Queue, results: Results) -> None:
    """The page's reading waits on a connection of its own; the old results stay, and say their age."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    assert data(service)["votes_counted"] == 0
    connection = psycopg2.connect(results.url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("ALTER VIEW vote_statistics RESET (security_barrier)")  # locks it, and no batch needs it
            queue.publish(vote(), vote())
            wait_until(lambda: service.metric("votes_aggregated_total", law_id="law-001", choice="oui") == 2, "counted")
            wait_until(lambda: int(ask(service, "/results.json")[1]["Age"]) >= 3, "the page tells its age")
            wait_until(lambda: data(service) and service.says("results cannot be read"), "a reading is given up")
            assert service.is_ready()
    finally:
        connection.close()
    wait_until(lambda: data(service)["votes_counted"] == 2, "the page is up to date again")
    assert service.says("results can be read again")


def test_the_page_outlives_a_restart_of_the_database(
    services: LocalServices, start_service: Start, queue: Queue, results: Results
) -> None:
    """It goes on by itself."""
    service = start_service(BATCH_TIMEOUT_SECONDS="0.05")
    queue.publish(vote())
    wait_until(lambda: data(service)["votes_counted"] == 1, "the page shows the vote")
    services.postgres.stop("immediate")
    try:
        assert ask(service, "/results.json")[0] == 200
        wait_until(lambda: int(ask(service, "/results.json")[1]["Age"]) >= 2, "the page tells its age")
    finally:
        services.postgres.start()
    queue.publish(vote())
    wait_until(
        lambda: ask(service, "/results.json")[0] == 200 and data(service)["votes_counted"] == 2, "it goes on", 60
    )


def test_700_000_laws_fit_into_the_memory_of_the_container(start_service: Start, results: Results) -> None:
    """Anybody who may vote can make them: docker-compose.yml allows 256 MB, and the machine has its own needs."""
    start_service().stop()  # makes the tables
    results.query(
        "INSERT INTO vote_results SELECT rpad('law-' || n, 64, 'x'), n % 1000, 1 FROM generate_series(1, 700000) AS n;"
        "INSERT INTO laws (law_id, title)"
        " SELECT rpad('law-' || n, 64, 'x'), repeat('é', 10000) FROM generate_series(1, 1100) AS n"
    )
    service = start_service()
    wait_until(lambda: "__other__" in ask(service, "/metrics")[2], "the totals are read")
    # a reading that takes 3 s is given up: on a busy machine the first may
    wait_until(lambda: ask(service, "/results.json")[0] == 200, "the results are read", 60)
    shown = data(service)
    assert len(shown["laws"]) == 1_000
    assert all(law["title"] == "é" * 999 + "…" for law in shown["laws"])
    assert shown["laws_left_out"]["laws"] == 699_000
    listed = sum(law["total"] for law in shown["laws"])
    assert listed + shown["laws_left_out"]["oui"] + shown["laws_left_out"]["non"] == shown["votes_counted"]
    assert shown["votes_counted"] == results.counted()
    other = sum(service.metric("current_vote_totals", law_id="__other__", choice=choice) for choice in ("oui", "non"))
    assert other < shown["votes_counted"]
    assert ask(service, "/results.csv")[0] == 200
    status = Path(f"/proc/{service.pid}/status").read_text()
    peak_megabytes = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    assert peak_megabytes < 100


# --- hostile clients, while votes are counted ---


class Attack:
    """Clients in threads of their own, bounded in number, that go on until the block ends."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.stop = threading.Event()
        self.sockets: list[socket.socket] = []

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        self.sockets.append(client)
        return client

    def idle(self) -> None:
        """1,000 connections that say nothing."""
        for _ in range(1_000):
            self.connect()

    def slowloris(self) -> None:
        """200 heads that never end, a header at a time."""
        clients = [self.connect() for _ in range(200)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        while clients and not self.stop.wait(0.2):
            for client in list(clients):
                try:
                    client.sendall(b"X-A: b\r\n")
                except OSError:
                    clients.remove(client)

    def endless_headers(self) -> None:
        """As fast as it is taken."""
        for _ in range(200):
            if self.stop.is_set():
                return
            client = self.connect()
            with contextlib.suppress(OSError):
                client.sendall(b"GET / HTTP/1.1\r\n")
                for _ in range(2_000):
                    client.sendall(b"X-A: b\r\n" * 100)

    def bad_requests(self) -> None:
        """Bytes that are no request."""
        kinds = [b"\x16\x03\x01\x00\xff", b"GET\r\n\r\n", b"\0" * 9_000, b"POST / HTTP/1.1\r\n\r\n"]
        for number in range(1_000):
            if self.stop.is_set():
                return
            client = self.connect()
            with contextlib.suppress(OSError):
                client.sendall(kinds[number % 4])

    def flood(self) -> None:
        """Good requests, one after the other as fast as they are answered, on 20 connections."""
        clients = [self.connect() for _ in range(100)][:20]
        with contextlib.suppress(OSError):  # the others may have had to make room
            while not self.stop.is_set():
                for client in clients:
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                for client in clients:
                    client.recv(1_000_000)

    def never_reading(self) -> None:
        """Ask for everything and read none of it."""
        paths = [b"/metrics", b"/results.json", b"/"]
        for number in range(200):
            if self.stop.is_set():
                return
            client = self.connect()
            with contextlib.suppress(OSError):
                client.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % paths[number % 3])


@contextlib.contextmanager
def under(attack: Attack, what: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=what, name="attack")
    thread.start()
    try:
        yield
    finally:
        attack.stop.set()
        thread.join()
        for client in attack.sockets:
            client.close()


@pytest.mark.parametrize("name", ["idle", "slowloris", "endless_headers", "bad_requests", "never_reading", "flood"])
def test_hostile_clients_do_not_disturb_the_count_or_the_metrics(
    start_service: Start, queue: Queue, results: Results, name: str
) -> None:
    """2,000 votes are counted to the vote, and /metrics, /readyz and the page answer all the while."""
    service = start_service()
    attack = Attack(service.port)
    messages = list(make_messages(2_000, 3, 11, 5, 2))
    with under(attack, getattr(attack, name)):
        wait_until(lambda: len(attack.sockets) >= 100, "the attack has begun")
        assert Publisher([queue.url], queue.name).publish(messages).all_confirmed
        answers = 0
        while results.counted() < 2_000:
            assert [ask(service, path)[0] for path in ("/metrics", "/readyz", "/results.json")] == [200, 200, 200]
            answers += 1
            assert answers < 2_000
        assert [ask(service, path)[0] for path in ("/metrics", "/healthz", "/readyz", "/")] == [200] * 4
        threads = len(list(Path(f"/proc/{service.pid}/task").iterdir()))
    wait_until(lambda: sum(results.rejected().values()) == 40, "all are accounted for")
    check_exact(results, messages)
    assert threads < 20
    assert service.stop() == 0
