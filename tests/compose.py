"""The servers of this folder's Compose stack in the place of private ones, for TEST_SERVERS=compose."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import quote

import pytest
from dotenv import dotenv_values

from tests.harness import ROOT


class ComposeServers:
    """What `docker compose up -d postgres rabbitmq` has started. They are used, and never stopped."""

    def __init__(self) -> None:
        self.postgres = _Postgres()
        self.rabbitmq = _RabbitMQ()

    def __enter__(self) -> ComposeServers:
        self.rabbitmq.ctl("add_user", self.rabbitmq.user, self.rabbitmq.password)
        self.rabbitmq.ctl("set_user_tags", self.rabbitmq.user, "administrator")
        self.rabbitmq.ctl("set_permissions", "-p", "/", self.rabbitmq.user, ".*", ".*", ".*")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.rabbitmq.ctl("delete_user", self.rabbitmq.user)


class _Server:
    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"needs servers of its own: {name}")


class _Postgres(_Server):
    def url(self, database: str = "votes") -> str:
        password = quote((ROOT / _setting("POSTGRES_OWNER_PASSWORD_FILE")).read_text().strip(), safe="")
        return f"postgresql://votes_owner:{password}@127.0.0.1:{_setting('POSTGRES_PORT')}/{quote(database, safe='')}"


class _RabbitMQ(_Server):
    def __init__(self) -> None:
        self.user = f"votes-tests-{secrets.token_hex(4)}"  # with all rights, for the session
        self.password = secrets.token_hex(16)

    @property
    def port(self) -> int:
        return int(_setting("RABBITMQ_PORT"))

    def url(self, vhost: str = "/") -> str:
        return f"amqp://{self.user}:{self.password}@127.0.0.1:{self.port}/{quote(vhost, safe='')}"

    def management_url(self) -> str:
        return f"http://127.0.0.1:{_setting('RABBITMQ_MANAGEMENT_PORT')}"

    def ctl(self, *arguments: str) -> str:
        command = [*_compose(), "exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout + done.stderr}"
        return done.stdout


def _setting(name: str) -> str:
    """As Compose reads it: the environment before .env."""
    values: dict[str, Any] = {**dotenv_values(ROOT / ".env"), **os.environ}
    assert values.get(name), f"{name} is not set: `make install` writes .env"
    return str(values[name])


def _compose() -> list[str]:
    """As the Makefile chooses."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        return [docker, "compose"]
    return ["docker-compose"]
