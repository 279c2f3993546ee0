"""Each check of the deployment files passes on the project, and finds what is broken in a copy of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import check_deploy, local_services
from scripts.check_deploy import ToolMissing
from tests.harness import ROOT

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".local", ".env", "__pycache__", ".*_cache", ".hypothesis")

# what is changed in which file, and words of the problem that this is
BROKEN: list[tuple[Callable[[Path], list[str]], str, str, str, str]] = [
    (check_deploy.check_dockerfile, "Dockerfile", "python:3.11-slim\n\nLABEL", "python:latest\n\nLABEL", "DL3007"),
    (check_deploy.check_dockerfile, "Dockerfile", "USER 10001", "USER root", "user of its own"),
    (check_deploy.check_dockerfile, "Dockerfile", '["python", "aggregator.py"]', "python aggregator.py", "exec form"),
    (check_deploy.check_compose, "docker-compose.yml", "cap_drop: [ALL]", "cap_dorp: [ALL]", "cap_dorp"),
    (check_deploy.check_compose, "docker-compose.yml", "networks: [database]\n", "networks: [nowhere]\n", "nowhere"),
    (
        check_deploy.check_compose,
        "docker-compose.yml",
        "      rabbitmq:\n        cond",
        "      rabbit:\n        cond",
        "rabbit",
    ),
    (check_deploy.check_compose, "docker-compose.yml", "127.0.0.1::8001", "127.0.0.1:8001:8001", "cannot be scaled"),
    (
        check_deploy.check_compose,
        "docker-compose.yml",
        "    build: .",
        "    build: .\n    container_name: aggregator",
        "container_name",
    ),
    (
        check_deploy.check_compose,
        "docker-compose.yml",
        "${GRAFANA_PASSWORD:?set it in .env}",
        "admin",
        "GRAFANA_PASSWORD",
    ),
    (check_deploy.check_compose, "docker-compose.yml", "rabbitmq:4.1-management", "rabbitmq:latest", "no version"),
    (check_deploy.check_compose, "docker-compose.yml", '"127.0.0.1:9090:9090"', '"9090:9090"', "open to the network"),
    (check_deploy.check_compose, "docker-compose.yml", "stop_grace_period: 30s", "stop_grace_period: 20s", "grace"),
    (
        check_deploy.check_compose,
        "docker-compose.yml",
        "networks: [database, broker, monitoring]",
        "networks: [database, broker]",
        "share 0 networks",
    ),
    (check_deploy.check_prometheus, "prometheus.yml", "dns_sd_configs", "dns_configs", "dns_configs"),
    (check_deploy.check_prometheus, "deploy/prometheus/recording.rules.yml", "expr: max(", "expr: max((", "promtool"),
    (check_deploy.check_prometheus, "deploy/prometheus/alerts.rules.yml", "broker_connected ==", "x ==", "BrokerLost"),
    (check_deploy.check_prometheus, "deploy/prometheus/alerts.rules.yml", "> 0\n          unless", "> 0 #", "Stalled"),
    (check_deploy.check_prometheus, "docs/RUNBOOK.md", "## BrokerLost", "## Something", "does not exist"),
    (check_deploy.check_prometheus, "deploy/prometheus/tests/alerts.test.yml", "", "", "no test"),
    (
        check_deploy.check_alertmanager,
        "deploy/alertmanager/alertmanager.yml",
        "receiver: operators",
        "receiver: nobody",
        "nobody",
    ),
    (
        check_deploy.check_dashboards,
        "deploy/grafana/dashboards/votes.json",
        "sum by (reason)",
        "sum by reason",
        "parse",
    ),
    (
        check_deploy.check_dashboards,
        "deploy/grafana/dashboards/votes.json",
        "votes_in_flight",
        "votes_on_air",
        "on_air",
    ),
    (check_deploy.check_dashboards, "deploy/grafana/dashboards/votes.json", '"uid": "prometheus"', '"uid": "x"', "not"),
    (
        check_deploy.check_dashboards,
        "deploy/grafana/dashboards/votes.json",
        "sum by (law_id) (votes:current_total:max)",
        "sum by (law_id) (current_vote_totals)",
        "sums totals",
    ),
    (check_deploy.check_kubernetes, "deploy/kubernetes/deployment.yaml", "replicas: 2", 'replicas: "two"', "two"),
    (check_deploy.check_kubernetes, "deploy/kubernetes/deployment.yaml", "livenessProbe", "liveProbe", "liveProbe"),
    (check_deploy.check_kubernetes, "deploy/kubernetes/scaledobject.yaml", "queueName", "queue", "queue"),
    (check_deploy.check_links, "README.md", "(docs/MESSAGE_FORMAT.md)", "(docs/FORMAT.md)", "docs/FORMAT.md"),
    (check_deploy.check_links, "docs/RUNBOOK.md", "(#brokerlost)", "(#brokergone)", "names no heading"),
]


def problems_of(check: Callable[[Path], list[str]], root: Path) -> list[str]:
    """What the check finds; the test is skipped where a program is missing, but not in CI."""
    try:
        return check(root)
    except ToolMissing as exc:
        if "CI" in os.environ:
            raise
        pytest.skip(str(exc))


@pytest.mark.parametrize("check", check_deploy.CHECKS, ids=lambda check: check.__name__)
def test_the_project_passes(check: Callable[[Path], list[str]]) -> None:
    """Every check, on the files as they are."""
    assert problems_of(check, ROOT) == []


@pytest.mark.parametrize(
    ("check", "file", "sound", "broken", "words"), BROKEN, ids=[f"{case[1]}: {case[4]}" for case in BROKEN]
)
def test_a_broken_copy_is_found(
    check: Callable[[Path], list[str]], file: str, sound: str, broken: str, words: str, tmp_path: Path
) -> None:
    """One change of one file, and the problem names it."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    text = (root / file).read_text()
    if sound:
        assert sound in text, "the test no longer knows the file"
        (root / file).write_text(text.replace(sound, broken))
    else:  # only the first case of the tests stays
        (root / file).write_text(text[: text.index("\n  - name:", text.index("- name:"))])
    problems = problems_of(check, root)
    assert any(words in problem for problem in problems), problems


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a developer without it knows why a check was left out."""
    monkeypatch.setattr(check_deploy, "_which", lambda name: None)
    with pytest.raises(ToolMissing, match="apt-get install prometheus"):
        check_deploy.check_prometheus(ROOT)


def test_a_missing_program_fails_in_ci_and_is_left_out_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing may look checked that was not."""

    def check_nothing(root: Path) -> Any:
        raise ToolMissing("promtool is not installed")

    monkeypatch.setattr(check_deploy, "CHECKS", (check_nothing,))
    monkeypatch.setattr(check_deploy, "PACKAGES", {})
    monkeypatch.delenv("CI", raising=False)
    assert check_deploy.main() == 0
    assert "nothing: not checked, promtool is not installed" in capsys.readouterr().out
    monkeypatch.setenv("CI", "true")
    assert check_deploy.main() == 1


def test_metrics_of_an_expression_are_told_from_its_functions_and_labels() -> None:
    """The names that a panel reads, and no others."""
    expression = (
        'sum by (law_id) (rate(a_total{choice="b_total"}[5m])) / on (x) group_left (y) votes:c:max > bool 1e3 or d'
    )
    assert check_deploy.metrics_in(expression) == {"a_total", "votes:c:max", "d"}


def test_a_missing_program_is_installed_by_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Debian packages of the missing ones, each once; and by nobody else."""
    asked: list[list[str]] = []
    monkeypatch.setattr(check_deploy, "_which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(local_services, "install", asked.append)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_deploy.install_programs(check_deploy.PACKAGES)
    assert asked == [["docker-compose", "prometheus", "prometheus-alertmanager"]]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_deploy.install_programs(check_deploy.PACKAGES)
    assert len(asked) == 1
