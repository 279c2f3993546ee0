#!/usr/bin/env python3
"""A private PostgreSQL and a private RabbitMQ for development and tests, without Docker.

    python scripts/local_services.py up          start both, or say that they run
    eval "$(python scripts/local_services.py env)"   AMQP_URL and DATABASE_URL for this shell
    python scripts/local_services.py down        stop both and remove their data

Both listen on 127.0.0.1 only, on free ports, with random passwords, beside whatever else runs on the machine.
Only the standard library is used: this must run before any virtual environment exists.

Exit codes: 0 done (`status`: both run), 1 failed (`status`, `env`: nothing runs), 2 wrong usage, 3 `status`: one or
both have died since `up`, 4 a server is not installed and could not be, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pwd
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self
from urllib.parse import quote

DEFAULT_DIRECTORY = Path(__file__).resolve().parent.parent / ".local"
USER = "votes"
HOST = "127.0.0.1"
NODE = "votes@localhost"

START_SECONDS = 90.0  # a start takes 1 to 5 s; a busy machine that recovers from a crash gets its time
STOP_SECONDS = 30.0
PORT_TRIES = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROC = Path("/proc")  # where it does not exist (macOS), `ps` is asked instead

# Below the range from which systems take the ports of outgoing connections (32768 and up). From inside it, a client
# that retries while its server is down can be given that very port, reach itself, and keep the server from coming back.
PORTS = range(26000, 32000)
_handed_out: deque[int] = deque(maxlen=100)  # servers that start side by side listen on their ports only seconds later

# Debian's wrapper in /usr/sbin wants root or the user rabbitmq and the system's own folders, so PATH comes last.
RABBITMQ_FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/opt/rabbitmq/sbin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
)
POSTGRES_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
PACKAGES = "rabbitmq-server postgresql"  # Debian's names
UNITS = {"rabbitmq-server": "rabbitmq-server epmd.socket epmd.service"}  # what systemd starts for a package

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"])


class LocalServicesError(Exception):
    """A server could not be found, started, reached or stopped; the message says what to do about it."""


class PortTaken(LocalServicesError):
    """Another program was faster to take a port; with new ports the next try may do."""


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process by pid and birth: a pid alone may be another process by now, after a reboot or a long night."""

    pid: int
    birth: str

    def is_alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours: its zombie would count as a live postmaster for PostgreSQL
        return any(process == self for process, _parent in _processes(self.pid))

    def send(self, signum: int) -> None:
        """Send a signal, if it still lives."""
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def descendants(self) -> list[Process]:
        """Its children, their children and so on, as they are now."""
        everyone = list(_processes())
        found, parents = [], {self.pid}
        while parents:
            children = [process for process, parent in everyone if parent in parents]
            found += children
            parents = {process.pid for process in children}
        return found

    def kill(self) -> None:
        """Kill it with all its descendants, frozen ones too, and return when they are gone."""
        if not self.is_alive():
            return  # "its" children would be those of a stranger with the same pid
        self.send(signal.SIGSTOP)  # from here on it has no new children
        family = [self, *self.descendants()]
        for process in family:
            process.send(signal.SIGKILL)
        if not _wait_until(lambda: not any(process.is_alive() for process in family), STOP_SECONDS):
            raise LocalServicesError(f"process {self.pid} or one of its children outlives SIGKILL")


def _processes(pid: int | None = None) -> Iterator[tuple[Process, int]]:
    """Yield every process that is no zombie, or just the one with this pid, each with the pid of its parent."""
    if not PROC.exists():
        selection = ["-A"] if pid is None else ["-p", str(pid)]
        command = ["ps", *selection, "-o", "pid=,ppid=,stat=,lstart="]
        for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
            child, parent, state, birth = line.split(maxsplit=3)
            if not state.startswith("Z"):
                yield Process(int(child), birth.strip()), int(parent)
        return
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    pids = [pid] if pid is not None else [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    for number in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name of the program stands first, in brackets, and may itself hold spaces and brackets.
            fields = (PROC / str(number) / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields and fields[0] not in "ZX":  # a process that is just ending may have an empty file
                yield Process(number, f"{boot} {fields[19]}"), int(fields[1])


def _spawn(command: list[str], log: Path, env: Mapping[str, str], user: pwd.struct_passwd | None = None) -> Process:
    """Start a server in a session of its own, so that neither Ctrl-C nor the end of this program reaches it."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",  # the user postgres may not enter ours
            env=env,
            start_new_session=True,
            **_as_user(user),
        )
    child.returncode = 0  # from here on the pid is what counts; a Popen dropped before its child ends would complain
    # Without a birth it has ended already, which the caller finds out by is_alive().
    return next((process for process, _parent in _processes(child.pid)), Process(child.pid, "ended at once"))


def _run(
    command: list[str], env: Mapping[str, str], timeout: float, user: pwd.struct_passwd | None = None, text: str = ""
) -> str:
    """Run a program to its end and return what it printed; raise LocalServicesError when it fails or takes too long."""
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=env,
            timeout=timeout,
            start_new_session=True,
            **_as_user(user),
        )
    except subprocess.TimeoutExpired as exc:
        raise LocalServicesError(f"{Path(command[0]).name} did not end within {timeout:.0f} s") from exc
    if done.returncode != 0:
        told = (done.stderr.strip() + "\n" + done.stdout.strip()).strip()
        raise LocalServicesError(f"{Path(command[0]).name} failed with exit code {done.returncode}:\n{told}")
    return done.stdout


def _as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    if user is None:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _environment(**variables: str) -> dict[str, str]:
    """Return an environment from scratch: the PGOPTIONS or RABBITMQ_NODENAME of the caller are not for our servers."""
    return {"PATH": SEARCH_PATH, "LANG": "C.UTF-8", **variables}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: raised between the start of a child and the note of its pid, they would lose it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    held: list[int] = []
    before = {}
    for signum in SIGNALS:
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # nohup stays in force
            before[signum] = signal.signal(signum, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for number in held:
            signal.raise_signal(number)


def exit_on_signals(said: str = "") -> None:
    """From here on Ctrl-C, SIGTERM and SIGHUP raise SystemExit, once, after the words ``said``."""

    def leave(signum: int, _frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not break the clean-up off
        if said:
            print(said, file=sys.stderr, flush=True)
        sys.exit(128 + signum)

    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, leave)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- the guard -------------------------------------------------------------------------------------------------------

# SIGKILL leaves a program no time to stop what it has started, and the servers are in sessions of their own. So a
# second process holds the other end of a pipe: where that breaks, it ends what is left.
_guard_pipe: int | None = None
_guard_lock = threading.Lock()


def end_with_this_program(folder: Path | None = None, pid: int | None = None) -> None:
    """Have the servers below ``folder`` stopped and removed, or this process killed, should we end without doing so."""
    global _guard_pipe
    birth = next((process.birth for process, _parent in _processes(pid)), "") if pid is not None else ""
    with _guard_lock:
        if _guard_pipe is None:
            reading, _guard_pipe = os.pipe()
            guard = subprocess.Popen(
                [sys.executable, "-c", "from scripts.local_services import guard; guard()"],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parent.parent,
                env=_environment(),
                start_new_session=True,
            )
            os.close(reading)
            guard.returncode = 0  # it outlives us by a moment, and is nobody's to wait for
        told = json.dumps({"folder": str(folder.absolute())} if folder else {"process": [pid, birth]})
        os.write(_guard_pipe, f"{told}\n".encode())


def guard() -> None:
    """Wait until the program that started this is gone; then end what it has told of and not ended itself."""
    told = [json.loads(line) for line in sys.stdin.read().splitlines()]
    for pid, birth in (one["process"] for one in told if "process" in one):
        with suppress(LocalServicesError):  # what cannot be stopped must not keep the rest running
            Process(pid, birth).kill()
    for folder in (Path(one["folder"]) for one in told if "folder" in one):
        for server in [_Server(state_file.parent) for state_file in folder.rglob("state.json")]:
            with suppress(LocalServicesError, OSError):
                server._stop(signal.SIGQUIT)
                server.remove_data()


# --- ports -----------------------------------------------------------------------------------------------------------


def _free_ports(count: int) -> list[int]:
    """Return so many ports that nothing on this machine listens on."""
    # Not the global random numbers: a test that seeds them would give every process the same "random" ports.
    candidates = random.SystemRandom().sample(PORTS, k=len(PORTS))
    free = list(islice((port for port in candidates if port not in _handed_out and _is_free(port)), count))
    if len(free) < count:
        raise LocalServicesError(f"no free port between {PORTS.start} and {PORTS.stop}")
    _handed_out.extend(free)
    return free


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do it: what is left of old connections is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


# --- programs --------------------------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Return the Debian names of the packages whose programs are not on this machine: empty when both servers are."""
    missing = []
    for package, find in (("rabbitmq-server", _find_rabbitmq), ("postgresql", _find_postgres)):
        try:
            find()
        except LocalServicesError:
            missing.append(package)
    return missing


def _find_postgres() -> Path:
    """Return the folder of PostgreSQL's server programs."""
    on_path = shutil.which("initdb", path=SEARCH_PATH)
    folders = [Path(on_path).parent] if on_path else []
    return _first_with(["initdb", "postgres"], folders + _newest_first(POSTGRES_FOLDERS), "PostgreSQL")


def _find_rabbitmq() -> Path:
    """Return the folder of RabbitMQ's own scripts."""
    on_path = shutil.which("rabbitmq-server", path=SEARCH_PATH)
    folders = [Path(on_path).parent] if on_path else []
    return _first_with(["rabbitmq-server", "rabbitmqctl"], _newest_first(RABBITMQ_FOLDERS) + folders, "RabbitMQ")


def _first_with(programs: list[str], folders: list[Path], server: str) -> Path:
    for folder in folders:
        if all(os.access(folder / program, os.X_OK) for program in programs):
            return folder
    raise LocalServicesError(f"{server} is not installed; {_how_to_install()}")


def _newest_first(patterns: tuple[str, ...]) -> list[Path]:
    def version(folder: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", str(folder))]

    return [f for p in patterns for f in sorted(Path("/").glob(p.lstrip("/")), key=version, reverse=True)]


def _find_program(name: str, folder: Path | None = None, packages: str = PACKAGES) -> str:
    """Return a program from this folder, or else from PATH; ``packages`` of Debian would bring it."""
    found = shutil.which(name, path=str(folder)) if folder else None
    found = found or shutil.which(name, path=SEARCH_PATH)
    if found is None:
        raise LocalServicesError(f"the program {name} is not installed; {_how_to_install(packages)}")
    return found


def _how_to_install(packages: str = PACKAGES) -> str:
    if shutil.which("apt-get"):
        sudo = "" if os.geteuid() == 0 else "sudo "
        return f"install it with: {sudo}apt-get install -y --no-install-recommends {packages}"
    if shutil.which("brew"):
        return "install it with: brew install rabbitmq postgresql"
    return "install the packages of RabbitMQ and PostgreSQL (server and client) of this system, or use Docker"


def install(packages: list[str]) -> None:
    """Install Debian packages with apt-get, as root, without starting the servers that they bring.

    Raises LocalServicesError with the last lines of apt-get when that fails.
    """
    print(f"installing {' '.join(packages)} with apt-get ...", flush=True)
    policy = Path("/usr/sbin/policy-rc.d")  # Debian asks this script whether a package may start its server; 101 is no
    ours = False
    try:
        with suppress(FileExistsError), _signals_held(), policy.open("x") as script:
            ours = True
            script.write("#!/bin/sh\n# of local_services.py, for the time of one apt-get install\nexit 101\n")
            policy.chmod(0o755)
        try:
            _apt_get("install", "-y", "--no-install-recommends", *packages)
        except LocalServicesError:  # most often an empty or outdated package list
            _apt_get("update")
            _apt_get("install", "-y", "--no-install-recommends", *packages)
    finally:
        if ours:
            policy.unlink(missing_ok=True)
    if Path("/run/systemd/system").exists():
        print("systemd may start the packages' own servers at the next boot; to prevent that:")
        print("  systemctl disable", " ".join(UNITS.get(package, package) for package in packages))


def _apt_get(*arguments: str) -> None:
    with _signals_held():  # dpkg is not to be killed half-way; Ctrl-C reaches apt-get itself, which knows how to stop
        done = subprocess.run(
            ["apt-get", "-o", "DPkg::Lock::Timeout=120", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-10:])
        raise LocalServicesError(f"apt-get {arguments[0]} failed with exit code {done.returncode}:\n{end}")


# --- the servers -----------------------------------------------------------------------------------------------------


class _Server:
    """What all servers share: one folder with a log and state.json (ports, password, pids), mode 0600.

    The state is read anew for each question, so any number of objects and programs may look at the same server. As a
    context manager it is started, and at the end stopped and removed with all its data.
    """

    name = ""
    port_names: tuple[str, ...] = ("port",)
    port_tries = PORT_TRIES

    def __init__(self, directory: Path, password: str = "") -> None:
        """``password``: of the user `votes`; a random one without it."""
        self.directory = directory.absolute()
        self.log = self.directory / "server.log"
        self._state_file = self.directory / "state.json"
        self._given_password = password

    def __enter__(self) -> Self:
        end_with_this_program(folder=self.directory)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.remove_data()

    @property
    def port(self) -> int:
        """The port on 127.0.0.1 that clients use. Raises LocalServicesError before the first start."""
        return int(self._get("port"))

    @property
    def pid(self) -> int:
        """The pid of the server. Raises LocalServicesError when it does not run."""
        if not self.is_running():
            raise LocalServicesError(f"{self.name} in {self.directory} does not run")
        return int(self._get("server")[0])

    def exists(self) -> bool:
        """Whether there is anything of a server in its folder: data, or just the remains of a start."""
        return self._state_file.exists()

    def is_running(self) -> bool:
        """Whether its process lives; it may still be busy with starting."""
        process = self._process("server")
        return process is not None and process.is_alive()

    def start(self) -> None:
        """Start it and return when clients can use it; nothing happens when it runs already.

        Data, password and ports are made at the first start and kept over all later ones. Raises LocalServicesError,
        and leaves nothing running, when it does not come up.
        """
        try:
            self.launch()
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def launch(self) -> None:
        """Start its process and return at once; nothing happens when it runs already."""
        if self.is_running():
            return
        self.kill()  # a half of it may still live
        if not self._state().get("complete"):  # never came up: what is there of data is not to be trusted
            self.remove_data()
            ports = dict(zip(self.port_names, _free_ports(len(self.port_names)), strict=True))
            with _signals_held():  # a folder without a state would not be known as ours
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._save(password=self._given_password or secrets.token_hex(16), **ports)
            self._make_data()
        self._launch()

    def wait_until_ready(self) -> None:
        """Return when clients can use it, with other ports if another program was faster to take one.

        Raises LocalServicesError, with the end of its log, when it ends by itself or takes longer than 90 s.
        """
        tries = 1
        while not self._becomes_ready():
            if self.is_running():
                self.kill()
                raise LocalServicesError(f"{self.name} is not usable after {START_SECONDS:.0f} s.\n{self.log_tail()}")
            self.kill()
            taken = [self._get(name) for name in self.port_names if not _is_free(self._get(name))]
            if not taken:
                raise LocalServicesError(f"{self.name} ended while it started.\n{self.log_tail()}")
            if self._state().get("complete"):
                raise LocalServicesError(
                    f"{self.name} keeps its ports, but another program now listens on {taken[0]}: "
                    "end that program, or run `down` and `up` for new ports (and no data)"
                )
            if tries == self.port_tries:
                raise PortTaken(f"{self.name} lost its port to others {tries} times: {taken[0]}; try again")
            tries += 1
            self.launch()
        if not self._state().get("complete"):
            self._finish_data()
            self._save(complete=True)

    def stop(self) -> None:
        """Stop it cleanly and return when it is gone; it is killed when that takes longer than 30 s."""
        self._stop(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it and all its children, as a crash would, and return when they are gone. Data stays."""
        for process in self._all_processes():
            process.kill()

    def freeze(self) -> None:
        """Stop it with all its children where they stand: its connections stay open, and nobody answers on them."""
        self._signal_family(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after freeze()."""
        self._signal_family(signal.SIGCONT)

    def remove_data(self) -> None:
        """Remove its whole folder, and its data below /var/tmp. Only for a server that is stopped."""
        home = self._state().get("home")
        if home is not None and Path(home).exists() and Path(home) != self.directory:
            with _signals_held():
                shutil.rmtree(home)
        if self.exists():  # else the folder is not ours
            with _signals_held():
                shutil.rmtree(self.directory)

    def log_tail(self, lines: int = 20) -> str:
        """Return the end of its log, under one line that says where the log is."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n  ".join([f"The end of {self.log}:", *text.splitlines()[-lines:]])

    def _make_data(self) -> None:
        """Make what the server needs before its first start."""

    def _launch(self) -> None:
        raise NotImplementedError

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def _finish_data(self) -> None:
        """Make what can be made only in the running server, once."""

    def _make_home(self, user: pwd.struct_passwd | None) -> Path:
        """Return a folder that this user can enter: our own, or one below /var/tmp."""
        with _signals_held():
            home = self.directory
            if user is not None:
                # unlike /tmp never in memory
                home = Path(tempfile.mkdtemp(prefix=f"votes-{self.name.lower()}-", dir="/var/tmp"))
                os.chown(home, user.pw_uid, user.pw_gid)
            self._save(home=str(home))
        return home

    def _becomes_ready(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while self.is_running() and time.monotonic() < deadline:
            if self._is_ready():
                return True
            time.sleep(0.02)
        return False

    def _stop(self, signum: int) -> None:
        server = self._process("server")
        if server is not None and server.is_alive():
            family = [server, *server.descendants()]
            server.send(signum)
            for process in family:
                process.send(signal.SIGCONT)  # one that is frozen would not hear of it
            _wait_until(lambda: not server.is_alive(), STOP_SECONDS)
            for process in family:
                process.kill()  # the helpers of Erlang outlive it by a moment
        self.kill()

    def _signal_family(self, signum: int) -> None:
        server = self._process("server")
        if server is None or not server.is_alive():
            raise LocalServicesError(f"{self.name} in {self.directory} does not run")
        server.send(signum)  # the parent first: frozen, it has no new children
        for process in server.descendants():
            process.send(signum)

    def _all_processes(self) -> list[Process]:
        return [process for process in map(self._process, ("server", "epmd")) if process is not None]

    def _process(self, role: str) -> Process | None:
        pid_and_birth = self._state().get(role)
        return Process(*pid_and_birth) if pid_and_birth else None

    def _get(self, key: str) -> Any:
        try:
            return self._state()[key]
        except KeyError as exc:
            raise LocalServicesError(f"{self.name} in {self.directory} has not been started") from exc

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as exc:
            raise LocalServicesError(f"{self._state_file} is damaged: remove {self.directory} by hand") from exc
        return state

    def _save(self, **changes: Any) -> None:
        text = json.dumps(self._state() | changes, indent=2)
        new = self._state_file.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        new.replace(self._state_file)  # a reader, or a crash, meets the old state or the new one, never a half


class PostgresServer(_Server):
    """A private PostgreSQL cluster with the superuser `votes` and the database `votes`.

    As root its data is in a folder of its own under /var/tmp: PostgreSQL refuses to run as root, and the user postgres
    may not be able to enter `directory`, for instance below /root.
    """

    name = "PostgreSQL"

    @property
    def postmaster_pid(self) -> int:
        """The pid of the postmaster. Raises LocalServicesError when it does not run."""
        return self.pid

    def url(self, database: str = "votes") -> str:
        """Return the URL of a database in it. Raises LocalServicesError before the first start."""
        return f"postgresql://{USER}:{self._get('password')}@{HOST}:{self.port}/{quote(database, safe='')}"

    def stop(self, mode: str = "fast") -> None:
        """Stop it and return when it is gone; it is killed when that takes longer than 30 s.

        `mode` is that of pg_ctl: "smart" waits for the clients to leave, "fast" rolls back what they do, "immediate"
        does not even write a checkpoint. Raises ValueError for any other.
        """
        signals = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
        if mode not in signals:
            raise ValueError(f"mode must be one of {', '.join(signals)}, not {mode!r}")
        self._stop(signals[mode])

    def kill(self) -> None:
        """Kill it and all its children, as a crash would, and return when they are gone. Data stays."""
        super().kill()
        if PROC.exists() and self.exists():
            # All are gone, we have looked. A postmaster that nobody reaps, as in many a container, would look alive
            # to the next one. Removed at any other time, this file could cost the data.
            (self._data() / "postmaster.pid").unlink(missing_ok=True)

    def _make_data(self) -> None:
        user = _unprivileged_user(self.name)
        home = self._make_home(user)
        password_file = home / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self._get("password"))
        if user is not None:
            os.chown(password_file, user.pw_uid, user.pw_gid)
        command = [
            _find_program("initdb", _find_postgres()),
            f"--pgdata={home / 'data'}",
            f"--username={USER}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            f"--locale={'C' if platform.system() == 'Darwin' else 'C.UTF-8'}",
            "--no-sync",  # only of the files of an empty cluster; the server itself keeps its honest fsync
        ]
        with _signals_held():  # it runs for a second; killed half-way it would leave children in the folder
            _run(command, _environment(), timeout=START_SECONDS, user=user)
        password_file.unlink()
        with (home / "data" / "postgresql.conf").open("a") as configuration:
            configuration.write(
                f"listen_addresses = '{HOST}'\n"
                "unix_socket_directories = ''\n"
                "max_connections = 200\n"
                "logging_collector = off\n"  # some distributions turn it on, and the log would be elsewhere
            )

    def _launch(self) -> None:
        data = self._data()
        if not data.exists():
            raise LocalServicesError(f"the data of {self.name}, {data}, is gone: run `down`, then `up`")
        command = [str(_find_postgres() / "postgres"), "-D", str(data), "-p", str(self.port)]
        with _signals_held():
            process = _spawn(command, self.log, _environment(), _unprivileged_user(self.name))
            self._save(server=[process.pid, process.birth])

    def _data(self) -> Path:
        return Path(self._state().get("home", self.directory)) / "data"

    def _all_processes(self) -> list[Process]:
        """The postmaster, and the children that outlive one that another hand killed, as long as their query takes."""
        return super()._all_processes() + [process for process, _parent in _processes() if self._works_here(process)]

    def _works_here(self, process: Process) -> bool:
        folder = PROC / str(process.pid)
        with suppress(OSError):
            return (folder / "cwd").readlink() == self._data() and (folder / "exe").readlink().name == "postgres"
        return False

    def _is_ready(self) -> bool:
        try:
            lines = (self._data() / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # As pg_ctl does it: the port may be answered by a stranger, this file is written by our own postmaster.
        if not lines or lines[0] != str(self._get("server")[0]) or lines[-1].strip() != "ready":
            return False
        try:
            self._psql("SELECT 1")
        except LocalServicesError:
            return False
        return True

    def _finish_data(self) -> None:
        self._psql(f"CREATE DATABASE {USER}")

    def _psql(self, statement: str) -> str:
        return _psql(self.port, self._get("password"), "postgres", statement)


def _psql(port: int, password: str, database: str, statement: str) -> str:
    """Return what a statement of the user `votes` answers: a line for each row, `|` between its values."""
    environment = _environment(
        PGHOST=HOST,
        PGPORT=str(port),
        PGUSER=USER,
        PGPASSWORD=password,  # not in the arguments, which all users of the machine can read
        PGDATABASE=database,
        PGCONNECT_TIMEOUT="5",
    )
    command = [_find_program("psql", _find_postgres()), "--no-psqlrc", "--tuples-only", "--no-align", "-c", statement]
    return _run(command, environment, timeout=30).strip()


def _unprivileged_user(server: str) -> pwd.struct_passwd | None:
    """Return whom a server runs as that refuses to run as root: None, ourselves, where we are not root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError as exc:
        raise LocalServicesError(
            f"{server} refuses to run as root, and there is no user postgres to run it as: "
            "create that user, or run this as an ordinary user"
        ) from exc


class RabbitMQServer(_Server):
    """A private RabbitMQ node with the administrator `votes` and no guest, and the epmd that it registers with."""

    name = "RabbitMQ"
    port_names: tuple[str, ...] = ("port", "distribution_port", "epmd_port", "management_port")
    node = NODE
    kernel_options = "-kernel inet_dist_use_interface {127,0,0,1}"  # of the node, and of rabbitmqctl when it calls

    def __init__(self, directory: Path, management: bool = False, password: str = "") -> None:
        """``management``: with the management API, which costs the node some work for each message."""
        super().__init__(directory, password)
        self._management = management

    def url(self, vhost: str = "/") -> str:
        """Return the AMQP URL of a virtual host in it. Raises LocalServicesError before the first start."""
        return f"amqp://{USER}:{self._get('password')}@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def management_url(self) -> str:
        """Return the address of its management API, if it has one. Raises LocalServicesError before the first start."""
        return f"http://{HOST}:{self._get('management_port')}"

    def ctl(self, *args: str, timeout: float = 60) -> str:
        """Run rabbitmqctl with these arguments (and --quiet) on this node and return what it prints.

        Raises LocalServicesError, with the words of rabbitmqctl, when it fails, takes longer than `timeout` seconds, or
        the node does not run.
        """
        return self._tool("rabbitmqctl", *args, timeout=timeout)

    def _tool(self, program: str, *args: str, timeout: float) -> str:
        if not self.is_running():  # and rabbitmqctl would start an epmd of its own, for good
            raise LocalServicesError(f"{self.name} in {self.directory} does not run")
        return _run([str(_find_rabbitmq() / program), "--quiet", *args], self._environment(), timeout=timeout)

    def _make_data(self) -> None:
        cookie = self.directory / ".erlang.cookie"
        cookie.touch(mode=0o600)
        cookie.write_text(self._cookie())
        cookie.chmod(0o400)  # Erlang rejects one that others may read
        configuration = self.directory / "rabbitmq.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(self._configuration())
        (self.directory / "enabled_plugins").write_text("[rabbitmq_management].\n" if self._management else "[].\n")
        (self.directory / "advanced.config").write_text("[].\n")

    def _cookie(self) -> str:
        return secrets.token_hex(16)

    def _configuration(self) -> str:
        return (
            f"listeners.tcp.1 = {HOST}:{self.port}\n"
            f"default_user = {USER}\n"
            f"default_pass = {self._get('password')}\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
            + f"management.tcp.ip = {HOST}\nmanagement.tcp.port = {self._get('management_port')}\n"
            * self._management
        )

    def _launch(self) -> None:
        if not self._start_epmd():
            return
        with _signals_held():
            node = _spawn([str(_find_rabbitmq() / "rabbitmq-server")], self.log, self._environment())
            self._save(server=[node.pid, node.birth])

    def _start_epmd(self) -> bool:
        # epmd outlives the node that brings it along; started by us, it can be stopped by its pid.
        epmd_port = self._epmd_port()
        command = [_find_program("epmd"), "-port", str(epmd_port), "-address", HOST]
        with _signals_held():
            epmd = _spawn(command, self.log, self._environment())
            self._save(epmd=[epmd.pid, epmd.birth])
        _wait_until(lambda: not epmd.is_alive() or _answers(epmd_port), STOP_SECONDS)
        return epmd.is_alive()  # else its port was taken, and the node would fall for the same

    def _epmd_port(self) -> int:
        return int(self._get("epmd_port"))

    def _is_ready(self) -> bool:
        with suppress(OSError, EOFError), socket.create_connection((HOST, self.port), timeout=5) as connection:
            return _amqp_login(connection, USER, self._get("password"))
        return False

    def _environment(self) -> dict[str, str]:
        folder = self.directory
        return _environment(
            HOME=str(folder),  # of the cookie
            RABBITMQ_NODENAME=self.node,
            RABBITMQ_DIST_PORT=str(self._get("distribution_port")),
            RABBITMQ_MNESIA_BASE=str(folder / "mnesia"),
            RABBITMQ_LOG_BASE=str(folder),
            RABBITMQ_LOGS="-",  # to stdout, and so into server.log with what Erlang itself has to say
            RABBITMQ_CONFIG_FILE=str(folder / "rabbitmq.conf"),
            RABBITMQ_CONFIG_FILES=str(folder / "conf.d"),  # does not exist; the system's own conf.d is not for us
            RABBITMQ_ADVANCED_CONFIG_FILE=str(folder / "advanced.config"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(folder / "enabled_plugins"),
            RABBITMQ_CONF_ENV_FILE="/dev/null",
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=f"{self.kernel_options} +sbwt none",
            RABBITMQ_CTL_ERL_ARGS=self.kernel_options,
            RUNNING_UNDER_SYSTEMD="true",  # the script then becomes the node instead of its parent: one pid for both
            ERL_EPMD_PORT=str(self._epmd_port()),
            ERL_EPMD_ADDRESS=HOST,
        )


def _amqp_login(connection: socket.socket, user: str, password: str) -> bool:
    """Return whether the broker accepts this user; raises OSError or EOFError when it hangs up."""

    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = connection.recv(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def read_method() -> tuple[int, int]:
        _kind, _channel, size = struct.unpack(">BHI", read(7))
        payload = read(size + 1)
        return struct.unpack(">HH", payload[:4])

    connection.sendall(b"AMQP\x00\x00\x09\x01")
    if read_method() != (10, 10):  # Connection.Start
        return False
    secret = f"\0{user}\0{password}".encode()
    start_ok = struct.pack(">HHI", 10, 11, 0) + b"\x05PLAIN" + struct.pack(">I", len(secret)) + secret + b"\x05en_US"
    connection.sendall(struct.pack(">BHI", 1, 0, len(start_ok)) + start_ok + b"\xce")
    return read_method() == (10, 30)  # Connection.Tune: the login is accepted


# --- both together ---------------------------------------------------------------------------------------------------


class LocalServices:
    """Both servers in one folder, as `postgres` and `rabbitmq`; a context manager that removes all data at its end."""

    def __init__(self, directory: Path, management: bool = False) -> None:
        """``management``: whether data made at the first start has RabbitMQ's management API."""
        self.directory = directory.absolute()
        self._addresses = self.directory / "services.env"
        self._has_management = management
        self.postgres = PostgresServer(self.directory / "postgres")
        self.rabbitmq = RabbitMQServer(self.directory / "rabbitmq", management)

    def __enter__(self) -> LocalServices:
        end_with_this_program(folder=self.directory)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def is_running(self) -> bool:
        """Whether both servers run."""
        return self.postgres.is_running() and self.rabbitmq.is_running()

    def exists(self) -> bool:
        """Whether there is anything of either server in the folder."""
        return self.postgres.exists() or self.rabbitmq.exists()

    def start(self) -> None:
        """Start those that do not run and return when both can be used.

        Raises LocalServicesError when one does not come up; then neither runs. Data of an earlier start is kept.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            had_data = self.exists()
            try:
                self.rabbitmq.launch()  # takes seconds to boot; PostgreSQL starts meanwhile
                self.postgres.start()
                self.rabbitmq.wait_until_ready()
                self._say_where()
            except BaseException:
                self.rabbitmq.kill()
                self.postgres.stop("immediate")
                if not had_data:
                    self._remove_data()
                raise

    def stop(self) -> None:
        """Stop both, return when they are gone, and remove their data; nothing happens when there is none."""
        if not self.directory.exists():
            return
        with self._locked():
            self.rabbitmq.stop()
            self.postgres.stop()
            self._remove_data()

    def urls(self) -> dict[str, str]:
        """The addresses by the name of their setting, passwords included."""
        urls = {"AMQP_URL": self.rabbitmq.url(), "DATABASE_URL": self.postgres.url()}
        return urls | ({"RABBITMQ_MANAGEMENT_URL": self.rabbitmq.management_url()} if self._has_management else {})

    def _say_where(self) -> None:
        """Write the file that the programs look for where no server is set (config.LOCAL_SERVICES)."""
        new = self._addresses.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"{name}={shlex.quote(url)}\n" for name, url in self.urls().items())
        new.replace(self._addresses)

    def _remove_data(self) -> None:
        self._addresses.unlink(missing_ok=True)
        self.rabbitmq.remove_data()
        self.postgres.remove_data()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one program at a time start or stop the servers of this folder, which must not be removed therefore."""
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


# --- the command line ------------------------------------------------------------------------------------------------


def up(services: LocalServices) -> int:
    """Start both servers, after their installation if need be."""
    if _urls_are_given():
        print("AMQP_URL and DATABASE_URL are set: nothing to start")
        return 0
    run_already = services.is_running()
    missing = [] if run_already else missing_packages()
    if missing:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            print(f"not installed: {' '.join(missing)}; {_how_to_install()}", file=sys.stderr)
            return 4
        try:
            install(missing)
        except LocalServicesError as exc:
            print(f"{exc}\nnot installed: {' '.join(missing)}; {_how_to_install()}", file=sys.stderr)
            return 4
    started = time.monotonic()
    services.start()
    print("both run already" if run_already else f"up in {time.monotonic() - started:.1f} s")
    return status(services)


def down(services: LocalServices) -> int:
    """Stop both servers and remove their data."""
    if not services.exists():
        print(f"nothing to stop in {services.directory}")
        return 0
    services.stop()
    print("down; the data is removed")
    return 0


def status(services: LocalServices) -> int:
    """Print what runs where."""
    for server in (services.postgres, services.rabbitmq):
        if server.is_running():
            print(f"{server.name:<10} runs on {HOST}:{server.port}, pid {server.pid}, log {server.log}")
        elif server.exists():
            print(f"{server.name:<10} has died, log {server.log}")
        else:
            print(f"{server.name:<10} does not run")
    if services.is_running():
        return 0
    return 3 if services.exists() else 1


def env(services: LocalServices) -> int:
    """Print the two URLs for `eval` in a shell."""
    if _urls_are_given():
        urls = {name: os.environ[name] for name in ("AMQP_URL", "DATABASE_URL")}
    elif services.is_running():
        urls = services.urls()
    else:
        print("the local services do not run: start them with `up`", file=sys.stderr)
        return 1
    for name, url in urls.items():
        print(f"export {name}={shlex.quote(url)}")
    return 0


def _urls_are_given() -> bool:
    return bool(os.environ.get("AMQP_URL") and os.environ.get("DATABASE_URL"))


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"up": up, "down": down, "status": status, "env": env}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="where data, logs and state are kept")
    options = parser.parse_args(arguments)
    exit_on_signals()
    try:
        return commands[options.command](LocalServices(options.directory, management=True))
    except (LocalServicesError, OSError) as exc:
        print(f"local_services: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
