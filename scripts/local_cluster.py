"""Servers as they run on more than one machine, each with its own ports on this one: for tests, without Docker.

    RabbitMQCluster   three nodes of one RabbitMQ cluster
    PostgresPair      a PostgreSQL primary and its synchronous standby
    PgBouncerServer   PgBouncer in front of a PostgreSQL
    HAProxyServer     HAProxy in front of the nodes of a cluster, or of any servers

All are context managers, and leave neither processes nor data. What scripts/local_services.py says of its two servers
holds for each of these: 127.0.0.1 only, free ports, random passwords, no more than the standard library.
"""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

from scripts import local_services
from scripts.local_services import (
    HOST,
    PORT_TRIES,
    START_SECONDS,
    USER,
    LocalServicesError,
    PortTaken,
    PostgresServer,
    RabbitMQServer,
    _answers,
    _environment,
    _find_postgres,
    _find_program,
    _find_rabbitmq,
    _psql,
    _run,
    _Server,
    _signals_held,
    _spawn,
    _unprivileged_user,
    _wait_until,
    end_with_this_program,
)

STANDBY = "standby"  # the name by which the primary knows its standby
SETTLE_SECONDS = 60.0  # nodes find each other, or a standby catches up, within a second or two

HEAL_SECONDS = 20.0
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# A node that does not answer for so long is taken for dead by the others, a quarter of it more or less. RabbitMQ's own
# 60 s would make each test with a frozen node a matter of minutes; below this, a busy machine looks like a dead one.
NET_TICK_SECONDS = 8


def missing_packages() -> list[str]:
    """Return the Debian names of the packages whose programs are not on this machine: empty when all four servers are.

    `local_services.install` takes what this returns.
    """
    missing = local_services.missing_packages()
    for package in ("pgbouncer", "haproxy"):
        try:
            _find_program(package)
        except LocalServicesError:
            missing.append(package)
    return missing


# --- RabbitMQ --------------------------------------------------------------------------------------------------------


class Epmd(_Server):
    """The name server of Erlang that all nodes of a cluster register with."""

    name = "epmd"

    def _launch(self) -> None:
        command = [_find_program("epmd"), "-port", str(self.port), "-address", HOST]
        with _signals_held():
            process = _spawn(command, self.log, _environment(HOME=str(self.directory)))
            self._save(server=[process.pid, process.birth])

    def _is_ready(self) -> bool:
        # Where the port is a stranger's, epmd ends at once, before that stranger is asked a second time.
        return _answers(self.port) and self.is_running() and _answers(self.port)


class RabbitMQNode(RabbitMQServer):
    """One node of a RabbitMQCluster. It can be stopped, killed, frozen and started again, by itself."""

    port_names = ("port", "distribution_port", "management_port")
    port_tries = 1  # with new ports, a node that has half joined would be another node of the same name
    kernel_options = (
        f"{RabbitMQServer.kernel_options} -kernel net_ticktime {NET_TICK_SECONDS}"
        # As RabbitMQ 4 has it by itself: else two nodes that are well hang up on each other for the sake of a third.
        " -kernel prevent_overlapping_partitions false"
    )

    def __init__(self, directory: Path, number: int, cluster: RabbitMQCluster) -> None:
        """``number`` counts from 1."""
        super().__init__(directory, cluster.management, cluster.password)
        self.node = f"votes-{number}@localhost"
        self._cluster = cluster

    def is_frozen(self) -> bool:
        """Whether it has been frozen and not thawed since."""
        return bool(self._state().get("frozen")) and self.is_running()

    def freeze(self) -> None:
        """Stop it where it stands. The other nodes take it for dead after 6 to 10 s."""
        super().freeze()
        self._save(frozen=True)

    def thaw(self) -> None:
        """Let it go on. Where the others took it for dead it may stay apart: see RabbitMQCluster.heal."""
        super().thaw()
        self._save(frozen=False)

    def queues(self, *args: str, timeout: float = 60) -> str:
        """Run rabbitmq-queues with these arguments on this node, as `ctl` does it with rabbitmqctl."""
        return self._tool("rabbitmq-queues", *args, timeout=timeout)

    def running_nodes(self) -> set[str]:
        """Return the names of the nodes that run, as this one sees it; none when it cannot say."""
        try:
            status = json.loads(self.ctl("cluster_status", "--formatter", "json", timeout=20))
        except LocalServicesError:
            return set()
        return set(status["running_nodes"])

    def _launch(self) -> None:
        self._save(frozen=False)
        super()._launch()

    def _cookie(self) -> str:
        return self._cluster.cookie

    def _configuration(self) -> str:
        members = "".join(
            f"cluster_formation.classic_config.nodes.{number} = {node.node}\n"
            for number, node in enumerate(self._cluster.nodes, start=1)
        )
        return (
            super()._configuration()
            + "cluster_formation.peer_discovery_backend = classic_config\n"
            + members
            + f"cluster_formation.discovery_retry_limit = {_discovery_tries()}\n"
            + f"cluster_partition_handling = {self._cluster.partition_handling}\n"
        )

    def _start_epmd(self) -> bool:
        self._cluster.epmd.start()
        return True

    def _epmd_port(self) -> int:
        return self._cluster.epmd.port


def _discovery_tries() -> int:
    """Return how often, every half second, a new node is to look for the others of its cluster."""
    # RabbitMQ 3: the first to come looks for one that runs, and there is none; each try after the first is time lost.
    # RabbitMQ 4: they agree on who is the first, and the others try until that one is there.
    is_version_3 = any(_find_rabbitmq().parent.glob("lib/rabbitmq_server-3.*"))
    return 1 if is_version_3 else 40


class RabbitMQCluster:
    """RabbitMQ nodes in one cluster: `nodes`, each to be stopped, killed or frozen by itself.

    The user `votes` and its password are the same on all nodes. A context manager that removes all data at its end.
    """

    def __init__(
        self, directory: Path, nodes: int = 3, management: bool = False, partition_handling: str = "autoheal"
    ) -> None:
        """``management``: with the management API on each node.

        ``partition_handling``: with "autoheal" nodes that were taken for dead start anew when they meet the others
        again. With "pause_minority" a node that was frozen does not see that it was away, and mostly stays apart.
        """
        self.directory = directory.absolute()
        self.management = management
        self.partition_handling = partition_handling
        self.password = secrets.token_hex(16)
        self.cookie = secrets.token_hex(16)
        self.epmd = Epmd(self.directory / "epmd")
        self.nodes = [RabbitMQNode(self.directory / f"node-{n}", n, self) for n in range(1, nodes + 1)]

    def __enter__(self) -> Self:
        end_with_this_program(folder=self.directory)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all nodes that do not run, side by side, and return when they are one cluster that clients can use.

        Raises LocalServicesError when it does not come up; then nothing of it runs.
        """
        had_data = self.epmd.exists()
        for tries in range(PORT_TRIES):
            try:
                self._start()
                return
            except BaseException as exc:
                self.kill()
                if not had_data:
                    self._remove_data()
                # nodes that start side by side may each make the default user, and the later one ends over that
                was_chance = isinstance(exc, PortTaken) or "user_already_exists" in str(exc)
                if had_data or not was_chance or tries == PORT_TRIES - 1:
                    raise

    def _start(self) -> None:
        self.epmd.start()
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()
        self.wait_until_complete()

    def wait_until_complete(self) -> None:
        """Return when every node runs and sees all others. Raises LocalServicesError after a minute."""
        if not self._is_complete(SETTLE_SECONDS):
            tails = "\n".join(node.log_tail() for node in self.nodes)
            raise LocalServicesError(f"the nodes in {self.directory} do not see each other.\n{tails}")

    def _is_complete(self, seconds: float) -> bool:
        names = {node.node for node in self.nodes}

        deadline = time.monotonic() + seconds
        # one after the other: each answer costs two seconds of CPU, and the nodes mostly agree
        for node in self.nodes:
            while node.running_nodes() != names:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.5)
        return True

    def heal(self) -> None:
        """Thaw every node that is frozen, start every one that does not run, and return when they are one again.

        A node that was taken for dead while it was frozen comes back by itself on most days. Where it does not, it is
        killed and started, as the person in charge would do.
        """
        for node in self.nodes:
            if node.is_frozen():
                node.thaw()
        self.epmd.start()
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()
        if self._is_complete(HEAL_SECONDS):
            return
        views = [node.running_nodes() for node in self.nodes]
        largest = max(views, key=len)
        for node, view in zip(self.nodes, views, strict=True):
            if view != largest:
                node.kill()
                node.start()
        if not self._is_complete(HEAL_SECONDS):
            self.kill()
            self.start()

    def stop(self) -> None:
        """Stop all nodes and epmd, and remove their data; nothing happens when there is none."""
        self.kill()  # the data goes too: three clean ends would only take their time
        self._remove_data()

    def kill(self) -> None:
        """Kill all nodes and epmd, as a power failure would. Data stays."""
        for server in (*self.nodes, self.epmd):
            server.kill()

    def urls(self, vhost: str = "/") -> list[str]:
        """Return the AMQP URLs of a virtual host, one for each node."""
        return [node.url(vhost) for node in self.nodes]

    def url(self, vhost: str = "/") -> str:
        """Return the AMQP URLs of all nodes, joined by commas."""
        return ",".join(self.urls(vhost))

    def ctl(self, *args: str, timeout: float = 60) -> str:
        """Run rabbitmqctl on a node that runs and is not frozen. Raises LocalServicesError as its own `ctl` does."""
        return self._some_node().ctl(*args, timeout=timeout)

    def leader(self, queue: str, vhost: str = "/") -> RabbitMQNode:
        """Return the node with the leader of a quorum queue, as soon as there is one.

        Raises LocalServicesError where there is none for a minute: most of its nodes are gone, or it is another kind of
        queue.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                states = self.raft_states(queue, vhost)
                leaders = [node for node in self.nodes if states.get(node.node) == "leader"]
                if len(leaders) == 1:
                    return leaders[0]
                told = str(states)
            except LocalServicesError as exc:
                told = str(exc)
            if time.monotonic() > deadline:
                raise LocalServicesError(f"queue {queue} has no leader: {told}")

    def followers(self, queue: str, vhost: str = "/") -> list[RabbitMQNode]:
        """Return the nodes with the other members of a quorum queue, whether they run or not."""
        leader = self.leader(queue, vhost)
        members = self.raft_states(queue, vhost)
        return [node for node in self.nodes if node.node in members and node is not leader]

    def raft_states(self, queue: str, vhost: str = "/") -> dict[str, str]:
        """Return what each member of a quorum queue is, by node: "leader", "follower", or a word for a dead one."""
        status = self._some_node().queues("quorum_status", queue, "--vhost", vhost, "--formatter", "json", timeout=30)
        return {row["Node Name"]: row["Raft State"] for row in json.loads(status)}

    def _some_node(self) -> RabbitMQNode:
        for node in self.nodes:
            if node.is_running() and not node.is_frozen():
                return node
        raise LocalServicesError(f"no node of the cluster in {self.directory} runs")

    def _remove_data(self) -> None:
        for server in (*self.nodes, self.epmd):
            server.remove_data()


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


class PairedPostgres(PostgresServer):
    """One of the two servers of a PostgresPair."""

    def __init__(self, directory: Path, password: str, source: PostgresServer | None) -> None:
        """``source``: whose copy it is, and whose standby; without it, it starts with an empty database."""
        super().__init__(directory, password)
        self._source = source

    @property
    def home(self) -> Path:
        """The folder that holds its data: as root, below /var/tmp. Raises LocalServicesError before the first start."""
        return Path(self._get("home"))

    def query(self, statement: str, database: str = "postgres") -> str:
        """Return what a statement answers: a line for each row, `|` between its values."""
        return _psql(self.port, self._get("password"), database, statement)

    def launch(self) -> None:
        """Start its process and return at once. Raises LocalServicesError when another has become the primary since."""
        if self.is_retired():
            raise LocalServicesError(f"the PostgreSQL in {self.directory} is no primary any more: rebuild() it")
        super().launch()

    def is_retired(self) -> bool:
        """Whether another has become the primary since it was one, and it has not been made a copy of that."""
        return bool(self._state().get("retired"))

    def retire(self) -> None:
        """Kill it if it runs, and let nobody start it before it has been made a copy."""
        with _signals_held():
            self._save(retired=True)
        self.kill()

    def copy(self, source: PostgresServer) -> None:
        """Replace its data by those of a server that runs, and be the standby of that server at the next start."""
        self.retire()  # a half of a copy is nothing to start with
        self._source = source
        if self._data().exists():
            shutil.rmtree(self._data())
        self._copy()
        self._save(retired=False)

    def _make_data(self) -> None:
        if self._source is None:
            super()._make_data()
            with (self._data() / "postgresql.conf").open("a") as configuration:
                configuration.write(
                    "wal_keep_size = '1GB'\n"  # a standby that was stopped for minutes is still served
                    "wal_retrieve_retry_interval = '100ms'\n"  # not 5 s until the standby tries to connect again
                )
        else:
            self._make_home(_unprivileged_user(self.name))
            self._copy()

    def _finish_data(self) -> None:
        if self._source is None:
            super()._finish_data()

    def _copy(self) -> None:
        assert self._source is not None
        environment = _environment(
            PGHOST=HOST, PGPORT=str(self._source.port), PGUSER=USER, PGPASSWORD=self._get("password")
        )
        command = [
            _find_program("pg_basebackup", _find_postgres()),
            f"--pgdata={self._data()}",
            "--checkpoint=fast",
            "--wal-method=stream",
            "--no-sync",  # of the copy, which is made anew after a power failure; the server itself keeps its fsync
        ]
        with _signals_held():
            _run(command, environment, timeout=START_SECONDS, user=_unprivileged_user(self.name))
        source = f"host={HOST} port={self._source.port} user={USER} password={self._get('password')}"
        with (self._data() / "postgresql.auto.conf").open("a") as configuration:
            configuration.write(
                f"primary_conninfo = '{source} application_name={STANDBY}'\n"
                "synchronous_standby_names = ''\n"  # the one of the source is copied; promoted, this one has no standby
            )
        marker = self._data() / "standby.signal"
        marker.touch(mode=0o600)
        user = _unprivileged_user(self.name)
        if user is not None:
            os.chown(marker, user.pw_uid, user.pw_gid)  # PostgreSQL removes it when it is promoted


class PostgresPair:
    """A PostgreSQL `primary` and its `standby`, which must have a transaction on its disk before it is committed.

    Both keep their ports over every change of roles, so one URL with both hosts stays true. A context manager that
    removes all data at its end.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        password = secrets.token_hex(16)
        self.primary = PairedPostgres(self.directory / "a", password, source=None)
        self.standby = PairedPostgres(self.directory / "b", password, source=self.primary)
        self._servers = (self.primary, self.standby)  # in the order of the URL, whatever their roles

    def __enter__(self) -> Self:
        end_with_this_program(folder=self.directory)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start both and return when the standby is in sync.

        Raises LocalServicesError when one does not come up; then neither runs.
        """
        try:
            self.primary.start()
            self.start_standby()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop both and remove their data; nothing happens when there is none."""
        self.kill()  # the data goes too, and a clean end would wait for a standby that may be frozen
        for server in self._servers:
            server.remove_data()

    def kill(self) -> None:
        """Kill both, as a power failure would. Data stays."""
        for server in self._servers:
            server.kill()

    def url(self, database: str = "votes", target: str = "read-write") -> str:
        """Return one URL with both hosts. ``target`` is libpq's target_session_attrs."""
        hosts = ",".join(f"{HOST}:{server.port}" for server in self._servers)
        password = self.primary._get("password")
        return f"postgresql://{USER}:{password}@{hosts}/{quote(database, safe='')}?target_session_attrs={target}"

    def is_in_sync(self) -> bool:
        """Whether the primary waits for the standby at each commit, and the standby has caught up."""
        try:
            state = self.primary.query("SELECT state, sync_state FROM pg_stat_replication")
        except LocalServicesError:
            return False
        return state == "streaming|sync"

    def freeze_standby(self) -> None:
        """Stop the standby where it stands: commits on the primary wait from now on."""
        self.standby.freeze()

    def thaw_standby(self) -> None:
        """Let the standby go on, and so all commits that wait for it."""
        self.standby.thaw()

    def stop_standby(self) -> None:
        """Stop the standby cleanly: commits on the primary wait from now on."""
        self.standby.stop()

    def start_standby(self) -> None:
        """Start the standby, made from the primary where it never was, and return when it is in sync."""
        self.standby.start()
        # Set only now: with a standby that has never come, the first transaction would wait for good.
        if not _wait_until(lambda: self._replication_state() == "streaming", SETTLE_SECONDS):
            raise LocalServicesError(f"the standby does not catch up.\n{self.standby.log_tail()}")
        self._set_synchronous(STANDBY)
        if not _wait_until(self.is_in_sync, SETTLE_SECONDS):
            raise LocalServicesError(f"the standby is not in sync.\n{self.primary.log_tail()}")

    def promote(self, alone: bool = True) -> None:
        """Make the standby the primary, and return when it can be written to.

        The old primary is killed first if it still runs, and cannot be started before `rebuild`: two primaries would
        both be written to. ``alone``: the new one commits without a standby; else each commit waits for `rebuild`.
        """
        self.primary.retire()
        self.primary, self.standby = self.standby, self.primary
        self.primary.query(f"SELECT pg_promote(true, {int(SETTLE_SECONDS)})")
        self._set_synchronous("" if alone else STANDBY)
        if not _wait_until(self._is_writable, SETTLE_SECONDS):
            raise LocalServicesError(f"the standby is not promoted.\n{self.primary.log_tail()}")

    def rebuild(self) -> None:
        """Make the server that is not the primary a new copy and its standby, and return when that is in sync."""
        self.standby.copy(self.primary)
        self.start_standby()

    def heal(self) -> None:
        """Thaw or start what is frozen or down, rebuild an old primary, and return when the standby is in sync."""
        for server in self._servers:
            if server.is_running():
                server.thaw()
        self.primary.start()
        if self.standby.is_retired():
            self.rebuild()
        elif not self.is_in_sync():
            self.start_standby()

    def _replication_state(self) -> str:
        with suppress(LocalServicesError):
            return self.primary.query("SELECT state FROM pg_stat_replication")
        return ""

    def _is_writable(self) -> bool:
        with suppress(LocalServicesError):
            return self.primary.query("SELECT pg_is_in_recovery()") == "f"
        return False

    def _set_synchronous(self, names: str) -> None:
        self.primary.query(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        self.primary.query("SELECT pg_reload_conf()")
        is_set: Callable[[], bool] = lambda: self.primary.query("SHOW synchronous_standby_names") == names  # noqa: E731
        if not _wait_until(is_set, SETTLE_SECONDS):
            raise LocalServicesError(f"synchronous_standby_names is not taken over.\n{self.primary.log_tail()}")


# --- in front of them ------------------------------------------------------------------------------------------------


class PgBouncerServer(_Server):
    """PgBouncer in front of a PostgreSQL of ours, for every database in it, with the same user and password."""

    name = "PgBouncer"

    def __init__(
        self, directory: Path, target: PostgresServer, pool_mode: str = "transaction", **settings: str | int
    ) -> None:
        """``settings``: more of the section [pgbouncer], such as default_pool_size=5."""
        super().__init__(directory)
        self._target = target
        self._settings = {"pool_mode": pool_mode, **settings}

    def url(self, database: str = "votes") -> str:
        """Return the URL of a database behind it. Raises LocalServicesError before the first start."""
        return f"postgresql://{USER}:{self._get('password')}@{HOST}:{self.port}/{quote(database, safe='')}"

    def launch(self) -> None:
        """Start its process and return at once; nothing happens when it runs already."""
        self._given_password = self._target._get("password")
        super().launch()

    def stop(self) -> None:
        """Stop it as soon as no transaction runs, and return when it is gone; it is killed after 30 s."""
        self._stop(signal.SIGINT)  # what SIGTERM does depends on its version: at once, or not before all clients leave

    def point_at(self, target: PostgresServer) -> None:
        """Send all later transactions to another server with the same password, as after a change of the primary."""
        self._target = target
        self._write_configuration()
        self.admin("RELOAD")
        self.admin("RECONNECT")  # else a connection to the old server is used again

    def admin(self, command: str) -> str:
        """Return what its administration console answers."""
        return _psql(self.port, self._get("password"), "pgbouncer", command)

    def _make_data(self) -> None:
        self._make_home(_unprivileged_user(self.name))

    def _launch(self) -> None:
        self._write_configuration()
        command = [_find_program("pgbouncer", packages="pgbouncer"), str(self._home() / "pgbouncer.ini")]
        with _signals_held():
            process = _spawn(command, self.log, _environment(), _unprivileged_user(self.name))
            self._save(server=[process.pid, process.birth])

    def _is_ready(self) -> bool:
        try:
            self.admin("SHOW VERSION")
        except LocalServicesError:
            return False
        return True

    def _home(self) -> Path:
        return Path(self._get("home"))

    def _write_configuration(self) -> None:
        settings: dict[str, Any] = {
            "listen_addr": HOST,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": self._home() / "userlist.txt",
            "admin_users": USER,
            "max_client_conn": 500,
            **self._settings,
        }
        self._write("userlist.txt", f'"{USER}" "{self._get("password")}"\n')
        self._write(
            "pgbouncer.ini",
            f"[databases]\n* = host={HOST} port={self._target.port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in settings.items()),
        )

    def _write(self, name: str, text: str) -> None:
        file = self._home() / name
        file.touch(mode=0o600)
        file.write_text(text)
        user = _unprivileged_user(self.name)
        if user is not None:
            os.chown(file, user.pw_uid, user.pw_gid)


class HAProxyServer(_Server):
    """HAProxy in TCP mode: one address for several servers of ours, of which it uses those that accept connections."""

    name = "HAProxy"
    port_names = ("port", "status_port")

    def __init__(
        self, directory: Path, backends: Sequence[RabbitMQServer | PostgresServer], balance: str = "roundrobin"
    ) -> None:
        """``balance``: its algorithm. With "first" all connections go to the first backend that is up."""
        super().__init__(directory)
        self.backends = list(backends)
        self._balance = balance

    def url(self, name: str | None = None) -> str:
        """Return the URL of a virtual host or database behind it: that of the first backend, with our port."""
        backend = self.backends[0]
        parts = urlsplit(backend.url() if name is None else backend.url(name))
        return parts._replace(netloc=parts.netloc.replace(f":{backend.port}", f":{self.port}")).geturl()

    def states(self) -> list[str]:
        """Return what it holds of each backend: "UP", "DOWN", or in between, such as "UP 1/2"."""
        return [row["status"] for row in self._rows()]

    def connections(self) -> list[int]:
        """Return how many connections each backend has through it."""
        return [int(row["scur"]) for row in self._rows()]

    def _rows(self) -> list[dict[str, str]]:
        rows = {
            row["svname"]: row for row in csv.DictReader(self._status().splitlines()) if row["# pxname"] == "servers"
        }
        return [rows[f"server-{number}"] for number in range(1, len(self.backends) + 1)]

    def _launch(self) -> None:
        servers = "".join(
            f"    server server-{number} {HOST}:{backend.port} check\n"
            for number, backend in enumerate(self.backends, start=1)
        )
        configuration = self.directory / "haproxy.cfg"
        configuration.touch(mode=0o600)
        configuration.write_text(
            "global\n"
            "    maxconn 1000\n"
            "    log stdout format raw daemon info\n"
            "defaults\n"
            "    mode tcp\n"
            "    log global\n"
            "    timeout connect 2s\n"
            "    timeout client 1h\n"  # as long as an idle consumer may sit there
            "    timeout server 1h\n"
            # A server that is down takes its connections along, which would else wait for an answer that never comes.
            "    default-server inter 200ms fall 2 rise 1 on-marked-down shutdown-sessions\n"
            "frontend clients\n"
            f"    bind {HOST}:{self.port}\n"
            "    default_backend servers\n"
            "backend servers\n"
            f"    balance {self._balance}\n"
            "    option redispatch 1\n"
            "    retries 3\n" + servers + "frontend status\n"
            "    mode http\n"
            f"    bind {HOST}:{self._get('status_port')}\n"
            "    stats enable\n"
            f"    stats uri /{self._get('password')}\n"
        )
        with _signals_held():
            command = [_find_program("haproxy", packages="haproxy"), "-db", "-f", str(configuration)]
            process = _spawn(command, self.log, _environment())
            self._save(server=[process.pid, process.birth])

    def _status(self) -> str:
        address = f"http://{HOST}:{self._get('status_port')}/{self._get('password')};csv"
        try:
            with NO_PROXY.open(address, timeout=5) as response:
                return str(response.read().decode())
        except OSError as exc:
            raise LocalServicesError(f"HAProxy does not tell its state: {exc}") from exc

    def _is_ready(self) -> bool:
        # It listens on all its ports or on none, and only ours knows the word in the path.
        with suppress(LocalServicesError):
            return bool(self._status())
        return False
