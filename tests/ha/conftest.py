"""The servers of several machines, on this one: a RabbitMQ cluster and a pair of PostgreSQL servers for the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from scripts import local_cluster
from scripts.local_cluster import PostgresPair, RabbitMQCluster
from tests.ha.lab import HaLab
from tests.harness import ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sockets of connections that died half-way are left to the garbage collector by pika, in whatever test that is."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def _servers_are_installed() -> None:
    missing = local_cluster.missing_packages()
    if missing:
        reason = f"not installed: {' '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def processes_below() -> Callable[[Path], list[int]]:
    """The pids of all processes whose command line or environment names this folder."""

    def find(directory: Path) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(directory).encode() in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    return find


@pytest.fixture(scope="session")
def started_cluster(
    _servers_are_installed: None,
    tmp_path_factory: pytest.TempPathFactory,
    processes_below: Callable[[Path], list[int]],
) -> Iterator[RabbitMQCluster]:
    """Three RabbitMQ nodes; no process of theirs is left at the end."""
    directory = tmp_path_factory.mktemp("cluster")
    with RabbitMQCluster(directory / "rabbitmq") as cluster:
        assert len(processes_below(directory)) >= 4  # three nodes with their helpers, one epmd
        yield cluster
    assert processes_below(directory) == []
    assert list((directory / "rabbitmq").iterdir()) == []


@pytest.fixture
def cluster(started_cluster: RabbitMQCluster) -> RabbitMQCluster:
    """The cluster, whole again whatever an earlier test has done to it."""
    if not all(node.is_running() and not node.is_frozen() for node in started_cluster.nodes):
        started_cluster.heal()
    return started_cluster


@pytest.fixture(scope="session")
def started_pair(
    _servers_are_installed: None,
    tmp_path_factory: pytest.TempPathFactory,
    processes_below: Callable[[Path], list[int]],
) -> Iterator[PostgresPair]:
    """A PostgreSQL primary with its standby; no process of theirs is left at the end."""
    directory = tmp_path_factory.mktemp("pair")
    with PostgresPair(directory / "postgres") as pair:
        homes = [server.home for server in (pair.primary, pair.standby)]
        assert all(processes_below(home) for home in homes)
        yield pair
    assert [pid for home in homes for pid in processes_below(home)] == []
    assert not any(home.exists() for home in homes)


@pytest.fixture
def pair(started_pair: PostgresPair) -> PostgresPair:
    """The pair, in sync whatever an earlier test has done to it."""
    started_pair.heal()
    return started_pair


# the folder of the service to try: that of an earlier version shows which of these were red on it
SERVICE = Path(os.environ.get("SERVICE_ROOT", ROOT))


@pytest.fixture
def open_lab(cluster: RabbitMQCluster, pair: PostgresPair, tmp_path: Path) -> Iterator[Callable[..., HaLab]]:
    """Opens a lab with a queue of its own."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(HaLab(cluster, pair, tmp_path, SERVICE, **options))
