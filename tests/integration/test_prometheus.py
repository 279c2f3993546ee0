"""A real Prometheus with the project's own configuration, two real replicas and a real broker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import check_deploy, local_services
from scripts.check_deploy import ToolMissing
from scripts.local_services import LocalServices
from test_publisher import Publisher, make_messages, totals_of
from tests.harness import ROOT, Queue, Results, Service, wait_settled, wait_until

RANGE = "10s"  # in the place of every range of a rule or a panel: a test cannot wait for minutes


class Prometheus:
    """The server, with the project's configuration but for addresses and durations, on a free port."""

    def __init__(self, directory: Path, targets: dict[str, list[str]], queue: str) -> None:
        """``targets`` are the addresses of each job; ``queue`` is the one that the rules are to watch."""
        self.directory = directory
        self.log = directory / "prometheus.log"
        self._targets = targets
        self._queue = queue
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        configuration = yaml.safe_load((ROOT / "prometheus.yml").read_text())
        configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        del configuration["alerting"]
        for job in configuration["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": self._targets.get(job["job_name"], [])}]
        rules = self.directory / "deploy/prometheus"
        rules.mkdir(parents=True)
        for file in (ROOT / "deploy/prometheus").glob("*.rules.yml"):
            text = file.read_text().replace("votes.aggregation", self._queue)
            (rules / file.name).write_text(re.sub(r"for: \w+", "for: 1s", shorten(text)))
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        command = [check_deploy._program("prometheus"), f"--config.file={self.directory}/prometheus.yml"]
        command += [f"--storage.tsdb.path={self.directory}/data", "--web.listen-address=127.0.0.1:0"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        wait_until(self._is_ready, "Prometheus is ready")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text()[-2000:]
        return re.search(r"Server is ready to receive", self.log.read_text()) is not None

    def api(self, path: str, **parameters: str) -> Any:
        found = re.search(r'msg="Listening on" address=(\S+)', self.log.read_text())
        assert found, self.log.read_text()
        url = f"http://{found[1]}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.api("query", query=expression)["result"]
        return result

    def value(self, expression: str) -> float | None:
        result = self.query(expression)
        return float(result[0]["value"][1]) if result else None

    def alert_state(self, name: str) -> str | None:
        states = {alert["labels"]["alertname"]: alert["state"] for alert in self.api("alerts")["alerts"]}
        return states.get(name)


def shorten(expression: str) -> str:
    """With a range of ten seconds in the place of each range."""
    return re.sub(r"\[(\w+|\$__rate_interval)\]", f"[{RANGE}]", expression)


@pytest.fixture(scope="module")
def broker_metrics(services: LocalServices) -> Iterator[str]:
    """The address at which the broker's prometheus plugin answers."""
    broker = services.rabbitmq
    port = local_services._free_ports(1)[0]
    listener = f'[{{port, {port}}}, {{ip, "127.0.0.1"}}]'
    broker.ctl("eval", f"application:set_env(rabbitmq_prometheus, tcp_config, {listener}, [{{persistent, true}}]).")
    set_plugins(services, "enable", "rabbitmq_prometheus")
    yield f"127.0.0.1:{port}"
    set_plugins(services, "disable", "rabbitmq_prometheus")  # and no other: the management API is for other tests


def set_plugins(services: LocalServices, *arguments: str) -> None:
    command = [str(local_services._find_rabbitmq() / "rabbitmq-plugins"), "--quiet", *arguments]
    local_services._run(command, services.rabbitmq._environment(), timeout=60)


@pytest.fixture
def start_prometheus(
    broker_metrics: str, queue: Queue, tmp_path: Path
) -> Iterator[Callable[[list[Service]], Prometheus]]:
    """Starts a Prometheus that watches these replicas and the broker; it is ended with the test."""
    started: list[Prometheus] = []

    def start(replicas: list[Service]) -> Prometheus:
        try:
            check_deploy._program("prometheus")
        except ToolMissing as exc:
            if "CI" in os.environ:
                raise
            pytest.skip(str(exc))
        (tmp_path / "prometheus").mkdir()
        targets = {"aggregator": [f"127.0.0.1:{replica.port}" for replica in replicas]}
        targets |= {"rabbitmq": [broker_metrics], "rabbitmq-queues": [broker_metrics]}
        prometheus = Prometheus(tmp_path / "prometheus", targets, queue.name)
        started.append(prometheus)
        prometheus.start()
        return prometheus

    yield start
    for prometheus in started:
        prometheus.close()


def test_prometheus_reads_what_was_counted_and_fires_when_votes_stall(
    services: LocalServices,
    start_service: Callable[..., Service],
    start_prometheus: Callable[[list[Service]], Prometheus],
    queue: Queue,
    results: Results,
) -> None:
    """The sum of what each replica counted is what was published; the totals are the table's; no alert is false."""
    replicas = [start_service(RECONCILE_SECONDS="0.5") for _ in range(2)]
    prometheus = start_prometheus(replicas)
    wait_until(lambda: prometheus.value('sum(up{job="aggregator"})') == 2, "both replicas are scraped")
    wait_until(lambda: prometheus.value("votes:queue_consumers:max") == 2, "both consume")

    messages = list(make_messages(2_000, 3, 11, 20, 5))
    half = len(messages) // 2
    for part in (messages[:half], messages[half:]):  # a rate needs a change between two scrapes
        Publisher([queue.url], queue.name).publish(part)
        wait_settled(services, queue)
        wait_until(lambda: prometheus.value("sum(votes_aggregated_total)") == results.counted(), "it is scraped")

    assert results.counted() == sum(sum(pair) for pair in totals_of(messages).values())
    for law_id, counts in results.totals().items():
        for choice, count in zip(("oui", "non"), counts, strict=True):
            assert prometheus.value(f'max(current_vote_totals{{law_id="{law_id}",choice="{choice}"}})') == count
    results.query("INSERT INTO laws (law_id, title, status) VALUES ('law-009', 'Nine', 'closed')")
    results.certify("law-009")
    moment = results.value("SELECT extract(epoch FROM certified_at)::float8 FROM certified_results")
    certified = 'max(law_certified_timestamp_seconds{law_id="law-009"})'
    wait_until(lambda: prometheus.value(certified) == moment, "the certificate is scraped")
    check_names_and_panels(prometheus)
    # neither votes wait nor is a server away; unreadable messages and late votes may well be reported
    for alert in (
        "VotesStalled",
        "QueueWithoutConsumers",
        "VoteAggregatorAbsent",
        "DatabaseLost",
        "BrokerLost",
        "TotalsDiffer",
    ):
        assert prometheus.alert_state(alert) is None

    for replica in replicas:
        assert replica.stop() == 0
    Publisher([queue.url], queue.name).publish(make_messages(50, 3, 12, 0, 0))
    wait_until(lambda: prometheus.alert_state("VotesStalled") == "firing", "the alert on stalled votes fires", 60)
    for alert in ("QueueWithoutConsumers", "VoteAggregatorAbsent", "VoteAggregatorDown"):
        wait_until(lambda name=alert: prometheus.alert_state(name) == "firing", f"{alert} fires", 60)


def check_names_and_panels(prometheus: Prometheus) -> None:
    """Every metric of a rule or a panel has been scraped or recorded, and every panel shows something."""
    names = set(prometheus.api("label/__name__/values"))
    assert names >= check_deploy.BROKER_METRICS
    rules = check_deploy._rules(ROOT, "expr")
    for rule in rules:
        assert check_deploy.metrics_in(rule["expr"]) - check_deploy.EXPORTER_METRICS <= names, rule
    for dashboard in (ROOT / "deploy/grafana/dashboards").glob("*.json"):
        for panel, expression in check_deploy.expressions(dashboard):
            assert check_deploy.metrics_in(expression) <= names, (panel, expression)
            assert prometheus.query(shorten(expression)), (panel, expression)
        for annotation, expression in check_deploy.annotation_expressions(dashboard):
            assert check_deploy.metrics_in(expression) <= names, (annotation, expression)
            if "started" in annotation or "Certificates" in annotation:
                assert prometheus.query(expression), expression
