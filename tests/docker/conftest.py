"""One engine, one set of images and one stack for the session; a test that breaks the stack mends it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from scripts import check_deploy
from tests.docker.engine import PROGRAMS, Engine, EngineError, make_images
from tests.docker.stack import Stack

PROFILES = ("alerting", "exporters")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """dockerd with stand-ins for all images. Where that cannot be had the tests are skipped, and fail in CI."""
    for program in PROGRAMS:  # one after the other: docker.io brings what is another package elsewhere
        check_deploy.install_programs({program: PROGRAMS[program]})
    missing = [program for program in PROGRAMS if check_deploy._which(program) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else "" if os.geteuid() == 0 else "needs root"
    if reason and "CI" not in os.environ:
        pytest.skip(reason)
    assert not reason, reason
    # as at Ctrl-C, so that the fixtures are torn down: the engine, in a session of its own, would outlive a SIGTERM
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    engine = Engine()
    try:
        try:
            engine.start()
        except EngineError as exc:
            if "CI" in os.environ:
                raise
            pytest.skip(str(exc))
        make_images(engine)
        print(f"\nengine and images: {time.monotonic() - started:.0f} s")
        yield engine
    finally:
        engine.close()
    assert (engine.processes(), engine.mounts(), engine.directory.exists()) == ([], [], False), (
        "the engine left something"
    )


@pytest.fixture(scope="session")
def running(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three replicas, with all profiles. At the end nothing of it is left."""
    started = time.monotonic()
    stack = Stack(engine, tmp_path_factory.mktemp("stack"), "votes-stack")
    try:
        stack.up(3, *PROFILES)
        print(f"\nthe stack is up and healthy after {time.monotonic() - started:.0f} s")
        yield stack
    finally:
        stack.down()
    assert stack.containers() == []
    networks = engine.docker("network", "ls", "--format", "{{.Name}}").split()
    assert not [name for name in networks if name.startswith(stack.name)]
    volumes = set(stack.volumes())
    assert volumes == {
        f"{stack.name}_{of}-data" for of in ("postgres", "rabbitmq", "prometheus", "grafana", "alertmanager")
    }
    stack.remove()
    assert stack.volumes() == []


@pytest.fixture
def stack(running: Stack) -> Iterator[Stack]:
    """The stack, healthy and with three replicas before and after the test."""
    yield running
    if len([one for one in running.containers("aggregator") if one["State"]["Status"] == "running"]) != 3:
        running.up(3, *PROFILES)
    running.wait_healthy()


@pytest.fixture
def seed() -> int:
    """Of the votes of one test, printed with its failure."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return seed
