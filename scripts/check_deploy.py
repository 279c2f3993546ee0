"""Each file of the deployment, read by the tool that reads it in real life: a part of `make lint`.

Programs that come from Debian (docker-compose, promtool, amtool) are installed where they are missing, if this is run
as root where apt-get is. Elsewhere their checks are left out with a reason, or fail where CI is set. The other tools
are packages in .venv.

Exit codes: 0 all that could be checked is right, 1 something is wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml
from prometheus_client.parser import text_string_to_metric_families

from observability import Health, Metrics, MetricsServer
from scripts import local_services

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "docker-compose": "docker-compose",
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "amtool": "prometheus-alertmanager",
}
PROFILES: tuple[list[str], ...] = ([], ["alerting"], ["exporters"], ["alerting", "exporters"])
PASSWORDS = (
    "POSTGRES_PASSWORD",
    "POSTGRES_OWNER_PASSWORD",
    "RABBITMQ_PASSWORD",
    "RABBITMQ_PUBLISHER_PASSWORD",
    "GRAFANA_PASSWORD",
)
KUBERNETES = "1.33"
HARD_EXIT_SECONDS = 5  # what the service takes beyond SHUTDOWN_TIMEOUT_SECONDS at most
NOT_METRICS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}


class ToolMissing(Exception):
    """A program that a check needs is not installed."""


def main() -> int:
    """Run every check, print what is wrong and return the exit code."""
    install_programs(PACKAGES)
    wrong = 0
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            problems = check(ROOT)
        except ToolMissing as exc:
            if "CI" not in os.environ:
                print(f"{name}: not checked, {exc}")
                continue
            problems = [str(exc)]
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
        wrong += len(problems)
    if not wrong:
        print("deployment files: all checks passed")
    return 1 if wrong else 0


def install_programs(packages: Mapping[str, str]) -> None:
    """Install the Debian packages of the programs (program: package) that are missing, where that can be done."""
    missing = sorted({package for program, package in packages.items() if not _which(program)})
    if missing and os.geteuid() == 0 and _which("apt-get"):
        try:
            local_services.install(missing)
        except local_services.LocalServicesError as exc:
            print(exc, file=sys.stderr)


# --- containers ------------------------------------------------------------------------------------------------------


def check_dockerfile(root: Path) -> list[str]:
    """Hadolint, and what it does not know: the user is a number, and the entrypoint gets signals itself."""
    text = (root / "Dockerfile").read_text()
    problems = _failure(_python_tool("hadolint"), root / "Dockerfile")
    if not re.search(r"^USER \d+$", text, re.M):
        problems.append("the service does not run as a user of its own with a fixed uid")
    if not re.search(r"^ENTRYPOINT \[", text, re.M):
        problems.append("ENTRYPOINT is not in exec form, so SIGTERM does not reach the service")
    if "HEALTHCHECK" not in text:
        problems.append("there is no HEALTHCHECK")
    return problems


def check_compose(root: Path) -> list[str]:
    """The Compose schema, Compose's own reading with each profile, each missing password, and our own rules."""
    file = root / "docker-compose.yml"
    problems = _failure(_python_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)
    if problems:
        return problems
    for profiles in PROFILES:
        problems += _compose(root, profiles, dict.fromkeys(PASSWORDS, "secret"))
    for name in PASSWORDS:
        if not _compose(root, [], dict.fromkeys(PASSWORDS, "secret") | {name: ""}):
            problems.append(f"Compose does not miss {name}")
    return problems + list(_compose_problems(yaml.safe_load(file.read_text()), root))


def _compose(root: Path, profiles: list[str], variables: Mapping[str, str]) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".env") as env:  # not the .env of whoever runs this
        env.writelines(f"{name}={value}\n" for name, value in variables.items())
        env.flush()
        chosen = [word for profile in profiles for word in ("--profile", profile)]
        command = [_program("docker-compose"), "--project-directory", root, "--file", root / "docker-compose.yml"]
        command += ["--env-file", env.name, *chosen, "config", "--quiet"]
        return _failure(*command, env={"PATH": os.environ["PATH"]})


def _compose_problems(compose: dict[str, Any], root: Path) -> Iterator[str]:
    services: dict[str, dict[str, Any]] = compose["services"]
    aggregator = services["aggregator"]
    if "container_name" in aggregator:
        yield "aggregator has a container_name, so it cannot be scaled"
    for port in aggregator.get("ports", []):
        if not re.fullmatch(r"127\.0\.0\.1::\d+", port):
            yield f"aggregator has the fixed port {port}, so it cannot be scaled"
    for name, service in services.items():
        image = service["image"]
        if not re.search(r":v?\d", image):
            yield f"{name}: the image {image} has no version"
        for network in set(service["networks"]) - compose["networks"].keys():
            yield f"{name}: there is no network {network}"
        for port in service.get("ports", []):
            if not port.startswith("127.0.0.1:"):
                yield f"{name}: the port {port} is open to the network"
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASS(WORD)?$", variable) and not str(value).startswith("${"):
                yield f"{name}: {variable} is written into the file"
        for volume in service.get("volumes", []):
            if volume.startswith("./") and not (root / volume.split(":")[0]).exists():
                yield f"{name}: {volume.split(':')[0]} does not exist"
    hardening = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    for key, value in hardening.items():
        if aggregator.get(key) != value:
            yield f"aggregator: {key} is not {value}"
    if "mem_limit" not in aggregator:
        yield "aggregator has no memory limit"
    shutdown = int(re.findall(r"\d+", aggregator["environment"]["SHUTDOWN_TIMEOUT_SECONDS"])[-1])
    grace = int(aggregator["stop_grace_period"].removesuffix("s"))
    if grace <= shutdown + HARD_EXIT_SECONDS - 1:
        yield f"stop_grace_period {grace} s is not above SHUTDOWN_TIMEOUT_SECONDS {shutdown} and its last resort"
    shared = set(aggregator["networks"]) & set(services["prometheus"]["networks"])
    if len(shared) != 1:
        yield f"aggregator and prometheus share {len(shared)} networks: each replica would be scraped once for each"


# --- Prometheus, Alertmanager, Grafana -------------------------------------------------------------------------------


def check_prometheus(root: Path) -> list[str]:
    """The configuration, the rules and their unit tests by promtool; each alert is explained and tested."""
    promtool = _program("promtool")
    problems = _failure(promtool, "check", "config", root / "prometheus.yml")
    problems += _failure(promtool, "check", "rules", *_rule_files(root))
    tests = sorted((root / "deploy/prometheus/tests").glob("*.test.yml"))
    problems += _failure(promtool, "test", "rules", *tests)
    return problems or list(_alert_problems(root, tests))


def _alert_problems(root: Path, tests: list[Path]) -> Iterator[str]:
    fires: set[str] = set()
    silent: set[str] = set()
    for test in (test for file in tests for test in yaml.safe_load(file.read_text())["tests"]):
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    for alert in _rules(root, "alert"):
        name = alert["alert"]
        if "severity" not in alert["labels"]:
            yield f"{name} has no severity"
        missing = {"summary", "description", "runbook_url"} - alert["annotations"].keys()
        if missing:
            yield f"{name} has no {', '.join(sorted(missing))}"
            continue
        target, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        if not (root / target).is_file() or anchor not in _anchors(root / target):
            yield f"{name} links to {target}#{anchor}, which does not exist"
        if name not in fires:
            yield f"{name} has no test in which it fires"
        if name not in silent:
            yield f"{name} has no test in which it is silent"


def check_alertmanager(root: Path) -> list[str]:
    """The configuration, by amtool."""
    return _failure(_program("amtool"), "check-config", root / "deploy/alertmanager/alertmanager.yml")


def check_dashboards(root: Path) -> list[str]:
    """Each panel has the provisioned datasource, an expression that promtool parses, and metrics that exist."""
    sources = yaml.safe_load((root / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = sources["datasources"][0]["uid"]
    known = service_metrics() | {rule["record"] for rule in _rules(root, "record")}
    problems = []
    for file in sorted((root / "deploy/grafana/dashboards").glob("*.json")):
        for panel, expression in expressions(file):
            where = f"{file.name}, panel {panel!r}"
            problems += [f"{where}: {problem}" for problem in _parse(expression)]
            problems += [
                f"{where}: no metric is called {name}"
                for name in sorted(metrics_in(expression))
                if name not in known and not name.startswith("rabbitmq_") and name != "up"
            ]
            if re.search(r"\bsum\b(\s+(by|without)\s*\([^)]*\))?\s*\(\s*current_vote_totals", expression):
                problems.append(f"{where}: sums totals over replicas, of which each shows the whole")
        for panel in json.loads(file.read_text())["panels"]:
            if panel["type"] != "row" and panel["datasource"]["uid"] != uid:
                problems.append(f"{file.name}, panel {panel['title']!r}: its datasource is not {uid}")
    return problems


def expressions(dashboard: Path) -> list[tuple[str, str]]:
    """The (title of the panel, expression) pairs of a dashboard, Grafana's own variables filled in."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "1m"))
        for panel in json.loads(dashboard.read_text())["panels"]
        for target in panel.get("targets", [])
    ]


def metrics_in(expression: str) -> set[str]:
    """The names of the metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    names = re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)
    return {name for name in names if name not in NOT_METRICS}


def service_metrics() -> set[str]:
    """The names of the samples and families that the service's /metrics shows, scraped over HTTP."""
    with MetricsServer(0, Metrics(), Health(60)) as server:
        server.open()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    names = {sample.name for family in families for sample in family.samples}
    for family in families:  # one whose labels have no value yet has no sample
        names |= {family.name + ("_total" if family.type == "counter" else "")}
    return names


def _parse(expression: str) -> list[str]:
    """What promtool says against an expression, as that of a rule."""
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        json.dump({"groups": [{"name": "panel", "rules": [{"record": "x", "expr": expression}]}]}, file)
        file.flush()
        return _failure(_program("promtool"), "check", "rules", file.name)


def _rule_files(root: Path) -> list[Path]:
    return sorted((root / "deploy/prometheus").glob("*.rules.yml"))


def _rules(root: Path, kind: str) -> list[dict[str, Any]]:
    groups = [group for file in _rule_files(root) for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def check_kubernetes(root: Path) -> list[str]:
    """Each manifest against the schema of its kind; KEDA's, which Kubernetes does not have, against one of ours."""
    keda = json.loads((root / "scripts/keda.schema.json").read_text())
    problems = []
    for file in sorted((root / "deploy/kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(file.read_text()):
            try:
                if manifest["apiVersion"].startswith("keda.sh/"):
                    jsonschema.validate(manifest, keda)
                else:
                    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as exc:
                problems.append(f"{file.name}, {manifest['kind']}: {exc.message}")
            except kubernetes_validate.SchemaNotFoundError:
                problems.append(f"{file.name}: Kubernetes {KUBERNETES} has no kind {manifest['kind']}")
    return problems


# --- documents -------------------------------------------------------------------------------------------------------


def check_links(root: Path) -> list[str]:
    """Each link of a Markdown file to another file, or to a heading, has its target."""
    problems = []
    for page in [*root.glob("*.md"), *(root / "docs").rglob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                problems.append(f"{page.relative_to(root)}: {link} does not exist")
            elif anchor and anchor not in _anchors(target):
                problems.append(f"{page.relative_to(root)}: {link} names no heading")
    return problems


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code forges make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- running a tool --------------------------------------------------------------------------------------------------


def _failure(*command: Any, env: Mapping[str, str] | None = None) -> list[str]:
    """Run a program; where it fails, what it says, as one problem."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    if done.returncode == 0:
        return []
    return [f"{Path(words[0]).name} fails:\n{(done.stdout + done.stderr).strip()}"]


def _python_tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _program(name: str) -> str:
    found = _which(name)
    if found is None:
        raise ToolMissing(f"{name} is not installed; on Debian and Ubuntu, as root: apt-get install {PACKAGES[name]}")
    return found


def _which(name: str) -> str | None:
    return shutil.which(name, path=local_services.SEARCH_PATH)


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_dockerfile,
    check_compose,
    check_prometheus,
    check_alertmanager,
    check_dashboards,
    check_kubernetes,
    check_links,
)

if __name__ == "__main__":
    sys.exit(main())
