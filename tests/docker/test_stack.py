"""docker-compose.yml as it stands, on a Docker engine: `make docker-test`; its core: ARGS="-m core"."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections import Counter
from pathlib import Path

import pika
import pytest

from tests.docker.engine import IMAGES, Engine, names_of_images
from tests.docker.stack import Stack, Totals, get, made
from tests.harness import ROOT, vote, wait_until

core = pytest.mark.core
AUDIT = ["run", "--rm", "-T", "audit"]


@core
def test_every_container_is_healthy_and_has_its_bounds(stack: Stack) -> None:
    """A health of its own, a limit of memory and rotated logs; no password where `docker inspect` shows it."""
    names = {one["Config"]["Labels"]["com.docker.compose.service"] for one in stack.containers()}
    assert names == {
        *("postgres", "database-setup", "rabbitmq", "aggregator", "sealer"),
        *("prometheus", "grafana", "alertmanager", "postgres-exporter"),
    }
    passwords = [file.read_text().strip() for file in (stack.root / ".secrets").iterdir()]
    for one in stack.containers():
        assert one["HostConfig"]["Memory"] > 0, one["Name"]
        assert {"max-size", "max-file"} <= one["HostConfig"]["LogConfig"]["Config"].keys(), one["Name"]
        assert not [password for password in passwords if password in json.dumps(one)], one["Name"]
        log = stack.engine.docker("logs", one["Id"])
        assert not [password for password in passwords if password in log], one["Name"]


@core
def test_three_replicas_count_each_vote_once(stack: Stack, seed: int) -> None:
    """The publisher of the quick start, with copies and invalid messages, and what `make check-db` says afterwards."""
    before = Totals(stack.totals())
    rejected = stack.results.value("SELECT count(*) FROM rejected_messages")
    expected, messages = made(3_000, seed, 10, 2)
    done = stack.publish(3_000, seed, "--duplicates", "10", "--invalid", "2")
    assert done.returncode == 0, done
    stack.wait_counted(expected, before=before)
    invalid = {
        message.id for message in messages if message.kind == "invalid"
    }  # some bodies hold the time of their making
    assert stack.results.value("SELECT count(*) FROM rejected_messages") == rejected + len(invalid)
    instances = "SELECT count(DISTINCT instance) FROM vote_audit"
    assert stack.results.value(instances) >= 3
    assert "law-001" in stack.make("check-db")


@core
def test_the_quick_start_s_commands_reach_the_stack(stack: Stack) -> None:
    """curl at a port of the range, `make metrics`, and the log."""
    ports = [stack.port(one) for one in stack.containers("aggregator")]
    assert sorted(ports) == sorted(set(ports)) and set(ports) <= set(stack.replica_ports)
    for port in ports:
        assert "\nvotes_aggregated_total" in get(f"http://localhost:{port}/metrics")
        assert "ready" in get(f"http://localhost:{port}/readyz")
    assert "\nbroker_connected 1.0" in stack.make("metrics")
    assert stack.compose("logs", "aggregator").count('"consuming"') >= 3


@core
def test_the_evening_of_a_vote_in_containers_and_from_the_host(stack: Stack, tmp_path: Path) -> None:
    """Close, compare, seal, verify, certify, hand over the export; the service's own role is refused, with 3."""
    laws = [f"evening-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for law in laws:
        stack.results.query("INSERT INTO laws (law_id, title) VALUES (%s, 'Evening')", law)
        publish(stack, vote(law), vote(law), vote(law, "non"))
        wait_until(lambda law=law: stack.results.totals().get(law) == (2, 1), "they are counted")
    in_container, on_host = laws
    assert stack.compose(*AUDIT, "close", in_container) == f"{in_container} is closed\n"
    stack.compose(*AUDIT, "seal")
    wait_until(lambda: stack.run("docker-compose", *AUDIT).returncode == 0, "the broker has figures of the queue", 60)
    assert "verified" in stack.compose(*AUDIT, "verify")
    printed: list[str] = []

    def is_certified() -> bool:  # the management API's figures are some seconds old, of what was not acked then
        done = stack.run("docker-compose", *AUDIT, "certify", in_container)
        printed.append(done.stdout)
        return done.returncode == 0

    wait_until(is_certified, "the law is certified", 60)
    certificate = json.loads(printed[-1])
    assert (certificate["oui"], certificate["non"]) == (2, 1)
    assert in_container in stack.compose(*AUDIT, "results", "--csv")
    exported = stack.compose(*AUDIT, "export-audit").splitlines()
    assert len([line for line in exported if json.loads(line)["law_id"] == in_container]) == 3
    folder = tmp_path / "export"
    folder.mkdir(mode=0o700)
    as_reader = ["run", "--rm", "-T", "--user", str(os.getuid()), "--volume", f"{folder}:/export", "audit"]
    stack.compose(*as_reader, "export-audit", "--output", "/export/audit.jsonl", "--seals", "/export/seals.json")
    assert in_container in (folder / "audit.jsonl").read_text()
    assert json.loads((folder / "seals.json").read_text())["totals"][in_container] == [2, 1]

    assert stack.run(".venv/bin/python", "reconcile.py", "close", on_host).stdout == f"{on_host} is closed\n"
    assert "newest seal" in stack.make("seal")
    assert "verified" in stack.make("verify")
    wait_until(lambda: stack.run("make", "certify", f"LAW={on_host}").returncode == 0, "the law is certified", 60)
    assert on_host in stack.make("results", "ARGS=--csv")
    stack.make("reconcile")

    open_law = f"open-{in_container}"
    stack.results.query("INSERT INTO laws (law_id, title) VALUES (%s, 'Open')", open_law)
    commands = ["seal", "verify", f"close {open_law}", f"certify {in_container}"]
    script = "".join(f"python reconcile.py {command} >/dev/null 2>&1; echo $?; " for command in commands)
    as_service = ["run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "aggregator", "-c", script]
    assert stack.compose(*as_service).split() == ["3"] * len(commands)


@core
def test_a_wrong_password_of_the_owner_leaves_the_stack_running(stack: Stack, seed: int) -> None:
    """And the command says what is wrong."""
    running = {one["Id"] for one in stack.containers() if one["State"]["Running"]}
    kept = stack.secret("postgres_owner").read_text()
    stack.secret("postgres_owner").write_text("wrong\n")
    try:
        done = stack.run("make", "docker-compose-up")
    finally:
        stack.secret("postgres_owner").write_text(kept)
    assert done.returncode != 0
    assert 'password authentication failed for user "votes_owner"' in done.stderr + done.stdout
    assert running <= {one["Id"] for one in stack.containers() if one["State"]["Running"]}
    before = Totals(stack.totals())
    assert stack.publish(300, seed).returncode == 0
    stack.wait_counted(made(300, seed)[0], before=before)


@core
def test_missing_passwords_are_all_named_before_anything_starts(stack: Stack) -> None:
    """By `make docker-compose-up`, with what writes them."""
    files = [stack.secret("rabbitmq"), stack.secret("grafana")]
    kept = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    try:
        done = stack.run("make", "docker-compose-up")
    finally:
        for file, text in zip(files, kept, strict=True):
            file.write_text(text)
            file.chmod(0o644)
    assert done.returncode != 0
    assert "RABBITMQ_PASSWORD: there is no password" in done.stderr and "GRAFANA_PASSWORD: there" in done.stderr
    assert "make install" in done.stderr


@core
def test_prometheus_sees_every_replica_and_the_rules_give_values(stack: Stack) -> None:
    """Each target is up, each rule is sound, and the records that need no history have a value."""
    jobs = {"aggregator": 3, "rabbitmq": 1, "rabbitmq-queues": 1, "postgres": 1}
    wait_until(lambda: _healthy_targets(stack) == jobs, "every target is up", 120)
    for record in (
        "votes:replicas:count",
        "votes:queue_messages:max",
        "votes:queue_consumers:max",
        "votes:handled:rate2m",
    ):
        wait_until(lambda record=record: stack.value(record) is not None, f"{record} has a value", 60)
    wait_until(lambda: stack.value("votes:queue_consumers:max") == 3, "three consume", 60)
    wait_until(lambda: stack.value("max(pg_up)") == 1, "the exporter sees PostgreSQL", 60)
    rules = [rule for group in stack.prometheus("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []


@pytest.mark.parametrize(
    "signal",
    [pytest.param("kill", marks=core), "stop"],
)
def test_a_replica_that_ends_in_the_middle_of_a_stream_costs_nothing(stack: Stack, seed: int, signal: str) -> None:
    """Killed it is started again by the engine, stopped it leaves the queue to the others."""
    before = Totals(stack.totals())
    publisher = stack.publishing(3_000, seed, 1_000)
    replica = stack.containers("aggregator")[1]
    wait_until(lambda: stack.totals() != before, "some are counted")
    if signal == "kill":  # from outside of the engine, which would take `docker kill` for the user's wish
        subprocess.run(["kill", "-9", str(replica["State"]["Pid"])], check=True)
    else:
        stack.engine.docker("stop", replica["Id"])
    assert publisher.wait(60) == 0
    stack.wait_counted(made(3_000, seed)[0], before=before)
    after = {one["Id"]: one for one in stack.containers("aggregator")}[replica["Id"]]
    if signal == "kill":
        wait_until(lambda: _restarts(stack, replica["Id"]) == replica["RestartCount"] + 1, "it is started again")
    else:
        assert (after["State"]["Status"], after["State"]["ExitCode"]) == ("exited", 0)
        stack.engine.docker("start", replica["Id"])


def test_a_frozen_replica_costs_nothing(stack: Stack, seed: int) -> None:
    """The broker takes its votes back once it has missed the heartbeats, and it goes on when it is thawed."""
    before = Totals(stack.totals())
    publisher = stack.publishing(3_000, seed, 1_000)
    replica = stack.containers("aggregator")[0]
    wait_until(lambda: stack.totals() != before, "some are counted")
    stack.engine.docker("pause", replica["Id"])
    try:
        assert publisher.wait(60) == 0
        stack.wait_counted(made(3_000, seed)[0], before=before, timeout=180)
    finally:
        stack.engine.docker("unpause", replica["Id"])
    wait_until(lambda: _is_ready(stack.port(replica)), "it is ready", 90)


@pytest.mark.parametrize("server", ["postgres", "rabbitmq"])
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_server_that_is_restarted_in_the_middle_of_a_stream_costs_nothing(
    stack: Stack, seed: int, server: str, how: str
) -> None:
    """What the publisher got no confirm for it publishes again: the same seed makes the same votes."""
    before = Totals(stack.totals())
    publisher = stack.publishing(4_000, seed, 1_000)
    wait_until(lambda: stack.totals() != before, "some are counted")
    container = stack.containers(server)[0]
    if how == "restart":
        stack.engine.docker("restart", "--time", "30", container["Id"])
    else:
        subprocess.run(["kill", "-9", str(container["State"]["Pid"])], check=True)
    publisher.wait(120)
    wait_until(lambda: stack.publish(4_000, seed).returncode == 0, "every vote is confirmed", 120)
    stack.wait_counted(made(4_000, seed)[0], before=before, timeout=180)


def test_a_full_queue_outlives_down_and_up(stack: Stack, seed: int) -> None:
    """With as many replicas afterwards as before, and no volume without a name."""
    before = Totals(stack.totals())
    stack.compose("stop", "aggregator")
    assert stack.publish(2_000, seed).returncode == 0
    assert stack.totals() == before
    stack.down()
    assert stack.containers() == []
    stack.up(3, "alerting", "exporters")
    stack.wait_counted(made(2_000, seed)[0], before=before)
    assert [name for name in stack.volumes() if not name.startswith(stack.name)] == []


def test_up_keeps_the_replicas_that_run(stack: Stack) -> None:
    """Without REPLICAS; a change of the file that a replica is made from replaces all of them."""
    ids = {one["Id"] for one in stack.containers("aggregator")}
    stack.make("docker-compose-up")
    assert {one["Id"] for one in stack.containers("aggregator")} == ids and len(ids) == 3


def test_a_load_is_watched_as_the_quick_start_says(stack: Stack, seed: int, tmp_path: Path) -> None:
    """One replica becomes three, with their log and the first one's metrics on the screen, and counts 100,000 votes."""
    before = Totals(stack.totals())
    stops = stack.compose("logs", "aggregator").count('"stopped"')
    with stack.screen(tmp_path / "log", "docker-compose", "logs", "-f", "aggregator") as log:
        stack.compose("up", "-d", "--scale", "aggregator=1")
        wait_until(lambda: log().count('"stopped"') == stops + 2, "the log goes on", 60)
    stack.compose("up", "-d", "--scale", "aggregator=3")
    stack.wait_healthy()
    assert len(stack.containers("aggregator")) == 3
    url = f"http://localhost:{stack.port(stack.containers('aggregator')[0])}/metrics"
    watch = f"curl -s {url} | grep votes_aggregated_total"
    with stack.screen(tmp_path / "watch", "watch", "-n", "1", watch) as screen:
        done = stack.run(".venv/bin/python", "test_publisher.py", "-n", "100000", "--seed", str(seed))
        assert done.returncode == 0, done
        wait_until(lambda: 'votes_aggregated_total{choice="oui",law_id="law-001"}' in screen(), "it is shown")
    stack.wait_counted(made(100_000, seed)[0], before=before, timeout=240)


def test_the_integration_tests_run_on_the_stack_s_servers(stack: Stack) -> None:
    """What CONTRIBUTING.md says, for some of them; what they make there is gone afterwards."""
    databases, queues = "SELECT datname FROM pg_database ORDER BY datname", ["list_queues", "--silent", "name"]
    before = stack.results.query(databases), stack.rabbitmqctl(*queues), stack.rabbitmqctl("list_users")
    stack.compose("up", "-d", "postgres", "rabbitmq")
    chosen = ("publisher_against_broker.py", "service.py::test_three_replicas_count_20_000_votes_exactly")
    command = [".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = stack.run(*command, *(f"tests/integration/test_{test}" for test in chosen), TEST_SERVERS="compose")
    assert done.returncode == 0, done.stdout[-4000:]
    print(done.stdout.splitlines()[-1])
    assert (stack.results.query(databases), stack.rabbitmqctl(*queues), stack.rabbitmqctl("list_users")) == before


def test_an_alert_reaches_a_receiver(stack: Stack) -> None:
    """At the address that the sample configuration names."""
    serve = (
        "import http.server as h\n"
        "class R(h.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        print(self.rfile.read(int(self.headers['Content-Length'])).decode(), flush=True)\n"
        "        self.send_response(200); self.end_headers()\n"
        "h.HTTPServer(('', 8080), R).serve_forever()\n"
    )
    network = ["--network", f"{stack.name}_monitoring", "--network-alias", "alert-receiver.example"]
    receiver = stack.engine.docker("run", "--detach", *network, "python:3.11-slim", "python", "-c", serve).strip()
    try:
        wait_until(lambda: '"alertname":"Always"' in stack.engine.docker("logs", receiver), "it arrives", 400)
    finally:
        stack.engine.docker("rm", "--force", receiver)


def test_an_exporter_with_another_password_is_not_healthy(stack: Stack) -> None:
    """It answers, and has nothing to tell of the database."""
    kept = stack.secret("postgres_monitor").read_text()
    (exporter,) = stack.containers("postgres-exporter")
    stack.secret("postgres_monitor").write_text("wrong\n")
    try:
        stack.compose("restart", "postgres-exporter")
        wait_until(lambda: _health(stack, exporter["Id"]) == "unhealthy", "it is unhealthy", 120)
        wait_until(lambda: stack.value("min(pg_up)") == 0, "the alert's expression holds", 60)
    finally:
        stack.secret("postgres_monitor").write_text(kept)
        stack.compose("restart", "postgres-exporter")


def test_passwords_are_changed_as_the_documents_say(stack: Stack, seed: int) -> None:
    """With every character as it is written; what is no longer valid is refused."""
    files = ("postgres", "rabbitmq", "rabbitmq_publisher")
    kept = {name: stack.password(name) for name in files}
    try:
        for name in files:
            stack.secret(name).write_text("pa$$ ${HOME} `w`\\\"'#%40" + uuid.uuid4().hex + "\n")
        rotate(stack)
        before = Totals(stack.totals())
        assert stack.publish(500, seed).returncode == 0
        stack.wait_counted(made(500, seed)[0], before=before)
        refused = stack.run(
            ".venv/bin/python", "test_publisher.py", "-n", "1", RABBITMQ_PUBLISHER_PASSWORD=kept["rabbitmq_publisher"]
        )
        assert refused.returncode == 3, refused
    finally:
        for name, password in kept.items():
            stack.secret(name).write_text(f"{password}\n")
        rotate(stack)


def test_the_owner_s_password_is_changed_as_the_documents_say(stack: Stack, seed: int) -> None:
    """At the database first, then in its file; the stack counts on meanwhile."""
    file = stack.secret("postgres_owner")
    kept = file.read_text()
    before = Totals(stack.totals())
    replicas = {one["Id"] for one in stack.containers("aggregator")}
    for password in ("an owner's pa$$word\n", kept):
        typed = password + password
        change = ["exec", "-T", "postgres", "psql", "-U", "votes_owner", "-c", r"\password", "votes"]
        stack.compose(*change, typed=typed)
        file.write_text(password)
        stack.make("docker-compose-up")
    assert {one["Id"] for one in stack.containers("aggregator")} == replicas
    assert stack.publish(100, seed).returncode == 0
    stack.wait_counted(made(100, seed)[0], before=before)


def test_a_stranger_can_follow_the_quick_start_with_docker(engine: Engine, running: Stack, tmp_path: Path) -> None:
    """Every command of that section of QUICKSTART.md, in its order, with Compose and ports as they are here."""
    other = Stack(engine, tmp_path, "votes-page")
    printed = {}
    try:
        for command in commands_with_docker():
            if command == "make docker-compose-down":
                look_at_the_addresses(other)
            here = command.replace("docker compose", "docker-compose").replace("run --rm", "run --rm -T")
            if "localhost:8001" in here:  # another program may have taken the first port since it was looked for
                port = other.port(other.containers("aggregator")[0])
                here = here.replace("8001", str(port))
            printed[command] = other.follow(here)
            if command == "make publish-test-votes":
                wait_until(lambda: other.results.counted() == 1_000, "they are counted")
            if command.endswith(("docker-compose-up", " -d", "=3")):
                other.wait_healthy()
        assert other.containers() == []
        assert [name for name in other.volumes() if name.startswith(other.name)] == []
    finally:
        other.remove()
    assert "1,000 of 1,000 messages" in printed["make publish-test-votes"]
    assert "law-001" in printed["make check-db"]
    assert "\nvotes_aggregated_total" in printed["curl -s localhost:8001/metrics"]
    assert printed["docker compose port aggregator 8001"] == f"127.0.0.1:{port}\n"
    assert "verified" in printed["docker compose run --rm audit verify"] and "verified" in printed["make verify"]


def test_another_clone_runs_beside_it(engine: Engine, running: Stack, seed: int, tmp_path: Path) -> None:
    """With a virtual host, an image and volumes of its own; started as Compose itself starts it."""
    other = Stack(engine, tmp_path, "votes-other", RABBITMQ_VHOST="the votes", RABBITMQ_QUEUE_TYPE="quorum")
    try:
        other.compose("up", "-d")
        other.wait_healthy()
        assert other.publish(500, seed).returncode == 0
        other.wait_counted(made(500, seed)[0], before=Totals())
        (mine,), theirs = other.containers("aggregator"), running.containers("aggregator")
        assert mine["Config"]["Image"] != theirs[0]["Config"]["Image"]
        assert other.port(mine) in other.replica_ports
        assert "\nbroker_connected 1.0" in get(f"http://localhost:{other.port(mine)}/metrics")
    finally:
        other.remove()
    assert other.containers() == []
    assert all(name.startswith(running.name) for name in running.volumes())


def test_every_image_has_a_stand_in() -> None:
    """By its name, as a stage of the Dockerfile."""
    stages = set(re.findall(r"^FROM \w+ AS (\S+)$", (IMAGES / "Dockerfile").read_text(), re.M))
    assert {name.partition(":")[0].rpartition("/")[2] for name in names_of_images()} == stages
    assert "FROM python:3.11-slim\n" in (ROOT / "Dockerfile").read_text()


def commands_with_docker() -> list[str]:
    """Those of the quick start, but for the one that runs these tests, and one that has no end."""
    section = (ROOT / "docs/QUICKSTART.md").read_text().partition("## With Docker")[2].partition("\n## ")[0]
    codes = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", section)]
    found = [code for code in codes if re.match(r"([A-Z_]+=\S+ )?(make|docker compose|docker-compose|curl) ", code)]
    assert found[-2] == "make docker-compose-down", found
    return [command for command in found if command not in ("make docker-test", "docker compose logs -f aggregator")]


def look_at_the_addresses(stack: Stack) -> None:
    """Of Grafana, Prometheus and RabbitMQ's management, with the users and passwords that the quick start names."""
    assert len(stack.containers("aggregator")) == 3
    get(f"http://localhost:{stack.setting('GRAFANA_PORT')}/api/health")
    assert (
        stack.compose("exec", "-T", "grafana", "cat", "/run/secrets/grafana_password")
        == stack.secret("grafana").read_text()
    )
    get(f"http://localhost:{stack.setting('PROMETHEUS_PORT')}/-/ready")
    whoami = f"http://localhost:{stack.setting('RABBITMQ_MANAGEMENT_PORT')}/api/whoami"
    login = f"votes-auditor:{stack.password('rabbitmq_auditor')}"
    assert '"votes-auditor"' in stack.follow(f"curl -s --fail --user {login} {whoami}")


def rotate(stack: Stack) -> None:
    """What docs/SECURITY.md says, for the service's passwords at both servers."""
    for command in (["up", "database-setup"], ["restart", "rabbitmq"], ["restart", "aggregator"]):
        stack.compose(*command)
    stack.wait_healthy()


def publish(stack: Stack, *votes: dict[str, object]) -> None:
    """By the publisher's user, from the host."""
    credentials = pika.PlainCredentials("votes-publisher", stack.password("rabbitmq_publisher"))
    port = int(stack.setting("RABBITMQ_PORT"))
    connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port, credentials=credentials))
    channel = connection.channel()
    channel.confirm_delivery()
    for one in votes:
        body = json.dumps(one).encode()
        channel.basic_publish("", "votes.aggregation", body, pika.BasicProperties(delivery_mode=2), mandatory=True)
    connection.close()


def _healthy_targets(stack: Stack) -> dict[str, int]:
    """Of each job, as Prometheus has them now; what a query finds of targets that have gone stays for five minutes."""
    targets = stack.prometheus("targets").get("activeTargets", [])
    return Counter(target["labels"]["job"] for target in targets if target["health"] == "up")


def _restarts(stack: Stack, container: str) -> int:
    return int(stack.engine.docker("inspect", "--format", "{{.RestartCount}}", container))


def _health(stack: Stack, container: str) -> str:
    return stack.engine.docker("inspect", "--format", "{{.State.Health.Status}}", container).strip()


def _is_ready(port: int) -> bool:
    try:
        return bool(get(f"http://localhost:{port}/readyz"))
    except OSError:  # 503 as well
        return False
