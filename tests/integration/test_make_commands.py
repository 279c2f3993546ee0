"""The commands of the Makefile against the names and the ports of docker-compose.yml."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import Settings
from tests.harness import ROOT, Service

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def command(module: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script as make runs it, in a folder without .env, with no programs but those of that folder."""
    search = {"PATH": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module], cwd=folder, env=search | environment, capture_output=True, text=True
    )


def default_of(text: str) -> str:
    """The default of a variable of Compose."""
    return re.sub(r".*\$\{\w+:-([^}]*)\}.*", r"\1", text)


def test_what_compose_gives_the_service_are_the_defaults_of_the_commands() -> None:
    """Queue, database and users: so that with one .env the commands reach what the stack has."""
    passwords = {"RABBITMQ_PASSWORD": "x", "POSTGRES_PASSWORD": "x"}
    environment = COMPOSE["aggregator"]["environment"]
    own = {
        name: default_of(text) for name, text in environment.items() if not re.search("_HOST$|_PASSWORD_FILE$", name)
    }
    for server in ("postgres", "rabbitmq"):
        own[f"{server.upper()}_PORT"] = default_of(COMPOSE[server]["ports"][0].rpartition(":")[0])
    assert Settings.from_env(passwords | own) == Settings.from_env(passwords)
    assert COMPOSE["database-setup"]["environment"]["PGDATABASE"] == COMPOSE["postgres"]["environment"]["POSTGRES_DB"]


@pytest.mark.parametrize("program", ["docker", "docker-compose"])
def test_metrics_are_those_of_the_stack_where_no_service_runs_here(
    program: str, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    """At the port that Compose names; what stands in for Compose here answers as it does."""
    service = start_service(wait=False)
    compose = tmp_path / program
    words = "compose port aggregator 8001" if program == "docker" else "port aggregator 8001"
    compose.write_text(f'#!/bin/sh\n[ "$*" = "{words}" ] && echo 127.0.0.1:{service.port}\n')
    compose.chmod(0o755)
    shown = command("scripts.show_metrics", tmp_path, METRICS_PORT="1")
    assert (shown.returncode, "\nbroker_connected " in shown.stdout) == (0, True), shown.stderr


def test_metrics_are_those_of_the_service_here(start_service: Callable[..., Service], tmp_path: Path) -> None:
    """And where there is none, the command says so."""
    service = start_service(wait=False)
    shown = command("scripts.show_metrics", tmp_path, METRICS_PORT=str(service.port))
    assert (shown.returncode, "\nbroker_connected " in shown.stdout) == (0, True), shown.stderr
    refused = command("scripts.show_metrics", tmp_path, METRICS_PORT="1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "no service answers on METRICS_PORT (1); start one with: make run\n"
