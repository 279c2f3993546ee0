"""The evening of a vote with the settings of the stack: each command logs in as whoever may run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from scripts.local_services import LocalServices
from tests.attack.test_roles import EVERYBODY, ROLES
from tests.harness import ROOT, Queue, Results, Service, vote, wait_until
from tests.integration.test_few_rights import PASSWORD, import_definitions, set_up_database

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stack(services: LocalServices, queue: Queue, results: Results, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings that .env of a stack has, by parts, on users and roles that deploy/ has made for this test."""
    broker, database = urlsplit(queue.url), urlsplit(results.url)
    name = uuid.uuid4().hex[:8]
    users = {
        "SERVICE_USER": f"service-{name}",
        "PUBLISHER_USER": f"publisher-{name}",
        "AUDITOR_USER": f"auditor-{name}",
    }
    passwords = {"SERVICE_PASSWORD": PASSWORD, "PUBLISHER_PASSWORD": PASSWORD, "AUDITOR_PASSWORD": PASSWORD}
    import_definitions(services, tmp_path, users | passwords | {"RABBITMQ_QUEUE": queue.name})
    role = f"role-{name}"
    set_up_database(results.url, SERVICE_ROLE=role, **EVERYBODY)
    yield {
        "RABBITMQ_HOST": "127.0.0.1",
        "RABBITMQ_PORT": str(broker.port),
        "RABBITMQ_VHOST": unquote(broker.path[1:]) or "/",
        "RABBITMQ_QUEUE": queue.name,
        "RABBITMQ_USER": users["SERVICE_USER"],
        "RABBITMQ_PASSWORD": PASSWORD,
        "RABBITMQ_AUDITOR_USER": users["AUDITOR_USER"],
        "RABBITMQ_AUDITOR_PASSWORD": PASSWORD,
        "RABBITMQ_MANAGEMENT_PORT": str(urlsplit(services.rabbitmq.management_url()).port),
        "POSTGRES_HOST": "127.0.0.1",
        "POSTGRES_PORT": str(database.port),
        "POSTGRES_DB": database.path[1:],
        "POSTGRES_USER": role,
        "POSTGRES_PASSWORD": PASSWORD,
        **{f"POSTGRES_{variable}": password for variable, password in EVERYBODY.items()},
    }
    for each in (role, *ROLES):
        results.execute(f'DROP OWNED BY "{each}"')
        results.execute(f'DROP ROLE "{each}"')
    for user in users.values():
        services.rabbitmq.ctl("delete_user", user)


@pytest.fixture
def run(stack: dict[str, str], tmp_path: Path) -> Run:
    """reconcile.py as its users run it."""

    def run(*arguments: str, without: str = "(nothing)", **settings: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in stack.items() if without not in name}
        environment = {"PATH": os.environ["PATH"], **kept, **settings}
        command = [sys.executable, str(ROOT / "reconcile.py"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    return run


@pytest.fixture
def counted(stack: dict[str, str], queue: Queue, results: Results, tmp_path: Path) -> Iterator[None]:
    """Three votes on one law, counted by the service with its own few rights."""
    results.query("INSERT INTO laws (law_id, title) VALUES ('law-001', 'One')")
    with queue.channel():
        pass  # declares it
    queue.publish(vote(), vote(), vote(choice="non"))
    with Service(tmp_path, "replica", queue, results, {"AMQP_URL": "", "DATABASE_URL": "", **stack}) as service:
        wait_until(lambda: results.counted() == 3, "they are counted")
        assert service.stop() == 0
    yield


def settled(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str] | None:
    return done if "ready 0, unacked 0" in done.stdout else None


def test_the_evening_of_a_vote(counted: None, run: Run, tmp_path: Path) -> None:
    """Close, compare, seal, verify, certify, hand over the export, prove a vote, each with the one file of settings."""
    assert run("close", "law-001").stdout == "law-001 is closed\n"
    assert run("close", "law-001").stdout == "law-001 was closed already\n"
    compared = wait_until(lambda: settled(run()), "the management API, which lags, knows of no message any more", 60)
    assert compared.returncode == 0, compared
    assert run("seal").returncode == 0
    verified = run("verify", "--json")
    assert verified.returncode == 0, verified
    by = ("certify", "law-001", "--by", "the mayor")
    certified = wait_until(lambda: None if "not acked" in (done := run(*by)).stderr else done, "nor does certify", 60)
    assert certified.returncode == 0, certified
    certificate = json.loads(certified.stdout)
    assert (certificate["oui"], certificate["non"]) == (2, 1)
    assert certificate["certified_by"].startswith("votes_certifier")
    assert run("verify", "--since", certificate["seal"]).returncode == 0
    published = run("seal").stdout.splitlines()[-1]  # its records are the certificate
    votes, chain = tmp_path / "audit.jsonl", tmp_path / "seals.json"
    assert run("export-audit", "--output", str(votes), "--seals", str(chain)).returncode == 0
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    exported = json.loads(chain.read_text())
    assert len(rows) == 3 and exported["totals"] == {"law-001": [2, 1]}
    assert "{seal_id}:{seal_hash}".format_map(exported["seals"][-1]) == published
    (tmp_path / "proof.json").write_text(run("prove", rows[0]["vote_id"]).stdout)
    assert run("check-proof", str(tmp_path / "proof.json"), "--seal", published).returncode == 0
    assert "law-001" in run("results", "--csv").stdout


def test_a_law_that_is_not_listed_cannot_be_closed(counted: None, run: Run) -> None:
    """There is no row to say so in."""
    done = run("close", "law-009")
    assert (done.returncode, "not in the table laws" in done.stderr) == (1, True)


@pytest.mark.parametrize("named", ["POSTGRES_HOST", "RABBITMQ_HOST"])
@pytest.mark.parametrize("command", [("certify", "law-001"), ("republish", "--reason", "bad_choice")])
def test_no_law_is_made_final_on_the_queue_of_another_broker(
    counted: None, run: Run, stack: dict[str, str], tmp_path: Path, named: str, command: tuple[str, ...]
) -> None:
    """Where .env names one server alone, the other would be whatever listens on this machine: exit code 2."""
    assert run("close", "law-001").returncode == 0
    assert run("seal").returncode == 0
    kept = {name: value for name, value in stack.items() if not name.endswith("_HOST")} | {named: "127.0.0.1"}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in kept.items()))
    done = run(*command, without="_")  # the environment names nothing
    assert (done.returncode, done.stdout) == (2, "")
    assert "only the other server is named" in done.stderr


def test_the_service_s_own_login_is_refused_what_the_others_do(counted: None, run: Run, results: Results) -> None:
    """A missing right exits with 3."""
    results.query("UPDATE vote_results SET oui_count = 7")  # so that there is something to correct
    none = {f"POSTGRES_{name}_PASSWORD": "" for name in ("CERTIFIER", "AUDITOR", "SEALER")}
    for command in (
        ["close", "law-001"],
        ["certify", "law-001"],
        ["--recount", "law-001", "--apply"],
        ["seal"],
        ["verify"],
    ):
        if command[0] == "certify":
            assert run("close", "law-001").returncode == 0
        done = run(*command, **none)
        assert (done.returncode, "a right is missing" in done.stderr) == (3, True), (command, done)


@pytest.mark.parametrize("name", ["POSTGRES_CERTIFIER_PASSWORD", "RABBITMQ_AUDITOR_PASSWORD"])
def test_their_passwords_may_be_in_files(
    counted: None, run: Run, stack: dict[str, str], tmp_path: Path, name: str
) -> None:
    """As every other secret."""
    (tmp_path / "secret").write_text(stack[name] + "\n")
    done = run("close", "law-001", without=name, **{f"{name}_FILE": str(tmp_path / "secret")})
    assert done.returncode == 0, done
    assert run(without=name, **{f"{name}_FILE": str(tmp_path / "secret")}).returncode == 0
