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

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".local", ".env", ".secrets", "__pycache__", ".*_cache", ".hypothesis"
)

DOCKERFILE, COMPOSE, ALERTS, RECORDS, ALERT_TESTS, VOTES, DEPLOYMENT, SCALER, RUNBOOK = (
    "Dockerfile",
    "docker-compose.yml",
    "deploy/prometheus/alerts.rules.yml",
    "deploy/prometheus/recording.rules.yml",
    "deploy/prometheus/tests/alerts.test.yml",
    "deploy/grafana/dashboards/votes.json",
    "deploy/kubernetes/deployment.yaml",
    "deploy/kubernetes/scaledobject.yaml",
    "docs/RUNBOOK.md",
)

UNIT, WORKFLOW = "deploy/systemd/vote-aggregator.service", ".github/workflows/ci.yml"
SCHEMA = "docs/vote.schema.json"
POLICIES = "deploy/kubernetes/networkpolicy.yaml"

# of each check: in which file what is changed into what, and words of the problem that this is
BROKEN: dict[Callable[[Path], list[str]], list[tuple[str, str, str, str]]] = {
    check_deploy.check_dockerfile: [
        (DOCKERFILE, "python:3.11-slim\n\nLABEL", "python:latest\n\nLABEL", "DL3007"),
        (DOCKERFILE, "USER 10001", "USER root", "user of its own"),
        (DOCKERFILE, "USER 10001", "", "user of its own"),
        (DOCKERFILE, '["python", "aggregator.py"]', "python aggregator.py", "exec form"),
        (DOCKERFILE, "HEALTHCHECK", "# HEALTHCHECK", "HEALTHCHECK"),
        (DOCKERFILE, "org.opencontainers.image.licenses", "licence", "label licenses"),
    ],
    check_deploy.check_compose: [
        ("deploy/rabbitmq/definitions.sh", "cat <<END", "cat <<END (", "syntax error"),
        (COMPOSE, "x-service: &service\n", "x-service: &service\n  build: .\n", "two services build one image"),
        (COMPOSE, "      aggregator:\n        condition: service_started", "      #", "before its image is built"),
        (COMPOSE, "services:\n", 'version: "3"\nservices:\n', "version"),
        (COMPOSE, "    hostname: rabbitmq", "    #", "hostname"),
        (COMPOSE, "cap_drop: [ALL]", "cap_dorp: [ALL]", "cap_dorp"),
        (COMPOSE, "read_only: true", "read_only: false", "read_only"),
        (COMPOSE, "mem_limit: 256m", "", "memory limit"),
        (COMPOSE, "mem_limit: ${POSTGRES_MEMORY:-2g}", "", "memory limit"),
        (COMPOSE, "max-size:", "mode:", "no end"),
        (COMPOSE, "mem_limit: 1g\n    logging: *logging", "mem_limit: 1g", "no end"),
        (COMPOSE, "/tmp:size=16m", "/tmp", "without a size"),
        (COMPOSE, "networks: [database]\n", "networks: [nowhere]\n", "nowhere"),
        (COMPOSE, "      prometheus:\n        cond", "      promotheus:\n        cond", "promotheus"),
        (COMPOSE, "condition: service_healthy", "condition: service_started", "to be healthy"),
        (COMPOSE, "127.0.0.1:${METRICS_PORTS:-8001-8010}:8001", "127.0.0.1:8001:8001", "cannot be scaled"),
        (COMPOSE, "${METRICS_PORTS:-8001-8010}", "${METRICS_PORT:-8001}", "cannot be scaled"),
        (
            COMPOSE,
            '"127.0.0.1:${METRICS_PORTS:-8001-8010}:8001"',
            "{target: 8001, published: 8001, host_ip: 127.0.0.1}",
            "cannot be scaled",
        ),
        (COMPOSE, "<<: *service", "<<: *service\n    container_name: aggregator", "container_name"),
        (COMPOSE, "_PASSWORD__FILE: /run/secrets/grafana_password", "_PASSWORD: admin", "hand it over in a file"),
        (COMPOSE, "DATA_SOURCE_PASS_FILE", "DATA_SOURCE_PASS", "hand it over in a file"),
        (COMPOSE, "    secrets: [grafana_password]\n", "", "none of its secrets"),
        (COMPOSE, "/run/secrets/grafana_password", "/run/secrets/grafana", "none of its secrets"),
        (COMPOSE, "-./.secrets/grafana_password", "-./.secrets/grafana", "by default ./.secrets/grafana_password"),
        (COMPOSE, "secrets:\n  rabbitmq_password:", "secrets:\n  x:\n    file: ./x\n  rabbitmq_password:", "to nobody"),
        (".env.example", "GRAFANA_PASSWORD_FILE=", "GRAFANA_PASSWORD=", "does not name GRAFANA_PASSWORD_FILE"),
        (COMPOSE, "RABBITMQ_HOST: rabbitmq", "AMQP_URL: amqp://votes:secret@rabbitmq/", "holds a password"),
        (COMPOSE, "BATCH_SIZE: ", "BATCHSIZE: ", "no setting is called BATCHSIZE"),
        (COMPOSE, "rabbitmq:4.1-management", "rabbitmq:latest", "no version"),
        (COMPOSE, '"127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"', '"9090:9090"', "open to the network"),
        (COMPOSE, "stop_grace_period: 30s", "stop_grace_period: 20s", "grace"),
        (COMPOSE, "healthcheck:", "x-healthcheck:", "health check"),
        (COMPOSE, "./deploy/postgres/roles.sql", "./deploy/postgres/rules.sql", "does not exist"),
        (COMPOSE, "networks: [database, broker, monitoring]", "networks: [database, broker]", "share 0 networks"),
    ],
    check_deploy.check_prometheus: [
        ("prometheus.yml", "dns_sd_configs", "dns_configs", "dns_configs"),
        ("prometheus.yml", "type: A", "type: SRV", "replicas are not found"),
        ("prometheus.yml", "names: [aggregator]", "names: [agregator]", "no service agregator"),
        ("prometheus.yml", "port: 8001", "port: 8002", "no metrics at 8002"),
        (RECORDS, "expr: max(", "expr: max((", "promtool"),
        (
            RECORDS,
            "max by (law_id, choice) (current",
            "sum by (law_id, choice) (current",
            "each replica shows the whole",
        ),
        (RECORDS, "sum(up{", "sum(upp{", "no metric is called upp"),
        (ALERTS, "broker_connected ==", "x ==", "BrokerLost"),
        (ALERTS, "> 0\n          unless", "> 0 #", "Stalled"),
        (ALERTS, "          severity: warning", "          level: warning", "severity"),
        (ALERTS, "#voteaggregatordown", "#voteaggregatorabsent", "runbook"),
        (RUNBOOK, "## BrokerLost", "## Something", "does not exist"),
        (ALERT_TESTS, "", "", "no test"),
    ],
    check_deploy.check_alertmanager: [
        ("deploy/alertmanager/alertmanager.yml", "receiver: operators", "receiver: nobody", "nobody"),
    ],
    check_deploy.check_dashboards: [
        ("deploy/grafana/provisioning/dashboards/votes.yml", "/etc/grafana", "/var/grafana", "mounts no dashboards"),
        (VOTES, '"uid": "votes"', '"uid": "votes-health"', "one uid"),
        (VOTES, "sum by (reason)", "sum by reason", "parse"),
        (VOTES, "votes_in_flight", "votes_on_air", "on_air"),
        (VOTES, "newest_seal_age_seconds", "newest_seal_old", "no metric is called newest_seal_old"),
        (VOTES, "votes:queue_ready:max", "rabbitmq_queue_dept", "no metric is called rabbitmq_queue_dept"),
        (VOTES, '"uid": "${datasource}"', '"uid": "prometheus"', "datasource"),
        (VOTES, '"value": "prometheus"', '"value": "x"', "begins with"),
        (VOTES, "label_values(votes:current_total:max, law_id)", "label_values(laws, law_id)", "no labels of a metric"),
        (VOTES, '"multi": true', '"multi": false', "one of several"),
        (VOTES, '"name": "law"', '"name": "bill"', "$law is used and no variable"),
        (VOTES, '"name": "law"', '"name": "bill"', "variable 'bill' is used nowhere"),
        (VOTES, 'sum(votes:current_total:max{law_id=~\\"$law\\"})', "sum(votes:current_total:max)", "chosen by $law"),
        (VOTES, 'timestamp_seconds{law_id=~\\"$law\\"}', "timestamp_seconds", "chosen by $law"),
        (VOTES, 'sum(votes_in_flight{instance=~\\"$instance\\"})', "sum(votes_in_flight)", "chosen by $instance"),
        (VOTES, '"useValueForTime": true', '"useValueForTime": "yes"', "no bool"),
        (VOTES, '"titleFormat"', '"titelFormat"', "titelFormat"),
        (VOTES, '"links": [', '"links": [], "x": [', "no link to"),
        (VOTES, '"type": "bargauge"', '"type": "bargraph"', "no panel bargraph"),
        (VOTES, '"unit": "cps"', '"unit": "votes"', "no unit votes"),
        (VOTES, '"displayMode": "basic"', '"displaymode": "basic"', "displaymode"),
        (VOTES, "sum(votes:current_total:max", "sum(current_vote_totals", "each replica shows the whole"),
        (VOTES, "sum(votes:current_total:max", "sum by (law_id) (1 * current_vote_totals", "shows the whole"),
    ],
    check_deploy.check_kubernetes: [
        (POLICIES, "vote-sealer\n  policyTypes", "vote-seller\n  policyTypes", "the pods of vote-sealer may reach"),
        (
            POLICIES,
            "policyTypes: [Ingress, Egress]\n  egress",
            "policyTypes: [Ingress]\n  egress",
            "vote-sealer may reach",
        ),
        (DEPLOYMENT, "replicas: 2", 'replicas: "two"', "two"),
        (DEPLOYMENT, "livenessProbe", "liveProbe", "liveProbe"),
        (DEPLOYMENT, "kind: Deployment", "kind: Deploymnt", "no kind Deploymnt"),
        (DEPLOYMENT, "kind: Deployment", "", "no kind None"),
        (DEPLOYMENT, "path: /readyz", "path: /healthz", "readinessProbe"),
        (DEPLOYMENT, "GracePeriodSeconds: 30", "GracePeriodSeconds: 20", "terminationGracePeriodSeconds"),
        (DEPLOYMENT, "key: AMQP_URL", "key: AMQP", "Secret"),
        (SCALER, "queueName", "queue", "queue"),
        (SCALER, "kind: ScaledObject", "kind: ScaledJob", "ScaledJob"),
        ("deploy/kubernetes/service.yaml", "selector:\n    app", "selector:\n    application", "Service selects"),
        ("deploy/kubernetes/configmap.yaml", "BATCH_SIZE:", "BATCHSIZE:", "no setting is called BATCHSIZE"),
        ("deploy/kubernetes/configmap.yaml", 'BATCH_SIZE: "100"', 'BATCH_SIZE: "0"', "BATCH_SIZE"),
    ],
    check_deploy.check_systemd: [
        (UNIT, "ExecStart=", "ExecStrat=", "ExecStrat"),
        (UNIT, "DynamicUser=yes\nProtectSystem=strict\nProtectHome=yes\nPrivateTmp=yes\n", "", "security"),
        (UNIT, "RestartPreventExitStatus=2", "", "not started again"),
        (UNIT, "WorkingDirectory=/", "WorkingDirectory=/opt/vote-aggregator", "which it may not read"),
    ],
    check_deploy.check_workflows: [
        (WORKFLOW, "runs-on:", "run-on:", "run-on"),
        (WORKFLOW, ".ci/run", "make test", "no workflow"),
        (
            ".github/dependabot.yml",
            "package-ecosystem: npm",
            "package-ecosystem: nmp",
            "nmp",
        ),
    ],
    check_deploy.check_message_schema: [
        (SCHEMA, '"type": "number"', '"type": "numbr"', "numbr"),
        (SCHEMA, '"choice": "non"', '"choice": "nein"', "'nein' is not one of"),
    ],
    check_deploy.check_documents: [
        ("README.md", "(docs/MESSAGE_FORMAT.md)", "(docs/FORMAT.md)", "docs/FORMAT.md"),
        ("README.md", "(docs/MESSAGE_FORMAT.md)", '(docs/FORMAT.md "votes")', "docs/FORMAT.md"),
        ("README.md", "[LICENSE](LICENSE)", "[LICENSE][l]\n\n[l]: LICENCE", "LICENCE"),
        (RUNBOOK, "(#databaselost)", "(#databasegone)", "names no heading"),
        (RUNBOOK, "`deploy/postgres/roles.sql`", "`deploy/postgres/rules.sql`", "rules.sql"),
        (RUNBOOK, "`make check-db`", "`make check-database`", "no make check-database"),
    ],
}
CASES = [(check, *case) for check, cases in BROKEN.items() for case in cases]


def problems_of(check: Callable[[Path], list[str]], root: Path) -> list[str]:
    """What the check finds; the test is skipped where a program is missing, but not in CI."""
    try:
        return check(root)
    except ToolMissing as exc:
        if "CI" in os.environ:
            raise
        pytest.skip(str(exc))


def test_every_check_has_a_broken_copy() -> None:
    """A check that nobody has seen fail proves nothing."""
    assert BROKEN.keys() == set(check_deploy.CHECKS)


@pytest.mark.parametrize("check", check_deploy.CHECKS, ids=lambda check: check.__name__)
def test_the_project_passes(check: Callable[[Path], list[str]]) -> None:
    """Every check, on the files as they are."""
    assert problems_of(check, ROOT) == []


@pytest.mark.parametrize(
    ("check", "file", "sound", "broken", "words"), CASES, ids=[f"{case[1]}: {case[4]}" for case in CASES]
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


def test_a_metric_that_only_the_unit_test_of_its_alert_has_is_found(tmp_path: Path) -> None:
    """promtool is content with it."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    for file in (ALERTS, ALERT_TESTS):
        text = (root / file).read_text()
        (root / file).write_text(text.replace("rabbitmq_alarms_memory", "rabbit_alarms_memory"))
    problems = problems_of(check_deploy.check_prometheus, root)
    assert problems == ["RabbitMQMemoryAlarm: no metric is called rabbit_alarms_memory_used_watermark"]


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
    assert asked == [["bash", "docker-compose", "prometheus", "prometheus-alertmanager", "systemd"]]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_deploy.install_programs(check_deploy.PACKAGES)
    assert len(asked) == 1
