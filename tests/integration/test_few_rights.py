"""The service under the database role and the broker user that deploy/ makes, and under no other rights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pika
import psycopg2
import pytest
import yaml
from pika.exceptions import AMQPError

from database import Database
from rabbitmq_client import broker_version, declare_queue
from scripts import local_services
from scripts.local_services import LocalServices, LocalServicesError, RabbitMQServer
from test_publisher import Publisher, make_messages
from tests.harness import ROOT, Queue, Results, Service, check_exact, vote, wait_settled
from votes import Rejection, Vote

PASSWORD = "p \"$\\' word"  # a shell, JSON and SQL all have something to say to it
SOME_USERS = {
    "SERVICE_USER": "some-service",
    "SERVICE_PASSWORD": PASSWORD,
    "PUBLISHER_USER": "some-publisher",
    "PUBLISHER_PASSWORD": PASSWORD,
}


@pytest.fixture
def role(results: Results) -> Iterator[Results]:
    """The database, as the service's role sees it."""
    name = f"role-{uuid.uuid4().hex[:8]}"
    for _ in range(2):  # it can be run again
        set_up_database(results.url, SERVICE_ROLE=name, SERVICE_PASSWORD=PASSWORD)
    yield Results(with_login(results.url, name))
    results.execute(f'DROP OWNED BY "{name}"')
    results.execute(f'DROP ROLE "{name}"')


@pytest.fixture
def users(services: LocalServices, queue: Queue, tmp_path: Path) -> Iterator[tuple[Queue, Queue]]:
    """The queue, as the service's user and as the publisher see it."""
    service, publisher = (f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("service", "publisher"))
    names = {"SERVICE_USER": service, "SERVICE_PASSWORD": PASSWORD, "PUBLISHER_USER": publisher}
    import_definitions(services, tmp_path, names | {"PUBLISHER_PASSWORD": PASSWORD, "RABBITMQ_QUEUE": queue.name})
    yield Queue(with_login(queue.url, service), queue.name), Queue(with_login(queue.url, publisher), queue.name)
    for name in (service, publisher):
        services.rabbitmq.ctl("delete_user", name)


def set_up_database(url: str, **variables: str) -> None:
    """What database-setup of docker-compose.yml does, by its own command; no warning may come of it."""
    assert run_setup(url, **variables) == ""


def run_setup(url: str, **variables: str) -> str:
    """As set_up_database; what it says beside."""
    setup = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["database-setup"]
    known = {name.removesuffix("_FILE") for name in setup["environment"]}
    assert variables.keys() <= known
    server = urlsplit(url)
    psql = Path(local_services._find_program("psql", local_services._find_postgres()))
    environment = {
        "PATH": f"{psql.parent}:{os.environ['PATH']}",
        "PGHOST": server.hostname or "",
        "PGPORT": str(server.port),
        "PGUSER": unquote(server.username or ""),
        "PGPASSWORD": unquote(server.password or ""),
        "PGDATABASE": server.path[1:],
    }
    with tempfile.TemporaryDirectory() as folder:
        for source, target in (volume.split(":")[:2] for volume in setup["volumes"]):
            (Path(folder) / Path(target).name).symlink_to(ROOT / source)
        command = [word.replace("/sql", folder) for word in setup["entrypoint"]]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def definitions(variables: dict[str, str]) -> bytes:
    """What deploy/rabbitmq/definitions.sh prints: JSON without a password in the clear."""
    script = ["bash", ROOT / "deploy/rabbitmq/definitions.sh"]
    done = subprocess.run(script, check=True, capture_output=True, env={"PATH": os.environ["PATH"], **variables})
    assert PASSWORD.encode() not in done.stdout
    json.loads(done.stdout)
    return done.stdout


def import_definitions(services: LocalServices, folder: Path, variables: dict[str, str]) -> None:
    file = folder / "definitions.json"
    file.write_bytes(definitions(variables))
    services.rabbitmq.ctl("import_definitions", str(file))


class BrokerOfTheStack(RabbitMQServer):
    """RabbitMQ with the configuration and the plugins of deploy/rabbitmq, on free ports."""

    def _make_data(self) -> None:
        super()._make_data()
        file = self.directory / "definitions.json"
        users = {"SERVICE_USER": local_services.USER, "SERVICE_PASSWORD": self._get("password")}
        users |= {"PUBLISHER_USER": "publisher", "PUBLISHER_PASSWORD": PASSWORD}
        file.write_bytes(definitions(users | {"RABBITMQ_QUEUE_TYPE": "classic"}))
        (self.directory / "enabled_plugins").write_text((ROOT / "deploy/rabbitmq/enabled_plugins").read_text())
        configuration = (ROOT / "deploy/rabbitmq/rabbitmq.conf").read_text()
        for plugin, port in zip(("management", "prometheus"), local_services._free_ports(2), strict=True):
            configuration += f"{plugin}.tcp.ip = 127.0.0.1\n{plugin}.tcp.port = {port}\n"
        (self.directory / "conf.d").mkdir()
        (self.directory / "conf.d/20-votes.conf").write_text(
            configuration.replace("/etc/rabbitmq/votes-definitions.json", str(file))
        )


def with_login(url: str, user: str) -> str:
    scheme, _, rest = url.partition("://")
    quoted = "".join(f"%{byte:02x}" for byte in PASSWORD.encode())
    return f"{scheme}://{user}:{quoted}@{rest.partition('@')[2]}"


def test_copies_and_trials_write_their_record_with_these_rights(role: Results, results: Results) -> None:
    """Copies that were delivered again write nothing else; a trial takes back what it wrote."""
    votes = [Vote.from_message(json.dumps(vote()).encode()) for _ in range(3)]
    with Database(role.url, pool_min=1, pool_max=1, timeout=10, instance="few") as database:
        database.batch_update_results(votes, [])
        outcome = database.batch_update_results([copy._replace(redelivered=True) for copy in votes], [])
        assert [reason for _, reason in outcome.duplicates] == ["redelivery"] * 3
        database.try_to_write(votes, [Rejection(b"x", "not_json", "", None, 1)])
    assert (results.counted(), results.rejected()) == (3, {})


def test_the_service_counts_from_start_to_end(
    role: Results, users: tuple[Queue, Queue], services: LocalServices, results: Results, tmp_path: Path
) -> None:
    """It declares its queue, counts, records copies and unreadable messages, shows results, writes statistics."""
    as_service, as_publisher = users
    replica = Service(tmp_path, "few", as_service, role).start_and_wait()
    try:
        messages = list(make_messages(500, 3, 7, 20, 5))
        Publisher([as_publisher.url], as_publisher.name).publish(messages)
        wait_settled(services, Queue(services.rabbitmq.url(), as_service.name))
        check_exact(results, messages)
        assert results.duplicates()["duplicate"] == 100
        command = [sys.executable, "-m", "scripts.check_db"]
        environment = {"PATH": os.environ["PATH"], "DATABASE_URL": role.url}
        shown = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        assert re.search(r"^  all .* 500 ", shown.stdout, re.M), "make check-db"
        status, page = replica.get("/results.json")
        assert (status, json.loads(page)["votes_counted"]) == (200, 500)
        assert replica.stop() == 0
        assert results.value("SELECT sum(votes) FROM aggregation_stats") == 500
        assert not [line for line in replica.lines() if line["level"] == "ERROR"]
    finally:
        replica.kill()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO vote_audit (vote_id, law_id, choice, instance, redelivered)"
        " VALUES (gen_random_uuid(), 'law-001', 'oui', 'x', false)",
        "INSERT INTO vote_results (law_id, oui_count) VALUES ('law-001', 1)",
        "UPDATE vote_results SET oui_count = 1",
        "UPDATE rejected_messages SET body = ''",
        "INSERT INTO duplicate_attempts (vote_id) VALUES (gen_random_uuid())",
        "UPDATE aggregation_stats SET votes = 0",
        "LOCK TABLE vote_audit IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE vote_results IN ROW EXCLUSIVE MODE",
        "UPDATE vote_audit SET choice = 'non'",
        "DELETE FROM vote_audit",
        "TRUNCATE vote_audit",
        "ALTER TABLE vote_audit DISABLE TRIGGER ALL",
        "DROP TABLE vote_audit",
        "DELETE FROM vote_results",
        "DELETE FROM rejected_messages",
        "DELETE FROM duplicate_attempts",
        "INSERT INTO laws (law_id, title) VALUES ('x', 'x')",
        "INSERT INTO schema_version (version) VALUES (99)",
        "CREATE TABLE mine (id integer)",
        "CREATE ROLE other",
        "SET session_replication_role = replica",
    ],
)
def test_the_role_is_refused(statement: str, role: Results) -> None:
    """What a service that was taken over could do to the count."""
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        role.query(statement)


def test_the_role_has_no_right_on_any_table_but_to_read(role: Results) -> None:
    """It writes by two functions, which nobody may call who was not granted it."""
    rights = "SELECT DISTINCT privilege_type FROM information_schema.table_privileges WHERE table_schema = 'public'"
    assert role.query(rights) == [("SELECT",)]
    may_call = (
        "SELECT proname, has_function_privilege(oid, 'EXECUTE'), proacl::text LIKE '{=X%' OR proacl::text LIKE '%,=X%'"
        " FROM pg_proc WHERE proname IN ('count_batch', 'record_minute', 'count_new_votes') ORDER BY 1"
    )
    assert role.query(may_call) == [("count_batch", True, False), ("record_minute", True, False)]


def test_a_role_that_was_granted_nothing_can_not_count(results: Results, role: Results) -> None:
    """Functions are for everybody, unless that is taken away in the transaction that makes them."""
    name = f"stranger-{uuid.uuid4().hex[:8]}"
    results.execute(f'CREATE ROLE "{name}"')
    try:
        for function in (
            "record_minute('x', now(), 1, 1, 1, 1, 1)",
            "count_batch" + "('x', 0, false" + ", '{}'" * 19 + ", false)",
        ):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                results.query(f'GRANT USAGE ON SCHEMA public TO "{name}"; SET LOCAL ROLE "{name}"; SELECT {function}')
    finally:
        results.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def test_who_may_read_the_results_is_shown_percentages(results: Results) -> None:
    """Also where functions are for nobody who was not granted them: what a view calls, its reader calls."""
    name = f"reader-{uuid.uuid4().hex[:8]}"
    results.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
    with Database(results.url, pool_min=1, pool_max=1, timeout=10, instance="owner") as database:
        database.initialise_schema()
    results.execute(f'CREATE ROLE "{name}"')
    try:
        results.query(f"INSERT INTO vote_results VALUES ('law-1', 1, 3); GRANT SELECT ON vote_statistics TO \"{name}\"")
        percentages = f'SET LOCAL ROLE "{name}"; SELECT oui_percent::text, non_percent::text FROM vote_statistics'
        assert results.query(percentages) == [("25.00", "75.00")]
    finally:
        results.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def test_a_table_of_the_caller_does_not_pass_for_one_of_ours(role: Results, results: Results) -> None:
    """The functions look in their own schema alone, whatever the caller's search_path and temporary tables say."""
    database, name = results.value("SELECT current_database()"), role.value("SELECT current_user")
    results.execute(f'GRANT TEMPORARY ON DATABASE {database} TO "{name}"')  # which roles.sql takes away
    shadow = "CREATE TEMPORARY TABLE vote_audit (LIKE public.vote_audit); SET search_path = pg_temp, public;"
    arguments = (
        "'x', 0, false, ARRAY[gen_random_uuid()], '{law-001}', '{oui}', '{NULL}', '{NULL}', '{f}'"
        + ", '{}'" * 13
        + ", false"
    )
    assert role.query(f"{shadow} SELECT inserted FROM public.count_batch({arguments})") == [(1,)]
    assert results.counted() == 1


def test_the_service_user_can_neither_publish_nor_reach_another_queue(users: tuple[Queue, Queue], queue: Queue) -> None:
    """A service that was taken over can invent no vote."""
    queue.publish(vote())  # so that the queue is there
    with pytest.raises(AMQPError, match="ACCESS_REFUSED"):
        users[0].publish(vote())
    assert queue.ready() == 1
    with pytest.raises(AMQPError, match="ACCESS_REFUSED"):
        consume(users[0].url, users[0].name + "-other")


def test_the_publisher_can_read_nothing(users: tuple[Queue, Queue], queue: Queue) -> None:
    """It publishes with confirms, and sees no vote of others."""
    queue.publish(vote())
    users[1].publish(vote())
    assert queue.ready() == 2
    with pytest.raises(AMQPError, match="ACCESS_REFUSED"):
        consume(users[1].url, users[1].name)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_the_service_finds_the_queue_of_the_definitions_as_it_declares_it(
    queue_type: str, services: LocalServices, queue: Queue, tmp_path: Path
) -> None:
    """Else it would say that the queue stands with other arguments, and look for a limit that is not there."""
    with queue.connect() as connection:
        version = broker_version(connection)
        variables = SOME_USERS | {"RABBITMQ_QUEUE": queue.name, "RABBITMQ_VERSION": ".".join(map(str, version))}
        import_definitions(services, tmp_path, variables | {"RABBITMQ_QUEUE_TYPE": queue_type})
        for _ in range(2):  # and one that stands is left as it is
            connection.channel().queue_declare(queue.name, passive=True)
            assert declare_queue(connection, queue.name, queue_type, 10)[1] == ""
            import_definitions(services, tmp_path, variables | {"RABBITMQ_QUEUE_TYPE": "classic"})
    services.rabbitmq.ctl("clear_policy", f"{queue.name}.keep")


def test_a_broker_before_4_refuses_the_queue_of_4(services: LocalServices, queue: Queue, tmp_path: Path) -> None:
    """Where -1 would drop a vote at its first return."""
    with queue.connect() as connection:
        if broker_version(connection) >= (4,):
            pytest.skip("this broker knows -1")
    with pytest.raises(LocalServicesError, match="-1 is not a valid delivery limit"):
        variables = {"RABBITMQ_QUEUE": queue.name, "RABBITMQ_QUEUE_TYPE": "quorum", "RABBITMQ_VERSION": "4"}
        import_definitions(services, tmp_path, SOME_USERS | variables)
    assert queue.name not in services.rabbitmq.ctl("list_queues", "name")


def test_the_broker_of_the_stack_has_these_two_users_and_no_guest(tmp_path: Path) -> None:
    """RabbitMQ itself reads its configuration, its plugins and the definitions at its start."""
    if local_services.missing_packages() and "CI" not in os.environ:
        pytest.skip("RabbitMQ is not installed")
    broker = BrokerOfTheStack(tmp_path / "broker")
    broker.start()
    try:
        users = json.loads(broker.ctl("list_users", "--formatter", "json"))
        assert {user["user"]: user["tags"] for user in users} == {local_services.USER: [], "publisher": []}
        permissions = json.loads(broker.ctl("list_permissions", "--formatter", "json"))
        rights = {row["user"]: (row["configure"], row["write"], row["read"]) for row in permissions}
        queue = r"^votes\.aggregation$"
        assert rights == {local_services.USER: (queue, "^$", queue), "publisher": ("^$", r"^amq\.default$", "^$")}
        queues = json.loads(broker.ctl("list_queues", "name", "type", "durable", "--formatter", "json"))
        names = [f"votes.aggregation{end}" for end in ("", ".dead", ".rejected")]
        assert sorted(queues, key=str) == [{"name": name, "type": "classic", "durable": True} for name in names]
        plugins = broker.ctl("eval", "rabbit_plugins:active().")
        assert "rabbitmq_prometheus" in plugins and "rabbitmq_management" in plugins
    finally:
        broker.stop()


def consume(url: str, queue: str) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        connection.channel().basic_get(queue)
    finally:
        connection.close()


def test_publish_test_votes_logs_in_as_the_publisher(users: tuple[Queue, Queue], queue: Queue, tmp_path: Path) -> None:
    """With .env as Compose has it, where the service's own user may not publish."""
    parameters = pika.URLParameters(users[1].url)
    queue.publish(vote())
    environment = {
        "PATH": os.environ["PATH"],
        "RABBITMQ_HOST": parameters.host,
        "RABBITMQ_PORT": str(parameters.port),
        "RABBITMQ_USER": "nobody",
        "RABBITMQ_PASSWORD": "wrong",
        "RABBITMQ_PUBLISHER_USER": parameters.credentials.username,
        "RABBITMQ_PUBLISHER_PASSWORD": PASSWORD,
        "RABBITMQ_QUEUE": queue.name,
    }
    command = [sys.executable, ROOT / "test_publisher.py", "-n", "20", "--quiet"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert queue.ready() == 21


def test_republish_needs_the_right_to_read_and_that_to_publish(
    role: Results, users: tuple[Queue, Queue], queue: Queue, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The service's role reads what is kept; its broker user may not publish, which is told with exit code 3."""
    with Database(role.url, pool_min=1, pool_max=1, timeout=10, instance="few") as database:
        database.batch_update_results([], [Rejection(json.dumps(vote()).encode(), "content_encoding", "", None, 1)])
    with queue.channel():
        pass  # declares it
    as_service, as_publisher = users
    command = ("republish", "--reason", "content_encoding")
    refused = run(*command, DATABASE_URL=role.url, AMQP_URL=as_service.url)
    assert (refused.returncode, "a right is missing: ChannelClosedByBroker: 403" in refused.stderr) == (3, True), (
        refused
    )
    assert queue.ready() == 0
    publisher = {"RABBITMQ_PUBLISHER_USER": pika.URLParameters(as_publisher.url).credentials.username}
    server = pika.URLParameters(queue.url)
    publisher |= {"RABBITMQ_PUBLISHER_PASSWORD": PASSWORD, "RABBITMQ_HOST": server.host, "AMQP_URL": ""}
    done = run(*command, DATABASE_URL=role.url, RABBITMQ_PORT=str(server.port), **publisher)
    assert (done.returncode, queue.ready()) == (0, 1), done
