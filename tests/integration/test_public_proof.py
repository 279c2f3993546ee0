"""What a real service publishes of the proof: the chain of seals, the newest of them, the certificates' hashes."""

from __future__ import annotations

import hashlib
import itertools
import json
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest

import public_proof
import reconcile
import seals
from database import Database
from public_proof import PublicProof, certificate_hash
from scripts.local_services import LocalServices
from tests.attack.test_insiders import a_vote, connect, count, forced, seal
from tests.harness import Queue, Results, Service, wait_until
from tests.integration.test_few_rights import PASSWORD, set_up_database, with_login

Start = Callable[..., Service]


@pytest.fixture
def sealed(database: Database, results: Results) -> list[seals.Seal]:
    """Three seals of a closed law and an open one."""
    made: list[seals.Seal] = []
    for number in range(3):
        count(database, *(a_vote("law-1") for _ in range(number + 1)), a_vote("law-2"))
        made += seal(results)
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-1', 'On bread', 'closed')")
    return made


def told(service: Service, path: str, port: int | None = None) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port or service.port}{path}", timeout=10) as response:
        return json.load(response)


def test_the_chain_is_published_as_it_is_hashed(sealed: list[seals.Seal], start_service: Start) -> None:
    """So that whoever archives it can compute each hash anew; the newest seal is with the results."""
    service = start_service()
    chain = told(service, "/seals.json")
    assert chain["shows_numbers"] is True
    assert [fields["seal_hash"] for fields in chain["seals"]] == [made.hash().hex() for made in sealed]
    assert [seals.Seal.from_texts(fields) for fields in chain["seals"]] == sealed
    assert told(service, "/results.json")["proof"]["seal"] == sealed[-1].name()


def test_seals_that_are_added_are_published(
    sealed: list[seals.Seal], start_service: Start, database: Database, results: Results
) -> None:
    """Whole and once, also where some were read before."""
    service = start_service()
    assert len(told(service, "/seals.json")["seals"]) == 3
    count(database, a_vote("law-2"))
    sealed += seal(results)
    wait_until(lambda: told(service, "/results.json")["proof"]["seal"] == sealed[-1].name(), "the new one is there")
    assert [seals.Seal.from_texts(fields) for fields in told(service, "/seals.json")["seals"]] == sealed


def test_seals_show_no_number_while_a_law_is_open_and_hidden(
    sealed: list[seals.Seal], start_service: Start, results: Results
) -> None:
    """Neither of votes nor of batches: hashes and times alone, which lead to the same newest seal."""
    service = start_service(RESULTS_PORT="0", RESULTS_VISIBLE="after_close")
    starting = next(line for line in service.lines() if line["message"] == "starting")
    port = starting["fields"]["RESULTS_PORT"]
    chain = told(service, "/seals.json", port)
    assert chain["shows_numbers"] is False
    assert [set(fields) for fields in chain["seals"]] == [{"seal_id", "sealed_at", "previous_hash", "seal_hash"}] * 3
    assert [fields["seal_hash"] for fields in chain["seals"]] == [made.hash().hex() for made in sealed]
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-2', 'On games', 'closed')")
    wait_until(lambda: told(service, "/seals.json", port)["shows_numbers"], "all laws are closed")
    assert [seals.Seal.from_texts(fields) for fields in told(service, "/seals.json", port)["seals"]] == sealed


def test_votes_of_a_law_that_is_not_listed_are_no_number_that_seals_show(
    sealed: list[seals.Seal], start_service: Start, database: Database, results: Results
) -> None:
    """It is open: its votes would be those of the seals less those of the page. The operator can list and close it."""
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-2', 'On games', 'closed')")
    service = start_service(RESULTS_PORT="0", RESULTS_VISIBLE="after_close")
    starting = next(line for line in service.lines() if line["message"] == "starting")
    port = starting["fields"]["RESULTS_PORT"]
    assert told(service, "/seals.json", port)["shows_numbers"] is True
    count(database, a_vote("law-3"))
    sealed += seal(results)
    wait_until(lambda: not told(service, "/seals.json", port)["shows_numbers"], "there is an open law")
    wait_until(lambda: len(told(service, "/seals.json", port)["seals"]) == len(sealed), "the new seal is there")
    assert set(told(service, "/seals.json", port)["seals"][0]) == {
        *("seal_id", "sealed_at", "previous_hash", "seal_hash")
    }
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-3', 'On wine', 'closed')")
    wait_until(lambda: told(service, "/seals.json", port)["shows_numbers"], "all laws are closed")
    assert [seals.Seal.from_texts(fields) for fields in told(service, "/seals.json", port)["seals"]] == sealed


def guessed_range(seal: dict[str, str], around: seals.Seal) -> tuple[int, int] | None:
    """The range of a seal without votes, as a reader of hashes finds it by trying: ``around`` says where he looks."""
    of_nothing = hashlib.sha256(b"").hexdigest()
    before, after = (f"{seal['sealed_at']}\t{seal['previous_hash']}", f"\t{of_nothing}")
    forms = [("1", ""), ("2", after), *(("3", f"{after}\t{salt}") for salt in ("", "0" * 64, of_nothing))]
    near = [range(max(0, txid - 20), txid + 20) for txid in (around.from_txid, around.to_txid)]
    for start, end in itertools.product(*near):
        fields = f"{seal['seal_id']}\t{start}\t{end}\t0\t{of_nothing}\t{of_nothing}\t{before}"
        for form, rest in forms:
            if hashlib.sha256(f"vote-audit-seal-{form}\t{fields}{rest}".encode()).hexdigest() == seal["seal_hash"]:
                return start, end
    return None


def test_the_range_of_a_seal_without_votes_cannot_be_guessed_from_its_hash(
    database: Database, results: Results, start_service: Start
) -> None:
    """It would tell which rounds had votes, and how many transactions lie between."""
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-1', 'On bread')")
    made: list[seals.Seal] = []
    for votes in (0, 2, 0):
        count(database, *(a_vote("law-1") for _ in range(votes)))
        results.query("SELECT pg_current_xact_id()")  # so that a transaction is over since the last seal
        with seals.sealing_session(results.url) as (reader, writer):
            made += seals.seal(reader, writer, also_without_votes=True)
            assert "." not in made[-1].sealed_at, "the time tells how long it took to read what was sealed"
    assert [each.votes for each in made] == [0, 2, 0]
    service = start_service(RESULTS_PORT="0", RESULTS_VISIBLE="after_close")
    starting = next(line for line in service.lines() if line["message"] == "starting")
    chain = told(service, "/seals.json", starting["fields"]["RESULTS_PORT"])
    assert (chain["shows_numbers"], len(chain["seals"])) == (False, 3)
    found = [guessed_range(*pair) for pair in zip(chain["seals"], made, strict=True)]
    assert found == [None] * 3
    of_before = seals.Seal(*list(vars(made[0]).values())[:9])  # the guessing itself works
    guessable = of_before.as_texts() | {"seal_hash": of_before.hash().hex()}
    assert guessed_range(guessable, of_before) == (of_before.from_txid, of_before.to_txid)


def test_seals_show_no_number_where_no_law_is_listed(
    database: Database, results: Results, start_service: Start
) -> None:
    """Also before the first vote: that they come to be hidden would tell that it was cast."""
    results.query("SELECT pg_current_xact_id()")
    with seals.sealing_session(results.url) as (reader, writer):
        assert len(seals.seal(reader, writer, also_without_votes=True)) == 1
    service = start_service(RESULTS_PORT="0", RESULTS_VISIBLE="after_close")
    starting = next(line for line in service.lines() if line["message"] == "starting")
    chain = told(service, "/seals.json", starting["fields"]["RESULTS_PORT"])
    assert (chain["shows_numbers"], len(chain["seals"])) == (False, 1)


def test_certificates_are_published_by_their_hash(
    sealed: list[seals.Seal], start_service: Start, services: LocalServices, idle_queue: Queue, results: Results
) -> None:
    """That of the certificate as it was printed, in a form that does not hang on its blanks and order."""
    broker = {
        "AMQP_URL": idle_queue.url,
        "RABBITMQ_QUEUE": idle_queue.name,
        "RABBITMQ_MANAGEMENT_URL": services.rabbitmq.management_url(),
    }
    with connect(results) as conn:
        certificate = reconcile.certify(conn, "law-1", broker, "votes for the élection committee", settle_seconds=0)
    (published,) = told(start_service(), "/results.json")["proof"]["certificates"]
    assert (published["law_id"], published["certified_by"]) == ("law-1", "votes for the élection committee")
    assert published["certified_at"] == certificate["certified_at"].replace("+00:00", "Z")
    assert published["sha256"] == certificate_hash(json.loads(json.dumps(certificate, indent=2)))


def test_no_replica_reads_a_certificate_of_any_size(
    sealed: list[seals.Seal], start_service: Start, results: Results
) -> None:
    """Nor is the page away for a moment that no calendar has. Rows of before the limits are not published."""
    forced(
        results,
        *(
            "INSERT INTO certified_results SELECT 'big-%s', 0, 0, now(), 'x', 1, jsonb_build_object('a',"
            " (SELECT jsonb_agg(n) FROM generate_series(1, 200000) AS n))".replace("%s", str(number))
            for number in range(6)
        ),
        *(
            f"INSERT INTO certified_results SELECT 'odd-{number}', 0, 0, '{moment}', 'x', 1, '{{}}'"
            for number, moment in enumerate(("infinity", "-infinity", "290000-01-01Z", "4000-01-01Z BC"))
        ),
        "INSERT INTO certified_results"
        " SELECT 'deep', 0, 0, now(), 'x', 1, (repeat('[', 5000) || repeat(']', 5000))::jsonb",
        "INSERT INTO certified_results SELECT 'long', 0, 0, now(), 'x', 1, repeat('1', 5000)::jsonb",
        "INSERT INTO certified_results SELECT 'law-1', 6, 0, '2026-01-01Z', 'x', 1, '{\"a\": [1, 2]}'",
    )
    with connect(results) as conn, conn.cursor() as cur:

        def read(statement: str, values: Any) -> list[tuple[Any, ...]]:
            cur.execute(statement, values)
            rows = cur.fetchall()
            longest = max((len(json.dumps(row, default=str)) for row in rows), default=0)
            assert longest < 70_000, statement
            return rows

        proof = PublicProof(read, psycopg2.Error)
        proof._refresh()
        assert proof.summary is not None
        published = proof.summary["certificates"]
        read_here = {each["law_id"]: each["sha256"] for each in published}
        read_here.pop("deep", None)  # which Pythons from 3.12 on read
        assert read_here == {"law-1": certificate_hash({"a": [1, 2]})}
    service = start_service()
    wait_until(lambda: told(service, "/results.json")["proof"]["certificates"] == published, "it is shown")
    for path in ("/", "/?lang=fr", "/results.csv"):
        assert service.get(path)[0] == 200


def test_many_certificates_are_read_a_few_at_a_time(sealed: list[seals.Seal], results: Results) -> None:
    """Each may have some 60 KB, and a replica has little memory."""
    forced(
        results,
        "INSERT INTO certified_results SELECT 'law-' || law, 0, 0, now(), 'x', 1,"
        " jsonb_build_object('law', law, 'a', repeat('x', 60000)) FROM generate_series(1, 1100) AS law",
    )
    with connect(results) as conn, conn.cursor() as cur:
        largest = 0

        def read(statement: str, values: Any) -> list[tuple[Any, ...]]:
            nonlocal largest
            cur.execute(statement, values)
            rows = cur.fetchall()
            largest = max(largest, sum(len(str(row)) for row in rows))
            return rows

        proof = PublicProof(read, psycopg2.Error)
        proof._refresh()
    assert proof.summary is not None
    shown = [made["law_id"] for made in proof.summary["certificates"]]
    assert shown == sorted(shown) and len({*shown}) == 1_000
    assert largest < 4_000_000


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_seals_are_read_some_at_a_time(
    sealed: list[seals.Seal], results: Results, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """There may be ten thousand, each of which takes several times what is published of it; the newest are."""
    monkeypatch.setattr(public_proof, "SEALS_AT_ONCE", at_once)
    with connect(results) as conn, conn.cursor() as cur:
        most = 0

        def read(statement: str, values: Any) -> list[tuple[Any, ...]]:
            nonlocal most
            cur.execute(statement, values)
            rows = cur.fetchall()
            most = max(most, len(rows))
            return rows

        for number in (3, 2):
            monkeypatch.setattr(public_proof, "MOST_SEALS", number)
            proof = PublicProof(read, psycopg2.Error)
            proof.refresh()
            shown = json.loads(proof.chain_json or b"")["seals"]
            assert [seals.Seal.from_texts(fields) for fields in shown] == sealed[-number:]
    assert most == min(at_once, 3)


@pytest.fixture
def service_role(database: Database, results: Results) -> Iterator[Results]:
    """The database as the role of the service sees it."""
    name = f"role-{uuid.uuid4().hex[:8]}"
    set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD)
    yield Results(with_login(results.url, name))
    results.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def test_the_services_role_has_the_rights_to_publish(
    sealed: list[seals.Seal], service_role: Results, start_service: Start
) -> None:
    """All but the leaves of the seals, which hold every vote_id."""
    service = start_service(DATABASE_URL=service_role.url)
    assert [seals.Seal.from_texts(fields) for fields in told(service, "/seals.json")["seals"]] == sealed
    assert told(service, "/results.json")["proof"]["certificates"] == []


def test_results_are_shown_where_the_seals_may_not_be_read(
    sealed: list[seals.Seal], service_role: Results, start_service: Start, results: Results
) -> None:
    """As with the roles of an earlier version: there is no proof to show, and the log says why."""
    role = service_role.value("SELECT quote_ident(current_user)")
    results.query(f"REVOKE SELECT ON audit_seals FROM {role}")
    results.query(f"GRANT SELECT (seal_id, to_txid, sealed_at) ON audit_seals TO {role}")
    service = start_service(DATABASE_URL=service_role.url)
    shown = told(service, "/results.json")
    assert (shown["proof"], shown["votes_counted"]) == (None, 9)
    assert service.get("/seals.json")[0] == 503
    assert service.says("seals cannot be read for the page")
