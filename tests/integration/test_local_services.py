"""The local services start, stop and clean up after themselves, whatever comes between."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pika
import psycopg2
import pytest

from scripts import local_services
from scripts.local_services import LocalServices, LocalServicesError, PostgresServer, Process, RabbitMQServer

SCRIPT = Path(local_services.__file__)
STANDARD_PORTS = (5432, 5672, 4369, 25672)


@pytest.fixture(autouse=True, scope="module")
def _servers_are_installed() -> None:
    missing = local_services.missing_packages()
    if missing:
        reason = f"not installed: {' '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _no_urls_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMQP_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A folder for the services; whatever a failed test leaves in it is stopped."""
    yield tmp_path / "local"
    LocalServices(tmp_path / "local").stop()


@pytest.fixture(scope="module")
def started_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    """Both servers, in a folder with a space in its name."""
    with LocalServices(tmp_path_factory.mktemp("local") / "with a space", management=True) as services:
        yield services


@pytest.fixture
def running(started_once: LocalServices) -> LocalServices:
    """Both servers, running even after a test that failed half-way."""
    started_once.start()
    return started_once


def run(*arguments: str | Path, python: str = sys.executable, **options: object) -> subprocess.CompletedProcess[str]:
    command = [python, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


def processes_of(directory: Path) -> list[Process]:
    """Every process that is noted in a state file below this folder, with all its children."""
    noted = []
    for state_file in directory.glob("*/state.json"):
        state = json.loads(state_file.read_text())
        noted += [Process(*state[role]) for role in ("server", "epmd") if role in state]
    return noted + [child for process in noted if process.is_alive() for child in process.descendants()]


def mentions(text: str) -> list[int]:
    """The pids of all processes whose command line or environment holds this text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text.encode() in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def test_up_and_down_are_safe_to_repeat_and_leave_nothing(directory: Path) -> None:
    """up, up, down, down; after that no process lives and no data is left, not even below /var/tmp."""
    first = run("up", "--directory", directory)
    assert first.returncode == 0, first.stderr
    processes = processes_of(directory)
    assert len(processes) >= 3
    home = Path(json.loads((directory / "postgres" / "state.json").read_text())["home"])
    state_files = list(directory.glob("*/state.json"))
    assert [oct(file.stat().st_mode & 0o777) for file in state_files] == ["0o600", "0o600"]
    secrets = [json.loads(file.read_text())["password"] for file in state_files]
    assert not any(secret in first.stdout + first.stderr for secret in secrets)

    second = run("up", "--directory", directory)
    assert second.returncode == 0
    assert "both run already" in second.stdout
    assert set(processes_of(directory)) & set(processes), "the second up must not restart"

    assert run("status", "--directory", directory).returncode == 0
    for _ in range(2):
        assert run("down", "--directory", directory).returncode == 0
    assert not [process for process in processes if process.is_alive()]
    assert list(directory.iterdir()) == []
    assert not home.exists()
    assert run("status", "--directory", directory).returncode == 1


def test_env_prints_both_urls_and_they_work(running: LocalServices) -> None:
    """What `eval` makes of env opens a connection to either server."""
    shown = run("env", "--directory", running.directory).stdout
    command = ["sh", "-c", f'{shown}\nprintf "%s\\n" "$AMQP_URL" "$DATABASE_URL"']
    amqp_url, database_url = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    pika.BlockingConnection(pika.URLParameters(amqp_url)).close()
    psycopg2.connect(database_url).close()


def test_env_fails_when_nothing_runs(directory: Path) -> None:
    """A script that evals env must not go on with empty URLs."""
    result = run("env", "--directory", directory)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "do not run" in result.stderr


def test_nothing_is_started_when_both_urls_are_set(directory: Path) -> None:
    """Who brings servers along gets no others, and env hands the same URLs back."""
    given = {"AMQP_URL": "amqp://user:it's@broker/", "DATABASE_URL": "postgresql://elsewhere/votes"}
    result = run("up", "--directory", directory, env=os.environ | given)
    assert result.returncode == 0
    assert "nothing to start" in result.stdout
    assert not directory.exists()
    shown = run("env", "--directory", directory, env=os.environ | given).stdout
    evaluated = subprocess.run(["sh", "-c", f'{shown}\nprintf %s "$AMQP_URL"'], capture_output=True, text=True)
    assert evaluated.stdout == given["AMQP_URL"]


def test_an_ordinary_user_can_run_it_while_the_standard_ports_are_taken(tmp_path: Path) -> None:
    """As nobody, with 5432, 5672, 4369 and 25672 held by others, with the system's own Python and no venv."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, to become another user, and a python3 outside of /root")
    nobody = pwd.getpwnam("nobody")
    home = Path("/tmp") / f"local-services-{os.getpid()}"  # tmp_path is closed to others
    home.mkdir(mode=0o700)
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    script = home / "local_services.py"
    shutil.copy(SCRIPT, script)
    script.chmod(0o644)

    def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, script, command, "--directory", home / "local"],
            capture_output=True,
            text=True,
            cwd=home,
            env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
        )

    try:
        with ExitStack() as held:
            for port in STANDARD_PORTS:
                listener = held.enter_context(socket.socket())
                with suppress(OSError):  # somebody else holds it: just as good
                    listener.bind(("0.0.0.0", port))
                    listener.listen()
            up = as_nobody("up")
            assert up.returncode == 0, up.stderr
            processes = processes_of(home / "local")
            assert {Path(f"/proc/{process.pid}").stat().st_uid for process in processes} == {nobody.pw_uid}
            assert as_nobody("status").returncode == 0
    finally:
        down = as_nobody("down")
        shutil.rmtree(home)
    assert down.returncode == 0, down.stderr
    assert not [process for process in processes if process.is_alive()]


def test_postgres_keeps_data_and_port_over_stop_and_kill(running: LocalServices) -> None:
    """A stop of each kind, a crash, and a frozen postmaster: the row and the URL are still the same."""
    server = running.postgres
    url = server.url()
    execute(url, "CREATE TABLE kept (number integer)")
    endings: list[Callable[[], None]] = [
        lambda: server.stop("smart"),
        lambda: server.stop("immediate"),
        server.kill,
        lambda: os.kill(server.postmaster_pid, signal.SIGKILL),
        lambda: freeze_and(server.postmaster_pid, server.stop),
        lambda: freeze_and(server.postmaster_pid, server.kill),
    ]
    for count, end in enumerate(endings, start=1):
        execute(url, "INSERT INTO kept VALUES (1)")
        family = family_of(server, "server")
        end()
        wait_for(lambda: not server.is_running(), "the postmaster is gone")
        server.start()
        assert not [process for process in family if process.is_alive()]
        assert server.url() == url
        assert execute(url, "SELECT count(*) FROM kept") == count


def test_a_killed_postgres_takes_its_busy_backends_along(running: LocalServices) -> None:
    """A backend that computes would outlive its postmaster by the length of its query, and so block the next start."""
    server = running.postgres
    busy = psycopg2.connect(server.url(), async_=True)
    wait_for(lambda: busy.poll() == psycopg2.extensions.POLL_OK, "connected")
    busy.cursor().execute("SELECT count(*) FROM generate_series(1, 1000000000000)")
    backend = next(p for p, _ in local_services._processes(busy.get_backend_pid()))
    os.kill(server.postmaster_pid, signal.SIGKILL)
    wait_for(lambda: not server.is_running(), "the postmaster is gone")
    assert backend.is_alive()
    server.start()
    assert not backend.is_alive()
    busy.close()


def test_rabbitmq_keeps_messages_and_port_over_stop_and_kill(running: LocalServices) -> None:
    """A persistent message in a durable queue is still there, under the same URL, after a stop and after a crash."""
    server = running.rabbitmq
    url = server.url()
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("kept", durable=True)
        channel.basic_publish("", "kept", b"vote", pika.BasicProperties(delivery_mode=2))
    for end in (server.stop, lambda: freeze_and(server.pid, server.kill)):
        processes = [p for role in ("server", "epmd") for p in family_of(server, role)]
        end()
        assert not [process for process in processes if process.is_alive()]
        server.start()
        assert server.url() == url
    assert server.ctl("list_queues", "name", "messages", "--no-table-headers").split() == ["kept", "1"]


def test_rabbitmqctl_reports_what_went_wrong(running: LocalServices) -> None:
    """The words of rabbitmqctl reach the caller."""
    with pytest.raises(LocalServicesError, match="no_such_user"):
        running.rabbitmq.ctl("set_permissions", "no_such_user", ".*", ".*", ".*")


def test_rabbitmq_has_one_user_and_it_is_not_guest(running: LocalServices) -> None:
    """The guest that RabbitMQ brings along is not made."""
    assert running.rabbitmq.ctl("list_users", "--no-table-headers").split() == ["votes", "[administrator]"]


def test_both_listen_on_the_loopback_interface_only(running: LocalServices) -> None:
    """No port is open to the network."""
    ports = [running.postgres.port]
    ports += [int(running.rabbitmq._get(name)) for name in running.rabbitmq.port_names]
    wanted = {f"{port:04X}" for port in ports}
    listening: dict[str, set[str]] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, port = line.split()[1].split(":")
        if line.split()[3] == "0A" and port in wanted:
            listening.setdefault(port, set()).add(address)
    assert listening == {port: {"0100007F"} for port in wanted}


def test_a_failing_start_leaves_nothing_running(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A RabbitMQ that dies at once: the message shows its last words, and PostgreSQL and epmd are gone as well."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for program in ("rabbitmq-server", "rabbitmqctl"):
        (broken / program).write_text("#!/bin/sh\necho my last words\nexit 1\n")
        (broken / program).chmod(0o755)
    monkeypatch.setattr(local_services, "RABBITMQ_FOLDERS", (str(broken),))
    started: list[Process] = []
    spawn = local_services._spawn

    def noting_spawn(*arguments: object) -> Process:
        started.append(spawn(*arguments))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(local_services, "_spawn", noting_spawn)
    with pytest.raises(LocalServicesError, match="my last words"):
        LocalServices(directory).start()
    assert len(started) == 3
    assert not [process for process in started if process.is_alive()]
    assert list(directory.iterdir()) == []


def test_a_taken_port_is_replaced_by_another(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program that is faster to take the port costs a second try, not the start."""
    free_ports = local_services._free_ports
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        answers = [[other.getsockname()[1]]]
        monkeypatch.setattr(
            local_services, "_free_ports", lambda count: answers.pop() if answers else free_ports(count)
        )
        server = PostgresServer(directory / "postgres")
        server.start()
        assert answers == []
        assert server.port != other.getsockname()[1]
        execute(server.url(), "SELECT 1")


def test_a_restart_says_when_its_port_was_taken_meanwhile(directory: Path) -> None:
    """Ports are kept, so the message says which one to free; the data stays."""
    server = PostgresServer(directory / "postgres")
    server.start()
    server.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", server.port))
        other.listen()
        with pytest.raises(LocalServicesError, match=f"another program now listens on {server.port}"):
            server.start()
        assert not server.is_running()
    server.start()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_up_leaves_nothing_running(directory: Path, signum: signal.Signals) -> None:
    """The node of RabbitMQ is booting and initdb is at work: no process and no data are left."""
    if signal.getsignal(signum) == signal.SIG_IGN:
        pytest.skip(f"{signum.name} is ignored here, as in a background job, and up respects that")
    postgres = PostgresServer(directory / "postgres")
    command = [sys.executable, str(SCRIPT), "up", "--directory", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as up:
        wait_for(lambda: "home" in postgres._state(), "initdb is about to run")
        home = Path(postgres._get("home"))
        processes = processes_of(directory)
        assert len(processes) >= 2
        up.send_signal(signum)
        assert up.wait(timeout=60) == 128 + signum
    assert not [process for process in processes if process.is_alive()]
    assert mentions(str(directory)) + mentions(str(home)) == []
    assert list(directory.iterdir()) == []
    assert not home.exists()


def test_a_stale_state_signals_no_stranger(directory: Path) -> None:
    """After a reboot a noted pid may be anyone's: status says dead, and down leaves the stranger alone."""
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            for name, roles in (("postgres", ["server"]), ("rabbitmq", ["server", "epmd"])):
                (directory / name).mkdir(parents=True)
                state = {role: [stranger.pid, "another birth"] for role in roles}
                (directory / name / "state.json").write_text(json.dumps(state))
            assert run("status", "--directory", directory).returncode == 3
            assert run("down", "--directory", directory).returncode == 0
            assert stranger.poll() is None
            assert list(directory.iterdir()) == []
        finally:
            stranger.kill()


def test_down_removes_only_what_is_its_own(directory: Path) -> None:
    """A folder that was pointed at by mistake keeps its files, even in folders that bear our names."""
    (directory / "postgres").mkdir(parents=True)
    (directory / "postgres" / "thesis.txt").write_text("years of work")
    assert run("down", "--directory", directory).returncode == 0
    assert (directory / "postgres" / "thesis.txt").exists()


@pytest.mark.parametrize("proc", ["/proc", "/no such folder"])
def test_a_process_is_known_by_pid_and_birth(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With /proc and with ps: a child is found and alive until it ends, and its pid alone does not count."""
    monkeypatch.setattr(local_services, "PROC", Path(proc))
    if proc != "/proc" and not shutil.which("ps"):
        pytest.skip("no ps")
    this = next(process for process, _parent in local_services._processes(os.getpid()))
    with subprocess.Popen(["sleep", "600"]) as child:
        found = next(process for process in this.descendants() if process.pid == child.pid)
        assert found.is_alive()
        assert not Process(child.pid, "another birth").is_alive()
        child.kill()
        wait_for(lambda: not found.is_alive(), "the end is noticed")


def family_of(server: PostgresServer | RabbitMQServer, role: str) -> list[Process]:
    process = server._process(role)
    assert process is not None
    return [process, *process.descendants()]


def execute(url: str, statement: str) -> object:
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None
    finally:
        connection.close()


def freeze_and(pid: int, end: Callable[[], None]) -> None:
    os.kill(pid, signal.SIGSTOP)
    end()


KILLED_IN_THE_MIDDLE = """
import sys, time
from pathlib import Path
from lab.service import ServiceProcess
from scripts.local_services import LocalServices

folder = Path(sys.argv[1])
with LocalServices(folder / "services") as services:
    urls = {"AMQP_URL": services.rabbitmq.url(), "DATABASE_URL": services.postgres.url()}
    print(ServiceProcess(folder / "service.log", urls).start_and_wait().pid, flush=True)
    time.sleep(600)
"""


def test_servers_and_service_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL, as the end of a test run may be: no process and no data are left."""
    command = [sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(tmp_path)]
    with subprocess.Popen(command, cwd=SCRIPT.parent.parent, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            service = int(program.stdout.readline())
            services = LocalServices(tmp_path / "services")
            home = Path(services.postgres._get("home"))
            processes = processes_of(services.directory)
            processes += [process for process, _parent in local_services._processes(service)]
            assert len(processes) > 4
        finally:
            program.kill()
    wait_for(lambda: not any(process.is_alive() for process in processes), "all of them end")
    wait_for(lambda: not home.exists() and not services.exists(), "their data is removed")
