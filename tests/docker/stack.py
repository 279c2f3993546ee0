"""The stack of docker-compose.yml in a clone of its own: how the tests start it, look at it and break it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg2
from dotenv import dotenv_values

from scripts.local_services import _is_free
from test_publisher import Message, make_messages, totals_of
from tests.docker.engine import Engine
from tests.harness import ROOT, Results, wait_until

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".local", ".env", ".secrets", "__pycache__", ".*_cache", ".hypothesis", "node_modules"
)
PORTS = ("POSTGRES", "RABBITMQ", "RABBITMQ_MANAGEMENT", "PROMETHEUS", "GRAFANA", "ALERTMANAGER")
REPLICA_PORTS = 10
# Apart from those that private servers take, also in other sessions: a container that is started again needs its port
# anew, and the engine does not go on to the next one where another program has it.
STACK_PORTS = range(20_000, 25_900)
ALWAYS = {  # an alert that there always is, so that its way to a receiver need not be waited for
    "groups": [
        {"name": "test", "rules": [{"alert": "Always", "expr": "vector(1)", "labels": {"severity": "critical"}}]}
    ]
}


class Stack:
    """A project of Compose, started by the commands that the documents name, in a clone made under umask 077."""

    def __init__(self, engine: Engine, directory: Path, name: str, **settings: str) -> None:
        self.engine = engine
        self.name = name
        self.root = directory / name
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT)
        (self.root / "deploy/prometheus/always.rules.yml").write_text(json.dumps(ALWAYS))
        for path in (self.root, *self.root.rglob("*")):
            path.chmod(path.stat().st_mode & 0o700)
        (self.root / ".venv").symlink_to(ROOT / ".venv")
        for file in self.root.glob("requirements*.txt"):
            os.utime(file, (0, 0))  # the packages are those of this checkout
        self.make("settings")
        ports = _free_range(len(PORTS) + REPLICA_PORTS)
        self.replica_ports = ports[len(PORTS) :]
        settings |= {f"{name}_PORT": str(port) for name, port in zip(PORTS, ports, strict=False)}
        self.set(METRICS_PORTS=f"{self.replica_ports[0]}-{self.replica_ports[-1]}", **settings)

    # --- its settings ---

    def set(self, **settings: str) -> None:
        """Change .env, as its owner does with an editor."""
        text = (self.root / ".env").read_text()
        for name, value in settings.items():
            text, changed = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert changed == 1, f".env.example does not name {name}"
        (self.root / ".env").write_text(text)

    def setting(self, name: str) -> str:
        return dotenv_values(self.root / ".env")[name] or ""

    def secret(self, name: str) -> Path:
        return self.root / ".secrets" / f"{name}_password"

    def password(self, name: str) -> str:
        return self.secret(name).read_text().strip()

    # --- commands ---

    def run(self, *command: str, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in the clone, as whoever made it runs it, with what is typed into it. It fails by its exit code."""
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.engine.environment | environment,
            input=typed,
            capture_output=True,
            text=True,
            timeout=300,
            umask=0o077,
        )

    def follow(self, command: str) -> str:
        """What a command line of the documents prints."""
        return _checked(self.run("sh", "-c", command))

    @contextlib.contextmanager
    def screen(self, file: Path, *command: str) -> Iterator[Callable[[], str]]:
        """A command that goes on until Ctrl-C, which is the end of the block. Answers what it has shown so far."""
        terminal = {"TERM": "vt100", "LINES": "100", "COLUMNS": "200"}
        with file.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.engine.environment | terminal,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                yield lambda: file.read_text(errors="replace")
            finally:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:  # docker-compose 1.29 may wait for a container that is gone
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def make(self, *arguments: str, **environment: str) -> str:
        return _checked(self.run("make", *arguments, **environment))

    def compose(self, *arguments: str, typed: str = "") -> str:
        return _checked(self.run("docker-compose", *arguments, typed=typed))

    def rabbitmqctl(self, *arguments: str) -> str:
        return self.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", *arguments)

    def up(self, replicas: int = 1, *profiles: str) -> None:
        """Start it as the quick start says, and wait until all are healthy."""
        chosen = ",".join(profiles)
        self.make("docker-compose-up", REPLICAS=str(replicas), COMPOSE_PROFILES=chosen)
        self.wait_healthy()

    def down(self) -> None:
        self.make("docker-compose-down")

    def remove(self) -> None:
        """Stop it, with its volumes and its image."""
        self.down()
        self.compose("--profile", "alerting", "down", "--volumes")  # Compose 2 leaves a profile's volume otherwise

    # --- what there is ---

    def containers(self, service: str = "") -> list[dict[str, Any]]:
        """What the engine knows of each container of the project, of one service where it is given."""
        label = f"label=com.docker.compose.project={self.name}"
        found = self.engine.docker("ps", "--all", "--quiet", "--filter", label).split()
        shown = json.loads(self.engine.docker("inspect", *found)) if found else []
        labels = "com.docker.compose.service"
        chosen = [one for one in shown if service in ("", one["Config"]["Labels"][labels])]
        return sorted(chosen, key=lambda one: str(one["Name"]))

    def volumes(self) -> list[str]:
        return self.engine.docker("volume", "ls", "--quiet").split()

    def wait_healthy(self) -> None:
        """Until every container runs and is healthy, where it says."""

        def ill() -> list[str]:
            return [
                f"{one['Name']}: {one['State']['Status']}, {one['State'].get('Health', {}).get('Status')}"
                for one in self.containers()
                if one["State"]["Status"] != "exited"
                and (
                    one["State"]["Status"] != "running"
                    or one["State"].get("Health", {"Status": "healthy"})["Status"] != "healthy"
                )
            ]

        wait_until(lambda: not ill(), f"all of {self.name} is healthy", 180)

    def port(self, replica: dict[str, Any]) -> int:
        return int(replica["NetworkSettings"]["Ports"]["8001/tcp"][0]["HostPort"])

    @property
    def results(self) -> Results:
        """The database, as its owner sees it from the host."""
        password = quote(self.password("postgres_owner"), safe="")
        return Results(f"postgresql://votes_owner:{password}@127.0.0.1:{self.setting('POSTGRES_PORT')}/votes")

    def prometheus(self, path: str, **parameters: str) -> Any:
        """What Prometheus answers, or nothing where it does not."""
        url = f"http://127.0.0.1:{self.setting('PROMETHEUS_PORT')}/api/v1/{path}?{urlencode(parameters)}"
        try:
            return json.loads(get(url))["data"]
        except (OSError, ValueError):
            return {}

    def value(self, expression: str) -> float | None:
        found = self.prometheus("query", query=expression).get("result", [])
        return float(found[0]["value"][1]) if found else None

    # --- votes ---

    def publish(self, votes: int, seed: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """By the publisher of the quick start, from the host."""
        return self.run(
            ".venv/bin/python", "test_publisher.py", "-n", str(votes), "--seed", str(seed), "--quiet", *arguments
        )

    def publishing(self, votes: int, seed: int, rate: int) -> subprocess.Popen[bytes]:
        """The same, in the background, at so many a second."""
        command = [".venv/bin/python", "test_publisher.py", "-n", str(votes), "--seed", str(seed), "--rate", str(rate)]
        return subprocess.Popen(
            [*command, "--quiet"],
            cwd=self.root,
            env=self.engine.environment,
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr,
        )

    def unsettled(self) -> int:
        """Messages on the queue, those on their way included; 1 where the broker does not say."""
        vhost = self.setting("RABBITMQ_VHOST")
        listing = ["rabbitmqctl", "--quiet", "list_queues", "--vhost", vhost, "name", "messages", "--formatter", "json"]
        done = self.run("docker-compose", "exec", "-T", "rabbitmq", *listing)
        if done.returncode != 0:
            return 1
        return sum(row["messages"] for row in json.loads(done.stdout) if row["name"] == "votes.aggregation")

    def wait_counted(self, *published: Published, before: Totals, timeout: float = 120) -> None:
        """Until the totals have grown by exactly these, and the queue is empty; then totals and audit log agree."""
        expected = before + sum((Totals(one) for one in published), Totals())
        wait_until(lambda: self.totals() == expected, f"the totals are {dict(expected)}", timeout)
        wait_until(lambda: self.unsettled() == 0, "the queue is empty", timeout)
        assert self.totals() == expected, "counted twice"
        results = self.results
        assert results.totals() == results.audited()

    def totals(self) -> Totals:
        try:
            rows = self.results.query("SELECT law_id, oui_count, non_count FROM vote_results")
        except psycopg2.Error as exc:  # it may be away at this very moment
            return Totals({str(exc): 1})
        return Totals(
            {(law, choice): n for law, *counts in rows for choice, n in zip(("oui", "non"), counts, strict=True) if n}
        )


Totals = collections.Counter
Published = dict[Any, int]


def made(votes: int, seed: int, duplicates: float = 0, invalid: float = 0) -> tuple[Published, list[Message]]:
    """What the publisher makes of these, as totals, and all of it."""
    messages = list(make_messages(votes, 3, seed, duplicates, invalid))
    both = {
        (law, choice): n
        for law, two in totals_of(messages).items()
        for choice, n in zip(("oui", "non"), two, strict=True)
    }
    return both, messages


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def _checked(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args} exits with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def _free_range(count: int) -> range:
    """So many ports in a row that are free."""
    while True:
        first = random.SystemRandom().choice(STACK_PORTS)
        if all(_is_free(port) for port in range(first, first + count)):
            return range(first, first + count)
